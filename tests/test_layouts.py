"""The same scans in every layout that people have them in: same tensors, same training; who is in train, val and test; large sets."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from test_train import CPU, SMALL
from test_train import run as train_run

import data
import train
from data import BadInput, Slices


def volumes(root: Path) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(case, image, mask), both (z,y,x), of a phantom folder, by nibabel alone; frames are numbered 1 and 2 as in SSL4MIS."""
    found = []
    for folder in sorted((root / "training").iterdir()):
        frames = sorted(f for f in folder.iterdir() if "_gt" not in f.name)
        for number, file in enumerate(frames, start=1):
            mask = file.with_name(file.name.replace(".nii.gz", "_gt.nii.gz"))
            arrays = (np.asarray(nib.load(f).dataobj).transpose(2, 1, 0) for f in (file, mask))
            found.append((f"{folder.name}_frame0{number}", *arrays))
    return found


def unit(image: np.ndarray) -> np.ndarray:
    image = image.astype(np.float64)
    return ((image - image.min()) / (image.max() - image.min())).astype(np.float32)


def as_hdf5(source: Path, target: Path, first: int, flat: bool) -> None:
    """Training patients 001 to 005 slice by slice, the others as volumes; `first` is the number of the first slice."""
    h5py = pytest.importorskip("h5py")
    slices, whole = (target, target) if flat else (target / "data" / "slices", target / "data")
    slices.mkdir(parents=True)
    for name, image, mask in volumes(source):
        if name < "patient006":
            parts = [(slices / f"{name}_slice_{k + first}.h5", unit(image)[k], mask[k]) for k in range(len(image))]
        else:
            parts = [(whole / f"{name}.h5", unit(image), mask)]
        for path, x, y in parts:
            with h5py.File(path, "w") as file:
                file["image"], file["label"] = x, y


def as_png(source: Path, target: Path) -> None:
    """The authors' tree: 001 and 002 labelled, 003 to 005 not, 006 val, 007 test."""
    from PIL import Image

    for name, image, mask in volumes(source):
        part = ["train-label", "train-label", "train-unlabel", "train-unlabel", "train-unlabel", "val", "test"][int(name[7:10]) - 1]
        for kind in ("image", "mask"):
            (target / part / kind).mkdir(parents=True, exist_ok=True)
        for k in range(len(image)):
            Image.fromarray((unit(image)[k] * 255).round().astype(np.uint8)).save(target / part / "image" / f"{name}_slice_{k}.png")
            if part != "train-unlabel":
                np.save(target / part / "mask" / f"{name}_slice_{k}.npy", mask[k])


def as_pair(source: Path, target: Path, masks: int = 7) -> None:
    """images/ and labels/; patients after the first `masks` have no mask."""
    for kind in ("images", "labels"):
        (target / kind).mkdir(parents=True)
    for name, image, mask in volumes(source):
        nib.save(nib.Nifti1Image(image.transpose(2, 1, 0), np.diag([1.8, 1.8, 9.0, 1.0])), target / "images" / f"{name}.nii.gz")
        if int(name[7:10]) <= masks:
            nib.save(nib.Nifti1Image(mask.transpose(2, 1, 0), np.diag([1.8, 1.8, 9.0, 1.0])), target / "labels" / f"{name}.nii.gz")


