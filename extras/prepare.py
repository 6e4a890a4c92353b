"""Any other layout of scans -> the arrays that `train.py --data FOLDER` reads, written once.

    python -m extras.prepare SOURCE --out FOLDER --classes background,lesion
    python -m extras.prepare ACDC --split acdc --bits 8 --out acdc8        small, to be sent
    python -m extras.prepare --phantoms scans                              a folder to try this with

SOURCE has one of the layouts in extras/layouts.py. FOLDER gets images.npy and masks.npy on the grid
of data.py, dataset.json, and the native masks. Volumes are read a few slices at a time, so that a
set may be larger than memory.
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
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

import data
import evaluate
from data import BadInput
from extras.files import NIFTI, check_whole, fault, open_volume, slabs, slice_axis
from extras.layouts import Source, find, leave
from extras.masks import class_names, mask_slabs

# -- The split -----------------------------------------------------------------------------------


def make_split(root: Path, sources: list[Source], how: str, seed: int) -> dict[str, list[str]]:
    """train, val, test -> patients, in train those with masks first."""
    patients = list(dict.fromkeys(s.patient for s in sources))
    masked = [p for p in patients if any(s.masks for s in sources if s.patient == p)]
    split = {part: list(dict.fromkeys(s.patient for s in sources if s.part == part))
             for part in ("train", "val", "test")}
    place = root  # named where a patient is twice in the split
    if how == "acdc":
        names = {part: [f"patient{n}" for n in data.ACDC_SPLIT[part]] for part in split}
        split = {part: [p for p in names[part] if p in patients] for part in split}
    elif split["train"] + split["val"]:
        leave([file for file in [root / "split.txt"] if file.exists()], "the folders are the split")
    elif os.path.lexists(root / "split.txt"):
        place = root / "split.txt"
        split = read_split(place, patients)
    else:
        test = split["test"]
        pool = sorted(set(masked) - set(test))
        order = np.random.default_rng(seed).permutation(pool).tolist()
        val = max(1, round(0.1 * len(order)))
        end = val + (0 if test else round(0.2 * len(order)))
        split = {"train": order[end:], "val": order[:val], "test": test or order[val:end]}
        split["train"] += [p for p in patients if p not in masked + test]
    split["train"].sort(key=lambda patient: patient not in masked)
    for part in ("val", "test"):  # without a mask nothing can be scored
        split[part] = [p for p in split[part] if p in masked]
    for patient, times in Counter(sum(split.values(), [])).items():
        if times > 1:
            raise BadInput(f"{place}: {patient} is twice in train, val and test; leave it in once")
    if not set(split["train"]) & set(masked) or not split["val"]:
        remedy = "add masks, or change the split or --patient"
        raise BadInput(f"{root}: train and val need a patient with a mask each; {remedy}")
    for part, names in split.items():
        shown = " ".join(names[:8]) + (" ..." if len(names) > 8 else "")
        print(f"{part}: {len(names)} patients, {len(set(names) & set(masked))} with masks: {shown}")
    warn_of_stems(patients)
    return split


def warn_of_stems(patients: list[str]) -> None:
    """Warns where names look like visits of one patient, who must not be in train and in test."""
    # eva_visit1, p01_2 and 001_SA_ED are; case_001 is not, nor are names that all have one stem.
    visit = r"(?<=\d)[_-][a-zA-Z].*$|[_-][a-zA-Z]+[_-]?\d+$|(?<=\d)[_-]\d+$"
    stems = Counter(re.sub(visit, "", patient) for patient in patients)
    stem, times = stems.most_common(1)[0]
    if times > 1 and len(stems) > 1:
        expression = "^" + "[_-]".join("[^_-]+" for _ in re.split("[_-]", stem))
        print(f"WARNING: {times} patients begin with {stem}; if they are one, and so with other "
              f"names, say so with --patient '{expression}'")


def read_split(path: Path, patients: list[str]) -> dict[str, list[str]]:
    """Lines of PATIENT and train, val or test; # begins a comment."""
    try:
        content = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BadInput(f"{path}: {fault(path, error)}") from None
    except UnicodeDecodeError:
        raise BadInput(f"{path}: is not UTF-8; save it as UTF-8") from None
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


