"""The paper's equations and published numbers, and the exact identities of the critical time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lossmith.laws.mixture_curves import (
    critical_time,
    domain_change,
    general_change,
    general_peak,
    in_order,
    power_law,
    share_reaching,
    trend,
    trend_share,
)

# Gu et al. 2024, table 5 (Finance): alpha4, beta3, s4 with T in units of 0.2B tokens.
PUBLISHED = {
    "460M": (0.22524761, -0.48139982, 0.26944345),
    "940M": (0.7520627, -1.06581937, 0.13720245),
    "1.6B": (-2.36384831, 1.59223649, -0.15125569),
    "3.1B": (-2.5368197, 0.84375368, -0.42071423),
}
# Table 2: domain loss at the end of the budget at shares 1, 3/4, 1/2, 1/3; 1/4 as measured and as predicted there.
TABLE_2 = {
    "460M": ((1.4628, 1.4844, 1.5122, 1.5387), 1.5561, 1.5566),
    "940M": ((1.3723, 1.3910, 1.4155, 1.4385), 1.4538, 1.4546),
    "1.6B": ((1.3242, 1.3416, 1.3643, 1.3854), 1.3994, 1.3999),
    "3.1B": ((1.2585, 1.2750, 1.2965, 1.3170), 1.3305, 1.3303),
}
GENERAL = np.array([0.1, -0.02, 0.0, 0.5, 0.9])
DOMAIN = np.array([0.8, 0.0, -0.3])


@pytest.mark.parametrize(
    ("t", "shares"),
    [
        (100, (0.29762, 0.34886, 0.41434, 0.47828)),
        (50, (0.16490, 0.22052, 0.28414, 0.35453)),
        (250, (0.51577, 0.53838, 0.56678, 0.59519)),
    ],
)
def test_equation_8_with_the_published_constants_gives_the_published_ratios(t: int, shares: tuple[float, ...]) -> None:
    laws = np.array(list(PUBLISHED.values()))
    np.testing.assert_allclose(domain_change(laws, np.full(4, float(t))), shares, atol=6e-6)
    never = np.full((4, 1), np.inf)
    np.testing.assert_allclose(trend_share(laws, never, np.array([0.5]), t), shares, atol=6e-6)


def test_a_budget_too_small_for_any_share_is_clipped_at_zero() -> None:
    laws = np.array(list(PUBLISHED.values()))
    assert (domain_change(laws, np.full(4, 10.0)) < 0).all()
    assert (trend_share(laws, np.full((4, 1), np.inf), np.array([0.5]), 10) == 0).all()


@pytest.mark.parametrize("size", TABLE_2)
def test_the_share_law_predicts_the_held_out_quarter_of_table_2(size: str) -> None:
    losses, measured, printed = TABLE_2[size]
    law = power_law(np.array([1, 0.75, 0.5, 1 / 3]), np.array(losses))
    predicted = float(domain_change(law, np.array(0.25))[0])
    assert abs(predicted / measured - 1) <= 1e-4
    # Ours is nearer than the paper's own prediction.
    assert abs(predicted - measured) <= abs(printed - measured)
    s = {"460M": 0.178, "940M": 0.179, "1.6B": 0.198, "3.1B": 0.163}
    assert law[0, 2] == pytest.approx(s[size], abs=1e-3)


def test_a_third_rounded_to_two_digits_predicts_worse() -> None:
    losses, measured, _ = TABLE_2["460M"]
    errors = [
        float(domain_change(power_law(np.array([1, 0.75, 0.5, r]), np.array(losses)), np.array(0.25))[0]) / measured - 1
        for r in (1 / 3, 0.33)
    ]
    assert abs(errors[1]) > 5 * abs(errors[0])


def test_the_peak_of_general_loss_is_the_closed_form() -> None:
    assert float(general_peak(GENERAL)) == pytest.approx(12.860082304526752, rel=1e-13)
    assert float(general_change(GENERAL, general_peak(GENERAL))) == pytest.approx(0.15938203070812415, rel=1e-13)


@pytest.mark.parametrize(
    ("lagrange", "time"), [(10, 10.66074048929785), (100, 12.65849432197131), (1000, 12.840066720517232)]
)
def test_the_critical_time_approaches_the_peak_from_below(lagrange: float, time: float) -> None:
    found = float(critical_time(GENERAL, DOMAIN, lagrange=lagrange))
    assert found == pytest.approx(time, rel=1e-12)
    assert found < float(general_peak(GENERAL))


def test_the_steep_start_of_domain_loss_is_not_taken_for_the_critical_time() -> None:
    """For lambda = 100 the first zero of F' lies near 0.0249: from falling to rising."""
    low, high = 0.02, 0.03

    def slope(t: float) -> float:
        return -0.24 * t**-1.3 + 100 * (0.05 * t**-0.5 - 0.018 * t**-0.1)

    assert slope(low) < 0 < slope(high)
    assert float(critical_time(GENERAL, DOMAIN, lagrange=100)) > 12


