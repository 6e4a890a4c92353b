"""The losses: one pure function of tensors for each equation.

Implements Sections 3.4 to 3.6, Eq. 8 to 12. Shapes: image (B,1,H,W) float in [0,1]; logits
(B,C,H,W); mask (B,H,W) int64 in [0,C), 0 is background. Logarithms are natural.

The paper does not say:
  - tau of Eq. 11: ours is 0.07, the usual one for InfoNCE.
  - whether all pseudo-labels count. By default they do; `threshold` leaves out unsure pixels.
Beyond the paper: `dice_weight` adds to the cross-entropy the soft Dice loss of other papers on
ACDC, `rec_weight` scales L_rec. `train.py --paper` leaves both as in the paper.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PseudoLabel(NamedTuple):
    label: Tensor  # (B,H,W) int64
    keep: Tensor  # (B,H,W) float: 1 = the confidence reaches the threshold, 0 = it does not

class BranchLoss(NamedTuple):
    total: Tensor  # () rec_weight * rec + seg
    rec: Tensor  # () of the image branch
    seg: Tensor  # () of the segmentation branch

def reconstruction_loss(x_hat: Tensor, x: Tensor) -> Tensor:
    """L_rec of Eq. 8 and 9: L1, mean over pixels. Both (B,1,H,W)."""
    return F.l1_loss(x_hat.float(), x.float())

def soft_dice_loss(logits: Tensor, y: Tensor, keep: Tensor | None = None) -> Tensor:
    """1 - soft Dice, mean over the C-1 foreground classes, each over the whole batch; in [0,1]."""
    C = logits.shape[1]
    p = logits.float().softmax(1)  # (B,C,H,W)
    t = F.one_hot(y, C).permute(0, 3, 1, 2).to(p.dtype)  # (B,C,H,W)
    weight = 1 if keep is None else keep[:, None]
    overlap = (p * t * weight).sum((0, 2, 3))[1:]  # (C-1,)
    size = ((p + t) * weight).sum((0, 2, 3))[1:]
    # One pixel more on both sides: no 0/0 where a class is in neither.
    return 1 - ((2 * overlap + 1) / (size + 1)).mean()

def segmentation_loss(logits: Tensor, y: Tensor, keep: Tensor | None = None,
                      dice_weight: float = 0.0) -> Tensor:
    """L_seg of Eq. 8 and 9: cross-entropy, mean over pixels (+ dice_weight * soft Dice loss).

    keep (B,H,W): 1 = the pixel counts, 0 = it does not. The sum is divided by all pixels.
    """
    cross_entropy = F.cross_entropy(logits.float(), y, reduction="none")  # (B,H,W)
    loss = (cross_entropy if keep is None else cross_entropy * keep).mean()
    if dice_weight:
        loss = loss + dice_weight * soft_dice_loss(logits, y, keep)
    return loss

def labeled_loss(x_hat: Tensor, x: Tensor, y_hat: Tensor, y: Tensor, rec_weight: float = 1.0,
                 dice_weight: float = 0.0) -> BranchLoss:
    """Eq. 8: L_l = L_rec(x_hat_l, x_l) + L_seg(y_hat_l, y_l), the first times rec_weight."""
    rec = reconstruction_loss(x_hat, x)
    seg = segmentation_loss(y_hat, y, dice_weight=dice_weight)
    return BranchLoss(rec_weight * rec + seg, rec, seg)

def pseudo_label(teacher_logits: Tensor, threshold: float = 0.0) -> PseudoLabel:
    """y~_u = argmax_c D_s^T( q(z_u^T) ), without gradient; threshold in [0,1], 0 keeps all."""
    confidence, label = teacher_logits.detach().float().softmax(1).max(1)  # (B,H,W) each
    return PseudoLabel(label, (confidence >= threshold).float())

def unlabeled_loss(x_hat: Tensor, x: Tensor, y_hat_perturbed: Tensor, pseudo: PseudoLabel,
                   rec_weight: float = 1.0, dice_weight: float = 0.0) -> BranchLoss:
    """Eq. 9: L_u = L_rec(x_hat_u, x_u) + L_seg( D_s^S( q'(z_u^S) ), y~_u ); rec_weight as above."""
    rec = reconstruction_loss(x_hat, x)
    seg = segmentation_loss(y_hat_perturbed, pseudo.label, pseudo.keep, dice_weight)
    return BranchLoss(rec_weight * rec + seg, rec, seg)

def dual_branch_loss(l_l: Tensor, l_u: Tensor, lambda_u: float) -> Tensor:
    """Eq. 10: L_db = L_l + lambda_u * L_u."""
    return l_l + lambda_u * l_u

def alignment_loss(f_pfa: Tensor, f_fm: Tensor, tau: float = 0.07) -> Tensor:
    """Eq. 11: InfoNCE over the N = H'W' patches of one image, mean over images; in nats, >= 0.

    -(1/N) sum_i log[ exp(sim(f_pfa_i, f_fm_i)/tau) / sum_j exp(sim(f_pfa_i, f_fm_j)/tau) ],
    sim = cosine. Both (B,C',H',W'); log N when all patches look alike. f_fm gets no gradient.
    """
    # In bfloat16 a cosine near 1 has steps of 0.004; divided by tau they are 0.06.
    with torch.autocast(f_pfa.device.type, enabled=False):
        pfa = F.normalize(f_pfa.float().flatten(2), dim=1)  # (B,C',N)
        fm = F.normalize(f_fm.detach().float().flatten(2), dim=1)
        log_p = (pfa.transpose(1, 2) @ fm / tau).log_softmax(2)  # (B,N,N): adapted i, frozen j
        return -log_p.diagonal(dim1=1, dim2=2).mean()

def total_loss(l_db: Tensor, l_align: Tensor, lambda_a: float) -> Tensor:
    """Eq. 12: L = L_db + lambda_a * L_align."""
    return l_db + lambda_a * l_align
