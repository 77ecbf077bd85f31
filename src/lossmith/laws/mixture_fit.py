"""Curves over tokens for every share at once, and refits on resampled runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lossmith.laws.fitting import Objective, fit_terms
from lossmith.laws.mixture_curves import DOMAIN_CURVE, GENERAL_CURVE, domain_change, general_change, in_order
from lossmith.laws.mixture_table import Size
from lossmith.laws.resampling import distinct
from lossmith.laws.tables import Table
from lossmith.laws.terms import Array, Terms

#: Parameters of a share: general loss over tokens, then domain loss.
GENERAL_NAMES = ("alpha2", "alpha3", "beta2", "s2", "s3")
DOMAIN_NAMES = ("alpha1", "beta1", "s1")
_ENOUGH_RUNS = 3
# The engine's exponents are the negative of the equation's.
_SIGNS = np.array([1.0, 1.0, 1.0, -1.0, -1.0])
_REFITS_AT_ONCE = 25


@dataclass(frozen=True, slots=True)
class Cells:
    """The rows of a table by size, share and kind of loss; ``rows`` are ``(C, n)`` indices, -1 where a cell is shorter.

    Cells are ordered by size, then share; the first half are general losses, the second domain losses.
    """

    rows: np.ndarray
    times: Array
    changes: Array
    present: np.ndarray

    @classmethod
    def of(cls, table: Table, sizes: Sequence[Size]) -> Cells:
        """Group the rows; times are relative to the size's budget, changes to the loss before."""
        columns = table.columns
        groups = []
        for part in (0, 1):
            for size in sizes:
                for ratio in size.ratios:
                    mask = (
                        (columns["params"] == size.params) & (columns["ratio"] == ratio) & (columns["domain"] == part)
                    )
                    group = np.flatnonzero(mask)
                    groups.append(group[np.lexsort((columns["tokens"][group], table.runs[group]))])
        longest = max(len(group) for group in groups)
        rows = np.stack([np.pad(group, (0, longest - len(group)), constant_values=-1) for group in groups])
        present = rows >= 0
        budgets = np.tile([size.tokens for size in sizes for _ in size.ratios], 2)
        times = np.where(present, columns["tokens"][rows] / budgets[:, None], 1.0)
        changes = np.where(present, (columns["loss"] - columns["base"])[rows], 0.0)
        return cls(rows, times, changes, present)

    def value(self, parameters: Array) -> Array:
        """The fitted change of every point, ``(2C, n)``, for the parameters ``(C, 8)``."""
        half = len(self.rows) // 2
        general = general_change(parameters[:, None, :5], self.times[:half])
        return np.concatenate([general, domain_change(parameters[:, None, 5:], self.times[half:])])


def fit_cells(cells: Cells, objective: Objective, starts: int) -> tuple[Array, list[Array]]:
    """The curves ``(C, 8)``, and for each cell the minima from which refits start."""
    half = len(cells.rows) // 2
    halves = ((slice(0, half), GENERAL_CURVE), (slice(half, None), DOMAIN_CURVE))
    parts, minima = [], []
    for which, terms in halves:
        found = fit_terms(
            terms,
            {"t": cells.times[which]},
            cells.changes[which],
            weights=cells.present[which].astype(np.float64),
            objective=objective,
            starts=starts,
        )
        parts.append(found.parameters)
        # The two powers of general loss may change places: that is no other minimum.
        found_at = in_order(found.minima) * _SIGNS if terms is GENERAL_CURVE else found.minima
        near = [distinct(m, v, 2) for m, v in zip(found_at, found.values, strict=True)]
        most = max(len(n) for n in near)
        minima.append(np.stack([np.pad(n, ((0, most - len(n)), (0, 0)), mode="edge") for n in near]))
    return _joined(*parts), minima


