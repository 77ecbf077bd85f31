"""Probabilities, weights and schedules of temperature sampling, against the numbers of the research digest."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lossmith.data import Cooldown, scalarization_weights, temperature_probabilities, weight_second_moment
from lossmith.registry import parse_assignments, parse_spec

SIZES = [1_000_000, 10_000, 100]
sizes = st.lists(st.floats(1, 1e12), min_size=1, max_size=8)


def close(found: torch.Tensor, expected: list[float], tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("tau", "p", "w", "second"),
    [
        (1, [1e6 / 1010100, 1e4 / 1010100, 100 / 1010100], [1, 1, 1], 1),
        (2, [0.900900900901, 0.090090090090, 0.009009009009], [0.91, 9.1, 91], 2.459459459459),
        (
            5,
            [0.642427248521, 0.255754894195, 0.101817857283],
            [0.648915763731, 25.833801862669, 1028.462176418671],
            111.739817530540,
        ),
    ],
)
def test_probabilities_weights_and_second_moment_are_those_of_the_digest(
    tau: float, p: list[float], w: list[float], second: float
) -> None:
    close(temperature_probabilities(SIZES, tau), p)
    close(scalarization_weights(SIZES, tau), w)
    assert weight_second_moment(SIZES, tau) == pytest.approx(second, rel=1e-12)


def test_two_domains() -> None:
    close(temperature_probabilities([900, 100], 2), [0.75, 0.25])
    close(scalarization_weights([900, 100], 2), [5 / 6, 2.5])
    assert weight_second_moment([900, 100], 2) == pytest.approx(1.25, rel=1e-14)
    close(temperature_probabilities([900, 100], 5), [0.608126757269, 0.391873242731])
    assert weight_second_moment([900, 100], 5) == pytest.approx(1.946555442473, rel=1e-12)


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (0, [1, 1, 1]),
        (0.5, [1.035135, 1.085192, 1.105802]),
        (1, [1.161809, 1.403343, 1.503183]),
        (2, [1.806497, 3.821883, 4.822903]),
    ],
)
def test_second_moment_of_zipf_sizes(alpha: float, expected: list[float]) -> None:
    zipf = [1 / i**alpha for i in range(1, 11)]
    assert [weight_second_moment(zipf, tau) for tau in (2, 5, 10)] == pytest.approx(expected, abs=6e-7)


def test_a_temperature_of_a_hundred_is_not_quite_uniform_and_infinity_is() -> None:
    close(temperature_probabilities(SIZES, 100), [0.3488, 0.3331, 0.3181], 5e-5)
    close(temperature_probabilities(SIZES, math.inf), [1 / 3] * 3)


def test_sizes_beyond_the_range_of_float32_keep_their_digits() -> None:
    probabilities = temperature_probabilities([1e12, 1], 1)
    close(probabilities, [1 - 1e-12 / (1 + 1e-12), 1e-12 / (1 + 1e-12)])
    close(temperature_probabilities([1e300, 1e-300], 1000), temperature_probabilities([1e12, 1], 20).tolist())


@given(sizes, st.floats(1, 50), st.floats(1e-3, 1e3))
def test_weights_have_mean_one_and_probabilities_do_not_know_the_unit(
    sizes: list[float], tau: float, unit: float
) -> None:
    p, w = temperature_probabilities(sizes, 1), scalarization_weights(sizes, tau)
    assert float((p * w).sum()) == pytest.approx(1, rel=1e-12)
    scaled = temperature_probabilities([unit * size for size in sizes], tau)
    torch.testing.assert_close(scaled, temperature_probabilities(sizes, tau), rtol=1e-11, atol=0)


@given(sizes, st.floats(1, 30), st.floats(1, 30))
def test_theorem_3_the_second_moment_never_falls_with_the_temperature(
    sizes: list[float], one: float, other: float
) -> None:
    low, high = sorted((one, other))
    first, second = weight_second_moment(sizes, low), weight_second_moment(sizes, high)
    assert 1 - 1e-12 <= first <= second * (1 + 1e-12)
    # The closed form of its proof.
    x = torch.tensor(sizes, dtype=torch.float64).log() / high
    closed = (high * x).logsumexp(0) + ((2 - high) * x).logsumexp(0) - 2 * x.logsumexp(0)
    assert second == pytest.approx(float(closed.exp()), rel=1e-10)
    smallest = [float(temperature_probabilities(sizes, tau).min()) for tau in (low, high)]
    assert smallest[0] <= smallest[1] * (1 + 1e-12)


def test_the_second_moment_rises_strictly_where_sizes_differ_and_stays_one_where_they_are_equal() -> None:
    rising = [weight_second_moment([3, 2], tau) for tau in (1, 1.5, 2, 4, 8, math.inf)]
    assert all(a < b for a, b in pairwise(rising))
    assert weight_second_moment([7, 7, 7], math.inf) == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize(
    ("wrong", "tau", "message"),
    [
        ([], 5, "at least one"),
        ([[1, 2]], 5, "shape"),
        ([3, 0], 5, "domain 1 has 0"),
        ([3, -1], 5, "domain 1 has -1"),
        ([math.nan, 1], 5, "domain 0 has nan"),
        ([math.inf, 1], 5, "domain 0 has inf"),
        ([2, 1], 0, "must be > 0"),
        ([2, 1], -1, "must be > 0"),
        ([2, 1], math.nan, "must be > 0"),
    ],
)
def test_sizes_and_temperatures_out_of_range_are_refused(wrong: list, tau: float, message: str) -> None:
    for function in (temperature_probabilities, scalarization_weights, weight_second_moment):
        with pytest.raises(ValueError, match=message):
            function(wrong, tau)


def test_a_temperature_below_one_sharpens_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="large domains get more"):
        assert float(temperature_probabilities([900, 100], 0.5)[0]) > 0.9
    with pytest.raises(TypeError, match="schedule"):
        temperature_probabilities([2, 1], "5")  # type: ignore[arg-type]


def test_schedules() -> None:
    assert [Cooldown().at(step, 4) for step in range(4)] == [5, 5, 1, 1]
    assert [Cooldown(5, 1, switch=3).at(step) for step in range(5)] == [5, 5, 5, 1, 1]
    assert [Cooldown(1, 5, switch=0.25).at(step, 4) for step in range(4)] == [1, 5, 5, 5]
    assert [Cooldown(5, 1, 4, "linear").at(step) for step in range(6)] == [5, 4, 3, 2, 1, 1]
    cosine = [Cooldown(5, 1, 4, "cosine").at(step) for step in range(5)]
    assert cosine == pytest.approx([5, 3 + math.sqrt(2), 3, 3 - math.sqrt(2), 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"switch": 0}, "switch"),
        ({"switch": -3}, "switch"),
        ({"switch": 1.0}, "switch"),
        ({"switch": 2.5}, "switch"),
        ({"switch": math.nan}, "switch"),
        ({"start": 0}, "first temperature must be > 0"),
        ({"end": math.nan}, "last temperature must be > 0"),
        ({"decay": "cosin"}, "did you mean 'cosine'"),
        ({"start": math.inf, "decay": "linear"}, "finite"),
    ],
)
def test_schedules_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cooldown(**options)


def test_a_switch_after_the_last_step_is_refused_as_soon_as_their_number_is_known() -> None:
    with pytest.raises(ValueError, match="only 100 steps"):
        Cooldown(5, 1, switch=100).switch_step(100)
    with pytest.raises(ValueError, match="not known"):
        Cooldown(5, 1).at(0)


def test_an_arrow_is_a_cooldown() -> None:
    assert str(parse_spec("temperature(tau=5 -> 1, switch=0.3)")) == "temperature(tau=cooldown(5, 1), switch=0.3)"
    assert str(parse_spec("temperature(5->1)")) == str(parse_spec("temperature(cooldown(5, 1))"))
    arm = parse_assignments("sampler=temperature(tau=inf -> 1.5), model='a -> b'")
    assert str(arm["sampler"]) == "temperature(tau=cooldown(inf, 1.5))"
    assert arm["model"] == "a -> b"
