"""Pictures of the geometry of representations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lossmith.files import write_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lossmith.probes.geometry import GeometryReport


def plot_geometry(report: GeometryReport, path: str | Path | None = None) -> Figure:
    """Spectra with the fitted decay; for several checkpoints also RankMe and alpha along training, with the phases."""
    from matplotlib.figure import Figure

    points = report.checkpoints
    many = len(points) > 1
    figure = Figure(figsize=(11 if many else 6, 4.4), layout="constrained")
    axes = figure.subplots(1, 2 if many else 1, squeeze=False)[0]
    left = axes[0]
    shades = np.linspace(0.25, 1, len(points))
    for shade, point in zip(shades, points, strict=True):
        values = point.metrics.eigenvalues.numpy()
        shares = values[values > 0] / values.sum()
        left.loglog(np.arange(1, len(shares) + 1), shares, color="C0", alpha=float(shade), linewidth=1.2)
    decay = report.metrics.decay
    if decay is not None:
        ranks = np.array([decay.first, decay.last])
        total = float(report.metrics.eigenvalues.sum())
        line = np.exp(decay.log_constant - decay.alpha * np.log(ranks)) / total
        left.loglog(ranks, line, color="black", linestyle="--", label=f"alpha = {decay.alpha:.3g}")
        left.legend()
    left.set_xlabel("rank")
    left.set_ylabel("share of variance" + (" (darker: later)" if many else ""))
    left.set_title(f"{report.model}, layer {report.layer}", fontsize=9)
    left.grid(alpha=0.3)
    if many:
        right = axes[1]
        steps = np.array([point.step or 0 for point in points], dtype=float)
        if steps[0] == 0:
            steps[0] = steps[1] / 2
        right.plot(steps, [point.metrics.rankme for point in points], marker="o", color="C0", label="RankMe")
        right.set_xscale("log")
        right.set_yscale("log")
        right.set_xlabel("step")
        right.set_ylabel("RankMe", color="C0")
        twin = right.twinx()
        twin.plot(steps, [point.metrics.alpha for point in points], marker="s", color="C1", label="alpha")
        twin.set_ylabel("alpha", color="C1")
        for number, phase in enumerate(report.phases):
            right.axvspan(max(phase.first, steps[0]), phase.last, color=f"C{number + 2}", alpha=0.12)
            right.text(
                np.sqrt(max(phase.first, steps[0]) * phase.last),
                0.97,
                phase.name,
                transform=right.get_xaxis_transform(),
                ha="center",
                va="top",
                fontsize=8,
            )
        right.grid(alpha=0.3)
    if path is not None:
        write_picture(figure, path)
    return figure
