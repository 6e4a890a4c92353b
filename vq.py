"""Vector quantization: a feature map becomes a grid of codeword indices.

Implements Section 3.3, Eq. 2 (nearest codeword, straight-through estimator) and the codebook mapping of Section 4.2
(SimVQ, Zhu et al. 2024: a frozen random table seen through one learnable linear map, so that every step moves every
codeword and none is left behind).

The paper does not say:
  - how the codebook gets a gradient. Straight-through gives it none, so we add the two usual VQ terms: the codebook
    loss (codewords go to the tokens) and the commitment loss with beta = 0.25 (tokens go to their codewords).
  - how a quantizer trained from scratch stays alive. Here it does not by itself: see `usage_loss`. The authors'
    release has a term of this kind too, though their paper has none. Its size here, 0.1 at temperature 0.05, is a start
    taken from an earlier prototype and not yet swept; `train.py --paper` leaves it out. Without it (`usage0` in
    the README) 3 % of 1024 codewords are in use at the end, with it all, and that is worth 0.025 Dice (three pairs, p 0.07).
  - the length of a codeword. Ours have unit length, and the model makes its tokens unit length, so that the distances of
    Eq. 2 and Eq. 4 lie in [0, 2] whatever the network does, and one temperature suits a whole run.

Run `python vq.py RUN` to draw the codebook of a training run as in Appendix E: before, during and after training.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class Quantized(NamedTuple):
    codes: Tensor  # (B,D,h,w) q(z): forward the nearest codeword, backward the identity
    indices: Tensor  # (B,h,w) int64, values in [0,K)
    loss: Tensor  # () codebook + beta * commitment + usage_weight * usage
    codebook: Tensor  # (K,D) as it was, so that nobody need compute it again


class Usage(NamedTuple):
    utilization: float  # share of the K codewords that occur at least once, in [0,1]
    perplexity: float  # exp(entropy of the histogram), in [1,K]: how many codewords it is "as if" in equal use


def nearest(z: Tensor, codebook: Tensor) -> Tensor:
    """Eq. 2: i = argmin_k || z - c_k ||_2 for any number of tokens.

    z (..., D), codebook (K,D) -> (...) int64. Bounded memory: at most 64 MB of distances at a time, never tokens x K. Nearly all of
    its time is the one matrix product (`python tests/bench.py`).

    Under autocast, tokens are no more exact than the bfloat16 arithmetic they come from, and the product rounds its inputs as much:
    of random tokens 1 in 200 then gets another codeword, whose squared distance is at most 0.001 larger; rounding the tokens to
    bfloat16 does that to 1 in 300. On a CPU with bfloat16 the search is three times faster so. What the product gives, the distances,
    stays in float32: in bfloat16 many would be equal.
    """
    K, D = codebook.shape
    if z.shape[-1] != D:
        raise ValueError(f"tokens have {z.shape[-1]} channels but codewords have {D}")
    precision = "medium" if torch.is_autocast_enabled(z.device.type) else "highest"
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False), matmul_precision(precision):
        # ||z-c||^2 = ||z||^2 - 2 (z.c - ||c||^2 / 2): the nearest codeword is where the bracket is largest.
        # Subtle: a shift common to z and c changes no distance but costs float32 digits, so take it out first.
        center = codebook.float().mean(0)
        c = codebook.float() - center  # (K,D)
        tokens = z.float().reshape(-1, D) - center  # (N,D)
        half_squares = torch.linalg.vector_norm(c, dim=1).square() / 2  # (K,)
        rows = max(1, min(128, 2**24 // K))  # few, so that their table stays in the cache
        found = [argmax(torch.mm(part, c.T).sub_(half_squares)) for part in tokens.split(rows)]
    return torch.cat(found).reshape(z.shape[:-1])


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """What PyTorch may do to the inputs of a float32 matrix product: "highest" nothing, "medium" round them to bfloat16 or TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def argmax(table: Tensor) -> Tensor:
    """table.argmax(1), (N,K) -> (N,), in two passes: on a CPU PyTorch's own takes as long as the product before it, its amax a tenth."""
    N, K = table.shape
    blocks = table.reshape(N, -1, math.gcd(K, 128))  # (N,K/b,b); any divisor b of K will do, 128 is quick
    block = blocks.amax(2).argmax(1)  # (N,)
    return block * blocks.shape[2] + blocks[torch.arange(N, device=table.device), block].argmax(1)


def straight_through(z: Tensor, codes: Tensor) -> Tensor:
    """Forward `codes`, backward the identity to `z` (Bengio et al. 2013): the argmin has no gradient of its own."""
    return z + (codes - z).detach()


def codebook_loss(z: Tensor, codes: Tensor, beta: float = 0.25) -> Tensor:
    """|| sg(z) - e ||^2 + beta || z - sg(e) ||^2, summed over the D channels, mean over tokens. Both (..., D).

    The first half moves codewords (through the linear map), the second moves tokens; beta stands on the token's side.
    """
    to_token = (codes - z.detach()).square().sum(-1).mean()
    to_codeword = (z - codes.detach()).square().sum(-1).mean()
    return to_token + beta * to_codeword


