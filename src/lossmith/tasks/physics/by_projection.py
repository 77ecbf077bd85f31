"""Levels from an output layer that is solved for, on hidden layers that are trained by L-BFGS."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from lossmith.tasks.physics.grid import Grid, gauss
from lossmith.tasks.physics.levels import Levels, Step, judge
from lossmith.tasks.physics.potentials import Potential
from lossmith.tasks.physics.projection import (
    Projected,
    energy_loss,
    error_bounds,
    load_output,
    project,
    squared_residuals,
)
from lossmith.tasks.physics.references import finite_differences
from lossmith.tasks.physics.trial import Trial

# Units of the hidden layer that are tried, one after the other.
_LADDER = (24, 48, 96, 160)
_BURST = 20
_POINTS = 360


def solve_by_projection(
    potential: Potential,
    states: int,
    tolerance: float,
    hidden: Sequence[int] | None,
    activation: str,
    points: int | None,
    max_steps: int | None,
    seed: int,
    started: float,
    kinetic: float,
    progress: Callable[[Step], None] | None,
) -> Levels:
    """Arguments as of :func:`~lossmith.tasks.physics.solve_schrodinger`; ``potential`` in units of ``kinetic``."""
    ladder = [tuple(hidden)] if hidden is not None else [(max(width, 4 * states),) for width in _LADDER]
    budget = 400 if max_steps is None else max_steps
    log: list[Step] = []
    grid = gauss(potential, points or max(_POINTS, 24 * states))
    floor = float(grid.v.min())

    def record(found: Projected, step: int) -> float:
        squared = squared_residuals(found, grid)
        energies = found.energies.numpy()
        errors = error_bounds(energies, found.next, squared)
        shown, bounds = ((kinetic * v).tolist() for v in (energies, errors))
        elapsed = time.perf_counter() - started
        log.append(Step(step, float(squared.sum()), tuple(shown), tuple(bounds), (1.0,) * states, elapsed))
        if progress is not None:
            progress(log[-1])
        # Energies may be 0 by their zero point: then the height above the floor counts.
        return float((errors / np.maximum(np.abs(energies), 1e-2 * (energies - floor))).max())

    best: tuple[float, Trial, Projected, Grid] | None = None
    spent = 0
    for rung, sizes in enumerate(ladder):
        trial = Trial(
            potential.interval, potential.jumps, knots=_sharpest(potential), hidden=sizes, states=states,
            activation=activation, seed=seed,
        )  # fmt: skip
        _place(trial, potential, states, seed)
        share = (budget - spent) // (len(ladder) - rung)
        for steps, found, used in _descend(trial, potential, grid, states, share):
            grid = used
            worst = record(found, spent + steps)
            if best is None or worst < best[0]:
                best = (worst, _copy(trial, found), found, grid)
            if worst <= tolerance:
                break
        spent += steps
        assert best is not None
        if best[0] <= tolerance:
            break
    assert best is not None
    worst, trial, found, grid = best
    judged = judge(potential, trial, None, grid=grid)
    # The level above the highest wanted one is known here.
    judged["errors"] = error_bounds(judged["energies"], found.next, judged["residuals"])
    levels = Levels(potential, trial, 1.0, **judged, history=tuple(log))
    warnings: list[str] = []
    if worst > tolerance:
        warnings.append(
            f"the error bound {worst:.1e} is above the tolerance {tolerance:.1e} after {spent} steps: "
            "raise max_steps or hidden, or choose a narrower interval"
        )
    return dataclasses.replace(levels, warnings=(*warnings, *_missed(levels)))


def _sharpest(potential: Potential) -> tuple[float, ...]:
    """Kinks that a trial function must know of; of a finely measured curve the 64 sharpest."""
    knots = np.array(potential.knots)
    if len(knots) <= 64:
        return potential.knots
    edges = potential.edges
    at = np.searchsorted(edges, knots)
    h = np.minimum(knots - edges[at - 1], edges[at + 1] - knots) / 2
    bends = np.abs(potential(knots + h) + potential(knots - h) - 2 * potential(knots)) / h
    return tuple(np.sort(knots[np.argsort(-bends)[:64]]).tolist())


def _copy(trial: Trial, found: Projected) -> Trial:
    own = copy.deepcopy(trial)
    load_output(own, found)
    return own


def _descend(
    trial: Trial, potential: Potential, grid: Grid, states: int, budget: int
) -> Iterator[tuple[int, Projected, Grid]]:
    """States before training and after every burst of L-BFGS steps, on a grid that is fine enough for them."""
    steps = 0
    while True:
        with torch.no_grad():
            found = project(trial.features(grid.x), grid, states)
            finer = gauss(potential, 2 * len(grid.x))
            while len(finer.x) < 20_000:
                jet = trial.features(finer.x).value @ found.output.T
                first = trial.features(finer.x).first @ found.output.T
                again = (finer.w[:, None] * (first**2 + finer.v[:, None] * jet**2)).sum(0) / (
                    finer.w[:, None] * jet**2
                ).sum(0)
                spread = (found.energies - grid.v.min()).abs()
                if bool(((again - found.energies).abs() <= 1e-7 * spread).all()):
                    break
                grid, finer = finer, gauss(potential, 2 * len(finer.x))
                found = project(trial.features(grid.x), grid, states)
        yield steps, found, grid
        if steps >= budget:
            return
        burst = min(_BURST, budget - steps)
        optimizer = torch.optim.LBFGS(
            trial.trunk, max_iter=burst, history_size=20, line_search_fn="strong_wolfe",
            tolerance_grad=1e-14, tolerance_change=1e-16,
        )  # fmt: skip

        def closure(grid: Grid = grid, optimizer: torch.optim.Optimizer = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = energy_loss(project(trial.features(grid.x), grid, states), grid)
            loss.backward()
            return loss

        before = [p.detach().clone() for p in trial.trunk]
        optimizer.step(closure)  # type: ignore[arg-type]
        if not all(bool(torch.isfinite(p).all()) for p in trial.trunk):
            with torch.no_grad():
                for parameter, old in zip(trial.trunk, before, strict=True):
                    parameter.copy_(old)
            return
        steps += burst


def _place(trial: Trial, potential: Potential, states: int, seed: int) -> None:
    """Units where the highest wanted state oscillates, as steep as it does there (semi-classically)."""
    a, b = potential.interval
    x = a + (b - a) * (np.arange(4000) + 0.5) / 4000
    v = potential(x)
    step = (b - a) / len(x)
    low, high = float(v.min()), float(v.min()) + (math.pi * (states + 1) / (b - a)) ** 2
    while np.sqrt(np.maximum(high - v, 0)).sum() * step < math.pi * (states + 1):
        high = low + 2 * (high - low)
    for _ in range(60):
        middle = (low + high) / 2
        if np.sqrt(np.maximum(middle - v, 0)).sum() * step < math.pi * (states + 1):
            low = middle
        else:
            high = middle
    wave = np.sqrt(np.maximum(high - v, 0))
    mean = float(wave.mean())
    # A quarter of the units go everywhere: tails are where nothing oscillates.
    share = np.cumsum(wave + mean / 3)
    share /= share[-1]
    units = trial.linear[0].out_features
    generator = np.random.default_rng(seed)
    quantiles = (np.arange(units) + generator.uniform(size=units)) / units
    centres = np.interp(quantiles, share, x)
    local = np.interp(centres, x, np.maximum(np.sqrt(np.abs(high - v)).clip(max=4 * wave.max()), mean))
    slopes = local * generator.uniform(0.4, 1.2, units) * generator.choice([-1, 1], units)
    trial.spread(torch.tensor(centres), torch.tensor(slopes))


def _missed(levels: Levels) -> list[str]:
    """A level that classical counting has and the network has not."""
    known = finite_differences(levels.potential, len(levels.energies)).energies
    floor = float(levels.potential(np.linspace(*levels.potential.interval, 4001)[1:-1]).min())
    for k, (mine, theirs) in enumerate(zip(levels.rayleigh, known, strict=True)):
        if abs(mine - theirs) > max(2 * levels.errors[k], 1e-2 * (theirs - floor)):
            return [f"state {k + 1}: finite differences have {theirs:.6g}, the network {mine:.6g}"]
    return []
