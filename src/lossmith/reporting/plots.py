"""PNG plots: loss by tokens, loss by seconds, and the paired differences with their intervals."""

from __future__ import annotations

import io
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossmith.files import write_bytes
from lossmith.reporting.comparison import Comparison
from lossmith.reporting.curves import ArmCurves, Axis, Part, arm_curves, frame, value_name
from lossmith.reporting.formatting import count, one_line
from lossmith.reporting.palette import Stroke, strokes
from lossmith.reporting.table import ComparisonTable, summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DASH: dict[str, Any] = {"solid": "-", "dash": (0, (5, 2)), "dot": (0, (1.2, 1.6))}
_INK = "#222222"


def write_plots(comparison: Comparison, folder: str | Path) -> list[Path]:
    """Write ``loss-by-tokens.png``, ``loss-by-seconds.png`` and ``differences.png``, where there is data.

    Nothing of matplotlib's global state is read for drawing or changed; the same comparison gives the same
    bytes.
    """
    folder = Path(folder)
    figures = {
        "loss-by-tokens.png": loss_figure(comparison, "tokens"),
        "loss-by-seconds.png": loss_figure(comparison, "seconds"),
        "differences.png": difference_figure(comparison),
    }
    written = []
    for name, figure in figures.items():
        if figure is not None:
            written.append(write_bytes(folder / name, _png(figure)))
    return written


def loss_figure(comparison: Comparison, axis: Axis) -> Figure | None:
    """Evaluation and training curves: the mean over seeds, thin lines per seed, their range as a band."""
    parts: tuple[Part, ...] = ("evaluation", "train")
    panels = [(part, arms) for part in parts if (arms := arm_curves(comparison, part, axis))]
    if not panels:
        return None
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    style = strokes(comparison)
    names = [arm for arm in style if any(found.arm == arm for _, arms in panels for found in arms)]
    columns = 3 if len(panels) == 2 else 2
    legend_rows = math.ceil(len(names) / columns)
    height = 4.3 + 0.24 * legend_rows
    figure = Figure(figsize=(5.4 * len(panels) + 0.4, height), dpi=150, facecolor="white")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (part, arms) in zip(grid, panels, strict=True):
        _draw_curves(axes, arms, style)
        _dress(axes, "Evaluation" if part == "evaluation" else "Training", axis, value_name(comparison, part))
        limits = frame(arms)
        if limits:
            axes.set_ylim(*limits[:2])
            if limits[2]:
                _text(axes, 0.985, 0.975, "the steep start lies outside the frame", ha="right", va="top", size=8)
    handles = [
        Line2D([], [], color=style[name].colour, linestyle=_DASH[style[name].dash], linewidth=2) for name in names
    ]
    # A label with a leading underscore would vanish, a dollar sign would start a formula: set the text later.
    legend = figure.legend(
        handles,
        [_short(name, "x") for name in names],
        loc="lower center",
        ncols=columns,
        frameon=False,
        fontsize=9.5,
    )
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(_short(name))
    figure.suptitle(one_line(comparison.title, 90), fontsize=12.5, color=_INK, parse_math=False)
    bottom = (0.24 * legend_rows + 0.78) / height
    figure.subplots_adjust(
        left=0.075 if len(panels) == 2 else 0.13,
        right=0.985,
        top=1 - 0.72 / height,
        bottom=bottom,
        wspace=0.2,
    )
    return figure


