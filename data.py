"""Data: ACDC in its original NIfTI layout, phantoms in the same layout, one loader for both, and the two views of a slice.

Implements the data part of Section 4.2: the 70/10/20 split of ACDC with 3 or 7 labelled patients (5 % and 10 %), slices
cropped to 128x128, random rotation, intensity ("color") jitter, Gaussian noise and blur.

The field's protocol, as every semi-supervised paper on ACDC has it: split by patient, both frames of a patient together;
"labelled" is a fixed prefix of the training list; intensities min-max to [0,1] per volume; classes 1 RV cavity,
2 myocardium, 3 LV cavity. Where we depart from it, metrics do not notice, for they are taken at native size:
  - the peers stretch each slice to 256x256 by nearest neighbor; we keep its aspect ratio: the longer side becomes `GRID`
    pixels, bilinear, the rest of the square is 0.
The paper does not say:
  - what of a slice is cropped. Training draws its 128x128 around the center, moved at random; evaluation looks at the central
    `VIEW`, and what lies outside is background. That loses 0.06 % of one heart in 160 volumes. Whole slices scored 5
    points of Dice less with the same weights (0.716 against 0.769), for they show surroundings that training never does.
  - which view gets which augmentation. Weak: rotation, scale, shift. Strong: weak, then jitter, noise and blur. Geometry
    is thus the same in both, and the teacher's pseudo-label fits the student's view pixel by pixel.

Run `python data.py [--data acdc --root DIR]` to list what is found and draw figures/data.png.
"""

import argparse
import os
import re
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

GRID = 240  # pixels of a slice's longer side. The way there and back costs a perfect validation mask 0.012 Dice, of 192 pixels 0.027
CROP = 128  # what training sees of it, Section 4.2
VIEW = 160  # what evaluation sees of it: around the center, with room for every heart
CLASSES = ["background", "RV", "Myo", "LV"]
COLORS = ["#000000", "#0072B2", "#E69F00", "#CC79A7"]  # of the classes in every figure; safe for color-blind readers

# The split that every semi-supervised paper on ACDC uses. The order of TRAIN matters: `--labeled 7` is its first seven.
ACDC_SPLIT = {
    "train": """099 038 050 100 058 021 049 020 072 040 060 089 004 056 098 096 031 018 094 047 048 055 097 074 043 041 063
        037 095 054 026 088 032 069 006 071 012 073 061 017 025 010 057 029 051 005 036 046 062 034 076 092 070 077 067 003
        091 016 014 044 042 090 053 027 035 086 023 009 079 015""".split(),
    "val": "028 085 082 087 019 030 078 045 002 039".split(),
    "test": "011 013 084 033 093 022 068 024 083 081 080 001 007 066 008 065 075 064 059 052".split(),
}
PHANTOM_SPLIT = {
    "train": [f"{i:03d}" for i in range(1, 15)],
    "val": [f"{i:03d}" for i in range(15, 19)],
    "test": [f"{i:03d}" for i in range(19, 23)],
}


class BadInput(Exception):
    """Something the user gave us cannot be used. The message is one line: which file or flag, what is wrong, the remedy."""


def first_line(error: Exception) -> str:
    """What went wrong, for a message of one line."""
    return (str(error) or type(error).__name__).split("\n")[0]


class Case(NamedTuple):
    """One frame of one patient: a volume."""

    name: str  # patient099_frame01
    image: Path
    mask: Path | None  # None: unlabelled, and then nothing reads a mask even if there is one on disk


# ---------------------------------------------------------------------------------------------------------------------
# Finding and reading files


