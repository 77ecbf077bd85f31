"""The picture of a critical mixture ratio."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lossmith.laws.mixture_curves import general_change

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lossmith.laws.critical_mixture import FittedMixture

_GENERAL, _DOMAIN, _CRITICAL = "#0072B2", "#D55E00", "#222222"


def mixture_figure(fitted: FittedMixture) -> Figure:
    """One row per model: general loss over tokens for every share, and both losses over the share at the budget."""
    from matplotlib.figure import Figure

    law: Any = fitted.law
    rows = len(law.sizes)
    figure = Figure(figsize=(10.0, 4.4 * rows), dpi=150, facecolor="white", layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False)
    first = 0
    for number, size in enumerate(law.sizes):
        curves = fitted.best.reshape(-1, 8)[first : first + len(size.ratios)]
        first += len(size.ratios)
        _over_tokens(axes[number, 0], fitted, size, curves)
        _over_share(axes[number, 1], fitted, size)
        if size.params:
            axes[number, 0].set_title(f"{size.params:.3g} parameters", fontsize=10, loc="left")
    for axis in axes.ravel():
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
    return figure


def _over_tokens(axis: Any, fitted: FittedMixture, size: Any, curves: np.ndarray) -> None:
    from matplotlib import colormaps

    columns = fitted.table.columns
    colours = colormaps["viridis"](np.linspace(0.0, 0.88, len(size.ratios)))
    law: Any = fitted.law
    axis.axhline(law.tolerance, color=_CRITICAL, linewidth=1.0, linestyle="--")
    axis.annotate(
        "tolerance", (1, law.tolerance), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
    )
    grid = np.linspace(size.first, size.tokens, 200)
    for ratio, curve, colour in zip(size.ratios, curves, colours, strict=True):
        rows = (columns["params"] == size.params) & (columns["ratio"] == ratio) & (columns["domain"] == 0)
        change = columns["loss"][rows] - columns["base"][rows]
        axis.scatter(columns["tokens"][rows], change, s=10, color=colour, alpha=0.55, linewidths=0)
        axis.plot(
            grid,
            general_change(curve[:5], grid / size.tokens),
            color=colour,
            linewidth=1.6,
            label=f"{100 * ratio:.3g}%",
        )
    axis.set_xlabel("tokens of continual pre-training")
    axis.set_ylabel("change of general loss, nats")
    axis.legend(title="domain share", fontsize=8, title_fontsize=8, frameon=False)


def _over_share(axis: Any, fitted: FittedMixture, size: Any) -> None:
    columns = fitted.table.columns
    one = {"params": size.params} if len(getattr(fitted.law, "sizes", ())) > 1 else {}
    found = fitted.critical_ratio(**one)
    grid = np.linspace(min(r for r in size.ratios if r > 0), 1.0, 100)
    parts = (("general", _GENERAL, size.base_general), ("domain", _DOMAIN, size.base_domain))
    for number, (part, colour, base) in enumerate(parts):
        last = (columns["params"] == size.params) & (columns["domain"] == number)
        last &= columns["tokens"] >= size.tokens * (1 - 1e-9)
        axis.scatter(columns["ratio"][last], (columns["loss"] - columns["base"])[last], s=16, color=colour, alpha=0.7)
        line = fitted.predict(ratio=grid, tokens=size.tokens, part=part, **one) - base
        axis.plot(grid, line, color=colour, linewidth=1.6, label=f"{part} loss")
    axis.axhline(0, color="#888888", linewidth=0.8)
    axis.axvline(found.ratio, color=_CRITICAL, linewidth=1.4, label=f"critical ratio {100 * found.ratio:.1f}%")
    if np.isfinite(found.limits[0]):
        axis.axvspan(*found.limits, color=_CRITICAL, alpha=0.12, linewidth=0)
    axis.set_xlabel("share of domain tokens")
    axis.set_ylabel(f"change after {size.tokens:.3g} tokens, nats")
    axis.legend(fontsize=8, frameon=False)
