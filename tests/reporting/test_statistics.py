from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lossmith.reporting import statistics as s
from lossmith.reporting.comparison import Claim, Run


def runs(**arms: list[float]) -> list[Run]:
    return [Run(arm, seed, {"loss": v}) for arm, values in arms.items() for seed, v in enumerate(values)]


def test_interval_equals_the_t_test_of_scipy():
    differences = [-0.3, -0.1, 0.05, -0.2, -0.4]
    ours = s.paired_interval(differences, level=0.9)
    theirs = stats.ttest_1samp(differences, 0.0)
    low, high = theirs.confidence_interval(0.9)
    assert (ours.estimate, ours.low, ours.high) == pytest.approx((np.mean(differences), low, high), rel=1e-12)
    assert ours.sd == pytest.approx(np.std(differences, ddof=1), rel=1e-12)
    assert s.paired_p_value(differences) == pytest.approx(theirs.pvalue, rel=1e-10)


def test_two_pairs_have_the_closed_form_of_one_degree_of_freedom():
    # The Cauchy quantile at 0.975 is tan(0.475 pi); the mean's standard error is |d1 - d2| / 2.
    interval = s.paired_interval([1.0, 3.0])
    assert interval.high - 2.0 == pytest.approx(math.tan(0.475 * math.pi), rel=1e-9)


def test_bonferroni_divides_the_error_by_the_comparisons_and_says_so():
    differences = [0.1, 0.2, 0.4]
    corrected = s.paired_interval(differences, level=0.95, comparisons=4)
    plain = s.paired_interval(differences, level=1 - 0.05 / 4)
    assert (corrected.low, corrected.high) == pytest.approx((plain.low, plain.high), rel=1e-12)
    assert corrected.level == 0.95
    assert "Bonferroni-corrected for 4" in corrected.method
    assert s.paired_p_value(differences, comparisons=4) == pytest.approx(4 * s.paired_p_value(differences))


def test_none_or_one_difference_gives_no_interval():
    empty, one = s.paired_interval([]), s.paired_interval([0.5])
    assert (empty.n, one.n, one.estimate) == (0, 1, 0.5)
    assert math.isnan(empty.estimate)
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert math.isnan(s.paired_p_value([0.5]))
    assert s.standing(one, True) == s.standing(empty, False) == "no interval"


def test_equal_differences_give_an_interval_without_width():
    zero = s.paired_interval([0.0, 0.0, 0.0])
    assert (zero.low, zero.high, zero.sd) == (0.0, 0.0, 0.0)
    assert s.standing(zero, True) == s.standing(zero, False) == "not told apart"
    assert s.paired_p_value([0.0, 0.0]) == 1.0
    tenth = s.paired_interval([0.1, 0.1, 0.1])  # its rounded mean would be 0.10000000000000002
    assert (tenth.low, tenth.estimate, tenth.high) == (0.1, 0.1, 0.1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_differences_are_refused(bad):
    with pytest.raises(ValueError, match="finite"):
        s.paired_interval([0.1, bad])


def test_huge_and_tiny_differences_keep_a_finite_spread():
    for scale in (1e300, 1e-300):
        interval = s.paired_interval([1.0 * scale, 2.0 * scale, 3.0 * scale])
        assert interval.sd == pytest.approx(scale, rel=1e-12)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=12), st.integers(1, 20))
def test_p_value_is_below_the_error_level_exactly_when_the_interval_leaves_out_zero(values, comparisons):
    interval = s.paired_interval(values, comparisons=comparisons)
    p = s.paired_p_value(values, comparisons=comparisons)
    if abs(p - 0.05) > 1e-9:
        assert (p < 0.05) == (s.standing(interval, True) != "not told apart")


def test_better_and_worse_follow_the_direction():
    lower, higher = s.paired_interval([-1.0, -1.1]), s.paired_interval([1.0, 1.1])
    assert (s.standing(lower, True), s.standing(lower, False)) == ("better", "worse")
    assert (s.standing(higher, True), s.standing(higher, False)) == ("worse", "better")


@pytest.mark.parametrize("level", [0.0, 1.0, -0.1, 95, math.nan])
def test_a_level_outside_zero_and_one_is_refused(level):
    with pytest.raises(ValueError, match="level"):
        s.paired_interval([1.0, 2.0], level=level)


