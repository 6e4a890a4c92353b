"""Each layout becomes the same arrays; what does not fit is refused in one line with its remedy."""

import gzip
import io
import json
import os
import random
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import data
import train
from extras import files, prepare

NAMES = "background,one,two"
GOOD_SPLIT = "p0 train\np1 train\np2 val\np3 test\np4 train\np5 val\n"


def volume(seed: int, shape=(20, 16, 3)) -> tuple[np.ndarray, np.ndarray]:
    """Image (x,y,z) and a mask in it, of classes 0 to 2."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 500, shape).astype(np.int16)
    mask = np.zeros(shape, np.uint8)
    mask[4:12, 4:12] = 1
    mask[6:9, 6:9] = 2
    return image, mask


def save(path: Path, array: np.ndarray, affine=np.diag([1.5, 1.5, 8.0, 1.0])) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


@pytest.fixture
def pairs(tmp_path):
    """Six patients in images/ and labels/."""
    root = tmp_path / "scans"
    for n in range(6):
        image, mask = volume(n)
        save(root / "images" / f"p{n}.nii.gz", image)
        save(root / "labels" / f"p{n}.nii.gz", mask)
    return root


def run(root: Path, *flags: str) -> data.Dataset:
    out = root.parent / "prepared"
    prepare.main([str(root), "--out", str(out), "--classes", NAMES, *flags])
    return data.load(str(out))


def refusal(root: Path, capsys, *flags: str) -> str:
    """What it says when it refuses; nothing is left behind."""
    out = root.parent / "prepared"
    with pytest.raises(SystemExit) as stopped:
        prepare.main([str(root), "--out", str(out), "--classes", NAMES, *flags])
    assert stopped.value.code == 2 and not out.exists()
    assert [f for f in root.parent.iterdir() if f.name.startswith(".")] == []
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def case(dataset: data.Dataset, name: str) -> data.Case:
    return next(case for case in dataset.cases if case.name == name)


def slices(dataset: data.Dataset, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    rows = dataset.rows([case(dataset, name)])
    return dataset.images[rows].float(), dataset.masks[rows]


def expected(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    image, mask = volume(seed)
    grid = data.to_grid(torch.from_numpy(data.scale(image.T)))
    return grid, data.to_grid(torch.from_numpy(mask.T.copy()))


def test_pairs_of_nifti_become_slices_on_the_grid_and_native_masks(pairs):
    dataset = run(pairs)
    images, masks = slices(dataset, "p3")
    assert (dataset.unit, dataset.eval_crop, dataset.labeled) == ("mm", data.GRID, 4)
    assert torch.allclose(images, expected(3)[0], atol=1e-3)
    assert torch.equal(masks, expected(3)[1])
    assert np.array_equal(data.read_mask(case(dataset, "p3"), 3), volume(3)[1].T)


def test_eight_bits_are_within_half_a_step(pairs):
    images, _ = slices(run(pairs, "--bits", "8"), "p3")
    assert (images - expected(3)[0]).abs().max() <= 0.51 / 255


def test_split_is_seventy_ten_twenty_and_no_patient_is_in_two_parts(pairs):
    split = run(pairs).split
    assert [len(split[part]) for part in ("train", "val", "test")] == [4, 1, 1]
    assert len(set(sum(split.values(), []))) == 6


def test_a_window_maps_to_zero_and_one(pairs):
    images, _ = slices(run(pairs, "--window", "100", "200"), "p0")
    grid = data.to_grid(torch.from_numpy(data.scale(volume(0)[0].T, (100, 200))))
    assert torch.allclose(images, grid, atol=1e-3)


def test_an_image_without_a_mask_is_unlabeled(pairs):
    (pairs / "labels" / "p2.nii.gz").unlink()
    dataset = run(pairs)
    assert "p2" in dataset.split["train"]
    assert all(case.patient != "p2" for case in dataset.training(0)[0])


def test_a_fourth_axis_of_one_time_point_is_left_out(pairs):
    for place, array in zip(("images", "labels"), volume(1)):
        save(pairs / place / "p1.nii.gz", array[..., None])
    assert torch.allclose(slices(run(pairs), "p1")[0], expected(1)[0], atol=1e-3)


def test_blanks_between_the_classes_do_not_count(pairs):
    assert run(pairs, "--classes", "background, heart, valve").labels[1:] == ["heart", "valve"]


def test_files_of_one_folder_are_one_patient(pairs):
    for n in (0, 1):
        for place in ("images", "labels"):
            (pairs / place / "anna").mkdir(exist_ok=True)
            (pairs / place / f"p{n}.nii.gz").rename(pairs / place / "anna" / f"visit{n}.nii.gz")
    assert [case.patient for case in run(pairs).cases].count("anna") == 2


def test_images_and_labels_may_be_links(pairs):
    for place in ("images", "labels"):
        (pairs / place).rename(pairs.parent / place)
        (pairs / place).symlink_to(pairs.parent / place)
    assert len(run(pairs).cases) == 6


@pytest.mark.parametrize("labels", [{"background": 0, "heart": 1, "valve": 2},  # its two versions
                                    {"0": "background", "1": "heart", "2": "valve"}])
def test_nnunets_folders_bring_their_class_names(pairs, labels):
    (pairs / "images").rename(pairs / "imagesTr")
    (pairs / "labels").rename(pairs / "labelsTr")
    for n in range(6):
        (pairs / "imagesTr" / f"p{n}.nii.gz").rename(pairs / "imagesTr" / f"p{n}_0000.nii.gz")
    (pairs / "dataset.json").write_text(json.dumps({"labels": labels}))
    assert run(pairs, "--classes", "").labels == ["background", "heart", "valve"]


def test_acdc_as_downloaded_keeps_the_fields_split(tmp_path, monkeypatch):
    split = {"train": ["001", "002"], "val": ["003"], "test": ["004"]}
    monkeypatch.setattr(data, "ACDC_SPLIT", split)
    for n in range(1, 5):
        image, mask = volume(n)
        folder = tmp_path / "acdc" / "training" / f"patient00{n}"
        save(folder / f"patient00{n}_frame01.nii.gz", image)
        save(folder / f"patient00{n}_frame01_gt.nii.gz", mask)
    dataset = run(tmp_path / "acdc", "--split", "acdc")
    assert (dataset.unit, dataset.eval_crop, dataset.labeled) == ("voxels", data.EVAL_CROP, 7)
    assert dataset.split["val"] == ["patient003"]


def test_the_first_of_acdcs_list_with_a_mask_are_labeled(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "ACDC_SPLIT", {"train": ["001", "002"], "val": ["003"], "test": []})
    for n in (1, 2, 3):
        file = tmp_path / "acdc" / f"patient00{n}" / f"patient00{n}_frame01.nii.gz"
        save(file, volume(n)[0])
        if n > 1:
            save(file.with_name(f"patient00{n}_frame01_gt.nii.gz"), volume(n)[1])
    few, _ = run(tmp_path / "acdc", "--split", "acdc").training(1)
    assert [case.patient for case in few] == ["patient002"]


def test_hdf5_slices_are_joined_in_the_order_of_their_numbers(tmp_path):
    h5py = pytest.importorskip("h5py")
    root = tmp_path / "ssl4mis" / "data" / "slices"
    root.mkdir(parents=True)
    for n in range(3):
        image, mask = volume(n, (20, 16, 11))
        for z in range(11):
            with h5py.File(root / f"patient00{n}_frame01_slice_{z + 1}.h5", "w") as file:
                file["image"] = image[:, :, z].T.astype(np.float32)
                file["label"] = mask[:, :, z].T
    images, _ = slices(run(tmp_path / "ssl4mis"), "patient001_frame01")
    native = volume(1, (20, 16, 11))[0].T
    grid = data.to_grid(torch.from_numpy(data.scale(native)))
    assert torch.allclose(images, grid, atol=1e-3)


def authors_tree(root: Path, slices: int) -> Path:
    """A volume in each folder of the authors' tree; slice z has grays from 20 z to 20 z + 19."""
    image_module = pytest.importorskip("PIL.Image")
    for part in ("train-label", "train-unlabel", "val", "test"):
        for place in ("image", "mask"):
            (root / part / place).mkdir(parents=True)
        for z in range(slices):
            name = f"{part}_frame01_slice_{z}"
            pixels = np.random.default_rng(z).integers(20 * z, 20 * z + 20, (12, 10))
            file = root / part / "image" / f"{name}.png"
            image_module.fromarray(pixels.astype(np.uint8)).save(file)
            np.save(root / part / "mask" / f"{name}.npy", np.eye(12, 10, dtype=np.uint8))
    return root


