"""QPM: Eq. 1 and 3 to 6 against integration and loops, the sampler against Eq. 4 by chi-square."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import qpm

EPS, T = 0.7, 0.5


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def codebook(K: int = 6, D: int = 3) -> torch.Tensor:
    return torch.randn(K, D, generator=seeded(), dtype=torch.float64)


def gaussian_kl(variance: float) -> float:
    """KL( N(0,1) || N(0,variance) ) by numerical integration."""
    x = np.linspace(-12, 12, 200_001)
    log_p = -0.5 * x**2 - 0.5 * math.log(2 * math.pi)
    log_q = -0.5 * x**2 / variance - 0.5 * math.log(2 * math.pi * variance)
    return float((np.exp(log_p) * (log_p - log_q)).sum() * (x[1] - x[0]))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_eq1_is_the_gaussian_kl_by_numerical_integration(p):
    assert qpm.dropout_kl(p).item() == pytest.approx(gaussian_kl(1 - p), abs=1e-6)


def transition_by_loops(c: np.ndarray, eps: float, temperature: float) -> np.ndarray:
    """Eq. 4 as it is written."""
    K = len(c)
    pi = np.zeros((K, K))
    for i in range(K):
        weights = [math.exp(-np.linalg.norm(c[i] - c[k]) / temperature) for k in range(K)]
        Z = sum(weights) - weights[i]
        for j in range(K):
            pi[i, j] = 1 - eps if i == j else eps * weights[j] / Z
    return pi


def test_eq3_to_eq6_equal_brute_force():
    c = codebook()
    K = len(c)
    pi = transition_by_loops(c.numpy(), EPS, T)
    Q = [sum(pi[i, j] / K for i in range(K)) for j in range(K)]
    kl = sum(math.log(1 / K / Q[j]) / K for j in range(K))
    prior = qpm.uniform_prior(K)
    transition = qpm.transition_rows(torch.arange(K), c, EPS, T)
    marginal = qpm.perturbed_marginal(prior, transition)
    assert prior.tolist() == [1 / K] * K
    assert np.allclose(transition, pi)
    assert np.allclose(marginal, Q)
    assert qpm.qpm_kl(prior, marginal).item() == pytest.approx(kl)


@pytest.mark.parametrize("temperature", [0.001, 1.0, math.inf])
def test_eq4_rows_sum_to_one(temperature):
    rows = qpm.transition_rows(torch.arange(6), codebook(), EPS, temperature)
    assert torch.allclose(rows.sum(1), torch.ones(6, dtype=torch.float64))


def test_figure_3_has_the_numbers_of_the_paper():
    far = 0.5 + math.log(0.70 / 0.15)  # as far as makes the nearest codeword hold 70 %
    c = torch.tensor([[0, 0], [0.5, 0], [0, far], [0, -far]], dtype=torch.float64)
    pi = qpm.transition_rows(torch.tensor([0]), c, 0.7)[0]
    assert pi.tolist() == pytest.approx([0.30, 0.49, 0.105, 0.105])


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("eps", [0.0, 0.3, 0.7, 1.0])
def test_appendix_b_bounds_hold(eps, temperature):
    c = codebook(40, 3)
    prior = qpm.uniform_prior(40)
    transition = qpm.transition_rows(torch.arange(40), c, eps, temperature)
    kl = qpm.qpm_kl(prior, qpm.perturbed_marginal(prior, transition))
    bound = qpm.qpm_kl_bound(c, eps, temperature).item()
    assert -1e-12 <= kl <= bound + 1e-12
    distances = F.pdist(c) / temperature
    expected = -math.log(1 - eps + eps * math.exp(distances.min() - distances.max()))
    assert bound == pytest.approx(expected)


@pytest.mark.parametrize("temperature", [1e-2, 1e-4])
def test_appendix_b_bound_is_finite_at_eps_1_where_exp_underflows(temperature):
    c = codebook(40, 3).float()
    distances = F.pdist(c.double()) / temperature
    expected = (distances.max() - distances.min()).item()
    assert qpm.qpm_kl_bound(c, 1.0, temperature).item() == pytest.approx(expected)


# The share of tokens that have all proposals refused: 0 at inf, 0.5 at 0.3, nearly 1 at 0.02.
@pytest.mark.parametrize("temperature", [math.inf, 1.0, 0.3, 0.02])
def test_eq4_a_million_draws_pass_chi_square(temperature):
    """All codewords in turn, so that a token that gets another's draw is noticed."""
    K, N = 8, 1_000_000
    c = F.normalize(codebook(K, 3), dim=1).float()
    indices = torch.arange(K).repeat(N // K)
    drawn = qpm.perturb(indices, c, EPS, temperature, seeded())
    counts = (K * indices + drawn).bincount(minlength=K * K).double()  # of each pair i, j
    expected = N / K * qpm.transition_rows(torch.arange(K), c, EPS, temperature).flatten().double()
    likely = expected > 5
    chi_square = ((counts - expected).square() / expected)[likely].sum().item()
    assert counts[~likely].sum() <= 30  # 9 are expected at T = 0.02
    assert chi_square < 115  # of at most 56 degrees of freedom: p is below 1e-5


def test_the_same_generator_gives_the_same_draws():
    indices = torch.arange(8).repeat(500)
    first, second = (qpm.perturb(indices, codebook(8), EPS, 0.3, seeded()) for _ in range(2))
    assert torch.equal(first, second)


def test_tokens_of_one_index_draw_independently():
    pi = qpm.transition_rows(torch.zeros(1, dtype=torch.long), codebook(8), EPS)[0]
    a, b = qpm.perturb(torch.zeros(2, 20_000, dtype=torch.long), codebook(8), EPS, 1.0, seeded())
    assert (a == b).double().mean().item() == pytest.approx(pi.square().sum().item(), abs=0.02)


def test_shuffle_exchanges_a_share_eps_of_the_indices_of_each_image():
    indices = torch.arange(64).repeat(3, 1)
    shuffled = qpm.shuffle(indices.reshape(3, 8, 8), 0.25, seeded()).flatten(1)
    assert torch.equal(shuffled.sort(1).values, indices)
    moved = shuffled != indices
    assert all(8 <= count <= 16 for count in moved.sum(1)) and not torch.equal(*moved[:2])


def test_dropout_zeroes_a_share_and_scales_the_rest():
    dropped = qpm.dropout(torch.ones(100_000), 0.8, seeded())
    assert (dropped == 0).double().mean().item() == pytest.approx(0.8, abs=0.01)
    assert torch.allclose(dropped[dropped > 0], torch.tensor(5.0))


@pytest.fixture
def tokens():
    """q(z) with gradient, its indices, and the codebook."""
    c = codebook(20, 3).float()
    indices = torch.randint(20, (2, 4, 4), generator=seeded())
    return c[indices].permute(0, 3, 1, 2).requires_grad_(), indices, c


@pytest.mark.parametrize("name", ["qpm", "shuffle", "none"])
def test_perturbed_tokens_are_codewords_and_pass_the_gradient_on(name, tokens):
    codes, indices, c = tokens
    perturbed = qpm.PERTURBATIONS[name](codes, indices, c, EPS, 1.0, seeded())
    upstream = torch.randn(perturbed.shape, generator=seeded(1))
    (perturbed * upstream).sum().backward()
    flat = perturbed.detach().permute(0, 2, 3, 1).reshape(-1, 1, 3)
    assert (flat - c).norm(dim=2).amin(1).max() < 1e-5
    assert torch.allclose(codes.grad, upstream)
    assert ((perturbed - codes).abs().amax() > 0.1) == (name != "none")


@pytest.mark.parametrize("p", [0.5, 1.0])
def test_dropped_tokens_mask_the_gradient_too(p, tokens):
    codes, indices, c = tokens
    dropped = qpm.PERTURBATIONS["dropout"](codes, indices, c, p, 1.0, seeded())
    dropped.sum().backward()
    assert torch.equal(codes.grad, torch.where(dropped != 0, 2.0, 0.0))


@pytest.mark.parametrize("eps, temperature, K",
                         [(-0.1, 1, 5), (1.1, 1, 5), (0.5, 0, 5), (0.5, 1, 1)])
def test_what_eq4_cannot_do_is_refused(eps, temperature, K):
    with pytest.raises(ValueError, match="eps must lie in"):
        qpm.perturb(torch.zeros(3, dtype=torch.long), codebook(K), eps, temperature)
