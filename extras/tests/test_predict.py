"""A new scan gets its segmentation in its own geometry, whole or not at all."""

import math
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes

import data
import evaluate
import train
from data import BadInput
from extras import predict
from extras.figures import Figure, legend
from extras.files import load_nifti
from extras.predict import draw

CPU = torch.device("cpu")
SAVED = {"labels": ["background", "dark", "bright"], "window": None, "eval_crop": data.GRID}
OBLIQUE = np.array([[1.5, 0.3, -0.8, 7], [-0.4, 1.6, 0.9, -3], [0.2, -0.5, 8.7, 11], [0, 0, 0, 1]])
TRUTH = np.zeros((24, 20, 7), np.uint8)  # (x,y,z), not symmetric in any axis
TRUTH[3:9, 4:15, 1:3] = 1
TRUTH[9:20, 4:8, 2:6] = 2
SMALL_SPLIT = {"train": ["001", "002"], "val": ["015"], "test": []}


def by_brightness(x: torch.Tensor) -> torch.Tensor:
    """Logits of a model that sees 0, 0.5 and 1 as classes 0, 1 and 2."""
    return torch.cat([0.25 - x, 0.25 - (x - 0.5).abs(), x - 0.75], 1) * 50


def save_scan(path, voxels=TRUTH * 100, affine=OBLIQUE, dtype="<i2", zooms=(), slope=(1, 0)):
    image = nib.Nifti1Image(voxels.astype(dtype), affine, nib.Nifti1Header(endianness=dtype[0]))
    image.header.set_data_dtype(dtype)
    image.header.set_xyzt_units("mm", "sec")
    image.header.set_slope_inter(*slope)
    image.header["cal_max"] = 300
    if zooms:
        image.header.set_zooms(zooms)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path.with_name(path.name.lower()))  # it has no .Nii.gz
    path.with_name(path.name.lower()).rename(path)
    return load_nifti(path)[0]


def segment(scan, out, saved=SAVED, **options):
    """The output of a model by brightness, and its voxels (x,y,z)."""
    predict.predict_file(by_brightness, saved, scan, out, CPU, **options)
    file = load_nifti(out)[0]
    return file, np.asarray(file.dataobj)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(predict, "draw", lambda path, *_: path.write_bytes(b"a picture"))


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs the command line with the model by brightness: exit status, stdout and stderr."""
    monkeypatch.setattr(predict, "load_runs", lambda runs, device: ([by_brightness], SAVED))

    def run_main(*arguments):
        monkeypatch.setattr(sys, "argv", ["predict", "RUN", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            predict.main()
        return stop.value.code, *capsys.readouterr()

    return run_main


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Two tiny runs of train.py that differ in the seed."""
    folder = tmp_path_factory.mktemp("predict")
    tiny = "--data phantom --labeled 1 --steps 2 --width 4 --batch 2 --codebook-size 32 --fm none"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "PHANTOM_SPLIT", SMALL_SPLIT)
        for seed in ("1", "2"):
            flags = [*tiny.split(), "--device", "cpu", "--seed", seed, "--out", str(folder / seed)]
            train.train(train.read_settings(flags))
    return [folder / "1", folder / "2"]


# -- Geometry


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz", "SCAN.NII.GZ", "Scan.Nii.gz"])
def test_labels_lie_where_the_scan_shows_them(tmp_path, name):
    save_scan(tmp_path / name)
    assert np.array_equal(segment(tmp_path / name, tmp_path / "out" / name)[1], TRUTH)


def test_affines_zooms_and_units_stay_also_where_sform_and_qform_differ(tmp_path):
    image = save_scan(tmp_path / "a.nii")
    image.set_qform(np.diag([1.5, 1.4, 8, 1]), code=1)
    image.set_sform(np.diag([1.0, -1, 1, 1]), code=2)
    nib.save(image, tmp_path / "b.nii")
    scan = nib.load(tmp_path / "b.nii")
    found, _ = segment(tmp_path / "b.nii", tmp_path / "seg.nii")
    assert np.array_equal(found.get_sform(coded=True)[0], scan.get_sform(coded=True)[0])
    assert np.array_equal(found.get_qform(coded=True)[0], scan.get_qform(coded=True)[0])
    assert [int(found.header[code]) for code in ("qform_code", "sform_code")] == [1, 2]
    assert found.header.get_zooms() == scan.header.get_zooms()
    assert found.header.get_xyzt_units() == ("mm", "sec")


