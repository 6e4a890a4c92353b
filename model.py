"""The network: encoder, quantizer, two decoders on one post-VQ space, adapter; the EMA teacher.

Implements Figure 2, Section 3.4 (dual branch, Eq. 7; teacher) and Section 3.5 (Post-VQ Feature
Adapter, PFA, Figure 4).

    x -> Encoder -> z -> VectorQuantizer -> q(z) -> ImageDecoder D_i        -> x_hat
            |                                |----> SegmentationDecoder D_s -> y_hat, of q'(z)
            '------ shallower maps ------------------'
                                             '----> FeatureAdapter          -> f_pfa

The paper does not say:
  - what is quantized when a decoder has skip connections. Ours is the deepest map; D_s also gets
    the shallower maps, continuous, as in the authors' release. D_i must not: it would copy x.
  - how tokens are scaled. Ours lose mean and variance per image and channel, and get unit length
    like the codewords. Raw features collapse the codebook.
  - which tokens of an unlabeled slice D_i gets: q(z). Eq. 9 perturbs only what D_s gets.
The paper's encoder is DINOv2 with UniMatch V2's decoder (`--encoder dinov2`, extras/dinov2.py). The
default here is a small convolutional network with BatchNorm, trained from scratch.
"""

from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from qpm import PERTURBATIONS
from vq import VectorQuantizer


class Encoded(NamedTuple):
    z: Tensor  # (B,D,h,w) tokens; h = H/16, with DINOv2 H/14
    skips: list[Tensor]  # (B,c,H/2,W/2), (B,2c,H/4,W/4), (B,4c,H/8,W/8); with DINOv2 as z

class Decoded(NamedTuple):
    y_hat: Tensor  # (B,C,H,W) logits of D_s
    x_hat: Tensor | None = None  # (B,1,H,W) image of D_i; None, as below, without a quantizer
    indices: Tensor | None = None  # (B,h,w) codewords of q(z)
    vq_loss: Tensor | None = None  # () the quantizer's own loss
    f_pfa: Tensor | None = None  # (B,C',H',W') adapted features; None without --fm too

def conv_block(inputs: int, outputs: int) -> nn.Sequential:
    """Two 3x3 convolutions, each with BatchNorm and SiLU."""
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers.append(nn.Conv2d(channels, outputs, 3, padding=1, bias=False))
        layers += [nn.BatchNorm2d(outputs), nn.SiLU(inplace=True)]
    return nn.Sequential(*layers)

def unit_tokens(z: Tensor) -> Tensor:
    """(B,D,h,w): each channel to mean 0 and variance 1 over h x w, then each token to length 1."""
    return F.normalize(F.instance_norm(z.float()), dim=1)

class Encoder(nn.Module):
    """Four levels at 1/2, 1/4, 1/8 and 1/16 of the image, then the tokens.

    2x2 pixels enter as channels: a level at full resolution would take half of a step's time.
    """

    def __init__(self, width: int, dim: int):
        super().__init__()
        channels = [width, 2 * width, 4 * width, 8 * width]
        self.levels = nn.ModuleList(conv_block(i, o) for i, o in zip([4] + channels, channels))
        self.to_tokens = nn.Conv2d(channels[-1], dim, 1, bias=False)  # unit_tokens removes a bias

    def forward(self, x: Tensor) -> Encoded:
        x = F.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last)  # (B,4,H/2,W/2)
        maps: list[Tensor] = []
        for level in self.levels:
            x = level(F.max_pool2d(x, 2) if maps else x)
            maps.append(x)
        return Encoded(unit_tokens(self.to_tokens(x)), maps[:-1])

class SegmentationDecoder(nn.Module):
    """D_s: q(z) or q'(z), and the shallower maps -> logits (B,C,H,W). Maps are added: half the work
    of a U-Net, which concatenates them."""

    def __init__(self, width: int, dim: int, classes: int):
        super().__init__()
        channels = [8 * width, 4 * width, 2 * width, width]
        self.from_tokens = nn.Conv2d(dim, channels[0], 1)
        self.narrow = nn.ModuleList(nn.Conv2d(i, o, 1) for i, o in zip(channels, channels[1:]))
        self.levels = nn.ModuleList(conv_block(c, c) for c in channels[1:])
        self.head = nn.Conv2d(width, 4 * classes, 1)

    def forward(self, codes: Tensor, skips: list[Tensor]) -> Tensor:
        x = self.from_tokens(codes)  # (B,8c,H/16,W/16)
        for narrow, level, skip in zip(self.narrow, self.levels, reversed(skips)):
            x = level(F.interpolate(narrow(x), scale_factor=2) + skip)
        return F.pixel_shuffle(self.head(x), 2)  # (B,C,H,W) from 2x2 pixels stacked into channels