def test_the_authors_png_tree_is_its_own_split(tmp_path, capsys):
    root = authors_tree(tmp_path / "png", 11)
    (root / "split.txt").write_text("val train")
    (root / "val" / "image" / "Thumbs.db").write_bytes(b"x")
    dataset = run(root)
    assert dataset.split["val"] == ["val"]
    assert "left alone, the folders are the split: 1 files" in capsys.readouterr().out
    assert len(dataset.training(0)[1]) == 1  # its masks are not read
    images, _ = slices(dataset, "train-label_frame01")
    assert torch.equal(images.amax((1, 2)).argsort(), torch.arange(11))


def test_volumes_are_read_a_few_slices_at_a_time():
    volume = files.Volume((17, 512, 512), lambda a, b: np.zeros((b - a, 512, 512), np.uint8))
    assert [len(slab) for slab in files.slabs(volume)] == [16, 1]


def test_a_prepared_set_trains(pairs):
    run(pairs)
    flags = ["--data", str(pairs.parent / "prepared"), "--steps", "2", "--width", "4",
             "--batch", "2", "--codebook-size", "16", "--fm", "none", "--device", "cpu"]
    trained = train.train(train.read_settings([*flags, "--out", str(pairs.parent / "run")]))
    assert (trained / "val.csv").exists()