def write(sources: list[Source], folder: Path, values: list[int], window, bits: int) -> list[dict]:
    """images.npy, masks.npy and masks/NUMBER.nii.gz; returns the cases of dataset.json."""
    N = sum(open_volume(source.images).shape[0] for source in sources)
    kind = np.dtype(np.uint8 if bits == 8 else np.float16)
    (folder / "masks").mkdir()
    cases, first = [], 0
    # Not memory-mapped: where the disk is full, that ends the process without a word.
    with open(folder / "images.npy", "wb") as images, open(folder / "masks.npy", "wb") as masks:
        for file, dtype in ((images, kind), (masks, np.dtype(np.uint8))):
            head = {"descr": dtype.str, "fortran_order": False, "shape": (N, data.GRID, data.GRID)}
            np.lib.format.write_array_header_1_0(file, head)
        for number, source in enumerate(sources, start=1):
            for path in (*source.images, *(source.masks or ())):
                check_whole(path)
            volume = open_volume(source.images)  # not all at once: a process may open 1024 files
            limits = window
            if limits is None:
                extremes = [(float(slab.min()), float(slab.max())) for slab in slabs(volume)]
                limits = (min(low for low, _ in extremes), max(high for _, high in extremes))
            for slab in slabs(volume):
                grid = data.to_grid(torch.from_numpy(data.scale(slab, limits))).numpy()
                images.write((np.rint(grid * 255) if bits == 8 else grid).astype(kind).tobytes())
            mask = np.zeros((volume.shape[0], data.GRID, data.GRID), np.uint8)
            name = None
            if source.masks:
                native = np.concatenate(list(mask_slabs(source, volume, values)))
                mask = data.to_grid(torch.from_numpy(native)).numpy()
                name = f"masks/{number:04d}.nii.gz"  # the case's own name may be no valid file name
                affine = np.diag([*volume.spacing[::-1], 1])
                nib.save(nib.Nifti1Image(native.T, affine), folder / name)
            masks.write(mask.tobytes())
            cases.append({"name": source.name, "patient": source.patient, "shape": volume.shape,
                          "spacing": volume.spacing, "mask": name, "first": first})
            first += volume.shape[0]
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
    labels = class_names(args.source, args.classes, args.split, sources)
    scored = {*split["val"], *split["test"]}
    used = {s for s in sources if s.patient in split["train"] or (s.masks and s.patient in scored)}
    others = [source.images[0] for source in sources if source not in used]
    leave(others, "not in the split, or without a mask in val or test")
    sources = [source for source in sources if source in used]
    if args.window and not 0 < args.window[1] - args.window[0] < math.inf:
        raise BadInput(f"--window {args.window}: the second number must be the larger")
    crop = args.eval_crop or (data.EVAL_CROP if args.split == "acdc" else data.GRID)
    if crop % 16 or not 32 <= crop <= data.GRID:
        raise BadInput(f"--eval-crop {crop}: must be a multiple of 16, 32 to {data.GRID}")
    labeled = 7
    if args.split != "acdc":
        labeled = len({s.patient for s in sources if s.masks} & set(split["train"]))
    warn_of_axes(sources)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent, prefix=".") as temporary:
        folder = Path(temporary, "set")
        folder.mkdir()
        cases = write(sources, folder, [*labels.values()], args.window, args.bits)
        # The field's protocol has distances in voxels; on a set of one's own mm mean more. HDF5 and
        # PNG do not say how large a voxel is.
        in_mm = args.split != "acdc" and NIFTI.search(sources[0].images[0].name)
        meta = {"labels": [*labels], "split": split, "labeled": labeled, "eval_crop": crop,
                "unit": "mm" if in_mm else "voxels", "window": args.window, "cases": cases}
        record = json.dumps(meta, indent=1) + "\n"
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
        axis = slice_axis(shape, spacing)
        if axis != "z":
            odd.append((source.images[0], axis, shape, spacing))
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
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as temporary:
        for case, volume in zip(cases, volumes):
            for place, array in (("images", volume.astype(np.int16)), ("labels", case.mask)):
                file = Path(temporary, "set", place, f"{case.name}.nii.gz")
                file.parent.mkdir(parents=True, exist_ok=True)
                affine = np.diag([*case.spacing[::-1], 1])
                nib.save(nib.Nifti1Image(array.T, affine), file)
        shutil.move(Path(temporary, "set"), folder)  # whole or not at all
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
    parser.add_argument("--window", type=float, nargs=2, metavar=("LOW", "HIGH"),
                        help="intensities that become 0 and 1, as of CT: -1000 400")
    parser.add_argument("--eval-crop", type=int, default=0, help="central pixels of 240 to score")
    parser.add_argument("--bits", type=int, default=16, choices=[8, 16], help="of a stored pixel")
    parser.add_argument("--phantoms", type=Path, metavar="FOLDER", help="write phantoms as scans")
    args = parser.parse_args(arguments)
    if not args.phantoms and not (args.source and args.out):
        parser.error("SOURCE and --out are needed")
    run = partial(write_phantoms, args.phantoms) if args.phantoms else partial(prepare, args)
    evaluate.command("extras.prepare", run, "make room, allow it, or change --out")


if __name__ == "__main__":
    main()
