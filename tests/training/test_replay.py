"""The adaptive off-policy schedule."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from lossmith.errors import InputError
from lossmith.training import ReplaySchedule


def shares(schedule: ReplaySchedule, number: int = 4000) -> dict[str, float]:
    torch.manual_seed(0)
    counts = Counter(schedule.choose() for _ in range(number))
    return {name: counts[name] / number for name in ("generate", "replay", "dataset")}


def test_with_an_unfilled_buffer_the_threshold_is_the_share_that_is_generated() -> None:
    found = shares(ReplaySchedule(0.3))
    assert found["generate"] == pytest.approx(0.3, abs=0.03)
    assert found["replay"] == 0


def test_with_a_full_buffer_less_is_generated_towards_the_end() -> None:
    schedule = ReplaySchedule(0.6, capacity=1)
    schedule.add([[1]], [[2]])
    schedule.progress = 0.75
    found = shares(schedule)
    assert found["generate"] == pytest.approx(0.15, abs=0.03)
    assert found["replay"] == pytest.approx(0.45, abs=0.03)
    assert found["dataset"] == pytest.approx(0.4, abs=0.03)


def test_the_threshold_grows_when_validation_gets_worse_by_more_than_the_tolerance() -> None:
    schedule = ReplaySchedule(0.0)
    for loss in (3.0, 2.0, 2.05):
        schedule.observe(loss)
    assert schedule.threshold == 0
    schedule.observe(2.1)
    assert schedule.threshold == pytest.approx(0.1)
    for _ in range(20):
        schedule.observe(9.0)
    assert schedule.threshold == 1


def test_the_buffer_forgets_the_oldest_and_gives_any_number() -> None:
    schedule = ReplaySchedule(capacity=3)
    schedule.add([[i] for i in range(5)], [[10 + i] for i in range(5)])
    prompts, responses = schedule.draw(3)
    assert sorted(prompts) == [[2], [3], [4]]
    assert [[p[0] + 10] for p in prompts] == responses
    assert len(schedule.draw(7)[0]) == 7
    with pytest.raises(ValueError, match="the buffer is empty"):
        ReplaySchedule().draw(1)


def test_bad_options_are_named() -> None:
    for options, message in (
        ({"threshold": 1.5}, "threshold must lie between 0 and 1, got 1.5"),
        ({"capacity": 0}, "capacity must be at least 1, got 0"),
        ({"tolerance": -1.0}, "tolerance be a finite number >= 0"),
    ):
        with pytest.raises(InputError, match=message):
            ReplaySchedule(**options)  # type: ignore[arg-type]
