"""The loop: a step walked by hand, who gets a gradient, runs that repeat and resume, refusals."""

import copy
import json
import math
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import data
import evaluate
import losses
import qpm
import train
from data import BadInput

SMALL = ["--width", "4", "--codebook-size", "32", "--batch", "2", "--device", "cpu"]
CPU = torch.device("cpu")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def step(few_phantoms):
    """One step on random images: `loss(**changes)` gives its loss and terms.

    The student is in evaluation mode, so that one branch at a time gives what all give together.
    The teacher says something else than the student.
    """
    s = train.read_settings([*SMALL, "--eps", "0.6", "--temperature", "0.3", "--lambda-dice", "0.5",
                             "--threshold", "0.3", "--lambda-a", "3", "--lambda-rec", "2"])
    student, teacher, fm, *_ = train.build(s, data.load("phantom"), CPU)
    g = seeded(5)
    for p in teacher.parameters():
        p.add_(0.3 * p.abs().mean() * torch.randn(p.shape, generator=g))
    x_l, x_u, x_a = (torch.rand(2, 1, 64, 64, generator=g) for _ in range(3))
    y_l = torch.randint(0, 4, (2, 64, 64), generator=g)
    student.adapter.grid = fm(x_l).shape[2:]
    found = SimpleNamespace(s=s, student=student.eval(), teacher=teacher, fm=fm, x_l=x_l, y_l=y_l,
                            x_u=x_u, x_a=x_a, lambda_u=0.7)

    def loss(**changes):
        v = SimpleNamespace(**(vars(found) | changes))
        return train.vqseg_loss(v.s, v.student, v.teacher, v.fm, v.x_l, v.y_l, v.x_u, v.x_a,
                                v.lambda_u, seeded(9))

    found.loss = loss
    return found


def l_seg(logits, y, keep=None):
    """Cross-entropy + 0.5 * soft Dice loss, class by class."""
    keep = torch.ones(y.shape) if keep is None else keep
    log_p = logits.log_softmax(1)
    cross_entropy = -(log_p.gather(1, y[:, None])[:, 0] * keep).mean()
    dices = []
    for c in (1, 2, 3):
        p, t = log_p[:, c].exp() * keep, (y == c) * keep
        dices.append((2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1))
    return (cross_entropy + 0.5 * (1 - sum(dices) / 3)).item()


@torch.no_grad()
def quantized(net, x):
    z, skips = net.encoder(x)
    return net.quantizer(z), skips


@torch.no_grad()
def test_eq8_terms_of_a_step_walked_by_hand(step):
    _, terms = step.loss()
    q, skips = quantized(step.student, step.x_l)
    seg = l_seg(step.student.segmentation_decoder(q.codes, skips), step.y_l)
    rec = (step.student.image_decoder(q.codes) - step.x_l).abs().mean()
    assert terms["seg_l"].item() == pytest.approx(seg, rel=1e-4)
    assert terms["rec_l"].item() == pytest.approx(rec.item(), rel=1e-4)


@torch.no_grad()
def test_eq9_segmentation_of_perturbed_tokens_against_the_teachers_label(step):
    _, terms = step.loss()
    q, skips = quantized(step.student, step.x_a)
    drawn = qpm.perturb(q.indices, q.codebook, 0.6, 0.3, seeded(9))
    codes = step.student.quantizer.indices_to_codes(drawn)
    confidence, label = step.teacher.predict(step.x_u).softmax(1).max(1)
    keep = (confidence >= 0.3).float()
    expected = l_seg(step.student.segmentation_decoder(codes, skips), label, keep)
    assert terms["seg_u"].item() == pytest.approx(expected, rel=1e-4)
    assert terms["kept"].item() == pytest.approx(keep.mean().item())
    assert (drawn != q.indices).any() and 0 < keep.mean() < 1


