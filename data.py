"""Data: all slices on one grid, the split by patient, weak and strong views, phantoms.

Implements the data part of Section 4.2: ACDC's 70/10/20 patients with 3 or 7 labeled (5 %, 10 %),
slices cropped to 128x128, random rotation, intensity ("color") jitter, Gaussian noise, blur; by the
field's protocol: labeled patients are the first of a fixed list, intensities min-max to [0,1] per
volume, classes 1 RV cavity, 2 myocardium, 3 LV cavity. Three things differ: the grid (others
stretch slices to 256x256, we keep their aspect ratio), evaluation sees only the center of a slice,
and probabilities, not labels, are brought back to native size.
The paper does not say:
  - where the crop lies. Ours is near the center in training; evaluation sees the central EVAL_CROP
    pixels, which hold all hearts of training and validation, and calls the rest background.
  - which view gets which augmentation. Weak: rotation, scale, shift. Strong: weak, then jitter,
    blur, noise. Both have the same geometry: the pseudo-label fits the student's view.
"""

import gzip
import importlib
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if sys.version_info < (3, 10):  # the type hints below would be a TypeError
    print("Python 3.10 or newer is needed; this is", sys.version.split()[0], file=sys.stderr)
    sys.exit(2)

GRID = 240  # G: pixels of a slice's longer side
CROP = 128  # pixels along a side that training sees, Section 4.2
EVAL_CROP = 160  # pixels along a side that evaluation sees, around the center
CLASSES = ["background", "RV", "Myo", "LV"]

# Training, validation and test patients. `--labeled 7` takes the first seven.
ACDC = """
    099 038 050 100 058 021 049 020 072 040 060 089 004 056 098 096 031 018 094 047 048 055 097 074
    043 041 063 037 095 054 026 088 032 069 006 071 012 073 061 017 025 010 057 029 051 005 036 046
    062 034 076 092 070 077 067 003 091 016 014 044 042 090 053 027 035 086 023 009 079 015
    028 085 082 087 019 030 078 045 002 039
    011 013 084 033 093 022 068 024 083 081 080 001 007 066 008 065 075 064 059 052""".split()
ACDC_SPLIT = {"train": ACDC[:70], "val": ACDC[70:80], "test": ACDC[80:]}
PHANTOM_SPLIT = {"train": [f"{number:03d}" for number in range(1, 15)],
                 "val": ["015", "016", "017", "018"], "test": ["019", "020", "021", "022"]}

class BadInput(Exception):
    """The user's input cannot be used. One line: which file or flag, what is wrong, the remedy."""

def extra(name: str):
    """A module of the folder extras; None where it has been deleted."""
    found = Path(__file__).parent.joinpath("extras", f"{name}.py").exists()
    return importlib.import_module(f"extras.{name}") if found else None

class Case(NamedTuple):
    """One volume: one frame of one patient."""

    name: str  # patient099_frame01
    patient: str  # patient099
    shape: tuple[int, ...]  # native (Z,H,W)
    spacing: tuple[float, ...]  # (z,y,x) in mm
    mask: Path | np.ndarray | None  # native mask (Z,H,W): NIfTI, or in memory; None: unlabeled
    first: int = 0  # its slices are the rows first to first + Z - 1

class Dataset(NamedTuple):
    labels: list[str]  # class names, background first
    split: dict[str, list[str]]  # train, val, test -> patients; of train, labeled ones come first
    labeled: int  # how many patients of train are labeled by default
    eval_crop: int  # pixels that evaluation sees; a multiple of 16, at least 32
    window: tuple[float, float] | None  # intensities that become 0 and 1; None: minimum and maximum
    cases: list[Case]
    images: Tensor  # (N,G,G) float32 or float16 in [0,1]
    masks: Tensor  # (N,G,G) uint8; 0 where a case has no mask
    unit: str  # of distances: voxels in the field's protocol, mm for a set of one's own

    def part(self, part: str) -> list[Case]:
        """The cases of train, val or test, in the order of the split."""
        cases = [c for patient in self.split[part] for c in self.cases if c.patient == patient]
        if not cases:
            raise BadInput(f"the {part} split is empty; add patients to it")
        return cases

    def rows(self, cases: list[Case]) -> Tensor:
        """The row numbers of all slices of these cases: (n,) int64."""
        return torch.cat([torch.arange(c.first, c.first + c.shape[0]) for c in cases])

    def training(self, labeled: int) -> tuple[list[Case], list[Case]]:
        """Cases of the first `labeled` patients (0: the default), and all others: unlabeled."""
        cases = self.part("train")
        most = len({case.patient for case in cases if case.mask is not None})
        if labeled > most:
            raise BadInput(f"--labeled {labeled}: only {most} training patients have masks")
        first = self.split["train"][: labeled or self.labeled]
        few = [case for case in cases if case.patient in first and case.mask is not None]
        names = {case.name for case in few}
        # With all patients labeled, all slices serve as unlabeled ones too.
        return few, [case for case in cases if case.name not in names] or cases

