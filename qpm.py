"""Quantized Perturbation Module (QPM): perturb which codeword a token has, not its numbers.

Implements Section 3.2 (why not dropout, Eq. 1, Appendix A), Section 3.3 (QPM, Eq. 3 to 6, Figure 3)
and Appendix B. K codewords c_1 .. c_K of D channels, eps in [0,1], d Euclidean, logarithms natural.

The paper does not say:
  - the scale of d in Eq. 4. In many dimensions codewords are almost equally far apart; then exp(-d)
    is nearly constant and Eq. 4 is uniform replacement. We divide d by a temperature T: 1 is Eq. 4
    as written, T -> 0 takes the nearest. So eps says how often a token changes, T how far.
  - which of two perturbations it means. The abstract shuffles the spatial locations of the indices
    (`shuffle`); Section 3.3 and Figure 3 resample each index from pi(.|i). Ours is the second.
  - what gradient a replaced token passes on. Ours: the identity, to the token that it replaces.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

PROPOSALS = 16  # per token; unit codewords, T = 1: exp(-1.4) = 1/4 pass, 0.75^16 = 1 % find none

def dropout_kl(p: Tensor) -> Tensor:
    """Eq. 1: KL(P||Q) = 1/2 ( p/(1-p) + log(1-p) ) of P = N(0,s^2), Q = N(0,(1-p)s^2); p < 1.
    Q has the variance of dropout that does not scale what it keeps; `dropout` below does scale."""
    p = torch.as_tensor(p, dtype=torch.float64)
    return 0.5 * (p / (1 - p) + torch.log1p(-p))

def uniform_prior(codebook_size: int) -> Tensor:
    """Eq. 3: P(c_i) = 1/K, (K,) float64."""
    return torch.full((codebook_size,), 1 / codebook_size, dtype=torch.float64)

def transition_rows(indices: Tensor, codebook: Tensor, eps: float,
                    temperature: float = 1.0) -> Tensor:
    """Eq. 4, rows pi(.|i) for the given i: indices (N,), codebook (K,D) -> (N,K), rows sum to 1.

    pi(j|i) = 1 - eps                            if j = i
            = eps * exp(-d(c_i,c_j)/T) / Z_i     if j != i, Z_i = sum_{k != i} exp(-d(c_i,c_k)/T)
    """
    check(eps, temperature, len(codebook))
    own = indices[:, None]
    logs = -torch.cdist(codebook[indices], codebook) / temperature  # (N,K)
    others = logs.scatter(1, own, -math.inf).softmax(1)  # j = i takes no part in Z_i
    return (eps * others).scatter(1, own, 1 - eps)

def perturbed_marginal(prior: Tensor, transition: Tensor) -> Tensor:
    """Eq. 5: Q(c_j|eps) = sum_i P(c_i) pi(j|i). (K,), (K,K) -> (K,)."""
    return prior.to(transition) @ transition

def qpm_kl(prior: Tensor, marginal: Tensor) -> Tensor:
    """Eq. 6: KL(P||Q) = sum_j P(c_j) log( P(c_j) / Q(c_j|eps) ). (K,), (K,) -> (), in nats."""
    prior = prior.to(marginal)
    return (prior * (prior / marginal).log()).sum()

def qpm_kl_bound(codebook: Tensor, eps: float, temperature: float = 1.0) -> Tensor:
    """Appendix B: KL(P||Q) <= -log( 1 - eps + eps exp(-(Dmax - Dmin)) ), finite for every eps.

    Dmin <= d(c_i,c_j)/T <= Dmax for all i != j. At eps = 1 the bound is Dmax - Dmin.
    """
    d = F.pdist(codebook) / temperature  # (K(K-1)/2,) all i < j
    log_keep, log_replace = d.new_tensor([1 - eps, eps]).log()
    return -torch.logaddexp(log_keep, log_replace + d.min() - d.max())  # exp underflows at small T

def check(eps: float, temperature: float = 1.0, codebook_size: int = 2) -> None:
    if not (0 <= eps <= 1 and temperature > 0 and codebook_size > 1):
        found = f"eps {eps}, T {temperature}, K {codebook_size}"
        raise ValueError(f"{found}: eps must lie in [0, 1], T above 0, K above 1")

def perturb(indices: Tensor, codebook: Tensor, eps: float, temperature: float = 1.0,
            generator: torch.Generator | None = None) -> Tensor:
    """QPM: replaces each index i by a sample j ~ pi(.|i) of Eq. 4, independently. (...) -> (...).

    Rejection sampling needs no row of K probabilities: propose j != i uniformly, accept it with
    probability exp(-d(c_i,c_j)/T). The first accepted j is a sample of Eq. 4, given that j != i.
    """
    K = len(codebook)
    check(eps, temperature, K)
    source = {"generator": generator, "device": indices.device}
    i = indices.reshape(-1, 1)  # (N,1)
    replaced = torch.rand(len(i), **source) < eps  # (N,)
    j = torch.randint(K - 1, (len(i), PROPOSALS), **source)
    j += j >= i  # skips i itself: uniform over the K - 1 others
    d = torch.linalg.vector_norm(codebook[i] - codebook[j], dim=2)  # (N,PROPOSALS)
    accepted = torch.rand(j.shape, **source) < (-d / temperature).exp()
    first = accepted.byte().argmax(1, keepdim=True)  # (N,1)
    sampled = j.gather(1, first)[:, 0]
    # Where all proposals are refused, often if T is small, a token samples from its row of Eq. 4.
    refused = (replaced & ~accepted.any(1)).nonzero()[:, 0]  # here the host waits for a GPU
    for chunk in refused.split(max(1, 2**22 // K)) if len(refused) else ():
        rows = transition_rows(i[chunk, 0], codebook, 1.0, temperature)
        sampled[chunk] = torch.multinomial(rows, 1, generator=generator)[:, 0]
    return torch.where(replaced, sampled, i[:, 0]).reshape(indices.shape)

def shuffle(indices: Tensor, eps: float, generator: torch.Generator | None = None) -> Tensor:
    """The abstract: round(eps * h*w) positions of each image exchange their indices. (B,h,w)."""
    check(eps)
    B, h, w = indices.shape
    flat = indices.reshape(B, h * w)
    order = torch.rand(B, h * w, generator=generator, device=indices.device).argsort(1)
    chosen = order[:, : round(eps * h * w)]  # (B,n) distinct positions in random order
    # The chosen positions, sorted, take the chosen indices in random order.
    moved = flat.scatter(1, chosen.sort(1).values, flat.gather(1, chosen))
    return moved.reshape(B, h, w)

def dropout(codes: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    """nn.Dropout with a generator: zero with probability p, else scaled by 1/(1-p). Any shape."""
    check(p)
    kept = torch.rand(codes.shape, generator=generator, device=codes.device) >= p
    return torch.where(kept, codes / max(1 - p, 1e-12), 0.0)

def replace(codes: Tensor, indices: Tensor, codebook: Tensor) -> Tensor:
    """c_j of new indices j (B,h,w): forward the new codewords, backward the identity to codes."""
    new = F.embedding(indices, codebook).permute(0, 3, 1, 2)  # (B,D,h,w)
    return codes + (new - codes).detach()

# --perturb NAME -> q'(z) (B,D,h,w), what D_s gets of the unlabeled slices, from q = q(z)
# (B,D,h,w), its indices i (B,h,w), the codebook c (K,D), eps, T and a generator g. To add one,
# write a function like those above and enter it here.
PERTURBATIONS = {
    "qpm": lambda q, i, c, eps, T, g: replace(q, perturb(i, c, eps, T, g), c),
    "shuffle": lambda q, i, c, eps, T, g: replace(q, shuffle(i, eps, g), c),
    "dropout": lambda q, i, c, eps, T, g: dropout(q, eps, g),
    "none": lambda q, i, c, eps, T, g: q,
}
