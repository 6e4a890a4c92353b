"""What needs real processes: two of them as torchrun starts them, and other environments."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import data
import train

ROOT = Path(__file__).parents[2]
SMALL = ["--steps", "6", "--batch", "2", "--width", "4", "--codebook-size", "16", "--fm", "none",
         "--device", "cpu"]
FEW = {"train": ["001", "002", "003", "004"], "val": ["005"], "test": ["006"]}


def process(rank: int, port: int, folder: str) -> None:
    """One of two processes: trains, then writes the state that its student ends with."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    data.PHANTOM_SPLIT = FEW
    students = []
    update = train.ema_update

    def remember(teacher, student, alpha):
        students[:] = [student]
        update(teacher, student, alpha)

    train.ema_update = remember
    train.train(train.read_settings([*SMALL, "--out", f"{folder}/run"]))
    torch.save(students[0].state_dict(), f"{folder}/{rank}.pt")


def test_two_processes_with_batches_of_their_own_end_with_equal_weights_and_one_run(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(process, args=(port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    differ = {name for name in first if not torch.equal(first[name], second[name])}
    assert differ == {name for name in first if "running" in name}  # BatchNorm's, of its own batch
    assert (tmp_path / "run" / "val.csv").exists()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["processes"] == 2


@pytest.mark.parametrize("environment", [
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "HOME": "/proc/nowhere",
     "MPLBACKEND": "module://matplotlib_inline.backend_inline"},
    {"PYTHONIOENCODING": "ascii:strict", "MPLBACKEND": "TkAgg", "DISPLAY": ""}])
def test_a_run_ends_whole_whatever_locale_backend_and_home_are(tmp_path, environment):
    code = (f"import data, evaluate, train; data.PHANTOM_SPLIT = {FEW}\n"
            "evaluate.command('train.py', lambda: train.train(train.read_settings()), '')")
    run = tmp_path / "ru\u0141"
    subprocess.run([sys.executable, "-c", code, *SMALL, "--out", str(run)], cwd=ROOT, check=True,
                   env=os.environ | {"OMP_NUM_THREADS": "1"} | environment, capture_output=True)
    names = {file.name for file in run.iterdir()}
    assert names >= {"last.pt", "val.csv", "predictions.png", "curves.png"}
