"""Risk of a tuned head against the width of the frozen model below it: double descent, in theory and on features."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from lossmith.theory.linear_gaussian import (
    Array,
    LinearGaussianHMM,
    MinNormHead,
    conditional_risk,
    excess_risk,
    theoretical_risk,
)


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """Risks at one width, means over repeats; prediction risk is excess plus what no head can avoid.

    Attributes:
        p, n: width and number of examples.
        excess, excess_error: simulated, with its standard error.
        median: of the excess, which exists at ``p = n``, too.
        bias, variance: of the heads, given their examples, exactly.
        theory: expected excess; infinite next to ``p = n``.
        best: risk of the best head.
        null: risk of a head that says 0.
    """

    p: int
    n: int
    excess: float
    excess_error: float
    median: float
    bias: float
    variance: float
    theory: float
    best: float
    null: float

    @property
    def prediction(self) -> float:
        """Risk of the tuned head."""
        return self.best + self.excess


def complexity_sweep(
    widths: Sequence[int],
    n: int = 100,
    *,
    d: int = 20,
    rho: float = 0.8,
    feature_noise: float = 0.5,
    repeats: int = 20,
    ridge: float = 0.0,
    seed: int = 0,
) -> list[SweepPoint]:
    """Tune heads on the model :class:`LinearGaussianHMM` at every width, ``W`` drawn afresh for each.

    Args:
        widths: ``p``.
        n: examples, from independent sequences.
        d: size of a state.
        rho: dependence of a state on the one before.
        feature_noise: ``s_u``.
        repeats: draws of ``W`` and of examples.
        ridge: ``λ`` of the heads.
        seed: of everything.

    Raises:
        ValueError: sizes below 1.

    >>> point = complexity_sweep([10], repeats=5)[0]
    >>> abs(point.excess / point.theory - 1) < 0.2
    True
    """
    if n < 2 or repeats < 1 or not widths:
        raise ValueError(f"n must be at least 2, repeats at least 1, and there must be widths; got {n}, {repeats}")
    points = []
    for p in widths:
        rows = []
        for repeat in range(repeats):
            hmm = LinearGaussianHMM.stationary(d, p, rho=rho, feature_noise=feature_noise, seed=seed, draw=repeat)
            population = hmm.population()
            x, z = hmm.pairs(n, seed=[seed, 2, p, repeat])
            excess = excess_risk(MinNormHead(ridge).fit(x, z), population)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                theory = sum(theoretical_risk(population, n))
            rows.append([excess, *conditional_risk(x, population), theory, population.best_risk, population.null_risk])
        table = np.array(rows)
        means = table.mean(0)
        error = float(table[:, 0].std(ddof=1) / math.sqrt(repeats)) if repeats > 1 else math.nan
        points.append(SweepPoint(p, n, float(means[0]), error, float(np.median(table[:, 0])), *map(float, means[1:])))
    return points


@dataclass(frozen=True, slots=True)
class FeaturePoint:
    """Held-out error of heads on a user's features.

    Attributes:
        p, n: width and number of training examples.
        error: median over splits of the mean over held-out examples of ``Σ (z - x B)²``.
        accuracy: mean over splits, where targets are classes; NaN where not.
    """

    p: int
    n: int
    error: float
    accuracy: float


def complexity_sweep_features(
    features: ArrayLike,
    targets: ArrayLike,
    widths: Sequence[int],
    n_train: int,
    *,
    splits: int = 8,
    ridge: float = 0.0,
    project: str = "random",
    seed: int = 0,
) -> list[FeaturePoint]:
    """The same sweep on features of a frozen model.

    Args:
        features: ``(rows, p)``.
        targets: ``(rows, d)``, or class indices ``(rows,)``, which become one-hot vectors.
        widths: directions used; more than ``p`` are refused.
        n_train: training rows; the others are held out.
        splits: random splits.
        ridge: ``λ`` of the heads.
        project: ``random`` (random orthogonal directions), ``first`` columns, or ``principal`` directions of the
            training rows.
        seed: of splits and directions.

    Raises:
        ValueError: values that are not finite, ``n_train`` not below the rows, widths above ``p``.
    """
    x, y = np.asarray(features, dtype=np.float64), np.asarray(targets)
    if x.ndim != 2 or len(x) != len(y):
        raise ValueError(f"features must be (rows, p) with one target per row, got {x.shape} and {y.shape}")
    if not np.isfinite(x).all() or (y.dtype.kind == "f" and not np.isfinite(y).all()):
        raise ValueError("features and targets must be finite")
    if not 1 <= n_train < len(x):
        raise ValueError(f"n_train must lie from 1 to {len(x) - 1}, got {n_train}")
    if not widths or min(widths) < 1 or max(widths) > x.shape[1]:
        raise ValueError(f"widths must lie from 1 to {x.shape[1]}, got {list(widths)}")
    if project not in ("random", "first", "principal"):
        raise ValueError(f"project must be random, first or principal, got '{project}'")
    classes = y.ndim == 1 and y.dtype.kind in "iub"
    z: Array = np.eye(int(y.max()) + 1)[y.astype(int)] if classes else y.astype(np.float64).reshape(len(x), -1)
    points = []
    for p in widths:
        errors, right = [], []
        for split in range(splits):
            draw = np.random.default_rng([seed, split])
            order = draw.permutation(len(x))
            train, test = order[:n_train], order[n_train:]
            directions = _directions(x[train], p, project, draw)
            head = MinNormHead(ridge).fit(x[train] @ directions, z[train])
            predicted = head.predict(x[test] @ directions)
            errors.append(float(((predicted - z[test]) ** 2).sum(-1).mean()))
            right.append(float((predicted.argmax(-1) == y[test]).mean()) if classes else math.nan)
        points.append(FeaturePoint(p, n_train, float(np.median(errors)), float(np.mean(right))))
    return points


def _directions(train: Array, p: int, project: str, draw: np.random.Generator) -> Array:
    width = train.shape[1]
    if project == "first":
        return np.eye(width)[:, :p]
    if project == "principal":
        # All p directions even where there are fewer rows.
        return np.linalg.svd(train, full_matrices=True)[2].T[:, :p]
    if p == width:
        return np.eye(width)
    q: Array = np.linalg.qr(draw.standard_normal((width, p)))[0]
    return q
