"""Data: every layout that scans come in, one reader for all, the split by patient, the grid, and the two views of a slice.

Implements the data part of Section 4.2: the 70/10/20 split of ACDC with 3 or 7 labelled patients (5 % and 10 %), slices
cropped to 128x128, random rotation, intensity ("color") jitter, Gaussian noise and blur; and the chest CTs with one lesion
class that the paper calls LC, which are not public: `--data lc` reads whatever you have of that kind.

The field's protocol, as every semi-supervised paper on ACDC has it: split by patient, both frames of a patient together;
"labelled" is a fixed prefix of the training list; intensities min-max to [0,1] per volume; classes 1 RV cavity,
2 myocardium, 3 LV cavity; arrays as they are stored, whatever the orientation. Where we depart from it, metrics do not
notice, for they are taken at native size:
  - the peers stretch each slice to 256x256 by nearest neighbor; we keep its aspect ratio: the longer side becomes `GRID`
    pixels, bilinear, the rest of the square is 0.
The paper does not say:
  - what of a slice is cropped. Training draws its 128x128 around the center, moved at random; evaluation looks at the central
    `VIEW`, and what lies outside is background. That loses 0.06 % of one heart in 160 volumes. Whole slices scored 5
    points of Dice less with the same weights (0.716 against 0.769), for they show surroundings that training never does.
    Lesions may lie anywhere: `--view` is the whole grid where the data is not cardiac, and training moves its crop as far.
  - which window shows CT. -1000 to 400 HU, as is usual for nodules of the lung: `--window`.
  - which view gets which augmentation. Weak: rotation, scale, shift. Strong: weak, then jitter, noise and blur. Geometry
    is thus the same in both, and the teacher's pseudo-label fits the student's view pixel by pixel.

In this order: reading files, a few slices at a time; the layouts; who is in train, val and test; the grid, and drawing slices; the two
views, which are the paper's part; phantoms. Only the last three touch what a network sees.

Run `python data.py [--data acdc --root DIR]` to see what is found and to draw figures/data.png.
"""

import argparse
import os
import re
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
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
# Of the classes in every figure, safe for color-blind readers; more classes than colors take them in turn.
COLORS = ["#000000", "#0072B2", "#E69F00", "#CC79A7", "#009E73", "#56B4E9", "#D55E00", "#F0E442"]

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
    """One frame of one patient: a volume, in one NIfTI or HDF5 file or in one file per slice."""

    name: str  # patient099_frame01
    patient: str  # patient099
    images: tuple[Path, ...]  # slices in their order
    masks: tuple[Path, ...] | None  # None: unlabelled, and then nothing reads a mask even if there is one on disk
    window: tuple[float, float] | None = None  # the intensities that become 0 and 1; None: the volume's own extremes


# ---------------------------------------------------------------------------------------------------------------------
# Reading: headers first, voxels a few slices at a time, so that a volume of 500 x 512 x 512 needs little memory


class Volume(NamedTuple):
    """A volume that is still on disk."""

    shape: tuple[int, int, int]  # (Z,H,W); nibabel gives (x,y,z), turned over here
    read: Callable[[int, int], np.ndarray]  # slices a to b: (b-a,H,W), numbers and finite, slope and intercept applied
    # Of NIfTI alone:
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0)  # (z,y,x) in mm: the header's zooms, for the affine's unit scales are wrong in ACDC
    affines: tuple[np.ndarray, ...] = ()  # voxel (x,y,z,1) -> mm by the sform, and by the qform if there is one too: they may differ
    axes: str = ""  # RAS, LPS, ...


def unreadable(path: Path, error: Exception) -> BadInput:
    kind = {".h5": "HDF5", ".png": "PNG", ".npy": "NumPy"}.get(path.suffix, "NIfTI")
    return BadInput(f"{path}: cannot be read as {kind} ({first_line(error)}); copy the file again from your download")


def numbers(path: Path, read: Callable[[], np.ndarray]) -> np.ndarray:
    """What `read` takes from this file, or one line about what is wrong with it."""
    try:
        voxels = np.asarray(read())
    except Exception as error:  # a damaged file can make a library fail in any way
        raise unreadable(path, error) from None
    if voxels.dtype.kind not in "iufb":
        raise BadInput(f"{path}: its voxels are {voxels.dtype}, not numbers; convert it to a gray image")
    if not np.isfinite(voxels).all():
        raise BadInput(f"{path}: holds NaN or infinite voxels; replace them or leave the patient out")
    return voxels