def usage_loss(z: Tensor, codebook: Tensor, temperature: float = 0.05, total: Callable[[Tensor], Tensor] = nn.Identity()) -> Tensor:
    """mean entropy of each token's soft assignment - entropy of the mean assignment, in nats; in [-log K, 0].

    Soft assignment: softmax_k( -||z - c_k||^2 / temperature ). Low when every token is sure of its codeword and all
    codewords are wanted equally. z (N,D), codebook (K,D), temperature in squared distance (unit-length codewords: 0 to 4).
    The mean assignment is that of the tokens of all processes: `total` sums over them, and is the identity where there is one.
    """
    distance = z.square().sum(1, keepdim=True) - 2 * z @ codebook.T + codebook.square().sum(1)  # (N,K)
    log_p = F.log_softmax(-distance / temperature, dim=1)
    p = log_p.exp()
    wanted = total(p.sum(0))  # (K,), sums to the number of tokens
    mean_p = wanted / wanted.sum()
    each = -(p * log_p).sum(1).mean()
    together = -(mean_p * mean_p.clamp_min(1e-12).log()).sum()
    return each - together


def usage(counts: Tensor) -> Usage:
    """Utilization and perplexity of a histogram of codewords (K,), not empty: few tokens cannot use many codewords."""
    p = counts.double() / counts.sum()
    entropy = -torch.special.xlogy(p, p).sum()
    return Usage((counts > 0).double().mean().item(), entropy.exp().item())


class VectorQuantizer(nn.Module):
    """K codewords of D channels: `codebook` = unit-length rows of Linear(frozen table)."""

    def __init__(self, codebook_size: int, dim: int, beta: float = 0.25, usage_weight: float = 0.1, usage_tokens: int = 64):
        super().__init__()
        self.codebook_size, self.beta, self.usage_weight, self.usage_tokens = codebook_size, beta, usage_weight, usage_tokens
        # A buffer, not a parameter: saved and moved with the model, never touched by the optimizer.
        self.register_buffer("table", torch.randn(codebook_size, dim) * dim**-0.5)
        self.linear = nn.Linear(dim, dim, bias=False)
        nn.init.orthogonal_(self.linear.weight)  # a rotation: it starts by keeping the table's distances

    @property
    def codebook(self) -> Tensor:
        """(K,D), float32, each row of unit length."""
        return self.codewords(self.table)

    def codewords(self, rows: Tensor) -> Tensor:
        """(...,D) rows of the table -> the codewords they are."""
        with torch.autocast(rows.device.type, enabled=False):
            return F.normalize(self.linear(rows), dim=-1)

    def indices_to_codes(self, indices: Tensor, codebook: Tensor | None = None) -> Tensor:
        """(B,h,w) -> (B,D,h,w): the inverse of quantization. Pass a codebook to save computing it again."""
        codebook = self.codebook if codebook is None else codebook
        return F.embedding(indices, codebook).permute(0, 3, 1, 2)

    def quantize(self, z: Tensor) -> Tensor:
        """q(z) alone, (B,D,h,w) -> (B,D,h,w), where nothing is learned: no loss, no straight-through."""
        codebook = self.codebook
        return self.indices_to_codes(nearest(z.permute(0, 2, 3, 1), codebook), codebook)

    def forward(self, z: Tensor, total: Callable[[Tensor], Tensor] = nn.Identity()) -> Quantized:
        B, D, h, w = z.shape
        codebook = self.codebook  # (K,D)
        tokens = z.permute(0, 2, 3, 1).float()  # (B,h,w,D)
        indices = nearest(tokens, codebook)  # (B,h,w)
        # Not codebook[indices], which is the same: its backward pass would visit the codewords that nobody chose too.
        codes = self.codewords(F.embedding(indices, self.table))  # (B,h,w,D)
        with torch.autocast(z.device.type, enabled=False):
            loss = codebook_loss(tokens, codes, self.beta)
            if self.usage_weight:
                # The term needs a (tokens, K) table with its gradient; an even sample of each image's tokens says as much.
                some = tokens.reshape(B, h * w, D)[:, :: -(-h * w // self.usage_tokens)]
                loss = loss + self.usage_weight * usage_loss(some.reshape(-1, D), codebook, total=total)
        return Quantized(straight_through(z, codes.permute(0, 3, 1, 2)), indices, loss, codebook)


def main() -> None:
    import matplotlib.pyplot as plt

    parser = argparse.ArgumentParser(description="Draw a run's codebook before, during and after training (Appendix E).")
    parser.add_argument("run", type=Path, help="run folder of train.py")
    parser.add_argument("--out", type=Path, default=Path("figures/vq.png"))
    args = parser.parse_args()
    if not (args.run / "codebooks.pt").exists():
        parser.exit(2, f"vq.py: {args.run}/codebooks.pt: no such file; give the folder of a run of train.py without --supervised\n")
    snapshots = torch.load(args.run / "codebooks.pt", weights_only=True)
    # One projection for all: the two directions in which the trained codebook varies most.
    last = snapshots[-1]["codebook"]
    directions = torch.linalg.svd(last - last.mean(0), full_matrices=False).Vh[:2]  # (2,D)
    figure, axes = plt.subplots(1, len(snapshots), figsize=(4 * len(snapshots), 4), sharex=True, sharey=True, layout="constrained")
    for axis, snapshot in zip(axes, snapshots):
        x, y = (snapshot["codebook"] @ directions.T).T
        active = snapshot["counts"] > 0
        K, share = len(active), active.double().mean().item()
        axis.scatter(x[active], y[active], s=8, color="#0072B2", label=f"active: {active.sum()} of {K}")
        axis.scatter(x[~active], y[~active], s=14, color="#D55E00", marker="x", label=f"inactive: {(~active).sum()}")
        axis.set(title=f"step {snapshot['step']}: {share:.1%} in use", xlabel="first principal direction")
        axis.set(aspect="equal", xlim=(-1, 1), ylim=(-1, 1.3))
        axis.legend(fontsize=8, loc="upper right")
        print(f"step {snapshot['step']}: {share:.1%} of {K} codewords in use over the training slices")
    axes[0].set_ylabel("second principal direction")
    figure.savefig(args.out, dpi=80)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
