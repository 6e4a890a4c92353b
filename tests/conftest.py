"""A small phantom data set, made once per test session: five training patients, one for validation, one for test."""

import shutil

import pytest
import torch

import data

torch.set_num_threads(2)
SMALL_SPLIT = {"train": ["001", "002", "003", "004", "005"], "val": ["006"], "test": ["007"]}


@pytest.fixture(scope="session")
def small_phantom(tmp_path_factory):
    root = tmp_path_factory.mktemp("phantom") / "small"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "PHANTOM_SPLIT", SMALL_SPLIT)
        data.make_phantoms(root)
    return root


@pytest.fixture
def phantom_copy(small_phantom, tmp_path, monkeypatch):
    """A copy that a test may damage; `--data phantom --root` then reads it with the small split."""
    monkeypatch.setattr(data, "PHANTOM_SPLIT", SMALL_SPLIT)
    root = tmp_path / "data"
    shutil.copytree(small_phantom, root)
    return root