@pytest.mark.parametrize("dtype", ["<i2", ">i2", "|u1", "<f4"])
def test_labels_have_the_integer_type_of_the_scan_and_no_scale(tmp_path, dtype):
    save_scan(tmp_path / "a.nii", dtype=dtype, slope=(0.5, 100))
    found, voxels = segment(tmp_path / "a.nii", tmp_path / "seg.nii")
    assert found.get_data_dtype() == np.dtype("|u1" if dtype == "<f4" else dtype)
    assert np.array_equal(voxels, TRUTH)
    raw = (tmp_path / "seg.nii").read_bytes()[112:120]  # scl_slope, scl_inter
    assert np.frombuffer(raw, f"{found.header.endianness}f4").tolist() == [1, 0]
    assert found.header["cal_min"] == found.header["cal_max"] == 0


def test_each_time_point_of_a_series_is_a_volume_of_its_own(tmp_path):
    series = np.stack([TRUTH, TRUTH[::-1], TRUTH[:, ::-1]], -1)
    scan = save_scan(tmp_path / "a.nii", series * [100, 10, 1], zooms=(1.5, 1.4, 8, 0.04))
    found, voxels = segment(tmp_path / "a.nii", tmp_path / "seg.nii")
    assert np.array_equal(voxels, series)
    assert found.header.get_zooms() == scan.header.get_zooms()


