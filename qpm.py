"""The Quantized Perturbation Module: perturb *which* codeword a token is, not the numbers inside it.

Implements Section 3.2 (why not dropout, Eq. 1, Appendix A), Section 3.3 (QPM, Eq. 3 to 6, Figure 3) and Appendix B.
Notation: K codewords c_1..c_K of D channels, strength eps in [0,1], d = Euclidean distance. Logarithms are natural (nats).

The paper does not say:
  - the scale of d in Eq. 4. In many dimensions codewords lie almost equally far apart, and exp(-d) then cannot tell near
    from far: Eq. 4 becomes uniform replacement. We divide d by a temperature T (T = 1 is the paper's formula) and count
    what it does with `effective_neighbors`.
  - which of two perturbations it means. The abstract *shuffles the spatial locations of codebook indices*; Section 3.3 and
    Figure 3 *resample* each index from pi(.|i). They differ: only a shuffle keeps the histogram of indices, only
    resampling knows distances. `perturb` is Eq. 4 and the default; `shuffle` is the abstract, to compare.
The authors' release resamples with the *squared* distance, eps = 0.1 and a Python loop over the distinct codes.

Run `python qpm.py` for Figure 3's example in numbers, and Eq. 1 against Eq. 6 in figures/qpm.png.
"""

import math

import torch
from torch import Tensor


def dropout_kl(p: Tensor, inverted: bool = False) -> Tensor:
    """Eq. 1, Appendix A: KL(P||Q) ~= 1/2 ( p/(1-p) + log(1-p) ), P = N(0, s^2), Q = N(0, (1-p) s^2). p in [0,1).

    That is dropout without rescaling, the paper's. inverted=True is what nn.Dropout does: it multiplies what it keeps by
    1/(1-p), so Q = N(0, s^2/(1-p)) and KL = 1/2 ( -p - log(1-p) ). Both are 0 at p = 0 and diverge as p -> 1.
    """
    p = torch.as_tensor(p, dtype=torch.float64)
    if inverted:
        return 0.5 * (-p - torch.log1p(-p))
    return 0.5 * (p / (1 - p) + torch.log1p(-p))


def uniform_prior(codebook_size: int) -> Tensor:
    """Eq. 3: P(c_i) = 1/K. (K,) float64."""
    return torch.full((codebook_size,), 1 / codebook_size, dtype=torch.float64)


def distances(codewords: Tensor, codebook: Tensor) -> Tensor:
    """d(c_i, c_j) = || c_i - c_j ||_2: (N,D), (K,D) -> (N,K). One matrix product; centered first to keep digits."""
    center = codebook.mean(0)
    a, b = codewords - center, codebook - center
    squared = torch.addmm(b.square().sum(1), a, b.T, alpha=-2) + a.square().sum(1, keepdim=True)
    return squared.clamp_min(0).sqrt()


