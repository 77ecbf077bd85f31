"""The one fit behind every law: robust, with bounds, from many starts, for a whole batch of problems at once.

.. math:: J(p) = \\sum_i w_i\\, \\rho_\\delta\\big(\\ln f_p(x_i) - \\ln y_i\\big), \\qquad
    \\rho_\\delta(r) = \\begin{cases} r^2/2 & |r| \\le \\delta \\\\ \\delta(|r| - \\delta/2) & \\text{else} \\end{cases}

Three steps, each deterministic:

1. *Variable projection on a grid.* For every start of the exponents the coefficients are a small linear least-squares
   problem with non-negative unknowns, sharpened by a few reweighted rounds towards :math:`J`.
2. *Newton from the best of them*, with the exact Hessian of :math:`J` (its indefinite part turned positive), bounds by
   projection, and the threshold :math:`\\delta` lowered in stages: far away nearly every residual lies on the
   linear branch of :math:`\\rho`, where Newton has no curvature to use.
3. The lowest minimum is kept.

Bootstrap resamples are weights ``w``, hundreds of laws are rows of a batch: all of them share one call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from lossmith.laws.newton import newton
from lossmith.laws.problem import HUBER_LOG, SQUARES, Objective, Problem
from lossmith.laws.projection import BLOCK, grid_starts
from lossmith.laws.terms import Array, Inputs, Terms

__all__ = ["HUBER_LOG", "SQUARES", "Objective", "Solution", "fit_terms"]


@dataclass(frozen=True, slots=True)
class Solution:
    """Minima: one row per problem.

    Attributes:
        parameters: ``(B, P)`` in the units of the table.
        objective: ``(B,)``.
        converged: whether Newton's own prediction of what is left to gain is below 1e-8 of the objective.
        minima: other minima that the starts led to, ``(B, M, P)``, best first.
        values: their objectives ``(B, M)``.
    """

    parameters: Array
    objective: Array
    converged: np.ndarray
    minima: Array
    values: Array


def fit_terms(
    terms: Terms,
    columns: Mapping[str, Array],
    target: Array,
    *,
    weights: Array | None = None,
    objective: Objective = HUBER_LOG,
    starts: int = 6,
    initial: Array | None = None,
    fixed: Mapping[str, float] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Solution:
    """Fit one law, or many, to one table, or many.

    Args:
        terms: shape of the law.
        columns: inputs by name, each ``(n,)`` shared by all problems or ``(B, n)``.
        target: measured values, ``(n,)`` or ``(B, n)``.
        weights: ``(n,)`` or ``(B, n)``, non-negative: 0 leaves a point out, 2 counts it twice (a bootstrap resample).
        objective: what to minimise.
        starts: how many of the grid's best points Newton starts from; 0 for none, where ``initial`` is given.
        initial: further starts in units of the table, ``(P,)``, ``(M, P)`` or ``(B, M, P)``.
        fixed: parameters that are given, by name.
        progress: told ``(problems done, problems)``.

    Returns:
        One minimum per problem.

    Raises:
        ValueError: shapes that do not fit, unknown names, or values that are not finite.

    >>> from lossmith.laws import Exponent, Term
    >>> n = np.geomspace(1, 100, 12)
    >>> law = Terms((Term("E"), Term("A", {"N": "alpha"})), (Exponent("alpha"),))
    >>> found = fit_terms(law, {"N": n}, 1.5 + 8 * n**-0.5)
    >>> found.parameters.round(9).tolist()
    [[1.5, 8.0, 0.5]]
    """
    fixed = dict(fixed or {})
    if unknown := set(fixed) - set(terms.names):
        raise ValueError(f"fixed names no parameter: {sorted(unknown)}; there are {', '.join(terms.names)}")
    if missing := set(terms.columns) - set(columns):
        raise ValueError(f"columns lacks {sorted(missing)}")
    given = {name: np.atleast_2d(np.asarray(columns[name], dtype=np.float64)) for name in terms.columns}
    y = np.atleast_2d(np.asarray(target, dtype=np.float64))
    w = np.ones((1, y.shape[-1])) if weights is None else np.atleast_2d(np.asarray(weights, dtype=np.float64))
    start = None if initial is None else np.asarray(initial, dtype=np.float64)
    if start is not None:
        start = start.reshape((1,) * (3 - start.ndim) + start.shape)
    arrays = {**given, "target": y, "weights": w}
    batch = max(len(array) for array in [*arrays.values(), *([start] if start is not None else [])])
    for name, array in arrays.items():
        if array.shape[-1] != y.shape[-1] or len(array) not in (1, batch):
            raise ValueError(f"{name} has shape {array.shape}, expected (1 or {batch}, {y.shape[-1]})")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} has values that are not finite")
    if starts < 0 or (starts == 0 and start is None):
        raise ValueError(f"starts must be at least 1, or 0 with initial, got {starts}")
    if y.shape[-1] == 0:
        raise ValueError("there are no points to fit")
    if (w < 0).any() or not (w.sum(-1) > 0).all():
        raise ValueError("weights must not be negative, and not all zero")
    powered = {column for term in terms.terms for column in term.powers}
    for name in powered:
        if not (given[name] > 0).all():
            raise ValueError(f"column {name} must be positive: it is raised to a power")
    if objective.residual == "log" and not (y > 0).all():
        raise ValueError("target must be positive for residuals of logarithms")
    inputs = Inputs.of(terms, given, as_given=_held_alone(terms, fixed))
    logged = np.log(y) if objective.residual == "log" else y

    width = max(1, BLOCK // y.shape[-1])
    per_problem = (starts + (start.shape[1] if start is not None else 0)) if batch > 1 else 1
    block = max(1, width // max(1, per_problem))
    parts = []
    for first in range(0, batch, block):
        rows = np.arange(first, min(first + block, batch))
        problem = Problem(
            inputs.select(rows),
            y if len(y) == 1 else y[rows],
            logged if len(logged) == 1 else logged[rows],
            w if len(w) == 1 else w[rows],
            objective,
            fixed,
            len(rows),
        )
        own = (
            None
            if start is None
            else np.broadcast_to(start[rows] if len(start) > 1 else start, (len(rows), *start.shape[1:]))
        )
        # A start far from the data may overflow; its objective is infinite, and it is not chosen.
        with np.errstate(over="ignore", invalid="ignore"):
            parts.append(_solve(problem, starts, own))
        if progress is not None:
            progress(int(rows[-1]) + 1, batch)
    return Solution(*(np.concatenate([getattr(part, name) for part in parts]) for name in Solution.__slots__))


def _held_alone(terms: Terms, fixed: Mapping[str, float]) -> set[str]:
    """Columns of terms whose coefficient is given and whose exponent is not.

    Around other means the coefficient would change with the exponent, and could not be held.
    """
    return {
        column
        for term in terms.terms
        if term.coefficient in fixed and not all(exponent in fixed for exponent in term.powers.values())
        for column in term.powers
    }


def _solve(problem: Problem, starts: int, own: Array | None) -> Solution:
    terms = problem.inputs.terms
    candidates = grid_starts(problem, starts) if starts else np.zeros((problem.count, 0, len(terms.names)))
    if own is not None:
        count = own.shape[1]
        flat = own.reshape(-1, own.shape[-1])
        repeated = problem.inputs.select(np.repeat(np.arange(problem.count), count))
        candidates = np.concatenate([candidates, repeated.to_own(flat).reshape(own.shape)], 1)
    number = candidates.shape[1]
    which = np.repeat(np.arange(problem.count), number)
    spread = problem.select(which)
    found, value, converged = newton(spread, candidates.reshape(-1, candidates.shape[-1]))
    given = spread.inputs.to_given(found)
    for name, constant in problem.fixed.items():
        given[:, terms.names.index(name)] = constant
    shape = (problem.count, number)
    value, given, converged = value.reshape(shape), given.reshape(*shape, -1), converged.reshape(shape)
    order = np.argsort(value, axis=1, kind="stable")
    value = np.take_along_axis(value, order, 1)
    given = np.take_along_axis(given, order[..., None], 1)
    converged = np.take_along_axis(converged, order, 1)
    return Solution(given[:, 0], value[:, 0], converged[:, 0], given, value)
