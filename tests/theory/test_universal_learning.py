"""Mixtures, regret, weights of hypotheses, Langevin dynamics."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from lossmith.theory import (
    SGLD,
    BayesMixture,
    annealed_log_evidence,
    as_log_prior,
    bernoulli_divergence,
    bernoulli_regret,
    boolean_inputs,
    boolean_regret,
    complexity_gaussian,
    distill_ensemble,
    log_ball_mass,
    prequential_codelength,
    regret_bound,
    sample_boolean_prior,
    sample_posterior,
    stationary_variance,
)

GRID = np.arange(1, 10) / 10
FLAT = np.full(9, -math.log(9))


# ---- exact regrets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "total", "batch"),
    [
        (1, 0.0822828785, 0.0822828785),
        (2, 0.1680055004, 0.0857226219),
        # The summary at hand prints 0.0406548447 for the batch regret; 40 digits of arithmetic give this.
        (10, 0.6188164887, 0.0406548747),
        (50, 1.3385709265, 0.0096709750),
    ],
)
def test_regrets_of_a_coin_under_the_uniform_prior(n: int, total: float, batch: float) -> None:
    online, single = bernoulli_regret(0.3, n)
    assert n * online == pytest.approx(total, abs=5e-11)
    assert single == pytest.approx(batch, abs=5e-11)


def test_the_chain_rule_and_that_single_predictions_have_no_guarantee() -> None:
    assert sum(bernoulli_regret(0.3, t)[1] for t in range(1, 11)) == pytest.approx(10 * bernoulli_regret(0.3, 10)[0])
    online, batch = bernoulli_regret(0.3, 2)
    assert batch > online


@pytest.mark.parametrize(
    ("n", "exact", "bound", "kl", "ninths"),
    [
        (5, 0.0674892342, 0.2444689217, 0.0822828786, 4),
        (20, 0.0405135727, 0.0830981720, 0.0281675576, 3),
        (100, 0.0157010210, 0.0219722458, 0.0, 1),
    ],
)
def test_the_bound_on_a_grid(n: int, exact: float, bound: float, kl: float, ninths: int) -> None:
    online, _ = bernoulli_regret(0.3, n, theta=GRID)
    found = regret_bound(bernoulli_divergence(0.3, GRID), FLAT, n)
    assert online == pytest.approx(exact, abs=5e-11)
    assert found.value == pytest.approx(bound, abs=5e-11)
    assert found.eps2 == pytest.approx(kl, abs=2e-10)
    assert found.mass == pytest.approx(ninths / 9)
    sharper = regret_bound(bernoulli_divergence(0.3, GRID), FLAT, n, mean_in_ball=True).value
    assert online <= sharper <= found.value


@pytest.mark.parametrize("n", [2, 5, 9])
def test_the_averaged_prediction_has_the_guarantee_that_single_ones_lack(n: int) -> None:
    """The mean of the n predictive distributions, over all texts: its risk is at most the online regret (convexity)."""
    truth = 0.3
    risk = 0.0
    for bits in itertools.product((0, 1), repeat=n - 1):
        mixture, predictions = BayesMixture(FLAT), []
        for bit in (*bits, None):
            predictions.append(math.exp(mixture.predictive(np.log(GRID))))
            if bit is not None:
                mixture.update(np.log(GRID if bit else 1 - GRID))
        averaged = float(np.mean(predictions))
        chance = math.prod(truth if bit else 1 - truth for bit in bits)
        risk += chance * float(bernoulli_divergence(truth, averaged))
    assert 0 < risk <= bernoulli_regret(truth, n, theta=GRID)[0]


@pytest.mark.parametrize("n", [5, 20, 100])
def test_a_truth_outside_the_class_is_measured_from_the_nearest_hypothesis(n: int) -> None:
    """E ln(P* / Q) / n obeys the bound with E ln(P* / P_theta) for the divergence (agnostic setting)."""
    truth = 0.34
    divergence = bernoulli_divergence(truth, GRID)
    excess = bernoulli_regret(truth, n, theta=GRID)[0] - divergence.min()
    assert divergence.argmin() == 2
    for mean_in_ball in (False, True):
        assert excess <= regret_bound(divergence - divergence.min(), FLAT, n, mean_in_ball=mean_in_ball).value


def test_the_ratio_of_hypotheses_matters_and_not_their_number() -> None:
    """K of N hypotheses are the truth: the regret is at most ln(N / K) / n."""
    for copies in (1, 100):
        theta = np.repeat(np.r_[0.3, 0.3, 0.6, 0.7, 0.9], copies)
        prior = np.full(len(theta), -math.log(len(theta)))
        for n in (5, 50):
            assert bernoulli_regret(0.3, n, theta=theta, log_prior=prior)[0] <= math.log(5 / 2) / n + 1e-12


def test_copies_change_nothing() -> None:
    theta, prior = np.repeat(GRID, 1000), np.full(9000, -math.log(9000))
    assert bernoulli_regret(0.3, 20, theta=theta, log_prior=prior)[0] == pytest.approx(0.0405135727, abs=5e-11)
    copies = regret_bound(bernoulli_divergence(0.3, theta), prior, 20).value
    assert copies == pytest.approx(0.0830981720, abs=5e-10)
    assert math.log(9000) / 20 > 11 * 0.0405


@pytest.mark.parametrize(
    ("truth", "regrets"), [(0.5, (0.0297976, 0.0163655, 0.0049261)), (0.25, (0.0348432, 0.0366997, 0.0170867))]
)
def test_heavy_hypotheses_cost_little(truth: float, regrets: tuple[float, ...]) -> None:
    theta = np.r_[0.5, np.linspace(0.01, 0.49, 50)]
    prior = np.log(np.r_[0.5, np.full(50, 0.01)])
    for n, expected in zip((5, 20, 100), regrets, strict=True):
        assert bernoulli_regret(truth, n, theta=theta, log_prior=prior)[0] == pytest.approx(expected, abs=5e-8)


# ---- the mixture ---------------------------------------------------------------------------------------------------


def log_likelihoods(data: np.ndarray) -> np.ndarray:
    return np.where(data[:, None] == 1, np.log(GRID), np.log(1 - GRID))


def test_the_evidence_is_the_product_of_predictions_and_beats_its_members() -> None:
    data = (np.random.default_rng(0).random(400) < 0.3).astype(int)
    mixture = BayesMixture(FLAT)
    rows = log_likelihoods(data)
    predicted = []
    for row in rows:
        ahead = float(mixture.predictive(row))
        members = mixture.posterior()
        assert ahead >= members @ row - 1e-12  # Jensen
        predicted.append(mixture.update(row))
        assert predicted[-1] == pytest.approx(ahead, abs=1e-12)
    whole = np.log(np.exp(rows.sum(0) - rows.sum(0).max()).mean()) + rows.sum(0).max()
    assert mixture.log_evidence == pytest.approx(whole, abs=1e-10)
    assert prequential_codelength(predicted) == pytest.approx(-whole, abs=1e-10)
    assert mixture.posterior()[2] > 0.95


def test_bayes_rule_of_laplace() -> None:
    """A fine grid of the uniform prior gives ``(k + 1) / (n + 2)`` and ``k! (n - k)! / (n + 1)!``."""
    theta = (np.arange(20_000) + 0.5) / 20_000
    mixture = BayesMixture(np.full(20_000, -math.log(20_000)))
    for bit in (1, 0, 1, 1):
        mixture.update(np.log(theta if bit else 1 - theta))
    assert math.exp(mixture.predictive(np.log(theta))) == pytest.approx(4 / 6, rel=1e-6)
    assert math.exp(mixture.log_evidence) == pytest.approx(6 * 1 / 120, rel=1e-6)


def test_excluded_hypotheses_stay_out() -> None:
    mixture = BayesMixture(as_log_prior([0.5, 0.5, 0.0]))
    mixture.update([-math.inf, -1.0, 0.0])
    assert mixture.posterior().tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match="no hypothesis"):
        mixture.update([0.0, -math.inf, 0.0])
    assert regret_bound([0.0, math.inf], np.log([0.5, 0.5]), 3).value == pytest.approx(math.log(2) / 3)


def test_wrong_mixtures() -> None:
    with pytest.raises(ValueError, match="normalize=True"):
        as_log_prior([0.5, 0.6])
    assert np.exp(as_log_prior([1, 3], normalize=True)).tolist() == [0.25, 0.75]
    with pytest.raises(ValueError, match="not negative"):
        as_log_prior([1.5, -0.5])
    with pytest.raises(ValueError, match="sum to 1"):
        BayesMixture([0.0, 0.0])
    with pytest.raises(ValueError, match="2 numbers"):
        BayesMixture(as_log_prior([0.5, 0.5])).update([math.nan, 0.0])
    with pytest.raises(ValueError, match="at least 0"):
        regret_bound([-0.1, 1.0], np.log([0.5, 0.5]), 3)
    with pytest.raises(ValueError, match="n must be"):
        regret_bound([0.1, 1.0], np.log([0.5, 0.5]), 0)


# ---- weights -------------------------------------------------------------------------------------------------------


def test_the_volume_of_a_ball() -> None:
    f = torch.tensor([1.0, 4.0, 9.0])
    found = log_ball_mass(f, 0.1)
    assert found == pytest.approx(-2.7735043795780245, rel=1e-12)
    draws = torch.rand(400_000, 3, generator=torch.Generator().manual_seed(0)) - 0.5
    inside = ((draws**2 * f).sum(-1) / 2 <= 0.1).double().mean()
    assert math.log(inside) == pytest.approx(found, abs=2e-2)


@pytest.mark.parametrize(("k", "n"), [(1, 50), (3, 400), (8, 10_000)])
def test_the_best_ball_of_a_smooth_model_has_half_a_nat_per_parameter(k: int, n: int) -> None:
    """eps^2 - ln w(eps) / n is least at eps^2 = k / 2n."""
    f = torch.linspace(1, 5, k)

    def bound(eps2: float) -> float:
        return eps2 - log_ball_mass(f, eps2) / n

    best = k / (2 * n)
    assert all(bound(best) < bound(best * factor) for factor in (0.5, 0.99, 1.01, 2.0))


def test_flat_directions_cost_nothing() -> None:
    few = complexity_gaussian(torch.tensor([2.0, 1.0]), 1000, 1.0)
    many = complexity_gaussian(torch.cat([torch.tensor([2.0, 1.0]), torch.full((10_000,), 1e-12)]), 1000, 1.0)
    assert many.nats == pytest.approx(few.nats, rel=1e-5)
    assert (many.directions, few.directions) == (2, 2)
    assert few.dimension == pytest.approx(2000 / 2001 + 1000 / 1001)
    assert few.nats == pytest.approx(0.5 * (math.log(2001) + math.log(1001)))


def test_random_networks_prefer_simple_functions() -> None:
    prior = sample_boolean_prior(4, draws=20_000)
    x = boolean_inputs(4)
    constant = torch.ones(16, dtype=torch.long)
    bit = (x[:, 0] > 0).long()
    both = ((x[:, 0] > 0) & (x[:, 1] > 0)).long()
    parity = (x.prod(1) > 0).long()
    weights = [prior.log_weight(f) for f in (constant, bit, both, parity)]
    assert -weights[0] == pytest.approx(2.30, abs=0.1)
    assert -weights[1] == pytest.approx(5.70, abs=0.4)
    assert weights[0] > weights[1] > weights[2] > weights[3] == -math.inf
    regrets = [float(boolean_regret(prior, f, 64, sequences=20)[-1]) for f in (constant, bit, both, parity)]
    assert regrets == sorted(regrets)
    for regret, weight in zip(regrets[:3], weights[:3], strict=True):
        assert regret <= -weight + 0.3


def test_annealing_finds_the_evidence_of_a_linear_model() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    y = x @ torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64) + 0.5 * torch.randn(20, generator=generator).double()
    covariance = x @ x.T + 0.25 * torch.eye(20, dtype=torch.float64)
    exact = torch.distributions.MultivariateNormal(torch.zeros(20, dtype=torch.float64), covariance).log_prob(y)

    def log_likelihood(theta: torch.Tensor) -> torch.Tensor:
        return torch.distributions.Normal(theta @ x.T, 0.5).log_prob(y).sum(-1)

    found = annealed_log_evidence(log_likelihood, 3, chains=64, temperatures=100)
    assert found.log_evidence == pytest.approx(float(exact), abs=4 * found.error + 0.05)
    assert found.error < 0.2
    assert 0.3 < found.acceptance < 0.95


# ---- Langevin ------------------------------------------------------------------------------------------------------


def test_the_stationary_variance_of_constant_steps() -> None:
    variance = 1.0
    for _ in range(2000):
        variance = (1 - 0.1 / 2) ** 2 * variance + 0.1
    assert stationary_variance(1.0, 0.1) == pytest.approx(variance, rel=1e-12)
    assert stationary_variance(1.0, 0.1) == pytest.approx(1.0256410256, abs=1e-10)


def test_sgld_samples_a_known_posterior() -> None:
    """Mean of a Gaussian with a Gaussian prior, many chains at once: the loss is their sum, mean over the data."""
    generator = torch.Generator().manual_seed(1)
    data = 0.7 + torch.randn(25, generator=generator, dtype=torch.float64)
    precision = 25 + 1 / 0.5**2
    theta = nn.Parameter(torch.zeros(4000, dtype=torch.float64))
    optimizer = SGLD([theta], lr=0.01, n_data=25, prior_std=0.5, seed=2)
    for _ in range(300):
        optimizer.zero_grad()
        (0.5 * (data - theta[:, None]) ** 2).mean(1).sum().backward()
        optimizer.step()
    mean, variance = float(data.sum()) / precision, stationary_variance(1 / precision, 0.01)
    assert float(theta.mean()) == pytest.approx(mean, abs=4 * math.sqrt(variance / 4000))
    assert float(theta.var()) == pytest.approx(variance, rel=0.1)


def test_the_ensemble_and_its_student() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    ensemble = sample_posterior(model, x[:100], y[:100], steps=1500, lr=2e-3, every=50)
    assert len(ensemble.samples) == 20
    mixture, single = ensemble.negative_log_likelihood(x[500:], y[500:])
    assert mixture < 0.92 * single
    torch.testing.assert_close(ensemble.predict_proba(x[:5]).sum(-1), torch.ones(5))
    student = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    target = ensemble.predict_proba(x[:500])
    entropy = -float(torch.special.xlogy(target, target).sum(-1).mean())
    before = float(nn.functional.cross_entropy(student(x[:500]), target)) - entropy
    distill_ensemble(ensemble, student, x[:500], steps=150)
    after = float(nn.functional.cross_entropy(student(x[:500]), target)) - entropy
    assert 0 < after < 0.1 * before


def test_wrong_langevin() -> None:
    weight = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="must be positive"):
        SGLD([weight], lr=0.0, n_data=10)
    with pytest.raises(TypeError, match="n_data"):
        SGLD([weight], lr=0.1)  # type: ignore[call-arg]
    optimizer = SGLD([weight], lr=1.0, n_data=10, seed=0)
    weight.grad = torch.full((2,), math.inf)
    with pytest.raises(ValueError, match="after step 1"):
        optimizer.step()
    with pytest.raises(ValueError, match="stable"):
        stationary_variance(1.0, 5.0)
    with pytest.raises(ValueError, match="NaN or above 0"):
        prequential_codelength([-1.0, 0.5])
    assert list(itertools.islice([prequential_codelength([])], 1)) == [0.0]
