"""Quantum wells: a residual as the training loss, with exact truth to judge it by.

"Physics-Informed Neural Networks for One-Dimensional Quantum Well Problems", 2025, arXiv 2504.05367.

Ground states of the infinite well (energy given), a finite well and a barrier (energy trained), with the norm in the
loss and without; the barrier once more from an energy near its second level; and the output layer solved for instead of
trained. Truth comes from transcendental equations. Seeds are those of the network's weights. ``--data`` takes a table
of a potential and replaces the barrier.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lossmith.reporting.comparison import Claim, Cost, Curve
from lossmith.studies.study import Experiment, Paper, Study

ARMS = {
    "norm": "residual + norm, Adam",
    "no-norm": "residual alone, Adam",
    "high-start": "residual + norm, the trained energy starts near the second level",
    "endpoints": "residual + norm, points that include the walls, so that jumps lie on points",
    "projection": "output layer solved for, hidden layers by L-BFGS on the energies",
}

CLAIMS = (
    Claim("Without the norm the infinite well's function drifts in size", "no-norm", "infinite/norm_error", "higher"),
    Claim("Without the norm the finite well's function collapses", "no-norm", "well/norm_error", "higher", margin=0.5),
    Claim("Without the norm the barrier's function collapses", "no-norm", "barrier/norm_error", "higher", margin=0.5),
    Claim("Without the norm energies are worse", "no-norm", "digits", "lower"),
    Claim("A high start ends at another level", "high-start", "barrier/nodes", "higher", margin=0.5),
    Claim("Points on the jumps bias the barrier's energy", "endpoints", "barrier/energy_error", "higher"),
    Claim("Solving for the output layer is more accurate", "projection", "digits", "higher"),
)


def experiment(arm: str, seed: int, options: Mapping[str, Any], folder: Path) -> Experiment:
    """The three ground states."""
    metrics: dict[str, float] = {}
    started, steps = time.perf_counter(), 0
    for name, potential, settings in _problems(options):
        levels = _solve(arm, name, potential, settings, seed, options)
        known = levels.compare()
        metrics[f"{name}/energy_error"] = abs(float(known.relative_errors[0]))
        # The given energy is no result: its well is judged by the Rayleigh quotient.
        if "energy" in settings and arm != "projection":
            metrics[f"{name}/energy_error"] = abs(float(levels.rayleigh[0] / known.energies[0] - 1))
        metrics[f"{name}/norm_error"] = abs(float(levels.norms[0]) - 1)
        metrics[f"{name}/overlap"] = float(known.overlaps[0])
        metrics[f"{name}/nodes"] = float(levels.nodes[0])
        steps += levels.history[-1].step
        logged = levels.history
    curve = Curve(tuple(s.step for s in logged), (), tuple(s.seconds for s in logged), tuple(s.loss for s in logged))
    errors = [value for key, value in metrics.items() if key.endswith("/energy_error")]
    # Errors of different wells and ways differ by orders of magnitude. Below 1e-9 references are no better.
    metrics["digits"] = -sum(math.log10(max(error, 1e-9)) for error in errors) / len(errors)
    return Experiment(metrics, Cost(steps=steps, seconds=time.perf_counter() - started), train=curve)


def _problems(options: Mapping[str, Any]) -> list[tuple[str, Any, dict[str, Any]]]:
    from lossmith.tasks.physics import barrier, finite_well, infinite_well, table

    data = options.get("data")
    last = table(data) if data else barrier(20, 0.2)
    return [
        ("infinite", infinite_well(), {"energy": math.pi**2, "lr": 1e-3}),
        ("well", finite_well(20, 0.5, (0, 1)), {"energy_init": 8.0}),
        ("barrier", last, {} if data else {"energy_init": 10.0}),
    ]


def _solve(arm: str, name: str, potential: Any, settings: dict[str, Any], seed: int, options: Mapping[str, Any]) -> Any:
    from lossmith.tasks.physics import exact_levels, finite_differences, solve_schrodinger

    if arm == "projection":
        return solve_schrodinger(potential, tolerance=float(options["tolerance"]), seed=seed)
    chosen = dict(settings)
    if arm == "no-norm":
        chosen["norm_weight"] = 0.0
    if arm == "high-start" and name == "barrier":
        exact = potential.steps is not None
        second = (exact_levels(potential, 2) if exact else finite_differences(potential, 2).energies)[1]
        chosen["energy_init"] = 0.99 * float(second)
    return solve_schrodinger(
        potential,
        method="residual",
        collocation="endpoints" if arm == "endpoints" else "midpoints",
        hidden=tuple(options["hidden"]),
        max_steps=int(options["steps"]),
        seed=seed,
        **chosen,
    )


STUDY = Study(
    slug="quantum-wells",
    family="tasks",
    question="Does a network trained on an equation's residual find the levels of a quantum well?",
    paper=Paper("Physics-Informed Neural Networks for One-Dimensional Quantum Well Problems", 2025, "2504.05367"),
    arms=ARMS,
    baseline="norm",
    metric="digits",
    lower_is_better=False,
    metrics=(
        "digits",
        "infinite/energy_error",
        "well/energy_error",
        "barrier/energy_error",
        "infinite/norm_error",
        "well/norm_error",
        "barrier/norm_error",
        "infinite/overlap",
        "well/overlap",
        "barrier/overlap",
        "barrier/nodes",
    ),
    better={"infinite/overlap": "higher", "well/overlap": "higher", "barrier/overlap": "higher"},
    claims=CLAIMS,
    seeds={"smoke": 2, "quick": 3, "full": 5},
    options={
        "smoke": {"steps": 20, "hidden": [8, 8], "tolerance": 1e-2},
        "quick": {"steps": 2000, "hidden": [20, 20, 20], "tolerance": 1e-4},
        "full": {"steps": 20_000, "hidden": [64, 64, 64], "tolerance": 1e-6},
    },
    experiment=experiment,
    data="a table of a potential (CSV: place, value)",
    notes=(
        "digits: mean over the three wells of -log10 of the energy's relative error. norm_error: distance of the "
        "integral of the squared function from 1 before it is normalised. nodes: 0 for a ground state.",
        "The infinite well's energy is given; its error is that of the Rayleigh quotient.",
    ),
)