def find_cases(root: Path, patients: list[str], need_masks: bool) -> list[Case]:
    """The frames of these patients below root: .../patientNNN/patientNNN_frameXX.nii[.gz] and ..._frameXX_gt.nii[.gz].

    Frame numbers differ per patient and are taken as they are; the 4-D series and Info.cfg are not needed.
    """
    if not root.is_dir():
        raise BadInput(f"--root {root}: no such folder; give the folder that holds ACDC's patientNNN folders")
    places = [root, root / "training", root / "testing", root / "database" / "training", root / "database" / "testing"]
    cases, missing = [], []
    for patient in patients:
        folders = [p / f"patient{patient}" for p in places if (p / f"patient{patient}").is_dir()]
        if not folders:
            missing.append(patient)
            continue
        if len(folders) > 1:
            raise BadInput(f"{folders[0]}: there is another one, {folders[1]}; remove one of the two")
        (folder,) = folders
        try:
            frames = sorted(f for f in folder.iterdir() if re.fullmatch(rf"patient{patient}_frame\d+\.nii(\.gz)?", f.name))
        except OSError as error:
            raise BadInput(f"{folder}: cannot be opened ({error.strerror}); give yourself the right to read it") from None
        if not frames:
            raise BadInput(f"{folder}: no patient{patient}_frameXX.nii.gz in it; copy the patient again from your download")
        for image in frames:
            stem = image.name.split(".")[0]
            if sum(f.name.split(".")[0] == stem for f in frames) > 1:
                raise BadInput(f"{image}: is there as .nii and as .nii.gz; remove one of the two")
            mask = next((m for m in (folder / f"{stem}_gt.nii.gz", folder / f"{stem}_gt.nii") if m.exists()), None)
            if need_masks and mask is None:
                raise BadInput(f"{image}: has no {stem}_gt.nii.gz beside it, and this split needs masks; add the mask")
            cases.append(Case(stem, image, mask if need_masks else None))
    if missing:
        raise BadInput(f"--root {root}: patients {' '.join(missing)} of this split are missing; add their patientNNN folders")
    return cases


class Volume(NamedTuple):
    voxels: np.ndarray  # (Z,H,W); nibabel gives (x,y,z), turned over here. Slope and intercept are applied
    spacing: tuple[float, ...]  # (z,y,x) in mm: the header's zooms, for the affine's unit scales are wrong in ACDC
    affines: list[np.ndarray]  # voxel (x,y,z,1) -> mm by the sform and by the qform, which differ in ACDC; voxels stay as stored


def read_nifti(path: Path) -> Volume:
    try:
        file = nib.load(path)
        volume = np.asanyarray(file.dataobj)
        spacing, affines = tuple(float(s) for s in file.header.get_zooms()[:3])[::-1], [file.affine, file.get_qform()]
    except Exception as error:  # a damaged header can make nibabel fail in any way
        raise BadInput(f"{path}: cannot be read as NIfTI ({first_line(error)}); copy the file again from your download") from None
    if volume.dtype.kind not in "iufb":
        raise BadInput(f"{path}: its voxels are {volume.dtype}, not numbers; convert it to a gray image")
    if volume.ndim > 3 and set(volume.shape[3:]) == {1}:
        volume = volume.reshape(volume.shape[:3])
    if volume.ndim != 3 or 0 in volume.shape:
        raise BadInput(f"{path}: has shape {volume.shape} but one 3-D volume (x, y, z) is needed; give one frame per file")
    return Volume(volume.transpose(2, 1, 0), spacing, affines)


def read_image(path: Path) -> tuple[np.ndarray, tuple[float, ...]]:
    """(Z,H,W) float32, min-max to [0,1] over the whole volume (a constant one becomes 0), and its voxel spacing (z,y,x) in mm."""
    volume, spacing, _ = read_nifti(path)
    if not np.isfinite(volume).all():
        raise BadInput(f"{path}: holds NaN or infinite voxels; replace them or leave the patient out")
    volume = volume.astype(np.float64)  # float32 would lose digits, and overflow, where values are large
    low, high = volume.min(), volume.max()
    scaled = (volume - low) / (high - low) if high > low else np.zeros_like(volume)
    return scaled.astype(np.float32), spacing


def read_mask(case: Case, shape: tuple[int, ...], classes: int) -> np.ndarray:
    """The case's mask for an image of this shape: (Z,H,W) uint8 with values in [0, classes)."""
    path = case.mask
    mask, _, affines = read_nifti(path)
    if mask.shape != shape:
        raise BadInput(f"{path}: mask of shape {mask.shape[::-1]} for an image of shape {shape[::-1]}; they must be equal")
    # By its header the mask may lie beside its image by half a voxel at most, in mm: this bounds the distance over all voxels.
    image = nib.load(case.image)
    apart = [(np.abs(a - b)[:3] @ [*mask.shape[::-1], 1]).max() for a, b in zip(affines, (image.affine, image.get_qform()))]
    if not min(apart) <= min(image.header.get_zooms()[:3]) / 2:
        raise BadInput(f"{path}: by its header it lies up to {min(apart):.0f} mm away from its image; store both with the same affine")
    wrong = [v for v in np.unique(mask).tolist() if v not in range(classes)]
    if wrong:
        raise BadInput(f"{path}: label value {wrong[0]:g} is not one of 0 to {classes - 1}; remap the mask's labels")
    return mask.astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------------------
