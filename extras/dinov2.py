"""DINOv2 as frozen foundation model and as encoder, with UniMatch V2's decoder.

Implements the frozen model of Section 3.5 (DINOv2, Oquab et al. 2023), and the encoder and decoder
of Section 4.2 (DPT, Ranftl et al. 2021). Parameters have the names of the official files.

The paper does not say:
  - which of DINOv2's sizes: ViT-S/14 here, whose 384 channels are the authors' codewords.
  - what a patch of 14 pixels makes of a crop of 128. Nothing is padded here: a slice is resized to
    the nearest multiple of 14, and what comes out is resized back.
"""

import errno
import hashlib
import http.client
import os
import shutil
import tempfile
import urllib.request
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from data import BadInput
from model import Encoded, unit_tokens

# ViT-S/14 without registers, Apache-2.0
OFFICIAL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth"
OFFICIAL_SHA256 = "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9"

class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and scaled per channel: (B,N,C) -> (B,N,C)."""

    def __init__(self, C: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(C, eps=1e-6)
        self.norm2 = nn.LayerNorm(C, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(C, 3 * C), "proj": nn.Linear(C, C)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(C, 4 * C), "fc2": nn.Linear(4 * C, C)})
        self.ls1 = nn.ParameterDict({"gamma": torch.ones(C)})
        self.ls2 = nn.ParameterDict({"gamma": torch.ones(C)})

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.attn["qkv"](self.norm1(x)).reshape(B, N, 3, C // 64, 64)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B,heads,N,64) each
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C)
        x = x + self.ls1["gamma"] * self.attn["proj"](attended)
        return x + self.ls2["gamma"] * self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))

class DINOv2(nn.Module):
    """The Vision Transformer with patches of 14 pixels: small (ViT-S/14), base or large."""

    def __init__(self, C: int = 384):
        super().__init__()
        self.channels = C
        depth = {384: 12, 768: 12, 1024: 24}[C]
        self.cls_token = nn.Parameter(1e-6 * torch.randn(1, 1, C))
        # The class token, then 37 x 37 patches: the last training images had 518 pixels.
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + 37 * 37, C))
        self.mask_token = nn.Parameter(torch.zeros(1, C), requires_grad=False)  # not used here
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, C, 14, stride=14)})
        self.blocks = nn.ModuleList(Block(C) for _ in range(depth))
        self.norm = nn.LayerNorm(C, eps=1e-6)

    def positions(self, h: int, w: int) -> Tensor:
        """Position embeddings for h x w patches: (1,1+hw,C).

        Subtle: the official code adds 0.1 to h and w and passes the ratio, not the size, to the
        bicubic resampling. The weights were trained with it.
        """
        grid = self.pos_embed[:, 1:].float().reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
        ratio = ((h + 0.1) / 37, (w + 0.1) / 37)
        grid = F.interpolate(grid, scale_factor=ratio, mode="bicubic")  # (1,C,h,w)
        grid = grid.flatten(2).transpose(1, 2).to(self.pos_embed)  # (1,hw,C)
        return torch.cat([self.pos_embed[:, :1], grid], 1)

    def taps(self, x: Tensor, layers: tuple[int, ...]) -> list[Tensor]:
        """Patch tokens after these blocks, each through the final LayerNorm.

        (B,3,H,W) normalized, H and W multiples of 14 -> [(B,C,H/14,W/14)].
        """
        B, _, H, W = x.shape
        h, w = H // 14, W // 14
        x = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)  # (B,hw,C)
        x = torch.cat([self.cls_token.expand(B, -1, -1), x], 1) + self.positions(h, w)  # (B,1+hw,C)
        tapped = []
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in layers:
                tapped.append(self.norm(x)[:, 1:].transpose(1, 2).reshape(B, -1, h, w))
        return tapped

    def forward(self, x: Tensor) -> Tensor:
        """f_fm of Eq. 11: gray slices in [0,1], (B,1,H,W) -> (B,C',H',W')."""
        return self.taps(imagenet_colors(to_patches(x)), (len(self.blocks) - 1,))[0]

def to_patches(x: Tensor) -> Tensor:
    """(B,1,H,W) resized to the nearest multiples of 14."""
    size = [max(14, round(n / 14) * 14) for n in x.shape[-2:]]
    return F.interpolate(x, size=size, mode="bicubic", antialias=True)

def imagenet_colors(x: Tensor) -> Tensor:
    """Gray slices in [0,1] -> normalized color images, as such models know: (B,3,H,W)."""
    mean_std = ((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))
    return torch.cat([(x - mean) / std for mean, std in mean_std], 1)

class DINOv2Encoder(nn.Module):
    """UniMatch V2's: tokens z from the deepest of four tapped blocks, the other three as skips."""

    def __init__(self):
        super().__init__()
        self.vit = DINOv2()

    def load_pretrained(self, weights: str) -> None:
        """ViT-S/14; the encoder must never start from random weights."""
        model = pretrained(weights, "--encoder dinov2")
        if model.channels != 384:
            raise refused(weights, f"has {model.channels} channels, but --encoder dinov2 needs 384")
        self.vit.load_state_dict(model.state_dict())

    def forward(self, x: Tensor) -> Encoded:
        *skips, z = self.vit.taps(imagenet_colors(to_patches(x)), (2, 5, 8, 11))
        return Encoded(unit_tokens(z), skips)

class ResidualUnit(nn.Module):
    """x + two 3x3 convolutions, each after a ReLU."""

    def __init__(self, width: int):
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(F.relu(x))))

