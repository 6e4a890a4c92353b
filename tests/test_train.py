"""The loop: Eq. 12 in a real step, gradients where they belong, runs that repeat, honest semi-supervision, clear refusals."""

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import data
import evaluate
import qpm
import train
from data import BadInput
from train import Settings

CPU = torch.device("cpu")
SMALL = Settings(labeled=2, steps=5, batch=2, width=8, dim=8, codebook_size=32, device="cpu", fm="standin", classes=4)


def one_step(s: Settings, progress: float = 1.0, seed: int = 0):
    """Networks and the loss of one step on random images, backward done."""
    student, teacher, fm, *_ = train.build(s, CPU)
    g = torch.Generator().manual_seed(seed)
    x_l, x_u, x_a = (torch.rand(2, 1, 64, 64, generator=g) for _ in range(3))
    y_l = torch.randint(0, 4, (2, 64, 64), generator=g)
    loss, terms = train.vqseg_loss(s, student, teacher, fm, x_l, y_l, x_u, x_a, progress, torch.Generator().manual_seed(seed))
    loss.backward()
    return student, teacher, loss, terms


def run(root: Path, out: Path, **changes) -> dict:
    train.train(replace(SMALL, root=str(root), out=str(out), **changes), [])
    return torch.load(out / "last.pt", weights_only=True)


def same_weights(a: dict, b: dict) -> bool:
    return all(torch.equal(a[who][k], b[who][k]) for who in ("student", "teacher") for k in a[who])


# --- the method


@pytest.mark.parametrize("progress, share", [(1.0, 1.0), (0.1, 1.0), (0.09, 0.0)])
def test_eq12_is_the_weighted_sum_of_the_printed_terms(progress, share):
    s = replace(SMALL, lambda_u=0.7, lambda_a=3.0, lambda_rec=2.0, lambda_vq=0.4, warmup=0.1)
    _, _, loss, t = one_step(s, progress)
    assert ("seg_u" in t) == ("rec_u" in t) == (share > 0)  # a term that is not there is not printed as 0
    l_l, l_u = 2.0 * t["rec_l"] + t["seg_l"], 2.0 * t["rec_u"] + t["seg_u"] if share else 0.0
    assert loss.item() == pytest.approx((l_l + 0.7 * share * l_u + 3.0 * t["align"] + 0.4 * t["vq"]).item(), rel=1e-5)


