"""Selection by loss difference: the digest's vectors, nesting, ties, exact shares."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lossmith.data import (
    NgramImportance,
    color_filter_scores,
    resampling_scores,
    rho_down,
    select_at_random,
    select_lowest,
    selection_cost,
)

MARGINAL = [(2, 3, 1), (1, 1, 1), (4, 4), (0.5, 2.5, 3), (2.2, 2.2, 2.2), (3,)]
CONDITIONAL = [(1.5, 2, 1), (1.2, 1.1, 1), (3, 4.2), (0.5, 2, 2.9), (2.2, 2.2, 2.2), (2.6,)]
A, B, N = [sum(r) for r in MARGINAL], [sum(r) for r in CONDITIONAL], [len(r) for r in MARGINAL]


def order(scores: np.ndarray) -> list[int]:
    # Sums of decimals differ in the last bit, which would break ties.
    return select_lowest(np.round(scores, 12), keep=1).tolist()


def test_the_sign_and_both_normalisations_are_those_of_the_hand_computed_vector() -> None:
    token, total = color_filter_scores(A, B, N), color_filter_scores(A, B, N, normalize="sum")
    assert token == pytest.approx([-0.5, 0.1, -0.4, -0.2, 0, -0.4], abs=1e-12)
    assert total == pytest.approx([-1.5, 0.3, -0.8, -0.6, 0, -0.4], abs=1e-12)
    assert order(token) == [0, 2, 5, 3, 4, 1]
    assert order(total) == [0, 2, 3, 5, 4, 1]
    assert order(np.divide(B, N)) == [1, 0, 3, 4, 5, 2]
    rounded = np.round(token, 12)
    assert [sorted(select_lowest(rounded, tau=tau).tolist()) for tau in (2, 3, 1)] == [
        [0, 2, 5],
        [0, 2],
        list(range(6)),
    ]


def test_equal_models_give_zero_and_a_constant_marginal_ranks_as_conditional_only() -> None:
    assert not color_filter_scores(A, A, N).any()
    nats = np.random.default_rng(0).random(50) * 9
    tokens = np.full(50, 7)
    assert order(color_filter_scores(tokens * np.log(300), nats, tokens)) == order(nats / tokens)


def test_shift_and_scale_change_nothing_and_selections_are_nested() -> None:
    scores = np.random.default_rng(1).normal(size=480)
    chosen = {tau: set(select_lowest(scores, tau=tau).tolist()) for tau in (16, 8, 2)}
    assert chosen[16] < chosen[8] < chosen[2]
    assert set(select_lowest(3 * scores + 5, tau=8).tolist()) == chosen[8]


@pytest.mark.parametrize(("candidates", "tau", "kept"), [(98, 49, 2), (147, 49, 3), (10, 3, 3), (7, 2.5, 2)])
def test_the_number_kept_is_exact_where_floating_point_is_off_by_one(candidates: int, tau: float, kept: int) -> None:
    assert len(select_lowest(np.arange(candidates), tau=tau)) == kept
    assert len(select_lowest(np.arange(100), keep=0.29)) == 29


def test_batchwise_keeps_the_best_of_each_batch() -> None:
    assert select_lowest([5, 1, 3, 9, 8, 7, 0], keep=0.5, batch=4).tolist() == [1, 2, 6]


@pytest.mark.parametrize(
    ("scores", "options", "match"),
    [
        ([1.0] * 5, {"tau": 6}, "at least 6"),
        ([1.0], {"tau": 0.5}, "at least 1"),
        ([1.0], {"keep": 0.0}, r"\(0, 1\]"),
        ([1.0], {"keep": float("nan")}, r"\(0, 1\]"),
        ([1.0], {"number": 2}, "1 candidates"),
        ([1.0], {}, "exactly one"),
        ([1.0, float("nan")], {"keep": 1}, "1 of 2 scores are NaN, the first at index 1"),
        ([[1.0]], {"keep": 1}, "one number per candidate"),
        ([], {"keep": 1}, "nothing is left"),
        ([1.0], {"number": 1, "batch": 1}, "batch needs"),
        ([1.0], {"keep": 1, "batch": 0}, "batch must be"),
    ],
)
def test_what_cannot_be_selected_is_one_sentence(scores: Any, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        select_lowest(scores, **options)


def test_scores_of_other_lengths_or_without_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="one length"):
        color_filter_scores(A, B[:3], N)
    with pytest.raises(ValueError, match="at least 1 predicted"):
        color_filter_scores([1.0], [1.0], [0])
    with pytest.raises(ValueError, match="did you mean 'token'"):
        color_filter_scores(A, B, N, normalize="tokens")


def test_costs_are_those_of_the_paper() -> None:
    assert selection_cost("color-filter", kept=1.5, prior=3.1, tau=16, ratio=5.5) == 82.05
    assert selection_cost("random", kept=25, ratio=5.5) == 412.5
    assert selection_cost("rho-down", kept=3, tau=16, ratio=5.5) == 2 * 48 + 6 + 49.5
    with pytest.raises(ValueError, match="unknown method"):
        selection_cost("rho", kept=1)


def test_rho_down_follows_the_learner_and_looks_at_nothing_twice() -> None:
    losses = np.zeros(40)
    looked: list[int] = []

    def learner(chosen: np.ndarray) -> np.ndarray:
        looked.extend(chosen.tolist())
        return losses[chosen]

    def learn(chosen: np.ndarray) -> None:
        losses[:20] -= 100  # from now on the others have more to give

    kept = rho_down(np.arange(40.0), learner, learn, number=10, batch_size=5, tau=4, seed=3)
    assert len(set(kept.tolist())) == 10
    assert sorted(looked) == list(range(40))
    first, second = looked[:20], looked[20:]
    assert kept[:5].tolist() == sorted(first)[:5]
    assert kept[5:].tolist() == sorted(second, key=lambda i: (i < 20, i))[:5]
    with pytest.raises(ValueError, match="need 44 candidates"):
        rho_down(np.arange(40.0), learner, learn, number=11, batch_size=5, tau=4)


def test_random_selection_is_nested_and_seeded() -> None:
    few, many = select_at_random(1000, 10, seed=4), select_at_random(1000, 80, seed=4)
    assert many[:10].tolist() == few.tolist()
    assert few.tolist() != select_at_random(1000, 10, seed=5).tolist()


def test_ngram_importance_equals_its_formula_and_resampling_follows_the_weights() -> None:
    """One bucket per word here: log of smoothed frequencies, by hand."""
    importance = NgramImportance.fit(["sea sea poem"], ["x x x sea"], buckets=1009, order=1)
    sea = np.log(3 / (3 + 1009)) - np.log(2 / (4 + 1009))
    assert importance.log_weights(["sea", "sea sea", ""]) == pytest.approx([sea, 2 * sea, 0])
    weights = np.log([0.1, 0.2, 0.3, 0.4])
    first = [int(resampling_scores(weights, seed=s).argmin()) for s in range(4000)]
    # Four standard deviations of a share of 4000 draws.
    assert np.bincount(first) / 4000 == pytest.approx([0.1, 0.2, 0.3, 0.4], abs=0.031)
