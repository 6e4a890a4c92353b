"""Evaluation: 3-D metrics per volume at native size, one function for training, validation and the final table.

Implements the numbers of Tables 1 and 7 (Dice, Jaccard, 95HD, ASD) by the field's protocol: every frame is one volume, each
class is scored in 3-D against the native mask, mean over volumes, then over classes. Definitions are medpy's, which
every paper on this benchmark uses:
  - surface = mask minus its 6-connected erosion; beyond the volume's edge counts as background.
  - hd95 = 95th percentile of both directed distance sets *pooled* (MONAI: the larger of two percentiles, which is larger).
  - asd = mean distance from the predicted surface to the true one: one direction only.
  - distances in voxels, z counted like x and y, unless a spacing in mm is given.

THE EMPTY-MASK RULE, here once and nowhere else (peers score an empty prediction as distance 0, a perfect one):
  - class in neither mask: nothing to score, all four are nan and left out of the means.
  - class in one mask only: Dice = Jaccard = 0, and both distances are the diagonal of the volume, the longest there is.

The peers look at a slice once. A prediction here is the mean over nine turned and scaled views of it, `VIEWS`; training chooses
its best checkpoint in one view, which is quicker.

Run `python evaluate.py RUN [--split val|test]`; it reads RUN/best.pt and writes RUN/val.csv or RUN/test.csv.
"""

import argparse
import csv
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

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


def dice(prediction: np.ndarray, truth: np.ndarray) -> float:
    """2 |A n B| / (|A| + |B|) of two boolean masks, in [0,1]."""
    both, total = np.count_nonzero(prediction & truth), np.count_nonzero(prediction) + np.count_nonzero(truth)
    return 2 * both / total if total else float("nan")


def jaccard(prediction: np.ndarray, truth: np.ndarray) -> float:
    """|A n B| / |A u B| of two boolean masks, in [0,1]."""
    union = np.count_nonzero(prediction | truth)
    return np.count_nonzero(prediction & truth) / union if union else float("nan")


def surface(mask: np.ndarray) -> np.ndarray:
    """Voxels of the mask with at least one of their 6 face neighbors outside it: (Z,H,W) bool -> (N,3) coordinates."""
    padded = np.pad(mask, 1)
    inside = mask.copy()
    for axis in range(3):
        for step in (-1, 1):
            inside &= np.roll(padded, step, axis)[1:-1, 1:-1, 1:-1]
    return np.argwhere(mask & ~inside)


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


