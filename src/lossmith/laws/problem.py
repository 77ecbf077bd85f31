"""What a fit minimises, and the rows of a batch of problems that are minimised together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lossmith.laws.terms import Array, Inputs


@dataclass(frozen=True, slots=True)
class Objective:
    """What a fit minimises.

    Attributes:
        residual: ``"log"`` for ``ln f - ln y``, ``"linear"`` for ``f - y``.
        delta: threshold of the Huber loss in units of the residual; ``inf`` is least squares.
    """

    residual: Literal["log", "linear"] = "log"
    delta: float = 1e-3

    def __post_init__(self) -> None:
        if self.residual not in ("log", "linear"):
            raise ValueError(f"residual must be 'log' or 'linear', got {self.residual!r}")
        if not self.delta > 0:
            raise ValueError(f"delta must be positive, got {self.delta}")

    def residuals(self, value: Array, target: Array) -> Array:
        """``target`` is already a logarithm where the residual is one; a value that is not positive gives NaN."""
        if self.residual == "linear":
            return value - target
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.log(np.where(value > 0, value, np.nan)) - target


#: Hoffmann et al. 2022 (arXiv 2203.15556), equation 3.
HUBER_LOG = Objective()
#: Choshen et al. 2024 (arXiv 2410.11840): least squares on the raw loss.
SQUARES = Objective("linear", float("inf"))


@dataclass(frozen=True, slots=True)
class Problem:
    """Some rows of the batch, in the units of ``inputs``."""

    inputs: Inputs
    y: Array
    target: Array
    weights: Array
    objective: Objective
    fixed: Mapping[str, float]
    count: int

    def select(self, rows: np.ndarray) -> Problem:
        """These rows; what all of them share stays shared."""

        def pick(array: Array) -> Array:
            return array if len(array) == 1 else array[rows]

        return Problem(
            self.inputs.select(rows),
            pick(self.y),
            pick(self.target),
            pick(self.weights),
            self.objective,
            self.fixed,
            len(rows),
        )

    def total(self, parameters: Array, delta: Array) -> Array:
        """``J``, infinite where the law is not positive."""
        with np.errstate(over="ignore", invalid="ignore"):
            residual = self.objective.residuals(self.inputs.value(parameters), self.target)
            value = (self.weights * huber(residual, delta[:, None])).sum(-1)
        return np.where(np.isfinite(value), value, np.inf)


def huber(residual: Array, delta: Array) -> Array:
    """``r^2/2`` up to ``delta``, ``delta (|r| - delta/2)`` beyond."""
    # x^2/2 + delta*(|r| - x) with x = min(|r|, delta) is both branches at once; delta may be infinite.
    size = np.abs(residual)
    inner = np.minimum(size, delta)
    rest = size - inner
    return 0.5 * inner * inner + np.where(rest > 0, delta, 0.0) * rest
