"""The network: encoder, quantizer, two decoders on one post-VQ space, adapter; the EMA teacher.

Implements Figure 2, Section 3.4 (dual branch, Eq. 7; teacher) and Section 3.5 (Post-VQ Feature
Adapter, PFA, Figure 4).

    x -> Encoder -> z -> VectorQuantizer -> q(z) -> ImageDecoder D_i        -> x_hat
            |                                |----> FeatureAdapter          -> f_pfa
            |                                '----> SegmentationDecoder D_s -> y_hat, of q, q'
            '------ shallower maps ---------------------'

The paper does not say:
  - what is quantized when a decoder has skip connections: NETWORKS lists four readings. D_s also
    gets the shallower maps, continuous, as in the authors' release. D_i must not: it would copy x.
  - how tokens are scaled. Ours get mean 0 and variance 1 per image and channel, then unit length
    like the codewords.
  - which tokens of an unlabeled slice D_i gets. Ours: q(z), since Eq. 9 perturbs what D_s gets.
    Eq. 7 also lists D_i( q'(z) ).
The paper's encoder is DINOv2 with UniMatch V2's decoder (`--encoder dinov2`, extras/dinov2.py). The
default here is a small convolutional network with BatchNorm, from scratch. D_i is small in both.
"""

from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from qpm import PERTURBATIONS
from vq import VectorQuantizer

# --encoder NAME: pixels of the image along a side of a token, and whether D_s sees shallower maps.
NETWORKS = {"conv16": (16, True), "conv8": (8, True), "conv4": (4, True), "conv4-alone": (4, False)}

class Encoded(NamedTuple):
    z: Tensor  # (B,D,h,w) tokens; h = H/stride, with DINOv2 H/14
    skips: list[Tensor]  # (B,c,H/2,W/2), (B,2c,H/4,W/4), ... (.,.,2h,2w); DINOv2: 3 like z

class Decoded(NamedTuple):
    y_hat: Tensor  # (B,C,H,W) logits of D_s
    x_hat: Tensor | None  # (B,1,H,W) image of D_i; None in the supervised baseline
    indices: Tensor  # (B,h,w) codewords of q(z)
    vq_loss: Tensor  # () the quantizer's own loss
    f_pfa: Tensor | None  # (B,C',H',W') adapted features; None without a foundation model

def conv_block(inputs: int, outputs: int) -> nn.Sequential:
    """Two 3x3 convolutions, each with BatchNorm and SiLU."""
    first = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)]
    second = [nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*first, nn.SiLU(True), *second, nn.SiLU(True))

def unit_tokens(z: Tensor) -> Tensor:
    """(B,D,h,w): each channel to mean 0 and variance 1 over h x w, then each token to length 1."""
    return F.normalize(F.instance_norm(z.float()), dim=1)

class Upward(nn.Module):
    """The way up of a U-Net. Maps are added, which is less work than concatenating them."""

    def __init__(self, channels: list[int]):
        super().__init__()
        pairs = list(zip(channels, channels[1:]))
        self.narrow = nn.ModuleList(nn.Conv2d(i, o, 1) for i, o in pairs)
        self.levels = nn.ModuleList(conv_block(o, o) for _, o in pairs)

    def forward(self, x: Tensor, skips: list[Tensor]) -> Tensor:
        for n, (narrow, level) in enumerate(zip(self.narrow, self.levels), 1):
            x = F.interpolate(narrow(x), scale_factor=2)
            x = level(x + skips[-n]) if skips else level(x)  # skips from deep to shallow
        return x

