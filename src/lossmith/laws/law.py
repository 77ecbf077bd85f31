"""What every law is: a shape, the columns that it needs, and ``fit``."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from lossmith.errors import InputError, did_you_mean
from lossmith.laws.fitted import Fitted
from lossmith.laws.fitting import HUBER_LOG, Objective, Solution, fit_terms
from lossmith.laws.resampling import Calibration, Fit, calibrate, distinct, refit
from lossmith.laws.tables import Column, Reading, Table, amount, read_table
from lossmith.laws.terms import Array, Terms

_CALIBRATION_REFITS = 60
# In units of the median error; a normal error is never, one of Student's t with 3 degrees of freedom once in 700.
_FAR_OFF = 15


@dataclasses.dataclass(frozen=True, kw_only=True)
class Law(ABC):
    """A law that is a sum of power-law terms.

    A law is a frozen dataclass of its options. A new one gives ``name``, ``formula``, ``needed`` (columns) and
    ``terms``; one whose terms use other quantities than its table has gives ``transform`` as well. Registered (entry
    point in the group ``lossmith.laws``), it is fitted by ``lossmith fit --law NAME`` and judged by
    ``pytest --pyargs lossmith.testing``.

    Attributes:
        objective: what the fit minimises.
        fixed: parameters that are given, by name.
    """

    name: ClassVar[str]
    formula: ClassVar[str]
    needed: ClassVar[tuple[Column, ...]]
    target: ClassVar[str] = "loss"

    objective: Objective = HUBER_LOG
    fixed: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if unknown := set(self.fixed) - set(self.names):
            wrong = sorted(unknown)[0]
            raise InputError(f"law {self.name} has no parameter '{wrong}' to fix: {did_you_mean(wrong, self.names)}")
        for name, low, high in zip(self.terms.names, self.terms.lower, self.terms.upper, strict=True):
            if name in self.fixed and not (np.isfinite(self.fixed[name]) and low <= self.fixed[name] <= high):
                raise InputError(f"{name} must lie between {low:g} and {high:g}, got {self.fixed[name]:g}")

    @property
    @abstractmethod
    def terms(self) -> Terms:
        """The law's shape."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters in their order."""
        return self.terms.names

    def transform(self, columns: Mapping[str, Array]) -> Mapping[str, Array]:
        """The columns that ``terms`` uses, from those of the table."""
        return columns

    def read(self, source: Any, reading: Reading = Reading()) -> Table:
        """The measurements in ``source``, as :func:`lossmith.laws.read_table` reads them."""
        return read_table(source, self.needed, self.target, reading)

    def inputs(self, **given: Any) -> tuple[Mapping[str, Array], tuple[int, ...]]:
        """What to predict at: the columns of ``terms`` flattened, and the shape of the answer.

        Raises:
            InputError: a missing or unknown name, or a value that is not positive.
        """
        needed = [column.name for column in self.needed if column.name != self.target]
        aliases = {alias: column.name for column in self.needed for alias in (column.name, *column.aliases)}
        arrays: dict[str, Array] = {}
        for name, value in given.items():
            if aliases.get(name) not in needed:
                raise InputError(f"law {self.name} has no input '{name}': {did_you_mean(name, needed)}")
            arrays[aliases[name]] = _numbers(name, value)
        if missing := [name for name in needed if name not in arrays]:
            raise InputError(f"law {self.name} needs {' and '.join(missing)} to predict")
        for name, array in arrays.items():
            if not (np.isfinite(array).all() and (array > 0).all()):
                raise InputError(f"{name} must be positive and finite, got {array.min():g}")
        try:
            broadcast = np.broadcast_arrays(*arrays.values())
        except ValueError:
            shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
            raise ValueError(f"the inputs' shapes do not fit together: {shapes}") from None
        columns = {name: array.reshape(-1) for name, array in zip(arrays, broadcast, strict=True)}
        return self.transform(columns), broadcast[0].shape

    def labels(self, **given: Any) -> list[str]:
        """One line for each value that :meth:`inputs` with the same arguments asks for: what it is predicted at."""
        names = list(given)
        arrays = np.broadcast_arrays(*(_numbers(name, value) for name, value in given.items()))
        rows = zip(*(array.reshape(-1) for array in arrays), strict=True)
        return [", ".join(f"{name}={value:.6g}" for name, value in zip(names, row, strict=True)) for row in rows]

    def evaluate(self, parameters: Array, columns: Mapping[str, Array]) -> Array:
        """The value for parameters ``(..., P)`` at the columns of ``terms``: ``(..., n)``."""
        return self.terms.predict(parameters, columns)

    def prepared(self, table: Table) -> Fit:
        """The table in the form that the engine takes."""
        return Fit(
            self.terms,
            self.transform(table.columns),
            table.columns[table.target],
            table.runs,
            self.objective,
            self.fixed,
        )

    def fit(
        self,
        source: Any,
        *,
        bootstrap: int = 200,
        seed: int = 0,
        calibrated: bool = True,
        starts: int = 6,
        reading: Reading = Reading(),
        progress: Callable[[int, int], None] | None = None,
        **columns: str | float,
    ) -> Fitted:
        """Fit to measurements.

        Args:
            source: DataFrame, mapping of columns, path, folder of run records, or a :class:`Table`.
            bootstrap: refits on resampled runs, from which intervals come; 0 for none.
            seed: of the resampling; the same seed gives the same bits.
            calibrated: whether to find out, by predicting larger runs from smaller ones, how much wider intervals must
                be.
            starts: how many starts Newton's method gets (the best ones of a grid over the exponents).
            reading: units, runs and so on; see :class:`Reading`.
            progress: told ``(refits done, refits)``.
            **columns: header of a quantity in the table, where the usual names do not do: ``tokens="D_total"``.

        Raises:
            InputError: the table lacks something, or has too few points for the law.
        """
        if bootstrap < 0:
            raise ValueError(f"bootstrap must not be negative, got {bootstrap}")
        if columns:
            reading = dataclasses.replace(reading, columns={**reading.columns, **columns})
        law, table = self.adapted(source, reading)
        return law.fit_table(
            table, bootstrap=bootstrap, seed=seed, calibrated=calibrated, starts=starts, progress=progress
        )

    def adapted(self, source: Any, reading: Reading) -> tuple[Law, Table]:
        """The law to fit, and the measurements: another one where its parameters depend on what is in the table."""
        return self, self.read(source, reading)

    def fit_table(
        self,
        table: Table,
        *,
        bootstrap: int = 200,
        seed: int = 0,
        calibrated: bool = True,
        starts: int = 6,
        solution: Solution | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Fitted:
        """As :meth:`fit`, for measurements that are read already, and, where given, a minimum that is found already."""
        self.check(table)
        fit = self.prepared(table)
        if solution is None:
            solution = fit_terms(
                fit.terms, fit.columns, fit.target, objective=fit.objective, starts=starts, fixed=fit.fixed
            )
        samples = np.zeros((0, len(self.names)))
        calibration = Calibration()
        if bootstrap:
            samples = refit(fit, solution, bootstrap, seed, progress=progress)
            if calibrated:
                calibration = calibrate(fit, solution, number=_CALIBRATION_REFITS, seed=seed)
        return Fitted(
            self,
            dict(zip(self.names, solution.parameters[0].tolist(), strict=True)),
            table,
            samples,
            float(solution.objective[0]),
            calibration,
            self.warnings(fit, solution, samples, calibration),
        )

    def check(self, table: Table) -> None:
        """Refuse a table with too few points or sizes.

        Raises:
            InputError: says how many are there and how many are needed.
        """
        free = len(self.names) - len(self.fixed)
        if len(table) <= free:
            raise InputError(
                f"{table.source} has {len(table)} points; law {self.name} has {free} free parameters and needs at "
                f"least {free + 1}"
            )
        columns = self.transform(table.columns)
        for term in self.terms.terms:
            unknown = term.coefficient not in self.fixed
            for column, exponent in term.powers.items():
                different = len(np.unique(columns[column]))
                needed = 2 + unknown
                if exponent not in self.fixed and different < needed:
                    raise InputError(
                        f"{table.source} has {different} different value{'s' * (different != 1)} of {column}; law "
                        f"{self.name} needs at least {needed} to find {exponent} (or fix {exponent} and "
                        f"{term.coefficient})"
                    )

    def warnings(
        self, fit: Fit, solution: Solution, samples: Array, calibration: Calibration = Calibration()
    ) -> tuple[str, ...]:
        """What the data cannot determine."""
        found: list[str] = []
        best = solution.parameters[0]
        free = [name for name in self.names if name not in self.fixed]
        if not solution.converged[0]:
            found.append("the minimum was not reached; the data may not determine the law")
        lower, upper = self.terms.lower, self.terms.upper
        for i, name in enumerate(self.names):
            if name not in free:
                continue
            term = self.terms.terms[i] if i < len(self.terms.terms) else None
            if term is not None and best[i] <= max(lower[i], 0) and term.lower == 0:
                found.append(f"{name} is not identified: the best fit has {name} = 0")
            elif term is None and (best[i] <= lower[i] or best[i] >= upper[i]):
                found.append(f"{name} lies at the border of its range ({best[i]:g})")
        found += self._far_off(fit, best)
        near = distinct(solution.minima[0], solution.values[0])
        others = [
            p for p, v in zip(solution.minima[0], solution.values[0], strict=True) if v <= 1.01 * solution.values[0, 0]
        ]
        if len(near) > 1 and any(np.abs(p / np.where(best == 0, 1, best) - 1).max() > 0.1 for p in others):
            found.append("another set of parameters, more than 10% away, fits as well (within 1% of the objective)")
        if len(samples) >= 20:
            low, high = np.quantile(samples, [0.05, 0.95], axis=0)
            for i, name in enumerate(self.names):
                if name in free and best[i] > 0 and (low[i] <= 0 or high[i] / low[i] > 10):
                    found.append(
                        f"{name} is hardly determined: its 90% interval reaches from {low[i]:.3g} to {high[i]:.3g}"
                    )
        powered = list(dict.fromkeys(c for term in self.terms.terms for c in term.powers))
        for i, first in enumerate(powered):
            for second in powered[i + 1 :]:
                a, b = np.log(fit.columns[first]), np.log(fit.columns[second])
                if a.std() > 0 and b.std() > 0 and abs(np.corrcoef(a, b)[0, 1]) > 0.98:
                    found.append(
                        f"{first} and {second} rise together (correlation above 0.98): their effects cannot be told "
                        "apart"
                    )
        if len(samples) and not calibration.points:
            found.append("too few runs to calibrate the intervals: expect them to be too narrow far from the data")
        return tuple(found)

    def _far_off(self, fit: Fit, best: Array) -> list[str]:
        """Points that a robust fit has set aside; they still pull where the law has nothing else to hold on to."""
        residuals = np.abs(fit.residuals(best))
        far = np.flatnonzero(residuals > _FAR_OFF * np.median(residuals))
        if not 0 < len(far) <= len(residuals) // 20:
            return []
        worst = far[np.argsort(-residuals[far], kind="stable")][:3]
        told = "; ".join(
            ", ".join(f"{name}={fit.columns[name][row]:.3g}" for name in fit.terms.columns)
            + f", {self.target}={fit.target[row]:.3g}"
            for row in worst
        )
        count = f"{len(far)} points lie" if len(far) > 1 else "1 point lies"
        rest = "; ..." if len(far) > len(worst) else ""
        return [f"{count} more than {_FAR_OFF} typical errors off ({told}{rest}): check, or leave out"]

    def plan(self, fitted: Fitted, **wishes: Any) -> Any:
        """What to train, where the law can say."""
        raise InputError(f"law {self.name} makes no plans")

    def example(self, *, rows: int = 60, noise: float = 0.002, seed: int = 0) -> dict[str, Array]:
        """Measurements that obey the law, in the columns that it needs: to try it out, and for the conformance suite.

        Counts are spread over two decades, other inputs over one, and every term adds about 1 to the target.

        Raises:
            NotImplementedError: a law that does not read plain tables, and has no example of its own.
        """
        if type(self).prepared is not Law.prepared or type(self).evaluate is not Law.evaluate:
            raise NotImplementedError(f"law {self.name} gives no example")
        rng = np.random.default_rng(seed)
        columns: dict[str, Array] = {}
        for column in self.needed:
            if column.name != self.target:
                decades = (7.0, 9.0) if column.kind == "count" else (-1.0, 0.0)
                columns[column.name] = 10 ** rng.uniform(*decades, rows)
        own = self.transform(columns)
        terms = self.terms
        parameters = np.array([1.0] * len(terms.terms) + [0.5 * (e.lower + min(e.upper, 0.8)) for e in terms.exponents])
        for i, name in enumerate(terms.names):
            parameters[i] = self.fixed.get(name, parameters[i])
        for k, term in enumerate(terms.terms):
            alone = np.where(np.arange(len(parameters)) < len(terms.terms), 0.0, parameters)
            alone[k] = 1.0
            if term.coefficient not in self.fixed:
                share = 1.0 if term.sign > 0 else 0.2
                parameters[k] = share / np.abs(self.evaluate(alone, own)).mean()
        columns[self.target] = self.evaluate(parameters, own) * np.exp(noise * rng.standard_normal(rows))
        return columns

    def options(self) -> dict[str, Any]:
        """The law's options as JSON has them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Law:
        """The law with options as :meth:`options` gave them."""
        values = dict(options)
        objective = dict(values.pop("objective"))
        # JSON has no infinity.
        delta = objective.get("delta")
        objective["delta"] = float("inf") if delta is None else delta
        return cls(objective=Objective(**objective), **values)


def _numbers(name: str, value: Any) -> Array:
    """A value that a law is asked at; text such as ``7B`` is an amount."""
    try:
        number = amount(value) if isinstance(value, str) else value
        array = np.asarray(number, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{name} must be a number, got {value!r}") from None
    if isinstance(value, str) and np.isnan(array):
        raise InputError(f"{name} must be a number, got {value!r}")
    return array
