"""Few phantoms, so that a training takes seconds."""

import pytest
import torch

import data

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def few_phantoms():
    few = {"train": ["001", "002", "003", "004"], "val": ["015"], "test": ["019"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "PHANTOM_SPLIT", few)
        yield
