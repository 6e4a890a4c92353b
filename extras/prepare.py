"""Any other layout of scans -> the arrays that `train.py --data FOLDER` reads, written once.

    python -m extras.prepare SOURCE --out FOLDER --classes background,lesion
    python -m extras.prepare ACDC --split acdc --bits 8 --out acdc8        small, to be sent
    python -m extras.prepare --phantoms scans                              a folder to try this with

SOURCE holds images/ and labels/ of NIfTI, or imagesTr/ and labelsTr/ (nnU-Net, Decathlon), or
patientNNN/ (ACDC), or HDF5 (SSL4MIS), or train-label/, val/, test/ of PNG (the authors').
FOLDER gets images.npy and masks.npy on the grid of data.py, dataset.json, and the native masks.
Volumes are read a few slices at a time, so that a set may be larger than memory.
The paper says nothing of this; it trained on ACDC and on chest CTs that are not public.
"""

import argparse
import gzip
import json
import math
import os
import re
import shutil
import tempfile
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch

import data
import evaluate
from data import BadInput

# They print guesses about a file; what is wrong with one is refused below.
nib.imageglobals.logger.disabled = True
warnings.filterwarnings("ignore", module="PIL|nibabel|numpy")
NIFTI = re.compile(r"\.nii(\.gz)?$", re.I)
HDF5 = re.compile(r"\.(h5|hdf5)$", re.I)
PNG = re.compile(r"\.png$", re.I)
NPY = re.compile(r"\.npy$", re.I)
FOREIGN = re.compile(r"\.(nrrd|nhdr|mha|mhd|dcm|dicom|ima|hdr|img|mgz|mgh|mnc)$", re.I)
# How files begin that are called .nii without being one: where, what, its name, the remedy.
CONVERT = "convert it to .nii.gz"
SIGNATURES = [
    (0, b"NRRD", "a NRRD file", CONVERT),
    (0, b"ObjectType", "a MetaImage (.mha) file", CONVERT),
    (0, b"NDims", "a MetaImage (.mha) file", CONVERT),
    (128, b"DICM", "a DICOM file", "convert its series to one .nii.gz"),
    (0, b"\x89HDF", "an HDF5 file", "name it .h5, and put it beside others of its kind"),
    (344, b"ni1", "the header of a pair .hdr and .img", CONVERT),
    (0, b"\x5c\x01\0\0", "an Analyze file", CONVERT),
    (0, b"\0\0\x01\x5c", "an Analyze file", CONVERT),
    (0, b"PK\x03\x04", "a zip archive", "unpack it"),
    (0, b"version https://git-lfs", "a pointer of git-lfs", "fetch the file with: git lfs pull"),
    (0, b"<", "a page of a web site", "download the file again, logged in"),
]


class Source(NamedTuple):
    """A volume where it lies: one file, or one file for each slice, in order."""

    name: str
    patient: str
    images: tuple[Path, ...]
    masks: tuple[Path, ...] | None
    part: str = ""  # train, val or test where the layout says so


class Volume(NamedTuple):
    """A volume that is still on disk."""

    shape: tuple[int, int, int]  # (Z,H,W)
    read: Callable[[int, int], np.ndarray]  # slices a to b: (b-a,H,W)
    spacing: tuple[float, ...] = (1.0, 1.0, 1.0)  # (z,y,x) in mm
    affines: tuple[np.ndarray, ...] = ()  # voxel (x,y,z,1) -> mm, by the sform and by the qform
    axes: str = ""  # RAS, LPS, ...


# -- Opening files -------------------------------------------------------------------------------


def voxels(path: Path, read: Callable[[], np.ndarray]) -> np.ndarray:
    """What `read` takes from this file, or one line about what is wrong with it."""
    try:
        found = np.asarray(read())
    except Exception as error:  # a damaged file can make a library fail in any way
        raise BadInput(f"{path}: {fault(path, error)}") from None
    if found.dtype.kind not in "iufb" or not np.isfinite(found).all():
        raise BadInput(f"{path}: holds voxels that are no finite numbers; replace them")
    return found


def fault(path: Path, error: Exception) -> str:
    """Why a file cannot be read, and the remedy."""
    if path.is_dir():
        return "is a folder; name the file in it, or rename the folder"
    if not path.exists():
        return "no such file; correct the path" + (" of the link" if path.is_symlink() else "")
    if not os.access(path, os.R_OK):
        return "cannot be read; allow it, or copy the file"
    reason = str(error).split("\n")[0] or type(error).__name__
    return f"damaged ({reason}); copy the file again"


