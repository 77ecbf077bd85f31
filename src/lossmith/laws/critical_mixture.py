"""How much domain data continual pre-training can take before a model forgets: the critical mixture ratio.

Gu et al., "CMR Scaling Law: Predicting Critical Mixture Ratios for Continual Pre-training of Language Models", 2024,
arXiv 2407.17467.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from lossmith.errors import InputError, did_you_mean
from lossmith.laws.critical_ratio import CriticalRatio, Wish, critical_ratio
from lossmith.laws.fitted import Fitted
from lossmith.laws.fitting import SQUARES, Objective, Solution
from lossmith.laws.law import Law
from lossmith.laws.mixture_curves import GENERAL_CURVE
from lossmith.laws.mixture_fit import Cells, fit_cells, refit_cells
from lossmith.laws.mixture_prediction import NAMES, MixtureFit, check_inputs, over_shares
from lossmith.laws.mixture_table import CPT_TOKENS, RATIO, Size, read_log, sizes_of
from lossmith.laws.resampling import Fit
from lossmith.laws.tables import LOSS, Column, Reading, Table
from lossmith.laws.terms import Array, Terms

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PARTS = {"general": 0.0, "domain": 1.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CriticalMixture(Law):
    r"""Losses of continual pre-training by share of domain data and tokens, and the critical mixture ratio.

    For every share :math:`R` of domain tokens, the changes against the model before are fitted over tokens :math:`T`
    (eq. 6)

    .. math:: \Delta L_{dom} = \alpha_1 T^{s_1} + \beta_1, \qquad
        \Delta L_{gen} = \alpha_2 T^{s_2} + \alpha_3 T^{s_3} + \beta_2

    At a given :math:`T` each loss is :math:`\alpha R^s + \beta` over the share (eq. 5): so shares and budgets that
    were not trained are predicted. The time :math:`T_0(R)` after which the objective :math:`L_{dom} + \lambda \Delta
    L_{gen}` falls for good gives the curve :math:`R = \alpha_4 T_0^{s_4} + \beta_3` (eq. 8), whose value at the
    budget is the largest share that is past its turn; the tolerance on general loss gives another limit, and the
    critical mixture ratio is the lower of the two (the paper does not say how they combine; its own numbers are
    equation 8 alone).

    Args:
        tolerance: how far general loss may rise, in nats per token; 0.05 is 5 % of perplexity.
        lagrange: weight of general loss in the objective; the paper uses 100 to 7000, and ``inf``, the limit, is the
            peak of general loss.
        base_general: loss on general text before continual pre-training, where the log has neither the column
            ``base_general`` nor rows with 0 tokens.
        base_domain: the same for domain text.
        scan: turns later than ``scan`` times the log's budget count as never.
        objective: least squares by default; another threshold is Huber's. Changes have no logarithm.
        sizes: filled by ``fit``.

    The log has one row per evaluation, with ``ratio`` (0 to 1), ``tokens``, ``general_loss``, ``domain_loss`` in
    nats, and perhaps ``params``, ``base_general``, ``base_domain``, ``run`` (a seed, the same label in every share)
    and ``learning_rate``. At least 3 shares above 0 and 8 evaluations of each, from one model under one schedule (a
    constant rate: annealing lowers the loss by itself). Each model size has its own curves.

    >>> shares, tokens = np.meshgrid([1 / 8, 1 / 4, 1 / 3, 1 / 2], np.geomspace(0.1, 100, 30), indexing="ij")
    >>> log = {"ratio": shares.ravel(), "tokens": 1e6 * tokens.ravel()}
    >>> log["general_loss"] = 2 + (0.04 * shares**2 * tokens**0.5 - 0.0008 * tokens**0.9).ravel()
    >>> log["domain_loss"] = 2 + (0.2 * (tokens**-0.1 - 1.3) * shares**0.2).ravel()
    >>> fitted = CriticalMixture(base_general=2.0, base_domain=2.0).fit(log, bootstrap=0)
    >>> fitted.plan().ratio.__round__(4), fitted.plan(tolerance=0.03).binds
    (0.4766, 'tolerance')
    >>> float(fitted.predict(ratio=0.4, tokens=1e8)).__round__(4)
    2.0135
    """

    name: ClassVar[str] = "critical-mixture"
    formula: ClassVar[str] = "share = alpha4 * critical tokens^s4 + beta3, from losses over tokens and share"
    needed: ClassVar[tuple[Column, ...]] = (RATIO, CPT_TOKENS, LOSS)

    objective: Objective = SQUARES
    tolerance: float = 0.05
    lagrange: float = float("inf")
    base_general: float | None = None
    base_domain: float | None = None
    scan: float = 1000.0
    sizes: tuple[Size, ...] = ()

    def __post_init__(self) -> None:
        if self.fixed:
            raise InputError(f"law {self.name} has a set of parameters for every share; none can be fixed")
        if self.objective.residual != "linear":
            raise InputError(f"law {self.name} fits changes of losses, which have no logarithm: use squares")
        _check_wish(self.tolerance, self.lagrange)
        for name, value in (("base_general", self.base_general), ("base_domain", self.base_domain)):
            if value is not None and not (np.isfinite(value) and value > 0):
                raise InputError(f"{name} must be positive and finite, got {value:g}")
        if not (np.isfinite(self.scan) and self.scan >= 1):
            raise InputError(f"scan must be at least 1, got {self.scan:g}")

    @property
    def terms(self) -> Terms:
        """The curve of general loss over tokens, of which every share has its own."""
        return GENERAL_CURVE

    @property
    def names(self) -> tuple[str, ...]:
        """``alpha2@0.25`` and so on: parameter at share, with the size in front where there are several."""
        several = len(self.sizes) > 1
        return tuple(
            f"{f'{size.params:.6g}:' if several else ''}{name}@{ratio:.6g}"
            for size in self.sizes
            for ratio in size.ratios
            for name in NAMES
        )

    def read(self, source: Any, reading: Reading = Reading()) -> Table:
        """The log in ``source``, as :func:`lossmith.laws.mixture_table.read_log` reads it."""
        return read_log(source, reading, self.base_general, self.base_domain)

    def check(self, table: Table) -> None:
        """Refuse a log with too few shares or evaluations."""
        sizes_of(table)

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
    ) -> FittedMixture:
        """Fit to a log that is read already. Limits are not calibrated (no larger run is there), curves not given."""
        if table.target != "loss" or "domain" not in table.columns:
            raise InputError(f"{table.source} is no log that law {self.name} has read")
        law = dataclasses.replace(self, sizes=sizes_of(table))
        cells = Cells.of(table, law.sizes)
        best, minima = fit_cells(cells, self.objective, starts)
        samples = np.zeros((0, best.size))
        if bootstrap:
            refits = refit_cells(
                cells, best, minima, table.runs, self.objective, number=bootstrap, seed=seed, progress=progress
            )
            samples = refits.reshape(bootstrap, -1)
        error = np.where(cells.present, cells.changes - cells.value(best), 0.0)
        return FittedMixture(
            law,
            dict(zip(law.names, best.ravel().tolist(), strict=True)),
            table,
            samples,
            float(0.5 * (error**2).sum()),
        )

    def prepared(self, table: Table) -> Fit:
        """The table with the fitted curves as its prediction."""
        return MixtureFit(
            self.terms, table.columns, table.columns["loss"], table.runs, self.objective, {}, self.sizes, table
        )

    def inputs(self, **given: Any) -> tuple[Mapping[str, Array], tuple[int, ...]]:
        """What to predict at: ``ratio``, ``tokens``, ``part`` and ``params``.

        ``ratio`` may be 0 only where that was trained. ``part`` is ``"general"`` (default) or ``"domain"``; ``params``
        is needed where there are several sizes. ``base`` replaces the loss before that the log had.
        """
        allowed = ("ratio", "tokens", "part", "params", "base", "domain")
        aliases = {alias: column.name for column in (RATIO, CPT_TOKENS) for alias in column.aliases}
        given = {aliases.get(name, name): value for name, value in given.items()}
        for name in given:
            if name not in allowed:
                raise InputError(f"law {self.name} has no input '{name}': {did_you_mean(name, allowed[:4])}")
        if missing := [name for name in ("ratio", "tokens") if name not in given]:
            raise InputError(f"law {self.name} needs {' and '.join(missing)} to predict")
        part = given.pop("part", None)
        if part is not None:
            if part not in _PARTS:
                raise InputError(f"part must be general or domain, got {part!r}")
            given["domain"] = _PARTS[part]
        given.setdefault("domain", 0.0)
        if "params" not in given and len(self.sizes) != 1:
            raise InputError(f"say for which model: params={' or '.join(f'{s.params:.6g}' for s in self.sizes)}")
        given.setdefault("params", self.sizes[0].params)
        arrays = {}
        for name, value in given.items():
            try:
                arrays[name] = np.asarray(value, dtype=np.float64)
            except (TypeError, ValueError):
                raise InputError(f"{name} must be a number, got {value!r}") from None
        check_inputs(arrays, self.sizes)
        try:
            broadcast = np.broadcast_arrays(*arrays.values())
        except ValueError:
            shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
            raise ValueError(f"the inputs' shapes do not fit together: {shapes}") from None
        return {name: a.reshape(-1) for name, a in zip(arrays, broadcast, strict=True)}, broadcast[0].shape

    def labels(self, **given: Any) -> list[str]:
        """One line for each value: what it is predicted at."""
        part = given.pop("part", None)
        lines = super().labels(**given)
        return [f"{line}, part={part}" for line in lines] if part is not None else lines

    def evaluate(self, parameters: Array, columns: Mapping[str, Array]) -> Array:
        """Losses for parameters ``(..., P)`` by equation 5 through the curves of equation 6: ``(..., n)``."""
        parameters = np.asarray(parameters, dtype=np.float64)
        flat = parameters.reshape(-1, len(self.names) // len(NAMES), len(NAMES))
        ratio = np.asarray(columns["ratio"])
        out = np.empty((len(flat), len(ratio)))
        start = 0
        for size in self.sizes:
            stop = start + len(size.ratios)
            for part in (0, 1):
                rows = np.flatnonzero((columns["params"] == size.params) & (columns["domain"] == part))
                if len(rows):
                    times, which = np.unique(columns["tokens"][rows] / size.tokens, return_inverse=True)
                    out[:, rows] = over_shares(flat[:, start:stop], size, part, times, which, ratio[rows])
                    base = size.base_domain if part else size.base_general
                    out[:, rows] += columns["base"][rows] if "base" in columns else base
            start = stop
        return out.reshape(*parameters.shape[:-1], len(ratio))

    def plan(  # type: ignore[override]
        self,
        fitted: Fitted,
        *,
        mixture: bool = True,
        tokens: float | None = None,
        tolerance: float | str | None = None,
        lagrange: float | str | None = None,
        params: float | None = None,
        level: float = 0.9,
    ) -> CriticalRatio:
        """The critical mixture ratio.

        Args:
            fitted: the fit.
            mixture: what ``lossmith plan --mixture`` asks for; this law plans nothing else.
            tokens: budget of continual pre-training; the log's by default. Beyond it the answer is marked as
                extrapolated.
            tolerance: in nats, instead of the law's.
            lagrange: instead of the law's.
            params: of the model, where the log has several.
            level: of the limits.

        Raises:
            InputError: a wish out of range, or a model that is not in the log.
        """
        if not mixture:
            raise InputError(f"law {self.name} plans mixtures only")
        numbers = {"tokens": tokens, "tolerance": tolerance, "lagrange": lagrange, "params": params}
        given = {name: _as_number(name, value) for name, value in numbers.items() if value is not None}
        if not 0 < level < 1:
            raise InputError(f"level must lie between 0 and 1, got {level:g}")
        wish = Wish(0.0, given.get("tolerance", self.tolerance), given.get("lagrange", self.lagrange), self.scan)
        _check_wish(wish.tolerance, wish.lagrange)
        number = self._size(given.get("params"))
        size = self.sizes[number]
        budget = given.get("tokens", size.tokens)
        if not (np.isfinite(budget) and budget > 0):
            raise InputError(f"tokens must be positive and finite, got {budget:g}")
        first = sum(len(s.ratios) for s in self.sizes[:number])
        cells = slice(first, first + len(size.ratios))
        shape = (-1, len(self.names) // len(NAMES), len(NAMES))
        best, samples = fitted.best.reshape(shape)[0, cells], fitted.samples.reshape(shape)[:, cells]
        return critical_ratio(size, best, samples, dataclasses.replace(wish, tokens=budget), level=level)

    def _size(self, params: float | None) -> int:
        there = ", ".join(f"{size.params:.6g}" for size in self.sizes)
        if params is None:
            if len(self.sizes) > 1:
                raise InputError(f"the log has several models; say which with params: {there}")
            return 0
        near = [i for i, size in enumerate(self.sizes) if abs(size.params - params) <= 0.01 * params]
        if not near:
            raise InputError(
                f"the log has no model of {params:g} parameters (sizes are not extrapolated); there are {there}"
            )
        return near[0]

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> CriticalMixture:
        """The law with options as :meth:`options` gave them."""
        values = dict(options)
        objective = dict(values.pop("objective"))
        for holder, name in ((objective, "delta"), (values, "lagrange")):
            # JSON has no infinity.
            holder[name] = float("inf") if holder.get(name) is None else holder[name]
        sizes = tuple(Size(**{**size, "ratios": tuple(size["ratios"])}) for size in values.pop("sizes"))
        return cls(objective=Objective(**objective), sizes=sizes, **values)


@dataclasses.dataclass(frozen=True)
class FittedMixture(Fitted):
    """What :meth:`CriticalMixture.fit` returns: a :class:`Fitted` whose summary and plot show the critical ratio."""

    def critical_ratio(self, **wishes: Any) -> CriticalRatio:
        """The same as ``plan``: see :meth:`CriticalMixture.plan`."""
        found: CriticalRatio = self.plan(**wishes)
        return found

    def predict_part(self, part: Literal["general", "domain"], **inputs: Any) -> Array:
        """``predict`` for one of the two losses."""
        return self.predict(part=part, **inputs)

    def summary(self) -> str:
        """Each model's critical ratio at the log's budget."""
        law: Any = self.law
        lines = [f"{law.name}: {law.formula}"]
        for size in law.sizes:
            lines.append(self.critical_ratio(**({"params": size.params} if len(law.sizes) > 1 else {})).text())
        runs = len(np.unique(self.table.runs))
        lines.append(
            f"  {len(self.table)} losses of {runs} runs; median error {np.median(np.abs(self.residuals)):.3g} nats"
        )
        lines += [f"  note: {note}" for note in self.notes]
        lines += [f"  warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)

    def plot(self, path: str | Path | None = None) -> Figure:
        """General loss over tokens, both losses over the share, and the critical ratio."""
        from lossmith.laws.mixture_plot import mixture_figure
        from lossmith.laws.plots import save

        figure = mixture_figure(self)
        if path is not None:
            save(figure, path)
        return figure

    @staticmethod
    def from_json(source: str | Path) -> FittedMixture:
        """Read what ``to_json`` or ``lossmith fit --law critical-mixture`` wrote.

        Raises:
            InputError: not such a file, or another law.
        """
        plain = Fitted.from_json(source)
        if not isinstance(plain.law, CriticalMixture):
            raise InputError(f"{source} holds law {plain.law.name}, not critical-mixture")
        return FittedMixture(**{f.name: getattr(plain, f.name) for f in dataclasses.fields(plain)})


def _check_wish(tolerance: float, lagrange: float) -> None:
    if not (np.isfinite(tolerance) and tolerance >= 0):
        raise InputError(f"tolerance must not be negative, in nats, got {tolerance:g}")
    if not lagrange > 0:
        raise InputError(f"lagrange must be positive (inf for the peak of general loss), got {lagrange:g}")


def _as_number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InputError(f"{name} must be a number, got {value!r}") from None
