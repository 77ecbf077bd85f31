"""How sure a fit is: refits on resampled runs, and intervals that are calibrated by predicting upwards.

Points of one run share its seed, its data and its mistakes, so whole runs are resampled, never points. With few runs a
sample with replacement would often leave too few sizes to fit; then the residuals of whole runs change sign instead
(wild bootstrap), which keeps every size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lossmith.laws.fitting import Objective, Solution, fit_terms
from lossmith.laws.terms import Array, Terms

_FEW_RUNS = 8
# The smallest runs that a pseudo-extrapolation is fitted on, as shares of all; each predicts the next fifth.
_CUTS = (0.5, 0.6, 0.7, 0.8)
_NEXT = 0.2
# A law through as few sizes as it has parameters for says nothing of the next.
_SIZES_TO_CALIBRATE = 4
_DRAWS_PER_SAMPLE = 5
# Numbers in one array of resamples, over several folds: 128 MiB.
_MOST_TOGETHER = 1 << 24


@dataclass(frozen=True, slots=True)
class Fit:
    """What a refit needs: the law's shape, the data, and the minimum found."""

    terms: Terms
    columns: Mapping[str, Array]
    target: Array
    runs: np.ndarray
    objective: Objective
    fixed: Mapping[str, float]

    def value(self, parameters: Array) -> Array:
        """The law at the data's inputs."""
        return self.terms.predict(parameters, self.columns)

    def residuals(self, parameters: Array) -> Array:
        """Measured minus predicted, in the objective's own units (logarithms, or the loss)."""
        value = self.value(parameters)
        return np.log(self.target) - np.log(value) if self.objective.residual == "log" else self.target - value

    @property
    def powered(self) -> tuple[str, ...]:
        """The columns that enter with powers."""
        return tuple(dict.fromkeys(column for term in self.terms.terms for column in term.powers))

    def size(self) -> Array:
        """What "larger" means for extrapolation: the logarithm of the product of the columns that enter with powers."""
        total = np.zeros(len(self.target))
        for name in self.powered:
            total = total + np.log(self.columns[name])
        return total

    def measures(self) -> list[Array]:
        """The size, and each of those columns alone where there are several."""
        if len(self.powered) < 2:
            return [self.size()]
        return [self.size(), *(np.log(self.columns[name]) for name in self.powered)]


