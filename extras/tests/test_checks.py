"""What ends a training is tried before it, and data that moved must be the same."""

import json

import numpy as np
import pytest
import torch

import data
from data import BadInput
from extras import checks
from model import VQSeg


@pytest.fixture(scope="module")
def hearts():
    return data.load("phantom")


@pytest.fixture
def begin(tmp_path, hearts):
    """Records a run that begins with these data; `begin(dataset)` checks it against others."""
    network = dict(classes=4, codebook_size=8, width=4, dim=8)
    volumes = {c.name: [c.patient, *c.shape] for c in hearts.cases}
    settings = {"labeled": 3, "resume": "", "root": ""}
    saved = {"settings": settings, "fm": "none", "split": hearts.split, "volumes": volumes,
             "labels": hearts.labels, "window": None, "eval_crop": hearts.eval_crop}
    (tmp_path / "config.json").write_text(json.dumps(saved))

    def check(dataset, resume=""):
        settings["resume"] = resume
        teacher = VQSeg(**network).eval()
        checks.before_training(tmp_path, teacher, dataset, saved, torch.device("cpu"))

    return check


def changed(dataset: data.Dataset, of: str, **changes) -> data.Dataset:
    cases = [c._replace(**changes) if c.patient == of else c for c in dataset.cases]
    return dataset._replace(cases=cases)


def test_a_run_that_can_end_leaves_nothing_behind(begin, hearts, tmp_path):
    begin(hearts)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("resume, left", [("", []), ("run", ["config.json"])])
def test_a_bad_mask_is_refused_before_the_training_and_nothing_remains(begin, hearts, tmp_path,
                                                                       resume, left):
    shape = next(c.shape for c in hearts.cases if c.patient == "patient018")  # the last
    with pytest.raises(BadInput, match="label value 9 is not one of 0 to 3"):
        begin(changed(hearts, "patient018", mask=np.full(shape, 9), shape=shape), resume)
    remains = [file.name for file in tmp_path.iterdir()] if tmp_path.exists() else []
    assert remains == left


def test_validation_masks_without_any_class_are_refused_before_the_training(begin, hearts):
    empty = [c._replace(mask=np.zeros(c.shape)) for c in hearts.cases]
    with pytest.raises(BadInput, match="val: no mask shows a class, nothing can be scored"):
        begin(hearts._replace(cases=empty))


@pytest.mark.parametrize("changes", [{"shape": (1, 2, 3)}, {"name": "another"},
                                     {"patient": "patient002"}])
def test_data_that_are_not_those_of_the_run_are_refused(begin, hearts, changes):
    with pytest.raises(BadInput, match="--root: .* is not as the run began with it"):
        begin(changed(hearts, "patient001", **changes))


@pytest.mark.parametrize("name, value", [
    ("labels", ["background", "Myo", "RV", "LV"]), ("window", [0, 60]), ("eval_crop", 64),
    ("split", {"train": ["patient001"], "val": ["patient002"], "test": []})])
def test_data_that_were_prepared_again_otherwise_are_refused(begin, hearts, name, value):
    again = hearts._replace(**{name: value})
    with pytest.raises(BadInput, match=f"--root: {name} of the data differs"):
        begin(again, resume="run")


def test_a_class_that_no_labeled_slice_shows_is_warned_of(hearts, capsys):
    checks.warn(hearts._replace(masks=hearts.masks.clamp(max=2)), 3, "")
    assert "no labeled slice shows LV; it cannot be learned" in capsys.readouterr().out


@pytest.mark.parametrize("count, warned", [(2, True), (3, False)])
def test_a_small_validation_set_is_warned_of(hearts, capsys, count, warned):
    split = hearts.split | {"val": hearts.split["val"][:count]}
    checks.warn(hearts._replace(split=split), 3, "")
    assert (f"validation set has {count} patients" in capsys.readouterr().out) == warned


# -- Prepared sets and records that were damaged -------------------------------------------------


