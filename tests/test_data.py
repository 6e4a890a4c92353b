"""Data: ACDC files land in the right rows, the split, the grid and back, the two views."""

import json
import math
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import data
from data import BadInput, Case

FEW = {"train": ["001", "002"], "val": ["003"], "test": ["004"]}


def volume(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Image and mask of 24 x 16 x 3 voxels (x,y,z), no two voxels alike."""
    image = np.random.default_rng(seed).permutation(24 * 16 * 3).reshape(24, 16, 3).astype(np.int16)
    mask = np.zeros((24, 16, 3), np.uint8)
    mask[4:12, 3:9] = 1
    mask[5:8, 4:7] = 3
    return image, mask


def save(path, array, spacing=(1.4, 1.3, 9.0)):
    path.parent.mkdir(parents=True, exist_ok=True)
    file = nib.Nifti1Image(array, np.eye(4))  # unit scales, as ACDC's sform has them
    file.header["pixdim"][1:4] = spacing
    nib.save(file, path)


@pytest.fixture
def acdc(tmp_path, monkeypatch):
    """Four patients in training/; the frame numbers differ, one file is not compressed."""
    monkeypatch.setattr(data, "ACDC_SPLIT", FEW)
    for n in (1, 2, 3, 4):
        folder = tmp_path / "training" / f"patient00{n}"
        for frame in (n, n + 10):
            image, mask = volume(10 * n + frame)
            end = ".nii" if n == 2 else ".nii.gz"
            save(folder / f"patient00{n}_frame{frame:02d}{end}", image)
            save(folder / f"patient00{n}_frame{frame:02d}_gt{end}", mask)
        save(folder / f"patient00{n}_4d.nii.gz", volume(0)[0])
    return tmp_path


def load(root, *parts) -> data.Dataset:
    return data.load("acdc", str(root), parts or ("train", "val"))


# -- The field's split


def test_acdc_has_70_10_and_20_patients_and_each_once():
    assert [len(data.ACDC_SPLIT[part]) for part in ("train", "val", "test")] == [70, 10, 20]
    assert sorted(data.ACDC) == [f"{n:03d}" for n in range(1, 101)]


def test_the_labeled_patients_are_the_fields():
    assert data.ACDC_SPLIT["train"][:7] == ["099", "038", "050", "100", "058", "021", "049"]


# -- ACDC files


def test_each_frame_lands_in_its_rows_slices_first_and_transposed(acdc):
    dataset = load(acdc)
    case = next(c for c in dataset.cases if c.name == "patient002_frame12")
    image, mask = volume(32)
    rows = dataset.rows([case])
    assert case.shape == (3, 16, 24)
    expected = data.to_grid(torch.from_numpy(image.transpose(2, 1, 0) / np.float32(1151)))
    assert torch.allclose(dataset.images[rows], expected, atol=1e-5)
    assert np.array_equal(data.read_mask(case, 4), mask.transpose(2, 1, 0))
    assert torch.equal(dataset.masks[rows], data.to_grid(torch.from_numpy(mask.T.copy())))


def test_spacing_is_the_headers_and_not_the_unit_scales_of_the_affine(acdc):
    assert load(acdc).cases[0].spacing == pytest.approx((9.0, 1.3, 1.4))


@pytest.mark.parametrize("place", ["", "training", "database/training"])
def test_patients_are_found_where_the_download_has_them(acdc, place):
    (acdc / "elsewhere" / place).parent.mkdir(parents=True, exist_ok=True)
    (acdc / "training").rename(acdc / "elsewhere" / place)
    assert len(load(acdc / "elsewhere").cases) == 6


def test_only_the_parts_that_are_asked_for_are_read(acdc):
    assert {case.patient for case in load(acdc, "test").cases} == {"patient004"}


def test_labeled_and_unlabeled_patients_are_disjoint(acdc):
    few, many = load(acdc).training(1)
    assert {case.patient for case in few} == {"patient001"}
    assert {case.patient for case in many} == {"patient002"}


def test_where_all_patients_are_labeled_all_slices_serve_as_unlabeled(acdc):
    few, many = load(acdc).training(2)
    assert few == many


WRONG = {  # what follows the name of patient001's first frame -> what is put there, what is said
    "a mask is missing": ("_gt.nii.gz", None, "patient001 is not as downloaded: .*copy it again"),
    "a frame is missing": (".nii.gz", None, "patient001 is not as downloaded"),
    "a frame is there twice": (".nii", volume(1)[0], "patient001 is not as downloaded"),
    "label": ("_gt.nii.gz", volume(1)[1] + np.uint8(1),
              "frame01_gt.nii.gz: label value 4 is not one of 0 to 3; change the labels"),
    "shape": ("_gt.nii.gz", volume(1)[1].transpose(1, 0, 2),
              r"frame01_gt.nii.gz: has shape \(16, 24, 3\), its image \(24, 16, 3\)"),
    "not finite": (".nii.gz", np.full((24, 16, 3), np.nan, np.float32),
                   r"frame01.nii.gz: unreadable \(.*voxels are not finite.*or copy it again"),
    "4-D": (".nii.gz", np.zeros((24, 16, 3, 2), np.int16),
            r"shape \(24, 16, 3, 2\) is not \(x, y, z\)'\)\); allow it, or copy it"),
    # The checksum of what is compressed, at which nibabel does not look.
    "checksum": (".nii.gz", lambda old: old[:-8] + bytes([old[-8] ^ 1]) + old[-7:],
                 r"frame01.nii.gz: unreadable \(BadGzipFile"),
    "cut off": (".nii.gz", lambda old: old[:-4], r"frame01.nii.gz: unreadable \(EOFError"),
    "something else": (".nii.gz", lambda old: b"hello", "frame01.nii.gz: unreadable .*; allow it")}


@pytest.mark.parametrize("case", WRONG)
def test_bad_files_are_named_with_their_remedy(acdc, case):
    end, content, said = WRONG[case]
    path = acdc / "training" / "patient001" / f"patient001_frame01{end}"
    if content is None:
        path.unlink()
    elif callable(content):
        path.write_bytes(content(path.read_bytes()))
    else:
        save(path, content)
    with pytest.raises(BadInput, match=said):
        load(acdc)


@pytest.mark.parametrize("name", ["acdc", "mine"])
def test_a_folder_that_is_not_there_is_named(name, tmp_path):
    with pytest.raises(BadInput, match="nowhere: neither ACDC nor a prepared set"):
        data.load(name, str(tmp_path / "nowhere"))


def test_a_mask_that_was_saved_with_a_scale_factor_is_rounded():
    mask = np.array([[[0.9999999, 2.0000003]]])
    case = Case("x", "x", (1, 1, 2), (1, 1, 1), mask)
    assert data.read_mask(case, 4).tolist() == [[[1, 2]]]


# -- Prepared sets


@pytest.fixture
def prepared(tmp_path):
    """One labeled and one unlabeled case of two slices, and one to validate on, in 8 bits."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 240, 240), dtype=np.uint8)
    np.save(tmp_path / "images.npy", pixels)
    np.save(tmp_path / "masks.npy", (pixels > 200).astype(np.uint8))
    save(tmp_path / "masks" / "a.nii.gz", np.ones((5, 4, 2), np.uint8))
    cases = [{"name": name, "patient": name, "shape": [2, 4, 5], "spacing": [9, 1, 1],
              "mask": mask, "first": first}
             for name, mask, first in (("a", "masks/a.nii.gz", 0), ("b", None, 2),
                                       ("c", "masks/a.nii.gz", 4))]
    split = {"train": ["a", "b"], "val": ["c"], "test": []}
    about = {"labels": ["background", "heart"], "split": split, "labeled": 1, "eval_crop": 240,
             "window": None, "cases": cases, "unit": "mm"}
    (tmp_path / "dataset.json").write_text(json.dumps(about))
    return tmp_path


def test_a_prepared_set_in_8_bits_has_its_pixels_in_0_to_1(prepared):
    pixels = np.load(prepared / "images.npy")
    assert torch.allclose(data.load(str(prepared)).images, torch.from_numpy(pixels) / 255)


def test_a_case_without_a_mask_is_unlabeled(prepared):
    few, many = data.load(str(prepared)).training(0)
    assert ([c.name for c in few], [c.name for c in many]) == (["a"], ["b"])


def test_the_native_mask_of_a_prepared_case_is_read(prepared):
    assert data.read_mask(data.load(str(prepared)).cases[0], 2).shape == (2, 4, 5)


def test_a_part_without_patients_is_refused(prepared):
    with pytest.raises(BadInput, match="the test split is empty"):
        data.load(str(prepared)).part("test")


def test_a_damaged_prepared_set_is_named(prepared):
    (prepared / "dataset.json").write_text("{")
    with pytest.raises(BadInput, match="unreadable .*; allow it, or prepare it again"):
        data.load(str(prepared))


# -- The grid and back


@pytest.mark.parametrize("volume, window, expected", [
    ([-3, 1, 5], None, [0, 0.5, 1]), ([-9, 0, 9], (-1, 1), [0, 0.5, 1]), ([7, 7], None, [0, 0])])
def test_intensities_become_0_to_1_by_the_extremes_or_the_window(volume, window, expected):
    assert data.scale(np.array([[volume]]), window).tolist() == [[expected]]


def test_the_grid_keeps_the_aspect_ratio_and_centers_the_slice():
    grid = data.to_grid(torch.ones(1, 100, 50))
    assert grid.shape == (1, 240, 240)
    assert grid[0, :, 60:180].min() == 1 and grid[0, :, :60].max() == grid[0, :, 180:].max() == 0


def test_the_grid_keeps_each_place_and_averages_where_it_shrinks():
    mask = torch.zeros(1, 720, 720, dtype=torch.uint8)
    mask[:, 1::3, 1::3] = 1  # the center of each pixel of the grid
    assert data.to_grid(mask).all() and data.to_grid(mask.float()).max() < 0.5


def test_outside_the_crop_all_is_background_and_probabilities_are_interpolated():
    foreground = torch.tensor([0.0, 1.0]).reshape(1, 2, 1, 1).expand(1, 2, 160, 160)
    p = data.to_native(foreground, (480, 480))[0]
    assert torch.allclose(p.sum(0), torch.ones(480, 480))
    assert p[1, 240, 78:82].tolist() == p[1, 78:82, 240].tolist() == [0, 0.25, 0.75, 1]
    assert p[1, 81:399, 81:399].min() == 1 and p[0, :79].min() == 1


# -- Batches and views


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_batch_has_slices_of_the_given_rows_with_their_masks():
    pixels = torch.rand(6, 240, 240, generator=seeded())
    masks = (pixels > 0.8).to(torch.uint8)
    dataset = data.Dataset(data.CLASSES, {}, 1, 240, None, [], pixels, masks, "mm")
    images, masks = data.batch(dataset, torch.tensor([1, 3]), 16, seeded())
    for image, mask in zip(images[:, 0], masks):
        row = next(row for row in (1, 3) if torch.equal(dataset.images[row], image))
        assert torch.equal(dataset.masks[row], mask)


def blobs(B: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Slices of the grid with a bright ellipse, and its mask."""
    y, x = torch.meshgrid(torch.arange(240), torch.arange(240), indexing="ij")
    mask = (((y - 115) / 30) ** 2 + ((x - 125) / 18) ** 2 < 1).expand(B, 240, 240)
    return mask[:, None].float(), mask.to(torch.uint8)


def test_weak_view_moves_image_and_mask_together():
    x, y = data.weak_view(*blobs(), seeded())
    assert x.shape == (4, 1, 128, 128) and y.dtype == torch.int64
    assert ((x[:, 0] > 0.5) != y.bool()).double().mean() < 0.003


@pytest.mark.parametrize("eval_crop, reach", [(160, 24), (128, 8), (96, 8)])
def test_weak_view_shifts_to_all_that_evaluation_sees_and_8_pixels_more(monkeypatch, eval_crop,
                                                                       reach):
    """The largest shift, neither rotated nor scaled."""
    monkeypatch.setattr(data, "uniform", lambda low, high, shape, g: torch.full(
        shape, {-0.7: 0.0, 0.8: 1.0}.get(low, high)))
    x = torch.rand(1, 1, 240, 240, generator=seeded())
    view, _ = data.weak_view(x, torch.zeros(1, 240, 240), seeded(), eval_crop)
    first = 120 - 64 + reach
    expected = x[..., first : first + 128, first : first + 128]
    assert torch.allclose(view, expected, atol=1e-4)


def test_weak_view_rotates_by_up_to_40_degrees():
    """Seen by the longest axis of an ellipse that stands upright."""
    _, y = data.weak_view(*blobs(200), seeded(), 128)
    angles = []
    for mask in y:
        axis = torch.linalg.eigh(mask.nonzero().double().T.cov()).eigenvectors[:, 1]  # (y,x)
        angles.append(torch.atan(axis[1] / axis[0]).item())
    assert -0.72 < min(angles) < -0.6 and 0.6 < max(angles) < 0.72


def test_weak_view_zooms_by_0_8_to_1_3():
    _, y = data.weak_view(*blobs(200), seeded())
    scale = (y.sum((1, 2)) / blobs(1)[1].sum()).sqrt()
    assert 0.79 < scale.min() < 0.85 and 1.25 < scale.max() < 1.32


def test_strong_view_keeps_the_geometry():
    x, y = data.weak_view(*blobs(), seeded())
    strong = data.strong_view(0.2 + 0.5 * x, seeded())
    for image, mask in zip(strong[:, 0], y.bool()):
        bright = image > (image[mask].mean() + image[~mask].mean()) / 2
        assert (bright != mask).double().mean() < 0.05


def test_strong_view_draws_each_strength_for_each_slice_and_repeats_with_the_seed(monkeypatch):
    draw, drawn = data.uniform, []
    monkeypatch.setattr(data, "uniform", lambda *given: drawn.append(draw(*given)) or drawn[-1])
    x = torch.rand(4, 1, 64, 64, generator=seeded())
    strong = data.strong_view(x, seeded())
    assert 0 <= strong.min() and strong.max() <= 1
    assert all(len(strengths.unique()) == 4 for strengths in drawn)
    assert torch.equal(strong, data.strong_view(x, seeded()))


def test_strong_view_blurs_like_a_gaussian(monkeypatch):
    """With all strengths in the middle of their range: no jitter, sigma 0.8, no noise."""
    monkeypatch.setattr(data, "uniform", lambda low, high, shape, g: torch.full(shape, {
        -0.5: 0.0, -0.15: 0.0, 0.1: 0.8, 0: 0.0}[low]))
    x = torch.zeros(1, 1, 9, 9)
    x[..., 4, 4] = 1
    taps = np.exp(-0.5 * (np.arange(-3, 4) / 0.8) ** 2)
    taps /= taps.sum()
    blurred = data.strong_view(x, seeded())[0, 0, 1:8, 1:8]
    assert np.allclose(blurred, np.outer(taps, taps), atol=1e-6)
    flat = torch.full((1, 1, 9, 9), 0.5)
    assert torch.allclose(data.strong_view(flat, seeded()), flat)  # also at the edge


def test_contrast_of_a_strong_view_keeps_the_mean(monkeypatch):
    """Gamma 2, contrast 1.5 and brightness 0.05, no blur or noise."""
    strengths = iter([math.log(2), math.log(1.5), 0.05, 0.1, 1.0, 0.0])
    monkeypatch.setattr(data, "uniform", lambda *args: torch.full(args[2], next(strengths)))
    x = torch.tensor([0.4, 0.6]).repeat(32).reshape(1, 1, 8, 8)
    expected = (x**2 - 0.26) * 1.5 + 0.26 + 0.05  # 0.26: the mean of 0.16 and 0.36
    assert torch.allclose(data.strong_view(x, seeded()), expected)


def test_noise_of_a_strong_view_has_the_strength_that_was_drawn(monkeypatch):
    strengths = iter([0.0, 0.0, 0.0, 0.1, 1.0, 0.05])
    monkeypatch.setattr(data, "uniform", lambda *args: torch.full(args[2], next(strengths)))
    strong = data.strong_view(torch.full((2, 1, 100, 100), 0.5), seeded())
    assert strong.std().item() == pytest.approx(0.05, rel=0.05) and not torch.equal(*strong)


# -- Phantoms


def test_each_phantom_has_all_classes_and_a_heart_that_beats():
    cases, _ = data.phantoms(("train",))
    assert all(set(np.unique(case.mask)) == {0, 1, 2, 3} for case in cases)
    assert all((a.mask == 3).sum() > (b.mask == 3).sum() for a, b in zip(cases[::2], cases[1::2]))


def test_extras_of_which_only_the_bytecode_is_left_are_as_good_as_deleted(tmp_path, monkeypatch):
    (tmp_path / "extras" / "__pycache__").mkdir(parents=True)
    monkeypatch.setattr(data, "__file__", str(tmp_path / "data.py"))
    assert data.extra("checks") is None


def test_an_old_python_is_told_in_one_line_with_status_2():
    code = "import nibabel, torch, sys; sys.version_info = (3, 9, 1); import data"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(data.__file__).parent,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("Python 3.10 or newer is needed; this is")
