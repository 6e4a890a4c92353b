"""One table over runs, and the paired t-test of Appendix D.

    python -m extras.compare RUN_OR_CSV ... [--records FILE]
    python -m extras.compare RUN_OR_CSV ... --pairs "qpm default,base none" [--last]
    python -m extras.compare RUN_OR_CSV ... --sweep eps --figure FILE
    python -m extras.compare RUN_OR_CSV ... --gain FILE
    python -m extras.compare RUN_OR_CSV ... --curves "qpm none" --figure FILE

Runs that differ in nothing but the seed are a row of the table. A pair is two runs of the same
seed; the test, two-tailed, is on their validation Dice. The paper does not say what a pair is, and
does not correct for making many tests; beside p stands Holm's correction over the rows or pairs.
A run's Dice is that of its best validation: chosen on the volumes that it is measured on. `--last`
takes the last validation, where nothing is chosen.

Of a run config.json, log.jsonl and val.csv are read, and val-eps1.0.csv where `evaluate.py RUN
--eps 1` wrote it. `--records` writes what the table needs into one CSV, in place of the runs.
"""

import argparse
import csv
import json
import math
import zlib
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

import evaluate
from data import BadInput
from evaluate import METRICS, Row, class_means
from extras import plots
from extras.stats import holm, t_test

NEUTRAL = {"seed", "device", "root", "out", "resume"}  # do not change what is learned


class Record(NamedTuple):
    """What a table needs of a run: a line of results/*.csv."""

    run: str  # the name of its folder
    commit: str
    seed: int
    fm: str  # foundation model
    settings: str  # JSON, without NEUTRAL
    dice: float  # mean over validation volumes, then over classes; so the next three
    jaccard: float
    hd95: float
    asd: float
    empty: int  # how often nothing of a class was predicted that is there,
    scored: int  # out of so many classes of volumes
    utilization: float  # share of the codewords in use at the end of training; nan without codebook
    perplexity: float
    best_step: int  # of the teacher that is scored
    val_log: str  # JSON, the validations: [{"step": ..., "val_dice": ...}, ...]
    unit: str = "voxels"  # of hd95 and asd
    exchanged: float = math.nan  # Dice after `evaluate.py RUN --eps 1`, every token replaced

    @property
    def curve(self) -> dict[int, float]:
        """Validation Dice by step."""
        return {line["step"]: line["val_dice"] for line in json.loads(self.val_log)}

    @property
    def last(self) -> float:
        """Dice at the last step."""
        return list(self.curve.values())[-1]

    @property
    def name(self) -> str:
        """NAME of a run called NAME-SEED."""
        return self.run.rpartition("-")[0]


def read_run(run: Path) -> Record:
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    text = (run / "log.jsonl").read_text(encoding="utf-8")
    log = [json.loads(line) for line in text.splitlines()]
    rows, unit = read_rows(run / "val.csv")
    exchanged = math.nan
    if (run / "val-eps1.0.csv").exists():
        exchanged = round(class_means(read_rows(run / "val-eps1.0.csv")[0])["mean"][0], 5)
    settings = config["settings"] | {name: config[name] for name in ("processes", "precision")}
    settings["data"] = Path(settings["data"]).name  # sets/prepared/ and prepared are one
    if settings["data"] not in ("acdc", "phantom"):  # two sets of one name are two
        content = [config[name] for name in ("labels", "split", "eval_crop", "window", "volumes")]
        settings["data"] += f"-{zlib.crc32(json.dumps(content).encode()):08x}"
    learned = {name: value for name, value in settings.items() if name not in NEUTRAL}
    val_log = [line for line in log if "val_dice" in line]
    if val_log[-1]["step"] != settings["steps"]:
        raise ValueError("stopped before its last step")
    best = max(val_log, key=lambda line: line["val_dice"])
    usage = [(math.nan, math.nan)]  # where there is no codebook
    usage += [(line["used"], line["perplexity"]) for line in log if "used" in line]
    means = [round(value, 5) for value in class_means(rows)["mean"]]
    return Record(run.resolve().name, config["commit"], settings["seed"], config["fm"],
                  json.dumps(learned), *means, sum(row.empty for row in rows), len(rows),
                  *usage[-1], best["step"], json.dumps(val_log), unit, exchanged)


