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
The authors' release resamples with the *squared* distance, eps = 0.1 and a Python loop over the distinct codes: over 200 times
the time of `perturb` for 2048 of 16384 codewords on a CPU (`python tests/bench.py`).

Beyond the paper, which calls eps the single control: eps says how often a token moves, the scale of d how far. Divide d by
T and the choice narrows from all K-1 codewords (T large) to the nearest one (T small). eps is the single control only where
T is so large that the distance no longer matters, and there Eq. 4 is uniform replacement. That is where T = 1 stands with
codewords of unit length in 32 dimensions, trained or not: lower row of the figure. And in training that is the end that helps:
on ACDC, T = 0.03 is worth no more than no perturbation, T = inf as much as T = 1 (README, "What held and what did not").

Run `python qpm.py [RUN]` for Figure 3's example, Eq. 1 against Eq. 6, and that scale, in figures/qpm.png.
"""

import argparse
import math
from pathlib import Path

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


def distances(indices: Tensor, codebook: Tensor, squares: Tensor | None = None) -> Tensor:
    """d(c_i, c_j) = || c_i - c_j ||_2 for the given i and all j: (N,), (K,D) -> (N,K). One matrix product.

    squares (K,): || c_k ||^2 of a codebook that is centered already (a shift changes no distance but costs digits). Who asks
    for rows in parts passes it; else both are done here.
    """
    if squares is None:
        codebook = codebook - codebook.mean(0)
        squares = codebook.square().sum(1)
    squared = torch.addmm(squares, codebook[indices], codebook.T, alpha=-2).add_(squares[indices, None])
    return squared.clamp_min_(0).sqrt_()


PROPOSALS = 16  # of `propose`
DRAWS = 2 + 2 * PROPOSALS  # uniform numbers per token: whether it moves, where to in its row, the proposals


def check(eps: float, temperature: float = 1.0, codebook_size: int = 2) -> None:
    if not 0 <= eps <= 1:
        raise ValueError(f"eps must lie in [0, 1], not {eps}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    if codebook_size < 2:
        raise ValueError("a codebook of one codeword has nothing to exchange")


def transition_rows(indices: Tensor, codebook: Tensor, eps: float, temperature: float = 1.0, squares: Tensor | None = None) -> Tensor:
    """Rows pi(.|i) of Eq. 4 for the given i: indices (N,), codebook (K,D) -> (N,K), each row sums to one.

    pi(j|i) = 1 - eps                                            if j = i
            = eps * exp(-d(c_i,c_j)/T) / Z_i                     if j != i,   Z_i = sum_{k != i} exp(-d(c_i,c_k)/T)
    T -> 0 takes the nearest neighbor, T = inf any other codeword alike.
    """
    check(eps, temperature, len(codebook))
    own = indices[:, None]
    closeness = distances(indices, codebook, squares).mul_(-1 / temperature)  # (N,K)
    others = closeness.scatter_(1, own, -math.inf).softmax(1)  # -inf: j = i takes no part in Z_i
    return others.mul_(eps).scatter_(1, own, 1 - eps)


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
    d = distances(torch.arange(len(codebook), device=codebook.device), codebook) / temperature
    apart = d[~torch.eye(len(codebook), dtype=torch.bool, device=d.device)]
    spread = apart.max() - apart.min()
    return -torch.log(1 - eps + eps * torch.exp(-spread))


def propose(indices: Tensor, codebook: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draws j != i from Eq. 4 by rejection, without looking at all codewords: (N,) -> j (N,), and whether one was found (N,) bool.

    Propose any other codeword with equal probability, accept it with probability exp(-d(c_i,c_j)/T): what is accepted first has
    the distribution of Eq. 4, with no Z_i. uniform (N, 2 * PROPOSALS): to propose, and to accept. With codewords of unit length and
    T = 1 a quarter is accepted, so that 16 proposals fail one token in a hundred; with a small T they fail nearly all.
    """
    pick, accept = uniform.chunk(2, dim=1)  # (N,PROPOSALS) each
    j = (pick * (len(codebook) - 1)).long()
    j += j >= indices[:, None]  # passes over i itself
    d = torch.linalg.vector_norm(codebook[j] - codebook[indices][:, None], dim=2)  # (N,PROPOSALS)
    accepted = accept < torch.exp(-d / temperature)
    first = accepted.long().argmax(1, keepdim=True)
    return j.gather(1, first)[:, 0], accepted.any(1)