def load(name: str, root: str = "", parts: tuple[str, ...] = ("train", "val")) -> Dataset:
    """`phantom`, `acdc` (as downloaded, in root), or a folder written by `extras.prepare`."""
    if name == "phantom":
        return stack(*phantoms(parts), PHANTOM_SPLIT, labeled=3)
    folder = Path(root or name).expanduser()
    if (folder / "dataset.json").exists():
        return load_prepared(folder)
    if name != "acdc" or not folder.is_dir():
        remedy = "name its folder with --root, or prepare your own: python -m extras.prepare"
        raise BadInput(f"{folder}: neither ACDC nor a prepared set; {remedy}")
    return stack(*read_acdc(folder, parts), ACDC_SPLIT, labeled=7)

def load_prepared(folder: Path) -> Dataset:
    """A set of `extras.prepare`: memory-mapped, but 8-bit images are read into memory."""
    checks = extra("checks")  # not in the try: a missing package is not a damaged file
    try:
        meta = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        cases = [Case(**case) for case in meta.pop("cases")]
        cases = [c._replace(mask=folder / c.mask if c.mask else None) for c in cases]
        # Mode "c": a change would stay in memory. PyTorch warns about arrays that are read-only.
        images = torch.from_numpy(np.load(folder / "images.npy", mmap_mode="c"))
        masks = torch.from_numpy(np.load(folder / "masks.npy", mmap_mode="c"))
        images = images / 255 if images.dtype == torch.uint8 else images  # --bits 8
        dataset = Dataset(**meta, cases=cases, images=images, masks=masks)
        return checks.intact(dataset) if checks else dataset
    except Exception as error:  # a damaged file can fail in any way
        raise BadInput(f"{folder}: unreadable ({error}); allow it, or prepare it again") from None

def read_acdc(root: Path, parts: tuple[str, ...]) -> tuple[list[Case], list[np.ndarray]]:
    """patientNNN/patientNNN_frameXX[_gt].nii[.gz], also below training/ or database/training/."""
    cases, images = [], []
    for patient in [f"patient{number}" for part in parts for number in ACDC_SPLIT[part]]:
        places = ("", "training", "database/training")
        files = [file for place in places for file in (root / place / patient).glob("*")]
        pattern = rf"{patient}_frame\d+\.nii(\.gz)?"  # the numbers differ between patients
        frames = sorted(f for f in files if re.fullmatch(pattern, f.name))
        masks = [f.with_name(f.name.replace(".nii", "_gt.nii")) for f in frames]
        if len(frames) != 2 or not all(mask.exists() for mask in masks):
            needed = f"two {patient}_frameXX.nii.gz, each with its _frameXX_gt.nii.gz"
            raise BadInput(f"{root}: {patient} is not as downloaded: {needed}; copy it again")
        for image, mask in zip(frames, masks):
            voxels, spacing = read_nifti(image)
            cases.append(Case(image.name.split(".")[0], patient, voxels.shape, spacing, mask))
            images.append(voxels)
    return cases, images

def read_nifti(path: Path) -> tuple[np.ndarray, tuple[float, ...]]:
    """(Z,H,W) voxels and (z,y,x) spacing in mm by pixdim: ACDC's sform has unit scales."""
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):  # nibabel would not look at the checksum
            content = gzip.decompress(content)
        file = nib.Nifti1Image.from_bytes(content)
        voxels = np.asarray(file.dataobj)
        if voxels.ndim != 3 or 0 in voxels.shape:
            raise ValueError(f"shape {voxels.shape} is not (x, y, z)")
        if voxels.dtype.kind not in "iufb" or not np.isfinite(voxels).all():
            raise ValueError("voxels are not finite numbers")
    except Exception as error:  # a damaged file can fail in any way
        raise BadInput(f"{path}: unreadable ({error!r}); allow it, or copy it again") from None
    return voxels.T, tuple(float(s) for s in file.header.get_zooms()[::-1])

