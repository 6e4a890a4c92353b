"""How long the expensive parts take, and how much memory, beside a plain version of each.

    python -m extras.bench [--device cuda] [--quick] [--csv FILE]

- A whole step of the default network, and of the paper's (DINOv2 ViT-S/14 as encoder and as
  foundation model, K = 16384, 4 + 4 slices of 224 x 224, random weights); of each the share of the
  loader, and of quantizer and QPM; its operations a second beside those of a bare matrix product.
- Nearest codeword beside the whole table of distances, and beside the bare product.
- QPM beside a loop over the distinct codes, as in the authors' release.

Seconds are the median of several loops after a warm-up. Memory is the peak on the GPU with all that
lies there; it is left out on a CPU. A part that fails says so, and the next one goes on.
"""

import argparse
import csv
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import data
import evaluate
import qpm
import train
import vq
from model import ema_update


class Table:
    """Prints rows as they come and appends them to a CSV file."""

    def __init__(self, device: torch.device, path: Path | None):
        self.device = device
        self.path = path
        self.peak = float("nan")  # operations a second of a bare matrix product
        self.card = f"CPU, {torch.get_num_threads()} threads"
        if device.type == "cuda":
            self.card = torch.cuda.get_device_name(device)
        print(f"{self.card}, PyTorch {torch.__version__}", flush=True)
        if path and not path.exists():
            self.write(["card", "torch", "name", "seconds", "peak_mb", "note"])

    def write(self, cells: list) -> None:
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(cells)

    def row(self, name: str, measured: tuple[float, float], note: str = "") -> None:
        seconds, peak_mb = measured
        memory = f"{peak_mb:7.0f} MB" if self.device.type == "cuda" else ""
        print(f"{name:44} {1000 * seconds:10.3f} ms {memory}  {note}", flush=True)
        if self.path:
            cells = [f"{seconds:.4g}", f"{peak_mb:.0f}", note]
            self.write([self.card, torch.__version__, name, *cells])

    def measure(self, f: Callable) -> tuple[float, float]:
        """Median seconds of a call, and the peak memory in MB."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        timer = Timer("f()", globals={"f": f}, num_threads=torch.get_num_threads())
        seconds = timer.blocked_autorange(min_run_time=1).median  # warms up, and waits for the GPU
        return seconds, torch.cuda.max_memory_allocated() / 2**20 if cuda else float("nan")


def unit(*shape: int, device: torch.device) -> Tensor:
    g = torch.Generator().manual_seed(shape[0])
    return F.normalize(torch.randn(shape, generator=g), dim=1).to(device)


def bench_product(table: Table, n: int) -> None:
    """The bare matrix product that a step's operations are compared with."""
    kind = torch.bfloat16 if evaluate.has_bfloat16(table.device) else torch.float32
    square = torch.randn(n, n, device=table.device).to(kind)
    measured = table.measure(lambda: square @ square)
    table.peak = 2 * n**3 / measured[0]
    table.row(f"product of {n} x {n}, {kind}", measured, f"{table.peak / 1e12:.2f} TFLOP/s")


def bench_step(table: Table, name: str, flags: list[str], crop: int = data.CROP) -> None:
    """A whole step, as train.train has it; and alone the loader, and quantizer and QPM."""
    device = table.device
    amp = evaluate.has_bfloat16(device)
    s = train.read_settings(flags)
    with mock.patch.object(data, "CROP", crop):
        dataset, labeled, unlabeled = train.open_data(s, 1, device)
        student, teacher, fm, optimizer, _ = train.build(s, dataset, device)
        g = torch.Generator(device).manual_seed(0)

        def load() -> tuple[Tensor, ...]:
            slices = data.batch(dataset, labeled, s.batch, g)
            x_l, y_l = data.weak_view(*slices, g, dataset.eval_crop)
            slices = data.batch(dataset, unlabeled, s.batch, g)
            x_u, _ = data.weak_view(*slices, g, dataset.eval_crop)
            return data.strong_view(x_l, g), y_l, x_u, data.strong_view(x_u, g)

        def step() -> None:
            batch = load()
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                loss, _ = train.vqseg_loss(s, student, teacher, fm, *batch, 1.0, g)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema_update(teacher, student, 0.99)

        measured = table.measure(step)
        whole = measured[0]
        note = f"{1 / whole:.1f} steps/s, {2 * s.batch / whole:.0f} slices/s"
        with FlopCounterMode(display=False) as counter:
            step()
        rate = counter.get_total_flops() / whole
        note += f", {rate / 1e12:.3f} TFLOP/s = {rate / table.peak:.1%} of the bare product"
        table.row(f"{name}: step", measured, note)
        if s.perturb != "qpm":
            return
        measured = table.measure(load)
        table.row(f"{name}: loader", measured, f"{measured[0] / whole:.1%} of the step")

    x_l, _, _, x_a = load()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=amp):
        tokens = student.encoder(torch.cat([x_l, x_a])).z  # (2B,D,h,w)

    def quantize() -> None:
        """The student's tokens there and back, QPM, and the teacher's tokens."""
        q = student.quantizer(tokens.requires_grad_())
        unlabeled = (q.codes[s.batch :], q.indices[s.batch :], q.codebook.detach())
        perturbed = qpm.PERTURBATIONS["qpm"](*unlabeled, s.eps, s.temperature, g)
        (perturbed.sum() + q.codes.sum() + q.loss).backward()
        with torch.no_grad():
            teacher.quantizer(tokens[s.batch :])

    measured = table.measure(quantize)
    table.row(f"{name}: quantizer and QPM", measured, f"{measured[0] / whole:.1%} of the step")


