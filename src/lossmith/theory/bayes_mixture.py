"""Learning as universal prediction: a Bayesian mixture under log loss, its regret, and the bound by weight.

"The Universality Lens: Why Even Highly Over-Parametrized Models Learn Well", 2025, arXiv 2506.07661. Natural
logarithms, nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def _logsumexp(values: Array, axis: int = -1) -> Array:
    most = values.max(axis, keepdims=True)
    finite = np.where(np.isfinite(most), most, 0.0)
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(np.exp(values - finite).sum(axis)) + finite.squeeze(axis))


def as_log_prior(prior: ArrayLike, *, normalize: bool = False) -> Array:
    """Logarithms of prior masses.

    Raises:
        ValueError: masses that are negative, or do not sum to 1 (without ``normalize``).
    """
    masses = np.asarray(prior, dtype=np.float64)
    if masses.ndim != 1 or not len(masses) or not np.isfinite(masses).all() or (masses < 0).any() or not masses.sum():
        raise ValueError("a prior needs finite masses that are not negative")
    total = float(masses.sum())
    if not normalize and abs(total - 1) > 1e-6:
        raise ValueError(f"prior masses sum to {total:.6g} instead of 1; normalize=True divides by it")
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(masses / total))


class BayesMixture:
    """``Q(x^n) = Σ_θ w(θ) P_θ(x^n)`` over a finite list of hypotheses, one observation after the other.

    Args:
        log_prior: ``ln w``, ``(hypotheses,)``; -inf for those that are excluded.

    >>> mixture = BayesMixture(as_log_prior([0.5, 0.5]))
    >>> round(mixture.update(np.log([0.9, 0.1])), 4)  # ln Q of the first observation
    -0.6931
    >>> mixture.posterior().round(3).tolist()
    [0.9, 0.1]
    """

    def __init__(self, log_prior: ArrayLike) -> None:
        self._log = np.array(log_prior, dtype=np.float64)
        if self._log.ndim != 1 or abs(float(_logsumexp(self._log))) > 1e-6:
            raise ValueError("log_prior must be (hypotheses,) with masses that sum to 1")
        self.log_evidence = 0.0

    def update(self, log_likelihood: ArrayLike) -> float:
        """Take an observation with ``ln P_θ(x)`` for every hypothesis; returns ``ln Q(x | the ones before)``.

        Raises:
            ValueError: NaN or +inf, or an observation that no hypothesis allows.
        """
        value = np.asarray(log_likelihood, dtype=np.float64)
        if value.shape != self._log.shape or np.isnan(value).any() or (value == np.inf).any():
            raise ValueError(f"log-likelihoods must be {len(self._log)} numbers below infinity")
        joint = self._log + value
        gained = float(_logsumexp(joint))
        if gained == -math.inf:
            raise ValueError("no hypothesis with mass allows this observation")
        self._log = joint - gained
        self.log_evidence += gained
        return gained

    def posterior(self) -> Array:
        """``w(θ | x^n)``."""
        return np.asarray(np.exp(self._log))

    def predictive(self, log_probability: ArrayLike) -> Array:
        """``ln Q(x | x^n)`` for any outcomes: ``log_probability`` is ``(..., hypotheses)``."""
        return _logsumexp(np.asarray(log_probability, dtype=np.float64) + self._log)


class BoundResult(NamedTuple):
    """``value = eps2 - ln(mass) / n``, the least over all balls around the truth."""

    value: float
    eps2: float
    mass: float


def regret_bound(kl_to_truth: ArrayLike, log_prior: ArrayLike, n: int, *, mean_in_ball: bool = False) -> BoundResult:
    """``R_o(n) <= min_ε [ε² - ln w(Θ_ε) / n]``, ``Θ_ε`` the hypotheses within ``ε²`` nats per symbol of the truth.

    What counts is the mass near the truth, not the number of hypotheses: copies change nothing.

    Args:
        kl_to_truth: ``D(P_θ0 || P_θ)`` per symbol; infinite where a hypothesis excludes what happens.
        log_prior: ``ln w``.
        n: symbols.
        mean_in_ball: use the prior-weighted mean divergence in the ball instead of its radius: sharper, still exact.

    Raises:
        ValueError: ``n`` below 1, or a divergence below 0.

    >>> theta = np.arange(1, 10) / 10
    >>> kl = 0.3 * np.log(0.3 / theta) + 0.7 * np.log(0.7 / (1 - theta))
    >>> bound = regret_bound(kl, np.full(9, -np.log(9)), 20)
    >>> round(bound.value, 10), round(bound.mass * 9)
    (0.083098172, 3)
    """
    kl, weight = np.asarray(kl_to_truth, dtype=np.float64), np.exp(np.asarray(log_prior, dtype=np.float64))
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if kl.shape != weight.shape or kl.ndim != 1 or np.isnan(kl).any() or (kl < -1e-9).any():
        raise ValueError("divergences must be one number of at least 0 for each hypothesis")
    order = np.argsort(kl, kind="stable")
    kl, mass = kl[order].clip(0), weight[order].cumsum()
    radius = kl
    if mean_in_ball:
        with np.errstate(invalid="ignore"):
            radius = (kl * weight[order]).cumsum() / np.where(mass > 0, mass, 1)
    with np.errstate(divide="ignore"):
        values = np.where(mass > 0, radius - np.log(mass) / n, np.inf)
    best = int(np.argmin(values))
    return BoundResult(float(values[best]), float(radius[best]), float(mass[best]))


def bernoulli_divergence(truth: float, theta: ArrayLike) -> Array:
    """``D(Bernoulli(truth) || Bernoulli(θ))`` in nats."""
    from scipy.special import rel_entr

    q = np.asarray(theta, dtype=np.float64)
    return np.asarray(rel_entr(truth, q) + rel_entr(1 - truth, 1 - q))


def bernoulli_regret(
    truth: float, n: int, *, theta: ArrayLike | None = None, log_prior: ArrayLike | None = None
) -> tuple[float, float]:
    """Exact online and batch regrets ``(R_o(n), R_b(n))`` for coins, by their sufficient statistic.

    Args:
        truth: probability of 1.
        n: symbols; the batch regret is that of the ``n``-th after ``n - 1``.
        theta: list of hypotheses; none is the uniform prior on [0, 1].
        log_prior: of the list; default uniform.

    >>> online, batch = bernoulli_regret(0.3, 2)
    >>> round(2 * online, 10), round(batch, 10)
    (0.1680055004, 0.0857226219)
    """
    if n < 1 or not 0 <= truth <= 1:
        raise ValueError(f"n must be at least 1 and truth a probability, got {n} and {truth}")

    def log_evidence(k: Array, m: int) -> Array:
        from scipy.special import betaln, xlog1py, xlogy

        if theta is None:
            return np.asarray(betaln(k + 1, m - k + 1))
        q = np.asarray(theta, dtype=np.float64)
        w = np.full(len(q), -math.log(len(q))) if log_prior is None else np.asarray(log_prior, dtype=np.float64)
        return _logsumexp(w + xlogy(k[:, None], q) + xlog1py(m - k[:, None], -q))

    def total(m: int) -> float:
        """``D(P(X^m) || Q(X^m))``."""
        from scipy.special import gammaln, xlog1py, xlogy

        if m == 0:
            return 0.0
        k = np.arange(m + 1, dtype=np.float64)
        log_p = xlogy(k, truth) + xlog1py(m - k, -truth)
        probability = np.exp(gammaln(m + 1) - gammaln(k + 1) - gammaln(m - k + 1) + log_p)
        gap = np.where(probability > 0, log_p - log_evidence(k, m), 0.0)
        return float((probability * gap).sum())

    whole = total(n)
    # The chain rule: the total is the sum of the batch regrets.
    return whole / n, whole - total(n - 1)


def prequential_codelength(predictions: Iterable[float] | Callable[[], Iterable[float]]) -> float:
    """``-Σ ln Q(x_t | x^{t-1})`` in nats, from the log-probability of each observation before it was seen."""
    values = list(predictions() if callable(predictions) else predictions)
    if any(math.isnan(value) or value > 1e-12 for value in values):
        raise ValueError("log-probabilities must not be NaN or above 0")
    return -math.fsum(values)
