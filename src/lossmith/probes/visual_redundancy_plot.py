"""Picture of the redundancy of visual tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lossmith.files import write_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lossmith.probes.visual_redundancy import RedundancyReport


def redundancy_figure(report: RedundancyReport, path: str | Path | None = None) -> Figure:
    """Left: accuracy against FLOPs. Right: accuracy beyond the trivial mixture, where there is one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    left.axhline(report.accuracy, color="black", linewidth=0.8, linestyle="--")
    left.plot([1.0], [report.accuracy], marker="*", markersize=12, color="black", label="full model")
    for number, selector in enumerate(dict.fromkeys(p.selector for p in report.points)):
        points = sorted((p for p in report.points if p.selector == selector), key=lambda p: p.flops)
        errors = [[p.accuracy - report.accuracy - p.low for p in points], [p.high - p.change for p in points]]
        left.errorbar(
            [p.flops for p in points],
            [p.accuracy for p in points],
            yerr=errors,
            marker="o",
            linestyle=":",
            linewidth=1,
            capsize=2,
            color=f"C{number}",
            label=selector,
        )
        beyond = [p for p in points if p.mixture == p.mixture]
        right.plot([p.committed for p in beyond], [p.above_mixture for p in beyond], "o", color=f"C{number}")
    left.set_xlabel("multiply-adds over those of the full model")
    left.set_ylabel("share of right tokens")
    left.legend(fontsize=8)
    left.grid(alpha=0.3)
    right.axhline(0, color="black", linewidth=0.8)
    right.set_xlabel("share of the answer written before the cut")
    right.set_ylabel("accuracy beyond the trivial mixture")
    right.grid(alpha=0.3)
    if path is not None:
        write_picture(figure, path)
    return figure
