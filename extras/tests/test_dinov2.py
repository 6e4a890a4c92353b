"""DINOv2: official names and shapes, features against PyTorch's own transformer, bad weights."""

import hashlib
import io
import itertools
import math
import urllib.error
from argparse import Namespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import BadInput
from extras import dinov2
from model import VQSeg, unit_tokens


def official_shapes(C: int = 384, depth: int = 12) -> dict[str, tuple]:
    """The entries of the official files, of dinov2_vits14_pretrain.pth 175."""
    shapes = {"cls_token": (1, 1, C), "pos_embed": (1, 1370, C), "mask_token": (1, C),
              "patch_embed.proj.weight": (C, 3, 14, 14), "patch_embed.proj.bias": (C,),
              "norm.weight": (C,), "norm.bias": (C,)}
    for n in range(depth):
        block = {"norm1.weight": (C,), "norm1.bias": (C,), "attn.qkv.weight": (3 * C, C),
                 "attn.qkv.bias": (3 * C,), "attn.proj.weight": (C, C), "attn.proj.bias": (C,),
                 "ls1.gamma": (C,), "norm2.weight": (C,), "norm2.bias": (C,),
                 "mlp.fc1.weight": (4 * C, C), "mlp.fc1.bias": (4 * C,),
                 "mlp.fc2.weight": (C, 4 * C), "mlp.fc2.bias": (C,), "ls2.gamma": (C,)}
        shapes |= {f"blocks.{n}.{name}": shape for name, shape in block.items()}
    return shapes


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Random weights in the official format, with LayerScale and norms that do something."""
    g = torch.Generator().manual_seed(0)
    scale = {1: 0.3, 2: 0.05, 3: 0.05, 4: 0.05}  # by the number of axes
    shapes = official_shapes().items()
    return {name: scale[len(shape)] * torch.randn(shape, generator=g) for name, shape in shapes}


@pytest.fixture(scope="module")
def file(state, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("weights") / "vits.pth"
    torch.save(state, path)
    return str(path)


@pytest.fixture(scope="module")
def vit(file):
    return dinov2.load_dinov2(file).eval()


@pytest.mark.parametrize("C, depth, entries", [(384, 12, 175), (768, 12, 175), (1024, 24, 343)])
def test_parameters_have_the_official_names_and_shapes(C, depth, entries):
    with torch.device("meta"):
        net = dinov2.DINOv2(C)
    found = {name: tuple(t.shape) for name, t in net.state_dict().items()}
    assert found == official_shapes(C, depth) and len(found) == entries and net.channels == C


def resampling(n: int) -> torch.Tensor:
    """(n,37) bicubic weights, a = -0.75: output i samples (i + 0.5) / s - 0.5, s = (n + 0.1) / 37.

    The ratio is the official one; n / 37 would be another function.
    """
    matrix = torch.zeros(n, 37, dtype=torch.float64)
    for i in range(n):
        place = (i + 0.5) * 37 / (n + 0.1) - 0.5
        for k in range(math.floor(place) - 1, math.floor(place) + 3):
            d = abs(place - k)
            near = 1.25 * d**3 - 2.25 * d**2 + 1
            far = -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[i, min(max(k, 0), 36)] += near if d <= 1 else far
    return matrix


def reference(state: dict, x: torch.Tensor) -> torch.Tensor:
    """The same features by PyTorch's TransformerEncoder in float64, LayerScale folded in."""
    s = {name: t.double() for name, t in state.items()}
    names = {"self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj.": "attn.proj.",
             "linear1.": "mlp.fc1.", "linear2.": "mlp.fc2.", "norm1.": "norm1.", "norm2.": "norm2."}
    gammas = {"attn.proj.": "ls1.gamma", "mlp.fc2.": "ls2.gamma"}
    theirs = {"norm.weight": s["norm.weight"], "norm.bias": s["norm.bias"]}
    for n, kind, name in itertools.product(range(12), ("weight", "bias"), names):
        t = s[f"blocks.{n}.{names[name]}{kind}"]
        if names[name] in gammas:
            t = (s[f"blocks.{n}.{gammas[names[name]]}"] * t.T).T
        theirs[f"layers.{n}.{name}{kind}"] = t
    layer = nn.TransformerEncoderLayer(384, 6, 1536, 0.0, "gelu", 1e-6, True, True)
    encoder = nn.TransformerEncoder(layer, 12, nn.LayerNorm(384, 1e-6), False).double()
    encoder.load_state_dict(theirs)
    h, w = x.shape[-2] // 14, x.shape[-1] // 14
    patches = F.unfold(x.double(), 14, stride=14).transpose(1, 2)  # (B,hw,3*14*14)
    tokens = patches @ s["patch_embed.proj.weight"].reshape(384, -1).T + s["patch_embed.proj.bias"]
    grid = s["pos_embed"][0, 1:].reshape(37, 37, 384)
    grid = torch.einsum("ip,jq,pqc->ijc", resampling(h), resampling(w), grid)
    first = (s["cls_token"] + s["pos_embed"][:, :1]).expand(len(x), 1, 384)
    out = encoder(torch.cat([first, tokens + grid.reshape(1, h * w, 384)], 1))
    return out[:, 1:].transpose(1, 2).reshape(len(x), 384, h, w)


