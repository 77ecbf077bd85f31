"""Superposition: does the loss fall like one over the width because features overlap?

Liu, Liu and Gore, "Superposition Yields Robust Neural Scaling", 2025, arXiv 2505.10465.

Toy models of several widths on five shapes of feature frequencies, with a weight decay that keeps features out (weak
superposition) or draws every feature's norm to one (strong). Two arms are theory: no run, only what each regime
should give. The last one measures language models of several widths: trained on the spot at ``smoke`` and ``quick``,
the paper's 27 open models at ``full``, or one's own (``--set models=[...]``).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lossmith.reporting.comparison import Claim, Cost, Curve
from lossmith.studies.study import Experiment, Paper, Study
from lossmith.studies.width_families import OPEN_MODELS, measure_families, prepare_families, train_family

DECAYS = {"decay": 1.0, "mild-decay": 0.1, "no-decay": 0.0, "growth": -1.0}

ARMS = {
    "decay": "toys with weight decay 1: weak superposition",
    "mild-decay": "toys with weight decay 0.1",
    "no-decay": "toys without weight decay",
    "growth": "toys with weight decay -1, norms drawn to one: strong superposition",
    "truncation": "theory of weak superposition: the most frequent features stored perfectly, the rest dropped",
    "one-over-m": "theory of strong superposition: loss and squared overlaps like one over the width",
    "language-models": "language models of several widths",
}

SHAPES: dict[str, dict[str, Any]] = {
    "flat": {"shape": "power", "exponent": 0.0},
    "power1": {"shape": "power", "exponent": 1.0},
    "power1.6": {"shape": "power", "exponent": 1.6},
    "exponential": {"shape": "exponential"},
    "linear": {"shape": "linear"},
}

CLAIMS = (
    Claim("Drawing norms to one makes a toy represent all features", "growth", "represented", "higher", margin=0.5),
    Claim("Strong superposition halves the loss", "growth", "power1/loss", "lower", ratio=0.5),
    Claim("Strong, flat: exponent 1 ± 0.2", "growth", "flat/exponent", "equal", "one-over-m", 0.2),
    Claim("Strong, power 1: exponent 1 ± 0.2", "growth", "exponent", "equal", "one-over-m", 0.2),
    Claim("Strong, exponential: exponent 1 ± 0.2", "growth", "exponential/exponent", "equal", "one-over-m", 0.2),
    Claim("Strong, linear: exponent 1 ± 0.2", "growth", "linear/exponent", "equal", "one-over-m", 0.2),
    Claim("Strong: squared overlaps are within 60 % of 1/m", "growth", "overlap", "equal", "one-over-m", 0.6),
    Claim("Weak, power 1.6: exponent of theory ± 0.2", "decay", "power1.6/exponent", "equal", "truncation", 0.2),
    Claim("Weak: the loss is the dropped features' ± 20 %", "decay", "power1.6/of_dropped", "equal", "truncation", 0.2),
    Claim("An exponential gives a power law only when strong", "growth", "exponential/r2", "higher", margin=0.05),
    Claim("Language models: squared overlaps like 1/m", "language-models", "overlap_slope", "equal", "one-over-m", 0.3),
    Claim("Language models: exponent 1 ± 0.2", "language-models", "exponent", "equal", "one-over-m", 0.2),
)


def experiment(arm: str, seed: int, options: Mapping[str, Any], folder: Path) -> Experiment:
    """One arm under one seed: a row of toys for every shape of frequencies, a theory, or a family of models."""
    if arm == "language-models":
        return _language_models(seed, options, folder)
    if arm in DECAYS:
        return _toys(DECAYS[arm], seed, options)
    return Experiment(_theory(arm, options))


def _exponent(shape: str) -> str:
    """The primary metric is the exponent on frequencies of power 1."""
    return "exponent" if shape == "power1" else f"{shape}/exponent"


def _frequencies(options: Mapping[str, Any]) -> Any:
    import torch

    from lossmith.theory import feature_frequencies

    features = int(options["features"])
    scale = float(options["scale"])
    rows = [
        feature_frequencies(s["shape"], features, exponent=s.get("exponent", 1.0), scale=scale) for s in SHAPES.values()
    ]
    return torch.stack(rows)


def _toys(decay: float, seed: int, options: Mapping[str, Any]) -> Experiment:
    import torch

    from lossmith.theory import ToyTraining, train_toys, truncation_loss

    widths = [int(width) for width in options["widths"]]
    features, steps, batch = int(options["features"]), int(options["steps"]), int(options["batch_size"])
    training = ToyTraining(
        steps=steps,
        batch_size=batch,
        learning_rate=float(options["learning_rate"]),
        averaged=int(options["averaged"]),
    )
    started = time.perf_counter()
    toys = train_toys(_frequencies(options), widths, weight_decays=(decay,), seeds=(seed,), training=training)
    seconds = time.perf_counter() - started
    slopes = toys.slopes()
    shares, overlaps = toys.represented()[:, 0, 0], toys.overlaps()[:, 0, 0]
    metrics: dict[str, float] = {
        "represented": float(shares.mean()),
        "overlap": float((overlaps * torch.tensor(widths)).mean()),
    }
    for i, name in enumerate(SHAPES):
        metrics[f"{name}/loss"] = float(toys.losses[i, 0, 0, -1])
        metrics[_exponent(name)] = float(slopes.exponent[i, 0, 0])
        metrics[f"{name}/r2"] = float(slopes.r_squared[i, 0, 0])
        stored = [round(float(share) * features) for share in shares[i]]
        dropped = [truncation_loss(toys.probabilities[i], k) for k in stored]
        if min(dropped) > 0:
            ratios = toys.losses[i, 0, 0] / torch.tensor(dropped, dtype=torch.float64)
            metrics[f"{name}/of_dropped"] = float(ratios.mean())
    every = max(1, steps // 50)
    curve = toys.curves[list(SHAPES).index("power1"), 0, 0, -1][: steps // every * every].reshape(-1, every).mean(-1)
    ends = range(every, steps // every * every + 1, every)
    cost = Cost(
        tokens=steps * batch * len(widths) * len(SHAPES),
        steps=steps,
        seconds=seconds,
        # Three products of batch x features x width.
        flops=float(sum(6 * batch * features * width for width in widths) * steps * len(SHAPES)),
    )
    curve_seconds = tuple(seconds * end / steps for end in ends)
    return Experiment(
        metrics,
        cost,
        train=Curve(tuple(ends), tuple(end * batch for end in ends), curve_seconds, tuple(curve.tolist())),
    )


def _theory(arm: str, options: Mapping[str, Any]) -> dict[str, float]:
    """What a regime should give, as metrics of an arm: claims compare with it."""
    import torch

    from lossmith.theory import loglog_slope, truncation_loss

    if arm == "one-over-m":
        exponents = {_exponent(name): 1.0 for name in SHAPES}
        return {**exponents, "represented": 1.0, "overlap": 1.0, "overlap_slope": 1.0}
    metrics: dict[str, float] = {}
    widths = [int(width) for width in options["widths"]]
    for name, probabilities in zip(SHAPES, _frequencies(options), strict=True):
        losses = torch.tensor([truncation_loss(probabilities, width) for width in widths], dtype=torch.float64)
        slope = loglog_slope(torch.tensor(widths, dtype=torch.float64), losses)
        metrics[f"{name}/loss"] = float(losses[-1])
        metrics[_exponent(name)] = float(slope.exponent)
        metrics[f"{name}/r2"] = float(slope.r_squared)
        metrics[f"{name}/of_dropped"] = 1.0
    metrics["represented"] = sum(widths) / len(widths) / int(options["features"])
    return metrics


def _language_models(seed: int, options: Mapping[str, Any], folder: Path) -> Experiment:
    started = time.perf_counter()
    models, cost = options["models"], Cost()
    if not models:
        models, cost = train_family(seed, options, folder)
    found = measure_families(models, options)
    metrics = {
        "overlap": found.overlap,
        "centred_overlap": found.centred_overlap,
        "overlap_slope": found.overlap_slope,
        "represented": found.represented,
        "exponent": found.exponent,
        "models/loss": found.loss,
    }
    seconds = time.perf_counter() - started
    return Experiment(
        metrics,
        Cost(tokens=cost.tokens, steps=cost.steps, seconds=seconds, flops=cost.flops, scored_tokens=found.tokens),
    )


# The widest toy is 2.56 times the exponential's scale at every size, as in the paper (1,024 and 400).
MODELS = {"data": "python", "models": {}, "corpora": {}, "texts": 1000, "max_length": 128}

STUDY = Study(
    slug="superposition",
    family="theory",
    question="Does the loss fall like one over the width because features overlap?",
    paper=Paper("Superposition Yields Robust Neural Scaling", 2025, "2505.10465"),
    arms=ARMS,
    baseline="decay",
    metric="exponent",
    metrics=(
        "exponent",
        *(f"{name}/exponent" for name in SHAPES if name != "power1"),
        "power1/loss",
        "flat/loss",
        "exponential/r2",
        "power1.6/r2",
        "power1.6/of_dropped",
        "represented",
        "overlap",
        "centred_overlap",
        "overlap_slope",
        "models/loss",
    ),
    lower_is_better=False,
    better={"power1/loss": "lower", "flat/loss": "lower"},
    claims=CLAIMS,
    seeds={"smoke": 2, "quick": 4, "full": 3},
    options={
        "smoke": {
            **MODELS,
            "features": 40,
            "scale": 3.125,
            "widths": [3, 5, 8],
            "steps": 40,
            "batch_size": 32,
            "learning_rate": 1e-2,
            "averaged": 10,
            "model_widths": [4, 8, 12, 16],
            "model_steps": 3,
            "model_batch_size": 4,
            "vocab_size": 300,
            "texts": 4,
        },
        "quick": {
            **MODELS,
            "features": 200,
            "scale": 15.625,
            "widths": [6, 10, 16, 26, 40],
            "steps": 2000,
            "batch_size": 256,
            "learning_rate": 1e-2,
            "averaged": 40,
            "model_widths": [8, 16, 32, 64],
            "model_steps": 250,
            "model_batch_size": 16,
            "vocab_size": 1024,
            "texts": 200,
        },
        "full": {
            **MODELS,
            "data": None,
            "features": 1000,
            "scale": 39.0625,
            "widths": [10, 15, 25, 39, 63, 100],
            "steps": 20_000,
            "batch_size": 2048,
            "learning_rate": 1e-2,
            "averaged": 100,
            "models": OPEN_MODELS,
            "corpora": {
                "wikitext": "Salesforce/wikitext:wikitext-103-raw-v1:test",
                "c4": "allenai/c4:en:validation",
                "pile": "NeelNanda/pile-10k",
                "books": "bookcorpus/bookcorpus",
            },
            "max_length": 2048,
        },
    },
    experiment=experiment,
    prepare=prepare_families,
    data="text for the language models: a file, a folder or a hub id",
    notes=(
        "exponent: by which the loss falls with the width; of toys, on frequencies of power 1, that of the straight "
        "line through log loss by log width (r2: how straight); of language models, that of the width law with an "
        "offset. SHAPE/loss: of the widest toy. of_dropped: loss over that of the features whose norm is at most 1/2, "
        "dropped; mean over widths. represented: share of features whose norm is above 1/2 (of tokens above half the "
        "mean norm). overlap: width times mean squared overlap; both are means over widths and shapes. centred: less "
        "the mean row. overlap_slope: the exponent by which squared overlaps fall with the width. The theory arms are "
        "not runs. Language models that are given do not change with the seed.",
    ),
)
