"""Weightings against the numbers worked out by hand in float64 (delta = 1)."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lossmith.data.weighting import (
    LossWeighting,
    constant,
    extremes,
    linupper,
    loss_weights,
    quadratic,
    uniform,
    warmup,
    weight_statistics,
)

LOSSES = torch.tensor([1.0, 2.0, 3.0, 5.0], dtype=torch.float64)

HAND_WORKED = [
    ("linupper", 1.0, (0.123681479249, 0.203916285630, 0.336201117560, 0.336201117560), 3.22112299099206),
    ("linupper", 0.4, (0.034655641420, 0.120960073967, 0.422192142306, 0.422192142306), 3.6541129278045226),
    ("quadratic", 1.0, (0.146299746326, 0.309716565402, 0.397683941946, 0.146299746326), 2.6902834345976467),
    ("extremes", 1.0, (0.336201117560, 0.203916285630, 0.123681479249, 0.336201117560), 2.79608371437),
]


@pytest.mark.parametrize(("strategy", "r", "weights", "loss"), HAND_WORKED)
def test_hand_worked_weights_and_losses(strategy: str, r: float, weights: tuple[float, ...], loss: float) -> None:
    w = loss_weights(LOSSES, strategy, r=r)
    assert w.tolist() == pytest.approx(weights, abs=1e-11)
    assert float((w * LOSSES).sum()) == pytest.approx(loss, abs=1e-11)


losses_lists = st.lists(st.floats(0.01, 20), min_size=2, max_size=40)


@given(losses_lists, st.floats(0.1, 10), st.floats(-5, 5), st.sampled_from(["linupper", "quadratic", "extremes"]))
def test_weights_do_not_change_when_losses_are_shifted_and_scaled(
    values: list[float], c: float, b: float, strategy: str
) -> None:
    losses = torch.tensor(values, dtype=torch.float64)
    if losses.max() - losses.min() < 1e-2:
        return
    torch.testing.assert_close(
        loss_weights(c * losses + b, strategy, r=0.5),
        loss_weights(losses, strategy, r=0.5),
        rtol=1e-9,
        atol=1e-12,
    )


@given(losses_lists, st.floats(0.2, 5), st.sampled_from(["linupper", "quadratic", "extremes", "linear"]))
def test_no_weight_exceeds_exp_1_over_r_times_the_mean(values: list[float], r: float, strategy: str) -> None:
    w = loss_weights(torch.tensor(values, dtype=torch.float64), strategy, r=r)
    assert (w > 0).all()
    assert float(w.sum()) == pytest.approx(1, abs=1e-12)
    assert float(w.max()) * len(values) <= math.exp(1 / r) * (1 + 1e-9)


@given(losses_lists, st.floats(0.1, 5))
def test_linupper_rises_with_the_loss_and_caps_the_upper_half(values: list[float], r: float) -> None:
    losses = torch.tensor(sorted(values), dtype=torch.float64)
    w = loss_weights(losses, "linupper", r=r)
    assert (w.diff() >= -1e-15).all()
    # Chebyshev's sum inequality.
    assert float((w * losses).sum()) >= float(losses.mean()) - 1e-9
    upper = losses >= (losses.min() + losses.max()) / 2 + 1e-9
    if losses.max() - losses.min() > 1e-5 and upper.any():
        torch.testing.assert_close(w[upper], w.max().expand(int(upper.sum())), rtol=1e-9, atol=0)


def test_quadratic_depends_on_the_distance_from_the_middle_and_extremes_on_the_ends() -> None:
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    q, e = loss_weights(losses, "quadratic"), loss_weights(losses, "extremes")
    torch.testing.assert_close(q, q.flip(0))
    assert q.argmax() == 2
    assert e[0] == e[4] == e.max()


def test_a_large_temperature_is_uniform_and_a_small_one_takes_the_top() -> None:
    for strategy in ("linupper", "quadratic", "extremes"):
        assert (loss_weights(LOSSES, strategy, r=1e6) - 0.25).abs().max() < 1e-6
    assert loss_weights(LOSSES, "linupper", r=1e-4).tolist() == pytest.approx([0, 0, 0.5, 0.5])
    assert torch.equal(loss_weights(LOSSES, "extremes", r=None), torch.full((4,), 0.25, dtype=torch.float64))


def test_one_step_is_guaranteed_progress_by_the_weighted_loss() -> None:
    """||x' - x*||^2 <= ||x - x*||^2 - 2 eta (1 - eta L) sum w l, for convex L-smooth losses that vanish at x*."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(32, 6, generator=generator, dtype=torch.float64)
    smooth = float(rows.square().sum(1).max())
    x = torch.randn(6, generator=generator, dtype=torch.float64)
    losses = 0.5 * (rows @ x).square()
    for strategy in ("linupper", "quadratic", "extremes"):
        w = loss_weights(losses, strategy, r=0.4)
        for eta in (0.1 / smooth, 1 / smooth):
            step = x - eta * (w[:, None] * (rows @ x)[:, None] * rows).sum(0)
            bound = x.square().sum() - 2 * eta * (1 - eta * smooth) * (w * losses).sum()
            assert step.square().sum() <= bound + 1e-12