@pytest.mark.parametrize("size", [(126, 126), (56, 98)])
@torch.no_grad()
def test_features_equal_pytorchs_own_transformer_in_float64(vit, state, size):
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(1))
    assert (vit.taps(x, (11,))[0] - reference(state, x)).abs().max() < 1e-4


@torch.no_grad()
def test_features_of_gray_slices_are_the_last_blocks_at_the_nearest_multiples_of_14(vit):
    x = torch.rand(2, 1, 128, 160)
    colors = dinov2.imagenet_colors(dinov2.to_patches(x))
    assert colors.shape == (2, 3, 126, 154) and torch.equal(vit(x), vit.taps(colors, (11,))[0])


def test_gray_slices_become_colors_normalized_as_imagenet():
    color = dinov2.imagenet_colors(torch.full((1, 1, 1, 1), 0.5)).flatten()
    expected = [(0.5 - 0.485) / 0.229, (0.5 - 0.456) / 0.224, (0.5 - 0.406) / 0.225]
    assert color.tolist() == pytest.approx(expected)


# -- As encoder, with UniMatch V2's decoder


@torch.no_grad()
def test_encoder_gives_the_deepest_of_four_taps_as_tokens_and_the_others_as_skips():
    encoder, x = dinov2.DINOv2Encoder(), torch.rand(1, 1, 126, 70)
    taps = encoder.vit.taps(dinov2.imagenet_colors(x), (2, 5, 8, 11))
    z, skips = encoder(x)
    assert z.shape == (1, 384, 9, 5) and torch.equal(z, unit_tokens(taps[3]))
    assert all(torch.equal(skip, tap) for skip, tap in zip(skips, taps[:3], strict=True))


def test_dpt_decoder_gives_logits_of_14_pixels_a_token_and_hears_all_four_maps():
    maps = [torch.randn(1, 384, 5, 4, requires_grad=True) for _ in range(4)]
    decoder = dinov2.DPTDecoder(384, 3)
    logits = decoder(maps[0], maps[1:])
    logits.square().sum().backward()
    assert logits.shape == (1, 3, 70, 56) and all(m.grad.any() for m in maps)
    assert all(p.grad.any() for p in decoder.parameters())


def test_every_trained_parameter_of_the_papers_network_gets_a_gradient():
    torch.manual_seed(0)
    net = VQSeg(codebook_size=64, encoder="dinov2", width=4)
    out = net(torch.rand(2, 1, 128, 128), 1, "qpm", 0.7, 1.0, None)
    assert out.y_hat.shape == (2, 4, 128, 128) and out.x_hat.shape == (2, 1, 128, 128)
    (out.y_hat.square().sum() + out.x_hat.square().sum() + out.vq_loss).backward()
    assert {n for n, p in net.named_parameters() if p.requires_grad and p.grad is None} == set()


# -- Weights


def test_weights_come_back_from_a_file_and_are_frozen(state, file):
    fm, name = dinov2.foundation_model("auto", file)
    assert name == "DINOv2, 384 channels" and not fm.training
    assert all(torch.equal(t, state[name]) for name, t in fm.state_dict().items())
    assert not any(p.requires_grad for p in fm.parameters())


def test_encoder_starts_from_the_weights_of_the_file(state, file):
    encoder = dinov2.DINOv2Encoder()
    encoder.load_pretrained(file)
    assert all(torch.equal(t, state[name]) for name, t in encoder.vit.state_dict().items())


