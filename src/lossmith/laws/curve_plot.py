"""The picture of a law of whole runs: every run's losses with the law through them, and the learning rates below."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lossmith.laws.fitted import Fitted

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by everyone.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


@dataclass(frozen=True)
class FittedCurves(Fitted):
    """A fit to whole runs."""

    def plot(self, path: str | Path | None = None) -> Figure:
        """Losses and learning rates by step, with the law; saved as PNG, SVG or PDF where ``path`` is given."""
        from lossmith.laws.plots import save

        figure = curves_figure(self)
        if path is not None:
            save(figure, path)
        return figure


def curves_figure(fitted: Fitted) -> Figure:
    """Above: measured losses as points and the law as lines. Below: the learning rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 5.4), dpi=150, facecolor="white", layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    table = fitted.table
    value = fitted.law.evaluate(fitted.best, fitted.law.transform(table.columns))
    for k, run in enumerate(dict.fromkeys(table.runs.tolist())):
        rows = np.flatnonzero(table.runs == run)
        rows = rows[np.argsort(table.columns["step"][rows], kind="stable")]
        colour, step = _COLOURS[k % len(_COLOURS)], table.columns["step"][rows]
        above.scatter(step, table.columns["loss"][rows], s=9, color=colour, alpha=0.5, linewidths=0)
        above.plot(step, value[rows], color=colour, linewidth=1.4, label=run)
        below.plot(step, table.columns["lr"][rows], color=colour, linewidth=1.4)
    above.set_ylabel("loss")
    above.set_title(fitted.law.formula, fontsize=10, loc="left")
    above.legend(frameon=False, fontsize=8)
    below.set_ylabel("learning rate")
    below.set_xlabel("optimiser step")
    below.set_ylim(bottom=0)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    return figure
