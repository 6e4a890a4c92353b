"""Metrics against brute force, the empty-mask rule, the table by hand."""

import csv
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import evaluate
from data import BadInput
from evaluate import Row


def masks(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two random, ragged masks (Z,H,W), one of them at the edge of the volume."""
    rng = np.random.default_rng(seed)
    a = np.zeros((5, 9, 8), bool)
    b = a.copy()
    a[0:4, 2:8, 1:6] = rng.random((4, 6, 5)) < 0.7
    b[1:5, 1:7, 2:8] = rng.random((4, 6, 6)) < 0.7
    return a, b


def surface_by_loops(mask: np.ndarray) -> np.ndarray:
    """Voxels with one of six neighbors outside; beyond the edge counts as outside."""
    padded = np.pad(mask, 1)
    found = []
    for z, y, x in np.argwhere(mask):
        neighbors = [padded[z, y + 1, x + 1], padded[z + 2, y + 1, x + 1],
                     padded[z + 1, y, x + 1], padded[z + 1, y + 2, x + 1],
                     padded[z + 1, y + 1, x], padded[z + 1, y + 1, x + 2]]
        if not all(neighbors):
            found.append((z, y, x))
    return np.array(found, float)


def distances_by_loops(a: np.ndarray, b: np.ndarray, spacing) -> np.ndarray:
    scaled_a, scaled_b = surface_by_loops(a) * spacing, surface_by_loops(b) * spacing
    return np.array([min(np.linalg.norm(p - q) for q in scaled_b) for p in scaled_a])


def test_dice_and_jaccard_by_hand():
    a, b = np.array([1, 1, 1, 0], bool), np.array([0, 1, 1, 1], bool)
    assert evaluate.dice(a, b) == pytest.approx(4 / 6)
    assert evaluate.jaccard(a, b) == pytest.approx(2 / 4)


@pytest.mark.parametrize("spacing", [(1, 1, 1), (9.0, 1.3, 1.4)])
def test_hd95_and_asd_equal_brute_force(spacing):
    for seed in range(5):
        a, b = masks(seed)
        pred_to_gt = distances_by_loops(a, b, spacing)
        gt_to_pred = distances_by_loops(b, a, spacing)
        hd95 = np.percentile(np.concatenate([pred_to_gt, gt_to_pred]), 95)
        row, = evaluate.score("case", a.astype(int), b.astype(int), ["background", "1"], spacing)
        assert row.hd95 == pytest.approx(hd95, abs=1e-9)
        assert row.asd == pytest.approx(pred_to_gt.mean(), abs=1e-9)


def test_a_class_in_neither_mask_is_not_scored():
    empty = np.zeros((2, 3, 4), bool)
    row, = evaluate.score("case", empty.astype(int), empty.astype(int), ["background", "one"])
    assert all(map(math.isnan, row[2:6])) and not row.empty


@pytest.mark.parametrize("swap", [False, True])
def test_a_class_in_one_mask_only_has_the_longest_distance(swap):
    full, empty = np.ones((2, 3, 4), bool), np.zeros((2, 3, 4), bool)
    a, b = (empty, full) if swap else (full, empty)
    diagonal = math.sqrt(1 + 4 + 9)
    row, = evaluate.score("case", a.astype(int), b.astype(int), ["background", "one"])
    assert (row.dice, row.jaccard) == (0, 0)
    assert row.hd95 == row.asd == pytest.approx(diagonal)


def test_score_has_a_row_for_each_foreground_class():
    truth = np.zeros((2, 4, 4), int)
    truth[:, :2] = 1
    truth[:, 2] = 2
    prediction = np.where(truth == 1, 1, 0)
    rows = evaluate.score("case", prediction, truth, ["background", "one", "two"])
    assert [(r.label, r.dice, r.empty) for r in rows] == [("one", 1.0, False), ("two", 0.0, True)]


def test_score_without_distances_leaves_them_out():
    truth = np.ones((2, 4, 4), int)
    row, = evaluate.score("case", truth, truth, ["background", "one"], distances=False)
    assert row.dice == 1 and math.isnan(row.hd95) and math.isnan(row.asd)


def rows() -> list[Row]:
    nan = math.nan
    return [Row("a", "RV", 0.5, 0.4, 2.0, 1.0, False), Row("a", "LV", nan, nan, nan, nan, False),
            Row("b", "RV", 0.9, 0.8, 4.0, 3.0, False), Row("b", "LV", 0.1, 0.0, 9.0, 8.0, True)]


def test_the_mean_is_over_volumes_then_over_classes():
    means = evaluate.class_means(rows())
    assert means["RV"] == pytest.approx([0.7, 0.6, 3.0, 2.0])
    assert means["mean"] == pytest.approx([0.4, 0.3, 6.0, 5.0])


def test_the_table_counts_empty_predictions():
    lines = evaluate.table(rows()).splitlines()
    assert lines[1].split() == ["RV", "0.7000", "0.6000", "3.0000", "2.0000", "0", "of", "2"]
    assert lines[3].split()[-3:] == ["1", "of", "4"]


@pytest.mark.parametrize("unit", ["mm", "voxels"])
def test_report_writes_the_rows_and_says_how_they_were_scored(tmp_path, capsys, unit):
    evaluate.report(tmp_path / "val.csv", rows(), {"step": 7, "fm": "none"}, unit)
    with open(tmp_path / "val.csv", newline="") as file:
        found = list(csv.DictReader(file))
    scores = ["dice", "jaccard", f"hd95_{unit}", f"asd_{unit}"]
    assert list(found[0]) == ["case", "label", *scores, "empty"]
    assert [(x["case"], x["label"], float(x[f"hd95_{unit}"])) for x in found[2:]] == [
        ("b", "RV", 4.0), ("b", "LV", 9.0)]
    assert f"one view, no post-processing, distances in {unit}" in capsys.readouterr().out


# -- Prediction


def bright_is_class_1(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([0.5 - x, x - 0.5], 1) * 50


def test_predict_comes_back_at_native_size_and_place():
    truth = np.zeros((3, 180, 150), np.uint8)
    truth[1, 80:120, 60:90] = 1
    images = data.to_grid(torch.from_numpy(truth.astype(np.float32)))
    cpu = torch.device("cpu")
    found = evaluate.predict(bright_is_class_1, images, (180, 150), 160, cpu, batch=2)
    assert found.shape == truth.shape and found.dtype == np.uint8
    assert evaluate.dice(found == 1, truth == 1) > 0.97


@pytest.fixture
def hearts(few_phantoms):
    return data.load("phantom")


def lv_is_brightest(x: torch.Tensor) -> torch.Tensor:
    logits = torch.zeros(len(x), 4, *x.shape[2:])
    logits[:, 3] = x[:, 0]
    return logits - 0.5


@pytest.mark.parametrize("name", ["Łódź", "caf\udce9", "心臓", "p\n1"])
def test_names_of_any_letters_go_into_the_csv(tmp_path, name):
    evaluate.report(tmp_path / "val.csv", [rows()[0]._replace(case=name)],
                    {"step": 7, "fm": "none"}, "mm")
    with open(tmp_path / "val.csv", newline="", encoding="utf-8") as file:
        found = next(csv.DictReader(file))["case"]
    assert found == name.encode("utf-8", "backslashreplace").decode()  # bytes of Latin-1 readable


def test_distances_in_mm_take_the_spacing_and_each_volume_is_printed(hearts, capsys):
    voxels = evaluate.evaluate(lv_is_brightest, hearts, "val", torch.device("cpu"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": Dice 0.")[0] for line in lines] == [c.name for c in hearts.part("val")]
    in_mm = hearts._replace(unit="mm")
    mm = evaluate.evaluate(lv_is_brightest, in_mm, "val", torch.device("cpu"))
    assert mm[0].hd95 > 1.7 * voxels[0].hd95  # spacing 9, 1.8 and 1.8 mm


def test_post_processing_comes_before_the_score(hearts):
    found = evaluate.evaluate(lv_is_brightest, hearts, "val", torch.device("cpu"),
                              post_process=np.zeros_like)
    assert all(r.empty for r in found)


# -- Runs


def test_a_file_is_saved_whole_or_not_at_all(tmp_path):
    evaluate.save(tmp_path / "x.pt", {"step": 1})

    class Unwritable:
        def __reduce__(self):
            raise OSError("no space left")

    with pytest.raises(BadInput, match="x.pt: no space left; make room or write elsewhere"):
        evaluate.save(tmp_path / "x.pt", {"step": Unwritable()})
    assert torch.load(tmp_path / "x.pt", weights_only=True) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["x.pt"]


def test_the_command_refuses_in_one_line(tmp_path):
    flags = [str(tmp_path), "--device", "nonsense"]
    command = [sys.executable, str(Path(evaluate.__file__)), *flags]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 2 and found.stderr.count("\n") == 1
    assert "--device nonsense: cannot be used here" in found.stderr


MEMORY = "; not enough memory: training needs less with a smaller --batch or --width\n"


@pytest.mark.parametrize("error, status, said", [
    (BadInput("a\nb: is bad; mend it"), 2, "x: a b: is bad; mend it\n"),
    (PermissionError(13, "denied", "runs"), 2, "x: [Errno 13] denied: 'runs'; change --out\n"),
    (RuntimeError("Tried to allocate 9 GiB"), 2, f"x: Tried to allocate 9 GiB{MEMORY}"),
    (RuntimeError("std::bad_alloc"), 2, f"x: std::bad_alloc{MEMORY}"),
    (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), 2, f"x: CUBLAS_STATUS_ALLOC_FAILED{MEMORY}"),
    (OSError(12, "Cannot allocate memory"), 2, f"x: [Errno 12] Cannot allocate memory{MEMORY}"),
    (MemoryError(), 2, f"x: {MEMORY}"),
    (BadInput("a: unreadable (Unable to allocate)"), 2, "x: a: unreadable (Unable to allocate)\n"),
    (BrokenPipeError(32, "Broken pipe"), "x: stopped; a training continues with --resume RUN", ""),
    (KeyboardInterrupt(), "x: stopped; a training continues with --resume RUN", "")])
def test_what_its_user_can_correct_is_one_line(capsys, error, status, said):
    def run():
        raise error

    with pytest.raises(SystemExit) as stopped:
        evaluate.command("x", run, "change --out")
    assert (stopped.value.code, capsys.readouterr().err) == (status, said)


def test_a_fault_of_the_program_keeps_its_traceback():
    def run():
        raise RuntimeError("sizes do not match")

    with pytest.raises(RuntimeError, match="sizes do not match"):
        evaluate.command("x", run, "change --out")


def test_summary_has_the_means_of_the_terms_and_the_use_of_the_codebook():
    indices = torch.tensor([[0, 1], [1, 1]])
    window = [{"loss": torch.tensor(1.0), "indices": indices},
              {"loss": torch.tensor(2.0), "seg_u": torch.tensor(5.0), "indices": indices}]
    record = evaluate.summary(20, window, codebook_size=8)
    assert (record["step"], record["loss"], record["seg_u"]) == (20, 1.5, 5.0)
    assert (record["used"], record["perplexity"]) == (0.25, 2)


def test_a_line_names_the_terms_of_eq12_in_100_characters():
    record = {"step": 10000, "loss": 1.0, "seg_l": 0.31, "rec_l": 0.1, "seg_u": 0.3, "rec_u": 0.1,
              "align": 3.21, "vq": -0.2, "used": 0.987, "perplexity": 12345}
    line = evaluate.one_line(record, 10000)
    assert all(f" {name} " in line for name in ("seg_l", "rec_l", "seg_u", "rec_u", "align"))
    assert len(f"{line} 8.5/s 999 min") <= 100


def test_the_log_without_a_codebook_says_nothing_of_its_use():
    window = [{"loss": torch.tensor(1.0), "indices": torch.zeros(2, 3, dtype=torch.long)}]
    assert evaluate.summary(5, window, codebook_size=0) == {"step": 5, "loss": 1.0}
