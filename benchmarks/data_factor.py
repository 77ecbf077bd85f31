"""How many times as much random data a selection is worth, from a finished run of the study color-filter.

    lossmith study color-filter --out runs/color-filter
    python benchmarks/data_factor.py runs/color-filter

The random arms of 1, 2, 4 and 8 times the size give, seed by seed, a curve of the loss by the logarithm of the data.
Where a selection's loss of the same seed lies on it is its factor; outside of what was measured it is named as a bound.
Printed: the geometric mean over seeds with its 95% interval, which takes bounds at their value.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np

from lossmith.reporting import comparison_from_json
from lossmith.reporting.statistics import paired_interval


def factor(loss: float, curve: dict[int, float]) -> float:
    """Times the data at which the curve (made monotone) has the loss; its ends where it lies beyond them."""
    times = sorted(curve)
    falling = np.minimum.accumulate([curve[t] for t in times])
    # np.interp wants what rises, and holds the ends.
    return float(np.exp(np.interp(-loss, -falling, np.log(times))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the finished study")
    comparison = comparison_from_json((parser.parse_args().run / "comparison.json").read_text())
    losses = {(run.arm, run.seed): run.metrics["target/loss"] for run in comparison.runs if run.error is None}
    seeds = sorted({seed for _, seed in losses})
    arms = dict.fromkeys(arm for arm, _ in losses)
    random = {int(arm.removeprefix("random").strip("-x") or 1): arm for arm in arms if arm.startswith("random")}
    for arm in [arm for arm in arms if arm not in random.values()]:
        found = [factor(losses[arm, s], {t: losses[name, s] for t, name in random.items()}) for s in seeds]
        interval = paired_interval(np.log(found).tolist())
        low, middle, high = (math.exp(x) for x in (interval.low, np.mean(np.log(found)), interval.high))
        bounds = sum(f in (min(random), max(random)) for f in found)
        print(
            f"{arm:18s} {middle:5.2f} times the data  [{low:.2f}, {high:.2f}]  {len(seeds)} seeds, {bounds} at a bound"
        )


if __name__ == "__main__":
    main()
