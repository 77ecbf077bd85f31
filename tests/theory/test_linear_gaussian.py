"""Head tuning on hidden Markov states: population quantities, exact and asymptotic risks, the sweep."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lossmith.theory import (
    LinearGaussianHMM,
    MinNormHead,
    complexity_sweep,
    complexity_sweep_features,
    conditional_risk,
    deterministic_equivalent,
    excess_risk,
    theoretical_risk,
)
from lossmith.theory.linear_gaussian import Population


def hand_example() -> LinearGaussianHMM:
    return LinearGaussianHMM(np.diag([0.6, 0.8]), np.diag([0.64, 0.36]), np.ones((2, 1)), 1.0)


def test_the_hand_example() -> None:
    population = hand_example().population()
    assert population.sigma_x == pytest.approx(3)
    assert population.beta.ravel().tolist() == pytest.approx([0.2, 4 / 15])
    assert population.best_risk == pytest.approx(5 / 3)
    assert population.null_risk == pytest.approx(2)
    assert theoretical_risk(population, 10) == pytest.approx((0, 5 / 3 / 8))


def test_population_quantities_are_those_of_samples() -> None:
    hmm = LinearGaussianHMM.stationary(3, 4, seed=1)
    population = hmm.population()
    x, z = hmm.pairs(400_000, seed=2)
    np.testing.assert_allclose(x.T @ x / len(x), population.sigma_x, atol=2e-2)
    np.testing.assert_allclose(MinNormHead().fit(x, z).coefficients, population.beta, atol=1e-2)
    left = z - x @ population.beta
    np.testing.assert_allclose(left.T @ left / len(x), population.sigma_eta, atol=2e-2)


def test_states_move_to_the_stationary_covariance() -> None:
    hmm = LinearGaussianHMM(np.array([[0.5, 0.3], [0.0, 0.7]]), np.diag([0.2, 0.4]), np.ones((2, 1)), 0.1)
    np.testing.assert_allclose(hmm.state_covariance(1), np.eye(2))
    np.testing.assert_allclose(hmm.state_covariance(300), hmm.state_covariance(), atol=1e-12)
    sample = hmm.sample(100_000, 4)
    np.testing.assert_allclose(np.cov(sample.states[:, 3].T, bias=True), hmm.state_covariance(4), atol=1e-2)
    np.testing.assert_allclose(LinearGaussianHMM.stationary(5, 2, rho=0.9).state_covariance(), np.eye(5), atol=1e-12)


@pytest.mark.parametrize(("n", "p"), [(30, 8), (12, 12), (8, 30)])
def test_bias_and_variance_add_up_for_given_inputs(n: int, p: int) -> None:
    hmm = LinearGaussianHMM.stationary(3, p)
    population = hmm.population()
    x, _ = hmm.pairs(n, seed=1)
    draw = np.random.default_rng(0)
    root = np.linalg.cholesky(population.sigma_eta)
    risks = [
        excess_risk(MinNormHead().fit(x, x @ population.beta + draw.standard_normal((n, 3)) @ root.T), population)
        for _ in range(1500)
    ]
    expected = sum(conditional_risk(x, population))
    assert np.mean(risks) == pytest.approx(expected, abs=4 * np.std(risks) / math.sqrt(len(risks)))


def test_no_bias_below_and_no_residual_above() -> None:
    below = LinearGaussianHMM.stationary(3, 10)
    assert abs(conditional_risk(below.pairs(30)[0], below.population())[0]) < 1e-10
    above = LinearGaussianHMM.stationary(3, 60)
    x, z = above.pairs(30)
    assert np.abs(MinNormHead().fit(x, z).predict(x) - z).max() < 1e-8


def test_the_deterministic_equivalent() -> None:
    assert deterministic_equivalent(np.ones(40), np.full(40, 1 / 40), 20) == (0.5, 1.0)
    # Isotropic with any size: the closed form without the finite-size correction.
    bias, variance = deterministic_equivalent(np.full(300, 2.5), np.full(300, 0.01), 100)
    assert bias == pytest.approx((1 - 1 / 3) * 2.5 * 3, rel=1e-10)
    assert variance == pytest.approx(1 / (3 - 1), rel=1e-10)
    # By simulation, with a spectrum of two values.
    spectrum = np.r_[np.full(100, 3.0), np.full(100, 0.3)]
    beta = np.full(200, 0.1)
    population = Population(np.diag(spectrum), beta[:, None], np.eye(1), 1.0)
    draw = np.random.default_rng(0)
    found = np.mean(
        [conditional_risk(draw.standard_normal((80, 200)) * np.sqrt(spectrum), population) for _ in range(30)], axis=0
    )
    assert found == pytest.approx(theoretical_risk(population, 80), rel=0.05)


@pytest.mark.parametrize(
    ("p", "excess", "prediction"), [(1, 0.1987, 19.68), (10, 1.7341, 17.22), (20, 3.0546, 15.21), (60, 13.027, 21.53)]
)
def test_the_digests_table(p: int, excess: float, prediction: float) -> None:
    """``W`` is drawn anew, so that its table is met to a few percent."""
    (point,) = complexity_sweep([p], repeats=20)
    assert point.theory == pytest.approx(excess, rel=0.05)
    assert abs(point.excess - point.theory) < 4 * point.excess_error
    assert point.prediction == pytest.approx(prediction, rel=0.08)


def test_the_curve_rises_peaks_at_n_and_falls() -> None:
    points = complexity_sweep([1, 5, 20, 60, 90, 120, 200, 400], repeats=10)
    excess = [point.excess for point in points]
    assert excess[:5] == sorted(excess[:5])
    assert excess[5:] == sorted(excess[5:], reverse=True)
    assert min(excess[:5]) == excess[0]
    for point in points[6:]:
        assert point.excess == pytest.approx(point.theory, rel=0.06)
    # The prediction risk does have a first descent.
    assert points[2].prediction < points[0].prediction
    assert points[-1].prediction < points[2].prediction


def test_rotations_and_scales() -> None:
    hmm = LinearGaussianHMM.stationary(3, 7)
    population = hmm.population()
    x, z = hmm.pairs(5, seed=3)
    base = excess_risk(MinNormHead().fit(x, z), population)
    draw = np.random.default_rng(1)
    o, q = (np.linalg.qr(draw.standard_normal((k, k)))[0] for k in (7, 3))
    inputs = population._replace(sigma_x=o.T @ population.sigma_x @ o, beta=o.T @ population.beta)
    assert excess_risk(MinNormHead().fit(x @ o, z), inputs) == pytest.approx(base)
    outputs = population._replace(beta=population.beta @ q)
    assert excess_risk(MinNormHead().fit(x, z @ q), outputs) == pytest.approx(base)
    scaled = population._replace(sigma_x=9 * population.sigma_x)
    assert excess_risk(MinNormHead().fit(3 * x, 3 * z), scaled) == pytest.approx(9 * base)


def test_words_that_do_not_depend_on_each_other() -> None:
    hmm = LinearGaussianHMM.stationary(4, 10, rho=0.0)
    population = hmm.population()
    assert np.abs(population.beta).max() == 0
    np.testing.assert_allclose(population.sigma_eta, np.eye(4), atol=1e-12)
    assert theoretical_risk(population, 50)[1] == pytest.approx(4 * 10 / (50 - 10 - 1))


def test_ridge() -> None:
    hmm = LinearGaussianHMM.stationary(5, 40)
    population = hmm.population()
    x, z = hmm.pairs(40, seed=1)
    plain, tiny = MinNormHead().fit(x, z), MinNormHead(1e-14).fit(x, z)
    np.testing.assert_allclose(tiny.coefficients, plain.coefficients, rtol=1e-4, atol=1e-6)
    expected = np.linalg.solve(x.T @ x + 40 * 0.3 * np.eye(40), x.T @ z)
    np.testing.assert_allclose(MinNormHead(0.3).fit(x, z).coefficients, expected, atol=1e-10)
    assert excess_risk(MinNormHead(0.3).fit(x, z), population) < 0.2 * excess_risk(plain, population)


def test_features_of_the_digits() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    g = np.random.default_rng(0).standard_normal((64, 1000)) / 8
    features = np.maximum(digits.data / 16 @ g, 0)
    points = complexity_sweep_features(features, digits.target, [50, 200, 600], 200, splits=2, project="first")
    small, peak, large = points
    assert peak.error > 10 * small.error
    assert peak.error > 10 * large.error
    assert large.error < small.error
    assert large.accuracy > 0.85


@pytest.mark.parametrize("project", ["random", "first", "principal"])
def test_projections(project: str) -> None:
    draw = np.random.default_rng(0)
    x = draw.standard_normal((60, 12))
    points = complexity_sweep_features(x, x[:, ::5], [3, 12], 40, project=project)
    assert points[1].error < 1e-20
    assert points[0].error > 1e-3


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match="spectral radius"):
        LinearGaussianHMM.stationary(2, 2, rho=1.0)
    with pytest.raises(ValueError, match=r"spectral radius of A is 1\.5"):
        LinearGaussianHMM(np.diag([1.5, 0.2]), np.eye(2), np.ones((2, 1)), 0.1).population()
    with pytest.raises(ValueError, match=r"features must have shape \(2, p\)"):
        LinearGaussianHMM(np.eye(2) / 2, np.eye(2), np.ones((3, 1)), 0.1)
    with pytest.raises(ValueError, match="feature_noise"):
        LinearGaussianHMM(np.eye(2) / 2, np.eye(2), np.ones((2, 1)), -0.1)
    with pytest.raises(ValueError, match="negative eigenvalue"):
        LinearGaussianHMM(np.eye(2) / 2, -np.eye(2), np.ones((2, 1)), 0.1)
    population = LinearGaussianHMM.stationary(2, 10).population()
    with pytest.warns(UserWarning, match="infinite"):
        assert theoretical_risk(population, 10)[1] == math.inf
    with pytest.raises(ValueError, match="finite"):
        MinNormHead().fit([[math.nan]], [[1.0]])
    with pytest.raises(ValueError, match="n_train"):
        complexity_sweep_features(np.ones((5, 2)), np.ones(5), [1], 5)
    with pytest.raises(ValueError, match="widths"):
        complexity_sweep_features(np.ones((5, 2)), np.ones(5), [3], 2)
