"""QPM against brute force, closed forms and frequencies: Eq. 1 and 3 to 6, Appendix A and B, Figure 3."""

import math

import numpy as np
import pytest
import torch

import qpm


def table(K: int, D: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(K, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def brute_force_pi(codebook: np.ndarray, eps: float, T: float) -> np.ndarray:
    K = len(codebook)
    pi = np.zeros((K, K))
    for i in range(K):
        weight = [0.0 if j == i else math.exp(-math.dist(codebook[i], codebook[j]) / T) for j in range(K)]
        for j in range(K):
            pi[i, j] = 1 - eps if j == i else eps * weight[j] / sum(weight)
    return pi


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("inverted", [False, True])
def test_eq1_is_the_gaussian_kl_by_numerical_integration(p, inverted):
    x, variance = np.linspace(-12, 12, 200001), 1 / (1 - p) if inverted else 1 - p
    P = np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    log_ratio = (-x * x / 2) - (-x * x / (2 * variance) - 0.5 * math.log(variance))
    assert qpm.dropout_kl(p, inverted).item() == pytest.approx((P * log_ratio).sum() * (x[1] - x[0]), abs=1e-6)


def test_eq1_variances_are_those_of_dropout():
    h = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    scaled = qpm.dropout(h, 0.3, torch.Generator().manual_seed(1))
    assert scaled.var().item() == pytest.approx(1 / 0.7, rel=0.02) and (scaled * 0.7).var().item() == pytest.approx(0.7, rel=0.02)
    assert (scaled == 0).float().mean().item() == pytest.approx(0.3, abs=0.004)


@pytest.mark.parametrize("eps, T", [(0.0, 1.0), (0.3, 0.2), (0.7, 1.0), (1.0, 3.0)])
@pytest.mark.parametrize("K, D", [(2, 3), (7, 2), (20, 8)])
def test_eq3_to_eq6_equal_brute_force(K, D, eps, T):
    c = table(K, D)
    expected = brute_force_pi(c.numpy(), eps, T)
    pi, P = qpm.transition_matrix(c, eps, T), qpm.uniform_prior(K)
    assert np.allclose(pi.numpy(), expected, atol=1e-6)
    assert np.allclose(P.numpy(), [1 / K] * K)
    Q = qpm.perturbed_marginal(P, pi)
    by_hand = np.array([sum(expected[i, j] / K for i in range(K)) for j in range(K)])
    assert np.allclose(Q.numpy(), by_hand, atol=1e-6) and Q.sum().item() == pytest.approx(1)
    assert qpm.qpm_kl(P, Q).item() == pytest.approx(-sum(math.log(K * q) for q in by_hand) / K, abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_eq4_rows_sum_to_one_and_prefer_the_nearest(seed):
    c = table(12, 3, seed)
    pi = qpm.transition_matrix(c, 0.6)
    assert torch.allclose(pi.sum(1), torch.ones(12, dtype=torch.float64)) and torch.allclose(pi.diag(), torch.full((12,), 0.4).double())
    away = torch.cdist(c, c).fill_diagonal_(math.inf)
    assert torch.equal(pi.clone().fill_diagonal_(0).argmax(1), away.argmin(1))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(qpm.transition_matrix(c[order], 0.6), pi[order][:, order])


def test_eq4_temperature_goes_from_nearest_neighbor_to_uniform():
    c = table(9, 4)
    away = torch.cdist(c, c).fill_diagonal_(math.inf)
    nearest = torch.nn.functional.one_hot(away.argmin(1), 9).double()
    assert torch.allclose(qpm.transition_matrix(c, 1.0, 1e-6), nearest)
    assert torch.allclose(qpm.transition_matrix(c, 1.0, math.inf), (1 - torch.eye(9).double()) / 8)
    everyone = torch.arange(9)
    assert torch.allclose(qpm.effective_neighbors(everyone, c, 1e-6), torch.ones(9).double())
    assert torch.allclose(qpm.effective_neighbors(everyone, c, math.inf), torch.full((9,), 8.0).double())


def test_mean_displacement_is_the_expected_distance():
    c, pi = table(7, 3), brute_force_pi(table(7, 3).numpy(), 0.6, 0.5)
    expected = [sum(pi[i, j] * math.dist(c[i], c[j]) for j in range(7)) for i in range(7)]
    assert qpm.mean_displacement(torch.arange(7), c, 0.6, 0.5).tolist() == pytest.approx(expected, rel=1e-5)


def test_figure_3_numbers():
    row = qpm.transition_matrix(qpm.figure_3_codebook(), 0.7)[0].tolist()
    assert row[:2] == pytest.approx([0.30, 0.49]) and sum(row[2:]) == pytest.approx(0.21)


def test_eq6_is_zero_at_eps_0_and_for_a_simplex_and_grows_with_eps():
    P = qpm.uniform_prior(6)
    values = [qpm.qpm_kl(P, qpm.perturbed_marginal(P, qpm.transition_matrix(table(6, 2), e))).item() for e in (0, 0.3, 0.6, 1.0)]
    assert values[0] == pytest.approx(0, abs=1e-12) and values == sorted(values) and values[-1] > 1e-3
    simplex = qpm.perturbed_marginal(P, qpm.transition_matrix(torch.eye(6).double(), 0.9))
    assert qpm.qpm_kl(P, simplex).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("eps", [0.2, 0.7, 1.0])
def test_appendix_b_bounds_hold(seed, eps):
    K = 10
    c = table(K, 1 + seed, seed)
    d = [math.dist(c[i], c[j]) for i in range(K) for j in range(K) if i != j]
    low, P = math.exp(-(max(d) - min(d))), qpm.uniform_prior(K)
    Q = qpm.perturbed_marginal(P, qpm.transition_matrix(c, eps))
    bound = qpm.qpm_kl_bound(c, eps).item()
    assert bound == pytest.approx(-math.log(1 - eps + eps * low), rel=1e-6)
    assert (Q >= (1 - eps + eps * low) / K - 1e-12).all() and 0 <= qpm.qpm_kl(P, Q).item() <= bound
    at_half = qpm.qpm_kl_bound(c, eps, 0.5).item()  # temperature 0.5 doubles every distance
    assert at_half == pytest.approx(-math.log(1 - eps + eps * low**2), rel=1e-6)
    if eps == 1.0:
        assert bound == pytest.approx(max(d) - min(d), rel=1e-6) and (Q <= min(1, 1 / low / K) + 1e-12).all()


@pytest.mark.parametrize("T", [0.05, 0.5, 5.0])
@pytest.mark.parametrize("proposals", [0, 1, 16])  # 0: as on a GPU, each token by its row; 1: many of them; 16: few, unless T is small
def test_eq4_a_million_draws_pass_chi_square(T, proposals, monkeypatch):
    K, n, c = 6, 1_000_000, table(6, 2).float()
    monkeypatch.setattr(qpm, "DRAWS", 2 + 2 * proposals)
    if proposals == 0:
        monkeypatch.setattr(qpm, "propose", lambda i, *_: (i, torch.zeros(len(i), dtype=torch.bool)))
    drawn = qpm.perturb(torch.full((n,), 2), c, 0.7, T, torch.Generator().manual_seed(0))
    expected = n * brute_force_pi(c.double().numpy(), 0.7, T)[2]
    chi2 = ((torch.bincount(drawn, minlength=K).numpy() - expected) ** 2 / (expected + 1e-9)).sum()
    assert chi2 < 20.5  # 5 degrees of freedom: exceeded once in 1000


def test_perturb_identity_at_eps_0_never_itself_at_eps_1_and_its_share_between():
    c, i = table(32, 4).float(), torch.randint(0, 32, (4, 100, 50), generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(1)
    assert torch.equal(qpm.perturb(i, c, 0.0, 1.0, g), i)
    assert not (qpm.perturb(i, c, 1.0, 1.0, g) == i).any()
    share = (qpm.perturb(i, c, 0.7, 1.0, g) != i).float().mean().item()
    assert abs(share - 0.7) < 4 * math.sqrt(0.7 * 0.3 / i.numel())


@pytest.mark.parametrize("K", [2, 5, 1000])
@pytest.mark.parametrize("u", [0.0, 1 - 2**-24, 1 - 2**-53])  # the least that torch.rand gives, the largest in float32 and in float64
@pytest.mark.parametrize("T", [1.0, 1e-3])
def test_perturb_at_the_ends_of_the_unit_interval_never_leaves_the_codebook_nor_gives_itself(K, u, T, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *shape, dtype, **options: torch.full(shape, u, dtype=dtype))
    i, c = torch.arange(K), table(K, 3).float()
    drawn = qpm.perturb(i, c, 1.0, T)
    assert not (drawn == i).any() and drawn.min() >= 0 and drawn.max() < K and torch.equal(qpm.perturb(i, c, 0.0, T), i)


def test_a_nan_stays_in_the_codebook():
    """So that the loss says it, and no index out of range."""
    drawn = qpm.perturb(torch.arange(5), torch.full((5, 3), torch.nan), 1.0, 1.0, torch.Generator().manual_seed(0))
    assert drawn.min() >= 0 and drawn.max() < 5


@pytest.mark.parametrize("T", [1.0, 0.05])
def test_perturb_needs_no_k_by_k_table_and_leaves_the_global_generator_alone(T, monkeypatch):
    sizes, original = [], qpm.transition_rows
    monkeypatch.setattr(qpm, "transition_rows", lambda *a: sizes.append((out := original(*a)).numel()) or out)
    proposed, by_rejection = [], qpm.propose
    monkeypatch.setattr(qpm, "propose", lambda i, *a: proposed.append(len(i)) or by_rejection(i, *a))
    state, c = torch.get_rng_state(), torch.nn.functional.normalize(table(16384, 4).float())
    drawn = qpm.perturb(torch.arange(2000), c, 0.7, T, torch.Generator().manual_seed(0))
    assert max(sizes) <= 2**22 and max(proposed) <= 1024 < sum(proposed) and torch.equal(torch.get_rng_state(), state)
    moved = (drawn != torch.arange(2000)).sum().item()
    assert sum(sizes) < (0.05 if T == 1.0 else 1.0) * moved * 16384  # at T = 1 few of those that move need a row


def test_perturb_draws_the_tokens_of_a_batch_as_it_draws_them_apart():
    """What two processes need to be one: the numbers of the second half are those after the first half's."""
    c, i = table(64, 3).float(), torch.arange(64).repeat(20)
    together, g = qpm.perturb(i, c, 0.7, 0.5, torch.Generator().manual_seed(4)), torch.Generator().manual_seed(4)
    assert torch.equal(together, torch.cat([qpm.perturb(half, c, 0.7, 0.5, g) for half in i.split(640)]))
    g = torch.Generator().manual_seed(4)
    torch.rand(640 * qpm.DRAWS, generator=g, dtype=torch.float64)
    assert torch.equal(together[640:], qpm.perturb(i[640:], c, 0.7, 0.5, g))


@pytest.mark.parametrize("eps, T, K", [(1.5, 1, 4), (-0.1, 1, 4), (0.5, 0, 4), (0.5, 1, 1)])
def test_values_out_of_range_are_refused(eps, T, K):
    with pytest.raises(ValueError):
        qpm.perturb(torch.zeros(3).long(), table(K, 2), eps, T)


def test_shuffle_keeps_each_images_histogram_and_moves_eps_of_the_places():
    i = torch.arange(200).reshape(2, 10, 10)
    out = qpm.shuffle(i, 0.4, torch.Generator().manual_seed(0))
    assert torch.equal(out.flatten(1).sort(1).values, i.flatten(1))
    assert all(30 <= int(n) <= 40 for n in (out != i).flatten(1).sum(1)) and torch.equal(qpm.shuffle(i, 0.0), i)