def what_it_is(path: Path) -> str:
    """Of a file that does not open as NIfTI: what it is instead, and the remedy."""
    try:
        with open(path, "rb") as file:
            content = file.read(400)
        packed = content[:2] == b"\x1f\x8b"
        if packed:
            with gzip.open(path) as file:
                content = file.read(400)
    except (OSError, EOFError, zlib.error) as error:
        return fault(path, error)
    if content[:2] == b"\x1f\x8b":
        return "is compressed twice; unpack it once with gunzip"
    if not content:
        return "is empty; copy the file again"
    if content[344:347] == b"n+1" or content[4:7] == b"n+2":
        if packed and not path.name.lower().endswith(".gz"):
            return "is compressed; rename it to .nii.gz"
        if not packed and path.name.lower().endswith(".gz"):
            return "is not compressed; rename it to .nii"
        return "has a damaged header; copy the file again"
    for start, signature, name, remedy in SIGNATURES:
        if content[start:].startswith(signature):
            return f"is {name}; {remedy}"
    return "is not NIfTI, or damaged; copy the file again, or convert it to .nii.gz"


def load_nifti(path: Path) -> tuple[nib.Nifti1Image, np.ndarray]:
    """The opened file, its voxels not read yet, and the sides of a voxel in mm: (x,y,z)."""
    try:
        with nib.openers.ImageOpener(path) as file:
            start = file.read(540)
        kinds = [kind for kind in (nib.Nifti1Image, nib.Nifti2Image)
                 if kind.header_class.may_contain_header(start)]
        # nib.load does not find p1.Nii.gz. Kept open, or each slab is unpacked from the start.
        image = kinds[0].from_file_map({"image": nib.FileHolder(path)}, keep_file_open=True)
        # The header as it is: nibabel makes 1 mm of a voxel size of 0.
        header = kinds[0].header_class(start[: image.header.sizeof_hdr], check=False)
        sform = image.header.get_sform(coded=True)[0]
        image.header.get_qform(coded=True)  # fails for a quaternion that is none
    except Exception:  # a damaged file can make a library fail in any way
        raise BadInput(f"{path}: {what_it_is(path)}") from None
    unit = {1: 1000.0, 3: 0.001}.get(int(header["xyzt_units"]) & 7, 1.0)  # meters, micrometers
    choices = [np.asarray(header["pixdim"][1:4], float)]
    if sform is not None:
        choices.append(np.linalg.norm(sform[:3, :3], axis=0))
        # Where the two disagree the affine counts, but not unit scales: ACDC has them.
        if not np.allclose(choices[1], 1, 1e-3) and not np.allclose(*choices, 1e-3):
            choices.reverse()
    for sides in choices:
        if np.isfinite(sides).all() and (sides > 0).all():
            return image, sides * unit
    raise BadInput(f"{path}: its header has no voxel size; correct pixdim or the affine")


def open_nifti(path: Path) -> Volume:
    file, sides = load_nifti(path)
    shape = file.shape
    if len(shape) == 2:
        raise BadInput(f"{path}: is one slice of shape {shape}; store it as (x, y, 1)")
    if len(shape) != 3 or 0 in shape:
        remedy = "store one volume a file, and of a one-hot mask its class numbers"
        raise BadInput(f"{path}: has shape {shape}, not (x, y, z); {remedy}")
    qform = file.header.get_qform(coded=True)[0]
    affines = (file.affine,) if qform is None else (file.affine, qform)

    def read(a: int, b: int) -> np.ndarray:
        return voxels(path, lambda: file.dataobj[:, :, a:b]).T

    axes = "".join(map(str, nib.aff2axcodes(file.affine)))
    return Volume(shape[::-1], read, tuple(sides[::-1].tolist()), affines, axes)


def hdf5_file(path: Path):
    try:
        import h5py

        return h5py.File(path)
    except ImportError:
        raise BadInput(f"{path}: HDF5 needs a package; pip install h5py") from None
    except Exception as error:  # a damaged file can make a library fail in any way
        raise BadInput(f"{path}: {fault(path, error)}") from None


def open_hdf5(path: Path, key: str) -> Volume:
    """SSL4MIS: key is image or label; (Z,H,W), or one slice (H,W)."""
    with hdf5_file(path) as file:
        shape = getattr(file.get(key), "shape", None)
    if shape is None:
        raise BadInput(f"{path}: has no array {key}; store one under that name")
    if len(shape) not in (2, 3) or 0 in shape:
        raise BadInput(f"{path}: {key} has shape {shape}, not (z, y, x) or (y, x); store it so")

    def read(a: int, b: int) -> np.ndarray:
        with hdf5_file(path) as file:
            return file[key][a:b] if len(shape) == 3 else file[key][()][None]

    return Volume((1, *shape)[-3:], lambda a, b: voxels(path, lambda: read(a, b)))


