"""The paper's scale: which foundation model is in use and what is said about it, --paper, a step that never waits for its device."""

import json
from dataclasses import replace
from functools import partialmethod
from unittest import mock

import bench
import pytest
import torch
import torch.nn as nn
from test_dinov2 import official_state
from test_train import CPU, SMALL, one_step, run
from torch._subclasses.fake_tensor import FakeTensorMode

import data
import model
import train
from data import BadInput
from train import Settings


@pytest.fixture(autouse=True)
def no_cached_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "vits.pth"
    torch.save(official_state(), path)
    return path


# --- foundation models


def test_auto_goes_on_without_weights_and_says_so_in_banner_record_and_result_and_none_is_silent(phantom_copy, tmp_path, capsys):
    for fm, name in (("auto", "none (--fm auto found no weights)"), ("none", "none")):
        run(phantom_copy, tmp_path / fm, steps=1, fm=fm)
        said = capsys.readouterr().out
        assert ("NO FOUNDATION MODEL" in said) == (fm == "auto") and f"foundation model: {name}\n" in said
        for file in ("record.json", "result.json"):
            assert json.loads((tmp_path / fm / file).read_text())["fm"] == name
        assert not any(n.startswith("adapter") for n in torch.load(tmp_path / fm / "best.pt", weights_only=True)["teacher"])


def test_dinov2_that_cannot_be_had_is_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", mock.Mock(side_effect=OSError("no network")))
    with pytest.raises(BadInput, match=r"--fm dinov2: its weights cannot be had; download https://.* and give --fm-weights FILE"):
        train.build(replace(SMALL, fm="dinov2"), CPU)
    with pytest.raises(BadInput, match="its weights cannot be had"):  # nor may a baseline start from random ones beside it
        train.build(replace(SMALL, fm="dinov2", encoder="dinov2", supervised=True), CPU)


@pytest.mark.parametrize("fm", ["auto", "dinov2"])
def test_weights_by_hand_are_used_frozen_and_aligned_with(weights, fm):
    student, _, loss, terms = one_step(replace(SMALL, fm=fm, fm_weights=str(weights)))
    assert terms["align"] > 0 and student.adapter.project.weight.grad.any() and student.adapter.project.out_channels == 384
    *_, frozen, _, about = train.build(replace(SMALL, fm=fm, fm_weights=str(weights)), CPU)
    assert about["fm"] == "DINOv2, 384 channels" and not any(p.requires_grad for p in frozen.parameters())


def test_any_other_model_enters_as_torchscript_and_gets_normalized_colors(tmp_path):
    net, x = nn.Conv2d(3, 5, 32, stride=32), torch.rand(2, 1, 64, 96)
    torch.jit.trace(net, torch.zeros(1, 3, 64, 64)).save(tmp_path / "fm.pt")
    fm = model.TorchScriptFM(tmp_path / "fm.pt")
    gray = x.expand(-1, 3, -1, -1)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    assert fm.channels == 5 and torch.allclose(fm(x), net((gray - mean) / deviation), atol=1e-5)
    _, _, _, terms = one_step(replace(SMALL, fm="torchscript", fm_weights=str(tmp_path / "fm.pt")))
    assert terms["align"] > 0


@pytest.mark.parametrize("content", ["nothing", "text", "vector", "weights"])
@pytest.mark.parametrize("fm", ["torchscript", "auto"])
def test_a_file_that_is_no_such_model_is_refused_in_one_line(tmp_path, content, fm):
    path = tmp_path / "fm.pt"
    if content == "text":
        path.write_text("hello")
    elif content == "vector":
        torch.jit.trace(nn.Flatten(), torch.zeros(1, 3, 8, 8)).save(path)
    elif content == "weights":
        torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(BadInput) as error:
        train.build(replace(SMALL, fm=fm, fm_weights=str(path)), CPU)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


# --- --paper


def test_paper_is_section_4_2_and_flags_beside_it_win():
    s = train.read_settings(["--paper"])
    stated = (s.encoder, s.codebook_size, s.eps, s.lambda_a, s.lambda_u, s.alpha, s.optimizer, s.lr, s.weight_decay, s.batch, s.epochs)
    assert stated == ("dinov2", 16384, 0.7, 5.0, 1.0, 0.99, "sgd", 1e-4, 3e-5, 4, 100)
    assert (s.minutes, s.steps, s.lambda_dice, s.lambda_usage, s.warmup, s.threshold, s.temperature) == (0, 0, 0, 0, 0, 0, 1)
    assert s.pieces == "all" and all(hasattr(Settings, name) for name in train.PAPER)
    s = train.read_settings(["--paper", "--steps", "20", "--lr", "0.01"])
    assert (s.steps, s.epochs, s.lr, s.codebook_size) == (20, 0, 0.01, 16384)