# From a native slice to the model's grid and back


def crop_center(x: Tensor, crop: int = VIEW) -> Tensor:
    """(...,G,G) -> (...,crop,crop). On ACDC's 160 training and validation volumes this loses 0.06 % of one heart."""
    edge = (x.shape[-1] - crop) // 2
    return x[..., edge : edge + crop, edge : edge + crop]


def uncrop(p: Tensor, grid: int = GRID) -> Tensor:
    """Probabilities (Z,C,crop,crop) -> (Z,C,grid,grid): what lies outside the crop is background (class 0), and surely so."""
    edge = (grid - p.shape[-1]) // 2
    outside = F.pad(p, (edge,) * 4)
    outside[:, 0] = F.pad(p[:, 0], (edge,) * 4, value=1.0)
    return outside


def to_grid(volume: Tensor, grid: int = GRID) -> Tensor:
    """(Z,H,W) float image or uint8 mask -> (Z,grid,grid): longer side to `grid`, centered, 0 around."""
    H, W = volume.shape[1:]
    h, w = (max(1, round(n * grid / max(H, W))) for n in (H, W))
    if volume.dtype == torch.uint8:
        small = F.interpolate(volume[:, None], size=(h, w), mode="nearest-exact")[:, 0]
    else:
        small = F.interpolate(volume[:, None], size=(h, w), mode="bilinear", antialias=True)[:, 0]
    top, left = (grid - h) // 2, (grid - w) // 2
    return F.pad(small, (left, grid - w - left, top, grid - h - top))


def from_grid(p: Tensor, shape: tuple[int, int]) -> Tensor:
    """The way back for probabilities: (Z,C,grid,grid) -> (Z,C,H,W) at native size, bilinear."""
    grid, (H, W) = p.shape[-1], shape
    h, w = (max(1, round(n * grid / max(H, W))) for n in (H, W))
    top, left = (grid - h) // 2, (grid - w) // 2
    return F.interpolate(p[..., top : top + h, left : left + w], size=(H, W), mode="bilinear", align_corners=False)


