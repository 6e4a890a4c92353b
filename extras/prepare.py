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
import json
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch

import data
from data import BadInput

NIFTI = re.compile(r"\.nii(\.gz)?$", re.I)
FOREIGN = re.compile(r"\.(nrrd|nhdr|mha|mhd|dcm|hdr|img)$", re.I)


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
        reason = str(error).split("\n")[0] or type(error).__name__
        raise BadInput(f"{path}: damaged ({reason}); copy the file again") from None
    if found.dtype.kind not in "iufb" or not np.isfinite(found).all():
        raise BadInput(f"{path}: holds voxels that are no finite numbers; replace them")
    return found


def open_nifti(path: Path) -> Volume:
    if path.is_dir():
        raise BadInput(f"{path}: is a folder, not a file; rename it")
    try:
        file = nib.load(path, keep_file_open=True)  # or each slab is unpacked from the start
        sform, qform = file.affine, file.header.get_qform(coded=True)[0]
        with nib.openers.ImageOpener(path) as raw:  # nib.load makes 1 mm of a voxel size of 0
            header = type(file.header).from_fileobj(raw, check=False)
        zooms = np.asarray(header["pixdim"][1:4], float)
    except Exception as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        remedy = "copy it again, or rename it to .nii where it is not compressed"
        raise BadInput(f"{path}: cannot be read as NIfTI ({reason}); {remedy}") from None
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
            shape = file[key].shape
    except (OSError, KeyError) as error:
        raise BadInput(f"{path}: no HDF5 with the array {key} ({error}); copy it again") from None
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
    opened = [open_hdf5(f, key) if f.suffix == ".h5" else open_slice(f) for f in files]
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


def nifti_files(folder: Path) -> dict[str, Path]:
    """Name below the folder, without ending -> file. What is no NIfTI is named and left alone."""
    found: dict[str, Path] = {}
    for file in listing(folder):
        if FOREIGN.search(file.name):
            raise BadInput(f"{file}: is not NIfTI; convert it to .nii.gz")
        if not NIFTI.search(file.name):
            print(f"left alone: {file}, which is no NIfTI file")
            continue
        name = NIFTI.sub("", file.relative_to(folder).as_posix())
        if name in found:
            raise BadInput(f"{file}: {found[name].name} has the same name; remove one of the two")
        found[name] = file
    return found


def paired(images: dict[str, Path], masks: dict[str, Path], part: str = "") -> list[Source]:
    """An image without a mask is unlabeled; a mask without an image is an error."""
    for name in sorted(masks.keys() - images.keys()):
        raise BadInput(f"{masks[name]}: has no image of that name; add it, or remove the mask")
    sources = []
    for name, image in images.items():
        mask = (masks[name],) if name in masks else None
        patient = name.split("/")[0] if "/" in name else name.split("_frame")[0]
        sources.append(Source(name.replace("/", "-"), patient, (image,), mask, part))
    return sources


def pairs_layout(root: Path) -> list[Source]:
    folders = [root / name for name in ("labels", "masks", "segmentations")]
    folders = [folder for folder in folders if folder.is_dir()]
    if len(folders) > 1:
        names = " and ".join(folder.name for folder in folders)
        raise BadInput(f"{root}: {names} hold masks; keep one of them")
    return paired(nifti_files(root / "images"), nifti_files(folders[0]) if folders else {})


def nnunet_layout(root: Path) -> list[Source]:
    sources = []
    for end, part in (("Tr", ""), ("Ts", "test")):
        images = nifti_files(root / f"images{end}")
        for name, file in images.items():
            if re.search(r"_000[1-9]$", name):
                raise BadInput(f"{file}: is a second channel; only one (_0000) can be read")
        masks = nifti_files(root / f"labels{end}")
        if part and images and not masks:
            print(f"left alone: {root / 'imagesTs'}, which has no masks in labelsTs")
            continue
        sources += paired({re.sub("_0000$", "", n): f for n, f in images.items()}, masks, part)
    return sources


