"""Essential sparsity: how many weights of a pre-trained model can go in one step, for free?

"The Emergence of Essential Sparsity in Large Pre-trained Models: The Weights that Matter", 2023, arXiv 2306.03805.

A network is pre-trained on scikit-learn's digits, as a masked autoencoder (``self``) or as a classifier
(``supervised``), pruned once, given a new output layer and fine-tuned on few labels with its masks held. Arms share a
seed's pre-trained network and its fine-tuning without pruning. ``full`` prunes a language model that is named and
measures its accuracy on text, without training.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lossmith.reporting.comparison import Claim, Cost
from lossmith.studies.sharing import tensors_once
from lossmith.studies.study import Experiment, Paper, Study

ARMS = {
    "dense": "nothing is removed",
    "magnitude": "the smallest of all weights, one threshold",
    "uniform": "the smallest of each matrix",
    "random": "weights at random",
    "erk": "weights at random, Erdos-Renyi densities",
    "two-of-four": "two of every four weights in a row, the smallest",
    "lottery": "lottery-ticket masks at one half: eight trainings instead of one",
}

CLAIMS = (
    Claim("Half of the weights go for 2 points at most", "magnitude", "self/score@0.5", "equal", margin=0.02),
    Claim("The fall is sharp: 25 points at 98 %", "magnitude", "self/score@0.98", "lower", margin=0.25),
    Claim("Magnitude has 0.1 more essential sparsity than chance", "magnitude", "self/s_star", "higher", "random", 0.1),
    Claim("The same with supervised pre-training", "magnitude", "supervised/s_star", "higher", "random", 0.1),
    Claim("One threshold beats one per matrix at 90 %", "magnitude", "self/score@0.9", "higher", "uniform"),
    Claim("2:4 stays within 2 points of dense", "two-of-four", "self/score@0.5", "equal", margin=0.02),
    Claim("Lottery tickets are no better at 50 %", "lottery", "self/score@0.5", "equal", "magnitude", 0.02),
    Claim("Self-supervised pre-training prunes better", "magnitude", "self_less_supervised", "higher", "dense"),
)

# Which pre-trainings an arm is asked about, if not the self-supervised one alone.
KINDS = dict.fromkeys(("dense", "magnitude", "random"), ("self", "supervised"))


def experiment(arm: str, seed: int, options: Mapping[str, Any], folder: Path) -> Experiment:
    """The curve of one arm: after both kinds of pre-training where a claim asks for both, or of a language model."""
    if options["model"] is not None:
        started = time.perf_counter()
        found, tokens = _language_model(arm, seed, options)
        return Experiment(found, Cost(seconds=time.perf_counter() - started, scored_tokens=tokens))
    metrics: dict[str, float] = {}
    steps, seconds = 0, 0.0
    for kind in KINDS.get(arm, ("self",)):
        own, taken, time_taken = _digits(arm, seed, kind, options, folder)
        metrics |= {f"{kind}/{name}": value for name, value in own.items()}
        if kind == "self":
            steps, seconds = taken, time_taken
    # Zero for the dense arm, which has no curve: what the claim compares with.
    if "supervised" in KINDS.get(arm, ()):
        metrics["self_less_supervised"] = metrics.get("self/s_star", 0.0) - metrics.get("supervised/s_star", 0.0)
    return Experiment(metrics, Cost(tokens=steps * int(options["batch_size"]), steps=steps, seconds=seconds))


def _digits(
    arm: str, seed: int, kind: str, options: Mapping[str, Any], folder: Path
) -> tuple[dict[str, float], int, float]:
    """Measurements, and what one pruned network costs: steps and seconds of its pre-training and its fine-tunings."""
    import torch

    from lossmith.sparsity import release_masks
    from lossmith.studies.image_classification import build_network, predict, read_split
    from lossmith.studies.tensor_training import train_on_tensors
    from lossmith.training import Classification

    split = read_split(options, seed)
    shape, spent = tuple(split.pixels.shape[1:]), []

    def train(model: Any, columns: Mapping[str, Any], objective: Any, steps: int) -> None:
        started = time.perf_counter()
        train_on_tensors(
            model,
            columns,
            objective,
            steps=steps,
            batch_size=int(options["batch_size"]),
            seed=seed,
            folder=folder,
            learning_rate=1e-3,
            weight_decay=0.0,
            logging_steps=steps,
        )
        spent.append(time.perf_counter() - started)

    few = {"pixel_values": split.pixels[split.student], "labels": split.labels[split.student]}

    def finetune(model: Any) -> None:
        train(model, few, Classification(), int(options["finetuning_steps"]))

    def pretrain() -> dict[str, Any]:
        """The pre-trained body, and the network that was fine-tuned from it as it is."""
        torch.manual_seed(seed)
        classes = split.classes if kind == "supervised" else split.pixels[0].numel()
        network: Any = build_network(options["network"], shape, classes)
        seen = split.pixels[split.teacher]
        columns, objective = {"pixel_values": seen, "labels": split.labels[split.teacher]}, Classification()
        if kind == "self":
            columns, objective = {"pixel_values": seen}, _masked_pixels(seed)  # type: ignore[assignment]
        train(network, columns, objective, int(options["pretraining_steps"]))
        body = {f"body.{name}": value for name, value in network.body.state_dict().items()}
        model = new_head(body)
        finetune(model)
        whole = {f"finetuned.{name}": value for name, value in model.state_dict().items()}
        return {**body, **whole, "seconds": torch.tensor(spent)}

    def new_head(stored: Mapping[str, Any]) -> Any:
        torch.manual_seed(1000 + seed)
        model: Any = build_network(options["network"], shape, split.classes)
        model.body.load_state_dict(_part(stored, "body."))
        return model

    shared = tensors_once(Path(options.get("shared", folder)) / f"{kind}-{seed}.safetensors", pretrain)
    pretraining, unpruned = shared["seconds"].tolist()
    spent.clear()

    def finetune_or_take(model: Any) -> None:
        if all(bool(mask.all()) for name, mask in model.named_buffers() if name.endswith("_mask")):
            release_masks(model).load_state_dict(_part(shared, "finetuned."))
            spent.append(unpruned)
        else:
            finetune(model)

    def evaluate(model: Any) -> Any:
        right = predict(model, split.pixels, split.test).argmax(-1) == split.labels[split.test]
        return right.double().numpy()

    # Not the output layer, which is new.
    which: dict[str, Any] = {"targets": "all", "exclude": ("classifier",)}
    found = _measured(arm, seed, options, lambda: new_head(shared), evaluate, finetune_or_take, **which)
    # The points of a curve are measurements of as many networks; a lottery ticket needs all of its trainings.
    trainings = len(spent) if arm == "lottery" else 1
    steps = int(options["pretraining_steps"]) + trainings * int(options["finetuning_steps"])
    return found, steps, pretraining + trainings * sum(spent) / len(spent)


def prepare(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Where the arms find what they share."""
    return {"shared": str(folder / "pretrained")}