@torch.no_grad()
def test_eq9_reconstruction_of_unperturbed_tokens_against_the_weak_view(step):
    _, terms = step.loss()
    q, _ = quantized(step.student, step.x_a)
    expected = (step.student.image_decoder(q.codes) - step.x_u).abs().mean()
    assert terms["rec_u"].item() == pytest.approx(expected.item(), rel=1e-4)


@torch.no_grad()
def test_eq11_alignment_with_features_of_the_weak_views(step):
    _, terms = step.loss()
    expected = []
    for seen, weak in ((step.x_l, step.x_l), (step.x_a, step.x_u)):
        f_pfa = step.student.adapter(quantized(step.student, seen)[0].codes).flatten(2)
        f_fm = step.fm(weak).flatten(2)
        sim = F.cosine_similarity(f_pfa[:, :, :, None], f_fm[:, :, None, :], dim=1) / 0.07
        expected.append(-sim.log_softmax(2).diagonal(dim1=1, dim2=2).mean().item())
    assert terms["align"].item() == pytest.approx(sum(expected) / 2, rel=1e-4)


def test_the_quantizers_loss_is_that_of_all_tokens(step):
    _, terms = step.loss()
    z = step.student.encoder(torch.cat([step.x_l, step.x_a])).z
    assert terms["vq"].item() == pytest.approx(step.student.quantizer(z).loss.item(), rel=1e-4)
    assert torch.equal(terms["indices"], step.student.quantizer(z).indices)


