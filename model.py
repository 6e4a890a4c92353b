"""The network: encoder -> quantizer -> two decoders on one shared post-VQ space, and the adapter to a foundation model.

Implements Figure 2, Section 3.4 (dual branch, Eq. 7; EMA teacher) and Section 3.5 (Post-VQ Feature Adapter, Figure 4).

    x -> Encoder -> z -> VectorQuantizer -> q(z) -> ImageDecoder         -> x_hat   (sees q(z) and nothing else)
            |                               |----> SegmentationDecoder -> y_hat   (q(z), or q'(z) after QPM)
            '---- shallower maps, continuous ------'
                                            '----> FeatureAdapter      -> f_pfa   (compared with the frozen model's f_fm)

The paper does not say:
  - what is quantized when a decoder has skip connections. We quantize the deepest map; the segmentation decoder also gets
    the shallower maps, unquantized, as in the authors' release. The image decoder must not, or it would copy the image.
  - how tokens are scaled. Ours go through a 1x1 convolution to few channels, lose their mean and variance per image and
    channel, and get unit length, like the codewords. With raw features a codebook collapses; with this, all 1024
    codewords are in use at the end of the README's ACDC run.
The paper's encoder is DINOv2; the default here is a small convolutional one that trains from scratch on two CPU cores.
GroupNorm everywhere: it has no running statistics, so the EMA teacher has no buffers to forget, and a batch split over
several GPUs gives the same result as one.

Run `python model.py RUN` to draw one validation slice on its way through Figure 2.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import qpm
from vq import VectorQuantizer, straight_through


class Encoded(NamedTuple):
    z: Tensor  # (B,D,h,w) tokens, h = H/16
    skips: list[Tensor]  # shallower maps: (B,c,H/2,W/2), (B,2c,H/4,W/4), (B,4c,H/8,W/8)


class GroupNorm(nn.GroupNorm):
    """In float32 also under autocast, as CUDA does it of itself. On a CPU the bfloat16 one makes a training step 1.3 times as long."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


def block(inputs: int, outputs: int) -> nn.Sequential:
    """Two 3x3 convolutions, each with GroupNorm and SiLU."""
    layers: list[nn.Module] = []
    for c in (inputs, outputs):
        layers += [nn.Conv2d(c, outputs, 3, padding=1, bias=False), GroupNorm(8, outputs), nn.SiLU(inplace=True)]
    return nn.Sequential(*layers)


class Encoder(nn.Module):
    """Four levels at 1/2, 1/4, 1/8 and 1/16 of the image, then the tokens.

    The image enters as 2x2 pixels stacked into channels. A level at full resolution would take more than half of the
    time of a step on the CPU and buys no accuracy at equal minutes.
    """

    def __init__(self, width: int, dim: int):
        super().__init__()
        channels = [width, 2 * width, 4 * width, 8 * width]
        self.levels = nn.ModuleList(block(i, o) for i, o in zip([4] + channels, channels))
        self.to_tokens = nn.Conv2d(channels[-1], dim, 1)

    def forward(self, x: Tensor) -> Encoded:
        x = F.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last)  # (B,4,H/2,W/2)
        maps = []
        for level in self.levels:
            x = level(F.max_pool2d(x, 2) if maps else x)
            maps.append(x)
        z = F.instance_norm(self.to_tokens(x).float())  # zero mean, unit variance over h x w
        return Encoded(F.normalize(z, dim=1), maps[:-1])


class SegmentationDecoder(nn.Module):
    """D_s: q(z) and the shallower maps -> logits (B,C,H,W). Maps from below and from across are added, not stacked: half the work."""

    def __init__(self, width: int, dim: int, classes: int):
        super().__init__()
        channels = [8 * width, 4 * width, 2 * width, width]
        self.from_tokens = nn.Conv2d(dim, channels[0], 1)
        self.narrow = nn.ModuleList(nn.Conv2d(i, o, 1) for i, o in zip(channels, channels[1:]))
        self.levels = nn.ModuleList(block(c, c) for c in channels[1:])
        self.head = nn.Conv2d(width, 4 * classes, 1)

    def forward(self, codes: Tensor, skips: list[Tensor]) -> Tensor:
        x = self.from_tokens(codes)
        for narrow, level, skip in zip(self.narrow, self.levels, reversed(skips)):
            x = level(F.interpolate(narrow(x), scale_factor=2) + skip)
        return F.pixel_shuffle(self.head(x), 2)


class ImageDecoder(nn.Module):
    """D_i: q(z) alone -> reconstructed image (B,1,H,W). Light: at 1/16 of the resolution there is no fine detail to give back."""

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.from_tokens = nn.Conv2d(dim, 4 * width, 1)
        self.levels = nn.ModuleList([block(4 * width, 2 * width), block(2 * width, width)])
        self.head = nn.Conv2d(width, 16, 1)

    def forward(self, codes: Tensor) -> Tensor:
        x = self.from_tokens(codes)
        for level in self.levels:
            x = level(F.interpolate(x, scale_factor=2))
        return F.pixel_shuffle(self.head(x), 4)


class FeatureAdapter(nn.Module):
    """PFA, Figure 4: resize q(z) to the foundation model's grid, then a 1x1 convolution to its channels."""

    def __init__(self, dim: int, fm_channels: int):
        super().__init__()
        self.project = nn.Conv2d(dim, fm_channels, 1)

    def forward(self, codes: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.project(F.interpolate(codes, size=grid, mode="bilinear", align_corners=False))


class StandInFM(nn.Module):
    """A frozen stand-in for the foundation model: random convolutions, the same for every seed. (B,1,H,W) -> (B,C',H/16,W/16).

    It knows nothing about images. It makes Eq. 11 run where no pretrained weights are at hand.
    """

    channels = 64

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        for name, (i, o, k) in {"a": (1, 32, 7), "b": (32, 64, 3), "c": (64, 64, 3)}.items():
            self.register_buffer(name, torch.randn(o, i, k, k, generator=draw) * (2 / (i * k * k)) ** 0.5)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x - 0.25, self.a, stride=4, padding=3))
        x = F.relu(F.conv2d(x, self.b, stride=2, padding=1))
        return F.instance_norm(F.conv2d(x, self.c, stride=2, padding=1).float())