class Encoder(nn.Module):
    """Down to 1/16 of the image in four levels, up again to 1/stride, then the tokens.

    2x2 pixels enter as channels: no convolution runs at full resolution, where it is slowest.
    """

    def __init__(self, channels: list[int], dim: int, stride: int, skips: bool):
        super().__init__()
        self.levels = nn.ModuleList(conv_block(i, o) for i, o in zip([4] + channels, channels))
        self.skips = skips
        self.shallower = n = stride.bit_length() - 2  # levels above the tokens: log2(stride) - 1
        self.upward = Upward(channels[n:][::-1])
        self.to_tokens = nn.Conv2d(channels[n], dim, 1, bias=False)  # unit_tokens removes a bias

    def forward(self, x: Tensor) -> Encoded:
        x = F.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last)  # (B,4,H/2,W/2)
        maps: list[Tensor] = []
        for level in self.levels:
            x = level(F.max_pool2d(x, 2) if maps else x)
            maps.append(x)
        z = self.to_tokens(self.upward(maps[-1], maps[self.shallower : -1]))
        return Encoded(unit_tokens(z), maps[: self.shallower] if self.skips else [])

class SegmentationDecoder(nn.Module):
    """D_s: q(z) or q'(z), and the shallower maps, if any -> logits (B,C,H,W)."""

    def __init__(self, channels: list[int], dim: int, classes: int):
        super().__init__()
        self.from_tokens = nn.Conv2d(dim, channels[-1], 1)
        self.upward = Upward(channels[::-1])
        self.head = nn.Conv2d(channels[0], 4 * classes, 1)

    def forward(self, codes: Tensor, skips: list[Tensor]) -> Tensor:
        x = self.upward(self.from_tokens(codes), skips)  # (B,c,H/2,W/2)
        return F.pixel_shuffle(self.head(x), 2)  # (B,C,H,W) from 2x2 pixels stacked into channels

class ImageDecoder(nn.Module):
    """D_i: q(z) and nothing else -> image (B,1,H,W)."""

    def __init__(self, width: int, dim: int, stride: int):
        super().__init__()
        self.doublings = stride.bit_length() - 3  # from 1/stride to 1/4: 2, 1 or 0
        self.from_tokens = nn.Conv2d(dim, 4 * width, 1)
        levels = [conv_block(4 * width, 2 * width), conv_block(2 * width, width)]
        self.levels = nn.ModuleList(levels)
        self.head = nn.Conv2d(width, 16, 1)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.from_tokens(codes)
        for n, level in enumerate(self.levels):
            x = level(F.interpolate(x, scale_factor=2) if n < self.doublings else x)
        return F.pixel_shuffle(self.head(x), 4)

class FeatureAdapter(nn.Module):
    """PFA, Figure 4: resize q(z) to the foundation model's grid (H',W'), then 1x1 convolution."""

    def __init__(self, dim: int, fm_channels: int, grid: tuple[int, int]):
        super().__init__()
        self.grid = grid
        self.project = nn.Conv2d(dim, fm_channels, 1)

    def forward(self, codes: Tensor) -> Tensor:
        return self.project(F.interpolate(codes, self.grid, mode="bilinear"))  # (B,C',H',W')

