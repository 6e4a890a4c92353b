"""Losses against hand-worked pixels and float64 loops: Eq. 8 to 12."""

import math

import numpy as np
import pytest
import torch

import losses


def test_eq8_to_eq10_on_two_pixels_by_hand():
    x, x_hat = torch.tensor([[[[0.2, 0.8]]]]), torch.tensor([[[[0.5, 0.7]]]])  # L1: (0.3 + 0.1) / 2 = 0.2
    y_hat = torch.log(torch.tensor([[[[0.9, 0.4]], [[0.1, 0.6]]]]))  # probabilities of class 0 and 1 at two pixels
    y = torch.tensor([[[0, 1]]])
    seg = -(math.log(0.9) + math.log(0.6)) / 2
    l_l = losses.labelled_loss(x_hat, x, y_hat, y)
    assert [v.item() for v in l_l] == pytest.approx([0.2 + seg, 0.2, seg])
    teacher = torch.log(torch.tensor([[[[0.8, 0.55]], [[0.2, 0.45]]]]))  # says class 0 at both, surely at the first only
    l_u = losses.unlabelled_loss(x_hat, x, y_hat, losses.pseudo_label(teacher))
    seg_u = -(math.log(0.9) + math.log(0.4)) / 2
    assert l_u.seg.item() == pytest.approx(seg_u)
    sure = losses.unlabelled_loss(x_hat, x, y_hat, losses.pseudo_label(teacher, 0.7))
    assert sure.seg.item() == pytest.approx(-math.log(0.9) / 2)  # mean over all pixels
    assert losses.dual_branch_loss(l_l.total, l_u.total, 3.0).item() == pytest.approx(0.2 + seg + 3 * (0.2 + seg_u))


@pytest.mark.parametrize("tau", [0.07, 1.0])
def test_eq11_equals_loops_in_float64(tau):
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 5, 2, 3, generator=g), torch.randn(2, 5, 2, 3, generator=g)
    A, B, per_image = a.double().flatten(2).numpy(), b.double().flatten(2).numpy(), []
    for m in range(2):
        cos = [[A[m, :, i] @ B[m, :, j] / np.linalg.norm(A[m, :, i]) / np.linalg.norm(B[m, :, j]) for j in range(6)] for i in range(6)]
        per_image.append(-np.mean([math.log(math.exp(cos[i][i] / tau) / sum(math.exp(c / tau) for c in cos[i])) for i in range(6)]))
    assert losses.alignment_loss(a, b, tau).item() == pytest.approx(np.mean(per_image), rel=1e-5)
    assert losses.alignment_loss(3 * a, 0.1 * b, tau).item() == pytest.approx(np.mean(per_image), rel=1e-5)


def test_eq11_is_as_exact_under_autocast():
    g = torch.Generator().manual_seed(0)
    features = torch.randn(2, 5, 6, 6, generator=g)
    near = features + 0.05 * torch.randn(2, 5, 6, 6, generator=g)
    with torch.autocast("cpu", torch.bfloat16):
        loss = losses.alignment_loss(near, features)
    a, b = (t.double().flatten(2).numpy() for t in (near, features))
    logits = np.einsum("mdi,mdj->mij", a / np.linalg.norm(a, axis=1, keepdims=True), b / np.linalg.norm(b, axis=1, keepdims=True)) / 0.07
    expected = np.log(np.exp(logits).sum(2)).mean() - logits.diagonal(0, 1, 2).mean()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, abs=1e-5)


def test_eq11_is_log_n_for_equal_features_and_0_for_matched_ones():
    assert losses.alignment_loss(torch.ones(1, 3, 4, 4), torch.ones(1, 3, 4, 4)).item() == pytest.approx(math.log(16), rel=1e-5)
    matched = torch.eye(9).reshape(1, 9, 3, 3)
    values = [losses.alignment_loss(matched, matched, tau).item() for tau in (1.0, 0.3, 0.05)]
    assert values[0] > values[1] > values[2] and values[2] < 1e-6


def test_eq11_gradient_reaches_the_adapter_and_never_the_foundation_model():
    a, b = (torch.randn(1, 3, 2, 2, requires_grad=True) for _ in range(2))
    losses.alignment_loss(a, b).backward()
    assert a.grad.any() and b.grad is None
    with pytest.raises(ValueError):
        losses.alignment_loss(a, torch.ones(1, 3, 4, 4))


def test_eq12_adds_with_its_weight():
    assert losses.total_loss(torch.tensor(2.0), torch.tensor(0.5), 5.0).item() == 4.5


def test_pseudo_label_carries_no_gradient_and_no_kept_pixel_is_finite():
    teacher = torch.randn(1, 3, 2, 2, requires_grad=True)
    pseudo = losses.pseudo_label(teacher, 1.0)
    assert torch.equal(pseudo.label, teacher.argmax(1)) and not pseudo.keep.any() and not pseudo.keep.requires_grad
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    loss = losses.segmentation_loss(logits, pseudo.label, pseudo.keep, dice_weight=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6) and torch.isfinite(logits.grad).all()


def test_soft_dice_by_hand():
    p = torch.tensor([[[[0.2, 0.9]], [[0.8, 0.1]]]])  # class 1: 0.8, 0.1; truth 1, 0: (2*0.8+1)/(0.9+1+1)
    assert losses.soft_dice_loss(p.log(), torch.tensor([[[1, 0]]])).item() == pytest.approx(1 - 2.6 / 2.9)


def test_empty_batch_and_slices_without_foreground_give_finite_losses_and_gradients():
    for B in (0, 2):
        x_hat, logits, features = torch.rand(B, 1, 4, 4), torch.randn(B, 3, 4, 4, requires_grad=True), torch.randn(B, 5, 2, 2)
        loss = losses.labelled_loss(x_hat, torch.rand(B, 1, 4, 4), logits, torch.zeros(B, 4, 4).long(), dice_weight=1.0).total
        loss = loss + losses.alignment_loss(features, features)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(logits.grad).all() and (B > 0 or loss == 0)