def test_power_is_the_noncentral_t_tail():
    for n, effect, m in ((2, 3.0, 1), (3, 1.5, 4), (10, 1.0, 1), (200, 0.2, 2)):
        threshold = stats.t.ppf(1 - 0.05 / 2 / m, n - 1)
        expected = stats.nct.sf(threshold, n - 1, effect * math.sqrt(n))
        assert s.power(effect, 1.0, n, comparisons=m) == pytest.approx(expected, abs=1e-9)


def test_power_is_what_a_simulation_counts():
    rng = np.random.default_rng(0)
    draws = rng.normal(0.8, 1.0, (40_000, 5))
    t = draws.mean(1) / (draws.std(1, ddof=1) / math.sqrt(5))
    counted = np.mean(t > stats.t.ppf(0.975, 4))
    # Three standard errors of a share near one quarter over 40 000 draws.
    assert s.power(0.8, 1.0, 5) == pytest.approx(counted, abs=3 * math.sqrt(0.25 / 40_000))


@pytest.mark.parametrize("n", [2, 3, 5, 20, 1000])
@pytest.mark.parametrize("comparisons", [1, 11])
def test_smallest_detectable_effect_has_just_the_power_asked_for(n, comparisons):
    effect = s.smallest_detectable(0.3, n, power=0.9, comparisons=comparisons)
    assert s.power(effect, 0.3, n, comparisons=comparisons) == pytest.approx(0.9, abs=1e-6)


def test_smallest_detectable_effect_at_the_edges():
    assert s.smallest_detectable(1.0, 1) == math.inf
    assert s.smallest_detectable(0.0, 3) == 0.0
    assert math.isfinite(s.smallest_detectable(1.0, 2, level=0.9999, comparisons=1000))
    with pytest.raises(ValueError, match="power"):
        s.smallest_detectable(1.0, 3, power=1.0)
    with pytest.raises(ValueError, match="sd"):
        s.smallest_detectable(math.nan, 3)


@pytest.mark.parametrize("effect", [10.0, 1.0, 0.31, 0.05, 0.001])
def test_seeds_needed_is_the_first_number_with_enough_power(effect):
    n = s.seeds_needed(effect, 1.0, comparisons=3)
    assert s.power(effect, 1.0, n, comparisons=3) >= 0.8
    assert n == 2 or s.power(effect, 1.0, n - 1, comparisons=3) < 0.8


def test_seeds_needed_at_the_edges():
    assert s.seeds_needed(1.0, 0.0) == 2
    assert s.seeds_needed(-1.0, 1.0) == s.seeds_needed(1.0, 1.0) == 10
    # Far out the t distribution is normal: n = ((1.95996 + 0.84162) sd / effect)^2.
    assert s.seeds_needed(1e-6, 1.0) == pytest.approx(7.84888e12, rel=1e-5)
    assert s.seeds_needed(1e-4, 1.0) == pytest.approx(7.84888e8, rel=1e-5)
    with pytest.raises(ValueError, match="effect"):
        s.seeds_needed(0.0, 1.0)


def test_equal_arms_are_told_apart_at_the_nominal_rate_for_one_comparison():
    rng = np.random.default_rng(1)
    trials = 4000
    told = sum(s.standing(s.paired_interval(d), True) != "not told apart" for d in rng.normal(size=(trials, 4)))
    # Exact level: the count is binomial, and four standard errors leave a chance of 6e-5.
    assert told / trials == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / trials))


def test_four_equal_arms_keep_the_family_wise_error_below_its_level():
    rng = np.random.default_rng(2)
    trials = 1500
    wrong = 0
    for _ in range(trials):
        shared = rng.normal(0, 3, 3)  # seeds differ a lot, and all arms alike
        losses = shared + rng.normal(0, 1, (5, 3))  # the first is the baseline
        intervals = [s.paired_interval(arm - losses[0], comparisons=4) for arm in losses[1:]]
        wrong += any(s.standing(interval, True) != "not told apart" for interval in intervals)
    error = math.sqrt(0.05 * 0.95 / trials)
    # Bonferroni is conservative when comparisons share a baseline, but by less than half here.
    assert 0.025 - 4 * error < wrong / trials < 0.05 + 4 * error


