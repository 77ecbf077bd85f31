"""Levels by the paper's training: residual and norm as a loss for all weights and the energy, minimised by Adam."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lossmith.errors import InputError
from lossmith.tasks.physics.grid import Grid, endpoints, midpoints
from lossmith.tasks.physics.levels import Levels, Step, judge
from lossmith.tasks.physics.potentials import Potential
from lossmith.tasks.physics.residual import schrodinger_residual_loss
from lossmith.tasks.physics.trial import Trial


def solve_by_residual(
    potential: Potential,
    states: int,
    hidden: Sequence[int],
    activation: str,
    points: int,
    collocation: str,
    energy: float | None,
    starts: list[float] | None,
    norm_weight: float | None,
    lr: float,
    energy_lr: float,
    max_steps: int,
    seed: int,
    started: float,
    kinetic: float,
    progress: Callable[[Step], None] | None,
) -> Levels:
    """Arguments as of :func:`~lossmith.tasks.physics.solve_schrodinger`; ``potential`` in units of ``kinetic``."""
    grid = (endpoints if collocation == "endpoints" else midpoints)(potential, points)
    trial = Trial(potential.interval, hidden=hidden, states=states, activation=activation, seed=seed)
    weight = norm_weight if norm_weight is not None else (1.0 if energy is not None else 1000.0)
    if not (math.isfinite(weight) and weight >= 0):
        raise InputError(f"norm_weight must not be negative, got {weight:g}")
    _begin(trial, grid, potential)
    groups: list[dict[str, Any]] = [{"params": list(trial.parameters()), "lr": lr}]
    if energy is not None:
        level = torch.tensor([energy], dtype=torch.float64)
    else:
        first = starts if starts is not None else judge(potential, trial, None)["rayleigh"].tolist()
        level = torch.nn.Parameter(torch.tensor(first, dtype=torch.float64))
        groups.append({"params": [level], "lr": energy_lr})
    optimizer = torch.optim.Adam(groups)
    log: list[Step] = []

    def loss_and_parts() -> Any:
        return schrodinger_residual_loss(
            trial.jet, grid.x, grid.v, level, norm_weight=weight, overlap_weight=max(weight, 1.0), weights=grid.w
        )

    every = max(1, min(100, max_steps // 30))
    for step in range(max_steps + 1):
        optimizer.zero_grad()
        loss, parts = loss_and_parts()
        if not bool(torch.isfinite(loss)):
            raise InputError(f"the loss is not finite at step {step}: lower lr or energy_lr")
        if step % every == 0 or step == max_steps:
            log.append(
                Step(step, loss.item(), tuple((kinetic * level.detach()).tolist()), (math.nan,) * states,
                     tuple(parts.norm.tolist()), time.perf_counter() - started)
            )  # fmt: skip
            if progress is not None:
                progress(log[-1])
        if step < max_steps:
            loss.backward()
            optimizer.step()
    judged = judge(potential, trial, level.detach().numpy().copy())
    levels = Levels(potential, trial, 1.0, **judged, history=tuple(log))
    return dataclasses.replace(levels, warnings=tuple(_symptoms(levels, potential, points, energy is not None)))


@torch.no_grad()
def _begin(trial: Trial, grid: Grid, potential: Potential) -> None:
    """Norm 1; several states begin as the box's sines, as far as the features can make them."""
    if len(trial.output) > 1:
        a, b = potential.interval
        number = torch.arange(1, len(trial.output) + 1, dtype=torch.float64)
        sines = torch.sin(math.pi * number * (grid.x[:, None] - a) / (b - a))
        # A ridge keeps the output layer small enough to train.
        features = trial.features(grid.x).value
        gram = features.T @ features
        ridge = 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        trial.output.copy_(torch.linalg.solve(gram + ridge, features.T @ sines).T)
    norms = (grid.w[:, None] * trial(grid.x) ** 2).sum(0)
    trial.output.div_(norms.clamp_min(1e-300).sqrt()[:, None])


def _symptoms(levels: Levels, potential: Potential, points: int, given: bool) -> list[str]:
    found = []
    for k, norm in enumerate(levels.norms):
        if norm < 0.1:
            found.append(f"state {k + 1} collapsed towards zero (norm {norm:.2g}): raise norm_weight")
        elif abs(levels.rayleigh[k] / levels.energies[k] - 1) > 0.01:
            found.append(
                f"state {k + 1}: the {'given' if given else 'trained'} energy {levels.energies[k]:.5g} and the "
                f"Rayleigh quotient {levels.rayleigh[k]:.5g} differ by more than 1%"
            )
        if levels.nodes[k] != k and norm >= 0.1:
            found.append(f"state {k + 1} has {levels.nodes[k]} nodes instead of {k}: it is another level")
    a, b = potential.interval
    for jump in potential.jumps:
        place = (jump - a) / (b - a) * points
        if abs(place - round(place)) > 1e-6:
            found.append(f"the jump at {jump:g} is not midway between points: choose n_collocation so that it is")
    return found
