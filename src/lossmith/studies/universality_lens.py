"""Universality lens: does the regret of a huge model follow the weight of the truth, or its number of parameters?

"The Universality Lens: Why Even Highly Over-Parametrized Models Learn Well", 2025, arXiv 2506.07661.

Mixtures over all Boolean functions of four inputs, weighted by how often random networks compute them, learn noisy
targets of rising complexity; with networks of 25 and of 385 parameters. And samples of a small classifier's posterior
(Langevin) predict digits: their mixture, one of them, and the network that maximises the posterior.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lossmith.reporting.comparison import Claim, Cost
from lossmith.studies.study import Experiment, Paper, Study

TARGETS = ("constant", "bit", "and", "xor", "parity")
ARMS = {
    "constant": "always 1, hidden width 4",
    "bit": "one input, width 4",
    "and": "and of two inputs, width 4",
    "xor": "exclusive or of two, width 4",
    "parity": "parity of four, width 4",
    "constant-wide": "always 1, 15 times the parameters",
    "bit-wide": "one input, 15 times the parameters",
    "and-wide": "and of two inputs, 15 times the parameters",
    "langevin-mixture": "digits: mean probability of posterior samples",
    "langevin-single": "digits: mean loss of single posterior samples",
    "map": "digits: the most probable network",
}

CLAIMS = (
    Claim("A bit costs more than a constant", "bit", "regret", "higher", "constant"),
    Claim("And costs more than a bit", "and", "regret", "higher", "bit"),
    Claim("Exclusive or costs more than and", "xor", "regret", "higher", "and"),
    Claim("Parity costs more than exclusive or", "parity", "regret", "higher", "xor"),
    Claim("15 times the parameters: a constant costs the same", "constant-wide", "regret", "equal", "constant", 0.6),
    Claim("15 times the parameters: a bit costs the same", "bit-wide", "regret", "equal", "bit", 0.6),
    Claim("15 times the parameters: and costs the same", "and-wide", "regret", "equal", "and", 0.6),
    Claim("The mixture beats its members", "langevin-mixture", "nll", "lower", "langevin-single", ratio=0.7),
)


def experiment(arm: str, seed: int, options: Mapping[str, Any], folder: Path) -> Experiment:
    """The regret of one target, or the loss on held-out digits."""
    started = time.perf_counter()
    if arm in ("langevin-mixture", "langevin-single", "map"):
        metrics, steps = _digits(arm, seed, options)
    else:
        metrics, steps = _boolean(arm, seed, options), 0
    return Experiment(metrics, Cost(steps=steps, seconds=time.perf_counter() - started))


def _boolean(arm: str, seed: int, options: Mapping[str, Any]) -> dict[str, float]:
    from lossmith.theory import boolean_inputs, boolean_regret, sample_boolean_prior

    name, _, wide = arm.partition("-")
    width = int(options["wide"] if wide else options["narrow"])
    prior = sample_boolean_prior(width, draws=int(options["draws"]), seed=seed)
    x = boolean_inputs(4)
    positive = x > 0
    target = {
        "constant": positive[:, 0] | ~positive[:, 0],
        "bit": positive[:, 0],
        "and": positive[:, 0] & positive[:, 1],
        "xor": positive[:, 0] ^ positive[:, 1],
        "parity": x.prod(1) > 0,
    }[name].long()
    # The same sequences for every target and width.
    total = boolean_regret(prior, target, int(options["examples"]), sequences=int(options["sequences"]), seed=seed)
    weight = prior.log_weight(target)
    metrics = {"excess": float(total[-1]) / len(total), "regret": float(total[-1]), "parameters": float(width * 6 + 1)}
    if math.isfinite(weight):
        metrics |= {"weight_cost": -weight, "regret_over_bound": float(total[-1]) / -weight}
    return metrics


def _digits(arm: str, seed: int, options: Mapping[str, Any]) -> tuple[dict[str, float], int]:
    import torch
    from sklearn.datasets import load_digits
    from torch import nn

    from lossmith.theory import PosteriorEnsemble, sample_posterior

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
    x = torch.tensor(digits.data / 16, dtype=torch.float32)[order]
    y = torch.tensor(digits.target)[order]
    train, steps = int(options["images"]), int(options["steps"])
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    prior_std = float(options["prior_std"])
    if arm == "map":
        ensemble = PosteriorEnsemble(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(steps // 4):
            optimizer.zero_grad()
            penalty = sum((p**2).sum() for p in model.parameters()) / (2 * prior_std**2 * train)
            (nn.functional.cross_entropy(model(x[:train]), y[:train]) + penalty).backward()
            optimizer.step()
        ensemble.keep(model)
        steps //= 4
    else:
        ensemble = sample_posterior(
            model, x[:train], y[:train], steps=steps, lr=float(options["lr"]), prior_std=prior_std, seed=seed
        )
    mixture, single = ensemble.negative_log_likelihood(x[train:], y[train:])
    right = ensemble.predict_proba(x[train:]).argmax(-1) == y[train:]
    nll = single if arm == "langevin-single" else mixture
    return {
        "excess": nll,
        "nll": nll,
        "accuracy": float(right.double().mean()),
        "samples": float(len(ensemble.samples)),
    }, steps


SMALL = {"narrow": 4, "wide": 64, "examples": 64, "images": 100, "lr": 2e-3, "prior_std": 0.3**0.5}

STUDY = Study(
    slug="universality-lens",
    family="theory",
    question="Does regret follow the weight of the truth, or the number of parameters?",
    paper=Paper("The Universality Lens: Why Even Highly Over-Parametrized Models Learn Well", 2025, "2506.07661"),
    arms=ARMS,
    baseline="constant",
    metric="excess",
    metrics=("excess", "regret", "weight_cost", "regret_over_bound", "parameters", "nll", "accuracy"),
    better={"regret": "lower", "nll": "lower", "accuracy": "higher"},
    claims=CLAIMS,
    seeds={"smoke": 2, "quick": 5, "full": 10},
    options={
        "smoke": {**SMALL, "draws": 2000, "sequences": 4, "steps": 60},
        "quick": {**SMALL, "draws": 40_000, "sequences": 40, "steps": 6000},
        "full": {**SMALL, "wide": 1024, "draws": 1_000_000, "sequences": 200, "steps": 60_000, "images": 1000},
    },
    experiment=experiment,
    notes=(
        "excess: nats per prediction above those of the truth (for digits those of the labels, 0). regret: total "
        "online regret after all examples, nats. weight_cost: -ln of the target's prior weight, the bound on it; "
        "missing where no draw computed the target. regret_over_bound: below 1 if the bound holds.",
    ),
)