class VQSeg(nn.Module):
    """Encoder, quantizer, both decoders and the adapter: the student, and by `ema_update` the teacher."""

    stride = 16  # H and W must be multiples of this

    def __init__(self, classes: int = 4, codebook_size: int = 1024, dim: int = 32, width: int = 24, quantize: bool = True):
        super().__init__()
        self.quantize = quantize
        self.encoder = Encoder(width, dim)
        self.quantizer = VectorQuantizer(codebook_size, dim)
        self.segmentation_decoder = SegmentationDecoder(width, dim, classes)
        self.image_decoder = ImageDecoder(width, dim)
        self.adapter = FeatureAdapter(dim, StandInFM.channels)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        """Plain prediction, no perturbation: (B,1,H,W) -> logits (B,C,H,W). Without `quantize` the tokens stay continuous."""
        z, skips = self.encoder(x)
        return self.segmentation_decoder(self.quantizer(z).codes if self.quantize else z, skips)

    def perturb(self, z: Tensor, codes: Tensor, indices: Tensor, how: str, eps: float, temperature: float,
                generator: torch.Generator | None = None) -> Tensor:
        """q'(z), what the segmentation decoder gets for an unlabelled strong view; backward the identity to z.

        z and codes (B,D,h,w), indices (B,h,w) -> (B,D,h,w). Only dropout acts on the codes' numbers, as in Section 3.2.
        """
        if how == "none":
            return codes
        if how == "dropout":
            return qpm.dropout(codes, eps, generator)
        codebook = self.quantizer.codebook.detach()
        if how == "shuffle":
            indices = qpm.shuffle(indices, eps, generator)
        else:
            indices = qpm.perturb(indices, codebook, eps, temperature, generator)
        return straight_through(z, self.quantizer.indices_to_codes(indices, codebook))


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, alpha: float) -> None:
    """theta_t <- alpha * theta_t + (1 - alpha) * theta_s for every parameter; buffers are copied."""
    for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
        t.lerp_(s, 1 - alpha)
    for t, s in zip(teacher.buffers(), student.buffers(), strict=True):
        t.copy_(s)


def load_teacher(path: Path, device: torch.device) -> tuple[VQSeg, dict]:
    """The network that a checkpoint of train.py describes, with the teacher's weights, and the checkpoint itself."""
    saved = torch.load(path, map_location=device, weights_only=True)
    s = saved["settings"]
    model = VQSeg(saved["classes"], s["codebook_size"], s["dim"], s["width"], quantize=not s["supervised"]).to(device)
    model.load_state_dict(saved["teacher"])
    return model.eval(), saved


@torch.no_grad()
def main() -> None:
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap

    parser = argparse.ArgumentParser(description="Draw one slice on its way through Figure 2.")
    parser.add_argument("run", type=Path, help="run folder of train.py, not --supervised")
    parser.add_argument("--out", type=Path, default=Path("figures/model.png"))
    args = parser.parse_args()
    if not (args.run / "codebooks.pt").exists() or not (args.run / "best.pt").exists():
        parser.exit(2, f"model.py: {args.run}: holds no best.pt and codebooks.pt; give a finished run of train.py without --supervised\n")
    model, saved = load_teacher(args.run / "best.pt", torch.device("cpu"))
    x = saved["sample"][None]  # (1,1,H,W)
    z, skips = model.encoder(x)
    q = model.quantizer(z)
    # Codewords that lie near each other get like colors: their position along the codebook's main direction.
    codebook = model.quantizer.codebook
    main_direction = torch.linalg.svd(codebook - codebook.mean(0), full_matrices=False).Vh[0]
    rec, plain = model.image_decoder(q.codes)[0, 0], model.segmentation_decoder(q.codes, skips).argmax(1)[0]
    token_map = (codebook @ main_direction)[q.indices[0]]  # (h,w)
    pictures = [("input x", x[0, 0], "gray"), (f"tokens, {q.indices.unique().numel()} codewords", token_map, "viridis"),
                ("reconstruction", rec, "gray"), ("prediction", plain, None)]
    generator = torch.Generator().manual_seed(0)
    for eps in (0.3, 0.7, 1.0):
        codes = model.perturb(z, q.codes, q.indices, "qpm", eps, saved["settings"]["temperature"], generator)
        perturbed = model.segmentation_decoder(codes, skips).argmax(1)[0]
        pictures.append((f"QPM, eps = {eps}: {(perturbed != plain).double().mean():.1%} differ", perturbed, None))
    figure, axes = plt.subplots(1, len(pictures), figsize=(15, 2.6), layout="constrained")
    classes = ListedColormap(["#000000", "#0072B2", "#E69F00", "#CC79A7", "#009E73", "#F0E442"][: saved["classes"]])
    for axis, (title, picture, colors) in zip(axes, pictures):
        if colors:
            axis.imshow(picture, cmap=colors, vmin=0 if colors == "gray" else None, vmax=1 if colors == "gray" else None)
        else:
            axis.imshow(picture, cmap=classes, vmin=0, vmax=saved["classes"] - 1, interpolation="nearest")
        axis.set_title(title, fontsize=8)
        axis.set(xticks=[], yticks=[])
    figure.savefig(args.out, dpi=75)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