def _part(stored: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}


def _masked_pixels(seed: int) -> Callable[[Any, Mapping[str, Any]], Any]:
    """Squared error of the hidden half of the pixels, predicted from the others."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def objective(model: Any, batch: Mapping[str, Any]) -> Any:
        pixels = batch["pixel_values"]
        hidden = torch.rand(pixels.shape, generator=generator) < 0.5
        # The network subtracts 1/2: a hidden pixel is neither dark nor bright.
        guess = model(pixel_values=pixels.masked_fill(hidden, 0.5))
        error = (guess - pixels.flatten(1)).square() * hidden.flatten(1)
        return error.sum(1) / hidden.flatten(1).sum(1).clamp_min(1)

    return objective


def _measured(
    arm: str,
    seed: int,
    options: Mapping[str, Any],
    load: Callable[[], Any],
    evaluate: Callable[[Any], Any],
    finetune: Callable[[Any], None] | None,
    **which: Any,
) -> dict[str, float]:
    from lossmith.sparsity import (
        apply_masks,
        essential_sparsity,
        lottery_masks,
        mask_similarity,
        one_shot_masks,
        release_masks,
    )

    grid = [float(s) for s in options["grid"]]
    if arm in ("magnitude", "uniform", "random", "erk"):
        curve = essential_sparsity(
            load, evaluate, grid=grid, method=arm, finetune=finetune, seed=seed, tolerance=options["tolerance"], **which
        )
        found = {f"score@{s:g}": score for s, score in zip(grid, curve.scores, strict=True) if s}
        return found | {"s_star": curve.s_star, "knee": curve.knee.at}
    metrics: dict[str, float] = {}
    masks: Any = {}
    model = load()
    if arm == "two-of-four":
        masks = one_shot_masks(model, method="2:4", **which)
    elif arm == "lottery":
        if finetune is None:
            # No training, no tickets.
            return {}
        masks = lottery_masks(load, finetune, 0.5, **which)
        metrics["ticket_similarity"] = mask_similarity(masks, one_shot_masks(model, 0.5, **which))["cosine"]
    apply_masks(model, masks, hold=True)
    if finetune is not None:
        finetune(model)
    values = evaluate(release_masks(model))
    values, weights = values if isinstance(values, tuple) else (values, None)
    score = float(np.average(values, weights=weights))
    # The dense model's score stands at every sparsity, so that claims can compare with it.
    return metrics | {f"score@{s:g}": score for s in (grid if arm == "dense" else [0.5]) if s}


def _language_model(arm: str, seed: int, options: Mapping[str, Any]) -> tuple[dict[str, float], int]:
    from lossmith.sparsity import load_causal_model, text_evaluation

    model, tokenizer = load_causal_model(options["model"])
    longest = int(options["max_length"])
    longest = min(longest, getattr(model.config, "max_position_embeddings", None) or longest)
    texts = int(options["texts"])
    evaluate = text_evaluation(options["data"], tokenizer, texts=texts, max_length=longest, what="accuracy")

    def load() -> Any:
        return copy.deepcopy(model)

    found = _measured(arm, seed, options, load, evaluate, None)
    return {f"self/{name}": value for name, value in found.items()}, evaluate.tokens


DIGITS = {
    "model": None,
    "data": "digits",
    "size": None,
    "network": "mlp(256, 256, 256)",
    "teacher_examples": 1000,
    "student_examples": 300,
    "batch_size": 64,
    "tolerance": 0.01,
    "texts": 0,
    "max_length": 0,
}

STUDY = Study(
    slug="essential-sparsity",
    family="sparsity",
    question="How many weights of a pre-trained model can go in one step, for free?",
    paper=Paper(
        "The Emergence of Essential Sparsity in Large Pre-trained Models: The Weights that Matter", 2023, "2306.03805"
    ),
    arms=ARMS,
    baseline="dense",
    metric="self/score@0.5",
    metrics=(
        "self/score@0.5",
        "self/score@0.9",
        "self/score@0.98",
        "self/s_star",
        "self/knee",
        "self/ticket_similarity",
        "supervised/score@0.5",
        "supervised/score@0.9",
        "supervised/s_star",
        "supervised/knee",
        "self_less_supervised",
    ),
    lower_is_better=False,
    better={"self/score@0.9": "higher", "self/s_star": "higher", "supervised/s_star": "higher"},
    claims=CLAIMS,
    seeds={"smoke": 2, "quick": 8, "full": 3},
    options={
        "smoke": {**DIGITS, "pretraining_steps": 20, "finetuning_steps": 10, "grid": [0, 0.5, 0.9, 0.98]},
        "quick": {
            **DIGITS,
            "pretraining_steps": 600,
            "finetuning_steps": 100,
            "grid": [0, 0.3, 0.5, 0.7, 0.9, 0.98],
        },
        "full": {
            **DIGITS,
            "model": "facebook/opt-350m",
            "data": "Salesforce/wikitext:wikitext-103-raw-v1:validation",
            "pretraining_steps": 0,
            "finetuning_steps": 0,
            "grid": [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.98],
            "texts": 1000,
            "max_length": 1024,
        },
    },
    experiment=experiment,
    prepare=prepare,
    data="text for the language model of the full scale: a file, a folder or a hub id",
    notes=(
        "score@s: test accuracy (of a language model, of the next token) at sparsity s of the prunable matrices; "
        "dense: of the whole model, at every s. s_star: largest sparsity of the grid up to which every score is "
        "within 1 % of the dense one. ticket_similarity: cosine of the lottery-ticket masks and the one-shot masks at "
        "50 %.",
        "Seeds change the network, the order of the examples, the labelled examples and the random masks.",
        "Cost is that of one pruned network: one pre-training and its fine-tuning, for lottery tickets all of them. "
        "The other points of a curve are measurements. Only arms that a claim asks for have the supervised twin.",
    ),
)
