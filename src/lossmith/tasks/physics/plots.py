"""Pictures of levels in their well."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lossmith.tasks.physics.references import finite_differences

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lossmith.tasks.physics.levels import Levels


def plot_levels(levels: Levels) -> Figure:
    """Wave functions at their energies in the potential, classical ones dotted; how energies came to the reference."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    a, b = levels.potential.interval
    x = np.linspace(a, b, 1501)[1:-1]
    v = levels.kinetic * levels.potential(x)
    energies = levels.energies
    agreement = levels.compare()
    bottom = float(v.min())
    top = float(energies.max())
    room = max(top - bottom, 1e-12)
    reference = finite_differences(levels.potential, len(energies), points=1499)
    psi = levels.wavefunctions(x)
    # Each wave as high as the room to the next level.
    height = 0.42 * (room if len(energies) == 1 else float(np.median(np.diff(np.append(bottom, energies)))))
    size = height / max(np.abs(psi).max(), 1e-300)
    left.plot(x, v, color="0.3", linewidth=1.2)
    for wall in (a, b):
        left.axvline(wall, color="0.3", linewidth=2.5)
    for k, energy in enumerate(energies):
        colour = f"C{k % 10}"
        left.axhline(energy, color=colour, linewidth=0.6, alpha=0.6)
        left.plot(x, energy + size * psi[:, k], color=colour, label=f"$E_{{{k + 1}}}$ = {energy:.6g}")
        known = np.interp(x, reference.points, reference.states[:, k])
        known *= np.sign(known @ psi[:, k]) or 1.0
        left.plot(x, energy + size * known, color="black", linestyle=":", linewidth=1)
    left.set_ylim(bottom - 0.1 * room, top + 0.35 * room)
    left.set_xlabel("x")
    left.set_ylabel("energy, wave functions (dotted: finite differences)")
    left.legend(loc="upper right", fontsize=8)
    left.set_title(levels.potential.name)
    steps = np.array([step.step for step in levels.history])
    history = np.array([step.energies for step in levels.history])
    for k in range(len(energies)):
        with np.errstate(divide="ignore", invalid="ignore"):
            error = np.abs(history[:, k] / agreement.energies[k] - 1)
        right.plot(steps, np.maximum(error, 1e-12), marker=".", color=f"C{k % 10}", label=f"$E_{{{k + 1}}}$")
    right.set_yscale("log")
    right.set_xlabel("training step")
    right.set_ylabel(f"relative difference to {agreement.method}")
    right.set_title("convergence")
    right.grid(alpha=0.3)
    return figure
