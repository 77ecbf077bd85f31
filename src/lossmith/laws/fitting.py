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
from typing import Literal

import numpy as np

from lossmith.laws.terms import Array, Inputs, Terms

# Elements of the largest temporary: small enough to stay in the cache.
_BLOCK = 1 << 16


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
class Solution:
    """Minima: one row per problem.

    Attributes:
        parameters: ``(B, P)`` in the units of the table.
        objective: ``(B,)``.
        converged: whether Newton's own prediction of what is left to gain is below 1e-10 of the objective.
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
    inputs = Inputs.of(terms, given)
    logged = np.log(y) if objective.residual == "log" else y

    width = max(1, _BLOCK // y.shape[-1])
    per_problem = (starts + (start.shape[1] if start is not None else 0)) if batch > 1 else 1
    block = max(1, width // max(1, per_problem))
    parts = []
    for first in range(0, batch, block):
        rows = np.arange(first, min(first + block, batch))
        problem = _Problem(
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
        parts.append(_solve(problem, starts, own))
        if progress is not None:
            progress(int(rows[-1]) + 1, batch)
    return Solution(*(np.concatenate([getattr(part, name) for part in parts]) for name in Solution.__slots__))


@dataclass(frozen=True, slots=True)
class _Problem:
    """Some rows of the batch, in the units of ``inputs``."""

    inputs: Inputs
    y: Array
    target: Array
    weights: Array
    objective: Objective
    fixed: Mapping[str, float]
    count: int

    def select(self, rows: np.ndarray) -> _Problem:
        def pick(array: Array) -> Array:
            return array if len(array) == 1 else array[rows]

        return _Problem(
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
            value = (self.weights * _huber(residual, delta[:, None])).sum(-1)
        return np.where(np.isfinite(value), value, np.inf)


def _huber(residual: Array, delta: Array) -> Array:
    # x^2/2 + delta*(|r| - x) with x = min(|r|, delta) is both branches at once; delta may be infinite.
    size = np.abs(residual)
    inner = np.minimum(size, delta)
    rest = size - inner
    return 0.5 * inner * inner + np.where(rest > 0, delta, 0.0) * rest


def _solve(problem: _Problem, starts: int, own: Array | None) -> Solution:
    terms = problem.inputs.terms
    candidates = _grid_starts(problem, starts) if starts else np.zeros((problem.count, 0, len(terms.names)))
    if own is not None:
        count = own.shape[1]
        flat = own.reshape(-1, own.shape[-1])
        repeated = problem.inputs.select(np.repeat(np.arange(problem.count), count))
        candidates = np.concatenate([candidates, repeated.to_own(flat).reshape(own.shape)], 1)
    number = candidates.shape[1]
    which = np.repeat(np.arange(problem.count), number)
    spread = problem.select(which)
    found, value, converged = _newton(spread, candidates.reshape(-1, candidates.shape[-1]))
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


def _grid_starts(problem: _Problem, starts: int) -> Array:
    """The best points of the grid of exponents: ``(count, starts, P)`` in the units of ``problem.inputs``."""
    terms = problem.inputs.terms
    number = len(terms.terms)
    grid = terms.grid(problem.fixed)
    points = problem.y.shape[-1]
    rounds = 4
    results, scores = [], []
    block = max(1, _BLOCK // (points * problem.count))
    everyone = np.arange(problem.count)
    for first in range(0, len(grid), block):
        exponents = grid[first : first + block]
        # Rows: problem by problem, grid point by grid point.
        spread = problem.select(np.repeat(everyone, len(exponents)))
        parameters = np.zeros((spread.count, len(terms.names)))
        parameters[:, number:] = np.tile(exponents, (problem.count, 1))
        for name in problem.fixed:
            position = terms.names.index(name)
            if position < number:
                whole = np.zeros_like(parameters)
                whole[:, number:] = parameters[:, number:]
                whole[:, position] = problem.fixed[name]
                parameters[:, position] = spread.inputs.to_own(whole)[:, position]
        basis = np.stack([np.broadcast_to(b, (spread.count, points)) for b in spread.inputs.basis(parameters)], 1)
        parameters = _linear_parts(spread, parameters, basis, rounds)
        delta = np.full(spread.count, spread.objective.delta)
        results.append(parameters.reshape(problem.count, len(exponents), -1))
        scores.append(spread.total(parameters, delta).reshape(problem.count, -1))
    every = np.concatenate(results, 1)
    order = np.argsort(np.concatenate(scores, 1), axis=1, kind="stable")[:, :starts]
    return np.take_along_axis(every, order[..., None], 1)


def _linear_parts(problem: _Problem, parameters: Array, basis: Array, rounds: int) -> Array:
    """Coefficients for given exponents: bounded least squares, reweighted towards the objective."""
    terms = problem.inputs.terms.terms
    objective = problem.objective
    names = [term.coefficient for term in terms]
    free = [k for k, name in enumerate(names) if name not in problem.fixed]
    held = [k for k in range(len(terms)) if k not in free]
    if not free:
        return parameters
    rest = np.broadcast_to(problem.y, (problem.count, problem.y.shape[-1]))
    for k in held:
        rest = rest - parameters[:, k, None] * basis[:, k]
    # ln f - ln y is (f - y)/y to first order.
    plain = problem.weights / problem.y**2 if objective.residual == "log" else problem.weights
    weights = np.broadcast_to(plain, rest.shape)
    signs = np.array([terms[k].lower == 0 for k in free])
    # Least squares has nothing to reweight.
    for turn in range(rounds if np.isfinite(objective.delta) or objective.residual == "log" else 1):
        part = basis[:, free]
        weighted = part * weights[:, None]
        gram = weighted @ part.transpose(0, 2, 1)
        parameters[:, free] = _nonnegative(gram, (weighted @ rest[..., None])[..., 0], signs)
        if turn + 1 == rounds:
            break
        value = (parameters[:, : len(terms), None] * basis).sum(1)
        if objective.residual == "log":
            value = np.maximum(value, 1e-3 * problem.y)
        residual = objective.residuals(value, problem.target)
        # Soften: residuals far below the typical one would otherwise take all the weight.
        typical = np.median(np.abs(residual), -1, keepdims=True)
        weights = plain / np.maximum(np.abs(residual), np.maximum(min(objective.delta, 1e300), 0.1 * typical))
    return parameters


def _nonnegative(gram: Array, right: Array, bounded: np.ndarray) -> Array:
    """Least squares from normal equations ``(B, K, K)``, ``(B, K)`` with ``bounded`` unknowns not negative."""
    size = np.sqrt(np.maximum(np.einsum("bkk->bk", gram), 1e-300))
    scaled = gram / (size[:, :, None] * size[:, None, :])
    count = scaled.shape[-1]
    scaled = scaled + 1e-12 * np.eye(count)
    target = right / size
    result = np.linalg.solve(scaled, target[..., None])[..., 0]
    for _ in range(200):
        wrong = np.flatnonzero(((result < 0) & bounded).any(-1))
        if not len(wrong):
            break
        if count <= 4:
            result[wrong] = _best_subset(scaled[wrong], target[wrong], bounded)
        else:
            result[wrong] = _coordinate_descent(scaled[wrong], target[wrong], bounded)
        break
    return result / size


def _best_subset(gram: Array, right: Array, bounded: np.ndarray) -> Array:
    """The exact solution for few unknowns: of all sets of zeros the feasible one with the lowest value."""
    count = gram.shape[-1]
    best = np.zeros_like(right)
    lowest = np.full(len(right), np.inf)
    for mask in range(1, 1 << count):
        kept = [k for k in range(count) if mask >> k & 1 or not bounded[k]]
        solution = np.linalg.solve(gram[:, kept][:, :, kept], right[:, kept, None])[..., 0]
        feasible = ((solution >= 0) | ~bounded[kept]).all(-1)
        value = np.where(feasible, -0.5 * (solution * right[:, kept]).sum(-1), np.inf)
        better = value < lowest
        lowest = np.where(better, value, lowest)
        full = np.zeros_like(right)
        full[:, kept] = solution
        best[better] = full[better]
    return best


def _coordinate_descent(gram: Array, right: Array, bounded: np.ndarray) -> Array:
    solution = np.zeros_like(right)
    for _ in range(200):
        for k in range(right.shape[-1]):
            step = right[:, k] - (gram[:, k] * solution).sum(-1) + gram[:, k, k] * solution[:, k]
            solution[:, k] = np.maximum(step / gram[:, k, k], 0.0) if bounded[k] else step / gram[:, k, k]
    return solution


def _newton(problem: _Problem, parameters: Array, *, iterations: int = 150) -> tuple[Array, Array, np.ndarray]:
    """Minimise from every row of ``parameters``; returns parameters, objectives, and what converged."""
    final = problem.objective.delta
    terms = problem.inputs.terms
    number = len(terms.terms)
    lower, upper = terms.lower, terms.upper
    held = np.array([name in problem.fixed for name in terms.names])
    # A fixed coefficient of the table's units changes with the exponents in ours; it is held only with them.
    moving = [
        k for k, term in enumerate(terms.terms) if held[k] and not all(n in problem.fixed for n in term.powers.values())
    ]
    if moving:
        raise ValueError(
            f"'{terms.names[moving[0]]}' can only be fixed together with the exponents of its term: "
            f"{', '.join(terms.terms[moving[0]].powers.values())}"
        )
    parameters = np.clip(parameters, lower, upper)
    count = len(parameters)
    result, best = parameters.copy(), np.full(count, np.inf)
    converged = np.zeros(count, dtype=bool)
    start = np.abs(problem.objective.residuals(problem.inputs.value(parameters), problem.target))
    # NaN where the law was not positive: begin wide.
    typical = np.nan_to_num(np.median(start, -1), nan=1.0)
    delta = np.maximum(final, 3 * typical) if np.isfinite(final) else np.full(count, np.inf)
    damping = np.full(count, 1e-3)
    stage = np.zeros(count, dtype=int)
    alive = np.arange(count)
    current = problem
    p, d, lam, age = parameters.copy(), delta, damping, stage
    value = current.total(p, d)
    p, value = _rescue(current, p, value, d, number)
    for _ in range(iterations):
        gradient, hessian, size = _derivatives(current, p, d)
        at_lower = (p <= lower) & (gradient > 0)
        at_upper = (p >= upper) & (gradient < 0)
        free = ~(at_lower | at_upper | held)
        step, gain = _step(gradient, hessian, size, free, lam)
        trial = np.clip(p + step, lower, upper)
        tried = current.total(trial, d)
        better = tried < value
        drop = np.where(better, value - tried, 0.0)
        p = np.where(better[:, None], trial, p)
        scale = np.maximum(value, 1e-300)
        value = np.where(better, tried, value)
        lam = np.clip(np.where(better, lam * 0.1, lam * 8), 1e-14, 1e12)
        age = age + 1
        flat = (gain <= 1e-15 * scale) | (lam >= 1e11) | (scale < 1e-31)
        last = d <= final
        # Earlier stages need only come near.
        advance = ~last & ((drop < 0.02 * scale) & better | flat | (age >= 6))
        if advance.any():
            d = np.where(advance, np.maximum(final, d / 4), d)
            age, lam = np.where(advance, 0, age), np.where(advance, 1e-3, lam)
            value = np.where(advance, current.total(p, d), value)
        done = last & flat
        if done.any():
            rows = alive[done]
            result[rows], best[rows] = p[done], value[done]
            converged[rows] = (gain[done] <= 1e-10 * scale[done]) | (scale[done] < 1e-31)
            keep = ~done
            alive, p, value, d, lam, age = alive[keep], p[keep], value[keep], d[keep], lam[keep], age[keep]
            if not len(alive):
                break
            current = problem.select(alive)
    else:
        result[alive] = p
        best[alive] = current.total(p, np.full(len(p), final))
        converged[alive] = False
    return result, best, converged


def _rescue(problem: _Problem, p: Array, value: Array, delta: Array, number: int) -> tuple[Array, Array]:
    """Where the law is not positive at a start, its lowering terms are taken back."""
    signs = np.array([term.sign for term in problem.inputs.terms.terms])
    for _ in range(40):
        bad = ~np.isfinite(value)
        if not bad.any():
            break
        p[:, :number] = np.where(bad[:, None] & (signs < 0), 0.5 * p[:, :number], p[:, :number])
        p[:, :number] = np.where(
            bad[:, None] & (signs > 0), p[:, :number] + 1e-3 * np.abs(problem.y).mean(), p[:, :number]
        )
        value = problem.total(p, delta)
    return p, value


def _derivatives(problem: _Problem, p: Array, delta: Array) -> tuple[Array, Array, Array]:
    """Gradient ``(B, P)``, Hessian ``(B, P, P)`` and positive sizes ``(B, P)`` of the parameters."""
    inputs, objective = problem.inputs, problem.objective
    basis = inputs.basis(p)
    f = inputs.value(p, basis)
    residual = objective.residuals(f, problem.target)
    jacobian = inputs.jacobian(p, basis, f.shape[-1])
    limit = delta[:, None]
    psi = problem.weights * np.clip(residual, -limit, limit)
    inside = problem.weights * (np.abs(residual) <= limit)
    robust = problem.weights * np.minimum(1.0, limit / np.maximum(np.abs(residual), 1e-300))
    if objective.residual == "log":
        inverse = 1 / f
        slope, square = psi * inverse, inverse * inverse
        inner, robust = (inside - psi) * square, robust * square
    else:
        slope, inner = psi, inside
    gradient = (jacobian @ slope[..., None])[..., 0]
    hessian = (jacobian * np.broadcast_to(inner, f.shape)[:, None]) @ jacobian.transpose(0, 2, 1)
    hessian += inputs.curvature(p, basis, slope)
    size = np.sqrt((jacobian * jacobian * np.broadcast_to(robust, f.shape)[:, None]).sum(-1))
    return gradient, hessian, np.maximum(size, 1e-12 * size.max(-1, keepdims=True) + 1e-300)


def _step(gradient: Array, hessian: Array, size: Array, free: np.ndarray, damping: Array) -> tuple[Array, Array]:
    """The damped Newton step in the free parameters, and what it is predicted to gain."""
    g = np.where(free, gradient / size, 0.0)
    h = hessian / (size[:, :, None] * size[:, None, :])
    both = free[:, :, None] & free[:, None, :]
    h = np.where(both, h, 0.0)
    values, vectors = np.linalg.eigh(h)
    along = (vectors.transpose(0, 2, 1) @ g[..., None])[..., 0]
    # Directions of negative curvature are descended, not climbed.
    stiff = np.abs(values) + damping[:, None]
    move = -along / stiff
    gain = (along * along / stiff).sum(-1)
    step = (vectors @ move[..., None])[..., 0]
    return np.where(free, step / size, 0.0), gain
