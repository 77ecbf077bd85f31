"""Plots of fitted laws: drawn without matplotlib's global state."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lossmith.errors import InputError
from lossmith.files import check_file_place, write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lossmith.laws.chinchilla import Plan
    from lossmith.laws.fitted import Fitted

_INK, _POINTS, _LINE = "#222222", "#0072B2", "#D55E00"
_FORMATS = (".png", ".svg", ".pdf")


def fit_figure(fitted: Fitted) -> Figure:
    """Left: measured against predicted. Right: relative errors by the size of the run."""
    from matplotlib.figure import Figure

    table = fitted.table
    measured = table.columns[table.target]
    predicted = fitted._fit.value(fitted.best)
    figure = Figure(figsize=(9.6, 4.2), dpi=150, facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2)
    low, high = min(measured.min(), predicted.min()), max(measured.max(), predicted.max())
    left.plot([low, high], [low, high], color=_LINE, linewidth=1.5, zorder=1)
    left.scatter(predicted, measured, s=14, color=_POINTS, alpha=0.65, linewidths=0, zorder=2)
    left.set_xlabel("predicted loss")
    left.set_ylabel("measured loss")
    if low > 0 and high / low > 1.5:
        left.set_xscale("log")
        left.set_yscale("log")
        _plain_ticks(left.xaxis)
        _plain_ticks(left.yaxis)
    size = np.exp(fitted._fit.size())
    relative = 100 * (measured / predicted - 1)
    right.axhline(0, color=_LINE, linewidth=1.5, zorder=1)
    right.scatter(size, relative, s=14, color=_POINTS, alpha=0.65, linewidths=0, zorder=2)
    right.set_xscale("log")
    powered = dict.fromkeys(c for term in fitted.law.terms.terms for c in term.powers)
    right.set_xlabel(" x ".join(powered))
    right.set_ylabel("measured above predicted, percent")
    left.set_title(fitted.law.formula, fontsize=10, color=_INK, loc="left")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    return figure


def plan_figure(fitted: Fitted, plan: Plan) -> Figure:
    """Predicted loss by size at the plan's budget, with limits of the expected loss, the best size and the data's."""
    from matplotlib.figure import Figure

    sizes = plan.params * np.geomspace(1 / 30, 30, 121)
    tokens = plan.flops / (6 * sizes)
    figure = Figure(figsize=(6.4, 4.2), dpi=150, facecolor="white", layout="constrained")
    axes = figure.subplots()
    if len(fitted.samples):
        band = fitted.interval(plan.level, kind="law", params=sizes, tokens=tokens)
        label = f"{100 * plan.level:g}% limits"
        axes.fill_between(sizes, band.low, band.high, color=_LINE, alpha=0.18, linewidth=0, label=label)
        axes.axvspan(*plan.params_limits, color=_POINTS, alpha=0.08, linewidth=0, label="limits of the best size")
    axes.plot(sizes, fitted.predict(params=sizes, tokens=tokens), color=_LINE, linewidth=1.8, label="predicted loss")
    axes.plot([plan.params], [plan.loss], "o", color=_INK, markersize=6)
    axes.annotate(
        f"{plan.params:.3g} parameters\n{plan.tokens:.3g} tokens",
        (plan.params, plan.loss),
        textcoords="offset points",
        xytext=(0, 14),
        ha="center",
        fontsize=9,
        color=_INK,
    )
    largest = fitted.table.columns["params"].max()
    if sizes[0] < largest < sizes[-1]:
        axes.axvline(largest, color=_INK, linewidth=0.8, linestyle=":", label="largest fitted model")
    axes.set_xscale("log")
    axes.set_xlabel("parameters")
    axes.set_ylabel("loss")
    axes.set_title(f"{plan.flops:.3g} training FLOPs", fontsize=10, color=_INK, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.legend(frameon=False, fontsize=8)
    return figure


def check_picture(path: str | Path) -> Path:
    """The path of a picture, by its ending.

    Raises:
        InputError: another ending, or no place where a file can be written.
    """
    path = Path(path)
    if path.suffix.lower() not in _FORMATS:
        raise InputError(f"cannot write a plot to {path}: the name must end in {', '.join(_FORMATS)}")
    check_file_place(path)
    return path


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure, whole or not at all."""
    path = check_picture(path)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:].lower(), metadata={"Date": None} if path.suffix == ".svg" else None)
    return write_bytes(path, buffer.getvalue())


def _plain_ticks(axis: object) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    axis.set_major_locator(MaxNLocator(6))  # type: ignore[attr-defined]
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))  # type: ignore[attr-defined]
    axis.set_minor_formatter(NullFormatter())  # type: ignore[attr-defined]
