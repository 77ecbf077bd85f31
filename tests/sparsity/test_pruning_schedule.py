"""When weights are pruned: published schedules, closed forms, and the tiny example by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lossmith.sparsity import PruningSchedule, average_density, step_fractions, steps_for_compute

# Steps, start, end, sparsity, interval; compute shares before start and end, average density.
PUBLISHED = [
    (25_050, 2_500, 12_600, 0.8, 100, 0.2500, 0.7510, 0.39921),
    (13_050, 2_500, 8_875, 0.4, 25, 0.2501, 0.7494, 0.7660),
    (72_200, 12_500, 47_200, 0.5, 100, 0.2499, 0.7501, 0.69291),
    (26_800, 4_100, 16_600, 0.6, 100, 0.2506, 0.7506, 0.61047),
]

TABLE = [
    (0.2, 0.223143, 0.721072, 0.892571),
    (0.4, 0.191542, 0.680764, 0.766167),
    (0.5, 0.173233, 0.653535, 0.692930),
    (0.6, 0.152572, 0.618571, 0.610286),
    (0.8, 0.099765, 0.501177, 0.399058),
]


@pytest.mark.parametrize("steps, start, end, sparsity, interval, before, until, average", PUBLISHED)
def test_published_schedules_prune_from_a_quarter_to_three_quarters_of_the_compute(
    steps: int, start: int, end: int, sparsity: float, interval: int, before: float, until: float, average: float
) -> None:
    schedule = PruningSchedule(steps, sparsity, start, end, interval)
    assert schedule.compute_before(start) == pytest.approx(before, abs=6e-5)
    assert schedule.compute_before(end) == pytest.approx(until, abs=6e-5)
    assert schedule.average_density == pytest.approx(average, abs=5e-5)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_the_rule_finds_the_published_steps(index: int) -> None:
    steps, start, end, sparsity, interval = PUBLISHED[index][:5]
    found = PruningSchedule.from_compute(steps, sparsity, interval=interval)
    assert (found.start, found.end) == (start, end)


@pytest.mark.parametrize("sparsity, start, end, average", TABLE)
def test_closed_forms_match_the_table(sparsity: float, start: float, end: float, average: float) -> None:
    assert step_fractions(sparsity) == pytest.approx((start, end), abs=5e-7)
    assert average_density(sparsity) == pytest.approx(average, abs=5e-7)


def test_without_pruning_shares_of_compute_are_shares_of_steps() -> None:
    assert step_fractions(0.0) == pytest.approx((0.25, 0.75))
    assert step_fractions(1e-9) == pytest.approx((0.25, 0.75))
    assert average_density(0.0) == 1
    assert average_density(1e-12) == pytest.approx(1, abs=1e-11)
    dense = PruningSchedule(100, 0.0, 25, 75, 10)
    assert dense.prunings == 0
    assert dense.average_density == 1
    assert dense.average_parameters(1000) == 1000
    assert not any(dense.prunes_before(step) for step in range(100))


def test_the_tiny_schedule_by_hand() -> None:
    schedule = PruningSchedule(20, 0.5, 5, 15, 5)
    assert schedule.prunings == 3
    assert [step for step in range(20) if schedule.prunes_before(step)] == [5, 10, 15]
    assert [schedule.density(step) for step in (4, 5, 10, 15)] == pytest.approx([1, 0.7937005, 0.6299605, 0.5])
    assert schedule.average_parameters(1000) == (5 * 1000 + 5 * 793 + 5 * 629 + 5 * 500) / 20 == 730.5


@given(
    steps=st.integers(1, 400),
    sparsity=st.floats(0, 0.99),
    start=st.floats(0, 0.9),
    width=st.floats(0.01, 1),
    interval=st.none() | st.integers(1, 60),
)
def test_any_rounded_schedule_holds_together(
    steps: int, sparsity: float, start: float, width: float, interval: int | None
) -> None:
    schedule = PruningSchedule.from_compute(
        steps, sparsity, start=start, end=min(start + width, 1.0), interval=interval
    )
    densities = [schedule.density(step) for step in range(steps)]
    # Sums by hand, densities that fall at prunings only, and the sparsity reached.
    assert schedule.average_density == pytest.approx(math.fsum(densities) / steps, rel=1e-12)
    changes = [step for step in range(steps) if densities[step] != (densities[step - 1] if step else 1.0)]
    if sparsity > 1e-6:
        assert changes == [step for step in range(steps) if schedule.prunes_before(step)]
        assert len(changes) == schedule.prunings
        assert densities[-1] == 1 - sparsity
    half = steps // 2
    assert schedule.compute_before(half) == pytest.approx(math.fsum(densities[:half]) / math.fsum(densities), rel=1e-9)


def test_long_runs_meet_the_closed_form() -> None:
    for sparsity in (0.2, 0.5, 0.8, 0.95):
        schedule = PruningSchedule.from_compute(1_000_000, sparsity, interval=100)
        assert schedule.average_density == pytest.approx(average_density(sparsity), rel=1e-3)
        assert schedule.compute_before(schedule.start) == pytest.approx(0.25, abs=1e-3)
        assert schedule.compute_before(schedule.end) == pytest.approx(0.75, abs=1e-3)


def test_steps_for_a_budget_spend_it() -> None:
    steps = steps_for_compute(6e15, 1e6, 0.8, tokens_per_step=1000)
    average = average_density(0.8) * 1e6
    assert 6 * average * steps * 1000 == pytest.approx(6e15, rel=1e-3)


@pytest.mark.parametrize("sparsity", [1.0, -0.1, 80, float("nan"), True, "0.5"])
def test_a_sparsity_outside_its_range_is_refused(sparsity: object) -> None:
    with pytest.raises(ValueError, match=r"sparsity must be a number in \[0, 1\)"):
        step_fractions(sparsity)  # type: ignore[arg-type]


@pytest.mark.parametrize("start, end", [(0.75, 0.25), (0.5, 0.5), (-0.1, 0.5), (0.2, 1.5)])
def test_a_start_that_is_not_before_the_end_is_refused(start: float, end: float) -> None:
    with pytest.raises(ValueError, match="0 <= start < end <= 1"):
        average_density(0.5, start=start, end=end)


def test_an_interval_that_does_not_divide_is_refused_with_an_offer() -> None:
    with pytest.raises(ValueError, match="interval 100 does not divide the 6375 steps from start to end; end 8800"):
        PruningSchedule(13_050, 0.4, 2_500, 8_875, 100)
    with pytest.raises(ValueError, match="0 <= start <= end < steps"):
        PruningSchedule(100, 0.4, 50, 100, 10)
    with pytest.raises(TypeError, match="steps must be a whole number"):
        PruningSchedule(100.0, 0.4, 50, 60, 10)  # type: ignore[arg-type]
