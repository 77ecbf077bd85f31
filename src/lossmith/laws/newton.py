"""Newton's method for a batch of robust, bounded fits, with the exact Hessian."""

from __future__ import annotations

import numpy as np

from lossmith.laws.problem import Problem
from lossmith.laws.terms import Array


def newton(problem: Problem, parameters: Array, *, iterations: int = 150) -> tuple[Array, Array, np.ndarray]:
    """Minimise from every row of ``parameters``; returns parameters, objectives, and what converged."""
    final = problem.objective.delta
    terms = problem.inputs.terms
    number = len(terms.terms)
    lower, upper = terms.lower, terms.upper
    held = np.array([name in problem.fixed for name in terms.names])
    parameters = np.clip(parameters, lower, upper)
    count = len(parameters)
    result, best = parameters.copy(), np.full(count, np.inf)
    converged = np.zeros(count, dtype=bool)
    start = np.abs(problem.objective.residuals(problem.inputs.value(parameters), problem.target))
    # NaN where the law was not positive: begin wide.
    typical = np.nan_to_num(np.median(start, -1), nan=1.0)
    delta = np.maximum(final, 3 * typical) if np.isfinite(final) else np.full(count, np.inf)
    damping = np.full(count, 1e-3)
    # Residuals of 1e-10: without noise, what is left is rounding, of which Newton cannot predict anything.
    reference = np.ones((1, 1)) if problem.objective.residual == "log" else problem.y**2
    exact = np.broadcast_to(1e-20 * (problem.weights * reference).sum(-1), count)
    stage = np.zeros(count, dtype=int)
    alive = np.arange(count)
    current = problem
    p, d, lam, age = parameters.copy(), delta, damping, stage
    value = current.total(p, d)
    p, value = _rescue(current, p, value, d, number)
    for _ in range(iterations):
        gradient, hessian, size = derivatives(current, p, d)
        at_lower = (p <= lower) & (gradient > 0)
        at_upper = (p >= upper) & (gradient < 0)
        free = ~(at_lower | at_upper | held)
        step, gain, left = _step(gradient, hessian, size, free, lam)
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
            converged[rows] = (left[done] <= 1e-8 * scale[done]) | (scale[done] <= exact[rows])
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


def _rescue(problem: Problem, p: Array, value: Array, delta: Array, number: int) -> tuple[Array, Array]:
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


def derivatives(problem: Problem, p: Array, delta: Array) -> tuple[Array, Array, Array]:
    """Gradient ``(B, P)``, Hessian ``(B, P, P)`` and positive sizes ``(B, P)`` of the parameters."""
    inputs, objective = problem.inputs, problem.objective
    basis = inputs.basis(p)
    f = np.broadcast_to(inputs.value(p, basis), (len(p), problem.y.shape[-1]))
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


def _step(gradient: Array, hessian: Array, size: Array, free: np.ndarray, damping: Array) -> tuple[Array, Array, Array]:
    """The damped Newton step in the free parameters, what it is predicted to gain, and what a full step would."""
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
    left = (along * along / (np.abs(values) + 1e-10)).sum(-1)
    step = (vectors @ move[..., None])[..., 0]
    return np.where(free, step / size, 0.0), gain, left
