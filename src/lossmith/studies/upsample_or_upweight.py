"""Upsample or upweight: how to train on domains of very different size.

Li et al., "Upsample or Upweight? Balanced Training on Heavily Imbalanced Datasets", 2025, arXiv 2410.04579.

A byte model learns Python code, of which there is plenty, and documentation, of which there are 60 chunks: drawn in
proportion, at temperatures, cooling down. With 300 chunks upsampling is set against upweighting, which has the same
expected gradient, and the variances of both are measured. With ``--data``, and at ``full``, the arms are language
models on text with domains.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lossmith.reporting.comparison import Claim, Cost, Curve
from lossmith.studies.settings import SMOKE, CompareSettings, make_settings
from lossmith.studies.study import Experiment, Paper, Study

# Sampler and weighting by arm.
METHODS = {
    "proportional": ("temperature(tau=1)", "uniform"),
    "tau-5": ("temperature(tau=5)", "uniform"),
    "uniform": ("temperature(tau=inf)", "uniform"),
    "upweight-5": ("temperature(tau=1)", "scalarization(tau=5)"),
    "cooldown": ("temperature(tau=5 -> 1)", "uniform"),
    "warm-up": ("temperature(tau=1 -> 5)", "uniform"),
}

ARMS = {
    "proportional": "domains drawn by their size, tau = 1",
    "tau-5": "temperature sampling, tau = 5",
    "uniform": "both domains drawn alike, tau = infinity",
    "upweight-5": "drawn by size, losses weighed to the expectation of tau = 5",
    "cooldown": "tau = 5, from half of the steps on tau = 1",
    "warm-up": "tau = 1, from half of the steps on tau = 5",
}

# The two arms that are also set against each other on the larger small domain.
PAIR = ("tau-5", "upweight-5")

CLAIMS = (
    Claim("Cooldown is better on the small domain than proportional", "cooldown", "small/loss"),
    Claim("Cooldown is better on the small domain than tau = 5", "cooldown", "small/loss", against="tau-5"),
    Claim("Cooldown is within 0.03 nats of proportional on the large one", "cooldown", "large/loss", margin=-0.03),
    Claim("and at least 0.08 better there than tau = 5", "cooldown", "large/loss", against="tau-5", margin=0.08),
    Claim("A high temperature over-fits the small domain", "uniform", "small/overfit", "higher", margin=0.1),
    Claim("Cooling down beats warming up on the small domain", "cooldown", "small/loss", against="warm-up"),
    Claim(
        "Upweighting has more than 5 times the gradient variance of upsampling",
        "upweight-5",
        "gradient/variance",
        "higher",
        "tau-5",
        ratio=5,
    ),
    Claim(
        "Upsampling learns 300 chunks faster than upweighting, by 0.15 nats",
        "tau-5",
        "300/small_loss",
        against="upweight-5",
        margin=0.15,
    ),
)


def experiment(arm: str, seed: int, options: Mapping[str, Any], folder: Path) -> Experiment:
    """One arm on the scarce domain; upsampling and upweighting also where there is more of it."""
    import torch

    from lossmith.studies.byte_domains import (
        CONTEXT,
        LARGE,
        SMALL,
        byte_model,
        read_chunks,
        train_on_domains,
        validation_losses,
        variance_of_gradient,
    )
    from lossmith.training.models import matmul_parameters

    started = time.perf_counter()
    whole, validation = (read_chunks(options["chunks"], split) for split in ("train", "validation"))
    order = torch.randperm(len(whole[SMALL]), generator=torch.Generator().manual_seed(seed))
    sampler, weighting = METHODS[arm]

    def train(small: int, steps: int, sampler: str, weighting: str) -> tuple[Any, ...]:
        model = byte_model(seed, int(options["width"]))
        chunks = {LARGE: whole[LARGE], SMALL: whole[SMALL][order[:small]]}
        found = train_on_domains(
            model,
            chunks,
            validation,
            sampler=sampler,
            weighting=weighting,
            steps=steps,
            batch_size=int(options["batch_size"]),
            evaluations=int(options["evaluations"]),
            seed=seed,
            folder=folder,
            learning_rate=float(options["learning_rate"]),
        )
        return model, chunks, *found

    steps, per_step = int(options["steps"]), int(options["batch_size"]) * (int(options["length"]) - CONTEXT)
    model, _, curves, trained, passes = train(int(options["scarce"]), steps, sampler, weighting)
    cost = Cost(
        tokens=steps * per_step,
        steps=steps,
        seconds=time.perf_counter() - started,
        flops=6.0 * matmul_parameters(model) * steps * per_step,
    )
    losses = validation_losses(model, validation)
    metrics = {
        "average/loss": (losses[LARGE] + losses[SMALL]) / 2,
        "large/loss": losses[LARGE],
        "small/loss": losses[SMALL],
        "small/overfit": losses[SMALL] - min(curves.small),
        "small/passes": passes,
    }
    if arm in PAIR:
        more = int(options["plenty_steps"])
        model = train(int(options["plenty"]), more, sampler, weighting)[0]
        found = validation_losses(model, validation)
        metrics |= {"300/small_loss": found[SMALL], "300/large_loss": found[LARGE]}
        before = int(options["variance_steps"])
        # Both arms measure at one and the same model.
        model, chunks, *_ = train(int(options["plenty"]), before, METHODS["proportional"][0], "uniform")
        variances = variance_of_gradient(model, chunks, examples=int(options["examples"]), tau=5, seed=seed).at(5)
        metrics["gradient/variance"] = variances.upsampling if arm == "tau-5" else variances.upweighting
    seconds = tuple(cost.seconds * step / steps for step in curves.steps)
    evaluation = Curve(curves.steps, tuple(step * per_step for step in curves.steps), seconds, curves.small)
    return Experiment(metrics, cost, train=trained.curve, evaluation=evaluation)


def prepare(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The embedded corpus as chunks of bytes, read once."""
    from lossmith.studies.byte_domains import write_chunks

    path = folder / "chunks.safetensors"
    if not path.exists():
        write_chunks(
            path,
            length=int(options["length"]),
            large=int(options["large"]),
            small=4 * int(options["plenty"]),
            validation=int(options["validation"]),
        )
    return {"chunks": str(path)}


