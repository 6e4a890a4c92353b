"""Data: the field's split, files read rightly or refused in one line, the grid and back, and views of one geometry."""

import gzip
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import data
from data import BadInput, Case, Slices

ACDC = Path(os.environ.get("ACDC_ROOT", Path(__file__).parents[2] / "shared" / "acdc"))
CPU = torch.device("cpu")


def write(path: Path, array: np.ndarray, zooms=(1.5, 1.4, 8.0)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([*zooms, 1.0])), path)
    return path


def opened(root: Path) -> data.DataSet:
    return data.open_dataset("phantom", str(root))


def alone(image: Path, mask: Path | None = None) -> Case:
    return Case("a", "a", (image,), (mask,) if mask else None)


# --- the split


def test_split_is_70_10_20_and_no_patient_is_in_two_parts():
    for split, sizes in ((data.ACDC_SPLIT, (70, 10, 20)), (data.PHANTOM_SPLIT, (14, 4, 4))):
        parts = [split["train"], split["val"], split["test"]]
        assert tuple(map(len, parts)) == sizes
        assert len(set(sum(parts, []))) == sum(sizes)
    assert sorted(sum(data.ACDC_SPLIT.values(), [])) == [f"{i:03d}" for i in range(1, 101)]


def test_labelled_patients_are_the_prefix_that_the_field_uses():
    assert data.ACDC_SPLIT["train"][:7] == ["099", "038", "050", "100", "058", "021", "049"]


@pytest.mark.skipif(not ACDC.is_dir(), reason=f"no real ACDC at {ACDC}")
@pytest.mark.parametrize("labeled, slices", [(3, 68), (7, 136)])
def test_real_acdc_has_the_slice_counts_of_the_field(labeled, slices):
    _, labelled, unlabelled = data.open_dataset("acdc", str(ACDC)).training(labeled)
    count = [sum(nib.load(c.images[0]).shape[2] for c in cases) for cases in (labelled, unlabelled)]
    assert count == [slices, 1312 - slices] and len(unlabelled) == 2 * (70 - labeled)


def test_all_patients_labelled_leaves_their_images_as_the_unlabelled_ones(phantom_copy):
    _, labelled, unlabelled = opened(phantom_copy).training(5)
    assert [c.name for c in labelled] == [c.name for c in unlabelled]
    assert all(c.masks for c in labelled) and not any(c.masks for c in unlabelled)


# --- finding and reading


def test_frames_are_found_in_the_original_nested_layout_with_its_other_files(tmp_path):
    folder = tmp_path / "database" / "training" / "patient090"
    for frame in ("04", "11"):
        write(folder / f"patient090_frame{frame}.nii.gz", np.ones((6, 5, 2), np.int16))
        write(folder / f"patient090_frame{frame}_gt.nii.gz", np.ones((6, 5, 2), np.uint8))
    write(folder / "patient090_4d.nii.gz", np.ones((6, 5, 2, 3), np.int16))
    (folder / "Info.cfg").write_text("ED: 4\nES: 11\n")
    cases = data.open_dataset("acdc", str(tmp_path)).cases["patient090"]
    assert [c.name for c in cases] == ["patient090_frame04", "patient090_frame11"]
    assert [c.masks[0].name for c in cases] == ["patient090_frame04_gt.nii.gz", "patient090_frame11_gt.nii.gz"]


def test_volume_is_turned_to_z_y_x_and_scaled_to_0_1_over_the_whole_volume(tmp_path):
    array = np.arange(3 * 4 * 2, dtype=np.int16).reshape(3, 4, 2) - 5  # x, y, z
    image, spacing = data.read_image(alone(write(tmp_path / "a.nii.gz", array)))
    assert image.shape == (2, 4, 3) and spacing == pytest.approx((8.0, 1.4, 1.5))
    assert image[1, 2, 0] == pytest.approx((array[0, 2, 1] + 5) / 23) and image.min() == 0 and image.max() == 1