def test_a_step_is_figure_2_walked_by_hand():
    """Who sees what: each term again, from the networks' parts, one branch at a time."""
    s = replace(SMALL, tau=0.2, lambda_dice=0.5, temperature=0.3, eps=0.6, threshold=0.3)
    student, teacher, fm, *_ = train.build(s, CPU)
    assert student.training and not teacher.training  # the teacher normalizes by running statistics, slice by slice
    student.eval()  # as here the student does, or one branch at a time would not give what both give together
    g = torch.Generator().manual_seed(5)
    for p in teacher.parameters():  # a teacher that says something else than the student
        p.add_(0.3 * p.std() * torch.randn(p.shape, generator=g))
    decoded = []  # at its start the decoder hears the tokens too faintly to tell from its output which ones it got
    student.segmentation_decoder.register_forward_pre_hook(lambda module, given: decoded.append(given[0]))
    x_l, x_u, x_a = (torch.rand(2, 1, 64, 64, generator=g) for _ in range(3))
    y_l = torch.randint(0, 4, (2, 64, 64), generator=g)
    _, terms = train.vqseg_loss(s, student, teacher, fm, x_l, y_l, x_u, x_a, 1.0, torch.Generator().manual_seed(9))

    def seg(logits, y, keep=None):
        log_p, keep = logits.log_softmax(1), torch.ones(y.shape) if keep is None else keep
        ce = -(log_p.gather(1, y[:, None])[:, 0] * keep).mean()
        dices = []
        for c in (1, 2, 3):
            p, t = log_p[:, c].exp() * keep, (y == c) * keep
            dices.append((2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1))
        return (ce + 0.5 * (1 - sum(dices) / 3)).item()

    with torch.no_grad():
        (z_l, skips_l), (z_a, skips_a) = student.encoder(x_l), student.encoder(x_a)
        q_l, q_a = student.quantizer(z_l), student.quantizer(z_a)
        assert terms["seg_l"].item() == pytest.approx(seg(student.segmentation_decoder(q_l.codes, skips_l), y_l), rel=1e-4)
        assert terms["rec_l"].item() == pytest.approx((student.image_decoder(q_l.codes) - x_l).abs().mean().item(), rel=1e-4)
        assert terms["rec_u"].item() == pytest.approx((student.image_decoder(q_a.codes) - x_u).abs().mean().item(), rel=1e-4)
        drawn = qpm.perturb(q_a.indices, student.quantizer.codebook, 0.6, 0.3, torch.Generator().manual_seed(9))
        assert torch.allclose(decoded[0], torch.cat([q_l.codes, student.quantizer.indices_to_codes(drawn)]), atol=1e-6)
        assert (drawn != q_a.indices).any()
        confidence, label = teacher(x_u).softmax(1).max(1)
        expected = seg(student.segmentation_decoder(student.quantizer.indices_to_codes(drawn), skips_a), label, (confidence >= 0.3).float())
        assert terms["seg_u"].item() == pytest.approx(expected, rel=1e-4)
        assert terms["kept"].item() == pytest.approx((confidence >= 0.3).float().mean().item())
        infonce = []
        for codes, x in ((q_l.codes, x_l), (q_a.codes, x_u)):
            a, b = student.adapter(codes, (4, 4)).flatten(2), fm(x).flatten(2)
            sim = torch.nn.functional.cosine_similarity(a[:, :, :, None], b[:, :, None, :], dim=1) / 0.2  # (B,N,N)
            infonce.append(-sim.log_softmax(2).diagonal(dim1=1, dim2=2).mean().item())
        assert terms["align"].item() == pytest.approx(sum(infonce) / 2, rel=1e-4)