@pytest.fixture
def prepared(tmp_path):
    """A set of two labeled patients as `extras.prepare` writes it: its record, to be changed."""
    np.save(tmp_path / "images.npy", np.zeros((4, 240, 240), np.float16))
    np.save(tmp_path / "masks.npy", np.ones((4, 240, 240), np.uint8))
    cases = [{"name": name, "patient": name, "shape": [2, 4, 5], "spacing": [9, 1, 1],
              "mask": "masks/1.nii.gz", "first": first} for name, first in (("a", 0), ("b", 2))]
    return {"labels": ["background", "heart"], "split": {"train": ["a"], "val": ["b"], "test": []},
            "labeled": 1, "eval_crop": 240, "window": None, "unit": "mm", "cases": cases}


@pytest.mark.parametrize("key, value", [
    ("labels", None), ("labels", "ab"), ("labels", ["a", "a"]),
    ("split", None), ("split", {"train": ["a"], "val": ["b"]}), ("labeled", 0), ("labeled", "1"),
    ("split", {"train": ["a", "a"], "val": ["b"], "test": []}), ("eval_crop", 17),
    ("eval_crop", 16), ("eval_crop", "240"), ("window", [1]), ("window", [1, 1]),
    ("unit", "km"), ("cases", {}), ("cases", None), ("more", 1),
    ("split", {"train": ["a", "c"], "val": ["b"], "test": []})])
def test_a_record_of_a_set_that_was_changed_is_one_line(prepared, tmp_path, key, value):
    (tmp_path / "dataset.json").write_text(json.dumps(prepared | {key: value}))
    with pytest.raises(BadInput, match="unreadable .*; allow it, or prepare it again"):
        data.load(str(tmp_path))


@pytest.mark.parametrize("key, value", [
    ("patient", None), ("patient", "c"), ("shape", [2, 4]), ("shape", [-2, 4, 5]),
    ("shape", "abc"), ("shape", [300, 4, 5]), ("spacing", None), ("spacing", [0, 1, 1]),
    ("first", -1), ("first", 99), ("mask", 5)])
def test_a_case_of_a_set_that_was_changed_is_one_line(prepared, tmp_path, key, value):
    prepared["cases"][0][key] = value
    (tmp_path / "dataset.json").write_text(json.dumps(prepared))
    with pytest.raises(BadInput, match="unreadable .*; allow it, or prepare it again"):
        data.load(str(tmp_path))


@pytest.mark.parametrize("name, array", [
    ("images", np.zeros((3, 240, 240), np.float16)), ("images", np.zeros((4, 100, 100), "f2")),
    ("images", np.zeros((4, 240, 240), np.uint16)), ("masks", np.zeros((2, 240, 240), np.uint8)),
    ("masks", np.zeros((4, 240, 240), np.float32))])
def test_arrays_of_another_set_are_one_line(prepared, tmp_path, name, array):
    (tmp_path / "dataset.json").write_text(json.dumps(prepared))
    np.save(tmp_path / f"{name}.npy", array)
    with pytest.raises(BadInput, match=f"{name}.npy does not fit the rest"):
        data.load(str(tmp_path))


def test_a_mask_value_that_is_no_class_is_refused_before_training(hearts):
    with pytest.raises(BadInput, match="set/masks.npy: holds the value 9; run extras.prepare"):
        checks.warn(hearts._replace(masks=hearts.masks.clamp(min=9)), 3, "set")


# -- Places that cannot be written ---------------------------------------------------------------


@pytest.mark.parametrize("name, allowed", [("new/run", True), ("new/run", False), ("file", True),
                                           ("file", False), ("file/run", True)])
def test_a_place_that_cannot_be_written_is_refused(tmp_path, monkeypatch, name, allowed):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(checks.os, "access", lambda path, mode: allowed)
    if allowed and name != "file/run":
        checks.writable(tmp_path / name, "change --out")
    else:
        with pytest.raises(BadInput, match="cannot be written; change --out"):
            checks.writable(tmp_path / name, "change --out")


def test_a_table_that_cannot_be_written_stops_the_scoring_before_it(hearts, tmp_path, monkeypatch):
    names = ("split", "labels", "window", "eval_crop")
    saved = {name: getattr(hearts, name) for name in names}
    checks.before_scoring(saved, hearts, "val", tmp_path / "val.csv")
    monkeypatch.setattr(checks.os, "access", lambda path, mode: False)
    with pytest.raises(BadInput, match="val.csv: .* cannot be written; allow it, or copy RUN"):
        checks.before_scoring(saved, hearts, "val", tmp_path / "val.csv")
