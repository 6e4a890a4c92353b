"""Masks: which value is which class, and what is wrong with a mask.

The values of a file become 0, 1, 2, ... in the order of the class names.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import data
from data import BadInput
from extras.files import Volume, open_volume, slabs
from extras.layouts import Source


def class_names(root: Path, text: str, how: str, sources: list[Source]) -> dict[str, int]:
    """Name of a class -> its value in the masks: of --classes, ACDC, or nnU-Net's dataset.json."""
    where = f"--classes {text}"
    if text.isdecimal():
        names = ["background", *(f"class {k}" for k in range(1, min(int(text), 256)))]
        pairs = [(name, k) for k, name in enumerate(names)]
    elif text:
        words = [word.strip().partition("=") for word in text.split(",")]
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
    if "background" in [*labels][1:]:
        raise BadInput(f"{where}: the first class is the background; put it there")
    return labels


def nnunet_classes(file: Path) -> list[tuple[str, int]]:
    try:
        labels = json.loads(file.read_text(encoding="utf-8-sig"))["labels"]
        pairs = list(labels.items())
        if "background" not in labels:  # nnU-Net's first version: number -> name
            pairs = [(name, number) for number, name in pairs]
        numbered = [(str(name), int(str(number))) for name, number in pairs]
    except Exception:  # a damaged file can fail in any way
        remedy = "allow it to be read, correct it, or give --classes"
        raise BadInput(f"{file}: its labels are no names with a number each; {remedy}") from None
    if "ignore" in dict(numbered):
        raise BadInput(f"{file}: pixels to ignore cannot be left out; change them, or --classes")
    return sorted(numbered, key=lambda pair: pair[1])


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
    if mask.shape != image.shape:
        shapes = f"{mask.shape[::-1]}, its image {image.shape[::-1]}"
        raise BadInput(f"{path}: has shape {shapes}; they must be equal")
    # By the headers a mask may lie half a voxel beside its image; this bounds it for all voxels.
    corner = [*mask.shape[::-1], 1]
    apart = [(np.abs(a - b)[:3] @ corner).max() for a, b in zip(mask.affines, image.affines)]
    if apart and not min(apart) <= min(image.spacing) / 2:
        raise BadInput(f"{path}: lies {min(apart):.0f} mm beside its image; give both one affine")
    order = np.argsort(values)
    ordered = np.array(values)[order]
    listed = ", ".join(map(str, values))
    first = 0  # slice of this slab
    for slab in map(snapped, slabs(mask)):
        place = np.searchsorted(ordered, slab).clip(max=len(values) - 1)
        wrong = np.argwhere(ordered[place] != slab)
        if len(wrong):
            value = f"{slab[tuple(wrong[0])]:.9g}"
            remedy = "change the mask, to whole numbers from 0 on"
            if value.isdecimal():
                remedy = f"change the mask, or name the value: --classes background=0,NAME={value}"
            if len(source.masks) > 1:  # a file for each slice
                path = source.masks[first + wrong[0, 0]]
            raise BadInput(f"{path}: label value {value} is not one of {listed}; {remedy}")
        yield order[place].astype(np.uint8)
        first += len(slab)
