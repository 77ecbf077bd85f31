"""Fitting the Chinchilla law: lossmith next to the customary grid of 4,500 L-BFGS-B starts.

    python benchmarks/scaling_law_fit.py [points.csv --params "Model Size" --flops "Training FLOP" --skip 5]
    python benchmarks/scaling_law_fit.py --laws 1000 --bootstrap 200 --jobs 4      # many laws

The peer is what published notebooks do (Hoffmann et al. 2022, D.2; Besiroglu et al. 2024): ``scipy.optimize.minimize``,
L-BFGS-B, from 5 x 5 x 5 x 6 x 6 starts of (alpha, beta, e, a, b), Huber loss of 1e-3 on log residuals through
logsumexp. It is given the exact gradient here, which most notebooks leave to finite differences (``--numeric``: what
that costs). All starts run, in rounds; after each round lossmith fits once, all in one process. Reported: both minima,
the time of the whole grid over the median time of a lossmith fit, and the time of bootstrap refits.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time

import numpy as np
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax

from lossmith.laws import Chinchilla, Reading, Table, fit_many

EXPONENTS, LEVELS, LOGARITHMS = np.arange(0, 2.5, 0.5), np.arange(-1, 1.5, 0.5), np.arange(0, 30, 5)
GRID = list(itertools.product(EXPONENTS, EXPONENTS, LEVELS, LOGARITHMS, LOGARITHMS))
DELTA = 1e-3


def synthetic(points: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    n, d = np.exp(rng.uniform(np.log([4e7, 1e9]), np.log([1e10, 3e11]), (points, 2)).T)
    loss = (1.82 + 482 * n**-0.35 + 2085 * d**-0.37) * np.exp(0.005 * rng.standard_t(4, points))
    return {"params": n, "tokens": d, "loss": loss}


def peer(table: Table, start: tuple[float, ...], numeric: bool) -> float:
    n, d, y = (np.log(table.columns[name]) for name in ("params", "tokens", "loss"))

    def value(p: np.ndarray) -> float:
        alpha, beta, e, a, b = p
        residual = np.abs(logsumexp([a - alpha * n, b - beta * d, np.full_like(n, e)], axis=0) - y)
        return float(np.where(residual <= DELTA, residual**2 / 2, DELTA * (residual - DELTA / 2)).sum())

    def both(p: np.ndarray) -> tuple[float, np.ndarray]:
        alpha, beta, e, a, b = p
        parts = np.stack([a - alpha * n, b - beta * d, np.full_like(n, e)])
        residual = logsumexp(parts, axis=0) - y
        share = softmax(parts, axis=0)
        psi = np.clip(residual, -DELTA, DELTA)
        size = np.abs(residual)
        total = np.where(size <= DELTA, residual**2 / 2, DELTA * (size - DELTA / 2)).sum()
        slopes = [-share[0] * n, -share[1] * d, share[2], share[0], share[1]]
        return float(total), np.array([(psi * slope).sum() for slope in slopes])

    found = minimize(value if numeric else both, np.array(start, dtype=float), jac=not numeric, method="L-BFGS-B")
    return float(found.fun)


def grid(table: Table, numeric: bool, starts: int, rounds: int) -> None:
    law = Chinchilla()
    order = np.random.default_rng(0).permutation(len(GRID))[:starts]
    theirs, ours, best = 0.0, [], np.inf
    law.fit(table, bootstrap=0)
    for part in np.array_split(order, rounds):
        began = time.perf_counter()
        best = min(best, *(peer(table, GRID[i], numeric) for i in part))
        theirs += time.perf_counter() - began
        began = time.perf_counter()
        fitted = law.fit(table, bootstrap=0)
        ours.append(time.perf_counter() - began)
    began = time.perf_counter()
    law.fit(table, bootstrap=1000, calibrated=False)
    refits = time.perf_counter() - began
    result = {
        "points": len(table),
        "starts of the peer": len(order),
        "peer's objective": best,
        "our objective": fitted.objective,
        "ours is at least as low": fitted.objective <= best * (1 + 1e-9),
        "peer seconds": round(theirs, 2),
        "our seconds (median)": round(statistics.median(ours), 4),
        "ratio": round(theirs / statistics.median(ours), 1),
        "1000 bootstrap refits, seconds": round(refits, 2),
        "parameters": fitted.parameters,
    }
    print(json.dumps(result, indent=2))


def many(laws: int, points: int, bootstrap: int, jobs: int) -> None:
    tables = [synthetic(points, seed) for seed in range(laws)]
    began = time.perf_counter()
    fit_many(Chinchilla(), tables, bootstrap=0)
    minima = time.perf_counter() - began
    began = time.perf_counter()
    found = fit_many(Chinchilla(), tables, bootstrap=bootstrap, calibrated=False, jobs=jobs)
    plain = time.perf_counter() - began
    result = {
        "laws": laws,
        "points of each": points,
        "processes": jobs,
        "minima of all in one call, seconds": round(minima, 1),
        f"with {bootstrap} bootstrap refits of each, seconds": round(plain, 1),
        "median alpha (truth 0.35)": statistics.median(fitted.parameters["alpha"] for fitted in found),
    }
    print(json.dumps(result, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", help="CSV of measurements; without it, 245 synthetic points")
    parser.add_argument("--params", default="params")
    parser.add_argument("--tokens", default="tokens")
    parser.add_argument("--flops", default="flops")
    parser.add_argument("--loss", default="loss")
    parser.add_argument("--skip", type=int, default=0, help="first rows to leave out")
    parser.add_argument("--starts", type=int, default=len(GRID))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--numeric", action="store_true", help="finite-difference gradients for the peer")
    parser.add_argument("--laws", type=int, default=0)
    parser.add_argument("--points", type=int, default=60, help="points of each of many laws")
    parser.add_argument("--bootstrap", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=4)
    options = parser.parse_args()
    if options.laws:
        many(options.laws, options.points, options.bootstrap, options.jobs)
        return
    source: object = synthetic(245)
    headers = {"params": options.params, "tokens": options.tokens, "flops": options.flops, "loss": options.loss}
    if options.table:
        import pandas as pd

        source = pd.read_csv(options.table).iloc[options.skip :]
        headers = {name: header for name, header in headers.items() if header in source.columns}
    grid(Chinchilla().read(source, Reading(columns=headers)), options.numeric, options.starts, options.rounds)


if __name__ == "__main__":
    main()