def test_split_txt_from_windows_is_read(pairs):
    (pairs / "split.txt").write_bytes(b"\xef\xbb\xbf" + GOOD_SPLIT.replace("\n", "\r\n").encode())
    assert run(pairs).split == {"train": ["p0", "p1", "p4"], "val": ["p2", "p5"], "test": ["p3"]}


def test_phantoms_stand_in_for_scans(tmp_path, monkeypatch):
    few = {"train": ["001", "002"], "val": ["003"], "test": []}
    monkeypatch.setattr(data, "PHANTOM_SPLIT", few)
    prepare.main(["--phantoms", str(tmp_path / "scans")])
    prepare.main([str(tmp_path / "scans"), "--out", str(tmp_path / "prepared"), "--classes", "4"])
    assert len(data.load(str(tmp_path / "prepared")).cases) == 6


def shifted(x: float) -> np.ndarray:
    """The affine of `save`, moved along x."""
    affine = np.diag([1.5, 1.5, 8.0, 1.0])
    affine[0, 3] = x
    return affine


def put(path: Path, content) -> None:
    """An array, an image or bytes into a file; a function changes its bytes; None removes it."""
    if content is None:
        path.unlink()
    elif isinstance(content, np.ndarray):
        save(path, content)
    elif isinstance(content, nib.Nifti1Image):
        nib.save(content, path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content(path.read_bytes()))


@pytest.mark.parametrize("name, content, said", [
    ("split.txt", b"\xe9 train", "save it as UTF-8"),
    ("split.txt", b"p0 train\n", "does not name p1 p2 p3 p4 p5; add a line for each"),
    ("split.txt", GOOD_SPLIT.replace(" ", ",").encode(), "is not a patient of this set"),
    ("split.txt", GOOD_SPLIT.encode() + b"p9 train\n", "'p9 train' is not a patient"),
    ("split.txt", GOOD_SPLIT.encode() + b"p0 test\n", "split.txt: p0 is twice in train, val"),
    ("split.txt", GOOD_SPLIT.replace("val", "test").encode(), "train and val need a patient with"),
    ("images/p1.nii.gz", nib.Nifti1Image(volume(1)[0], shifted(np.nan)), "affine is not finite"),
    ("labels/p1.nii.gz", lambda old: old[:-8] + bytes([old[-8] ^ 1]) + old[-7:],
     "labels/p1.nii.gz: damaged (CRC check failed"),
    ("images/p1.nii.gz", lambda old: old[:-4], "p1.nii.gz: damaged (Compressed file ended"),
    ("labels/p1.nii.gz", volume(1)[1] + np.uint8(1),
     "p1.nii.gz: label value 3 is not one of 0, 1, 2; change the mask, or name the"),
    ("labels/p1.nii.gz", volume(1, (16, 20, 3))[1],
     "labels/p1.nii.gz: has shape (16, 20, 3), its image (20, 16, 3)"),
    ("labels/p1.nii.gz", nib.Nifti1Image(volume(1)[1], shifted(40)),
     "labels/p1.nii.gz: lies 40 mm beside its image; give both one affine"),
    ("images/p1.nii.gz", np.full((20, 16, 3), np.nan, np.float32),
     "images/p1.nii.gz: holds voxels that are not finite numbers; replace them"),
    ("images/p1.nii.gz", volume(1)[0][:, :, 0], "has shape (20, 16), not (x, y, z); store"),
    ("labels/p1.nii.gz", np.zeros((20, 16, 3, 2), np.uint8), "of a mask its class numbers"),
    ("images/p1.nii", volume(1)[0], "has the same name; remove one of the two"),
    ("images/p1.nii.gz", None, "labels/p1.nii.gz: has no image of that name")])
