"""Several runs, one table; the t-test of Appendix D; records that stand in for their runs."""

import csv
import json
import math
import sys

import numpy as np
import pytest
from matplotlib.axes import Axes

import data
import train
from data import BadInput
from extras import compare, plots, stats

LOG = '[{"step": 5, "val_dice": 0.75}, {"step": 10, "val_dice": 0.5}]'
RECORD = compare.Record("r", "abc", 1, "none", "{}", 0.5, 0.4, 3.0, 1.0, 2, 6, 0.9, 20.5, 10, LOG)
HEADER = "case,label,dice,jaccard,hd95,asd,empty\n"


def write_run(folder, dices, seed=1, **settings):
    """A run folder by hand: one volume, and a class for each Dice."""
    folder.mkdir()
    own = {"data": "acdc", "steps": 10, "seed": seed, "device": "cuda:1", "out": str(folder)}
    settings = own | settings
    config = {"settings": settings, "fm": "none", "commit": "abc", "processes": 1,
              "precision": "float32", "labels": [], "split": {}, "eval_crop": 160, "window": None,
              "volumes": {}}
    log = [{"step": 5, "used": 0.25, "perplexity": 7.5}, {"step": 5, "val_dice": 0.75},
           {"step": 10, "used": 0.5, "perplexity": 9.5}, {"step": 10, "val_dice": 0.5}]
    rows = [f"a,{k},{dice},0.5,{k}.0,1.0,{dice == 0}\n" for k, dice in enumerate(dices)]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "log.jsonl").write_text("".join(json.dumps(x) + "\n" for x in log), encoding="utf-8")
    (folder / "val.csv").write_text(HEADER + "".join(rows), encoding="utf-8")
    return folder


