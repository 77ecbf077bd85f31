"""Solving the stationary Schroedinger equation with a network: ``-ψ'' + V ψ = E ψ``, zero at the walls."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from lossmith.errors import InputError, did_you_mean
from lossmith.tasks.physics.by_projection import solve_by_projection
from lossmith.tasks.physics.by_residual import solve_by_residual
from lossmith.tasks.physics.levels import Levels, Step
from lossmith.tasks.physics.potentials import Array, Potential, check_interval, from_function, get_potential

METHODS = ("projection", "residual")

Progress = Callable[[Step], None]


def solve_schrodinger(
    potential: Potential | str | Callable[[Array], Any],
    *,
    states: int = 1,
    tolerance: float = 1e-4,
    method: Literal["projection", "residual"] = "projection",
    interval: tuple[float, float] | None = None,
    kinetic: float = 1.0,
    hidden: Sequence[int] | None = None,
    activation: str = "tanh",
    n_collocation: int | None = None,
    collocation: Literal["midpoints", "endpoints"] = "midpoints",
    energy: float | None = None,
    energy_init: Literal["rayleigh"] | float | Sequence[float] | None = None,
    norm_weight: float | None = None,
    lr: float = 2e-3,
    energy_lr: float = 2e-2,
    max_steps: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> Levels:
    """The lowest states of a potential, by a physics-informed network.

    ``method="projection"``: the output layer is solved for (:mod:`~lossmith.tasks.physics.projection`) and the layers
    below are trained by L-BFGS on the states' energies, wider and wider, until error bounds from the residual are
    below ``tolerance``. ``method="residual"`` is the paper's: residual and norm (and orthogonality, for several
    states) as a loss for all weights and, unless it is given, the energy, with Adam for ``max_steps``.

    Source: "Physics-Informed Neural Networks for One-Dimensional Quantum Well Problems", 2025, arXiv 2504.05367.

    Args:
        potential: a :class:`Potential`, the name of one (``"finite_well"``, with ``options``), or a function of an
            array of places (with ``interval``).
        states: how many.
        tolerance: wanted relative error of the energies (projection).
        method: see above.
        interval: walls, for names and functions.
        kinetic: ``ħ²/2m`` in your units of energy times length squared: 1 here, 0.5 for atomic units, 38.1 for an
            electron in meV and nm.
        hidden: sizes of hidden layers; default: one layer as wide as necessary (projection), 20-20-20 (residual).
        activation: ``tanh``, ``sin`` or ``silu``.
        n_collocation: points; default 360 Gauss points, more where needed (projection), 200 midpoints (residual).
        collocation: ``midpoints``, or ``endpoints``: equally spaced with the walls among them, as public notebooks do;
            the walls' and jumps' places are then effectively shifted (residual).
        energy: the level, if known (residual, one state).
        energy_init: where trained energies begin: ``"rayleigh"`` (the default: the first function's own) or numbers.
        norm_weight: ``λ`` of the norm; default 1 for a given energy, 1000 for trained ones.
        lr: of the network (residual).
        energy_lr: of trained energies (residual).
        max_steps: default 400 L-BFGS steps, or 3000 of Adam.
        seed: of the weights.
        progress: told of every logged step.
        **options: of the potential named: ``depth``, ``width``, ...

    Raises:
        InputError: what cannot be meant.

    >>> levels = solve_schrodinger("barrier", height=20, width=0.2, interval=(0, 1), states=2)
    >>> levels.energies.round(4).tolist()
    [16.9122, 40.4038]
    """
    if method not in METHODS:
        raise InputError(f"unknown method '{method}': {did_you_mean(method, METHODS)}")
    if states < 1:
        raise InputError(f"states must be at least 1, got {states}")
    for name, number in (("tolerance", tolerance), ("kinetic", kinetic), ("lr", lr), ("energy_lr", energy_lr)):
        if not (math.isfinite(number) and number > 0):
            raise InputError(f"{name} must be positive and finite, got {number:g}")
    if collocation not in ("midpoints", "endpoints"):
        raise InputError(f"collocation must be midpoints or endpoints, got '{collocation}'")
    if max_steps is not None and max_steps < 0:
        raise InputError(f"max_steps must not be negative, got {max_steps}")
    given = _as_potential(potential, states, interval, options)
    if given.bound is not None and states > given.bound:
        raise InputError(f"{given.name} in open space has {given.bound} bound states, {states} are wanted")
    scaled = _scaled(given, 1 / kinetic)
    started = time.perf_counter()
    if method == "projection":
        for name, value in (("energy", energy), ("energy_init", energy_init), ("norm_weight", norm_weight)):
            if value is not None:
                raise InputError(f"{name} belongs to method='residual'; projection finds energies and norms itself")
        found = solve_by_projection(
            scaled, states, tolerance, hidden, activation, n_collocation, max_steps, seed, started, kinetic, progress
        )
    else:
        if energy is not None and energy_init is not None:
            raise InputError("energy (given) and energy_init (trained from there) exclude each other")
        if energy is not None and states > 1:
            raise InputError("a given energy goes with one state")
        starts = _starts(energy_init, states, kinetic)
        found = solve_by_residual(
            scaled, states, hidden or (20, 20, 20), activation, n_collocation or 200, collocation,
            None if energy is None else energy / kinetic, starts,
            norm_weight, lr, energy_lr, 3000 if max_steps is None else max_steps, seed, started, kinetic, progress,
        )  # fmt: skip
    scale = {name: kinetic * getattr(found, name) for name in ("energies", "errors", "rayleigh")}
    return dataclasses.replace(found, kinetic=kinetic, seconds=time.perf_counter() - started, **scale)


def _as_potential(
    potential: Potential | str | Callable[[Array], Any],
    states: int,
    interval: tuple[float, float] | None,
    options: dict[str, Any],
) -> Potential:
    if isinstance(potential, str):
        named = potential.lower().replace("-", "_").replace(" ", "_")
        if interval is not None:
            options = {**options, "interval": interval}
        if named == "finite_well" and interval is None:
            options = {**options, "states": states}
        return get_potential(potential, **options)
    if options:
        raise InputError(f"unknown option '{sorted(options)[0]}'; options of a potential go with its name")
    if isinstance(potential, Potential):
        if interval is not None:
            raise InputError("interval belongs to a named potential or a function; this one has its own")
        return potential
    if interval is None:
        raise InputError("a function needs an interval, the places of the walls")
    return from_function(potential, check_interval(interval))


def _scaled(potential: Potential, factor: float) -> Potential:
    if factor == 1:
        return potential
    steps = None if potential.steps is None else tuple(factor * step for step in potential.steps)
    return dataclasses.replace(potential, function=lambda x: factor * potential(x), steps=steps)


def _starts(energy_init: Any, states: int, kinetic: float) -> list[float] | None:
    if energy_init is None or energy_init == "rayleigh":
        return None
    if isinstance(energy_init, str):
        raise InputError(f"energy_init must be 'rayleigh' or numbers, got {energy_init!r}")
    values = [float(v) / kinetic for v in np.atleast_1d(energy_init)]
    if len(values) != states or not all(math.isfinite(v) for v in values):
        raise InputError(f"energy_init must be {states} finite number{'s' * (states != 1)}, got {energy_init!r}")
    return values