def test_bad_input_is_one_line_with_its_remedy(pairs, capsys, name, content, said):
    put(pairs / name, content)
    assert said in refusal(pairs, capsys)


def read_or_refused(root: Path, capsys) -> None:
    """Either all is well, or it is refused in one line; nothing is left behind."""
    status = 0
    try:
        run(root)
    except SystemExit as stopped:
        status = stopped.code
    assert (status, capsys.readouterr().err.count("\n")) in {(0, 0), (2, 1)}
    assert not [f for f in root.parent.iterdir() if f.name.startswith(".")]


@pytest.mark.parametrize("seed", range(40))
def test_a_file_with_random_damage_is_read_or_refused_in_one_line(pairs, capsys, seed):
    rng = random.Random(seed)
    file = rng.choice(sorted(pairs.rglob("*.nii.gz")))
    content = bytearray(gzip.decompress(file.read_bytes()))
    for _ in range(rng.randrange(1, 8)):
        content[rng.randrange(352)] = rng.randrange(256)  # most of it in the header
    file.write_bytes(gzip.compress(content[: rng.choice([None, rng.randrange(len(content))])]))
    read_or_refused(pairs, capsys)


# -- Kinds of input, several of each -------------------------------------------------------------


@pytest.mark.parametrize("ending, packed", [("NII.GZ", True), ("Nii.gz", False), ("NII", True)])
def test_what_an_ending_says_of_compression_does_not_matter(pairs, ending, packed):
    for file in sorted(pairs.rglob("*.nii.gz")):
        content = file.read_bytes() if packed else gzip.decompress(file.read_bytes())
        file.unlink()
        file.with_name(f"{file.name[:2]}.{ending}").write_bytes(content)
    assert len(run(pairs).cases) == 6


@pytest.mark.parametrize("name", ["p9.mha", "p9.nrrd", "p9.seg.nrrd", "p9.IMA", "p9.hdr", "p9.mgz"])
def test_what_nifti_it_is_not_is_to_be_converted(pairs, capsys, name):
    (pairs / "labels" / name).write_bytes(b"x")
    assert f"{name}: is not NIfTI; convert it to .nii.gz" in refusal(pairs, capsys)


@pytest.mark.parametrize("name", ["notes.txt", "Thumbs.db", "p9.nii.zip", "IM0001"])
def test_what_is_left_alone_is_named(pairs, capsys, name):
    (pairs / "labels" / name).write_bytes(b"x")
    run(pairs)
    assert f"left alone, no NIfTI: 1 files ({pairs / 'labels' / name})" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["._p9.nii.gz", ".DS_Store", ".ipynb_checkpoints"])
def test_hidden_files_are_no_scans(pairs, capsys, name):
    for place in ("images", "labels"):
        (pairs / place / name).write_bytes(b"x")
    assert len(run(pairs).cases) == 6 and "left alone" not in capsys.readouterr().out


@pytest.mark.parametrize("target", ["file", "folder"])
def test_links_to_files_and_folders_of_patients_are_followed(pairs, target):
    for place in ("images", "labels"):
        elsewhere = pairs.parent / place
        elsewhere.mkdir()
        (pairs / place / "p0.nii.gz").rename(elsewhere / "p0.nii.gz")
        link = pairs / place / ("p0.nii.gz" if target == "file" else "anna")
        link.symlink_to(elsewhere / "p0.nii.gz" if target == "file" else elsewhere)
    assert len([case for case in run(pairs).cases if case.mask]) == 6


