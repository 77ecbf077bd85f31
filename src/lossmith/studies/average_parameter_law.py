"""Average parameter count: is a model that loses weights while it is trained worth a dense one of its average size?

Jin et al., "The Journey Matters: Average Parameter Count over Pre-training Unifies Sparse and Dense Scaling Laws",
2025, arXiv 2501.12486.

Character models on real text: three dense sizes for three lengths, sparse runs beside them, and the sparse run's
alternatives at its own compute. A law fitted to the dense runs alone then predicts the sparse ones, given their
average, final or initial number of parameters. ``--data`` takes a text; ``full`` is a Llama-style model on C4.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossmith.reporting.comparison import Claim, Cost, Curve
from lossmith.studies.settings import CompareSettings, make_settings
from lossmith.studies.sharing import json_once
from lossmith.studies.study import Experiment, Paper, Study
from lossmith.studies.tensor_training import train_on_tensors

if TYPE_CHECKING:
    from torch import Tensor

ARMS = {
    "average": "dense, as many weights as the sparse run has on average",
    "sparse": "80 % pruned between a quarter and three quarters of the compute",
    "final": "dense, as many weights as the sparse run keeps",
    "initial": "dense, as many weights as the sparse run begins with",
    "early": "80 % pruned in the first half of the compute, equal compute",
    "late": "80 % pruned in the second half of the compute, equal compute",
    "random": "the sparse run's schedule, weights chosen at random",
}

CLAIMS = (
    Claim("A sparse run equals a dense model of its average size (0.05 nats)", "sparse", "loss", "equal", margin=0.05),
    Claim("It beats a dense model of its final size by 0.08", "sparse", "loss", against="final", margin=0.08),
    Claim("Pruning early is no better by 0.02", "sparse", "loss", against="early", margin=-0.02),
    Claim("Pruning late is no better by 0.02", "sparse", "loss", against="late", margin=-0.02),
    Claim("Magnitude is better than chance", "sparse", "loss", against="random"),
    Claim("The average count predicts better than the final one", "average", "law/error", against="final"),
    Claim("The average count predicts better than the initial one", "average", "law/error", against="initial"),
)

CONTEXT, EMBEDDED, SPARSITY, MILDER = 16, 16, 0.8, 0.5
_ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
_LAW_ARMS = ("average", "final", "initial")


@dataclass(frozen=True, slots=True)
class Training:
    """One model of the study."""

    name: str
    width: int
    steps: int
    sparsity: float = 0.0
    start: float = 0.25
    end: float = 0.75
    score: str = "magnitude"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a training gave: the held-out loss, what it cost, and its three counts of weights."""

    loss: float
    params: int
    avg_params: float
    final_params: int
    sparsity: float
    tokens: int
    steps: int
    seconds: float
    flops: float
    curve: Mapping[str, Any]


def experiment(arm: str, seed: int, options: Mapping[str, Any], folder: Path) -> Experiment:
    """The arm's own training, and for the counts the law; trainings are shared by the arms of a seed."""
    shared = folder.parents[2] / "trainings" / f"seed-{seed}"
    plan = trainings(options)
    mine = _trained(plan[arm][0], seed, options, shared)
    metrics = {"loss": mine.loss, "parameters/average": mine.avg_params, "parameters/final": float(mine.final_params)}
    if arm in _LAW_ARMS:
        metrics |= law_errors(arm, [_trained(t, seed, options, shared) for t in _order(arm, plan)])
    cost = Cost(tokens=mine.tokens, steps=mine.steps, seconds=mine.seconds, flops=mine.flops)
    return Experiment(metrics, cost, train=Curve(**{k: tuple(v) for k, v in mine.curve.items()}))