def open_slice(path: Path) -> Volume:
    """One gray slice in PNG, or one mask in npy."""
    from PIL import Image  # comes with matplotlib

    def read() -> np.ndarray:
        if NPY.search(path.name):
            with open(path, "rb") as file:
                return np.lib.format.read_array(file)
        image = Image.open(path)
        return np.asarray(image.convert("RGB") if image.mode == "P" else image)

    shape = voxels(path, read).shape
    if len(shape) != 2:
        raise BadInput(f"{path}: has shape {shape}; save it as one gray slice (y, x)")
    return Volume((1, *shape), lambda a, b: voxels(path, read)[None])


def open_volume(files: tuple[Path, ...], key: str = "image") -> Volume:
    """One file, or slices that become one volume."""
    if NIFTI.search(files[0].name):
        return open_nifti(files[0])
    opened = [open_hdf5(f, key) if HDF5.search(f.name) else open_slice(f) for f in files]
    if len(opened) == 1:
        return opened[0]
    shape = opened[0].shape[1:]
    for file, volume in zip(files, opened):
        if volume.shape != (1, *shape):
            differ = f"has shape {volume.shape[1:]}, other slices {shape}; give all one size"
            raise BadInput(f"{file}: {differ}")
    return Volume((len(files), *shape),
                  lambda a, b: np.concatenate([volume.read(0, 1) for volume in opened[a:b]]))


