"""Scaling-law estimation: which measurements of small models predict the large one best?

Choshen, Zhang and Andreas, "A Hitchhiker's Guide to Scaling Law Estimation", 2024, arXiv 2410.11840.

Every arm is a way to predict the largest model of a family from the others. The families: character models trained
here, and made-up ones with a known law and three kinds of error. ``--data`` takes published tables (those of the
paper at ``full``) in place of the trained family; then seed ``s`` leaves out one of the small models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lossmith.errors import InputError
from lossmith.laws import (
    BORROWED,
    HUBER_LOG,
    SQUARES,
    Chinchilla,
    Estimate,
    Protocol,
    Reading,
    Table,
    TiedChinchilla,
    TokenLaw,
    absolute_relative_error,
    estimate_pairs,
    read_family,
    split_family,
)
from lossmith.reporting.comparison import Claim, Cost
from lossmith.studies.model_families import made_up_family, read_tables, train_family
from lossmith.studies.study import Experiment, Paper, Study
from lossmith.training.record import locked

# What is left of Chinchilla's law where the size is not asked for.
_ONE = Protocol(models=1, choose="largest")

PROTOCOLS: dict[str, Protocol] = {
    "protocol": Protocol(),
    "no-cut": Protocol(min_tokens=0),
    "ends": Protocol(last=0.15),
    "huber": Protocol(law=Chinchilla(objective=HUBER_LOG)),
    "tied": Protocol(law=TiedChinchilla()),
    "models-3": Protocol(models=3),
    "one-borrowed": dataclasses.replace(_ONE, law=Chinchilla(objective=SQUARES, fixed=BORROWED)),
    "first-half": Protocol(first=0.5),
}

ARMS = {
    "best-seen": "the lowest loss of the small models: no law",
    "protocol": "whole curves without the first 10 billion tokens (4 % of short runs), least squares",
    "no-cut": "whole curves from the first checkpoint on",
    "ends": "the last 15 % of every curve only: end points, and just enough for five parameters",
    "huber": "as protocol, Huber loss on logarithms",
    "tied": "as protocol, three free parameters: coefficients tied to exponents",
    "models-3": "as protocol, the three smallest models",
    "one-borrowed": "the largest small model alone, A and alpha borrowed",
    "first-half": "as protocol, every small model trained half as long",
    "own-start": "no small models: the first 30 % of the target's own curve",
}

# Errors of the made-up families: of whole runs (seeds), and of single checkpoints.
CONDITIONS: dict[str, dict[str, Any]] = {
    "early/are": {"run_noise": 0.01, "checkpoint_noise": 0.003, "transient": True},
    "checkpoints/are": {"run_noise": 0.003, "checkpoint_noise": 0.02, "transient": False},
    "runs/are": {"run_noise": 0.02, "checkpoint_noise": 0.001, "transient": False},
}

CLAIMS = (
    Claim("A law predicts the largest model better than the best loss seen", "protocol", "family/are", "lower"),
    Claim("Leaving out early training halves the error", "protocol", "early/are", "lower", "no-cut", ratio=0.5),
    Claim("Whole curves halve the error of their ends", "protocol", "checkpoints/are", "lower", "ends", ratio=0.5),
    Claim(
        "Whole curves are no better where the error is of whole runs (a limit found for this study)",
        "protocol", "runs/are", "equal", "ends", 0.005,
    ),
    Claim("More small models beat three", "protocol", "early/are", "lower", "models-3"),
    Claim("Small models beat one larger with a borrowed law", "protocol", "family/are", "lower", "one-borrowed"),
    Claim("Huber loss on logarithms agrees with least squares to half a percent", "huber", "early/are", "equal",
          "protocol", 0.005),
    Claim("Training the target to 30 % is as good, to one percent", "own-start", "family/are", "lower", "protocol",
          -0.01),
)  # fmt: skip


def prepare(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Check the user's tables before anything runs; the folder of trained families."""
    if options["data"] is not None:
        path = Path(options["data"])
        if not path.exists():
            raise InputError(
                f"there is no {path}; --data takes a table of checkpoints or a folder of them, such as aggregated_eval "
                "of github.com/IBM/ColPret"
            )
        read_tables(path, options)
    return {"families": str(folder / "families")}


def experiment(arm: str, seed: int, options: Mapping[str, Any], folder: Path) -> Experiment:
    """One way to predict, on the families of one seed."""
    families = _families(seed, options)
    errors, flops = _judged(arm, families)
    metrics = {"family/are": errors}
    trials = int(options["trials"])
    for name, noise in CONDITIONS.items():
        if arm == "own-start":
            # The made-up target has no errors: its own start would give its end away.
            metrics[name] = float("nan")
            continue
        tables = [
            made_up_family(1000 * seed + trial, sizes=int(options["sizes"]), checkpoints=80, **noise)
            for trial in range(trials)
        ]
        metrics[name] = _judged(arm, tables)[0]
    return Experiment(metrics, Cost(flops=flops))


