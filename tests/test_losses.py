"""Losses: Eq. 8 to 12 by hand on a few pixels, Eq. 11 against loops in float64."""

import math

import pytest
import torch

import losses

# Two pixels, two classes: probabilities 3/4, 1/4 and 1/2, 1/2.
LOGITS = torch.log(torch.tensor([[[[0.75, 0.5]], [[0.25, 0.5]]]]))  # (1,2,1,2)
Y = torch.tensor([[[0, 1]]])
CROSS_ENTROPY = (math.log(4 / 3) + math.log(2)) / 2
X_HAT, X = torch.tensor([[[[0.2, 0.6]]]]), torch.tensor([[[[0.5, 0.5]]]])
L1 = 0.2  # (0.3 + 0.1) / 2


def test_eq8_by_hand():
    loss = losses.labeled_loss(X_HAT, X, LOGITS, Y)
    assert loss.rec.item() == pytest.approx(L1)
    assert loss.seg.item() == pytest.approx(CROSS_ENTROPY)
    assert loss.total.item() == pytest.approx(L1 + CROSS_ENTROPY)
    weighed = losses.labeled_loss(X_HAT, X, LOGITS, Y, rec_weight=3).total
    assert weighed.item() == pytest.approx(3 * L1 + CROSS_ENTROPY)


def test_eq9_by_hand():
    pseudo = losses.PseudoLabel(torch.tensor([[[1, 0]]]), torch.ones(1, 1, 2))
    loss = losses.unlabeled_loss(X_HAT, X, LOGITS, pseudo, rec_weight=2)
    cross_entropy = (math.log(4) + math.log(2)) / 2
    assert loss.total.item() == pytest.approx(2 * L1 + cross_entropy)


def test_eq10_by_hand():
    assert losses.dual_branch_loss(torch.tensor(2.0), torch.tensor(3.0), 0.5).item() == 3.5


def test_eq12_by_hand():
    assert losses.total_loss(torch.tensor(2.0), torch.tensor(3.0), 5.0).item() == 17.0


def test_soft_dice_by_hand_over_a_batch():
    """Twice the same image. Class 1: overlap 0.5, sizes 0.25 + 0.5 and 1; one pixel is added."""
    logits = torch.cat([LOGITS, LOGITS])
    y = torch.cat([Y, Y])
    expected = 1 - (2 * 1.0 + 1) / (1.5 + 2 + 1)
    assert losses.soft_dice_loss(logits, y).item() == pytest.approx(expected)


def test_pseudo_label_is_the_likeliest_class():
    logits = torch.tensor([[[[0.0, 3.0]], [[1.0, 2.0]], [[2.0, 1.0]]]])
    assert losses.pseudo_label(logits).label.tolist() == [[[2, 0]]]


def test_pseudo_label_keeps_pixels_that_reach_the_threshold():
    assert losses.pseudo_label(LOGITS, 0.75).keep.tolist() == [[[1.0, 0.0]]]
    assert losses.pseudo_label(LOGITS, 0.0).keep.tolist() == [[[1.0, 1.0]]]


def features(seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(2, 5, 2, 3, generator=g, dtype=torch.float64)


def test_eq11_equals_loops_in_float64():
    f_pfa, f_fm, tau = features(0), features(1), 0.2
    terms = []
    for a, b in zip(f_pfa.flatten(2), f_fm.flatten(2)):  # (C',N) of one image
        for i in range(6):
            sim = [(a[:, i] @ b[:, j] / a[:, i].norm() / b[:, j].norm()).item() for j in range(6)]
            total = sum(math.exp(s / tau) for s in sim)
            terms.append(-math.log(math.exp(sim[i] / tau) / total))
    expected = sum(terms) / len(terms)
    assert losses.alignment_loss(f_pfa, f_fm, tau).item() == pytest.approx(expected, rel=1e-5)


def test_eq11_trains_the_adapter_and_not_the_frozen_model():
    f_pfa, f_fm = features(0).requires_grad_(), features(1).requires_grad_()
    losses.alignment_loss(f_pfa, f_fm).backward()
    assert f_pfa.grad.abs().sum() > 0 and f_fm.grad is None


def test_eq11_stays_in_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        found = losses.alignment_loss(features(0), features(1))
    assert found.item() == pytest.approx(losses.alignment_loss(features(0), features(1)).item())
