"""Hiding the largest runs, predicting them, and counting how often the intervals were right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lossmith.errors import InputError
from lossmith.laws.fitted import Fitted, Interval
from lossmith.laws.law import Law
from lossmith.laws.tables import Reading, Table


@dataclass(frozen=True, slots=True)
class Backtest:
    """How a law fitted to the smaller runs predicted the larger ones.

    Attributes:
        fitted: the law, fitted to the smaller runs.
        hidden: the measurements of the larger ones.
        interval: what was predicted there.
        coverage: share of them inside the calibrated limits.
        plain_coverage: the same without calibration.
        error: mean absolute relative error.
        best_seen_error: the same of the lowest loss among the smaller runs, which needs no law.
        scale_up: largest size hidden over the largest seen, in the law's own measure (Chinchilla: parameters x tokens).
    """

    fitted: Fitted
    hidden: Table
    interval: Interval
    coverage: float
    plain_coverage: float
    error: float
    best_seen_error: float
    scale_up: float

    def text(self) -> str:
        """Two lines, for people."""
        runs = len(np.unique(self.hidden.runs))
        return (
            f"backtest: the largest {runs} runs hidden "
            f"({len(self.hidden)} points, up to {self.scale_up:.3g} times larger): "
            f"mean error {100 * self.error:.2f}% (best loss seen: {100 * self.best_seen_error:.2f}%)\n"
            f"  {100 * self.interval.level:g}% limits held {100 * self.coverage:.0f}% of them "
            f"({100 * self.plain_coverage:.0f}% without calibration)"
        )


def backtest(
    law: Law,
    source: Any,
    *,
    share: float = 0.2,
    level: float = 0.9,
    bootstrap: int = 200,
    seed: int = 0,
    reading: Reading = Reading(),
) -> Backtest:
    """Hide the largest ``share`` of the runs (at least one), fit the others, and compare.

    Args:
        law: what to fit.
        source: measurements, as for :meth:`Law.fit`.
        share: of the runs that are hidden; the largest, by the product of what the law raises to powers.
        level: of the limits.
        bootstrap: refits.
        seed: of the resampling.
        reading: units, runs and so on.

    Raises:
        InputError: too few runs are left to fit the law.
        ValueError: a share outside (0, 1).

    >>> import numpy as np
    >>> from lossmith.laws import Chinchilla
    >>> rng = np.random.default_rng(0)
    >>> n, d = np.exp(rng.uniform(np.log([1e7, 1e9]), np.log([1e9, 1e11]), (60, 2)).T)
    >>> loss = (1.7 + 400 * n**-0.34 + 1500 * d**-0.33) * np.exp(0.003 * rng.standard_normal(60))
    >>> test = backtest(Chinchilla(), {"params": n, "tokens": d, "loss": loss}, bootstrap=50)
    >>> test.error < 0.01, len(test.hidden)
    (True, 12)
    """
    if not 0 < share < 1:
        raise ValueError(f"share must lie between 0 and 1, got {share}")
    table = law.read(source, reading)
    size = law.prepared(table).size()
    labels, codes = np.unique(table.runs, return_inverse=True)
    largest = np.full(len(labels), -np.inf)
    np.maximum.at(largest, codes, size)
    number = max(1, round(share * len(labels)))
    if number >= len(labels):
        raise InputError(
            f"{table.source} has {len(labels)} run{'s' * (len(labels) != 1)}: none is left to fit when the largest is "
            "hidden"
        )
    hidden_runs = np.argsort(largest, kind="stable")[-number:]
    hidden = np.isin(codes, hidden_runs)
    seen, rest = table.select(~hidden), table.select(hidden)
    fitted = law.fit_table(seen, bootstrap=bootstrap, seed=seed)
    inputs: Mapping[str, Any] = {name: column for name, column in rest.columns.items() if name != rest.target}
    found = fitted.interval(level, **inputs)
    plain = fitted.interval(level, calibrated=False, **inputs)
    measured = rest.columns[rest.target]
    best = seen.columns[seen.target].min()
    return Backtest(
        fitted,
        rest,
        found,
        float(found.covers(measured).mean()),
        float(plain.covers(measured).mean()),
        float((np.abs(found.value - measured) / measured).mean()),
        float((np.abs(best - measured) / measured).mean()),
        float(np.exp(size[hidden].max() - size[~hidden].max())),
    )