def open_nifti(path: Path, frame: int | None = None) -> Volume:
    """One frame of a 4-D series, or the only one: None."""
    try:
        file = nib.load(path, keep_file_open=True)  # or each part of a .nii.gz would be unpacked from its beginning
        shape, header = file.shape, file.header
        spacing, (qform, stated) = tuple(float(s) for s in header.get_zooms()[:3])[::-1], header.get_qform(coded=True)
        affines = (file.affine, qform) if stated else (file.affine,)
        axes = "".join(code or "?" for code in nib.aff2axcodes(file.affine))
    except Exception as error:
        raise unreadable(path, error) from None
    if len(shape) < 3 or min(shape) < 1 or (frame is None and set(shape[3:]) - {1}):
        raise BadInput(f"{path}: has shape {shape} but one 3-D volume (x, y, z) is needed; give one frame per file")
    at = (frame or 0, *(0 for _ in shape[4:])) if len(shape) > 3 else ()
    read = lambda a, b: numbers(path, lambda: file.dataobj[(slice(None), slice(None), slice(a, b), *at)]).transpose(2, 1, 0)  # noqa: E731
    return Volume(shape[2::-1], read, spacing, affines, axes)


def open_hdf5(path: Path):
    try:
        import h5py
    except ImportError:
        raise BadInput(f"{path}: HDF5 needs a package that is not installed; pip install h5py") from None
    try:
        return h5py.File(path)
    except OSError as error:
        raise unreadable(path, error) from None


def open_arrays(files: tuple[Path, ...], key: str) -> Volume:
    """One HDF5 volume, or slices in HDF5, PNG and npy files. In HDF5 `key` is the name of the array: image or label."""

    def part(path: Path, rows: slice = np.s_[:]) -> np.ndarray:
        if path.suffix == ".h5":
            with open_hdf5(path) as file:
                return numbers(path, lambda: file[key][rows])
        if path.suffix == ".npy":
            return numbers(path, lambda: np.load(path))
        from PIL import Image  # comes with matplotlib

        with_palette = lambda picture: picture.convert("RGB") if picture.mode == "P" else picture  # noqa: E731, its numbers are no grays
        return numbers(path, lambda: with_palette(Image.open(path)))

    if files[0].suffix == ".h5":
        with open_hdf5(files[0]) as file:
            shape = getattr(file.get(key), "shape", ())
    else:
        shape = part(files[0]).shape
    if len(shape) == 3 and len(files) == 1 and 0 not in shape:
        return Volume(shape, lambda a, b: part(files[0], slice(a, b)))
    if len(shape) != 2 or 0 in shape:
        raise BadInput(f"{files[0]}: its {key} has shape {shape} but a gray slice (y, x) is needed, or a volume (z, y, x); store it so")

    def read(a: int, b: int) -> np.ndarray:
        slices = [part(path) for path in files[a:b]]
        for path, one in zip(files[a:b], slices):
            if one.shape != shape:
                raise BadInput(f"{path}: a slice of shape {one.shape} in a volume of {shape}; all slices of a volume must be equal")
        return np.stack(slices)

    return Volume((len(files), *shape), read)


def open_volume(files: tuple[Path, ...], key: str = "image") -> Volume:
    return open_nifti(files[0]) if files[0].name.endswith((".nii", ".nii.gz")) else open_arrays(files, key)


