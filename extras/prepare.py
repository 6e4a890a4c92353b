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
import os
import re
import shutil
import tempfile
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

# It prints guesses about headers; what is wrong with one is refused below.
nib.imageglobals.logger.disabled = True
NIFTI = re.compile(r"\.nii(\.gz)?$", re.I)
HDF5 = re.compile(r"\.(h5|hdf5)$", re.I)
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


def reason(error: Exception) -> str:
    """What an error says, in one line."""
    return str(error).split("\n")[0] or type(error).__name__


def voxels(path: Path, read: Callable[[], np.ndarray]) -> np.ndarray:
    """What `read` takes from this file, or one line about what is wrong with it."""
    try:
        found = np.asarray(read())
    except Exception as error:  # a damaged file can make a library fail in any way
        raise BadInput(f"{path}: damaged ({reason(error)}); copy the file again") from None
    if found.dtype.kind not in "iufb" or not np.isfinite(found).all():
        raise BadInput(f"{path}: holds voxels that are no finite numbers; replace them")
    return found


def what_it_is(path: Path) -> str:
    """Of a file that does not open as NIfTI: what it is instead, and the remedy."""
    if path.is_dir():
        return "is a folder; name the file in it, or rename the folder"
    if not path.exists():
        return "no such file; correct the path" + (" of the link" if path.is_symlink() else "")
    try:
        with open(path, "rb") as file:
            content = file.read(400)
    except OSError as error:
        return f"cannot be read ({error.strerror}); allow it, or copy the file"
    packed = content[:2] == b"\x1f\x8b"
    if packed:
        try:
            with gzip.open(path) as file:
                content = file.read(400)
        except (OSError, EOFError, zlib.error) as error:
            return f"damaged ({reason(error)}); copy the file again"
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


def load_nifti(path: Path) -> nib.Nifti1Image:
    """The opened file, its voxels not read yet."""
    try:
        return nib.load(path, keep_file_open=True)  # or each slab is unpacked from the start
    except Exception:  # a damaged file can make a library fail in any way
        raise BadInput(f"{path}: {what_it_is(path)}") from None


def open_nifti(path: Path) -> Volume:
    file = load_nifti(path)
    try:
        sform, qform = file.affine, file.header.get_qform(coded=True)[0]
        with nib.openers.ImageOpener(path) as raw:  # nib.load makes 1 mm of a voxel size of 0
            header = type(file.header).from_fileobj(raw, check=False)
        zooms = np.asarray(header["pixdim"][1:4], float)
    except Exception:  # a quaternion that is none, for one
        raise BadInput(f"{path}: has a damaged header; copy the file again") from None
    shape = file.shape
    if len(shape) == 2:
        raise BadInput(f"{path}: is one slice of shape {shape}; store it as (x, y, 1)")
    if len(shape) != 3 or 0 in shape:
        remedy = "store one volume a file, and of a one-hot mask its class numbers"
        raise BadInput(f"{path}: has shape {shape}, not (x, y, z); {remedy}")
    # ACDC's sform has unit scales while pixdim is right: the affine counts only without a pixdim.
    if not (np.isfinite(zooms).all() and (zooms > 0).all()):
        zooms = np.linalg.norm(sform[:3, :3], axis=0)
    if not (np.isfinite(zooms).all() and (zooms > 0).all()):
        raise BadInput(f"{path}: its header has no voxel size; correct pixdim or the affine")
    affines = (sform,) if qform is None else (sform, qform)
    spacing = tuple(float(s) for s in zooms[::-1])

    def read(a: int, b: int) -> np.ndarray:
        return voxels(path, lambda: file.dataobj[:, :, a:b]).T

    return Volume(shape[::-1], read, spacing, affines, "".join(map(str, nib.aff2axcodes(sform))))


def open_hdf5(path: Path, key: str) -> Volume:
    """SSL4MIS: key is image or label; (Z,H,W), or one slice (H,W)."""
    try:
        import h5py
    except ImportError:
        raise BadInput(f"{path}: HDF5 needs a package; pip install h5py") from None

    def read(a: int, b: int) -> np.ndarray:
        with h5py.File(path) as file:
            return file[key][a:b] if file[key].ndim == 3 else file[key][()][None]

    try:
        with h5py.File(path) as file:
            shape = file[key].shape if key in file else None
    except Exception as error:  # a damaged file can make a library fail in any way
        raise BadInput(f"{path}: no HDF5 ({reason(error)}); copy the file again") from None
    if shape is None:
        raise BadInput(f"{path}: has no array {key}; store one under that name")
    if len(shape) not in (2, 3) or 0 in shape:
        raise BadInput(f"{path}: {key} has shape {shape}, not (z, y, x) or (y, x); store it so")
    shape = shape if len(shape) == 3 else (1, *shape)
    return Volume(shape, lambda a, b: voxels(path, lambda: read(a, b)))


