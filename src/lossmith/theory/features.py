"""Sparse features with given frequencies: what the toy model of superposition is trained on.

Liu, Liu and Gore, "Superposition Yields Robust Neural Scaling", 2025, arXiv 2505.10465.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lossmith.errors import did_you_mean

SHAPES = ("power", "exponential", "linear")
# A feature that is on in all but one of 2^24 rows is on in all of them, as float32 uniforms would have it.
_ALWAYS = 24 * math.log(2)


def feature_frequencies(
    shape: str,
    features: int,
    *,
    exponent: float = 1.0,
    scale: float = 400.0,
    active: float = 1.0,
) -> Float[Tensor, " features"]:
    r"""How often each feature is on, the most frequent first.

    .. math:: p_i \propto i^{-\alpha} \;(\text{power}), \qquad e^{-(i-1)/s} \;(\text{exponential}), \qquad
        (n - i + 1)/n \;(\text{linear}), \qquad \sum_i p_i = E

    Args:
        shape: ``"power"``, ``"exponential"`` or ``"linear"``.
        features: how many, ``n``.
        exponent: ``α >= 0`` of the power law.
        scale: ``s > 0`` of the exponential, in features.
        active: ``E``, the number of features that are on in an example, in the mean.

    Returns:
        float64 probabilities, not increasing.

    Raises:
        ValueError: an unknown shape, numbers out of range, or an ``active`` that needs a probability above 1.

    Source: Liu et al. 2025, arXiv 2505.10465 (defaults: power, one feature in the mean).

    >>> [round(p, 6) for p in feature_frequencies("power", 4).tolist()]
    [0.48, 0.24, 0.16, 0.12]
    """
    if shape not in SHAPES:
        raise ValueError(f"unknown shape '{shape}': {did_you_mean(shape, SHAPES)}")
    if features < 1:
        raise ValueError(f"features must be at least 1, got {features}")
    if not (math.isfinite(exponent) and exponent >= 0):
        raise ValueError(f"exponent must be at least 0, got {exponent}")
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be positive, got {scale}")
    if not (math.isfinite(active) and active > 0):
        raise ValueError(f"active must be positive, got {active}")
    i = torch.arange(1, features + 1, dtype=torch.float64)
    if shape == "power":
        weights = i**-exponent
    elif shape == "exponential":
        weights = torch.exp(-(i - 1) / scale)
    else:
        weights = (features - i + 1) / features
    probabilities = active * weights / weights.sum()
    if (largest := float(probabilities[0])) > 1 + 1e-12:
        raise ValueError(
            f"active={active:g} would need a probability of {largest:.3g} for the most frequent of {features} "
            f"features; at most {active / largest:.4g} can be active with this shape"
        )
    return probabilities.clamp_max(1.0)


def with_density(probabilities: Float[Tensor, " features"], share: float) -> Float[Tensor, " features"]:
    r"""The same frequencies at a higher density, ``p_i (1 + t (1/p_1 - 1))``: at ``share=1`` the first is always on.

    Args:
        probabilities: not all zero.
        share: ``t`` in [0, 1].

    Raises:
        ValueError: a share outside [0, 1], or wrong probabilities.

    >>> with_density(torch.tensor([0.5, 0.25]), 1.0).tolist()
    [1.0, 0.5]
    """
    check_probabilities(probabilities)
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share}")
    return probabilities * (1 + share * (1 / probabilities.max() - 1))


def check_probabilities(probabilities: Tensor) -> None:
    """Refuse what is not a row of probabilities.

    Raises:
        ValueError: says what is wrong and where.
        TypeError: not floating-point numbers.
    """
    if probabilities.ndim != 1 or len(probabilities) == 0:
        raise ValueError(f"probabilities must be one row, got shape {tuple(probabilities.shape)}")
    if not probabilities.is_floating_point():
        raise TypeError(f"probabilities must be floating-point numbers, got {probabilities.dtype}")
    wrong = ~((probabilities >= 0) & (probabilities <= 1))
    if wrong.any():
        first = int(wrong.nonzero()[0])
        raise ValueError(f"probabilities must lie in [0, 1], got {float(probabilities[first]):g} at index {first}")
    if not (probabilities > 0).any():
        raise ValueError("probabilities are all 0: no feature is ever on")


class Active(NamedTuple):
    """The features that are on in some rows: three columns of equal length, in the order of the rows."""

    rows: Int[Tensor, " count"]
    features: Int[Tensor, " count"]
    values: Float[Tensor, " count"]


def sample_active(probabilities: Float[Tensor, " features"], rows: int, generator: torch.Generator) -> Active:
    r"""Draw rows without visiting the features that are off: the work grows with those that are on.

    A feature is on where a Poisson process of rate :math:`\lambda_i = -\ln(1 - p_i)` has at least one point, which has
    probability :math:`p_i` exactly; all points of all features are thrown at once, and several in one place count
    as one.
    """
    steps = _rates(probabilities).cumsum(0)
    total = float(steps[-1])
    points = int(torch.poisson(torch.tensor([rows * total], dtype=torch.float64), generator=generator))
    uniform = torch.rand(points, dtype=torch.float64, generator=generator) * total
    feature = torch.searchsorted(steps, uniform, right=True).clamp_max(len(probabilities) - 1)
    row = torch.randint(rows, (points,), generator=generator)
    cells = torch.unique(row * len(probabilities) + feature)
    values = 2 * torch.rand(len(cells), dtype=torch.float64, generator=generator)
    return Active(cells // len(probabilities), cells % len(probabilities), values)


def expected_points(probabilities: Float[Tensor, " features"]) -> float:
    """How many points :func:`sample_active` throws per row."""
    return float(_rates(probabilities).sum())


def _rates(probabilities: Tensor) -> Tensor:
    return (-torch.log1p(-probabilities.double())).clamp_max(_ALWAYS)


def sample_features(
    probabilities: Float[Tensor, " features"],
    rows: int,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "rows features"]:
    r"""Examples :math:`x_i = u_i v_i` with :math:`u_i` on with probability :math:`p_i`, :math:`v_i` uniform in (0, 2).

    Hence :math:`E[x_i] = p_i` and :math:`E[x_i^2] = \tfrac43 p_i`.

    Args:
        probabilities: of being on, each in [0, 1].
        rows: how many examples.
        generator: source of randomness; a new one with seed 0 by default.
        dtype: of the result.

    Raises:
        ValueError: probabilities out of range, or a negative number of rows.

    Source: Liu et al. 2025, arXiv 2505.10465.

    >>> sample_features(torch.tensor([1.0, 0.0]), 3).count_nonzero(0).tolist()
    [3, 0]
    """
    check_probabilities(probabilities)
    if rows < 0:
        raise ValueError(f"rows must not be negative, got {rows}")
    generator = generator if generator is not None else torch.Generator().manual_seed(0)
    dense = torch.zeros(rows, len(probabilities), dtype=dtype)
    if rows:
        active = sample_active(probabilities, rows, generator)
        dense[active.rows, active.features] = active.values.to(dtype)
    return dense