def difference_figure(comparison: Comparison | ComparisonTable) -> Figure | None:
    """Paired differences to the baseline of the primary metric, with their corrected intervals."""
    from matplotlib.figure import Figure

    table = comparison if isinstance(comparison, ComparisonTable) else summarise(comparison)
    arms = table.arms[1:]
    if not arms or not any(arm.primary.difference and arm.primary.difference.n for arm in arms):
        return None
    colours = {"better": "#0072B2", "worse": "#D55E00"}
    height = 1.75 + 0.42 * len(arms)
    left = min(0.33, 0.05 + 0.0088 * max(len(_short(arm.name, width=30)) for arm in arms))
    figure = Figure(figsize=(9.2, height), dpi=150, facecolor="white")
    axes = figure.subplots()
    axes.axvline(0, color=_INK, linewidth=1)
    reach = 0.0
    for row, arm in enumerate(arms):
        interval, standing = arm.primary.difference, arm.primary.standing or ""
        colour = colours.get(standing, "#666666")
        assert interval is not None
        mark = standing + (" †" if arm.flags and standing in colours else "")
        axes.text(1.015, row, mark, transform=axes.get_yaxis_transform(), va="center", fontsize=9.5, color=colour)
        if not math.isfinite(interval.estimate):
            continue
        reach = max(reach, abs(interval.estimate))
        whole = math.isfinite(interval.low) and math.isfinite(interval.high)
        if whole:
            axes.plot([interval.low, interval.high], [row, row], color=colour, linewidth=2.4, solid_capstyle="butt")
            axes.plot([interval.low, interval.high], [row, row], "|", color=colour, markersize=9)
            reach = max(reach, abs(interval.low), abs(interval.high))
        axes.plot(
            interval.estimate,
            row,
            "o",
            color=colour,
            markerfacecolor=colour if whole else "white",
            markersize=6.5,
        )
    reach = reach * 1.12 or 1.0
    axes.set_xlim(-reach, reach)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_yticks(range(len(arms)), [""] * len(arms))
    for row, arm in enumerate(arms):
        axes.text(
            -0.015, row, _short(arm.name, width=30), transform=axes.get_yaxis_transform(), ha="right",
            va="center", fontsize=10, color=_INK, parse_math=False,
        )  # fmt: skip
    _dress(axes, "", "", f"difference in {one_line(table.metric, 40)} to {_short(table.baseline, width=26)}")
    axes.set_xlabel(axes.get_ylabel(), parse_math=False)
    axes.set_ylabel("")
    axes.tick_params(axis="y", length=0)
    sides = ("better", "worse") if table.lower_is_better else ("worse", "better")
    axes.set_title(f"← {sides[0]}", loc="left", fontsize=9.5, color="#555555")
    axes.set_title(f"{sides[1]} →", loc="right", fontsize=9.5, color="#555555")
    correction = f", corrected for {table.comparisons} arms" if table.comparisons > 1 else ""
    figure.suptitle(
        f"Paired by seed, {100 * table.level:.10g}% intervals{correction}",
        fontsize=11.5,
        color=_INK,
        x=(left + 0.85) / 2,
    )
    figure.subplots_adjust(left=left, right=0.85, top=1 - 0.72 / height, bottom=0.62 / height)
    return figure


def _draw_curves(axes: Axes, arms: list[ArmCurves], style: dict[str, Stroke]) -> None:
    for layer, arm in enumerate(arms):
        colour, dash = style[arm.arm].colour, _DASH[style[arm.arm].dash]
        for line in arm.lines:
            alone = len(arm.lines) == 1 and line.finished
            if not alone:
                axes.plot(line.x, line.y, color=colour, alpha=0.4, linewidth=0.7, zorder=2 + layer)
            if not line.finished:  # a failed run ends in a cross
                axes.plot(line.x[-1:], line.y[-1:], "x", color=colour, markersize=7, zorder=40)
        if arm.band is not None:
            band = arm.band
            axes.fill_between(band.x, band.low, band.high, color=colour, alpha=0.13, linewidth=0, zorder=1)
            marker = "o" if len(band.x) == 1 else None
            axes.plot(band.x, band.mean, color=colour, linestyle=dash, linewidth=2, marker=marker, zorder=20 + layer)


def _dress(axes: Axes, title: str, x_name: str, y_name: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_title(title, fontsize=11, color=_INK, parse_math=False)
    axes.set_xlabel(x_name, fontsize=10, color=_INK)
    axes.set_ylabel(one_line(y_name, 80), fontsize=10, color=_INK, parse_math=False)
    axes.tick_params(labelsize=9, colors=_INK)
    axes.grid(True, color="#e3e3e3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    if x_name == "tokens":
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _tick(value: float) -> str:
    text = "0" if value == 0 else count(value)
    head, tail = (text[:-1], text[-1]) if text[-1].isalpha() else (text, "")
    return (head.rstrip("0").rstrip(".") if "." in head else head) + tail


def _text(axes: Axes, x: float, y: float, text: str, **options: Any) -> None:
    axes.text(x, y, text, transform=axes.transAxes, color="#777777", style="italic", zorder=60, **options)


def _short(name: str, stand_in: str = "(unnamed)", width: int = 34) -> str:
    return one_line(name, width).lstrip("_" if stand_in == "x" else "") or stand_in


def _png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name in a script that the font lacks
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
