"""Evaluation: 3-D metrics per volume at native size, predictions for new scans, and a table over runs.

Implements the numbers of Tables 1 and 7 (Dice, Jaccard, 95HD, ASD) by the field's protocol, and the t-test of Appendix D. Every frame
is one volume, each class is scored in 3-D against the native mask, mean over volumes, then over classes. Definitions are medpy's,
which every paper on this benchmark uses:
  - surface = mask minus its 6-connected erosion; beyond the volume's edge counts as background.
  - hd95 = 95th percentile of both directed distance sets *pooled* (MONAI: the larger of two percentiles, which is larger).
  - asd = mean distance from the predicted surface to the true one: one direction only.
  - distances in voxels, z counted like x and y, unless a spacing in mm is given.

THE EMPTY-MASK RULE, here once and nowhere else (peers score an empty prediction as distance 0, a perfect one):
  - class in neither mask: nothing to score, all four are nan and left out of the means.
  - class in one mask only: Dice = Jaccard = 0, and both distances are the diagonal of the volume, the longest there is.

The peers look at a slice once, and count all that they find. Training chooses its best checkpoint so, which is quicker; else
  - a prediction is the mean over nine turned and scaled views of a slice, `VIEWS`.
  - of a heart only the largest connected piece of each class counts, for it has one of each; of what else, all. All 53 short
    ACDC runs (README, "What held") that were scored both ways gained by it, 0.002 to 0.034 validation Dice. `--pieces all` is without.

    python evaluate.py RUN [--split test]                          scores, into RUN/val.csv or RUN/test.csv
    python evaluate.py RUN [RUN ...] --predict SCAN --out SEG       a new scan, or a folder of them; several runs: their mean
    python evaluate.py RUN RUN [RUN ...]                            one table over runs, seeds together
    python evaluate.py results/eps.csv --sweep eps --figure eps.png   the same from the records of runs, and a figure
"""

import argparse
import csv
import json
import math
import os
import pickle
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import data
from data import BadInput, Case, Slices
from model import VQSeg, load_teacher

# How prediction looks at a slice: (rotation in radians, scale), well inside of what training shows (data.weak_view). VQ-Seg's 30
# minutes on ACDC: validation Dice 0.876 in these nine views, 0.874 in the three angles or the three scales alone, 0.872 in one.
VIEWS = [(angle, zoom) for angle in (-0.3, 0.0, 0.3) for zoom in (0.9, 1.0, 1.1)]
ONE_VIEW = [(0.0, 1.0)]
METRICS = ["dice", "jaccard", "hd95", "asd"]
NOT_OURS = (RuntimeError, KeyError, TypeError, ValueError, EOFError, AttributeError, pickle.UnpicklingError)  # from loading a foreign file
Model = Callable[[Tensor], Tensor]  # (B,1,H,W) -> logits (B,C,H,W)

# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def dice(prediction: np.ndarray, truth: np.ndarray) -> float:
    """2 |A n B| / (|A| + |B|) of two boolean masks, in [0,1]."""
    both, total = np.count_nonzero(prediction & truth), np.count_nonzero(prediction) + np.count_nonzero(truth)
    return 2 * both / total if total else float("nan")


def jaccard(prediction: np.ndarray, truth: np.ndarray) -> float:
    """|A n B| / |A u B| of two boolean masks, in [0,1]."""
    union = np.count_nonzero(prediction | truth)
    return np.count_nonzero(prediction & truth) / union if union else float("nan")


def bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """Cuts all that is True out of a (Z,H,W) mask, which is not empty: a heart fills little of its volume, a lesion of a chest less."""
    there = [np.flatnonzero(mask.any(axis)) for axis in ((1, 2), (0, 2), (0, 1))]
    return tuple(slice(places[0], places[-1] + 1) for places in there)


def surface(mask: np.ndarray) -> np.ndarray:
    """Voxels of the mask with at least one of their 6 face neighbors outside it: (Z,H,W) bool, not empty -> (N,3) coordinates."""
    box = bounding_box(mask)
    mask = mask[box]
    padded = np.pad(mask, 1)
    inside = mask.copy()
    for axis in range(3):
        for step in (-1, 1):
            inside &= np.roll(padded, step, axis)[1:-1, 1:-1, 1:-1]
    return np.argwhere(mask & ~inside) + [side.start for side in box]