@pytest.fixture
def runs(tmp_path):
    """Three seeds of eps 0.3, two of eps 0.7, one of another temperature."""
    args = [("a-1", 0.50, 1, 0.3, 1.0), ("a-2", 0.60, 2, 0.3, 1.0), ("a-3", 0.70, 3, 0.3, 1.0),
            ("b-2", 0.75, 2, 0.7, 1.0), ("b-1", 0.60, 1, 0.7, 1.0), ("c-1", 0.0, 1, 0.3, math.inf)]
    folders = []
    for name, dice, seed, eps, T in args:
        folders.append(write_run(tmp_path / name, [dice, dice], seed, eps=eps, temperature=T))
    return folders


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs the command line: exit status, stdout and stderr."""

    def run_main(*arguments):
        monkeypatch.setattr(sys, "argv", ["compare", *map(str, arguments)])
        status = 0
        try:
            compare.main()
        except SystemExit as stop:
            status = stop.code
        return status, *capsys.readouterr()

    return run_main


def record(name, seed, dice, **settings):
    settings = json.dumps(settings)
    return RECORD._replace(run=f"{name}-{seed}", seed=seed, dice=dice, settings=settings)


# -- Appendix D

# (t, degrees of freedom, two-tailed p), from printed tables of critical values
CRITICAL = [(12.706, 1, 0.05), (4.303, 2, 0.05), (3.182, 3, 0.05), (3.250, 9, 0.01),
            (2.228, 10, 0.05), (0.0, 5, 1.0)]


@pytest.mark.parametrize("t, n, p", CRITICAL)
def test_appendix_d_t_test_has_the_critical_values_of_the_tables(t, n, p):
    noise = np.resize([1.0, -1.0], n + 1)
    noise -= noise.mean()
    difference = noise / noise.std(ddof=1) + t / math.sqrt(n + 1)
    assert stats.t_test(difference, np.zeros(n + 1)) == pytest.approx(p, abs=2e-4)
    assert stats.t_test(np.zeros(n + 1), difference) == pytest.approx(p, abs=2e-4)


@pytest.mark.parametrize("a, b", [([], []), ([0.5], [0.1]), ([0.5, 0.6, 0.7], [0.4, 0.5, 0.6])])
def test_t_test_of_under_two_pairs_or_of_equal_differences_is_nan(a, b):
    assert math.isnan(stats.t_test(a, b))


def test_holm_multiplies_the_smallest_p_by_the_number_of_tests_and_keeps_the_order():
    found = stats.holm([0.01, math.nan, 0.04, 0.03, 0.5])
    assert found == pytest.approx([0.04, math.nan, 0.09, 0.09, 0.5], nan_ok=True)
    assert stats.holm([0.6, 0.7]) == [1, 1]


def test_pairs_share_their_seed_and_their_place_in_the_lists():
    runs = [record("a", 1, 0.50), record("a", 2, 0.60), record("c", 2, 0.55), record("c", 1, 0.40),
            record("b", 3, 0.90), record("d", 3, 0.70), record("b", 4, 0.1), record("ab", 1, 0.2)]
    mean, std, p, n = compare.paired(runs, ["a", "b"], ["c", "d"])
    expected = [0.1, 0.05, 0.2]
    assert (mean, std, n) == pytest.approx((np.mean(expected), np.std(expected, ddof=1), 3))
    assert p == pytest.approx(stats.t_test(expected, [0, 0, 0]))


def test_runs_that_no_pair_names_may_have_any_names(call, tmp_path):
    runs = [write_run(tmp_path / name, [0.5]) for name in ("a-1", "b-1", "mine", "yours")]
    status, out, _ = call(*runs, "--pairs", "a,b")
    assert status == 0 and out.startswith("a - b: +0.0000 +- nan (n 1")


def test_last_takes_the_dice_of_the_last_validation(runs, call):
    log = [{"step": 5, "val_dice": 0.2}, {"step": 10, "val_dice": 0.3}]
    (runs[4] / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    line = call(*runs, "--pairs", "b,a", "--last")[1]
    # seed 1: 0.3 - 0.5, seed 2: 0.5 - 0.5
    assert line == "b - a: -0.1000 +- 0.1414 (n 2, p 0.5, last step)\n"
    status, _, err = call(*runs, "--last")
    assert status == 2 and "--last: is for --pairs" in err


@pytest.mark.parametrize("more, less, message", [
    ("a b", "a", "as many names"), ("a", "x", "no pair"), ("twin", "a", "the same name and seed")])
def test_pairs_that_cannot_be_made_are_refused(more, less, message):
    runs = [record("a", 1, 0.5)] + [record("twin", 1, 0.5)] * (2 if more == "twin" else 1)
    with pytest.raises(BadInput, match=message):
        compare.paired(runs, more.split(), less.split())


# -- The table


def test_a_run_that_stopped_early_is_refused(tmp_path, call):
    status, _, err = call(write_run(tmp_path / "r", [0.5], steps=11))
    assert status == 2 and "stopped before its last step" in err


def test_the_table_has_a_row_for_each_setting_and_pairs_by_seed(runs, call):
    status, out, _ = call(*runs)
    head, rule, *rows = [line.strip("| \n").split(" | ") for line in out.splitlines()]
    assert status == 0 and set(rule) == {"---"}
    assert head == ["eps", "temperature", "foundation model", "seeds", "Dice", "Jaccard",
                    "HD95 (voxels)", "ASD (voxels)", "Dice at the last step", "codewords in use",
                    "perplexity", "lost when all tokens are replaced", "empty predictions",
                    "p against the first row", "p by Holm"]
    rest = ["0.5000 +- 0.0000", "0.5000 +- 0.0000", "1.0000 +- 0.0000", "0.5000 +- 0.0000",
            "0.5000 +- 0.0000", "10 +- 0", "-"]
    a, b, c = rows
    p = stats.t_test([0.6, 0.75], [0.5, 0.6])
    assert a == ["0.3", "1.0", "none", "1 2 3", "0.6000 +- 0.1000", *rest, "0 of 6", "-", "-"]
    assert b[:5] == ["0.7", "1.0", "none", "1 2", "0.6750 +- 0.1061"]
    assert b[-3:] == ["0 of 4", f"{p:.2g}", f"{p:.2g}"]
    assert c[:6] == ["0.3", "inf", "none", "1", "0.0000", "0.5000"]
    assert c[-3:] == ["2 of 2", "-", "-"]


def test_two_rows_need_no_correction_by_holm(runs, call):
    assert "Holm" not in call(*runs[:5])[1]


def test_the_order_of_settings_does_not_tell_runs_apart():
    runs = [record("a", 1, 0.5, x=1, y=2), record("a", 2, 0.5, y=2, x=1)]
    assert len(compare.by_settings(runs)) == 1


def test_a_prepared_set_is_the_same_by_whatever_path_it_was_named(tmp_path):
    paths = ["prepared", "prepared/", "/home/sets/prepared", "../sets/prepared"]
    runs = [write_run(tmp_path / f"a-{k}", [0.5], k, data=path) for k, path in enumerate(paths)]
    assert len(compare.by_settings([compare.read_run(run) for run in runs])) == 1


def test_two_prepared_sets_of_one_name_are_two_rows(tmp_path):
    runs = [write_run(tmp_path / f"a-{k}", [0.5], k, data="prepared") for k in (1, 2)]
    config = json.loads((runs[0] / "config.json").read_text())
    (runs[0] / "config.json").write_text(json.dumps(config | {"window": [0, 1]}))
    assert len(compare.by_settings([compare.read_run(run) for run in runs])) == 2


def test_runs_with_other_foundation_models_are_rows_of_their_own():
    other = record("a", 2, 0.5)._replace(fm="dinov2")
    assert len(compare.by_settings([record("a", 1, 0.5), other])) == 2


def test_the_same_seed_twice_in_a_row_is_refused(runs, call):
    status, _, err = call(runs[0], runs[0])
    assert status == 2 and "a-1: has the settings and the seed of a-1" in err


# -- Records


def test_a_record_has_the_best_step_and_the_last_use_of_the_codebook(runs):
    found = compare.read_run(runs[0])
    assert (found.run, found.commit, found.seed, found.scored) == ("a-1", "abc", 1, 2)
    assert (found.utilization, found.perplexity, found.best_step) == (0.5, 9.5, 5)
    assert found.val_log == LOG and found.last == 0.5
    learned = {"data": "acdc", "steps": 10, "eps": 0.3, "temperature": 1.0}
    assert json.loads(found.settings) == learned | {"processes": 1, "precision": "float32"}


def test_records_give_the_table_and_the_pairs_again_without_the_runs(runs, tmp_path, call):
    first, second = tmp_path / "first.csv", tmp_path / "second.csv"
    table = call(*runs, "--records", first)[1]
    call(*runs[:3], "--records", second)
    assert call(first, second)[1] == table  # a line that both hold counts once
    with open(first, newline="", encoding="utf-8") as file:
        assert next(csv.reader(file)) == list(compare.Record._fields)
    pairs = call(first, *("--pairs", "b,a") * 2, "--pairs", "c,a")[1].splitlines()
    assert pairs[:2] == 2 * ["b - a: +0.1250 +- 0.0354 (n 2, p 0.13, 0.25 by Holm)"]
    assert pairs[2:] == ["c - a: -0.5000 +- nan (n 1, p nan, nan by Holm)"]


def test_no_records_are_written_where_the_figure_is_refused(runs, tmp_path, call):
    flags = ["--records", tmp_path / "x.csv", "--figure", tmp_path / "x.png", "--sweep", "seed"]
    assert call(*runs, *flags)[0] == 2 and not (tmp_path / "x.csv").exists()


def test_records_are_not_overwritten(runs, tmp_path, call):
    (tmp_path / "mine.csv").write_text("precious")
    status, _, err = call(*runs, "--records", tmp_path / "mine.csv")
    assert status == 2 and "File exists" in err and "name another file" in err
    assert (tmp_path / "mine.csv").read_text() == "precious"


HEAD = ",".join(compare.Record._fields)
NO_STEPS = ",".join(map(str, RECORD._replace(val_log="[]")))


@pytest.mark.parametrize("text", ["", "run,seed\na,x\n", f"{HEAD}\na,b\n", f"{HEAD}\n{NO_STEPS}\n"])
def test_a_csv_that_holds_no_records_is_refused_in_one_line(tmp_path, call, text):
    (tmp_path / "r.csv").write_text(text)
    status, _, err = call(tmp_path / "r.csv")
    assert status == 2 and "r.csv: neither a finished run" in err and err.count("\n") == 1


@pytest.mark.parametrize("name", ["config.json", "log.jsonl", "val.csv"])
def test_a_run_without_one_of_its_files_is_refused_in_one_line(runs, call, name):
    (runs[0] / name).unlink()
    status, _, err = call(*runs)
    assert status == 2 and "a-1: neither a finished run" in err and err.count("\n") == 1


def test_a_run_of_train_py_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "PHANTOM_SPLIT", {"train": ["001"], "val": ["015"], "test": []})
    tiny = "--data phantom --labeled 1 --steps 2 --width 4 --batch 2 --codebook-size 32 --fm none"
    run = train.train(train.read_settings([*tiny.split(), "--out", str(tmp_path / "run")]))
    found = compare.read_run(run)
    assert found.scored == 6 and found.best_step in (1, 2) and 0 < found.utilization <= 1
    assert json.loads(found.settings)["codebook_size"] == 32


# -- Sweeps


def test_a_sweep_has_a_curve_for_each_other_setting_and_dashes_constants(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Axes, "legend", lambda axis, **how: None)
    monkeypatch.setattr(Axes, "errorbar", lambda _, *xy, **how: drawn.append((how["label"], *xy)))
    monkeypatch.setattr(Axes, "axhline", lambda _, y, **how: drawn.append((how["linestyle"], y)))
    runs = [record("a", 1, 0.5, how="qpm", T=1.0), record("b", 1, 0.7, how="qpm", T=math.inf),
            record("a", 2, 0.7, how="qpm", T=1.0), record("c", 1, 0.4, how="none", T=1.0)]
    plots.draw_sweep(compare.by_settings(runs), "T", tmp_path / "t.png")
    qpm = ("how qpm", [0, 1], pytest.approx([0.6, 0.7]), pytest.approx([0.02**0.5, 0]))
    assert drawn == [qpm, ("--", 0.4)]


@pytest.mark.parametrize("flags", [("--sweep", "eps"), ("--curves", "a b", "--curves", "c")])
def test_the_command_line_draws_sweeps_and_curves(runs, tmp_path, call, flags):
    assert call(*runs, *flags, "--figure", tmp_path / "f.png")[0] == 0
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("flags, message", [
    ("--sweep eps", "give the file and"), ("--figure f.png", "give the file and"),
    ("--curves a --sweep eps --figure f.png", "give the file and"),
    ("--sweep eps --figure f.abc", "must end in .png"),
    ("--sweep lr --figure f.png", "do not differ in it, but in eps"),
    ("--sweep how --figure f.png", "is not a number")])
def test_what_cannot_be_drawn_is_refused(runs, tmp_path, call, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    other = write_run(tmp_path / "d", [0.5], eps=0.1, how="qpm")
    status, _, err = call(*runs, other, *flags.split())
    assert status == 2 and message in err and err.count("\n") == 1


def test_curves_show_mean_and_range_over_seeds_in_a_panel_each(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Axes, "plot", lambda axis, *xy, **how: drawn.append((how["label"], *xy)))
    monkeypatch.setattr(Axes, "fill_between", lambda axis, *xy, **how: drawn.append(xy))
    monkeypatch.setattr(Axes, "legend", lambda axis, **how: drawn.append("panel"))
    low = json.dumps([{"step": 5, "val_dice": 0.25}, {"step": 10, "val_dice": 0.1}])
    runs = [record("a", 1, 0.5), record("b", 1, 0.5), record("a", 2, 0.5)._replace(val_log=low)]
    plots.draw_curves(runs, [["a"], ["b"]], tmp_path / "c.png")
    a, band, panel, b, _, _ = drawn
    assert a == ("a", [5, 10], pytest.approx([0.5, 0.3]))
    assert b == ("b", [5, 10], pytest.approx([0.75, 0.5]))
    assert band == ([5, 10], pytest.approx([0.25, 0.1]), pytest.approx([0.75, 0.5]))
    assert panel == "panel" and (tmp_path / "c.png").exists()


@pytest.mark.parametrize("name, message", [("x", "no run x-SEED"), ("a", "at different steps")])
def test_curves_without_runs_or_of_different_steps_are_refused(tmp_path, name, message):
    short = record("a", 2, 0.5)._replace(val_log='[{"step": 5, "val_dice": 0.75}]')
    with pytest.raises(BadInput, match=message):
        plots.draw_curves([record("a", 1, 0.5), short], [[name]], tmp_path / "c.png")


# -- Gain against token dependence


def test_the_gain_is_paired_and_stands_over_what_exchanged_tokens_cost(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Axes, "errorbar", lambda _, *xy, **how: drawn.append(xy))
    runs = []
    for seed, none, qpm, exchanged in ((1, 0.5, 0.6, 0.4), (2, 0.7, 0.7, 0.5), (3, 0.1, 0.9, 0.1)):
        runs.append(record("q", seed, qpm, encoder="e", perturb="qpm"))
        if seed < 3:  # the third has no partner
            none = record("n", seed, none, encoder="e", perturb="none")
            runs.append(none._replace(exchanged=exchanged))
    plots.draw_gain(compare.by_settings(runs), tmp_path / "g.png")
    need, gain, gain_std, need_std = drawn[0][:4]
    assert (need, gain) == pytest.approx((0.15, 0.05))
    assert (need_std, gain_std) == pytest.approx((0.05 * 2**0.5, 0.05 * 2**0.5))


def test_the_gain_of_runs_that_differ_in_more_than_their_network_is_refused(tmp_path):
    runs = [record("a", 1, 0.5, perturb="none", eps=0.1), record("b", 1, 0.5, perturb="qpm", eps=1)]
    with pytest.raises(BadInput, match="differ in .*eps"):
        plots.draw_gain(compare.by_settings(runs), tmp_path / "g.png")


def test_the_gain_pairs_no_runs_of_different_precision(tmp_path):
    runs = [record(how, seed, 0.5, perturb=how, precision=precision) for seed in (1, 2)
            for how, precision in (("none", "bfloat16"), ("qpm", "float32"))]
    with pytest.raises(BadInput, match="qpm: give two seeds of both"):
        plots.draw_gain(compare.by_settings(runs), tmp_path / "g.png")


@pytest.mark.parametrize("perturb", ["none", "shuffle"])
def test_a_gain_without_pairs_is_refused(tmp_path, perturb):
    runs = [record("a", 1, 0.5, perturb="qpm"), record("b", 1, 0.5, perturb=perturb)]
    with pytest.raises(BadInput, match="qpm: give two seeds of both"):
        plots.draw_gain(compare.by_settings(runs), tmp_path / "g.png")


def test_a_record_has_the_dice_after_all_tokens_are_exchanged(runs):
    twin = write_run(runs[0].parent / "twin", [0.2, 0.4])
    (twin / "val.csv").rename(runs[0] / "val-eps1.0.csv")
    assert compare.read_run(runs[0]).exchanged == pytest.approx(0.3)
    assert math.isnan(compare.read_run(runs[1]).exchanged)
    row = compare.table([compare.read_run(runs[0])])[1]
    assert row[-3] == f"{compare.read_run(runs[0]).dice - 0.3:.4f}"
