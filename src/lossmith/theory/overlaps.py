"""How much vectors get in each other's way: norms and overlaps of the rows of a matrix."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

# A row shorter than this has no direction.
DEAD = 1e-6


def welch_bound(vectors: int, dimensions: int) -> float:
    r"""The least mean squared overlap that unit vectors can have: :math:`\max(0, \frac{n - m}{m (n - 1)})`.

    Vectors that reach it are a tight frame; random ones have :math:`1/m`, which is barely more where ``n >> m``.

    Args:
        vectors: ``n >= 2``.
        dimensions: ``m >= 1``.

    Source: Welch, "Lower bounds on the maximum cross correlation of signals", 1974; as used by Liu et al. 2025,
    arXiv 2505.10465.

    >>> welch_bound(3, 2)
    0.25
    """
    if vectors < 2 or dimensions < 1:
        raise ValueError(f"needs at least 2 vectors and 1 dimension, got {vectors} and {dimensions}")
    return max(0.0, (vectors - dimensions) / (dimensions * (vectors - 1)))


def mean_square_overlap(weight: Float[Tensor, "*batch rows columns"]) -> Float[Tensor, "*batch"]:
    r"""Mean over all pairs of rows of the squared cosine between them.

    .. math:: \frac{1}{n(n-1)} \sum_{i \ne j} \Bigl(\frac{W_i \cdot W_j}{\|W_i\| \|W_j\|}\Bigr)^2

    Computed from the squared Frobenius norm of the Gram matrix of the columns, which is the same sum with the diagonal:
    ``n m²`` operations instead of ``n² m``. Rows without direction (norm at most 1e-6) do not count; NaN where
    fewer than two are left.

    Returns:
        float64.

    Source: Liu et al. 2025, arXiv 2505.10465.

    >>> mean_square_overlap(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])).item()
    0.333333...
    """
    unit, alive = _units(weight)
    rows, columns = unit.shape[-2:]
    gram = unit.mT @ unit if columns <= rows else unit @ unit.mT
    diagonal = unit.square().sum(-1).square().sum(-1)
    return (gram.square().sum((-2, -1)) - diagonal).clamp_min(0) / _pairs(alive)


def mean_absolute_overlap(weight: Float[Tensor, "*batch rows columns"]) -> Float[Tensor, "*batch"]:
    """The same of the absolute cosine. Needs all pairs at once: ``n²`` numbers.

    >>> mean_absolute_overlap(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])).item()
    0.466666...
    """
    unit, alive = _units(weight)
    total = (unit @ unit.mT).abs().sum((-2, -1)) - unit.square().sum((-2, -1))
    return total.clamp_min(0) / _pairs(alive)


def represented(weight: Float[Tensor, "*batch rows columns"], threshold: float = 0.5) -> Float[Tensor, "*batch"]:
    r"""Share of the rows whose norm is above ``threshold``: :math:`\phi_{1/2}` (:math:`\phi_1` with 1).

    About ``m/n`` where only the most frequent features are stored, about 1 where all are, overlapping.

    Source: Liu et al. 2025, arXiv 2505.10465.

    >>> represented(torch.tensor([[0.3, 0.3], [0.6, 0.8]])).item()
    0.5
    """
    _check(weight)
    return (weight.double().norm(dim=-1) > threshold).double().mean(-1)


def _units(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of length 1 (or 0, where they have no direction), and how many have a direction."""
    _check(weight)
    wide = weight.double()
    norms = wide.norm(dim=-1, keepdim=True)
    alive = norms > DEAD
    return torch.where(alive, wide / norms, 0.0), alive.sum((-2, -1))


def _pairs(alive: Tensor) -> Tensor:
    count = alive.double()
    return torch.where(count > 1, count * (count - 1), torch.nan)


def _check(weight: Tensor) -> None:
    if weight.ndim < 2 or weight.shape[-2] < 2 or weight.shape[-1] < 1:
        raise ValueError(f"weight must have at least two rows and one column, got shape {tuple(weight.shape)}")
    if not weight.is_floating_point():
        raise TypeError(f"weight must hold floating-point numbers, got {weight.dtype}")
    if not weight.isfinite().all():
        raise ValueError("weight has values that are not finite")
