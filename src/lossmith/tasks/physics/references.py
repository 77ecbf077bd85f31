"""Energies and states by classical methods: what a network is judged by, and what beats it in one dimension."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lossmith.tasks.physics.potentials import Array, Potential


@dataclass(frozen=True, slots=True)
class Reference:
    """Levels by a classical method.

    Attributes:
        method: which.
        energies: ``(states,)``.
        points: inner grid points, ``(n,)``; empty where only energies are known.
        states: normalised, ``(n, states)``.
    """

    method: str
    energies: Array
    points: Array
    states: Array


def finite_differences(potential: Potential, states: int = 1, *, points: int = 4001) -> Reference:
    """The lowest eigenpairs of ``-ψ'' + V ψ`` by second-order differences on ``points`` inner points.

    The matrix is tridiagonal, ``2/h² + V̄_i`` beside ``-1/h²``, with ``V̄_i`` the mean of ``V`` over the cell of the
    point; energies err by O(h²).

    >>> from lossmith.tasks.physics import infinite_well
    >>> float(finite_differences(infinite_well()).energies[0].round(5))
    9.8696
    """
    from scipy.linalg import eigh_tridiagonal

    a, b = potential.interval
    if points < max(10, states):
        raise ValueError(f"points must be at least {max(10, states)}, got {points}")
    h = (b - a) / (points + 1)
    x: Array = np.linspace(a, b, points + 2)[1:-1]
    energies, vectors = eigh_tridiagonal(
        2 / h**2 + _cell_means(potential, x, h),
        np.full(points - 1, -1 / h**2),
        select="i",
        select_range=(0, states - 1),
    )
    return Reference("finite differences", energies, x, vectors / math.sqrt(h))


def _cell_means(potential: Potential, x: Array, h: float) -> Array:
    """Mean of ``V`` over ``[x - h/2, x + h/2]``; cells with an edge inside are split there."""
    nodes, weights = np.polynomial.legendre.leggauss(3)
    means = potential((x[:, None] + h / 2 * nodes).reshape(-1)).reshape(len(x), -1) @ weights / 2
    inner = potential.edges[1:-1]
    for cell in np.unique(np.floor((inner - x[0]) / h + 0.5).astype(int)):
        if 0 <= cell < len(x):
            low, high = x[cell] - h / 2, x[cell] + h / 2
            cuts = np.array([low, *inner[(inner > low) & (inner < high)], high])
            lengths = np.diff(cuts)
            places = cuts[:-1, None] + lengths[:, None] * (nodes + 1) / 2
            means[cell] = (potential(places.reshape(-1)).reshape(places.shape) @ weights / 2 * lengths).sum() / h
    return means


def exact_levels(potential: Potential, states: int = 1) -> Array:
    """Levels of a potential of constant steps, to the last digits.

    In each step ``ψ`` is known in closed form; the ``n``-th level is where the solution that starts at the left wall
    gains its ``n``-th zero (Sturm), found by bisection. For the symmetric well and barrier these are the roots of the
    textbooks' transcendental equations, ``k tan(kc) = q coth(q(w - c))`` and so on.

    Raises:
        ValueError: the potential is not constant between jumps.

    >>> from lossmith.tasks.physics import barrier, finite_well
    >>> float(exact_levels(finite_well(20, 0.5, (0, 1)))[0].round(9))
    13.018068469
    >>> exact_levels(barrier(20, 0.2), 2).round(9).tolist()
    [16.912240702, 40.403821009]
    """
    if potential.steps is None:
        raise ValueError(f"potential {potential.name} is not constant between jumps: use finite_differences")
    lengths = np.diff([potential.interval[0], *potential.jumps, potential.interval[1]])
    heights = np.array(potential.steps)
    floor = float(heights.min())
    width = float(lengths.sum())
    levels = []
    for n in range(1, states + 1):
        low, high = floor, float(heights.max()) + (n * math.pi / width) ** 2 + 1e-9
        while (middle := (low + high) / 2) not in (low, high):
            low, high = (middle, high) if _zeros(middle, lengths, heights) < n else (low, middle)
        levels.append(high)
    return np.array(levels)


def _zeros(energy: float, lengths: Array, heights: Array) -> int:
    """Zeros in ``(a, b]`` of the solution with ``ψ(a) = 0``: the number of levels up to ``energy``."""
    value, slope, zeros = 0.0, 1.0, 0
    for length, height in zip(lengths, heights, strict=True):
        square = energy - height
        if square > 0:
            k = math.sqrt(square)
            phase = math.atan2(k * value, slope) % math.pi
            zeros += math.floor((phase + k * length) / math.pi)
            c, s = math.cos(k * length), math.sin(k * length)
            new = value * c + slope / k * s, slope * c - k * value * s
        else:
            q = math.sqrt(-square)
            # Divided by cosh: only the ratio counts, and cosh overflows.
            t = math.tanh(q * length)
            new = value + slope * (t / q if q * length > 1e-8 else length), slope + q * value * t
            zeros += (value * new[0] < 0) or (value != 0 and new[0] == 0)
        size = math.hypot(*new)
        value, slope = new[0] / size, new[1] / size
    return zeros
