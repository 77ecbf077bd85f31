"""The critical mixture ratio: what it is computed from, which constraint binds, and how sure it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from lossmith.laws.mixture_curves import (
    critical_time,
    domain_change,
    general_change,
    power_law,
    share_reaching,
    trend,
    trend_share,
)
from lossmith.laws.mixture_table import Size
from lossmith.laws.terms import Array

Limits = tuple[float, float]


@dataclass(frozen=True, slots=True)
class TriedShare:
    """What the curves say of one share of domain data at the budget.

    Attributes:
        ratio: share of domain tokens.
        general_change, domain_change: loss minus that of the model before, in nats.
        critical_tokens: tokens after which the objective falls for good: 0 from the start, ``inf`` never.
        critical_limits: of these.
        feasible: within the tolerance, past the critical tokens, and better on the domain.
    """

    ratio: float
    general_change: float
    domain_change: float
    critical_tokens: float
    critical_limits: Limits
    feasible: bool


@dataclass(frozen=True, slots=True)
class CriticalRatio:
    """The largest share of domain data at which the model does not forget.

    Attributes:
        ratio: the critical mixture ratio: the lower of ``trend`` and ``within_tolerance``; 0 where no share is
            feasible.
        limits: of it; NaN without bootstrap refits.
        level: share of cases that the limits are to hold.
        binds: which of the two it is; ``"nothing"`` where every share is allowed.
        trend: largest share whose objective is falling at the end of the budget (equation 8).
        trend_limits: of it.
        within_tolerance: largest share with general loss at most ``tolerance`` above that of the model before.
        tolerance_limits: of it.
        tokens: budget of continual pre-training.
        tolerance: nats per token.
        lagrange: how much general loss matters.
        params: of the model; 0 where the log does not say.
        general_loss, domain_loss: predicted at ``ratio`` and ``tokens``; NaN where ``ratio`` is 0.
        extrapolation: ``tokens`` over those of the log.
        shares: what each share of the log does.
        curve: alpha4, beta3 and s4 of equation 8 with time in budgets of the log; NaN without a curve.
        notes: what to know before using the number.
    """

    ratio: float
    limits: Limits
    level: float
    binds: Literal["trend", "tolerance", "nothing"]
    trend: float
    trend_limits: Limits
    within_tolerance: float
    tolerance_limits: Limits
    tokens: float
    tolerance: float
    lagrange: float
    params: float
    general_loss: float
    domain_loss: float
    extrapolation: float
    shares: tuple[TriedShare, ...]
    curve: tuple[float, float, float]
    notes: tuple[str, ...]

    def text(self) -> str:
        """A table of the shares and the result, for people."""
        lines = [
            f"critical mixture ratio for {self.tokens:.4g} tokens"
            f"{f' and {self.params:.4g} parameters' if self.params else ''}: {100 * self.ratio:.1f}% domain data"
            f"{_span(self.limits, self.level)}",
            f"  set by {_REASONS[self.binds]}",
            f"  objective falls at the end up to   {100 * self.trend:5.1f}%{_span(self.trend_limits, self.level)}",
            f"  general loss within {self.tolerance:g} nats up to {100 * self.within_tolerance:5.1f}%"
            f"{_span(self.tolerance_limits, self.level)}",
        ]
        if np.isfinite(self.general_loss):
            lines.append(f"  predicted there: general loss {self.general_loss:.4f}, domain loss {self.domain_loss:.4f}")
        lines.append(f"  {'share':>8}{'general':>10}{'domain':>10}   falls for good after")
        for share in self.shares:
            limits = share.critical_limits
            span = f"  ({_tokens(limits[0])} to {_tokens(limits[1])})" if limits[0] == limits[0] else ""
            lines.append(
                f"  {100 * share.ratio:7.1f}%{share.general_change:+10.4f}{share.domain_change:+10.4f}   "
                f"{_tokens(share.critical_tokens)}{span}{'' if share.feasible else ', not feasible'}"
            )
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


_MISSED = "equation 5 misses general loss at a share tried by {:.2g} nats: believe the table of shares more than it"
_REASONS = {
    "trend": "the trend: above it the objective is not yet falling",
    "tolerance": "the tolerance on general loss",
    "nothing": "nothing: every share is allowed",
}


@dataclass(frozen=True, slots=True)
class Wish:
    """For which budget and preferences a ratio is asked."""

    tokens: float
    tolerance: float
    lagrange: float
    scan: float


def critical_ratio(
    size: Size, best: Array, samples: Array, wish: Wish, *, level: float, noisy_start: bool = True
) -> CriticalRatio:
    """The critical mixture ratio of one model.

    Args:
        size: the model.
        best: curves of its shares ``(K, 8)``.
        samples: the same of bootstrap refits ``(S, K, 8)``.
        wish: budget and preferences.
        level: of the limits.
        noisy_start: whether nothing is known before the log's first evaluation: an objective that turns earlier falls
            from the start.
    """
    every = np.concatenate([best[None], samples])
    ratios = np.array(size.ratios)
    t = wish.tokens / size.tokens
    first = size.first / size.tokens if noisy_start else 1e-9
    general, domain = every[..., :5], every[..., 5:]
    times = critical_time(general, domain, lagrange=wish.lagrange, first=first, scan=wish.scan)
    changes = general_change(general, np.array(t)), domain_change(domain, np.array(t))
    positive, mixed = ratios > 0, size.mixed
    curves, pairs = trend(times[:, mixed], ratios[mixed])
    trends = trend_share(curves, times, ratios, t)
    rises = np.any(times > 0, axis=-1)
    trends = np.where(rises, trends, 1.0)
    general_law = power_law(ratios[mixed], changes[0][:, mixed])
    allowed = share_reaching(general_law, np.array(wish.tolerance))
    kept = changes[0] <= wish.tolerance
    if ratios[-1] == 1 and not mixed[-1]:
        # The law does not know what happens without replay; the run without it does.
        past = times <= t
        allowed = np.where((allowed == 1) & ~kept[:, -1], np.where(kept, ratios, 0.0).max(-1), allowed)
        trends = np.where((trends == 1) & ~past[:, -1], np.where(past, ratios, 0.0).max(-1), trends)
    missed = float(np.abs(domain_change(general_law[0], ratios[mixed]) - changes[0][0, mixed]).max())
    critical = np.minimum(trends, allowed)
    share = float(critical[0])
    binds: Literal["trend", "tolerance", "nothing"] = "trend" if trends[0] <= allowed[0] else "tolerance"
    if share == 1:
        binds = "nothing"
    losses = [float("nan")] * 2
    if share > 0:
        domain_law = power_law(ratios[positive], changes[1][:1, positive])
        pair = ((size.base_general, general_law), (size.base_domain, domain_law))
        losses = [base + float(domain_change(law[0], np.array(share))) for base, law in pair]
    limits = [_limits(values[1:], level) for values in (critical, trends, allowed)]
    shares = tuple(
        TriedShare(
            float(ratio),
            float(changes[0][0, k]),
            float(changes[1][0, k]),
            float(times[0, k]) * size.tokens,
            _limits(times[1:, k] * size.tokens, level),
            bool(times[0, k] <= t and changes[0][0, k] <= wish.tolerance and changes[1][0, k] < 0),
        )
        for k, ratio in enumerate(ratios)
    )
    return CriticalRatio(
        share,
        limits[0],
        level,
        binds,
        float(trends[0]),
        limits[1],
        float(allowed[0]),
        limits[2],
        wish.tokens,
        wish.tolerance,
        wish.lagrange,
        size.params,
        losses[0],
        losses[1],
        t,
        shares,
        tuple(curves[0].tolist()),
        _notes(size, shares, share, int(pairs[0]), bool(rises[0]), t)
        + ((_MISSED.format(missed),) if missed > 0.5 * wish.tolerance and missed > 1e-6 else ()),
    )


def _notes(
    size: Size, shares: Sequence[TriedShare], ratio: float, pairs: int, rises: bool, t: float
) -> tuple[str, ...]:
    notes = []
    highest = max(size.ratios)
    tried = [share for share in shares if share.ratio > 0]
    finite = [share for share in tried if 0 < share.critical_tokens < np.inf]
    if t > 1 + 1e-9:
        notes.append(f"extrapolated: {t:.3g} times the tokens of the log")
    if not rises:
        if ratio >= highest:
            notes.append(f"no share tried keeps the objective from falling: the critical ratio is {highest:g} or above")
    elif pairs < 2:
        notes.append(
            f"{pairs} share{'s turn' if pairs != 1 else ' turns'} from rising to falling within reach, "
            "too few for a curve: the trend is the largest share tried that is past its turn"
        )
    elif pairs == 2:
        notes.append("only 2 shares turn from rising to falling: the trend is drawn through them with a fixed exponent")
    times = [share.critical_tokens for share in finite]
    if any(later < earlier for earlier, later in pairwise(times)):
        notes.append(
            "critical tokens do not grow with the share, as they should: the log may be too noisy or too short"
        )
    late = [share.ratio for share in finite if share.critical_tokens > 10 * size.tokens]
    if late:
        notes.append(
            f"critical tokens of share {', '.join(f'{r:g}' for r in late)} lie over 10 times beyond the log: a guess"
        )
    if ratio > highest and rises:
        notes.append(f"extrapolated: above the largest share tried ({highest:g})")
    if ratio == 0:
        notes.append("no share of domain data is feasible at this budget")
    if any(share.domain_change >= 0 for share in tried if share.ratio <= ratio):
        notes.append("domain loss does not fall at some share up to it: more domain data do not help there")
    return tuple(notes)


def _limits(values: Array, level: float) -> Limits:
    if not len(values):
        return float("nan"), float("nan")
    # Critical tokens may be infinite: order statistics, not interpolation between them.
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2], method="nearest")
    return float(low), float(high)


def _span(limits: Limits, level: float) -> str:
    if limits[0] != limits[0]:
        return ""
    return f"   {100 * level:g}% limits {100 * limits[0]:.1f}% to {100 * limits[1]:.1f}%"


def _tokens(value: float) -> str:
    if value == 0:
        return "the start"
    return "never" if np.isinf(value) else f"{value:.3g} tokens"
