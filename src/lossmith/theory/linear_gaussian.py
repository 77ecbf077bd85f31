"""A language model as a frozen map of hidden Markov states, and what a head tuned on top of it risks.

"Investigating the Impact of Model Complexity in Large Language Models", 2024, arXiv 2410.00699. The population
quantities are exact consequences of the model's definition; the risk above the number of examples is the deterministic
equivalent of Hastie, Montanari, Rosset and Tibshirani, 2022.

Vectors are rows: ``z_{i+1} = z_i A + e``, ``x_i = z_i W + u``.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


class Population(NamedTuple):
    """What head tuning would find with infinitely many examples.

    Attributes:
        sigma_x: covariance of the representations, ``(p, p)``.
        beta: best linear head ``Σ_x⁻¹ Wᵀ Σ_z A``, ``(p, d)``.
        sigma_eta: covariance of what it leaves over, ``(d, d)``.
        null_risk: of a head that says 0.
    """

    sigma_x: Array
    beta: Array
    sigma_eta: Array
    null_risk: float

    @property
    def best_risk(self) -> float:
        """Of the best head, ``tr Σ_η``."""
        return float(np.trace(self.sigma_eta))


@dataclass(frozen=True)
class LinearGaussianHMM:
    """Hidden states are words; representations of width ``p`` are what a frozen language model makes of them.

    ``z_1 ~ N(0, I)``, ``z_{i+1} = z_i A + e_i``, ``x_i = z_i W + u_i``, ``u_i ~ N(0, s_u² I)``.

    Attributes:
        transition: ``A``, ``(d, d)``.
        noise_cov: covariance of ``e``, ``(d, d)``.
        features: ``W``, ``(d, p)``.
        feature_noise: ``s_u``.

    >>> hmm = LinearGaussianHMM.stationary(2, 1, rho=0.8)
    >>> hmm.sample(5, 3).states.shape
    (5, 3, 2)
    """

    transition: Array
    noise_cov: Array
    features: Array
    feature_noise: float

    def __post_init__(self) -> None:
        a, s, w = (np.asarray(m, dtype=np.float64) for m in (self.transition, self.noise_cov, self.features))
        if a.ndim != 2 or a.shape[0] != a.shape[1]:
            raise ValueError(f"transition must be square, got shape {a.shape}")
        if s.shape != a.shape:
            raise ValueError(f"noise_cov must have shape {a.shape}, as transition, got {s.shape}")
        if w.ndim != 2 or w.shape[0] != len(a):
            raise ValueError(f"features must have shape ({len(a)}, p), as transition has {len(a)} rows, got {w.shape}")
        if self.feature_noise < 0 or not math.isfinite(self.feature_noise):
            raise ValueError(f"feature_noise must not be negative, got {self.feature_noise}")
        if not all(np.isfinite(m).all() for m in (a, s, w)):
            raise ValueError("transition, noise_cov and features must be finite")
        if np.linalg.eigvalsh((s + s.T) / 2).min() < -1e-12 * max(1.0, np.abs(s).max()):
            raise ValueError("noise_cov has a negative eigenvalue: it is no covariance")
        for name, value in (("transition", a), ("noise_cov", s), ("features", w)):
            object.__setattr__(self, name, value)

    @classmethod
    def stationary(
        cls, d: int, p: int, *, rho: float = 0.8, feature_noise: float = 0.5, seed: int = 0, draw: int = 0
    ) -> LinearGaussianHMM:
        """``A = ρ Q`` with orthogonal ``Q`` and noise ``(1 - ρ²) I``: every position has covariance ``I``.

        Args:
            d: size of a state.
            p: width of the representation; ``W`` has independent entries ``N(0, 1/d)``.
            rho: dependence of a state on the one before.
            feature_noise: ``s_u``.
            seed: of ``Q``.
            draw: of ``W``, besides ``seed`` and ``p``.

        Raises:
            ValueError: ``rho`` outside [0, 1), or sizes below 1.
        """
        if not 0 <= rho < 1:
            raise ValueError(f"rho, the spectral radius, must lie in [0, 1) for a stationary chain, got {rho}")
        if d < 1 or p < 1:
            raise ValueError(f"d and p must be at least 1, got {d} and {p}")
        q, r = np.linalg.qr(np.random.default_rng([seed, 0]).standard_normal((d, d)))
        w = np.random.default_rng([seed, 1, p, draw]).standard_normal((d, p)) / math.sqrt(d)
        return cls(rho * q * np.sign(np.diag(r)), (1 - rho**2) * np.eye(d), w, feature_noise)

    @property
    def d(self) -> int:
        """Size of a state."""
        return len(self.transition)

    @property
    def p(self) -> int:
        """Width of a representation."""
        return int(self.features.shape[1])

    def state_covariance(self, position: int | None = None) -> Array:
        """Covariance of ``z`` at a position counted from 1, or of the stationary chain.

        Raises:
            ValueError: a chain that is not stationary (spectral radius at least 1), or a position below 1.
        """
        if position is None:
            from scipy.linalg import solve_discrete_lyapunov

            radius = float(np.abs(np.linalg.eigvals(self.transition)).max())
            if radius >= 1:
                raise ValueError(f"the chain has no stationary covariance: the spectral radius of A is {radius:.4g}")
            found: Array = solve_discrete_lyapunov(self.transition.T, self.noise_cov)
            return found
        if position < 1:
            raise ValueError(f"position counts from 1, got {position}")
        sigma = np.eye(self.d)
        for _ in range(position - 1):
            sigma = self.transition.T @ sigma @ self.transition + self.noise_cov
        return sigma

    def population(self, position: int | None = None) -> Population:
        """Exact quantities for predicting ``z_{i+1}`` from ``x_i`` at a position (see :meth:`state_covariance`)."""
        s, a, w = self.state_covariance(position), self.transition, self.features
        sigma_x = w.T @ s @ w + self.feature_noise**2 * np.eye(self.p)
        cross = w.T @ s @ a
        beta = np.linalg.pinv(sigma_x, hermitian=True) @ cross
        following = a.T @ s @ a + self.noise_cov
        return Population(sigma_x, beta, following - cross.T @ beta, float(np.trace(following)))

    def sample(self, sequences: int, length: int, *, seed: int = 0) -> Sample:
        """Independent sequences from the start of the chain."""
        if sequences < 1 or length < 1:
            raise ValueError(f"sequences and length must be at least 1, got {sequences} and {length}")
        draw = np.random.default_rng(seed)
        states = np.empty((sequences, length, self.d))
        states[:, 0] = draw.standard_normal((sequences, self.d))
        noise = _root(self.noise_cov)
        for i in range(1, length):
            states[:, i] = states[:, i - 1] @ self.transition + draw.standard_normal((sequences, self.d)) @ noise
        x = states @ self.features + self.feature_noise * draw.standard_normal((sequences, length, self.p))
        return Sample(states, x)

    def pairs(self, n: int, *, seed: int | list[int] = 0, position: int | None = None) -> tuple[Array, Array]:
        """``n`` independent examples ``(x_i, z_{i+1})``, one per sequence: ``(n, p)`` and ``(n, d)``."""
        draw = np.random.default_rng(seed)
        z = draw.standard_normal((n, self.d)) @ _root(self.state_covariance(position))
        x = z @ self.features + self.feature_noise * draw.standard_normal((n, self.p))
        return x, z @ self.transition + draw.standard_normal((n, self.d)) @ _root(self.noise_cov)


class Sample(NamedTuple):
    """States ``(sequences, length, d)`` and representations ``(sequences, length, p)``."""

    states: Array
    representations: Array


def _root(covariance: Array) -> Array:
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    root: Array = vectors * np.sqrt(values.clip(0)) @ vectors.T
    return root


class MinNormHead:
    """Least squares ``X B ≈ Z``: the shortest of all best heads, or ridge.

    ``B = X⁺ Z`` (ordinary least squares where there are more examples than features, the interpolator of least norm
    otherwise), or ``(XᵀX + n λ I)⁻¹ Xᵀ Z``. No intercept, nothing is centred.

    Args:
        ridge: ``λ``.

    >>> head = MinNormHead().fit(np.eye(2, 3), np.array([[1.0], [2.0]]))
    >>> head.coefficients.ravel().tolist()
    [1.0, 2.0, 0.0]
    """

    def __init__(self, ridge: float = 0.0) -> None:
        if not (math.isfinite(ridge) and ridge >= 0):
            raise ValueError(f"ridge must not be negative, got {ridge}")
        self.ridge = ridge
        self.coefficients: Array = np.zeros((0, 0))

    def fit(self, x: ArrayLike, z: ArrayLike) -> MinNormHead:
        """Fit to ``x`` ``(n, p)`` and ``z`` ``(n, d)``.

        Raises:
            ValueError: shapes that do not fit, or values that are not finite.
        """
        features, targets = np.asarray(x, dtype=np.float64), np.asarray(z, dtype=np.float64)
        if targets.ndim == 1:
            targets = targets[:, None]
        if features.ndim != 2 or len(features) != len(targets) or not len(features):
            raise ValueError(f"x must be (n, p) and z (n, d), got {features.shape} and {targets.shape}")
        if not (np.isfinite(features).all() and np.isfinite(targets).all()):
            raise ValueError("x and z must be finite")
        if self.ridge:
            u, s, vt = np.linalg.svd(features, full_matrices=False)
            shrunk = s / (s**2 + len(features) * self.ridge)
            self.coefficients = vt.T @ (shrunk[:, None] * (u.T @ targets))
        else:
            self.coefficients = _pseudo_inverse(features) @ targets
        return self

    def predict(self, x: ArrayLike) -> Array:
        """``x B``."""
        return np.asarray(x, dtype=np.float64) @ self.coefficients


def _pseudo_inverse(x: Array) -> Array:
    return np.asarray(np.linalg.pinv(x, rcond=max(x.shape) * np.finfo(np.float64).eps), dtype=np.float64)


def excess_risk(head: MinNormHead | Array, population: Population) -> float:
    """``tr((B - β)ᵀ Σ_x (B - β))``: what a head risks beyond the best one, without a test set."""
    b = head.coefficients if isinstance(head, MinNormHead) else head
    gap = b - population.beta
    return float(np.einsum("pd,pq,qd->", gap, population.sigma_x, gap))


def conditional_risk(x: Array, population: Population) -> tuple[float, float]:
    """Bias and variance of the least-norm head for given ``x``, exact in any shape.

    ``tr(βᵀ Π Σ_x Π β)`` with ``Π = I - X⁺X``, and ``tr Σ_η · tr(Σ_x X⁺ X⁺ᵀ)``.
    """
    inverse = _pseudo_inverse(np.asarray(x, dtype=np.float64))
    left = population.beta - inverse @ (x @ population.beta)
    bias = float(np.einsum("pd,pq,qd->", left, population.sigma_x, left))
    return bias, population.best_risk * float(np.einsum("pn,pq,qn->", inverse, population.sigma_x, inverse))


def theoretical_risk(population: Population, n: int) -> tuple[float, float]:
    """Expected bias and variance of the least-norm head from ``n`` examples.

    Below ``p = n - 1`` exactly ``(0, tr Σ_η · p / (n - p - 1))``; above ``n + 1`` the deterministic equivalent, with
    the exact finite-size variance where ``Σ_x`` is a multiple of the identity; between, infinite (with a warning).

    >>> flat = Population(np.eye(4), np.full((4, 1), 0.5), np.eye(1), 2.0)
    >>> theoretical_risk(flat, 2)
    (0.5, 2.0)
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    p = len(population.sigma_x)
    noise = population.best_risk
    if p < n - 1:
        return 0.0, noise * p / (n - p - 1)
    if p <= n + 1:
        warnings.warn(f"with {p} features and {n} examples the expected risk is infinite", stacklevel=2)
        return 0.0, math.inf
    s, v = np.linalg.eigh(population.sigma_x)
    if np.ptp(s) <= 1e-12 * s.max():
        return (1 - n / p) * float(s.mean()) * float((population.beta**2).sum()), noise * n / (p - n - 1)
    bias, variance = deterministic_equivalent(s, ((v.T @ population.beta) ** 2).sum(-1), n)
    return bias, noise * variance


