"""Every figure of the README, and the pictures that end a training.

    python -m extras.figures RUN --out figures

Draws Figure 2 (`model.png`: one slice on its way through the network), Figure 3 with Eq. 1 against
Eq. 6 (`qpm.png`), Appendix E (`vq.png`: the codebook before and after training; where the paper has
t-SNE, here are the two main directions) and the two views of Section 4.2 (`data.png`).
Pictures are made without pyplot, so that no display or backend matters.
"""

import argparse
import io
import json
import math
import os
from functools import partial
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # a notebook hands its own down, which may not be installed here

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

import data
import evaluate
import qpm
from data import BadInput, Dataset
from model import VQSeg

COLORS = ["#0072B2", "#E69F00", "#CC79A7", "#009E73", "#56B4E9", "#D55E00", "#F0E442"]


def show(axis, image, mask=None, classes: int = 4, aspect: float = 1.0) -> None:
    """A slice in gray; where mask is not 0, the colors of the classes. aspect: a pixel's dy/dx."""
    axis.imshow(np.asarray(image), cmap="gray", vmin=0, vmax=1, aspect=aspect)
    axis.set(xticks=[], yticks=[])
    if mask is not None:
        colors = ListedColormap([COLORS[k % len(COLORS)] for k in range(max(2, classes - 1))])
        visible = np.ma.masked_equal(np.asarray(mask), 0)
        axis.imshow(visible, cmap=colors, vmin=1, vmax=max(2, classes - 1), alpha=0.6,
                    aspect=aspect, interpolation="nearest")


def write(figure: Figure, path: Path, dpi: int) -> None:
    """The figure into a file, whole or not at all."""
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:], dpi=dpi)
    evaluate.save(path, picture.getvalue())


def printable(name: str) -> str:
    """A name that can be drawn: odd bytes escaped, and no formula where it holds a $."""
    return name.encode(errors="backslashreplace").decode().replace("$", r"\$")


def legend(figure: Figure, labels: list[str]) -> None:
    """The names of the classes below the figure."""
    colors = [COLORS[k % len(COLORS)] for k in range(len(labels) - 1)]
    patches = [Patch(color=color, label=printable(name)) for color, name in zip(colors, labels[1:])]
    figure.legend(handles=patches, loc="outside lower center", ncols=8, fontsize=8)


def draw_run(run: Path, model: VQSeg, dataset: Dataset, part: str, rows: list, device) -> None:
    """RUN/predictions.png (of the test split test-predictions.png) and RUN/curves.png."""
    name = "predictions.png" if part == "val" else f"{part}-predictions.png"
    draw_predictions(run / name, model, dataset, part, rows, device)
    draw_curves(run / "curves.png", run / "log.jsonl")
    print(f"wrote {run}/{name} and curves.png")


