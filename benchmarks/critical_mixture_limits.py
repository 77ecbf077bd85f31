"""How often do limits of the critical mixture ratio hold the truth? Simulated logs with known curves.

One run per share, so that limits come from blocks of neighbouring residuals. Errors of neighbouring evaluations are
correlated as ``--correlation`` says: a single run cannot show how far its loss wanders, and limits are the less to be
believed the more it does.

    python benchmarks/critical_mixture_limits.py --logs 60
"""

from __future__ import annotations

import argparse

import numpy as np

from lossmith.laws import CriticalMixture

SHARES, BUDGET = (1 / 8, 1 / 4, 1 / 3, 1 / 2), 100.0
# With dL_gen = 0.04 R^2 T^0.5 - 0.0008 T^0.9: the trend 0.18973666 T^0.2, and where dL_gen reaches 0.05.
TREND, TOLERANCE = 0.47659694, 0.50119005


def simulated(rng: np.random.Generator, evaluations: int, noise: float, correlation: float) -> dict[str, np.ndarray]:
    """A log with noise of standard deviation ``noise`` nats."""
    ratio, t = np.meshgrid(SHARES, np.linspace(BUDGET / evaluations, BUDGET, evaluations), indexing="ij")
    errors = rng.standard_normal((2, *ratio.shape))
    for k in range(1, evaluations):
        errors[..., k] = correlation * errors[..., k - 1] + np.sqrt(1 - correlation**2) * errors[..., k]
    general = 2 + 0.04 * ratio**2 * t**0.5 - 0.0008 * t**0.9 + noise * errors[0]
    domain = 2 + 0.2 * (t**-0.1 - 1.3) * ratio**0.2 + noise * errors[1]
    columns = {"ratio": ratio, "tokens": t, "general_loss": general, "domain_loss": domain}
    return {name: values.ravel() for name, values in columns.items()}


def main() -> None:
    """Print one row per correlation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", type=int, default=60)
    parser.add_argument("--evaluations", type=int, default=20)
    parser.add_argument("--noise", type=float, default=0.003, help="nats")
    parser.add_argument("--correlation", type=float, nargs="+", default=[0.0, 0.6])
    parser.add_argument("--bootstrap", type=int, default=60)
    parser.add_argument("--level", type=float, default=0.9)
    given = parser.parse_args()
    law = CriticalMixture(base_general=2.0, base_domain=2.0)
    print(f"{given.logs} logs, {100 * given.level:g}% limits, noise {given.noise:g} nats")
    heads = {"correlation": 12, "ratio held": 12, "trend held": 12, "tolerance held": 16, "mean width": 12, "sd": 13}
    print("".join(f"{head:>{width}}" for head, width in heads.items()))
    for correlation in given.correlation:
        held, widths, ratios = np.zeros(3), [], []
        for seed in range(given.logs):
            log = simulated(np.random.default_rng(seed), given.evaluations, given.noise, correlation)
            found = law.fit(log, bootstrap=given.bootstrap, seed=seed).plan(level=given.level)
            truths = (min(TREND, TOLERANCE), TREND, TOLERANCE)
            limits = (found.limits, found.trend_limits, found.tolerance_limits)
            held += [low <= truth <= high for (low, high), truth in zip(limits, truths, strict=True)]
            widths.append(found.limits[1] - found.limits[0])
            ratios.append(found.ratio)
        shares = "".join(f"{value:{width}.2f}" for value, width in zip(held / given.logs, (12, 12, 16), strict=True))
        print(f"{correlation:12.2f}{shares}{np.mean(widths):12.3f}{np.std(ratios):13.3f}", flush=True)


if __name__ == "__main__":
    main()
