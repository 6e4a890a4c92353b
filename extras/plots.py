"""Figures over many runs, for `extras.compare`: Dice against a setting or the step, and gain
against dependence.

Groups are what `extras.compare.by_settings` returns: for each row of the table the settings in
which rows differ, and its runs by seed.
"""

from pathlib import Path

import numpy as np

from data import BadInput
from extras.figures import Figure, write  # by way of it: it sets the backend before the import


def draw_sweep(groups: list, name: str, path: Path) -> None:
    """Dice against the setting `name`: a curve for each other setting, dashed if constant."""
    if name not in groups[0][0]:
        others = ", ".join(groups[0][0]) or "nothing"
        raise BadInput(f"--sweep {name}: the runs do not differ in it, but in {others}; name one")
    if not all(isinstance(differ[name], int | float) for differ, _ in groups):
        raise BadInput(f"--sweep {name}: is not a number; name a setting that is")
    places = sorted({differ[name] for differ, _ in groups})  # equally far apart: T goes up to inf
    curves: dict[str, dict] = {}
    for differ, seeds in groups:
        label = ", ".join(f"{k} {v}" for k, v in differ.items() if k != name) or "Dice"
        curves.setdefault(label, {})[differ[name]] = [run.dice for run in seeds.values()]
    figure = Figure(figsize=(6, 4.6), layout="constrained")
    axis = figure.subplots()
    for number, (label, curve) in enumerate(curves.items()):
        how = {"color": f"C{number}", "label": label}
        x = sorted(curve)
        mean = [np.mean(curve[k]) for k in x]
        std = [np.std(curve[k], ddof=1) if len(curve[k]) > 1 else 0 for k in x]
        if len(x) == 1:  # such as no perturbation, whose strength has no effect
            axis.axhline(mean[0], linestyle="--", **how)
        else:
            axis.errorbar([places.index(k) for k in x], mean, std, marker="o", capsize=3, **how)
    axis.set(xticks=range(len(places)), xticklabels=[f"{k:g}" for k in places], xlabel=name)
    axis.set_ylabel("validation Dice, mean and std over seeds")
    figure.legend(loc="outside lower left", fontsize=6)
    write(figure, path, 100)


def draw_curves(records: list, panels: list[list[str]], path: Path) -> None:
    """For each panel the validation Dice by step of its runs NAME-SEED: mean and range."""
    figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, names in zip(axes, panels):
        for name in names:
            curves = [record.curve for record in records if record.name == name]
            if not curves:
                raise BadInput(f"--curves {name}: there is no run {name}-SEED; name others")
            if any(curve.keys() != curves[0].keys() for curve in curves):
                raise BadInput(f"--curves {name}: runs validate at different steps; leave some out")
            dice = np.array([list(curve.values()) for curve in curves])  # (seeds, validations)
            steps = list(curves[0])
            axis.plot(steps, dice.mean(0), marker=".", label=name)
            axis.fill_between(steps, dice.min(0), dice.max(0), alpha=0.2)
        axis.set_xlabel("step")
        axis.legend(fontsize=8)
    axes[0].set_ylabel("validation Dice, mean and range over seeds")
    write(figure, path, 100)


def draw_gain(groups: list, path: Path) -> None:
    """For each network what a perturbation adds, against how much that network needs its tokens:
    what replacing all of them at test time costs the runs without perturbation."""
    cells: dict[tuple, dict] = {}
    for differ, seeds in groups:
        if differ.keys() - {"encoder", "precision"} != {"perturb"}:
            names = ", ".join(differ) or "nothing"
            raise BadInput(f"--gain: runs differ in {names}; give some that do in perturb, encoder")
        network = differ.get("encoder", "all"), differ.get("precision")  # pairs have both in common
        cells[network, differ["perturb"]] = seeds
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    axis.axhline(0, color="gray", linewidth=0.8)
    for color, perturb in zip(("C0", "C1", "C2"), ("qpm", "shuffle", "dropout")):
        networks = [network for network, name in cells if name == perturb]
        for network in networks:
            runs, base = cells[network, perturb], cells.get((network, "none"), {})
            seeds = sorted(runs.keys() & base.keys())
            if len(seeds) < 2:
                needed = "two seeds of both this and --perturb none"
                raise BadInput(f"--gain: {network[0]}, {perturb}: give {needed}, or leave it out")
            gain = [runs[k].dice - base[k].dice for k in seeds]
            need = [base[k].dice - base[k].exchanged for k in seeds]
            x, y = np.mean(need), np.mean(gain)
            axis.errorbar(x, y, np.std(gain, ddof=1), np.std(need, ddof=1), "o", color=color)
            axis.annotate(network[0], (x, y), (6, 6), textcoords="offset points", fontsize=8)
        if networks:
            axis.plot([], [], "o", color=color, label=perturb)
    axis.margins(x=0.3)  # room for the names
    axis.set_xlabel("token dependence: Dice lost when every token is replaced")
    axis.set_ylabel("Dice over no perturbation, paired")
    axis.legend(fontsize=8)
    write(figure, path, 100)
