"""The losses: one pure function of tensors per equation (Sections 3.4 to 3.6, Eq. 8 to 12).

Shapes: image (B,1,H,W) float in [0,1]; logits (B,C,H,W); mask (B,H,W) int64, values in [0,C).
No device, no state, no randomness in here: what goes in decides what comes out. All logarithms are natural.

The paper does not say:
  - tau of Eq. 11: 0.07, the customary InfoNCE temperature (the authors' release has it in a comment).
Options beyond the paper, whose defaults here are the paper's:
  - Eq. 9 keeps every pseudo-label; `threshold` and `keep` leave out pixels of low confidence.
  - Eq. 8 and 9 add L_rec and L_seg as they are; `rec_weight` weighs L_rec.
  - L_seg is cross-entropy alone; `dice_weight` adds the soft Dice loss that the peers on ACDC add to it.

Run `python losses.py RUN` to draw the terms over a training run.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

Total = Callable[[Tensor], Tensor]  # the sum over all processes of a value that each has its part of; the identity where there is one


class PseudoLabel(NamedTuple):
    label: Tensor  # (B,H,W) int64
    keep: Tensor  # (B,H,W) float: 1 = the teacher is at least `threshold` sure, 0 = it is not


class BranchLoss(NamedTuple):
    total: Tensor  # ()
    rec: Tensor  # () image branch
    seg: Tensor  # () segmentation branch


def mean(values: Tensor) -> Tensor:
    """Mean of all values, and 0 where there are none: an empty batch has no loss."""
    return values.sum() / max(1, values.numel())


def reconstruction_loss(x_hat: Tensor, x: Tensor) -> Tensor:
    """L_rec of Eq. 8 and 9: L1, mean over pixels. Both (B,1,H,W)."""
    return mean((x_hat.float() - x.float()).abs())


def soft_dice_loss(logits: Tensor, y: Tensor, keep: Tensor | None = None, total: Total = nn.Identity()) -> Tensor:
    """1 - soft Dice, mean over the C-1 foreground classes, each over the whole batch (of all processes); in [0,1].

    Over the batch and not per slice: a class that is absent from a slice would otherwise be all noise.
    """
    C = logits.shape[1]
    p = logits.float().softmax(1)
    t = F.one_hot(y, C).permute(0, 3, 1, 2).to(p.dtype)  # (B,C,H,W)
    if keep is not None:
        p, t = p * keep[:, None], t * keep[:, None]
    overlap, size = total(torch.stack([(p * t).sum((0, 2, 3)), (p + t).sum((0, 2, 3))]))[:, 1:]  # (C-1,) each
    return 1 - ((2 * overlap + 1) / (size + 1)).mean()  # +1 pixel: finite, and 0 loss for a class absent from both


def segmentation_loss(logits: Tensor, y: Tensor, keep: Tensor | None = None, dice_weight: float = 0.0,
                      total: Total = nn.Identity()) -> Tensor:
    """L_seg of Eq. 8 and 9: cross-entropy, mean over pixels (+ dice_weight * soft Dice loss).

    keep (B,H,W): 1 = the pixel counts, 0 = it does not. The mean is over *all* pixels, so that few confident pixels
    make a small loss and not a loud one; with none it is 0.
    """
    ce = F.cross_entropy(logits.float(), y, reduction="none")  # (B,H,W)
    loss = mean(ce if keep is None else ce * keep)
    if dice_weight:
        loss = loss + dice_weight * soft_dice_loss(logits, y, keep, total)
    return loss


def labelled_loss(x_hat: Tensor, x: Tensor, y_hat: Tensor, y: Tensor, rec_weight: float = 1.0, dice_weight: float = 0.0,
                  total: Total = nn.Identity()) -> BranchLoss:
    """Eq. 8: L_l = L_rec(x_hat_l, x_l) + L_seg(y_hat_l, y_l)."""
    rec = reconstruction_loss(x_hat, x)
    seg = segmentation_loss(y_hat, y, None, dice_weight, total)
    return BranchLoss(rec_weight * rec + seg, rec, seg)


def pseudo_label(teacher_logits: Tensor, threshold: float = 0.0) -> PseudoLabel:
    """y~_u = argmax_c D_s^T( q(z_u^T) ); threshold is a probability in [0,1], 0 keeps every pixel. Neither has a gradient."""
    confidence, label = teacher_logits.float().softmax(1).max(1)
    return PseudoLabel(label, (confidence >= threshold).float())


def unlabelled_loss(x_hat: Tensor, x: Tensor, y_hat_perturbed: Tensor, pseudo: PseudoLabel, rec_weight: float = 1.0,
                    dice_weight: float = 0.0, total: Total = nn.Identity()) -> BranchLoss:
    """Eq. 9: L_u = L_rec(x_hat_u, x_u) + L_seg( D_s^S( q'(z_u^S) ), y~_u )."""
    rec = reconstruction_loss(x_hat, x)
    seg = segmentation_loss(y_hat_perturbed, pseudo.label, pseudo.keep, dice_weight, total)
    return BranchLoss(rec_weight * rec + seg, rec, seg)


def dual_branch_loss(l_l: Tensor, l_u: Tensor, lambda_u: float = 1.0) -> Tensor:
    """Eq. 10: L_db = L_l + lambda_u * L_u."""
    return l_l + lambda_u * l_u


def alignment_loss(f_pfa: Tensor, f_fm: Tensor, tau: float = 0.07) -> Tensor:
    """Eq. 11: InfoNCE over the patches of one image, mean over images; in nats, >= 0, log(H'W') when all look alike.

    -(1/(H'W')) sum_i log[ exp(sim(f_pfa_i, f_fm_i)/tau) / sum_j exp(sim(f_pfa_i, f_fm_j)/tau) ],  sim = cosine.
    Both (B,C',H',W'). Each adapted token must find the frozen model's own feature at its place among all places.
    """
    if f_pfa.shape != f_fm.shape:
        raise ValueError(f"adapted features {tuple(f_pfa.shape)} and foundation features {tuple(f_fm.shape)} differ in shape")
    a = F.normalize(f_pfa.float().flatten(2), dim=1)  # (B,C',N), N = H'W'
    b = F.normalize(f_fm.detach().float().flatten(2), dim=1)
    # A cosine near 1 has steps of 0.004 in bfloat16, which divided by tau are steps of 0.06 in the exponent.
    with torch.autocast(a.device.type, enabled=False):
        log_p = (a.transpose(1, 2) @ b / tau).log_softmax(2)  # (B,N,N): row i is the adapted patch, column j the frozen one
    return mean(-log_p.diagonal(dim1=1, dim2=2))


def total_loss(l_db: Tensor, l_align: Tensor, lambda_a: float = 5.0) -> Tensor:
    """Eq. 12: L = L_db + lambda_a * L_align."""
    return l_db + lambda_a * l_align


def main() -> None:
    import matplotlib.pyplot as plt

    parser = argparse.ArgumentParser(description="Draw the terms of Eq. 12 over a training run.")
    parser.add_argument("run", type=Path, help="run folder of train.py")
    parser.add_argument("--out", type=Path, default=Path("figures/losses.png"))
    args = parser.parse_args()
    if not (args.run / "log.jsonl").exists():
        parser.exit(2, f"losses.py: {args.run}/log.jsonl: no such file; give the folder of a run of train.py\n")
    lines = [json.loads(line) for line in (args.run / "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    panels = [
        ("segmentation: L_seg", "nats (+ Dice loss)", {"seg_l": "labelled, Eq. 8", "seg_u": "unlabelled, Eq. 9"}),
        ("reconstruction: L_rec", "mean |error|, image in [0,1]", {"rec_l": "labelled, Eq. 8", "rec_u": "unlabelled, Eq. 9"}),
        ("alignment: L_align", "nats", {"align": "Eq. 11"}),
        ("quantizer", "squared distance + usage", {"vq": "codebook, commitment and usage"}),
    ]
    figure, axes = plt.subplots(1, len(panels), figsize=(14, 3.2), layout="constrained")
    for axis, (title, unit, terms) in zip(axes, panels):
        for (name, label), color in zip(terms.items(), ("#0072B2", "#D55E00")):
            axis.plot([line["step"] for line in lines], [line.get(name, float("nan")) for line in lines], color=color, label=label)
        axis.set(title=title, xlabel="step", ylabel=unit)
        axis.legend(fontsize=8)
    figure.savefig(args.out, dpi=75)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