def test_every_part_of_the_student_learns_and_the_teacher_does_not():
    student, teacher, _, _ = one_step(SMALL)
    assert [n for n, p in student.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize("weight, part", [("lambda_rec", "image_decoder"), ("lambda_a", "adapter"), ("lambda_vq", "quantizer")])
def test_each_part_gets_its_gradient_from_its_own_term_only(weight, part):
    student, _, _, _ = one_step(replace(SMALL, **{weight: 0.0}))
    moved = {n.split(".")[0] for n, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    assert part not in moved and "encoder" in moved and "segmentation_decoder" in moved


@pytest.mark.parametrize("changes, progress", [({"lambda_u": 0.0}, 1.0), ({"warmup": 0.5}, 0.4)])
def test_unlabelled_batch_changes_nothing_when_lambda_u_is_0_and_during_the_warm_up(changes, progress):
    s = replace(SMALL, **changes)
    student, teacher, fm, *_ = train.build(s, CPU)
    x_l, y_l = torch.rand(2, 1, 64, 64), torch.randint(0, 4, (2, 64, 64))
    gradients = []
    for _ in range(2):
        x_u, x_a = torch.rand(2, 1, 64, 64), torch.rand(2, 1, 64, 64)
        student.zero_grad()
        train.vqseg_loss(s, student, teacher, fm, x_l, y_l, x_u, x_a, progress, torch.Generator().manual_seed(0))[0].backward()
        gradients.append([p.grad.clone() for p in student.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_pseudo_label_is_the_teachers_and_of_the_weak_view():
    student, teacher, fm, *_ = train.build(SMALL, CPU)
    x_l, y_l, x_u, x_a = torch.rand(2, 1, 64, 64), torch.zeros(2, 64, 64).long(), torch.rand(2, 1, 64, 64), torch.rand(2, 1, 64, 64)

    def seg_u(net, weak):
        return train.vqseg_loss(SMALL, student, net, fm, x_l, y_l, weak, x_a, 1.0, torch.Generator().manual_seed(0))[1]["seg_u"].item()

    class Says(torch.nn.Module):
        def forward(self, x):  # class 1 where the weak view is bright, else class 0
            return torch.cat([0.5 - x, x - 0.5, torch.full_like(x, -9), torch.full_like(x, -9)], 1)

    assert seg_u(Says(), x_u) != pytest.approx(seg_u(teacher, x_u)) and seg_u(Says(), x_u) != pytest.approx(seg_u(Says(), 1 - x_u))


def test_supervised_baseline_is_l_seg_on_the_network_without_quantizer():
    s = replace(SMALL, supervised=True)
    student, *_ = train.build(s, CPU)
    loss, terms = train.supervised_loss(s, student, torch.rand(2, 1, 64, 64), torch.randint(0, 4, (2, 64, 64)))
    loss.backward()
    moved = {n.split(".")[0] for n, p in student.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"encoder", "segmentation_decoder"} and set(terms) == {"loss", "seg_l"}


# --- runs


def test_a_short_run_writes_its_record_and_evaluate_reads_it(phantom_copy, tmp_path, capsys):
    out = tmp_path / "run"
    last = run(phantom_copy, out)
    drawn, best = torch.load(out / "codebooks.pt", weights_only=True), torch.load(out / "best.pt", weights_only=True)
    assert drawn[0]["step"] == 0 and drawn[-1]["step"] == best["step"]
    written = {p.name for p in out.iterdir()}
    assert written == {"record.json", "log.jsonl", "best.pt", "last.pt", "val.csv", "val.json", "predictions.png", "result.json",
                       "codebooks.pt"}  # fmt: skip
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = [line for line in lines if "loss" in line][-1]
    assert {"seg_l", "rec_l", "seg_u", "rec_u", "align", "vq", "kept", "utilization", "perplexity", "steps_per_s"} <= set(losses)
    assert last["place"]["step"] == 5 and max(line.get("val_dice", 0) for line in lines) == pytest.approx(last["place"]["best"], abs=1e-5)
    cases = data.open_dataset("phantom", str(phantom_copy)).with_masks("val")
    rows = evaluate.evaluate([evaluate.load(out, CPU)[0]], cases, data.CLASSES, CPU, one_piece=True)
    assert evaluate.mean_dice(rows) == pytest.approx(json.loads((out / "result.json").read_text())["val_dice"], abs=1e-6)
    assert "empty predictions" in capsys.readouterr().out


def test_evaluation_with_qpm_perturbs_the_tokens_and_writes_no_scores(phantom_copy, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    run(phantom_copy, out, steps=1)
    model, x = evaluate.load(out, CPU)[0], torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        z, skips = model.encoder(x)
        drawn = qpm.perturb(model.quantizer(z).indices, model.quantizer.codebook, 0.9, 0.5, torch.Generator().manual_seed(0))
        expected = model.segmentation_decoder(model.quantizer.indices_to_codes(drawn), skips)
        assert torch.allclose(evaluate.perturbed(model, 0.9, 0.5, CPU)(x), expected, atol=1e-5)
    (out / "val.json").unlink()
    before = (out / "val.csv").stat().st_mtime_ns
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(out), "--eps", "1", "--figure", str(tmp_path / "perturbed.png")])
    evaluate.main()
    assert (out / "val.csv").stat().st_mtime_ns == before and not (out / "val.json").exists()
    assert (tmp_path / "perturbed.png").exists()
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(out), "--eps", "1.5"])
    with pytest.raises(SystemExit) as stop:
        evaluate.main()
    assert stop.value.code == 2 and "--eps 1.5: must lie in 0 to 1" in capsys.readouterr().err


def test_teacher_follows_the_student_by_alpha_and_averages_less_at_first(phantom_copy, tmp_path, monkeypatch):
    seen = []
    learns = lambda net: next(net.parameters()).requires_grad  # noqa: E731
    monkeypatch.setattr(train, "ema_update", lambda teacher, student, alpha: seen.append((learns(student) and not learns(teacher), alpha)))
    run(phantom_copy, tmp_path / "run", alpha=0.6)
    assert seen == [(True, 0.0), (True, 0.5), (True, 0.6), (True, 0.6), (True, 0.6)]


def test_same_seed_same_weights_to_the_bit_and_another_seed_others(phantom_copy, tmp_path):
    first, second = run(phantom_copy, tmp_path / "a", steps=3), run(phantom_copy, tmp_path / "b", steps=3)
    other = run(phantom_copy, tmp_path / "c", steps=3, seed=1)
    assert same_weights(first, second) and not same_weights(first, other)


def test_masks_of_unlabelled_patients_are_never_used(phantom_copy, tmp_path):
    with_masks = run(phantom_copy, tmp_path / "a")
    for patient in ("003", "004", "005"):
        for mask in (phantom_copy / "training" / f"patient{patient}").glob("*_gt.nii.gz"):
            mask.unlink()
    assert same_weights(with_masks, run(phantom_copy, tmp_path / "b"))


def test_training_does_not_ask_for_test_patients_and_evaluate_names_them(phantom_copy, tmp_path, monkeypatch, capsys):
    for file in (phantom_copy / "training" / "patient007").iterdir():
        file.unlink()
    (phantom_copy / "training" / "patient007").rmdir()
    run(phantom_copy, tmp_path / "a", steps=1, supervised=True)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path / "a"), "--split", "test"])
    with pytest.raises(SystemExit) as stop:
        evaluate.main()
    assert stop.value.code == 2 and "patients patient007 of the test split are missing" in capsys.readouterr().err