LAYOUTS = {
    "hdf5": lambda a, b: as_hdf5(a, b, first=1, flat=False), "flat hdf5": lambda a, b: as_hdf5(a, b, first=0, flat=True),
    "png": as_png, "pair": as_pair,
}  # fmt: skip
SAYS = {"hdf5": "HDF5 of SSL4MIS", "png": "PNG and npy", "pair": "images/ and labels/"}
PATIENTS = "".join(f"patient00{n} {'train' if n < 6 else 'val' if n == 6 else 'test'}\n" for n in range(1, 8))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_tensors_and_trains(layout, phantom_copy, tmp_path, capsys):
    LAYOUTS[layout](phantom_copy, tmp_path / "set")
    (tmp_path / "set" / "split.txt").write_text(PATIENTS)
    name, classes = ("phantom", 0) if "hdf5" in layout else (str(tmp_path / "set"), 4)
    found, original = data.open_dataset(name, str(tmp_path / "set"), classes, view=160), data.open_dataset("phantom", str(phantom_copy))
    assert SAYS[layout.split()[-1]] in found.summary()
    for count, part, (ours, theirs) in zip((4, 6), ("labelled", "unlabelled"), zip(found.training(2)[1:], original.training(2)[1:])):
        a, b = Slices(ours), Slices(theirs)
        assert len(ours) == len(theirs) == count and len(a) == len(b), part
        (x, y), (x_, y_) = (s.batch(torch.arange(len(a)), CPU) for s in (a, b))
        assert torch.allclose(x, x_, rtol=0, atol=0.5 / 255 + 1e-6 if layout == "png" else 1e-6) and torch.equal(y, y_), part
        assert y.any() == (part == "labelled")
    for part in ("val", "test"):
        assert len(found.with_masks(part)) == 2
    train_run(tmp_path / "set", tmp_path / "run", data=name, classes=classes, steps=2)
    assert SAYS[layout.split()[-1]] in capsys.readouterr().out


def test_original_4d_series_and_info_are_left_alone(phantom_copy):
    before = data.open_dataset("phantom", str(phantom_copy)).cases
    folder = phantom_copy / "training" / "patient001"
    (folder / "Info.cfg").write_text("ED: 1\nES: 9\n")
    nib.save(nib.Nifti1Image(np.zeros((8, 8, 3, 5), np.int16), np.eye(4)), folder / "patient001_4d.nii.gz")
    assert data.open_dataset("phantom", str(phantom_copy)).cases == before


def test_both_frames_of_the_png_tree_are_cases_of_their_own_and_slice_10_comes_after_slice_2(tmp_path):
    from PIL import Image

    for frame in (1, 2):
        for k in range(12):
            for part in ("train-label", "val"):
                for kind in ("image", "mask"):
                    (tmp_path / part / kind).mkdir(parents=True, exist_ok=True)
                name = f"patient{'001' if part == 'val' else '002'}_frame0{frame}_slice_{k}"
                Image.fromarray(np.full((9, 9), 20 * k, np.uint8)).save(tmp_path / part / "image" / f"{name}.png")
                np.save(tmp_path / part / "mask" / f"{name}.npy", np.full((9, 9), k == 10, np.uint8))
    first, second = data.open_dataset(str(tmp_path), classes=2).with_masks("val")
    assert (first.name, second.name) == ("patient001_frame01", "patient001_frame02")
    assert data.read_image(first)[0][:, 0, 0] == pytest.approx(np.arange(12) / 11) and data.read_mask(first, 2)[10].all()


# --- what is wrong with a layout is said in one line


def refused(folder: Path, **options) -> str:
    with pytest.raises(BadInput) as error:
        found = data.open_dataset(str(folder), **{"classes": 4} | options)
        Slices(found.training()[1])
        found.with_masks("val")
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_image_without_mask_and_a_mask_without_image_are_refused_and_not_dropped(phantom_copy, tmp_path):
    as_png(phantom_copy, tmp_path / "png")
    mask = tmp_path / "png" / "train-label" / "mask" / "patient001_frame01_slice_1.npy"
    kept = mask.read_bytes()
    mask.unlink()
    assert "patient001_frame01_slice_1.png: has no mask/" in refused(tmp_path / "png")
    mask.write_bytes(kept)
    (mask.parent.parent / "image" / "patient001_frame01_slice_2.png").unlink()
    assert "patient001_frame01_slice_2.npy: has no image/" in refused(tmp_path / "png")
    mask.with_name("patient001_frame01_slice_2.npy").unlink()
    copies = [shutil.copy(f, f.with_name(f.name.replace("_1.", "_01."))) for f in (mask, mask.parent.parent / "image" / f"{mask.stem}.png")]
    assert "is the same slice" in refused(tmp_path / "png") and len(copies) == 2
    as_pair(phantom_copy, tmp_path / "pair")
    (tmp_path / "pair" / "images" / "patient003_frame01.nii.gz").unlink()
    assert "patient003_frame01.nii.gz: has no image of the same name" in refused(tmp_path / "pair")


