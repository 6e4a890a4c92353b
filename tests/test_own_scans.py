"""A new scan gets its segmentation in its own geometry; several runs, one table; the t-test of Appendix D."""

import csv
import json
import math
import shutil
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from test_layouts import as_pair
from test_train import CPU
from test_train import run as train_run

import data
import evaluate
import train
from data import BadInput


@pytest.fixture(scope="module")
def pair(small_phantom, tmp_path_factory):
    root = tmp_path_factory.mktemp("own") / "set"
    as_pair(small_phantom, root)
    return root


@pytest.fixture(scope="module")
def runs(pair, tmp_path_factory):
    """Two seeds of one setting and one of another, on a folder of one's own, just long enough to predict something."""
    folder = tmp_path_factory.mktemp("runs")
    for name, changes in {"a1": {"seed": 1}, "a2": {"seed": 2}, "b1": {"seed": 1, "eps": 0.3}}.items():
        train_run(pair, folder / name, data=str(pair), view=160, steps=40, lr=0.02, fm="none", **changes)
    return folder


def call(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    try:
        evaluate.main()
    except SystemExit as stop:
        return stop.code or 0
    return 0


def dice_by_hand(a: np.ndarray, b: np.ndarray, k: int) -> float:
    return 2 * ((a == k) & (b == k)).sum() / ((a == k).sum() + (b == k).sum())


def test_written_segmentation_scores_the_dice_that_evaluate_prints(pair, runs, tmp_path, monkeypatch):
    saved = torch.load(runs / "a1" / "best.pt", weights_only=True)
    case = evaluate.dataset_of(saved).training()[1][0]
    assert call(monkeypatch, runs / "a1", "--predict", case.images[0], "--out", tmp_path / "new" / "seg.nii.gz") == 0
    rows = evaluate.evaluate([evaluate.load(runs / "a1", CPU)[0]], [case], data.class_names(str(pair), 4), CPU, 160)
    found, truth = (np.asarray(nib.load(path).dataobj) for path in (tmp_path / "new" / "seg.nii.gz", case.masks[0]))
    assert len(np.unique(found)) > 1
    assert [row.dice for row in rows] == pytest.approx([dice_by_hand(found, truth, k) for k in (1, 2, 3)], nan_ok=True)
    assert (tmp_path / "new" / "seg.png").read_bytes().startswith(b"\x89PNG")


OBLIQUE = np.array([[1.5, 0.3, -0.8, 7], [-0.4, 1.6, 0.9, -3], [0.2, -0.5, 8.7, 11], [0, 0, 0, 1]])
AFFINES = {"RAS": np.diag([1.5, 1.4, 8, 1.0]), "LPS": np.diag([-1.5, -1.4, 8, 1.0]), "oblique": OBLIQUE}


@pytest.mark.parametrize("kind", [*AFFINES, "sform is not the qform", "4-D", "float", "slope", "big-endian"])
def test_output_has_the_geometry_of_the_input_and_integer_labels(pair, runs, tmp_path, monkeypatch, kind):
    voxels = np.asarray(nib.load(pair / "images" / "patient001_frame01.nii.gz").dataobj)
    if kind == "4-D":
        voxels = np.stack([voxels, voxels[::-1], voxels // 2], -1)
    if kind == "float":
        voxels = voxels.astype(np.float32)
    header = nib.Nifti1Header(endianness=">") if kind == "big-endian" else None
    image = nib.Nifti1Image(voxels, AFFINES.get(kind, AFFINES["RAS"]), header)
    image.header.set_data_dtype(voxels.dtype)
    image.header.set_xyzt_units("mm", "sec")
    image.header["cal_max"] = 300
    if kind == "4-D":
        image.header.set_zooms((1.5, 1.4, 8.0, 0.04))
    if kind == "sform is not the qform":
        image.set_sform(np.eye(4), code=1)
    if kind == "slope":
        image.header.set_slope_inter(0.5, 100)
    nib.save(image, tmp_path / "scan.nii.gz")
    assert call(monkeypatch, runs / "a1", "--predict", tmp_path / "scan.nii.gz", "--out", tmp_path / "seg.nii.gz") == 0
    a, b = nib.load(tmp_path / "scan.nii.gz"), nib.load(tmp_path / "seg.nii.gz")
    assert b.shape == a.shape and b.header.get_zooms() == a.header.get_zooms() and b.header.get_xyzt_units() == a.header.get_xyzt_units()
    assert np.array_equal(b.affine, a.affine) and nib.aff2axcodes(b.affine) == nib.aff2axcodes(a.affine)
    for one, other in ((a.get_sform(coded=True), b.get_sform(coded=True)), (a.get_qform(coded=True), b.get_qform(coded=True))):
        assert one[1] == other[1] and np.array_equal(one[0], other[0])
    assert b.get_data_dtype() == (np.uint8 if kind == "float" else a.get_data_dtype()) and b.header["cal_max"] == 0
    labels = np.asarray(b.dataobj)
    assert labels.dtype.kind in "iu" and set(np.unique(labels)) <= {0, 1, 2, 3} and len(np.unique(labels)) > 1
    if kind == "4-D":  # each time point is a volume of its own
        model = evaluate.load(runs / "a1", CPU)[0]
        one = data.scaled(data.open_nifti(tmp_path / "scan.nii.gz", 1), None)
        assert np.array_equal(labels[..., 1], evaluate.predict([model], one, CPU, 160).transpose(2, 1, 0))
        assert not np.array_equal(labels[..., 0], labels[..., 1])


def test_several_runs_predict_the_mean_of_their_probabilities():
    sure = lambda p: lambda x: torch.log(torch.tensor([1 - p, p]))[None, :, None, None].expand(len(x), 2, *x.shape[2:])  # noqa: E731
    volume = np.random.default_rng(0).random((2, 40, 40)).astype(np.float32)
    for models, label in (((0.9, 0.2, 0.2), 0), ((0.9, 0.9, 0.2), 1), ((0.8, 0.3), 1)):  # means 0.43, 0.67, 0.55
        found = evaluate.predict([sure(p) for p in models], [volume], CPU, views=evaluate.ONE_VIEW)
        assert found[0, 20, 20] == label


def test_several_runs_from_the_command_line_and_runs_that_have_no_mean(pair, runs, tmp_path, monkeypatch, capsys):
    scan = pair / "images" / "patient003_frame01.nii.gz"
    assert call(monkeypatch, runs / "a1", runs / "a2", "--predict", scan, "--out", tmp_path / "mean.nii.gz") == 0
    both = [evaluate.load(runs / name, CPU)[0] for name in ("a1", "a2")]
    expected = evaluate.predict(both, [data.read_image(data.Case("a", "a", (scan,), None))[0]], CPU, 160)
    assert np.array_equal(np.asarray(nib.load(tmp_path / "mean.nii.gz").dataobj).transpose(2, 1, 0), expected)
    train_run(pair, tmp_path / "other", data=str(pair), view=96, steps=1, fm="none")
    capsys.readouterr()
    assert call(monkeypatch, runs / "a1", tmp_path / "other", "--predict", scan, "--out", tmp_path / "no.nii.gz") == 2
    assert "its classes, --window, --view or --pieces are not those of" in capsys.readouterr().err


def test_a_folder_goes_on_over_bad_files_and_leaves_alone_what_is_there(pair, runs, tmp_path, monkeypatch, capsys):
    scans = tmp_path / "scans"
    scans.mkdir()
    for name in ("patient001_frame01", "patient002_frame01"):
        (scans / f"{name}.nii.gz").write_bytes((pair / "images" / f"{name}.nii.gz").read_bytes())
    (scans / "broken.nii.gz").write_bytes(b"hello")
    (scans / "notes.txt").write_text("not a scan")
    assert call(monkeypatch, runs / "a1", "--predict", scans, "--out", tmp_path / "out") == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "broken.nii.gz: cannot be read as NIfTI" in said.err
    assert "3 of 3: " in said.out and said.out.count("written") == 2
    names = {f"{name}.{kind}" for name in ("patient001_frame01", "patient002_frame01") for kind in ("nii.gz", "png")}
    assert {f.name for f in (tmp_path / "out").iterdir()} == names
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").iterdir()}
    (scans / "broken.nii.gz").unlink()
    assert call(monkeypatch, runs / "a1", "--predict", scans, "--out", tmp_path / "out", "--eps", 1) == 2
    assert "leave them out beside --predict" in capsys.readouterr().err
    (scans / "below").mkdir()
    (scans / "below" / "patient001_frame01.nii.gz").touch()
    assert call(monkeypatch, runs / "a1", "--predict", scans, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "WARNING" in said and "1 NIfTI files in folders below it are left alone" in said
    assert said.count("is there already, left alone") == 2 and all(f.stat().st_mtime_ns == t for f, t in before.items())


@pytest.mark.parametrize("case", ["itself", "existing", "picture", "no nifti", "same folder", "no out", "5-D", "no scan"])
def test_what_would_be_lost_or_cannot_be_is_refused_in_one_line(pair, runs, tmp_path, monkeypatch, capsys, case):
    scan = tmp_path / "scan.nii.gz"
    scan.write_bytes((pair / "images" / "patient001_frame01.nii.gz").read_bytes())
    if case == "5-D":
        nib.save(nib.Nifti1Image(np.zeros((4, 4, 2, 2, 2), np.int16), np.eye(4)), scan)
    (tmp_path / "there.nii.gz").write_text("precious")
    (tmp_path / "drawn.png").write_text("precious")
    out = {"itself": scan, "existing": tmp_path / "there.nii.gz", "picture": tmp_path / "drawn.nii.gz", "no nifti": tmp_path / "seg.mha",
           "same folder": tmp_path, "5-D": tmp_path / "seg.nii.gz", "no scan": tmp_path / "seg.nii.gz"}.get(case)  # fmt: skip
    source = tmp_path if case == "same folder" else tmp_path / "nowhere.nii.gz" if case == "no scan" else scan
    before = {f: f.read_bytes() for f in tmp_path.iterdir()}
    assert call(monkeypatch, runs / "a1", "--predict", source, *(["--out", out] if out else [])) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said
    assert {f: f.read_bytes() for f in tmp_path.iterdir()} == before


def test_a_scan_stored_in_other_axes_than_the_training_scans_is_warned_of(pair, runs, tmp_path, monkeypatch, capsys):
    voxels = np.asarray(nib.load(pair / "images" / "patient001_frame01.nii.gz").dataobj)
    for axes in ("RAS", "LPS"):
        nib.save(nib.Nifti1Image(voxels, AFFINES[axes]), tmp_path / f"{axes}.nii.gz")
        call(monkeypatch, runs / "a1", "--predict", tmp_path / f"{axes}.nii.gz", "--out", tmp_path / f"{axes}_seg.nii.gz")
        assert ("is stored in LPS, but the training scans in RAS" in capsys.readouterr().out) == (axes == "LPS")


# --- tables


# Student's t: (t, degrees of freedom, two-tailed p), from printed tables of critical values
CRITICAL = [(12.706, 1, 0.05), (4.303, 2, 0.05), (3.182, 3, 0.05), (2.262, 9, 0.05), (3.250, 9, 0.01), (2.228, 10, 0.05)]


@pytest.mark.parametrize("t, n, p", CRITICAL)
def test_appendix_d_t_test_has_the_critical_values_of_the_tables(t, n, p):
    noise = np.resize([1.0, -1.0], n + 1)
    noise = noise - noise.mean()
    noise /= noise.std(ddof=1)
    differences = noise + t / math.sqrt(n + 1)  # mean t / sqrt(n + 1), standard deviation 1
    assert evaluate.t_test(differences, np.zeros(n + 1)) == pytest.approx(p, abs=2e-4)
    assert evaluate.t_test(np.zeros(n + 1), differences) == pytest.approx(p, abs=2e-4)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 10, 21])
def test_appendix_d_t_test_equals_scipys(n):
    stats, rng = pytest.importorskip("scipy.stats"), np.random.default_rng(n)
    for shift in (0.0, 0.3, 2.0):
        a, b = rng.standard_normal(n) + shift, rng.standard_normal(n)
        assert evaluate.t_test(a, b) == pytest.approx(stats.ttest_rel(a, b).pvalue, abs=1e-12)


def test_t_test_of_one_pair_or_of_equal_differences_says_nothing():
    assert math.isnan(evaluate.t_test([0.5], [0.1])) and math.isnan(evaluate.t_test([0.5, 0.6], [0.4, 0.5]))


def test_table_over_runs_has_a_line_per_setting_with_mean_and_spread_over_seeds(runs, tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, runs / "a1", runs / "a2", runs / "b1", "--csv", tmp_path / "t.csv", "--figure", tmp_path / "t.png") == 0
    said = capsys.readouterr().out
    lines = list(csv.reader(open(tmp_path / "t.csv")))
    assert lines[0] == ["eps", "foundation model", "seeds", "Dice", "Jaccard", "HD95 (voxels)", "ASD (voxels)", "codewords in use",
                        "empty predictions", "p against the first"]  # fmt: skip
    assert [line.strip("| ").split(" | ") for line in said.splitlines()[:1] + said.splitlines()[2:4]] == lines

    def dice(name):
        rows = list(csv.DictReader(open(runs / name / "val.csv")))
        return np.mean([np.mean([float(r["dice"]) for r in rows if r["label"] == f"class {k}"]) for k in (1, 2, 3)])

    a = [dice("a1"), dice("a2")]
    assert lines[1][:4] == ["0.7", "none", "1 2", f"{np.mean(a):.4f} +- {np.std(a, ddof=1):.4f}"] and lines[1][-1] == "-"
    assert lines[2][:4] == ["0.3", "none", "1", f"{dice('b1'):.4f}"] and lines[2][-1] == "-"
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_p_in_the_table_is_paired_by_seed(runs, tmp_path):
    """Four seeds of two settings with scores made by hand; the order in which runs are named does not matter."""
    scores = {("x", 1): 0.5, ("x", 2): 0.7, ("x", 3): 0.6, ("x", 4): 0.8, ("y", 1): 0.6, ("y", 2): 0.75, ("y", 3): 0.72, ("y", 4): 0.81}
    saved, folders = torch.load(runs / "a1" / "best.pt", weights_only=True), {}
    for (name, seed), d in scores.items():
        folders[name, seed] = tmp_path / f"{name}{seed}"
        folders[name, seed].mkdir()
        settings = saved["settings"] | {"seed": seed, "eps": 0.1 if name == "x" else 0.2, "out": str(folders[name, seed])}
        torch.save(saved | {"settings": settings}, folders[name, seed] / "best.pt")
        evaluate.write_scores(folders[name, seed], "val", [evaluate.Row("c", "one", d, 0, 1, 1, False)], saved)
    order = [("x", 3), ("y", 2), ("x", 1), ("y", 4), ("x", 4), ("y", 1), ("x", 2), ("y", 3)]
    head, lines = evaluate.compare([evaluate.record_of(folders[key], "val", CPU) for key in order])
    d = np.array([0.1, 0.05, 0.12, 0.01])
    t = d.mean() / (d.std(ddof=1) / 2)
    theta = math.atan(t / math.sqrt(3))
    expected = 1 - 2 / math.pi * (theta + math.sin(theta) * math.cos(theta))
    assert [line[head.index("seeds")] for line in lines] == ["1 2 3 4", "1 2 3 4"]
    assert lines[1][-1] == f"{expected:.4f}" and lines[0][-1] == "-"
    with pytest.raises(BadInput, match="has the settings and the seed of"):
        evaluate.compare([evaluate.record_of(folders["x", seed], "val", CPU) for seed in (1, 2, 1)])


def test_records_give_the_table_and_the_figure_again_when_the_runs_are_gone(runs, tmp_path, monkeypatch, capsys):
    for name in ("a1", "a2", "b1"):
        shutil.copytree(runs / name, tmp_path / name)
    mine, records = [tmp_path / name for name in ("a1", "a2", "b1")], tmp_path / "records.csv"
    assert call(monkeypatch, *mine, "--csv", tmp_path / "t.csv", "--records", records) == 0
    table = capsys.readouterr().out.splitlines()[:4]
    for run in mine:
        shutil.rmtree(run)
    assert call(monkeypatch, records, "--sweep", "eps", "--figure", tmp_path / "eps.png") == 0
    assert capsys.readouterr().out.splitlines()[:4] == table and not (tmp_path / "comparison.csv").exists()
    assert (tmp_path / "eps.png").read_bytes().startswith(b"\x89PNG")
    lines = list(csv.DictReader(open(records)))
    assert [(line["run"], line["seed"]) for line in lines] == [("a1", "1"), ("a2", "2"), ("b1", "1")]
    assert json.loads(lines[2]["settings"])["eps"] == 0.3 and "val_dice" in json.loads(lines[0]["log"])[-1]
    assert lines[0]["commit"] == json.loads((runs / "a1" / "record.json").read_text())["commit"]
    assert call(monkeypatch, records, "--sweep", "lr", "--figure", tmp_path / "lr.png") == 2
    assert "--sweep lr: the runs do not differ in it, but in eps" in capsys.readouterr().err
    assert call(monkeypatch, records, "--sweep", "eps") == 2 and "--figure FILE" in capsys.readouterr().err
    assert call(monkeypatch, runs / "a1", "--sweep", "eps") == 2 and "are for several runs" in capsys.readouterr().err
    words = evaluate.read_records(records)
    words[2] = words[2]._replace(settings=json.dumps(json.loads(words[2].settings) | {"perturb": "dropout"}))
    with pytest.raises(BadInput, match="--sweep perturb: is no number"):
        evaluate.draw_sweep(words, "perturb", tmp_path / "p.png")
    assert call(monkeypatch, records, "--records", records) == 2 and "is there already" in capsys.readouterr().err
    for text in ("run,seed\na1,x\n", ""):
        records.write_text(text)
        assert call(monkeypatch, records) == 2
        said = capsys.readouterr().err
        assert "records.csv: cannot be read as records of runs" in said and said.count("\n") == 1


def test_a_sweep_has_the_mean_and_the_spread_over_seeds_at_each_place(tmp_path, monkeypatch):
    """T goes up to inf, and places are equally far apart; curves are told apart by the other settings."""
    drawn = []
    curve, line = Axes.errorbar, Axes.axhline
    monkeypatch.setattr(Axes, "errorbar", lambda self, *p, **how: drawn.append((how["label"], *p)) or curve(self, *p, **how))
    monkeypatch.setattr(Axes, "axhline", lambda self, *p, **how: drawn.append((how["label"], *p)) or line(self, *p, **how))
    blank = evaluate.Record("r", "c", 0, "none", 0, 0, 0, 0, 0, 1, 1, 1, "", "[]")
    two = [blank._replace(seed=k, settings=json.dumps({a: 1, b: 1})) for k, (a, b) in enumerate(("xy", "yx"))]
    assert [len(group) for _, group in evaluate.by_settings(two)] == [2]  # the order of the settings says nothing
    points = [("qpm", 1.0, 1, 0.5), ("qpm", math.inf, 1, 0.7), ("qpm", 1.0, 2, 0.7), ("none", 1.0, 1, 0.4)]
    records = [blank._replace(run=str(k), seed=seed, dice=d, settings=json.dumps({"perturb": how, "temperature": T}))
               for k, (how, T, seed, d) in enumerate(points)]  # fmt: skip
    evaluate.draw_sweep(records, "temperature", tmp_path / "t.png")
    assert drawn == [("perturb qpm", [0, 1], pytest.approx([0.6, 0.7]), pytest.approx([0.02**0.5, 0])), ("perturb none", 0.4)]


def test_scores_that_are_missing_are_made_and_broken_ones_refused(runs, tmp_path):
    path = runs / "b1" / "test.csv"
    rows = evaluate.scores(runs / "b1", "test", CPU)
    cases = evaluate.dataset_of(evaluate.load(runs / "b1", CPU)[1]).with_masks("test")
    assert path.exists() and {r.case for r in rows} == {c.name for c in cases}
    path.write_text("nonsense\n1,2\n")
    with pytest.raises(BadInput, match="cannot be read as a table of scores"):
        evaluate.scores(runs / "b1", "test", CPU)
    path.unlink()


def test_result_says_which_foundation_model(runs, capsys, monkeypatch):
    assert call(monkeypatch, runs / "a2") == 0
    assert "foundation model: none; mean" in capsys.readouterr().out
    assert json.loads((runs / "a2" / "val.json").read_text())["fm"] == "none"


# --- found by reading it again: what went wrong in silence


def test_an_output_that_cannot_be_written_is_one_line_and_leaves_nothing_behind(pair, runs, tmp_path, monkeypatch, capsys):
    scans = tmp_path / "scans"
    scans.mkdir()
    for name in ("patient001_frame01.nii.gz", "patient002_frame01.nii.gz"):
        (scans / name).write_bytes((pair / "images" / name).read_bytes())
    original, calls = nib.save, []

    def full_once(image, path):
        calls.append(path)
        if len(calls) > 1:
            return original(image, path)
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nib, "save", full_once)
    assert call(monkeypatch, runs / "a1", "--predict", scans, "--out", tmp_path / "out") == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "patient001_frame01.nii.gz: cannot be written" in said.err and "No space left" in said.err
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"patient002_frame01.nii.gz", "patient002_frame01.png"}
    assert call(monkeypatch, runs / "a1", "--predict", scans / "none.nii.gz", "--out", tmp_path / "new" / "seg.nii.gz") == 2
    assert not (tmp_path / "new").exists()