def acdc_layout(root: Path) -> list[Source]:
    sources = []
    for place in ("", "training", "testing", "database/training", "database/testing"):
        for folder in sorted((root / place).glob("patient*/")):
            files = {n: f for n, f in nifti_files(folder).items() if "_frame" in n}
            masks = {n.removesuffix("_gt"): f for n, f in files.items() if n.endswith("_gt")}
            images = {n: f for n, f in files.items() if not n.endswith("_gt")}
            sources += paired(images, masks)
    return sources


def hdf5_layout(root: Path) -> list[Source]:
    """NAME.h5, or NAME_slice_K.h5 of each slice; a volume that is there whole is read whole."""
    found: dict[str, dict[int, Path]] = {}
    for file in listing(root):
        match = re.fullmatch(r"(.+?)(?:_slice_(\d+))?\.h5", file.name)
        if match:
            found.setdefault(match[1], {})[int(match[2] or -1)] = file
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
    return sources


def png_layout(root: Path) -> list[Source]:
    """The authors' tree. Their loader drops images without a mask, and puts slice 10 before 2."""
    sources = []
    for folder in ("train-label", "train-unlabel", "val", "test"):
        volumes: dict[str, dict[int, Path]] = {}
        for file in listing(root / folder / "image"):
            match = re.fullmatch(r"(.+?)_(?:slice_?)?(\d+)\.png", file.name)
            if not match:
                raise BadInput(f"{file}: name it like patient001_frame01_slice_1.png")
            volumes.setdefault(match[1], {})[int(match[2])] = file
        for name, slices in volumes.items():
            images = tuple(slices[k] for k in sorted(slices))
            masks = tuple(root / folder / "mask" / f"{f.stem}.npy" for f in images)
            missing = [mask for mask in masks if not mask.exists()]
            if missing and folder != "train-unlabel":
                remedy = "add it, or move the image to train-unlabel"
                raise BadInput(f"{missing[0]}: no such file; {remedy}")
            labeled = None if folder == "train-unlabel" else masks
            part = folder.split("-")[0]
            sources.append(Source(name, name.split("_frame")[0], images, labeled, part))
    return sources


LAYOUTS = {
    "images": ("images/ and labels/ of NIfTI", pairs_layout),
    "imagesTr": ("nnU-Net's imagesTr/ and labelsTr/", nnunet_layout),
    "train-label": ("the authors' train-label/, val/ and test/", png_layout),
}


def find(root: Path) -> list[Source]:
    """All volumes below a folder, in whatever layout."""
    if not root.is_dir():
        raise BadInput(f"{root}: no such folder")
    layouts = [LAYOUTS[name] for name in LAYOUTS if (root / name).is_dir()]
    layouts += [("patientNNN/ of NIfTI, as ACDC", acdc_layout), ("HDF5, as SSL4MIS", hdf5_layout)]
    for name, layout in layouts:
        sources = layout(root)
        if sources:
            print(f"{root}: {name}; {len(sources)} volumes, "
                  f"{sum(s.masks is not None for s in sources)} with masks")
            return sources
    raise BadInput(f"{root}: no layout that is known; put NIfTI files into images/ and labels/")


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
    stems = Counter(re.sub(r"[_-][a-zA-Z]+[_-]?\d+$", "", p) for p in patients)
    for stem, times in stems.items():
        if times > 1 and stem not in patients:
            print(f"WARNING: {times} patients begin with {stem}: if they are one, put their files "
                  f"into a folder images/{stem}/")
    return split


def read_split(path: Path, patients: list[str]) -> dict[str, list[str]]:
    """Lines of PATIENT and train, val or test; # begins a comment."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise BadInput(f"{path}: is not UTF-8; save it as UTF-8") from None
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


def class_names(root: Path, text: str, how: str, sources: list[Source]) -> list[str]:
    """Of --classes, of ACDC, or of nnU-Net's dataset.json; else the values found are named."""
    file = root / "dataset.json"
    if text:
        if text.isdigit():
            return ["background", *(f"class {k}" for k in range(1, int(text)))]
        return text.split(",")
    if how == "acdc":
        return data.CLASSES
    if file.exists():
        with suppress(ValueError, KeyError, AttributeError):
            labels = json.loads(file.read_text(encoding="utf-8"))["labels"]
            if "background" in labels:  # nnU-Net's second version: name -> number
                labels = {number: name for name, number in labels.items()}
            numbered = {int(number): name for number, name in labels.items()}
            return [numbered[k] for k in range(len(numbered))]
    values: set[float] = set()
    for source in [s for s in sources if s.masks][:5]:
        for slab in slabs(open_volume(source.masks, "label")):
            values |= set(np.unique(slab).tolist())
    found = ", ".join(f"{value:g}" for value in sorted(values)[:12])
    raise BadInput(f"--classes is needed: the masks hold {found}; give their number or names")