class Slices:
    """All slices of some cases, on the grid, drawn by number. Every file is read and checked once at the start.

    Prepared volumes stay in memory up to `cache_bytes`, the longest unused go first and are read again when wanted; so
    memory is bounded whatever the size of the data set.
    """

    def __init__(self, cases: list[Case], classes: int = len(CLASSES), cache_bytes: int = 4 * 2**30):
        self.cases, self.classes, self.cache_bytes = cases, classes, cache_bytes
        self.cache: OrderedDict[int, tuple[Tensor, Tensor]] = OrderedDict()
        self.cached_bytes = 0
        self.where = [(c, k) for c in range(len(cases)) for k in range(len(self.volume(c)[0]))]  # slice -> (case, k)

    def __len__(self) -> int:
        return len(self.where)

    def volume(self, c: int) -> tuple[Tensor, Tensor]:
        """Case c on the grid: image (Z,G,G) float32, mask (Z,G,G) uint8 (all 0 where the case has none)."""
        if c not in self.cache:
            image, _ = read_image(self.cases[c].image)
            labelled = self.cases[c].mask is not None
            mask = read_mask(self.cases[c], image.shape, self.classes) if labelled else np.zeros(image.shape, np.uint8)
            self.cache[c] = to_grid(torch.from_numpy(image)), to_grid(torch.from_numpy(mask))
            self.cached_bytes += sum(t.nbytes for t in self.cache[c])
            while self.cached_bytes > self.cache_bytes and len(self.cache) > 1:
                _, oldest = self.cache.popitem(last=False)
                self.cached_bytes -= sum(t.nbytes for t in oldest)
        self.cache.move_to_end(c)
        return self.cache[c]

    def names(self, numbers: Tensor) -> list[str]:
        """(B,) -> "patient099_frame01 slice 3", counted from 1."""
        return [f"{self.cases[c].name} slice {k + 1}" for c, k in (self.where[n] for n in numbers.tolist())]

    def absent_classes(self, labels: list[str]) -> list[str]:
        """Those of the labels that no slice shows."""
        seen = {value for c in range(len(self.cases)) for value in self.volume(c)[1].unique().tolist()}
        return [label for value, label in enumerate(labels) if value not in seen]

    def batch(self, numbers: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """(B,) -> images (B,1,G,G) float32 in [0,1], masks (B,G,G) uint8."""
        pairs = [tuple(t[k] for t in self.volume(c)) for c, k in (self.where[n] for n in numbers.tolist())]
        images, masks = (torch.stack(t) for t in zip(*pairs))
        return images[:, None].to(device, non_blocking=True), masks.to(device, non_blocking=True)


# ---------------------------------------------------------------------------------------------------------------------
# The two views (Section 4.2), batched, on the training device. The generator must live there too.


def uniform(low: float, high: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator, device=generator.device)


def weak_view(images: Tensor, masks: Tensor, generator: torch.Generator, crop: int = CROP) -> tuple[Tensor, Tensor]:
    """Rotate, scale, shift and crop: (B,1,G,G), (B,G,G) -> (B,1,crop,crop) float, (B,crop,crop) int64.

    Rotation up to 40 degrees and no flip: scanners lay hearts down the same way, and any angle plus flips cost 12 points of
    validation Dice at 600 supervised steps (0.51 against 0.63).
    """
    B, _, G, _ = images.shape
    angle = uniform(-0.7, 0.7, (B,), generator)
    zoom = uniform(0.8, 1.3, (B,), generator)  # above 1: the heart appears larger
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    shift = uniform(-0.2, 0.2, (B, 2), generator)  # of half the slice
    # Rows of theta give, for a point of the crop in [-1,1]^2, the point of the slice in [-1,1]^2 that it shows.
    turn = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1) * (crop / G)  # (B,2,2)
    theta = torch.cat([turn, shift[:, :, None]], dim=2)  # (B,2,3)
    grid = F.affine_grid(theta, [B, 1, crop, crop], align_corners=False)
    view = F.grid_sample(images, grid, mode="bilinear", align_corners=False)
    labels = F.grid_sample(masks[:, None].float(), grid, mode="nearest", align_corners=False)[:, 0].long()
    return view, labels


