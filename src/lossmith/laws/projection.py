"""Starts by variable projection: for fixed exponents a law is linear in its coefficients.

Golub and Pereyra 1973; here over a whole grid of exponents and a whole batch of problems, with coefficients that are
not negative.
"""

from __future__ import annotations

import numpy as np

from lossmith.laws.problem import Problem
from lossmith.laws.terms import Array

# Elements of the largest temporary: small enough to stay in the cache.
BLOCK = 1 << 16


def grid_starts(problem: Problem, starts: int) -> Array:
    """The best points of the grid of exponents: ``(count, starts, P)`` in the units of ``problem.inputs``."""
    terms = problem.inputs.terms
    number = len(terms.terms)
    grid = terms.grid(problem.fixed)
    points = problem.y.shape[-1]
    rounds = 4
    results, scores = [], []
    block = max(1, BLOCK // (points * problem.count))
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


def _linear_parts(problem: Problem, parameters: Array, basis: Array, rounds: int) -> Array:
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
        parameters[:, free] = nonnegative(gram, (weighted @ rest[..., None])[..., 0], signs)
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


def nonnegative(gram: Array, right: Array, bounded: np.ndarray) -> Array:
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
