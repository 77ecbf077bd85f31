"""What arms cost next to the baseline, and which differences are too large for a fair ranking."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields

from lossmith.reporting import formatting
from lossmith.reporting.comparison import Cost

# Counted exactly, so a difference is real; the measured ones vary by several percent between identical runs.
COUNTED_LIMIT = 0.01
MEASURED_LIMITS = {"seconds": 0.10, "peak_memory_bytes": 0.25}
STANDARD_ERRORS = 3.0


@dataclass(frozen=True, slots=True)
class CostMeans:
    """Means of :class:`Cost` over an arm's finished runs; ``n`` is their number (all zero without any).

    ``errors`` holds the standard errors of the measured quantities, where there are runs enough to know them.
    """

    n: int = 0
    tokens: float = 0.0
    steps: float = 0.0
    seconds: float = 0.0
    flops: float = 0.0
    peak_memory_bytes: float = 0.0
    scored_tokens: float = 0.0
    errors: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CostDifference:
    """``relative`` is ``arm / reference - 1``, infinite where the reference has none.

    For ``scored_tokens`` it is the surplus over the reference's training tokens. ``text`` says it in words.
    """

    quantity: str
    relative: float
    flagged: bool
    text: str


_NAMES = {
    "tokens": "tokens",
    "steps": "steps",
    "flops": "FLOPs",
    "scored_tokens": "scoring",
    "seconds": "time",
    "peak_memory_bytes": "memory",
}


def mean_cost(costs: Iterable[Cost]) -> CostMeans:
    """Average each quantity.

    >>> mean_cost([Cost(tokens=100), Cost(tokens=300)]).tokens
    200.0
    """
    costs = list(costs)
    if not costs:
        return CostMeans()
    means = {f.name: sum(float(getattr(c, f.name)) for c in costs) / len(costs) for f in fields(Cost)}
    errors = {}
    for name in MEASURED_LIMITS if len(costs) > 1 else ():
        squares = sum((float(getattr(c, name)) - means[name]) ** 2 for c in costs)
        errors[name] = math.sqrt(squares / (len(costs) - 1) / len(costs))
    return CostMeans(n=len(costs), errors=errors, **means)


def cost_differences(arm: CostMeans, reference: CostMeans) -> tuple[CostDifference, ...]:
    """Every quantity in which ``arm`` differs from ``reference``; none where either has no finished run.

    Flagged beyond 1 percent (tokens, optimiser steps, FLOPs, tokens that were only scored). Time and peak memory are
    measured on a machine with other things to do: flagged beyond 10 and 25 percent, and only if the difference is
    also larger than three of its standard errors over the runs.

    >>> [d.text for d in cost_differences(CostMeans(1, tokens=110.0), CostMeans(1, tokens=100.0))]
    ['tokens +10%']
    """
    if not arm.n or not reference.n:
        return ()
    differences = []
    for quantity, name in _NAMES.items():
        own, other = getattr(arm, quantity), getattr(reference, quantity)
        if own == other:
            continue
        base = reference.tokens or other if quantity == "scored_tokens" else other
        relative = (own - other) / base if base else math.inf
        if not math.isfinite(relative):
            relative = math.inf
        limit = MEASURED_LIMITS.get(quantity, COUNTED_LIMIT)
        noise = STANDARD_ERRORS * math.hypot(arm.errors.get(quantity, 0.0), reference.errors.get(quantity, 0.0))
        # A hair of slack, so that a difference of exactly the limit is not flagged for a rounding error.
        flagged = abs(relative) > limit * (1 + 1e-9) and abs(own - other) > noise
        differences.append(CostDifference(quantity, relative, flagged, f"{name} {formatting.relative(relative)}"))
    return tuple(differences)
