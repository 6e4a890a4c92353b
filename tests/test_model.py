"""The network: who sees which tokens (Eq. 7), shapes, the teacher's average."""

import copy
import sys

import pytest
import torch

import model
import qpm
from model import VQSeg


def images() -> torch.Tensor:
    return torch.rand(4, 1, 64, 64, generator=torch.Generator().manual_seed(0))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(9)


@pytest.fixture
def net():
    """In evaluation mode, in which slices do not change each other through BatchNorm."""
    torch.manual_seed(0)
    return VQSeg(classes=3, codebook_size=32, width=4, dim=8, fm_grid=(5, 3, 3)).eval()


def inputs_of(module: torch.nn.Module) -> list[torch.Tensor]:
    """The first argument of each call of a module from now on."""
    seen: list[torch.Tensor] = []
    module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    return seen


def test_eq7_image_decoder_sees_q_of_z_and_nothing_else(net):
    seen = inputs_of(net.image_decoder)
    out = net(images(), 2, "qpm", 1.0, 1.0, seeded())
    q = net.quantizer(net.encoder(images()).z)
    assert torch.allclose(seen[0], q.codes)
    assert torch.allclose(out.x_hat, net.image_decoder(q.codes))


def test_eq7_segmentation_decoder_gets_perturbed_tokens_of_unlabeled_slices_only(net):
    seen = inputs_of(net.segmentation_decoder)
    net(images(), 2, "qpm", 1.0, 1.0, seeded())
    q = net.quantizer(net.encoder(images()).z)
    drawn = qpm.perturb(q.indices[2:], q.codebook, 1.0, 1.0, seeded())
    assert torch.allclose(seen[0][:2], q.codes[:2])
    assert torch.allclose(seen[0][2:], q.codebook[drawn].permute(0, 3, 1, 2), atol=1e-6)


def test_a_perturbation_starts_from_q_of_z(net):
    seen = inputs_of(net.segmentation_decoder)
    net(images(), 2, "none", 1.0, 1.0, seeded())
    assert torch.allclose(seen[0], net.quantizer(net.encoder(images()).z).codes)


def test_adapter_resizes_to_the_grid_then_maps_each_place():
    adapter = model.FeatureAdapter(dim=2, fm_channels=3, grid=(1, 4))
    codes = torch.rand(1, 2, 1, 2, generator=seeded())
    left, right = codes[..., :1], codes[..., 1:]
    wide = torch.cat([left, 0.75 * left + 0.25 * right, 0.25 * left + 0.75 * right, right], 3)
    weight = adapter.project.weight[:, :, 0, 0]
    expected = torch.einsum("oi,bihw->bohw", weight, wide) + adapter.project.bias[:, None, None]
    assert torch.allclose(adapter(codes), expected, atol=1e-6)


def test_segmentation_decoder_uses_each_shallower_map(net):
    z, skips = net.encoder(images())
    with torch.no_grad():
        before = net.segmentation_decoder(z, skips)
        for k in range(3):
            changed = [s + (k == n) for n, s in enumerate(skips)]
            assert not torch.allclose(net.segmentation_decoder(z, changed), before)


def test_tokens_have_unit_length_and_no_mean():
    z = torch.randn(2, 8, 4, 4, generator=seeded())
    assert torch.allclose(model.unit_tokens(z).norm(dim=1), torch.ones(2, 4, 4))
    normalized = (z - z.mean((2, 3), keepdim=True)) / z.std((2, 3), correction=0, keepdim=True)
    assert torch.allclose(model.unit_tokens(z), normalized / normalized.norm(dim=1, keepdim=True),
                          atol=1e-4)


def test_predict_is_the_segmentation_of_the_forward_pass(net):
    with torch.no_grad():
        assert torch.allclose(net.predict(images()), net(images(), 4, "qpm", 1, 1, None).y_hat)