def bench_paper(table: Table, flags: list[str], crop: int) -> None:
    from extras.dinov2 import DINOv2

    with tempfile.TemporaryDirectory() as folder:
        weights = f"{folder}/random.pth"
        torch.save(DINOv2().state_dict(), weights)
        flags = ["--paper", "--fm-weights", weights, *flags]
        bench_step(table, f"paper's network, {crop} x {crop}", flags, crop)


def bench_search(table: Table, K: int, N: int, D: int = 384) -> None:
    codebook = unit(K, D, device=table.device)
    z = unit(N, D, device=table.device)
    name = f"K = {K}, N = {N}"
    product = table.measure(lambda: z @ codebook.T)
    table.row(f"bare product z @ codebook.T, {name}", product)
    ours = table.measure(lambda: vq.nearest(z, codebook))
    note = f"{ours[0] / product[0]:.2f} times the bare product"
    table.row(f"nearest codeword, {name}", ours, note)
    plain = table.measure(lambda: torch.cdist(z, codebook).argmin(1))
    table.row(f"  whole distance table, {name}", plain, f"{plain[0] / ours[0]:.1f} times ours")


def plain_perturb(indices: Tensor, codebook: Tensor, eps: float) -> Tensor:
    """As the authors' release does it: each code that moves alone, its gradient recorded."""
    codebook = codebook.detach().requires_grad_()
    drawn = indices.clone()
    moves = torch.rand(len(indices), device=indices.device) < eps
    for code in indices[moves].unique():
        distance = (codebook - codebook[code]).pow(2).sum(1).sqrt()
        distance[code] = torch.inf
        others = torch.softmax(-distance, 0)
        where = (indices == code) & moves
        drawn[where] = torch.multinomial(others, int(where.sum()), replacement=True)
    return drawn


def bench_qpm(table: Table, K: int, N: int, D: int = 384) -> None:
    """Every token has another codeword, which is the slowest case for the loop."""
    codebook = unit(K, D, device=table.device)
    indices = torch.randperm(K, generator=torch.Generator().manual_seed(0))[:N].to(table.device)
    ours = table.measure(lambda: qpm.perturb(indices, codebook, 0.7))
    table.row(f"QPM, K = {K}, N = {N}", ours)
    plain = table.measure(lambda: plain_perturb(indices, codebook, 0.7))
    table.row(f"  loop over codes, K = {K}, N = {N}", plain, f"{plain[0] / ours[0]:.0f} times ours")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time and memory of the expensive parts.")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    args = parser.parse_args(arguments)
    evaluate.command("extras.bench", partial(bench, args), "allow it, or change --csv")


def bench(args: argparse.Namespace) -> None:
    table = Table(evaluate.join_processes(args.device)[2], args.csv)
    small = ["--batch", "1", "--codebook-size", "64", "--width", "4"] if args.quick else []
    default = "default network, 128 x 128"
    parts: list[tuple] = [
        (bench_product, 256 if args.quick else 8192 if table.device.type == "cuda" else 2048),
        (bench_step, default, small),
        (bench_step, f"{default}, --perturb none", ["--perturb", "none", *small]),
        (bench_paper, small, 28 if args.quick else 224),
    ]
    sizes = [(64, 32)] if args.quick else [(16384, 2048), (16384, 32768), (65536, 2048),
                                           (65536, 32768)]
    parts += [(bench_search, K, N) for K, N in sizes]
    parts += [(bench_qpm, *sizes[0])]
    for part, *sizes in parts:
        try:
            part(table, *sizes)
        except Exception as error:  # the other parts are worth having
            reason = str(error).split("\n")[0]
            print(f"{part.__name__} {sizes}: failed, {type(error).__name__}: {reason}", flush=True)


if __name__ == "__main__":
    main()
