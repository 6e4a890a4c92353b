"""Vector quantization: a feature map becomes a grid of codeword indices.

Implements Section 3.3, Eq. 2 (nearest codeword, straight-through estimator) and the codebook
mapping of Section 4.2 (SimVQ, Zhu et al. 2024): a frozen random table passed through one learnable
linear map, so that each step moves all codewords, also those that are nearest to no token.

The paper does not say:
  - how the codebook gets a gradient; the straight-through estimator gives it none. We add the usual
    codebook loss (codewords move to tokens) and commitment loss (tokens move to codewords).
  - what keeps the codebook in use (Table 5: 98 %). We add `usage_loss`, as the authors' release.
  - the length of a codeword. Ours have unit length, and so have the tokens: the distances of Eq. 2
    and Eq. 4 lie in [0, 2], and one temperature suits a whole run.
"""

import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


class Quantized(NamedTuple):
    codes: Tensor  # (B,D,h,w) q(z): forward the nearest codeword, backward the identity to z
    indices: Tensor  # (B,h,w) int64 in [0,K): the codeword of each token
    loss: Tensor  # () codebook + beta * commitment + usage_weight * usage
    codebook: Tensor  # (K,D) the codewords of this step

def nearest(z: Tensor, codebook: Tensor) -> Tensor:
    """Eq. 2: i = argmin_k || z - c_k ||_2. z (...,D), codebook (K,D) -> (...) int64."""
    with torch.no_grad(), torch.autocast(z.device.type, enabled=False):
        # ||z - c||^2 = ||z||^2 - 2 (z.c - ||c||^2 / 2): the nearest c has the largest bracket.
        codebook = codebook.float()
        half_squares = codebook.square().sum(1) / 2  # (K,)
        # In chunks (n,K) of 64 MB at most. addmm is here chunk @ codebook.T - half_squares.
        tokens = z.float().reshape(-1, z.shape[-1])  # (N,D)
        chunks = tokens.split(max(1, 2**24 // len(codebook)))
        brackets = (torch.addmm(half_squares, chunk, codebook.T, beta=-1) for chunk in chunks)
        return torch.cat([bracket.max(1).indices for bracket in brackets]).reshape(z.shape[:-1])

def straight_through(z: Tensor, codes: Tensor) -> Tensor:
    """Forward `codes`, backward the identity to z (Bengio et al. 2013): argmin has no gradient."""
    return z + (codes - z).detach()

def codebook_loss(z: Tensor, codes: Tensor, beta: float = 0.25) -> Tensor:
    """|| sg(z) - e ||^2 + beta || z - sg(e) ||^2, sum over D, mean over tokens; sg: no gradient."""
    codebook_term = (codes - z.detach()).square().sum(-1).mean()  # moves codes e, (...,D) like z
    commitment_term = (z - codes.detach()).square().sum(-1).mean()  # moves the tokens z
    return codebook_term + beta * commitment_term

def usage_loss(z: Tensor, codebook: Tensor, temperature: float = 0.05) -> Tensor:
    """Mean entropy of each token's soft assignment minus entropy of the mean assignment, in nats.

    p(k|z) = softmax_k( -||z - c_k||^2 / temperature ), not the T of Eq. 4: about 5 likely k at
    D = 32. In [-log K, 0]; low: tokens are sure, codewords used alike. z (N,D), codebook (K,D).
    """
    squared = z.square().sum(1, keepdim=True) - 2 * z @ codebook.T + codebook.square().sum(1)
    log_p = F.log_softmax(-squared / temperature, dim=1)  # (N,K)
    p = log_p.exp()
    mean_p = p.mean(0)  # (K,)
    entropy_of_mean = -(mean_p * mean_p.clamp_min(1e-12).log()).sum()
    return -(p * log_p).sum(1).mean() - entropy_of_mean

def usage(counts: Tensor) -> tuple[float, float]:
    """Utilization (the share of codewords that occur) and perplexity (exp(entropy), the effective
    number of codewords, in [1,K]) of a histogram (K,) that is not all 0."""
    p = counts.double() / counts.sum()
    entropy = -torch.special.xlogy(p, p).sum()
    return (counts > 0).double().mean().item(), entropy.exp().item()

class VectorQuantizer(nn.Module):
    """K codewords of D channels. The codebook is Linear(frozen table), each row of unit length.
    K = 0 is a control: the tokens stay as they are."""

    def __init__(self, codebook_size: int, dim: int, usage_weight: float = 0.1):
        super().__init__()
        self.usage_weight = usage_weight
        self.register_buffer("table", torch.randn(codebook_size, dim) * dim**-0.5)  # never trained
        self.linear = nn.Linear(dim, dim, bias=False)
        nn.init.orthogonal_(self.linear.weight)  # at first only a rotation
        self.linear.requires_grad_(codebook_size > 0)

    @property
    def codebook(self) -> Tensor:
        """The codewords c_1 .. c_K: (K,D) float32."""
        with torch.autocast(self.table.device.type, enabled=False):
            return F.normalize(self.linear(self.table), dim=1)

    def forward(self, z: Tensor) -> Quantized:
        """(B,D,h,w) tokens -> q(z), indices, loss and codebook; without gradient the loss is 0."""
        if not len(self.table):
            indices = torch.zeros_like(z[:, 0], dtype=torch.long)  # (B,h,w)
            return Quantized(z, indices, z.new_zeros(()), self.table)
        codebook = self.codebook
        indices = nearest(z.permute(0, 2, 3, 1), codebook)  # (B,h,w)
        codes = F.embedding(indices, codebook).permute(0, 3, 1, 2)  # (B,D,h,w)
        loss = self.loss(z, codes, codebook) if torch.is_grad_enabled() else z.new_zeros(())
        return Quantized(straight_through(z, codes), indices, loss, codebook)

    def loss(self, z: Tensor, codes: Tensor, codebook: Tensor) -> Tensor:
        """z and codes (B,D,h,w), codebook (K,D) -> ()."""
        with torch.autocast(z.device.type, enabled=False):
            tokens = z.float().flatten(2).transpose(1, 2)  # (B,hw,D)
            loss = codebook_loss(tokens, codes.flatten(2).transpose(1, 2))
            if self.usage_weight:
                step = max(1, tokens.shape[1] // 64)  # about 64 tokens an image: p is (N,K)
                while math.gcd(step, z.shape[3]) > 1:  # else some columns are never sampled
                    step += 1
                sample = tokens[:, ::step].flatten(0, 1)
                loss = loss + self.usage_weight * usage_loss(sample, codebook)
        return loss
