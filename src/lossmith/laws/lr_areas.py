"""The two areas of a learning-rate schedule: under it, and of its annealing.

Tissue, Wang and Wang, "Scaling Law with Learning Rate Annealing", 2024, arXiv 2408.11029.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lossmith.laws.terms import Array


def areas(rates: Array, decay: float | Sequence[float] | Array) -> tuple[Array, Array]:
    """The area under the learning rate and the area of its annealing, after every step, in linear time.

    With the momentum ``m_i = decay * m_{i-1} + (eta_{i-1} - eta_i)`` and ``eta_0 = eta_1``, the double sum ``S2`` is
    ``sum_i m_i = (eta_1 - eta_s - decay * m_s) / (1 - decay)``: one pass of a filter, for any number of schedules.

    Args:
        rates: learning rate of each step, ``(..., T)``: of one schedule or of many.
        decay: the momentum's, inside (0, 1): one number, or ``(D,)`` of them.

    Returns:
        ``S1 (..., T)``, and ``S2`` of the same shape, ``(D, ..., T)`` for several decays.

    Raises:
        ValueError: a decay outside (0, 1).

    >>> first, second = areas(np.array([4, 4, 3, 3, 1, 1]) * 1e-3, 0.9)
    >>> first.round(6).tolist(), second.round(6).tolist()
    ([0.004, 0.008, 0.011, 0.014, 0.015, 0.016], [0.0, 0.0, 0.001, 0.0019, 0.00471, 0.007239])
    """
    from scipy.signal import lfilter

    eta = np.asarray(rates, dtype=np.float64)
    factors = np.atleast_1d(np.asarray(decay, dtype=np.float64))
    if eta.ndim == 0 or eta.shape[-1] == 0:
        raise ValueError(f"rates must be a list of numbers, got shape {eta.shape}")
    if not ((factors > 0) & (factors < 1)).all():
        raise ValueError(f"decay must lie inside (0, 1), got {decay}")
    fall = -np.diff(eta, axis=-1, prepend=eta[..., :1])
    below = eta[..., :1] - eta
    second = np.empty((len(factors), *eta.shape))
    for k, factor in enumerate(factors):
        second[k] = (below - factor * lfilter([1.0], [1.0, -factor], fall, axis=-1)) / (1 - factor)
    return eta.cumsum(-1), second if np.ndim(decay) else second[0]


def warmup_steps(rates: Array) -> int:
    """The number of steps before the rate stops rising for the first time; a rate of 0 at the start belongs to them.

    >>> warmup_steps(np.array([0.0, 0.0, 1.0, 2.0, 2.0, 1.0])), warmup_steps(np.array([2.0, 2.0, 3.0]))
    (3, 0)
    """
    begin = int(np.argmax(rates > 0))
    stops = np.flatnonzero(np.diff(rates[begin:]) <= 0)
    return begin + int(stops[0]) if len(stops) else len(rates) - 1