def trainings(options: Mapping[str, Any]) -> dict[str, list[Training]]:
    """The trainings of every arm; the first is the one that arms are compared by, the others are for the law."""
    from lossmith.sparsity import PruningSchedule, average_density, steps_for_compute

    width, steps = int(options["width"]), int(options["steps"])
    lengths = [steps, steps // 2, steps // 4]
    whole = linear_weights(width)
    average = PruningSchedule.from_compute(steps, SPARSITY).average_parameters(whole)
    found = {
        "average": [Training("average", width_of(average), n) for n in lengths],
        "sparse": [Training("sparse", width, n, SPARSITY) for n in lengths]
        + [Training("milder", width, steps, MILDER)],
        "final": [Training("final", width_of((1 - SPARSITY) * whole), n) for n in lengths],
        "initial": [Training("initial", width, n) for n in lengths],
        "random": [Training("random", width, steps, SPARSITY, score="random")],
    }
    compute = 6 * average_density(SPARSITY) * whole * steps
    for name, start, end in (("early", 0.0, 0.5), ("late", 0.5, 1.0)):
        equal = steps_for_compute(compute, whole, SPARSITY, tokens_per_step=1, start=start, end=end)
        found[name] = [Training(name, width, equal, SPARSITY, start, end)]
    return found


def linear_weights(width: int) -> int:
    """Weights of the three linear layers: those that are pruned and counted."""
    return (CONTEXT * EMBEDDED + len(_ALPHABET)) * width + width * width


def width_of(weights: float) -> int:
    """The width whose :func:`linear_weights` are nearest."""
    half = (CONTEXT * EMBEDDED + len(_ALPHABET)) / 2
    return max(round(math.sqrt(half * half + weights) - half), 1)


def law_errors(count: str, outcomes: list[Outcome]) -> dict[str, float]:
    """Mean relative errors at the sparse runs, in percent, when their size is counted so."""
    from lossmith.laws import Reading, compare_counts

    names = ("params", "avg_params", "final_params", "sparsity", "tokens", "loss")
    table = {name: [getattr(outcome, name) for outcome in outcomes] for name in names}
    # Thousands of tokens are meant.
    reading = Reading(scale={"tokens": 1, "params": 1, "avg_params": 1, "final_params": 1})
    fit = next(fit for fit in compare_counts(table, reading=reading) if fit.count == count)
    return {"law/error": 100 * fit.predicted_error, "law/together": 100 * fit.sparse_error}


def _order(arm: str, plan: Mapping[str, list[Training]]) -> list[Training]:
    """The arm's own first and the others from there on, so that workers do not wait for each other."""
    names = ["average", "final", "initial", "sparse"]
    place = names.index(arm)
    return [training for name in names[place:] + names[:place] for training in plan[name]]


def _trained(training: Training, seed: int, options: Mapping[str, Any], shared: Path) -> Outcome:
    """The outcome of a training, computed by whichever arm needs it first."""
    place = shared / f"{training.name}-{training.steps}"
    return Outcome(**json_once(place / "outcome.json", lambda: asdict(train(training, seed, options, place))))


def train(training: Training, seed: int, options: Mapping[str, Any], folder: Path) -> Outcome:
    """A multi-layer perceptron that predicts the next of 16 characters."""
    import torch
    from torch import nn

    from lossmith.losses import cross_entropy
    from lossmith.sparsity import ComputeSchedule, SparsePretraining
    from lossmith.training import SparsityCallback

    windows = text_codes(Path(options["text"])).unfold(0, CONTEXT + 1, 1)
    held_out = windows[len(windows) * 9 // 10 + CONTEXT :]
    held_out = held_out[:: max(len(held_out) // int(options["held_out"]), 1)]
    known = windows[: len(windows) * 9 // 10]
    torch.manual_seed(seed)
    width, batch_size = training.width, int(options["batch_size"])
    model = nn.Sequential(
        nn.Embedding(len(_ALPHABET), EMBEDDED),
        nn.Flatten(-2),
        nn.Linear(CONTEXT * EMBEDDED, width, bias=False),
        nn.ReLU(),
        nn.Linear(width, width, bias=False),
        nn.ReLU(),
        nn.Linear(width, len(_ALPHABET), bias=False),
    )
    sparsity = SparsePretraining(
        ComputeSchedule(training.sparsity, training.start, training.end),
        score="random" if training.score == "random" else "magnitude",
        seed=seed,
    )
    started = time.perf_counter()
    trained = train_on_tensors(
        model,
        {"inputs": known[:, :-1], "labels": known[:, -1]},
        lambda model, batch: cross_entropy(model(batch["inputs"]), batch["labels"]),
        steps=training.steps,
        batch_size=batch_size,
        seed=seed,
        folder=folder,
        callbacks=[SparsityCallback(sparsity)],
        use_cpu=not torch.cuda.is_available(),
        learning_rate=float(options["learning_rate"]),
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.05},
        warmup_steps=min(100, training.steps // 4),
        adam_beta2=0.95,
        weight_decay=0.1,
    )
    seconds = time.perf_counter() - started
    model.eval()
    with torch.no_grad():
        device = next(model.parameters()).device
        loss = float(cross_entropy(model(held_out[:, :-1].to(device)), held_out[:, -1].to(device)).double().mean())
    return Outcome(
        loss=loss,
        params=sparsity.number,
        avg_params=sparsity.average_parameters(training.steps),
        final_params=sparsity.active,
        sparsity=training.sparsity,
        tokens=training.steps * batch_size,
        steps=training.steps,
        seconds=seconds,
        flops=trained.flops,
        curve=asdict(trained.curve),
    )


def text_codes(path: Path) -> Tensor:
    """The text's characters as their places in the alphabet, which is in the order of its bytes."""
    import numpy as np
    import torch

    alphabet, text = (np.frombuffer(found, dtype=np.uint8) for found in (_ALPHABET.encode(), path.read_bytes()))
    return torch.from_numpy(np.searchsorted(alphabet, text))


def prepare(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Printable ASCII of the user's text, or of the beginning of the embedded corpus."""
    from lossmith.data import read_corpus
    from lossmith.errors import InputError
    from lossmith.files import write_text

    path, text = folder / "text.txt", ""
    if not path.exists():
        for document in read_corpus(str(options.get("data") or "python")):
            text += "".join(c for c in document.text if c in _ALPHABET) + "\n"
            if len(text) >= options["characters"]:
                break
        if len(text) < 50 * CONTEXT:
            raise InputError(
                f"--data {options.get('data')} has {len(text)} printable ASCII characters; the study needs "
                f"{50 * CONTEXT} or more"
            )
        write_text(path, text[: int(options["characters"])])
    return {"text": str(path)}


def comparison(scale: str, data: str | None) -> tuple[CompareSettings, tuple[Claim, ...]]:
    """``full``: the released configuration ``llama2-70m`` (60 % pruned), with dense models of its three sizes."""
    from lossmith.sparsity import average_density

    sparse, steps, per_step = 0.6, 26_800, 16 * 2048
    shape = {"num_hidden_layers": 6, "num_attention_heads": 8, "tie_word_embeddings": False}
    # Matrix parameters with 32,000 tokens: 41.5M, on average 25.3M, in the end 16.6M.
    sizes = {
        "initial": {"hidden_size": 512, "intermediate_size": 2048},
        "average": {"hidden_size": 384, "intermediate_size": 1376},
        "final": {"hidden_size": 288, "intermediate_size": 1040, "num_attention_heads": 6},
    }
    arms: list[dict[str, Any]] = [{name: {"model_overrides": {**shape, **size}}} for name, size in sizes.items()]
    for name, start, end in (("sparse", 0.25, 0.75), ("early", 0.0, 0.5), ("late", 0.5, 1.0)):
        weights = f"sparse_pretraining(final={sparse}, start={start}, end={end}, interval=100)"
        # As many steps as cost the same.
        equal = round(steps * average_density(sparse) / average_density(sparse, start=start, end=end))
        options = {"weights": weights, "tokens": equal * per_step}
        arms.append({name: {**options, "model_overrides": {**shape, **sizes["initial"]}}})
    values: dict[str, Any] = {
        "data": data or "allenai/c4",
        "arms": arms,
        "baseline": "average",
        "model": "small",
        "model_overrides": {"initializer_range": 0.02},
        "vocab_size": 32_000,
        "packing": "concatenated",
        "sequence_length": 2048,
        "batch_size": 16,
        "tokens": steps * per_step,
        "eval_tokens": 2_000_000,
        "evaluations": 10,
        "training": {
            "learning_rate": 6.4e-3,
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
            "warmup_steps": 268,
        },
    }
    claims = (
        Claim("A sparse run equals a dense model of its average size", "sparse", "eval/loss", "equal", margin=0.05),
        Claim("It beats a dense model of its final size", "sparse", "eval/loss", against="final"),
        Claim("Pruning early is no better by 0.02", "sparse", "eval/loss", against="early", margin=-0.02),
        Claim("Pruning late is no better by 0.02", "sparse", "eval/loss", against="late", margin=-0.02),
    )
    return make_settings(values), claims


STUDY = Study(
    slug="average-parameter-law",
    family="sparsity",
    question="Is a model that loses weights while it is trained worth a dense one of its average size?",
    paper=Paper(
        "The Journey Matters: Average Parameter Count over Pre-training Unifies Sparse and Dense Scaling Laws",
        2025,
        "2501.12486",
    ),
    arms=ARMS,
    baseline="average",
    metric="loss",
    metrics=("loss", "law/error", "law/together", "parameters/average", "parameters/final"),
    better={"law/error": "lower", "law/together": "lower"},
    claims=CLAIMS,
    seeds={"smoke": 2, "quick": 4, "full": 3},
    options={
        "smoke": {
            "width": 48,
            "steps": 40,
            "batch_size": 64,
            "learning_rate": 5e-3,
            "characters": 60_000,
            "held_out": 1000,
        },
        "quick": {
            "width": 192,
            "steps": 480,
            "batch_size": 512,
            "learning_rate": 2e-3,
            "characters": 2_000_000,
            "held_out": 20_000,
        },
    },
    experiment=experiment,
    prepare=prepare,
    comparison=comparison,
    data="a text, or a folder or data set of texts",
    notes=(
        "loss: nats per character on the last tenth of the text. parameters/...: weights of the linear layers.",
        "law/error: mean relative error, in percent, at which Chinchilla's law, fitted to the nine dense runs alone "
        "(three sizes, three lengths), predicts the four sparse runs when it is given this arm's count as their size; "
        "law/together: the error at the sparse runs of a law fitted to all thirteen.",
        "Cost is that of the run that gives loss, with FLOPs of active weights; three arms wait for the law's runs "
        "besides. Without kernels for unstructured sparsity a sparse run takes as long as a dense one of its initial "
        "size.",
    ),
)
