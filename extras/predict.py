"""Segmenting new scans with the best teacher of a run, or with the mean of several runs.

    python -m extras.predict RUN [RUN ...] --scan FILE --out FILE        one NIfTI scan
    python -m extras.predict RUN [RUN ...] --scan FOLDER --out FOLDER    all NIfTI scans of a folder

Goes beyond the paper, which scores its test set (Section 4.1) and says nothing about new scans. The
mean over runs, `--tta` and `--keep-largest` are not in the field's protocol of evaluation either.

A scan has the shape (x,y,z), or (x,y,z,t): then each time point is a volume of its own. Slices lie
along z and are taken as stored, so store a scan in the orientation of the training scans. The
segmentation has the scan's shape, sform, qform, zooms and units; a picture lies beside it.
"""

import argparse
import math
import os
import re
import sys
import tempfile
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import data
import evaluate
from data import BadInput
from evaluate import Model
from extras.checks import writable
from extras.figures import Figure, legend, show
from extras.files import NIFTI, check_whole, load_nifti, slice_axis, voxels
from extras.layouts import leave, of_kind
from model import VQSeg

# Test-time augmentation: rotations (radians) and scales, well inside of what training shows.
TTA = [(angle, zoom) for angle in (-0.3, 0.0, 0.3) for zoom in (0.9, 1.0, 1.1)]