def test_a_link_to_nothing_is_refused(pairs, capsys):
    (pairs / "labels" / "anna").symlink_to(pairs / "nowhere")
    assert "anna: is a link to nothing; correct it, or remove it" in refusal(pairs, capsys)


def test_links_in_a_circle_are_refused(pairs, capsys):
    (pairs / "images" / "again").symlink_to(pairs / "images")
    assert "links lead here twice, or in a circle; remove one" in refusal(pairs, capsys)


@pytest.mark.parametrize("masks, seen", [("masks", True), ("Segmentations", True),
                                         ("truth", False)])
def test_the_folder_of_the_masks_is_recognized_or_named(pairs, capsys, masks, seen):
    (pairs / "labels").rename(pairs / masks)
    if seen:
        assert all(case.mask for case in run(pairs).cases)
    else:
        assert "rename the folder that holds them (images, truth)" in refusal(pairs, capsys)


@pytest.mark.parametrize("content, said", [
    (b"", "damaged (not NIfTI, by its first bytes); copy the file again, or convert it"),
    (gzip.compress(gzip.compress(b"x")), "damaged (not NIfTI"),
    (gzip.compress(bytes(400))[:12], "damaged (Compressed file ended")])
def test_a_file_that_does_not_open_is_named(pairs, capsys, content, said):
    (pairs / "images" / "p1.nii.gz").write_bytes(content)
    assert f"p1.nii.gz: {said}" in refusal(pairs, capsys)


def test_a_folder_with_the_name_of_a_file_is_named(pairs, capsys):
    (pairs / "images" / "p1.nii.gz").unlink()
    (pairs / "images" / "p1.nii").mkdir()
    assert "p1.nii: is a folder; name the file in it" in refusal(pairs, capsys)


def test_a_file_that_may_not_be_read_is_to_be_allowed(pairs, capsys, monkeypatch):
    put(pairs / "images" / "p1.nii.gz", lambda old: old[:-4])  # reading it fails
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "p1.nii.gz: cannot be read; allow it, or copy the file" in refusal(pairs, capsys)


@pytest.mark.parametrize("stored, off, read", [
    (np.uint16, 0.0, True), (np.float64, 5e-4, True), (np.float32, -9e-4, True),
    (np.float64, 2e-3, False), (np.float32, 0.5, False), (np.float64, -3.0, False)])
def test_a_label_within_a_thousandth_is_that_number(pairs, capsys, stored, off, read):
    mask = volume(1)[1]
    file = nib.Nifti1Image(mask + (mask > 0) * np.float64(off), np.diag([1.5, 1.5, 8.0, 1.0]))
    file.header.set_data_dtype(stored)  # to an integer type nibabel writes a scale factor
    nib.save(file, pairs / "labels" / "p1.nii.gz")
    if read:
        assert torch.equal(slices(run(pairs), "p1")[1], expected(1)[1])
    else:
        message = refusal(pairs, capsys)
        assert f"label value {1 + off:.9g} is not one of" in message and "NAME=" not in message


@pytest.mark.parametrize("pixdim, sides, code, spacing", [
    ((0, 0, 0), (1.5, 1.5, 8), 1, (8, 1.5, 1.5)),  # none in the header
    ((1.5, np.nan, 8), (1.5, 1.5, 8), 1, (8, 1.5, 1.5)),
    ((1, 1, 1), (1.5, 1.5, 8), 1, (8, 1.5, 1.5)),  # a default of whoever wrote the file
    ((2, 2, 2), (1.5, 1.5, 8), 1, (8, 1.5, 1.5)),
    ((1.5, 1.5, 8), (1, 1, 1), 1, (8, 1.5, 1.5)),  # as ACDC
    ((1.5, 1.5, 8), (1, 1, 1), 0, (8, 1.5, 1.5)),
    ((0, 0, 0), (1.5, 1.5, 8), 0, None),  # the affine does not count
    ((np.inf, 1, 1), (0, 1.5, 8), 1, None),
])
def test_spacing_comes_from_header_or_affine_and_never_from_nowhere(pairs, capsys, pixdim, sides,
                                                                   code, spacing):
    for place in ("images", "labels"):
        file = pairs / place / "p1.nii.gz"
        raw = bytearray(gzip.decompress(file.read_bytes()))
        raw[80:92] = np.array(pixdim, "<f4").tobytes()
        raw[252:256] = np.array([0, code], "<i2").tobytes()
        affine = np.diag([*sides, 1])[:3].astype("<f4")
        raw[280:328] = affine.tobytes()
        file.write_bytes(gzip.compress(bytes(raw)))
    if spacing is None:
        assert "has no voxel size; correct pixdim or the affine" in refusal(pairs, capsys)
    else:
        assert case(run(pairs), "p1").spacing == pytest.approx(spacing)