def test_constant_volume_becomes_zero_and_not_nan(tmp_path):
    image, _ = data.read_image(alone(write(tmp_path / "a.nii.gz", np.full((4, 4, 2), 7, np.int16))))
    assert (image == 0).all()


def test_unlabelled_cases_need_no_mask_and_never_read_one(phantom_copy):
    for patient in ("003", "004", "005"):
        for mask in (phantom_copy / "training" / f"patient{patient}").glob("*_gt.nii.gz"):
            mask.write_bytes(b"not a mask at all")
    _, _, unlabelled = opened(phantom_copy).training(2)
    images, masks = Slices(unlabelled).batch(torch.arange(5), CPU)
    assert len(unlabelled) == 6 and not masks.any()


def damage(root: Path, how: str, monkeypatch) -> Path:
    """Spoil labelled patient 001 in one way and return the file or folder that the message must name."""
    folder = root / "training" / "patient001"
    image = folder / "patient001_frame01.nii.gz"
    mask = folder / "patient001_frame01_gt.nii.gz"
    array, labels = np.asarray(nib.load(image).dataobj), np.asarray(nib.load(mask).dataobj).copy()
    if how == "no image":
        for frame in folder.glob("*.nii.gz"):
            frame.unlink()
        return folder
    if how == "no mask":
        mask.unlink()
        return image
    if how == "mask alone":
        return mask.rename(mask.with_name("patient001_frame07_gt.nii.gz"))
    if how == "mask of another shape":
        return write(mask, labels[:-1])
    if how == "label 7":
        labels[0, 0, 0] = 7
        return write(mask, labels, (1.8, 1.8, 9.0))
    if how == "mask flipped":
        return write(mask, labels, (-1.8, 1.8, 9.0))
    if how == "mask of another spacing":
        return write(mask, labels, (1.9, 1.8, 9.0))
    if how == "mask elsewhere":
        affine = nib.load(image).affine.copy()
        affine[1, 3] += 1.0
        nib.save(nib.Nifti1Image(labels, affine), mask)
        return mask
    if how == "patient twice":
        (root / "patient001").mkdir()
        return root / "patient001"
    if how == "folder unreadable":
        original, denied = Path.iterdir, PermissionError(13, "Permission denied")
        monkeypatch.setattr(Path, "iterdir", lambda self: original(self) if self != folder else (_ for _ in ()).throw(denied))
        return folder
    if how == ".nii and .nii.gz":
        (folder / "patient001_frame01.nii").write_bytes(gzip.decompress(image.read_bytes()))
        return folder / "patient001_frame01.nii"
    if how == "symlink loop":
        image.unlink()
        image.symlink_to(image)
    if how == "label not whole":
        return write(mask, labels.astype(np.float32) + 0.5, (1.8, 1.8, 9.0))
    if how == "truncated gzip":
        image.write_bytes(image.read_bytes()[:2000])
    elif how == "empty file":
        image.write_bytes(b"")
    elif how == "not nifti":
        image.write_bytes(gzip.compress(b"hello" * 200))
    elif how == "NaN":
        array = array.astype(np.float32)
        array[3, 3, 1] = np.nan
        write(image, array)
    elif how == "4-D":
        write(image, np.stack([array, array], -1))
    elif how == "2-D":
        write(image, array[..., 0])
    elif how == "5-D":
        write(image, np.stack([array, array], -1)[..., None, :])
    elif how == "RGB":
        write(image, np.zeros(array.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")]))
    elif how == "infinite":
        write(image, np.where(array == array.max(), np.inf, array).astype(np.float32))
    return image


def test_mask_whose_sform_is_not_its_images_is_taken_when_the_qforms_agree_as_in_acdc(tmp_path):
    image, mask = write(tmp_path / "a.nii.gz", np.ones((6, 5, 2), np.int16)), write(tmp_path / "a_gt.nii.gz", np.ones((6, 5, 2), np.uint8))
    case = alone(image, mask)

    def state(path, sform, qform_code):
        file = nib.load(path)
        file.set_qform(file.get_qform(), code=qform_code)
        file.set_sform(sform, code=1)
        nib.save(file, path)

    state(image, np.eye(4), 1)  # unit scales, beside a qform with the true ones
    state(mask, nib.load(mask).affine, 1)
    assert data.read_image(case)[1] == pytest.approx((8.0, 1.4, 1.5)) and data.read_mask(case, 4).all()
    state(mask, nib.load(mask).affine, 0)  # a qform that the header says is none
    with pytest.raises(BadInput, match="store both with the same affine"):
        data.read_mask(case, 4)


@pytest.mark.parametrize(
    "how, says",
    [
        ("no image", "no patient001_frameXX.nii.gz"), ("mask alone", "has no image patient001_frame07 beside it"),
        ("no mask", "add the mask"), ("mask of another shape", "must be equal"),
        ("label 7", "label value 7 is not one of 0 to 3"), ("label not whole", "label value 0.5"),
        ("truncated gzip", "cannot be read as NIfTI"),
        ("empty file", "cannot be read as NIfTI"), ("not nifti", "cannot be read as NIfTI"), ("NaN", "NaN or infinite"),
        ("4-D", "one 3-D volume"), ("2-D", "one 3-D volume"), ("5-D", "one 3-D volume"), ("RGB", "not numbers"),
        ("infinite", "NaN or infinite"), ("mask flipped", "store both with the same affine"),
        ("mask of another spacing", "store both with the same affine"), ("mask elsewhere", "up to 1 mm away from its image"),
        ("patient twice", "there is another one"), (".nii and .nii.gz", "is there as .nii and as .nii.gz; remove one"),
        ("folder unreadable", "cannot be opened (Permission denied)"), ("symlink loop", "cannot be read as NIfTI"),
    ],
)  # fmt: skip
def test_bad_file_is_refused_in_one_line_that_names_it(phantom_copy, monkeypatch, how, says):
    guilty = damage(phantom_copy, how, monkeypatch)
    with pytest.raises(BadInput) as error:
        Slices(opened(phantom_copy).training(2)[1])
    message = str(error.value)
    assert str(guilty) in message and says in message and "\n" not in message


def odd(folder: Path, how: str) -> np.ndarray:
    """Store patient001's frame in an unusual but right way; returns the (x,y,z) values that must be read."""
    values = np.random.default_rng(0).integers(0, 900, (24, 20, 4)).astype(np.int16)
    shape = {"one slice": (24, 20, 1), "6 x 6 pixels": (6, 6, 4), "1024 x 1024": (1024, 1024, 1)}.get(how)
    values = np.resize(values, shape).copy() if shape else values
    zooms, suffix, stored = (1.5, 1.4, 8.0), ".nii.gz", values
    if how == "negative":
        values = stored = values - 500
    elif how == "float64, large":
        values = stored = values.astype(np.float64) * 1e300
    elif how == "big-endian":
        stored = values.astype(">i2")
    elif how == "constant":
        values = stored = np.full_like(values, 7)
    elif how == "all zero":
        values = stored = np.zeros_like(values)
    elif how == "4-D of one time point":
        stored = values[..., None]
    elif how == ".nii":
        suffix = ".nii"
    elif how == "flipped and rotated axes":
        zooms = (-1.5, -1.4, 8.0)
    image = nib.Nifti1Image(stored, np.diag([*zooms, 1.0]), dtype=stored.dtype)
    if how == "big-endian":
        image = nib.Nifti1Image(stored, np.diag([*zooms, 1.0]), header=nib.Nifti1Header(endianness=">"), dtype=stored.dtype)
    if how == "slope and intercept":
        image.header.set_slope_inter(0.5, 100)  # what is stored now means 0.5 * stored + 100
        values = values * 0.5 + 100
        image = nib.Nifti1Image(values, image.affine, image.header)
        image.set_data_dtype(np.int16)
    folder.mkdir(parents=True)
    nib.save(image, folder / f"patient001_frame04{suffix}")
    nib.save(nib.Nifti1Image((values > np.median(values)).astype(np.uint8), image.affine), folder / f"patient001_frame04_gt{suffix}")
    return values.astype(np.float64)


@pytest.mark.parametrize("how", [
    "negative", "float64, large", "big-endian", "slope and intercept", "constant", "all zero", "one slice", "6 x 6 pixels", "1024 x 1024",
    "4-D of one time point", ".nii", "flipped and rotated axes", "one frame in a folder with spaces and \u00fcnic\u00f6de",
])  # fmt: skip
def test_odd_but_right_file_is_read_rightly(tmp_path, how):
    root = tmp_path / how.replace("/", "")
    values = odd(root / "patient001", how)
    (case,) = data.open_dataset("acdc", str(root)).cases["patient001"]
    low, high = values.min(), values.max()
    expected = (values - low) / (high - low) if high > low else np.zeros_like(values)
    image, _ = data.read_image(case)
    assert np.allclose(image, expected.transpose(2, 1, 0), atol=1e-3 if how == "slope and intercept" else 1e-6)
    assert np.array_equal(data.read_mask(case, 4), (values > np.median(values)).transpose(2, 1, 0))
    images, masks = Slices([case]).batch(torch.tensor([0]), CPU)
    assert images.shape == (1, 1, data.GRID, data.GRID) and torch.isfinite(images).all() and masks.dtype == torch.uint8


def test_damaged_bytes_are_read_or_refused_and_nothing_else(tmp_path):
    """Fuzz: 600 times some bytes of a valid file are changed, cut or doubled, mostly in its header."""
    rng = np.random.default_rng(0)
    good = write(tmp_path / "good.nii", np.arange(6 * 5 * 3, dtype=np.int16).reshape(6, 5, 3)).read_bytes()
    path, read, refused = tmp_path / "bad.nii", 0, 0
    for _ in range(600):
        spoiled = bytearray(good)
        for _ in range(rng.integers(1, 5)):
            spoiled[rng.integers(0, 348 if rng.random() < 0.8 else len(good))] = rng.integers(0, 256)
        if rng.random() < 0.2:
            spoiled = spoiled[: rng.integers(0, len(good))]
        path.write_bytes(spoiled)
        try:
            image, _ = data.read_image(alone(path))
            assert image.ndim == 3 and image.dtype == np.float32 and np.isfinite(image).all()
            assert 0 <= image.min() and image.max() <= 1
            read += 1
        except BadInput as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert read > 100 and refused > 100


def test_missing_root_and_missing_patients_are_named(tmp_path, phantom_copy):
    with pytest.raises(BadInput, match="no such folder"):
        data.open_dataset("acdc", str(tmp_path / "nowhere"))
    found = opened(phantom_copy)._replace(split={"test": ["patient007", "patient008", "patient009"]})
    with pytest.raises(BadInput, match="patients patient008 patient009 of the test split are missing"):
        found.with_masks("test")


@pytest.mark.parametrize("labeled", [0, -3, 6, 71, 1.5])
def test_labeled_outside_of_the_training_list_is_refused(phantom_copy, labeled):
    with pytest.raises(BadInput, match=f"--labeled {labeled}: must lie in 1 to 5"):
        opened(phantom_copy).training(labeled)


# --- the grid


@pytest.mark.parametrize("H, W", [(154, 224), (256, 216), (512, 428), (192, 192), (6, 9)])
def test_mask_survives_the_way_to_the_grid_and_back(H, W):
    y, x = np.mgrid[:H, :W]
    mask = torch.from_numpy(((y / H - 0.45) ** 2 + (x / W - 0.5) ** 2 < 0.04).astype(np.uint8))[None]
    onehot = torch.nn.functional.one_hot(data.to_grid(mask).long(), 2).permute(0, 3, 1, 2).float()
    back = data.from_grid(onehot, (H, W)).argmax(1).bool()
    assert back.shape == (1, H, W)
    assert 2 * (back & mask.bool()).sum() / (back.sum() + mask.sum()) > 0.97


def test_grid_keeps_the_aspect_ratio_and_centers():
    square = data.to_grid(torch.ones(1, 100, 50), grid=40)[0]
    assert torch.allclose(square[:, 10:30], torch.ones(40, 20)) and square[:, :10].sum() + square[:, 30:].sum() == 0


def test_outside_of_the_crop_is_background():
    p = data.uncrop(torch.tensor([0.1, 0.6, 0.3])[:, None, None].expand(2, 3, 8, 8), grid=12)
    labels = p.argmax(1)
    assert torch.allclose(p.sum(1), torch.ones(2, 12, 12))
    assert torch.equal(data.crop_center(labels, 8), torch.ones(2, 8, 8).long()) and labels.sum() == 2 * 64


def test_cache_bounds_memory_and_changes_no_value(phantom_copy):
    cases = opened(phantom_copy).with_masks("train")
    roomy, tight = Slices(cases), Slices(cases, cache_bytes=3 * 2**20)
    numbers = torch.tensor([0, len(roomy) - 1, 20, 3, 40])
    assert all(torch.equal(a, b) for a, b in zip(roomy.batch(numbers, CPU), tight.batch(numbers, CPU)))
    held = sum(t.nbytes for pair in tight.cache.values() for t in pair)
    assert held == tight.cached_bytes <= 3 * 2**20 < roomy.cached_bytes


# --- the views


def test_weak_view_moves_image_and_mask_alike():
    y, x = torch.meshgrid(torch.arange(data.GRID), torch.arange(data.GRID), indexing="ij")
    mask = (((y - 112) ** 2 + (x - 124) ** 2) < 38**2).to(torch.uint8).expand(6, -1, -1)
    view, labels = data.weak_view(mask[:, None].float(), mask, torch.Generator().manual_seed(0))
    assert view.shape == (6, 1, data.CROP, data.CROP) and labels.dtype == torch.int64
    assert ((view[:, 0] > 0.5) != labels.bool()).float().mean() < 0.01 and labels.float().mean() > 0.1
    assert len({int(m.sum()) for m in labels}) == 6  # each slice is scaled on its own


def test_strong_view_changes_intensities_and_not_places():
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    disk = 0.2 + 0.5 * (((y - 30) ** 2 + (x - 34) ** 2) < 15**2).float().expand(8, 1, 64, 64)
    strong = data.strong_view(disk, torch.Generator().manual_seed(0))
    assert strong.shape == disk.shape and strong.min() >= 0 and strong.max() <= 1
    inside, outside = disk > 0.5, disk < 0.5
    for k in range(8):
        middle = (strong[k][inside[k]].mean() + strong[k][outside[k]].mean()) / 2
        assert ((strong[k] > middle) == inside[k]).float().mean() > 0.9
    assert (strong - disk).abs().mean() > 0.03


def test_views_are_a_function_of_the_generator_alone():
    images, masks = torch.rand(3, 1, 192, 192), torch.zeros(3, 192, 192, dtype=torch.uint8)

    def views(seed):
        g = torch.Generator().manual_seed(seed)
        weak = data.weak_view(images, masks, g)[0]
        return weak, data.strong_view(weak, g)

    assert all(torch.equal(a, b) for a, b in zip(views(1), views(1)))
    assert not any(torch.equal(a, b) for a, b in zip(views(1), views(2)))


# --- the phantom


def test_phantom_is_the_same_each_time_and_has_two_frames_of_every_class(small_phantom, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PHANTOM_SPLIT", {"train": ["003"], "val": [], "test": []})
    data.make_phantoms(tmp_path / "again")
    first, second = (opened(root).cases["patient003"] for root in (small_phantom, tmp_path / "again"))
    assert len(first) == 2 and [c.name for c in first] == [c.name for c in second]
    volumes = []
    for a, b in zip(first, second):
        assert np.array_equal(data.read_image(a)[0], data.read_image(b)[0])
        mask = data.read_mask(a, 4)
        assert set(np.unique(mask)) == {0, 1, 2, 3}
        volumes.append((mask == 3).sum())
    assert volumes[0] > volumes[1]  # the left ventricle is larger at end-diastole, the first frame
