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
import math
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

import data
import evaluate
from data import BadInput
from extras.files import Volume, fault, open_volume, slabs
from extras.layouts import Source, find, leave, text

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
    elif split["train"] + split["val"]:
        leave([file for file in [root / "split.txt"] if file.exists()], "the folders are the split")
    elif os.path.lexists(root / "split.txt"):
        split = read_split(root / "split.txt", patients)
    else:
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