@pytest.mark.parametrize("units, factor", [("meter", 1000), ("micron", 0.001), ("unknown", 1)])
def test_spacing_is_in_mm_whatever_the_header_counts_in(pairs, units, factor):
    for place, array in zip(("images", "labels"), volume(1)):
        file = nib.Nifti1Image(array, np.diag([1.5, 1.5, 8.0, 1.0]))
        file.header.set_xyzt_units(units)
        nib.save(file, pairs / place / "p1.nii.gz")
    sides = [8 * factor, 1.5 * factor, 1.5 * factor]
    assert case(run(pairs), "p1").spacing == pytest.approx(sides)


@pytest.mark.parametrize("shape, spacing, axis", [
    ((1, 30, 26), (1, 1, 1), "x"), ((3, 20, 16), (8, 1.5, 1.5), "x"),
    ((20, 3, 16), (1, 8, 1), "y"), ((3, 200, 160), (1, 1, 1), "x"),
    ((20, 16, 3), (1, 1, 8), None), ((16, 16, 16), (1, 1, 1), None)])
def test_volumes_along_another_axis_are_warned_of_once(pairs, capsys, shape, spacing, axis):
    for name in ("p0", "p1"):
        for place, array in zip(("images", "labels"), volume(0, shape)):
            save(pairs / place / f"{name}.nii.gz", array, np.diag([*map(float, spacing), 1.0]))
    run(pairs)
    said = capsys.readouterr().out
    if axis:
        assert f"along its axis {axis}" in said and "in 2 volumes; store them along" in said
    assert said.count("slices seem to lie") == bool(axis)


@pytest.mark.parametrize("factor, said", [
    (1, "the masks hold 0, 1, 2; name each, as in --classes background=0,NAME=1,NAME=2"),
    (100, "the masks hold 0, 100, 200; name each, as in --classes background=0,NAME=100,"),
    (1.5, "the masks hold 0, 1.5, 3; change them to whole numbers from 0 on"),
    (0.99999999, "the masks hold 0, 1, 2; name each"),
    (-1, "the masks hold -2, -1, 0; change them to whole numbers")])
def test_missing_classes_names_the_values_and_how_to_map_them(pairs, capsys, factor, said):
    for n in range(6):
        save(pairs / "labels" / f"p{n}.nii.gz", volume(n)[1] * np.float64(factor))
    assert said in refusal(pairs, capsys, "--classes", "")


@pytest.mark.parametrize("classes", ["1", "0", "300", "\u00b2", "a", "a,a", "a,", "a=0,b=0",
                                     "a,b=x", "a,b=-1", "a,b=1.5"])
def test_classes_that_are_none_are_refused(pairs, capsys, classes):
    assert "each NAME=NUMBER with both its own" in refusal(pairs, capsys, "--classes", classes)


def test_the_background_is_the_first_class_or_is_refused(pairs, capsys):
    said = refusal(pairs, capsys, "--classes", "LV=3,background=0")
    assert "the first class is the background" in said


@pytest.mark.parametrize("flags, said", [
    (["--window", "5", "-1"], "the second number must be the larger"),
    (["--window", "nan", "1"], "the second number"), (["--window", "0", "inf"], "the second"),
    (["--eval-crop", "17"], "multiple of 16"), (["--eval-crop", "16"], "32 to 240"),
    (["--seed", "-1"], "--seed -1: must be"),
    (["--patient", "("], "give a regular expression"),
    (["--patient", "x"], "is not in p0; give what all names have")])