def refit(
    fit: Fit,
    solution: Solution,
    number: int,
    seed: int,
    *,
    keep: Array | None = None,
    method: Literal["auto", "runs", "wild"] = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Array:
    """Parameters ``(number, P)`` of bootstrap refits.

    Args:
        fit: the data.
        solution: the fit to start from: its minima are the starts of every refit.
        number: resamples.
        seed: of the resampling.
        keep: rows that count, as weights ``(n,)``; all by default.
        method: ``"runs"`` draws runs with replacement, ``"wild"`` turns the signs of their residuals; ``"auto"`` takes
            the second below 8 runs.
        progress: told ``(refits done, refits)``.
    """
    sample = _resample(fit, solution, number, seed, keep, method)
    return _refit(fit, sample, progress).parameters


@dataclass(frozen=True, slots=True)
class _Resample:
    """What the refits are fitted to, ``(number, n)``, and where they start, ``(number, M, P)``."""

    weights: Array
    target: Array
    starts: Array


def _resample(
    fit: Fit, solution: Solution, number: int, seed: int, keep: Array | None = None, method: str = "auto"
) -> _Resample:
    rng = np.random.default_rng(seed)
    kept = np.ones(len(fit.target)) if keep is None else np.asarray(keep, dtype=np.float64)
    _, codes = np.unique(fit.runs, return_inverse=True)
    present = np.unique(codes[kept > 0])
    if method == "auto":
        method = "wild" if len(present) < _FEW_RUNS else "runs"
    shape = (number, len(fit.target))
    if method == "runs":
        counts = rng.multinomial(len(present), np.full(len(present), 1 / len(present)), size=number).astype(np.float64)
        per_run = np.zeros((number, codes.max() + 1))
        per_run[:, present] = counts
        weights: Array = per_run[:, codes] * kept
        target = np.broadcast_to(fit.target, shape)
    else:
        signs = rng.choice([-1.0, 1.0], size=(number, codes.max() + 1))[:, codes]
        free = len(fit.terms.names) - len(fit.fixed)
        points = int((kept > 0).sum())
        wider = np.sqrt(points / max(points - free, 1))
        moved = signs * fit.residuals(solution.parameters[0]) * wider
        value = fit.value(solution.parameters[0])
        target = value * np.exp(moved) if fit.objective.residual == "log" else value + moved
        if fit.objective.residual == "linear" and (fit.target > 0).all():
            target = np.maximum(target, 1e-3 * fit.target)
        weights = np.broadcast_to(kept, shape)
    starts = distinct(solution.minima[0], solution.values[0])
    return _Resample(weights, target, np.broadcast_to(starts, (number, *starts.shape)))


def _refit(fit: Fit, sample: _Resample, progress: Callable[[int, int], None] | None = None) -> Solution:
    return fit_terms(
        fit.terms,
        fit.columns,
        sample.target,
        weights=sample.weights,
        objective=fit.objective,
        starts=0,
        initial=sample.starts,
        fixed=fit.fixed,
        progress=progress,
    )


def distinct(minima: Array, values: Array, limit: int = 3) -> Array:
    """The lowest minima that differ from each other."""
    chosen: list[Array] = []
    for parameters, value in zip(minima, values, strict=True):
        if not np.isfinite(value):
            continue
        if all(np.abs(parameters - other).max() > 1e-4 * (1e-12 + np.abs(other).max()) for other in chosen):
            chosen.append(parameters)
        if len(chosen) == limit:
            break
    return np.array(chosen if chosen else minima[:1])


@dataclass(frozen=True, slots=True)
class Noise:
    """What one measurement may be off by: the effect of its run, and its own; both as found in the fit."""

    of_runs: Array
    within: Array

    @classmethod
    def of(cls, residuals: Array, runs: np.ndarray, parameters: int, keep: Array | None = None) -> Noise:
        """Split residuals; those of ``keep > 0`` count. The fit has used up ``parameters`` degrees of freedom."""
        rows = np.ones(len(residuals), dtype=bool) if keep is None else keep > 0
        residuals, runs = residuals[rows], runs[rows]
        _, codes, counts = np.unique(runs, return_inverse=True, return_counts=True)
        wider = np.sqrt(len(residuals) / max(len(residuals) - parameters, 1))
        if counts.max() == 1:
            return cls(np.zeros(1), residuals * wider)
        means = np.bincount(codes, residuals) / counts
        number = len(counts)
        return cls(means * np.sqrt(number / max(number - 1, 1)), (residuals - means[codes]) * wider)

    def draw(self, rng: np.random.Generator, shape: tuple[int, int]) -> Array:
        """Random errors ``shape``: rows are draws, columns points; the run's effect is one per draw."""
        return rng.choice(self.of_runs, size=(shape[0], 1)) + rng.choice(self.within, size=shape)


def prediction_draws(value: Array, noise: Noise | None, residual: str, seed: int, best: Array | None = None) -> Array:
    """Possible measurements: parameters' uncertainty ``value (S, n)`` and, unless ``None``, noise on top.

    Refits scatter around the fit, not around the truth; their spread is put around ``best``.
    """
    draws = value
    if best is not None:
        with np.errstate(divide="ignore", invalid="ignore"):
            centre = np.median(value, 0)
            draws = value * (best / centre) if residual == "log" else value + (best - centre)
    if noise is None:
        return draws
    repeated = np.repeat(draws, _DRAWS_PER_SAMPLE, axis=0)
    errors = noise.draw(np.random.default_rng(seed), repeated.shape)  # type: ignore[arg-type]
    return repeated * np.exp(errors) if residual == "log" else repeated + errors


def widen(draws: Array, centre: Array, factor: float, residual: str) -> Array:
    """Spread ``draws`` around ``centre`` by ``factor``."""
    if factor == 1:
        return draws
    if residual == "log":
        return np.exp(np.log(centre) + factor * (np.log(draws) - np.log(centre)))
    return centre + factor * (draws - centre)


@dataclass(frozen=True, slots=True)
class Calibration:
    """How much too narrow the plain intervals were when smaller runs predicted larger ones of the same table.

    Attributes:
        factor: what intervals are widened by.
        coverage: share of those larger runs' points that the plain 90% intervals held.
        points: how many points that was; 0 when there are too few runs to find out.
    """

    factor: float = 1.0
    coverage: float = float("nan")
    points: int = 0


def calibrate(fit: Fit, solution: Solution, *, number: int, seed: int, level: float = 0.9) -> Calibration:
    """Fit on the smallest runs, predict the next fifth by size, at several cuts; widen until ``level`` of them are in.

    "Size" is taken in turn to be the product of the inputs and each input alone, because the largest runs lie further
    out in all of them; the direction that needs the most decides. The factor of a direction is the conformal one: the
    ``level`` quantile (with the finite-sample correction) of how many half-widths the points lie from the prediction.
    It is never below 1.
    """
    labels, codes = np.unique(fit.runs, return_inverse=True)
    folds = [_folds(fit, measure, codes, len(labels)) for measure in fit.measures()]
    flat = [fold for direction in folds for fold in direction]
    if not flat:
        return Calibration()
    free = len(fit.terms.names) - len(fit.fixed)
    keeps = np.array([keep for keep, _ in flat], dtype=np.float64)
    found = fit_terms(
        fit.terms,
        fit.columns,
        fit.target,
        weights=keeps,
        objective=fit.objective,
        starts=2,
        initial=distinct(solution.minima[0], solution.values[0]),
        fixed=fit.fixed,
    )
    ones = [Solution(*(getattr(found, name)[i : i + 1] for name in Solution.__slots__)) for i in range(len(flat))]
    refits: list[Array] = []
    together = max(1, _MOST_TOGETHER // (number * len(fit.target)))
    for first in range(0, len(ones), together):
        places = range(first, min(first + together, len(ones)))
        refits += [*_refit_all(fit, [_resample(fit, ones[i], number, seed + i, keeps[i]) for i in places])]
    scores = []
    for index, (keep, test) in enumerate(flat):
        chosen = ones[index].parameters[0]
        noise = Noise.of(fit.residuals(chosen), fit.runs, free, keep)
        best = fit.value(chosen)[test]
        value = fit.value(refits[index])[:, test]
        draws = prediction_draws(value, noise, fit.objective.residual, seed + index, best)
        low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
        scores.append(_half_widths(fit.target[test], low, best, high, fit.objective.residual))
    factor, position = 1.0, 0
    for direction in folds:
        if direction:
            own = np.concatenate(scores[position : position + len(direction)])
            position += len(direction)
            rank = min(np.ceil((len(own) + 1) * level) / len(own), 1.0)
            factor = max(factor, float(np.quantile(own, rank, method="higher")))
    every = np.concatenate(scores)
    return Calibration(factor, float((every <= 1).mean()), len(every))


def _refit_all(fit: Fit, samples: list[_Resample]) -> Array:
    """Parameters ``(samples, number, P)``, all in one call."""
    most = max(sample.starts.shape[1] for sample in samples)
    # Repeated starts cost a little time and change nothing.
    starts = [s.starts[:, np.arange(most) % s.starts.shape[1]] for s in samples]
    whole = _Resample(
        np.concatenate([s.weights for s in samples]),
        np.concatenate([s.target for s in samples]),
        np.concatenate(starts),
    )
    found = _refit(fit, whole).parameters
    return found.reshape(len(samples), -1, found.shape[-1])


def _folds(fit: Fit, size: Array, codes: np.ndarray, runs: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows to fit and rows to predict, at each cut."""
    largest = np.full(runs, -np.inf)
    np.maximum.at(largest, codes, size)
    rank = np.argsort(np.argsort(largest, kind="stable"), kind="stable")[codes]
    folds = []
    for cut in _CUTS:
        first, last = int(np.floor(cut * runs + 1e-9)), int(np.ceil((cut + _NEXT) * runs - 1e-9))
        keep, test = rank < first, (rank >= first) & (rank < last)
        enough = keep.sum() > len(fit.terms.names) + 2
        different = all(len(np.unique(fit.columns[c][keep])) >= _SIZES_TO_CALIBRATE for c in fit.powered)
        if test.any() and enough and different:
            folds.append((keep, test))
    return folds


def _half_widths(measured: Array, low: Array, best: Array, high: Array, residual: str) -> Array:
    if residual == "log":
        measured, low, best, high = np.log(measured), np.log(low), np.log(best), np.log(high)
    above = measured > best
    width = np.where(above, high - best, best - low)
    return np.abs(measured - best) / np.maximum(width, 1e-12)