def test_a_picture_of_a_prediction_shows_the_slices_that_it_names_and_never_holds_the_volume(monkeypatch, tmp_path):
    volume, seen = np.linspace(0, 1, 40, dtype=np.float32)[:, None, None] * np.ones((1, 8, 8), np.float32), []
    monkeypatch.setattr(data, "show", lambda axis, picture, mask=None: seen.append((float(picture[0, 0]), mask)))
    labels = np.arange(40)[:, None, None] * np.ones((1, 8, 8), int)
    evaluate.draw_overlay((volume[k : k + 7] for k in range(0, 40, 7)), labels, tmp_path / "a.png")
    wanted = [0, 8, 16, 23, 31, 39]
    assert [round(value * 39) for value, _ in seen] == [k for k in wanted for _ in range(2)]
    assert [int(mask[0, 0]) for _, mask in seen if mask is not None] == wanted


def copied(run, target, **settings):
    """A copy of a run with some settings changed in its checkpoint."""
    shutil.copytree(run, target)
    saved = torch.load(run / "best.pt", weights_only=True)
    torch.save(saved | {"settings": saved["settings"] | settings}, target / "best.pt")
    return target


def test_runs_that_scale_intensities_differently_have_no_mean_and_no_common_figure(pair, runs, tmp_path, monkeypatch, capsys):
    window = copied(runs / "a2", tmp_path / "window", window="0,1000")
    lesion, ct = copied(runs / "a1", tmp_path / "x", classes=2), copied(runs / "a2", tmp_path / "y", data="lc", classes=2)
    scan = pair / "images" / "patient003_frame01.nii.gz"
    piece = copied(runs / "a2", tmp_path / "piece", pieces="largest")
    for first, second in ((runs / "a1", window), (runs / "a1", piece), (lesion, ct)):  # lc's window is its default, in no setting
        assert call(monkeypatch, first, second, "--predict", scan, "--out", tmp_path / "seg.nii.gz") == 2
        said = capsys.readouterr().err
        assert f"{second}: its classes, --window, --view or --pieces are not those of {first}" in said and said.count("\n") == 1
    assert call(monkeypatch, runs / "a1", window, "--csv", tmp_path / "t.csv", "--figure", tmp_path / "t.png") == 2
    assert "its classes, --window, --view" in capsys.readouterr().err and not (tmp_path / "t.png").exists()