def test_flags_out_of_range_are_refused(pairs, capsys, flags, said):
    assert said in refusal(pairs, capsys, *flags)


IGNORED = b'{"labels": {"background": 0, "muscle": 1, "ignore": 2}}'


@pytest.mark.parametrize("content, said", [
    *((content, "its labels are no names with a number each; allow it to be read") for content in (
        b"{", b"[" * 100_000, b"{}", b'{"labels": null}', b'{"labels": ["a", "b"]}',
        b'{"labels": {"background": 0, "all": [1, 2]}}', '{"labels": {}}'.encode("utf-16"))),
    (IGNORED, "pixels to ignore cannot be left out; change them, or --classes")])
def test_a_dataset_json_that_cannot_be_followed_is_refused(pairs, capsys, content, said):
    (pairs / "images").rename(pairs / "imagesTr")
    (pairs / "labels").rename(pairs / "labelsTr")
    (pairs / "dataset.json").write_bytes(content)
    assert f"dataset.json: {said}" in refusal(pairs, capsys, "--classes", "")


def test_a_split_txt_that_cannot_be_opened_is_not_ignored(pairs, capsys):
    (pairs / "split.txt").symlink_to(pairs / "nowhere")
    assert "split.txt: no such file; correct the path of the link" in refusal(pairs, capsys)


def test_a_disk_that_fills_up_ends_in_one_line_and_leaves_nothing(pairs, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare.nib, "save", full)
    assert "No space left on device; make room, allow it, or change --out" in refusal(pairs, capsys)


def test_of_many_values_the_first_twelve_are_named(pairs, capsys):
    save(pairs / "labels" / "p1.nii.gz", np.arange(960).reshape(20, 16, 3).astype(np.int16) % 14)
    said = refusal(pairs, capsys, "--classes", "")
    assert "10, 11, ...; name each, as in --classes background=0,NAME=1," in said


# -- The authors' PNG ----------------------------------------------------------------------------


@pytest.fixture
def png(tmp_path):
    return authors_tree(tmp_path / "png", 3)


