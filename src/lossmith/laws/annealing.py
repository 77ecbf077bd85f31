"""Loss along a run under any learning-rate schedule.

Tissue, Wang and Wang, "Scaling Law with Learning Rate Annealing", 2024, arXiv 2408.11029.

.. math::
    L(s) = L_0 + A\\,S_1(s)^{-\\alpha} - C\\,S_2(s), \\qquad S_1(s) = \\sum_{i \\le s} \\eta_i, \\qquad
    S_2(s) = \\sum_{i \\le s} \\sum_{k \\le i} (\\eta_{k-1} - \\eta_k)\\, \\lambda^{i-k}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from lossmith.errors import InputError, did_you_mean
from lossmith.laws.curve_plot import FittedCurves
from lossmith.laws.curves import LossCurve, read_curves
from lossmith.laws.fitted import Fitted
from lossmith.laws.fitting import Solution, fit_terms
from lossmith.laws.law import Law
from lossmith.laws.lr_areas import areas, warmup_steps
from lossmith.laws.resampling import Calibration, Fit
from lossmith.laws.schedules import schedule as as_schedule
from lossmith.laws.tables import LOSS, Column, Reading, Table
from lossmith.laws.terms import Array, Exponent, Term, Terms
from lossmith.registry import parse_value

STEP = Column("step", ("_step", "global_step", "iteration"), what="optimiser step")
RATE = Column("lr", ("learning_rate",), what="learning rate")

#: Decays that ``decay=None`` chooses from; the momentum remembers about ``1 / (1 - decay)`` steps.
DECAYS = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995)
# Points of one curve are not independent: it is resampled in so many pieces, where there are few curves.
_PIECES = 8
_FEW_CURVES = 8
_SHORTEST_PIECE = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class LRAnnealing(Law):
    """The whole loss curve of a run under any schedule, from one or two finished runs with other schedules.

    ``predict(schedule="wsd(peak=3e-4, warmup=2000, stable=20000, decay=4000)")`` gives the loss after every step;
    ``at=[...]`` after chosen ones. Model, data, batch size and peak rate are those of the fitted runs.

    Attributes:
        decay: of the annealing momentum, per optimiser step: not fitted. 0.999 is for runs of tens of thousands of
            steps; for shorter ones ``1 / (1 - decay)`` is 1 to 5 percent of the run. ``None`` takes the best of
            ``DECAYS``.
        warmup: ``"constant"`` counts the steps of the warm-up as if they ran at the rate that it reaches (so that
            ``L0`` is comparable), ``"actual"`` as they are, ``"exclude"`` not at all.
        exclude: share of each run's steps whose losses are left out, at its beginning.
        one_schedule: allow a fit on runs of a single schedule, which determines the parameters only weakly (not at all
            ``C`` if the rate is constant).

    >>> truth = {"L0": 2.6, "A": 0.5, "C": 0.4, "alpha": 0.6}
    >>> law = LRAnnealing(decay=0.99)
    >>> curves = []
    >>> for text in ("constant(peak=1e-3)", "cosine(peak=1e-3)"):
    ...     first, second = areas(as_schedule(text).values(2000), 0.99)
    ...     loss = truth["L0"] + truth["A"] * first ** -truth["alpha"] - truth["C"] * second
    ...     curves.append(LossCurve.of(text, range(100, 2001, 50), loss[99::50], as_schedule(text).values(2000)))
    >>> fitted = law.fit(curves, bootstrap=0)
    >>> {name: round(value, 6) for name, value in fitted.parameters.items()}
    {'L0': 2.6, 'A': 0.5, 'C': 0.4, 'alpha': 0.6}
    >>> fitted.predict(schedule="wsd(peak=1e-3, decay=0.2)", steps=2000, at=2000).round(4).tolist()
    [2.9212]
    """

    name: ClassVar[str] = "lr-annealing"
    formula: ClassVar[str] = "L = L0 + A*S1^-alpha - C*S2"
    needed: ClassVar[tuple[Column, ...]] = (STEP, RATE, LOSS)

    decay: float | None = 0.999
    warmup: Literal["constant", "actual", "exclude"] = "constant"
    exclude: float = 0.0
    one_schedule: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decay is not None and not (isinstance(self.decay, int | float) and 0 < self.decay < 1):
            raise InputError(f"decay must lie inside (0, 1), got {self.decay}")
        if self.warmup not in ("constant", "actual", "exclude"):
            raise InputError(f"warmup must be constant, actual or exclude, got '{self.warmup}'")
        if not (isinstance(self.exclude, int | float) and 0 <= self.exclude < 1):
            raise InputError(f"exclude must be a share of the steps from 0 to below 1, got {self.exclude}")

    @property
    def terms(self) -> Terms:
        """Constant, power of the forward area, annealing."""
        return Terms(
            (Term("L0"), Term("A", {"area": "alpha"}), Term("C", factor="annealing", sign=-1)), (Exponent("alpha"),)
        )

    def areas(self, rates: Array, decay: float | None = None) -> tuple[Array, Array, int]:
        """``S1`` and ``S2`` after every step as the law's ``warmup`` has them, and the steps of the warm-up."""
        decay = self._decay() if decay is None else decay
        begun = warmup_steps(rates)
        if self.warmup == "actual":
            return *areas(rates, decay), begun
        if self.warmup == "constant":
            return *areas(np.concatenate([np.full(begun, rates[begun]), rates[begun:]]), decay), begun
        first, second = areas(rates[begun:], decay)
        nothing = np.zeros(begun)
        return np.concatenate([nothing, first]), np.concatenate([nothing, second]), begun

    def read(self, source: Any, reading: Reading = Reading()) -> Table:
        """The measurements of the curves in ``source`` with their areas; see :func:`lossmith.laws.read_curves`."""
        return source if isinstance(source, Table) else self.tabulate(read_curves(source, reading), _name(source))

    def tabulate(self, curves: Sequence[LossCurve], source: str = "the curves") -> Table:
        """One row per measurement that counts: ``step``, ``lr``, ``area``, ``annealing``, ``loss``.

        Raises:
            InputError: two curves of one name, or none with a loss after its warm-up.
        """
        names = [curve.name for curve in curves]
        if len(set(names)) < len(names):
            twice = next(n for n in names if names.count(n) > 1)
            raise InputError(f"two curves are called '{twice}'; the names of runs must differ")
        columns: dict[str, list[Array]] = {}
        runs, notes = [], [note for curve in curves for note in curve.notes]
        for curve in curves:
            first, second, begun = self.areas(curve.rates)
            at = curve.steps - 1
            inside = curve.steps <= (begun if self.warmup != "actual" else 0)
            early = curve.steps <= self.exclude * curve.steps[-1]
            keep = ~inside & ~early & (first[at] > 0)
            if dropped := int((~keep).sum()):
                why = " and ".join(w for w, m in (("in the warm-up", inside), ("early", early & ~inside)) if m.any())
                notes.append(f"{curve.name}: {dropped} of {len(keep)} losses left out ({why or 'before any learning'})")
            parts = {
                "step": curve.steps.astype(np.float64),
                "lr": curve.rates[at],
                "area": first[at],
                "annealing": second[at],
                "loss": curve.losses,
                **self._extra(curve),
            }
            for name, values in parts.items():
                columns.setdefault(name, []).append(values[keep])
            runs.append(np.full(int(keep.sum()), curve.name))
        joined = {name: np.concatenate(values) for name, values in columns.items()}
        if not len(joined.get("loss", ())):
            raise InputError(f"{source} has no loss after the warm-up of its runs")
        return Table(joined, "loss", np.concatenate(runs).astype(str), tuple(notes), source)

    def _extra(self, curve: LossCurve) -> dict[str, Array]:
        return {}

    def _decay(self) -> float:
        if self.decay is None:
            raise InputError("decay=None is settled by fit(); give a decay here")
        return float(self.decay)

    def inputs(self, **given: Any) -> tuple[Mapping[str, Array], tuple[int, ...]]:
        """What to predict at.

        Args:
            **given: ``schedule`` (text, object, rates or CSV), ``steps`` of the training, and ``at``: the steps whose
                losses are wanted, by default all.

        Raises:
            InputError: steps that the schedule does not have, or that lie in its warm-up where that does not count.
        """
        if "area" in given:
            return self._measured(given)
        allowed = ("schedule", "steps", "at", *self._asked())
        for name in given:
            if name not in allowed:
                raise InputError(f"law {self.name} has no input '{name}': {did_you_mean(name, allowed)}")
        if "schedule" not in given:
            raise InputError(f'law {self.name} needs a schedule to predict: schedule="cosine(peak=3e-4)", steps=24000')
        rates = as_schedule(given["schedule"]).values(given.get("steps"))
        at = self._at(given, len(rates))
        first, second, begun = self.areas(rates)
        if not (first[at - 1] > 0).all():
            raise InputError(f"step {at[first[at - 1] <= 0][0]} comes before any learning (warm-up: {begun} steps)")
        return self._predicting(first[at - 1], second[at - 1], given), (len(at),)

    def _at(self, given: Mapping[str, Any], total: int) -> np.ndarray:
        if given.get("at") is None:
            if self.warmup == "constant":
                return np.arange(1, total + 1)
            begun = warmup_steps(as_schedule(given["schedule"]).values(given.get("steps")))
            return np.arange(begun + 1, total + 1)
        try:
            at = np.atleast_1d(np.asarray(given["at"], dtype=np.float64))
        except (TypeError, ValueError):
            raise InputError(f"at must hold steps from 1 to {total}, got {given['at']!r}") from None
        wrong = ~((at >= 1) & (at <= total) & (at == np.round(at)))
        if at.ndim != 1 or wrong.any():
            found = f"{at[wrong][0]:g}" if at.ndim == 1 else f"an array of shape {at.shape}"
            raise InputError(f"at must hold steps from 1 to {total}, got {found}")
        return at.astype(np.int64)

    def _asked(self) -> tuple[str, ...]:
        return ()

    def _measured(self, given: Mapping[str, Any]) -> tuple[Mapping[str, Array], tuple[int, ...]]:
        """Rows of a table as they are: what a backtest asks for."""
        columns = {name: np.atleast_1d(np.asarray(value, dtype=np.float64)) for name, value in given.items()}
        return self.transform(columns), columns["area"].shape

    def _predicting(self, first: Array, second: Array, given: Mapping[str, Any]) -> Mapping[str, Array]:
        return {"area": first, "annealing": second}

    def labels(self, **given: Any) -> list[str]:
        """``step 24000 of wsd(...)``."""
        self.inputs(**given)
        made = as_schedule(given["schedule"])
        at = self._at(given, len(made.values(given.get("steps"))))
        return [f"step {step} of {made}" for step in at]

    def prepared(self, table: Table) -> Fit:
        """As every law; but few curves are resampled in pieces, because whole ones could not be left out."""
        whole = super().prepared(table)
        if len(np.unique(table.runs)) >= _FEW_CURVES:
            return whole
        pieces = table.runs.astype(object)
        for run in np.unique(table.runs):
            rows = np.flatnonzero(table.runs == run)
            rows = rows[np.argsort(table.columns["step"][rows], kind="stable")]
            number = max(1, min(_PIECES, len(rows) // _SHORTEST_PIECE))
            for k, part in enumerate(np.array_split(rows, number)):
                pieces[part] = f"{run} [{k}]"
        return dataclasses.replace(whole, runs=pieces.astype(str))

    def fit(  # type: ignore[override]
        self,
        source: Any,
        *,
        bootstrap: int = 200,
        seed: int = 0,
        calibrated: bool = True,
        starts: int = 6,
        reading: Reading = Reading(),
        progress: Callable[[int, int], None] | None = None,
        schedules: Mapping[str, Any] | None = None,
        **columns: str | float,
    ) -> Fitted:
        """Fit to the curves of finished runs: as :meth:`Law.fit`, for what :func:`lossmith.laws.read_curves` reads.

        Args:
            source: curves, a DataFrame, a file, or a folder.
            bootstrap: refits, from which intervals come; 0 for none. Below 8 curves, pieces of curves are resampled.
            seed: of the resampling.
            calibrated: whether intervals are widened by how well later losses were predicted from earlier ones.
            starts: of Newton's method.
            reading: headers and unit.
            progress: told ``(refits done, refits)``.
            schedules: run's name -> schedule, where no learning rate was logged.
            **columns: header of ``step``, ``lr`` or ``loss``.
        """
        if columns:
            reading = dataclasses.replace(reading, columns={**reading.columns, **columns})
        if isinstance(source, Table):
            law, table = self, source
        else:
            curves = read_curves(source, reading, schedules=schedules)
            law = self if self.decay is not None else self.settled(curves)
            table = law.tabulate(curves, _name(source))
        fitted = law.fit_table(
            table, bootstrap=bootstrap, seed=seed, calibrated=calibrated, starts=starts, progress=progress
        )
        if law is not self:
            note = f"decay {law.decay:g} was chosen among {len(DECAYS)} by the objective; intervals take it as given"
            fitted = dataclasses.replace(fitted, warnings=(*fitted.warnings, note))
        return fitted

    def settled(self, curves: Sequence[LossCurve]) -> LRAnnealing:
        """The law with the decay of ``DECAYS`` that fits best, of those that remember at most a fifth of the runs."""
        longest = max(int(curve.steps[-1]) for curve in curves)
        candidates = [d for d in DECAYS if 1 / (1 - d) <= longest / 5] or [DECAYS[0]]
        laws = [dataclasses.replace(self, decay=d) for d in candidates]
        tables = [law.tabulate(curves) for law in laws]
        laws[0].check(tables[0])
        fits = [law.prepared(table) for law, table in zip(laws, tables, strict=True)]
        columns = {name: np.stack([fit.columns[name] for fit in fits]) for name in self.terms.columns}
        found = fit_terms(
            self.terms, columns, fits[0].target, objective=self.objective, fixed=laws[0]._held(tables[0]).fixed
        )
        return laws[int(np.argmin(found.objective))]

    def fit_table(self, table: Table, **options: Any) -> Fitted:
        """As :meth:`Law.fit_table`; without any annealing ``C`` is held at 0."""
        self.check(table)
        plain = Law.fit_table(self._held(table), table, **options)
        return FittedCurves(**{part.name: getattr(plain, part.name) for part in dataclasses.fields(plain)})

    def _held(self, table: Table) -> LRAnnealing:
        if np.any(table.columns["annealing"] != 0) or "C" in self.fixed:
            return self
        return dataclasses.replace(self, fixed={**self.fixed, "C": 0.0})

    def check(self, table: Table) -> None:
        """Refuse too few points, and runs of a single schedule unless that is asked for.

        Raises:
            InputError: says what is there and what is needed.
        """
        free = len(self.names) - len(self.fixed)
        if len(table) <= free:
            raise InputError(
                f"{table.source} has {len(table)} losses; law {self.name} has {free} free parameters and needs "
                f"at least {free + 1}"
            )
        if len(np.unique(table.columns["area"])) < 3:
            raise InputError(f"{table.source} has losses at fewer than 3 steps: alpha cannot be determined")
        if self.one_schedule or "C" in self.fixed:
            return
        if not np.any(table.columns["annealing"] != 0):
            raise InputError(
                f"the learning rate of {table.source} is constant: nothing anneals, and C cannot be determined; add a "
                "run whose rate falls, or allow it with one_schedule=true"
            )
        if not _differ(table):
            raise InputError(
                f"{table.source} has runs of one schedule only, along which S1 and S2 go together; add a run with "
                "another schedule (a constant rate beside a cosine), or allow it with one_schedule=true"
            )

    def warnings(
        self, fit: Fit, solution: Solution, samples: Array, calibration: Calibration = Calibration()
    ) -> tuple[str, ...]:
        """What the data cannot determine."""
        found = list(super().warnings(fit, solution, samples, calibration))
        if self.fixed.get("C") == 0.0 and not np.any(fit.columns["annealing"] != 0):
            found.append("no run anneals: C is not known, and predictions are without any annealing")
        elif self.one_schedule and not _differ_along(fit.columns["area"], fit.columns["annealing"], fit.runs):
            found.append("all runs have one schedule: predictions for other schedules are weak")
        return tuple(found)

    def plan(self, fitted: Fitted, **wishes: Any) -> Any:
        """Schedules ranked by their predicted last loss: see :func:`lossmith.laws.rank_schedules`."""
        from lossmith.laws.schedule_plan import rank_schedules

        given = {k: parse_value(v) if isinstance(v, str) and k != "what_if" else v for k, v in wishes.items()}
        known = ("steps", "what_if", "peak", "warmup", "floor", "level", "top", *self._asked())
        for name in given:
            if name not in known:
                raise InputError(
                    f"law {self.name} plans schedules; it does not take '{name}': {did_you_mean(name, known)}"
                )
        return rank_schedules(fitted, **given)


def _differ(table: Table) -> bool:
    return _differ_along(table.columns["area"], table.columns["annealing"], table.runs)


def _differ_along(first: Array, second: Array, runs: np.ndarray) -> bool:
    """Whether ``S2`` is not the same function of ``S1`` in all runs."""
    labels = np.unique(runs)
    reference = max(labels, key=lambda label: first[runs == label].max())
    x, y = first[runs == reference], second[runs == reference]
    order = np.argsort(x)
    scale = np.abs(second).max()
    for label in labels:
        own = (runs == label) & (first >= x.min()) & (first <= x.max())
        if own.any() and np.abs(np.interp(first[own], x[order], y[order]) - second[own]).max() > 0.02 * scale:
            return True
    return False


def _name(source: Any) -> str:
    return str(source) if isinstance(source, str) or hasattr(source, "__fspath__") else "the curves"