def test_figure_over_runs_has_a_row_for_each_also_where_folders_have_the_same_name(pair, runs, tmp_path, monkeypatch):
    first, second = copied(runs / "a1", tmp_path / "a" / "run"), copied(runs / "a2", tmp_path / "b" / "run")
    (second / "log.jsonl").unlink()  # as when only checkpoints were copied: no curve, and no traceback
    rows = []
    monkeypatch.setattr(evaluate, "draw", lambda models, *_: rows.append(models))
    assert call(monkeypatch, first, second, "--csv", tmp_path / "t.csv", "--figure", tmp_path / "t.png") == 0
    assert list(rows[0]) == [str(first), str(second)]
    monkeypatch.undo()
    assert call(monkeypatch, first, second, "--csv", tmp_path / "u.csv", "--figure", tmp_path / "t.png") == 0
    assert (tmp_path / "t.png").exists()


def test_scores_of_an_earlier_checkpoint_are_made_again(runs, tmp_path):
    run = copied(runs / "a1", tmp_path / "run")
    fresh = evaluate.scores(run, "test", CPU)
    marked = [row._replace(dice=0.125) for row in fresh]
    evaluate.write_csv(run / "test.csv", marked)
    assert evaluate.scores(run, "test", CPU) == marked  # of this checkpoint: read and not made again
    saved = torch.load(run / "best.pt", weights_only=True)
    torch.save(saved | {"step": saved["step"] + 1}, run / "best.pt")  # training went on
    assert [row.dice for row in evaluate.scores(run, "test", CPU)] == pytest.approx([row.dice for row in fresh], abs=1e-12)


