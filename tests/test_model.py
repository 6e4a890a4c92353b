"""The network: who sees what (Eq. 7, Figure 2), who gets a gradient, the adapter of Section 3.5, the EMA of Section 3.4."""

import copy

import numpy as np
import pytest
import torch

import model
import qpm
from model import FeatureAdapter, StandInFM, VQSeg, ema_update


def small(seed: int = 0, **options) -> VQSeg:
    torch.manual_seed(seed)
    return VQSeg(**({"classes": 3, "codebook_size": 16, "dim": 8, "width": 8} | options))


@pytest.mark.parametrize("H, W", [(64, 64), (96, 32), (192, 192)])
def test_eq7_both_branches_give_back_the_size_of_the_image(H, W):
    model, x = small(), torch.rand(2, 1, H, W)
    z, skips = model.encoder(x)
    q = model.quantizer(z)
    assert z.shape == (2, 8, H // 16, W // 16) and q.indices.shape == (2, H // 16, W // 16)
    assert model.segmentation_decoder(q.codes, skips).shape == (2, 3, H, W)
    assert model.image_decoder(q.codes).shape == (2, 1, H, W)


def test_tokens_have_unit_length():
    z = small().encoder(torch.rand(2, 1, 128, 128)).z
    assert torch.allclose(z.norm(dim=1), torch.ones(2, 8, 8), atol=1e-5)


def test_tokens_forget_offset_and_scale_of_their_channels():
    g = torch.Generator().manual_seed(0)
    z, scale, offset = torch.randn(2, 8, 6, 5, generator=g), 0.5 + 2 * torch.rand(8, 1, 1, generator=g), torch.randn(8, 1, 1, generator=g)
    assert torch.allclose(model.unit_tokens(scale * z + offset), model.unit_tokens(z), atol=1e-4)


def test_every_slice_is_predicted_independently_of_its_batch():
    model, x = small().eval(), torch.rand(3, 1, 64, 64)
    with torch.no_grad():
        together, alone = model(x), torch.cat([model(part) for part in x.split(1)])
    assert torch.allclose(together, alone, atol=1e-4)


def test_plain_prediction_is_decoder_of_quantized_tokens_and_of_continuous_ones_without_quantizer():
    x = torch.rand(1, 1, 64, 64)
    for quantize in (True, False):
        model = small(quantize=quantize)
        z, skips = model.encoder(x)
        tokens = model.quantizer.indices_to_codes(model.quantizer(z).indices) if quantize else z
        assert torch.allclose(model(x), model.segmentation_decoder(tokens, skips), atol=1e-6)


@pytest.mark.parametrize("how", ["none", "dropout", "shuffle", "qpm"])
def test_perturbation_at_eps_0_changes_nothing(how):
    model = small()
    z = model.encoder(torch.rand(2, 1, 64, 64)).z
    q = model.quantizer(z)
    out = model.perturb(z, q.codes, q.indices, how, 0.0, 1.0, torch.Generator().manual_seed(0))
    assert torch.allclose(out, q.codes, atol=1e-6)


def test_qpm_gives_codewords_at_drawn_indices_and_passes_the_gradient_straight_to_the_tokens():
    model = small()
    z = model.encoder(torch.rand(2, 1, 64, 64)).z.detach().requires_grad_()
    q = model.quantizer(z)
    out = model.perturb(z, q.codes, q.indices, "qpm", 0.9, 0.2, torch.Generator().manual_seed(3))
    drawn = qpm.perturb(q.indices, model.quantizer.codebook, 0.9, 0.2, torch.Generator().manual_seed(3))
    expected = model.quantizer.codebook[drawn].permute(0, 3, 1, 2)
    assert torch.allclose(out, expected, atol=1e-6) and not torch.allclose(out, q.codes, atol=0.1)
    upstream = torch.randn(out.shape)
    (gradient,) = torch.autograd.grad((out * upstream).sum(), z)
    assert torch.equal(gradient, upstream)


def test_shuffle_keeps_each_images_codewords_and_dropout_zeroes_numbers_not_tokens():
    model = small()
    z = model.encoder(torch.rand(2, 1, 128, 128)).z
    q = model.quantizer(z)
    g = torch.Generator().manual_seed(0)
    shuffled = model.perturb(z, q.codes, q.indices, "shuffle", 1.0, 1.0, g)
    assert torch.allclose(shuffled.flatten(2).sum(2), q.codes.flatten(2).sum(2), atol=1e-4)
    dropped = model.perturb(z, q.codes, q.indices, "dropout", 0.5, 1.0, g)
    assert 0.4 < (dropped == 0).float().mean() < 0.6 and (dropped != 0).any(1).all()


def test_adapter_is_bilinear_resize_then_one_linear_map_per_patch():
    torch.manual_seed(0)
    adapter, codes = FeatureAdapter(4, 6), torch.randn(2, 4, 3, 5)
    weight, bias = adapter.project.weight[:, :, 0, 0].detach().double().numpy(), adapter.project.bias.detach().double().numpy()
    same = np.einsum("oi,bihw->bohw", weight, codes.double().numpy()) + bias[:, None, None]
    assert np.allclose(adapter(codes, (3, 5)).detach().numpy(), same, atol=1e-6)
    # Twice as large along x: the new columns lie at 1/4 and 3/4 between the old ones, the outermost repeat.
    wide = adapter(codes, (3, 10)).detach().numpy()
    assert np.allclose(wide[..., 0], same[..., 0], atol=1e-6)
    assert np.allclose(wide[..., 1], 0.75 * same[..., 0] + 0.25 * same[..., 1], atol=1e-6)


def test_stand_in_foundation_model_is_frozen_and_the_same_for_every_seed():
    torch.manual_seed(1)
    first = StandInFM()
    torch.manual_seed(2)
    second, x = StandInFM(), torch.rand(2, 1, 64, 48, requires_grad=True)
    assert not list(first.parameters()) and torch.equal(first(x), second(x))
    assert first(x).shape == (2, StandInFM.channels, 4, 3)


def test_ema_after_n_steps_equals_its_closed_form():
    alpha, n = 0.9, 7
    student = small(0)
    teacher = copy.deepcopy(student)
    start = {k: v.clone().double() for k, v in teacher.state_dict().items()}
    frozen, counts = ["quantizer.table"], [k for k in start if k.endswith("num_batches_tracked")]
    moving = start.keys() - set(frozen) - set(counts)
    assert any(k.endswith("running_var") for k in moving) and any(k.endswith("weight") for k in moving)
    seen = []
    for step in range(n):
        for k, v in student.state_dict().items():
            if k not in frozen:
                v.add_(step + 1 if k in counts else 0.1 * (step + 1))
        seen.append({k: v.clone().double() for k, v in student.state_dict().items()})
        ema_update(teacher, student, alpha)
    for name, value in teacher.state_dict().items():
        # theta_n = alpha^n theta_0 + (1 - alpha) sum_k alpha^(n-1-k) s_k
        closed = alpha**n * start[name] + (1 - alpha) * sum(alpha ** (n - 1 - k) * s[name] for k, s in enumerate(seen))
        assert torch.allclose(value.double(), closed, atol=1e-5) if name in moving else torch.equal(value, student.state_dict()[name])


def test_ema_leaves_the_student_alone():
    teacher, student = small(0), small(1)
    before = copy.deepcopy(student.state_dict())
    ema_update(teacher, student, 0.99)
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
