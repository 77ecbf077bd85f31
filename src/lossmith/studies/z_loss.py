"""Z-loss and the spherical family: which losses with an exact, cheap output layer come near log-softmax?

de Brébisson and Vincent, "The Z-loss: a shift and scale invariant classification loss belonging to the Spherical
Family", 2016, arXiv 1604.08859.

A word-level n-gram language model: embeddings of the last words, two layers, and an output layer over a large
vocabulary. The spherical arms train it with ``SphericalHead``, the others densely or by a tree; all by plain SGD for
the output layer (at a learning rate chosen by the same grid for every arm) and Adam for the rest.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lossmith.reporting.comparison import Claim, Cost
from lossmith.studies.study import Experiment, Paper, Study
from lossmith.studies.tensor_training import Trained, train_on_tensors

KS = (1, 5, 10, 20, 50, 100)

ARMS = {
    "log-softmax": "cross entropy, dense output layer",
    "hierarchical": "two-level hierarchical softmax",
    "taylor": "Taylor softmax, exact by SphericalHead",
    "spherical": "spherical softmax (eps 0.01), exact by SphericalHead",
    "z-plain": "Z-loss a=1 b=0, exact by SphericalHead",
    "z-low-k": "Z-loss a=0.1 b=10, exact by SphericalHead",
    "z-high-k": "Z-loss a=1 b=6, exact by SphericalHead",
}
HEADS: dict[str, dict[str, Any]] = {
    "taylor": {"loss": "taylor_softmax"},
    "spherical": {"loss": "spherical_softmax", "eps": 1e-2},
    "z-plain": {"loss": "z_loss", "a": 1.0, "b": 0.0},
    "z-low-k": {"loss": "z_loss", "a": 0.1, "b": 10.0},
    "z-high-k": {"loss": "z_loss", "a": 1.0, "b": 6.0},
}

CLAIMS = (
    Claim("Z-loss beats Taylor softmax by 3 points at k=1", "z-low-k", "top1/error", "lower", "taylor", 0.03),
    Claim("Z-loss beats spherical softmax by 10 points at k=1", "z-low-k", "top1/error", "lower", "spherical", 0.1),
    Claim("Small a, large b is better for k=1", "z-low-k", "top1/error", "lower", "z-high-k"),
    Claim("a=1, b=6 is better for k=100", "z-high-k", "top100/error", "lower", "z-low-k"),
    Claim("For k=20 Z-loss is within a point of log-softmax", "z-high-k", "top20/error", "lower", None, -0.01),
    Claim("A step takes less time than with log-softmax", "z-low-k", "seconds_per_step", "lower", ratio=0.8),
    Claim("A step takes less time than with a tree", "z-low-k", "seconds_per_step", "lower", "hierarchical", ratio=0.8),
)


def experiment(arm: str, seed: int, options: Mapping[str, Any], folder: Path) -> Experiment:
    """One model, tested on words that neither training nor the choice of the learning rate has seen."""
    rate = options["rates"][arm]
    started = time.perf_counter()
    model, trained = train(arm, seed, options, folder, steps=int(options["steps"]), rate=rate)
    seconds = time.perf_counter() - started
    metrics = {f"top{k}/error": e for k, e in errors(model, arm, options, "test").items()}
    metrics |= {"seconds_per_step": seconds / trained.steps, "output_learning_rate": rate}
    tokens = trained.steps * int(options["batch_size"])
    return Experiment(metrics, Cost(tokens=tokens, steps=trained.steps, seconds=seconds), train=trained.curve)


def train(
    arm: str, seed: int, options: Mapping[str, Any], folder: Path, *, steps: int, rate: float
) -> tuple[Any, Trained]:
    """A model of an arm, trained; the arms start from the same body and see the same batches."""
    import torch
    from torch import nn

    from lossmith.heads import HierarchicalSoftmax, SphericalHead
    from lossmith.training import SphericalHeadCallback, SphericalObjective
    from lossmith.training.networks import WordWindow

    words = _words(options)
    classes, width = int(words["vocabulary"]), int(options["width"])
    torch.manual_seed(seed)
    layer: Any = nn.Linear(width, classes, bias=False)
    nn.init.normal_(layer.weight, std=1e-3)
    if arm in HEADS:
        layer = SphericalHead.from_linear(layer, **HEADS[arm])
    elif arm == "hierarchical":
        layer = HierarchicalSoftmax(width, classes, init_std=1e-3)
    torch.manual_seed(seed)
    model = WordWindow(classes, int(options["context"]), int(options["embedding"]), tuple(options["hidden"]), layer)
    callbacks: list[Any] = []
    objective: Any
    if arm in HEADS:
        objective = SphericalObjective("classification")
        callbacks = [SphericalHeadCallback(lr_scale=rate)]
    elif arm == "hierarchical":

        def objective(model: Any, batch: Mapping[str, Any]) -> Any:
            return model.classifier(model.features(batch["context"]), batch["labels"])

    else:
        from lossmith.training import Classification

        objective = Classification()

    def optimizers(model: Any) -> tuple[Any, Any]:
        from lossmith.training.networks import AdamWithPlainOutput

        optimizer = AdamWithPlainOutput(
            model.body_parameters(), model.classifier.parameters(), lr=float(options["learning_rate"]), output_lr=rate
        )
        # SphericalHead follows the first group's rate: lr_scale makes of it the output layer's.
        if arm in HEADS:
            callbacks[0].lr_scale = rate / float(options["learning_rate"])
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))

    trained = train_on_tensors(
        model,
        {"context": words["train_context"], "labels": words["train_labels"]},
        objective,
        steps=steps,
        batch_size=int(options["batch_size"]),
        seed=seed,
        folder=folder,
        optimizers=optimizers,
        max_grad_norm=0.0,
        callbacks=callbacks,
    )
    return model, trained


def errors(model: Any, arm: str, options: Mapping[str, Any], part: str) -> dict[int, float]:
    """Share of words that are not among the model's ``k`` best."""
    import torch

    from lossmith.training.spherical import topk_errors

    words = _words(options)
    with torch.no_grad():
        hidden = model.eval().features(words[f"{part}_context"])
        first = model.classifier(hidden) if arm == "log-softmax" else model.classifier
        return topk_errors(first, hidden, words[f"{part}_labels"], KS)


