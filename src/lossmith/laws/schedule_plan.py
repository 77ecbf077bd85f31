"""Which schedule next: candidates ranked by the loss that the fitted annealing law predicts for their end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lossmith.errors import InputError
from lossmith.laws.schedules import Schedule, cosine, linear, schedule, whole_number, wsd

if TYPE_CHECKING:
    from lossmith.laws.fitted import Fitted

_SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)
_SHAPES = ("linear", "1-sqrt")
# Of the table for people.
_WIDTH = 80


@dataclass(frozen=True, slots=True)
class Candidate:
    """One schedule.

    Attributes:
        schedule: as it is written.
        loss: predicted after its last step.
        low, high: limits of that; NaN without bootstrap refits.
        above: how much more than the best's.
        above_low, above_high: limits of that difference, which is surer than either loss.
    """

    schedule: str
    loss: float
    low: float
    high: float
    above: float
    above_low: float
    above_high: float


@dataclass(frozen=True, slots=True)
class SchedulePlan:
    """Candidates, best first.

    Attributes:
        candidates: see :class:`Candidate`.
        steps: of the training.
        level: of the limits.
        cautions: where the law was not fitted, one sentence each.
    """

    candidates: tuple[Candidate, ...]
    steps: int
    level: float
    cautions: tuple[str, ...] = ()

    def text(self) -> str:
        """A table, for people."""
        limits = any(np.isfinite(c.low) for c in self.candidates)
        lines = [f"predicted loss after {self.steps} steps{f', {100 * self.level:g}% limits' if limits else ''}"]
        rows = []
        for c in self.candidates:
            span = f"  [{c.low:.4f}, {c.high:.4f}]" if limits else ""
            more = "best" if c is self.candidates[0] else f"{c.above:+.4f}"
            if limits and c is not self.candidates[0]:
                more += f" [{c.above_low:+.4f}, {c.above_high:+.4f}]"
            rows.append((f"{c.loss:10.4f}{span}  {more}", c.schedule))
        wide = max(len(numbers) for numbers, _ in rows)
        if wide + 2 + max(len(name) for _, name in rows) <= _WIDTH:
            lines += [f"{numbers:{wide}}  {name}" for numbers, name in rows]
        else:
            lines += [line for numbers, name in rows for line in (name, numbers)]
        return "\n".join([*lines, *(f"  caution: {caution}" for caution in self.cautions)])


def rank_schedules(
    fitted: Fitted,
    *,
    steps: int | None = None,
    what_if: Schedule | str | Sequence[Schedule | str] = (),
    peak: float | None = None,
    warmup: float | None = None,
    floor: float | None = None,
    level: float = 0.9,
    top: int = 12,
    **size: Any,
) -> SchedulePlan:
    """Rank schedules by predicted last loss.

    The last loss depends on a schedule only through its area and how far the averaged rate has fallen, so that the
    unconstrained optimum is a degenerate one (full rate until the last moment, then 0). The search is therefore over
    families: cosine, linear, and warm-up/stable/decay with decays of 2 to 90 percent of the training.

    Args:
        fitted: an :class:`~lossmith.laws.LRAnnealing` fit.
        steps: of the training; needed unless every schedule has its own length.
        what_if: schedules to rank, instead of the families.
        peak: of the families; by default that of the fitted runs, which the law is for.
        warmup: of the families, in steps or as a share; by default none.
        floor: last rate of the families; by default the lowest of the fitted runs.
        level: of the limits.
        top: how many to return.
        **size: ``params``, for the law by size.

    Raises:
        InputError: nothing to rank, or not the same number of steps for all.
    """
    steps = None if steps is None else whole_number("steps", steps, least=1)
    top = whole_number("top", top, least=1)
    what_if = (what_if,) if isinstance(what_if, str | Schedule) else what_if
    rates = fitted.table.columns["lr"]
    seen_peak, seen_floor = float(rates.max()), float(rates.min())
    if what_if:
        candidates = [schedule(given) for given in what_if]
    else:
        if steps is None:
            raise InputError("plan needs steps (of the training), or schedules to compare (what_if)")
        # The last logged rate of a cosine lies a little above its floor.
        high, low = peak or seen_peak, float(f"{seen_floor:.2g}") if floor is None else floor
        shared: dict[str, Any] = {"floor": min(low, high), "warmup": warmup or 0}
        candidates = [cosine(high, **shared), linear(high, **shared)]
        candidates += [wsd(high, decay=share, shape=shape, **shared) for shape in _SHAPES for share in _SHARES]
    lengths = {steps if steps is not None else made.length for made in candidates}
    if None in lengths:
        raise InputError("plan needs steps: a schedule has no length of its own")
    if len(lengths) > 1:
        raise InputError(f"schedules of {sorted(lengths)} steps cannot be ranked together; say steps")  # type: ignore[type-var]
    last = int(lengths.pop())  # type: ignore[arg-type]
    inputs: list[dict[str, Any]] = [{"schedule": made, "steps": last, "at": last, **size} for made in candidates]
    values = np.array([float(fitted.predict(**given)[0]) for given in inputs])
    order = np.argsort(values, kind="stable")[:top]
    samples = np.array([fitted.predict_samples(**given)[:, 0] for given in inputs])
    best = order[0]
    ranked = []
    for k in order:
        low_loss = high_loss = low_more = high_more = float("nan")
        if samples.shape[1]:
            found = fitted.interval(level, **inputs[k])
            low_loss, high_loss = float(found.low[0]), float(found.high[0])
            more = samples[k] - samples[best]
            limits = np.quantile(more, [(1 - level) / 2, (1 + level) / 2])
            # Refits scatter around the fit, not around the truth: as for single losses.
            low_more, high_more = limits + (values[k] - values[best] - np.median(more))
        ranked.append(
            Candidate(
                str(candidates[k]), float(values[k]), low_loss, high_loss, float(values[k] - values[best]),
                float(low_more), float(high_more),
            )
        )  # fmt: skip
    return SchedulePlan(tuple(ranked), last, level, cautions(fitted, [candidates[k] for k in order], last))


def cautions(fitted: Fitted, schedules: Sequence[Schedule], steps: int | None) -> tuple[str, ...]:
    """Where schedules leave what the law was fitted to."""
    columns = fitted.table.columns
    seen_peak, seen_floor = float(columns["lr"].max()), float(columns["lr"].min())
    found = []
    if odd := [made for made in schedules if abs(made.peak / seen_peak - 1) > 0.01]:
        found.append(
            f"the law was fitted at a peak rate of {seen_peak:g}, and holds for that; {odd[0]} has {odd[0].peak:g}"
        )
    rates = [made.values(steps if steps is not None else made.length) for made in schedules]
    if any(rate[-1] < 0.5 * seen_floor for rate in rates):
        found.append(f"rates below {seen_floor:g}, the lowest of the fitted runs, are an extrapolation")
    longest = float(columns["area"].max())
    if rates and (ratio := max(float(rate.sum()) for rate in rates) / longest) > 1.05:
        found.append(f"the area under the rate is {ratio:.2g} times the largest of the fitted runs")
    return tuple(found)
