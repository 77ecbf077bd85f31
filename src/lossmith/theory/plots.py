"""Plots of trained toys: drawn without matplotlib's global state."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lossmith.theory.overlaps import welch_bound
from lossmith.theory.superposition import truncation_loss

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lossmith.theory.toys import Toys

# Okabe and Ito, as in the reports.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_INK, _THEORY = "#222222", "#767676"


def toys_figure(toys: Toys, path: str | Path | None = None) -> Figure:
    """Loss, share represented and overlaps by width; a line per weight decay (mean), points per seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.2, 4.2), dpi=150, facecolor="white", layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    widths = torch.tensor(toys.widths, dtype=torch.float64)
    slopes = toys.slopes().exponent if len(toys.widths) >= 3 else None
    panels = ((left, toys.losses), (middle, toys.represented()), (right, toys.overlaps() * widths))
    for row, decay in enumerate(toys.weight_decays):
        colour = _COLOURS[row % len(_COLOURS)]
        for axes, values in panels:
            label = f"weight decay {decay:g}"
            if axes is left and slopes is not None:
                label += f": exponent {slopes[row].mean():.2f}"
            axes.plot(toys.widths, values[row].mean(0), color=colour, linewidth=1.8, label=label)
            for seed in values[row]:
                axes.plot(toys.widths, seed, "o", color=colour, markersize=4, alpha=0.6, markeredgewidth=0)
    features = len(toys.probabilities)
    start = float(toys.losses[..., 0].amin())
    left.plot(toys.widths, start * widths[0] / widths, color=_THEORY, linestyle=":", label="1 / width")
    left.plot(
        toys.widths,
        [truncation_loss(toys.probabilities, width) for width in toys.widths],
        color=_THEORY,
        linestyle="--",
        label="the first stored, the rest dropped",
    )
    middle.plot(toys.widths, widths / features, color=_THEORY, linestyle="--", label="width / features")
    right.axhline(1, color=_THEORY, linestyle=":", label="random vectors")
    welch = [width * welch_bound(features, width) for width in toys.widths]
    right.plot(toys.widths, welch, color=_THEORY, linestyle="--", label="Welch bound")
    left.set_yscale("log")
    for axes, title, lines in (
        (left, "loss", 10),
        (middle, "share of features represented (norm > 1/2)", 1),
        (right, "width x mean squared overlap", 2),
    ):
        _dress(axes, title, toys.widths)
        handles, labels = axes.get_legend_handles_labels()
        axes.legend(handles[-lines:], labels[-lines:], frameon=False, fontsize=8.5)
    if path is not None:
        from lossmith.laws.plots import save

        save(figure, path)
    return figure


def _dress(axes: Axes, title: str, widths: tuple[int, ...]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.xaxis.set_minor_formatter(NullFormatter())
    if axes.get_yscale() == "log":
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("width", color=_INK)
    axes.set_title(title, fontsize=10, color=_INK, loc="left")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
