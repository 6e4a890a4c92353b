"""What a GPU could do differently from a CPU. Skipped where there is no CUDA device, as in CI.

    python -m pytest tests/test_cuda.py -rA

A token halfway between two codewords goes to either, by rounding. So where a step on the GPU must
equal the step on the CPU, both make the choices of the CPU.
"""

import json
import math
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import data
import evaluate
import losses
import qpm
import train
import vq

DEV = "cuda"
CPU = torch.device("cpu")
SMALL = ["--width", "8", "--codebook-size", "64", "--batch", "2", "--warmup", "0"]
SCORE_RUN = evaluate.score_run
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(),
                                reason="no CUDA device: nothing of test_cuda.py was tried")

@pytest.fixture(autouse=True)
def exact_and_small(few_phantoms, monkeypatch):
    """float32 without TF32, which keeps 11 bits; few phantoms; no tables and pictures."""
    monkeypatch.setattr(evaluate, "score_run", lambda *args: None)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)

@pytest.fixture
def dinov2_weights(tmp_path):
    """A file in the official format, with random weights."""
    dinov2 = pytest.importorskip("extras.dinov2")
    torch.manual_seed(0)
    torch.save(dinov2.DINOv2().state_dict(), tmp_path / "vits.pth")
    return str(tmp_path / "vits.pth")

def unit(*shape):
    g = torch.Generator().manual_seed(shape[0])
    return F.normalize(torch.randn(shape, generator=g), dim=-1)

# -- The same numbers ----------------------------------------------------------------------------

def share_choices(monkeypatch):
    """Random draws come from a CPU generator. Nearest codewords and pseudo-labels are kept; after
    the function that is returned was called, they are given again in the same order."""
    kept, replaying = [], []

    def shared(function):
        def choose(*args):
            if not replaying:
                kept.append(function(*args))
                return kept[-1]
            choice = kept.pop(0)  # indices (B,h,w), or a tuple of label and keep
            moved = [part.to(args[0].device) for part in choice]
            return type(choice)(*moved) if isinstance(choice, tuple) else torch.stack(moved)
        return choose

    def drawn_on_cpu(draw):
        return lambda *args, device, **how: draw(*args, **how).to(device)

    def rows_drawn_on_cpu(draw):
        return lambda rows, *args, **how: draw(rows.cpu(), *args, **how).to(rows.device)

    monkeypatch.setattr(vq, "nearest", shared(vq.nearest))
    monkeypatch.setattr(losses, "pseudo_label", shared(losses.pseudo_label))
    monkeypatch.setattr(torch, "rand", drawn_on_cpu(torch.rand))
    monkeypatch.setattr(torch, "randint", drawn_on_cpu(torch.randint))
    monkeypatch.setattr(torch, "multinomial", rows_drawn_on_cpu(torch.multinomial))
    return lambda: replaying.append(True)

def first_step(s, device):
    """The loss terms and the gradients of a first step on views that were made on the CPU."""
    g = torch.Generator().manual_seed(0)
    dataset, labeled, unlabeled = train.open_data(s, 1, CPU)
    x_l, y_l = data.weak_view(*data.batch(dataset, labeled, s.batch, g), g, dataset.eval_crop)
    x_u, _ = data.weak_view(*data.batch(dataset, unlabeled, s.batch, g), g, dataset.eval_crop)
    x_l, y_l, x_u, x_a = (
        x.to(device) for x in (data.strong_view(x_l, g), y_l, x_u, data.strong_view(x_u, g)))
    student, teacher, fm, _, _ = train.build(s, dataset, device)
    if s.supervised:
        loss, terms = train.supervised_loss(s, student, x_l, y_l)
    else:
        loss, terms = train.vqseg_loss(s, student, teacher, fm, x_l, y_l, x_u, x_a, 1.0, g)
    loss.backward()
    terms = {name: terms[name].item() for name in terms if name != "indices"}
    named = student.named_parameters()
    return terms, {name: p.grad.cpu() for name, p in named if p.grad is not None}

@pytest.mark.parametrize("kind", ["default", "supervised", "dropout", "shuffle", "paper"])
def test_step_equals_the_cpu(kind, monkeypatch, request):
    """Loss terms to 1e-4; gradients to 1e-3 of the largest number of their tensor. DPT's decoder
    has ReLUs: there rounding decides what one near 0 lets through, so lengths are compared."""
    flags = {"default": [], "supervised": ["--supervised"]}.get(kind, ["--perturb", kind])
    if kind == "paper":
        flags = ["--paper", "--fm-weights", request.getfixturevalue("dinov2_weights")]
    s = train.read_settings(SMALL + flags)
    replay = share_choices(monkeypatch)
    expected_terms, expected = first_step(s, CPU)
    replay()
    terms, gradients = first_step(s, torch.device(DEV))
    print(terms)
    assert terms == pytest.approx(expected_terms, rel=1e-4)
    assert gradients.keys() == expected.keys()
    # BatchNorm cancels most of the gradient of some biases: they are measured by the others.
    size = partial(torch.linalg.vector_norm, ord=2 if kind == "paper" else math.inf)
    least = 0.01 * max(size(gradient) for gradient in expected.values())
    errors = {}
    for name, gradient in expected.items():
        errors[name] = float(size(gradients[name] - gradient) / size(gradient).maximum(least))
    worst = max(errors, key=errors.get)
    print(f"largest relative error of a gradient: {errors[worst]:.1e}, {worst}")
    assert errors[worst] < 1e-3

