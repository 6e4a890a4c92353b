"""Checks before hours are spent: can the run end, and are the data those that it began with?

`data.py`, `train.py` and `evaluate.py` call this where the folder extras is there; it has no
command line. What can end a training is tried before it: validation masks, pictures, table.
"""

import io
import itertools
import json
import os
import tempfile
from contextlib import redirect_stdout, suppress
from pathlib import Path

import torch

import data
import evaluate
from data import BadInput, Dataset, read_mask
from extras import figures
from model import VQSeg


def intact(d: Dataset) -> Dataset:
    """The prepared set d; ValueError where it is not as `extras.prepare` writes it."""
    first = [0, *itertools.accumulate(c.shape[0] for c in d.cases)]  # row of each case, and N
    patients = sum(d.split.values(), [])
    arrays = (first[-1], data.GRID, data.GRID)  # (N,G,G)
    rules = {
        "labels": isinstance(d.labels, list) and len(d.labels) == len(set(d.labels)) > 1,
        "split": set(d.split) == {"train", "val", "test"} and len(patients) == len(set(patients)),
        "labeled": isinstance(d.labeled, int) and d.labeled > 0,
        "eval_crop": d.eval_crop in range(32, data.GRID + 1, 16),
        "window": d.window is None or d.window[0] < d.window[1],
        "unit": d.unit in ("mm", "voxels"),
        "patients": {c.patient for c in d.cases} == set(patients),
        "spacing": all(len(c.spacing) == len(c.shape) == 3 and min(c.spacing) > 0 for c in d.cases),
        "first": [c.first for c in d.cases] == first[:-1],
        "images.npy": d.images.shape == arrays and d.images.is_floating_point(),
        "masks.npy": d.masks.shape == arrays and d.masks.dtype == torch.uint8,
    }
    for name, right in rules.items():
        if not right:
            raise ValueError(f"{name} does not fit the rest")
    return d


def before_training(run: Path, teacher: VQSeg, dataset: Dataset, saved: dict, device: torch.device):
    """Raises now what would be raised at the end. saved: what a checkpoint will hold."""
    s = saved["settings"]
    try:
        began = json.loads((run / "config.json").read_bytes())
        for part in ("train", "val"):
            same_volumes(began, dataset, part)
        warn(dataset, s["labeled"], s["root"])
        with tempfile.TemporaryDirectory(dir=run, prefix=".rehearsal-") as folder:
            rehearse(Path(folder), teacher, dataset, saved | {"step": 0}, device)
    except Exception:
        if not s["resume"]:  # the same command can follow when the fault is mended
            with suppress(OSError):  # a folder that is not empty was there before, and stays
                (run / "config.json").unlink()
                run.rmdir()
        raise


def before_scoring(saved: dict, dataset: Dataset, part: str, table: Path) -> None:
    """Raises now what would be raised when all volumes are scored. table: the file to write."""
    same_volumes(saved, dataset, part)
    writable(table, "allow it, or copy RUN to where you may write")


def writable(path: Path, remedy: str) -> None:
    """Raises where a file or a folder cannot be written, or cannot be made."""
    place = path
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK) or not (place == path or place.is_dir()):
        raise BadInput(f"{path}: {place} cannot be written; {remedy}")


def rehearse(folder: Path, teacher: VQSeg, dataset: Dataset, saved: dict, device: torch.device):
    """The table and the pictures that end a training, of one volume and an untrained teacher.

    Their numbers mean nothing: `folder` is hidden, and is removed afterwards.
    """
    # A list, so that each mask is read and a bad one is found now.
    if not any([read_mask(case, len(dataset.labels)).any() for case in dataset.part("val")]):
        raise BadInput("val: no mask shows a class, nothing can be scored; change the split")
    one = dataset._replace(split=dataset.split | {"val": [dataset.part("val")[0].patient]})
    with redirect_stdout(io.StringIO()):
        rows = evaluate.evaluate(teacher.predict, one, "val", device, distances=False)
        evaluate.report(folder / "val.csv", rows, saved, one.unit)
        figures.draw_run(folder, teacher, one, "val", rows, device)


def warn(dataset: Dataset, labeled: int, folder: str) -> None:
    """Says what makes a result worth little. folder: of a prepared set."""
    shown: set[int] = set()
    for case in dataset.training(labeled)[0]:  # one by one: together they may exceed memory
        shown |= set(dataset.masks[case.first : case.first + case.shape[0]].unique().tolist())
    if max(shown) >= len(dataset.labels):
        fault = f"holds the value {max(shown)}; run extras.prepare again"
        raise BadInput(f"{folder}/masks.npy: {fault}")
    for k in sorted(set(range(len(dataset.labels))) - shown):
        print(f"WARNING: no labeled slice shows {dataset.labels[k]}; it cannot be learned")
    count = len({case.patient for case in dataset.part("val")})
    if count < 3:
        print(f"WARNING: the validation set has {count} patients, and it chooses the checkpoint: "
              "its Dice is too good; judge by the test set, or validate on 3 or more")


def same_volumes(began: dict, dataset: Dataset, part: str) -> None:
    """Raises where the data are not those that a run began with. began: its record."""

    def of_part(volumes: dict) -> dict:
        return {k: v for k, v in volumes.items() if v[0] in began["split"][part]}

    known = of_part(began.get("volumes", {}))  # none of a part that was not read: ACDC's test
    found = of_part({c.name: [c.patient, *c.shape] for c in dataset.cases})
    differ = sorted(name for name in known if found.get(name) != known[name])
    differ += sorted(found.keys() - known.keys()) if known else []
    if differ:
        raise BadInput(f"--root: {differ[0]} ({part}) is not as the run began with it; name the "
                       "folder of the same data with --root, or begin another run")
    # The same volumes, prepared again with other flags.
    for name in ("labels", "window", "eval_crop", "split"):
        if began[name] != getattr(dataset, name):
            raise BadInput(f"--root: {name} of the data differs from what the run began with; "
                           "prepare the set as it was, or begin another run")