def prepare(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Words as numbers; then every arm's learning rate of the output layer, by the same grid on validation words."""
    from safetensors.torch import save_file

    from lossmith.files import read_json, replacing, write_json

    words, path = folder / "words.safetensors", folder / "rates.json"
    if not words.exists():
        with replacing(words) as temporary:
            save_file(_number(options), temporary)
    prepared = {**options, "words": str(words)}
    rates = read_json(path) if path.exists() else {}
    for arm in ARMS:
        if arm not in rates:
            found = {}
            for rate in options["grid"]:
                try:
                    model, _ = train(
                        arm, 1000, prepared, folder / "grid", steps=int(options["grid_steps"]), rate=float(rate)
                    )
                    found[rate] = errors(model, arm, prepared, "validation")[1]
                except RuntimeError:
                    # It diverged: not this one.
                    found[rate] = 1.0
            rates[arm] = min(found, key=lambda rate: found[rate])
            write_json(path, rates)
    return {"words": str(words), "rates": rates}


def _number(options: Mapping[str, Any]) -> dict[str, Any]:
    """The most frequent words by number, cut into windows; the last tenth is for validation and testing."""
    import torch

    from lossmith.data import read_corpus
    from lossmith.errors import InputError

    text: list[str] = []
    limit = int(options["words"])
    for document in read_corpus(options["data"]):
        text += re.findall(r"[^\W\d]+|\d+|[^\w\s]", document.text)
        if len(text) >= limit:
            break
    context = int(options["context"])
    if len(text) < 50 * context:
        raise InputError(f"{options['data']} holds {len(text)} words: too few for windows of {context}")
    text = text[:limit]
    # Number 0 is every word that is not among the most frequent.
    kept = [word for word, _ in Counter(text[: int(0.9 * len(text))]).most_common(int(options["vocabulary"]) - 1)]
    lookup = {word: number for number, word in enumerate(kept, 1)}
    numbers = torch.tensor([lookup.get(word, 0) for word in text])
    windows = numbers.unfold(0, context + 1, 1)
    # Rare words are no targets: to predict "some rare word" is no prediction.
    parts: dict[str, Any] = {}
    for part, begin, end in (("train", 0.0, 0.9), ("validation", 0.9, 0.95), ("test", 0.95, 1.0)):
        rows = windows[int(begin * len(windows)) : int(end * len(windows))]
        rows = rows[rows[:, -1] > 0]
        if part != "train":
            rows = rows[: int(options["test_words"])]
        parts |= {f"{part}_context": rows[:, :-1].contiguous(), f"{part}_labels": rows[:, -1].contiguous()}
    return {**parts, "vocabulary": torch.tensor(len(kept) + 1)}


def _words(options: Mapping[str, Any]) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(options["words"])


NETWORK = {"data": "python", "context": 6, "embedding": 32, "hidden": [256, 96], "width": 96, "learning_rate": 2e-3}

STUDY = Study(
    slug="z-loss",
    family="heads",
    question="Which losses whose output layer costs nothing per class come near log-softmax?",
    paper=Paper(
        "The Z-loss: a shift and scale invariant classification loss belonging to the Spherical Family",
        2016,
        "1604.08859",
    ),
    arms=ARMS,
    baseline="log-softmax",
    metric="top1/error",
    metrics=(*(f"top{k}/error" for k in KS), "seconds_per_step", "output_learning_rate"),
    better={**{f"top{k}/error": "lower" for k in KS}, "seconds_per_step": "lower"},
    claims=CLAIMS,
    seeds={"smoke": 2, "quick": 3, "full": 3},
    options={
        "smoke": {
            **NETWORK,
            "words": 20_000,
            "vocabulary": 500,
            "batch_size": 32,
            "steps": 8,
            "test_words": 300,
            "grid": [1.0],
            "grid_steps": 2,
        },
        "quick": {
            **NETWORK,
            "words": 600_000,
            "vocabulary": 5000,
            "batch_size": 128,
            "steps": 500,
            "test_words": 4000,
            "grid": [0.04, 0.2, 1.0, 5.0, 25.0, 125.0],
            "grid_steps": 150,
        },
        "full": {
            **NETWORK,
            "data": "dvruette/lm1b",
            "context": 9,
            "embedding": 512,
            "hidden": [2048, 2048, 512],
            "width": 512,
            "words": 800_000_000,
            "vocabulary": 793_471,
            "batch_size": 200,
            "steps": 4_000_000,
            "test_words": 150_000,
            "grid": [0.008, 0.04, 0.2, 1.0, 5.0, 25.0, 125.0],
            "grid_steps": 20_000,
        },
    },
    experiment=experiment,
    prepare=prepare,
    data="text: a file, a folder or a hub id",
    notes=(
        "topK/error: share of test words that are not among the K best of the vocabulary. The output layer is trained "
        "by plain SGD in every arm, at the best of the same grid of learning rates, chosen by top-1 error on "
        "validation words in shorter runs with another seed; these runs are not in the cost.",
    ),
)