def test_predict_can_perturb_all_slices(net):
    seen = inputs_of(net.segmentation_decoder)
    with torch.no_grad():
        net.predict(images(), "qpm", 1.0, 1.0, seeded())
        q = net.quantizer(net.encoder(images()).z)
    drawn = qpm.perturb(q.indices, q.codebook, 1.0, 1.0, seeded())
    assert torch.allclose(seen[0], q.codebook[drawn].permute(0, 3, 1, 2), atol=1e-6)


@pytest.mark.parametrize("image_branch", [True, False])  # a control, the supervised baseline
def test_without_a_codebook_the_decoders_see_the_encoder_s_tokens(image_branch):
    net = VQSeg(width=4, dim=8, codebook_size=0, image_branch=image_branch).eval()
    seen = [inputs_of(net.segmentation_decoder)]
    seen += [inputs_of(net.image_decoder)] if image_branch else []
    out = net(images(), 2, "none", 0.0, 1.0, None)
    assert all(torch.equal(tokens[0], net.encoder(images()).z) for tokens in seen)
    assert out.vq_loss == 0 and (out.x_hat is not None) == image_branch
    assert not any(p.requires_grad for p in net.quantizer.parameters())  # DDP waits for those


@pytest.mark.parametrize("name, stride", [("conv16", 16), ("conv8", 8), ("conv4", 4),
                                          ("conv4-alone", 4)])
def test_tokens_sit_at_the_stride_and_skips_are_the_maps_above_it(name, stride):
    net = VQSeg(classes=3, codebook_size=32, width=4, dim=8, encoder=name).eval()
    z, skips = net.encoder(images())
    out = net(images(), 2, "qpm", 0.5, 1.0, seeded())
    assert z.shape == (4, 8, 64 // stride, 64 // stride)
    sizes = [64 // 2**n for n in range(1, 4) if 2**n < stride]
    assert [skip.shape[2] for skip in skips] == ([] if name == "conv4-alone" else sizes)
    assert out.y_hat.shape == (4, 3, 64, 64)
    assert net.image_decoder(z).shape == (4, 1, 64, 64)  # without being resized


def test_the_encoder_s_way_up_uses_the_maps_between_1_16_and_the_tokens():
    net = VQSeg(width=4, dim=8, encoder="conv4").eval()
    seen = []
    net.encoder.upward.register_forward_pre_hook(lambda _, given: seen.append(given))
    net.encoder(images())
    assert seen[0][0].shape == (4, 32, 4, 4)
    assert [skip.shape for skip in seen[0][1]] == [(4, 8, 16, 16), (4, 16, 8, 8)]


def test_stand_in_is_frozen_and_the_same_for_every_seed_and_leaves_the_seed_as_it_is():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    first = model.StandInFM()
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first(images()), model.StandInFM()(images()))
    assert not any(p.requires_grad for p in first.parameters())


def test_without_the_folder_extras_there_is_no_guidance_unless_it_was_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "extras", None)
    assert model.foundation_model("auto") == (None, "none (the folder extras is not here)")
    with pytest.raises(ImportError, match="--fm dinov2: needs the folder extras"):
        model.foundation_model("dinov2")


def test_teacher_is_the_moving_average_of_parameters_and_running_statistics(net):
    """And the student stays as it is."""
    student = copy.deepcopy(net)
    expected = {k: v.double() for k, v in net.state_dict().items() if v.is_floating_point()}
    assert any("running_var" in name for name in expected)
    for step in range(1, 6):
        for name in expected:  # as after a step of training
            student.state_dict()[name].add_(0.1 * step)
        given = {name: student.state_dict()[name].clone() for name in expected}
        model.ema_update(net, student, 0.9)
        for name in expected:
            assert torch.equal(student.state_dict()[name], given[name]), name
            expected[name] = 0.9 * expected[name] + 0.1 * given[name].double()
    for name, value in expected.items():
        assert torch.allclose(net.state_dict()[name].double(), value, atol=1e-5), name
