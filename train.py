"""Training: the whole method in one plain loop.

    python train.py                                                     phantoms, 3 minutes on two CPU cores
    python train.py --data acdc --root DIR --labeled 7                  real cardiac MRI
    python train.py --data acdc --root DIR --labeled 7 --supervised     the baseline: labelled part only, same budget
    torchrun --nproc-per-node 4 train.py --data acdc --root DIR --labeled 7 --paper       the paper's settings on four GPUs

Implements Sections 3.4 to 3.6 (student and EMA teacher, Eq. 7 to 12 in their order) and the settings of 4.2.
Names: l labelled, u unlabelled weak view, a unlabelled strong view; x image, y mask, z tokens, q quantized, _hat predicted.

The paper does not say:
  - which unlabelled view enters the student. The strong one, x_a: its tokens are perturbed, its pseudo-label comes from the
    teacher's look at the weak view x_u, and its image branch must give back x_u, as Eq. 9 has it.
  - which view of a labelled slice. The strong one too: x_l is that in all of Eq. 8 and in Eq. 11.
  - any warm-up before the unlabelled loss or threshold on pseudo-labels: `--warmup` and `--threshold`.
  - the weight of the quantizer's own loss: `--lambda-vq`.
  - what an epoch is, or which decay its "decay 3e-5" is: a pass over the unlabelled slices, and SGD's weight decay (with
    momentum 0.9).
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
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import data
import evaluate
import losses
import qpm
from data import BadInput, Case, Slices
from model import OFFICIAL, DINOv2, StandInFM, TorchScriptFM, VQSeg, ema_update, load_dinov2, official_weights, total
from vq import Usage, usage


def option(default, help: str, choices: list[str] | None = None, low: float = -math.inf, high: float = math.inf):
    """A field of Settings; a number must lie in low to high."""
    return field(default=default, metadata={"help": help, "choices": choices, "low": low, "high": high})


@dataclass
class Settings:
    """Every field is a command-line flag; defaults stand here and nowhere else."""

    # what to train on
    data: str = option("phantom", "phantom: made in code; acdc; lc: chest CT, one lesion class; or a folder of your own")
    root: str = option("", "folder of acdc or lc; empty = ./acdc or ./lc")
    labeled: float = option(-1.0, "labelled patients, the first of the training list, or below 1 their share of those that have masks; "
                            "-1 = 3 for phantom, 7 for acdc, 0.1 for lc, else all that have masks")  # fmt: skip
    classes: int = option(0, "classes of the masks, with the background; needed for a folder of your own", low=0, high=256)
    window: str = option("", "intensities that become 0 and 1, like --window=-1000,400, the default of lc; empty = each volume's extremes")
    view: int = option(0, "pixels of 240, around the center, that evaluation sees; 0 = 160 for phantom and acdc, else all", low=0, high=240)
    pieces: str = option("", "of each class in a predicted volume: all, or its largest connected piece, for each is one in a heart; empty "
                         "= largest for phantom and acdc, else all", ["", "largest", "all"])  # fmt: skip
    split_seed: int = option(0, "shuffles the patients of lc and of your own folder into 70/10/20; ROOT/split.txt goes before it", low=0)
    # how long, where
    minutes: float = option(0.0, "wall-clock budget; 0 = 3 for phantom, 30 for acdc", low=0, high=10**6)
    steps: int = option(0, "budget in steps instead: repeatable to the bit, which a clock is not", low=0, high=10**9)
    epochs: float = option(0.0, "budget in passes over the unlabelled slices instead", low=0, high=10**6)
    # Fewer steps a minute, each of them steadier, which pays once a run is long. Validation Dice of 8 and (4), one core, width 8, 7 ACDC
    # patients, seeds 1 and 2: after 24 minutes 0.842, 0.839 (0.837, 0.834), after 8 minutes 0.795, 0.792 (0.796, 0.804).
    batch: int = option(8, "labelled slices per step and process, and as many unlabelled (the paper: 4 per GPU)", low=1, high=4096)
    seed: int = option(1337, "the randomness of step n is a function of (seed, n) alone", low=0, high=2**63)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    out: str = option("", "run folder; empty = runs/DATA-LABELED-NAME-seedSEED, numbered if it is taken")
    resume: str = option("", "run folder to go on with, from its last checkpoint and with its settings")
    compile: bool = option(False, "compile the network with torch.compile: slow to start, faster steps on a GPU")
    # the method, a switch for every part
    paper: bool = option(False, "everything that Section 4.2 states (PAPER, below); flags given beside it win")
    supervised: bool = option(False, "the baseline: L_seg of Eq. 8 only, on the same network without quantizer and image branch")
    perturb: str = option("qpm", "qpm: Eq. 4; shuffle: the abstract; dropout: Section 3.2, as nn.Dropout does it; none",
                          ["qpm", "shuffle", "dropout", "none"])  # fmt: skip
    eps: float = option(0.7, "strength of the perturbation", low=0, high=1)
    temperature: float = option(1.0, "T, divides the distance in Eq. 4; inf = uniform replacement")
    codebook_size: int = option(1024, "K (the paper: 16384 with DINOv2)", low=2, high=2**20)
    lambda_u: float = option(1.0, "Eq. 10: weight of the unlabelled loss; 0 switches it off", low=0)
    # With ImageNet features (EfficientNet-lite0) on 7 ACDC patients, 0.1 is worth 0.015 validation Dice over six pairs of runs (README,
    # Table 2). The paper's 5 did worse in the one run that tried it: 0.686 after 1500 steps at full width, against 0.744 for 1.
    lambda_a: float = option(0.1, "Eq. 12: weight of the alignment (the paper: 5)", low=0)
    lambda_rec: float = option(1.0, "weight of L_rec in Eq. 8 and 9; 0 switches the image branch off", low=0)
    lambda_vq: float = option(1.0, "weight of the quantizer's own loss", low=0)
    lambda_usage: float = option(0.1, "in that, weight of the usage term, which the paper has not", low=0)
    lambda_dice: float = option(1.0, "weight of the soft Dice loss in L_seg; 0 is the paper's plain cross-entropy", low=0)
    fm: str = option("auto", "foundation model of Eq. 11: auto = dinov2 if its weights are at hand, else none; dinov2 = downloaded if "
                     "need be; torchscript = any other, in --fm-weights; standin = frozen random features",
                     ["auto", "dinov2", "torchscript", "standin", "none"])  # fmt: skip
    fm_weights: str = option("", "DINOv2 weights in the official format; or, with --fm torchscript, a TorchScript file that maps "
                             "ImageNet-normalized (B,3,H,W) to features (B,C,h,w)")  # fmt: skip
    tau: float = option(0.07, "temperature of Eq. 11")
    alpha: float = option(0.99, "EMA of the teacher", low=0, high=1)
    threshold: float = option(0.0, "pseudo-label pixels less sure than this are left out; 0 is Eq. 9", low=0, high=1)
    warmup: float = option(0.2, "share of the budget on labelled slices alone, until pseudo-labels are worth learning", low=0, high=1)
    # optimizer and network
    optimizer: str = option("adamw", "adamw, or the paper's sgd (momentum 0.9)", ["adamw", "sgd"])
    lr: float = option(3e-3, "falls as (1 - progress)^0.9; the paper's 1e-4 starts from pretrained weights", low=0)
    weight_decay: float = option(0.01, "of the optimizer", low=0)
    encoder: str = option("conv", "conv: small, from scratch; dinov2: UniMatch V2's, ViT-S/14 from DINOv2's weights", ["conv", "dinov2"])
    width: int = option(24, "channels of the first level of the network", low=1, high=4096)
    dim: int = option(32, "channels of a token of the conv encoder", low=1, high=4096)


# --paper: Section 4.2. What it does not mention is what Eq. 8 to 12 have: no Dice loss, no usage term, no warm-up, no threshold; and
# every piece of a prediction counts.
PAPER = {"encoder": "dinov2", "codebook_size": 16384, "eps": 0.7, "temperature": 1.0, "lambda_a": 5.0, "lambda_u": 1.0, "lambda_rec": 1.0,
         "lambda_dice": 0.0, "lambda_usage": 0.0, "warmup": 0.0, "threshold": 0.0, "alpha": 0.99, "tau": 0.07, "batch": 4, "epochs": 100.0,
         "optimizer": "sgd", "lr": 1e-4, "weight_decay": 3e-5, "pieces": "all"}


# ---------------------------------------------------------------------------------------------------------------------
# The method: one training step's loss


def learns_from_unlabelled(s: Settings, progress: float) -> bool:
    return s.lambda_u > 0 and progress >= s.warmup and not s.supervised


def supervised_loss(s: Settings, student: VQSeg, x_l: Tensor, y_l: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The baseline: L_seg of Eq. 8 and nothing else."""
    seg = losses.segmentation_loss(student(x_l), y_l, None, s.lambda_dice, total)
    return seg, {"loss": seg, "seg_l": seg}