def test_pieces_are_those_of_the_run_unless_the_command_says_otherwise(runs, tmp_path, monkeypatch, capsys):
    run = copied(runs / "a1", tmp_path / "run")
    saved = torch.load(run / "best.pt", weights_only=True)
    assert saved["settings"]["pieces"] == "all" and not evaluate.one_piece(saved)  # a folder of one's own may hold lesions
    for name, expected in (("acdc", True), ("phantom", True), ("lc", False), (str(tmp_path), False)):
        settings = saved["settings"] | {"data": name, "pieces": ""}
        assert evaluate.one_piece({"settings": settings}) == expected
        del settings["pieces"]  # a run from before this setting
        assert evaluate.one_piece({"settings": settings}) == expected
    every = evaluate.scores(run, "val", CPU)
    assert call(monkeypatch, run, "--pieces", "largest") == 0
    said = capsys.readouterr().out
    torch.save(saved | {"settings": saved["settings"] | {"pieces": "largest"}}, run / "best.pt")
    one = evaluate.scores(run, "val", CPU)  # made again, for those that are there counted all
    assert one != every and evaluate.table(one) in said
    scan, out = evaluate.dataset_of(saved).with_masks("val")[0].images[0], tmp_path / "seg.nii.gz"
    for pieces, file in (("all", tmp_path / "all.nii.gz"), ("", out)):
        assert call(monkeypatch, run, "--predict", scan, "--out", file, *(["--pieces", pieces] if pieces else [])) == 0
    every, one = (np.asarray(nib.load(file).dataobj) for file in (tmp_path / "all.nii.gz", out))
    assert not np.array_equal(every, one)
    for k in (1, 2, 3):
        assert np.array_equal(one == k, evaluate.largest_piece((every == k).transpose(2, 1, 0)).transpose(2, 1, 0))
    assert call(monkeypatch, run, runs / "b1", "--pieces", "all", "--csv", tmp_path / "t.csv") == 2


