"""Training: the whole method in one plain loop.

Implements Sections 3.4 to 3.6 (student and EMA teacher, Eq. 7 to 12) and the settings of 4.2.
Names: _l labeled, strong view; _u, _a unlabeled, weak and strong view; x image, y mask, _hat output

The paper does not say:
  - which view the student sees: Eq. 7 lists q(z_a) and q'(z_u). Ours is the strong one. QPM
    perturbs the tokens of x_a, D_i makes x_u from q(z_a); teacher and frozen model see x_u.
  - any warm-up: of the unlabeled loss (`--warmup`), the learning rate (100 steps), alpha (890).
  - some settings. With `--paper` an epoch is a pass over the unlabeled slices, batch 4 is 4 labeled
    and 4 unlabeled, "decay 3e-5" is weight decay, momentum 0.9. lr always falls with power 0.9.
"""

import argparse
import copy
import json
import math
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, fields
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
from data import BadInput, Dataset
from model import NETWORKS, VQSeg, ema_update, foundation_model
from qpm import PERTURBATIONS


def option(default, help: str, choices=None, low: float = 0, high: float = math.inf):
    return field(default=default, metadata=dict(help=help, choices=choices, low=low, high=high))

@dataclass
class Settings:
    """Each field is a flag with its default and its limits."""

    data: str = option("phantom", "phantom, acdc, or a folder written by extras.prepare")
    root: str = option("", "folder of acdc as downloaded; empty = ./acdc")
    labeled: int = option(0, "labeled patients; 0 = phantom 3, acdc 7, else all that have masks")
    steps: int = option(0, "length of the training; 0 = phantom 600, paper 100 epochs, else 10000")
    batch: int = option(8, "labeled slices a step and process; as many unlabeled", low=1, high=4096)
    seed: int = option(1337, "all draws of a step follow from seed, step and process", high=2**63)
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    out: str = option("", "run folder; empty = runs/DATA-LABELED-METHOD-seedSEED")
    resume: str = option("", "run folder to continue, from its last checkpoint")
    paper: bool = option(False, "as in Section 4.2 (PAPER in train.py); other flags override")
    supervised: bool = option(False, "the baseline: L_seg of Eq. 8, network without quantizer")
    perturb: str = option("qpm", "qpm is Eq. 4, shuffle the abstract's", [*PERTURBATIONS])
    eps: float = option(0.7, "strength of the perturbation", high=1)
    temperature: float = option(1.0, "T, divides d in Eq. 4; inf = uniform replacement", low=1e-6)
    codebook_size: int = option(1024, "K; 0 = no quantizer (--perturb none or dropout)", high=2**20)
    lambda_u: float = option(1.0, "weight of the unlabeled loss, Eq. 10")
    lambda_a: float = option(0.1, "weight of the alignment, Eq. 12")
    lambda_rec: float = option(1.0, "weight of L_rec in Eq. 8 and 9; 0 = D_i has no effect")
    lambda_usage: float = option(0.1, "weight of the usage term in the quantizer's loss")
    lambda_dice: float = option(1.0, "weight of the soft Dice loss in L_seg; the paper: 0")
    fm: str = option("auto", "foundation model of Eq. 11; auto = standin for phantom, else dinov2 "
                     "if available", ["auto", "dinov2", "torchscript", "standin", "none"])
    fm_weights: str = option("", "file of DINOv2's weights, or any model's in TorchScript")
    threshold: float = option(0.0, "pseudo-labels of less confidence do not count", high=1)
    warmup: float = option(0.2, "share of the steps on labeled slices alone", high=1)
    lr: float = option(3e-3, "learning rate; falls as (1 - step/steps)^0.9")
    encoder: str = option("conv16", "conv: from scratch, tokens of 16, 8 or 4 pixels; alone: "
                          "D_s sees only tokens; dinov2: the paper's", [*NETWORKS, "dinov2"])
    width: int = option(24, "channels of the first level of the conv network", low=1, high=1024)

# Section 4.2 and Eq. 8 to 12; `build` adds SGD, `open_data` 100 epochs. As without --paper, lr and
# alpha rise at first.
PAPER = {"encoder": "dinov2", "fm": "dinov2", "codebook_size": 16384, "eps": 0.7, "lambda_a": 5.0,
         "lambda_u": 1.0, "lambda_rec": 1.0, "lambda_dice": 0.0, "lambda_usage": 0.0,
         "threshold": 0.0, "warmup": 0.0, "batch": 4, "lr": 1e-4}