@given(
    a2=st.floats(0.01, 1),
    a3=st.floats(-1, -0.01),
    s2=st.floats(0.05, 0.7),
    gap=st.floats(0.1, 0.8),
    a1=st.floats(0.05, 2),
    s1=st.floats(-2, -0.1),
    lagrange=st.sampled_from([5.0, 100.0, 7000.0]),
)
def test_a_critical_time_solves_the_implicit_equation_7(
    a2: float, a3: float, s2: float, gap: float, a1: float, s1: float, lagrange: float
) -> None:
    s3 = s2 + gap
    t = float(critical_time(np.array([a2, a3, 0.0, s2, s3]), np.array([a1, 0.0, s1]), lagrange=lagrange))
    assume(0 < t < np.inf)
    terms = np.array([a1 * s1 * t ** (s1 - 1), lagrange * a2 * s2 * t ** (s2 - 1), lagrange * a3 * s3 * t ** (s3 - 1)])
    assert abs(terms.sum()) <= 1e-9 * np.abs(terms).max()
    base = -(a1 * s1) / (lagrange * a2 * s2) / (1 + (a3 * s3) / (a2 * s2) * t ** (s3 - s2))
    assert base > 0
    # The bracket cancels where the peak is near: the error of t is magnified by it.
    assert np.log(base) / (s2 - s1) == pytest.approx(np.log(t), abs=1e-4 * max(1, abs(np.log(t))))


@pytest.mark.parametrize(
    ("general", "time"),
    [
        ((0.1, 0.2, 0.0, 0.5, 0.9), np.inf),
        ((-0.1, -0.2, 0.0, 0.5, 0.9), 0.0),
        ((-0.1, 0.2, 0.0, 0.5, 0.9), np.inf),
        ((0.1, -0.2, 0.0, 0.5, 0.5), 0.0),
        ((0.3, -0.2, 0.0, 0.5, 0.5), np.inf),
        ((0.0, 0.0, 0.0, 0.5, 0.9), 0.0),
    ],
)
@pytest.mark.parametrize("lagrange", [np.inf, 1e9])
def test_losses_that_never_turn_are_never_or_always_past_it(
    general: tuple[float, ...], time: float, lagrange: float
) -> None:
    assert float(general_peak(np.array(general))) == time
    assert float(critical_time(np.array(general), DOMAIN, lagrange=lagrange, first=1e-3)) == time


def test_a_turn_before_the_first_or_far_beyond_the_last_evaluation_is_none() -> None:
    assert float(critical_time(GENERAL, DOMAIN, first=13.0)) == 0
    assert np.isinf(critical_time(GENERAL, DOMAIN, scan=12.0))
    assert np.isinf(critical_time(GENERAL, DOMAIN, lagrange=1000, scan=12.0))


def test_the_powers_of_general_loss_come_in_order_whichever_the_fit_found_first() -> None:
    one, other = np.array([0.1, -0.02, 0.3, -0.5, -0.9]), np.array([-0.02, 0.1, 0.3, -0.9, -0.5])
    np.testing.assert_array_equal(in_order(np.stack([one, other])), [[0.1, -0.02, 0.3, 0.5, 0.9]] * 2)


def test_the_largest_share_within_a_value() -> None:
    rising, falling, saturating = (0.4, -0.05, 2.0), (-0.4, 0.2, 1.0), (-0.1, 0.2, -0.5)
    laws = np.array([rising, falling, saturating])
    np.testing.assert_allclose(share_reaching(laws, np.array(0.05)), [0.5, 1.0, (0.1 / 0.15) ** 2])
    np.testing.assert_allclose(share_reaching(laws, np.array(-0.3)), [0.0, 0.0, 0.04])
    assert (share_reaching(laws, np.array(9.0)) == 1).all()


def test_two_turns_give_a_nearly_logarithmic_trend_and_one_gives_the_largest_share_past_it() -> None:
    times = np.array([[0.0, 0.2, 0.5, np.inf], [0.0, 0.2, np.inf, np.inf]])
    shares = np.array([0.125, 0.25, 0.5, 1.0])
    laws, number = trend(times, shares)
    assert number.tolist() == [2, 1]
    slope = 0.25 / np.log(0.5 / 0.2)
    found = trend_share(laws, times, shares, 1.0)
    assert found[0] == pytest.approx(0.25 + slope * np.log(1 / 0.2), rel=0.01)
    assert found[1] == 0.25


def test_multipliers_that_are_not_positive_are_refused() -> None:
    with pytest.raises(ValueError, match="lagrange must be positive"):
        critical_time(GENERAL, DOMAIN, lagrange=0)