def perturb(indices: Tensor, codebook: Tensor, eps: float, temperature: float = 1.0,
            generator: torch.Generator | None = None) -> Tensor:
    """QPM: replace each index i by a draw j ~ pi(.|i) of Eq. 4, independently per token. indices (...) -> (...).

    The first uniform number of a token says whether it moves. Where to: on a CPU by `propose`, or else, and on a GPU always, by
    the cumulative distribution of the token's own row. No loop over codes, no K x K matrix: 16 MB of rows at a time, which stay
    in the cache. The generator must live on the indices' device; it gives each token DRAWS numbers, so that tokens drawn in two
    batches are drawn as in one.
    """
    check(eps, temperature, len(codebook))
    with torch.no_grad(), torch.autocast(codebook.device.type, enabled=False):
        flat = indices.reshape(-1)  # (N,)
        uniform = torch.rand(len(flat), DRAWS, generator=generator, device=flat.device, dtype=torch.float64)
        moves = uniform[:, 0] < eps  # u < 1: eps = 0 is the identity, eps = 1 moves all
        moved, rest = flat, torch.arange(len(flat), device=flat.device)
        if flat.device.type == "cpu":  # how many tokens are left is a number that a GPU would have to wait for
            which = moves.nonzero()[:, 0]
            parts = [propose(flat[part], codebook, temperature, uniform[part, 2:]) for part in which.split(1024)]
            j, found = (torch.cat(of_parts) for of_parts in zip(*parts))
            moved, rest = flat.scatter(0, which, j), which[~found]
        centered = codebook - codebook.mean(0)
        squares = torch.linalg.vector_norm(centered, dim=1).square()
        # Subtle: u < 1 in float32 too keeps the target below the last step, which is 1 but for rounding, and right=True passes
        # steps of height 0, like that of i itself: what is found has positive probability. Only a NaN finds nothing: clamp.
        below_1 = uniform[rest, 1:2].clamp(max=1 - 2**-24).to(codebook.dtype)
        drawn, rows = [], max(1, 2**22 // len(codebook))
        for part, u in zip(flat[rest].split(rows), below_1.split(rows)):
            row = transition_rows(part, centered, 1.0, temperature, squares)
            cumulative = torch.cumsum(row, 1, out=row)
            drawn.append(torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)[:, 0])
        moved = moved.scatter(0, rest, torch.cat(drawn).clamp(max=len(codebook) - 1))
    return torch.where(moves, moved, flat).reshape(indices.shape)


def shuffle(indices: Tensor, eps: float, generator: torch.Generator | None = None) -> Tensor:
    """The abstract's reading: round(eps * h*w) positions of each image exchange their indices. (B,h,w) -> (B,h,w)."""
    check(eps)
    B, h, w = indices.shape
    flat = indices.reshape(B, h * w)
    order = torch.rand(B, h * w, generator=generator, device=indices.device).argsort(1)
    chosen = order[:, : round(eps * h * w)]  # (B,n) distinct positions in random order
    moved = flat.scatter(1, chosen.sort(1).values, flat.gather(1, chosen))
    return moved.reshape(B, h, w)


def dropout(codes: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    """Each number of q(z) is zeroed with probability p, the others scaled by 1/(1-p): nn.Dropout with a generator.

    Section 3.2 argues against dropout without that scaling; see `dropout_kl`.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"dropout rate must lie in [0, 1], not {p}")
    kept = torch.rand(codes.shape, generator=generator, device=codes.device) >= p
    return torch.where(kept, codes / max(1 - p, 1e-12), torch.zeros_like(codes))


def effective_neighbors(indices: Tensor, codebook: Tensor, temperature: float = 1.0) -> Tensor:
    """exp(H(pi(.|i), j != i)), in [1, K-1]: among how many codewords Eq. 4 really chooses a replacement. (N,) -> (N,)."""
    p = transition_rows(indices, codebook, 1.0, temperature)
    return (-torch.special.xlogy(p, p).sum(1)).exp()


def mean_displacement(indices: Tensor, codebook: Tensor, eps: float, temperature: float = 1.0) -> Tensor:
    """sum_j pi(j|i) d(c_i,c_j): how far Eq. 4 moves a token's features on average. (N,) -> (N,)."""
    return (transition_rows(indices, codebook, eps, temperature) * distances(indices, codebook)).sum(1)


def figure_3_codebook() -> Tensor:
    """Four codewords in the plane with the paper's Figure 3: at eps = 0.7, pi(1|1) = 0.30 and pi(2|1) = 0.49.

    The nearest codeword holds 70 % of the off-diagonal mass if exp(-d_12) = 0.7 Z_1; with the other two equally far,
    d_13 = d_14 = d_12 + log(0.70 / 0.15). We put c_2 at distance 0.5 from c_1.
    """
    far = 0.5 + math.log(0.70 / 0.15)
    return torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.0, far], [0.0, -far]], dtype=torch.float64)