def mask_slabs(source: Source, image: Volume, classes: int) -> Iterator[np.ndarray]:
    """Slabs (n,H,W) uint8 of a mask, after a look at whether it fits its image."""
    path = source.masks[0]
    mask = open_volume(source.masks, "label")
    # By the headers a mask may lie half a voxel beside its image; this bounds it for all voxels.
    corner = [*mask.shape[::-1], 1]
    apart = [(np.abs(a - b)[:3] @ corner).max() for a, b in zip(mask.affines, image.affines)]
    if apart and mask.shape == image.shape and not min(apart) <= min(image.spacing) / 2:
        raise BadInput(f"{path}: lies {min(apart):.0f} mm beside its image; give both one affine")
    case = data.Case(source.name, source.patient, image.shape, image.spacing, path)
    if mask.shape != image.shape:
        shapes = f"{mask.shape[::-1]}, its image {image.shape[::-1]}"
        raise BadInput(f"{path}: has shape {shapes}; they must be equal")
    for slab in slabs(mask):
        try:
            yield data.read_mask(case._replace(shape=slab.shape, mask=slab), classes)
        except BadInput as error:  # names the array, not the file
            raise BadInput(f"{path}: {str(error).split(': ', 1)[-1]}") from None


def write(sources: list[Source], folder: Path, labels: list[str], window, bits: int) -> list[dict]:
    """images.npy, masks.npy and masks/NAME.nii.gz; returns the cases of dataset.json."""
    opened = [open_volume(source.images) for source in sources]
    N = sum(volume.shape[0] for volume in opened)
    kind = np.uint8 if bits == 8 else np.float16
    size = (N, data.GRID, data.GRID)
    images = np.lib.format.open_memmap(folder / "images.npy", "w+", kind, size)
    masks = np.lib.format.open_memmap(folder / "masks.npy", "w+", np.uint8, size)
    (folder / "masks").mkdir()
    cases, row = [], 0
    for number, (source, volume) in enumerate(zip(sources, opened), start=1):
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
            native = np.concatenate(list(mask_slabs(source, volume, len(labels))))
            masks[first:row] = data.to_grid(torch.from_numpy(native)).numpy()
            name = f"masks/{source.name}.nii.gz"
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
    sources = find(args.source)
    labels = class_names(args.source, args.classes, args.split, sources)
    split = make_split(args.source, sources, args.split, args.seed)
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
        cases = write(sources, folder, labels, window, args.bits)
        about = {"labels": labels, "split": split, "labeled": labeled, "eval_crop": crop,
                 "window": window, "cases": cases}
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
    parser.add_argument("--classes", default="", help="number, or names with the background first")
    parser.add_argument("--split", default="", choices=["", "acdc"], help="acdc: the field's split")
    parser.add_argument("--seed", type=int, default=0, help="of the 70/10/20 split")
    parser.add_argument("--labeled", type=int, default=0, help="default of train.py; 0 = all masks")
    parser.add_argument("--window", default="", help="LOW,HIGH that become 0 and 1, as of CT")
    parser.add_argument("--eval-crop", type=int, default=0, help="central pixels of 240 to score")
    parser.add_argument("--bits", type=int, default=16, choices=[8, 16], help="of a stored pixel")
    parser.add_argument("--phantoms", type=Path, metavar="FOLDER", help="write phantoms as scans")
    args = parser.parse_args(arguments)
    try:
        if args.phantoms:
            return write_phantoms(args.phantoms)
        if not (args.source and args.out):
            raise BadInput("SOURCE and --out are needed")
        prepare(args)
    except (BadInput, OSError) as error:
        print(f"extras.prepare: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
