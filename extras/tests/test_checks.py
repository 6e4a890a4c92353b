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
    saved = {"settings": {"labeled": 3}, "fm": "none", "split": hearts.split, "volumes": volumes}
    (tmp_path / "config.json").write_text(json.dumps(saved))

    def check(dataset):
        teacher = VQSeg(**network).eval()
        checks.before_training(tmp_path, teacher, dataset, saved, torch.device("cpu"))

    return check


def changed(dataset: data.Dataset, of: str, **changes) -> data.Dataset:
    cases = [c._replace(**changes) if c.patient == of else c for c in dataset.cases]
    return dataset._replace(cases=cases)


def test_a_run_that_can_end_leaves_nothing_behind(begin, hearts, tmp_path):
    begin(hearts)
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("patient", ["patient015", "patient018"])
def test_a_bad_validation_mask_is_refused_before_the_training(begin, hearts, patient):
    shape = next(c.shape for c in hearts.cases if c.patient == patient)
    bad = changed(hearts, patient, mask=np.full(shape, 9), shape=shape)
    with pytest.raises(BadInput, match="label value 9 is not one of 0 to 3"):
        begin(bad)


@pytest.mark.parametrize("changes", [{"shape": (1, 2, 3)}, {"name": "another"},
                                     {"patient": "patient002"}])
def test_data_that_are_not_those_of_the_run_are_refused(begin, hearts, changes):
    with pytest.raises(BadInput, match="--root: .* is not as the run began with it"):
        begin(changed(hearts, "patient001", **changes))


def test_a_class_that_no_labeled_slice_shows_is_warned_of(hearts, capsys):
    checks.warn(hearts._replace(masks=hearts.masks.clamp(max=2)), 3)
    assert "no labeled slice shows LV; it cannot be learned" in capsys.readouterr().out


@pytest.mark.parametrize("count, warned", [(2, True), (3, False)])
def test_a_small_validation_set_is_warned_of(hearts, capsys, count, warned):
    split = hearts.split | {"val": hearts.split["val"][:count]}
    checks.warn(hearts._replace(split=split), 3)
    assert (f"validation set has {count} patients" in capsys.readouterr().out) == warned


def test_a_run_folder_that_cannot_be_written_is_refused(begin, hearts, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checks.tempfile, "TemporaryDirectory", full)
    with pytest.raises(BadInput, match="cannot be written .No space left on device.*--out"):
        begin(hearts)