def read_mask(case: Case, classes: int) -> np.ndarray:
    """The native mask: (Z,H,W) uint8 with values in [0, classes)."""
    mask = case.mask if isinstance(case.mask, np.ndarray) else read_nifti(case.mask)[0]
    labels = np.clip(np.rint(mask), 0, 255).astype(np.uint8)
    # Not exactly: a mask saved with a scale factor has 0.9999999 for 1.
    wrong = mask[(np.abs(mask - labels.astype(np.float64)) > 1e-3) | (labels >= classes)]
    if mask.shape == tuple(case.shape) and not len(wrong):
        return labels
    fault = f"has shape {mask.shape[::-1]}, its image {tuple(case.shape[::-1])}; they must be equal"
    if len(wrong):
        fault = f"label value {wrong[0]:.9g} is not one of 0 to {classes - 1}; change the labels"
    raise BadInput(f"{case.mask}: {fault}")

def scale(volume: np.ndarray, window: tuple[float, float] | None = None) -> np.ndarray:
    """(Z,H,W) -> float32 in [0,1]: the window, or else the volume's minimum and maximum."""
    low, high = window or (float(volume.min()), float(volume.max()))
    volume = (volume.astype(np.float64) - low) / ((high - low) or 1)  # a constant volume becomes 0
    return np.clip(volume, 0, 1).astype(np.float32)

def stack(cases: list[Case], volumes: list[np.ndarray], split: dict, labeled: int) -> Dataset:
    """Native volumes of hearts -> a data set in memory."""
    split = {part: [f"patient{number}" for number in split[part]] for part in split}
    first = np.cumsum([0, *map(len, volumes)]).tolist()
    cases = [case._replace(first=row) for case, row in zip(cases, first)]
    images = torch.cat([to_grid(torch.from_numpy(scale(volume))) for volume in volumes])
    masks = torch.cat([to_grid(torch.from_numpy(read_mask(c, len(CLASSES)))) for c in cases])
    return Dataset(CLASSES, split, labeled, EVAL_CROP, None, cases, images, masks, "voxels")

def fit(height: int, width: int) -> tuple[int, int, int, int]:
    """Where a native slice lies on the grid: top, left, h, w in pixels."""
    h, w = (max(1, round(n * GRID / max(height, width))) for n in (height, width))
    return (GRID - h) // 2, (GRID - w) // 2, h, w

def to_grid(volume: Tensor) -> Tensor:
    """(Z,H,W) float image or uint8 mask -> (Z,G,G): the longer side becomes G, 0 around."""
    top, left, h, w = fit(*volume.shape[1:])
    image = volume.is_floating_point()
    mode = "bilinear" if image else "nearest-exact"
    small = F.interpolate(volume[:, None], size=(h, w), mode=mode, antialias=image)[:, 0]
    return F.pad(small, (left, GRID - w - left, top, GRID - h - top))

def to_native(p: Tensor, shape: tuple[int, int]) -> Tensor:
    """Probabilities of the crop -> native size, background around: (Z,C,crop,crop) -> (Z,C,H,W)."""
    edge = (GRID - p.shape[-1]) // 2
    background = F.pad(p[:, :1], (edge,) * 4, value=1.0)
    p = torch.cat([background, F.pad(p[:, 1:], (edge,) * 4)], 1)  # (Z,C,G,G)
    top, left, h, w = fit(*shape)
    return F.interpolate(p[..., top : top + h, left : left + w], size=shape, mode="bilinear")

def crop_center(x: Tensor, crop: int = EVAL_CROP) -> Tensor:
    """(...,G,G) -> (...,crop,crop)."""
    edge = (GRID - crop) // 2
    return x[..., edge : edge + crop, edge : edge + crop]

def batch(dataset: Dataset, rows: Tensor, count: int, generator: torch.Generator) -> tuple:
    """`count` random slices out of `rows`, with replacement: images (B,1,G,G), masks (B,G,G)."""
    device = generator.device
    chosen = rows[torch.randint(len(rows), (count,), generator=generator, device=device)]
    chosen = chosen.to(dataset.images.device)
    x, y = dataset.images[chosen], dataset.masks[chosen]
    return x.to(device).float()[:, None], y.to(device)

def uniform(low: float, high: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator, device=generator.device)

