"""DINOv2: the official file's names and shapes, features equal to an independent transformer's, the encoder and decoder of UniMatch V2."""

import math

import numpy as np
import pytest
import torch
import torch.nn as nn

import model
from model import DINOv2, VQSeg


def official_state(C: int = 384, depth: int = 12) -> dict[str, torch.Tensor]:
    """A state dict with the names and shapes of the official files, written down here once more, and random values."""
    shapes = {"cls_token": (1, 1, C), "pos_embed": (1, 1370, C), "mask_token": (1, C), "patch_embed.proj.weight": (C, 3, 14, 14),
              "patch_embed.proj.bias": (C,), "norm.weight": (C,), "norm.bias": (C,)}
    for n in range(depth):
        for name, shape in {"norm1.weight": (C,), "norm1.bias": (C,), "attn.qkv.weight": (3 * C, C), "attn.qkv.bias": (3 * C,),
                            "attn.proj.weight": (C, C), "attn.proj.bias": (C,), "ls1.gamma": (C,), "norm2.weight": (C,), "norm2.bias": (C,),
                            "mlp.fc1.weight": (4 * C, C), "mlp.fc1.bias": (4 * C,), "mlp.fc2.weight": (C, 4 * C), "mlp.fc2.bias": (C,),
                            "ls2.gamma": (C,)}.items():
            shapes[f"blocks.{n}.{name}"] = shape
    g = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=g) * (0.3 if "gamma" in name or len(shape) == 1 else 0.05) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "vits.pth"
    torch.save(official_state(), path)
    return path


def bicubic(grid: np.ndarray, h: int, w: int) -> np.ndarray:
    """(37,37,C) float64 -> (h,w,C), the official way: output pixel i looks at (i + 1/2) / s - 1/2 with s = (h + 0.1) / 37, a = -0.75."""

    def matrix(n: int) -> np.ndarray:
        m, scale = np.zeros((n, 37)), (n + 0.1) / 37
        for i in range(n):
            at = (i + 0.5) / scale - 0.5
            for k in range(math.floor(at) - 1, math.floor(at) + 3):
                d = abs(at - k)
                near, far = 1.25 * d**3 - 2.25 * d**2 + 1, -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
                m[i, min(max(k, 0), 36)] += near if d <= 1 else far
        return m

    return np.einsum("ip,jq,pqc->ijc", matrix(h), matrix(w), grid)


def reference_features(state: dict, x: torch.Tensor) -> torch.Tensor:
    """PyTorch's own TransformerEncoder in float64; LayerScale is folded into the matrices before it, patches by unfold."""
    C, depth = state["cls_token"].shape[-1], 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks"))
    s = {name: value.double() for name, value in state.items()}
    layer = nn.TransformerEncoderLayer(C, C // 64, 4 * C, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, depth, nn.LayerNorm(C, 1e-6), enable_nested_tensor=False).double()
    theirs = {"norm.weight": s["norm.weight"], "norm.bias": s["norm.bias"]}
    for n in range(depth):
        b = {name.removeprefix(f"blocks.{n}."): value for name, value in s.items() if name.startswith(f"blocks.{n}.")}
        t = {"self_attn.in_proj_weight": b["attn.qkv.weight"], "self_attn.in_proj_bias": b["attn.qkv.bias"],
             "self_attn.out_proj.weight": b["ls1.gamma"][:, None] * b["attn.proj.weight"],
             "self_attn.out_proj.bias": b["ls1.gamma"] * b["attn.proj.bias"],
             "linear1.weight": b["mlp.fc1.weight"], "linear1.bias": b["mlp.fc1.bias"],
             "linear2.weight": b["ls2.gamma"][:, None] * b["mlp.fc2.weight"], "linear2.bias": b["ls2.gamma"] * b["mlp.fc2.bias"],
             **{f"norm{k}.{part}": b[f"norm{k}.{part}"] for k in (1, 2) for part in ("weight", "bias")}}
        theirs |= {f"layers.{n}.{name}": value for name, value in t.items()}
    encoder.load_state_dict(theirs)
    B, _, H, W = x.shape
    h, w = H // 14, W // 14
    patches = nn.functional.unfold(x.double(), 14, stride=14).transpose(1, 2)  # (B,hw,3*14*14)
    tokens = patches @ s["patch_embed.proj.weight"].reshape(C, -1).T + s["patch_embed.proj.bias"]
    grid = s["pos_embed"][0, 1:].reshape(37, 37, C).numpy()
    positions = grid if (h, w) == (37, 37) else bicubic(grid, h, w)
    tokens = tokens + torch.from_numpy(positions).reshape(1, h * w, C)
    first = (s["cls_token"] + s["pos_embed"][:, :1]).expand(B, -1, -1)
    with torch.no_grad():
        out = encoder(torch.cat([first, tokens], 1))
    return out[:, 1:].transpose(1, 2).reshape(B, C, h, w)


def test_state_dict_has_the_official_names_and_shapes():
    ours, official = DINOv2("small").state_dict(), official_state()
    assert len(official) == 175 and sum(v.numel() for v in official.values()) == 22_056_576
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in official.items()}


