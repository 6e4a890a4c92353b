"""Quantizer: Eq. 2 against brute force, who gets which gradient, usage by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import vq


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_eq2_nearest_equals_brute_force():
    z, codebook = random(2, 3, 5, 8), random(300, 8, seed=1)
    found = vq.nearest(z, codebook)
    apart = z.double().numpy()[..., None, :] - codebook.double().numpy()
    distances = np.linalg.norm(apart, axis=-1)
    assert np.array_equal(found.numpy(), distances.argmin(-1))


def test_eq2_never_holds_a_table_of_more_than_64_mb(monkeypatch):
    sizes = []
    original = torch.addmm

    def watched(*args, **kwargs):
        sizes.append(original(*args, **kwargs))
        return sizes[-1]

    monkeypatch.setattr(torch, "addmm", watched)
    z, codebook = random(600, 2), random(65536, 2, seed=1)
    found = vq.nearest(z, codebook)
    assert max(table.numel() for table in sizes) <= 2**24
    assert found[-1] == (codebook - z[-1]).norm(dim=1).argmin()  # the chunks keep their order


def test_straight_through_is_the_codeword_forward_and_the_identity_backward():
    z = random(5, 3).requires_grad_()
    codes = random(5, 3, seed=1).requires_grad_()
    upstream = random(5, 3, seed=2)
    out = vq.straight_through(z, codes)
    (out * upstream).sum().backward()
    assert torch.allclose(out, codes)
    assert torch.equal(z.grad, upstream)
    assert codes.grad is None


def test_codebook_loss_has_beta_on_the_tokens_side():
    z = random(4, 3).requires_grad_()
    codes = random(4, 3, seed=1).requires_grad_()
    vq.codebook_loss(z, codes, beta=0.25).backward()
    assert torch.allclose(codes.grad, 2 * (codes - z).detach() / 4)
    assert torch.allclose(z.grad, 0.25 * 2 * (z - codes).detach() / 4)


def test_usage_loss_of_sure_tokens_is_minus_log_k_on_all_codewords_and_0_on_one():
    codebook = torch.eye(4)
    assert vq.usage_loss(codebook, codebook, 0.01).item() == pytest.approx(-math.log(4), abs=1e-4)
    assert vq.usage_loss(codebook[:1], codebook, 0.01).item() == pytest.approx(0, abs=1e-4)


def test_usage_loss_equals_numpy():
    z, codebook = random(6, 4), random(5, 4, seed=1)
    squared = ((z.numpy()[:, None] - codebook.numpy()) ** 2).sum(2)
    p = np.exp(-squared / 0.7)
    p /= p.sum(1, keepdims=True)
    expected = -(p * np.log(p)).sum(1).mean() + (p.mean(0) * np.log(p.mean(0))).sum()
    assert vq.usage_loss(z, codebook, 0.7).item() == pytest.approx(expected, abs=1e-5)


def test_usage_by_hand():
    utilization, perplexity = vq.usage(torch.tensor([3, 0, 0, 0, 0, 1, 0, 0]))
    entropy = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    assert utilization == 0.25
    assert perplexity == pytest.approx(math.exp(entropy))


@pytest.fixture
def quantizer():
    torch.manual_seed(0)
    return vq.VectorQuantizer(64, 4, usage_weight=0.3)


def test_a_step_moves_all_codewords_and_never_the_frozen_table(quantizer):
    codebook, table = quantizer.codebook.detach().clone(), quantizer.table.clone()
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=1.0)
    quantizer(F.normalize(random(1, 4, 2, 2), dim=1)).loss.backward()
    optimizer.step()
    assert torch.equal(quantizer.table, table)
    assert ((quantizer.codebook - codebook).norm(dim=1) > 0).all()


def test_codewords_have_unit_length(quantizer):
    assert torch.allclose(quantizer.codebook.norm(dim=1), torch.ones(64))


def test_codes_are_the_codewords_of_the_nearest_indices(quantizer):
    z = random(2, 4, 3, 5)
    q = quantizer(z)
    assert torch.equal(q.indices, vq.nearest(z.permute(0, 2, 3, 1), quantizer.codebook))
    assert torch.allclose(q.codes, quantizer.codebook[q.indices].permute(0, 3, 1, 2), atol=1e-6)


def test_the_gradient_of_codes_passes_to_the_tokens(quantizer):
    z = random(2, 4, 3, 5).requires_grad_()
    upstream = random(2, 4, 3, 5, seed=1)
    (quantizer(z).codes * upstream).sum().backward()
    assert torch.allclose(z.grad, upstream)


def test_the_loss_is_the_codebook_loss_and_the_usage_of_a_sample(quantizer):
    z = random(2, 4, 16, 16)  # 256 tokens an image, every fifth is in the sample
    q = quantizer(z)
    tokens = z.flatten(2).transpose(1, 2)  # (2,256,4)
    codes = quantizer.codebook[q.indices.flatten(1)]
    usage = vq.usage_loss(tokens[:, ::5].reshape(-1, 4), quantizer.codebook)
    expected = vq.codebook_loss(tokens, codes, 0.25) + 0.3 * usage
    assert q.loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("side", [8, 12, 16, 24, 32, 56])  # 8, 16, 32: conv16, conv8, conv4
def test_the_usage_term_meets_all_columns_and_rows_of_the_grid(side):
    z = random(1, 4, side, side).requires_grad_()
    grads = []
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        loss = vq.VectorQuantizer(64, 4, usage_weight=weight)(z).loss
        grads.append(torch.autograd.grad(loss, z)[0])
    met = (grads[1] != grads[0]).any(1)[0]  # (h,w)
    assert met.any(0).all() and met.any(1).all()


def test_the_quantizer_stays_in_float32_under_autocast(quantizer):
    z = random(2, 4, 16, 16)
    expected = quantizer(z)
    with torch.autocast("cpu", torch.bfloat16):
        found = quantizer(z)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_without_gradient_no_loss_is_computed(quantizer):
    with torch.no_grad():
        assert quantizer(random(2, 4, 3, 5)).loss == 0
