"""Many short trainings side by side on one GPU, for when there is one for ten minutes only.

    python -m extras.gpu_run --data acdc --root DIR --out FOLDER --seconds 500 -- --fm none

For each seed, each number of labeled patients, VQ-Seg and `--supervised`: a process of its own
runs train.py, so that a crash of one leaves the others. A step of this small network keeps neither
the GPU nor a CPU core busy; several processes do. What stands after `--` goes to train.py.

FOLDER/NAME is a run, FOLDER/NAME.log what it printed. FOLDER/gpu.csv gets a line as each ends, in
an order that leaves whole seeds where the time is cut.
"""

import argparse
import csv
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from extras.compare import read_run

REPOSITORY = Path(__file__).resolve().parent.parent
SCORES = ["dice", "jaccard", "hd95", "asd", "best_step", "val_log"]
FIELDS = ["card", "labeled", "method", "seed", "steps", "seconds", "end", *SCORES]

class Job:
    """One training: VQ-Seg or the supervised baseline."""

    def __init__(self, seed: int, labeled: int, method: str, args: argparse.Namespace):
        self.about = {"labeled": labeled, "method": method, "seed": seed, "steps": args.steps}
        self.name = f"{method}-{labeled}-seed{seed}"
        self.run = args.out / self.name
        self.log = args.out / f"{self.name}.log"
        command = [sys.executable, "-u", REPOSITORY / "train.py", "--data", args.data, "--labeled",
                   labeled, "--seed", seed, "--steps", args.steps, "--out", self.run]
        command += ["--root", args.root] if args.root else []
        command += ["--supervised"] if method == "supervised" else []
        self.command = [str(part) for part in command + args.train_flags]

    def start(self, threads: int) -> None:
        self.began = time.perf_counter()
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=subprocess.STDOUT,
                                            env=environment)

    def result(self) -> dict:
        """A line of gpu.csv. Of a training that did not finish it has the validations alone."""
        line = self.about | {"seconds": round(time.perf_counter() - self.began)}
        status = self.process.returncode
        line["end"] = {None: "cut", 0: "finished"}.get(status, f"failed with status {status}")
        if status == 0:
            record = read_run(self.run)
            line["steps"] = json.loads(record.settings)["steps"]
            line |= {name: getattr(record, name) for name in SCORES}
        elif (self.run / "log.jsonl").exists():
            text = (self.run / "log.jsonl").read_text(encoding="utf-8")
            log = [json.loads(line) for line in text.splitlines()]
            line["val_log"] = json.dumps([record for record in log if "val_dice" in record])
        return line

def report(job: Job, table: Path, card: str) -> None:
    """Appends the line to gpu.csv and prints it."""
    line = {"card": card} | job.result()
    new = not table.exists()
    with open(table, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerow(line)
    last = job.log.read_text(encoding="utf-8").rstrip().split("\n")[-1]
    print(f"{job.name}: {line['end']} after {line['seconds']} s, Dice {line.get('dice')}; {last}",
          flush=True)

def work(jobs: list[Job], args: argparse.Namespace, card: str) -> None:
    """Runs so many jobs at a time until all have ended or the time is up."""
    began = time.perf_counter()
    threads = max(1, (os.cpu_count() or 1) // args.parallel)
    waiting = jobs.copy()
    running: list[Job] = []
    try:
        while (waiting or running) and time.perf_counter() - began < args.seconds:
            while waiting and len(running) < args.parallel:
                running.append(waiting.pop(0))
                running[-1].start(threads)
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                report(job, args.out / "gpu.csv", card)
            time.sleep(0.1)
    finally:  # at Ctrl-C too
        for job in running:
            job.process.kill()
            report(job, args.out / "gpu.csv", card)
        for job in waiting:
            print(f"{job.name}: not started")

def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Trainings side by side, within a time limit.")
    parser.add_argument("--data", default="acdc", help="as of train.py")
    parser.add_argument("--root", default="", help="as of train.py")
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("--steps", type=int, default=0, help="as of train.py")
    parser.add_argument("--labeled", type=int, nargs="+", default=[7, 3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--parallel", type=int, default=4, help="processes at a time")
    parser.add_argument("--seconds", type=float, default=540, help="then what still runs is ended")
    parser.add_argument("train_flags", nargs="*", help="after --: more flags of train.py")
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    order = itertools.product(args.seeds, args.labeled, ["vqseg", "supervised"])
    jobs = [Job(*which, args) for which in order]
    print(f"{len(jobs)} runs on {card}, {args.parallel} at a time, {args.seconds:.0f} s at most",
          flush=True)
    work(jobs, args, card)

if __name__ == "__main__":
    main()
