"""The loop: a step walked by hand, who gets a gradient, runs that repeat and resume, refusals."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

import data
import evaluate
import losses
import qpm
import train
import vq
from data import BadInput

CPU = torch.device("cpu")
SMALL = ["--width", "4", "--codebook-size", "32", "--batch", "2", "--device", "cpu"]


@pytest.fixture(scope="module", autouse=True)
def small_crops(few_phantoms):
    """64 x 64 pixels: a step takes a quarter of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "CROP", 64)
        yield


def seeded(seed: int = 9) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def built(*flags: str):
    """Settings, student, teacher, foundation model, optimizer."""
    s = train.read_settings([*SMALL, *flags])
    nothing = torch.empty(0)
    dataset = data.Dataset(data.CLASSES, {}, 3, 160, None, [], nothing, nothing, "voxels")
    return s, *train.build(s, dataset, CPU)[:4]


# -- One step


@pytest.fixture
def step():
    """One step on random images: `loss(**changes)` gives its loss and terms.

    The student is in evaluation mode, so that one branch at a time gives what all give together.
    The teacher says something else than the student, and something else in each pixel.
    """
    s, student, teacher, fm, _ = built(
        "--eps", "0.6", "--temperature", "0.3", "--threshold", "0.35", "--lambda-dice", "0.5",
        "--lambda-a", "3", "--lambda-rec", "2")
    g = seeded(5)
    for p in teacher.parameters():
        p.add_(0.3 * p.abs().mean() * torch.randn(p.shape, generator=g))
    for net in (student, teacher):  # at their start tokens and pixels hardly matter to them
        net.segmentation_decoder.from_tokens.weight.data *= 60
        net.segmentation_decoder.head.weight.data *= 60
    x_l, x_u, x_a = (torch.rand(2, 1, 64, 64, generator=g) for _ in range(3))
    y_l = torch.randint(0, 4, (2, 64, 64), generator=g)
    given = dict(s=s, student=student.eval(), teacher=teacher, fm=fm, x_l=x_l, y_l=y_l, x_u=x_u,
                 x_a=x_a, lambda_u=0.7)

    def loss(**changes):
        return train.vqseg_loss(**(given | changes), g=seeded())

    return SimpleNamespace(**given, loss=loss)


def l_seg(logits, y, keep=None):
    """Cross-entropy + 0.5 * soft Dice loss, class by class."""
    keep = torch.ones(y.shape) if keep is None else keep
    log_p = logits.log_softmax(1)
    cross_entropy = -(log_p.gather(1, y[:, None])[:, 0] * keep).mean()
    dices = []
    for c in (1, 2, 3):
        p, t = log_p[:, c].exp() * keep, (y == c) * keep
        dices.append((2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1))
    return (cross_entropy + 0.5 * (1 - sum(dices) / 3)).item()


@torch.no_grad()
def quantized(net, x):
    z, skips = net.encoder(x)
    return net.quantizer(z), skips


@torch.no_grad()
def test_eq8_terms_of_a_step_walked_by_hand(step):
    _, terms = step.loss()
    q, skips = quantized(step.student, step.x_l)
    seg = l_seg(step.student.segmentation_decoder(q.codes, skips), step.y_l)
    rec = (step.student.image_decoder(q.codes) - step.x_l).abs().mean()
    assert terms["seg_l"].item() == pytest.approx(seg, rel=1e-4)
    assert terms["rec_l"].item() == pytest.approx(rec.item(), rel=1e-4)


@torch.no_grad()
def test_eq9_segmentation_of_perturbed_tokens_against_the_teachers_label(step):
    _, terms = step.loss()
    q, skips = quantized(step.student, step.x_a)
    drawn = qpm.perturb(q.indices, q.codebook, 0.6, 0.3, seeded())
    codes = q.codebook[drawn].permute(0, 3, 1, 2)
    confidence, label = step.teacher.predict(step.x_u).softmax(1).max(1)
    keep = (confidence >= 0.35).float()
    expected = l_seg(step.student.segmentation_decoder(codes, skips), label, keep)
    assert terms["seg_u"].item() == pytest.approx(expected, rel=1e-4)
    assert terms["kept"].item() == pytest.approx(keep.mean().item())
    assert (drawn != q.indices).any() and 0 < keep.mean() < 1


