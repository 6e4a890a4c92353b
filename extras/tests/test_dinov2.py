"""DINOv2: official names and shapes, features against PyTorch's own transformer, bad weights."""

import urllib.error

import pytest
import torch
import torch.nn.functional as F

from data import BadInput
from extras import dinov2
from model import VQSeg


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    net = dinov2.DINOv2()
    for name, p in net.named_parameters():  # LayerScale and norms that do something
        if "gamma" in name or "norm" in name:
            p.data += 0.3 * torch.randn(p.shape)
    return net.eval()


def official_shapes() -> dict[str, tuple]:
    """The 175 entries of dinov2_vits14_pretrain.pth."""
    C = 384
    shapes = {"cls_token": (1, 1, C), "pos_embed": (1, 1370, C), "mask_token": (1, C),
              "patch_embed.proj.weight": (C, 3, 14, 14), "patch_embed.proj.bias": (C,),
              "norm.weight": (C,), "norm.bias": (C,)}
    for n in range(12):
        block = {"norm1.weight": (C,), "norm1.bias": (C,), "attn.qkv.weight": (3 * C, C),
                 "attn.qkv.bias": (3 * C,), "attn.proj.weight": (C, C), "attn.proj.bias": (C,),
                 "ls1.gamma": (C,), "norm2.weight": (C,), "norm2.bias": (C,),
                 "mlp.fc1.weight": (4 * C, C), "mlp.fc1.bias": (4 * C,),
                 "mlp.fc2.weight": (C, 4 * C), "mlp.fc2.bias": (C,), "ls2.gamma": (C,)}
        shapes |= {f"blocks.{n}.{name}": shape for name, shape in block.items()}
    return shapes


def test_parameters_have_the_official_names_and_shapes(vit):
    found = {name: tuple(t.shape) for name, t in vit.state_dict().items()}
    assert found == official_shapes() and len(found) == 175


