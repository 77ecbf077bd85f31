"""Synthetic comparisons for the tests of the reports."""

from __future__ import annotations

import numpy as np

from lossmith.reporting.comparison import Claim, Comparison, Cost, Curve, Run


def curves(rng: np.random.Generator, offset: float, points: int = 60) -> tuple[Curve, Curve]:
    steps = np.arange(1, points + 1)
    loss = 2.0 + offset + 4.0 / steps**0.7
    noisy = loss + rng.normal(0, 0.08, points)
    tokens, seconds = steps * 4096, steps * 0.21 * rng.uniform(0.95, 1.05)
    train = Curve(*(tuple(x.tolist()) for x in (steps, tokens, seconds, noisy)))
    every = slice(5, None, 6)
    smooth = loss[every] + rng.normal(0, 0.004, len(loss[every]))
    evaluation = Curve(*(tuple(x.tolist()) for x in (steps[every], tokens[every], seconds[every], smooth)))
    return train, evaluation


def comparison(
    arms: tuple[str, ...] = ("baseline", "reweighted", "z-loss", "focal"),
    offsets: tuple[float, ...] = (0.0, -0.05, 0.002, 0.08),
    seeds: int = 3,
    **changes: object,
) -> Comparison:
    runs = []
    for index, arm in enumerate(arms):
        offset = offsets[index % len(offsets)]
        for seed in range(seeds):
            rng = np.random.default_rng([seed, index])
            shared = np.random.default_rng(seed).normal(0, 0.05)
            train, evaluation = curves(rng, offset + shared)
            loss = 2.18 + offset + shared + rng.normal(0, 0.004)
            extra = 1.3 if index == 3 else 1.0
            cost = Cost(
                tokens=245_760,
                steps=60,
                seconds=12.6 * rng.uniform(0.97, 1.03) * extra,
                flops=3.1e12 * extra,
                peak_memory_bytes=int(410 * 2**20 * rng.uniform(0.99, 1.01)),
                scored_tokens=81_920 if index == 3 else 0,
            )
            metrics = {"eval/loss": loss, "eval/accuracy": 0.41 - 0.2 * offset + rng.normal(0, 0.003)}
            runs.append(Run(arm, seed, metrics, cost, train, evaluation))
    fields: dict = {
        "title": "Dynamic loss-based reweighting",
        "question": "Does weighting each sequence by its loss lower the validation loss at an equal budget?",
        "arms": {arm: f"the arm {arm}" for arm in arms},
        "baseline": arms[0],
        "metric": "eval/loss",
        "metrics": ("eval/loss", "eval/accuracy"),
        "runs": tuple(runs),
        "better": {"eval/accuracy": "higher"},
        "configuration": {
            "model": "tiny",
            "arms": {arm: {"loss": "cross_entropy"} for arm in arms},
            "seeds": seeds,
        },
        "environment": {"python": "3.11", "torch": "2.13.0", "device": "cpu"},
        "notes": ("Every arm sees the same documents in the same order.",),
        "paper": "Dynamic loss-based sample reweighting (2025)",
    }
    if len(arms) > 1:
        fields["claims"] = (
            Claim("reweighting lowers the loss", arms[1], "eval/loss"),
            Claim("reweighting lowers it by 0.5", arms[1], "eval/loss", margin=0.5),
            Claim("the last arm costs nothing", arms[-1], "eval/loss", direction="equal", margin=0.01),
        )
    return Comparison(**(fields | changes))