def test_pairing_finds_an_effect_that_an_unpaired_test_misses():
    rng = np.random.default_rng(3)
    paired = unpaired = 0
    for _ in range(300):
        shared = rng.normal(0, 1, 5)
        base, arm = shared + rng.normal(0, 0.1, 5), shared - 0.3 + rng.normal(0, 0.1, 5)
        paired += s.paired_p_value(arm - base) < 0.05
        unpaired += stats.ttest_ind(arm, base).pvalue < 0.05
    assert paired / 300 > 0.85
    assert unpaired / 300 < 0.15


def test_pairs_are_formed_only_of_seeds_that_both_finished():
    found = [
        Run("a", 0, {"loss": 1.0}),
        Run("a", 1, {"loss": 1.0}, error="killed"),
        Run("a", 2, {"loss": math.nan}),
        Run("a", 3, {"loss": 5.0}),
        Run("a", 4, {}),
        *(Run("b", seed, {"loss": 3.0}) for seed in (0, 1, 2, 4, 5)),
    ]
    values = s.finished_values(found, "a", "loss")
    assert values == {0: 1.0, 3: 5.0}
    assert s.paired_differences(values, s.finished_values(found, "b", "loss")) == {0: -2.0}
    assert s.verdict(Claim("", "a", "loss", against="b"), found) == "inconclusive"


def test_a_claim_is_judged_by_the_side_on_which_its_whole_interval_lies():
    data = runs(a=[1.0, 2.0, 3.0], b=[2.0, 3.01, 3.99])  # a - b is -1 within 0.01
    expected = {
        ("lower", 0.0): "supported",
        ("lower", 0.5): "supported",
        ("lower", 1.0): "inconclusive",
        ("lower", 1.5): "not supported",
        ("higher", 0.0): "not supported",
        ("higher", -1.5): "supported",
        ("equal", 2.0): "supported",
        ("equal", 1.0): "inconclusive",
        ("equal", 0.5): "not supported",
    }
    for (direction, margin), verdict in expected.items():
        claim = Claim("c", "a", "loss", direction=direction, against="b", margin=margin)
        assert s.verdict(claim, data) == verdict, (direction, margin)


def test_a_ratio_claim_is_judged_by_the_paired_contrast():
    data = runs(a=[1.0, 2.01, 2.99], b=[4.0, 8.0, 12.0])
    judgement = s.judge(Claim("c", "a", "loss", ratio=0.5), data, baseline="b")
    expected = s.paired_interval([1.0 - 2.0, 2.01 - 4.0, 2.99 - 6.0])
    assert (judgement.interval.low, judgement.interval.high) == pytest.approx((expected.low, expected.high))
    assert s.verdict(Claim("c", "a", "loss", ratio=0.26), data, baseline="b") == "inconclusive"
    assert s.verdict(Claim("c", "a", "loss", direction="higher", ratio=0.2), data, baseline="b") == "inconclusive"
    exact = runs(a=[1.0, 2.0], b=[4.0, 8.0])
    assert s.verdict(Claim("c", "a", "loss", ratio=0.25), exact, baseline="b") == "supported"
    assert s.verdict(Claim("c", "a", "loss", ratio=0.2), exact, baseline="b") == "inconclusive"


def test_identical_arms_support_equality_and_nothing_else():
    data = runs(a=[1.0, 2.0], b=[1.0, 2.0])
    for direction, verdict in (("equal", "supported"), ("lower", "inconclusive"), ("higher", "inconclusive")):
        assert s.verdict(Claim("c", "a", "loss", direction=direction, against="b"), data) == verdict


def test_one_seed_is_inconclusive_however_large_the_difference():
    assert s.verdict(Claim("c", "a", "loss", against="b"), runs(a=[0.0], b=[100.0])) == "inconclusive"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"direction": "below"}, "direction"),
        ({"margin": math.nan}, "finite"),
        ({"direction": "equal", "margin": -1.0}, "margin"),
        ({"margin": 0.1, "ratio": 0.5}, "ratio"),
    ],
)
def test_a_claim_that_makes_no_sense_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        s.verdict(Claim("c", "a", "loss", against="b", **changes), [])
    with pytest.raises(ValueError, match="baseline"):
        s.verdict(Claim("c", "a", "loss"), [])