def test_other_faults_of_layouts_are_named(phantom_copy, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    assert "holds no layout that we know" in refused(tmp_path / "empty")
    as_hdf5(phantom_copy, tmp_path / "h5", 1, flat=False)
    (tmp_path / "h5" / "data" / "slices" / "patient001_frame01_slice_2.h5").unlink()
    assert "slice 2 is missing" in refused(tmp_path / "h5")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "patient001_frame01.h5").write_bytes(b"hello")
    assert "cannot be read as HDF5" in refused(tmp_path / "bad")
    monkeypatch.setitem(sys.modules, "h5py", None)
    assert "pip install h5py" in refused(tmp_path / "bad")


# --- the split of a set of one's own


def test_seeded_split_is_70_10_20_by_patient_and_those_without_masks_all_train(phantom_copy, tmp_path):
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    for n in range(30):
        for frame in (1, 2):
            nib.save(nib.Nifti1Image(np.zeros((4, 4, 2), np.int16), np.eye(4)), tmp_path / "images" / f"p{n}_frame{frame}.nii")
            if n < 20:
                nib.save(nib.Nifti1Image(np.zeros((4, 4, 2), np.uint8), np.eye(4)), tmp_path / "labels" / f"p{n}_frame{frame}.nii")
    splits = [data.open_dataset(str(tmp_path), classes=2, split_seed=seed).split for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]
    train_part, val, test = splits[0].values()
    assert (len(train_part), len(val), len(test)) == (14 + 10, 2, 4) and len(set(train_part + val + test)) == 30
    assert set(train_part[14:]) == {f"p{n}" for n in range(20, 30)}
    found = data.open_dataset(str(tmp_path), classes=2)
    assert [found.training(n)[0] for n in (-1, 3, 0.5, 0.01)] == [14, 3, 7, 1]
    count, labelled, unlabelled = found.training(3)
    assert len(labelled) == 6 and len(unlabelled) == 2 * 21 and not any(case.masks for case in unlabelled)


@pytest.mark.parametrize(
    "text, says",
    [
        ("patient001 train\n", "does not say where patient002"), (PATIENTS + "patient009 val\n", "no patient 'patient009'"),
        (PATIENTS + "patient001 val\n", "patient001 is in more than one"), ("patient001\n", "line 1, 'patient001', is not PATIENT train"),
        (PATIENTS.replace("val", "train"), "nobody is in the val split"),
    ],
)  # fmt: skip
def test_split_file_decides_and_its_faults_are_named(phantom_copy, tmp_path, text, says):
    as_pair(phantom_copy, tmp_path / "set")
    last = PATIENTS.replace("patient001 train\n", "") + "patient001 train  # last\n"
    (tmp_path / "set" / "split.txt").write_text("# who is who\n\n" + last)
    split = data.open_dataset(str(tmp_path / "set"), classes=4).split
    assert split == {"train": [f"patient00{n}" for n in (2, 3, 4, 5, 1)], "val": ["patient006"], "test": ["patient007"]}
    (tmp_path / "set" / "split.txt").write_text(text)
    assert says in refused(tmp_path / "set")


def test_files_of_a_folder_below_images_are_one_patient(tmp_path):
    for n in range(3):
        for scan in ("before", "after"):
            for kind, dtype in (("images", np.int16), ("labels", np.uint8)):
                (tmp_path / kind / f"anna{n}").mkdir(parents=True, exist_ok=True)
                nib.save(nib.Nifti1Image(np.zeros((4, 4, 2), dtype), np.eye(4)), tmp_path / kind / f"anna{n}" / f"{scan}.nii.gz")
    found = data.open_dataset(str(tmp_path), classes=2)
    assert {name: [c.name for c in cases] for name, cases in found.cases.items()}["anna1"] == ["anna1/after", "anna1/before"]
    assert sorted(sum(found.split.values(), [])) == ["anna0", "anna1", "anna2"]


@pytest.mark.parametrize(
    "options, says",
    [
        ({"classes": 0}, "--classes 0: must say how many classes"), ({"window": "5,1"}, "--window=5,1: must be two numbers"),
        ({"window": "a,b"}, "--window=a,b: must be two numbers"), ({"view": 500}, "--view 500: must lie in"),
    ],
)  # fmt: skip
def test_settings_of_an_own_set_are_checked(phantom_copy, tmp_path, options, says):
    as_pair(phantom_copy, tmp_path / "set")
    assert says in refused(tmp_path / "set", **options)


