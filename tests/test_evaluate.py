"""Metrics against brute force, the pooled and one-directional definitions, and the empty-mask rule."""

import math

import numpy as np
import pytest
import torch

import evaluate as ev


def brute_surface(mask):
    points = []
    for v in np.argwhere(mask):
        for step in ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)):
            n = v + step
            if (n < 0).any() or (n >= mask.shape).any() or not mask[tuple(n)]:
                points.append(v)
                break
    return np.array(points)


@pytest.mark.parametrize("seed", range(6))
def test_metrics_equal_brute_force(seed):
    rng, spacing = np.random.default_rng(seed), [(1, 1, 1), (8.0, 1.5, 1.2)][seed % 2]
    p, t = rng.random((4, 7, 6)) < 0.6, rng.random((4, 7, 6)) < 0.6
    a, b = brute_surface(p) * spacing, brute_surface(t) * spacing
    there, back = [min(math.dist(u, v) for v in b) for u in a], [min(math.dist(u, v) for v in a) for u in b]
    assert ev.hd95(p, t, spacing) == pytest.approx(np.percentile(there + back, 95))
    assert ev.asd(p, t, spacing) == pytest.approx(np.mean(there))
    both = (p & t).sum()
    assert ev.dice(p, t) == 2 * both / (p.sum() + t.sum()) and ev.jaccard(p, t) == both / (p | t).sum()


def test_hd95_pools_both_directions_and_asd_looks_one_way():
    p, t = np.zeros((1, 1, 60), bool), np.zeros((1, 1, 60), bool)
    p[..., :10], t[..., :30] = True, True  # prediction lies in the truth: forward all 0, back 0 (10 times) then 1 to 20
    pooled = [0] * 20 + list(range(1, 21))
    assert ev.hd95(p, t) == pytest.approx(np.percentile(pooled, 95)) and np.percentile(pooled, 95) < np.percentile(pooled[10:], 95)
    assert ev.asd(p, t) == 0 and ev.asd(t, p) == pytest.approx(sum(range(1, 21)) / 30)


def test_empty_masks_follow_the_one_rule():
    truth = np.zeros((2, 4, 5), int)
    truth[0, 1, 1], truth[1, 2, 2] = 1, 2
    prediction = np.where(truth == 2, 0, truth)
    prediction[0, 0, 0] = 3
    one, missed, invented = ev.score("a", prediction, truth, ["bg", "one", "two", "three"])
    diagonal = math.sqrt(1 + 9 + 16)
    assert (one.dice, one.jaccard, one.hd95, one.asd, one.empty) == (1, 1, 0, 0, False)
    assert missed[2:] == (0, 0, diagonal, diagonal, True) and invented[2:] == (0, 0, diagonal, diagonal, False)
    nothing = ev.score("a", np.zeros_like(truth), np.zeros_like(truth), ["bg", "one"])[0]
    assert all(math.isnan(v) for v in nothing[2:6]) and not nothing.empty


def test_score_gives_each_class_its_own_four_numbers():
    rng = np.random.default_rng(0)
    p, t = rng.integers(0, 3, (3, 6, 5)), rng.integers(0, 3, (3, 6, 5))
    p[0] = t[0]
    rows = ev.score("a", p, t, ["bg", "one", "two"], (5.0, 1.0, 2.0))
    for k, row in enumerate(rows, start=1):
        a, b = p == k, t == k
        far = ev.hd95(a, b, (5.0, 1.0, 2.0)), ev.asd(a, b, (5.0, 1.0, 2.0))
        assert row[2:6] == (ev.dice(a, b), ev.jaccard(a, b), *far) and far[1] != ev.asd(b, a, (5.0, 1.0, 2.0))


def test_turn_rotates_and_scales_about_the_center_and_its_inverse_leads_back():
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(ev.turn(x, math.pi / 2, 1.0), torch.rot90(x, 1, (2, 3)), atol=1e-5)
    blocks = torch.arange(16.0).reshape(1, 1, 4, 4)
    twice = ev.turn(blocks, 0.0, 2.0)[0, 0]  # shows row and column 0.75 of the input: 4 * 0.75 + 0.75
    assert twice[0, 0].item() == pytest.approx(0.75 * 1 + 0.75 * 4)
    y, z = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    smooth = torch.exp(-4 * ((y - 0.1) ** 2 + 2 * (z + 0.1) ** 2))[None, None]
    assert not torch.allclose(ev.turn(smooth, 0.3, 1.1), smooth, atol=0.05)
    assert torch.allclose(ev.turn(ev.turn(smooth, 0.3, 1.1), -0.3, 1 / 1.1)[..., 16:48, 16:48], smooth[..., 16:48, 16:48], atol=0.01)