def main() -> None:
    import matplotlib.pyplot as plt

    parser = argparse.ArgumentParser(description="Draw Figure 3, Eq. 1 against Eq. 6, and what the scale of d does to Eq. 4.")
    parser.add_argument("run", type=Path, nargs="?", help="run folder of train.py, to add its trained codebook to the lower row")
    parser.add_argument("--out", type=Path, default=Path("figures/qpm.png"))
    args = parser.parse_args()
    books = {f"{K} random codewords, D = {D}": torch.nn.functional.normalize(torch.randn(K, D, generator=torch.Generator().manual_seed(0)))
             for K, D in ((1024, 2), (1024, 32))}
    if args.run and not (args.run / "codebooks.pt").exists():
        parser.exit(2, f"qpm.py: {args.run}/codebooks.pt: no such file; give the folder of a run of train.py without --supervised\n")
    if args.run:
        trained = torch.load(args.run / "codebooks.pt", weights_only=True)[-1]["codebook"]
        books[f"{len(trained)} trained codewords, D = {trained.shape[1]}"] = trained

    figure, ((left, middle), (below, right)) = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    codebook, eps = figure_3_codebook(), 0.7
    pi = transition_matrix(codebook, eps)
    print(f"Figure 3, K = 4, eps = {eps}: pi(j|1) =", " ".join(f"{p:.2f}" for p in pi[0].tolist()))
    left.scatter(codebook[:, 0], codebook[:, 1], s=80, color="black")
    for j, (x, y) in enumerate(codebook.tolist()):
        label, side = f"$c_{j + 1}$: $\\pi({j + 1}|1)$ = {pi[0, j]:.2f}", (-12, -5) if j == 0 else (12, -5)
        left.annotate(label, (x, y), xytext=side, textcoords="offset points", ha="right" if j == 0 else "left", fontsize=11)
    left.set(title="Figure 3: where a token of $c_1$ goes, eps = 0.7", xlabel="channel 1", ylabel="channel 2")
    left.set(xlim=(-1.5, 2), ylim=(-2.8, 2.8))

    p = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    random = torch.randn(64, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prior = uniform_prior(len(random))
    kl = [qpm_kl(prior, perturbed_marginal(prior, transition_matrix(random, e))).item() for e in p.tolist()]
    middle.plot(p, dropout_kl(p), color="#D55E00", label="dropout, Eq. 1")
    middle.plot(p, dropout_kl(p, inverted=True), "--", color="#D55E00", label="inverted dropout (nn.Dropout)")
    middle.plot(p, kl, color="#0072B2", label="QPM, Eq. 6 (64 random codewords, D = 8)")
    middle.plot(p, [qpm_kl_bound(random, e).item() for e in p.tolist()], ":", color="#0072B2", label="QPM, bound of Appendix B")
    middle.set(title="How far a perturbation goes", xlabel="p or eps", ylabel="KL(P||Q) in nats", yscale="log", ylim=(1e-5, 100))
    middle.legend(fontsize=8)

    temperatures = torch.logspace(-3, 1, 33)
    for (label, book), color in zip(books.items(), ("#009E73", "#CC79A7", "#0072B2")):
        some = torch.arange(0, len(book), max(1, len(book) // 64))
        below.plot(temperatures, [effective_neighbors(some, book, t).mean() for t in temperatures.tolist()], color=color, label=label)
        right.plot(temperatures, [mean_displacement(some, book, eps, t).mean() for t in temperatures.tolist()], color=color, label=label)
        at_1, at_small = (effective_neighbors(some, book, t).mean() for t in (1.0, 0.05))
        print(f"{label}: effective neighbors {at_1:.0f} at T = 1, {at_small:.1f} at T = 0.05")
    below.set(title="Among how many codewords Eq. 4 chooses", ylabel="effective neighbors", xscale="log", yscale="log")
    right.set(title="How far a token moves on average, eps = 0.7", ylabel="mean displacement, codewords of length 1", xscale="log")
    for axis in (below, right):
        axis.axvline(1, color="gray", lw=0.8)
        axis.set_xlabel("temperature T (the paper: 1)")
        axis.legend(fontsize=8)
    figure.savefig(args.out, dpi=75)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