def test_mixed_orientations_are_warned_of(phantom_copy, tmp_path):
    as_pair(phantom_copy, tmp_path / "set")
    cases = sum(data.open_dataset(str(tmp_path / "set"), classes=4).cases.values(), [])
    assert data.mixed_orientations(cases) == ""
    for kind in ("images", "labels"):
        path = tmp_path / "set" / kind / "patient001_frame01.nii.gz"
        file = nib.load(path)
        nib.save(nib.Nifti1Image(np.asarray(file.dataobj), np.diag([-1.8, -1.8, 9.0, 1.0])), path)
    assert "RAS 13, LPS 1" in data.mixed_orientations(cases)


# --- chest CT, and sets that do not fit into memory


def test_lc_is_two_classes_a_window_of_the_lung_and_a_share_of_labels(phantom_copy, tmp_path, monkeypatch):
    for kind in ("images", "labels"):
        (tmp_path / "lc" / kind).mkdir(parents=True)
    for n in range(30):
        voxels = np.full((8, 8, 3), -300, np.int16)
        voxels[0, 0], voxels[1, 1] = -2000, 3000
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), tmp_path / "lc" / "images" / f"ct{n}.nii.gz")
        nib.save(nib.Nifti1Image((voxels > 0).astype(np.uint8), np.eye(4)), tmp_path / "lc" / "labels" / f"ct{n}.nii.gz")
    monkeypatch.chdir(tmp_path)
    found = data.open_dataset("lc")
    assert found.labels == ["background", "lesion"] and found.view == data.GRID
    assert [len(found.split[part]) for part in ("train", "val", "test")] == [21, 3, 6]
    assert [found.training(n)[0] for n in (-1, 0.05, 0.1, 1 / 3)] == [2, 1, 2, 7]
    image, _ = data.read_image(found.training()[1][0])
    assert (image[:, 0, 0] == 0).all() and (image[:, 1, 1] == 1).all() and image[:, 5, 5] == pytest.approx(0.5)
    assert len(Slices(found.training()[1], 2)) == 6  # slices without lesion too
    assert data.read_image(data.open_dataset("lc", window="-400,-200").training()[1][0])[0][:, 5, 5] == pytest.approx(0.5)


def sparse(path: Path, shape: tuple[int, int, int], dtype) -> None:
    """A .nii of zeros that takes no room on the disk."""
    header = nib.Nifti1Header()
    header.set_data_shape(shape)
    header.set_data_dtype(dtype)
    header["vox_offset"], header["magic"] = 352, b"n+1"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header.binaryblock + bytes(4))
    os.truncate(path, 352 + int(np.prod(shape)) * np.dtype(dtype).itemsize)