def test_non_finite_loss_stops_loudly_with_its_terms(phantom_copy, tmp_path, monkeypatch):
    monkeypatch.setattr(train.losses, "reconstruction_loss", lambda x_hat, x: x_hat.sum() * float("nan"))
    with pytest.raises(FloatingPointError, match=r"step 0: the loss is not finite.*rec_l=nan.*slices: patient00._frame.. slice \d+, "):
        run(phantom_copy, tmp_path / "a")
    assert not (tmp_path / "a" / "last.pt").exists()


def test_a_line_of_the_record_holds_the_mean_of_each_term_over_the_steps_that_have_it(tmp_path):
    record = train.Record(tmp_path, 8, CPU, train.Place())
    record.add({"loss": torch.tensor(1.0), "indices": torch.tensor([[[0, 1]]])})
    record.add({"loss": torch.tensor(4.0), "seg_u": torch.tensor(0.5), "indices": torch.tensor([[[1, 1]]])})
    record.line(train.Place(step=2, seconds=1.0, progress=0.5))
    record.add({"loss": torch.tensor(3.0)})
    record.line(train.Place(step=3, seconds=1.0, progress=0.6))
    first, second = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert (first["step"], first["loss"], first["seg_u"], first["utilization"]) == (2, 2.5, 0.5, 0.25)
    assert second["loss"] == 3.0 and "seg_u" not in second and "utilization" not in second


def test_a_dead_codebook_is_warned_of(tmp_path, capsys):
    record = train.Record(tmp_path, 64, CPU, train.Place())
    for step in range(1, 11):
        assert "WARNING" not in capsys.readouterr().out
        record.add({"loss": torch.tensor(1.0), "indices": torch.full((2, 4, 4), 7)})
        record.line(train.Place(step=step, seconds=1.0, progress=0.5))
    assert "WARNING: under 5 % of the codebook in use" in capsys.readouterr().out


def test_a_class_that_no_labelled_slice_shows_is_warned_of(phantom_copy, tmp_path, capsys):
    for mask in (phantom_copy / "training").glob("patient00[12]/*_gt.nii.gz"):
        file = nib.load(mask)
        labels = np.asarray(file.dataobj).copy()
        labels[labels == 1] = 0
        nib.save(nib.Nifti1Image(labels, file.affine), mask)
    run(phantom_copy, tmp_path / "run", steps=1, supervised=True)
    said = capsys.readouterr().out
    assert "WARNING: no labelled slice shows the class RV" in said and said.count("WARNING") == 1