def vqseg_loss(s: Settings, student: nn.Module, teacher: VQSeg, fm: nn.Module | None, x_l: Tensor,
               y_l: Tensor, x_u: Tensor, x_a: Tensor, lambda_u: float, g: torch.Generator):
    """Eq. 7 to 12 on one batch: the loss, and by name its terms and the codeword indices.

    x_l, x_u, x_a (B,1,H,W), y_l (B,H,W). lambda_u = 0, the warm-up, leaves the unlabeled out.
    """
    B = len(x_l)
    # 1. Student, Eq. 7: tokens, QPM on the unlabeled ones, both branches, adapter.
    seen = torch.cat([x_l, x_a]) if lambda_u else x_l
    out = student(seen, B, s.perturb, s.eps, s.temperature, g)
    # 2. Labeled slices, Eq. 8.
    l_l = losses.labeled_loss(out.x_hat[:B], x_l, out.y_hat[:B], y_l, s.lambda_rec, s.lambda_dice)
    terms = {"seg_l": l_l.seg, "rec_l": l_l.rec, "vq": out.vq_loss, "indices": out.indices}
    loss = l_l.total
    if lambda_u:
        # 3. Teacher: pseudo-labels of the weak view. Eq. 7 lists its D_i too, which no loss uses.
        with torch.no_grad():
            pseudo = losses.pseudo_label(teacher.predict(x_u), s.threshold)
        # 4. Unlabeled slices, Eq. 9: y_hat comes from q'(z), x_hat from q(z). Then Eq. 10.
        l_u = losses.unlabeled_loss(out.x_hat[B:], x_u, out.y_hat[B:], pseudo,
                                    s.lambda_rec, s.lambda_dice)
        terms |= {"seg_u": l_u.seg, "rec_u": l_u.rec, "kept": pseudo.keep.mean()}
        loss = losses.dual_branch_loss(l_l.total, l_u.total, lambda_u)
    if fm is not None:
        # 5. The frozen model's features of x_l and of the weak x_u, Eq. 11. Total, Eq. 12.
        with torch.no_grad():
            f_fm = fm(torch.cat([x_l, x_u]) if lambda_u else x_l)
        terms["align"] = losses.alignment_loss(out.f_pfa, f_fm)
        loss = losses.total_loss(loss, terms["align"], s.lambda_a)
    # 6. The quantizer's own loss, which Eq. 12 leaves out but the codebook needs.
    loss = loss + out.vq_loss
    return loss, {"loss": loss, **terms}

def supervised_loss(s: Settings, student: nn.Module, x_l: Tensor, y_l: Tensor):
    """The baseline: L_seg of Eq. 8 and nothing else."""
    y_hat = student(x_l, len(x_l), "none", 0.0, 1.0, None).y_hat
    loss = losses.segmentation_loss(y_hat, y_l, dice_weight=s.lambda_dice)
    return loss, {"loss": loss, "seg_l": loss}