def strong_view(x: Tensor, generator: torch.Generator) -> Tensor:
    """Intensity jitter, then blur and noise, each strength drawn per slice. (B,1,H,W) -> (B,1,H,W), values in [0,1]."""
    B = len(x)
    each = (B, 1, 1, 1)
    gamma = torch.exp(uniform(-0.5, 0.5, each, generator))
    contrast = torch.exp(uniform(-0.5, 0.5, each, generator))
    brightness = uniform(-0.15, 0.15, each, generator)
    mean = x.mean((2, 3), keepdim=True)
    x = ((x.clamp_min(0) ** gamma - mean) * contrast + mean + brightness).clamp(0, 1)
    # Blur: one separable Gaussian per slice, sigma up to 1.5 pixels, for half of the slices.
    sigma = uniform(0.1, 1.5, (B, 1), generator)
    sigma = torch.where(uniform(0, 1, (B, 1), generator) < 0.5, sigma, torch.full_like(sigma, 0.1))
    steps = torch.arange(-3, 4, device=x.device)
    kernel = torch.exp(-0.5 * (steps / sigma) ** 2)
    kernel = kernel / kernel.sum(1, keepdim=True)  # (B,7)
    x = F.conv2d(x.transpose(0, 1), kernel[:, None, None, :], padding=(0, 3), groups=B)
    x = F.conv2d(x, kernel[:, None, :, None], padding=(3, 0), groups=B).transpose(0, 1)
    noise = torch.randn(x.shape, generator=generator, device=x.device) * uniform(0, 0.08, each, generator)
    return (x + noise).clamp(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# Phantoms: short-axis cine-MRI made of ellipses, so that everything runs where no data is


def phantom_slice(size: int, anatomy: dict, height: float, contraction: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One short-axis slice (size,size): intensities and mask. height: 0 = base, 1 = apex. contraction: 0 = ED, 1 = ES."""
    y, x = np.mgrid[:size, :size] / size - 0.5

    def ellipse(cx, cy, rx, ry, turn=0.0):
        u, v = x - cx, y - cy
        u, v = u * np.cos(turn) + v * np.sin(turn), v * np.cos(turn) - u * np.sin(turn)
        return (u / rx) ** 2 + (v / ry) ** 2 < 1

    a = anatomy
    image = np.full((size, size), 20.0)  # air
    image[ellipse(0, 0, a["chest"], a["chest"] * 0.78)] = 230  # fat under the skin
    image[ellipse(0, 0, a["chest"] - 0.03, a["chest"] * 0.78 - 0.03)] = 110  # muscle
    image[ellipse(-0.2, -0.04, 0.15, 0.22, 0.2) | ellipse(0.22, -0.02, 0.14, 0.2, -0.2)] = 40  # lungs
    image[ellipse(-0.16, 0.24, 0.2, 0.12, 0.3)] = 140  # liver
    image[ellipse(0.05, 0.3, 0.03, 0.03)] = 240  # aorta
    cx, cy = a["x"] + 0.02 * height, a["y"] + 0.02 * height
    taper = np.sqrt(max(0.0, 1 - (0.9 * height) ** 2))  # the ventricle closes towards the apex
    cavity = a["lv"] * taper * (1 - 0.35 * contraction)
    wall = a["wall"] * (1 + 0.4 * contraction)
    outer = cavity + wall
    rv = ellipse(cx - 0.8 * outer, cy - 0.2 * outer, a["rv"] * taper * (1 - 0.25 * contraction), 1.1 * outer, a["turn"])
    heart = ellipse(cx, cy, outer, outer * a["oval"], a["turn"])
    lv = ellipse(cx, cy, cavity, cavity * a["oval"], a["turn"])
    mask = np.zeros((size, size), np.uint8)
    mask[rv], mask[heart], mask[lv] = 1, 2, 3
    image[mask == 1], image[mask == 2], image[mask == 3] = 205, 90, 220
    if cavity > 0.05:  # papillary muscles: dark spots that belong to the cavity
        image[lv & (ellipse(cx + 0.5 * cavity, cy, 0.012, 0.012) | ellipse(cx - 0.3 * cavity, cy + 0.4 * cavity, 0.012, 0.012))] = 110
    texture = rng.standard_normal((size // 8 + 1, size // 8 + 1)).repeat(8, 0).repeat(8, 1)[:size, :size]
    drift = 1 + a["drift"] * (x * np.cos(a["drift_turn"]) + y * np.sin(a["drift_turn"]))  # distance from the coil
    return (image + 6 * texture) * drift, mask


def phantom_patient(folder: Path, patient: str, seed: int) -> None:
    """Both frames of one patient as ACDC has them: int16 image and uint8 mask, (x, y, z), voxel spacing in the header."""
    rng = np.random.default_rng([seed, int(patient)])
    draw = rng.uniform
    anatomy = {
        "x": draw(-0.03, 0.07), "y": draw(-0.06, 0.04), "chest": draw(0.4, 0.47), "turn": draw(-0.5, 0.5), "oval": draw(0.88, 1.12),
        "lv": draw(0.06, 0.1), "wall": draw(0.022, 0.04), "rv": draw(0.07, 0.11), "drift": draw(0, 0.9), "drift_turn": draw(0, 6.28),
    }
    size, depth, noise = int(rng.integers(112, 145)), int(rng.integers(6, 9)), draw(8, 20)
    for frame, contraction in ((1, 0.0), (int(rng.integers(8, 13)), 1.0)):
        slices = [phantom_slice(size, anatomy, k / (depth - 1), contraction, rng) for k in range(depth)]
        image, mask = (np.stack(t, axis=-1).transpose(1, 0, 2) for t in zip(*slices))  # (y,x,z) -> (x,y,z)
        image = np.clip(image + noise * rng.standard_normal(image.shape), 0, 1000)
        spacing = np.diag([1.8, 1.8, 9.0, 1.0])
        name = f"patient{patient}_frame{frame:02d}"
        nib.save(nib.Nifti1Image(image.astype(np.int16), spacing), folder / f"{name}.nii.gz")
        nib.save(nib.Nifti1Image(mask, spacing), folder / f"{name}_gt.nii.gz")


def make_phantoms(root: Path, seed: int = 0) -> None:
    """Write all phantom patients below root, once: into a temporary folder first, so that root is whole or absent."""
    if root.exists():
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent) as temporary:
        for patients in PHANTOM_SPLIT.values():
            for patient in patients:
                folder = Path(temporary) / "all" / "training" / f"patient{patient}"
                folder.mkdir(parents=True)
                phantom_patient(folder, patient, seed)
        os.replace(Path(temporary) / "all", root)


# ---------------------------------------------------------------------------------------------------------------------
# Data sets


def open_dataset(name: str, root: str) -> tuple[Path, dict[str, list[str]]]:
    """The folder and the split (train, val, test: lists of patients) of `phantom` or `acdc`. Phantoms are made when absent."""
    if name == "phantom":
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = Path(root) if root else cache / "vq-seg" / "phantom-1"
        make_phantoms(folder)
        return folder, PHANTOM_SPLIT
    if not root:
        raise BadInput("--data acdc needs --root: the folder that holds ACDC's patientNNN folders")
    return Path(root), ACDC_SPLIT


def training_cases(root: Path, split: dict[str, list[str]], labeled: int) -> tuple[list[Case], list[Case]]:
    """The labelled cases, and the unlabelled ones: the other training patients, or all again without masks if none is left."""
    patients = split["train"]
    if not 1 <= labeled <= len(patients):
        raise BadInput(f"--labeled {labeled}: must lie in 1 to {len(patients)}, the training patients of this data set")
    overlap = set(patients) & set(split["val"]) | set(patients) & set(split["test"]) | set(split["val"]) & set(split["test"])
    assert not overlap, f"patients in more than one of train, val and test: {overlap}"
    labelled = find_cases(root, patients[:labeled], need_masks=True)
    return labelled, find_cases(root, patients[labeled:] or patients, need_masks=False)


def main() -> None:
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap

    parser = argparse.ArgumentParser(description="List a data set and draw slices, masks and both views of them.")
    parser.add_argument("--data", default="phantom", choices=["phantom", "acdc"])
    parser.add_argument("--root", default="")
    args = parser.parse_args()
    try:
        root, split = open_dataset(args.data, args.root)
        cases = find_cases(root, split["train"], need_masks=True)
        slices = Slices(cases)
    except BadInput as error:
        parser.exit(2, f"data.py: {error}\n")
    print(f"{args.data} at {root}: {len(split['train'])} training patients, {len(cases)} frames, {len(slices)} slices")
    for case in cases[:: max(1, len(cases) // 8)]:
        volume, spacing = read_image(case.image)
        print(f"  {case.name}: {volume.shape} voxels (z,y,x), spacing {tuple(round(v, 2) for v in spacing)} mm")

    generator = torch.Generator().manual_seed(0)
    images, masks = slices.batch(torch.linspace(3, len(slices) - 4, 6).long(), torch.device("cpu"))
    weak, labels = weak_view(images, masks, generator)
    strong = strong_view(weak, generator)
    colors = ListedColormap(COLORS)
    figure, axes = plt.subplots(3, 6, figsize=(12, 6.2), layout="constrained")
    for column in range(6):
        pairs = (images[column, 0], masks[column]), (weak[column, 0], labels[column]), (strong[column, 0], None)
        for row, (title, (picture, mask)) in enumerate(zip(("slice on the grid, mask", "weak view x_u", "strong view x_a"), pairs)):
            axes[row, column].imshow(picture, cmap="gray", vmin=0, vmax=1)
            if mask is not None:
                axes[row, column].imshow(np.ma.masked_equal(mask, 0), cmap=colors, vmin=0, vmax=3, alpha=0.45, interpolation="nearest")
            axes[row, column].set(xticks=[], yticks=[], ylabel=title if column == 0 else "")
    figure.savefig("figures/data.png", dpi=60)
    print("wrote figures/data.png")


if __name__ == "__main__":
    main()