def test_eq12_is_the_weighted_sum_of_the_terms(step):
    loss, t = step.loss()
    l_l = 2 * t["rec_l"] + t["seg_l"]
    l_u = 2 * t["rec_u"] + t["seg_u"]
    expected = l_l + 0.7 * l_u + 3 * t["align"] + t["vq"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_warm_up_leaves_the_unlabeled_batch_out(step):
    loss, terms = step.loss(lambda_u=0.0)
    other, _ = step.loss(lambda_u=0.0, x_u=1 - step.x_u, x_a=1 - step.x_a)
    assert torch.equal(loss, other)
    assert "seg_u" not in terms and "rec_u" not in terms


def test_every_part_of_the_student_learns_and_the_teacher_does_not(step):
    step.loss()[0].backward()
    assert all(p.grad is not None and p.grad.any() for p in step.student.parameters())
    assert all(p.grad is None for p in (*step.teacher.parameters(), *step.fm.parameters()))


@pytest.mark.parametrize("weight, part", [("lambda_rec", "image_decoder"), ("lambda_a", "adapter")])
def test_each_branch_gets_its_gradient_from_its_own_term(weight, part, step):
    s = copy.copy(step.s)
    setattr(s, weight, 0.0)
    step.loss(s=s)[0].backward()
    gradients = [p.grad for p in getattr(step.student, part).parameters() if p.grad is not None]
    assert not any(gradient.any() for gradient in gradients)
    assert step.student.encoder.to_tokens.weight.grad.any()


def test_a_new_perturbation_is_one_function_and_one_entry(step, monkeypatch):
    def exchange(q, i, c, eps, T, g):
        """Tokens of two images of the batch change places."""
        return qpm.replace(q, i.flip(0), c)

    monkeypatch.setitem(qpm.PERTURBATIONS, "exchange", exchange)
    s = copy.copy(step.s)
    s.perturb = "exchange"
    loss, _ = step.loss(s=s)
    loss.backward()
    warm_up, _ = step.loss(s=s, lambda_u=0.0)
    assert loss.isfinite() and warm_up.isfinite()
    assert loss != step.loss()[0]


def test_supervised_baseline_is_l_seg_on_continuous_tokens(few_phantoms):
    s = train.read_settings([*SMALL, "--supervised", "--lambda-dice", "0.5"])
    student, *_ = train.build(s, data.load("phantom"), CPU)
    x, y = torch.rand(2, 1, 64, 64), torch.randint(0, 4, (2, 64, 64))
    loss, _ = train.supervised_loss(s, student.eval(), x, y)
    assert loss.item() == pytest.approx(l_seg(student.predict(x), y), rel=1e-4)


# -- The loop


def run(out, *flags: str) -> dict:
    """Trains a little; the last checkpoint."""
    flags = [*SMALL, "--steps", "12", "--warmup", "0.25", "--out", str(out), *flags]
    folder = train.train(train.read_settings(flags))
    return torch.load(folder / "last.pt", weights_only=True)


def same(a: dict, b: dict) -> bool:
    parts = [(a[part][name], b[part][name]) for part in ("student", "teacher") for name in a[part]]
    return all(torch.equal(x, y) for x, y in parts)


def test_a_run_folder_holds_the_record_the_checkpoints_and_the_scores(few_phantoms, tmp_path):
    run(tmp_path)
    names = {file.name for file in tmp_path.iterdir()}
    assert names >= {"config.json", "log.jsonl", "last.pt", "best.pt", "val.csv"}


def test_the_same_seed_gives_the_same_bits_and_another_does_not(few_phantoms, tmp_path):
    first = run(tmp_path / "a")
    assert same(first, run(tmp_path / "b"))
    assert not same(first, run(tmp_path / "c", "--seed", "1"))


def interrupt(monkeypatch, at: int) -> None:
    original = train.generator

    def generator(device, seed, step, rank):
        if step == at:
            raise KeyboardInterrupt
        return original(device, seed, step, rank)

    monkeypatch.setattr(train, "generator", generator)


def test_a_resumed_run_ends_bitwise_like_one_without_a_stop(few_phantoms, tmp_path, monkeypatch):
    whole = run(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, 8)  # three steps after a checkpoint
        run(tmp_path / "stopped")
    folder = train.train(train.read_settings(["--resume", str(tmp_path / "stopped")]))
    resumed = torch.load(folder / "last.pt", weights_only=True)
    assert same(whole, resumed)
    assert whole["log"] == resumed["log"]


def test_masks_of_unlabeled_slices_are_never_read(few_phantoms, tmp_path, monkeypatch):
    expected = run(tmp_path / "a", "--labeled", "2")
    original = data.load

    def corrupted(*args):
        dataset = original(*args)
        if len(args) == 2:  # for training, not for the table
            _, unlabeled = dataset.training(2)
            dataset.masks[dataset.rows(unlabeled)] = 3
        return dataset

    monkeypatch.setattr(data, "load", corrupted)
    assert same(expected, run(tmp_path / "b", "--labeled", "2"))


def watched(monkeypatch, name: str) -> list:
    """The arguments of each call of a function of train.py."""
    calls = []
    original = getattr(train, name)

    def call(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(train, name, call)
    return calls


def test_the_teachers_alpha_rises_to_that_of_section_3_4(few_phantoms, tmp_path, monkeypatch):
    calls = watched(monkeypatch, "ema_update")
    run(tmp_path, "--steps", "120")
    alphas = [alpha for _, _, alpha in calls]
    assert alphas[:3] == pytest.approx([0, 1 / 2, 2 / 3])
    assert alphas[110:] == [0.99] * 10


def test_the_unlabeled_loss_counts_after_the_warm_up(few_phantoms, tmp_path, monkeypatch):
    calls = watched(monkeypatch, "vqseg_loss")
    run(tmp_path, "--lambda-u", "0.5")
    assert [args[8] for args in calls] == [0.0] * 3 + [0.5] * 9


def test_the_learning_rate_is_polynomial_after_a_short_rise(few_phantoms, tmp_path, monkeypatch):
    rates = []
    original = torch.optim.AdamW.step

    def step(optimizer):
        rates.append(optimizer.param_groups[0]["lr"])
        return original(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    run(tmp_path, "--steps", "120", "--lr", "0.002")
    expected = [0.002 * min(1, (k + 1) / 100) * (1 - k / 120) ** 0.9 for k in range(120)]
    assert rates == pytest.approx(expected)


def test_student_and_teacher_begin_alike_and_the_teacher_gets_the_student(few_phantoms, monkeypatch,
                                                                         tmp_path):
    calls = watched(monkeypatch, "ema_update")
    run(tmp_path)
    teacher, student, _ = calls[0]
    assert student.training and not teacher.training
    assert all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in teacher.parameters())


def test_best_pt_is_the_teacher_with_the_best_validation(few_phantoms, tmp_path, monkeypatch):
    scores = iter([0.1, 0.9, 0.3])
    monkeypatch.setattr(evaluate, "mean_dice", lambda rows: next(scores))
    run(tmp_path)
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert (best["step"], best["val_dice"]) == (10, 0.9)


def test_a_loss_that_is_not_finite_stops_the_run(few_phantoms, tmp_path, monkeypatch):
    monkeypatch.setattr(losses, "total_loss", lambda l_db, l_align, lambda_a: l_db * math.nan)
    with pytest.raises(FloatingPointError, match="step 1: the loss is not finite"):
        run(tmp_path)


def test_the_log_has_all_terms_and_the_use_of_the_codebook(few_phantoms, tmp_path):
    run(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    terms = {"step", "loss", "seg_l", "rec_l", "seg_u", "rec_u", "kept", "align", "vq", "used",
             "perplexity"}
    assert set(lines[-2]) == terms and set(lines[-1]) == {"step", "val_dice"}


# -- Settings


def test_there_are_at_most_28_flags():
    assert len(fields(train.Settings)) <= 28


def test_paper_sets_what_section_4_2_states():
    s = train.read_settings(["--paper"])
    found = (s.codebook_size, s.eps, s.lambda_a, s.lambda_u, s.batch, s.lr, s.encoder, s.fm)
    assert found == (16384, 0.7, 5.0, 1.0, 4, 1e-4, "dinov2", "dinov2")
    assert (s.lambda_dice, s.lambda_usage, s.warmup, s.threshold) == (0, 0, 0, 0)


def test_a_flag_beside_paper_wins():
    assert train.read_settings(["--paper", "--eps", "0.5"]).eps == 0.5


def test_paper_without_weights_is_refused(few_phantoms, monkeypatch):
    dinov2 = pytest.importorskip("extras.dinov2")
    monkeypatch.setattr(dinov2, "official_weights", lambda: None)
    with pytest.raises(BadInput, match="--fm-weights FILE"):
        train.train(train.read_settings(["--paper", "--device", "cpu"]))


@pytest.mark.parametrize("flag, value", [("--eps", "1.5"), ("--batch", "0"), ("--temperature", "0"),
                                         ("--codebook-size", "1"), ("--lambda-u", "-1")])
def test_a_value_out_of_range_names_its_flag(flag, value):
    with pytest.raises(BadInput, match=f"{flag} .*must be"):
        train.read_settings([flag, value])


def test_more_labeled_patients_than_there_are_is_refused(few_phantoms):
    with pytest.raises(BadInput, match="--labeled 5: only 4 training patients have masks"):
        train.train(train.read_settings([*SMALL, "--labeled", "5"]))


def test_resume_takes_the_runs_own_flags_and_refuses_others(few_phantoms, tmp_path):
    run(tmp_path, "--labeled", "2")
    own = [*SMALL, "--steps", "12", "--labeled", "2", "--out", str(tmp_path)]
    assert train.read_settings(["--resume", str(tmp_path), *own]).labeled == 2
    with pytest.raises(BadInput, match="--eps 0.1: the run began with 0.7"):
        train.read_settings(["--resume", str(tmp_path), "--eps", "0.1"])


def test_a_run_is_not_written_over(few_phantoms, tmp_path):
    run(tmp_path)
    with pytest.raises(BadInput, match="holds a run"):
        run(tmp_path)