class DPTDecoder(nn.Module):
    """D_s of UniMatch V2: q(z) and three taps, all (B,D,h,w) -> logits (B,C,14h,14w).

    The four maps become 4h, 2h, h and h/2 high, and are fused from the deepest upward.
    """

    def __init__(self, dim: int, classes: int, width: int = 64):
        super().__init__()
        channels = [dim // 8, dim // 4, dim // 2, dim]
        self.project = nn.ModuleList(nn.Conv2d(dim, c, 1) for c in channels)
        larger = [nn.ConvTranspose2d(c, c, k, stride=k) for c, k in zip(channels, (4, 2))]
        smaller = nn.Conv2d(dim, dim, 3, stride=2, padding=1)
        self.resize = nn.ModuleList([*larger, nn.Identity(), smaller])
        self.narrow = nn.ModuleList(nn.Conv2d(c, width, 3, padding=1, bias=False) for c in channels)
        self.across = nn.ModuleList(ResidualUnit(width) for _ in range(3))
        self.level = nn.ModuleList(ResidualUnit(width) for _ in range(4))
        self.out = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(4))
        convolution = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Sequential(convolution, nn.ReLU(inplace=True), nn.Conv2d(width, classes, 1))

    def forward(self, codes: Tensor, skips: list[Tensor]) -> Tensor:
        h, w = codes.shape[-2:]
        maps = []
        for k, x in enumerate([*skips, codes]):
            maps.append(self.narrow[k](self.resize[k](self.project[k](x))))  # (B,width,4h,4w), ...
        sizes = [(8 * h, 8 * w)] + [m.shape[-2:] for m in maps[:3]]
        x = maps[3]  # (B,width,h/2,w/2)
        for k in (3, 2, 1, 0):
            x = x if k == 3 else x + self.across[k](maps[k])
            # DPT enlarges first; a 1x1 convolution commutes with it, at a quarter of the work.
            x = self.out[k](self.level[k](x))
            x = F.interpolate(x, size=sizes[k], mode="bilinear", align_corners=True)
        return F.interpolate(self.head(x), (14 * h, 14 * w), mode="bilinear", align_corners=True)

