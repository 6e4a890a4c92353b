"""Each layout becomes the same arrays; what does not fit is refused in one line with its remedy."""

import gzip
import json
import random
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import data
import train
from data import BadInput
from extras import prepare

NAMES = "background,one,two"


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


def slices(dataset: data.Dataset, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    case = next(case for case in dataset.cases if case.name == name)
    rows = dataset.rows([case])
    return dataset.images[rows].float(), dataset.masks[rows]


def expected(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    image, mask = volume(seed)
    grid = data.to_grid(torch.from_numpy(data.scale(image.T)))
    return grid, data.to_grid(torch.from_numpy(mask.T.copy()))


def test_pairs_of_nifti_become_slices_on_the_grid(pairs):
    images, masks = slices(run(pairs), "p3")
    assert torch.allclose(images, expected(3)[0], atol=1e-3)
    assert torch.equal(masks, expected(3)[1])


def test_eight_bits_are_within_half_a_step(pairs):
    images, _ = slices(run(pairs, "--bits", "8"), "p3")
    assert (images - expected(3)[0]).abs().max() <= 0.51 / 255


def test_the_native_mask_travels_along_with_its_spacing(pairs):
    dataset = run(pairs)
    case = next(case for case in dataset.cases if case.name == "p3")
    assert np.array_equal(data.read_mask(case, 3), volume(3)[1].T)
    assert tuple(case.spacing) == (8.0, 1.5, 1.5)


def test_split_is_seventy_ten_twenty_and_no_patient_is_in_two_parts(pairs):
    split = run(pairs).split
    assert [len(split[part]) for part in ("train", "val", "test")] == [4, 1, 1]
    assert len(set(sum(split.values(), []))) == 6


def test_a_window_maps_to_zero_and_one(pairs):
    images, _ = slices(run(pairs, "--window=100,200"), "p0")
    grid = data.to_grid(torch.from_numpy(data.scale(volume(0)[0].T, (100, 200))))
    assert torch.allclose(images, grid, atol=1e-3)


def test_an_image_without_a_mask_is_unlabeled(pairs):
    (pairs / "labels" / "p2.nii.gz").unlink()
    dataset = run(pairs)
    assert "p2" in dataset.split["train"]
    assert all(case.patient != "p2" for case in dataset.training(0)[0])


def test_files_of_one_folder_are_one_patient(pairs):
    for n in (0, 1):
        for place in ("images", "labels"):
            (pairs / place / "anna").mkdir(exist_ok=True)
            (pairs / place / f"p{n}.nii.gz").rename(pairs / place / "anna" / f"visit{n}.nii.gz")
    assert [case.patient for case in run(pairs).cases].count("anna") == 2


def test_links_to_folders_are_followed_and_hidden_files_are_not(pairs):
    for place in ("images", "labels"):
        (pairs / place).rename(pairs.parent / place)
        (pairs / place).symlink_to(pairs.parent / place)
        (pairs / place / "._p0.nii.gz").write_text("litter")
    assert len(run(pairs).cases) == 6


def test_nnunets_folders_bring_their_class_names(pairs, capsys):
    (pairs / "images").rename(pairs / "imagesTr")
    (pairs / "labels").rename(pairs / "labelsTr")
    for n in range(6):
        (pairs / "imagesTr" / f"p{n}.nii.gz").rename(pairs / "imagesTr" / f"p{n}_0000.nii.gz")
    labels = {"labels": {"background": 0, "heart": 1, "valve": 2}}
    (pairs / "dataset.json").write_text(json.dumps(labels))
    prepare.main([str(pairs), "--out", str(pairs.parent / "prepared")])
    assert data.load(str(pairs.parent / "prepared")).labels == ["background", "heart", "valve"]


def test_acdc_as_downloaded_keeps_the_fields_split(tmp_path, monkeypatch):
    split = {"train": ["001", "002"], "val": ["003"], "test": ["004"]}
    monkeypatch.setattr(data, "ACDC_SPLIT", split)
    for n in range(1, 5):
        image, mask = volume(n)
        folder = tmp_path / "acdc" / "training" / f"patient00{n}"
        save(folder / f"patient00{n}_frame01.nii.gz", image)
        save(folder / f"patient00{n}_frame01_gt.nii.gz", mask)
    assert run(tmp_path / "acdc", "--split", "acdc").split["val"] == ["patient003"]


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


def test_the_authors_png_tree_is_its_own_split(tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    root = tmp_path / "png"
    for folder in ("train-label", "train-unlabel", "val", "test"):
        for place in ("image", "mask"):
            (root / folder / place).mkdir(parents=True)
        for z in range(11):
            name = f"{folder}_frame01_slice_{z}"
            pixels = np.full((12, 10), 20 * z, np.uint8)
            image_module.fromarray(pixels).save(root / folder / "image" / f"{name}.png")
            np.save(root / folder / "mask" / f"{name}.npy", np.eye(12, 10, dtype=np.uint8))
    dataset = run(root)
    assert dataset.split["val"] == ["val"]
    assert len(dataset.training(0)[1]) == 1  # its masks are not read
    images, _ = slices(dataset, "train-label_frame01")
    assert torch.equal(images.amax((1, 2)).argsort(), torch.arange(11))


def test_volumes_are_read_a_few_slices_at_a_time(pairs, monkeypatch):
    largest = []
    original = prepare.slabs

    def watched(opened):
        for slab in original(opened):
            largest.append(slab.size)
            yield slab

    image, mask = volume(0, (512, 512, 40))
    save(pairs / "images" / "p0.nii.gz", image)
    save(pairs / "labels" / "p0.nii.gz", mask)
    monkeypatch.setattr(prepare, "slabs", watched)
    run(pairs)
    assert max(largest) <= 2**22


def test_a_prepared_set_trains(pairs):
    run(pairs)
    flags = ["--data", str(pairs.parent / "prepared"), "--steps", "2", "--width", "4",
             "--batch", "2", "--codebook-size", "16", "--fm", "none", "--device", "cpu"]
    trained = train.train(train.read_settings([*flags, "--out", str(pairs.parent / "run")]))
    assert (trained / "val.csv").exists()


def test_split_txt_from_windows_is_read(pairs):
    parts = ["train", "train", "val", "test", "train", "val"]
    lines = [f"p{n} {part}" for n, part in enumerate(parts)]
    (pairs / "split.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert run(pairs).split == {"train": ["p0", "p1", "p4"], "val": ["p2", "p5"], "test": ["p3"]}


def test_phantoms_stand_in_for_scans(tmp_path, monkeypatch):
    few = {"train": ["001", "002"], "val": ["003"], "test": []}
    monkeypatch.setattr(data, "PHANTOM_SPLIT", few)
    prepare.main(["--phantoms", str(tmp_path / "scans")])
    prepare.main([str(tmp_path / "scans"), "--out", str(tmp_path / "prepared"), "--classes", "4"])
    assert len(data.load(str(tmp_path / "prepared")).cases) == 6


def spoil_label(root):
    save(root / "labels" / "p1.nii.gz", volume(1)[1] + np.uint8(1))


def spoil_shape(root):
    save(root / "labels" / "p1.nii.gz", volume(1, (16, 20, 3))[1])


def spoil_place(root):
    moved = np.diag([1.5, 1.5, 8.0, 1.0])
    moved[0, 3] = 40
    save(root / "labels" / "p1.nii.gz", volume(1)[1], moved)


def spoil_nan(root):
    save(root / "images" / "p1.nii.gz", np.full((20, 16, 3), np.nan, np.float32))


def spoil_flat(root):
    save(root / "images" / "p1.nii.gz", volume(1)[0][:, :, 0])


def spoil_one_hot(root):
    save(root / "labels" / "p1.nii.gz", np.zeros((20, 16, 3, 2), np.uint8))


def spoil_bytes(root):
    (root / "images" / "p1.nii.gz").write_bytes(b"no scan")


def spoil_twin(root):
    save(root / "images" / "p1.nii", volume(1)[0])


def spoil_foreign(root):
    (root / "images" / "p9.mha").write_bytes(b"")


def spoil_orphan(root):
    (root / "images" / "p1.nii.gz").unlink()


def spoil_split(root):
    (root / "split.txt").write_text("p0 train\n")


def spoil_encoding(root):
    (root / "split.txt").write_text("p0 train\n", encoding="utf-16")


def spoil_circle(root):
    (root / "images" / "again").symlink_to(root / "images")


def spoil_voxel_size(root):
    file = nib.load(root / "images" / "p1.nii.gz")
    image = nib.Nifti1Image(np.asarray(file.dataobj), None)
    image.header["pixdim"][1:4] = 0
    image.header["srow_x"] = image.header["srow_y"] = image.header["srow_z"] = 0
    image.header["sform_code"] = 1
    nib.save(image, root / "images" / "p1.nii.gz")


@pytest.mark.parametrize("spoil, said", [
    (spoil_label, "p1.nii.gz: label value 3 is not one of 0, 1, 2; change the mask, or name the"),
    (spoil_shape, "labels/p1.nii.gz: has shape (16, 20, 3), its image (20, 16, 3)"),
    (spoil_place, "labels/p1.nii.gz: lies 40 mm beside its image; give both one affine"),
    (spoil_nan, "images/p1.nii.gz: holds voxels that are no finite numbers; replace them"),
    (spoil_flat, "is one slice of shape (20, 16); store it as (x, y, 1)"),
    (spoil_one_hot, "of a one-hot mask its class numbers"),
    (spoil_bytes, "images/p1.nii.gz: is not NIfTI, or damaged; copy the file again"),
    (spoil_twin, "has the same name; remove one of the two"),
    (spoil_foreign, "p9.mha: is not NIfTI; convert it to .nii.gz"),
    (spoil_orphan, "labels/p1.nii.gz: has no image of that name"),
    (spoil_split, "does not name p1 p2 p3 p4 p5; add a line for each"),
    (spoil_encoding, "split.txt: is not UTF-8; save it as UTF-8"),
    (spoil_circle, "links lead here twice, or in a circle; remove one"),
    (spoil_voxel_size, "p1.nii.gz: its header has no voxel size; correct pixdim or the affine"),
])
def test_bad_input_is_one_line_with_its_remedy(pairs, capsys, spoil, said):
    spoil(pairs)
    assert said in refusal(pairs, capsys)


@pytest.mark.parametrize("seed", range(40))
def test_a_file_with_random_damage_is_read_or_refused_in_one_line(pairs, capsys, seed):
    rng = random.Random(seed)
    file = rng.choice(sorted(pairs.rglob("*.nii.gz")))
    content = bytearray(gzip.decompress(file.read_bytes()))
    for _ in range(rng.randrange(1, 8)):
        content[rng.randrange(352)] = rng.randrange(256)  # most of it in the header
    file.write_bytes(gzip.compress(content[: rng.choice([None, rng.randrange(len(content))])]))
    status = 0
    try:
        run(pairs)
    except SystemExit as stopped:
        status = stopped.code
    assert (status, capsys.readouterr().err.count("\n")) in {(0, 0), (2, 1)}
    assert not [f for f in pairs.parent.iterdir() if f.name.startswith(".")]


def test_missing_classes_names_the_values_found(pairs, capsys):
    assert "the masks hold 0, 1, 2; name each, as in" in refusal(pairs, capsys, "--classes", "")


def test_an_existing_folder_is_not_overwritten(pairs, capsys):
    (pairs.parent / "prepared").mkdir()
    with pytest.raises(SystemExit):
        run(pairs)
    assert "already exists; not overwriting" in capsys.readouterr().err


def test_slices_along_another_axis_are_warned_of(pairs, capsys):
    image, mask = volume(0, (3, 20, 16))
    for place, array in (("images", image), ("labels", mask)):
        save(pairs / place / "p0.nii.gz", array, np.diag([8.0, 1.5, 1.5, 1.0]))
    run(pairs)
    assert "slices seem to lie along its axis x" in capsys.readouterr().out


def test_visits_that_look_like_one_patient_are_warned_of(pairs, capsys):
    for place in ("images", "labels"):
        for n in (0, 1):
            (pairs / place / f"p{n}.nii.gz").rename(pairs / place / f"eva_visit{n}.nii.gz")
    run(pairs)
    assert "2 patients begin with eva" in capsys.readouterr().out


def test_the_refusal_of_a_mask_names_its_file():
    source = prepare.Source("x", "x", (Path("i.nii"),), (Path("missing.nii.gz"),))
    with pytest.raises(BadInput, match="missing.nii.gz: no such file; correct the path"):
        list(prepare.mask_slabs(source, prepare.Volume((1, 2, 2), None), [0, 1]))