@torch.no_grad()
def test_eq9_reconstruction_of_unperturbed_tokens_against_the_weak_view(step):
    _, terms = step.loss()
    q, _ = quantized(step.student, step.x_a)
    expected = (step.student.image_decoder(q.codes) - step.x_u).abs().mean()
    assert terms["rec_u"].item() == pytest.approx(expected.item(), rel=1e-4)


@torch.no_grad()
def test_eq11_alignment_with_features_of_x_l_and_of_the_weak_x_u(step):
    _, terms = step.loss()
    expected = []
    for seen, given in ((step.x_l, step.x_l), (step.x_a, step.x_u)):
        f_pfa = step.student.adapter(quantized(step.student, seen)[0].codes).flatten(2)
        f_fm = step.fm(given).flatten(2)
        sim = F.cosine_similarity(f_pfa[:, :, :, None], f_fm[:, :, None, :], dim=1) / 0.07
        expected.append(-sim.log_softmax(2).diagonal(dim1=1, dim2=2).mean().item())
    assert terms["align"].item() == pytest.approx(sum(expected) / 2, rel=1e-4)


def test_eq12_is_the_weighted_sum_of_the_terms(step):
    loss, t = step.loss()
    l_l = 2 * t["rec_l"] + t["seg_l"]
    l_u = 2 * t["rec_u"] + t["seg_u"]
    expected = l_l + 0.7 * l_u + 3 * t["align"] + t["vq"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_quantizers_loss_is_that_of_all_tokens(step):
    _, terms = step.loss()
    q = step.student.quantizer(step.student.encoder(torch.cat([step.x_l, step.x_a])).z)
    assert terms["vq"].item() == pytest.approx(q.loss.item(), rel=1e-4)
    assert torch.equal(terms["indices"], q.indices)


def test_the_warm_up_leaves_the_unlabeled_batch_out(step):
    loss, terms = step.loss(lambda_u=0.0)
    other, _ = step.loss(lambda_u=0.0, x_u=1 - step.x_u, x_a=1 - step.x_a)
    assert torch.equal(loss, other)
    assert "seg_u" not in terms and "rec_u" not in terms


def test_every_part_of_the_student_learns(step):
    step.loss()[0].backward()
    assert all(p.grad is not None and p.grad.any() for p in step.student.parameters())


def test_without_foundation_model_there_is_no_alignment(step):
    loss, terms = step.loss(fm=None)
    with_it, found = step.loss()
    assert "align" not in terms
    assert loss.item() == pytest.approx((with_it - 3 * found["align"]).item(), rel=1e-5)


def test_without_lambda_usage_the_quantizer_has_the_codebook_loss_alone():
    student = built("--lambda-usage", "0")[1]
    z = student.encoder(torch.rand(2, 1, 64, 64, generator=seeded())).z
    q = student.quantizer(z)
    expected = vq.codebook_loss(z.movedim(1, 3), q.codes.movedim(1, 3))
    assert q.loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_supervised_student_has_neither_codebook_nor_image_branch_nor_adapter():
    student = built("--supervised")[1]
    assert len(student.quantizer.table) == 0 and student.image_decoder is student.adapter is None


def test_a_new_perturbation_is_one_function_and_one_entry(step, monkeypatch):
    monkeypatch.setitem(qpm.PERTURBATIONS, "zero", lambda q, *others: 0 * q)
    zero = step.loss(s=replace(step.s, perturb="zero"))[1]["seg_u"]
    assert zero != step.loss()[1]["seg_u"]


def test_supervised_loss_is_l_seg_and_nothing_else():
    s, student, *_ = built("--supervised", "--lambda-dice", "0.5")
    x, y = torch.rand(2, 1, 64, 64, generator=seeded()), torch.randint(0, 4, (2, 64, 64))
    loss, _ = train.supervised_loss(s, student.eval(), x, y)
    assert loss.item() == pytest.approx(l_seg(student.predict(x), y), rel=1e-4)


# -- The schedule


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """What a run of 120 steps hands to its functions and gets from them, by name."""
    seen = {}

    def watch(patch, module, name):
        original, seen[name] = getattr(module, name), []

        def call(*given, **options):
            result = original(*given, **options)
            seen[name].append((given, result))
            return result

        patch.setattr(module, name, call)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("batch", "weak_view", "strong_view"):
            watch(patch, data, name)
        for name in ("open_data", "build", "generator", "vqseg_loss", "ema_update"):
            watch(patch, train, name)
        patch.setattr(evaluate, "evaluate", lambda *given, **options: [])
        watch(patch, evaluate, "evaluate")
        patch.setattr(evaluate, "class_means", lambda rows: {"mean": [0.5]})
        patch.setattr(evaluate, "score_run", lambda *given: None)
        patch.setattr(data, "extra", lambda name: None)
        seen["lr"] = []
        hook = register_optimizer_step_pre_hook(
            lambda optimizer, *_: seen["lr"].append(optimizer.param_groups[0]["lr"]))
        flags = ["--steps", "120", "--lr", "0.002", "--lambda-u", "0.5", "--warmup", "0.253"]
        run(tmp_path_factory.mktemp("calls"), *flags)
        hook.remove()
    return seen


def test_the_learning_rate_is_polynomial_after_a_short_rise(calls):
    expected = [0.002 * min(1, (k + 1) / 100) * (1 - k / 120) ** 0.9 for k in range(120)]
    assert calls["lr"] == pytest.approx(expected)


def test_the_teachers_alpha_rises_from_a_tenth(calls):
    alphas = [alpha for (_, _, alpha), _ in calls["ema_update"]]
    assert alphas == pytest.approx([(1 + k) / (10 + k) for k in range(120)])


def test_the_teachers_alpha_stays_at_that_of_section_3_4(unscored, monkeypatch, tmp_path):
    alphas = []
    begin = train.open_run
    monkeypatch.setattr(train, "open_run", lambda *given: (begin(*given)[0], 880, -1.0, []))
    monkeypatch.setattr(train, "ema_update", lambda teacher, student, alpha: alphas.append(alpha))
    run(tmp_path / "late", "--steps", "900")
    assert alphas == pytest.approx([(1 + k) / (10 + k) for k in range(880, 890)] + [0.99] * 10)


def test_the_unlabeled_loss_counts_after_the_warm_up(calls):
    # 0.253 of 120 steps is 30.36.
    assert [given[8] for given, _ in calls["vqseg_loss"]] == [0.0] * 31 + [0.5] * 89


def test_the_student_sees_strong_views_and_the_teacher_the_weak_one(calls):
    (_, (weak_l, _)), (_, (weak_u, _)) = calls["weak_view"][-2:]
    (of_l, strong_l), (of_u, strong_u) = calls["strong_view"][-2:]
    given, _ = calls["vqseg_loss"][-1]
    x_l, _, x_u, x_a = given[4:8]
    assert of_l[0] is weak_l and of_u[0] is weak_u
    assert x_l is strong_l and x_u is weak_u and x_a is strong_u


def test_a_step_has_a_labeled_and_an_unlabeled_batch(calls):
    _, (_, labeled, unlabeled) = calls["open_data"][0]
    assert all(given[1] is labeled for given, _ in calls["batch"][0::2])
    assert all(given[1] is unlabeled for given, _ in calls["batch"][1::2])
    assert all(given[3] == 160 for given, _ in calls["weak_view"])


def test_the_teacher_follows_the_student_in_evaluation_mode_and_is_validated(calls):
    _, (student, teacher, *_) = calls["build"][0]
    assert all(given[:2] == (teacher, student) for given, _ in calls["ema_update"])
    assert all(given[0] == teacher.predict for given, _ in calls["evaluate"])
    assert student.training and not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())