def test_the_window_of_the_run_scales_intensities(tmp_path):
    save_scan(tmp_path / "a.nii")
    _, voxels = segment(tmp_path / "a.nii", tmp_path / "seg.nii", SAVED | {"window": [0, 500]})
    assert np.array_equal(voxels, TRUTH // 2)


def test_a_run_segments_a_scan_as_its_evaluation_does(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PHANTOM_SPLIT", SMALL_SPLIT)
    dataset = data.load("phantom", parts=("val",))
    volume = data.phantoms(("val",))[1][0]
    save_scan(tmp_path / "a.nii", volume.T, dtype="<f8")
    (model,), saved = predict.load_runs(runs[:1], CPU)
    predict.predict_file(model, saved, tmp_path / "a.nii", tmp_path / "seg.nii", CPU)
    images = dataset.images[: len(volume)]
    expected = evaluate.predict(model, images, volume.shape[1:], saved["eval_crop"], CPU)
    assert np.array_equal(np.asarray(nib.load(tmp_path / "seg.nii").dataobj).T, expected)


def test_milliliters_are_voxels_times_their_size():
    found = [np.array([[[0, 1, 1, 2]]]), np.array([[[0, 0, 1, 0]]])]
    sizes = predict.milliliters(found, 500.0, ["bg", "RV", "LV"])
    assert sizes == "RV (1) 1.0 0.5 ml, LV (2) 0.5 0.0 ml"


@pytest.mark.parametrize("pixdim", [(0, 0, 0), (1, 1, 1), (np.nan, 2, 8)])
def test_milliliters_take_the_affine_where_the_header_has_no_voxel_size(tmp_path, pixdim):
    save_scan(tmp_path / "a.nii", affine=np.diag([1.0, 2, 8, 1]))
    raw = bytearray((tmp_path / "a.nii").read_bytes())
    raw[80:92] = np.array(pixdim, "<f4").tobytes()
    (tmp_path / "a.nii").write_bytes(raw)
    found = predict.predict_file(by_brightness, SAVED, tmp_path / "a.nii", tmp_path / "o.nii", CPU)
    dark, bright = ((TRUTH == k).sum() * 0.016 for k in (1, 2))
    assert found == f"dark (1) {dark:.1f} ml, bright (2) {bright:.1f} ml"


def test_a_folder_that_cannot_be_written_is_refused_before_a_scan_is_read(tmp_path, call,
                                                                         monkeypatch):
    save_scan(tmp_path / "in" / "a.nii")
    monkeypatch.setattr("extras.checks.os.access", lambda path, mode: False)
    monkeypatch.setattr(predict, "read_scan", None)
    for scan, out in (("in", "out"), ("in/a.nii", "out/a.nii")):
        status, _, err = call("--scan", tmp_path / scan, "--out", tmp_path / out)
        assert status == 2 and "cannot be written; allow it, or change --out" in err


def test_the_picture_shows_six_slices_in_mm_proportions(tmp_path, monkeypatch):
    masks = []
    imshow = Axes.imshow

    def record(axis, image, aspect, **how):
        assert aspect == 2.0
        masks.extend([image.data] if np.ma.isMaskedArray(image) else [])
        return imshow(axis, image, aspect=aspect, **how)

    monkeypatch.setattr(Axes, "imshow", record)
    monkeypatch.setattr(predict, "draw", draw)
    save_scan(tmp_path / "a.nii", affine=np.diag([1, 2, 8, 1]))
    segment(tmp_path / "a.nii", tmp_path / "seg.nii")
    assert (tmp_path / "seg.png").read_bytes().startswith(b"\x89PNG")
    assert np.array_equal(np.array(masks).T, TRUTH[..., [0, 1, 2, 4, 5, 6]])


@pytest.mark.parametrize("names", [["a", "b"], ["bg", "RV", "Myo", "LV"], ["x"] + ["y"] * 9])
def test_the_legend_names_the_classes(names):
    figure = Figure()
    legend(figure, names)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == names[1:]


@pytest.mark.parametrize("name", ["\udcc5\udc81eft", "\ud800", "\u0141", "$x_$", "a\nb", ""])
def test_a_class_of_any_name_can_be_drawn(tmp_path, name):
    draw(tmp_path / "a.png", np.zeros((2, 8, 8)), TRUTH[:8, :8, :2].T, ["background", name], 1.0)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


# -- Ensembles, test-time augmentation, largest component


def test_several_runs_segment_with_the_mean_of_their_probabilities(runs):
    models, _ = predict.load_runs(runs, CPU)
    x = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, second = (model(x).softmax(1) for model in models)
        both = predict.mean_of(models)(x).softmax(1)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(both, (first + second) / 2)


def test_a_folder_of_scans_is_segmented_by_the_mean_of_all_runs_named(runs, tmp_path, monkeypatch):
    save_scan(tmp_path / "in" / "a.nii")
    used = []
    monkeypatch.setattr(predict, "mean_of", lambda models: used.append(models) or by_brightness)
    flags = ["--scan", tmp_path / "in", "--out", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["predict", *map(str, [*runs, *flags])])
    with pytest.raises(SystemExit, match="0"):
        predict.main()
    assert len(used[0]) == 2 and (tmp_path / "out" / "a.nii").exists()


@pytest.mark.parametrize("key, value", [("labels", ["x"]), ("window", [0, 9]), ("eval_crop", 96)])
def test_runs_that_see_a_scan_differently_have_no_mean(runs, tmp_path, key, value):
    saved = torch.load(runs[1] / "best.pt", weights_only=True)
    torch.save(saved | {key: value}, tmp_path / "best.pt")
    with pytest.raises(BadInput, match=rf"{tmp_path}: its {key} is .* in {runs[0]}; give"):
        predict.load_runs([runs[0], tmp_path], CPU)


def test_rotate_zoom_rotates_and_scales_about_the_center():
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    quarter = predict.rotate_zoom(x, math.pi / 2, 1.0)
    assert torch.allclose(quarter, torch.rot90(x, 1, (2, 3)), atol=1e-5)
    column = predict.rotate_zoom(torch.arange(16.0).reshape(1, 1, 4, 4), 0.0, 2.0)[0, 0, :, 0]
    assert torch.allclose(column, torch.tensor([3.75, 5.75, 7.75, 9.75]))


@pytest.mark.parametrize("views", [predict.TTA, [(0.3, 1.1)]])  # one: no other makes up for it
def test_test_time_augmentation_rotates_each_prediction_back(views, monkeypatch):
    monkeypatch.setattr(predict, "TTA", views)
    y, x = np.mgrid[-1:1:100j, -1:1:100j]
    ellipse = np.exp(-4 * ((y - 0.1) ** 2 + 2 * (x + 0.1) ** 2))[None, None]
    image = torch.from_numpy(ellipse).float()
    found = predict.with_tta(by_brightness)(image).argmax(1)
    assert (found == by_brightness(image).argmax(1)).float().mean() > 0.98


def test_eps_1_replaces_every_token_at_test_time(runs):
    model, saved = evaluate.load_run(runs[0], torch.device("cpu"))
    flags = {"eps": 1.0, "tta": False, "keep_largest": False}
    network, _, names = predict.extended(model, saved, flags)
    seen = []  # (B,D,h,w) tokens that D_s gets
    model.segmentation_decoder.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    x = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    model.predict(x)
    network(x)
    moved = (seen[0] - seen[1]).norm(dim=1)  # of one codeword in both: rounding, about 1e-7
    assert moved.min() > 1e-3 and names == ["eps1.0"]
    with pytest.raises(BadInput, match="--eps 2: must be 0 to 1"):
        predict.extended(model, saved, flags | {"eps": 2})


def test_the_flags_of_evaluate_add_augmentation_and_post_processing(runs):
    model, saved = evaluate.load_run(runs[0], CPU)
    flags = {"eps": 0.0, "tta": True, "keep_largest": True}
    network, post_process, names = predict.extended(model, saved, flags)
    x = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(network(x), predict.with_tta(model.predict)(x))
    assert post_process is predict.keep_largest and names == ["tta", "keep-largest"]


@pytest.mark.parametrize("seed", range(4))
def test_largest_component_equals_scipys(seed):
    ndimage = pytest.importorskip("scipy.ndimage")
    mask = np.random.default_rng(seed).random((5, 9, 8)) < 0.2 + 0.1 * seed
    components, _ = ndimage.label(mask)
    sizes = np.bincount(components.ravel())[1:]
    found = predict.largest_component(mask)
    assert len(sizes) > 1 and found.sum() == sizes.max()
    assert len(np.unique(components[found])) == 1


def test_largest_component_of_a_spiral_is_all_of_it():
    rows = ["11111", "00001", "11101", "10001", "11111"]
    spiral = np.array([[list(row) for row in rows]]) == "1"
    assert np.array_equal(predict.largest_component(spiral), spiral)


def test_keep_largest_removes_what_a_class_has_besides(tmp_path):
    stray = TRUTH.copy()
    stray[22, 17, :2] = 1
    save_scan(tmp_path / "a.nii", stray * 100)
    _, voxels = segment(tmp_path / "a.nii", tmp_path / "seg.nii", largest=True)
    assert np.array_equal(voxels, TRUTH)


# -- Folders, and what is refused


def test_a_folder_goes_on_after_a_bad_file_and_ends_with_2(tmp_path, call):
    for name in ("a.nii", "c.NII.GZ", ".hidden.nii", "below/d.nii", "out/e.nii"):
        save_scan(tmp_path / name)
    (tmp_path / "b.nii.gz").write_bytes(b"hello")
    (tmp_path / "notes.txt").write_text("not a scan")
    status, out, err = call("--scan", tmp_path, "--out", tmp_path / "out")
    assert status == 2 and err.count("\n") == 1 and "b.nii.gz: damaged (not NIfTI" in err
    assert f"no NIfTI: 2 files ({tmp_path / 'below'}, {tmp_path / 'notes.txt'})" in out
    assert "1 of 3: " in out and "3 of 3: " in out
    names = {"a.nii", "a.png", "c.NII.GZ", "c.png", "e.nii"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names


def test_masks_and_other_channels_among_the_scans_are_left_alone(tmp_path, call):
    for name in ("p_frame01.nii", "p_frame01_gt.nii", "c_0000.nii.gz", "c_0001.nii.gz"):
        save_scan(tmp_path / "in" / name)
    status, out, _ = call("--scan", tmp_path / "in", "--out", tmp_path / "out")
    assert status == 0 and "left alone, masks of ACDC, or other channels: 2 files" in out
    assert {f.name for f in (tmp_path / "out").glob("*.nii*")} == {"p_frame01.nii", "c_0000.nii.gz"}


def test_a_scan_whose_slices_lie_along_x_is_warned_of(tmp_path, call):
    save_scan(tmp_path / "a.nii", affine=np.diag([9.0, 1.5, 1.5, 1]))
    out = call("--scan", tmp_path / "a.nii", "--out", tmp_path / "o.nii")[1]
    assert "a.nii: slices seem to lie along its axis x; store them along the last, z" in out


def test_a_folder_is_continued_without_overwriting(tmp_path, call):
    save_scan(tmp_path / "in" / "a.nii")
    save_scan(tmp_path / "in" / "b.nii")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.nii").write_text("precious")
    status, out, _ = call("--scan", tmp_path / "in", "--out", tmp_path / "out")
    assert status == 0 and "a.nii: already exists; not overwriting" in out
    assert (tmp_path / "out" / "a.nii").read_text() == "precious"
    assert (tmp_path / "out" / "b.nii").exists()


REFUSED = {
    "itself": "a.nii a.nii", "exists": "a.nii there.nii", "its picture exists": "a.nii drawn.nii",
    "not NIfTI": "a.nii o.mha", "out is a folder": "a.nii empty", "out is a file": ". there.nii",
    "no scan": "no.nii x/o.nii", "no scan in it": "empty out", "same folder": ". .",
    "5-D": "five.nii o.nii", "not finite": "nan.nii o.nii", "below a file": "a.nii a.nii/o.nii",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_in_one_line_and_changes_nothing(tmp_path, call, case):
    save_scan(tmp_path / "a.nii")
    save_scan(tmp_path / "five.nii", np.zeros((4, 4, 2, 2, 2)))
    save_scan(tmp_path / "nan.nii", np.full((4, 4, 2), np.nan), dtype="<f4")
    for name in ("there.nii", "drawn.png"):
        (tmp_path / name).write_text("precious")
    (tmp_path / "empty").mkdir()
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    scan, out = REFUSED[case].split()
    status, _, err = call("--scan", tmp_path / scan, "--out", tmp_path / out)
    assert status == 2 and err.startswith("extras.predict: ") and err.count("\n") == 1
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before


def test_a_full_disk_is_one_line_and_leaves_nothing_behind(tmp_path, call, monkeypatch):
    def full(image, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    save_scan(tmp_path / "a.nii")
    monkeypatch.setattr(nib, "save", full)
    status, _, err = call("--scan", tmp_path / "a.nii", "--out", tmp_path / "out" / "seg.nii")
    assert status == 2 and "seg.nii: cannot be written (No space left on device)" in err
    assert list((tmp_path / "out").iterdir()) == []