class ImageDecoder(nn.Module):
    """D_i: q(z) and nothing else -> image (B,1,16h,16w)."""

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.from_tokens = nn.Conv2d(dim, 4 * width, 1)
        channels = [4 * width, 2 * width, width]
        self.levels = nn.ModuleList(conv_block(i, o) for i, o in zip(channels, channels[1:]))
        self.head = nn.Conv2d(width, 16, 1)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.from_tokens(codes)
        for level in self.levels:
            x = level(F.interpolate(x, scale_factor=2))
        return F.pixel_shuffle(self.head(x), 4)

class FeatureAdapter(nn.Module):
    """PFA, Figure 4: resize q(z) to the foundation model's grid (H',W'), then 1x1 convolution."""

    def __init__(self, dim: int, fm_channels: int, grid: tuple[int, int]):
        super().__init__()
        self.grid = grid
        self.project = nn.Conv2d(dim, fm_channels, 1)

    def forward(self, codes: Tensor) -> Tensor:
        resized = F.interpolate(codes, size=self.grid, mode="bilinear", align_corners=False)
        return self.project(resized)  # (B,C',H',W')

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

    quantize=False is the supervised baseline: encoder and D_s on continuous tokens. fm_grid is
    (C',H',W') of the foundation model's features; None: no adapter. H, W are multiples of 16.
    """

    def __init__(self, classes: int = 4, codebook_size: int = 1024, width: int = 24, dim: int = 32,
                 encoder: str = "conv", quantize: bool = True, usage_weight: float = 0.1,
                 fm_grid: tuple[int, int, int] | None = None):
        super().__init__()
        if encoder == "dinov2":  # the paper's, with 384 channels
            from extras.dinov2 import DINOv2Encoder, DPTDecoder

            dim = 384
            self.encoder = DINOv2Encoder()
            self.segmentation_decoder = DPTDecoder(dim, classes)
        else:
            self.encoder = Encoder(width, dim)
            self.segmentation_decoder = SegmentationDecoder(width, dim, classes)
        self.quantizer, self.image_decoder, self.adapter = None, None, None
        if quantize:
            self.quantizer = VectorQuantizer(codebook_size, dim, usage_weight=usage_weight)
            self.image_decoder = ImageDecoder(width, dim)
        if fm_grid:
            self.adapter = FeatureAdapter(dim, fm_grid[0], fm_grid[1:])
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, labeled: int, how: str, eps: float, temperature: float,
                generator: torch.Generator | None) -> Decoded:
        """Eq. 7, of a batch whose first `labeled` slices are labeled; the others are perturbed."""
        z, skips = self.encoder(x)
        if self.quantizer is None:
            return Decoded(resized(self.segmentation_decoder(z, skips), x))
        q = self.quantizer(z)
        tokens = q.codes
        if labeled < len(x):  # q'(z): QPM, Eq. 4, or what --perturb names
            unlabeled = (q.codes[labeled:], q.indices[labeled:], q.codebook.detach())
            perturbed = PERTURBATIONS[how](*unlabeled, eps, temperature, generator)
            tokens = torch.cat([q.codes[:labeled], perturbed])
        y_hat = resized(self.segmentation_decoder(tokens, skips), x)
        x_hat = resized(self.image_decoder(q.codes), x)
        f_pfa = self.adapter(q.codes) if self.adapter else None
        return Decoded(y_hat, x_hat, q.indices, q.loss, f_pfa)

    def predict(self, x: Tensor, how: str = "none", eps: float = 0.0, temperature: float = 1.0,
                generator: torch.Generator | None = None) -> Tensor:
        """D_s( q(z) ), or D_s( q'(z) ) of all slices: (B,1,H,W) -> logits (B,C,H,W)."""
        z, skips = self.encoder(x)
        if self.quantizer is not None:
            q = self.quantizer(z)
            z = PERTURBATIONS[how](q.codes, q.indices, q.codebook, eps, temperature, generator)
        return resized(self.segmentation_decoder(z, skips), x)

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