def transition_rows(indices: Tensor, codebook: Tensor, eps: float, temperature: float = 1.0) -> Tensor:
    """Rows pi(.|i) of Eq. 4 for the given i: indices (N,), codebook (K,D) -> (N,K), each row sums to one.

    pi(j|i) = 1 - eps                                            if j = i
            = eps * exp(-d(c_i,c_j)/T) / Z_i                     if j != i,   Z_i = sum_{k != i} exp(-d(c_i,c_k)/T)
    T -> 0 takes the nearest neighbor, T = inf any other codeword alike.
    """
    if not 0 <= eps <= 1:
        raise ValueError(f"eps must lie in [0, 1], not {eps}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    if len(codebook) < 2:
        raise ValueError("a codebook of one codeword has nothing to exchange")
    own = indices[:, None]
    closeness = distances(codebook[indices], codebook) * (-1 / temperature)  # (N,K)
    others = closeness.scatter_(1, own, -math.inf).softmax(1)  # -inf: j = i takes no part in Z_i
    return (eps * others).scatter_(1, own, 1 - eps)


def transition_matrix(codebook: Tensor, eps: float, temperature: float = 1.0) -> Tensor:
    """Eq. 4 for all i: (K,D) -> (K,K), row i is pi(.|i)."""
    return transition_rows(torch.arange(len(codebook), device=codebook.device), codebook, eps, temperature)


def perturbed_marginal(prior: Tensor, transition: Tensor) -> Tensor:
    """Eq. 5: Q(c_j|eps) = sum_i P(c_i) pi(j|i). (K,), (K,K) -> (K,)."""
    return prior.to(transition) @ transition


def qpm_kl(prior: Tensor, marginal: Tensor) -> Tensor:
    """Eq. 6: KL(P||Q) = sum_j P(c_j) log( P(c_j) / Q(c_j|eps) ). (K,), (K,) -> ()."""
    prior = prior.to(marginal)
    return (prior * (prior / marginal).log()).sum()


def qpm_kl_bound(codebook: Tensor, eps: float, temperature: float = 1.0) -> Tensor:
    """Appendix B: KL <= -log( 1 - eps + eps exp(-(Dmax - Dmin)) ), finite for every eps; Dmax - Dmin at eps = 1.

    Dmin <= d(c_i,c_j)/T <= Dmax over all i != j.
    """
    d = distances(codebook, codebook) / temperature
    apart = d[~torch.eye(len(codebook), dtype=torch.bool, device=d.device)]
    spread = apart.max() - apart.min()
    return -torch.log(1 - eps + eps * torch.exp(-spread))


def perturb(indices: Tensor, codebook: Tensor, eps: float, temperature: float = 1.0,
            generator: torch.Generator | None = None) -> Tensor:
    """QPM: replace each index i by a draw j ~ pi(.|i) of Eq. 4, independently per token. indices (...) -> (...).

    All tokens at once, by inverting the cumulative distribution of each token's own row: one uniform number per token, no
    loop over codes, no K x K matrix: 8 MB of rows at a time, which stay in the cache and take a third of the time of 64 MB.
    The generator must live on the indices' device.
    """
    K = len(codebook)
    with torch.no_grad(), torch.autocast(codebook.device.type, enabled=False):
        flat = indices.reshape(-1)  # (N,)
        uniform = torch.rand(len(flat), 1, generator=generator, device=flat.device, dtype=codebook.dtype)
        drawn = []
        for part, u in zip(flat.split(max(1, 2**21 // K)), uniform.split(max(1, 2**21 // K))):
            cumulative = transition_rows(part, codebook, eps, temperature).cumsum(1)
            total = cumulative[:, -1:]  # 1 but for rounding
            # Subtle: strictly below the total, so that the step found there has positive probability: eps = 0 is exactly
            # the identity, and eps = 1 never gives i back.
            target = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
            drawn.append(torch.searchsorted(cumulative, target, right=True)[:, 0])
    return torch.cat(drawn).reshape(indices.shape)


def shuffle(indices: Tensor, eps: float, generator: torch.Generator | None = None) -> Tensor:
    """The abstract's reading: round(eps * h*w) positions of each image exchange their indices. (B,h,w) -> (B,h,w)."""
    if not 0 <= eps <= 1:
        raise ValueError(f"eps must lie in [0, 1], not {eps}")
    B, h, w = indices.shape
    flat = indices.reshape(B, h * w)
    order = torch.rand(B, h * w, generator=generator, device=indices.device).argsort(1)
    chosen = order[:, : round(eps * h * w)]  # (B,n) distinct positions in random order
    moved = flat.scatter(1, chosen.sort(1).values, flat.gather(1, chosen))
    return moved.reshape(B, h, w)


def dropout(codes: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    """What Section 3.2 argues against: each number of q(z) is zeroed with probability p, the others scaled by 1/(1-p)."""
    if not 0 <= p <= 1:
        raise ValueError(f"dropout rate must lie in [0, 1], not {p}")
    kept = torch.rand(codes.shape, generator=generator, device=codes.device) >= p
    return torch.where(kept, codes / max(1 - p, 1e-12), torch.zeros_like(codes))


def effective_neighbors(indices: Tensor, codebook: Tensor, temperature: float = 1.0) -> Tensor:
    """exp(H(pi(.|i), j != i)), in [1, K-1]: among how many codewords Eq. 4 really chooses a replacement. (N,) -> (N,)."""
    p = transition_rows(indices, codebook, 1.0, temperature)
    return (-torch.special.xlogy(p, p).sum(1)).exp()


def figure_3_codebook() -> Tensor:
    """Four codewords in the plane with the paper's Figure 3: at eps = 0.7, pi(1|1) = 0.30 and pi(2|1) = 0.49.

    The nearest codeword holds 70 % of the off-diagonal mass if exp(-d_12) = 0.7 Z_1; with the other two equally far,
    d_13 = d_14 = d_12 + log(0.70 / 0.15). We put c_2 at distance 0.5 from c_1.
    """
    far = 0.5 + math.log(0.70 / 0.15)
    return torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.0, far], [0.0, -far]], dtype=torch.float64)


def main() -> None:
    import matplotlib.pyplot as plt

    codebook, eps = figure_3_codebook(), 0.7
    pi = transition_matrix(codebook, eps)
    print(f"Figure 3, K = 4, eps = {eps}: pi(j|1) =", " ".join(f"{p:.2f}" for p in pi[0].tolist()))

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    left.scatter(codebook[:, 0], codebook[:, 1], s=80, color="black")
    for j, (x, y) in enumerate(codebook.tolist()):
        left.annotate(f"$c_{j + 1}$: $\\pi({j + 1}|1)$ = {pi[0, j]:.2f}", (x, y), xytext=(10, 8), textcoords="offset points")
    left.set(title="Figure 3: where a token of $c_1$ goes", xlabel="channel 1", ylabel="channel 2", xlim=(-0.6, 2.6), ylim=(-2.8, 2.8))

    p = torch.linspace(0, 0.99, 100, dtype=torch.float64)
    random = torch.randn(64, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prior = uniform_prior(len(random))
    kl = [qpm_kl(prior, perturbed_marginal(prior, transition_matrix(random, e))).item() for e in p.tolist()]
    bound = [qpm_kl_bound(random, e).item() for e in p.tolist()]
    middle.plot(p, dropout_kl(p), color="#D55E00", label="dropout, Eq. 1")
    middle.plot(p, dropout_kl(p, inverted=True), "--", color="#D55E00", label="inverted dropout (nn.Dropout)")
    middle.plot(p, kl, color="#0072B2", label="QPM, Eq. 6 (64 random codewords, D = 8)")
    middle.plot(p, bound, ":", color="#0072B2", label="QPM, bound of App. B")
    middle.set(title="How far a perturbation goes", xlabel="p or eps", ylabel="KL(P||Q) in nats", yscale="symlog", ylim=(0, 60))
    middle.set_yscale("symlog", linthresh=0.1)
    middle.legend(fontsize=7)

    for D, color in ((2, "#009E73"), (8, "#0072B2"), (64, "#CC79A7")):
        table = torch.nn.functional.normalize(torch.randn(1024, D, generator=torch.Generator().manual_seed(0)), dim=1)
        temperatures = torch.logspace(-3, 1, 25)
        some = torch.arange(0, 1024, 16)
        right.plot(temperatures, [effective_neighbors(some, table, t).mean() for t in temperatures.tolist()], color=color, label=f"D = {D}")
    right.set(title="1024 random unit-length codewords", xlabel="temperature T", ylabel="effective neighbors", xscale="log", yscale="log")
    right.axvline(1, color="gray", lw=0.8)
    right.legend(fontsize=8)
    figure.savefig("figures/qpm.png", dpi=110)
    print("wrote figures/qpm.png")


if __name__ == "__main__":
    main()