def vqseg_loss(s: Settings, student: VQSeg, teacher: VQSeg, fm: nn.Module | None, x_l: Tensor, y_l: Tensor, x_u: Tensor, x_a: Tensor,
               progress: float, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 7 to 12 on one labelled and one unlabelled batch: the loss, and each of its terms by name.

    During the warm-up, and with --lambda-u 0, nothing looks at the unlabelled batch; such a step takes half the time.
    """
    B, zero = len(x_l), torch.zeros((), device=x_l.device)
    lambda_u = s.lambda_u if learns_from_unlabelled(s, progress) else 0.0
    if not lambda_u:
        x_u, x_a = x_u[:0], x_a[:0]
    # 1. The teacher looks at the weak view: pseudo-labels, without gradient.
    with torch.no_grad():
        pseudo = losses.pseudo_label(teacher(x_u), s.threshold) if lambda_u else None
    # 2. The student encodes labelled slices and strong views together; Eq. 2 makes tokens of them.
    z, skips = student.encoder(torch.cat([x_l, x_a]))
    q = student.quantizer(z, total)
    # 3. QPM perturbs the unlabelled tokens, Eq. 4.
    perturbed = q.codes[B:]
    if lambda_u:
        perturbed = student.perturb(z[B:], perturbed, q.indices[B:], s.perturb, s.eps, s.temperature, generator, q.codebook)
    # 4. Both branches decode from the shared post-VQ space, Eq. 7.
    y_hat = student.segmentation_decoder(torch.cat([q.codes[:B], perturbed]), skips)
    x_hat = student.image_decoder(q.codes) if s.lambda_rec else torch.cat([x_l, x_u])
    # 5. Eq. 8, 9, 10.
    l_l = losses.labelled_loss(x_hat[:B], x_l, y_hat[:B], y_l, s.lambda_rec, s.lambda_dice, total)
    l_u = losses.BranchLoss(zero, zero, zero)
    if lambda_u:
        l_u = losses.unlabelled_loss(x_hat[B:], x_u, y_hat[B:], pseudo, s.lambda_rec, s.lambda_dice, total)
    l_db = losses.dual_branch_loss(l_l.total, l_u.total, lambda_u)
    # 6. Tokens align with the frozen model's features of x_l and of the undisturbed x_u, one pass for all, Eq. 11; the sum is Eq. 12.
    l_align = zero
    if fm is not None and s.lambda_a:
        with torch.no_grad():
            f_fm = fm(torch.cat([x_l, x_u]))
        l_align = losses.alignment_loss(student.adapter(q.codes, f_fm.shape[-2:]), f_fm, s.tau)
    loss = losses.total_loss(l_db, l_align, s.lambda_a) + s.lambda_vq * q.loss
    terms = {"loss": loss, "seg_l": l_l.seg, "rec_l": l_l.rec, "align": l_align, "vq": q.loss, "indices": q.indices}
    if lambda_u:
        terms |= {"seg_u": l_u.seg, "rec_u": l_u.rec, "kept": pseudo.keep.mean()}
    return loss, terms


class Step(nn.Module):
    """One forward pass that ends in the loss: what DistributedDataParallel wraps."""

    def __init__(self, student: VQSeg):
        super().__init__()
        self.student = student

    def forward(self, s: Settings, *given) -> tuple[Tensor, dict[str, Tensor]]:
        return supervised_loss(s, self.student, *given) if s.supervised else vqseg_loss(s, self.student, *given)


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
    """Ctrl-C fills `stop`; the loop then ends at its next line, where a checkpoint goes on bitwise as if nothing had happened.

    With torchrun, every process runs this. Each draws the joint batch and keeps its share, so that n processes do what one does
    with the joint batch; only the first one (rank 0) writes, prints and validates.
    """
    rank, world, device = join_processes(s)
    say = print if rank == 0 else lambda *_, **__: None
    # Everything the run needs is found, read and checked before anything is written.
    found, labelled, unlabelled, val_cases = read_data(s, say)
    steps = s.steps or math.ceil(s.epochs * len(unlabelled) / (s.batch * world))  # 0: the clock decides
    student, teacher, fm, optimizer, about = build(s, device, say)
    crop, s.view = (pixels // student.stride * student.stride for pixels in (data.CROP, found.view))  # whole patches of the network
    amp = has_bfloat16(device)
    run = run_folder(s, rank, world, about["fm"], {"labelled": labelled.cases, "unlabelled": unlabelled.cases, "val": val_cases})
    at = restore(run, student, teacher, optimizer, device) if s.resume else Place()
    record = Record(run, s.codebook_size, device, at, rank == 0)
    step = Step(student)
    if world > 1:
        unused = s.supervised or not (s.lambda_rec and s.lambda_a)  # whether some parameters get no gradient
        step = DistributedDataParallel(step, find_unused_parameters=unused)
    sample = data.crop_center(data.middle_slice(val_cases[0]), s.view)  # for the figure of model.py
    # What evaluation needs beside the weights: the split too, for a seed would shuffle a folder that has grown anew.
    axes = data.open_volume(labelled.cases[0].images).axes
    fixed = {"settings": asdict(s), "split": found.split, "axes": axes, "sample": sample, **about}
    if rank == 0 and at.step == 0 and not s.supervised:
        snapshot(run, 0, teacher, [labelled, unlabelled], device, s.view)
    budget = f"{steps} steps" if steps else f"{s.minutes:g} minutes"
    say(f"{run}: training for {budget} on {device} in {'bfloat16' if amp else 'float32'}, from step {at.step} on", flush=True)

    every = 50 if steps == 0 or steps >= 500 else max(1, steps // 10)
    start = time.perf_counter() - at.seconds
    mine = slice(rank * s.batch, (rank + 1) * s.batch)
    while at.progress < 1:
        # 1. What is random in this step, and the learning rate: the polynomial schedule of 4.2 after a short warm-up.
        generator, _ = generators(device, s.seed, at.step)
        for group in optimizer.param_groups:
            group["lr"] = s.lr * min(1.0, (at.step + 1) / 100) * (1 - at.progress) ** 0.9
        # 2. Labelled slices with their masks, unlabelled slices in a weak and a strong view of the same geometry.
        l_numbers, u_numbers = pick_slices(s, at.step, world, labelled, unlabelled)
        x_l, y_l = data.weak_view(*labelled.batch(l_numbers, device), generator, crop, s.view)
        x_l = data.strong_view(x_l, generator)
        x_u = x_a = x_l[:0]
        if learns_from_unlabelled(s, at.progress):
            x_u, _ = data.weak_view(*unlabelled.batch(u_numbers, device), generator, crop, s.view)
            x_a = data.strong_view(x_u, generator)
            skip_draws(generator, s, rank, student, crop)
        x_l, y_l, x_u, x_a = (t[mine] for t in (x_l, y_l, x_u, x_a))
        # 3. The loss of the paper, or of the baseline.
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            if s.supervised:
                loss, terms = step(s, x_l, y_l)
            else:
                loss, terms = step(s, teacher, fm, x_l, y_l, x_u, x_a, at.progress, generator)
        # 4. Student by gradient, teacher by moving average (its first steps average less, or it would remember the start).
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema_update(teacher, student, min(s.alpha, 1 - 1 / (at.step + 1)))
        # 5. The record: a line every 50 steps, validation ten times in a run, a checkpoint with it and every minute. Only a line
        #    reads numbers back from the device, so that a GPU never waits in between.
        at.step, at.seconds = at.step + 1, time.perf_counter() - start
        at.progress = min(1.0, at.step / steps if steps else at.seconds / (60 * s.minutes))
        record.add(terms)
        if at.step % every and at.progress < 1:
            continue
        stopping = total(torch.tensor(len(stop), device=device)) > 0  # all or none
        bad = record.first_not_finite()
        if bad is not None:
            bad_step, shown = at.step - record.steps + bad, show(record.terms[bad])
            l_numbers, u_numbers = pick_slices(s, bad_step, world, labelled, unlabelled)
            slices = ", ".join(labelled.names(l_numbers[mine]) + unlabelled.names(u_numbers[mine]))
            raise FloatingPointError(f"step {bad_step}: the loss is not finite: {shown}; slices: {slices}")
        record.line(at)
        validate = int(10 * at.progress) > at.checks
        if validate:
            first, at.checks = at.checks == 0, int(10 * at.progress)
        if validate and rank == 0:
            rows = evaluate.evaluate([teacher], val_cases, found.labels, device, s.view, amp, distances=False, views=evaluate.ONE_VIEW)
            score = evaluate.mean_dice(rows)
            record.write({"step": at.step, "progress": round(at.progress, 4), "val_dice": round(score, 5)})
            better = ", the best so far" if score > at.best else ""
            print(f"step {at.step}: validation Dice of the teacher in one view: {score:.4f}{better}", flush=True)
            if score > at.best:
                at.best = score
                save(run / "best.pt", fixed | {"step": at.step, "val_dice": score, "teacher": teacher.state_dict()})
            if first and not s.supervised:
                snapshot(run, at.step, teacher, [labelled, unlabelled], device, s.view)
        if validate or stopping or at.seconds > at.saved + 60:
            at.saved = at.seconds
            if rank == 0:
                save(run / "last.pt", {"place": asdict(at), "teacher": teacher.state_dict(), "student": student.state_dict(),
                                       "optimizer": optimizer.state_dict()})
        if stopping:
            raise KeyboardInterrupt
    if rank == 0:
        finish(s, run, found.labels, labelled, unlabelled, val_cases, device, at)
    if world > 1:
        dist.barrier()  # while the first one finishes; leaving at once can deadlock in gloo's destructor
        dist.destroy_process_group()


def finish(s: Settings, run: Path, labels: list[str], labelled: Slices, unlabelled: Slices, val_cases: list[Case], device: torch.device,
           at: Place) -> None:
    """The table and the picture of the best teacher, and how much of the codebook the training slices use: all in float32."""
    model, saved = evaluate.load(run, device)
    rows = evaluate.evaluate([model], val_cases, labels, device, s.view, one_piece=evaluate.one_piece(saved))
    evaluate.write_scores(run, "val", rows, saved)
    result = {"val_dice": evaluate.mean_dice(rows), "best_step": saved["step"], "steps": at.step}
    result |= {"minutes": round(at.seconds / 60, 2), "fm": saved["fm"]}
    print(f"\n{run}: teacher of step {saved['step']} of {at.step}, best on validation; {at.seconds / 60:.1f} minutes; "
          f"foundation model: {result['fm']}")
    if not s.supervised:
        used = snapshot(run, saved["step"], model, [labelled, unlabelled], device, s.view)
        result |= {"utilization": used.utilization, "perplexity": used.perplexity}
        print(f"codebook over all training slices: {used.utilization:.1%} of {s.codebook_size} in use, perplexity {used.perplexity:.0f}")
    print(evaluate.table(rows))
    evaluate.draw({"prediction": model}, val_cases, rows, labels, device, s.view, evaluate.one_piece(saved), run / "predictions.png")
    (run / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {run}/val.csv, val.json, predictions.png, result.json, log.jsonl, best.pt, last.pt")


def snapshot(run: Path, step: int, teacher: VQSeg, sets: list[Slices], device: torch.device, view: int) -> Usage:
    """Add the codebook, and how often the training slices use each codeword, to RUN/codebooks.pt; `python vq.py RUN` draws it."""
    counts = evaluate.codeword_counts(teacher, sets, device, view)
    path = run / "codebooks.pt"
    earlier = [e for e in torch.load(path, weights_only=True) if e["step"] < step] if path.exists() else []
    save(path, earlier + [{"step": step, "codebook": teacher.quantizer.codebook.detach().cpu(), "counts": counts}])
    return usage(counts)


# ---------------------------------------------------------------------------------------------------------------------
# The record, and going on where a run stopped


class Record:
    """Means of the terms since the last line: one line on the screen, the same as JSON in RUN/log.jsonl.

    `add` only keeps what the device has computed; `line` reads it, and means over all processes.
    """

    def __init__(self, run: Path, codebook_size: int, device: torch.device, at: Place, writes: bool = True):
        self.path, self.writes, self.low = run / "log.jsonl", writes, 0
        self.counts = torch.zeros(codebook_size, dtype=torch.int64, device=device)
        self.clear()
        # A run that is resumed writes the lines after its checkpoint again: take out those, and one torn by the crash.
        if writes:
            lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
            kept = [text for text in lines if text.endswith("\n") and json.loads(text)["step"] <= at.step]
            self.path.with_suffix(".tmp").write_text("".join(kept))
            os.replace(self.path.with_suffix(".tmp"), self.path)

    def clear(self) -> None:
        self.since, self.terms = time.perf_counter(), []
        self.counts.zero_()

    @property
    def steps(self) -> int:
        return len(self.terms)

    def add(self, terms: dict[str, Tensor]) -> None:
        self.terms.append({name: value.detach() for name, value in terms.items() if name != "indices"})
        if "indices" in terms:
            used = terms["indices"].flatten()
            self.counts.scatter_add_(0, used, torch.ones_like(used))

    def first_not_finite(self) -> int | None:
        """The first step since the last line whose loss is not finite, counted from 0."""
        finite = torch.stack([terms["loss"] for terms in self.terms]).isfinite().tolist()
        return None if all(finite) else finite.index(False)

    def line(self, at: Place) -> None:
        names = list(dict.fromkeys(name for terms in self.terms for name in terms))
        means = torch.stack([torch.stack([t[name].float() for t in self.terms if name in t]).mean() for name in names])
        means, counts = (total(means) / total(torch.ones_like(means))).tolist(), total(self.counts)
        line = {"step": at.step, "progress": round(at.progress, 4)}
        line |= {name: round(mean, 5) for name, mean in zip(names, means)}
        if counts.any():
            used = usage(counts)
            line |= {"utilization": round(used.utilization, 4), "perplexity": round(used.perplexity, 1)}
            self.low = self.low + 1 if used.utilization < 0.05 else 0
            if self.low == 10 and self.writes:
                print("WARNING: under 5 % of the codebook in use for ten lines: QPM has nothing to exchange; see usage_loss in vq.py")
        line["steps_per_s"] = round(self.steps / (time.perf_counter() - self.since), 2)
        left = at.seconds * (1 / at.progress - 1) / 60
        if self.writes:
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


def join_processes(s: Settings) -> tuple[int, int, torch.device]:
    """Rank, number of processes and device: 0 and 1 without torchrun; with it, one process per GPU, or several on the CPU."""
    rank, world, local = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = pick_device(s.device)
    if world == 1:
        return 0, 1, device
    if s.minutes:
        raise BadInput("--minutes: the clocks of several processes differ; give --steps or --epochs")
    if device.type == "cuda":
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    # The others wait while the first one validates, on large volumes for longer than the ten minutes that are usual; a process that
    # dies is noticed at once by its closed connections, or by torchrun.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=12))
    return rank, world, device


def pick_slices(s: Settings, step: int, world: int, labelled: Slices, unlabelled: Slices) -> tuple[Tensor, Tensor]:
    """The numbers of the labelled and of the unlabelled slices of this step's joint batch."""
    _, pick = generators(torch.device("cpu"), s.seed, step)
    return tuple(some.draw(world * s.batch, pick, s.seed, step) for some in (labelled, unlabelled))


def skip_draws(generator: torch.Generator, s: Settings, rank: int, student: VQSeg, crop: int) -> None:
    """Pass over the numbers that the processes before this one draw for the tokens of their share.

    So two processes on a CPU perturb as one does; CUDA draws in another order, and there it only keeps the processes apart.
    """
    each, kind = {"qpm": (qpm.DRAWS, torch.float64), "shuffle": (1, None), "dropout": (student.dim, None), "none": (0, None)}[s.perturb]
    tokens = s.batch * (crop // student.stride) ** 2
    torch.rand(rank * tokens * each, generator=generator, device=generator.device, dtype=kind)


def generators(device: torch.device, seed: int, step: int) -> tuple[torch.Generator, torch.Generator]:
    """For step `step` of seed `seed`: one generator on the device, for the tensors, and one on the CPU, to pick slices.

    On the CPU that makes a run repeatable to the bit. On CUDA the draws repeat too, but backward passes there (grid_sample,
    interpolate, embedding) add with atomics in any order, so that two runs agree to rounding only.
    """
    states = np.random.SeedSequence((seed, step)).generate_state(2)
    return torch.Generator(device).manual_seed(int(states[0])), torch.Generator().manual_seed(int(states[1]))


def read_data(s: Settings, say) -> tuple[data.DataSet, Slices, Slices, list[Case]]:
    """The data set, its labelled and unlabelled training slices, its validation volumes; settings that depend on it are filled in."""
    found = data.open_dataset(s.data, s.root, s.classes, s.window, s.view, s.split_seed)
    s.classes, s.pieces = len(found.labels), data.pieces_that_count(s.data, s.pieces)
    s.labeled, labelled_cases, unlabelled_cases = found.training(s.labeled)
    val_cases = found.with_masks("val")
    say(found.summary())
    say(data.mixed_orientations(labelled_cases + unlabelled_cases + val_cases), end="")
    labelled, unlabelled = Slices(labelled_cases, s.classes, say), Slices(unlabelled_cases, s.classes, say)
    say(f"{s.labeled} labelled patients ({len(labelled)} slices), {len(unlabelled_cases)} unlabelled volumes ({len(unlabelled)} slices), "
        f"{len(val_cases)} validation volumes")
    for name in labelled.absent_classes(found.labels):
        say(f"WARNING: no labelled slice shows the class {name}: it cannot be learned", flush=True)
    # Every validation voxel is read once now, or a damaged file would stop the run at its first validation.
    shown = [slab.any() for case in val_cases for slab in data.mask_slabs(case, s.classes)]
    for case in val_cases:
        for _ in data.slabs(data.open_volume(case.images)):
            pass
    if not any(shown):
        raise BadInput(f"{found.root}: no validation mask shows any class, so no teacher could be chosen; add a patient with one to val")
    return found, labelled, unlabelled, val_cases


def build(s: Settings, device: torch.device, say=print) -> tuple[VQSeg, VQSeg, nn.Module | None, torch.optim.Optimizer, dict]:
    """Student, teacher (a copy that no gradient reaches), foundation model, optimizer, and what a checkpoint must know of them."""
    fm, fm_name = (None, "none") if s.supervised else foundation_model(s, say)
    network = {"classes": s.classes, "codebook_size": s.codebook_size, "dim": s.dim, "width": s.width, "quantize": not s.supervised,
               "encoder": s.encoder, "fm_channels": fm.channels if fm else 0, "usage_weight": s.lambda_usage}
    pretrained = pretrained_dinov2(s) if s.encoder == "dinov2" else None
    torch.manual_seed(s.seed)
    student = VQSeg(**network)
    if pretrained:
        if pretrained.channels != student.dim:
            raise BadInput(f"--fm-weights {s.fm_weights}: has {pretrained.channels} channels; give ViT-S/14, with {student.dim}")
        student.encoder.vit.load_state_dict(pretrained.state_dict())
    elif s.encoder == "dinov2":
        say("WARNING: no weights at hand: the DINOv2 encoder starts from random ones; give --fm-weights FILE", flush=True)
    student = student.to(device)
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    fm = fm.to(device).requires_grad_(False).eval() if fm else None
    if s.compile:
        for net in (student, teacher):
            for part in (net.encoder, net.segmentation_decoder, net.image_decoder):
                part.compile()
    if s.optimizer == "sgd":
        optimizer = torch.optim.SGD(student.parameters(), lr=s.lr, momentum=0.9, weight_decay=s.weight_decay, fused=True)
    else:
        # eps above rounding: with the usual 1e-8, a weight whose gradient is nearly 0 steps by what is rounded in it, and two processes
        # end 5e-5 from what one does with the joint batch.
        optimizer = torch.optim.AdamW(student.parameters(), lr=s.lr, weight_decay=s.weight_decay, eps=1e-6, fused=True)
    return student, teacher, fm, optimizer, {"network": network, "fm": fm_name}


def foundation_model(s: Settings, say) -> tuple[nn.Module | None, str]:
    """The frozen model of Eq. 11 that --fm asks for, and its name for the record."""
    if s.fm == "none":
        return None, "none"
    if s.fm == "standin":
        return StandInFM(), "stand-in, random features"
    if s.fm == "torchscript":
        try:
            return TorchScriptFM(Path(s.fm_weights)), f"TorchScript {s.fm_weights}"
        except (*evaluate.NOT_OURS, OSError) as error:
            remedy = "give what torch.jit.trace(model, torch.zeros(1, 3, 128, 128)).save(FILE) writes"
            raise BadInput(f"--fm-weights {s.fm_weights}: no TorchScript feature extractor ({data.first_line(error)}); {remedy}") from None
    fm = pretrained_dinov2(s)
    if fm:
        return fm, f"DINOv2, {fm.channels} channels"
    say("NO FOUNDATION MODEL: no DINOv2 weights at hand, so Eq. 11 is left out; --fm dinov2 downloads them, --fm-weights FILE names "
        "them, --fm none keeps quiet", flush=True)
    return None, "none (--fm auto found no weights)"


def pretrained_dinov2(s: Settings) -> DINOv2 | None:
    """DINOv2 from --fm-weights, or from the official file: where it is at hand, or downloaded with --fm dinov2."""
    path = Path(s.fm_weights) if s.fm_weights and s.fm != "torchscript" else None
    try:
        path = path or official_weights(download=s.fm == "dinov2")
        found = load_dinov2(path) if path else None
    except (*evaluate.NOT_OURS, OSError) as error:
        where = f"--fm-weights {path}" if s.fm_weights else "DINOv2"
        raise BadInput(f"{where}: not DINOv2 weights in the official format ({data.first_line(error)}); get {OFFICIAL}") from None
    if s.fm == "dinov2" and not found:
        raise BadInput(f"--fm dinov2: its weights cannot be had; download {OFFICIAL} elsewhere and give --fm-weights FILE")
    return found


def run_folder(s: Settings, rank: int, processes: int, fm: str, cases: dict[str, list[Case]]) -> Path:
    """The folder of the run that goes on, or a new one with the record of what is about to run, which never goes over an old one."""
    names = {part: [case.name for case in some] for part, some in cases.items()}
    if s.resume:
        record = json.loads((Path(s.resume) / "record.json").read_text())
        if names != {part: record[part] for part in names}:
            remedy = "restore them, or start a new run"
            raise BadInput(f"--resume {s.resume}: the data set does not hold the volumes that the run began with; {remedy}")
        return Path(s.resume)
    if rank > 0:
        return Path()  # only the first process writes
    name = "supervised" if s.supervised else f"vqseg-{s.perturb}"
    run = Path(s.out or f"runs/{Path(s.data).resolve().name}-{s.labeled}-{name}-seed{s.seed}")
    if s.out and (run / "record.json").exists():
        raise BadInput(f"--out {run}: holds a run already; --resume {run} goes on with it, or give another folder")
    number, first = 2, run.name
    while not s.out and run.exists():
        run = run.with_name(f"{first}.{number}")
        number += 1
    run.mkdir(parents=True, exist_ok=True)
    here = Path(__file__).parent
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True).stdout.strip()
    record = {"settings": asdict(s), "command": sys.argv, "commit": commit or "unknown", "torch": torch.__version__,
              "numpy": np.__version__, "python": sys.version.split()[0], "chosen_on": "val", "processes": processes, "fm": fm}
    record |= names
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
    budgets = [name for name in ("minutes", "steps", "epochs") if given.get(name)]
    if len(budgets) > 1:
        raise BadInput(f"--{budgets[0]} and --{budgets[1]}: give one of them")
    if given.get("paper"):
        given = {name: value for name, value in PAPER.items() if not (budgets and name == "epochs")} | given
    s = Settings(**given)
    if not s.minutes and not s.steps and not s.epochs:
        s.minutes = 3.0 if s.data == "phantom" else 30.0
    for f in fields(Settings):
        low, high = f.metadata["low"], f.metadata["high"]
        if isinstance(f.default, (int, float)) and not low <= getattr(s, f.name) <= high:
            raise BadInput(f"--{f.name.replace('_', '-')} {getattr(s, f.name)}: must lie in {low} to {high}")
    for name in ("temperature", "tau"):
        if not getattr(s, name) > 0:
            raise BadInput(f"--{name} {getattr(s, name)}: must be above 0")
    return s


def resumed_settings(given: dict) -> Settings:
    """The settings that a run began with. A flag that says otherwise is refused: it would be another run."""
    run = given["resume"]
    try:
        record = json.loads((Path(run) / "record.json").read_text())
        recorded, processes = record["settings"], record["processes"]
        s = Settings(**recorded | {"resume": run, "out": run})
        if record["fm"].startswith("none"):
            s.fm = "none"  # also where --fm auto would find weights by now
    except (OSError, ValueError, KeyError, TypeError):
        raise BadInput(f"--resume {run}: holds no run of train.py; give the folder that it printed") from None
    if processes != int(os.environ.get("WORLD_SIZE", 1)):
        raise BadInput(f"--resume {run}: began with {processes} processes; start as many with torchrun --nproc-per-node {processes}")
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
