"""The areas S1 and S2: the identities of the research digest."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lossmith.laws import areas, warmup_steps
from lossmith.laws.schedules import cosine, wsd

RATES = arrays(np.float64, st.integers(1, 40), elements=st.floats(1e-6, 1e-2))
DECAY = st.floats(0.01, 0.999)


def double_sum(rates: np.ndarray, decay: float) -> np.ndarray:
    """S2 as it is printed: quadratic."""
    before = np.concatenate([rates[:1], rates[:-1]])
    drops = before - rates
    inner = [sum(drops[k] * decay ** (i - k) for k in range(i + 1)) for i in range(len(rates))]
    return np.cumsum(inner)


def test_the_hand_worked_example() -> None:
    rates = np.array([4, 4, 3, 3, 1, 1]) * 1e-3
    first, second = areas(rates, 0.9)
    np.testing.assert_allclose(first, [0.004, 0.008, 0.011, 0.014, 0.015, 0.016], rtol=1e-13)
    np.testing.assert_allclose(second, [0, 0, 0.001, 0.0019, 0.00471, 0.007239], rtol=1e-12, atol=1e-18)
    loss = 2.6 + 0.5 * first**-0.6 - 0.4 * second
    expected = [16.3320067913, 11.659745796, 10.0836105879, 9.075036354, 8.8113147887, 8.5743075237]
    np.testing.assert_allclose(loss, expected, rtol=1e-11)


@given(RATES, DECAY)
def test_the_filter_is_the_double_sum_and_the_averaged_rate(rates: np.ndarray, decay: float) -> None:
    second = areas(rates, decay)[1]
    np.testing.assert_allclose(second, double_sum(rates, decay), atol=1e-12)
    average, averages = rates[0], []
    for rate in rates:
        average = decay * average + (1 - decay) * rate
        averages.append(average)
    np.testing.assert_allclose(second, (rates[0] - np.array(averages)) / (1 - decay), atol=1e-12)


@given(st.floats(1e-6, 1e-2), st.integers(1, 50), DECAY)
def test_a_constant_rate_anneals_exactly_nothing(rate: float, steps: int, decay: float) -> None:
    assert not areas(np.full(steps, rate), decay)[1].any()


@given(RATES, DECAY, st.floats(0.1, 10))
def test_both_areas_scale_with_the_rate(rates: np.ndarray, decay: float, factor: float) -> None:
    for one, other in zip(areas(factor * rates, decay), areas(rates, decay), strict=True):
        np.testing.assert_allclose(one, factor * other, rtol=1e-9, atol=1e-14)


@given(RATES, DECAY)
def test_a_falling_rate_has_an_annealing_area_within_its_bounds(rates: np.ndarray, decay: float) -> None:
    falling = np.sort(rates)[::-1]
    second = areas(falling, decay)[1]
    assert (second >= -1e-15).all()
    assert (second <= (falling[0] - falling) / (1 - decay) * (1 + 1e-9) + 1e-15).all()


def test_a_single_drop_has_its_closed_form() -> None:
    rates, decay, drop, at = np.full(200, 3e-3), 0.95, 2e-3, 50
    rates[at - 1 :] -= drop
    after = np.arange(at, 201)
    np.testing.assert_allclose(
        areas(rates, decay)[1][at - 1 :], drop * (1 - decay ** (after - at + 1)) / (1 - decay), rtol=1e-12
    )


def test_without_memory_only_the_fall_counts() -> None:
    rates = cosine(1e-3, floor=1e-4).values(50)
    np.testing.assert_allclose(areas(rates, 1e-12)[1], rates[0] - rates, atol=1e-14)


def test_rewarming_lowers_the_annealing_area() -> None:
    rates = np.concatenate([np.linspace(1e-3, 1e-4, 100), np.full(100, 1e-3)])
    second = areas(rates, 0.98)[1]
    assert second[99] > 0
    assert (np.diff(second[100:]) < 0).all()
    assert second[-1] < 0.2 * second[99]


def test_the_realistic_example_with_its_warm_up_as_constant() -> None:
    rates = cosine(3e-4, warmup=2160, floor=3e-5).values(24000)
    begun = warmup_steps(rates)
    assert begun == 2160
    rates[:begun] = 3e-4
    first, second = areas(rates, 0.999)
    assert first[23999] == pytest.approx(4.251735, abs=1e-9)
    assert second[23999] == pytest.approx(0.2672645719, abs=1e-10)
    assert first[12000] == pytest.approx(3.1990453015, abs=1e-10)
    assert second[12000] == pytest.approx(0.0957562480, abs=1e-10)
    loss = 2.9071 + 0.5929 * first[23999] ** -0.7586 - 0.4687 * second[23999]
    assert loss == pytest.approx(2.97959887, abs=1e-8)


def test_many_schedules_and_decays_in_one_call() -> None:
    rates = np.stack([cosine(1e-3).values(300), wsd(1e-3).values(300)])
    decays = (0.9, 0.99, 0.999)
    first, second = areas(rates, decays)
    assert first.shape == (2, 300)
    assert second.shape == (3, 2, 300)
    for d, decay in enumerate(decays):
        for k in range(2):
            np.testing.assert_array_equal(second[d, k], areas(rates[k], decay)[1])


def test_a_long_cosine_anneals_by_its_fall_whatever_its_length() -> None:
    ends = [areas(cosine(1e-3, floor=1e-4).values(steps), 0.99)[1][-1] for steps in (20_000, 80_000)]
    np.testing.assert_allclose(ends, 9e-4 / 0.01, rtol=2e-3)


@pytest.mark.parametrize("decay", [0, 1, -0.5, 1.5, float("nan"), (0.9, 1.0)])
def test_a_decay_outside_its_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="inside"):
        areas(np.ones(3), decay)


def test_nothing_is_no_schedule() -> None:
    with pytest.raises(ValueError, match="list of numbers"):
        areas(np.zeros(0), 0.9)


def test_warm_up_ends_where_the_rate_first_stops_rising() -> None:
    assert warmup_steps(np.array([0, 1, 2, 2, 1.0])) == 2
    assert warmup_steps(np.array([3, 2, 5.0])) == 0
    assert warmup_steps(np.array([1.0, 2.0, 3.0])) == 2
    assert warmup_steps(np.array([1.0])) == 0