def test_prediction_is_the_mean_probability_of_the_views_each_turned_back():
    seen = []

    def model(x):  # says class 1 where it is bright
        seen.append(x)
        return torch.cat([0.4 - x, x - 0.4], 1) * 20

    y, x = np.mgrid[:100, :100] / 50 - 1
    volume = np.exp(-4 * ((y - 0.1) ** 2 + 2 * (x + 0.1) ** 2))[None].astype(np.float32)
    one = ev.predict([model], [volume], torch.device("cpu"), views=ev.ONE_VIEW)
    assert (one == (volume > 0.4)).mean() > 0.99 and len(seen) == 1
    nine = ev.predict([model], [volume], torch.device("cpu"))
    assert (nine == one).mean() > 0.99 and len(seen) == 10
    turned = ev.predict([model], [volume], torch.device("cpu"), views=[(0.3, 1.1)])  # alone: no other view makes up for it
    assert (turned == one).mean() > 0.99 and not torch.allclose(seen[-1], seen[0], atol=0.05)
    sure = iter([9.0, -2.0, -2.0])  # one very sure view does not outvote two, as it would in a mean of logits
    votes = ev.predict([lambda v: torch.cat([0 * v, 0 * v + next(sure)], 1)], [volume], torch.device("cpu"), views=ev.ONE_VIEW * 3)
    assert votes[0, 50, 50] == 0  # 1.00, 0.12, 0.12: mean 0.41


def pieces(mask):
    """Flood fill, voxel by voxel."""
    left, found = set(map(tuple, np.argwhere(mask).tolist())), []
    while left:
        edge = [left.pop()]
        piece = set(edge)
        while edge:
            z, y, x = edge.pop()
            for n in ((z + 1, y, x), (z - 1, y, x), (z, y + 1, x), (z, y - 1, x), (z, y, x + 1), (z, y, x - 1)):
                if n in left:
                    left.remove(n)
                    piece.add(n)
                    edge.append(n)
        found.append(piece)
    return found


@pytest.mark.parametrize("seed", range(8))
def test_largest_piece_equals_a_flood_fill(seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((5, 9, 8)) < rng.uniform(0.2, 0.6)
    found, kept = pieces(mask), set(map(tuple, np.argwhere(ev.largest_piece(mask)).tolist()))
    assert len(found) > 1 and kept in found and len(kept) == max(map(len, found))


def test_largest_piece_of_a_spiral_is_all_of_it_and_of_nothing_nothing():
    spiral = np.zeros((1, 9, 9), bool)
    spiral[0, 0, :] = spiral[0, :, 8] = spiral[0, 8, :] = spiral[0, 2:, 0] = spiral[0, 2, :7] = spiral[0, 2:7, 6] = spiral[0, 6, 2:7] = True
    assert np.array_equal(ev.largest_piece(spiral), spiral) and not ev.largest_piece(np.zeros((2, 3, 4), bool)).any()


def test_with_one_piece_a_prediction_loses_the_smaller_pieces_of_each_class_and_nothing_else():
    volume = np.zeros((4, 240, 240), np.float32)  # as the grid, so that nothing is resampled
    volume[:, 100:130, 100:130], volume[1:3, 110:120, 110:120] = 1.0, 2.0  # class 1, and class 2 within
    alone = np.zeros(volume.shape, bool)
    alone[0, 150:155, 100:110] = alone[3, 60:64, 60:64] = True
    volume[alone] = 1.0
    volume[3, 112:116, 112:116] = 2.0  # touches its slice below by faces: stays
    volume[0, 90:92, 90:92] = 2.0  # not so
    alone |= (np.arange(4) == 0)[:, None, None] & (volume == 2)
    model = lambda x: 50 * torch.cat([0.5 - x, 0.25 - (x - 1).abs(), x - 1.5], 1)  # noqa: E731
    slabs = lambda: iter([volume[:1], volume[1:]])  # noqa: E731, a piece may reach from slab to slab
    every, one = (ev.predict([model], slabs(), torch.device("cpu"), views=ev.ONE_VIEW, one_piece=only) for only in (False, True))
    assert np.array_equal(every, volume) and np.array_equal(one, np.where(alone, 0, volume))


def test_mean_is_over_volumes_then_classes_and_leaves_out_what_is_nowhere():
    row = lambda case, label, d: ev.Row(case, label, d, 0, 0, 0, False)  # noqa: E731
    rows = [row("a", "x", 1.0), row("b", "x", 0.0), row("a", "y", 1.0), row("b", "y", float("nan"))]
    assert ev.mean_dice(rows) == 0.75 and "0 of 4" in ev.table(rows)