def test_the_teacher_begins_as_the_student():
    _, student, teacher, *_ = built()
    assert all(torch.equal(t, teacher.state_dict()[k]) for k, t in student.state_dict().items())


def test_the_randomness_of_a_step_is_a_function_of_seed_step_and_rank():
    keys = [(1, 2, 0), (2, 1, 0), (1, 3, 0), (1, 2, 1)]
    drawn = [train.generator(CPU, *key).initial_seed() for key in keys]
    assert len(set(drawn)) == 4
    assert drawn == [train.generator(CPU, *key).initial_seed() for key in keys]


def test_all_draws_of_a_run_follow_from_its_seed(calls):
    assert [given[1:] for given, _ in calls["generator"]] == [(1337, k, 0) for k in range(120)]
    views = zip(calls["weak_view"][::2], calls["vqseg_loss"], calls["generator"])
    assert all(view[0][2] is loss[0][9] is g for view, loss, (_, g) in views)
    weights = [built("--seed", seed)[1].encoder.to_tokens.weight for seed in "12"]
    assert not torch.equal(*weights)


# -- Runs


def run(out, *flags: str) -> dict:
    """Trains a little; the last checkpoint."""
    flags = [*SMALL, "--steps", "12", "--warmup", "0.25", "--out", str(out), *flags]
    folder = train.train(train.read_settings(flags))
    return torch.load(folder / "last.pt", weights_only=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a whole run and its last checkpoint."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, run(folder)


@pytest.fixture
def unscored(monkeypatch):
    """Without the table and the pictures that end a run, and their rehearsal."""
    monkeypatch.setattr(evaluate, "score_run", lambda *given: None)
    monkeypatch.setattr(data, "extra", lambda name: None)


def same(a: dict, b: dict) -> bool:
    parts = [(a[part][name], b[part][name]) for part in ("student", "teacher") for name in a[part]]
    return all(torch.equal(x, y) for x, y in parts)


def test_outside_git_the_commit_is_unknown(tmp_path, monkeypatch):
    (tmp_path / "no git's").mkdir()
    monkeypatch.setattr(train, "__file__", str(tmp_path / "no git's" / "train.py"))
    s = train.read_settings(["--out", str(tmp_path / "run")])
    train.open_run(s, 0, {}, None, None, None)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["commit"] == "unknown"


def test_the_log_has_all_terms_and_the_use_of_the_codebook(finished):
    lines = [json.loads(line) for line in (finished[0] / "log.jsonl").read_text().splitlines()]
    terms = {"step", "loss", "seg_l", "rec_l", "seg_u", "rec_u", "kept", "align", "vq", "used",
             "perplexity"}
    assert set(lines[-2]) == terms and set(lines[-1]) == {"step", "val_dice"}


def test_masks_of_unlabeled_slices_are_never_read(finished, unscored, tmp_path, monkeypatch):
    dataset = data.load("phantom")
    unlabeled = [case for case in dataset.cases if case.patient == "patient004"]
    dataset.masks[dataset.rows(unlabeled)] = 3
    monkeypatch.setattr(data, "load", lambda *given: dataset)
    assert same(finished[1], run(tmp_path))


def test_best_pt_is_the_teacher_with_the_best_validation(unscored, tmp_path, monkeypatch):
    scores = iter([0.1, 0.9, 0.3])
    monkeypatch.setattr(evaluate, "class_means", lambda rows: {"mean": [next(scores)]})
    run(tmp_path)
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert (best["step"], best["val_dice"]) == (10, 0.9)


def test_the_table_of_a_run_has_the_dice_of_its_best_validation(finished):
    lines = (finished[0] / "val.csv").read_text().splitlines()[1:]
    dice = [float(line.split(",")[2]) for line in lines]
    exact = finished[1]["precision"] == "float32"  # else the table is still in float32
    near = pytest.approx(finished[1]["best"], abs=1e-5 if exact else 0.01)
    assert sum(dice) / len(dice) == near


def test_resume_knows_the_best_validation_so_far(finished):
    s, student, teacher, _, optimizer = built("--resume", str(finished[0]))
    assert train.open_run(s, 0, {}, student, teacher, optimizer)[2] == finished[1]["best"]


def test_a_folder_is_found_again_from_another_one(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    for flags in (["--data", "mine"], ["--data", "acdc", "--root", "mine"]):
        assert train.read_settings(flags).root == str(tmp_path / "mine")


def test_a_loss_that_is_not_finite_stops_the_run(unscored, tmp_path, monkeypatch):
    monkeypatch.setattr(losses, "total_loss", lambda l_db, l_align, lambda_a: l_db * math.nan)
    with pytest.raises(BadInput, match="step 1: the loss is not finite.*a smaller --lr"):
        run(tmp_path)


def test_a_run_is_not_written_over(finished, tmp_path, monkeypatch):
    with pytest.raises(BadInput, match="holds a run"):
        run(finished[0])
    monkeypatch.chdir(tmp_path)
    s = train.read_settings(["--labeled", "3"])
    names = [str(train.open_run(s, 0, {}, None, None, None)[0]) for _ in range(2)]
    assert names == ["runs/phantom-3-vqseg-qpm-seed1337", f"{names[0]}-again"]


def test_a_score_beyond_the_protocol_has_a_file_of_its_own_and_no_pictures(finished, capsys):
    evaluate.score_run(finished[0], "test", CPU, unit="mm")
    assert "one view, no post-processing, distances in mm" in capsys.readouterr().out
    assert (finished[0] / "test-mm.csv").exists()
    assert not list(finished[0].glob("test*.png"))


def test_of_the_training_patients_those_with_masks_are_scored(finished, monkeypatch):
    dataset = data.load("phantom")
    patients = dataset.split["train"]
    few = [c._replace(mask=c.mask if c.patient == patients[0] else None) for c in dataset.cases]
    monkeypatch.setattr(data, "load", lambda *_: dataset._replace(cases=few))
    evaluate.score_run(finished[0], "train", CPU)
    lines = (finished[0] / "train.csv").read_text().splitlines()[1:]
    assert {line.split("_")[0] for line in lines} == {patients[0]} and len(lines) == 6


# -- Settings


def test_paper_sets_what_section_4_2_states_and_none_of_our_additions():
    s = train.read_settings(["--paper"])
    found = (s.codebook_size, s.eps, s.lambda_a, s.lambda_u, s.batch, s.lr, s.encoder, s.fm)
    assert found == (16384, 0.7, 5.0, 1.0, 4, 1e-4, "dinov2", "dinov2")
    assert (s.lambda_dice, s.lambda_usage, s.warmup, s.threshold) == (0, 0, 0, 0)


def test_paper_trains_for_100_passes_over_the_unlabeled_slices():
    s = train.read_settings(["--paper", "--batch", "2", "--device", "cpu"])
    _, _, unlabeled = train.open_data(s, 3, CPU)  # three processes
    assert s.steps == math.ceil(100 * len(unlabeled) / 6)


def test_paper_has_sgd_with_momentum_and_weight_decay():
    optimizer = built("--paper", "--encoder", "conv16", "--fm", "none")[4]
    assert isinstance(optimizer, torch.optim.SGD)
    assert (optimizer.defaults["momentum"], optimizer.defaults["weight_decay"]) == (0.9, 3e-5)


def test_the_papers_encoder_does_not_take_the_weights_of_another_foundation_model(monkeypatch):
    dinov2 = pytest.importorskip("extras.dinov2")
    asked = []  # of each network the weights
    encoder = dinov2.DINOv2Encoder
    monkeypatch.setattr(encoder, "load_pretrained", lambda self, file: asked.append(file))
    monkeypatch.setattr(train, "foundation_model", lambda *_: (None, "another"))
    for fm in ("torchscript", "dinov2"):
        built("--paper", "--fm", fm, "--fm-weights", "file.pt")
    assert asked[0] == "" and asked[1].endswith("file.pt")


def test_paper_without_weights_is_refused(monkeypatch):
    dinov2 = pytest.importorskip("extras.dinov2")
    monkeypatch.setattr(dinov2, "official_weights", lambda: None)
    with pytest.raises(BadInput, match="--fm-weights FILE"):
        train.train(train.read_settings(["--paper", "--device", "cpu"]))


@pytest.mark.parametrize("flag, value", [("--eps", "1.5"), ("--batch", "0"), ("--temperature", "0"),
                                         ("--codebook-size", "1"), ("--lambda-u", "-1"),
                                         ("--width", "99999"), ("--seed", "9" * 20)])
def test_a_value_out_of_range_names_its_flag(flag, value):
    with pytest.raises(BadInput, match=f"{flag} .*must be"):
        train.read_settings([flag, value])


def test_the_supervised_baseline_may_be_told_that_it_has_no_codebook():
    assert train.read_settings(["--supervised", "--codebook-size", "0"]).supervised


def test_more_labeled_patients_than_there_are_is_refused():
    with pytest.raises(BadInput, match="--labeled 5: only 4 training patients have masks"):
        train.train(train.read_settings([*SMALL, "--labeled", "5"]))


@pytest.mark.parametrize("found, kept", [(torch.nn.Conv2d(1, 8, 32, 32), "dinov2"), (None, "none")])
def test_a_run_records_what_auto_found(monkeypatch, found, kept):
    """So that --resume does not take another one, or none."""
    monkeypatch.setattr(train, "foundation_model", lambda kind, weights: (found, "any name"))
    assert built("--data", "acdc")[0].fm == kept


def test_resume_takes_the_runs_own_flags(finished):
    again = ["--resume", str(finished[0]), *SMALL, "--steps", "12", "--warmup", "0.25"]
    assert train.read_settings(again) == train.read_settings(["--resume", str(finished[0])])


def test_weights_may_have_moved_since(finished, tmp_path):
    s = train.read_settings(["--resume", str(finished[0]), "--fm-weights", str(tmp_path / "new")])
    assert s.fm_weights == str(tmp_path / "new")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"settings": {"width": 4, "depth": 5}}'])
def test_resume_of_a_folder_without_a_run_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BadInput, match="--resume .*: no readable run of this version; begin"):
            train.read_settings(["--resume", str(folder)])


