"""When weights are pruned during training, and how many are active on average.

Jin et al., "The Journey Matters: Average Parameter Count over Pre-training Unifies Sparse and Dense Scaling Laws",
2025, arXiv 2501.12486, equation 1, and its released code.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

from lossmith.laws.sparse_compute import check_shares, step_fractions

# Of the released code.
_LONGEST_INTERVAL = 100
# Where the user names none: short runs prune about so often.
_PRUNINGS = 24


@dataclass(frozen=True, slots=True)
class PruningSchedule:
    """Which share of the weights is active at which step.

    Before the steps ``start, start + interval, ..., end`` the smallest of the remaining weights are removed, the same
    share of them each time, so that after the last of ``K`` prunings the share ``sparsity`` of all is gone: the density
    after pruning ``k`` (from 0) is ``(1 - sparsity) ** ((k + 1) / K)``. It falls geometrically, not along a cubic.

    Attributes:
        steps: optimiser steps of the whole run.
        sparsity: share of the prunable weights that is removed in the end, in [0, 1); 0 prunes nothing.
        start: first step (from 0) before which is pruned.
        end: last such step.
        interval: steps between prunings; divides ``end - start``.

    Source: Jin et al. 2025, arXiv 2501.12486, and its released code.

    >>> schedule = PruningSchedule(steps=20, sparsity=0.5, start=5, end=15, interval=5)
    >>> schedule.prunings, schedule.average_parameters(1000)
    (3, 730.5)
    """

    steps: int
    sparsity: float
    start: int
    end: int
    interval: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "start", "end", "interval"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be a whole number, got {value!r}")
        check_shares(self.sparsity)
        if self.interval < 1:
            raise ValueError(f"interval must be at least 1 step, got {self.interval}")
        if not 0 <= self.start <= self.end < self.steps:
            raise ValueError(
                f"start and end must be steps with 0 <= start <= end < steps, got start {self.start}, end {self.end}, "
                f"steps {self.steps}"
            )
        if rest := (self.end - self.start) % self.interval:
            raise ValueError(
                f"interval {self.interval} does not divide the {self.end - self.start} steps from start to end; "
                f"end {self.end - rest} would do"
            )

    @classmethod
    def from_compute(
        cls, steps: int, sparsity: float, *, start: float = 0.25, end: float = 0.75, interval: int | None = None
    ) -> PruningSchedule:
        """Prune from the share ``start`` to the share ``end`` of the training compute.

        Args:
            steps: of the whole run.
            sparsity: in the end, in [0, 1).
            start: share of the compute, which is a smaller share of the steps: early steps are dense and cost more.
            end: share of the compute.
            interval: steps between prunings; default: about 24 prunings, at most 100 steps apart. Start and end are
                rounded to its multiples.

        >>> PruningSchedule.from_compute(25_050, 0.8, interval=100)
        PruningSchedule(steps=25050, sparsity=0.8, start=2500, end=12600, interval=100)
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps must be a whole number of at least 1, got {steps!r}")
        first, last = (share * steps for share in step_fractions(sparsity, start=start, end=end))
        if interval is None:
            interval = min(max(round((last - first) / _PRUNINGS), 1), _LONGEST_INTERVAL)
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise ValueError(f"interval must be a whole number of at least 1 step, got {interval!r}")
        begin = min(round(first / interval), (steps - 1) // interval) * interval
        # A pruning before a step that does not come would never happen.
        finish = min(max(round(last / interval) * interval, begin), (steps - 1) // interval * interval)
        return cls(steps, sparsity, begin, finish, interval)

    @property
    def prunings(self) -> int:
        """How often weights are removed."""
        return 0 if self.sparsity == 0 else (self.end - self.start) // self.interval + 1

    def prunes_before(self, step: int) -> bool:
        """Whether weights are removed before ``step`` (from 0)."""
        return self.sparsity > 0 and self.start <= step <= self.end and (step - self.start) % self.interval == 0

    def density(self, step: int) -> float:
        """Share of the prunable weights that is active in ``step`` (from 0)."""
        if self.sparsity == 0 or step < self.start:
            return 1.0
        done = min(step - self.start, self.end - self.start) // self.interval + 1
        # The power rounds: the last density is the one that was asked for.
        return 1 - self.sparsity if done == self.prunings else (1 - self.sparsity) ** (done / self.prunings)

    @property
    def average_density(self) -> float:
        """Active share, averaged over the steps."""
        return self._average(self.density)

    def average_parameters(self, params: int) -> float:
        """Active weights of ``params``, whole ones as pruning leaves them, averaged over the steps (equation 1)."""
        return self._average(lambda step: kept_of(params, self.density(step)))

    def compute_before(self, step: int) -> float:
        """Share of the run's compute that is spent before ``step``."""
        return self._sum(self.density, step) / self._sum(self.density, self.steps)

    def _average(self, value: Callable[[int], float]) -> float:
        return self._sum(value, self.steps) / self.steps

    def _sum(self, value: Callable[[int], float], until: int) -> float:
        """Sum over the steps before ``until`` of something that changes at prunings only."""
        changes = [self.start + k * self.interval for k in range(self.prunings)]
        edges = [0, *(step for step in changes if 0 < step < until), until]
        return sum((after - before) * value(before) for before, after in itertools.pairwise(edges))


def kept_of(number: int, density: float) -> int:
    """How many of ``number`` weights stay at a density: whole weights, at least one, safe against rounding."""
    return min(max(math.floor(number * density + 1e-6), 1), number)