def test_run_folder_records_settings_versions_commit_and_patients(phantom_copy, tmp_path):
    run(phantom_copy, tmp_path / "run", steps=1, supervised=True)
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert {"settings", "command", "commit", "torch", "numpy", "python", "chosen_on"} <= set(record) and record["settings"]["seed"] == 1337
    patients = [{name.split("_")[0] for name in record[part]} for part in ("labelled", "unlabelled", "val")]
    assert patients == [{"patient001", "patient002"}, {"patient003", "patient004", "patient005"}, {"patient006"}]


def test_randomness_of_a_step_is_a_function_of_seed_and_step():
    draw = lambda seed, step: torch.cat([torch.rand(3, generator=g) for g in train.generators(CPU, seed, step)])  # noqa: E731
    assert torch.equal(draw(1, 2), draw(1, 2))
    assert not torch.equal(draw(1, 2), draw(2, 1)) and not torch.equal(draw(1, 2)[:3], draw(1, 2)[3:])


# --- refusals


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--eps", "1.5"], "--eps 1.5: must lie in 0 to 1"), (["--eps", "nan"], "--eps nan"),
        (["--labeled", "0", "--root", "{phantom}"], "--labeled 0: must lie in 1 to 5"),
        (["--data", "acdc"], "--data acdc needs --root"), (["--data", "acdc", "--root", "/no/such"], "/no/such: no such folder"),
        (["--temperature", "0"], "--temperature 0.0: must be above 0"), (["--width", "0"], "--width 0: must lie in 1 to 4096"),
        (["--minutes", "1", "--steps", "5"], "give one of them"), (["--device", "cuda:77"], "--device cuda:77"),
        (["--batch", "0"], "--batch 0: must lie in 1"), (["--codebook-size", "1"], "--codebook-size 1: must lie in 2"),
    ],
)  # fmt: skip
def test_bad_flag_is_one_line_and_status_2_and_nothing_is_written(flags, says, phantom_copy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", "run", *(f.format(phantom=phantom_copy) for f in flags)])
    with pytest.raises(SystemExit) as stop:
        train.main()
    message = capsys.readouterr().err
    assert stop.value.code == 2 and says in message and message.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_is_never_written_over(phantom_copy, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "record.json").write_text("{}")
    with pytest.raises(BadInput, match="holds a run already"):
        run(phantom_copy, out)
    assert [p.name for p in out.iterdir()] == ["record.json"]


def test_unknown_flag_and_unknown_choice_end_with_status_2():
    for flags in (["--epsilon", "1"], ["--perturb", "noise"]):
        with pytest.raises(SystemExit) as stop:
            train.read_settings(flags)
        assert stop.value.code == 2


def test_house_rules_of_imports():
    """vq, qpm, losses and data stand on the ground; model on vq and qpm; evaluate on model and data."""
    root, ours = Path(train.__file__).parent, {"vq", "qpm", "losses", "data", "model", "evaluate", "train"}
    allowed = {"vq": set(), "qpm": set(), "losses": set(), "data": set(), "model": {"vq", "qpm"}, "evaluate": {"model", "data"}}
    code = f"""import importlib, sys
for name in {[*allowed]!r}:
    [sys.modules.pop(m, None) for m in {ours!r}]
    importlib.import_module(name)
    print(*(m for m in {ours!r} if m in sys.modules))"""
    said = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()
    for (name, may), loaded in zip(allowed.items(), said, strict=True):
        assert {name} <= set(loaded.split()) <= may | {name} | (allowed["model"] if "model" in may else set())


def test_settings_are_documented_and_survive_the_command_line():
    assert all(f.metadata["help"] for f in train.fields(Settings))
    given = train.read_settings(["--data", "phantom", "--lambda-u", "2.5", "--supervised", "--steps", "7"])
    expected = copy.copy(Settings(lambda_u=2.5, supervised=True, steps=7))
    assert given == expected