def deterministic_equivalent(spectrum: Array, energies: Array, n: int) -> tuple[float, float]:
    """Bias, and variance per unit of noise, for ``p > n`` features with covariance eigenvalues ``spectrum``.

    With ``γ = p / n``, ``c`` the root of ``1 - 1/γ = (1/p) Σ 1/(1 + c γ s_i)`` and
    ``ρ = γ c Σ s²/(1 + cγs)² / Σ s/(1 + cγs)²``: bias ``(1 + ρ) Σ g_i s_i / (1 + cγs_i)²``, variance ``ρ``.

    >>> deterministic_equivalent(np.ones(20), np.full(20, 0.05), 10)
    (0.5, 1.0)
    """
    from scipy.optimize import brentq

    p = len(spectrum)
    if p <= n:
        raise ValueError(f"the equivalent needs more features than examples, got {p} and {n}")
    gamma = p / n

    def gap(log_c: float) -> float:
        return float(np.mean(1 / (1 + math.exp(log_c) * gamma * spectrum))) - (1 - 1 / gamma)

    scale = -math.log(gamma * float(spectrum.max()))
    low, high = scale - 5, scale + 5
    while gap(low) < 0:
        low -= 5
    while gap(high) > 0:
        high += 5
    c = math.exp(brentq(gap, low, high, xtol=1e-14, rtol=1e-14))
    weights = 1 / (1 + c * gamma * spectrum) ** 2
    rho = gamma * c * float((spectrum**2 * weights).sum() / (spectrum * weights).sum())
    bias = (1 + rho) * float((energies * spectrum * weights).sum())
    return round(bias, 14), round(rho, 14)