class StandInFM(nn.Sequential):
    """A frozen stand-in for the foundation model: the same random convolutions for every seed. It
    makes Eq. 11 run without weights. (B,1,H,W) -> (B,64,H/16,W/16)."""

    def __init__(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            super().__init__(
                nn.Conv2d(1, 32, 7, 4, 3), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(),
                nn.Conv2d(64, 64, 3, 2, 1), nn.InstanceNorm2d(64),
            )
        self.requires_grad_(False)

def foundation_model(kind: str, weights: str = "") -> tuple[nn.Module | None, str]:
    """The frozen model of Eq. 11 that --fm asks for, (B,1,H,W) -> (B,C',H',W'), and its name."""
    if kind == "none":
        return None, "none"
    if kind == "standin":
        return StandInFM(), "stand-in with random features"
    try:
        from extras import dinov2
    except ImportError:
        if kind == "auto":
            return None, "none (the folder extras is not here)"
        raise ImportError(f"--fm {kind}: needs the folder extras beside train.py") from None
    return dinov2.foundation_model(kind, weights)

class VQSeg(nn.Module):
    """Encoder, quantizer, both decoders and adapter: the student, and by `ema_update` the teacher.

    codebook_size 0: the tokens stay continuous, as in the supervised baseline, which lacks D_i.
    fm_grid: (C',H',W') of f_fm, Eq. 11. H, W of x: multiples of 16, at least 32.
    """

    def __init__(self, classes: int = 4, codebook_size: int = 1024, width: int = 24, dim: int = 32,
                 encoder: str = "conv16", image_branch: bool = True, usage_weight: float = 0.1,
                 fm_grid: tuple[int, int, int] | None = None):
        super().__init__()
        if encoder == "dinov2":  # the paper's, with 384 channels
            from extras.dinov2 import DINOv2Encoder, DPTDecoder

            dim = 384
            stride = 16  # of D_i, whose image is then 16/14 of x; `resized` undoes it
            self.encoder = DINOv2Encoder()
            self.segmentation_decoder = DPTDecoder(dim, classes)
        else:
            stride, skips = NETWORKS[encoder]
            channels = [width, 2 * width, 4 * width, 8 * width]
            self.encoder = Encoder(channels, dim, stride, skips)
            up_from = channels[: self.encoder.shallower + 1]
            self.segmentation_decoder = SegmentationDecoder(up_from, dim, classes)
        self.quantizer = VectorQuantizer(codebook_size, dim, usage_weight=usage_weight)
        self.image_decoder = ImageDecoder(width, dim, stride) if image_branch else None
        self.adapter = FeatureAdapter(dim, fm_grid[0], fm_grid[1:]) if fm_grid else None
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, labeled: int, how: str, eps: float, temperature: float,
                generator: torch.Generator | None) -> Decoded:
        """Eq. 7 of x (B,1,H,W). D_s gets q(z) of the first `labeled` slices, of the others q'(z) by
        PERTURBATIONS[how]; D_i and the adapter always get q(z)."""
        z, skips = self.encoder(x)
        q = self.quantizer(z)
        tokens = q.codes
        if labeled < len(x):  # q'(z): QPM, Eq. 4, or what --perturb names
            unlabeled = (q.codes[labeled:], q.indices[labeled:], q.codebook.detach())
            perturbed = PERTURBATIONS[how](*unlabeled, eps, temperature, generator)
            tokens = torch.cat([q.codes[:labeled], perturbed])
        y_hat = resized(self.segmentation_decoder(tokens, skips), x)
        x_hat = resized(self.image_decoder(q.codes), x) if self.image_decoder else None
        f_pfa = self.adapter(q.codes) if self.adapter else None
        return Decoded(y_hat, x_hat, q.indices, q.loss, f_pfa)

    def predict(self, x: Tensor, how: str = "none", eps: float = 0.0, temperature: float = 1.0,
                generator: torch.Generator | None = None) -> Tensor:
        """D_s( q(z) ), or D_s( q'(z) ) of all slices: (B,1,H,W) -> logits (B,C,H,W)."""
        z, skips = self.encoder(x)
        q = self.quantizer(z)
        tokens = PERTURBATIONS[how](q.codes, q.indices, q.codebook, eps, temperature, generator)
        return resized(self.segmentation_decoder(tokens, skips), x)

def resized(y: Tensor, x: Tensor) -> Tensor:
    """y at the size of x. DINOv2's patches of 14 pixels do not fill a crop of 128."""
    return y if y.shape[2:] == x.shape[2:] else F.interpolate(y, x.shape[2:], mode="bilinear")

@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, alpha: float) -> None:
    """theta_t <- alpha * theta_t + (1 - alpha) * theta_s, running statistics of BatchNorm too."""
    averaged = []
    for net in (teacher, student):
        averaged.append([t for t in (*net.parameters(), *net.buffers()) if t.is_floating_point()])
    torch._foreach_lerp_(*averaged, 1 - alpha)  # t.lerp_(s, 1 - alpha) of all, in few launches
