"""The figures of the README: what they count, and what they are drawn from."""

import argparse
import math

import pytest
import torch
from matplotlib.image import imread

import data
import evaluate
import train
from data import BadInput
from extras import figures
from model import VQSeg

SPLIT = {"train": ["001"], "val": ["002"], "test": ["003"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Untrained runs: with a codebook and without."""
    folder = tmp_path_factory.mktemp("figures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "PHANTOM_SPLIT", SPLIT)
        dataset = data.load("phantom")
    for name, flags in (("vqseg", []), ("supervised", ["--supervised"])):
        s = train.read_settings(["--width", "4", "--codebook-size", "32", "--fm", "none", *flags])
        _, teacher, _, _, about = train.build(s, dataset, torch.device("cpu"))
        (folder / name).mkdir()
        evaluate.save(folder / name / "best.pt", about | {"teacher": teacher.state_dict()})
    return folder


@pytest.fixture
def draw(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PHANTOM_SPLIT", SPLIT)

    def draw_run(name):
        figures.draw_all(argparse.Namespace(run=runs / name, out=tmp_path, root=""))
        return {file.name for file in tmp_path.iterdir() if imread(file).std() > 0}

    return draw_run


def test_a_run_gives_the_four_figures_of_the_readme(draw):
    assert draw("vqseg") == {"model.png", "qpm.png", "vq.png", "data.png"}


def test_a_run_without_a_codebook_is_refused(draw):
    with pytest.raises(data.BadInput, match="supervised: has no codebook"):
        draw("supervised")


def test_effective_neighbors_are_all_others_for_infinite_temperature_and_one_near_zero():
    codebook = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    every = torch.arange(4)
    all_others = figures.effective_neighbors(every, codebook, math.inf)
    nearest = figures.effective_neighbors(every, codebook, 0.01)
    torch.testing.assert_close(all_others, torch.full((4,), 3.0))
    torch.testing.assert_close(nearest, torch.ones(4))


def test_codewords_in_use_are_those_of_all_training_slices_at_once(monkeypatch):
    # Two patients: more slices than are taken at once.
    monkeypatch.setattr(data, "PHANTOM_SPLIT", SPLIT | {"train": ["001", "002"]})
    dataset = data.load("phantom", parts=("train",))
    torch.manual_seed(0)
    model = VQSeg(width=4, codebook_size=8, dim=4).eval()
    with torch.no_grad():
        tokens = model.encoder(data.crop_center(dataset.images)[:, None]).z
        expected = model.quantizer(tokens).indices.flatten().bincount(minlength=8)
    assert figures.codewords_in_use(model, dataset).equal(expected > 0)


@pytest.mark.parametrize("content", ["{", '{"step": 1}\n\n'])
def test_a_log_that_is_damaged_is_one_line(tmp_path, content):
    (tmp_path / "log.jsonl").write_text(content)
    with pytest.raises(BadInput, match="log.jsonl: damaged; remove it"):
        figures.draw_curves(tmp_path / "curves.png", tmp_path / "log.jsonl")
