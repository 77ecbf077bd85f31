"""What an arm would reach with a larger budget, by the annealing law, and how far the law missed what is known.

The law is fitted to the losses of all seeds of an arm and asked for the same schedule stretched over a larger budget.
Where the validation loss was measured too seldom, the law is fitted to the training loss, averaged over windows, and
moved to the validation loss by their mean ratio. The runs of an arm have one schedule, along which annealing and
progress go together, and short runs are no place for the law: the intervals say both.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lossmith.errors import InputError
from lossmith.laws import Fitted, LossCurve, LRAnnealing, every_step
from lossmith.laws.recorded_schedules import stretched
from lossmith.reporting.comparison import Forecast, ForecastPoint
from lossmith.training.record import read_json_lines

TIMES = (2.0, 4.0, 8.0)
# The part of a run that predicts the rest.
FIRST = 2 / 3
# Left out at the beginning: the law does not hold there.
EXCLUDED = 0.2
# The annealing momentum remembers this share of a run.
_MEMORY = 0.03
_WINDOWS = 48
_VALIDATIONS = 12
_LOGGED = 60
_REFITS = 60


def forecast(arm: str, folders: Sequence[Path], *, comparable: bool = True, level: float = 0.9) -> Forecast:
    """The forecast of one arm from the records of its finished runs.

    Args:
        arm: its name.
        folders: run records, one per seed.
        comparable: whether its training loss is the validation loss on other text, up to a factor.
        level: of the intervals.

    Returns:
        The forecast; one that gives its reason instead, where the runs cannot carry it.
    """
    try:
        records = [read_json_lines(folder / "metrics.jsonl") for folder in folders]
        curves, factors = _curves(records, folders, comparable)
        return _forecast(arm, records, curves, factors, level)
    except (ValueError, ArithmeticError, np.linalg.LinAlgError) as error:
        # A finished comparison must not fail for what is said beyond it.
        return Forecast(arm, level=level, reason=str(error))


def _forecast(
    arm: str, records: Sequence[list[dict[str, Any]]], curves: Sequence[LossCurve], validated: bool, level: float
) -> Forecast:
    steps = int(curves[0].steps[-1])
    rates = curves[0].rates
    law = LRAnnealing(decay=1 - 1 / max(2.0, _MEMORY * steps), one_schedule=True, exclude=EXCLUDED)
    fitted = law.fit(curves, bootstrap=_REFITS)
    factor = 1.0 if validated else _ratio(fitted, records, rates)
    tokens = float(np.mean([max(line.get("tokens") or 0 for line in record) for record in records]))
    missed, at_end, held = _missed(law, curves, level)
    points = []
    for times in TIMES:
        longer = stretched(rates, round(times * len(rates)))
        found = fitted.interval(level, kind="law", schedule=longer, at=longer.length)
        low, value, high = _with_misses(*(factor * float(part[0]) for part in (found.low, found.value, found.high)),
                                        size=max(missed, abs(at_end)), times=times)  # fmt: skip
        points.append(ForecastPoint(times, round(times * tokens), value, low, high))
    return Forecast(arm, tuple(points), FIRST, missed, at_end, held, level)


def _with_misses(low: float, value: float, high: float, *, size: float, times: float) -> tuple[float, float, float]:
    """Widen an interval by how far the law was off within the runs, grown with the logarithm of the budget.

    Refits know nothing of what the law itself gets wrong. The only evidence of that is the miss over the rest of the
    runs, which is an extrapolation by ``1 / FIRST``.
    """
    grown = size * math.log(times) / math.log(1 / FIRST)
    below, above = math.hypot(math.log(value / low), grown), math.hypot(math.log(high / value), grown)
    return value * math.exp(-below), value, value * math.exp(above)


def _missed(law: LRAnnealing, curves: Sequence[LossCurve], level: float) -> tuple[float, float, float]:
    """Relative error over the rest, the same at the end (with its sign), and the share that the intervals held."""
    parts = [curve.first(FIRST) for curve in curves]
    fitted = law.fit(parts, bootstrap=_REFITS)
    errors, ends, held = [], [], []
    for curve, part in zip(curves, parts, strict=True):
        at, measured = curve.steps[len(part.steps) :], curve.losses[len(part.steps) :]
        found = fitted.interval(level, schedule=curve.rates, at=at)
        errors.append(np.abs(found.value / measured - 1).mean())
        ends.append(found.value[-1] / measured[-1] - 1)
        held.append(found.covers(measured).mean())
    return float(np.mean(errors)), float(np.mean(ends)), float(np.mean(held))


def _curves(
    records: Sequence[list[dict[str, Any]]], folders: Sequence[Path], comparable: bool
) -> tuple[list[LossCurve], bool]:
    """A curve per run, and whether it is the validation loss."""
    if not records:
        raise InputError("no run finished")
    validations = [_points(record, "eval/loss") for record in records]
    if min(len(steps) for steps, _ in validations) >= _VALIDATIONS:
        found, validated = validations, True
    elif not comparable:
        raise InputError(
            f"its training loss is another quantity than eval/loss, which was measured fewer than {_VALIDATIONS} times "
            "(more --set evaluations=)"
        )
    else:
        found, validated = [_points(record, "train/loss_unweighted", "train/loss") for record in records], False
        if (fewest := min(len(steps) for steps, _ in found)) < _LOGGED:
            raise InputError(f"too short: {fewest} logged training losses, {_LOGGED} are needed")
    curves = []
    for (steps, losses), record, folder in zip(found, records, folders, strict=True):
        logged, rates = _points(record, "learning_rate")
        if not len(logged) or not (rates > 0).any():
            raise InputError("no learning rate was logged")
        if not (losses > 0).all():
            raise InputError("its loss is not positive throughout")
        curve = LossCurve.of(folder.name, steps, losses, every_step(logged, rates, int(steps[-1])))
        if not validated:
            late = dataclasses.replace(
                curve,
                steps=curve.steps[curve.steps > EXCLUDED * steps[-1]],
                losses=curve.losses[curve.steps > EXCLUDED * steps[-1]],
            )
            curve = late.averaged(_WINDOWS)
            # The whole length of the run, not that of its last window's middle.
            curve = dataclasses.replace(curve, rates=late.rates)
        curves.append(curve)
    return curves, validated


def _ratio(fitted: Fitted, records: Sequence[list[dict[str, Any]]], rates: np.ndarray) -> float:
    """Validation loss over the law of the training loss."""
    ratios = []
    for record in records:
        steps, losses = _points(record, "eval/loss")
        late = steps > EXCLUDED * len(rates)
        if late.any():
            ratios += np.log(losses[late] / fitted.predict(schedule=rates, at=steps[late])).tolist()
    if not ratios or not np.isfinite(ratios).all():
        raise InputError("no validation after the first fifth of the run")
    return math.exp(float(np.mean(ratios)))


def _points(record: Sequence[Mapping[str, Any]], *names: str) -> tuple[np.ndarray, np.ndarray]:
    found = {}
    for line in record:
        value = next((line[n] for n in names if line.get(n) is not None), None)
        if value is not None and line.get("step"):
            found[int(line["step"])] = float(value)
    steps = np.array(sorted(found), dtype=np.int64)
    return steps, np.array([found[step] for step in steps.tolist()], dtype=np.float64)
