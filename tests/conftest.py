"""Few phantoms, so that a training takes seconds."""

import pytest
import torch

import data

torch.set_num_threads(1)


@pytest.fixture
def few_phantoms(monkeypatch):
    few = {"train": ["001", "002", "003", "004"], "val": ["015"], "test": ["019"]}
    monkeypatch.setattr(data, "PHANTOM_SPLIT", few)