def slabs(volume: Volume) -> Iterator[np.ndarray]:
    """A few slices at a time, about 4 million voxels."""
    Z, H, W = volume.shape
    step = max(1, 2**22 // (H * W))
    for a in range(0, Z, step):
        yield volume.read(a, min(a + step, Z))


# -- Layouts: each lists the volumes below a folder ----------------------------------------------


def listing(folder: Path | None) -> list[Path]:
    """The files below a folder, hidden ones left out; folders that are links are followed."""
    files, seen = [], set()
    todo = [folder] if folder else []
    while todo:
        place = todo.pop()
        if place.resolve() in seen:
            raise BadInput(f"{place}: links lead here twice, or in a circle; remove one")
        seen.add(place.resolve())
        for entry in sorted(place.iterdir()):
            if entry.name.startswith("."):
                continue
            if entry.is_symlink() and not entry.exists():
                raise BadInput(f"{entry}: is a link to nothing; correct it, or remove it")
            (todo if entry.is_dir() and not NIFTI.search(entry.name) else files).append(entry)
    return sorted(files)


def text(name: str) -> str:
    """Names that are not UTF-8, as from old zip files, are taken for Latin-1."""
    raw = os.fsencode(name)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def child(root: Path | None, *names: str) -> Path | None:
    """The folder of one of these names, upper or lower case; None if there is none."""
    entries = sorted(root.iterdir()) if root else []
    found = [entry for entry in entries if entry.is_dir() and entry.name.lower() in names]
    if len(found) > 1:
        listed = " and ".join(folder.name for folder in found)
        raise BadInput(f"{root}: {listed} hold the same kind of files; keep one of them")
    return found[0] if found else None


def add(found: dict, key, file: Path) -> None:
    """found[key] = file, where no file has that place already."""
    if key in found:
        raise BadInput(f"{file}: {found[key]} has the same name; remove one of the two")
    found[key] = file


def leave(files: list[Path], why: str) -> None:
    """Says which files are not used."""
    if files:
        names = ", ".join(str(file) for file in files[:5]) + (", ..." if len(files) > 5 else "")
        print(f"left alone, {why}: {len(files)} files ({names})")


def of_kind(files: list[Path], ending: re.Pattern, kind: str) -> list[Path]:
    """The files with this ending; the others are named and left alone."""
    leave([file for file in files if not ending.search(file.name)], f"no {kind}")
    return [file for file in files if ending.search(file.name)]


def nifti_files(folder: Path | None) -> dict[str, Path]:
    """Name below the folder, without ending -> file."""
    found: dict[str, Path] = {}
    files = listing(folder)
    for file in files:
        if FOREIGN.search(file.name):
            raise BadInput(f"{file}: is not NIfTI; convert it to .nii.gz")
    for file in of_kind(files, NIFTI, "NIfTI"):
        add(found, NIFTI.sub("", text(file.relative_to(folder).as_posix())), file)
    return found


def patient_of(name: str) -> str:
    """By the rule that needs no flag: the first folder, or what stands before _frame."""
    return name.split("/")[0] if "/" in name else name.split("_frame")[0]


def paired(images: dict[str, Path], masks: dict[str, Path], part: str = "") -> list[Source]:
    """An image without a mask is unlabeled; a mask without an image is an error."""
    for name in sorted(masks.keys() - images.keys()):
        raise BadInput(f"{masks[name]}: has no image of that name; add it, or remove the mask")
    sources = []
    for name, image in images.items():
        mask = (masks[name],) if name in masks else None
        sources.append(Source(name.replace("/", "-"), patient_of(name), (image,), mask, part))
    return sources


def pairs_layout(root: Path) -> list[Source]:
    masks = child(root, "labels", "masks", "segmentations")
    others = [f.name for f in sorted(root.iterdir()) if f.is_dir() and f.name[0] != "."]
    if len(others) > 1 and not masks:
        raise BadInput(f"{root}: masks are looked for in labels/, masks/ or segmentations/; rename "
                       f"the folder that holds them ({', '.join(others)})")
    return paired(nifti_files(child(root, "images")), nifti_files(masks))


def nnunet_layout(root: Path) -> list[Source]:
    sources = []
    for end, part in (("tr", ""), ("ts", "test")):
        images = nifti_files(child(root, f"images{end}"))
        for name, file in images.items():
            if re.search(r"_000[1-9]$", name):
                raise BadInput(f"{file}: is a second channel; only one (_0000) can be read")
        masks = nifti_files(child(root, f"labels{end}"))
        if part and images and not masks:
            leave(list(images.values()), "without masks in labelsTs")
            continue
        sources += paired({re.sub("_0000$", "", n): f for n, f in images.items()}, masks, part)
    return sources


def acdc_layout(root: Path) -> list[Source]:
    """patientNNN/patientNNN_frameXX[_gt].nii.gz, at any depth, as in training/ and database/."""
    pattern = re.compile(r"(?:^|.*/)patient\d+/(patient\d+_frame\d+)(_gt)?")
    if not any(pattern.match(file.relative_to(root).as_posix()) for file in listing(root)):
        return []
    images: dict[str, Path] = {}
    masks: dict[str, Path] = {}
    other = []
    for name, file in nifti_files(root).items():
        match = pattern.fullmatch(name)
        if match:
            add(masks if match[2] else images, match[1], file)
        else:
            other.append(file)
    leave(other, "no frame of a patient")
    return paired(images, masks)


def hdf5_layout(root: Path) -> list[Source]:
    """NAME.h5, or NAME_slice_K.h5 of each slice; a volume that is there whole is read whole."""
    files = listing(root)
    if not any(HDF5.search(file.name) for file in files):
        return []
    found: dict[str, dict[int, Path]] = {}
    for file in of_kind(files, HDF5, "HDF5"):
        match = re.fullmatch(r"(.+?)(?:_slice_(\d+))?", HDF5.sub("", text(file.name)))
        add(found.setdefault(match[1], {}), int(match[2] or -1), file)
    sources = []
    for name, slices in found.items():
        order = [-1] if -1 in slices else sorted(slices)
        if len(order) > 1 and order[-1] - order[0] + 1 != len(order):
            raise BadInput(f"{slices[order[0]]}: other slices are missing; copy them again")
        images = tuple(slices[k] for k in order)
        with hdf5_file(images[0]) as file:
            masks = images if "label" in file else None
        sources.append(Source(name, name.split("_frame")[0], images, masks))
    return sources


def png_layout(root: Path) -> list[Source]:
    """The authors' tree. Their loader drops images without a mask, and puts slice 10 before 2."""
    sources = []
    for part in ("train-label", "train-unlabel", "val", "test"):
        folder = child(root, part)
        masks: dict[str, Path] = {}
        for file in of_kind(listing(child(folder, "mask", "masks")), NPY, "npy"):
            add(masks, file.stem, file)
        volumes: dict[str, dict[int, Path]] = {}
        images = of_kind(listing(child(folder, "image", "images")), PNG, "PNG")
        for file in images:
            match = re.fullmatch(r"(.+?)_(?:slice_?)?(\d+)", text(file.stem), re.I)
            if not match:
                raise BadInput(f"{file}: name it like patient001_frame01_slice_1.png")
            add(volumes.setdefault(match[1], {}), int(match[2]), file)
            if part != "train-unlabel" and file.stem not in masks:
                remedy = "add it, or move the image to train-unlabel"
                raise BadInput(f"{file}: has no mask {file.stem}.npy; {remedy}")
        for stem in sorted(masks.keys() - {image.stem for image in images}):
            raise BadInput(f"{masks[stem]}: has no image of that name; add it, or remove the mask")
        for name, slices in volumes.items():
            files = tuple(slices[k] for k in sorted(slices))
            if max(slices) - min(slices) + 1 != len(slices):
                print(f"WARNING: {files[0]}: other slices are missing, numbers have gaps; its "
                      "volume and distances come out too small")
            labeled = None
            if part != "train-unlabel":
                labeled = tuple(masks[file.stem] for file in files)
            sources.append(Source(name, name.split("_frame")[0], files, labeled,
                                  part.split("-")[0]))
    return sources


LAYOUTS = {
    "images": ("images/ and labels/ of NIfTI", pairs_layout),
    "imagestr": ("nnU-Net's imagesTr/ and labelsTr/", nnunet_layout),
    "train-label": ("the authors' train-label/, val/ and test/", png_layout),
}


def find(root: Path, patient: str = "") -> list[Source]:
    """All volumes below a folder, in whatever layout. patient: the expression of --patient."""
    if not root.is_dir():
        raise BadInput(f"{root}: no such folder; correct the path")
    layouts = [LAYOUTS[name] for name in LAYOUTS if child(root, name)]
    layouts += [("patientNNN/ of NIfTI, as ACDC", acdc_layout), ("HDF5, as SSL4MIS", hdf5_layout)]
    for name, layout in layouts:
        sources = layout(root)
        if sources:
            break
    else:
        holds = ", ".join(file.name for file in sorted(root.iterdir())[:5]) or "nothing"
        raise BadInput(f"{root}: holds {holds}; put NIfTI files into images/ and labels/")
    print(f"{root}: {name}; {len(sources)} volumes, "
          f"{sum(s.masks is not None for s in sources)} with masks")
    named: dict[str, Path] = {}
    for source in sources:
        add(named, source.name, source.images[0])
    return [with_patient(source, patient) for source in sources] if patient else sources


def with_patient(source: Source, pattern: str) -> Source:
    """The patient is what --patient finds in the name of a file."""
    try:
        found = re.search(pattern, source.name)
    except re.error as error:
        raise BadInput(f"--patient {pattern}: {error}; give a regular expression") from None
    if not found or not found[0]:
        raise BadInput(f"--patient {pattern}: is not in {source.name}; give what all names have")
    return source._replace(patient=found[0])


# -- The split -----------------------------------------------------------------------------------


def make_split(root: Path, sources: list[Source], how: str, seed: int) -> dict[str, list[str]]:
    """train, val, test -> patients, in train those with masks first."""
    patients = list(dict.fromkeys(s.patient for s in sources))
    masked = [p for p in patients if any(s.masks for s in sources if s.patient == p)]
    split = {part: list(dict.fromkeys(s.patient for s in sources if s.part == part))
             for part in ("train", "val", "test")}
    if how == "acdc":
        names = {part: [f"patient{n}" for n in data.ACDC_SPLIT[part]] for part in split}
        split = {part: [p for p in names[part] if p in patients] for part in split}
    elif not split["train"] + split["val"] and os.path.lexists(root / "split.txt"):
        split = read_split(root / "split.txt", patients)
    elif not split["train"] + split["val"]:
        test = split["test"]
        pool = sorted(set(masked) - set(test))
        order = np.random.default_rng(seed).permutation(pool).tolist()
        val = max(1, round(0.1 * len(order)))
        end = val + (0 if test else round(0.2 * len(order)))
        split = {"train": order[end:], "val": order[:val], "test": test or order[val:end]}
        split["train"] += [p for p in patients if p not in masked]
    if how != "acdc":
        split["train"].sort(key=lambda patient: patient not in masked)
    for patient, times in Counter(sum(split.values(), [])).items():
        if times > 1:
            raise BadInput(f"{patient}: is in two of train, val and test; leave it in one")
    if not set(split["train"]) & set(masked) or not set(split["val"]) & set(masked):
        raise BadInput(f"{root}: train and val need a patient with a mask each; add masks")
    for part, some in split.items():
        shown = " ".join(some[:8]) + (" ..." if len(some) > 8 else "")
        print(f"{part}: {len(some)} patients, {len(set(some) & set(masked))} with masks: {shown}")
    warn_of_stems(patients)
    return split


def warn_of_stems(patients: list[str]) -> None:
    """Visits of one patient in train and in test would make the test a rehearsal."""
    visits = Counter(re.sub(r"[_-][a-zA-Z]+[_-]?\d+$", "", p) for p in patients)
    numbers = Counter(re.sub(r"[_-]\d+$", "", p) for p in patients)
    # case_001 to case_300 have one stem and are many; p01_1, p01_2, p02_1 have several.
    numbers = Counter({k: n for k, n in numbers.items() if re.search(r"\d$", k)})
    if len(numbers) < 2:
        numbers.clear()
    for stem, times in (visits | numbers).items():
        if times > 1 and stem not in patients:
            print(f"WARNING: {times} patients begin with {stem}; if they are one, say so with "
                  f"--patient '^[^_-]+', which takes a name up to _ or -")


def read_split(path: Path, patients: list[str]) -> dict[str, list[str]]:
    """Lines of PATIENT and train, val or test; # begins a comment."""
    try:
        content = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BadInput(f"{path}: {fault(path, error)}") from None
    except UnicodeDecodeError:
        content = "\0"
    if "\0" in content:  # UTF-16 without its mark
        raise BadInput(f"{path}: is not UTF-8; save it as UTF-8")
    split: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for line in content.splitlines():
        words = line.split("#")[0].rsplit(None, 1)
        if words and (len(words) != 2 or words[1] not in split or words[0].strip() not in patients):
            raise BadInput(f"{path}: {line[:60]!r} is not a patient of this set and train, val or "
                           "test; correct it")
        if words:
            split[words[1]].append(words[0].strip())
    unlisted = sorted(set(patients) - set(sum(split.values(), [])))
    if unlisted:
        raise BadInput(f"{path}: does not name {' '.join(unlisted[:5])}; add a line for each")
    return split


# -- Writing -------------------------------------------------------------------------------------


def class_names(root: Path, text: str, how: str, sources: list[Source]) -> dict[str, int]:
    """Name of a class -> its value in the masks: of --classes, ACDC, or nnU-Net's dataset.json."""
    where = f"--classes {text}"
    if text.isdecimal():
        names = ["background", *(f"class {k}" for k in range(1, min(int(text), 256)))]
        pairs = [(name, k) for k, name in enumerate(names)]
    elif text:
        words = [word.partition("=") for word in text.split(",")]
        pairs = [(name, value or k) for k, (name, _, value) in enumerate(words)]
    elif how == "acdc":
        pairs = [(name, k) for k, name in enumerate(data.CLASSES)]
    elif (root / "dataset.json").exists():
        where = str(root / "dataset.json")
        pairs = nnunet_classes(root / "dataset.json")
    else:
        raise BadInput(f"--classes is needed: the masks hold {mask_values(sources)}")
    numbered = [pair for pair in pairs if pair[0] and re.fullmatch(r"\d{1,6}", str(pair[1]))]
    labels = {name: int(value) for name, value in numbered}
    if not 2 <= len(labels) <= 255 or not len(labels) == len(pairs) == len({*labels.values()}):
        raise BadInput(f"{where}: give 2 to 255 classes, each NAME=NUMBER with both its own")
    return labels


def nnunet_classes(file: Path) -> list[tuple[str, int]]:
    try:
        labels = json.loads(file.read_text(encoding="utf-8-sig"))["labels"]
        pairs = list(labels.items())
        if "background" not in labels:  # nnU-Net's first version: number -> name
            pairs = [(name, number) for number, name in pairs]
        return sorted([(str(name), int(str(number))) for name, number in pairs],
                      key=lambda pair: pair[1])
    except Exception:  # a damaged file can fail in any way
        remedy = "correct it, or give --classes"
        raise BadInput(f"{file}: has no labels as nnU-Net writes them; {remedy}") from None


def mask_values(sources: list[Source]) -> str:
    """What the masks hold, and what to do with it."""
    values: set[float] = set()
    for source in [s for s in sources if s.masks]:
        for slab in slabs(open_volume(source.masks, "label")):
            values |= set(np.unique(snapped(slab)).tolist())
    shown = [f"{value:.9g}" for value in sorted(values)]
    more = ["..."] if len(shown) > 12 else []
    listed = ", ".join(shown[:12] + more)
    if not all(map(str.isdecimal, shown)):
        return f"{listed}; change them to whole numbers from 0 on, one for each class"
    example = ["background=" + shown[0], *[f"NAME={value}" for value in shown[1:12]], *more]
    return f"{listed}; name each, as in --classes {','.join(example)}"


def snapped(slab: np.ndarray) -> np.ndarray:
    """Labels that are nearly whole are whole: a mask saved with a scale factor has 0.9999999."""
    whole = np.rint(slab) + 0.0  # of -0.0 it makes 0.0
    return np.where(np.abs(slab - whole) <= 1e-3, whole, slab)


def mask_slabs(source: Source, image: Volume, values: list[int]) -> Iterator[np.ndarray]:
    """Slabs (n,H,W) uint8 of a mask, after a look at whether it fits its image.

    values: what the classes have in the file; they become 0, 1, 2, ...
    """
    path = source.masks[0]
    mask = open_volume(source.masks, "label")
    # By the headers a mask may lie half a voxel beside its image; this bounds it for all voxels.
    corner = [*mask.shape[::-1], 1]
    apart = [(np.abs(a - b)[:3] @ corner).max() for a, b in zip(mask.affines, image.affines)]
    if apart and mask.shape == image.shape and not min(apart) <= min(image.spacing) / 2:
        raise BadInput(f"{path}: lies {min(apart):.0f} mm beside its image; give both one affine")
    if mask.shape != image.shape:
        shapes = f"{mask.shape[::-1]}, its image {image.shape[::-1]}"
        raise BadInput(f"{path}: has shape {shapes}; they must be equal")
    order = np.argsort(values)
    ordered = np.array(values)[order]
    listed = ", ".join(map(str, values))
    for slab in map(snapped, slabs(mask)):
        place = np.searchsorted(ordered, slab).clip(max=len(values) - 1)
        wrong = slab[ordered[place] != slab]
        if len(wrong):
            value = f"{wrong[0]:.9g}"
            remedy = "change the mask, to whole numbers from 0 on"
            if value.isdecimal():
                remedy = f"change the mask, or name the value: --classes background=0,NAME={value}"
            raise BadInput(f"{path}: label value {value} is not one of {listed}; {remedy}")
        yield order[place].astype(np.uint8)


def write(sources: list[Source], folder: Path, values: list[int], window, bits: int) -> list[dict]:
    """images.npy, masks.npy and masks/NUMBER.nii.gz; returns the cases of dataset.json."""
    N = sum(open_volume(source.images).shape[0] for source in sources)
    kind = np.uint8 if bits == 8 else np.float16
    size = (N, data.GRID, data.GRID)
    needed = (np.dtype(kind).itemsize + 1) * N * data.GRID**2  # where they miss, the process dies
    if shutil.disk_usage(folder).free < needed:
        raise BadInput(f"--out: needs {needed / 2**30:.3f} GB; make room, or name another disk")
    images = np.lib.format.open_memmap(folder / "images.npy", "w+", kind, size)
    masks = np.lib.format.open_memmap(folder / "masks.npy", "w+", np.uint8, size)
    (folder / "masks").mkdir()
    cases, row = [], 0
    for number, source in enumerate(sources, start=1):
        volume = open_volume(source.images)  # not all at once: a process may open 1024 files
        first = row
        limits = window
        if limits is None:
            extremes = [(float(slab.min()), float(slab.max())) for slab in slabs(volume)]
            limits = (min(low for low, _ in extremes), max(high for _, high in extremes))
        for slab in slabs(volume):
            grid = data.to_grid(torch.from_numpy(data.scale(slab, limits))).numpy()
            images[row : row + len(grid)] = np.rint(grid * 255) if bits == 8 else grid
            row += len(grid)
        name = None
        if source.masks:
            native = np.concatenate(list(mask_slabs(source, volume, values)))
            masks[first:row] = data.to_grid(torch.from_numpy(native)).numpy()
            name = f"masks/{number:04d}.nii.gz"  # a name of its own could be one no disk can store
            file = nib.Nifti1Image(native.T, np.diag([*volume.spacing[::-1], 1]))
            nib.save(file, folder / name)
        cases.append({"name": source.name, "patient": source.patient, "shape": volume.shape,
                      "spacing": volume.spacing, "mask": name, "first": first})
        if number % 20 == 0:
            print(f"{number} of {len(sources)} volumes", flush=True)
    return cases


def prepare(args: argparse.Namespace) -> None:
    if args.seed < 0:
        raise BadInput(f"--seed {args.seed}: must be 0 or more")
    if args.out.exists():
        raise BadInput(f"--out {args.out}: already exists; not overwriting")
    sources = find(args.source, args.patient)
    split = make_split(args.source, sources, args.split, args.seed)
    labels = class_names(args.source, text(args.classes), args.split, sources)
    listed = {*sum(split.values(), [])}
    others = [source.images[0] for source in sources if source.patient not in listed]
    leave(others, "of patients that the split does not name")
    sources = [source for source in sources if source.patient in listed]
    window = None
    if args.window:
        try:
            low, high = window = [float(word) for word in args.window.split(",")]
        except ValueError:
            low = high = 0.0
        if not 0 < high - low < math.inf:
            raise BadInput(f"--window={args.window}: give two numbers, like --window=-1000,400")
    crop = args.eval_crop or (data.EVAL_CROP if args.split == "acdc" else data.GRID)
    if crop % 16 or not 16 <= crop <= data.GRID:
        raise BadInput(f"--eval-crop {crop}: must be a multiple of 16, at most {data.GRID}")
    most = len({s.patient for s in sources if s.masks} & set(split["train"]))
    if not 0 <= args.labeled <= most:
        raise BadInput(f"--labeled {args.labeled}: must be 1 to {most}, all that have masks")
    labeled = args.labeled or (7 if args.split == "acdc" else most)
    warn_of_axes(sources)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent, prefix=".") as temporary:
        folder = Path(temporary, "set")
        folder.mkdir()
        cases = write(sources, folder, [*labels.values()], window, args.bits)
        # The field's protocol has distances in voxels; on a set of one's own mm mean more.
        about = {"labels": [*labels], "split": split, "labeled": labeled, "eval_crop": crop,
                 "unit": "voxels" if args.split == "acdc" else "mm", "window": window,
                 "cases": cases}
        record = json.dumps(about, indent=1) + "\n"
        (folder / "dataset.json").write_text(record, encoding="utf-8")
        shutil.move(folder, args.out)  # whole or not at all
    slices = sum(case["shape"][0] for case in cases)
    print(f"wrote {args.out}: {len(cases)} volumes, {slices} slices, classes {', '.join(labels)}")


