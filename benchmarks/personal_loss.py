"""What resampling by personal loss costs: training steps against plain BPR, and drawing a batch against a loop.

Steps are those of ``Recommender.fit``, both ways taking turns in one process; the loop is the usual Python code for
the same triples (choose k of a user's items, reject negatives that were used).

    python benchmarks/personal_loss.py [--data ../shared/data/lastfm] [--backbone mf lightgcn] [--repeats 5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from lossmith.tasks.recommendation import Interactions, Recommender, TripleSource, synthetic_feedback
from lossmith.tasks.recommendation.reading import read_parts

WAYS = ("plain", "personal(pool_size=5, warmup_epochs=0)")


class Clock(TrainerCallback):
    """Processor time of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        now = time.process_time()
        if self._last:
            self.seconds.append(now - self._last)
        self._last = now


class Timed(Recommender):
    """A recommender whose training is timed."""

    def _train(self, objective: Any, steps_per_epoch: int, callbacks: list[Any]) -> int:
        self.clock = Clock()
        return super()._train(objective, steps_per_epoch, [*callbacks, self.clock])


def steps(table: Interactions, backbone: str, repeats: int, epochs: int) -> None:
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for repeat in range(repeats + 1):
        for way in WAYS if repeat % 2 else reversed(WAYS):
            recommender = Timed(backbone, denoise=way, epochs=epochs)
            recommender.fit(table)
            if repeat:  # the first is to warm up
                seconds[way].append(statistics.median(recommender.clock.seconds))
    plain, personal = (statistics.median(seconds[way]) for way in WAYS)
    ratios = [b / a for a, b in zip(seconds[WAYS[0]], seconds[WAYS[1]], strict=True)]
    print(
        f"{backbone}, step of 2048: plain {plain * 1e3:.2f} ms, personal {personal * 1e3:.2f} ms; "
        f"ratio {statistics.median(ratios):.2f} (of {repeats} pairs: {min(ratios):.2f} to {max(ratios):.2f})"
    )


def loop(table: Interactions, sets: list[set[int]], draw: np.random.Generator, batch: int, k: int) -> list[Any]:
    rows = []
    for _ in range(batch):
        user = int(draw.integers(len(table.users)))
        own = table.items_of(user)
        pool = draw.choice(own, k, replace=len(own) < k)
        negative = int(draw.integers(len(table.items)))
        while negative in sets[user]:
            negative = int(draw.integers(len(table.items)))
        rows.append((user, pool, negative))
    return rows


def draws(table: Interactions, repeats: int) -> None:
    source, generator = TripleSource(table), np.random.default_rng(0)
    sets = [set(table.items_of(u).tolist()) for u in range(len(table.users))]
    ours, loops = [], []
    for repeat in range(repeats + 1):
        started = time.process_time()
        source.draw(torch.arange(2048) + 2048 * repeat, 5)
        middle = time.process_time()
        loop(table, sets, generator, 2048, 5)
        ours.append(middle - started)
        loops.append(time.process_time() - middle)
    a, b = statistics.median(ours[1:]), statistics.median(loops[1:])
    print(f"drawing 2048 triples with pools of 5: {a * 1e3:.2f} ms, loop {b * 1e3:.1f} ms; {b / a:.0f} times faster")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="table; default: synthetic feedback of 2,000 users and 4,000 items")
    parser.add_argument("--backbone", nargs="+", default=["mf", "lightgcn"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = read_parts(options.data)[0] if options.data else synthetic_feedback(2000, 4000, per_user=30).train
    print(table.summary())
    draws(table, options.repeats * 4)
    for backbone in options.backbone:
        steps(table, backbone, options.repeats, options.epochs)


if __name__ == "__main__":
    main()