@pytest.mark.parametrize("name, value, said", [
    ("perturb", "x", "--perturb x: must be one of"), ("encoder", "v1", "--encoder v1: must be one"),
    ("steps", "a", "no readable run of"), ("seed", None, "no readable run of"),
    ("width", [4], "no readable run of this version; begin anew")])
def test_resume_of_a_damaged_record_is_refused(finished, tmp_path, name, value, said):
    record = json.loads((finished[0] / "config.json").read_text())
    record["settings"][name] = value
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(BadInput, match=said):
        train.read_settings(["--resume", str(tmp_path)])


def test_resume_of_a_record_that_does_not_fit_the_checkpoint_is_refused(finished, tmp_path):
    record = json.loads((finished[0] / "config.json").read_text())
    record["settings"]["codebook_size"] = 99
    (tmp_path / "config.json").write_text(json.dumps(record))
    (tmp_path / "last.pt").write_bytes((finished[0] / "last.pt").read_bytes())
    with pytest.raises(BadInput, match="last.pt: no whole .*, or name the run.s own data with"):
        train.train(train.read_settings(["--resume", str(tmp_path)]))


def test_a_checkpoint_with_one_wrong_bit_is_refused(finished, tmp_path):
    content = bytearray((finished[0] / "best.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "best.pt").write_bytes(content)
    with pytest.raises(BadInput, match="best.pt: no whole checkpoint of this version"):
        evaluate.load_run(tmp_path, CPU)


@pytest.mark.parametrize("key", ["settings", "labels", "window", "teacher"])
def test_a_checkpoint_of_another_version_is_refused(finished, tmp_path, key):
    saved = torch.load(finished[0] / "best.pt")
    del saved[key]
    torch.save(saved, tmp_path / "best.pt")
    with pytest.raises(BadInput, match=rf"checkpoint of this version \(KeyError\('{key}'\)\)"):
        evaluate.load_run(tmp_path, CPU)


@pytest.mark.parametrize("name, times", [("best.pt", 1), ("last.pt", 1), ("log.jsonl", 3),
                                         ("last.pt", 3)])
def test_a_run_that_stops_anywhere_ends_bitwise_like_one_without_a_stop(
        finished, unscored, tmp_path, monkeypatch, name, times):
    save, seen = evaluate.save, []

    def crash(path, content):
        seen.append(path.name)
        if seen.count(name) == times:
            raise KeyboardInterrupt
        save(path, content)

    monkeypatch.setattr(evaluate, "save", crash)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    monkeypatch.setattr(evaluate, "save", save)
    train.train(train.read_settings(["--resume", str(tmp_path)]))
    assert same(finished[1], torch.load(tmp_path / "last.pt"))
    assert (tmp_path / "log.jsonl").read_bytes() == (finished[0] / "log.jsonl").read_bytes()


def test_resume_refuses_a_flag_that_contradicts_the_run(finished):
    with pytest.raises(BadInput, match="--eps 0.1: RUN began with 0.7; leave it out"):
        train.read_settings(["--resume", str(finished[0]), "--eps", "0.1"])