def test_a_table_is_never_written_over_a_file_that_the_user_names(runs, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.csv").write_text("precious")
    assert call(monkeypatch, runs / "a1", runs / "b1", "--csv", tmp_path / "mine.csv") == 2
    assert "mine.csv: is there already" in capsys.readouterr().err and (tmp_path / "mine.csv").read_text() == "precious"
    assert call(monkeypatch, runs / "a1", runs / "b1", "--csv", tmp_path / "no" / "t.csv") == 2
    said = capsys.readouterr().err
    assert "t.csv" in said and said.count("\n") == 1
    for _ in range(2):  # but the one without a name of its own is
        assert call(monkeypatch, runs / "a1", runs / "b1") == 0
    (runs / "comparison.csv").unlink()


def test_validation_masks_that_show_nothing_are_refused_before_training(pair, tmp_path):
    """Every Dice would be nan where the teacher is right too: no best checkpoint, and half an hour lost."""
    shutil.copytree(pair, tmp_path / "set")
    found = data.open_dataset(str(pair), classes=4)
    for case in found.with_masks("val"):
        path = tmp_path / "set" / "labels" / case.masks[0].name
        file = nib.load(path)
        nib.save(nib.Nifti1Image(np.zeros(file.shape, np.uint8), file.affine), path)
    with pytest.raises(BadInput, match="no validation mask shows any class"):
        train_run(tmp_path / "set", tmp_path / "run", data=str(tmp_path / "set"), classes=4, steps=1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("part", ["images", "labels"])
def test_the_last_validation_file_is_read_before_training_too(pair, tmp_path, part):
    shutil.copytree(pair, tmp_path / "set")
    last = data.open_dataset(str(pair), classes=4).with_masks("val")[-1]
    path = tmp_path / "set" / part / last.masks[0].name
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(BadInput, match=f"{part}/{path.name}: cannot be read as NIfTI"):
        train_run(tmp_path / "set", tmp_path / "run", data=str(tmp_path / "set"), classes=4, steps=1)
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_go_on_with_other_volumes_than_it_began_with(pair, tmp_path):
    """A seed would split the grown folder anew, and train on patients that the run was validated on."""
    shutil.copytree(pair, tmp_path / "set")
    train_run(tmp_path / "set", tmp_path / "run", data=str(tmp_path / "set"), classes=4, steps=1, fm="none")
    resumed = train.read_settings(["--resume", str(tmp_path / "run")])
    train.train(resumed, [])
    shutil.copy(tmp_path / "set" / "images" / "patient001_frame01.nii.gz", tmp_path / "set" / "images" / "new.nii.gz")
    with pytest.raises(BadInput, match="does not hold the volumes that the run began with"):
        train.train(resumed, [])


def test_volumes_without_any_class_are_not_drawn_as_best_or_worst(tmp_path, monkeypatch, recwarn):
    cases = [data.Case(name, name, (), ()) for name in ("empty", "good", "bad")]
    rows = [evaluate.Row(name, "lesion", d, d, 1, 1, False) for name, d in (("empty", math.nan), ("good", 0.9), ("bad", 0.2))]
    drawn = []
    monkeypatch.setattr(data, "read_image", lambda case: drawn.append(case.name) or (np.zeros((3, 16, 16), np.float32), (1, 1, 1)))
    monkeypatch.setattr(data, "read_mask", lambda case, classes: np.zeros((3, 16, 16), np.uint8))
    evaluate.draw({}, cases, rows, ["background", "lesion"], CPU, 240, False, tmp_path / "a.png")
    assert drawn == ["good", "bad", "bad"] and not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]
