"""Training: the whole method in one plain loop.

    python train.py                                                     phantoms, 3 minutes on two CPU cores
    python train.py --data acdc --root DIR --labeled 7                  real cardiac MRI
    python train.py --data acdc --root DIR --labeled 7 --supervised     the baseline: labelled part only, same budget

Implements Sections 3.4 to 3.6 (student and EMA teacher, Eq. 7 to 12 in their order) and the settings of 4.2.
Names: l labelled, u unlabelled weak view, a unlabelled strong view; x image, y mask, z tokens, q quantized, _hat predicted.

The paper does not say:
  - which unlabelled view enters the student. The strong one, x_a: its tokens are perturbed, its pseudo-label comes from the
    teacher's look at the weak view x_u, and its image branch must give back x_u, as Eq. 9 has it.
  - any warm-up before the unlabelled loss or threshold on pseudo-labels: `--warmup` and `--threshold`.
  - the weight of the quantizer's own loss: `--lambda-vq`.
"""

import argparse
import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

import data
import evaluate
import losses
from data import BadInput, Case, Slices
from model import StandInFM, VQSeg, ema_update
from vq import Usage, usage


def option(default, help: str, choices: list[str] | None = None, low: float = -math.inf, high: float = math.inf):
    """A field of Settings; a number must lie in low to high."""
    return field(default=default, metadata={"help": help, "choices": choices, "low": low, "high": high})


@dataclass
class Settings:
    """Every field is a command-line flag; defaults stand here and nowhere else."""

    # what to train on
    data: str = option("phantom", "phantom: made in code, kept in a cache folder; acdc: the real one, from --root", ["phantom", "acdc"])
    root: str = option("", "folder that holds ACDC's patientNNN folders, or its training/ folder")
    labeled: int = option(-1, "labelled patients, the first of the training list; -1 = 3 for phantom, 7 for acdc")
    # how long, where
    minutes: float = option(0.0, "wall-clock budget; 0 = 3 for phantom, 30 for acdc", low=0, high=10**6)
    steps: int = option(0, "budget in steps instead: repeatable to the bit, which a clock is not", low=0, high=10**9)
    batch: int = option(4, "labelled slices per step, and as many unlabelled (the paper: 4 per GPU)", low=1, high=4096)
    seed: int = option(1337, "the randomness of step n is a function of (seed, n) alone", low=0, high=2**63)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    out: str = option("", "run folder; empty = runs/DATA-LABELED-NAME-seedSEED, numbered if it is taken")
    resume: str = option("", "run folder to go on with, from its last checkpoint and with its settings")
    # the method, a switch for every part
    supervised: bool = option(False, "the baseline: L_seg of Eq. 8 only, on the same network without quantizer and image branch")
    perturb: str = option("qpm", "qpm: Eq. 4; shuffle: the abstract; dropout: Section 3.2; none", ["qpm", "shuffle", "dropout", "none"])
    eps: float = option(0.7, "strength of the perturbation", low=0, high=1)
    temperature: float = option(1.0, "T, divides the distance in Eq. 4; inf = uniform replacement")
    codebook_size: int = option(1024, "K (the paper: 16384 with DINOv2)", low=2, high=2**20)
    lambda_u: float = option(1.0, "Eq. 10: weight of the unlabelled loss; 0 switches it off", low=0)
    lambda_a: float = option(0.1, "Eq. 12: weight of the alignment; the paper: 5, with DINOv2; the stand-in knows nothing to teach", low=0)
    lambda_rec: float = option(1.0, "weight of L_rec in Eq. 8 and 9; 0 switches the image branch off", low=0)
    lambda_vq: float = option(1.0, "weight of the quantizer's own loss", low=0)
    lambda_dice: float = option(1.0, "weight of the soft Dice loss in L_seg; 0 is the paper's plain cross-entropy", low=0)
    fm: str = option("standin", "foundation model of Eq. 11: standin = frozen random features; none", ["standin", "none"])
    tau: float = option(0.07, "temperature of Eq. 11")
    alpha: float = option(0.99, "EMA of the teacher", low=0, high=1)
    threshold: float = option(0.0, "pseudo-label pixels less sure than this are left out; 0 is Eq. 9", low=0, high=1)
    warmup: float = option(0.2, "share of the budget on labelled slices alone, until pseudo-labels are worth learning", low=0, high=1)
    # optimizer and network
    lr: float = option(3e-3, "AdamW, falls as (1 - progress)^0.9; the paper's SGD at 1e-4 starts from pretrained weights", low=0)
    weight_decay: float = option(0.01, "AdamW", low=0)
    width: int = option(24, "channels of the first level of the network")
    dim: int = option(32, "channels of a token", low=1, high=4096)