def rotate_zoom(x: Tensor, angle: float, zoom: float) -> Tensor:
    """(B,C,H,W) rotated (radians) and scaled about its center; (-angle, 1/zoom) undoes it."""
    cos = math.cos(angle) / zoom
    sin = math.sin(angle) / zoom
    theta = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]], device=x.device)
    grid = F.affine_grid(theta.expand(len(x), 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def rotated_back(model: Model, angle: float, zoom: float, x: Tensor) -> Tensor:
    """Logarithm of the probabilities of x rotated and scaled, brought back: (B,C,H,W)."""
    p = model(rotate_zoom(x, angle, zoom)).float().softmax(1)
    return rotate_zoom(p, -angle, 1 / zoom).log()


def with_tta(model: Model) -> Model:
    """The model with test-time augmentation: the mean probabilities over TTA."""
    return mean_of([partial(rotated_back, model, angle, zoom) for angle, zoom in TTA])


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What goes beyond the field's protocol, also for `evaluate.py`."""
    parser.add_argument("--tta", action="store_true", help="test-time augmentation: nine views")
    parser.add_argument("--keep-largest", action="store_true", help="of each class one component")
    parser.add_argument("--eps", type=float, default=0.0, help="QPM of this strength at test time")


def extended(model: VQSeg, saved: dict, flags: dict) -> tuple:
    """For `evaluate.py`: the network, the post-processing, and the names of what was asked for."""
    network = model.predict
    if flags["eps"]:  # QPM at test time: how much the decoder needs its tokens
        if not 0 <= flags["eps"] <= 1 or len(model.quantizer.table) < 2:
            raise BadInput(f"--eps {flags['eps']}: must be 0 to 1, of a run with a codebook")
        T = saved["settings"]["temperature"]
        g = torch.Generator(model.quantizer.table.device).manual_seed(0)
        network = partial(model.predict, how="qpm", eps=flags["eps"], temperature=T, generator=g)
    network = with_tta(network) if flags["tta"] else network
    names = [name.replace("_", "-") for name in ("tta", "keep_largest") if flags[name]]
    names += [f"eps{flags['eps']}"] if flags["eps"] else []
    return network, keep_largest if flags["keep_largest"] else None, names


def mean_of(models: list[Model]) -> Model:
    """The ensemble: the logarithm of the mean probabilities of several models.

    The softmax in `evaluate.predict` makes that mean of it again.
    """

    def ensemble(x: Tensor) -> Tensor:
        probabilities = [model(x).float().softmax(1) for model in models]
        return torch.stack(probabilities).mean(0).log()

    return ensemble if len(models) > 1 else models[0]


def largest_component(mask: np.ndarray) -> np.ndarray:
    """The largest of the face-connected components of a (Z,H,W) boolean mask."""
    lines = [np.flatnonzero(mask.any(axis)) for axis in ((1, 2), (0, 2), (0, 1))]
    box = tuple(slice(line[0], line[-1] + 1) for line in lines)  # holds all of the mask
    inside = mask[box]
    label = np.arange(1, inside.size + 1).reshape(inside.shape) * inside
    before = None
    # Each voxel takes the highest label on the lines through it within the mask, until all agree.
    while not np.array_equal(label, before):
        before = label
        for axis in (0, 0, 1, 1, 2, 2):  # twice each: forward and backward
            # A running maximum that begins anew after each gap.
            gaps = np.cumsum(~inside, axis) * (inside.size + 1)
            label = np.flip((np.maximum.accumulate(label + gaps, axis) - gaps) * inside, axis)
            inside = np.flip(inside, axis)
    values, counts = np.unique(label[inside], return_counts=True)
    largest = np.zeros_like(mask)
    largest[box] = label == values[counts.argmax()]
    return largest


def keep_largest(volume: np.ndarray) -> np.ndarray:
    """(Z,H,W) labels: of each class only the largest connected component, the rest background."""
    kept = np.zeros_like(volume)
    for k in np.unique(volume[volume > 0]):
        kept[largest_component(volume == k)] = k
    return kept


def load_runs(runs: list[Path], device: torch.device) -> tuple[list[Model], dict]:
    """The teachers of runs that see a scan alike, and the checkpoint of the first."""
    loaded = [evaluate.load_run(run, device) for run in runs]
    first = loaded[0][1]
    for run, (_, saved) in zip(runs, loaded):
        for key in ("labels", "window", "eval_crop"):
            if saved[key] != first[key]:
                differ = f"its {key} is {saved[key]}, but {first[key]} in {runs[0]}"
                raise BadInput(f"{run}: {differ}; give runs that have it in common")
    return [model.predict for model, _ in loaded], first


def read_scan(path: Path) -> tuple[nib.Nifti1Image, list[float], np.ndarray]:
    """A NIfTI file, its (x,y,z) spacing in mm, its voxels as (T,Z,H,W); T is 1 without time."""
    file, sides = load_nifti(path)
    if len(file.shape) not in (3, 4) or 0 in file.shape:
        raise BadInput(f"{path}: has shape {file.shape}; store it as (x, y, z) or (x, y, z, t)")
    check_whole(path)
    axis = slice_axis(file.shape[:3], sides)
    if axis != "z":
        print(f"WARNING: {path}: slices seem to lie along its axis {axis}; store them along the "
              "last, z, as in training")
    found = voxels(path, lambda: file.dataobj)
    return file, sides.tolist(), found.reshape(*found.shape[:3], -1).T


def like(file: nib.Nifti1Image, voxels: np.ndarray, kind: np.dtype) -> nib.Nifti1Image:
    """Voxels of data type `kind` with the header of a scan."""
    header = file.header.copy()
    header.set_data_dtype(kind)
    header.set_slope_inter(1, 0)
    header["cal_min"] = header["cal_max"] = 0  # they are of the scan's intensities
    # From an affine nibabel may derive a new sform and qform; without one it leaves the header's.
    return type(file)(voxels.astype(kind), None, header)


def draw(path: Path, volume: np.ndarray, labels: np.ndarray, names: list[str], aspect: float):
    """Six slices of a volume (Z,H,W) in [0,1], without and with labels. aspect: a pixel's dy/dx."""
    shown = np.unique(np.linspace(0, len(volume) - 1, 6).round().astype(int))
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    axes = figure.subplots(2, len(shown), squeeze=False)
    for column, z in enumerate(shown):
        axes[0, column].set_title(f"slice {z + 1} of {len(volume)}", fontsize=8)
        show(axes[0, column], volume[z], None, len(names), aspect)
        show(axes[1, column], volume[z], labels[z], len(names), aspect)
    legend(figure, names)
    figure.savefig(path, dpi=75)


def predict_file(model: Model, saved: dict, scan: Path, out: Path, device: torch.device,
                 largest: bool = False) -> str:
    """Segments a scan into the file `out`; returns the milliliters of each class as text."""
    names, crop = saved["labels"], saved["eval_crop"]
    picture = out.with_name(NIFTI.sub("", out.name) + ".png")
    for path in (out, picture):
        if path.exists():
            raise BadInput(f"{path}: already exists; not overwriting; change --out or remove it")
    file, (dx, dy, dz), series = read_scan(scan)
    shape = series.shape[2:]
    found = []
    for volume in series:
        images = data.to_grid(torch.from_numpy(data.scale(volume, saved["window"])))
        labels = evaluate.predict(model, images, shape, crop, device)
        found.append(keep_largest(labels) if largest else labels)

    kind = file.get_data_dtype()
    if kind.kind not in "iu" or np.iinfo(kind).max < len(names) - 1:
        kind = np.dtype(np.uint8)
    voxels = np.stack(found).T.reshape(file.shape)  # (T,Z,H,W) -> (x,y,z), or (x,y,z,T)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # Whole or not at all: files move out of a hidden folder when both of them are written.
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".") as folder:
            written = Path(folder, out.name.lower())  # nibabel has no .Nii.gz
            drawn = Path(folder, "drawn.png")
            nib.save(like(file, voxels, kind), written)
            draw(drawn, data.scale(series[0], saved["window"]), found[0], names, dy / dx)
            os.replace(written, out)
            os.replace(drawn, picture)
    except OSError as error:
        reason = error.strerror or error
        raise BadInput(f"{out}: cannot be written ({reason}); make room or change --out") from None
    return milliliters(found, dx * dy * dz, names)


def milliliters(found: list[np.ndarray], voxel: float, names: list[str]) -> str:
    """Each class, its value in the file, its size at each time point. voxel: one's size in mm^3."""
    sizes = []
    for k, name in enumerate(names[1:], start=1):
        numbers = [f"{(labels == k).sum() * voxel / 1000:.1f}" for labels in found]
        sizes.append(f"{name} ({k}) {' '.join(numbers)} ml")
    return ", ".join(sizes)


def pair_files(scan: Path, out: Path) -> list[tuple[Path, Path]]:
    """Each scan, and where its segmentation goes."""
    if not scan.exists():
        raise BadInput(f"--scan {scan}: no such file or folder; correct the path")
    if not scan.is_dir():
        for flag, path in (("--scan", scan), ("--out", out)):
            if not NIFTI.search(path.name) or path.is_dir():
                raise BadInput(f"{flag} {path}: must be a .nii or .nii.gz file, or both be folders")
        return [(scan, out)]
    if out.exists() and (not out.is_dir() or out.samefile(scan)):
        raise BadInput(f"--out {out}: must be a folder, and another one than that of the scans")
    files = sorted(f for f in scan.iterdir() if not f.name.startswith(".") and f != out)
    scans = of_kind(files, NIFTI, "NIfTI")
    not_scans = [f for f in scans if re.search(r"_(gt|000[1-9])\.nii", f.name, re.I)]
    leave(not_scans, "masks of ACDC, or other channels")
    scans = [f for f in scans if f not in not_scans]
    if not scans:
        remedy = "convert others, or give the folder that does"
        raise BadInput(f"--scan {scan}: holds no scan in .nii or .nii.gz; {remedy}")
    return [(f, out / f.name) for f in scans]


def predict_all(args: argparse.Namespace) -> None:
    """Segments a scan or a folder of scans; goes on after one that cannot be."""
    several = args.scan.is_dir()
    pairs = pair_files(args.scan, args.out)
    writable(args.out if several else args.out.parent, "allow it, or change --out")
    device = evaluate.join_processes(args.device)[2]
    models, saved = load_runs(args.runs, device)
    model = with_tta(mean_of(models)) if args.tta else mean_of(models)
    bad = 0
    for i, (scan, out) in enumerate(pairs, start=1):
        try:
            result = "already exists; not overwriting"
            if not (several and out.exists()):
                result = predict_file(model, saved, scan, out, device, args.keep_largest)
            print(f"{i} of {len(pairs)}: {out}: {result}", flush=True)
        except BadInput as error:
            print(f"extras.predict: {error}", file=sys.stderr, flush=True)
            bad += 1
    sys.exit(2 if bad else 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder of train.py")
    parser.add_argument("--scan", type=Path, required=True, help="NIfTI file, or a folder of them")
    parser.add_argument("--out", type=Path, required=True, help="file, or folder, for the result")
    parser.add_argument("--tta", action="store_true", help="test-time augmentation: nine views")
    parser.add_argument("--keep-largest", action="store_true", help="of each class one component")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    args = parser.parse_args()
    evaluate.command("extras.predict", partial(predict_all, args), "allow it, or change --out")


if __name__ == "__main__":
    main()