def comparison(scale: str, data: str | None) -> tuple[CompareSettings, tuple[Claim, ...]]:
    """The arms as language models: on the user's domains, or (``full``) on SlimPajama's seven."""
    arms = ["proportional: sampler=temperature(tau=1)"]
    for name, (sampler, weighting) in METHODS.items():
        if name == "upweight-5":
            arms.append(f"{name}: sampler={sampler}, weighting={weighting}")
        elif name in ("tau-5", "uniform", "cooldown"):
            arms.append(f"{name}: sampler={sampler}")
    values: dict[str, Any] = {"arms": arms, "baseline": "proportional", "max_epochs": 4}
    if data is not None:
        values["data"] = data
    if scale == "smoke":
        values |= SMOKE
    if scale == "full":
        values |= {
            "data": data or "DKYoon/SlimPajama-6B",
            "domain_field": None if data else "meta.redpajama_set_name",
            "model": "EleutherAI/pythia-160m",
            "random_weights": True,
            "packing": "concatenated",
            "sequence_length": 1024,
            "batch_size": 256,
            "tokens": 20_000 * 256 * 1024,
            "eval_tokens": 4_000_000,
            "evaluations": 20,
            "training": {
                "learning_rate": 5e-4,
                "adam_beta2": 0.98,
                "lr_scheduler_type": "inverse_sqrt",
                "warmup_steps": 1000,
                "weight_decay": 0.0,
            },
        }
    claims = (
        Claim(
            "Cooldown is no more than 0.03 nats worse overall than proportional", "cooldown", "eval/loss", margin=-0.03
        ),
        Claim("Cooldown is better overall than tau = 5", "cooldown", "eval/loss", against="tau-5"),
        Claim("Upsampling is better overall than upweighting", "tau-5", "eval/loss", against="upweight-5"),
    )
    return make_settings(values), claims


SIZES = {"length": 65, "learning_rate": 3e-3, "scarce": 60, "plenty": 300}

STUDY = Study(
    slug="upsample-or-upweight",
    family="data",
    question="Domains of very different size: draw the small ones more often, let them count more, or cool down?",
    paper=Paper("Upsample or Upweight? Balanced Training on Heavily Imbalanced Datasets", 2025, "2410.04579"),
    arms=ARMS,
    baseline="proportional",
    metric="average/loss",
    metrics=(
        "average/loss",
        "small/loss",
        "large/loss",
        "small/overfit",
        "small/passes",
        "300/small_loss",
        "300/large_loss",
        "gradient/variance",
    ),
    better={"small/loss": "lower", "large/loss": "lower", "300/small_loss": "lower", "300/large_loss": "lower"},
    claims=CLAIMS,
    seeds={"smoke": 2, "quick": 4, "full": 3},
    options={
        "smoke": {
            **SIZES,
            "width": 16,
            "batch_size": 8,
            "large": 2000,
            "validation": 20,
            "steps": 16,
            "evaluations": 4,
            "plenty_steps": 8,
            "variance_steps": 4,
            "examples": 5,
        },
        "quick": {
            **SIZES,
            "width": 96,
            "batch_size": 32,
            "large": 38_000,
            "validation": 120,
            "steps": 600,
            "evaluations": 6,
            "plenty_steps": 200,
            "variance_steps": 50,
            "examples": 50,
        },
    },
    experiment=experiment,
    prepare=prepare,
    comparison=comparison,
    notes=(
        "nats per byte on held-out text; average/loss: mean of the two domains; small/overfit: how far the small "
        "domain's loss has risen from its lowest point; small/passes: how often its 60 chunks were passed through; "
        "300/...: with 300 chunks in the small domain and fewer steps; gradient/variance: of one example's gradient, "
        "estimated at one model for both. Cost: that of the run with 60 chunks.",
    ),
)