def test_close_losses_in_half_precision_are_told_apart() -> None:
    """2l - (max + min) in bfloat16 gives h = -1, -.25, .375, 1 for these; the exact values are evenly spaced."""
    losses = torch.tensor([3.1, 3.2, 3.3, 3.4], dtype=torch.bfloat16)
    exact = loss_weights(losses.double(), "linupper", r=0.4)
    w = loss_weights(losses, "linupper", r=0.4)
    assert w.dtype == torch.float32
    torch.testing.assert_close(w.double(), exact, rtol=1e-6, atol=0)


def test_faults_of_other_implementations_fail_here() -> None:
    """Per-process normalisation is another method, and a softmax of h is not uniform."""
    whole = loss_weights(LOSSES, "linupper", r=0.4)
    halves = torch.cat([loss_weights(LOSSES[:2], "linupper", r=0.4), loss_weights(LOSSES[2:], "linupper", r=0.4)]) / 2
    assert (whole - halves).abs().max() > 0.1
    h = 2 * (LOSSES - 1) / 4 - 1
    assert (torch.softmax(h, 0) - uniform()(LOSSES, 0)).abs().max() > 0.1


def test_an_outlier_takes_most_of_the_weight_unless_clipped() -> None:
    losses = torch.tensor([1.1, 1.2, 1.3, 1.2, 50.0])
    assert loss_weights(losses, "linupper", r=0.4)[4] == pytest.approx(0.75, abs=0.01)
    assert loss_weights(losses, "linupper", r=0.4, clip_quantile=0.75)[4] < 0.5


def test_schedules_and_burn_in() -> None:
    assert [warmup(0.4, 2)(s) for s in range(4)] == [100.0, 100.0, 0.4, 0.4]
    assert constant(2.0)(7) == 2.0
    weighting = linupper(r=warmup(0.4, 2), burn_in_steps=1)
    assert [weighting.temperature(s) for s in range(3)] == [None, 100.0, 0.4]
    assert not weighting.needs_losses(0)
    assert weighting.needs_losses(1)
    assert torch.equal(weighting(LOSSES, 0), torch.full((4,), 0.25, dtype=torch.float64))
    assert not linupper(r=None).needs_losses(5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: loss_weights(LOSSES, "linupper", r=0), r"r must be > 0.*got 0"),
        (lambda: loss_weights(LOSSES, "linupper", r=math.nan), "r must be > 0"),
        (lambda: linupper(r=-1), "r must be > 0, got -1"),
        (lambda: warmup(0.4, r_initial=0), "r_initial must be > 0"),
        (lambda: loss_weights(LOSSES, "linuper"), "unknown strategy 'linuper': did you mean 'linupper'"),
        (lambda: loss_weights(LOSSES[None]), r"one dimension.*\(1, 4\)"),
        (lambda: loss_weights(LOSSES[:0]), "at least one example"),
        (lambda: loss_weights(torch.tensor([1.0, math.nan, 2.0])), r"examples \[1\] are \[nan\]"),
        (lambda: loss_weights(torch.tensor([1.0, math.inf])), r"examples \[1\] are \[inf\]"),
        (lambda: linupper(burn_in_steps=-1), "burn_in_steps must be >= 0"),
        (lambda: quadratic(delta=0), "delta must be"),
        (lambda: extremes(clip_quantile=0.2), "clip_quantile must be"),
        (lambda: linupper(variant="paper"), "unknown variant 'paper'"),
    ],
)
def test_bad_input_is_one_clear_sentence(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


def test_a_batch_of_one_has_weight_one_and_warns() -> None:
    with pytest.warns(UserWarning, match="batch of one example has no effect"):
        assert LossWeighting()(torch.tensor([3.0]), 0).tolist() == [1.0]


def test_statistics_of_uniform_and_concentrated_weights() -> None:
    even = weight_statistics(LOSSES, torch.full((4,), 0.25))
    assert (even.effective_sample_size, even.largest_relative_weight) == (4.0, 1.0)
    one = weight_statistics(LOSSES, torch.tensor([0.0, 0.0, 0.0, 1.0]))
    assert (one.effective_sample_size, one.largest_relative_weight) == (1.0, 4.0)
    assert (one.loss_min, one.loss_mean, one.loss_max) == (1.0, 2.75, 5.0)
