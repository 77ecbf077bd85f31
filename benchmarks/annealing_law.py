"""The annealing law: time of S2 and of the fit next to their plain forms; and its errors on given curves.

    python benchmarks/annealing_law.py [--steps 24000] [--repeats 5] [--json]
    python benchmarks/annealing_law.py --curves FOLDER [--warmup 2160] [--card docs/systems/lr-annealing-law.md]

Time: all candidates in one process, one after another in every round; medians over the rounds, and the median over the
rounds of the ratio to ours within the same round. ``S2``: our filter, the recursion in a Python loop, and the double
sum as it is printed (a matrix of steps by steps, in blocks of rows). ``fit``: our engine, and the customary grid of 24
starts of ``scipy.optimize.minimize(method="L-BFGS-B")`` on the same objective, with analytic gradients and with finite
differences; the objectives reached are printed beside the times.

``--curves``: FOLDER holds one folder per model, with CSV files ``step, lr, loss``. The law is fitted to the shortest
runs whose names begin with ``constant`` and ``cosine``, and predicts all others.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.optimize import minimize

from lossmith.laws import LossCurve, LRAnnealing, areas, read_curves, schedule

DECAY = 0.999
DELTA = 1e-3


def looped(rates: np.ndarray) -> np.ndarray:
    momentum = total = 0.0
    before, out = float(rates[0]), []
    for rate in rates.tolist():
        momentum = DECAY * momentum + before - rate
        total += momentum
        before = rate
        out.append(total)
    return np.array(out)


def double_sum(rates: np.ndarray, rows: int = 500) -> np.ndarray:
    drops = -np.diff(rates, prepend=rates[:1])
    steps = np.arange(len(rates))
    powers = DECAY**steps
    inner = np.empty(len(rates))
    for first in range(0, len(rates), rows):
        ages = steps[first : first + rows, None] - steps
        inner[first : first + rows] = np.where(ages >= 0, powers[np.maximum(ages, 0)], 0.0) @ drops
    return inner.cumsum()


def plain_fit(first: np.ndarray, second: np.ndarray, loss: np.ndarray, *, gradient: bool) -> float:
    """The lowest objective of 24 starts; scaled as the usual implementations do, or L-BFGS stops early."""
    scale = np.abs(second).max()
    target, scaled = np.log(loss), second / scale

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray] | float:
        power = first ** -theta[3]
        value = np.maximum(theta[0] + theta[1] * power - theta[2] * scaled, 1e-6)
        r = np.log(value) - target
        size = np.abs(r)
        huber = np.where(size < DELTA, r * r / 2, DELTA * (size - DELTA / 2)).sum() / DELTA**2
        if not gradient:
            return float(huber)
        w = np.clip(r, -DELTA, DELTA) / value / DELTA**2
        slopes = [w.sum(), w @ power, -(w @ scaled), -theta[1] * (w @ (power * np.log(first)))]
        return float(huber), np.array(slopes)

    starts = itertools.product((0.7, 0.95), (0.3, 1.0), (0.05, 0.3), (0.3, 0.6, 1.0))
    options = {"maxiter": 100_000, "maxfun": 1_000_000, "ftol": 1e-12}
    best = np.inf
    for share, a, c, alpha in starts:
        start = [share * loss.min(), a, c * scale, alpha]
        found = minimize(objective, start, jac=gradient, method="L-BFGS-B", bounds=[(0, None)] * 4, options=options)
        best = min(best, float(found.fun))
    return best * DELTA**2


def timed(candidates: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds, and the median ratio to the first candidate within a round."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(repeats):
        for name, candidate in candidates.items():
            started = time.perf_counter()
            candidate()
            seconds[name].append(time.perf_counter() - started)
    ours = seconds[next(iter(candidates))]
    return {
        name: {
            "seconds": statistics.median(values),
            "ratio": statistics.median(v / own for v, own in zip(values, ours, strict=True)),
        }
        for name, values in seconds.items()
    }


def speed(steps: int, repeats: int) -> dict[str, dict[str, dict[str, float]]]:
    rates = schedule("cosine(peak=3e-4, floor=3e-5)").values(steps)
    expected = areas(rates, DECAY)[1]
    for other in (looped(rates), double_sum(rates)):
        assert np.abs(other - expected).max() < 1e-9 * expected.max()
    results = {
        "S2": timed(
            {
                "ours": lambda: areas(rates, DECAY),
                "recursion in Python": lambda: looped(rates),
                "double sum": lambda: double_sum(rates),
            },
            repeats,
        )
    }
    law, curves = LRAnnealing(decay=DECAY), []
    at = np.arange(steps // 12, steps + 1, max(1, steps // 190))
    for k, text in enumerate(("constant(peak=3e-4)", "cosine(peak=3e-4, floor=3e-5)")):
        own = schedule(text).values(steps)
        first, second = areas(own, DECAY)
        noise = np.exp(0.002 * np.random.default_rng(k).standard_normal(len(at)))
        curves.append(LossCurve.of(text, at, (2.9 + 0.59 * first**-0.76 - 0.47 * second)[at - 1] * noise, own))
    table = law.tabulate(curves)
    columns = [table.columns[name] for name in ("area", "annealing", "loss")]
    fits: dict[str, Callable[[], float]] = {
        "ours": lambda: law.fit(table, bootstrap=0).objective,
        "24 starts, analytic": lambda: plain_fit(*columns, gradient=True),
        "24 starts, differences": lambda: plain_fit(*columns, gradient=False),
    }
    results["fit"] = timed(fits, repeats)
    for name, candidate in fits.items():
        results["fit"][name]["objective"] = candidate()
    return results


def judged(folder: Path, warmup: int = 0) -> str:
    """A Markdown table of the errors on the runs that were not fitted."""
    law = LRAnnealing(decay=DECAY, warmup="actual" if warmup else "constant")
    models = sorted((p for p in folder.iterdir() if p.is_dir()), key=lambda p: float(p.name.rstrip("MB") or 0))
    lines = ["| model | run | mean error | worst point | at the end | R² |", "|---|---|---:|---:|---:|---:|"]
    for model in models:
        curves = {curve.name: _begun(curve, warmup) for curve in read_curves(model)}
        fitting = [
            min((c for c in curves.values() if c.name.startswith(kind)), key=lambda c: c.steps[-1])
            for kind in ("constant", "cosine")
        ]
        fitted = law.fit(fitting, bootstrap=0)
        rows = []
        for curve in curves.values():
            predicted = fitted.predict(schedule=curve.rates, at=curve.steps)
            relative = 100 * (predicted / curve.losses - 1)
            r2 = 1 - ((predicted - curve.losses) ** 2).sum() / ((curve.losses - curve.losses.mean()) ** 2).sum()
            seen = any(curve is other for other in fitting)
            rows.append((seen, curve.name, np.abs(relative).mean(), np.abs(relative).max(), relative[-1], r2))
        for seen, name, mean, worst, end, r2 in sorted(rows, key=lambda row: (not row[0], row[1])):
            note = " (fitted)" if seen else ""
            lines.append(f"| {model.name} | `{name}`{note} | {mean:.3f}% | {worst:.2f}% | {end:+.2f}% | {r2:.4f} |")
        unseen = [row for row in rows if not row[0]]
        decaying = [row[2] for row in unseen if row[1].startswith("wsd")]
        lines.append(
            f"| {model.name} | mean of the {len(unseen)} not fitted | {np.mean([r[2] for r in unseen]):.3f}% | | | |"
        )
        if decaying:
            lines.append(f"| {model.name} | mean of the {len(decaying)} `wsd` runs | {np.mean(decaying):.3f}% | | | |")
    return "\n".join(lines)


def _begun(curve: LossCurve, warmup: int) -> LossCurve:
    """The curve with the linear warm-up that its log leaves out."""
    rates = curve.rates.copy()
    rates[:warmup] = rates[warmup] * np.arange(warmup) / max(warmup, 1)
    return dataclasses.replace(curve, rates=rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--curves", type=Path)
    parser.add_argument("--warmup", type=int, default=0, help="steps of a linear warm-up that the curves do not log")
    parser.add_argument("--card", type=Path, help="page whose block 'measured:begin by-schedule' takes the table")
    given = parser.parse_args()
    if given.curves is not None:
        text = judged(given.curves)
        if given.warmup:
            text += f'\n\nWith the warm-up of {given.warmup} steps as it was (`warmup="actual"`):\n\n'
            text += judged(given.curves, given.warmup)
        print(text)
        if given.card is not None:
            from lossmith.reporting.card import write_measured

            heading = (
                f"Written by `python benchmarks/annealing_law.py --curves {given.curves.name} --card {given.card}`."
            )
            write_measured(given.card, f"{heading}\n\n{text}", "by-schedule")
        return
    results = speed(given.steps, given.repeats)
    if given.json:
        print(json.dumps(results, indent=2))
        return
    for what, rows in results.items():
        print(f"\n{what}, {given.steps} steps, median of {given.repeats} interleaved rounds")
        for name, row in rows.items():
            objective = f"   objective {row['objective']:.9g}" if "objective" in row else ""
            print(f"  {name:24} {1e3 * row['seconds']:10.2f} ms   {row['ratio']:9.1f} x ours{objective}")


if __name__ == "__main__":
    main()
