"""One law for dense and sparse pre-training: size is the number of parameters that were active on average.

Jin et al., "The Journey Matters: Average Parameter Count over Pre-training Unifies Sparse and Dense Scaling Laws",
2025, arXiv 2501.12486, equations 1 and 2.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from lossmith.errors import InputError
from lossmith.files import read_json
from lossmith.laws.chinchilla import Chinchilla
from lossmith.laws.fitted import Fitted
from lossmith.laws.law import Law
from lossmith.laws.sources import read_frame
from lossmith.laws.sparse_compute import average_density, average_density_of_steps
from lossmith.laws.sparse_plan import SparsePlan, plan_sparse
from lossmith.laws.tables import LOSS, PARAMS, TOKENS, Column, Reading, Table, read_table
from lossmith.laws.terms import Array, Exponent, Term, Terms

if TYPE_CHECKING:
    import pandas as pd

AVERAGE = Column(
    "avg_params",
    ("average_params", "params_average", "average_parameters", "avg_linear_params", "avg_parameters", "n_bar", "Nbar"),
    "count",
    100.0,
    "number of active parameters, averaged over the training",
    optional=True,
)
_START_PARAMS = dataclasses.replace(PARAMS, what="number of parameters at the start", optional=True)
_FINAL_PARAMS = Column(
    "final_params",
    ("params_final", "final_parameters", "final_linear_params"),
    "count",
    10.0,
    "number of parameters in the end",
    optional=True,
)
_SPARSITY = Column("sparsity", ("final_sparsity",), what="share of the parameters removed", optional=True)
_START = Column("start", ("start_compute", "pruning_start"), what="where pruning begins", optional=True)
_END = Column("end", ("end_compute", "pruning_end"), what="where pruning ends", optional=True)
_STEPS = Column("steps", ("max_steps", "total_steps"), what="optimiser steps", optional=True)
# What an empty cell of a dense run means.
_DENSE = ((_SPARSITY, 0.0), (_START, 0.25), (_END, 0.75))

Count = Literal["average", "final", "initial"]
_COUNTS: Mapping[Count, str] = {"average": "avg_params", "final": "final_params", "initial": "params"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AverageParameter(Law):
    r"""``L = E + A / Nbar**alpha + B / D**beta`` with ``Nbar = (1/T) sum_t N_t``, for sparse and dense runs together.

    ``N_t`` counts the weights that step ``t`` used: of linear layers, the output layer among them, without embeddings
    and norms. A dense run has ``Nbar = N``, and without sparse runs this is :class:`Chinchilla`. The loss is that of
    the *end* of a run: in the middle of pruning, or of a learning-rate schedule, the law does not hold.

    A table has ``tokens``, ``loss`` and one of

    - ``avg_params``;
    - ``params`` (at the start) and ``sparsity`` (in the end; 0 or empty for dense runs), with ``start`` and ``end`` of
      pruning as shares of the compute (0.25 and 0.75 where they are missing), or as steps beside ``steps``.

    A folder of run records has all of it: see ``parameters`` in ``result.json``. ``final_params`` is needed only to
    compare the counts (:func:`compare_counts`) where there is no ``sparsity``.

    Source: Jin et al. 2025, arXiv 2501.12486, equation 2. Its fitting recipe and its constants are not known here: this
    is fitted as :class:`Chinchilla` is.

    >>> import numpy as np
    >>> n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e7, 1e9, 4), np.geomspace(1e9, 1e11, 4)))
    >>> sparsity = np.tile([0.0, 0.8], 8)
    >>> average = n * np.where(sparsity == 0, 1, average_density(0.8))
    >>> runs = {"params": n, "sparsity": sparsity, "tokens": d, "loss": 1.7 + 400 * average**-0.34 + 1500 * d**-0.33}
    >>> fitted = AverageParameter().fit(runs, bootstrap=0)
    >>> round(fitted.parameters["alpha"], 6)
    0.34
    >>> sparse = fitted.predict(params=1.14e9, sparsity=0.8, tokens=2e11)
    >>> dense = fitted.predict(params=4.549e8, tokens=2e11)
    >>> round(float(sparse), 4), round(float(dense), 4)
    (2.4351, 2.4351)
    """

    name: ClassVar[str] = "average-parameter"
    formula: ClassVar[str] = "loss = E + A / avg_params^alpha + B / tokens^beta"
    needed: ClassVar[tuple[Column, ...]] = (AVERAGE, TOKENS, LOSS)

    @property
    def terms(self) -> Terms:
        """Those of Chinchilla, with the average count."""
        return Terms(
            (Term("E"), Term("A", {"avg_params": "alpha"}), Term("B", {"tokens": "beta"})),
            (Exponent("alpha"), Exponent("beta")),
        )

    def read(self, source: Any, reading: Reading = Reading()) -> Table:
        """The measurements with ``avg_params`` and, where the source has them, ``params`` and ``final_params``.

        Raises:
            InputError: neither the average nor what it follows from, a sparsity that is none, and what
                :func:`read_table` refuses.
        """
        if isinstance(source, Table):
            return source
        name, frame = _frame(source)
        for column, value in _DENSE:
            if (header := _find(column, frame, reading)) is not None:
                frame = frame.assign(**{header: frame[header].fillna(value)})
        columns = (AVERAGE, _START_PARAMS, _FINAL_PARAMS, _SPARSITY, _START, _END, _STEPS, TOKENS, LOSS)
        try:
            table = read_table(frame, columns, self.target, reading)
        except InputError as error:
            raise InputError(str(error).replace("the table", name, 1)) from None
        return dataclasses.replace(table, columns=_counted(table, name, frame), source=name)

    def inputs(self, **given: Any) -> tuple[Mapping[str, Array], tuple[int, ...]]:
        """``avg_params``, or ``params`` (at the start) with ``sparsity``, ``start`` and ``end`` (default 0.25, 0.75).

        Raises:
            InputError: both, neither, or a share out of range.
        """
        rest = {name: value for name, value in given.items() if name not in ("params", "sparsity", "start", "end")}
        if len(rest) == len(given):
            return super().inputs(**given)
        if "params" not in given:
            raise InputError("law average-parameter needs params (at the start) beside sparsity, or avg_params alone")
        if any(alias in rest for alias in (AVERAGE.name, *AVERAGE.aliases)):
            raise InputError("give avg_params, or params with sparsity: not both")
        shares = [given.get("sparsity", 0.0), given.get("start", 0.25), given.get("end", 0.75)]
        try:
            density = np.vectorize(lambda s, x, y: average_density(float(s), start=float(x), end=float(y)))(*shares)
            return super().inputs(avg_params=np.asarray(given["params"], dtype=np.float64) * density, **rest)
        except InputError:
            raise
        except (ValueError, TypeError) as error:
            raise InputError(str(error)) from None

    def plan(self, fitted: Fitted, **wishes: Any) -> SparsePlan:
        """What to train and when to prune it: see :func:`lossmith.laws.plan_sparse` for the wishes."""
        return plan_sparse(fitted, **wishes)

    @staticmethod
    def as_chinchilla(fitted: Fitted) -> Fitted:
        """The same fit as the law of dense models, whose ``params`` is the average."""
        columns = dict(fitted.table.columns)
        columns["params"] = columns["avg_params"]
        return dataclasses.replace(
            fitted,
            law=Chinchilla(objective=fitted.law.objective, fixed=fitted.law.fixed),
            table=dataclasses.replace(fitted.table, columns=columns),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class CountFit:
    """How well one way of counting a sparse run's parameters does.

    Attributes:
        count: ``average``, ``final`` or ``initial``: what the law is given as the size of a sparse run.
        fitted: the law fitted to dense and sparse runs together.
        dense_error: mean relative error of that fit at the dense runs.
        sparse_error: the same at the sparse runs.
        predicted_error: mean relative error at the sparse runs of the law fitted to the *dense runs alone*; NaN where
            these are too few.
        predicted_bias: the same with its sign: positive where the law says more than was measured.
    """

    count: Count
    fitted: Fitted
    dense_error: float
    sparse_error: float
    predicted_error: float
    predicted_bias: float


def compare_counts(
    source: Any, *, law: AverageParameter | None = None, reading: Reading = Reading()
) -> tuple[CountFit, ...]:
    """Fit dense and sparse runs with the average, the final and the initial number of parameters as their size.

    Args:
        source: as for :meth:`AverageParameter.fit`, with the parameters at the start and in the end of every run.
        law: with options of the fit.
        reading: units and so on.

    Raises:
        InputError: no sparse run, or no count besides the average.

    >>> n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e7, 1e9, 4), np.geomspace(1e9, 1e11, 4)))
    >>> sparsity = np.tile([0.0, 0.8, 0.0, 0.0], 4)
    >>> average = n * np.where(sparsity == 0, 1, average_density(0.8))
    >>> runs = {"params": n, "sparsity": sparsity, "tokens": d, "loss": 1.7 + 400 * average**-0.34 + 1500 * d**-0.33}
    >>> [(fit.count, round(100 * fit.predicted_bias, 1)) for fit in compare_counts(runs)]
    [('average', 0.0), ('final', 9.2), ('initial', -9.4)]
    """
    law = AverageParameter() if law is None else law
    table = law.read(source, reading)
    if missing := [column for column in _COUNTS.values() if column not in table.columns]:
        raise InputError(f"{table.source} has no {missing[0]}: comparing counts takes params and sparsity of every run")
    sparse = table.columns["final_params"] < table.columns["params"] * (1 - 1e-9)
    if not sparse.any():
        raise InputError(f"{table.source} has no sparse run: every count is the same")
    found = []
    for count, column in _COUNTS.items():
        own = dataclasses.replace(table, columns={**table.columns, "avg_params": table.columns[column]})
        fitted = law.fit_table(own, bootstrap=0)
        errors = np.abs(_errors(fitted, own))
        predicted = np.full(1, np.nan)
        # The dense runs may be too few for a law of their own.
        with contextlib.suppress(InputError):
            predicted = _errors(law.fit_table(own.select(~sparse), bootstrap=0), own.select(sparse))
        dense_error = float(errors[~sparse].mean()) if (~sparse).any() else float("nan")
        found.append(
            CountFit(
                count,
                fitted,
                dense_error,
                float(errors[sparse].mean()),
                float(np.abs(predicted).mean()),
                float(predicted.mean()),
            )
        )
    return tuple(found)


def _errors(fitted: Fitted, table: Table) -> Array:
    value = fitted.predict(avg_params=table.columns["avg_params"], tokens=table.columns["tokens"])
    return value / table.columns[table.target] - 1


def _frame(source: Any) -> tuple[str, pd.DataFrame]:
    """Run records have the counts in their results, and count by their ends only; everything else is a table."""
    import pandas as pd

    if isinstance(source, str | Path) and Path(source).is_dir():
        rows = []
        for path in sorted(Path(source).rglob("result.json")):
            result = read_json(path)
            counts, tokens = result.get("parameters"), (result.get("cost") or {}).get("tokens")
            loss = (result.get("metrics") or {}).get("eval/loss")
            if counts and tokens and loss is not None:
                row = {"run": str(path.parent.relative_to(source)), "arm": result.get("arm"), "tokens": tokens}
                sizes = {"avg_params": counts["average"], "params": counts["initial"], "final_params": counts["final"]}
                rows.append({**row, **sizes, "loss": loss})
        if rows:
            return str(source), pd.DataFrame(rows)
        raise InputError(
            f"{source} holds no finished run records with counts of parameters (result.json); give a table instead"
        )
    return read_frame(source)


def _find(column: Column, frame: pd.DataFrame, reading: Reading) -> str | None:
    """The header of an optional column."""
    said = reading.columns.get(column.name)
    names = {re.sub(r"[^a-z0-9]", "", alias.lower()) for alias in (column.name, *column.aliases)}
    for header in frame.columns:
        if header == said or (said is None and re.sub(r"[^a-z0-9]", "", str(header).lower()) in names):
            return str(header)
    return None


def _counted(table: Table, name: str, frame: pd.DataFrame) -> dict[str, Array]:
    """The law's columns: the average from the schedule where it is not given, and the other counts."""
    given = dict(table.columns)
    sparsity = given.get("sparsity")
    if sparsity is not None:
        wrong = ~((sparsity >= 0) & (sparsity < 1))
        if wrong.any():
            hint = "; is it in percent? Then say scale sparsity=0.01" if (sparsity[wrong] >= 1).any() else ""
            row = int(np.flatnonzero(wrong)[0])
            raise InputError(f"{name}: sparsity must lie in [0, 1), row {row + 1} has {sparsity[row]:g}{hint}")
    derived_tokens = any(note.startswith("tokens computed as") for note in table.notes)
    if "avg_params" not in given:
        if "params" not in given or sparsity is None:
            there = ", ".join(map(str, frame.columns))
            raise InputError(
                f"{name} has no column for 'avg_params' ({AVERAGE.what}), nor params (at the start) and sparsity (in "
                f"the end, 0 for dense runs) from which it follows; its columns are: {there}"
            )
        given["avg_params"] = given["params"] * _average_densities(given, name)
    if sparsity is not None and "params" in given and "final_params" not in given:
        given["final_params"] = given["params"] * (1 - sparsity)
    if derived_tokens:
        # The compute of a run is 6 Nbar D.
        given["tokens"] = given["tokens"] * (given["params"] / given["avg_params"])
    kept = ("avg_params", "params", "final_params", "tokens", "loss")
    return {column: given[column] for column in kept if column in given}


def _average_densities(given: Mapping[str, Array], name: str) -> Array:
    sparsity = given["sparsity"]
    start, end = (given.get(c.name, np.full(len(sparsity), v)) for c, v in _DENSE[1:])
    steps = given.get("steps")
    by_steps = (start > 1) | (end > 1)
    if by_steps.any() and steps is None:
        raise InputError(
            f"{name}: start and end above 1 are steps, and need the column steps; shares of the compute lie in [0, 1]"
        )
    found = []
    for row in range(len(sparsity)):
        s, x, y = float(sparsity[row]), float(start[row]), float(end[row])
        try:
            if s and by_steps[row] and steps is not None:
                found.append(average_density_of_steps(s, x / float(steps[row]), y / float(steps[row])))
            else:
                found.append(average_density(s, start=x, end=y) if s else 1.0)
        except ValueError as error:
            raise InputError(f"{name}, row {row + 1}: {error}") from None
    return np.array(found)
