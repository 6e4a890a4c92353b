"""Evaluation: 3-D metrics at native size, the table of a run; also run files, processes, log.

Implements the numbers of Section 4.1 and of Tables 1 and 7 (Dice, Jaccard, 95HD, ASD) by the
field's protocol: each frame is one volume, each class is scored in 3-D against the native mask;
mean over volumes, then over classes; one view of a slice, no post-processing unless flags say so.

The paper does not say which distances it takes. Ours are medpy's, in voxels, as in other papers:
  - surface = mask minus its 6-connected erosion; outside the volume counts as background.
  - hd95 = 95th percentile of both directed distance sets pooled (MONAI: the larger of two).
  - asd = mean distance from the predicted to the true surface, one direction only.
  - a class in neither mask is not scored: all four are nan and left out of the means.
  - a class in one mask only: Dice = Jaccard = 0, and both distances are the volume's diagonal.
    (Other papers give an empty prediction distance 0, as if it were perfect.)
"""

import argparse
import csv
import io
import math
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import data
from data import BadInput, Dataset
from model import VQSeg
from vq import usage

METRICS = ["dice", "jaccard", "hd95", "asd"]
PROTOCOL = "one view, no post-processing"
Model = Callable[[Tensor], Tensor]  # (B,1,H,W) -> logits (B,C,H,W)

class Row(NamedTuple):
    """The score of one class in one volume."""

    case: str
    label: str
    dice: float
    jaccard: float
    hd95: float
    asd: float
    empty: bool  # the class is in the mask, and the prediction has none of it

def dice(prediction: np.ndarray, truth: np.ndarray) -> float:
    """2 |A n B| / (|A| + |B|) of two boolean masks, in [0,1]; nan where both are empty."""
    size = int(prediction.sum()) + int(truth.sum())
    return 2 * int((prediction & truth).sum()) / size if size else math.nan

def jaccard(prediction: np.ndarray, truth: np.ndarray) -> float:
    """|A n B| / |A u B| of two boolean masks, in [0,1]; nan where both are empty."""
    union = int((prediction | truth).sum())
    return int((prediction & truth).sum()) / union if union else math.nan

def surface(mask: np.ndarray) -> np.ndarray:
    """Voxels with a face neighbor outside the mask: (Z,H,W) bool -> (N,3)."""
    padded = np.pad(mask, 1)
    inside = padded.copy()
    for axis in range(3):
        inside &= np.roll(padded, 1, axis) & np.roll(padded, -1, axis)
    return np.argwhere(padded & ~inside) - 1

