"""How long the expensive parts take, and how much memory, beside a plain version of each. `python tests/bench.py` prints it.

Plain nearest codeword: the whole distance table, then argmin. Plain QPM: a loop over the distinct codes, each with its distances to
all codewords. The training step is the paper's (DINOv2 ViT-S/14 as encoder and as foundation model,
K = 16384, 4 + 4 slices of 224 x 224) with random weights and with tokens that are spread over the codebook, as after training; beside
it the time that as many operations take in a bare matrix product, which a step can hardly beat.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import model
import qpm
import train
import vq


def plain_nearest(z: Tensor, codebook: Tensor) -> Tensor:
    return torch.cdist(z, codebook).argmin(1)


def plain_perturb(indices: Tensor, codebook: Tensor, eps: float, temperature: float = 1.0, generator=None) -> Tensor:
    """As the authors' release does it: only the codes of tokens that move, but each alone and with its gradient recorded."""
    codebook = codebook.detach().requires_grad_()
    flat, drawn = indices.flatten(), indices.flatten().clone()
    moves = torch.rand(len(flat), generator=generator, device=flat.device) < eps
    for code in flat[moves].unique():
        distance = (codebook - codebook[code]).pow(2).sum(1).sqrt()
        distance[code] = torch.inf
        others = torch.softmax(-distance / temperature, 0)
        where = (flat == code) & moves
        drawn[where] = torch.multinomial(others, int(where.sum()), replacement=True, generator=generator)
    return drawn.reshape(indices.shape)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(f: Callable, device: torch.device, runs: int = 5) -> float:
    """Median of some runs after one to warm up; of one run without, where that takes long."""
    times = []
    for _ in range(runs + 1):
        wait(device)
        start = time.perf_counter()
        f()
        wait(device)
        times.append(time.perf_counter() - start)
        if times[0] > 10:
            return times[0]
    return sorted(times[1:])[runs // 2]


def megabytes(f: Callable, device: torch.device) -> float:
    """Peak memory of one run above what was in use before it. On a CPU from Linux's own account; nan elsewhere."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return float("nan")
    reset.write_text("5")  # the peak starts again from what is in use now
    used = lambda name: next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name)) / 2**10  # noqa: E731
    before = used("VmRSS")
    f()
    return used("VmHWM") - before


def unit(*shape: int, device: torch.device) -> Tensor:
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])), dim=1).to(device)


def bench_search(K: int, N: int, D: int, device: torch.device) -> None:
    codebook, z = unit(K, D, device=device), unit(N, D, device=device)
    ours, product = (seconds(f, device) for f in (lambda: vq.nearest(z, codebook), lambda: z @ codebook.T))
    plain = seconds(lambda: plain_nearest(z, codebook), device)
    memory = [megabytes(f, device) for f in (lambda: vq.nearest(z, codebook), lambda: plain_nearest(z, codebook))]
    print(f"{K:7} {N:7}  {ours:9.3f} s {memory[0]:6.0f} MB  {plain:9.3f} s {memory[1]:6.0f} MB   {ours / product:.2f} x bare product")


def bench_qpm(K: int, N: int, D: int, device: torch.device) -> None:
    codebook, indices = unit(K, D, device=device), torch.randperm(K, generator=torch.Generator().manual_seed(0))[:N].to(device)
    ours, memory = (measure(lambda: qpm.perturb(indices, codebook, 0.7), device) for measure in (seconds, megabytes))
    print(f"{K:7} {N:7}  {ours:9.3f} s {memory:6.0f} MB", end="  ")
    if N > 2048:
        print("    minutes")
        return
    plain, memory = (measure(lambda: plain_perturb(indices, codebook, 0.7), device) for measure in (seconds, megabytes))
    print(f"{plain:9.3f} s {memory:6.0f} MB   {plain / ours:.0f} times faster")


def bench_step(device: torch.device, K: int, size: int) -> None:
    s = train.read_settings(["--paper", "--fm", "none", "--codebook-size", str(K)])
    torch.manual_seed(0)
    fm = model.DINOv2("small").to(device).requires_grad_(False)
    network = {"codebook_size": K, "encoder": "dinov2", "fm_channels": fm.channels, "usage_weight": s.lambda_usage}
    student, teacher = (model.VQSeg(**network).to(device) for _ in range(2))
    teacher.requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), lr=s.lr, momentum=0.9, weight_decay=s.weight_decay, fused=True)
    x, y = torch.rand(4, 1, size, size, device=device), torch.randint(0, 4, (4, size, size), device=device)
    noise = unit(8, 384, size // 14, size // 14, device=device)
    spread = lambda module, given, out: out._replace(z=F.normalize(out.z + noise[: len(out.z)], dim=1))  # noqa: E731
    student.encoder.register_forward_hook(spread)

    def step(amp: bool) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            loss, _ = train.vqseg_loss(s, student, teacher, fm, x, y, x, x, 1.0, torch.Generator(device).manual_seed(0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.ema_update(teacher, student, s.alpha)

    def tokens() -> None:
        """What of the step is quantizer and QPM: the student's tokens there and back, the teacher's there."""
        z = noise.clone().requires_grad_()
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            q = student.quantizer(z)
            with torch.no_grad():
                teacher.quantizer.quantize(noise[:4])
            qpm.perturb(q.indices[4:], q.codebook.detach(), s.eps)
        (q.codes.sum() + q.loss).backward()

    amp = train.has_bfloat16(device)
    ours, part, memory = seconds(lambda: step(amp), device, 3), seconds(tokens, device, 3), megabytes(lambda: step(amp), device)
    with torch.no_grad():
        distinct = student.quantizer(student.encoder(torch.cat([x, x])).z).indices[4:].unique().numel()
    with FlopCounterMode(display=False) as counted:
        step(amp)
    kind, operations = torch.bfloat16 if amp else torch.float32, counted.get_total_flops()
    square = torch.rand(2048, 2048, device=device).to(kind)
    least = seconds(lambda: square @ square, device) * operations / (2 * 2048**3)
    print(f"{K:7} {distinct:7}  {ours:9.3f} s {memory:6.0f} MB  in {str(kind)[6:]}; quantizer and QPM are {part / ours:.1%} of it")
    print(f"{K:7} {distinct:7}  {least:9.3f} s would take a bare matrix product of as many operations, {operations / 1e9:.0f} billion")
    with mock.patch.object(qpm, "perturb", plain_perturb):
        plain = seconds(lambda: step(False), device, 1)
    print(f"{K:7} {distinct:7}  {plain:9.3f} s with the loop over codes in float32: ours is {plain / ours:.1f} times faster")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    args = parser.parse_args(arguments)
    device = train.pick_device(args.device)
    print(f"{device}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}")
    print("\nnearest codeword, D = 384\n      K  tokens         ours                plain")
    for K, N in ((64, 32),) if args.quick else ((1024, 2048), (16384, 2048), (65536, 2048), (65536, 32768)):
        bench_search(K, N, 384, device)
    print("\nQPM at eps = 0.7, D = 384, every token another codeword\n      K  tokens         ours                plain")
    for K, N in ((64, 32),) if args.quick else ((1024, 1024), (16384, 256), (16384, 2048), (65536, 32768)):
        bench_qpm(K, N, 384, device)
    print("\none training step, 4 + 4 slices\n      K  distinct codes of the perturbed tokens")
    for K, size in ((64, 28),) if args.quick else ((1024, 224), (16384, 224)):
        bench_step(device, K, size)


if __name__ == "__main__":
    main()