def weak_view(images: Tensor, masks: Tensor, generator: torch.Generator,
              eval_crop: int = EVAL_CROP) -> tuple[Tensor, Tensor]:
    """Rotate, scale, shift, crop: (B,1,G,G), (B,G,G) -> (B,1,CROP,CROP), (B,CROP,CROP) int64.

    The crop moves so far that training sees all that evaluation sees, and 8 pixels more.
    """
    B = len(images)
    angle = uniform(-0.7, 0.7, (B,), generator)  # up to 40 degrees; no flips, RV is on one side
    zoom = uniform(0.8, 1.3, (B,), generator)  # above 1: the heart appears larger
    reach = (max(0, eval_crop - CROP) / 2 + 8) / (GRID / 2)  # as a share of half the slice
    shift = uniform(-reach, reach, (B, 2, 1), generator)
    # theta maps a point of the crop, in [-1,1]^2, to the point of the slice that it shows.
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1)
    rotation = (rotation * (CROP / GRID) / zoom[:, None]).reshape(B, 2, 2)
    theta = torch.cat([rotation, shift], 2)  # (B,2,3)
    grid = F.affine_grid(theta, [B, 1, CROP, CROP], align_corners=False)
    x = F.grid_sample(images, grid, mode="bilinear", align_corners=False)
    y = F.grid_sample(masks[:, None].float(), grid, mode="nearest", align_corners=False)
    return x, y[:, 0].long()

def strong_view(x: Tensor, generator: torch.Generator) -> Tensor:
    """Intensity jitter, blur, noise, random in each slice: (B,1,H,W) -> (B,1,H,W) in [0,1]."""
    B = len(x)
    each = (B, 1, 1, 1)
    # 1. Jitter: gamma and contrast 0.6 to 1.6, brightness.
    gamma, contrast = (torch.exp(uniform(-0.5, 0.5, each, generator)) for _ in range(2))
    brightness = uniform(-0.15, 0.15, each, generator)
    x = x.clamp_min(0) ** gamma
    mean = x.mean((2, 3), keepdim=True)
    x = ((x - mean) * contrast + mean + brightness).clamp(0, 1)
    # 2. Blur: half of the slices, Gaussian, sigma up to 1.5 pixels; 0.1 leaves a slice as it is.
    sigma = uniform(0.1, 1.5, (B, 1), generator)
    sigma = torch.where(uniform(0, 1, (B, 1), generator) < 0.5, sigma, 0.1)
    steps = torch.arange(-3, 4, device=x.device)
    kernel = torch.softmax(-0.5 * (steps / sigma) ** 2, 1)  # (B,7): Gaussian with sum 1
    x = F.pad(x.transpose(0, 1), (3,) * 4, mode="replicate")  # zeros would darken the edge
    x = F.conv2d(x, kernel[:, None, None, :], groups=B)  # slices as channels, each its kernel
    x = F.conv2d(x, kernel[:, None, :, None], groups=B).transpose(0, 1)
    # 3. Noise.
    noise = torch.randn(x.shape, generator=generator, device=x.device)
    return (x + noise * uniform(0, 0.08, each, generator)).clamp(0, 1)

def phantoms(parts: tuple[str, ...]) -> tuple[list[Case], list[np.ndarray]]:
    """Short-axis cine-MRI made of ellipses, for a first run without data; the same at each call."""
    ranges = {"x": (-0.05, 0.05), "y": (-0.05, 0.05), "lv": (0.06, 0.1), "wall": (0.022, 0.04),
              "rv": (0.8, 1.2), "coil": (-0.9, 0.9), "noise": (8, 20)}
    cases, images = [], []
    for patient in [f"patient{number}" for part in parts for number in PHANTOM_SPLIT[part]]:
        rng = np.random.default_rng(int(patient[7:]))
        a = {name: rng.uniform(*limits) for name, limits in ranges.items()}
        side = np.linspace(-0.5, 0.5, int(rng.integers(112, 145)))
        height = np.linspace(0, 0.9, int(rng.integers(6, 9)))  # 0 base, 1 apex
        z, y, x = np.meshgrid(height, side, side, indexing="ij")  # (Z,H,W) each
        for frame, size in (("01", 1.0), ("02", 0.65)):  # end-diastole, end-systole
            lv = a["lv"] * size * np.sqrt(1 - z**2)  # the ventricles close toward the apex
            outer = lv + a["wall"]
            radius = np.hypot(x - a["x"], y - a["y"])
            mask = np.zeros(z.shape, np.uint8)
            mask[np.hypot(x - a["x"] + outer, 0.8 * (y - a["y"])) < a["rv"] * outer] = 1
            mask[radius < outer] = 2
            mask[radius < lv] = 3
            image = np.array([110.0, 205.0, 90.0, 220.0])[mask]
            image[(mask == 0) & (np.hypot(np.abs(x) - 0.22, 0.7 * y) < 0.1)] = 40  # lungs
            image[np.hypot(x / 0.45, y / 0.35) > 1] = 20  # air
            image = image * (1 + a["coil"] * x) + a["noise"] * rng.standard_normal(z.shape)
            cases.append(Case(f"{patient}_frame{frame}", patient, z.shape, (9.0, 1.8, 1.8), mask))
            images.append(image)
    return cases, images
