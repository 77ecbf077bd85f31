"""Curves of several seeds on one grid: their mean, their range, and fewer points where there are too many."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lossmith.reporting.comparison import Comparison, Curve, Run
from lossmith.reporting.table import failure_reason

Axis = Literal["tokens", "seconds"]
Part = Literal["evaluation", "train"]
Array = NDArray[np.float64]
POINTS = 400


@dataclass(frozen=True, slots=True)
class Line:
    """The finite points of one seed, by ascending ``x``."""

    seed: int
    finished: bool
    x: Array
    y: Array


@dataclass(frozen=True, slots=True)
class Band:
    """Mean and range over seeds, where all of them were measured."""

    x: Array
    mean: Array
    low: Array
    high: Array


@dataclass(frozen=True, slots=True)
class ArmCurves:
    """What is drawn of one arm: ``lines`` of every seed, ``band`` of the finished ones, if any."""

    arm: str
    lines: tuple[Line, ...]
    band: Band | None


def arm_curves(comparison: Comparison, part: Part, axis: Axis) -> list[ArmCurves]:
    """The curves of every arm that has any, the baseline first."""
    names = [comparison.baseline, *(name for name in comparison.arms if name != comparison.baseline)]
    found = []
    for name in names:
        lines = []
        for run in sorted((run for run in comparison.runs if run.arm == name), key=lambda run: run.seed):
            x, y = thinned(*points(getattr(run, part), axis))
            if len(x):
                lines.append(Line(run.seed, failure_reason(run, comparison.metric) is None, x, y))
        if lines:
            found.append(ArmCurves(name, tuple(lines), band([line for line in lines if line.finished])))
    return found


def points(curve: Curve, axis: Axis) -> tuple[Array, Array]:
    """Finite points by ascending ``axis``; none where the curve does not have that axis.

    >>> points(Curve((1, 2), (10, 20), (0.1, 0.2), (3.0, float("nan"))), "tokens")
    (array([10.]), array([3.]))
    """
    x = np.asarray(getattr(curve, axis), dtype=np.float64)
    y = np.asarray(curve.values, dtype=np.float64)
    if len(x) == 0:
        return x, x
    if len(x) != len(y):
        raise ValueError(f"a curve has {len(x)} {axis} but {len(y)} values; the lists must have equal lengths")
    keep = np.isfinite(x) & np.isfinite(y)
    order = np.argsort(x[keep], kind="stable")
    return x[keep][order], y[keep][order]


def thinned(x: Array, y: Array, limit: int = POINTS) -> tuple[Array, Array]:
    """Means of ``limit`` equal groups of neighbouring points where there are more; the last point stays.

    >>> thinned(np.arange(5.0), np.array([1.0, 3.0, 5.0, 7.0, 9.0]), limit=3)
    (array([0.5, 2.5, 4. ]), array([2., 6., 9.]))
    """
    if len(x) <= limit:
        return x, y
    edges = np.linspace(0, len(x) - 1, limit).astype(int)[:-1]
    sizes = np.diff(np.append(edges, len(x) - 1))
    means = [np.add.reduceat(a[:-1], edges) / sizes for a in (x, y)]
    return np.append(means[0], x[-1]), np.append(means[1], y[-1])


def band(lines: Sequence[Line]) -> Band | None:
    """Interpolate all lines to the points of any, within the range that all have."""
    if not lines:
        return None
    first, last = max(line.x[0] for line in lines), min(line.x[-1] for line in lines)
    grid = np.unique(np.concatenate([line.x for line in lines]))
    grid = grid[(grid >= first) & (grid <= last)]
    if len(grid) == 0:
        return None
    if len(grid) > POINTS:
        grid = grid[np.linspace(0, len(grid) - 1, POINTS).astype(int)]
    values = np.stack([np.interp(grid, line.x, line.y) for line in lines])
    scale = max(1.0, float(np.abs(values).max()))  # a mean of huge finite values must not overflow
    return Band(grid, (values / scale).mean(0) * scale, values.min(0), values.max(0))


def frame(arms: Iterable[ArmCurves]) -> tuple[float, float, bool] | None:
    """Lower and upper end of the value axis, and whether the start of some curve lies above it.

    The first part of a run falls so far that the differences at its end would be invisible next to it.
    """
    lines = [line for arm in arms for line in arm.lines]
    if not lines:
        return None
    last = max(float(line.x[-1]) for line in lines)
    late = [line.y[line.x >= 0.15 * last] for line in lines]
    shown = np.concatenate([*late, np.asarray([line.y[-1] for line in lines])])
    low, high = float(shown.min()), float(shown.max())
    everything = np.concatenate([line.y for line in lines])
    if everything.min() < low - 2 * (high - low):  # rising curves (accuracy) keep their frame too
        clipped_below = True
    else:
        clipped_below, low = False, float(everything.min())
    clipped_above = float(everything.max()) > high + 0.25 * (high - low)
    high = high if clipped_above else float(everything.max())
    pad = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
    if not (math.isfinite(low - pad) and math.isfinite(high + pad)):
        return None
    return low - pad, high + pad, clipped_above or clipped_below


def value_name(comparison: Comparison, part: Part) -> str:
    """What the values of a curve are called: the primary metric's name where they end at it."""
    if part == "train":
        return "training loss"
    runs = [run for run in comparison.runs if _finite_end(run, comparison.metric)]
    if runs and all(
        math.isclose(run.evaluation.values[-1], run.metrics[comparison.metric], rel_tol=0.05, abs_tol=1e-9)
        for run in runs
    ):
        return comparison.metric
    return "evaluation"


def _finite_end(run: Run, metric: str) -> bool:
    return failure_reason(run, metric) is None and bool(run.evaluation.values)