CHILD = """
import resource, sys, time
sys.path.insert(0, {root!r})
import train
start = time.perf_counter()
original = train.Slices.__init__
def listed(self, *a):
    original(self, *a)
    print("listed", time.perf_counter() - start)
train.Slices.__init__ = listed
train.evaluate.codeword_counts = lambda *a: train.torch.ones(64, dtype=train.torch.int64)  # minutes, and no more memory
sys.argv = ["train.py", *{flags!r}]
train.main()
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def child(flags: list[str]) -> tuple[list[float], float, str]:
    code = CHILD.format(root=str(Path(train.__file__).parent), flags=flags)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    return [float(w[1]) for w in lines if w[:1] == ["listed"]], float(lines[-1][1]), done.stdout


@pytest.mark.slow
def test_300_large_volumes_are_listed_in_seconds_and_train_in_under_4_gb(tmp_path):
    """512 x 512 x 300, a lesion in none of them; and one small patient, with a lesion, to validate on."""
    names = [f"ct{n:03d}" for n in range(300)]
    for name in names:
        for kind, dtype in (("images", np.int16), ("labels", np.uint8)):
            sparse(tmp_path / "set" / kind / f"{name}.nii", (512, 512, 300), dtype)
    for kind, dtype in (("images", np.int16), ("labels", np.uint8)):
        sparse(tmp_path / "set" / kind / "small.nii", (64, 64, 2), dtype)
    with open(tmp_path / "set" / "labels" / "small.nii", "r+b") as file:
        file.seek(352)
        file.write(b"\1")  # the only voxel of a lesion: a validation without any is refused
    (tmp_path / "set" / "split.txt").write_text("small val\n" + "".join(f"{name} train\n" for name in names))
    where = ["--data", "lc", "--root", str(tmp_path / "set"), "--out", str(tmp_path / "run"), "--device", "cpu"]
    listed, peak, said = child([*where, "--steps", "6", "--batch", "2", "--width", "8", "--warmup", "0", "--codebook-size", "64"])
    assert len(listed) == 2 and max(listed) < 30 and peak < 4 and "step 6 " in said
    assert said.count("their headers were checked") == 2


def test_a_volume_of_500_slices_of_512_x_512_is_read_a_few_slices_at_a_time(tmp_path, monkeypatch):
    sparse(tmp_path / "ct.nii", (512, 512, 500), np.int16)
    read, original = [], data.numbers
    monkeypatch.setattr(data, "numbers", lambda path, f: read.append((out := original(path, f)).nbytes) or out)
    case = data.Case("ct", "ct", (tmp_path / "ct.nii",), None, (-1000, 400))
    volume, _ = Slices([case]).volume(0)
    assert volume.shape == (500, data.GRID, data.GRID) and max(read) <= 2**23 and sum(read) == 512 * 512 * 500 * 2


def test_a_set_larger_than_the_cache_is_drawn_from_volumes_that_fit_others_every_500_steps(phantom_copy):
    cases = data.open_dataset("phantom", str(phantom_copy)).training(5)[1]
    slices = Slices(cases, 4, cache_bytes=20 * 5 * data.GRID**2)  # room for 20 slices of the 70
    drawn = [set(slices.draw(400, torch.Generator().manual_seed(0), 7, step).tolist()) for step in (0, 499, 500)]
    assert drawn[0] == drawn[1] != drawn[2]
    for some in drawn:
        assert len({slices.where[n][0] for n in some}) >= 2 and len(some) <= 20
    every = set().union(*(slices.resident(7, 500 * k).tolist() for k in range(60)))
    assert every == set(range(len(slices)))  # in the long run nobody is left out
    whole = Slices(cases, 4)
    g = torch.Generator().manual_seed(3)
    assert torch.equal(whole.draw(9, torch.Generator().manual_seed(3), 7, 0), torch.randint(len(whole), (9,), generator=g))


def test_listing_a_set_says_what_is_in_it(phantom_copy, tmp_path, monkeypatch, capsys):
    as_pair(phantom_copy, tmp_path / "set", masks=5)
    monkeypatch.setattr(sys, "argv", ["data.py", "--data", str(tmp_path / "set"), "--classes", "4", "--out", str(tmp_path / "sheet.png")])
    data.main()
    said = capsys.readouterr().out
    assert "images/ and labels/ of NIfTI; 14 volumes of 7 patients, 10 with masks" in said
    assert "train, 3 patients labelled: 3 patients, 6 volumes" in said and "train, unlabelled: 2 patients, 4 volumes" in said
    assert "stored in RAS: 14 volumes" in said and "spacing (9.0, 1.8, 1.8) mm" in said and (tmp_path / "sheet.png").exists()


def test_every_setting_of_the_data_reaches_training(phantom_copy, tmp_path):
    as_pair(phantom_copy, tmp_path / "set")
    s = replace(SMALL, data=str(tmp_path / "set"), classes=4, window="0,300", view=100, split_seed=3, labeled=0.5, steps=1, fm="none")
    train.train(replace(s, out=str(tmp_path / "run")), [])
    saved = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    found = data.open_dataset(str(tmp_path / "set"), "", 4, "0,300", 100, 3)
    assert saved["split"] == found.split and saved["settings"]["labeled"] == 2 and saved["axes"] == "RAS"
    assert saved["settings"]["view"] == 96 and saved["sample"].shape == (1, 96, 96)  # whole tokens