def test_every_trainable_tensor_of_the_paper_gets_a_gradient_and_frozen_ones_none(weights):
    s = train.read_settings(["--paper", "--fm-weights", str(weights), "--codebook-size", "256", "--classes", "4", "--device", "cpu"])
    student, teacher, fm, _, _ = train.build(s, CPU)
    official = official_state()
    assert all(torch.equal(value, official[name]) for name, value in student.encoder.vit.state_dict().items())
    x, y = torch.rand(1, 1, 70, 70), torch.randint(0, 4, (1, 70, 70))
    loss, terms = train.vqseg_loss(s, student, teacher, fm, x, y, x, x, 0.0, torch.Generator().manual_seed(0))
    loss.backward()
    assert all(torch.isfinite(value).all() for value in terms.values())
    assert [n for n, p in student.named_parameters() if p.requires_grad != (p.grad is not None and bool(p.grad.any()))] == []
    assert [n for n, p in student.named_parameters() if not p.requires_grad] == ["encoder.vit.mask_token"]
    assert all(p.grad is None for net in (teacher, fm) for p in net.parameters())


def test_epochs_are_passes_over_the_unlabelled_slices(phantom_copy, tmp_path):
    last = run(phantom_copy, tmp_path / "run", steps=0, epochs=0.1, batch=2, supervised=True)
    slices = len(data.Slices(data.open_dataset("phantom", str(phantom_copy)).training(2)[2]))
    assert last["place"]["step"] == -(-slices // 20)


def test_sgd_is_used_when_asked_for():
    *_, optimizer, _ = train.build(replace(SMALL, optimizer="sgd", lr=0.5, weight_decay=0.25), CPU)
    group = optimizer.param_groups[0]
    assert isinstance(optimizer, torch.optim.SGD) and (group["lr"], group["momentum"], group["weight_decay"]) == (0.5, 0.9, 0.25)


# --- devices


class Generator:
    """In place of a CUDA generator, which only a GPU can make."""

    device = torch.device("cuda", 0)


def fake_draw(original):
    def draw(*shape, generator, device=None, dtype=None):
        assert torch.device(device or "cpu").type == generator.device.type == "cuda", "drawn on another device than the generator's"
        return original(*shape, device=device, dtype=dtype)

    return draw


@pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch is built without CUDA")
@pytest.mark.parametrize("options", [{}, {"encoder": "dinov2", "lambda_usage": 0.0, "lambda_dice": 0.0}], ids=["conv", "dinov2"])
@pytest.mark.parametrize("perturb", ["qpm", "shuffle", "dropout"])
def test_a_step_on_cuda_mixes_no_devices_and_never_waits_for_the_gpu(options, perturb, monkeypatch):
    """Fake tensors have a device and no values: a CPU tensor among CUDA ones fails, and so does whatever must read a value back."""
    s = replace(SMALL, perturb=perturb, **options)
    network = {"classes": 4, "codebook_size": 64, "dim": 8, "width": 8, "encoder": s.encoder, "usage_weight": s.lambda_usage}
    cuda = torch.device("cuda", 0)
    with FakeTensorMode():
        with cuda, mock.patch.object(nn.Module, "to", lambda net, **kind: net):  # made there at once: fake parameters cannot be moved
            student, teacher, fm = model.VQSeg(**network, fm_channels=384), model.VQSeg(**network), model.DINOv2("small")
        for name in ("rand", "randn"):
            monkeypatch.setattr(torch, name, fake_draw(getattr(torch, name)))
        images, masks = torch.zeros(2, 1, 240, 240, device=cuda), torch.zeros(2, 240, 240, dtype=torch.uint8, device=cuda)
        x_l, y_l = data.weak_view(images, masks, Generator(), 126 if s.encoder == "dinov2" else 128)
        x_a = data.strong_view(x_l, Generator())
        with torch.autocast("cuda", torch.bfloat16):
            loss, terms = train.vqseg_loss(s, student, teacher, fm, x_l, y_l, x_l, x_a, 1.0, Generator())
        assert loss.device == cuda and all(value.device == cuda for value in terms.values())
        record = object.__new__(train.Record)
        record.terms, record.counts = [], torch.zeros(64, dtype=torch.int64, device=cuda)
        record.add(terms)
        assert record.counts.device == cuda


def test_generators_live_on_the_device_that_they_draw_for():
    tensors, picks = train.generators(CPU, 1, 2)
    assert tensors.device == CPU and picks.device == CPU
    with mock.patch.object(torch, "Generator", side_effect=lambda device="cpu": mock.Mock(manual_seed=lambda seed: torch.device(device))):
        assert train.generators(torch.device("cuda", 1), 1, 2) == (torch.device("cuda", 1), torch.device("cpu"))


def test_compiled_network_takes_the_step_of_the_plain_one(monkeypatch):
    """Traced by torch.compile and then run as it is: its C++ compiler takes minutes."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    losses = [one_step(replace(SMALL, compile=compiled))[2].item() for compiled in (False, True)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_bench_runs_and_its_plain_versions_agree_with_ours(capsys):
    bench.main(["--quick", "--device", "cpu"])
    assert capsys.readouterr().out.count("times faster") == 2
    z, codebook, device = bench.unit(50, 6, device=CPU), bench.unit(9, 6, device=CPU), torch.Generator()
    assert torch.equal(bench.plain_nearest(z, codebook), bench.vq.nearest(z, codebook))
    many = torch.arange(9).repeat(20000)
    drawn = [torch.bincount(9 * many + f(many, codebook, 0.7, 0.3, device), minlength=81) for f in (bench.plain_perturb, bench.qpm.perturb)]
    assert ((drawn[0] - drawn[1]).abs() < 6 * (drawn[0] + drawn[1] + 1).sqrt()).all()
