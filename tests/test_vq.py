"""Quantizer: Eq. 2 against brute force, who gets a gradient, usage by hand."""

import math

import numpy as np
import pytest
import torch

import vq


@pytest.mark.parametrize("shape, K, D", [((50,), 16, 4), ((2, 3, 5), 7, 3), ((300,), 65536, 8)])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_eq2_nearest_equals_brute_force(shape, K, D, offset):
    g = torch.Generator().manual_seed(0)
    z, c = torch.randn(*shape, D, generator=g) + offset, torch.randn(K, D, generator=g) + offset
    found, (Z, C) = vq.nearest(z, c), (t.double().numpy().reshape(-1, D) for t in (z, c))
    ours = np.linalg.norm(Z - C[found.flatten().numpy()], axis=1)
    best = np.array([np.linalg.norm(C - row, axis=1).min() for row in Z])
    assert found.shape == shape and np.allclose(ours, best, atol=1e-4)


def test_eq2_under_autocast_is_off_by_no_more_than_rounded_tokens_and_restores_the_precision():
    g = torch.Generator().manual_seed(0)
    z, c = (torch.nn.functional.normalize(torch.randn(n, 384, generator=g), dim=1) for n in (200, 4096))
    with torch.autocast("cpu", torch.bfloat16):
        found = vq.nearest(z, c)
    squared = torch.cdist(z.double(), c.double()).square()
    excess = squared[torch.arange(200), found] - squared.amin(1)
    assert excess.max() <= 1e-3 and excess.mean() < 1e-4  # exactly 0 on a CPU that has no bfloat16 product
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("K", [1, 7, 12, 128, 384])
def test_argmax_in_two_passes_is_the_first_largest(K):
    table = torch.randint(0, 5, (50, K), generator=torch.Generator().manual_seed(K)).float()
    assert vq.argmax(table).tolist() == table.numpy().argmax(1).tolist()


def test_eq2_memory_is_bounded(monkeypatch):
    sizes, original = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: sizes.append((out := original(*a, **k)).numel()) or out)
    vq.nearest(torch.randn(600, 2), torch.randn(65536, 2))
    assert sum(sizes) == 600 * 65536 and max(sizes) <= 2**24


def test_straight_through_is_the_codeword_forward_and_the_identity_backward():
    z, e = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    upstream = torch.randn(5, 3)
    out = vq.straight_through(z, e)
    (out * upstream).sum().backward()
    assert torch.allclose(out, e) and torch.equal(z.grad, upstream) and e.grad is None


def test_codebook_loss_value_and_beta_on_the_tokens_side():
    z, e = torch.tensor([[1.0, 2.0], [0.0, 0.0]], requires_grad=True), torch.tensor([[0.0, 2.0], [0.0, 3.0]], requires_grad=True)
    loss = vq.codebook_loss(z, e, beta=0.25)  # squared lengths 1 and 9, mean 5, times 1.25
    loss.backward()
    assert loss.item() == pytest.approx(6.25)
    assert torch.allclose(z.grad, 0.25 * (z - e).detach()) and torch.allclose(e.grad, (e - z).detach())  # 2 (.) / N, N = 2


def test_usage_loss_is_minus_log_k_at_best_and_0_at_worst_and_equals_numpy():
    c = torch.eye(4)
    assert vq.usage_loss(c, c, 0.01).item() == pytest.approx(-math.log(4), abs=1e-4)
    assert vq.usage_loss(c[:1].expand(5, 4), c, 0.5).item() == pytest.approx(0, abs=1e-5)
    z = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    p = np.exp(-((z.numpy()[:, None] - c.numpy()[None]) ** 2).sum(2) / 0.7)
    p /= p.sum(1, keepdims=True)
    expected = -(p * np.log(p)).sum(1).mean() + (p.mean(0) * np.log(p.mean(0))).sum()
    assert vq.usage_loss(z, c, 0.7).item() == pytest.approx(expected, abs=1e-5)


def test_usage_loss_of_two_processes_has_the_mean_assignment_of_both():
    g = torch.Generator().manual_seed(0)
    (a, b), c = torch.randn(2, 6, 4, generator=g), torch.randn(8, 4, generator=g)
    there, here = (torch.softmax(-(torch.cdist(z, c) ** 2) / 0.7, 1).sum(0) for z in (b, a))  # what the other process has in its sum
    halves = vq.usage_loss(a, c, 0.7, lambda x: x + there), vq.usage_loss(b, c, 0.7, lambda x: x + here)
    assert (sum(halves) / 2).item() == pytest.approx(vq.usage_loss(torch.cat([a, b]), c, 0.7).item(), abs=1e-5)
    assert halves[0].item() != pytest.approx(vq.usage_loss(a, c, 0.7).item(), abs=1e-3)


def test_usage_by_hand():
    used = vq.usage(torch.tensor([2, 2, 0, 0, 0, 0, 0, 0]))
    assert used.utilization == 0.25 and used.perplexity == pytest.approx(2)
    once = vq.usage(torch.tensor([3, 0, 0, 0, 0, 1, 0, 0]))  # entropy of 3/4, 1/4
    assert once.utilization == 0.25 and once.perplexity == pytest.approx(math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4)))
    assert vq.usage(torch.tensor([0, 0, 0, 3])).perplexity == pytest.approx(1)


def test_linear_map_moves_every_codeword_and_the_frozen_table_never_moves():
    torch.manual_seed(0)
    quantizer = vq.VectorQuantizer(64, 4)
    before, table = quantizer.codebook.detach().clone(), quantizer.table.clone()
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=1.0)
    quantizer(torch.nn.functional.normalize(torch.randn(1, 4, 2, 2), dim=1)).loss.backward()
    optimizer.step()
    assert torch.equal(quantizer.table, table) and [n for n, _ in quantizer.named_parameters()] == ["linear.weight"]
    assert ((quantizer.codebook - before).norm(dim=1) > 0).all()


def test_codes_are_the_codebook_at_the_indices_and_of_unit_length():
    torch.manual_seed(0)
    quantizer, z = vq.VectorQuantizer(16, 5), torch.randn(2, 5, 3, 4)
    q = quantizer(z)
    assert q.codes.shape == (2, 5, 3, 4) and q.indices.shape == (2, 3, 4) and q.loss.shape == ()
    assert torch.allclose(q.codes, quantizer.indices_to_codes(q.indices), atol=1e-6)
    assert torch.allclose(quantizer.codebook.norm(dim=1), torch.ones(16), atol=1e-5)


def test_quantize_gives_the_codes_of_the_forward_pass():
    torch.manual_seed(0)
    quantizer, z = vq.VectorQuantizer(16, 5), torch.randn(2, 5, 3, 4)
    assert torch.allclose(quantizer.quantize(z), quantizer(z).codes, atol=1e-6)


def test_quantizer_loss_is_codebook_loss_plus_weighted_usage_of_an_even_sample():
    torch.manual_seed(0)
    quantizer = vq.VectorQuantizer(16, 5, beta=0.5, usage_weight=0.3, usage_tokens=3)
    z = torch.randn(2, 5, 3, 4)
    q, tokens = quantizer(z), z.permute(0, 2, 3, 1).reshape(24, 5)
    expected = vq.codebook_loss(tokens, quantizer.codebook[q.indices.flatten()], 0.5) + 0.3 * vq.usage_loss(tokens[::4], quantizer.codebook)
    assert torch.equal(q.codebook, quantizer.codebook)
    assert q.loss.item() == pytest.approx(expected.item(), rel=1e-5)
