"""The essential point, the knee, their intervals, lottery tickets and the count along a training."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lossmith.errors import InputError
from lossmith.sparsity.essential import GRID, EssentialCurve, essential_point, essential_sparsity, find_knee
from lossmith.sparsity.essential_text import TextEvaluation
from lossmith.sparsity.essential_tickets import lottery_masks, sparsification
from lossmith.sparsity.magnitude import one_shot_masks

SHORT = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
SCORES = [0.84, 0.841, 0.839, 0.838, 0.836, 0.831, 0.80, 0.72, 0.60, 0.41]


def test_points_and_knees_of_the_worked_examples() -> None:
    flat = [1, 1, 1, 1, 0.8, 0.6]
    assert essential_point(SHORT, flat) == 0.3
    knee = find_knee(SHORT, flat)
    assert knee.at == 0.3
    assert knee.sharp
    np.testing.assert_allclose([knee.before, knee.after], [0, -2], atol=1e-12)
    assert essential_point(GRID, SCORES) == 0.4
    assert essential_point(GRID, SCORES, absolute=True) == 0.5
    assert essential_point(GRID, SCORES, tolerance=0.05) == 0.6
    knee = find_knee(GRID, SCORES)
    assert knee.at == 0.6
    np.testing.assert_allclose([knee.before, knee.after], [-0.0243, -1.3003], atol=1e-4)


def test_nothing_counts_beyond_the_first_failure() -> None:
    assert essential_point(SHORT, [1, 1, 0.5, 1, 1, 1]) == 0.1
    assert essential_point(SHORT, [1, 1, math.nan, 1, 1, 1]) == 0.1
    assert essential_point(SHORT, [1] * 6) == 0.5
    # Of a negative score, a loss, the tolerance is of its magnitude.
    assert essential_point(SHORT, [-2, -2.01, -2.03, -2, -2, -2]) == 0.1


def test_interpolates_between_the_last_pass_and_the_first_failure() -> None:
    found = essential_point(SHORT, [1, 1, 1, 1, 0.8, 0.6], interpolate=True, tolerance=0.1)
    assert found == pytest.approx(0.35)


def test_intervals_hold_the_truth_and_are_narrow_with_many_examples() -> None:
    rng = np.random.default_rng(0)
    truth = np.array([0.9, 0.9, 0.9, 0.9, 0.7, 0.5])
    for number, widest in ((100, 0.5), (4000, 0.2)):
        samples = (rng.random((number, 1)) < truth).astype(float)
        curve = EssentialCurve(SHORT, tuple(samples.mean(0)), samples, tolerance=0.03)
        for what, value in (("s_star", 0.3), ("knee", 0.3)):
            low, high = curve.interval(what)  # type: ignore[arg-type]
            assert low <= value <= high
            assert high - low <= widest
    assert curve.interval() == curve.interval()
    assert math.isnan(EssentialCurve(SHORT, (1.0,) * 6).interval()[0])


def test_paired_examples_give_the_drop_its_own_error() -> None:
    samples = np.random.default_rng(0).normal(size=(200, 1)) - np.array(SHORT)
    frame = EssentialCurve(SHORT, tuple(samples.mean(0)), samples).to_frame()
    # Every example drops by the same: no error, however much examples differ.
    np.testing.assert_allclose(frame["drop"], SHORT, atol=1e-12)
    np.testing.assert_allclose(frame["drop_error"], 0, atol=1e-12)


def test_weighted_examples_are_a_mean_over_tokens() -> None:
    layer = nn.Linear(4, 4)
    curve = essential_sparsity(
        layer, lambda m: ([1.0, 4.0], [3, 1]), grid=(0, 0.5), targets="all", lower_is_better=True, patterns=("2:4",)
    )
    assert curve.scores == (-1.75, -1.75)
    assert curve.patterns == {"2:4": -1.75}


def test_every_sparsity_starts_from_the_same_weights_and_training_keeps_the_zeros() -> None:
    torch.manual_seed(0)
    layer, seen = nn.Linear(10, 10), []
    before = layer.weight.detach().clone()

    def finetune(model: nn.Module) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            (model(torch.ones(1, 10)) - 1).square().sum().backward()
            optimizer.step()

    def evaluate(model: nn.Module) -> float:
        seen.append((model.weight == 0).sum().item())
        assert isinstance(model.weight, nn.Parameter)
        return 1.0

    curve = essential_sparsity(layer, evaluate, grid=(0, 0.3, 0.6, 0.9), finetune=finetune, targets="all")
    assert seen == [0, 30, 60, 90]
    assert torch.equal(layer.weight, before)
    assert curve.s_star == 0.9
    assert "essential sparsity 0.9" in curve.summary()


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_curve_is_drawn(suffix: str, tmp_path: Path) -> None:
    samples = np.random.default_rng(0).random((5, 6))
    curve = EssentialCurve(SHORT, tuple(samples.mean(0)), samples, patterns={"2:4": 0.3})
    curve.plot(tmp_path / f"curve.{suffix}")
    assert (tmp_path / f"curve.{suffix}").stat().st_size > 1000
    assert curve.to_dict()["knee_interval"]


def test_a_picture_that_cannot_be_drawn_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    def fails(self: Figure, path: Path, **options: object) -> None:
        Path(path).write_text("half")
        raise OSError("disk full")

    (tmp_path / "curve.png").write_text("old")
    monkeypatch.setattr(Figure, "savefig", fails)
    with pytest.raises(OSError, match="disk full"):
        EssentialCurve(SHORT, (1.0,) * 6).plot(tmp_path / "curve.png")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("curve.png", "old")]


def test_wrong_curves_are_refused() -> None:
    for grid in ([0.1, 0.2], [0, 0.2, 0.1], [0, 1.0], [0]):
        with pytest.raises(ValueError, match="rise from 0"):
            essential_point(grid, [1.0] * len(grid))
    with pytest.raises(ValueError, match="6 sparsities and 5 scores"):
        essential_point(SHORT, [1.0] * 5)
    with pytest.raises(ValueError, match="dense model is nan"):
        essential_point(SHORT, [math.nan] + [1.0] * 5)
    with pytest.raises(ValueError, match="tolerance"):
        essential_point(SHORT, [1.0] * 6, tolerance=-1)
    with pytest.raises(ValueError, match="at least 4"):
        find_knee((0, 0.1, 0.2), [1, 1, 1])
    with pytest.raises(InputError, match="no text"):
        TextEvaluation([[1]])


def test_tickets_without_training_are_one_shot_masks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    found = lottery_masks(model, lambda m: None, 0.5, targets="all")
    # No ties among random floats: the two rules remove the same weights.
    once = one_shot_masks(model, 0.5, targets="all")
    assert all(torch.equal(found[name], once[name]) for name in once)


def test_tickets_never_take_a_weight_back_and_start_from_the_old_weights() -> None:
    torch.manual_seed(0)
    model, starts, zeros = nn.Linear(12, 12), [], []

    def finetune(ticket: nn.Module) -> None:
        mask = ticket.weight_mask.bool()
        starts.append(torch.equal(ticket.weight_orig[mask], model.weight[mask]))
        zeros.append(~mask)
        with torch.no_grad():
            ticket.weight_orig.copy_(torch.randint(0, 3, ticket.weight_orig.shape))

    found = lottery_masks(model, finetune, 0.4, rate=0.2, targets="all")["weight"]
    zeros.append(~found)
    assert all(starts)
    assert [int(z.sum()) for z in zeros] == [0, round(0.2 * 144), round(0.36 * 144), round(0.4 * 144)]
    assert all(bool((later | ~early).all()) for early, later in itertools.pairwise(zeros))


def test_sparsification_finds_the_jump_with_one_threshold() -> None:
    last = torch.arange(1, 11).float().reshape(2, 5)
    points = {"1": {"w": last + 5}, "2": {"w": last + 4}, "3": {"w": last}}
    found = sparsification(points)
    assert found.threshold == 5
    assert found.shares == (0.0, 0.1, 0.5)
    assert found.jump == ("3", pytest.approx(0.4))
    assert found.layers["w"] == found.shares
    free = sparsification({"1": {"w": last * 100}, "2": {"w": last}}, scale_free=True)
    np.testing.assert_allclose(*free.shares)
    with pytest.raises(ValueError, match="at least 2"):
        sparsification({"1": {"w": last}})
    with pytest.raises(ValueError, match="same matrices: v"):
        sparsification({"1": {"w": last}, "2": {"v": last}})
