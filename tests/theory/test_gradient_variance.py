"""Variance of upsampling and upweighting: the digest's numbers, and both estimators drawn."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lossmith.data import TemperatureSampler, scalarization_weights, temperature_probabilities
from lossmith.theory import gradient_moments, gradient_variances

SIZES = [900, 100]


def scalar(means: tuple[float, float], second: tuple[float, float], tau: float = 5) -> tuple[float, float]:
    """Gradients of one coordinate: the products are those of the means."""
    mean = torch.tensor(means, dtype=torch.float64)
    found = gradient_variances(SIZES, second, mean.outer(mean), tau)
    return found.upweighting, found.upsampling


def test_theorem_2_with_equal_second_moments() -> None:
    upweighting, upsampling = scalar((1, 1), (2, 2))
    assert upweighting == pytest.approx(2.893110884945, abs=1e-11)
    assert upsampling == pytest.approx(1, abs=1e-14)


def test_theorem_2_is_false_in_general() -> None:
    upweighting, upsampling = scalar((1, 0.1), (5, 0.02))
    assert upweighting == pytest.approx(1.66624, abs=5e-6)
    assert upsampling == pytest.approx(2.62946, abs=5e-6)


@given(
    st.lists(st.floats(1, 1e6), min_size=1, max_size=6),
    st.floats(1, 100),
    st.floats(0.01, 100),
    st.lists(st.floats(0, 10), min_size=6, max_size=6),
)
def test_theorem_2_holds_where_domains_that_gain_weight_have_larger_second_moments(
    sizes: list[float], tau: float, base: float, steps: list[float]
) -> None:
    """Sorted by falling size, second moments rise: the usual case, small domains being less well fitted."""
    sizes = sorted(sizes, reverse=True)
    second = base + torch.tensor(steps[: len(sizes)], dtype=torch.float64).cumsum(0)
    products = torch.zeros(len(sizes), len(sizes))
    found = gradient_variances(sizes, second, products, tau)
    p, w = temperature_probabilities(sizes, tau), scalarization_weights(sizes, tau)
    assert found.difference == pytest.approx(float((p * (w - 1)) @ second), rel=1e-9, abs=1e-9 * found.upweighting)
    assert found.difference >= -1e-9 * found.upweighting
    equal = gradient_variances(sizes, [base] * len(sizes), products, tau)
    assert equal.difference == pytest.approx(base * (equal.weight_second_moment - 1), rel=1e-9, abs=1e-9 * base)


def test_at_temperature_one_and_for_equal_sizes_there_is_no_difference() -> None:
    mean = torch.randn(3, 4, dtype=torch.float64)
    products = mean @ mean.T
    assert gradient_variances([7, 2, 1], [9.0, 8.0, 7.0], products, 1).difference == pytest.approx(0, abs=1e-14)
    assert gradient_variances([5, 5, 5], [9.0, 8.0, 7.0], products, 5).difference == pytest.approx(0, abs=1e-14)


def test_the_formulas_are_the_variances_of_all_draws_enumerated() -> None:
    gradients = torch.randn(100, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    domains = torch.tensor([0] * 90 + [3] * 10)
    gradients[domains == 3] += 1
    sizes, second, products = gradient_moments(gradients, domains)
    assert sizes.tolist() == [90, 10]
    found = gradient_variances(sizes, second, products, 5)
    p, w = temperature_probabilities(sizes, 5), scalarization_weights(sizes, 5)
    place = (domains == 3).long()
    variances = []
    for chance, weight in (
        (p[place] / sizes[place], torch.ones(100)),
        (torch.full((100,), 0.01, dtype=torch.float64), w[place]),
    ):
        estimates = weight[:, None].double() * gradients
        mean = chance.double() @ estimates
        assert float(mean.square().sum()) == pytest.approx(found.mean_squared, rel=1e-12)
        variances.append(float(chance.double() @ (estimates - mean).square().sum(-1)))
    assert variances == pytest.approx([found.upsampling, found.upweighting], rel=1e-12)
    assert found.ratio == pytest.approx(variances[1] / variances[0], rel=1e-12)


def test_batches_that_the_sampler_draws_have_those_variances() -> None:
    """The mean of a batch of 8 has an eighth of it, within 4 standard errors of 4000 batches."""
    generator = torch.Generator().manual_seed(1)
    gradients = torch.randn(1000, 1, dtype=torch.float64, generator=generator)
    domains = torch.tensor([0] * 900 + [1] * 100)
    gradients[domains == 1] = 2 + 3 * gradients[domains == 1]
    found = gradient_variances(*gradient_moments(gradients, domains), tau=5)
    for tau, weights, variance in (
        (5, torch.ones(2, dtype=torch.float64), found.upsampling),
        (1, scalarization_weights([900, 100], 5), found.upweighting),
    ):
        drawn = torch.tensor(list(TemperatureSampler([range(900), range(900, 1000)], tau, total=32_000, seed=2)))
        means = (weights[domains[drawn]] * gradients[drawn, 0]).view(-1, 8).mean(1)
        spread = 4 * float((means - means.mean()).square().std()) / 4000**0.5
        assert float(means.var()) == pytest.approx(variance / 8, abs=spread)


@pytest.mark.parametrize(
    ("second", "products", "message"),
    [
        ([1.0], [[1.0]], "shape"),
        ([1.0, 2.0], [[1.0]], "shape"),
        ([1.0, -2.0], [[1.0, 0.0], [0.0, 1.0]], "negative"),
    ],
)
def test_moments_that_do_not_fit_are_refused(second: list, products: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gradient_variances(SIZES, second, products)
    with pytest.raises(ValueError, match="one row per example"):
        gradient_moments(torch.zeros(3), torch.zeros(3, dtype=torch.long))