def train(s: Settings) -> Path:
    """Trains, validates, scores; returns the run folder. With torchrun each process runs this."""
    rank, world, device = evaluate.join_processes(s.device)
    dataset, rows_l, rows_u = open_data(s, world, device)
    student, teacher, fm, optimizer, meta = build(s, dataset, device)
    amp = evaluate.has_bfloat16(device)
    meta |= {"processes": world, "precision": "bfloat16" if amp else "float32"}
    run, start, best, log = open_run(s, rank, meta, student, teacher, optimizer)
    model = DistributedDataParallel(student) if world > 1 else student
    if rank == 0 and data.extra("checks"):
        data.extra("checks").before_training(run, teacher, dataset, meta, device)
    print(f"{run}: steps {start} to {s.steps} on {device}, {meta['precision']}; foundation model: "
          f"{meta['fm']}\nterms (_l labeled; _u unlabeled, after the warm-up), codewords used, "
          "their perplexity, speed, time left")
    log_every = max(1, s.steps // 50)
    recent: list[dict[str, Tensor]] = []
    began = time.perf_counter()
    for step in range(start, s.steps):
        g = generator(device, s.seed, step, rank)  # all the randomness of this step
        for group in optimizer.param_groups:  # polynomial schedule, after a short linear warm-up
            group["lr"] = s.lr * min(1.0, (step + 1) / 100) * (1 - step / s.steps) ** 0.9
        lambda_u = s.lambda_u if step >= s.warmup * s.steps else 0.0

        x_l, y_l = data.weak_view(*data.batch(dataset, rows_l, s.batch, g), g, dataset.eval_crop)
        x_u, _ = data.weak_view(*data.batch(dataset, rows_u, s.batch, g), g, dataset.eval_crop)
        x_l, x_a = data.strong_view(x_l, g), data.strong_view(x_u, g)

        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            if s.supervised:
                loss, terms = supervised_loss(s, model, x_l, y_l)
            else:
                loss, terms = vqseg_loss(s, model, teacher, fm, x_l, y_l, x_u, x_a, lambda_u, g)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        # alpha rises from 0.1 to 0.99 in 890 steps, so that at first the teacher follows closely.
        ema_update(teacher, student, min(0.99, (1 + step) / (10 + step)))

        recent.append({name: value.detach() for name, value in terms.items()})
        if (step + 1) % log_every == 0:  # only now do numbers leave the device
            log.append(evaluate.summary(step + 1, recent, s.codebook_size))
            recent = []
            speed = (step + 1 - start) / (time.perf_counter() - began)
            left = (s.steps - step - 1) / speed / 60
            print(f"{evaluate.one_line(log[-1], s.steps)} {speed:.3g}/s {left:.0f} min", flush=True)
        if (step + 1) % (5 * log_every) == 0 or step + 1 == s.steps:
            rows = evaluate.evaluate(teacher.predict, dataset, "val", device, amp, distances=False)
            dice = float(evaluate.class_means(rows)["mean"][0])
            log.append({"step": step + 1, "val_dice": round(dice, 5)})
            print(f"step {step + 1}: validation Dice of the teacher {dice:.4f}", flush=True)
            state = meta | {"step": step + 1, "val_dice": dice, "teacher": teacher.state_dict()}
            if rank == 0 and dice > best:
                evaluate.save(run / "best.pt", state)
            best = max(best, dice)
            state |= {"student": student.state_dict(), "optimizer": optimizer.state_dict()}
            if rank == 0:  # last.pt comes last: after a crash --resume goes on from the older one
                text = "".join(json.dumps(record) + "\n" for record in log)
                evaluate.save(run / "log.jsonl", text.encode())
                evaluate.save(run / "last.pt", state | {"best": best, "log": log})
    if rank == 0:
        evaluate.score_run(run, "val", device, s.root)
    if world > 1:
        dist.destroy_process_group()
    return run

def generator(device: torch.device, seed: int, step: int, rank: int) -> torch.Generator:
    """The randomness of a step, by seed, step and process: resuming needs no saved state."""
    state = np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state[0]) >> 1)

def open_data(s: Settings, world: int, device: torch.device):
    """Data set, rows of labeled and of unlabeled slices. Sets s.labeled and s.steps where 0."""
    dataset = data.load(s.data, s.root)
    few, many = dataset.training(s.labeled)
    rows_l, rows_u = dataset.rows(few), dataset.rows(many)
    s.labeled = len({case.patient for case in few})
    paper_steps = math.ceil(100 * len(rows_u) / (s.batch * world))  # 100 epochs
    s.steps = s.steps or (paper_steps if s.paper else {"phantom": 600}.get(s.data, 10_000))
    print(f"{s.data}: {s.labeled} labeled patients, {len(rows_l)} slices; {len(rows_u)} "
          f"unlabeled slices; {len(dataset.part('val'))} validation volumes")
    # A set that fits lives on the GPU, so that no step waits for the host.
    if device.type == "cuda" and 8 * dataset.images.numel() < torch.cuda.mem_get_info(device)[0]:
        dataset = dataset._replace(images=dataset.images.to(device), masks=dataset.masks.to(device))
    return dataset, rows_l.to(device), rows_u.to(device)

def build(s: Settings, dataset: Dataset, device: torch.device):
    """Student, teacher, foundation model, optimizer, a run's record for evaluation. Sets s.fm."""
    if s.fm == "auto" and s.data == "phantom":
        s.fm = "standin"
    if s.supervised or not s.lambda_a:
        s.fm = "none"
    fm, fm_name = foundation_model(s.fm, s.fm_weights)
    if s.fm == "auto":  # a resumed run keeps this, whatever weights it finds
        s.fm = "dinov2" if fm else "none"
    fm_grid = tuple(fm(torch.zeros(1, 1, data.CROP, data.CROP)).shape[1:]) if fm else None
    network = dict(classes=len(dataset.labels), width=s.width, encoder=s.encoder, fm_grid=fm_grid,
                   codebook_size=0 if s.supervised else s.codebook_size,
                   image_branch=not s.supervised, usage_weight=s.lambda_usage)
    torch.manual_seed(s.seed)
    student = VQSeg(**network)
    if s.encoder == "dinov2":
        student.encoder.load_pretrained("" if s.fm == "torchscript" else s.fm_weights)
    if dist.is_initialized() and device.type == "cuda":
        student = nn.SyncBatchNorm.convert_sync_batchnorm(student)
    student = student.to(device)
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    trained = [p for p in student.parameters() if p.requires_grad]
    if s.paper:
        optimizer = torch.optim.SGD(trained, lr=s.lr, momentum=0.9, weight_decay=3e-5, fused=True)
    else:
        optimizer = torch.optim.AdamW(trained, lr=s.lr, weight_decay=0.01, fused=True)
    meta = {"settings": asdict(s), "network": network, "fm": fm_name, "labels": dataset.labels,
            "split": dataset.split, "eval_crop": dataset.eval_crop, "window": dataset.window,
            "volumes": {case.name: [case.patient, *case.shape] for case in dataset.cases}}
    return student, teacher, fm.to(device) if fm else None, optimizer, meta

