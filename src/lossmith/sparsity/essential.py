"""How much of a model goes for free: the curve of quality by sparsity, where it leaves its tolerance, and its knee.

"The Emergence of Essential Sparsity in Large Pre-trained Models: The Weights that Matter", 2023, arXiv 2306.03805. The
paper names a turning point and a tolerance of 1 %; the formulas here are this module's own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from lossmith.files import write_picture
from lossmith.sparsity.magnitude import apply_masks, one_shot_masks, release_masks
from lossmith.sparsity.masks import parse_structure

GRID = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Knee:
    """The turn of two straight lines: where it is, the slope before and after."""

    at: float
    before: float
    after: float

    @property
    def sharp(self) -> bool:
        """Whether the curve falls more than five times as fast after the knee as before."""
        return abs(self.after) > 5 * abs(self.before)


def essential_point(
    grid: Sequence[float],
    scores: ArrayLike,
    *,
    tolerance: float = 0.01,
    absolute: bool = False,
    interpolate: bool = False,
) -> float:
    """The largest sparsity up to which *every* score is at least ``(1 - tolerance)`` of the dense one.

    Args:
        grid: sparsities, ascending from 0.
        scores: higher is better.
        tolerance: share of the dense score (of its magnitude, where it is negative), 0 or more.
        absolute: the tolerance is a difference of scores instead.
        interpolate: the straight line between the last point that passes and the first that fails.

    A noisy curve that comes back after a failure does not count.

    >>> scores = [0.84, 0.841, 0.839, 0.838, 0.836, 0.831, 0.80, 0.72, 0.60, 0.41]
    >>> essential_point(GRID, scores), essential_point(GRID, scores, absolute=True)
    (0.4, 0.5)
    """
    places, values = _curve(grid, scores)
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance}")
    limit = values[0] - (tolerance if absolute else tolerance * abs(values[0]))
    # A score that is not finite fails.
    failing = np.flatnonzero(~(values >= limit))
    if not len(failing):
        return float(places[-1])
    first = int(failing[0])
    last = float(places[first - 1])
    if not interpolate or not math.isfinite(values[first]):
        return last
    share = (values[first - 1] - limit) / (values[first - 1] - values[first])
    return float(last + share * (places[first] - last))


def find_knee(grid: Sequence[float], scores: ArrayLike) -> Knee:
    """Least squares of ``b0 + b1 s + b2 max(0, s - t)``, ``t`` at the inner points of the grid; the first of equals.

    >>> knee = find_knee((0, 0.1, 0.2, 0.3, 0.4, 0.5), [1, 1, 1, 1, 0.8, 0.6])
    >>> knee.at, round(knee.after, 9)
    (0.3, -2.0)
    """
    places, values = _curve(grid, scores)
    if len(places) < 4:
        raise ValueError(f"a knee needs at least 4 sparsities, got {len(places)}")
    if not np.isfinite(values).all():
        raise ValueError("a knee needs finite scores")
    best: tuple[float, Knee] | None = None
    for t in places[1:-1]:
        design = np.stack([np.ones_like(places), places, np.maximum(0, places - t)], axis=1)
        fit = np.linalg.lstsq(design, values, rcond=None)[0]
        error = float(np.square(design @ fit - values).sum())
        # Rounding is no better fit.
        if best is None or error < best[0] - 1e-12 * float(np.square(values).sum()):
            best = error, Knee(float(t), float(fit[1]), float(fit[1] + fit[2]))
    assert best is not None
    return best[1]


@dataclass(frozen=True, slots=True)
class EssentialCurve:
    """Scores by sparsity.

    Attributes:
        grid: sparsities, ascending from 0.
        scores: higher is better (of losses, their negative).
        samples: (examples or runs x grid) what the scores are means of; empty where only the scores are known.
        weights: of the examples, such as their tokens.
        method: of pruning.
        tolerance, absolute: see :func:`essential_point`.
        patterns: scores of N:M patterns besides.
        bootstrap: resamples of the intervals.
        seed: of the resamples.
    """

    grid: tuple[float, ...]
    scores: tuple[float, ...]
    samples: Floats = field(default_factory=lambda: np.zeros((0, 0)))
    weights: Floats = field(default_factory=lambda: np.zeros(0))
    method: str = "magnitude"
    tolerance: float = 0.01
    absolute: bool = False
    patterns: Mapping[str, float] = field(default_factory=dict)
    bootstrap: int = 1000
    seed: int = 0

    @property
    def s_star(self) -> float:
        """See :func:`essential_point`."""
        return essential_point(self.grid, self.scores, tolerance=self.tolerance, absolute=self.absolute)

    @property
    def knee(self) -> Knee:
        """See :func:`find_knee`."""
        return find_knee(self.grid, self.scores)

    def resampled(self) -> Floats:
        """Curves (resamples x grid) from examples drawn with replacement, the same for all sparsities."""
        number = len(self.samples)
        if number < 2:
            return np.zeros((0, len(self.grid)))
        # How often each example is drawn, rather than which.
        drawn = np.random.default_rng(self.seed).multinomial(number, np.full(number, 1 / number), size=self.bootstrap)
        weighted = drawn * (self.weights if len(self.weights) else 1.0)
        weighted = weighted[weighted.sum(axis=1) > 0]
        found: Floats = weighted @ self.samples / weighted.sum(axis=1, keepdims=True)
        return found

    def interval(self, what: Literal["s_star", "knee"] = "s_star", level: float = 0.95) -> tuple[float, float]:
        """Percentiles over resampled examples (or runs); NaN where there are fewer than two."""
        curves = self.resampled()
        if not len(curves):
            return math.nan, math.nan
        if what == "knee":
            values = [find_knee(self.grid, curve).at for curve in curves]
        else:
            options: dict[str, Any] = {"tolerance": self.tolerance, "absolute": self.absolute}
            values = [essential_point(self.grid, curve, **options) for curve in curves]
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], method="closest_observation")
        return float(low), float(high)

    def to_frame(self) -> pd.DataFrame:
        """One row per sparsity: ``sparsity``, ``score``, ``drop`` and the standard error of the paired drop."""
        scores = np.array(self.scores)
        error = self.resampled()
        drop_error = (error[:, :1] - error).std(axis=0) if len(error) else np.full(len(scores), math.nan)
        return pd.DataFrame(
            {"sparsity": self.grid, "score": scores, "drop": scores[0] - scores, "drop_error": drop_error}
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        knee = self.knee if len(self.grid) >= 4 and np.isfinite(self.scores).all() else None
        return {
            "method": self.method,
            "tolerance": self.tolerance,
            "absolute": self.absolute,
            "s_star": self.s_star,
            "s_star_interval": list(self.interval()),
            "knee": knee and {"at": knee.at, "before": knee.before, "after": knee.after, "sharp": knee.sharp},
            "knee_interval": list(self.interval("knee")) if knee else None,
            "rows": self.to_frame().to_dict("records"),
            "patterns": dict(self.patterns),
        }

    def summary(self) -> str:
        """The table, the essential sparsity and the knee."""
        lines = [f"{'sparsity':>8} {'score':>10} {'drop':>10}  ± standard error"]
        for s, score, drop, error in self.to_frame().itertuples(index=False):
            lines.append(f"{s:8.2f} {score:10.4f} {drop:10.4f}" + (f"  ± {error:.4f}" if math.isfinite(error) else ""))
        lines += [f"{p:>8} {v:10.4f} {self.scores[0] - v:10.4f}" for p, v in self.patterns.items()]
        unit = "" if self.absolute else " of the dense score"
        lines.append(
            f"essential sparsity {self.s_star:g}{_between(self.interval())}: up to there the drop is at most "
            f"{self.tolerance:.4g}{unit}"
        )
        if len(self.grid) >= 4 and np.isfinite(self.scores).all():
            knee = self.knee
            lines.append(
                f"knee at {knee.at:g}{_between(self.interval('knee'))}: slope {knee.before:.4g} before, "
                f"{knee.after:.4g} after, {'sharp' if knee.sharp else 'not sharp'}"
            )
        return "\n".join(lines)

    def plot(self, path: str | Path | None = None) -> Any:
        """Draw the curve with its interval, the essential sparsity and the knee; save it under ``path``."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(self.grid, self.scores, marker="o", label=self.method)
        if len(curves := self.resampled()):
            low, high = np.quantile(curves, [0.025, 0.975], axis=0)
            axes.fill_between(self.grid, low, high, alpha=0.2, label="95% over examples")
        axes.axvline(self.s_star, linestyle="--", color="grey", label=f"essential sparsity {self.s_star:g}")
        for pattern, score in self.patterns.items():
            kept, of = parse_structure(pattern) or (1, 1)
            axes.plot([1 - kept / of], [score], marker="x", linestyle="none", label=pattern)
        axes.set(xlabel="sparsity of the prunable weights", ylabel="score")
        axes.legend()
        if path is not None:
            write_picture(figure, path)
        return figure


