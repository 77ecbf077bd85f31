"""A fitted law: predictions with intervals, residuals, a plot, a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lossmith.errors import InputError
from lossmith.files import finite_or_none, read_utf8, write_text
from lossmith.laws.resampling import Calibration, Fit, Noise, prediction_draws, widen
from lossmith.laws.tables import Table
from lossmith.laws.terms import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lossmith.laws.law import Law

FORMAT = "lossmith.law/1"


@dataclass(frozen=True, slots=True)
class Interval:
    """A prediction and its limits, each with the shape of the inputs."""

    low: Array
    value: Array
    high: Array
    level: float

    def covers(self, measured: Array) -> np.ndarray:
        """Which measurements lie inside."""
        return (np.asarray(measured) >= self.low) & (np.asarray(measured) <= self.high)


@dataclass(frozen=True)
class Fitted:
    """What :meth:`Law.fit` returns.

    Attributes:
        law: the law with its options.
        parameters: fitted values by name.
        table: the measurements that it was fitted to.
        samples: parameters of the bootstrap refits ``(S, P)``; no rows where there were none.
        objective: the minimum's value.
        calibration: what intervals are widened by, and why.
        warnings: what the data cannot determine, one sentence each.
    """

    law: Law
    parameters: Mapping[str, float]
    table: Table
    samples: Array
    objective: float
    calibration: Calibration = field(default_factory=Calibration)
    warnings: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What reading the table did."""
        return self.table.notes

    @cached_property
    def best(self) -> Array:
        """The parameters in the law's order."""
        return np.array([self.parameters[name] for name in self.law.names])

    @cached_property
    def residuals(self) -> Array:
        """Measured minus predicted at the fitted points: of logarithms, or of losses if the law is fitted to those."""
        return self._fit.residuals(self.best)

    @cached_property
    def noise(self) -> Noise:
        """The scatter of the residuals, by run and within runs."""
        free = len(self.law.names) - len(self.law.fixed)
        return Noise.of(self.residuals, self.table.runs, free)

    @cached_property
    def _fit(self) -> Fit:
        return self.law.prepared(self.table)

    def predict(self, **inputs: Any) -> Array:
        """The law's value.

        Args:
            **inputs: what the law needs, by name (``params=70e9, tokens=1.4e12``); numbers or arrays that broadcast.
        """
        columns, shape = self.law.inputs(**inputs)
        return self.law.evaluate(self.best, columns).reshape(shape)

    def predict_samples(self, **inputs: Any) -> Array:
        """The same for every bootstrap refit: ``(S, *shape)``."""
        columns, shape = self.law.inputs(**inputs)
        return self.law.evaluate(self.samples, columns).reshape(len(self.samples), *shape)

    def interval(
        self,
        level: float = 0.9,
        *,
        kind: Literal["measurement", "law"] = "measurement",
        calibrated: bool = True,
        seed: int = 0,
        **inputs: Any,
    ) -> Interval:
        """Prediction with limits.

        Args:
            level: share of cases that the limits are to hold.
            kind: ``"measurement"`` for the loss of a run yet to be made (uncertain parameters and noise), ``"law"`` for
                the expected loss alone.
            calibrated: widen by what predicting larger runs from smaller ones of the same table has shown to be needed.
            seed: of the noise draws.
            **inputs: as for :meth:`predict`.

        Raises:
            ValueError: the fit has no bootstrap refits, or a level outside (0, 1).
        """
        if not 0 < level < 1:
            raise ValueError(f"level must lie between 0 and 1, got {level}")
        if kind not in ("measurement", "law"):
            raise ValueError(f"kind must be 'measurement' or 'law', got {kind!r}")
        if len(self.samples) == 0:
            raise ValueError("this fit has no bootstrap refits, hence no intervals; fit with bootstrap=200")
        columns, shape = self.law.inputs(**inputs)
        best = self.law.evaluate(self.best, columns)
        values = self.law.evaluate(self.samples, columns)
        residual = self.law.objective.residual
        noise = self.noise if kind == "measurement" else None
        draws = prediction_draws(values, noise, residual, seed, best)
        if calibrated:
            draws = widen(draws, best, self.calibration.factor, residual)
        low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
        return Interval(low.reshape(shape), best.reshape(shape), high.reshape(shape), level)

    def parameter_intervals(self, level: float = 0.9) -> dict[str, tuple[float, float]]:
        """Percentile limits of each parameter; none without bootstrap refits."""
        if len(self.samples) == 0:
            return {}
        limits = np.quantile(self.samples, [(1 - level) / 2, (1 + level) / 2], axis=0)
        return {name: (float(low), float(high)) for name, low, high in zip(self.law.names, *limits, strict=True)}

    def plan(self, **wishes: Any) -> Any:
        """What to train: see the law's own ``plan``."""
        return self.law.plan(self, **wishes)

    def plot(self, path: str | Path | None = None) -> Figure:
        """Measured against predicted, and the residuals by size; saved as PNG or SVG where ``path`` is given."""
        from lossmith.laws.plots import fit_figure, save

        figure = fit_figure(self)
        if path is not None:
            save(figure, path)
        return figure

    def summary(self) -> str:
        """A few lines of text: parameters with limits, quality, warnings."""
        intervals = self.parameter_intervals()
        lines = [f"{self.law.name}: {self.law.formula}"]
        for name in self.law.names:
            value = f"  {name:8} {self.parameters[name]:.6g}"
            if name in self.law.fixed:
                value += "  (given)"
            elif name in intervals:
                low, high = intervals[name]
                value += f"  90% interval {low:.4g} to {high:.4g}"
            lines.append(value)
        size = np.median(np.abs(self.residuals))
        runs = len(np.unique(self.table.runs))
        unit = f"{100 * size:.2g}%" if self.law.objective.residual == "log" else f"{size:.3g}"
        lines.append(f"  {len(self.table)} points of {runs} runs; median error {unit}")
        if self.calibration.points:
            lines.append(
                f"  intervals: plain 90% ones held {100 * self.calibration.coverage:.0f}% of {self.calibration.points} "
                f"larger points predicted from smaller ones; widened by {self.calibration.factor:.2f}"
            )
        lines += [f"  note: {note}" for note in self.notes]
        lines += [f"  warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)

    def to_json(self, path: str | Path | None = None) -> str:
        """The fit as JSON text; also written to ``path`` where one is given."""
        value = {
            "format": FORMAT,
            "law": self.law.name,
            "options": self.law.options(),
            "parameters": dict(self.parameters),
            "objective": self.objective,
            "calibration": {
                "factor": self.calibration.factor,
                "coverage": self.calibration.coverage,
                "points": self.calibration.points,
            },
            "warnings": list(self.warnings),
            "samples": {name: self.samples[:, i].tolist() for i, name in enumerate(self.law.names)},
            "table": {
                "source": self.table.source,
                "target": self.table.target,
                "notes": list(self.table.notes),
                "runs": self.table.runs.tolist(),
                "columns": {name: column.tolist() for name, column in self.table.columns.items()},
            },
        }
        text = json.dumps(finite_or_none(value), allow_nan=False) + "\n"
        if path is not None:
            write_text(path, text)
        return text

    @staticmethod
    def from_json(source: str | Path) -> Fitted:
        """Read what :meth:`to_json` wrote: a path, or the text itself.

        Raises:
            InputError: not such a file, or a law that is not installed.
        """
        from lossmith.registry import LAWS

        name, text = "the text", str(source)
        if not text.lstrip().startswith("{"):
            name = text
            if not Path(text).is_file():
                raise InputError(f"there is no file {text}")
            text = read_utf8(text)
        try:
            value = json.loads(text)
            if value["format"] != FORMAT:
                raise KeyError
            law = LAWS.get(value["law"]).from_options(value["options"])
            table = value["table"]
            samples = np.array([value["samples"][n] for n in law.names], dtype=np.float64).T
            calibration = value["calibration"]
            coverage = calibration["coverage"]
            return Fitted(
                law,
                value["parameters"],
                Table(
                    {k: np.array(v, dtype=np.float64) for k, v in table["columns"].items()},
                    table["target"],
                    np.array(table["runs"], dtype=str),
                    tuple(table["notes"]),
                    table["source"],
                ),
                samples.reshape(-1, len(law.names)),
                value["objective"],
                Calibration(
                    calibration["factor"], float("nan") if coverage is None else coverage, calibration["points"]
                ),
                tuple(value["warnings"]),
            )
        except InputError:
            raise
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{name} is not a fitted law (JSON written by lossmith fit)") from None
