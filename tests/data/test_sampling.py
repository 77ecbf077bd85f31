"""Draws of domains: frequencies, schedules, orders that can be compared and resumed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from lossmith.data import Cooldown, DomainSampler, TemperatureSampler, temperature_probabilities, unimax_probabilities
from lossmith.data.sampling import (
    Sampling,
    TemperatureSampling,
    domain_parts,
    domains_of,
    shuffled,
    temperature,
    unimax,
)
from lossmith.errors import InputError
from lossmith.registry import SAMPLERS

SIZES = (9000, 900, 100)
PARTS = np.split(np.arange(sum(SIZES)), np.cumsum(SIZES)[:-1])
DOMAIN_OF = np.repeat(np.arange(3), SIZES)
ROWS = datasets.Dataset.from_dict({"domain": DOMAIN_OF})


def draw(tau: Any, total: int = 40_000, batch_size: int = 40, seed: int = 0) -> np.ndarray:
    return np.array(list(TemperatureSampler(PARTS, tau, total=total, batch_size=batch_size, seed=seed)))


def check_frequencies(drawn: np.ndarray, tau: float) -> None:
    """Within 4 standard errors of the probabilities: wrong in 1 of 5000 fixed draws."""
    expected = temperature_probabilities(SIZES, tau).numpy()
    found = np.bincount(DOMAIN_OF[drawn], minlength=3) / len(drawn)
    assert (np.abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / len(drawn))).all()


@pytest.mark.parametrize("tau", [1, 2, 5, 100, math.inf])
def test_domains_are_drawn_as_often_as_the_temperature_says(tau: float) -> None:
    check_frequencies(draw(tau), tau)


def test_the_switch_comes_exactly_at_its_step() -> None:
    switched, hot, cold = draw(Cooldown(5, 1, switch=0.5)), draw(5), draw(1)
    check_frequencies(switched[:20_000], 5)
    check_frequencies(switched[20_000:], 1)
    assert (switched[:20_000] == hot[:20_000]).all()
    # Behind it the domains are those of a run that was cold all along.
    assert (DOMAIN_OF[switched[20_000:]] == DOMAIN_OF[cold[20_000:]]).all()
    assert (DOMAIN_OF[switched[19_960:20_000]] != DOMAIN_OF[cold[19_960:20_000]]).any()


def test_gradual_decays_pass_through_every_temperature() -> None:
    linear = draw(Cooldown(5, 1, switch=1000 // 2, decay="linear"))
    share = (DOMAIN_OF[linear] > 0).reshape(4, -1).mean(1)
    assert share[0] > share[1] > share[2] == pytest.approx(0.1, abs=0.02)


def test_the_order_within_a_domain_goes_on_over_the_switch_and_does_not_depend_on_the_temperature() -> None:
    runs = [draw(tau, 4000) for tau in (1, 5, Cooldown(5, 1), Cooldown(1, 5))]
    for domain in range(3):
        orders = [run[DOMAIN_OF[run] == domain] for run in runs]
        for order in orders[1:]:
            both = min(len(orders[0]), len(order))
            assert (orders[0][:both] == order[:both]).all()


def test_a_domain_is_passed_through_whole_before_an_example_comes_again() -> None:
    drawn = draw(math.inf)
    small = drawn[DOMAIN_OF[drawn] == 2]
    passes = [small[i : i + 100] for i in range(0, len(small) - 99, 100)]
    assert all(sorted(one) == list(PARTS[2]) for one in passes)
    assert (passes[0] != passes[1]).any()


def test_runs_at_neighbouring_temperatures_draw_nearly_the_same_domains() -> None:
    apart = (DOMAIN_OF[draw(5)] != DOMAIN_OF[draw(5.2)]).mean()
    least = float((temperature_probabilities(SIZES, 5) - temperature_probabilities(SIZES, 5.2)).abs().sum() / 2)
    assert apart < 3 * least


def test_counts_and_passes_are_those_of_the_draws() -> None:
    sampler = TemperatureSampler(PARTS, Cooldown(5, 1), total=12_345, batch_size=7, seed=3)
    drawn = DOMAIN_OF[list(sampler)]
    assert len(drawn) == len(sampler) == 12_345
    assert sampler.counts().tolist() == np.bincount(drawn).tolist()
    assert sampler.passes() == pytest.approx(np.bincount(drawn) / SIZES)
    # Steps, batch size and processes' shares are what the same numbers are cut into.
    assert list(sampler) == list(sampler)
    torch.rand(3)
    assert list(TemperatureSampler(PARTS, Cooldown(5, 1), total=12_345, batch_size=7, seed=3)) == list(sampler)
    assert list(TemperatureSampler(PARTS, Cooldown(5, 1), total=12_345, batch_size=7, seed=4)) != list(sampler)


def test_a_domain_without_probability_is_never_drawn() -> None:
    sampler = DomainSampler(PARTS, lambda step: [0.0, 1.0, 0.0], total=5000, seed=1)
    assert sampler.counts().tolist() == [0, 5000, 0]


def test_unimax_is_even_but_for_the_domains_that_would_repeat_too_often() -> None:
    assert unimax_probabilities([1000, 100, 10], 200, epochs=3).tolist() == pytest.approx([0.425, 0.425, 0.15])
    assert unimax_probabilities([1000, 100, 10], 10_000, epochs=1).tolist() == pytest.approx(
        [1000 / 1110, 100 / 1110, 10 / 1110]
    )
    assert unimax_probabilities([5, 5], 4, epochs=9).tolist() == [0.5, 0.5]
    sampler = unimax(epochs=2).draw(ROWS, steps=100, batch_size=40, seed=0)
    assert sampler.passes()[2] == pytest.approx(2, abs=0.3)
    assert sampler.counts()[0] == pytest.approx(sampler.counts()[1] * 1900 / 1800, rel=0.2)


@pytest.mark.parametrize(
    "rows",
    [
        [{"domain": int(d)} for d in DOMAIN_OF],
        datasets.Dataset.from_dict({"text": [""] * len(DOMAIN_OF), "domain": DOMAIN_OF}),
    ],
    ids=["rows", "dataset"],
)
def test_domains_are_found_in_every_kind_of_data_set(rows: Any) -> None:
    assert all((a == b).all() for a, b in zip(domain_parts(domains_of(rows)), PARTS, strict=True))
    assert all((a == b).all() for a, b in zip(domain_parts(torch.tensor(DOMAIN_OF)), PARTS, strict=True))


def test_a_selection_of_a_data_set_has_its_own_domains() -> None:
    rows = datasets.Dataset.from_dict({"domain": DOMAIN_OF}).select([9999, 0, 9500])
    assert [part.tolist() for part in domain_parts(domains_of(rows))] == [[1], [2], [0]]


@pytest.mark.parametrize("name", SAMPLERS.names())
def test_every_sampler_draws_whole_steps_and_the_same_again(name: str) -> None:
    sampling = SAMPLERS.build(name)
    assert isinstance(sampling, Sampling)
    drawn = list(sampling.draw(ROWS, steps=11, batch_size=13, seed=5))
    assert len(drawn) == 143
    assert set(map(type, drawn)) == {int}
    assert set(drawn) <= set(range(len(DOMAIN_OF)))
    assert drawn == list(sampling.draw(ROWS, steps=11, batch_size=13, seed=5))


@pytest.mark.parametrize(
    ("parts", "options", "message"),
    [
        ([], {}, "at least one domain"),
        ([range(3), range(0)], {}, "domain 1 has no examples"),
        ([range(3), range(3, 5)], {"batch_size": 0}, "batch_size"),
        ([range(3), range(3, 5)], {"tau": 0}, "> 0"),
        ([range(3), range(3, 5)], {"tau": Cooldown(5, 1, switch=50)}, "only 10 steps"),
    ],
)
def test_what_cannot_be_drawn_is_refused(parts: Sequence[Any], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TemperatureSampler(parts, **{"tau": 5.0, "total": 10, **options})


def test_one_domain_alone_is_noted() -> None:
    with pytest.warns(UserWarning, match="only one domain"):
        assert sorted(TemperatureSampler([range(5)], 5, total=5)) == list(range(5))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (datasets.Dataset.from_dict({"text": ["a"]}), "column 'domain'"),
        ([{"text": "a"}], "every row"),
        (range(5), "every row"),
        ([], "whole number"),
    ],
)
def test_data_without_domains_is_refused(rows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        temperature(5).draw(rows, steps=2, batch_size=2, seed=0)


@pytest.mark.parametrize("domains", [[0.5, 1.0], [-1, 0], [[0], [1]], []])
def test_domains_that_are_no_numbers_are_refused(domains: list) -> None:
    with pytest.raises(ValueError, match="one whole number >= 0 per example"):
        TemperatureSampling(5, domains).draw(range(2), steps=2, batch_size=2, seed=0)


def test_names_with_options() -> None:
    assert SAMPLERS.build("temperature(tau=5 -> 1, switch=20, decay=linear)").tau == Cooldown(5, 1, 20, "linear")
    assert SAMPLERS.build("temperature").tau == 5
    assert SAMPLERS.build("shuffled") == shuffled()
    for text, message in [
        ("temperature(tau=5, switch=0.5)", "belong to a schedule"),
        ("temperature(tau=5 -> x)", "from one number to another"),
        ("temperature(tau=high)", "must be a number"),
        ("temprature", "did you mean 'temperature'"),
        ("unimax(epochs=-1)", "epochs must be"),
    ]:
        with pytest.raises(InputError, match=message):
            SAMPLERS.build(text)