def read_rows(path: Path) -> tuple[list[Row], str]:
    """The lines of a CSV that evaluate.py writes, and the unit of its distances."""
    rows = []
    with open(path, newline="", encoding="utf-8") as file:
        lines = csv.DictReader(file)
        unit = "mm" if "hd95_mm" in lines.fieldnames else "voxels"
        for line in lines:
            x = {name.removesuffix(f"_{unit}"): value for name, value in line.items()}
            scores = [float(x[metric]) for metric in METRICS]
            rows.append(Row(x["case"], x["label"], *scores, empty=x["empty"] == "True"))
    return rows, unit


def read_records(path: Path) -> list[Record]:
    """The lines of a CSV of --records."""
    kinds = Record.__annotations__
    records = []
    with open(path, newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            record = Record(**{name: kinds[name](value) for name, value in line.items()})
            json.loads(record.settings)  # this and record.last raise where the line is damaged
            record.last
            records.append(record)
    if not records:
        raise ValueError("no lines")
    return records


def read_all(paths: list[Path]) -> list[Record]:
    """The records of run folders and CSVs. A line that several CSVs hold counts once."""
    runs = []
    lines = {}
    for path in paths:
        try:
            if path.suffix == ".csv":
                lines |= {str(record): record for record in read_records(path)}
            else:
                runs.append(read_run(path))
        except (OSError, ValueError, LookupError, TypeError) as error:
            kinds = "neither a finished run of train.py nor a CSV of --records"
            raise BadInput(f"{path}: {kinds} ({error!r}); finish it or leave it out") from None
    return [*lines.values(), *runs]


def paired(records: list[Record], more: list[str], less: list[str], last: bool = False) -> tuple:
    """Mean and std of the difference in Dice, p, and the number of pairs.

    A pair is the run more[i]-SEED and the run less[i]-SEED, for each i and each seed of both.
    """
    records = [record for record in records if record.name in more + less]
    dice = {(r.name, r.seed): r.last if last else r.dice for r in records}
    names = f"{' '.join(more)},{' '.join(less)}"
    if len(dice) < len(records):
        raise BadInput(f"--pairs {names}: two runs have the same name and seed; leave one out")
    if len(more) != len(less):
        raise BadInput(f"--pairs {names}: give as many names before the comma as after it")
    pairs = []
    for a, b in zip(more, less):
        seeds = [seed for name, seed in dice if name == a and (b, seed) in dice]
        pairs += [(dice[a, seed], dice[b, seed]) for seed in seeds]
    if not pairs:
        raise BadInput(f"--pairs {names}: no pair NAME-SEED; name runs that have a common seed")
    a, b = np.transpose(pairs)
    std = (a - b).std(ddof=1) if len(pairs) > 1 else math.nan
    return (a - b).mean(), std, t_test(a, b), len(pairs)


def by_settings(records: list[Record]) -> list[tuple[dict, dict[int, Record]]]:
    """The rows of a table: of the settings those in which rows differ, and the runs by seed."""
    groups: dict[str, dict[int, Record]] = {}
    for record in records:
        key = json.dumps([record.fm, json.loads(record.settings)], sort_keys=True)
        seeds = groups.setdefault(key, {})
        if record.seed in seeds:
            twin = seeds[record.seed].run
            raise BadInput(f"{record.run}: has the settings and the seed of {twin}; leave one out")
        seeds[record.seed] = record
    settings = [json.loads(key)[1] for key in groups]
    names = dict.fromkeys(name for s in settings for name in s)
    differ = [name for name in names if len({json.dumps(s.get(name)) for s in settings}) > 1]
    return [({k: s.get(k) for k in differ}, seeds) for s, seeds in zip(settings, groups.values())]


def table(records: list[Record]) -> list[list[str]]:
    """Head and rows: mean +- standard deviation over seeds, and p against the first row."""
    groups = by_settings(records)
    first = groups[0][1]
    p_values = []
    for _, seeds in groups:
        common = seeds.keys() & first.keys()
        p_values.append(t_test([seeds[k].dice for k in common], [first[k].dice for k in common]))
    unit = records[0].unit
    for record in records:
        if record.unit != unit:
            raise BadInput(f"{record.run}: has distances in {record.unit}, but {records[0].run} in "
                           f"{unit}; compare runs that have it in common")
    head = [*groups[0][0], "foundation model", "seeds", "Dice", "Jaccard", f"HD95 ({unit})",
            f"ASD ({unit})", "Dice at the last step", "codewords in use", "perplexity",
            "lost when all tokens are replaced", "empty predictions", "p against the first row"]
    rows = []
    for (differ, seeds), *tests in zip(groups, p_values, holm(p_values)):
        runs = list(seeds.values())
        row = [*map(str, differ.values()), runs[0].fm, " ".join(map(str, sorted(seeds)))]
        for name in (*METRICS, "last", "utilization"):
            row.append(mean_std([getattr(run, name) for run in runs]))
        row.append(mean_std([run.perplexity for run in runs], digits=0))
        row.append(mean_std([run.dice - run.exchanged for run in runs]))
        row.append(f"{sum(run.empty for run in runs)} of {sum(run.scored for run in runs)}")
        row += ["-" if math.isnan(p) else f"{p:.2g}" for p in tests]
        rows.append(row if len(groups) > 2 else row[:-1])
    return [[*head, "p by Holm"] if len(groups) > 2 else head, *rows]


def mean_std(values: list[float], digits: int = 4) -> str:
    mean = np.mean(values)
    if math.isnan(mean):
        return "-"
    spread = f" +- {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{spread}"


def run_command(args: argparse.Namespace) -> None:
    if bool(args.sweep) + bool(args.curves) != bool(args.figure):
        raise BadInput("--figure, and --sweep or --curves: give the file and what it shows")
    if args.last and not args.pairs:
        raise BadInput("--last: is for --pairs; the table has a column for it")
    for path in (args.figure, args.gain):
        if path and (path.suffix not in (".png", ".pdf", ".svg") or not path.parent.is_dir()):
            raise BadInput(f"{path}: must end in .png, .pdf or .svg, in a folder that exists")
    records = read_all(args.runs)
    tests = []
    for names in args.pairs:
        more, _, less = names.partition(",")
        tests.append(paired(records, more.split(), less.split(), args.last))
    for names, (mean, std, p, n), corrected in zip(args.pairs, tests, holm([t[2] for t in tests])):
        by_holm = f", {corrected:.2g} by Holm" if len(tests) > 1 else ""
        step = ", last step" if args.last else ""
        print(f"{names.replace(',', ' - ')}: {mean:+.4f} +- {std:.4f} "
              f"(n {n}, p {p:.2g}{by_holm}{step})")
    if not args.pairs:
        head, *rows = table(records)
        for line in [head, ["---"] * len(head), *rows]:
            print(f"| {' | '.join(line)} |")
    if args.sweep:
        plots.draw_sweep(by_settings(records), args.sweep, args.figure)
    if args.curves:
        plots.draw_curves(records, [names.split() for names in args.curves], args.figure)
    if args.gain:
        plots.draw_gain(by_settings(records), args.gain)
    if args.records:
        with open(args.records, "x", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([Record._fields, *records])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_OR_CSV",
                        help="run folder of train.py, or CSV of --records")
    parser.add_argument("--records", type=Path, help="write a line for each run into this CSV")
    parser.add_argument("--pairs", action="append", default=[], metavar='"A B,C D"',
                        help="no table, but the runs A-SEED and B-SEED against C-SEED and D-SEED")
    parser.add_argument("--last", action="store_true", help="with --pairs: Dice at the last step")
    parser.add_argument("--sweep", metavar="SETTING", help="setting for the x axis of --figure")
    parser.add_argument("--curves", action="append", default=[], metavar='"A B"',
                        help="a panel of --figure: Dice by step of the runs A-SEED and B-SEED")
    parser.add_argument("--figure", type=Path, help="draw --sweep or --curves into this file")
    parser.add_argument("--gain", type=Path, metavar="FILE", help="draw the gain by a perturbation "
                        "against how much each network needs its tokens")
    args = parser.parse_args()
    evaluate.command("extras.compare", partial(run_command, args), "allow it, or name another file")


if __name__ == "__main__":
    main()