def directed_distances(a: np.ndarray, b: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """From each point of a to the nearest point of b: (N,3), (M,3) -> (N,). Exact, in bounded memory."""
    scale = torch.tensor(spacing, dtype=torch.float64)
    a, b = torch.from_numpy(a) * scale, torch.from_numpy(b) * scale
    rows = max(1, 2**22 // len(b))
    exact = "donot_use_mm_for_euclid_dist"
    return torch.cat([torch.cdist(part, b, compute_mode=exact).min(1).values for part in a.split(rows)]).numpy()


def surface_distances(prediction: np.ndarray, truth: np.ndarray, spacing: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Both directed distance sets, prediction -> truth and truth -> prediction, with the empty-mask rule."""
    if not prediction.any() and not truth.any():
        nothing = np.array([float("nan")])
        return nothing, nothing
    if not prediction.any() or not truth.any():
        diagonal = np.linalg.norm((np.array(truth.shape) - 1) * spacing)
        return np.array([diagonal]), np.array([diagonal])
    a, b = surface(prediction), surface(truth)
    return directed_distances(a, b, spacing), directed_distances(b, a, spacing)


def hd95(prediction: np.ndarray, truth: np.ndarray, spacing: tuple[float, ...] = (1, 1, 1)) -> float:
    """95th percentile of the pooled surface distances of two (Z,H,W) boolean masks; voxels, or mm with a (z,y,x) spacing."""
    return float(np.percentile(np.concatenate(surface_distances(prediction, truth, spacing)), 95))


def asd(prediction: np.ndarray, truth: np.ndarray, spacing: tuple[float, ...] = (1, 1, 1)) -> float:
    """Mean distance from the predicted surface to the true surface, same arguments and units as hd95."""
    return float(surface_distances(prediction, truth, spacing)[0].mean())


class Row(NamedTuple):
    """One class of one volume."""

    case: str
    label: str
    dice: float
    jaccard: float
    hd95: float
    asd: float
    empty: bool  # the class is in the mask, and nothing of it was predicted


def score(case: str, prediction: np.ndarray, truth: np.ndarray, labels: list[str], spacing=(1, 1, 1), distances: bool = True) -> list[Row]:
    """One row for each foreground class; prediction and truth (Z,H,W) integer. distances=False leaves hd95 and asd nan."""
    rows = []
    for k, label in enumerate(labels[1:], start=1):
        p, t = prediction == k, truth == k
        far = (float("nan"), float("nan"))
        if distances:
            there, back = surface_distances(p, t, spacing)
            far = float(np.percentile(np.concatenate([there, back]), 95)), float(there.mean())
        rows.append(Row(case, label, dice(p, t), jaccard(p, t), *far, bool(t.any() and not p.any())))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Predictions


def turn(x: Tensor, angle: float, zoom: float) -> Tensor:
    """(B,C,H,W) rotated by angle (radians) and scaled by zoom about its center; turn(., -angle, 1 / zoom) is the way back."""
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    theta = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]], device=x.device).expand(len(x), 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def largest_piece(mask: np.ndarray) -> np.ndarray:
    """Of the pieces of a (Z,H,W) boolean mask, connected by faces, the one with the most voxels."""
    if not mask.any():
        return mask
    box = bounding_box(mask)
    inside, before = mask[box], None
    # Each voxel has a number, and takes the highest one that it can see along a line that stays inside, until none changes.
    number = np.arange(1, inside.size + 1).reshape(inside.shape) * inside
    while not np.array_equal(number, before):
        before = number
        for axis in (0, 0, 1, 1, 2, 2):  # twice: there and back
            gaps = np.cumsum(~inside, axis) * (inside.size + 1)  # rise from run to run, so that the running maximum begins anew
            number = (np.maximum.accumulate(number + gaps, axis) - gaps) * inside
            number, inside = np.flip(number, axis), np.flip(inside, axis)
    values, counts = np.unique(number[inside], return_counts=True)
    largest = np.zeros_like(mask)
    largest[box] = number == values[counts.argmax()]
    return largest


@torch.no_grad()
def predict(models: list[Model], slabs: Iterable[np.ndarray], device: torch.device, view: int = data.VIEW, amp: bool = False,
            views: list[tuple[float, float]] = VIEWS, one_piece: bool = False, batch: int = 8) -> np.ndarray:
    """Slabs (n,H,W) float in [0,1] of a volume -> (Z,H,W) uint8 labels at native size. Each slice on its own, its central crop at once.

    The probabilities are a mean over models and over views of the slice, each turned back. With one_piece, what a class has beside
    its largest piece in the volume becomes background.
    """
    out = []
    for slab in slabs:
        for part in torch.from_numpy(slab).split(batch):
            x, p = data.crop_center(data.to_grid(part), view)[:, None].to(device), 0.0
            for angle, zoom in views:
                turned = turn(x, angle, zoom)
                for model in models:
                    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                        logits = model(turned)
                    p = p + turn(logits.float().softmax(1), -angle, 1 / zoom) / (len(views) * len(models))
            out.append(data.from_grid(data.uncrop(p), slab.shape[1:]).argmax(1).to(torch.uint8).cpu())
    labels = torch.cat(out).numpy()
    for k in np.unique(labels[labels > 0]) if one_piece else ():
        labels[(labels == k) & ~largest_piece(labels == k)] = 0
    return labels


def evaluate(models: list[Model], cases: list[Case], labels: list[str], device: torch.device, view: int = data.VIEW, amp: bool = False,
             distances: bool = True, mm: bool = False, views: list[tuple[float, float]] = VIEWS, one_piece: bool = False) -> list[Row]:
    """Score every case. Used by train.py for validation, there in one view, and for the table."""
    rows = []
    for case in cases:
        volume = data.open_volume(case.images)
        if mm and not (volume.affines and np.isfinite(volume.spacing).all() and min(volume.spacing) > 0):
            raise BadInput(f"{case.images[0]}: gives no voxel spacing in mm; correct its header, or leave out --mm")
        truth = data.read_mask(case, len(labels))
        prediction = predict(models, data.scaled(volume, case.window), device, view, amp, views, one_piece)
        rows += score(case.name, prediction, truth, labels, volume.spacing if mm else (1, 1, 1), distances)
    return rows


def predict_file(models: list[Model], source: Path, target: Path, saved: dict, device: torch.device) -> None:
    """Segment a NIfTI volume, or each time point of a 4-D one: same shape, affines, zooms and orientation, integer labels, and a PNG."""
    picture = target.with_name(data.stem(target) + ".png")
    for path in (target, picture):
        if path.exists():
            raise BadInput(f"{path}: is there already and is not written over; remove it or give another --out")
    series = data.open_nifti(source, frame=0)
    file = nib.load(source)
    if math.prod(file.shape[4:]) > 1:
        raise BadInput(f"{source}: has shape {file.shape}; 3-D, or 4-D with time as the last axis, is needed")
    if series.axes != saved["axes"] and saved["axes"]:
        print(f"WARNING: {source} is stored in {series.axes}, but the training scans in {saved['axes']}: it looks turned", flush=True)
    frames = [data.open_nifti(source, frame) for frame in range(math.prod(file.shape[3:4]))]
    window, view = data.read_window(saved["settings"]["data"], saved["settings"]["window"]), saved["settings"]["view"]
    found = [predict(models, data.scaled(volume, window), device, view, one_piece=one_piece(saved)) for volume in frames]  # (Z,H,W) each
    voxels = np.stack([labels.transpose(2, 1, 0) for labels in found], -1).reshape(file.shape)
    kind, header = file.get_data_dtype(), file.header.copy()
    fits = kind.kind in "iu" and np.iinfo(kind).max >= voxels.max()
    header.set_data_dtype(kind if fits else np.uint8)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0  # of the scan's intensities
    # The affine is the header's own, so nibabel leaves sform and qform as they are, also where they differ.
    temporary = target.with_name(f".{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        nib.save(type(file)(voxels.astype(header.get_data_dtype()), file.affine, header), temporary)
        os.replace(temporary, target)
        draw_overlay(data.scaled(frames[0], window), found[0], picture)
    except OSError as error:
        raise BadInput(f"{target}: cannot be written ({data.first_line(error)}); make room, or give another --out") from None
    finally:
        temporary.unlink(missing_ok=True)


def predict_all(models: list[Model], source: Path, out: Path, saved: dict, device: torch.device) -> int:
    """A file, or all NIfTI files of a folder into another: one that is bad gets its line, the others go on. How many were bad."""
    if not source.is_dir():
        if not out.name.endswith((".nii", ".nii.gz")):
            raise BadInput(f"--out {out}: must be the name of a .nii or .nii.gz file, as --predict is")
        predict_file(models, source, out, saved, device)
        print(f"wrote {out} and its picture")
        return 0
    files, bad = data.nifti_files(data.contents(source)), 0
    if not files:
        raise BadInput(f"--predict {source}: no .nii or .nii.gz file in it; give the folder that holds the scans")
    below = len(data.nifti_files(f for f in source.rglob("*") if not f.is_relative_to(out))) - len(files)
    if below:
        print(f"WARNING: {source}: {below} NIfTI files in folders below it are left alone; give each such folder by itself", flush=True)
    if out.exists() and (not out.is_dir() or out.samefile(source)):
        raise BadInput(f"--out {out}: must be a folder, and another one than that of the scans")
    for number, file in enumerate(files, start=1):
        done = "is there already, left alone" if (out / file.name).exists() else "written"
        try:
            if done == "written":
                predict_file(models, file, out / file.name, saved, device)
            print(f"{number} of {len(files)}: {out / file.name} {done}", flush=True)
        except BadInput as error:
            print(f"evaluate.py: {error}", file=sys.stderr, flush=True)
            bad += 1
    return bad


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def mean(values: Iterable[float]) -> float:
    """Of those that are not nan; nan if there are none."""
    some = [value for value in values if not math.isnan(value)]
    return float(sum(some) / len(some)) if some else float("nan")


def class_means(rows: list[Row]) -> dict[str, list[float]]:
    """For each class the four metrics, each a mean over the volumes that have it."""
    labels = dict.fromkeys(r.label for r in rows)
    return {label: [mean(getattr(r, m) for r in rows if r.label == label) for m in METRICS] for label in labels}


def means(rows: list[Row]) -> list[float]:
    """The four metrics, mean over volumes for each class, then over classes."""
    return [mean(column) for column in zip(*class_means(rows).values())]


def mean_dice(rows: list[Row]) -> float:
    return means(rows)[0]


def table(rows: list[Row]) -> str:
    """Per class and overall: mean +- standard deviation over volumes, and how many volumes lack the class altogether."""
    lines = [f"{'class':8}" + "".join(f"{m:>18}" for m in METRICS) + "   empty predictions"]
    for label, middle in class_means(rows).items():
        mine = [r for r in rows if r.label == label]
        spread = [mean((getattr(r, m) - middle[k]) ** 2 for r in mine) ** 0.5 for k, m in enumerate(METRICS)]
        cells = "".join(f"{m:>9.4f} +-{s:>7.4f}" for m, s in zip(middle, spread))
        lines.append(f"{label:8}{cells}   {sum(r.empty for r in mine)} of {len(mine)}")
    lines.append(f"{'mean':8}" + "".join(f"{m:>9.4f}{'':9}" for m in means(rows)) + f"   {sum(r.empty for r in rows)} of {len(rows)}")
    return "\n".join(lines)


def write_csv(path: Path, rows: list[Row]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows(rows)


def read_csv(path: Path) -> list[Row]:
    try:
        with open(path, newline="") as file:
            lines = list(csv.DictReader(file))
        return [Row(x["case"], x["label"], *(float(x[m]) for m in METRICS), x["empty"] == "True") for x in lines]
    except (OSError, KeyError, ValueError) as error:
        raise BadInput(f"{path}: cannot be read as a table of scores ({data.first_line(error)}); remove it and evaluate again") from None


def t_test(a: list[float], b: list[float]) -> float:
    """Appendix D: p of a paired two-tailed t-test, in [0,1]; nan for under two pairs or for differences without any spread.

    Student's distribution in closed form for n whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4).
    """
    difference = np.subtract(a, b)
    n = len(difference) - 1
    if n < 1 or np.ptp(difference) == 0:
        return float("nan")
    t = abs(difference.mean()) / (difference.std(ddof=1) / math.sqrt(n + 1))
    theta = math.atan(t / math.sqrt(n))
    cos, sin = math.cos(theta), math.sin(theta)
    if n % 2:
        term, sums = cos, 0.0
        for k in range(1, n, 2):  # cos + 2/3 cos^3 + 2/3 4/5 cos^5 + ...
            sums += term
            term *= (k + 1) / (k + 2) * cos**2
        return 1 - 2 / math.pi * (theta + sin * sums)
    term, sums = 1.0, 0.0
    for k in range(0, n, 2):  # 1 + 1/2 cos^2 + 1/2 3/4 cos^4 + ...
        sums += term
        term *= (k + 1) / (k + 2) * cos**2
    return 1 - sin * sums


class Record(NamedTuple):
    """What a table needs of a run: a line of results/*.csv, from which the table can be made again without the run."""

    run: str
    commit: str
    seed: int
    fm: str
    dice: float
    jaccard: float
    hd95: float
    asd: float
    empty: int
    scored: int  # classes of volumes
    utilization: float  # of the codebook over the training slices, by the teacher that is scored; nan without a codebook
    perplexity: float
    settings: str  # JSON, without what does not change what is learned
    log: str  # JSON, the lines of log.jsonl with a validation


def record_of(run: Path, split: str, device: torch.device, root: str = "") -> Record:
    saved, rows = load(run, torch.device("cpu"))[1], scores(run, split, device, root)
    about, result = (json.loads((run / name).read_text()) if (run / name).exists() else {} for name in ("record.json", "result.json"))
    settings = {k: v for k, v in saved["settings"].items() if k not in ("seed", "out", "root", "resume", "device")}
    settings["pieces"] = "largest" if one_piece(saved) else "all"  # a run from before this setting is scored like others
    lines: dict[int, dict] = {}
    for text in (run / "log.jsonl").read_text().splitlines() if (run / "log.jsonl").exists() else []:
        line = json.loads(text)
        lines.setdefault(line["step"], {}).update((k, v) for k, v in line.items() if k in ("step", "loss", "utilization", "val_dice"))
    log = [line for line in lines.values() if "val_dice" in line]
    return Record(run.name, about.get("commit", "unknown"), saved["settings"]["seed"], saved["fm"], *(round(m, 5) for m in means(rows)),
                  sum(r.empty for r in rows), len(rows), result.get("utilization", math.nan), round(result.get("perplexity", math.nan), 1),
                  json.dumps(settings), json.dumps(log))  # fmt: skip


def write_records(path: Path, records: list[Record]) -> None:
    with open(path, "x", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([Record._fields, *records])


def read_records(path: Path) -> list[Record]:
    kinds = Record.__annotations__
    try:
        with open(path, newline="") as file:
            records = [Record(**{name: kinds[name](value) for name, value in line.items()}) for line in csv.DictReader(file)]
        if not records:
            raise ValueError("no lines")
        return records
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise BadInput(f"{path}: cannot be read as records of runs ({data.first_line(error)}); give what --records wrote") from None


def by_settings(records: list[Record]) -> list[tuple[dict, list[Record]]]:
    """Runs that differ in nothing but their seed, together; with each group those of its settings in which groups differ."""
    groups: dict[str, dict[int, Record]] = {}
    for record in records:
        key = json.dumps(json.loads(record.settings) | {"model": record.fm}, sort_keys=True)  # an older run has another order
        seeds = groups.setdefault(key, {})
        if record.seed in seeds:
            raise BadInput(f"{record.run}: has the settings and the seed of {seeds[record.seed].run}; leave one of the two out")
        seeds[record.seed] = record
    firsts = [next(iter(seeds.values())) for seeds in groups.values()]
    settings = [json.loads(first.settings) | {"model": first.fm} for first in firsts]
    names = dict.fromkeys(name for s in settings for name in s)  # an older run lacks the newest
    differ = [name for name in names if len({json.dumps(s.get(name)) for s in settings}) > 1]
    return [({name: s.get(name) for name in differ}, [seeds[k] for k in sorted(seeds)]) for s, seeds in zip(settings, groups.values())]


def compare(records: list[Record]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of one table over runs, seeds together: mean +- standard deviation over seeds."""
    lines, first = [], None
    groups = by_settings(records)
    for differ, group in groups:
        numbers = np.array([(r.dice, r.jaccard, r.hd95, r.asd, r.utilization) for r in group])  # (seeds,5)
        spread = [f" +- {d:.4f}" for d in numbers.std(0, ddof=1)] if len(group) > 1 else [""] * 5
        cells = [f"{m:.4f}{d}" if not math.isnan(m) else "-" for m, d in zip(numbers.mean(0), spread)]
        by_seed = {r.seed: r.dice for r in group}
        first = first or by_seed
        common = [seed for seed in by_seed if seed in first]
        p = t_test([by_seed[seed] for seed in common], [first[seed] for seed in common])
        named = [str(value) for name, value in differ.items() if name != "model"] + [group[0].fm, " ".join(map(str, by_seed))]
        empty = f"{sum(r.empty for r in group)} of {sum(r.scored for r in group)}"
        lines.append(named + cells + [empty, "-" if math.isnan(p) else f"{p:.4f}"])
    head = [name for name in groups[0][0] if name != "model"] + ["foundation model", "seeds", "Dice", "Jaccard", "HD95 (voxels)"]
    return head + ["ASD (voxels)", "codewords in use", "empty predictions", "p against the first"], lines


def draw_sweep(records: list[Record], name: str, path: Path) -> None:
    """Dice against the setting `name`, a curve for each other setting; and the codewords in use over training, of the longest.

    What was run at one place only, as without any perturbation, is dashed in both: something to compare the curves with.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = by_settings(records)
    if name not in groups[0][0]:
        raise BadInput(f"--sweep {name}: the runs do not differ in it, but in {', '.join(groups[0][0]) or 'nothing'}; name one of these")
    if not all(isinstance(differ[name], int | float) for differ, _ in groups):
        raise BadInput(f"--sweep {name}: is no number; name a setting that is")
    places = sorted({differ[name] for differ, _ in groups})  # side by side, at equal distances: T goes up to inf, K by factors of 4
    curves: dict[str, dict] = {}
    for differ, group in groups:
        others = ", ".join(f"{k} {v}" for k, v in differ.items() if k != name) or "Dice"
        curves.setdefault(others, {})[differ[name]] = group
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    for number, (label, curve) in enumerate(curves.items()):
        x, color = sorted(curve), f"C{number}"
        dices = [[r.dice for r in curve[value]] for value in x]
        middle, spread = [np.mean(some) for some in dices], [np.std(some, ddof=1) if len(some) > 1 else 0 for some in dices]
        if len(x) == 1:
            left.axhline(middle[0], color=color, linestyle="--", label=label)
            left.axhspan(middle[0] - spread[0], middle[0] + spread[0], color=color, alpha=0.15, linewidth=0)
        else:
            left.errorbar([places.index(value) for value in x], middle, spread, color=color, marker="o", capsize=3, label=label)
    left.set(xticks=range(len(places)), xticklabels=[f"{value:g}" for value in places], xlabel=name)
    left.set_title("Dice, mean and standard deviation over seeds", fontsize=10)
    left.legend(fontsize=8)
    longest, curve = max(curves.items(), key=lambda item: len(item[1]))  # the first of those with the most places
    shown = [(curve[value][0], f"{name} {value:g}", "-") for value in sorted(curve)]
    shown += [(next(iter(curve.values()))[0], label, "--") for label, curve in curves.items() if len(curve) == 1 and label != longest]
    for record, label, style in shown:
        log = [line for line in json.loads(record.log) if "utilization" in line]
        right.plot([line["step"] for line in log], [line["utilization"] for line in log], style, label=label)
    right.set_title(f"share of codewords in use within 50 steps ({longest}, seed {shown[0][0].seed})", fontsize=10)
    right.set(xlabel="step", ylim=(0, 1.05))
    right.legend(fontsize=8)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def scores(run: Path, split: str, device: torch.device, root: str = "") -> list[Row]:
    """RUN/val.csv or RUN/test.csv, made where it is not there yet, or not of the checkpoint that is there now."""
    model, saved = load(run, device)
    path, record = run / f"{split}.csv", run / f"{split}.json"
    try:
        scored = json.loads(record.read_text())
        fresh = path.exists() and (scored["checkpoint_step"], scored["one_piece"]) == (saved["step"], one_piece(saved))
    except (OSError, ValueError, KeyError):  # not there, cut off while it was written, or older than one of these
        fresh = False
    if not fresh:
        found, view = dataset_of(saved, root), saved["settings"]["view"]
        rows = evaluate([model], found.with_masks(split), found.labels, device, view, one_piece=one_piece(saved))
        write_scores(run, split, rows, saved)
    return read_csv(path)


def write_scores(run: Path, split: str, rows: list[Row], saved: dict) -> None:
    """RUN/val.csv or RUN/test.csv, and beside it which checkpoint was scored."""
    write_csv(run / f"{split}.csv", rows)
    record = {"split": split, "dice": mean_dice(rows), "checkpoint_step": saved["step"], "checkpoint_chosen_on": "val",
              "one_piece": one_piece(saved)}  # fmt: skip
    record |= {"val_dice_in_one_view": saved["val_dice"], "fm": saved["fm"]}
    (run / f"{split}.json").write_text(json.dumps(record, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def load(run: Path, device: torch.device) -> tuple[VQSeg, dict]:
    """The teacher that was best on validation, and the checkpoint it comes from."""
    path = run / "best.pt"
    if not path.exists():
        raise BadInput(f"{path}: no such file; give a run folder that train.py has finished")
    try:
        return load_teacher(path, device)
    except NOT_OURS as error:
        raise BadInput(f"{path}: not a checkpoint of this project ({data.first_line(error)}); train again") from None


def load_alike(runs: list[Path], device: torch.device) -> tuple[list[Model], dict]:
    """The teachers of runs that see a scan alike and mean the same by a class, and the first one's checkpoint."""
    models, saved = zip(*(load(run, device) for run in runs))
    for run, other in zip(runs, saved):
        kinds = [(data.class_names(s["data"], s["classes"]), data.read_window(s["data"], s["window"]), s["view"], one_piece(of))
                 for of in (other, saved[0]) for s in [of["settings"]]]  # fmt: skip
        if kinds[0] != kinds[1]:
            remedy = "give runs that have these in common"
            raise BadInput(f"{run}: its classes, --window, --view or --pieces are not those of {runs[0]}; {remedy}")
    return list(models), saved[0]


def dataset_of(saved: dict, root: str = "") -> data.DataSet:
    """The data set that a run was trained on, with the split that it had."""
    s = saved["settings"]
    found = data.open_dataset(s["data"], root or s["root"], s["classes"], s["window"], s["view"], s["split_seed"])
    return found._replace(split=saved["split"])


def one_piece(saved: dict) -> bool:
    """Whether of a class only its largest piece counts, in the predictions of this checkpoint's run."""
    return data.pieces_that_count(saved["settings"]["data"], saved["settings"].get("pieces", "")) == "largest"


def perturbed(model: VQSeg, eps: float, temperature: float, device: torch.device) -> Model:
    """The model with QPM on the tokens of what it segments: how much it needs its tokens."""
    generator = torch.Generator(device).manual_seed(0)

    def forward(x: Tensor) -> Tensor:
        z, skips = model.encoder(x)
        q = model.quantizer(z)
        return model.segmentation_decoder(model.perturb(z, q.codes, q.indices, "qpm", eps, temperature, generator, q.codebook), skips)

    return forward


@torch.no_grad()
def codeword_counts(model: VQSeg, sets: list[Slices], device: torch.device, view: int = data.VIEW) -> Tensor:
    """How often each codeword occurs in the central crops of these sets' slices, without augmentation: (K,) int64.

    Of a large set 2000 slices stand for all, of one that is too large to be kept those that are drawn from first.
    """
    K = model.quantizer.codebook_size
    counts = torch.zeros(K, dtype=torch.int64)
    for slices in sets:
        some = slices.resident()
        for numbers in some[:: -(-len(some) // 2000)].split(16):
            z = model.encoder(data.crop_center(slices.batch(numbers, device)[0], view)).z
            counts += torch.bincount(model.quantizer(z).indices.flatten().cpu(), minlength=K)
    return counts


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def draw(models: dict[str, Model], cases: list[Case], rows: list[Row], labels: list[str], device: torch.device, view: int, one_piece: bool,
         path: Path, logs: Iterable[Path] = ()) -> None:
    """Best, median and worst case by mean Dice: image, expert's mask and each model's prediction in three slices; the runs' curves."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    dice_of = {case: mean(r.dice for r in rows if r.case == case.name) for case in cases}
    # A volume without any class, found to be so, has no Dice: it is shown only where there is no other.
    ranked = sorted((c for c in cases if not math.isnan(dice_of[c])), key=dice_of.get, reverse=True) or cases
    lines = 2 + len(models)
    figure = plt.figure(figsize=(13.5, 1.67 * lines + 3 * bool(logs)), layout="constrained")
    top, *below = np.atleast_1d(figure.subfigures(1 + bool(logs), 1, height_ratios=[1.67 * lines, 3][: 1 + bool(logs)]))
    axes = top.subplots(lines, 9)
    for group, (name, case) in enumerate((("best", ranked[0]), ("median", ranked[len(ranked) // 2]), ("worst", ranked[-1]))):
        image, truth = data.read_image(case)[0], data.read_mask(case, len(labels))
        masks = {"image": None, "expert": truth}
        masks |= {label: predict([model], [image], device, view, one_piece=one_piece) for label, model in models.items()}
        depth, H, W = image.shape
        middle = np.s_[H // 6 : H - H // 6, W // 6 : W - W // 6] if view < data.GRID else np.s_[:, :]  # hearts are small
        axes[0, 3 * group + 1].set_title(f"{name}: {case.name}, Dice {dice_of[case]:.3f}", fontsize=9)
        for column, k in enumerate((depth // 5, depth // 2, depth - 1 - depth // 5), start=3 * group):
            for axis, (label, mask) in zip(axes[:, column], masks.items()):
                data.show(axis, image[k][middle], None if mask is None else mask[k][middle])
                axis.set_ylabel(label if column == 0 else "", fontsize=8)
            axis.set_xlabel(f"slice {k + 1} of {depth}", fontsize=8)
    if logs:
        curves = below[0].subplots(1, 2)
        for log in logs:
            lines = [json.loads(line) for line in log.read_text().splitlines()]
            for axis, key, title in zip(curves, ("loss", "val_dice"), ("loss", "validation Dice of the teacher, one view")):
                some = [line for line in lines if key in line]
                axis.plot([line["step"] for line in some], [line[key] for line in some], label=log.parent.name)
                axis.set(title=title, xlabel="step")
        curves[1].legend(fontsize=8)
    figure.savefig(path, dpi=60)
    plt.close(figure)


def draw_overlay(slabs: Iterable[np.ndarray], labels: np.ndarray, path: Path) -> None:
    """Six slices of a volume, which comes in slabs (n,H,W), without and with their labels (Z,H,W) in color."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 6, figsize=(12, 4.4), layout="constrained")
    shown = np.linspace(0, len(labels) - 1, 6).round().astype(int)
    for k, image in enumerate(image for slab in slabs for image in slab):
        for column in np.flatnonzero(shown == k):
            data.show(axes[0, column], image)
            data.show(axes[1, column], image, labels[k])
            axes[0, column].set_title(f"slice {k + 1} of {len(labels)}", fontsize=8)
    figure.savefig(path, dpi=75)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    what = "folder of train.py; several, or CSVs of --records: one table; several with --predict: their mean"
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help=what)
    parser.add_argument("--split", default="val", choices=["val", "test"])
    parser.add_argument("--root", default="", help="where the data is now, if not where training found it")
    parser.add_argument("--predict", type=Path, metavar="SCAN", help="segment this NIfTI file, or all in this folder, into --out")
    parser.add_argument("--out", type=Path, help="file or folder for --predict")
    parser.add_argument("--csv", type=Path, help="where the table over several runs goes; default: comparison.csv beside the first")
    parser.add_argument("--records", type=Path, help="also write a line for each run here; such a CSV is taken in place of its runs")
    parser.add_argument("--figure", type=Path, help="also draw best, median and worst case into this PNG, and of several runs their curves")
    parser.add_argument("--sweep", metavar="SETTING", help="of several runs, let --figure draw Dice against this setting of train.py")
    parser.add_argument("--eps", type=float, default=0.0, help="QPM of this strength on the tokens; then no CSV is written")
    parser.add_argument("--pieces", default="", choices=["all", "largest"], help="in place of the run's --pieces; then no CSV is written")
    parser.add_argument("--mm", action="store_true", help="distances in mm, by the files' spacing, not in voxels; then no CSV is written")
    args = parser.parse_args()
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if args.predict or args.out:
            sys.exit(2 if main_predict(args, device) else 0)
        several = len(args.runs) > 1 or args.runs[0].suffix == ".csv"
        main_compare(args, device) if several else main_score(args, device)
    except (BadInput, OSError) as error:  # OSError: a table or a figure that cannot be written; it names the file
        parser.exit(2, f"evaluate.py: {error}\n")


def main_predict(args: argparse.Namespace, device: torch.device) -> int:
    if not (args.predict and args.out):
        raise BadInput("--predict and --out: give both, the scan and where its segmentation goes")
    if args.eps or args.mm or args.csv or args.records or args.figure or args.sweep:
        raise BadInput("--eps, --mm, --csv, --records, --figure and --sweep: are for scores; leave them out beside --predict")
    models, saved = load_alike(args.runs, device)
    saved["settings"]["pieces"] = args.pieces or saved["settings"].get("pieces", "")
    return predict_all(models, args.predict, args.out, saved, device)


def main_compare(args: argparse.Namespace, device: torch.device) -> None:
    folders = [run for run in args.runs if run.suffix != ".csv"]
    if args.eps or args.mm or args.pieces:
        raise BadInput("--eps, --mm and --pieces: are for one run; give one, or leave them out")
    for flag, path in (("--csv", args.csv), ("--records", args.records)):
        if path and path.exists():
            raise BadInput(f"{flag} {path}: is there already and is not written over; remove it or give another name")
    if args.sweep and not args.figure:
        raise BadInput(f"--sweep {args.sweep}: draws a figure; say where it goes with --figure FILE")
    if args.figure and not args.sweep:  # before the hours that scoring may take
        models, saved = load_alike(args.runs, device)
    records = [record_of(run, args.split, device, args.root) for run in folders]
    records = [record for path in args.runs if path not in folders for record in read_records(path)] + records
    head, lines = compare(records)
    print("\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *lines]))
    if args.records:
        write_records(args.records, records)
        print(f"wrote {args.records}")
    if args.csv or folders:
        path = args.csv or folders[0].parent / "comparison.csv"
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([head, *lines])
        print(f"wrote {path}")
    if args.figure and args.sweep:
        draw_sweep(records, args.sweep, args.figure)
        print(f"wrote {args.figure}")
    elif args.figure:
        found, rows = dataset_of(saved, args.root), scores(args.runs[0], args.split, device, args.root)
        names = [run.name for run in args.runs]
        names = names if len(set(names)) == len(names) else map(str, args.runs)
        logs = [run / "log.jsonl" for run in args.runs if (run / "log.jsonl").exists()]
        draw(dict(zip(names, models)), found.with_masks(args.split), rows, found.labels, device, found.view, one_piece(saved), args.figure,
             logs)
        print(f"wrote {args.figure}")


def main_score(args: argparse.Namespace, device: torch.device) -> None:
    run = args.runs[0]
    if args.csv or args.records or args.sweep:
        raise BadInput("--csv, --records and --sweep: are for several runs; give more, or leave them out")
    model, saved = load(run, device)
    s = saved["settings"]
    s["pieces"] = args.pieces or s.get("pieces", "")
    found = dataset_of(saved, args.root)
    cases = found.with_masks(args.split)
    if not 0 <= args.eps <= 1 or (args.eps and s["supervised"]):
        raise BadInput(f"--eps {args.eps}: must lie in 0 to 1, and be 0 for a run with --supervised, which has no codewords")
    network = perturbed(model, args.eps, s["temperature"], device) if args.eps else model
    rows = evaluate([network], cases, found.labels, device, s["view"], mm=args.mm, one_piece=one_piece(saved))
    for row in rows:
        distance = f"hd95 {row.hd95:6.2f}  asd {row.asd:5.2f}"
        print(f"{row.case}  {row.label:4} dice {row.dice:.4f}  jaccard {row.jaccard:.4f}  {distance}{'  EMPTY' if row.empty else ''}")
    print(f"\n{run}: {args.split} split, teacher of step {saved['step']}, chosen on validation (one view: {saved['val_dice']:.4f});")
    print(f"foundation model: {saved['fm']}; mean +- standard deviation over volumes; distances in {'mm' if args.mm else 'voxels'}")
    print(table(rows))
    if args.figure:
        draw({"prediction": network}, cases, rows, found.labels, device, s["view"], one_piece(saved), args.figure)
        print(f"wrote {args.figure}")
    if not (args.eps or args.mm or args.pieces):  # the table over runs reads them, of undisturbed tokens and in voxels
        write_scores(run, args.split, rows, saved)


if __name__ == "__main__":
    main()