def test_encoder_of_another_width_is_refused(monkeypatch):
    monkeypatch.setattr(dinov2, "load_dinov2", lambda path: Namespace(channels=768))
    with pytest.raises(BadInput, match="vitb.pth: has 768 channels, but .* needs 384"):
        dinov2.DINOv2Encoder().load_pretrained("vitb.pth")


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Where the official file would be, in an empty cache; and there is no network."""
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    return tmp_path / "hub" / "checkpoints" / "dinov2_vits14_pretrain.pth"


@pytest.fixture
def small_official(monkeypatch):
    """The official file is now these bytes."""
    monkeypatch.setattr(dinov2, "OFFICIAL_SHA256", hashlib.sha256(b"hello").hexdigest())


def test_a_full_disk_is_not_taken_for_being_offline(cached, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: io.BytesIO(b"hello"))
    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(BadInput, match="checkpoints: the disk is full; make room"):
        dinov2.official_weights()


def test_offline_a_download_says_what_it_tries_and_guidance_is_left_out(cached, capsys):
    assert dinov2.foundation_model("auto", "") == (None, "none (no DINOv2 weights: offline)")
    printed = capsys.readouterr().out
    assert printed == f"downloading {dinov2.OFFICIAL} (88 MB) to {cached.parent}\n"


@pytest.mark.parametrize("flag, ask", [
    ("--fm dinov2", lambda: dinov2.foundation_model("dinov2", "")),
    ("--encoder dinov2", lambda: dinov2.DINOv2Encoder().load_pretrained(""))])
def test_offline_dinov2_is_refused_where_it_was_asked_for(flag, ask, cached):
    with pytest.raises(BadInput, match=f"{flag}: no weights; download https.* --fm-weights FILE"):
        ask()


@pytest.mark.parametrize("content, kept", [(b"hello", True), (b"hellO", False), (b"he", False)])
@pytest.mark.usefixtures("small_official")
def test_a_download_is_kept_only_if_it_is_the_official_file(content, kept, cached, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: io.BytesIO(content))
    assert dinov2.official_weights() == (cached if kept else None)
    assert list(cached.parent.iterdir()) == ([cached] if kept else [])


def test_a_cached_file_that_is_not_the_official_one_is_refused(cached, small_official):
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"hellO")
    with pytest.raises(BadInput, match=f"{cached}: not the official file, .*; remove it"):
        dinov2.official_weights()


def test_a_cache_that_cannot_be_written_is_named_with_its_variable(cached):
    cached.parents[1].write_text("a file in place of the folder")
    with pytest.raises(BadInput, match=f"{cached.parent}: cannot be written; set TORCH_HOME"):
        dinov2.official_weights()


def write(path, content, state):
    """A file that is not what it should be: bytes, TorchScript, or changes of a state dict."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, nn.Module):
        torch.jit.trace(content, torch.zeros(1, 3, 128, 128)).save(path)
    elif isinstance(content, dict):
        changed = state | content
        torch.save({name: t for name, t in changed.items() if t is not None}, path)
    else:
        torch.save(content, path)
    return str(path)


CONVOLUTION = nn.Conv2d(3, 5, 16, 16)
WRONG = {
    "text": (b"hello", "not a PyTorch file"),
    "cut off": (b"PK\3\4 half of it", "not a PyTorch file"),
    "more than tensors": (Namespace(lr=1), "not a PyTorch file of tensors alone"),
    "TorchScript": (CONVOLUTION, "is a TorchScript file; add --fm torchscript"),
    "list": ([torch.zeros(3)], "not a flat DINOv2 state dict"),
    "checkpoint": ({"optimizer": {}}, "Unexpected .*optimizer.*; get"),
    "missing": ({"norm.bias": None}, "Missing .*norm.bias.*; get"),
    "shape": ({"mask_token": torch.zeros(1, 5)}, "size mismatch for mask_token"),
    "width": ({"cls_token": torch.zeros(1, 1, 500)}, "not a flat DINOv2 state dict .500.; get"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_of_something_else_is_refused_in_one_line_with_its_fault(case, state, tmp_path):
    content, fault = WRONG[case]
    path = write(tmp_path / "weights.pth", content, state)
    with pytest.raises(BadInput, match=f"--fm-weights {path}: .*{fault}") as refusal:
        dinov2.load_dinov2(path)
    message = str(refusal.value)
    assert "\n" not in message and "; " in message and "weights_only" not in message


@pytest.mark.parametrize("kind", ["auto", "dinov2", "torchscript"])
@pytest.mark.parametrize("name, fault", [("nowhere", "no such file"), ("", "is a folder")])
def test_a_path_of_no_file_is_refused(kind, name, fault, tmp_path):
    with pytest.raises(BadInput, match=f"--fm-weights {tmp_path / name}: {fault}; name a file"):
        dinov2.foundation_model(kind, str(tmp_path / name))


# -- Any other model


def test_torchscript_gets_normalized_colors_and_tells_its_channels(tmp_path):
    path = write(tmp_path / "net.pt", CONVOLUTION, {})
    fm, name = dinov2.foundation_model("torchscript", path)
    x = torch.rand(2, 1, 64, 96)
    assert torch.allclose(fm(x), CONVOLUTION(dinov2.imagenet_colors(x)), atol=1e-5)
    assert fm.channels == 5 and name == f"TorchScript {path}" and not fm.training


@pytest.mark.parametrize("content, fault", [
    (b"hello", "is not a TorchScript file"),
    (nn.Sequential(CONVOLUTION, nn.Flatten()), "makes no feature map")])
def test_torchscript_that_gives_no_feature_map_is_refused(content, fault, tmp_path):
    path = write(tmp_path / "net.pt", content, {})
    with pytest.raises(BadInput, match=f"{path}: {fault}.*; write it with torch.jit.trace"):
        dinov2.foundation_model("torchscript", path)


def test_torchscript_needs_a_file():
    with pytest.raises(BadInput, match="--fm torchscript: needs a model; give --fm-weights FILE"):
        dinov2.foundation_model("torchscript", "")
