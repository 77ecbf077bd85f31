"""Plots of probes: drawn without matplotlib's global state."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lossmith.probes.superposition_report import Histogram, SuperpositionReport

_INK, _BARS, _LINE = "#222222", "#0072B2", "#D55E00"


def superposition_figure(report: SuperpositionReport, path: str | Path | None = None) -> Figure:
    """Left: cosines between rows, beside those of random vectors. Right: norms."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.2), dpi=150, facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2)
    heights = _bars(left, report.cosines)
    m = report.dimensions
    if m > 1:
        # The cosine of random directions has density (1 - c²)^((m-3)/2).
        log_total = math.lgamma(m / 2) - math.lgamma((m - 1) / 2) - 0.5 * math.log(math.pi)
        middles = [(a + b) / 2 for a, b in zip(report.cosines.edges[:-1], report.cosines.edges[1:], strict=True)]
        random = [math.exp(log_total + (m - 3) / 2 * math.log(max(1 - c * c, 1e-300))) for c in middles]
        left.plot(middles, random, color=_LINE, linewidth=1.5, label="random vectors")
        left.set_ylim(0, 1.1 * max(*heights, min(max(random), 5 * max(heights))))
        left.legend(frameon=False, fontsize=9)
    left.set_xlim(*_reach(report))
    left.set_xlabel("cosine between two tokens' rows")
    left.set_title(f"mean square {report.ratio:.3g} / m", fontsize=10, loc="left", color=_INK)
    _bars(right, report.norm_histogram)
    right.set_xlabel("norm of a token's row")
    right.set_title(f"{report.rows} tokens in {report.dimensions} dimensions", fontsize=10, loc="left", color=_INK)
    figure.suptitle(report.name, fontsize=11, color=_INK, parse_math=False)
    for axes in (left, right):
        axes.set_ylabel("density")
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    if path is not None:
        from lossmith.laws.plots import save

        save(figure, path)
    return figure


def _reach(report: SuperpositionReport) -> tuple[float, float]:
    """Where nearly all cosines are, and those of random vectors."""
    edges, counts = report.cosines.edges, report.cosines.counts
    enough = max(1, round(2e-4 * sum(counts)))
    seen = [i for i, count in enumerate(counts) if count >= enough]
    around = min(1.0, 5 / report.dimensions**0.5)
    return (
        max(-1.0, min(-around, edges[seen[0]] if seen else 0)),
        min(1.0, max(around, edges[seen[-1] + 1] if seen else 0)),
    )


def _bars(axes: Axes, histogram: Histogram) -> list[float]:
    total = max(sum(histogram.counts), 1)
    widths = [b - a for a, b in zip(histogram.edges[:-1], histogram.edges[1:], strict=True)]
    heights = [count / total / max(width, 1e-300) for count, width in zip(histogram.counts, widths, strict=True)]
    axes.bar(histogram.edges[:-1], heights, width=widths, align="edge", color=_BARS, linewidth=0)
    return heights