def test_nearest_codeword_equals_the_cpu():
    z, codebook = unit(8192, 32), unit(1000, 32)
    best = (z.double() @ codebook.double().T).topk(2).values  # all codewords have length 1
    sure = best[:, 0] - best[:, 1] > 1e-5
    assert sure.double().mean() > 0.99
    found = vq.nearest(z.to(DEV), codebook.to(DEV)).cpu()
    assert found[sure].equal(vq.nearest(z, codebook)[sure])

# -- QPM, whose draws are the GPU's --------------------------------------------------------------

@pytest.mark.parametrize("temperature", [1.0, 0.3, 0.03])  # at 0.03 most tokens draw from their row
def test_qpm_draws_from_equation_4(temperature):
    """A million draws. With so many degrees of freedom chi-square is nearly normal."""
    K, n = 64, 15625
    codebook = unit(K, 16).to(DEV)
    indices = torch.arange(K, device=DEV).repeat(n)
    g = torch.Generator(DEV).manual_seed(0)
    drawn = qpm.perturb(indices, codebook, 0.7, temperature, g)
    observed = (K * indices + drawn).bincount(minlength=K * K).double()
    pi = qpm.transition_rows(indices[:K], codebook.double(), 0.7, temperature)
    expected = n * pi.flatten()
    rare = expected < 10  # too few for chi-square: one cell for all of them
    observed, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (observed, expected))
    chi_square = ((observed - expected).square() / expected.clamp_min(1e-9)).sum().item()
    freedom = len(expected) - 1 - K  # each codeword has n draws
    print(f"T = {temperature}: chi-square {chi_square:.0f}, {freedom} degrees of freedom")
    assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)

@pytest.mark.parametrize("temperature", [1.0, 0.03])
def test_qpm_of_no_and_of_full_strength(temperature):
    codebook = unit(64, 16).to(DEV)
    indices = torch.arange(64, device=DEV).repeat(1000).reshape(10, 80, 80)
    assert qpm.perturb(indices, codebook, 0.0, temperature).equal(indices)
    assert (qpm.perturb(indices, codebook, 1.0, temperature) != indices).all()

# -- train.py ------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["none", "dropout", "shuffle", "qpm", "supervised"])
def test_host_waits_only_for_qpm(kind, monkeypatch, tmp_path):
    """Between two log lines the host never waits for the GPU. QPM is the exception: how many tokens
    have all proposals refused must be known to the host."""
    flags = ["--supervised"] if kind == "supervised" else ["--perturb", kind]
    flags += ["--steps", "100", "--device", DEV, "--out", str(tmp_path / "run")]
    generator, summary, mode = train.generator, evaluate.summary, torch.cuda.set_sync_debug_mode

    def start_of_step(device, seed, step, rank):
        strict = "warn" if kind == "qpm" else "error"
        mode(strict if step >= 10 else "default")  # the first steps load kernels
        return generator(device, seed, step, rank)

    def log_line(*args):
        mode("default")  # until the next step: a validation follows
        return summary(*args)

    monkeypatch.setattr(train, "generator", start_of_step)
    monkeypatch.setattr(evaluate, "summary", log_line)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train.train(train.read_settings(SMALL + flags))
    finally:
        mode("default")
    waits = sum("called a synchronizing CUDA" in str(w.message) for w in caught) / 90
    print(f"{kind}: the host waits {waits:.1f} times a step")
    if kind == "qpm":
        assert 0 < waits < 4  # were it 0, the other kinds would prove nothing

@pytest.mark.parametrize("first, second", [(DEV, "cpu"), ("cpu", DEV)])
def test_resume_on_the_other_device(first, second, tmp_path, monkeypatch):
    run, generator = str(tmp_path / "run"), train.generator

    def interrupted(device, seed, step, rank):
        if step == 7:
            raise RuntimeError("interrupted")
        return generator(device, seed, step, rank)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="interrupted"):
        patch.setattr(train, "generator", interrupted)
        train.train(train.read_settings([*SMALL, "--steps", "10", "--out", run, "--device", first]))
    run = train.train(train.read_settings(["--resume", run, "--device", second]))
    found = logged_losses(run)
    assert [*found] == [*range(1, 11)]
    assert found[6] == pytest.approx(found[5], rel=0.3)  # goes on, does not start again

def logged_losses(run):
    log = [json.loads(line) for line in (run / "log.jsonl").read_text("utf-8").splitlines()]
    return {record["step"]: record["loss"] for record in log if "loss" in record}

def test_bfloat16_training_is_finite_and_learns(tmp_path, monkeypatch):
    """The whole command, with the table and the pictures at its end."""
    monkeypatch.setattr(evaluate, "score_run", SCORE_RUN)
    assert evaluate.has_bfloat16(torch.device(DEV))
    flags = ["--steps", "50", "--warmup", "0", "--device", DEV, "--out", str(tmp_path / "run")]
    run = train.train(train.read_settings(flags))
    found = [*logged_losses(run).values()]
    assert len(found) == 50 and all(map(math.isfinite, found))
    assert sum(found[-10:]) < 0.9 * sum(found[:10])
    assert (run / "val.csv").exists()

def test_data_lives_on_the_gpu_where_it_fits(monkeypatch):
    s = train.read_settings([])
    found = []
    for free in (2**40, 0):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, free))
        dataset, labeled, _ = train.open_data(s, 1, torch.device(DEV))
        assert dataset.images.is_cuda == dataset.masks.is_cuda == (free > 0)
        found.append(data.batch(dataset, labeled, 8, torch.Generator(DEV).manual_seed(0)))
    for on_gpu, from_host in zip(*found):
        assert on_gpu.is_cuda and from_host.is_cuda and on_gpu.equal(from_host)
