"""Pruning between shares of the compute: which steps that is, and how many weights are active on average.

Jin et al., "The Journey Matters: Average Parameter Count over Pre-training Unifies Sparse and Dense Scaling Laws",
2025, arXiv 2501.12486: the density falls geometrically; a step costs what its density is. With the final density
:math:`d = 1 - S` and the mean density while pruning :math:`g = (1-d)/\\ln(1/d)`, pruning from the share :math:`x` to
the share :math:`y` of the compute takes :math:`Q = x + (y-x)/g + (1-y)/d` times the steps of a dense run of that
compute.
"""

from __future__ import annotations

import math


def step_fractions(sparsity: float, *, start: float = 0.25, end: float = 0.75) -> tuple[float, float]:
    r"""The shares of the steps after which pruning begins and ends, :math:`x/Q` and :math:`(x + (y-x)/g)/Q`.

    Args:
        sparsity: share of the weights that is removed in the end, in [0, 1).
        start: share of the compute spent before pruning begins, ``x``.
        end: share of the compute spent when it is over, ``y``.

    Raises:
        ValueError: a share out of range.

    >>> tuple(round(share, 4) for share in step_fractions(0.8))
    (0.0998, 0.5012)
    """
    check_shares(sparsity, start, end)
    density, mean = _densities(sparsity)
    whole = start + (end - start) / mean + (1 - end) / density
    return start / whole, (start + (end - start) / mean) / whole


def average_density(sparsity: float, *, start: float = 0.25, end: float = 0.75) -> float:
    r"""Active weights on average over the steps, as a share of all: :math:`\bar N / N_0 = 1/Q`.

    Arguments as of :func:`step_fractions`.

    >>> round(average_density(0.8), 6)
    0.399058
    """
    check_shares(sparsity, start, end)
    density, mean = _densities(sparsity)
    return 1 / (start + (end - start) / mean + (1 - end) / density)


def average_density_of_steps(sparsity: float, start: float, end: float) -> float:
    """The same where ``start`` and ``end`` are shares of the *steps*: ``start + (end - start) g + (1 - end) d``.

    >>> share = step_fractions(0.8)
    >>> round(average_density_of_steps(0.8, *share), 6)
    0.399058
    """
    check_shares(sparsity, start, end)
    density, mean = _densities(sparsity)
    return start + (end - start) * mean + (1 - end) * density


def steps_for_compute(
    flops: float, params: float, sparsity: float, *, tokens_per_step: int, start: float = 0.25, end: float = 0.75
) -> int:
    """Optimiser steps that a budget pays for: ``C / (6 N_0 (1/Q) tokens_per_step)``, rounded, at least 1.

    Args:
        flops: training compute ``C``, counted as 6 per active parameter and token.
        params: prunable parameters at the start, ``N_0``.
        sparsity: in the end.
        tokens_per_step: over all processes.
        start: share of the compute before pruning.
        end: share of the compute when pruning is over.

    >>> steps_for_compute(5.41e20, 1.14e9, 0.8, tokens_per_step=4096 * 2048)
    23627
    """
    for name, value in (("flops", flops), ("params", params), ("tokens_per_step", tokens_per_step)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive and finite, got {value}")
    average = params * average_density(sparsity, start=start, end=end)
    return max(round(flops / (6 * average * tokens_per_step)), 1)


def check_shares(sparsity: float, start: float = 0.25, end: float = 0.75) -> None:
    """Refuse shares out of range.

    Raises:
        ValueError: names the share, what was given and what is allowed.
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be a number in [0, 1), the share of weights to remove, got {sparsity!r}")
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (start, end))
    if not numbers or not 0 <= start < end <= 1:
        raise ValueError(f"start and end must be shares with 0 <= start < end <= 1, got {start}, {end}")


def _densities(sparsity: float) -> tuple[float, float]:
    """Density in the end, and on average (over the steps) while it falls geometrically."""
    density = 1 - sparsity
    # (1 - d) / ln(1/d) with S = 1 - d; log1p keeps it right where S is tiny.
    return density, 1.0 if sparsity == 0 else sparsity / -math.log1p(-sparsity)
