"""What resampling from a pool does to given losses, in closed form."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import numpy.typing as npt

LARGEST = 5_000_000


def pool_marginals(losses: npt.ArrayLike, pool_size: int, tau: float) -> npt.NDArray[np.float64]:
    r"""With which probability each of a user's positives is trained on, over all pools of ``pool_size`` of them.

    .. math:: P(i) = \binom{N}{k}^{-1} \sum_{C \ni i,\ |C| = k}
        \frac{e^{-\ell_i/\tau}}{\sum_{c \in C} e^{-\ell_c/\tau}}

    Args:
        losses: of the user's ``N`` positives.
        pool_size: ``k <= N``; above ``N`` pools are drawn with replacement, which this does not cover.
        tau: temperature; ``inf`` is uniform.

    Raises:
        ValueError: more than five million pools.

    ``k = 1`` and ``tau = inf`` are uniform, ``k = N`` is the softmax of ``-losses / tau``; as tau goes to 0 the item
    with the r-th smallest loss has ``C(N - r, k - 1) / C(N, k)``: the k - 1 largest are never trained on.

    >>> pool_marginals([0.1, 0.3, 0.5, 0.7, 2.0], 3, 1e-6).round(6).tolist()
    [0.6, 0.3, 0.1, 0.0, 0.0]
    """
    values = np.asarray(losses, float)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError("losses must be a list of finite numbers")
    n = len(values)
    if not 1 <= pool_size <= n:
        raise ValueError(f"pool_size must be between 1 and the number of losses, {n}, got {pool_size}")
    if not tau > 0:
        raise ValueError(f"tau must be > 0, got {tau}")
    if math.comb(n, pool_size) > LARGEST:
        raise ValueError(f"{n} losses have more than {LARGEST:,} pools of {pool_size}")
    pools = np.array(list(combinations(range(n), pool_size)))
    inside = values[pools]
    chances = np.exp(-(inside - inside.min(1, keepdims=True)) / tau)
    chances /= chances.sum(1, keepdims=True)
    return np.bincount(pools.ravel(), chances.ravel(), minlength=n) / len(pools)


def selection_gap(clean: int, noisy: int, mean_difference: float, tau: float = 1.0) -> float:
    r"""How much more of training goes to clean than to noisy positives, for large pools.

    .. math:: E[\Lambda_{clean} - \Lambda_{noise}] \approx \frac{n - m\xi}{n + m\xi}, \qquad
        \xi = e^{(\mu_1 - \mu_2)/\tau}

    where losses of the ``n`` clean and ``m`` noisy positives have means ``μ₁ < μ₂`` and the same spread. Uniform
    sampling has ``(n - m)/(n + m)``: less for any positive difference of means.

    Args:
        clean: ``n``.
        noisy: ``m``.
        mean_difference: ``μ₂ - μ₁``.
        tau: temperature.

    Source: leading order of theorem 1 of "Personalized Denoising Implicit Feedback for Robust Recommender System",
    WWW 2025, arXiv 2502.00348.

    >>> selection_gap(28, 8, 0.0), round(selection_gap(28, 8, 0.5, tau=0.5), 4)
    (0.5555555555555556, 0.8098)
    """
    if clean < 0 or noisy < 0 or clean + noisy == 0:
        raise ValueError(f"clean and noisy must be counts >= 0, not both 0, got {clean} and {noisy}")
    if not tau > 0:
        raise ValueError(f"tau must be > 0, got {tau}")
    share = math.exp(-mean_difference / tau)
    return (clean - noisy * share) / (clean + noisy * share)