def nearest_distances(a: Tensor, b: Tensor) -> Tensor:
    """From each point of a to the nearest of b: (N,3), (M,3) -> (N,). As in Eq. 2, the nearest b
    has the largest a.b - |b|^2/2. Its distance is then computed from the points."""
    half_squares = b.square().sum(1) / 2
    chunks = a.split(max(1, 2**17 // len(b)))  # the table of one stays in the cache
    brackets = (torch.addmm(half_squares, chunk, b.T, beta=-1) for chunk in chunks)
    index = torch.cat([bracket.max(1).indices for bracket in brackets])  # (N,)
    return torch.linalg.vector_norm(a - b[index], dim=1)

def surface_distances(prediction: np.ndarray, truth: np.ndarray, spacing=(1, 1, 1)) -> tuple:
    """Surface distances pred_to_gt, gt_to_pred of two (Z,H,W) masks; spacing (z,y,x) of a voxel."""
    if not prediction.any() or not truth.any():
        diagonal = np.linalg.norm((np.array(truth.shape) - 1) * spacing)
        value = np.array([diagonal if prediction.any() or truth.any() else math.nan])
        return value, value
    a = torch.from_numpy(surface(prediction) * np.array(spacing, float))
    b = torch.from_numpy(surface(truth) * np.array(spacing, float))
    return nearest_distances(a, b).numpy(), nearest_distances(b, a).numpy()

def hd95(pred_to_gt: np.ndarray, gt_to_pred: np.ndarray) -> float:
    """95th percentile of both sets of surface distances, pooled; nan if one is nan."""
    return float(np.percentile(np.concatenate([pred_to_gt, gt_to_pred]), 95))

def asd(pred_to_gt: np.ndarray) -> float:
    """Mean distance from the predicted to the true surface; nan if one is nan."""
    return float(np.mean(pred_to_gt))

def score(case: str, prediction: np.ndarray, truth: np.ndarray, labels: list[str],
          spacing=(1, 1, 1), distances: bool = True) -> list[Row]:
    """One row for each foreground class; prediction and truth (Z,H,W) integer."""
    rows = []
    for k, label in enumerate(labels[1:], start=1):
        p, t = prediction == k, truth == k
        both = surface_distances(p, t, spacing) if distances else ([math.nan], [math.nan])
        rows.append(Row(case, label, dice(p, t), jaccard(p, t), hd95(*both), asd(both[0]),
                        empty=t.any() and not p.any()))
    return rows

@torch.no_grad()
def predict(model: Model, images: Tensor, shape: tuple[int, int], crop: int, device: torch.device,
            amp: bool = False, batch: int = 8) -> np.ndarray:
    """Slices (Z,G,G) -> labels (Z,H,W) uint8 at native size (H,W)."""
    predictions = []
    for chunk in images.split(batch):
        x = data.crop_center(chunk.to(device).float(), crop)[:, None]  # (b,1,crop,crop)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            logits = model(x)
        p = data.to_native(logits.float().softmax(1), shape)  # (b,C,H,W)
        predictions.append(p.argmax(1).to(torch.uint8).cpu())
    return torch.cat(predictions).numpy()

def evaluate(model: Model, dataset: Dataset, part: str, device: torch.device, amp: bool = False,
             distances: bool = True, post_process: Callable | None = None) -> list[Row]:
    """Scores of all volumes of train, val or test; post_process changes a predicted volume."""
    rows: list[Row] = []
    for case in dataset.part(part):
        images = dataset.images[case.first : case.first + case.shape[0]]
        prediction = predict(model, images, case.shape[1:], dataset.eval_crop, device, amp)
        if post_process:
            prediction = post_process(prediction)
        truth = data.read_mask(case, len(dataset.labels))
        spacing = case.spacing if dataset.unit == "mm" else (1, 1, 1)
        case_rows = score(case.name, prediction, truth, dataset.labels, spacing, distances)
        if distances:  # slow: show progress
            print(f"{case.name}: Dice {nanmean([r[2:3] for r in case_rows])[0]:.4f}", flush=True)
        rows += case_rows
    return rows

def class_means(rows: list[Row]) -> dict[str, np.ndarray]:
    """Each class -> the four metrics, mean over the volumes; and "mean", over the classes."""
    labels = dict.fromkeys(r.label for r in rows)
    means = {k: nanmean([r[2:6] for r in rows if r.label == k]) for k in labels}
    return means | {"mean": nanmean(list(means.values()))}

def nanmean(values: list) -> np.ndarray:
    """Mean of each column, nan left out: (n,m) -> (m,); nan where all are nan."""
    return np.ma.masked_invalid(values).mean(0).filled(math.nan)

def table(rows: list[Row]) -> str:
    """The means, and in how many volumes the prediction lacks a class that the mask has."""
    lines = [f"{'class':10}" + "".join(f"{m:>9}" for m in METRICS) + "   empty predictions"]
    for label, values in class_means(rows).items():
        counted = [r for r in rows if label in (r.label, "mean")]
        cells = "".join(f"{value:9.4f}" for value in values)
        lines.append(f"{label:10}{cells}   {sum(r.empty for r in counted)} of {len(counted)}")
    return "\n".join(lines)

def report(path: Path, rows: list[Row], saved: dict, unit: str, how: str = PROTOCOL) -> None:
    """Writes the rows into a CSV file; prints the table and what it is of."""
    head = [f"{name}_{unit}" if name in ("hd95", "asd") else name for name in Row._fields]
    text = io.StringIO()
    csv.writer(text).writerows([head, *rows])
    save(path, text.getvalue().encode(errors="backslashreplace"))
    print(f"\n{path}: teacher of step {saved['step']}, the best on validation; {how}, distances in "
          f"{unit}\nfoundation model: {saved['fm']}\n{table(rows)}")

def score_run(run: Path, part: str, device: torch.device, root: str = "", unit: str = "", **beyond):
    """The table of a run's best teacher, also into a CSV file, and pictures.

    Flags beyond the field's protocol write a CSV file named after them, and no pictures.
    """
    model, saved = load_run(run, device)
    dataset = data.load(saved["settings"]["data"], root or saved["settings"]["root"], (part,))
    dataset = dataset._replace(split=saved["split"], unit=unit or dataset.unit)
    network, post_process, names = model.predict, None, []
    if any(beyond.values()):
        network, post_process, names = data.extra("predict").extended(model, saved, beyond)
    how = ", ".join(names) or PROTOCOL
    names += [unit] if unit else []
    path = run / f"{'-'.join([part, *names])}.csv"
    if data.extra("checks"):
        data.extra("checks").before_scoring(saved, dataset, part, path)
    # Of train only what has a mask can be scored.
    dataset = dataset._replace(cases=[case for case in dataset.cases if case.mask is not None])
    rows = evaluate(network, dataset, part, device, post_process=post_process)
    report(path, rows, saved, dataset.unit, how)
    if not names and data.extra("figures"):
        data.extra("figures").draw_run(run, model, dataset, part, rows, device)

def command(name: str, run, remedy: str) -> None:
    """Runs a command line. A user's error becomes one line on stderr and exit status 2."""
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace")  # for characters it cannot encode
    try:
        run()
    except (KeyboardInterrupt, BrokenPipeError):  # Ctrl-C, or a closed pipe
        sys.exit(f"{name}: stopped; a training continues with --resume RUN")
    except (BadInput, OSError, ImportError, MemoryError, RuntimeError) as error:
        memory = isinstance(error, MemoryError) or "alloc" in str(error).lower()
        if isinstance(error, RuntimeError) and not memory:  # a bug in our code
            raise
        end = f"; {remedy}" if isinstance(error, OSError) else ""
        if memory and not isinstance(error, BadInput):
            end = "; not enough memory: training needs less with a smaller --batch or --width"
        print(f"{name}: {error}{end}".replace("\n", " "), file=sys.stderr)
        sys.exit(2)

def save(path: Path, content: dict | bytes) -> None:
    """Writes a checkpoint or a file atomically: a crash leaves the previous file."""
    temporary = path.with_suffix(".tmp")
    try:
        if isinstance(content, dict):
            torch.save(content, temporary)
        else:
            temporary.write_bytes(content)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # a full disk
        temporary.unlink(missing_ok=True)
        raise BadInput(f"{path}: {error}; make room or write elsewhere, then --resume") from None

def load_run(run: Path, device: torch.device, name: str = "best.pt", **resumed) -> tuple:
    """The teacher of a run, and its checkpoint; the objects in `resumed` load their states."""
    path = Path(run) / name
    try:
        if zipfile.ZipFile(path).testzip():  # torch.load does not look at the checksums
            raise ValueError
        saved = torch.load(path, map_location=device, weights_only=True)
        model = VQSeg(**saved["network"]).to(device)
        model.load_state_dict(saved["teacher"])
        for key, module in resumed.items():
            module.load_state_dict(saved[key])
        for key in ("settings", "labels", "split", "fm", "window", "eval_crop"):
            saved[key]  # a KeyError where it is missing
    except Exception as error:  # a foreign file can fail in any way, and in many lines
        fault = f"no whole checkpoint of this version ({error!r:.80}); copy it again"
        remedy = "name the run's own data with --root" if resumed else "give another run"
        raise BadInput(f"{path}: {fault}, or {remedy}") from None
    return model.eval(), saved

def join_processes(name: str) -> tuple[int, int, torch.device]:
    """Rank, number of processes, device. With torchrun, one process for each GPU."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    name = f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and world > 1 else name
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise BadInput(f"--device {name}: cannot be used here; try --device cpu") from None
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if rank > 0:
        sys.stdout = open(os.devnull, "w", errors="replace")  # only the first process prints
    return rank, world, device

def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware has bfloat16. Emulated, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return device.type == "cpu" and (able.get("amx_bf16", False) or able.get("avx512_bf16", False))

def summary(step: int, recent: list[dict[str, Tensor]], codebook_size: int) -> dict:
    """Means of the terms over the last steps, and the use of the codebook, for the log."""
    record = {"step": step}
    for name in [name for name in recent[-1] if name != "indices"]:
        values = torch.stack([terms[name] for terms in recent if name in terms])
        record[name] = round(values.float().mean().item(), 5)
    if not math.isfinite(record["loss"]):
        raise BadInput(f"step {step}: the loss is not finite: {record}; try a smaller --lr")
    if "indices" in recent[-1] and codebook_size:
        indices = torch.cat([terms["indices"].flatten() for terms in recent])
        record["used"], perplexity = usage(indices.bincount(minlength=codebook_size))
        record["perplexity"] = round(perplexity)
    return record

def one_line(r: dict, steps: int) -> str:
    """The terms of Eq. 12 and the use of the codebook, for a person to read."""
    text = f"{r['step']}/{steps}"
    for name in ("seg_l", "rec_l", "seg_u", "rec_u", "align"):
        text += f" {name} {r[name]:.2f}" if name in r else ""
    return text + (f" used {r['used']:.0%} ppl {r['perplexity']}" if "used" in r else "")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Score the best teacher of a run.")
    parser.add_argument("run", type=Path, help="run folder of train.py")
    parser.add_argument("--split", default="val", choices=["train", "val", "test"], dest="part")
    parser.add_argument("--root", default="", help="where the data is now")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--unit", default="", choices=["mm", "voxels"], help="of distances")
    if data.extra("predict"):
        data.extra("predict").add_flags(parser)
    a = vars(parser.parse_args())
    command("evaluate.py", lambda: score_run(**a | {"device": join_processes(a["device"])[2]}),
            "copy RUN to where you may write")