@pytest.mark.parametrize("size, C, depth", [("base", 768, 12), ("large", 1024, 24)])
def test_larger_sizes_have_the_official_names_and_shapes_too(size, C, depth):
    with torch.device("meta"):
        ours = DINOv2(size).state_dict()
    assert {k: tuple(v.shape) for k, v in ours.items()} == {k: tuple(v.shape) for k, v in official_state(C, depth).items()}


@pytest.mark.parametrize("H, W", [(224, 224), (126, 126), (518, 518), (140, 266)])
def test_features_equal_an_independent_transformers(weights, H, W):
    x = torch.randn(1, 3, H, W, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = model.load_dinov2(weights).features(x)
    theirs = reference_features(official_state(), x)
    assert ours.shape == (1, 384, H // 14, W // 14) and (ours - theirs).abs().max() < 1e-4 and theirs.abs().max() > 1


def test_gray_slices_are_resized_to_whole_patches_and_normalized_as_colors(weights):
    dino, x = model.load_dinov2(weights), torch.rand(2, 1, 128, 160, generator=torch.Generator().manual_seed(0))
    seen = []
    dino.features = lambda image: seen.append(image) or image
    dino(x)
    assert seen[0].shape == (2, 3, 126, 154)  # the nearest multiples of 14
    dino(torch.full((1, 1, 126, 126), 0.5))
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    assert torch.allclose(seen[1][0, :, 0, 0], (0.5 - mean) / deviation)


def test_weights_that_do_not_fit_are_refused(tmp_path, weights):
    right = torch.load(weights, weights_only=True)
    missing = {name: value for name, value in right.items() if name != "norm.bias"}
    for wrong in (missing, right | {"extra": torch.zeros(1)}, right | {"mask_token": torch.zeros(1, 5)}):
        torch.save(wrong, tmp_path / "other.pth")
        with pytest.raises(RuntimeError):
            model.load_dinov2(tmp_path / "other.pth")


def test_official_file_is_taken_from_the_cache_only_with_the_right_size_and_hash(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert model.official_weights(download=False) is None
    cached = tmp_path / "checkpoints" / "dinov2_vits14_pretrain.pth"
    cached.parent.mkdir()
    cached.write_bytes(b"hello")
    with pytest.raises(ValueError, match="not the official file"):
        model.official_weights(download=False)
    monkeypatch.setattr(model, "OFFICIAL_BYTES", 5)
    with pytest.raises(ValueError, match="not the official file"):  # right size, wrong content
        model.official_weights(download=False)
    monkeypatch.setattr(model, "OFFICIAL_SHA256", "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824")  # of "hello"
    assert model.official_weights(download=False) == cached


def test_a_download_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def broken(url, target, hash_prefix):
        assert url == model.OFFICIAL and hash_prefix == model.OFFICIAL_SHA256
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", broken)
    assert model.official_weights(download=True) is None and not list(tmp_path.rglob("*.pth"))


# --- as encoder


def test_dinov2_encoder_quantizes_the_deepest_of_four_taps_and_both_branches_give_back_the_size():
    torch.manual_seed(0)
    net, x = VQSeg(3, codebook_size=32, encoder="dinov2", width=8), torch.rand(1, 1, 126, 70)
    z, skips = net.encoder(x)
    vit = net.encoder.vit
    expected = vit.taps(model.imagenet_colors(x), (2, 5, 8, 11))
    assert all(torch.equal(a, b) for a, b in zip(skips, expected[:3]))
    assert torch.allclose(expected[3], vit.features(model.imagenet_colors(x)))
    assert torch.equal(z, model.unit_tokens(expected[3])) and z.shape == (1, 384, 9, 5)
    q = net.quantizer(z)
    assert net.segmentation_decoder(q.codes, skips).shape == (1, 3, 126, 70) and net.image_decoder(q.codes).shape == (1, 1, 126, 70)
    with pytest.raises(ValueError, match="an image of 128 x 70: .*crop to 126 x 70"):
        net(torch.rand(1, 1, 128, 70))


def test_dpt_decoder_hears_every_map():
    torch.manual_seed(0)
    net = VQSeg(3, codebook_size=32, encoder="dinov2", width=8)
    z, skips = net.encoder(torch.rand(1, 1, 70, 56))
    inputs = [t.detach().requires_grad_() for t in (z, *skips)]
    net.segmentation_decoder(inputs[0], inputs[1:]).square().sum().backward()
    assert all(t.grad.abs().sum() > 0 for t in inputs)
    assert all(p.grad is not None and p.grad.any() for p in net.segmentation_decoder.parameters())