def refit_cells(
    cells: Cells,
    best: Array,
    minima: list[Array],
    runs: np.ndarray,
    objective: Objective,
    *,
    number: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Array:
    """Curves of bootstrap refits ``(number, C, 8)``.

    Shares with at least three runs have whole runs drawn with replacement: a run's label means the same in every share
    (the seed, and with it the model before), so that a draw holds for all of them. With fewer, blocks of neighbouring
    residuals are drawn from anywhere along the curve: losses wander, so that neighbours err together.
    """
    rng = np.random.default_rng(seed)
    half = len(cells.rows) // 2
    value = cells.value(best)
    residuals = np.where(cells.present, cells.changes - value, 0.0)
    labels = np.where(cells.present, runs[cells.rows], "")
    names, codes = np.unique(labels, return_inverse=True)
    codes = codes.reshape(labels.shape)
    several = [len(np.unique(row[row != ""])) >= _ENOUGH_RUNS for row in labels]
    found = []
    for first in range(0, number, _REFITS_AT_ONCE):
        count = min(_REFITS_AT_ONCE, number - first)
        # Weights of names are drawn once for all cells that have the same names.
        drawn: dict[tuple[str, ...], Array] = {}
        weights = np.broadcast_to(cells.present.astype(np.float64), (count, *cells.rows.shape)).copy()
        targets = np.broadcast_to(cells.changes, weights.shape).copy()
        for cell in range(len(cells.rows)):
            own = np.unique(labels[cell][cells.present[cell]])
            if several[cell]:
                key = tuple(own.tolist())
                if key not in drawn:
                    drawn[key] = np.zeros((count, len(names)))
                    drawn[key][:, np.isin(names, own)] = rng.multinomial(
                        len(own), np.full(len(own), 1 / len(own)), count
                    )
                weights[:, cell] *= drawn[key][:, codes[cell]]
            else:
                there = cells.present[cell]
                curve = best[cell % half, :5] if cell < half else best[cell % half, 5:]
                errors = _standard_residuals(curve, cells.times[cell, there], residuals[cell, there])
                targets[:, cell, there] = value[cell, there] + _blocks(rng, errors, count)
        parts = []
        for which, terms, initial in (
            (slice(0, half), GENERAL_CURVE, minima[0]),
            (slice(half, None), DOMAIN_CURVE, minima[1]),
        ):
            parts.append(_refits(terms, cells, which, targets[:, which], weights[:, which], initial, objective))
        found.append(_joined(*parts))
        if progress is not None:
            progress(first + count, number)
    return np.concatenate(found)


def _refits(
    terms: Terms, cells: Cells, which: slice, targets: Array, weights: Array, initial: Array, objective: Objective
) -> Array:
    count, shares, points = targets.shape
    found = fit_terms(
        terms,
        {"t": np.tile(cells.times[which], (count, 1))},
        targets.reshape(-1, points),
        weights=weights.reshape(-1, points),
        objective=objective,
        starts=0,
        initial=np.tile(initial, (count, 1, 1)),
    )
    return found.parameters.reshape(count, shares, -1)


def _joined(general: Array, domain: Array) -> Array:
    """Parameters with the signs of the equations: general, then domain."""
    return np.concatenate([in_order(general), domain * np.array([1.0, 1.0, -1.0])], -1)


def _standard_residuals(curve: Array, times: Array, residuals: Array) -> Array:
    """Residuals as large as errors are: a fit follows its points, most of all those at the ends."""
    logs = np.log(times)
    powers = [(a, s) for a, s in zip(curve[: len(curve) // 2], curve[len(curve) // 2 + 1 :], strict=True)]
    columns = [np.ones_like(times)]
    for coefficient, exponent in powers:
        columns += [times**exponent, coefficient * times**exponent * logs]
    basis, _ = np.linalg.qr(np.stack(columns, -1) / np.maximum(np.abs(np.stack(columns, -1)).max(0), 1e-300))
    leverage = np.minimum((basis**2).sum(-1), 0.95)
    standard = residuals / np.sqrt(1 - leverage)
    return standard - standard.mean()


def _blocks(rng: np.random.Generator, errors: Array, count: int) -> Array:
    """Errors ``(count, n)``: blocks of about n ** (1/3) neighbours from anywhere, with random signs."""
    number = len(errors)
    length = max(2, round(number ** (1 / 3)))
    blocks = -(-number // length)
    starts = rng.integers(0, number, size=(count, blocks, 1))
    picked = errors[(starts + np.arange(length)) % number] * rng.choice([-1.0, 1.0], size=(count, blocks, 1))
    return picked.reshape(count, -1)[:, :number]