def warn_of_axes(sources: list[Source]) -> None:
    """Arrays are used as stored: slices along the last axis, all volumes in one orientation."""
    axes: Counter[str] = Counter()
    odd = []
    for source in sources:
        volume = open_volume(source.images)
        axes[volume.axes] += 1
        spacing, shape = volume.spacing[::-1], volume.shape[::-1]  # (x,y,z)
        if max(spacing) > 1.5 * spacing[2]:
            odd.append((source.images[0], "xyz"[int(np.argmax(spacing))], shape, spacing))
        elif 8 * min(shape[:2]) < shape[2]:
            odd.append((source.images[0], "xyz"[int(np.argmin(shape))], shape, spacing))
    if odd:
        file, axis, shape, spacing = odd[0]
        print(f"WARNING: {file}: slices seem to lie along its axis {axis} (shape {shape}, spacing "
              f"{spacing}), and so in {len(odd)} volumes; store them along the last, z")
    if len(axes) > 1:
        found = ", ".join(f"{n} {name}" for name, n in axes.items())
        print(f"WARNING: volumes are stored in different orientations ({found}); store them alike")


def write_phantoms(folder: Path) -> None:
    """All phantoms as NIfTI in images/ and labels/, to stand in for somebody's own scans."""
    if folder.exists():
        raise BadInput(f"--phantoms {folder}: already exists; not overwriting")
    cases, volumes = data.phantoms(("train", "val", "test"))
    for case, volume in zip(cases, volumes):
        for place, array in (("images", volume.astype(np.int16)), ("labels", case.mask)):
            (folder / place).mkdir(parents=True, exist_ok=True)
            affine = np.diag([*case.spacing[::-1], 1])
            nib.save(nib.Nifti1Image(array.T, affine), folder / place / f"{case.name}.nii.gz")
    print(f"wrote {len(cases)} volumes in {folder}/images and {folder}/labels")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write any layout of scans as one prepared set.")
    parser.add_argument("source", type=Path, nargs="?", help="folder of the scans")
    parser.add_argument("--out", type=Path, help="folder of the prepared set")
    parser.add_argument("--classes", default="",
                        help="number, or names with the background first; NAME=VALUE of the masks")
    parser.add_argument("--patient", default="", metavar="EXPRESSION",
                        help="what of a file's name is the patient, a regular expression: ^[^_]+")
    parser.add_argument("--split", default="", choices=["", "acdc"], help="acdc: the field's split")
    parser.add_argument("--seed", type=int, default=0, help="of the 70/10/20 split")
    parser.add_argument("--labeled", type=int, default=0, help="default of train.py; 0 = all masks")
    parser.add_argument("--window", default="", help="LOW,HIGH that become 0 and 1, as of CT")
    parser.add_argument("--eval-crop", type=int, default=0, help="central pixels of 240 to score")
    parser.add_argument("--bits", type=int, default=16, choices=[8, 16], help="of a stored pixel")
    parser.add_argument("--phantoms", type=Path, metavar="FOLDER", help="write phantoms as scans")
    args = parser.parse_args(arguments)
    if not args.phantoms and not (args.source and args.out):
        parser.error("SOURCE and --out are needed")
    run = partial(write_phantoms, args.phantoms) if args.phantoms else partial(prepare, args)
    evaluate.command("extras.prepare", run, "allow it, or name another folder with --out")


if __name__ == "__main__":
    main()
