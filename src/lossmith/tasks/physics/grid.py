"""Places with weights: where residuals are taken, and how integrals are."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lossmith.errors import InputError
from lossmith.tasks.physics.potentials import Potential


class Grid(NamedTuple):
    """Collocation points ``x``, quadrature weights ``w`` (they sum to ``b - a``) and the potential ``v`` there."""

    x: Tensor
    w: Tensor
    v: Tensor


def midpoints(potential: Potential, points: int) -> Grid:
    """``x_j = a + (j + 1/2)(b - a) / n``, equal weights.

    >>> from lossmith.tasks.physics import infinite_well
    >>> midpoints(infinite_well(), 10).x[:3].tolist()
    [0.05, 0.15, 0.25]
    """
    _enough(points)
    a, b = potential.interval
    x = a + (np.arange(points) + 0.5) * (b - a) / points
    return _grid(potential, x, np.full(points, (b - a) / points))


def endpoints(potential: Potential, points: int) -> Grid:
    """Equally spaced with the walls among them, as public notebooks have it; equal weights. Jumps may lie on points.

    >>> from lossmith.tasks.physics import infinite_well
    >>> endpoints(infinite_well(), 11).x[:2].tolist()
    [0.0, 0.1]
    """
    _enough(points)
    a, b = potential.interval
    return _grid(potential, np.linspace(a, b, points), np.full(points, (b - a) / points))


def gauss(potential: Potential, points: int) -> Grid:
    """About ``points`` Gauss-Legendre points, shared between the stretches from edge to edge by their lengths.

    No stretch has fewer than 12, and long stretches are cut, so that a potential that is rough somewhere costs there.

    >>> from lossmith.tasks.physics import barrier
    >>> float(gauss(barrier(20, 0.2), 100).w.sum().round(decimals=12))
    1.0
    """
    _enough(points)
    a, b = potential.interval
    nodes, weights = np.polynomial.legendre.leggauss(12)
    cuts = [
        np.linspace(low, high, 1 + max(1, round(points / 12 * (high - low) / (b - a))))
        for low, high in zip(potential.edges[:-1], potential.edges[1:], strict=True)
    ]
    low = np.concatenate([cut[:-1] for cut in cuts])
    half = np.concatenate([np.diff(cut) for cut in cuts]) / 2
    x = (low + half)[:, None] + half[:, None] * nodes
    return _grid(potential, x.reshape(-1), (half[:, None] * weights).reshape(-1))


def _grid(potential: Potential, x: np.ndarray, w: np.ndarray) -> Grid:
    return Grid(*(torch.tensor(part, dtype=torch.float64) for part in (x, w, potential(x))))


def _enough(points: int) -> None:
    if points < 10:
        raise InputError(f"points must be at least 10, got {points}")
