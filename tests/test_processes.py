"""Several processes are one: torchrun on n shares ends as one process with the joint batch, and a dead process is not waited for."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL_SPLIT

import data
import train

FLAGS = "--fm standin --labeled 2 --steps 10 --warmup 0.3 --width 8 --dim 8 --codebook-size 32 --device cpu".split()
DRIVER = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(train.__file__).parent)!r})
import data, train
data.PHANTOM_SPLIT = {SMALL_SPLIT!r}
train.has_bfloat16 = lambda device: False
victim, step = int(sys.argv.pop(1)), int(sys.argv.pop(1))
def dying(original, calls=[0]):
    def call(*a, **k):
        calls[0] += 1
        if calls[0] == step and int(os.environ.get("RANK", 0)) == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*a, **k)
    return call
train.ema_update = dying(train.ema_update)
train.main()
"""


def arguments(root: Path, out: Path, *flags: str) -> list[str]:
    return ["--root", str(root), "--out", str(out), *FLAGS, *flags]


def torchrun(root: Path, out: Path, *flags: str, victim: int = -1) -> subprocess.CompletedProcess:
    script = out.with_suffix(".py")
    script.write_text(DRIVER)
    command = [sys.executable, *"-m torch.distributed.run --standalone --nproc-per-node 2".split(), str(script), str(victim), "3"]
    return subprocess.run([*command, *arguments(root, out, *flags)], capture_output=True, text=True, timeout=120)


def loss_lines(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "steps_per_s"} for line in lines if "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--perturb", "qpm"], ["--perturb", "dropout"], ["--supervised"]], ids=lambda flags: flags[-1])
def test_two_processes_give_the_losses_and_weights_of_one_with_the_joint_batch(small_phantom, tmp_path, monkeypatch, flags):
    monkeypatch.setattr(data, "PHANTOM_SPLIT", SMALL_SPLIT)
    monkeypatch.setattr(train, "has_bfloat16", lambda device: False)  # to 1e-5 in float32, whatever the machine has
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments(small_phantom, tmp_path / "1", "--batch", "4", *flags)])
    train.main()
    done = torchrun(small_phantom, tmp_path / "2", "--batch", "2", *flags)
    assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / n / "last.pt", weights_only=True) for n in "12")
    for who in ("student", "teacher"):
        assert all(torch.allclose(one[who][name], two[who][name], rtol=0, atol=1e-5) for name in one[who])
    first, second = loss_lines(tmp_path / "1"), loss_lines(tmp_path / "2")
    assert len(first) == len(second) == 10 and all(a == pytest.approx(b, abs=2e-5) for a, b in zip(first, second))
    assert not torch.equal(*(run["student"]["encoder.to_tokens.weight"] for run in (one, two)))  # two did run, and round in another order


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_with_an_error_and_no_hang(small_phantom, tmp_path, victim):
    done = torchrun(small_phantom, tmp_path / "run", "--batch", "2", victim=victim)
    assert done.returncode != 0 and "SIGKILL" in done.stderr


def test_a_clock_is_no_budget_for_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(train.BadInput, match="--minutes: the clocks of several processes differ; give --steps or --epochs"):
        train.join_processes(train.Settings(minutes=1.0, device="cpu"))
