"""Shares of a mixture are kept at every moment, and orders can be compared and resumed."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lossmith.data import MixtureSampler
from lossmith.errors import InputError


def draw(shares: list[float], total: int = 400, seed: int = 0, **options: Any) -> np.ndarray:
    parts = [range(1000 * k, 1000 * k + 50 + 7 * k) for k in range(len(shares))]
    return np.array(list(MixtureSampler(parts, shares, total=total, seed=seed, **options)))


@pytest.mark.parametrize("share", [0.0, 0.125, 1 / 3, 0.5, 0.9, 1.0])
def test_two_parts_are_never_an_example_away_from_their_shares(share: float) -> None:
    from_domain = np.cumsum(draw([1 - share, share]) >= 1000)
    assert np.abs(from_domain - share * np.arange(1, 401)).max() <= 0.5 + 1e-9


def test_every_batch_of_eight_has_exactly_two_examples_of_a_quarter() -> None:
    per_batch = (draw([0.75, 0.25]) >= 1000).reshape(-1, 8).sum(1)
    assert (per_batch == 2).all()


@given(st.lists(st.integers(1, 20), min_size=2, max_size=6))
def test_several_parts_stay_near_their_shares(weights: list[int]) -> None:
    shares = [w / sum(weights) for w in weights]
    drawn = draw(shares) // 1000
    for part, share in enumerate(shares):
        assert np.abs(np.cumsum(drawn == part) - share * np.arange(1, 401)).max() < len(shares)


def test_shares_are_of_tokens_where_lengths_are_given() -> None:
    lengths = np.where(np.arange(2000) < 1000, 100, 20)
    drawn = draw([0.5, 0.5], lengths=lengths)
    tokens = lengths[drawn]
    share = tokens[drawn >= 1000].sum() / tokens.sum()
    assert share == pytest.approx(0.5, abs=100 / tokens.sum())
    assert (drawn >= 1000).sum() == pytest.approx(5 * (drawn < 1000).sum(), rel=0.02)


def test_examples_of_a_part_come_in_the_same_order_whatever_the_shares() -> None:
    few, many = draw([0.75, 0.25]), draw([0.25, 0.75])
    for part in (0, 1):
        one, other = few[few // 1000 == part], many[many // 1000 == part]
        assert (one[:90] == other[:90]).all()


def test_a_part_is_passed_through_whole_before_an_example_comes_again() -> None:
    drawn = draw([0.5, 0.5])
    first = drawn[drawn < 1000]
    assert sorted(first[:50]) == list(range(50))
    assert sorted(first[50:100]) == list(range(50))
    assert (first[:50] != first[50:100]).any()


def test_the_same_seed_gives_the_same_order_again_and_another_seed_another() -> None:
    assert (draw([0.5, 0.5]) == draw([0.5, 0.5])).all()
    assert (draw([0.5, 0.5]) != draw([0.5, 0.5], seed=1)).any()
    sampler = MixtureSampler([range(9), range(9, 20)], [0.3, 0.7], total=60, seed=2)
    # A resumed run skips what it has seen.
    assert list(islice(sampler, 30, None)) == list(sampler)[30:]
    assert len(sampler) == len(list(sampler)) == 60


@pytest.mark.parametrize(
    ("parts", "shares", "options", "message"),
    [
        ([range(3)], [0.5, 0.5], {}, "1 parts but 2 shares"),
        ([], [], {}, "0 parts"),
        ([range(3), range(3, 6)], [0.5, 0.6], {}, "sum to 1"),
        ([range(3), range(3, 6)], [-0.5, 1.5], {}, "between 0 and 1"),
        ([range(3), range(3, 6)], [float("nan"), 1.0], {}, "between 0 and 1"),
        ([range(3), []], [0.5, 0.5], {}, "part 2 has share 0.5 but no examples"),
        ([range(3), range(3, 6)], [0.5, 0.5], {"lengths": [1, 1, 1]}, "lengths has 3 entries"),
        ([range(3), range(3, 6)], [0.5, 0.5], {"lengths": [1, 1, 1, 0, 1, 1]}, "lengths must be positive"),
    ],
)
def test_shares_and_parts_that_do_not_fit_are_refused(
    parts: Any, shares: list[float], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        MixtureSampler(parts, shares, total=4, seed=0, **options)


def test_a_part_without_a_share_may_be_empty() -> None:
    assert list(MixtureSampler([range(2), []], [1.0, 0.0], total=2, seed=0))
