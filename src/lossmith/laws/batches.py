"""Many laws at once: one for each table, or for each part of a table."""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np

from lossmith.errors import InputError
from lossmith.laws.fitted import Fitted
from lossmith.laws.fitting import Solution, fit_terms
from lossmith.laws.law import Law
from lossmith.laws.sources import read_frame
from lossmith.laws.tables import Reading, Table


def fit_many(
    law: Law,
    sources: Sequence[Any],
    *,
    bootstrap: int = 200,
    seed: int = 0,
    calibrated: bool = True,
    starts: int = 6,
    jobs: int = 1,
    reading: Reading = Reading(),
    progress: Callable[[int, int], None] | None = None,
) -> list[Fitted]:
    """Fit one law to each of many tables; the minima of all are sought in one vectorised call.

    Args:
        law: what to fit.
        sources: tables, each as for :meth:`Law.fit`.
        bootstrap: refits of each, for intervals; 0 for none.
        seed: of the resampling, the same for each table.
        calibrated: as for :meth:`Law.fit`.
        starts: as for :meth:`Law.fit`.
        jobs: processes that share the refits.
        reading: units, runs and so on, the same for all tables.
        progress: told ``(tables done, tables)``.

    Returns:
        What ``law.fit`` gives for each table alone.

    Raises:
        InputError: a table that cannot be fitted (the sentence names it), or a law that prepares its table in a way of
            its own.

    >>> import numpy as np
    >>> from lossmith.laws import Chinchilla
    >>> n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e7, 1e9, 4), np.geomspace(1e9, 1e11, 4)))
    >>> tables = [{"params": n, "tokens": d, "loss": e + 400 * n**-0.34 + 1500 * d**-0.33} for e in (1.6, 1.7)]
    >>> [round(fitted.parameters["E"], 6) for fitted in fit_many(Chinchilla(), tables, bootstrap=0)]
    [1.6, 1.7]
    """
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, got {jobs}")
    if type(law).prepared is not Law.prepared:
        raise InputError(f"law {law.name} is fitted to one table at a time")
    tables = [law.read(source, reading) for source in sources]
    if not tables:
        return []
    for table in tables:
        law.check(table)
    solutions = _solve_all(law, tables, starts)
    options = {"bootstrap": bootstrap, "seed": seed, "calibrated": calibrated}
    work = [(law, table, solution, options) for table, solution in zip(tables, solutions, strict=True)]
    found: list[Fitted] = []
    if jobs == 1 or not bootstrap:
        for item in work:
            found.append(_finish(item))
            if progress is not None:
                progress(len(found), len(work))
        return found
    # A fork of a process in which another library has started threads can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(work)), context) as pool:
        for fitted in pool.map(_finish, work, chunksize=max(1, len(work) // (8 * jobs))):
            found.append(fitted)
            if progress is not None:
                progress(len(found), len(work))
    return found


def fit_groups(law: Law, source: Any, by: str, *, reading: Reading = Reading(), **options: Any) -> dict[str, Fitted]:
    """Fit one law to each group of rows that share a value of the column ``by`` (a family of models, a data set).

    Args:
        law: what to fit.
        source: a table, as for :meth:`Law.fit`.
        by: header.
        reading: units, runs and so on.
        **options: of :func:`fit_many`.

    Raises:
        InputError: no such column, or a group that cannot be fitted.
    """
    if type(law).prepared is not Law.prepared:
        raise InputError(f"law {law.name} is fitted to one table at a time")
    name, frame = read_frame(source)
    if by not in frame.columns:
        raise InputError(
            f"{name} has no column '{by}' to group by; its columns are: {', '.join(map(str, frame.columns))}"
        )
    values = sorted(map(str, frame[by].dropna().unique()))
    tables = []
    for value in values:
        own = dataclasses.replace(reading, where={**reading.where, by: value})
        try:
            tables.append(law.read(frame, own))
        except InputError as error:
            raise InputError(f"{by} {value}: {error}") from None
    for value, table in zip(values, tables, strict=True):
        try:
            law.check(table)
        except InputError as error:
            raise InputError(f"{by} {value}: {error}") from None
    return dict(zip(values, fit_many(law, tables, **options), strict=True))


def _solve_all(law: Law, tables: Sequence[Table], starts: int) -> list[Solution]:
    """One call for all: shorter tables are filled up with points of weight 0."""
    fits = [law.prepared(table) for table in tables]
    most = max(len(table) for table in tables)

    def filled(values: Sequence[np.ndarray]) -> np.ndarray:
        # "edge" repeats the last point, so that logarithms and centring stay defined.
        return np.stack([np.pad(v, (0, most - len(v)), mode="edge") for v in values])

    columns: Mapping[str, np.ndarray] = {n: filled([fit.columns[n] for fit in fits]) for n in law.terms.columns}
    weights = np.stack([np.arange(most) < len(table) for table in tables]).astype(np.float64)
    found = fit_terms(
        law.terms,
        columns,
        filled([fit.target for fit in fits]),
        weights=weights,
        objective=law.objective,
        starts=starts,
        fixed=law.fixed,
    )
    return [Solution(*(getattr(found, name)[i : i + 1] for name in Solution.__slots__)) for i in range(len(tables))]


def _finish(work: tuple[Law, Table, Solution, Mapping[str, Any]]) -> Fitted:
    law, table, solution, options = work
    return law.fit_table(table, solution=solution, **options)
