"""Predictive strength: the digest's numbers, its identities, and what chooses by it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau

from lossmith.data import (
    Document,
    bits_per_character,
    character_threshold,
    predictive_strength,
    sample_documents,
    strength_labels,
)
from lossmith.errors import InputError

# Four models, five documents; the second document ties all, the fourth two of them.
BENCHMARK = [0.3, 0.5, 0.4, 0.9]
LOSSES = np.array(
    [[1, 0.9, 0.8, 0.7, 0.5], [0.8, 0.9, 1, 0.6, 0.5], [0.9, 0.9, 0.9, 0.7, 0.5], [0.5, 0.9, 1.1, 0.2, 0.6]]
)


def slow_strength(losses: np.ndarray, benchmark: np.ndarray, tie: float) -> np.ndarray:
    """Equation 2 as it stands."""
    n, found = len(benchmark), np.zeros(losses.shape[1])
    for d in range(losses.shape[1]):
        for i in range(n):
            for j in range(n):
                if benchmark[i] < benchmark[j]:
                    found[d] += 1.0 if losses[i, d] > losses[j, d] else tie * (losses[i, d] == losses[j, d])
    return found / (n * (n - 1) / 2)


def test_the_worked_example() -> None:
    assert predictive_strength(LOSSES, BENCHMARK).tolist() == [1.0, 0.0, 0.0, 5 / 6, 0.0]


def test_half_ties_are_kendalls_tau_b_numerator() -> None:
    half = predictive_strength(LOSSES, BENCHMARK, ties="half")
    assert half.tolist() == pytest.approx(slow_strength(LOSSES, np.array(BENCHMARK), 0.5).tolist(), abs=1e-15)
    assert half[1] == 0.5


@given(st.integers(0, 10**6), st.integers(2, 8))
def test_it_is_half_of_one_plus_kendalls_tau(seed: int, models: int) -> None:
    generator = np.random.default_rng(seed)
    losses, benchmark = generator.normal(size=(models, 9)), generator.normal(size=models)
    tau = [kendalltau(-losses[:, d], benchmark).statistic for d in range(9)]
    assert predictive_strength(losses, benchmark) == pytest.approx((1 + np.array(tau)) / 2, abs=1e-12)


@given(st.integers(0, 10**6))
def test_ties_count_as_in_the_equation_in_losses_and_in_the_benchmark(seed: int) -> None:
    generator = np.random.default_rng(seed)
    losses, benchmark = generator.integers(0, 4, (5, 12)).astype(float), generator.integers(0, 3, 5).astype(float)
    benchmark[0] = 7
    for ties, tie in (("strict", 0.0), ("half", 0.5)):
        expected = slow_strength(losses, benchmark, tie)
        assert predictive_strength(losses, benchmark, ties=ties) == pytest.approx(expected, abs=1e-15)


@given(st.integers(0, 10**6))
def test_only_orders_count(seed: int) -> None:
    generator = np.random.default_rng(seed)
    losses, benchmark = generator.uniform(0.5, 3, (6, 20)), generator.normal(size=6)
    there = predictive_strength(losses, benchmark)
    for changed in (np.exp(losses), losses * generator.uniform(0.1, 10, 20), losses**3 + 5):
        assert np.array_equal(predictive_strength(changed, benchmark), there)
    assert np.array_equal(predictive_strength(losses, np.exp(benchmark)), there)
    assert predictive_strength(losses, -benchmark) == pytest.approx(1 - there, abs=1e-15)
    order = generator.permutation(6)
    assert np.array_equal(predictive_strength(losses[order], benchmark[order]), there)


def test_two_models_say_yes_or_no_and_random_losses_average_one_half() -> None:
    generator = np.random.default_rng(0)
    assert set(predictive_strength(generator.normal(size=(2, 100)), [0, 1]).tolist()) == {0.0, 1.0}
    strength = predictive_strength(generator.normal(size=(6, 200_000)), range(6))
    assert strength.mean() == pytest.approx(0.5, abs=2e-3)  # standard error 5e-4
    assert (strength == 1).mean() == pytest.approx(1 / 720, abs=4e-4)  # standard error 8e-5
    assert len(set(strength.tolist())) == 16


def test_a_document_without_a_finite_loss_under_every_model_has_no_strength() -> None:
    losses = np.array([[2.0, np.nan, 2.0, np.inf], [1.0, 1.0, np.inf, 1.0]])
    strength = predictive_strength(losses, [0, 1])
    assert strength[0] == 1
    assert np.isnan(strength[1:]).all()
    assert predictive_strength(np.empty((2, 0)), [0, 1]).shape == (0,)


@pytest.mark.parametrize(
    ("losses", "benchmark", "match"),
    [
        (np.ones((1, 3)), [1.0], "at least 2 finite values that differ"),
        (np.ones((2, 3)), [1.0, 1.0], "at least 2 finite values that differ"),
        (np.ones((2, 3)), [1.0, np.nan], "at least 2 finite values"),
        (np.ones((2, 3)), [1.0, 2.0, 3.0], r"got \(2, 3\) and \(3,\)"),
        (np.ones(3), [1.0, 2.0, 3.0], r"losses must be \(models, documents\)"),
    ],
)
def test_what_has_no_strength_is_one_sentence(losses: np.ndarray, benchmark: list[float], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        predictive_strength(losses, benchmark)


def test_bits_per_character() -> None:
    assert bits_per_character([120.0], [100])[0] == pytest.approx(1.7312340490667562, abs=1e-15)
    assert bits_per_character(math.log(2) * np.ones((2, 3)), [1, 2, 4]).tolist() == [[1, 0.5, 0.25]] * 2
    with pytest.raises(ValueError, match="at least 1 character"):
        bits_per_character([1.0], [0])


def test_ties_and_positives_have_names() -> None:
    with pytest.raises(ValueError, match="unknown ties 'none'"):
        predictive_strength(LOSSES, BENCHMARK, ties="none")
    with pytest.raises(ValueError, match="did you mean 'perfect'"):
        strength_labels([0, 1], positives="perfct")


def test_negatives_are_filled_from_the_bottom_level_by_level() -> None:
    strength = np.array([1.0] * 5 + [0.0] * 3 + [1 / 15] * 4 + [0.5] * 20)
    labels = strength_labels(strength, seed=1)
    assert labels.positives.tolist() == [0, 1, 2, 3, 4]
    assert labels.negatives.tolist()[:3] == [5, 6, 7]
    assert len(labels.negatives) == 5
    assert set(labels.negatives.tolist()[3:]) <= {8, 9, 10, 11}
    drawn = {tuple(strength_labels(strength, seed=s).negatives.tolist()) for s in range(30)}
    assert len(drawn) == 6  # all pairs of 4
    assert labels.histogram == {0.0: 3, 1 / 15: 4, 0.5: 20, 1.0: 5}


def test_no_document_is_both_where_most_are_perfect() -> None:
    labels = strength_labels([1.0] * 8 + [0.5, 0.9])
    assert len(labels.positives) == 8
    assert labels.negatives.tolist() == [8, 9]


def test_without_a_perfect_document_it_warns_and_takes_quantiles() -> None:
    strength = np.repeat([0.2, 0.4, 0.6, 0.8], 5)
    with pytest.warns(UserWarning, match="no document ranks all models rightly .strength: 0.2: 5, 0.4: 5"):
        labels = strength_labels(strength, share=0.25)
    assert labels.rule == "quantile"
    assert (labels.positives.tolist(), labels.negatives.tolist()) == ([15, 16, 17, 18, 19], [0, 1, 2, 3, 4])


@pytest.mark.parametrize("strength", [[1.0] * 6, [0.0] * 6, [], [float("nan")] * 3])
def test_documents_that_cannot_be_told_apart_are_one_sentence_with_the_histogram(strength: list[float]) -> None:
    with pytest.raises(InputError, match=r"got (1: 6|0: 6|none at all) \(number of documents by strength\)"):
        strength_labels(strength)


@pytest.mark.parametrize(
    ("keep", "threshold", "kept"),
    [
        (0.1, 0.8, {0, 2}),
        (0.2, 0.7, {0, 2, 4}),
        (0.4, 0.7, {0, 2, 4}),
        (0.5, 0.2, {0, 1, 2, 3, 4}),
        (1, 0.2, {0, 1, 2, 3, 4}),
    ],
)
def test_the_budget_counts_characters_and_must_be_exceeded(keep: float, threshold: float, kept: set[int]) -> None:
    scores, lengths = np.array([0.9, 0.2, 0.8, 0.55, 0.7]), [100, 1000, 300, 50, 550]
    assert character_threshold(scores, lengths, keep) == threshold
    assert set(np.flatnonzero(scores >= threshold).tolist()) == kept


@pytest.mark.parametrize(
    ("scores", "lengths", "keep", "match"),
    [
        ([1.0], [1], 0.0, "keep must lie in"),
        ([1.0], [1], float("nan"), "keep must lie in"),
        ([], [], 0.5, "not empty"),
        ([1.0], [1, 2], 0.5, "one length"),
        ([float("nan")], [1], 0.5, "1 NaN"),
    ],
)
def test_a_budget_that_means_nothing_is_one_sentence(
    scores: list[float], lengths: list[int], keep: float, match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        character_threshold(scores, lengths, keep)


def test_the_sample_takes_as_many_of_each_frequent_domain() -> None:
    sizes = {"a": 500, "b": 300, "c": 7, "d": 2}
    corpus = [Document(f"{name}{i}", domain=name) for i in range(500) for name in sizes if i < sizes[name]]
    sample = sample_documents(lambda: corpus, 30, domains=3, seed=3)
    assert [index for index, _ in sample] == sorted({index for index, _ in sample})
    assert all(corpus[index] is document for index, document in sample)
    names = [document.domain for _, document in sample]
    assert {name: names.count(name) for name in sizes} == {"a": 10, "b": 10, "c": 7, "d": 0}
    assert sample == sample_documents(lambda: corpus, 30, domains=3, seed=3)
    few = [document.domain for _, document in sample_documents(lambda: corpus, 30, largest_share=0.3)]
    assert {name: few.count(name) for name in sizes} == {"a": 8, "b": 8, "c": 2, "d": 0}
    with pytest.raises(ValueError, match="at least 1"):
        sample_documents(lambda: corpus, 0)
    with pytest.raises(ValueError, match=r"largest_share must lie in \(0, 1\], got 0"):
        sample_documents(lambda: corpus, 1, largest_share=0)


def test_every_document_of_a_domain_is_as_likely() -> None:
    corpus = [Document(str(i)) for i in range(20)]
    counts = np.zeros(20)
    for seed in range(400):
        for index, _ in sample_documents(lambda: corpus, 5, seed=seed):
            counts[index] += 1
    assert counts.sum() == 2000
    assert (np.abs(counts - 100) < 45).all()  # five standard deviations of 8.7