def essential_sparsity(
    model: nn.Module | Callable[[], nn.Module],
    evaluate: Callable[[nn.Module], Any],
    *,
    grid: Sequence[float] = GRID,
    method: str = "magnitude",
    patterns: Sequence[str] = (),
    finetune: Callable[[nn.Module], object] | None = None,
    targets: Literal["blocks", "all"] = "blocks",
    exclude: Sequence[str] = (),
    tolerance: float = 0.01,
    absolute: bool = False,
    lower_is_better: bool = False,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> EssentialCurve:
    """Prune once at every sparsity of a grid, each time from the same weights, and evaluate.

    Args:
        model: a module, which is copied, or a function that loads it afresh.
        evaluate: one number; or a value per example, which gives intervals; or a pair (values, weights).
        grid: sparsities, ascending from 0.
        method: see :func:`~lossmith.sparsity.one_shot_masks`.
        patterns: N:M patterns to evaluate besides, such as ``("2:4",)``.
        finetune: trains the pruned model in place, masks held; make the optimiser inside.
        targets, exclude: see :func:`~lossmith.sparsity.block_weights`.
        tolerance, absolute: see :func:`essential_point`.
        lower_is_better: ``evaluate`` gives losses: the curve holds their negative.
        seed: of random masks and of the intervals.
        progress: told (done, total) after each model.

    >>> layer = nn.Linear(4, 4)
    >>> curve = essential_sparsity(layer, lambda m: float((m.weight != 0).sum()), targets="all", tolerance=0.3)
    >>> curve.s_star
    0.2
    """
    _curve(grid, np.zeros(len(grid)))
    for pattern in patterns:
        if parse_structure(pattern) is None:
            raise ValueError(f"patterns are N:M such as 2:4, got {pattern!r}")
    columns: list[Floats] = []
    weights: Floats | None = None
    settings: list[tuple[str, float]] = [(method, s) for s in grid] + [(p, 0.0) for p in patterns]
    for number, (kind, sparsity) in enumerate(settings):
        pruned = copy.deepcopy(model) if isinstance(model, nn.Module) else model()
        chosen = one_shot_masks(pruned, sparsity, method=kind, targets=targets, exclude=exclude, seed=seed)
        apply_masks(pruned, chosen, hold=finetune is not None)
        if finetune is not None:
            finetune(pruned)
            release_masks(pruned)
        values, own = _measured(evaluate(pruned))
        if columns and len(values) != len(columns[0]):
            raise ValueError(f"evaluate gave {len(columns[0])} values first and {len(values)} later")
        columns.append(-values if lower_is_better else values)
        weights = own
        progress(number + 1, len(settings))
    assert weights is not None
    samples = np.stack(columns, axis=1)
    means = weights @ samples / weights.sum()
    return EssentialCurve(
        tuple(float(s) for s in grid),
        tuple(means[: len(grid)].tolist()),
        samples[:, : len(grid)],
        weights,
        method,
        tolerance,
        absolute,
        dict(zip(patterns, means[len(grid) :].tolist(), strict=True)),
        seed=seed,
    )


def _measured(found: Any) -> tuple[Floats, Floats]:
    values, weights = found if isinstance(found, tuple) else (found, None)
    if isinstance(values, Tensor):
        values = values.detach().double().cpu().numpy()
    array = np.atleast_1d(np.asarray(values, dtype=np.float64))
    own = np.ones(len(array)) if weights is None else np.asarray(weights, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"evaluate must give a number or a value per example, got shape {array.shape}")
    if own.shape != array.shape or not (own >= 0).all() or not own.sum() > 0:
        raise ValueError("evaluate's weights must be one per value, not negative, and not all zero")
    return array, own


def _curve(grid: Sequence[float], scores: ArrayLike) -> tuple[Floats, Floats]:
    places, values = np.asarray(grid, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if places.ndim != 1 or len(places) < 2 or places[0] != 0 or not (np.diff(places) > 0).all() or places[-1] >= 1:
        raise ValueError(f"the grid must rise from 0 to below 1, got {list(grid)}")
    if values.shape != places.shape:
        raise ValueError(f"there are {len(places)} sparsities and {values.size} scores")
    if not math.isfinite(values[0]):
        raise ValueError(f"the score of the dense model is {values[0]}")
    return places, values


def _between(interval: tuple[float, float]) -> str:
    low, high = interval
    return f" (95% interval {low:g} to {high:g})" if math.isfinite(low) else ""
