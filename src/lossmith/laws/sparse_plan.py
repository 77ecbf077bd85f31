"""What to train for a budget, to be served sparse."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from lossmith.errors import InputError
from lossmith.laws.chinchilla import Plan
from lossmith.laws.sparse_compute import average_density, step_fractions

if TYPE_CHECKING:
    from lossmith.laws.fitted import Fitted


@dataclasses.dataclass(frozen=True, slots=True)
class SparsePlan:
    """A sparse pre-training for a budget, beside the dense model that it equals in compute and, by the law, in loss.

    Attributes:
        dense: the plan for the average size, with limits: what a dense model would be.
        sparsity: share of the parameters that is removed in the end.
        initial_params: parameters at the start.
        final_params: parameters in the end, those that are served.
        start, end: shares of the compute between which is pruned.
        start_steps, end_steps: the same as shares of the steps (and tokens).
    """

    dense: Plan
    sparsity: float
    initial_params: float
    final_params: float
    start: float
    end: float
    start_steps: float
    end_steps: float

    @property
    def average_params(self) -> float:
        """Active parameters on average, and size of the dense model of equal loss."""
        return self.dense.params

    @property
    def smaller(self) -> float:
        """How many times smaller the served model is than the dense one of equal loss."""
        return self.average_params / self.final_params

    def text(self) -> str:
        """A few lines, for people."""
        lines = [
            self.dense.text().replace("parameters          ", "average parameters  ", 1),
            f"  {'sparsity':20} {self.sparsity:g}",
            f"  {'start with':20} {self.initial_params:.3g} parameters",
            f"  {'serve':20} {self.final_params:.3g} parameters, {self.smaller:.3g} times fewer than a dense model of "
            "equal loss",
            f"  {'prune':20} from {100 * self.start_steps:.3g}% to {100 * self.end_steps:.3g}% of the steps "
            f"({100 * self.start:g}% to {100 * self.end:g}% of the compute)",
        ]
        return "\n".join(lines)


def plan_sparse(
    fitted: Fitted,
    *,
    flops: float | None = None,
    loss: float | None = None,
    sparsity: float = 0.5,
    params: float | None = None,
    final_params: float | None = None,
    tokens: float | None = None,
    start: float = 0.25,
    end: float = 0.75,
    level: float = 0.9,
) -> SparsePlan:
    """The best sparse pre-training for a budget of ``flops``, or the cheapest that reaches a ``loss``.

    The average size and the tokens are Chinchilla's optimum for the budget ``6 Nbar D``; start and end follow from the
    schedule: ``N_0 = Nbar Q``, ``N_T = (1 - S) N_0``.

    Args:
        fitted: the fit of :class:`AverageParameter`.
        flops: training compute.
        loss: wanted loss, instead of a budget.
        sparsity: share of the parameters removed in the end, in [0, 1); 0 plans a dense model.
        params: a size at the start that is given.
        final_params: a size in the end that is given: what may be served.
        tokens: tokens that are given.
        start: share of the compute before pruning.
        end: share of the compute when pruning is over.
        level: of the limits.

    Raises:
        InputError: a share out of range, two sizes, and what :meth:`Chinchilla.plan` refuses.
    """
    numbers: dict[str, Any] = {
        "flops": flops, "loss": loss, "sparsity": sparsity, "params": params, "final_params": final_params,
        "tokens": tokens, "start": start, "end": end, "level": level,
    }  # fmt: skip
    for name, value in numbers.items():
        try:
            numbers[name] = None if value is None else float(value)
        except (TypeError, ValueError):
            raise InputError(f"{name} must be a number, got {value!r}") from None
    share, x, y = numbers["sparsity"], numbers["start"], numbers["end"]
    try:
        density = average_density(share, start=x, end=y)
        steps = step_fractions(share, start=x, end=y)
    except ValueError as error:
        raise InputError(str(error)) from None
    average = None
    for name, factor in (("params", density), ("final_params", density / (1 - share))):
        if (size := numbers[name]) is not None:
            if average is not None:
                raise InputError("plan takes params (at the start) or final_params (in the end), not both")
            if not (np.isfinite(size) and size > 0):
                raise InputError(f"{name} must be positive and finite, got {size:g}")
            average = size * factor
    law: Any = fitted.law
    goal = {name: numbers[name] for name in ("flops", "loss", "tokens", "level")}
    dense = law.as_chinchilla(fitted).plan(**goal, params=average)
    initial = dense.params / density
    return SparsePlan(dense, share, initial, initial * (1 - share), x, y, *steps)