# ---------------------------------------------------------------------------------------------------------------------
# The method: one training step's loss


def supervised_loss(s: Settings, student: VQSeg, x_l: Tensor, y_l: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The baseline: L_seg of Eq. 8 and nothing else."""
    seg = losses.segmentation_loss(student(x_l), y_l, dice_weight=s.lambda_dice)
    return seg, {"loss": seg, "seg_l": seg}


def vqseg_loss(s: Settings, student: VQSeg, teacher: VQSeg, fm: nn.Module | None, x_l: Tensor, y_l: Tensor, x_u: Tensor, x_a: Tensor,
               progress: float, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 7 to 12 on one labelled and one unlabelled batch: the loss, and each of its terms by name.

    During the warm-up, and with --lambda-u 0, nothing looks at the unlabelled batch; such a step takes half the time.
    """
    B, zero = len(x_l), torch.zeros((), device=x_l.device)
    lambda_u = s.lambda_u if progress >= s.warmup else 0.0
    if not lambda_u:
        x_u, x_a = x_u[:0], x_a[:0]
    # 1. The teacher looks at the weak view: pseudo-labels, without gradient.
    with torch.no_grad():
        pseudo = losses.pseudo_label(teacher(x_u), s.threshold) if lambda_u else None
    # 2. The student encodes labelled slices and strong views together; Eq. 2 makes tokens of them.
    z, skips = student.encoder(torch.cat([x_l, x_a]))
    q = student.quantizer(z)
    # 3. QPM perturbs the unlabelled tokens, Eq. 4.
    perturbed = student.perturb(z[B:], q.codes[B:], q.indices[B:], s.perturb, s.eps, s.temperature, generator) if lambda_u else q.codes[B:]
    # 4. Both branches decode from the shared post-VQ space, Eq. 7.
    y_hat = student.segmentation_decoder(torch.cat([q.codes[:B], perturbed]), skips)
    x_hat = student.image_decoder(q.codes) if s.lambda_rec else torch.cat([x_l, x_u])
    # 5. Eq. 8, 9, 10.
    l_l = losses.labelled_loss(x_hat[:B], x_l, y_hat[:B], y_l, s.lambda_rec, s.lambda_dice)
    l_u = losses.BranchLoss(zero, zero, zero)
    if lambda_u:
        l_u = losses.unlabelled_loss(x_hat[B:], x_u, y_hat[B:], pseudo, s.lambda_rec, s.lambda_dice)
    l_db = losses.dual_branch_loss(l_l.total, l_u.total, lambda_u)
    # 6. Tokens align with the frozen model's features of the undisturbed slices, Eq. 11; the sum is Eq. 12.
    l_align = zero
    if fm is not None and s.lambda_a:
        f_fm = fm(torch.cat([x_l, x_u]))
        l_align = losses.alignment_loss(student.adapter(q.codes, f_fm.shape[-2:]), f_fm, s.tau)
    loss = losses.total_loss(l_db, l_align, s.lambda_a) + s.lambda_vq * q.loss
    terms = {"loss": loss, "seg_l": l_l.seg, "rec_l": l_l.rec, "align": l_align, "vq": q.loss, "indices": q.indices}
    if lambda_u:
        terms |= {"seg_u": l_u.seg, "rec_u": l_u.rec, "kept": pseudo.keep.mean()}
    return loss, terms


# ---------------------------------------------------------------------------------------------------------------------
# The loop


@dataclass
class Place:
    """Where the loop stands. Saved with the weights; with the seed it is all the state there is."""

    step: int = 0
    seconds: float = 0.0
    progress: float = 0.0  # share of the budget that is used, in [0,1]
    checks: int = 0  # tenths of the budget at the last validation
    best: float = -1.0  # validation Dice of best.pt
    saved: float = 0.0  # seconds at the last checkpoint


def train(s: Settings, stop: list[str]) -> None:
    """Ctrl-C fills `stop`; the loop then ends at its next line, where a checkpoint goes on bitwise as if nothing had happened."""
    device = pick_device(s.device)
    amp = has_bfloat16(device)
    # Everything the run needs is found, read and checked before anything is written.
    root, split = data.open_dataset(s.data, s.root)
    labelled_cases, unlabelled_cases = data.training_cases(root, split, s.labeled)
    val_cases = data.find_cases(root, split["val"], need_masks=True)
    labelled, unlabelled = Slices(labelled_cases), Slices(unlabelled_cases)
    print(f"{s.data}: {s.labeled} labelled patients ({len(labelled)} slices), {len(unlabelled_cases)} unlabelled frames "
          f"({len(unlabelled)} slices), {len(val_cases)} validation volumes; {device}, {'bfloat16' if amp else 'float32'}")
    for name in labelled.absent_classes(data.CLASSES):
        print(f"WARNING: no labelled slice shows the class {name}: it cannot be learned", flush=True)
    student, teacher, fm, optimizer = build(s, device)
    run = Path(s.resume) if s.resume else make_run_folder(s, {"labelled": labelled_cases, "unlabelled": unlabelled_cases, "val": val_cases})
    at = restore(run, student, teacher, optimizer, device) if s.resume else Place()
    record = Record(run, s.codebook_size, device, at)
    sample = data.crop_center(data.to_grid(torch.from_numpy(data.read_image(val_cases[0].image)[0])))  # for the figure of model.py
    fixed = {"settings": asdict(s), "classes": len(data.CLASSES), "sample": sample[len(sample) // 2][None].clone()}
    if at.step == 0 and not s.supervised:
        snapshot(run, 0, teacher, [labelled, unlabelled], device)
    print(f"{run}: training for {f'{s.steps} steps' if s.steps else f'{s.minutes:g} minutes'}, from step {at.step} on", flush=True)

    every = 50 if s.steps == 0 or s.steps >= 500 else max(1, s.steps // 10)
    start = time.perf_counter() - at.seconds
    while at.progress < 1:
        # 1. What is random in this step, and the learning rate: the polynomial schedule of 4.2 after a short warm-up.
        generator, pick = generators(device, s.seed, at.step)
        for group in optimizer.param_groups:
            group["lr"] = s.lr * min(1.0, (at.step + 1) / 100) * (1 - at.progress) ** 0.9
        # 2. Labelled slices with their masks, unlabelled slices in a weak and a strong view of the same geometry.
        l_numbers, u_numbers = (torch.randint(len(some), (s.batch,), generator=pick) for some in (labelled, unlabelled))
        x_l, y_l = data.weak_view(*labelled.batch(l_numbers, device), generator)
        x_l = data.strong_view(x_l, generator)
        x_u, _ = data.weak_view(*unlabelled.batch(u_numbers, device), generator)
        x_a = data.strong_view(x_u, generator)
        # 3. The loss of the paper, or of the baseline.
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            if s.supervised:
                loss, terms = supervised_loss(s, student, x_l, y_l)
            else:
                loss, terms = vqseg_loss(s, student, teacher, fm, x_l, y_l, x_u, x_a, at.progress, generator)
        if not torch.isfinite(loss):
            slices = ", ".join(labelled.names(l_numbers) + unlabelled.names(u_numbers))
            raise FloatingPointError(f"step {at.step}: the loss is not finite: {show(terms)}; slices: {slices}")
        # 4. Student by gradient, teacher by moving average (its first steps average less, or it would remember the start).
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema_update(teacher, student, min(s.alpha, 1 - 1 / (at.step + 1)))
        # 5. The record: a line every 50 steps, validation ten times in a run, a checkpoint with it and every minute.
        at.step, at.seconds = at.step + 1, time.perf_counter() - start
        at.progress = min(1.0, at.step / s.steps if s.steps else at.seconds / (60 * s.minutes))
        record.add(terms)
        if at.step % every and at.progress < 1:
            continue
        record.line(at)
        validate = int(10 * at.progress) > at.checks
        if validate:
            first, at.checks = at.checks == 0, int(10 * at.progress)
            rows = evaluate.evaluate(teacher, val_cases, data.CLASSES, device, amp, distances=False, views=evaluate.ONE_VIEW)
            score = evaluate.mean_dice(rows)
            record.write({"step": at.step, "progress": round(at.progress, 4), "val_dice": round(score, 5)})
            better = ", the best so far" if score > at.best else ""
            print(f"step {at.step}: validation Dice of the teacher in one view: {score:.4f}{better}", flush=True)
            if score > at.best:
                at.best = score
                save(run / "best.pt", fixed | {"step": at.step, "val_dice": score, "teacher": teacher.state_dict()})
            if first and not s.supervised:
                snapshot(run, at.step, teacher, [labelled, unlabelled], device)
        if validate or stop or at.seconds > at.saved + 60:
            at.saved = at.seconds
            save(run / "last.pt", {"place": asdict(at), "teacher": teacher.state_dict(), "student": student.state_dict(),
                                   "optimizer": optimizer.state_dict()})
        if stop:
            raise KeyboardInterrupt
    finish(s, run, labelled, unlabelled, val_cases, device, at)


def finish(s: Settings, run: Path, labelled: Slices, unlabelled: Slices, val_cases: list[Case], device: torch.device, at: Place) -> None:
    """The table and the picture of the best teacher, and how much of the codebook the training slices use: all in float32."""
    model, saved = evaluate.load(run, device)
    rows = evaluate.evaluate(model, val_cases, data.CLASSES, device)
    evaluate.write_csv(run / "val.csv", rows)
    result = {"val_dice": evaluate.mean_dice(rows), "best_step": saved["step"], "steps": at.step}
    result |= {"minutes": round(at.seconds / 60, 2), "fm": "none" if s.supervised else s.fm}
    print(f"\n{run}: teacher of step {saved['step']} of {at.step}, best on validation; {at.seconds / 60:.1f} minutes; "
          f"foundation model: {result['fm']}")
    if not s.supervised:
        used = snapshot(run, saved["step"], model, [labelled, unlabelled], device)
        result |= {"utilization": used.utilization, "perplexity": used.perplexity}
        print(f"codebook over all training slices: {used.utilization:.1%} of {s.codebook_size} in use, perplexity {used.perplexity:.0f}")
    print(evaluate.table(rows))
    evaluate.draw(model, val_cases, rows, device, run / "predictions.png")
    (run / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {run}/val.csv, predictions.png, result.json, log.jsonl, best.pt, last.pt")


def snapshot(run: Path, step: int, teacher: VQSeg, sets: list[Slices], device: torch.device) -> Usage:
    """Add the codebook, and how often the training slices use each codeword, to RUN/codebooks.pt; `python vq.py RUN` draws it."""
    counts = evaluate.codeword_counts(teacher, sets, device)
    path = run / "codebooks.pt"
    earlier = [e for e in torch.load(path, weights_only=True) if e["step"] < step] if path.exists() else []
    save(path, earlier + [{"step": step, "codebook": teacher.quantizer.codebook.detach().cpu(), "counts": counts}])
    return usage(torch.repeat_interleave(counts), len(counts))


# ---------------------------------------------------------------------------------------------------------------------
# The record, and going on where a run stopped


class Record:
    """Means of the terms since the last line: one line on the screen, the same as JSON in RUN/log.jsonl."""

    def __init__(self, run: Path, codebook_size: int, device: torch.device, at: Place):
        self.path, self.low = run / "log.jsonl", 0
        self.counts = torch.zeros(codebook_size, dtype=torch.int64, device=device)
        self.clear()
        # A run that is resumed writes the lines after its checkpoint again: take out those, and one torn by the crash.
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        kept = [text for text in lines if text.endswith("\n") and json.loads(text)["step"] <= at.step]
        self.path.with_suffix(".tmp").write_text("".join(kept))
        os.replace(self.path.with_suffix(".tmp"), self.path)

    def clear(self) -> None:
        self.since, self.steps, self.sums, self.times = time.perf_counter(), 0, {}, {}
        self.counts.zero_()

    def add(self, terms: dict[str, Tensor]) -> None:
        self.steps += 1
        for name, value in terms.items():
            if name == "indices":
                self.counts += torch.bincount(value.flatten(), minlength=len(self.counts))
            else:
                self.sums[name] = self.sums.get(name, 0.0) + value.detach()
                self.times[name] = self.times.get(name, 0) + 1

    def line(self, at: Place) -> None:
        line = {"step": at.step, "progress": round(at.progress, 4)}
        line |= {name: round(total.item() / self.times[name], 5) for name, total in self.sums.items()}
        if self.counts.any():
            used = usage(torch.repeat_interleave(self.counts), len(self.counts))
            line |= {"utilization": round(used.utilization, 4), "perplexity": round(used.perplexity, 1)}
            self.low = self.low + 1 if used.utilization < 0.05 else 0
            if self.low == 10:
                print("WARNING: under 5 % of the codebook in use for ten lines: QPM has nothing to exchange; see usage_loss in vq.py")
        line["steps_per_s"] = round(self.steps / (time.perf_counter() - self.since), 2)
        left = at.seconds * (1 / at.progress - 1) / 60
        print("  ".join(f"{k} {v:g}" for k, v in line.items()) + f"  left {left:.1f} min", flush=True)
        self.write(line)
        self.clear()

    def write(self, line: dict) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")


def restore(run: Path, student: VQSeg, teacher: VQSeg, optimizer: torch.optim.Optimizer, device: torch.device) -> Place:
    """Weights and optimizer as the last checkpoint has them; a run that was stopped before its first one starts anew."""
    path = run / "last.pt"
    if not path.exists():
        return Place()
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        student.load_state_dict(saved["student"])
        teacher.load_state_dict(saved["teacher"])
        optimizer.load_state_dict(saved["optimizer"])
        return Place(**saved["place"])
    except evaluate.NOT_OURS as error:
        raise BadInput(f"{path}: not a checkpoint of this run ({data.first_line(error)}); remove it to start the run anew") from None


def save(path: Path, state: object) -> None:
    """Whole or not at all: write beside it, sync, rename."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        temporary.unlink(missing_ok=True)
        remedy = f"the one before is whole: make room, then --resume {path.parent}"
        raise BadInput(f"{path}: cannot be written ({data.first_line(error)}); {remedy}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Setting up


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {name}: cannot be used ({data.first_line(error)}); try --device cpu") from None
    return device


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is in the silicon. Where it is emulated it is slower than float32, fifty times on one CPU we tried."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # absent from older PyTorch: float32 then
    return device.type == "cpu" and any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))


def generators(device: torch.device, seed: int, step: int) -> tuple[torch.Generator, torch.Generator]:
    """For step `step` of seed `seed`: one generator on the device, for the tensors, and one on the CPU, to pick slices.

    On the CPU that makes a run repeatable to the bit. On CUDA the draws repeat too, but backward passes there (grid_sample,
    interpolate, embedding) add with atomics in any order, so that two runs agree to rounding only.
    """
    states = np.random.SeedSequence((seed, step)).generate_state(2)
    return torch.Generator(device).manual_seed(int(states[0])), torch.Generator().manual_seed(int(states[1]))


def build(s: Settings, device: torch.device) -> tuple[VQSeg, VQSeg, nn.Module | None, torch.optim.Optimizer]:
    """Student, teacher (a copy that no gradient reaches), foundation model, optimizer."""
    torch.manual_seed(s.seed)
    fm = StandInFM().to(device) if s.fm == "standin" and not s.supervised else None
    student = VQSeg(len(data.CLASSES), s.codebook_size, s.dim, s.width, quantize=not s.supervised).to(device)
    teacher = copy.deepcopy(student).requires_grad_(False)
    return student, teacher, fm, torch.optim.AdamW(student.parameters(), lr=s.lr, weight_decay=s.weight_decay, fused=True)


def make_run_folder(s: Settings, cases: dict[str, list[Case]]) -> Path:
    """A new folder with the record of what is about to run. A folder that holds a run already is never written over."""
    name = "supervised" if s.supervised else f"vqseg-{s.perturb}"
    run = Path(s.out or f"runs/{s.data}-{s.labeled}-{name}-seed{s.seed}")
    if s.out and (run / "record.json").exists():
        raise BadInput(f"--out {run}: holds a run already; --resume {run} goes on with it, or give another folder")
    number = 2
    while not s.out and run.exists():
        run = run.with_name(f"{run.name.split('.')[0]}.{number}")
        number += 1
    run.mkdir(parents=True, exist_ok=True)
    here = Path(__file__).parent
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True).stdout.strip()
    record = {"settings": asdict(s), "command": sys.argv, "commit": commit or "unknown", "torch": torch.__version__,
              "numpy": np.__version__, "python": sys.version.split()[0], "chosen_on": "val"}
    record |= {part: [case.name for case in some] for part, some in cases.items()}
    (run / "record.tmp").write_text(json.dumps(record, indent=2) + "\n")
    os.replace(run / "record.tmp", run / "record.json")
    s.out = str(run)
    return run


def show(terms: dict[str, Tensor]) -> str:
    return " ".join(f"{name}={value.item():.4g}" for name, value in terms.items() if value.ndim == 0)


def read_settings(arguments: list[str] | None = None) -> Settings:
    """The command line, with the defaults that depend on the data set filled in and every range checked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], argument_default=argparse.SUPPRESS)
    for f in fields(Settings):
        flag, about = "--" + f.name.replace("_", "-"), f.metadata["help"]
        if isinstance(f.default, bool):
            parser.add_argument(flag, action="store_true", help=about)
        else:
            parser.add_argument(flag, type=type(f.default), choices=f.metadata["choices"], help=f"{about} (default: {f.default})")
    given = vars(parser.parse_args(arguments))  # only what stands on the command line
    if "resume" in given:
        return resumed_settings(given)
    s = Settings(**given)
    if s.labeled == -1:
        s.labeled = 3 if s.data == "phantom" else 7
    if not s.minutes and not s.steps:
        s.minutes = 3.0 if s.data == "phantom" else 30.0
    if s.minutes and s.steps:
        raise BadInput("--minutes and --steps: give one of them")
    for f in fields(Settings):
        low, high = f.metadata["low"], f.metadata["high"]
        if isinstance(f.default, (int, float)) and not low <= getattr(s, f.name) <= high:
            raise BadInput(f"--{f.name.replace('_', '-')} {getattr(s, f.name)}: must lie in {low} to {high}")
    for name in ("temperature", "tau"):
        if not getattr(s, name) > 0:
            raise BadInput(f"--{name} {getattr(s, name)}: must be above 0")
    if s.width < 8 or s.width % 8:
        raise BadInput(f"--width {s.width}: must be a multiple of 8, the number of groups of GroupNorm")
    return s


def resumed_settings(given: dict) -> Settings:
    """The settings that a run began with. A flag that says otherwise is refused: it would be another run."""
    run = given["resume"]
    try:
        recorded = json.loads((Path(run) / "record.json").read_text())["settings"]
        s = Settings(**recorded | {"resume": run, "out": run})
    except (OSError, ValueError, KeyError, TypeError):
        raise BadInput(f"--resume {run}: holds no run of train.py; give the folder that it printed") from None
    for name, value in given.items():
        if name not in ("resume", "out") and value != recorded[name]:
            flag = "--" + name.replace("_", "-")
            raise BadInput(f"{flag} {value}: the run in {run} began with {recorded[name]}; leave the flag out, or start a new run")
    return s


def main() -> None:
    s, stop = None, []

    def on_ctrl_c(*_) -> None:
        if stop:
            raise KeyboardInterrupt
        stop.append("Ctrl-C")
        print("stopping at the next line, with a checkpoint; Ctrl-C again stops at once", flush=True)

    try:
        s = read_settings()
        signal.signal(signal.SIGINT, on_ctrl_c)
        train(s, stop)
    except KeyboardInterrupt:
        print(f"train.py: stopped; go on with: python train.py --resume {s.out}" if s and s.out else "train.py: stopped", file=sys.stderr)
        sys.exit(130)
    except (BadInput, FloatingPointError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, BadInput) else 1)


if __name__ == "__main__":
    main()