def reference(vit: dinov2.DINOv2, x: torch.Tensor) -> torch.Tensor:
    """The same features by PyTorch's TransformerEncoderLayer in float64, LayerScale folded in."""
    state = {name: t.double() for name, t in vit.state_dict().items()}
    B, _, H, W = x.shape
    x = F.conv2d(x.double(), state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], 14)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([state["cls_token"].expand(B, -1, -1), x], 1)
    x = x + vit.positions(H // 14, W // 14).double()
    for n in range(12):
        b = {name.removeprefix(f"blocks.{n}."): t for name, t in state.items()
             if name.startswith(f"blocks.{n}.")}
        layer = torch.nn.TransformerEncoderLayer(384, 6, 1536, 0.0, "gelu", 1e-6, batch_first=True,
                                                 norm_first=True).double().eval()
        layer.load_state_dict({
            "self_attn.in_proj_weight": b["attn.qkv.weight"],
            "self_attn.in_proj_bias": b["attn.qkv.bias"],
            "self_attn.out_proj.weight": b["ls1.gamma"][:, None] * b["attn.proj.weight"],
            "self_attn.out_proj.bias": b["ls1.gamma"] * b["attn.proj.bias"],
            "linear1.weight": b["mlp.fc1.weight"], "linear1.bias": b["mlp.fc1.bias"],
            "linear2.weight": b["ls2.gamma"][:, None] * b["mlp.fc2.weight"],
            "linear2.bias": b["ls2.gamma"] * b["mlp.fc2.bias"],
            "norm1.weight": b["norm1.weight"], "norm1.bias": b["norm1.bias"],
            "norm2.weight": b["norm2.weight"], "norm2.bias": b["norm2.bias"],
        })
        x = layer(x)
    x = F.layer_norm(x, (384,), state["norm.weight"], state["norm.bias"], 1e-6)
    return x[:, 1:].transpose(1, 2).reshape(B, -1, H // 14, W // 14)


@pytest.mark.parametrize("size", [(126, 126), (56, 98), (518, 518)])
@torch.no_grad()
def test_features_equal_pytorchs_own_transformer_in_float64(vit, size):
    x = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    assert (vit.features(x) - reference(vit, x)).abs().max() < 1e-3


@torch.no_grad()
def test_positions_are_resampled_with_the_official_offset(vit):
    """Bicubic sampling by hand of one output row: the ratio is (h + 0.1) / 37, not h / 37."""
    grid = vit.pos_embed[0, 1:, 0].reshape(37, 37).double()

    def weights(d: float) -> list[float]:
        a = -0.75
        near = [(a + 2) * t**3 - (a + 3) * t**2 + 1 for t in (d, 1 - d)]
        far = [a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a for t in (1 + d, 2 - d)]
        return [far[0], near[0], near[1], far[1]]

    def sample(values, place: float):
        start = int(place // 1)
        taps = [values[min(max(start + k, 0), 36)] for k in (-1, 0, 1, 2)]
        return sum(w * tap for w, tap in zip(weights(place - start), taps))

    ratio = 37 / 9.1
    place = (4 + 0.5) * ratio - 0.5
    row = [sample(grid[:, column], place) for column in range(37)]
    expected = sample(row, (2 + 0.5) * ratio - 0.5)
    found = vit.positions(9, 9)[0, 1 + 4 * 9 + 2, 0].item()
    assert found == pytest.approx(expected.item(), abs=1e-5)


def test_a_size_that_patches_do_not_fill_is_refused(vit):
    with pytest.raises(ValueError, match="patches of 14 need 126 x 126"):
        vit.features(torch.zeros(1, 3, 128, 128))


def test_gray_slices_become_normalized_color_at_multiples_of_14(vit):
    assert vit(torch.rand(2, 1, 128, 128)).shape == (2, 384, 9, 9)
    color = dinov2.imagenet_colors(torch.full((1, 1, 1, 1), 0.5)).flatten()
    expected = [(0.5 - 0.485) / 0.229, (0.5 - 0.456) / 0.224, (0.5 - 0.406) / 0.225]
    assert color.tolist() == pytest.approx(expected)


def test_the_papers_network_gives_outputs_of_the_size_of_its_input():
    torch.manual_seed(0)
    net = VQSeg(codebook_size=64, encoder="dinov2", width=4)
    out = net(torch.rand(2, 1, 128, 128), 1, "qpm", 0.7, 1.0, None)
    assert out.y_hat.shape == (2, 4, 128, 128) and out.x_hat.shape == (2, 1, 128, 128)
    (out.y_hat.sum() + out.x_hat.sum() + out.vq_loss).backward()
    silent = {n for n, p in net.named_parameters() if p.requires_grad and p.grad is None}
    assert silent == set()


# -- Weights


def test_weights_come_back_from_a_file(vit, tmp_path):
    torch.save(vit.state_dict(), tmp_path / "vits.pth")
    fm, name = dinov2.foundation_model("dinov2", str(tmp_path / "vits.pth"))
    assert name == "DINOv2, 384 channels"
    expected = vit.state_dict()
    assert all(torch.equal(t, expected[name]) for name, t in fm.state_dict().items())
    assert not any(p.requires_grad for p in fm.parameters())


@pytest.fixture
def offline(tmp_path, monkeypatch):
    def refused(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", refused)


def test_offline_guidance_is_left_out_by_default(offline):
    assert dinov2.foundation_model("auto", "")[0] is None


def test_offline_nothing_is_left_in_the_cache(offline, tmp_path):
    dinov2.foundation_model("auto", "")
    assert [f for f in tmp_path.rglob("*") if f.is_file()] == []


def test_offline_dinov2_is_refused_where_it_was_asked_for(offline):
    with pytest.raises(BadInput, match="--fm dinov2: no weights"):
        dinov2.foundation_model("dinov2", "")
    with pytest.raises(BadInput, match="--encoder dinov2: download"):
        dinov2.DINOv2Encoder().load_pretrained("")


def test_a_cached_file_that_is_not_the_official_one_is_refused(offline, tmp_path):
    cached = tmp_path / "hub" / "checkpoints" / "dinov2_vits14_pretrain.pth"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"half of it")
    with pytest.raises(BadInput, match="not the official file, or cut off; remove it"):
        dinov2.foundation_model("auto", "")


@pytest.mark.parametrize("content, said", [
    (b"text", "not a DINOv2 state dict"),
    ({"weights": torch.zeros(3)}, "not a DINOv2 state dict"),
    ({"cls_token": torch.zeros(1, 1, 500)}, "not a DINOv2 state dict"),
    ({"cls_token": torch.zeros(1, 1, 384)}, "is missing or not of ViT/14"),
])
def test_a_file_of_something_else_is_refused(content, said, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(BadInput, match=f"--fm-weights .*weights.pth: .*{said}"):
        dinov2.load_dinov2(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(BadInput, match="nowhere.pth: no such file"):
        dinov2.foundation_model("dinov2", str(tmp_path / "nowhere.pth"))


def test_any_other_model_enters_as_torchscript(tmp_path):
    net = torch.nn.Conv2d(3, 5, 16, 16)
    torch.jit.trace(net, torch.zeros(1, 3, 128, 128)).save(tmp_path / "net.pt")
    fm, _ = dinov2.foundation_model("torchscript", str(tmp_path / "net.pt"))
    assert fm(torch.rand(2, 1, 128, 128)).shape == (2, 5, 8, 8)


def test_torchscript_that_gives_no_feature_map_is_refused(tmp_path):
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 16, 16), torch.nn.Flatten())
    torch.jit.trace(net, torch.zeros(1, 3, 128, 128)).save(tmp_path / "net.pt")
    with pytest.raises(BadInput, match="no TorchScript features"):
        dinov2.foundation_model("torchscript", str(tmp_path / "net.pt"))