def open_run(s: Settings, rank: int, meta: dict, student, teacher, optimizer):
    """The run folder, the first step, the best Dice and the log so far."""
    method = "supervised" if s.supervised else f"vqseg-{s.perturb}"
    name = f"runs/{Path(s.data).resolve().name}-{s.labeled}-{method}-seed{s.seed}"
    while Path(name).exists():  # no run is written over
        name += "-again"
    run = Path(s.resume or s.out or name)
    if s.resume and (run / "last.pt").exists():
        _, saved = evaluate.load_run(run, torch.device("cpu"), "last.pt", student=student,
                                     teacher=teacher, optimizer=optimizer)
        return run, saved["step"], saved["best"], saved["log"]
    if rank == 0:
        if (run / "config.json").exists() and not s.resume:
            raise BadInput(f"{run}: holds a run; --resume {run} continues it, --out starts another")
        run.mkdir(parents=True, exist_ok=True)
        # A shell, since git may be missing; it also says nothing where the code is no checkout.
        git = subprocess.run("git describe --always --dirty", shell=True, capture_output=True,
                             cwd=Path(__file__).parent, text=True)
        commit = git.stdout.strip() or "unknown"
        config = meta | {"commit": commit, "torch": torch.__version__, "command": sys.argv}
        evaluate.save(run / "config.json", json.dumps(config, indent=2).encode() + b"\n")
    return run, 0, -1.0, []

def read_settings(arguments: list[str] | None = None) -> Settings:
    """The command line; with --resume, the settings that the run began with."""
    parser = argparse.ArgumentParser(description="Train VQ-Seg", argument_default=argparse.SUPPRESS)
    for f in fields(Settings):
        how = {"type": f.type, "choices": f.metadata["choices"]}
        if f.type is bool:
            how = {"action": "store_true"}
        text = f"{f.metadata['help']} (default: {f.default})"
        parser.add_argument("--" + f.name.replace("_", "-"), help=text, **how)
    given = vars(parser.parse_args(arguments))  # only what stands on the command line
    for name in given.keys() & {"root", "fm_weights"}:  # --resume may run in another folder
        given[name] = str(Path(given[name]).expanduser().resolve())
    base = PAPER if given.get("paper") else {}
    if "resume" in given:
        try:
            base = json.loads(Path(given["resume"], "config.json").read_bytes())["settings"]
            base = {f.name: f.type(base[f.name]) for f in fields(Settings)}
        except Exception:  # a damaged file can fail in any way
            fault = "no readable run of this version; begin anew"
            raise BadInput(f"--resume {given['resume']}: {fault}") from None
        for name in given.keys() - {"resume", "root", "device", "fm_weights"}:
            if given[name] != base[name]:
                values = f"{given[name]}: RUN began with {base[name]}; leave it out"
                raise BadInput(f"--{name.replace('_', '-')} {values}")
    s = Settings(**base | given)
    for f in fields(Settings):
        flag, value = "--" + f.name.replace("_", "-"), getattr(s, f.name)
        low, high = f.metadata["low"], f.metadata["high"]
        if value not in (f.metadata["choices"] or [value]):  # in a record of another version
            raise BadInput(f"{flag} {value}: must be one of {', '.join(f.metadata['choices'])}")
        if f.name == "codebook_size" and not s.supervised and s.perturb not in ("none", "dropout"):
            low = 2  # there must be another codeword
        if f.type in (int, float) and not low <= value <= high:
            raise BadInput(f"{flag} {value}: must be {low} to {high}")
    if not s.root and Path(s.data).is_dir():
        s.root = str(Path(s.data).resolve())
    return s

if __name__ == "__main__":
    evaluate.command("train.py", lambda: train(read_settings()), "allow it, or change --out")