class TorchScriptFM(nn.Module):
    """Any other frozen model (Table 4): maps normalized (B,3,H,W) to features (B,C',H',W')."""

    def __init__(self, path: str):
        super().__init__()
        check_file(path)
        try:
            fault = "is not a TorchScript file"
            self.model = torch.jit.load(path, map_location="cpu").eval()
            fault = "makes no feature map (B,C',H',W') of an image (1,3,128,128)"
            with torch.no_grad():
                _, self.channels, _, _ = self.model(torch.zeros(1, 3, 128, 128)).shape
        except Exception:  # of any kind; PyTorch's own lines are about its zip reader
            remedy = "write it with torch.jit.trace(model, torch.zeros(1, 3, 128, 128)).save(FILE)"
            raise refused(path, fault, remedy) from None

    def forward(self, x: Tensor) -> Tensor:
        return self.model(imagenet_colors(x))

def foundation_model(kind: str, weights: str) -> tuple[nn.Module | None, str]:
    """The frozen model for --fm auto, dinov2 or torchscript, and its name for the run record."""
    if kind == "torchscript":
        if not weights:
            raise BadInput("--fm torchscript: needs a model; give --fm-weights FILE")
        return TorchScriptFM(weights).requires_grad_(False).eval(), f"TorchScript {weights}"
    model = pretrained(weights, "--fm dinov2" if kind == "dinov2" else "")
    if model is None:
        return None, "none (no DINOv2 weights: offline)"
    return model.requires_grad_(False).eval(), f"DINOv2, {model.channels} channels"

def pretrained(weights: str, needed_by: str) -> DINOv2 | None:
    """From this file, else the cache or network. If not to be had: None, or the flag's BadInput."""
    path = weights or official_weights()
    if needed_by and not path:
        raise BadInput(f"{needed_by}: no weights; download {OFFICIAL}, give --fm-weights FILE")
    return load_dinov2(path) if path else None

def official_weights() -> Path | None:
    """The official ViT-S/14 in PyTorch's cache, downloaded there if need be; None if offline."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(OFFICIAL).name
    if not os.path.exists(path):
        fetch(path)
    if os.path.exists(path) and not is_official(path):  # torch.hub would not notice
        raise BadInput(f"{path}: not the official file, or cut off; remove it, and start again")
    return path if os.path.exists(path) else None

def is_official(path: Path) -> bool:
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == OFFICIAL_SHA256

def fetch(path: Path) -> None:
    """Download the official file to `path`. Where that fails there is no file."""
    print(f"downloading {OFFICIAL} (88 MB) to {path.parent}", flush=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=path.parent)
    except OSError:
        raise BadInput(f"{path.parent}: cannot be written; set TORCH_HOME elsewhere") from None
    with folder:
        part = Path(folder.name, "part")
        try:
            with urllib.request.urlopen(OFFICIAL, timeout=5) as source, open(part, "wb") as target:
                shutil.copyfileobj(source, target)
        except (OSError, http.client.HTTPException) as error:  # offline, refused or cut off
            if getattr(error, "errno", None) == errno.ENOSPC:
                remedy = "make room, or set TORCH_HOME elsewhere"
                raise BadInput(f"{path.parent}: the disk is full; {remedy}") from None
            return
        if is_official(part):
            os.replace(part, path)  # at once: other processes see the whole file or none

def refused(path: str | Path, fault: str, remedy: str = f"get {OFFICIAL}") -> BadInput:
    return BadInput(f"--fm-weights {path}: {fault}; {remedy}")

def check_file(path: str | Path) -> None:
    if not os.path.isfile(path):
        raise refused(path, "is a folder" if os.path.isdir(path) else "no such file", "name a file")

def load_dinov2(path: str | Path) -> DINOv2:
    """A DINOv2 with the weights of a file in the official format: all names and shapes must fit."""
    check_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of any kind; PyTorch's own lines advise to load unsafely
        if "TorchScript" in str(error):
            raise refused(path, "is a TorchScript file", "add --fm torchscript") from None
        raise refused(path, "not a PyTorch file of tensors alone, or damaged") from None
    try:
        model = DINOv2(state["cls_token"].shape[2])
        model.load_state_dict(state)
    except Exception as error:  # of any kind; PyTorch's own lines are many
        fault = " ".join(str(error).split())[:200]
        raise refused(path, f"not a flat DINOv2 state dict ({fault})") from None
    return model