def open_slice(path: Path) -> Volume:
    """One gray slice in PNG, or one mask in npy."""
    from PIL import Image  # comes with matplotlib

    def read() -> np.ndarray:
        return np.load(path) if path.suffix == ".npy" else np.asarray(Image.open(path))

    shape = voxels(path, read).shape
    if len(shape) != 2:
        raise BadInput(f"{path}: has shape {shape}; a gray slice (y, x) is needed")
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
            raise BadInput(f"{file}: has shape {volume.shape[1:]}, other slices {shape}")
    return Volume((len(files), *shape),
                  lambda a, b: np.concatenate([volume.read(0, 1) for volume in opened[a:b]]))


def slabs(volume: Volume) -> Iterator[np.ndarray]:
    """A few slices at a time, about 4 million voxels."""
    Z, H, W = volume.shape
    step = max(1, 2**22 // (H * W))
    for a in range(0, Z, step):
        yield volume.read(a, min(a + step, Z))


# -- Layouts: each lists the volumes below a folder ----------------------------------------------


def listing(folder: Path) -> list[Path]:
    """The files below a folder, hidden ones left out; folders that are links are followed."""
    files, seen = [], set()
    todo = [folder] if folder.is_dir() else []
    while todo:
        place = todo.pop()
        if place.resolve() in seen:
            raise BadInput(f"{place}: links go in a circle; remove the link")
        seen.add(place.resolve())
        for entry in sorted(place.iterdir()):
            if not entry.name.startswith("."):
                (todo if entry.is_dir() and not NIFTI.search(entry.name) else files).append(entry)
    return sorted(files)


def text(path: Path) -> str:
    """A path as text. Names that are not UTF-8, as from old zip files, are taken for Latin-1."""
    raw = os.fsencode(path.as_posix())
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def child(root: Path, *names: str) -> Path | None:
    """The folder of one of these names, upper or lower case; None if there is none, or two."""
    found = [f for f in sorted(root.iterdir()) if f.is_dir() and f.name.lower() in names]
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


def nifti_files(folder: Path | None) -> dict[str, Path]:
    """Name below the folder, without ending -> file. What is no NIfTI is named and left alone."""
    found: dict[str, Path] = {}
    other = []
    for file in listing(folder) if folder else []:
        if FOREIGN.search(file.name):
            raise BadInput(f"{file}: is not NIfTI; convert it to .nii.gz")
        if NIFTI.search(file.name):
            add(found, NIFTI.sub("", text(file.relative_to(folder))), file)
        else:
            other.append(file)
    leave(other, "no NIfTI")
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
    found: dict[str, dict[int, Path]] = {}
    other = []
    for file in listing(root):
        match = re.fullmatch(r"(.+?)(?:_slice_(\d+))?", HDF5.sub("", text(Path(file.name))))
        if HDF5.search(file.name):
            add(found.setdefault(match[1], {}), int(match[2] or -1), file)
        else:
            other.append(file)
    sources = []
    for name, slices in found.items():
        order = [-1] if -1 in slices else sorted(slices)
        if len(order) > 1 and order[-1] - order[0] + 1 != len(order):
            raise BadInput(f"{slices[order[0]]}: other slices are missing; copy them again")
        files = tuple(slices[k] for k in order)
        open_hdf5(files[0], "image")  # h5py is there, and the file can be read
        try:
            open_hdf5(files[0], "label")
            masks = files
        except BadInput:  # no array of that name
            masks = None
        sources.append(Source(name, name.split("_frame")[0], files, masks))
    leave(other if sources else [], "no HDF5")
    return sources


def png_layout(root: Path) -> list[Source]:
    """The authors' tree. Their loader drops images without a mask, and puts slice 10 before 2."""
    sources = []
    for folder in ("train-label", "train-unlabel", "val", "test"):
        volumes: dict[str, dict[int, Path]] = {}
        images = listing(root / folder / "image")
        for file in images:
            match = re.fullmatch(r"(.+?)_(?:slice_?)?(\d+)\.png", text(Path(file.name)), re.I)
            if not match:
                raise BadInput(f"{file}: name it like patient001_frame01_slice_1.png")
            add(volumes.setdefault(match[1], {}), int(match[2]), file)
        masks = {file.stem: file for file in listing(root / folder / "mask")}
        for stem in sorted(masks.keys() - {image.stem for image in images}):
            raise BadInput(f"{masks[stem]}: has no image of that name; add it, or remove the mask")
        for name, slices in volumes.items():
            files = tuple(slices[k] for k in sorted(slices))
            needed = tuple(root / folder / "mask" / f"{f.stem}.npy" for f in files)
            missing = [mask for mask in needed if mask not in masks.values()]
            if missing and folder != "train-unlabel":
                remedy = "add it, or move the image to train-unlabel"
                raise BadInput(f"{missing[0]}: no such file; {remedy}")
            labeled = None if folder == "train-unlabel" else needed
            part = folder.split("-")[0]
            sources.append(Source(name, name.split("_frame")[0], files, labeled, part))
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
    file = root / "split.txt"
    if how == "acdc":
        split = {k: [f"patient{n}" for n in v] for k, v in data.ACDC_SPLIT.items()}
        split = {k: [p for p in v if p in patients] for k, v in split.items()}
    elif any(s.part for s in sources if s.part != "test"):
        split = {part: list(dict.fromkeys(s.patient for s in sources if s.part == part))
                 for part in ("train", "val", "test")}
    elif file.exists():
        split = read_split(file, patients)
    else:
        test = list(dict.fromkeys(s.patient for s in sources if s.part == "test"))
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
    if len(split["val"]) < 3:
        print(f"WARNING: {len(split['val'])} validation patients choose the checkpoint; its score "
              "may be luck; name more in split.txt")
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
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise BadInput(f"{path}: is not UTF-8; save it as UTF-8") from None
    if any("\0" in line for line in lines):  # UTF-16 without its mark
        raise BadInput(f"{path}: is not UTF-8; save it as UTF-8")
    split: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for line in lines:
        words = line.split("#")[0].rsplit(None, 1)
        if words and (len(words) != 2 or words[1] not in split or words[0].strip() not in patients):
            raise BadInput(f"{path}: {line!r} is not a patient of this set and train, val or test")
        if words:
            split[words[1]].append(words[0].strip())
    unlisted = sorted(set(patients) - set(sum(split.values(), [])))
    if unlisted:
        raise BadInput(f"{path}: does not name {' '.join(unlisted[:5])}; add a line for each")
    return split


# -- Writing -------------------------------------------------------------------------------------


def class_names(root: Path, text: str, how: str, sources: list[Source]) -> dict[str, int]:
    """Name of a class -> its value in the masks: of --classes, ACDC, or nnU-Net's dataset.json."""
    names: dict[str, int] = {}
    file = root / "dataset.json"
    if text.isdigit():
        words = ["background", *(f"class {k}" for k in range(1, int(text)))]
    elif text:
        words = text.split(",")
    elif how == "acdc":
        words = data.CLASSES
    elif file.exists():
        words = nnunet_classes(file)
    else:
        values = [f"{value:g}" for value in mask_values(sources)[:12]]
        example = ",".join(["background=" + values[0], *[f"NAME={value}" for value in values[1:]]])
        raise BadInput(f"--classes is needed: the masks hold {', '.join(values)}; name each, as in "
                       f"--classes {example}")
    for k, word in enumerate(words):
        name, _, value = word.partition("=")
        if name in names or not name or not (value or str(k)).isdigit():
            raise BadInput(f"--classes {text}: {word!r} is twice, empty or no NAME=NUMBER")
        names[name] = int(value or k)
    if not 2 <= len(names) <= 255 or len(set(names.values())) < len(names):
        raise BadInput(f"--classes {text}: give 2 to 255 names, each with a number of its own")
    return names


def nnunet_classes(file: Path) -> list[str]:
    try:
        labels = json.loads(file.read_text(encoding="utf-8-sig"))["labels"]
        if "background" in labels:  # nnU-Net's second version: name -> number
            labels = {number: name for name, number in labels.items()}
        numbered = {int(number): str(name) for number, name in labels.items()}
        return [f"{numbered[k]}={k}" for k in sorted(numbered)]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        fault = f"has no labels as nnU-Net writes them ({reason(error)})"
        raise BadInput(f"{file}: {fault}; correct it, or give --classes") from None


def mask_values(sources: list[Source]) -> list[float]:
    values: set[float] = set()
    for source in [s for s in sources if s.masks]:
        for slab in slabs(open_volume(source.masks, "label")):
            values |= set(np.unique(slab).tolist())
    return sorted(values)


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
    for slab in slabs(mask):
        whole = np.rint(slab)
        place = np.searchsorted(ordered, whole).clip(max=len(values) - 1)
        # Not exactly: a mask saved with a scale factor has 0.9999999 for 1.
        wrong = slab[(ordered[place] != whole) | (np.abs(slab - whole) > 1e-3)]
        if len(wrong):
            listed = ", ".join(map(str, values))
            raise BadInput(f"{path}: label value {wrong[0]:.9g} is not one of {listed}; change the "
                           f"mask, or name the value: --classes background=0,NAME={wrong[0]:.9g}")
        yield order[place].astype(np.uint8)


def write(sources: list[Source], folder: Path, values: list[int], window, bits: int) -> list[dict]:
    """images.npy, masks.npy and masks/NUMBER.nii.gz; returns the cases of dataset.json."""
    N = sum(open_volume(source.images).shape[0] for source in sources)
    kind = np.uint8 if bits == 8 else np.float16
    size = (N, data.GRID, data.GRID)
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
    if args.out.exists():
        raise BadInput(f"--out {args.out}: already exists; not overwriting")
    sources = find(args.source, args.patient)
    labels = class_names(args.source, args.classes, args.split, sources)
    split = make_split(args.source, sources, args.split, args.seed)
    others = [s.images[0] for s in sources if s.patient not in sum(split.values(), [])]
    leave(others, "of patients that the split does not name")
    sources = [s for s in sources if s.patient in sum(split.values(), [])]
    window = None
    if args.window:
        try:
            low, high = (float(word) for word in args.window.split(","))
        except ValueError:
            low, high = 0.0, 0.0
        if not low < high:
            raise BadInput(f"--window={args.window}: give two numbers, like --window=-1000,400")
        window = (low, high)
    crop = args.eval_crop or (data.EVAL_CROP if args.split == "acdc" else data.GRID)
    if crop % 16 or not 16 <= crop <= data.GRID:
        raise BadInput(f"--eval-crop {crop}: must be a multiple of 16, at most {data.GRID}")
    warn_of_axes(sources)
    masked = {s.patient for s in sources if s.masks}
    labeled = args.labeled or (7 if args.split == "acdc" else len(masked & set(split["train"])))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent, prefix=".") as temporary:
        folder = Path(temporary, "set")
        folder.mkdir()
        cases = write(sources, folder, [*labels.values()], window, args.bits)
        # The field's protocol has distances in voxels; on a set of one's own mm mean more.
        about = {"labels": [*labels], "split": split, "labeled": labeled, "eval_crop": crop,
                 "unit": "voxels" if args.split == "acdc" else "mm", "window": window,
                 "cases": cases}
        text = json.dumps(about, indent=1) + "\n"
        (folder / "dataset.json").write_text(text, encoding="utf-8")
        shutil.move(folder, args.out)  # whole or not at all
    slices = sum(case["shape"][0] for case in cases)
    print(f"wrote {args.out}: {len(cases)} volumes, {slices} slices, classes {', '.join(labels)}")


def warn_of_axes(sources: list[Source]) -> None:
    """Arrays are used as stored: slices along the last axis, all volumes in one orientation."""
    axes: Counter[str] = Counter()
    for source in sources:
        volume = open_volume(source.images)
        axes[volume.axes] += 1
        spacing, shape = volume.spacing[::-1], volume.shape[::-1]  # (x,y,z)
        thick = int(np.argmax(spacing))
        if spacing[thick] > 1.5 * spacing[2] or (1 in shape[:2] and shape[2] > 1):
            print(f"WARNING: {source.images[0]}: slices seem to lie along another axis than the "
                  f"last (shape {shape}, spacing {spacing}); store them along the last")
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