def _families(seed: int, options: Mapping[str, Any]) -> list[Table]:
    if options["data"] is not None:
        return [_without_one(table, seed) for table in read_tables(options["data"], options).values()]
    folder = Path(options["families"])
    with locked(folder / f"seed-{seed}", wait_seconds=3600):
        # Counts as small as these would be taken for millions or billions.
        plain = Reading(scale={"params": 1, "tokens": 1})
        return [read_family(train_family(seed, options, folder), plain)]


def _without_one(table: Table, seed: int) -> Table:
    """Leave out one of the small models, where three are left: what differs between seeds."""
    sizes = np.unique(table.columns["params"])
    if len(sizes) < 5:
        return table
    return table.select(table.columns["params"] != sizes[seed % (len(sizes) - 1)])


def _judged(arm: str, tables: list[Table]) -> tuple[float, float]:
    """Median error over families; compute of the training that the arm used, mean."""
    if arm == "own-start":
        found = [_own_start(table) for table in tables]
        errors, spent = [error for error, _ in found], [flops for _, flops in found]
    else:
        pairs = [(table, PROTOCOLS.get(arm, PROTOCOLS["protocol"])) for table in tables]
        estimates: list[Estimate] = estimate_pairs(pairs)
        errors = [one.best_seen if arm == "best-seen" else one.are for one in estimates]
        spent = [one.flops for one in estimates]
    known = [error for error in errors if not np.isnan(error)]
    return (float(np.median(known)) if known else float("nan")), float(np.mean(spent))


def _own_start(table: Table) -> tuple[float, float]:
    protocol = Protocol()
    size, tokens = table.columns["params"], table.columns["tokens"]
    target = size == size.max()
    limit = 0.3 * tokens[target].max()
    early = table.select(target & (tokens <= limit) & (tokens > protocol.cut(table)))
    _, late = split_family(table, protocol)
    law = TokenLaw(objective=SQUARES)
    try:
        law.check(early)
    except InputError:
        return float("nan"), 6 * float(size.max()) * limit
    fitted = law.fit_table(early, bootstrap=0)
    predicted = fitted.predict(tokens=late.columns["tokens"])
    return absolute_relative_error(late.columns["loss"], predicted), 6 * float(size.max()) * limit


TRAINED = {
    "data": None,
    "params": None,
    "tokens": None,
    "loss": None,
    "unit": None,
    "by": "scaled_set",
    "held_out": 8192,
    "learning_rate": 3e-3,
}

STUDY = Study(
    slug="scaling-law-estimation",
    family="laws",
    question="Which measurements of small models predict the large one best?",
    paper=Paper("A Hitchhiker's Guide to Scaling Law Estimation", 2024, "2410.11840"),
    arms=ARMS,
    baseline="best-seen",
    metric="family/are",
    metrics=("family/are", *CONDITIONS),
    better=dict.fromkeys(CONDITIONS, "lower"),
    claims=CLAIMS,
    seeds={"smoke": 2, "quick": 5, "full": 5},
    options={
        "smoke": {
            **TRAINED, "widths": [2, 4, 8, 16, 32], "steps": 30, "batch_size": 256, "checkpoints": 20,
            "trials": 2, "sizes": 5,
        },
        "quick": {
            **TRAINED, "widths": [4, 8, 16, 32, 64, 128], "steps": 300, "batch_size": 1024, "checkpoints": 24,
            "trials": 30, "sizes": 8,
        },
        "full": {
            **TRAINED, "data": "ColPret/aggregated_eval", "widths": [], "steps": 0, "batch_size": 0, "checkpoints": 0,
            "trials": 40, "sizes": 8,
        },
    },
    experiment=experiment,
    prepare=prepare,
    data="a table of checkpoints (params, tokens, loss; families told apart by scaled_set), or a folder of such tables",
    notes=(
        "are: mean absolute relative error over the last 30 % of the largest model's training, as a share of the loss. "
        "family/: the trained character models, or the families of --data (median). early/, checkpoints/, runs/: "
        "made-up families with a known law (median): with a transient at the start and errors of 1 % per run and 0.3 % "
        "per checkpoint; of 0.3 % per run and 2 % per checkpoint; of 2 % per run and 0.1 % per checkpoint. Their "
        "largest model has no errors.",
        "FLOPs are those of the training whose measurements the arm uses, 6 per parameter and token; the fits "
        "themselves take milliseconds.",
    ),
)  # fmt: skip
