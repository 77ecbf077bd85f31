"""The interactive charts of the HTML report, as plain plotly.js figures (traces and layout)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lossmith.reporting.cells import label
from lossmith.reporting.comparison import Comparison
from lossmith.reporting.curves import ArmCurves, Array, Axis, Part, arm_curves, frame, value_name
from lossmith.reporting.formatting import interval_text, number, one_line
from lossmith.reporting.palette import BASELINE, strokes
from lossmith.reporting.table import ComparisonTable

Figure = dict[str, object]


@dataclass(frozen=True, slots=True)
class Chart:
    """A figure with its element's id, heading, caption and the text that a screen reader reads."""

    id: str
    heading: str
    caption: str
    alternative: str
    figure: Figure


def loss_charts(comparison: Comparison) -> list[Chart]:
    """Evaluation and training loss, each by tokens and by seconds, where they were recorded."""
    found = []
    parts: tuple[Part, ...] = ("evaluation", "train")
    axes: tuple[Axis, ...] = ("tokens", "seconds")
    for part in parts:
        for axis in axes:
            arms = arm_curves(comparison, part, axis)
            if arms:
                found.append(_loss_chart(comparison, part, axis, arms))
    return found


def _loss_chart(comparison: Comparison, part: Part, axis: Axis, arms: list[ArmCurves]) -> Chart:
    indices = {name: index for index, name in enumerate(strokes(comparison))}
    traces = [trace for arm in arms for trace in _traces(comparison, arm, indices[arm.arm], axis)]
    y_axis: dict[str, object] = {"title": {"text": text(value_name(comparison, part))}}
    clipped = ""
    limits = frame(arms)
    if limits:
        y_axis["range"] = [_round(limits[0]), _round(limits[1])]
        if limits[2]:
            clipped = " The steep start lies outside the frame: double-click to see it."
    heading = f"{'Evaluation' if part == 'evaluation' else 'Training'} by {axis}"
    caption = (
        "Thick: mean over the finished seeds; thin: each seed; shaded: their range. "
        f"A cross ends a failed run.{clipped}"
    )
    ends = [f"{label(arm.arm)} ends at {number(float(arm.band.mean[-1]))}" for arm in arms if arm.band]
    return Chart(
        id=f"chart-{part}-{axis}",
        heading=heading,
        caption=caption,
        alternative=f"{heading}: " + ("; ".join(ends) or "no finished run") + ".",
        figure={"data": traces, "layout": {"xaxis": {"title": {"text": axis}}, "yaxis": y_axis}},
    )


def _traces(comparison: Comparison, arm: ArmCurves, index: int, axis: Axis) -> list[Figure]:
    stroke = strokes(comparison)[arm.arm]
    common: Figure = {"type": "scatter", "mode": "lines", "meta": index, "showlegend": False}
    name = text(arm.arm)
    traces: list[Figure] = []
    if arm.band is not None and len(arm.lines) > 1:
        outline = (
            np.concatenate([arm.band.x, arm.band.x[::-1]]),
            np.concatenate([arm.band.high, arm.band.low[::-1]]),
        )
        shade = {"fill": "toself", "fillcolor": stroke.colour, "opacity": 0.15, "line": {"width": 0}}
        traces.append({**common, **shade, **_xy(*outline), "hoverinfo": "skip"})
    for line in arm.lines:
        if len(arm.lines) > 1 or not line.finished:
            thin = {"line": {"color": stroke.colour, "width": 0.8}, "opacity": 0.45, "hoverinfo": "skip"}
            traces.append({**common, **thin, **_xy(line.x, line.y)})
        if not line.finished:
            cross = {"mode": "markers", "marker": {"symbol": "x", "color": stroke.colour, "size": 8}}
            hover = {"hoverinfo": "text", "hovertext": text(f"{label(arm.arm)}, seed {line.seed}: failed")}
            traces.append({**common, **cross, **hover, **_xy(line.x[-1:], line.y[-1:])})
    if arm.band is not None:
        mean: Figure = {
            "name": name,
            "line": {"color": stroke.colour, "width": 2.4, "dash": stroke.dash},
            "mode": "lines" if len(arm.band.x) > 1 else "markers",
            "marker": {"color": stroke.colour},
            "hovertemplate": f"%{{y:.4f}} at %{{x:,.4~s}} {axis}",
        }
        traces.append({**common, **mean, **_xy(arm.band.x, arm.band.mean)})
    return traces