def turn(x: Tensor, angle: float, zoom: float) -> Tensor:
    """(B,C,H,W) rotated by angle (radians) and scaled by zoom about its center; turn(., -angle, 1 / zoom) is the way back."""
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    theta = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]], device=x.device).expand(len(x), 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


@torch.no_grad()
def predict(model: Callable[[Tensor], Tensor], volume: np.ndarray, device: torch.device, amp: bool = False,
            views: list[tuple[float, float]] = VIEWS, view: int = data.VIEW, batch: int = 8) -> np.ndarray:
    """(Z,H,W) float in [0,1] -> (Z,H,W) uint8 labels at native size. Each slice on its own, its central crop at once.

    The probabilities are a mean over views of the slice, each turned back.
    """
    out = []
    for part in data.crop_center(data.to_grid(torch.from_numpy(volume)), view)[:, None].split(batch):
        x, p = part.to(device), 0.0
        for angle, zoom in views:
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                logits = model(turn(x, angle, zoom))
            p = p + turn(logits.float().softmax(1), -angle, 1 / zoom) / len(views)
        out.append(data.from_grid(data.uncrop(p), volume.shape[1:]).argmax(1).to(torch.uint8).cpu())
    return torch.cat(out).numpy()


def evaluate(model: Callable[[Tensor], Tensor], cases: list[Case], labels: list[str], device: torch.device, amp: bool = False,
             distances: bool = True, mm: bool = False, views: list[tuple[float, float]] = VIEWS, view: int = data.VIEW) -> list[Row]:
    """Score every case. Used by train.py for validation, there in one view, and for the table."""
    rows = []
    for case in cases:
        volume, spacing = data.read_image(case.image)
        if mm and not (np.isfinite(spacing).all() and min(spacing) > 0):
            raise BadInput(f"{case.image}: its voxel spacing is {spacing} mm; correct the header, or leave out --mm")
        truth = data.read_mask(case, volume.shape, len(labels))
        prediction = predict(model, volume, device, amp, views, view)
        rows += score(case.name, prediction, truth, labels, spacing if mm else (1, 1, 1), distances)
    return rows


def mean_dice(rows: list[Row]) -> float:
    """Mean over volumes for each class, then over classes."""
    labels = sorted({r.label for r in rows})
    return float(np.mean([np.nanmean([r.dice for r in rows if r.label == label]) for label in labels]))


def table(rows: list[Row]) -> str:
    """Per class and overall: mean +- standard deviation over volumes, and how many volumes lack the class altogether."""
    lines = [f"{'class':8}" + "".join(f"{m:>18}" for m in METRICS) + "   empty predictions"]
    labels = list(dict.fromkeys(r.label for r in rows))
    by_class = {label: [r for r in rows if r.label == label] for label in labels}
    means = []
    for label, mine in by_class.items():
        values = np.array([[getattr(r, m) for m in METRICS] for r in mine])  # (volumes,4)
        means.append(np.nanmean(values, 0))
        cells = "".join(f"{m:>9.4f} +-{s:>7.4f}" for m, s in zip(means[-1], np.nanstd(values, 0)))
        lines.append(f"{label:8}{cells}   {sum(r.empty for r in mine)} of {len(mine)}")
    lines.append(f"{'mean':8}" + "".join(f"{m:>9.4f}{'':9}" for m in np.mean(means, 0)) + f"   {sum(r.empty for r in rows)} of {len(rows)}")
    return "\n".join(lines)


def write_csv(path: Path, rows: list[Row]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows(rows)


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


def perturbed(model: VQSeg, eps: float, temperature: float, device: torch.device) -> Callable[[Tensor], Tensor]:
    """The model with QPM on the tokens of what it segments, (B,1,H,W) -> logits: how much it needs its tokens."""
    generator = torch.Generator(device).manual_seed(0)

    def forward(x: Tensor) -> Tensor:
        z, skips = model.encoder(x)
        q = model.quantizer(z)
        return model.segmentation_decoder(model.perturb(z, q.codes, q.indices, "qpm", eps, temperature, generator, q.codebook), skips)

    return forward


@torch.no_grad()
def codeword_counts(model: VQSeg, sets: list[Slices], device: torch.device, view: int = data.VIEW) -> Tensor:
    """How often each codeword occurs in the central crops of all these slices, without augmentation: (K,) int64."""
    K = model.quantizer.codebook_size
    counts = torch.zeros(K, dtype=torch.int64)
    for slices in sets:
        for numbers in torch.arange(len(slices)).split(16):
            z = model.encoder(data.crop_center(slices.batch(numbers, device)[0], view)).z
            counts += torch.bincount(model.quantizer(z).indices.flatten().cpu(), minlength=K)
    return counts


def draw(model: Callable[[Tensor], Tensor], cases: list[Case], rows: list[Row], device: torch.device, path: Path,
         view: int = data.VIEW) -> None:
    """Best, median and worst case by mean Dice of the classes: image, expert's mask, prediction in three slices of each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap

    dice_of = {case: np.nanmean([r.dice for r in rows if r.case == case.name]) for case in cases}
    ranked = sorted(cases, key=dice_of.get, reverse=True)
    figure, axes = plt.subplots(3, 9, figsize=(13.5, 5), layout="constrained")
    for group, (name, case) in enumerate((("best", ranked[0]), ("median", ranked[len(ranked) // 2]), ("worst", ranked[-1]))):
        volume, _ = data.read_image(case.image)
        truth, prediction = data.read_mask(case, volume.shape, len(data.CLASSES)), predict(model, volume, device, view=view)
        depth, H, W = volume.shape
        middle = np.s_[H // 6 : H - H // 6, W // 6 : W - W // 6]  # two thirds of the slice: hearts are small
        axes[0, 3 * group + 1].set_title(f"{name}: {case.name}, Dice {dice_of[case]:.3f}", fontsize=9)
        for column, k in enumerate((depth // 5, depth // 2, depth - 1 - depth // 5), start=3 * group):
            for row, (label, mask) in enumerate((("image", None), ("expert", truth), ("prediction", prediction))):
                axis = axes[row, column]
                axis.imshow(volume[k][middle], cmap="gray")
                if mask is not None:
                    shown = np.ma.masked_equal(mask[k][middle], 0)
                    axis.imshow(shown, cmap=ListedColormap(data.COLORS), vmin=0, vmax=3, alpha=0.6, interpolation="nearest")
                axis.set(xticks=[], yticks=[], ylabel=label if column == 0 else "")
                if row == 2:
                    axis.set_xlabel(f"slice {k + 1} of {depth}", fontsize=8)
    figure.savefig(path, dpi=60)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Score a run's best teacher on a split.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--split", default="val", choices=["val", "test"])
    parser.add_argument("--root", default="", help="where the data is now, if not where training found it")
    parser.add_argument("--figure", type=Path, help="also draw the best, the median and the worst case into this PNG")
    parser.add_argument("--eps", type=float, default=0.0, help="QPM of this strength on the tokens; then no CSV is written")
    parser.add_argument("--mm", action="store_true", help="distances in mm, by the files' spacing, instead of voxels")
    args = parser.parse_args()
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model, saved = load(args.run, device)
        root, split = data.open_dataset(saved["settings"]["data"], args.root or saved["settings"]["root"])
        cases = data.find_cases(root, split[args.split], need_masks=True)
        if not 0 <= args.eps <= 1 or (args.eps and saved["settings"]["supervised"]):
            raise BadInput(f"--eps {args.eps}: must lie in 0 to 1, and be 0 for a run with --supervised, which has no codewords")
        network = perturbed(model, args.eps, saved["settings"]["temperature"], device) if args.eps else model
        rows = evaluate(network, cases, data.CLASSES, device, mm=args.mm, view=saved["view"])
    except BadInput as error:
        parser.exit(2, f"evaluate.py: {error}\n")
    for row in rows:
        distance = f"hd95 {row.hd95:6.2f}  asd {row.asd:5.2f}"
        print(f"{row.case}  {row.label:4} dice {row.dice:.4f}  jaccard {row.jaccard:.4f}  {distance}{'  EMPTY' if row.empty else ''}")
    print(f"\n{args.run}: {args.split} split, teacher of step {saved['step']}, chosen on validation (one view: {saved['val_dice']:.4f});")
    print(f"mean +- standard deviation over volumes; distances in {'mm' if args.mm else 'voxels'}")
    print(table(rows))
    if args.figure:
        draw(network, cases, rows, device, args.figure, saved["view"])
        print(f"wrote {args.figure}")
    if args.eps:
        return
    write_csv(args.run / f"{args.split}.csv", rows)
    record = {"split": args.split, "dice": mean_dice(rows), "checkpoint_step": saved["step"], "checkpoint_chosen_on": "val"}
    record |= {"val_dice_in_one_view": saved["val_dice"], "mm": args.mm}
    (args.run / f"{args.split}.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