def slabs(volume: Volume) -> Iterator[np.ndarray]:
    """The voxels, about 4 million at a time."""
    Z, H, W = volume.shape
    step = max(1, 2**22 // (H * W))
    return (volume.read(z, min(z + step, Z)) for z in range(0, Z, step))


def scaled(volume: Volume, window: tuple[float, float] | None) -> Iterator[np.ndarray]:
    """Slabs (n,H,W) float32: the window, or else the extremes of the whole volume, to [0,1]. A constant volume becomes 0."""
    if window is None:
        extremes = [(float(slab.min()), float(slab.max())) for slab in slabs(volume)]
        window = min(low for low, _ in extremes), max(high for _, high in extremes)
    low, high = window
    for slab in slabs(volume):
        slab = slab.astype(np.float64)  # float32 would lose digits, and overflow, where values are large
        yield (np.clip((slab - low) / (high - low), 0, 1) if high > low else np.zeros_like(slab)).astype(np.float32)


def mask_slabs(case: Case, classes: int) -> Iterator[np.ndarray]:
    """Slabs (n,H,W) uint8 of the case's mask, with values in [0, classes), after a look at whether it fits its image."""
    path, image, mask = case.masks[0], open_volume(case.images), open_volume(case.masks, "label")
    if mask.shape != image.shape:
        raise BadInput(f"{path}: mask of shape {mask.shape[::-1]} for an image of shape {image.shape[::-1]}; they must be equal")
    # By its header the mask may lie beside its image by half a voxel at most, in mm: this bounds the distance over all voxels.
    apart = [(np.abs(a - b)[:3] @ [*mask.shape[::-1], 1]).max() for a, b in zip(mask.affines, image.affines)]
    if apart and not min(apart) <= min(image.spacing) / 2:
        raise BadInput(f"{path}: by its header it lies up to {min(apart):.0f} mm away from its image; store both with the same affine")
    for slab in slabs(mask):
        with np.errstate(invalid="ignore"):  # what is no uint8 is refused in the next lines
            labels = slab.astype(np.uint8)
        wrong = slab[(labels != slab) | (labels >= classes)]
        if len(wrong):
            raise BadInput(f"{path}: label value {wrong[0]:g} is not one of 0 to {classes - 1}; remap the mask's labels")
        yield labels


def read_image(case: Case) -> tuple[np.ndarray, tuple[float, ...]]:
    """(Z,H,W) float32 in [0,1], and the voxel spacing (z,y,x) in mm."""
    volume = open_volume(case.images)
    return np.concatenate(list(scaled(volume, case.window))), volume.spacing


def read_mask(case: Case, classes: int) -> np.ndarray:
    """(Z,H,W) uint8."""
    return np.concatenate(list(mask_slabs(case, classes)))


def middle_slice(case: Case) -> Tensor:
    """(1,G,G) on the grid, scaled by its own extremes: for a figure."""
    volume = open_volume(case.images)
    image = volume.read(volume.shape[0] // 2, volume.shape[0] // 2 + 1).astype(np.float32)
    return to_grid(torch.from_numpy((image - image.min()) / max(1e-6, image.max() - image.min())))


# ---------------------------------------------------------------------------------------------------------------------
# Layouts: each function lists the volumes below a folder, with masks where there are any


def contents(folder: Path) -> list[Path]:
    """What is in a folder, in order; nothing where there is no such folder."""
    try:
        return sorted(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise BadInput(f"{folder}: cannot be opened ({error.strerror}); give yourself the right to read it") from None


def stem(path: Path) -> str:
    return re.sub(r"\.nii(\.gz)?$", "", path.name)


def nifti_files(files: Iterable[Path]) -> list[Path]:
    """Those that are NIfTI."""
    found = sorted(f for f in files if f.name.endswith((".nii", ".nii.gz")) and not f.name.startswith("."))
    for file in found:
        if file.with_name(file.name + ".gz") in found:
            raise BadInput(f"{file}: is there as .nii and as .nii.gz; remove one of the two")
    return found


def acdc_layout(root: Path) -> list[Case]:
    """.../patientNNN/patientNNN_frameXX.nii[.gz] and ..._frameXX_gt.nii[.gz], as downloaded; frame numbers differ per patient.

    The 4-D series and Info.cfg are not needed.
    """
    places = [root, root / "training", root / "testing", root / "database" / "training", root / "database" / "testing"]
    folders = [f for place in places for f in contents(place) if re.fullmatch(r"patient\d+", f.name) and f.is_dir()]
    cases = []
    for folder in folders:
        twin = next(f for f in reversed(folders) if f.name == folder.name)
        if twin != folder:
            raise BadInput(f"{folder}: there is another one, {twin}; remove one of the two")
        files = contents(folder)
        images = nifti_files(f for f in files if re.fullmatch(rf"{folder.name}_frame\d+", stem(f)))
        if not images:
            raise BadInput(f"{folder}: no {folder.name}_frameXX.nii.gz in it; copy the patient again from your download")
        for image in images:
            masks = tuple(nifti_files(f for f in files if stem(f) == f"{stem(image)}_gt"))
            cases.append(Case(stem(image), folder.name, (image,), masks or None))
        for mask in nifti_files(f for f in files if re.fullmatch(rf"{folder.name}_frame\d+_gt", stem(f))):
            if stem(mask).removesuffix("_gt") not in map(stem, images):
                raise BadInput(f"{mask}: has no image {stem(mask).removesuffix('_gt')} beside it; add the image, or remove the mask")
    return cases


def hdf5_layout(root: Path) -> list[Case]:
    """SSL4MIS: data/slices/patientNNN_frameXX_slice_J.h5 and data/patientNNN_frameXX.h5, or all in one folder; J not zero padded.

    A volume that is there whole is read whole; else its slices must be complete, from 0 or 1 on.
    """
    found: dict[str, dict[int, Path]] = {}  # case -> slices, or -1 -> volume
    for place in (root, root / "slices", root / "data", root / "data" / "slices"):
        for file in contents(place):
            if file.suffix != ".h5":
                continue
            name, number = re.fullmatch(r"(.+?)(?:_slice_(\d+))?", file.stem).groups()
            twin = found.setdefault(name, {}).setdefault(int(number or -1), file)
            if twin != file:
                raise BadInput(f"{file}: there is another one, {twin}; remove one of the two")
    cases = []
    for name, files in sorted(found.items()):
        order = [-1] if -1 in files else sorted(files)
        gap = set(range(min(order[0], 1), order[-1])) - set(order)
        if gap:
            raise BadInput(f"{files[order[0]]}: of this volume slice {min(gap)} is missing; copy the slices again")
        images = tuple(files[k] for k in order)
        with open_hdf5(images[0]) as file:
            labelled = "label" in file
        cases.append(Case(name, name.split("_frame")[0], images, images if labelled else None))
    return cases


def png_layout(root: Path) -> tuple[list[Case], dict[str, list[str]]]:
    """The VQ-Seg authors' tree, {train-label,train-unlabel,val,test}/{image/*.png,mask/*.npy}, one file per slice; and its split.

    Their loader drops images without a mask, joins both frames of a patient and puts slice 10 before slice 2; none of it here.
    """
    cases, split = [], {"train": [], "val": [], "test": []}
    for folder, part in (("train-label", "train"), ("train-unlabel", "train"), ("val", "val"), ("test", "test")):
        images = [f for f in contents(root / folder / "image") if f.suffix == ".png"]
        masks = {f.stem: f for f in contents(root / folder / "mask") if f.suffix == ".npy"} if folder != "train-unlabel" else {}
        slices: dict[str, dict[int, Path]] = {}
        for image in images:
            match = re.fullmatch(r"(.+?)_(?:slice_?)?(\d+)", image.stem)
            if not match:
                raise BadInput(f"{image}: its name does not end in the number of the slice; name it like patient001_frame01_slice_1.png")
            if folder != "train-unlabel" and image.stem not in masks:
                raise BadInput(f"{image}: has no mask/{image.stem}.npy; add the mask, or move the image to train-unlabel")
            twin = slices.setdefault(match[1], {}).setdefault(int(match[2]), image)
            if twin != image:
                raise BadInput(f"{image}: {twin.name} is the same slice; remove one of the two")
        for alone in sorted(masks.keys() - {image.stem for image in images}):
            raise BadInput(f"{masks[alone]}: has no image/{alone}.png; add the image, or remove the mask")
        for name, files in sorted(slices.items()):
            patient, ordered = name.split("_frame")[0], tuple(files[k] for k in sorted(files))
            cases.append(Case(name, patient, ordered, tuple(masks[f.stem] for f in ordered) if masks else None))
            if patient not in split[part]:
                split[part].append(patient)
    return cases, split


def pair_layout(root: Path) -> list[Case]:
    """images/ and labels/ of NIfTI with the same names; an image without a mask is unlabelled.

    A patient is a folder directly below images/, or the files with the same name up to `_frame`.
    """
    images, labels = root / "images", root / "labels"
    cases, masks = [], {f.relative_to(labels): f for f in nifti_files(labels.rglob("*"))}
    for image in nifti_files(images.rglob("*")):
        name = image.relative_to(images)
        mask = masks.pop(name, None)
        patient = name.parts[0] if len(name.parts) > 1 else stem(image).split("_frame")[0]
        cases.append(Case((name.parent / stem(image)).as_posix(), patient, (image,), (mask,) if mask else None))
    for alone in masks:
        raise BadInput(f"{labels / alone}: has no image of the same name in {images}; add the image, or remove the mask")
    return cases


def recognize(root: Path) -> tuple[str, list[Case], dict[str, list[str]] | None]:
    """What the folder holds: the layout's name, all its volumes, and the split if the layout is one."""
    if (root / "train-label").is_dir():
        return "train-label/, val/, test/ of PNG and npy slices", *png_layout(root)
    nested = "patientNNN/ folders of NIfTI, ACDC as downloaded"
    for name, layout in (("images/ and labels/ of NIfTI", pair_layout), (nested, acdc_layout), ("HDF5 of SSL4MIS", hdf5_layout)):
        if cases := layout(root):
            return name, cases, None
    raise BadInput(f"{root}: holds no layout that we know: patientNNN/, images/ and labels/, train-label/ or *.h5; arrange it like one")


# ---------------------------------------------------------------------------------------------------------------------
# Data sets: who is in train, val and test, and who of train is labelled


class DataSet(NamedTuple):
    root: Path
    layout: str  # what was recognized
    labels: list[str]  # class names, the background first
    view: int  # pixels of the grid that evaluation sees
    labeled: float  # how many training patients are labelled if nobody says; -1: all that have masks
    strict: bool  # a benchmark: of a labelled patient every volume must have its mask
    split: dict[str, list[str]]  # train, val, test -> patients; those of train in the order of labelling
    cases: dict[str, list[Case]]  # patient -> volumes, with masks where there are any

    def summary(self) -> str:
        volumes = [case for cases in self.cases.values() for case in cases]
        masked = sum(case.masks is not None for case in volumes)
        return f"{self.root}: {self.layout}; {len(volumes)} volumes of {len(self.cases)} patients, {masked} with masks"

    def patients(self, part: str) -> list[str]:
        """Those of train, val or test, all of which must be there."""
        missing = [patient for patient in self.split[part] if patient not in self.cases]
        if missing:
            raise BadInput(f"{self.root}: patients {' '.join(missing)} of the {part} split are missing; add them")
        if not self.split[part]:
            raise BadInput(f"{self.root}: nobody is in the {part} split; add patients to it")
        return self.split[part]

    def with_masks(self, part: str, count: int | None = None) -> list[Case]:
        """What the first `count` patients of this part (None: all) have to learn from or to be scored against."""
        found = []
        for patient in self.patients(part)[:count]:
            bare = [case for case in self.cases[patient] if not case.masks]
            if bare and (self.strict or len(bare) == len(self.cases[patient])):
                raise BadInput(f"{bare[0].images[0]}: has no mask, and here ({part}) it needs one; add the mask")
            found += [case for case in self.cases[patient] if case.masks]
        return found

    def training(self, labeled: float = -1) -> tuple[int, list[Case], list[Case]]:
        """How many patients are labelled (given as a count or as a share below 1), their volumes, and the unlabelled volumes.

        Unlabelled are all other training volumes, or all again if none is left: without their masks, so that nothing can read them.
        """
        volumes = [case for patient in self.patients("train") for case in self.cases[patient]]
        most = len({case.patient for case in volumes if case.masks})
        labeled = self.labeled if labeled == -1 else labeled
        count = most if labeled == -1 else max(1, int(labeled * most + 1e-9)) if 0 < labeled < 1 else labeled
        if count not in range(1, most + 1):
            raise BadInput(f"--labeled {labeled:g}: must lie in 1 to {most}, the training patients with masks, or be a share below 1")
        labelled = self.with_masks("train", int(count))
        unlabelled = [case for case in volumes if case not in labelled] or volumes
        return int(count), labelled, [case._replace(masks=None) for case in unlabelled]


def open_dataset(name: str, root: str = "", classes: int = 0, window: str = "", view: int = 0, split_seed: int = 0) -> DataSet:
    """`phantom` (made when absent), `acdc`, `lc`, or the path of a folder of one's own: found and split, and no voxel read."""
    labels, limits, view = class_names(name, classes), read_window(name, window), view_size(name, view)
    folder = Path(root or name)
    if name == "phantom":
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = Path(root) if root else cache / "vq-seg" / "phantom-1"
        make_phantoms(folder)
    if not folder.is_dir():
        if name in ("acdc", "lc") and not root:
            raise BadInput(f"--data {name} needs --root, the folder of your copy: there is no folder {name} here")
        raise BadInput(f"{folder}: no such folder; give phantom, acdc, lc or a folder of your own to --data, or its place to --root")
    layout, volumes, split = recognize(folder)
    cases: dict[str, list[Case]] = {}
    for case in volumes:
        cases.setdefault(case.patient, []).append(case._replace(window=limits))
    masked = [patient for patient, some in cases.items() if any(case.masks for case in some)]
    benchmark = {"phantom": PHANTOM_SPLIT, "acdc": ACDC_SPLIT}.get(name) if split is None else None
    labeled = {"phantom": 3, "acdc": 7, "lc": 0.1}.get(name, -1) if split is None else -1
    if benchmark:
        split = {part: [f"patient{number}" for number in some] for part, some in benchmark.items()}
    elif split is None:
        own = folder / "split.txt"
        split = read_split(own, list(cases)) if own.exists() else seeded_split(folder, masked, split_seed)
        split["train"] += [patient for patient in cases if patient not in sum(split.values(), [])]
        split["train"].sort(key=lambda patient: patient not in masked)
    for patient, times in Counter(sum(split.values(), [])).items():
        if times > 1:
            raise BadInput(f"{folder}: {patient} is in more than one of train, val and test; leave each patient in one of them")
    return DataSet(folder, layout, labels, view, labeled, benchmark is not None, split, cases)


def class_names(name: str, classes: int) -> list[str]:
    """The background first. `classes` counts it; 0 = what the benchmark has."""
    names = {"phantom": CLASSES, "acdc": CLASSES, "lc": ["background", "lesion"]}.get(name)
    if names and classes in (0, len(names)):
        return names
    if names or not 2 <= classes <= 256:
        needed = f"be {len(names)} for {name}" if names else f"say how many classes the masks of {name} have, with the background: 2 to 256"
        raise BadInput(f"--classes {classes}: must {needed}")
    return ["background", *(f"class {k}" for k in range(1, classes))]


def read_window(name: str, text: str) -> tuple[float, float] | None:
    """LOW,HIGH; nothing = the extremes of each volume, but for CT a window of the lung."""
    text = text or ("-1000,400" if name == "lc" else "")
    try:
        low, high = (float(word) for word in text.split(",")) if text else (0, 1)
    except ValueError:
        low, high = 0, 0
    if not -np.inf < low < high < np.inf:
        raise BadInput(f"--window={text}: must be two numbers, the lower one first, like --window=-1000,400")
    return (low, high) if text else None


def view_size(name: str, view: int) -> int:
    view = view or (VIEW if name in ("phantom", "acdc") else GRID)
    if not 16 <= view <= GRID:
        raise BadInput(f"--view {view}: must lie in 16, a token, to {GRID}, the grid")
    return view


def pieces_that_count(name: str, pieces: str) -> str:
    """Of a class in a prediction: `largest` connected piece, for each class is one in a heart, or `all`, for lesions may be many."""
    return pieces or ("largest" if name in ("phantom", "acdc") else "all")


def seeded_split(root: Path, masked: list[str], seed: int) -> dict[str, list[str]]:
    """70/10/20 of the patients that have masks, shuffled."""
    if len(masked) < 2:
        raise BadInput(f"{root}: {len(masked)} patients have masks, but one to train on and one to validate on are needed; add masks")
    order = np.random.default_rng(seed).permutation(sorted(masked)).tolist()
    val = max(1, round(0.1 * len(order)))
    test = max(1, round(0.2 * len(order))) if len(order) > 2 else 0
    return {"train": order[val + test :], "val": order[:val], "test": order[val : val + test]}


def read_split(path: Path, patients: list[str]) -> dict[str, list[str]]:
    """Lines of PATIENT and train, val or test; # begins a comment. Every patient once; the order of train is that of labelling."""
    split: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        words = line.split("#")[0].strip().rsplit(None, 1)
        if not words:
            continue
        if len(words) < 2 or words[1] not in split:
            raise BadInput(f"{path}: line {number}, {line.strip()!r}, is not PATIENT train, PATIENT val or PATIENT test; write it so")
        if words[0] not in patients:
            raise BadInput(f"{path}: line {number}: no patient {words[0]!r} in {path.parent}; there are {', '.join(patients[:5])}, ...")
        split[words[1]].append(words[0])
    if unlisted := [patient for patient in patients if patient not in sum(split.values(), [])]:
        raise BadInput(f"{path}: does not say where {' '.join(unlisted[:5])} belongs; add a line PATIENT train, val or test for each")
    return split


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
    """All slices of some cases, on the grid, drawn by number.

    Prepared volumes stay in memory up to `cache_bytes`. A set that fits is read and checked once, at the start. A larger one is
    drawn from as many volumes as fit, others every 500 steps; the longest unused go first and are read again when wanted.
    """

    def __init__(self, cases: list[Case], classes: int = len(CLASSES), say: Callable = print, cache_bytes: int = 2**30):
        self.cases, self.classes, self.cache_bytes = cases, classes, cache_bytes
        self.cache: OrderedDict[int, tuple[Tensor, Tensor]] = OrderedDict()
        self.cached_bytes = 0
        self.depths = [open_volume(case.images).shape[0] for case in cases]  # headers only
        self.where = [(c, k) for c, depth in enumerate(self.depths) for k in range(depth)]  # slice -> (case, k)
        self.fits = len(self.where) * 5 * GRID**2 <= cache_bytes  # float32 image and uint8 mask
        if self.fits:
            for c in range(len(cases)):
                self.volume(c)
        else:
            size = f"{len(cases)} volumes, {len(self.where)} slices: more than {cache_bytes / 2**30:.1f} GiB"
            say(f"{size}; their headers were checked, their voxels will be when they are first drawn", flush=True)

    def __len__(self) -> int:
        return len(self.where)

    def volume(self, c: int) -> tuple[Tensor, Tensor]:
        """Case c on the grid: image (Z,G,G) float32, mask (Z,G,G) uint8 (all 0 where the case has none)."""
        if c not in self.cache:
            case = self.cases[c]
            image = torch.cat([to_grid(torch.from_numpy(slab)) for slab in scaled(open_volume(case.images), case.window)])
            mask = torch.zeros(image.shape, dtype=torch.uint8)
            if case.masks:
                mask = torch.cat([to_grid(torch.from_numpy(slab)) for slab in mask_slabs(case, self.classes)])
            self.cache[c] = image, mask
            self.cached_bytes += image.nbytes + mask.nbytes
            while self.cached_bytes > self.cache_bytes and len(self.cache) > 1:
                _, oldest = self.cache.popitem(last=False)
                self.cached_bytes -= sum(t.nbytes for t in oldest)
        self.cache.move_to_end(c)
        return self.cache[c]

    def resident(self, seed: int = 0, step: int = 0) -> Tensor:
        """Numbers of the slices to draw from at this step: all, or those of volumes that fit into the cache together."""
        if self.fits:
            return torch.arange(len(self))
        first, chosen, room = np.cumsum([0, *self.depths]), [], self.cache_bytes // (5 * GRID**2)
        for c in np.random.default_rng((seed, step // 500)).permutation(len(self.cases)):
            room -= self.depths[c]
            if chosen and room < 0:
                break
            chosen.append(torch.arange(first[c], first[c + 1]))
        return torch.cat(chosen)

    def draw(self, count: int, generator: torch.Generator, seed: int, step: int) -> Tensor:
        """Numbers of `count` slices at random, a function of the generator's state, the seed and the step."""
        numbers = self.resident(seed, step)
        return numbers[torch.randint(len(numbers), (count,), generator=generator)]

    def names(self, numbers: Tensor) -> list[str]:
        """(B,) -> "patient099_frame01 slice 3", counted from 1."""
        return [f"{self.cases[c].name} slice {k + 1}" for c, k in (self.where[n] for n in numbers.tolist())]

    def absent_classes(self, labels: list[str]) -> list[str]:
        """Those of the labels that no slice shows; nothing for a set that is not read as a whole."""
        seen = {value for c in range(len(self.cases)) for value in self.volume(c)[1].unique().tolist()} if self.fits else range(len(labels))
        return [label for value, label in enumerate(labels) if value not in seen]

    def batch(self, numbers: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """(B,) -> images (B,1,G,G) float32 in [0,1], masks (B,G,G) uint8."""
        pairs = [tuple(t[k] for t in self.volume(c)) for c, k in (self.where[n] for n in numbers.tolist())]
        images, masks = (torch.stack(t) for t in zip(*pairs))
        if device.type == "cuda":  # only from pinned memory does the copy not wait for the GPU
            images, masks = images.pin_memory(), masks.pin_memory()
        return images[:, None].to(device, non_blocking=True), masks.to(device, non_blocking=True)


# ---------------------------------------------------------------------------------------------------------------------
# The two views (Section 4.2), batched, on the training device. The generator must live there too.


def uniform(low: float, high: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator, device=generator.device)


def weak_view(images: Tensor, masks: Tensor, generator: torch.Generator, crop: int = CROP, view: int = VIEW) -> tuple[Tensor, Tensor]:
    """Rotate, scale, shift and crop: (B,1,G,G), (B,G,G) -> (B,1,crop,crop) float, (B,crop,crop) int64.

    The crop moves so far that training sees all of the central `view` pixels that evaluation looks at, and 8 more.

    Rotation up to 40 degrees and no flip: scanners lay hearts down the same way, and any angle plus flips cost 12 points of
    validation Dice at 600 supervised steps (0.51 against 0.63).
    """
    B, _, G, _ = images.shape
    angle = uniform(-0.7, 0.7, (B,), generator)
    zoom = uniform(0.8, 1.3, (B,), generator)  # above 1: the heart appears larger
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    reach = (max(0, view - crop) / 2 + 8) / (G / 2)  # of half the slice
    shift = uniform(-reach, reach, (B, 2), generator)
    # Rows of theta give, for a point of the crop in [-1,1]^2, the point of the slice in [-1,1]^2 that it shows.
    turn = torch.stack([torch.stack([cos, -sin], 1), torch.stack([sin, cos], 1)], 1) * (crop / G)  # (B,2,2)
    theta = torch.cat([turn, shift[:, :, None]], dim=2)  # (B,2,3)
    grid = F.affine_grid(theta, [B, 1, crop, crop], align_corners=False)
    x = F.grid_sample(images, grid, mode="bilinear", align_corners=False)
    y = F.grid_sample(masks[:, None].float(), grid, mode="nearest", align_corners=False)[:, 0].long()
    return x, y


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
        if not root.exists():  # another process may have been quicker
            os.replace(Path(temporary) / "all", root)


# ---------------------------------------------------------------------------------------------------------------------
# A look at a data set


def show(axis, picture, mask=None, alpha: float = 0.6) -> None:
    """A slice in gray and its mask (0 is not drawn) in color, on an axis of matplotlib."""
    from matplotlib.colors import ListedColormap

    axis.imshow(np.asarray(picture), cmap="gray", vmin=0, vmax=1)
    axis.set(xticks=[], yticks=[])
    if mask is not None:
        n = len(COLORS) - 1
        colored = np.ma.masked_equal(np.where(mask > 0, (np.asarray(mask).astype(int) - 1) % n + 1, 0), 0)
        axis.imshow(colored, cmap=ListedColormap(COLORS), vmin=0, vmax=n, alpha=alpha, interpolation="nearest")


def orientations(cases: list[Case]) -> Counter:
    """How many volumes are stored in which axes: RAS, LPS, ..."""
    return Counter(axes for case in cases if (axes := open_volume(case.images).axes))


def mixed_orientations(cases: list[Case]) -> str:
    """A warning where there are several: arrays are used as stored, so that the network sees a mixture too. Else nothing."""
    counts = orientations(cases)
    said = ", ".join(f"{axes} {count}" for axes, count in counts.most_common())
    return f"WARNING: volumes are stored in different orientations ({said}); reorient them all alike\n" if len(counts) > 1 else ""


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parser = argparse.ArgumentParser(description="Say what is in a data set, and draw slices, masks and both views of them.")
    for flag, default in (("data", "phantom"), ("root", ""), ("window", "")):
        parser.add_argument(f"--{flag}", default=default, help="as in train.py")
    for flag, kind, default in (("labeled", float, -1), ("classes", int, 0), ("view", int, 0), ("split-seed", int, 0)):
        parser.add_argument(f"--{flag}", type=kind, default=default, help="as in train.py")
    parser.add_argument("--out", type=Path, default=Path("figures/data.png"), help="the picture")
    a = parser.parse_args()
    try:
        found = open_dataset(a.data, a.root, a.classes, a.window, a.view, a.split_seed)
        print(found.summary())
        labeled, labelled, unlabelled = found.training(a.labeled)
        parts = {f"train, {labeled} patients labelled": labelled, "train, unlabelled": unlabelled}
        for part in ("val", "test"):
            parts[part] = [case for patient in found.split[part] for case in found.cases.get(patient, [])]
        for part, cases in parts.items():
            depth = sum(open_volume(case.images).shape[0] for case in cases)
            print(f"  {part}: {len({case.patient for case in cases})} patients, {len(cases)} volumes, {depth} slices")
        masked = [case for patient in found.split["train"] for case in found.cases[patient] if case.masks]
        for axes, count in orientations(sum(parts.values(), [])).items():
            print(f"  stored in {axes}: {count} volumes")
        for case in masked[:: max(1, len(masked) // 8)]:
            volume, mask = open_volume(case.images), read_mask(case, len(found.labels))
            there = ", ".join(found.labels[k] for k in np.unique(mask))
            print(f"  {case.name}: {volume.shape} voxels (z,y,x), spacing {tuple(round(v, 2) for v in volume.spacing)} mm; {there}")
        slices = Slices(masked, len(found.labels))
        some = slices.resident()
        images, masks = slices.batch(some[torch.linspace(min(3, len(some) - 1), max(0, len(some) - 4), 6).long()], torch.device("cpu"))
    except BadInput as error:
        parser.exit(2, f"data.py: {error}\n")

    generator = torch.Generator().manual_seed(0)
    weak, labels = weak_view(images, masks, generator, view=found.view)
    strong = strong_view(weak, generator)
    figure, axes = plt.subplots(3, 6, figsize=(12, 6.2), layout="constrained")
    for column in range(6):
        pairs = (images[column, 0], masks[column]), (weak[column, 0], labels[column]), (strong[column, 0], None)
        for axis, title, (picture, mask) in zip(axes[:, column], ("slice on the grid, mask", "weak view x_u", "strong view x_a"), pairs):
            show(axis, picture, mask, alpha=0.45)
            axis.set_ylabel(title if column == 0 else "")
    a.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(a.out, dpi=60)
    print(f"wrote {a.out}")


if __name__ == "__main__":
    main()