def draw_predictions(path: Path, model: VQSeg, dataset: Dataset, part: str, rows: list, device):
    """Best, median and worst case by Dice: image, expert and prediction in three slices each."""
    cases = dataset.part(part)
    dice = {c.name: np.ma.masked_invalid([r.dice for r in rows if r.case == c.name]) for c in cases}
    ranked = sorted(cases, key=lambda c: float(dice[c.name].mean() or 0), reverse=True)
    figure = Figure(figsize=(13.5, 5.2), layout="constrained")
    axes = figure.subplots(3, 9)
    for group, case in enumerate((ranked[0], ranked[len(ranked) // 2], ranked[-1])):
        depth = case.shape[0]
        images = dataset.images[case.first : case.first + depth]
        crop = dataset.eval_crop
        found = evaluate.predict(model.predict, images, case.shape[1:], crop, device)
        volumes = [None, data.read_mask(case, len(dataset.labels)), found]
        title = f"{printable(case.name)}: Dice {dice[case.name].mean():.3f}"
        axes[0, 3 * group + 1].set_title(title, fontsize=9)
        for column, z in enumerate((depth // 5, depth // 2, depth - 1 - depth // 5), 3 * group):
            for axis, volume in zip(axes[:, column], volumes):
                mask = None
                if volume is not None:
                    mask = data.to_grid(torch.from_numpy(volume[z : z + 1]))[0]
                    mask = data.crop_center(mask, crop)
                picture = data.crop_center(images[z].float().cpu(), crop)
                show(axis, picture, mask, len(dataset.labels), case.spacing[1] / case.spacing[2])
            axis.set_xlabel(f"slice {z + 1} of {depth}", fontsize=8)
    for axis, name in zip(axes[:, 0], ("image", "expert", "prediction")):
        axis.set_ylabel(name)
    legend(figure, dataset.labels)
    write(figure, path, 70)


def draw_curves(path: Path, log: Path) -> None:
    """The terms of Eq. 12, the use of the codebook and the validation Dice over a training."""
    try:
        text = log.read_text(encoding="utf-8") if log.exists() else ""
        lines = [json.loads(line) for line in text.splitlines()]
    except ValueError:
        raise BadInput(f"{log}: damaged; remove it, and the curves are empty") from None
    panels = {"L_seg": ["seg_l", "seg_u"], "L_rec": ["rec_l", "rec_u"], "L_align": ["align"],
              "quantizer": ["vq"], "codewords in use": ["used"], "validation Dice": ["val_dice"]}
    figure = Figure(figsize=(13.5, 2.6), layout="constrained")
    for axis, (title, names) in zip(figure.subplots(1, len(panels)), panels.items()):
        for name in names:
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                axis.plot(*zip(*points), label=name)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        if len(names) > 1 and axis.lines:
            axis.legend(fontsize=7)
    write(figure, path, 70)


@torch.no_grad()
def draw_model(path: Path, model: VQSeg, dataset: Dataset, temperature: float) -> None:
    """Above, one slice on its way through both branches; below, what QPM does to its mask."""
    case = dataset.part("val")[0]
    image = dataset.images[case.first + case.shape[0] // 2].float()
    x = data.crop_center(image, dataset.eval_crop)[None, None]  # (1,1,H,W)
    q = model.quantizer(model.encoder(x).z)
    plain = model.predict(x).argmax(1)[0]
    # Codewords that lie near each other get similar colors: the main direction of the codebook.
    direction = torch.linalg.svd(q.codebook - q.codebook.mean(0), full_matrices=False).Vh[0]
    color = q.codebook @ direction  # (K,)
    figure = Figure(figsize=(10, 5.8), layout="constrained")
    above, below = figure.subplots(2, 4)
    show(above[0], x[0, 0])
    show(above[2], model.image_decoder(q.codes)[0, 0])
    show(above[3], x[0, 0], plain, len(dataset.labels))
    g = torch.Generator().manual_seed(0)
    exchanged = qpm.perturb(q.indices, q.codebook, 0.7, temperature, g)
    for axis, indices in ((above[1], q.indices), (below[0], exchanged)):  # one scale for both
        axis.imshow(color[indices[0]], vmin=color.min(), vmax=color.max())  # (h,w)
    titles = ["image x", "tokens q(z)", "image branch D_i(q(z))", "segmentation D_s(q(z))",
              "tokens q'(z), eps 0.7"]
    for axis, eps in zip(below[1:], (0.3, 0.7, 1.0)):
        g = torch.Generator().manual_seed(0)
        perturbed = model.predict(x, "qpm", eps, temperature, g).argmax(1)[0]
        show(axis, x[0, 0], perturbed, len(dataset.labels))
        titles.append(f"D_s(q'(z)), eps {eps}: {(perturbed != plain).double().mean():.1%} differ")
    for axis, title in zip((*above, *below), titles):
        axis.set_title(title, fontsize=10)
        axis.set(xticks=[], yticks=[])
    legend(figure, dataset.labels)
    write(figure, path, 90)


def effective_neighbors(indices: Tensor, codebook: Tensor, temperature: float = 1.0) -> Tensor:
    """exp(H(pi(.|i), j != i)) in [1, K-1]: among how many codewords Eq. 4 chooses. (N,) -> (N,)."""
    p = qpm.transition_rows(indices, codebook, 1.0, temperature)
    return torch.exp(-torch.special.xlogy(p, p).sum(1))


def draw_qpm(path: Path, trained: Tensor) -> None:
    """Figure 3; the divergence of dropout and of QPM; how many codewords Eq. 4 chooses among."""
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    # The nearest of four codewords has 70 % of the off-diagonal mass, pi(2|1) = 0.49 at eps = 0.7,
    # where the other two are log(0.70 / 0.15) farther away.
    far = 0.5 + math.log(0.70 / 0.15)
    book = torch.tensor([[0.0, 0.0], [0.5, 0.0], [0.0, far], [0.0, -far]], dtype=torch.float64)
    pi = qpm.transition_rows(torch.arange(4), book, 0.7)
    left.scatter(book[:, 0], book[:, 1], s=80, color="black")
    for j, (x, y) in enumerate(book.tolist()):
        side = -1.35 if j == 0 else 0.12
        left.annotate(f"$\\pi$({j + 1}|1) = {pi[0, j]:.2f}", (x + side, y - 0.08), fontsize=10)
    left.set(title="Figure 3: where a token of $c_1$ goes, eps = 0.7")
    left.set(xlim=(-1.6, 2.4), ylim=(-2.6, 2.6))

    p = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    random = torch.randn(64, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prior = qpm.uniform_prior(64)
    every = torch.arange(64)
    kl = [qpm.qpm_kl(prior, qpm.perturbed_marginal(prior, qpm.transition_rows(every, random, e)))
          for e in p.tolist()]
    middle.plot(p, qpm.dropout_kl(p), color="#D55E00", label="dropout, Eq. 1")
    # nn.Dropout scales what it keeps by 1/(1-p), so that Q = N(0,s^2/(1-p)).
    middle.plot(p, (-p - torch.log1p(-p)) / 2, "--", color="#D55E00", label="nn.Dropout")
    middle.plot(p, kl, color="#0072B2", label="QPM, Eq. 6 (64 random codewords)")
    bound = [qpm.qpm_kl_bound(random, e) for e in p.tolist()]
    middle.plot(p, bound, ":", color="#0072B2", label="bound of Appendix B")
    middle.set(title="KL(P||Q) in nats", xlabel="p or eps", yscale="log", ylim=(1e-5, 100))
    middle.legend(fontsize=8)

    K, D = trained.shape
    unit = F.normalize(torch.randn(K, D, generator=torch.Generator().manual_seed(0)), dim=1)
    temperatures = torch.logspace(-3, 1, 33).tolist()
    for book, label in ((unit, "random"), (trained, "trained")):
        sample = torch.arange(0, K, max(1, K // 64))
        means = [effective_neighbors(sample, book, t).mean() for t in temperatures]
        right.loglog(temperatures, means, label=f"{K} {label} codewords, D = {D}")
        for t in (1.0, 0.05):
            n = effective_neighbors(sample, book, t).mean()
            print(f"{K} {label} codewords: Eq. 4 at T = {t} chooses among {n:.0f}, exp(entropy)")
    right.axvline(1, color="gray", lw=0.8)
    right.set(title="effective neighbors of Eq. 4", xlabel="temperature T")
    right.legend(fontsize=8)
    write(figure, path, 75)


@torch.no_grad()
def codewords_in_use(model: VQSeg, dataset: Dataset) -> Tensor:
    """Which codewords occur in the evaluation crops of the training slices: (K,) bool."""
    used = torch.zeros(len(model.quantizer.table), dtype=torch.bool)
    for rows in dataset.rows(dataset.part("train")).split(16):
        x = data.crop_center(dataset.images[rows].float(), dataset.eval_crop)[:, None]
        used[model.quantizer(model.encoder(x).z).indices] = True
    return used


def draw_codebook(path: Path, models: dict[str, VQSeg], dataset: Dataset) -> None:
    """The codebook in its two main directions, and which codewords the training slices use."""
    figure = Figure(figsize=(4.5 * len(models), 4.3), layout="constrained")
    axes = figure.subplots(1, len(models), sharex=True, sharey=True)
    last = [*models.values()][-1].quantizer.codebook.detach()
    directions = torch.linalg.svd(last - last.mean(0), full_matrices=False).Vh[:2]  # (2,D)
    for axis, (title, model) in zip(axes, models.items()):
        x, y = directions @ model.quantizer.codebook.detach().T
        active = codewords_in_use(model, dataset)
        share = active.double().mean()
        axis.scatter(x[active], y[active], s=8, color="#0072B2", label="in use")
        axis.scatter(x[~active], y[~active], s=12, color="#D55E00", marker="x", label="not in use")
        axis.set_title(f"{title}: {share:.1%} of {len(active)} in use", fontsize=9)
        axis.legend(fontsize=8, loc="upper right")
        print(f"codebook {title}: {share:.1%} of {len(active)} codewords in use")
    write(figure, path, 75)


def draw_views(path: Path, dataset: Dataset) -> None:
    """Slices on the grid, their weak views with the masks, and their strong views."""
    labeled, _ = dataset.training(0)
    g = torch.Generator().manual_seed(0)
    images, masks = data.batch(dataset, dataset.rows(labeled), 6, g)
    x_u, y = data.weak_view(images, masks, g, dataset.eval_crop)
    x_a = data.strong_view(x_u, g)
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    axes = figure.subplots(3, 6)
    for column in range(6):
        for axis, x, mask in zip(axes[:, column], (images, x_u, x_a), (masks, y, None)):
            show(axis, x[column, 0], None if mask is None else mask[column], len(dataset.labels))
    for axis, name in zip(axes[:, 0], ("slice on the grid", "weak view", "strong view")):
        axis.set_ylabel(name)
    legend(figure, dataset.labels)
    write(figure, path, 60)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the figures of the README from a run.")
    parser.add_argument("run", type=Path, help="run folder of train.py, not --supervised")
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("--root", default="", help="where the data is now")
    args = parser.parse_args()
    evaluate.command("extras.figures", partial(draw_all, args), "allow it, or change --out")


def draw_all(args: argparse.Namespace) -> None:
    model, saved = evaluate.load_run(args.run, torch.device("cpu"))
    s = saved["settings"]
    if s["supervised"] or s["codebook_size"] < 2:
        raise BadInput(f"{args.run}: has no codebook; give a run that has one")
    dataset = data.load(s["data"], args.root or s["root"])
    for part in ("train", "val"):
        data.extra("checks").same_volumes(saved, dataset, part)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(s["seed"])
    untrained = VQSeg(**saved["network"]).eval()
    if s["encoder"] == "dinov2":
        untrained.encoder.load_pretrained("" if s["fm"] == "torchscript" else s["fm_weights"])
    draw_model(args.out / "model.png", model, dataset, s["temperature"])
    draw_qpm(args.out / "qpm.png", model.quantizer.codebook.detach())
    draw_codebook(args.out / "vq.png", {"before": untrained, "after": model}, dataset)
    draw_views(args.out / "data.png", dataset)
    print(f"wrote model.png, qpm.png, vq.png and data.png in {args.out}")


if __name__ == "__main__":
    main()
