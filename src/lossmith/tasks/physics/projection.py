"""The best output layer for given features, and how far off its energies can be.

The output layer of a :class:`Trial` enters linearly. For fixed features the best states are eigenvectors of a small
matrix (Rayleigh and Ritz), and the gradient of their energies in the features is exact with the eigenvectors held
fixed (Hellmann and Feynman): training need not search for what linear algebra knows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lossmith.tasks.physics.grid import Grid
from lossmith.tasks.physics.potentials import Array
from lossmith.tasks.physics.trial import Jet, Trial

# Directions in which features differ by less than this (relative, squared) are rounding.
_RANK = 1e-13


class Projected(NamedTuple):
    """The lowest states that features can make.

    Attributes:
        energies: Rayleigh quotients, above the true levels, ``(states,)``.
        next: the level above them, infinite where there is none.
        output: the layer that makes them, ``(states, features)``.
        jet: of the states on the grid.
    """

    energies: Tensor
    next: float
    output: Tensor
    jet: Jet


def project(features: Jet, grid: Grid, states: int) -> Projected:
    """Solve ``∫(φ_i' φ_j' + V φ_i φ_j) c = E ∫φ_i φ_j c`` for the lowest ``states``; they are orthonormal.

    Raises:
        ValueError: fewer independent features than states.
    """
    value, first = features.value.detach(), features.first.detach()
    overlap = (value.T * grid.w) @ value
    hamiltonian = (first.T * grid.w) @ first + (value.T * (grid.w * grid.v)) @ value
    scale = overlap.diagonal().clamp_min(1e-300).rsqrt()
    overlap = scale[:, None] * overlap * scale
    hamiltonian = scale[:, None] * hamiltonian * scale
    sizes, directions = torch.linalg.eigh(overlap)
    kept = sizes > _RANK * sizes[-1]
    if int(kept.sum()) < states:
        raise ValueError(f"{int(kept.sum())} independent features cannot make {states} states")
    whiten = directions[:, kept] * sizes[kept].rsqrt()
    energies, vectors = torch.linalg.eigh(whiten.T @ hamiltonian @ whiten)
    output = (scale[:, None] * (whiten @ vectors[:, :states])).T.contiguous()
    # Gradients must not run through the layer: at the minimum they vanish.
    jet = Jet(*(part @ output.T for part in features))
    return Projected(energies[:states], float(energies[states]) if len(energies) > states else np.inf, output, jet)


def energy_loss(found: Projected, grid: Grid) -> Tensor:
    """Sum of the states' energies, with its exact gradient in the features."""
    kinetic = (grid.w[:, None] * found.jet.first**2).sum(0)
    square = grid.w[:, None] * found.jet.value**2
    potential = (grid.v[:, None] * square).sum(0)
    return (kinetic + potential - found.energies * (square.sum(0) - 1)).sum()


def squared_residuals(found: Projected, grid: Grid) -> Array:
    """``ρ_k = ∫ (-ψ_k'' + V ψ_k - E_k ψ_k)²``, ``(states,)``."""
    value, second = found.jet.value.detach(), found.jet.second.detach()
    residual = -second + grid.v[:, None] * value - found.energies * value
    return (grid.w[:, None] * residual**2).sum(0).numpy()


def error_bounds(energies: Array, following: float, squared: Array) -> Array:
    """How far each energy may lie from a true level.

    The smaller of ``√ρ`` (Weinstein: some level is as near as that) and ``ρ / gap`` (Kato and Temple: for a level
    whose neighbours are ``gap`` away), where levels that nearly coincide may be taken together, with the gap to those
    outside and the sum of their residuals. Holds if no level was missed; the gaps are those of the computed levels,
    less the residual on the other side.

    >>> error_bounds(np.array([1.0, 3.0]), 5.0, np.array([1e-6, 1e-6])).round(8).tolist()
    [5e-07, 5e-07]
    """
    every = np.concatenate([[-np.inf], energies, [following]])
    bounds = np.sqrt(squared)
    for first in range(len(energies)):
        for last in range(first, len(energies)):
            together = float(squared[first : last + 1].sum())
            gap = min(every[first + 1] - every[first], every[last + 2] - every[last + 1]) - np.sqrt(together)
            if gap > 0:
                bounds[first : last + 1] = np.minimum(bounds[first : last + 1], together / gap)
    return bounds


def load_output(trial: Trial, found: Projected) -> None:
    """Put the layer into the trial function."""
    with torch.no_grad():
        trial.output.copy_(found.output)