def picture(mode: str) -> bytes:
    file = io.BytesIO()
    pytest.importorskip("PIL.Image").new(mode, (10, 12)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("mode, read", [("L", True), ("I;16", True), ("1", True), ("RGB", False),
                                        ("RGBA", False), ("LA", False), ("P", False)])
def test_gray_pictures_are_read_and_others_refused(png, capsys, mode, read):
    (png / "val" / "image" / "val_frame01_slice_1.png").write_bytes(picture(mode))
    if read:
        assert len(run(png).cases) == 4
    else:
        assert "slice_1.png: has shape (12, 10, " in refusal(png, capsys)


def test_a_picture_that_was_copied_in_part_is_refused(png, capsys):
    put(png / "val/image/val_frame01_slice_1.png", lambda old: old[:100] + bytes(len(old) - 100))
    assert "slice_1.png: damaged (" in refusal(png, capsys)


def test_a_label_that_is_no_class_is_named_with_its_slice(png, capsys):
    np.save(png / "val" / "mask" / "val_frame01_slice_2.npy", np.full((12, 10), 7, np.uint8))
    assert "slice_2.npy: label value 7 is not one of" in refusal(png, capsys)


def test_a_gap_between_slices_is_warned_of(png, capsys):
    for place, ending in (("image", "png"), ("mask", "npy")):
        (png / "val" / place / f"val_frame01_slice_1.{ending}").unlink()
    run(png)
    assert "val_frame01_slice_0.png: other slices are missing" in capsys.readouterr().out


@pytest.mark.parametrize("lost, said", [
    ("val/mask/val_frame01_slice_1.npy", "slice_1.png: has no mask val_frame01_slice_1.npy"),
    ("val/image/val_frame01_slice_1.png", "slice_1.npy: has no image of that name")])
def test_a_picture_without_its_mask_and_a_mask_without_its_picture(png, capsys, lost, said):
    (png / lost).unlink()
    assert said in refusal(png, capsys)


@pytest.mark.parametrize("seed", range(10))
def test_a_picture_or_mask_with_random_damage_is_read_or_refused_in_one_line(png, capsys, seed):
    rng = random.Random(seed)
    file = rng.choice(sorted([*png.rglob("*.png"), *png.rglob("*.npy")]))
    content = bytearray(file.read_bytes())
    for _ in range(rng.randrange(1, 8)):
        content[rng.randrange(len(content))] = rng.randrange(256)
    file.write_bytes(content[: rng.choice([None, rng.randrange(len(content))])])
    read_or_refused(png, capsys)


def test_hdf5_volumes_are_read_whole_and_are_unlabeled_without_a_label(tmp_path):
    h5py = pytest.importorskip("h5py")
    root = tmp_path / "h5"
    root.mkdir()
    for n in range(6):
        image, mask = volume(n)
        with h5py.File(root / f"p{n}.h5", "w") as file:
            file["image"] = image.T
            if n < 5:
                file["label"] = mask.T
    (root / "p0_slice_1.h5").write_bytes((root / "p0.h5").read_bytes())  # not read
    (root / "Thumbs.db").write_bytes(b"x")
    dataset = run(root)
    assert [(c.shape[0], bool(c.mask)) for c in dataset.cases] == [(3, n < 5) for n in range(6)]
    assert dataset.unit == "voxels"


def test_an_existing_folder_is_not_overwritten(pairs, capsys):
    (pairs.parent / "prepared").mkdir()
    with pytest.raises(SystemExit):
        run(pairs)
    assert "already exists; not overwriting" in capsys.readouterr().err


def test_visits_that_look_like_one_patient_are_warned_of(pairs, capsys):
    for place in ("images", "labels"):
        for n in (0, 1):
            (pairs / place / f"p{n}.nii.gz").rename(pairs / place / f"eva_visit{n}.nii.gz")
    run(pairs)
    assert "2 patients begin with eva" in capsys.readouterr().out


@pytest.mark.parametrize("names, stem, patient", [
    (["eva_visit1", "eva_visit2", "p0"], "eva", "eva"),
    (["p01_1", "p01_2", "p02_1"], "p01", "p01"),
    (["GLI-001-000", "GLI-001-001", "GLI-002-000"], "GLI-001", "GLI-001"),
    (["001_SA_ED", "001_SA_ES", "002_SA_ED"], "001", "001"),
    (["sub-01_ses-01_cine", "sub-01_ses-02_cine", "sub-02_ses-01_cine"], "sub-01", "sub-01"),
    (["case_001", "case_002", "case_003"], "", ""),
    (["LIDC-IDRI-0001", "LIDC-IDRI-0002"], "", "")])
def test_only_names_of_visits_are_warned_of_and_the_remedy_joins_them(capsys, names, stem, patient):
    prepare.warn_of_stems(names)
    said = capsys.readouterr().out
    assert (f"begin with {stem};" in said) if stem else not said
    if stem:
        expression = re.search("--patient '(.*)'", said)[1]
        assert re.search(expression, names[0])[0] == re.search(expression, names[1])[0] == patient


def test_a_volume_without_a_mask_is_no_part_of_validation(pairs, capsys):
    for n in range(6):  # each patient has a second frame, without a mask
        image, _ = volume(n)
        for place in ("images", "labels"):
            (pairs / place / f"p{n}.nii.gz").rename(pairs / place / f"p{n}_frame01.nii.gz")
        save(pairs / "images" / f"p{n}_frame02.nii.gz", image)
    dataset = run(pairs)
    assert all(case.mask for case in dataset.part("val") + dataset.part("test"))
    assert sum(case.mask is None for case in dataset.part("train")) == len(dataset.split["train"])
    assert "without a mask in val or test: 2 files" in capsys.readouterr().out


def test_nnunet_test_scans_without_masks_are_left_alone(pairs, capsys):
    for n in range(6):
        end = "Ts" if n > 3 else "Tr"
        save(pairs / f"images{end}" / f"p{n}_0000.nii.gz", volume(n)[0])
        if n < 5:
            save(pairs / f"labels{end}" / f"p{n}.nii.gz", volume(n)[1])
    for place in ("images", "labels"):
        shutil.rmtree(pairs / place)
    assert run(pairs).split["test"] == ["p4"]
    assert "p5_0000.nii.gz" in capsys.readouterr().out
