"""Nothing is lost: runs killed at any moment, also inside a checkpoint's write, and resumed end as the uninterrupted run does."""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SMALL_SPLIT

import data
import train
from data import BadInput

FLAGS = "--fm standin --labeled 2 --steps 20 --batch 2 --width 8 --dim 8 --codebook-size 32 --device cpu".split()
# Every life is forked from one process that has imported the packages and has computed nothing: that spares 6 s a life.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch._dynamo", "matplotlib.pyplot", "nibabel"])


def life(arguments: list[str], errors: Path, where: str, n: int):
    """A run on the small phantom split, in a process of its own, that kills itself at the n-th call of something where asked."""
    data.PHANTOM_SPLIT, sys.argv = SMALL_SPLIT, ["train.py", *arguments]
    sys.stdout, sys.stderr = open(os.devnull, "w"), open(errors, "w", buffering=1)

    def dying(original, calls=[0]):
        def call(*a, **k):
            calls[0] += 1
            if calls[0] == n:
                if where == "write":
                    a[1].write(b"half of a checkpoint")
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*a, **k)

        return call

    deadly = {"write": (torch, "save"), "fsync": (os, "fsync"), "rename": (os, "replace"), "step": (train, "ema_update")}
    if where in deadly:
        owner, name = deadly[where]
        setattr(owner, name, dying(getattr(owner, name)))
    train.main()


def start(root: Path, out: Path, where: str = "nowhere", n: int = 0):
    go = ["--resume", str(out)] if (out / "record.json").exists() else ["--root", str(root), "--out", str(out), *FLAGS]
    process = PROCESSES.Process(target=life, args=(go, errors(out), where, n))
    process.start()
    return process


def errors(out: Path) -> Path:
    return out.with_suffix(".stderr")


def end(process) -> int:
    process.join()
    return process.exitcode


def outcome(out: Path) -> tuple[dict, list]:
    """Everything that must be equal: the checkpoint but for its times, the best one, and the log but for its speed."""
    last, best = (torch.load(out / name, weights_only=True) for name in ("last.pt", "best.pt"))
    place = {k: v for k, v in last.pop("place").items() if k not in ("seconds", "saved")}
    lines = [{k: v for k, v in json.loads(line).items() if k != "steps_per_s"} for line in (out / "log.jsonl").read_text().splitlines()]
    return {"last": last, "best": best["teacher"]}, [place, best["step"], best["val_dice"], lines]


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.fixture(scope="module")
def uninterrupted(small_phantom, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    process = start(small_phantom, out)
    assert end(process) == 0, errors(out).read_text()
    return outcome(out)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_five_times_and_resumed_ends_bitwise_as_the_uninterrupted_run(seed, small_phantom, tmp_path, uninterrupted):
    expected, rng, out, deaths = uninterrupted, random.Random(seed), tmp_path / "run", 0
    # The first life ends by the clock, the others inside their n-th write, sync, rename or step: none gets to the end.
    for where in ["clock", *rng.sample(["write", "fsync", "rename", "step"], 4)]:
        process = start(small_phantom, out, where, rng.randint(1, 3))
        if where == "clock":
            lines = rng.randint(1, 4)
            while process.is_alive() and (not (out / "log.jsonl").exists() or (out / "log.jsonl").read_text().count("\n") < lines):
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.2))
            process.kill()
        deaths += end(process) == -signal.SIGKILL
    process = start(small_phantom, out)
    assert end(process) == 0, errors(out).read_text()
    (weights, rest), (expected_weights, expected_rest) = outcome(out), expected
    assert deaths == 5 and rest == expected_rest and equal(weights, expected_weights)
    assert not list(out.glob("*.tmp"))


def test_ctrl_c_leaves_a_checkpoint_of_that_moment_and_says_how_to_go_on(small_phantom, tmp_path, uninterrupted):
    out = tmp_path / "run"
    process = start(small_phantom, out)
    while not (out / "log.jsonl").exists() or not (out / "log.jsonl").read_text():
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    assert end(process) == 130
    assert errors(out).read_text() == f"train.py: stopped; go on with: python train.py --resume {out}\n"
    place, lines = torch.load(out / "last.pt", weights_only=True)["place"], (out / "log.jsonl").read_text().splitlines()
    assert 0 < place["step"] < 20 and json.loads(lines[-1])["step"] == place["step"]
    process = start(small_phantom, out)
    assert end(process) == 0, errors(out).read_text()
    (weights, rest), (expected_weights, expected_rest) = outcome(out), uninterrupted
    assert rest == expected_rest and equal(weights, expected_weights)


def test_settings_that_contradict_the_resumed_run_are_refused_with_the_difference(tmp_path):
    s = train.Settings(lr=0.5, out=str(tmp_path), labeled=2)
    (tmp_path / "record.json").write_text(json.dumps({"settings": train.asdict(s), "processes": 1, "fm": "none"}))
    assert train.read_settings(["--resume", str(tmp_path), "--lr", "0.5"]).lr == 0.5
    with pytest.raises(BadInput, match="--lr 0.003: the run in .* began with 0.5; leave the flag out"):
        train.read_settings(["--resume", str(tmp_path), "--lr", "3e-3"])  # the default, but given by hand
    for nothing in (tmp_path / "no such", tmp_path / "record.json"):
        with pytest.raises(BadInput, match="holds no run of train.py"):
            train.read_settings(["--resume", str(nothing)])


def test_a_full_disk_is_one_line_and_the_earlier_checkpoint_stays_whole(tmp_path, monkeypatch):
    train.save(tmp_path / "last.pt", {"step": 1})

    def full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(BadInput, match=r"last.pt: cannot be written .*No space left.*make room, then --resume"):
        train.save(tmp_path / "last.pt", {"step": 2})
    monkeypatch.undo()
    assert torch.load(tmp_path / "last.pt", weights_only=True) == {"step": 1} and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "pickle"])
def test_a_foreign_or_truncated_checkpoint_is_refused_and_runs_no_code(content, small_phantom, tmp_path):
    class Malicious:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    path = tmp_path / "last.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(Malicious(), path)
    settings = train.Settings(width=8, dim=8, codebook_size=32, classes=4)
    student, teacher, _, optimizer, _ = train.build(settings, torch.device("cpu"))
    with pytest.raises(BadInput, match="last.pt: not a checkpoint of this run"):
        train.restore(tmp_path, student, teacher, optimizer, torch.device("cpu"))
    assert not (tmp_path / "owned").exists()