def difference_chart(table: ComparisonTable) -> Chart | None:
    """The paired differences of the primary metric with their intervals, one row for each arm."""
    arms = [arm for arm in table.arms[1:] if arm.primary.difference and math.isfinite(arm.primary.difference.estimate)]
    if not arms:
        return None
    colours = {"better": "#0072B2", "worse": "#D55E00"}
    traces: list[Figure] = []
    annotations: list[Figure] = []
    words = []
    reach = 0.0
    for row, arm in enumerate(arms):
        interval, standing = arm.primary.difference, arm.primary.standing or ""
        assert interval is not None
        whole = math.isfinite(interval.low) and math.isfinite(interval.high)
        colour = colours.get(standing, BASELINE)
        ends = (interval.estimate, interval.low, interval.high)
        reach = max([reach, *(abs(end) for end in ends if math.isfinite(end))])
        trace: Figure = {
            "type": "scatter",
            "mode": "markers",
            "x": [_round(interval.estimate)],
            "y": [row],
            "marker": {"color": colour, "size": 10, "symbol": "circle" if whole else "circle-open"},
            "showlegend": False,
            "hoverinfo": "text",
            "hovertext": text(
                f"{label(arm.name)}: {number(interval.estimate, interval.sd, sign=True)} "
                f"{interval_text(interval.low, interval.high) if whole else 'no interval'}"
            ),
        }
        if whole:
            trace["error_x"] = {
                "type": "data",
                "symmetric": False,
                "array": [_round(interval.high - interval.estimate)],
                "arrayminus": [_round(interval.estimate - interval.low)],
                "color": colour,
                "thickness": 2.4,
                "width": 5,
            }
        traces.append(trace)
        mark = standing + (" †" if arm.flags and standing in colours else "")
        annotations.append(
            {
                "text": text(mark), "x": 1.01, "xref": "paper", "xanchor": "left", "y": row,
                "showarrow": False,
                "font": {"color": colour},
            }
        )  # fmt: skip
        words.append(f"{label(arm.name)} {mark}, {interval_text(interval.low, interval.high)}")
    layout: Figure = {
        "height": 130 + 40 * len(arms),
        "margin": {"r": 120, "t": 30},
        "xaxis": {
            "title": {"text": text(f"difference in {table.metric} to {one_line(table.baseline, 40)}")},
            "range": [_round(-1.12 * reach or -1.0), _round(1.12 * reach or 1.0)],
            "zeroline": True,
            "zerolinewidth": 2,
        },
        "yaxis": {
            "tickmode": "array",
            "tickvals": list(range(len(arms))),
            "ticktext": [text(one_line(arm.name, 36) or "(unnamed)") for arm in arms],
            "range": [len(arms) - 0.5, -0.5],
            "automargin": True,
            "zeroline": False,
            "showgrid": False,
            "fixedrange": True,
        },
        "annotations": annotations,
    }
    side = "left" if table.lower_is_better else "right"
    return Chart(
        id="chart-differences",
        heading="Differences to the baseline",
        caption=f"Paired by seed, corrected intervals; {side} of zero is better, open circles have none.",
        alternative="Differences to the baseline: " + "; ".join(words) + ".",
        figure={"data": traces, "layout": layout},
    )


def text(name: str) -> str:
    """Text for plotly, which reads tags and entities in labels: the user's are shown as they were written.

    >>> text("<b>a & b")
    '&lt;b&gt;a &amp; b'
    """
    return label(name).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _xy(x: Array, y: Array) -> Figure:
    return {"x": [_round(value) for value in x], "y": [_round(value) for value in y]}


def _round(value: float) -> float:
    """Seven digits are more than a screen shows, and a third of the bytes."""
    rounded = float(f"{float(value):.7g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded
