"""The README keeps its word: every equation has a function and a test that exist, and every figure comes from its command."""

import csv
import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import test_train

import evaluate
import losses
import model
import qpm
import vq

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ROWS = re.findall(r"^\| ((?:Eq|App)\. .*?) \| (.*?) \| (.*?) \|$", README, re.M)


def test_every_equation_has_a_row():
    named = [n for equation, _, _ in ROWS if equation.startswith("Eq") for n in re.findall(r"\d+", equation)]
    assert sorted(map(int, named)) == list(range(1, 13))
    assert {equation for equation, _, _ in ROWS if equation.startswith("App")} == {"App. A", "App. B", "App. D"}


@pytest.mark.parametrize("equation, functions, tests", ROWS, ids=[row[0] for row in ROWS])
def test_every_name_in_the_table_exists(equation, functions, tests):
    for name in re.findall(r"`(.*?)`", functions):
        module, function = name.split(".")
        assert callable(getattr(importlib.import_module(module), function)), name
    assert re.findall(r"`(.*?)`", tests), equation
    for name in re.findall(r"`(.*?)`", tests):
        file, function = name.split("::")
        assert re.search(rf"^def {function}\(", (ROOT / file).read_text(), re.M), name


def test_every_figure_of_the_readme_exists_and_every_module_is_named():
    shown = set(re.findall(r"\((figures/.*?)\)", README))
    assert shown == {f"figures/{f.name}" for f in (ROOT / "figures").iterdir()}
    assert all(f"`{name}.py`" in README for name in ("vq", "qpm", "model", "losses", "data", "train", "evaluate"))


def test_figures_come_out_of_a_run_and_a_folder_without_one_is_refused(phantom_copy, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    test_train.run(phantom_copy, run)
    for module in (vq, qpm, model, losses):
        picture = tmp_path / f"{module.__name__}.png"
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", str(run), "--out", str(picture)])
        module.main()
        assert picture.read_bytes().startswith(b"\x89PNG")
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", str(tmp_path), "--out", str(picture)])
        with pytest.raises(SystemExit) as stop:
            module.main()
        message = capsys.readouterr().err
        assert stop.value.code == 2 and message.count("\n") == 1 and str(tmp_path) in message


def study(column: str = "dice") -> dict[str, dict[int, float]]:
    """Row of the study -> this column for each of its seeds, three or more (two of the longest), from the lines of results/*.csv."""
    found: dict[str, dict[int, float]] = {}
    for path in (ROOT / "results").iterdir():
        for line in csv.DictReader(open(path)):
            name, seed = line["run"].rsplit("-", 1)
            value = float(line[column])
            earlier = found.setdefault(name, {}).setdefault(int(seed), value)
            assert line["seed"] == seed and value == pytest.approx(earlier, nan_ok=True)
    least = {"full7": 2, "fullsup7": 2}
    assert all(sorted(seeds) == list(range(1, max(least.get(name, 3), len(seeds)) + 1)) for name, seeds in found.items())
    return found


def cells(row: dict[int, float], first: dict[int, float]) -> list[str]:
    """Mean +- standard deviation, and p against the first row."""
    values, common = np.array(list(row.values())), row.keys() & first.keys()
    p = "-" if row == first else f"{evaluate.t_test([row[k] for k in common], [first[k] for k in common]):.2f}"
    return [f"{values.mean():.3f} +- {values.std(ddof=1):.3f}", p]


def tables() -> list[list[list[str]]]:
    """Every table of the README as its lines of cells, without the rule below the head."""
    found: list[list[list[str]]] = [[]]
    for line in README.splitlines():
        if line.startswith("| "):
            found[-1].append(line.strip("| ").split(" | "))
        elif found[-1]:
            found.append([])
    return [[table[0], *table[2:]] for table in found if table]


def test_tables_of_the_study_are_those_of_its_records():
    dice, in_use, checked = study(), study("utilization"), set()
    for head, *lines in tables():
        if head[1:4] == ["run", "Dice", "p"]:  # p is against the first line
            names = [line[1].strip("`") for line in lines]
            for name, line in zip(names, lines):
                share = [f"{np.mean(list(in_use[name].values())):.0%}"] if head[4:] == ["in use"] else []
                assert line[2:] == cells(dice[name], dice[names[0]]) + share, name
        elif head == ["eps", "QPM", "p", "shuffle", "p", "dropout", "p"]:  # p is against no perturbation
            names = [f"{kind}{eps}" for eps, *_ in lines for kind in ("qpm", "shuffle", "dropout")]
            names = ["default" if name == "qpm0.7" else name for name in names]
            names = [name for name in names if name in dice]  # a dash where nothing was run
            shown = [cell for line in lines for pair in zip(line[1::2], line[2::2]) if pair != ("-", "-") for cell in pair]
            assert shown == sum([cells(dice[name], dice["none"]) for name in names], [])
        elif head[-3:] == ["VQ-Seg", "`--supervised`", "p"]:  # p is of one against the other
            names, kinds = [], {"": ("labels", "supervised"), "8": ("clock", "clocksup"), "24": ("long", "longsup")}
            kinds |= dict.fromkeys(("12", "30"), ("full", "fullsup"))
            for n, *minutes, vqseg, supervised, p_shown in lines:
                pair = [kind + n for kind in kinds["".join(minutes)]]
                pair = ["default", "supervised"] if pair[0] == "labels7" else pair
                (first, p), (second, _) = cells(dice[pair[0]], dice[pair[1]]), cells(dice[pair[1]], dice[pair[1]])
                assert [vqseg, supervised, p_shown] == [first, second, p], n
                names += pair
        else:
            continue
        checked |= set(names)
    assert checked == set(dice)


def test_effects_of_the_study_are_those_of_its_records():
    dice, effects = study(), re.findall(r"\(`([\w. ]+)`, not `([\w. ]+)`\): ([+-]0\.\d{3}), p (0\.\d\d)", README)
    assert len(effects) >= 3
    for more, less, effect, p in effects:
        named = zip(more.split(), less.split(), strict=True)
        pairs = [(dice[x][k], dice[y][k]) for x, y in named for k in dice[x].keys() & dice[y].keys()]
        a, b = np.transpose(pairs)
        assert (effect, p) == (f"{(a - b).mean():+.3f}", f"{evaluate.t_test(a, b):.2f}"), more
