"""Dice loss: does a soft F1 help where the positive class is rare and F1 is the score?

Li et al., "Dice Loss for Data-imbalanced NLP Tasks", 2020, arXiv 1911.02855.

Tagging: dotted names that begin with a module of the standard library (``os.path.join``) are to be found in its own
documentation: some percent of the words, known exactly. ``--data`` takes CoNLL files instead. ``gaussian``: a small
network on two classes of points, the positives 2, 5 or 50 percent of them.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossmith.reporting.comparison import Claim, Cost
from lossmith.studies.study import Experiment, Paper, Study
from lossmith.studies.tensor_training import train_on_tensors

if TYPE_CHECKING:
    from lossmith.tasks.text import Sentence

LOSSES = {
    "ce": "cross_entropy",
    "weighted-ce": "weighted_cross_entropy",
    "focal": "focal_loss(gamma=2)",
    "dice-printed": "dice_loss(alpha=0)",
    "dice": "set_dice_loss(alpha=0)",
    "dice-adjusting": "set_dice_loss(alpha=0.01)",
    "tversky": "set_tversky_loss(false_positives=0.4, false_negatives=0.6)",
}
ARMS = {
    "ce": "cross entropy",
    "weighted-ce": "cross entropy, classes weighed by their frequency",
    "focal": "focal loss, gamma 2",
    "dice-printed": "Dice loss of each example by itself, as printed",
    "dice": "Dice loss of the whole batch (soft F1)",
    "dice-adjusting": "the same, self-adjusting with alpha 0.01 (the released setting)",
    "tversky": "Tversky loss of the whole batch, misses cost more",
}
CLAIMS = (
    Claim("Soft F1 beats cross entropy by 0.3 at 2 % positives", "dice", "gaussian/f1_2", "higher", margin=0.3),
    Claim("Soft F1 beats cross entropy by 0.1 at 5 % positives", "dice", "gaussian/f1_5", "higher", margin=0.1),
    Claim("With equal classes it changes nothing (0.02)", "dice", "gaussian/accuracy_50", "equal", margin=0.02),
    Claim("The printed form harms at 5 % positives", "dice-printed", "gaussian/f1_5", "lower"),
    Claim("Soft F1 finds entities better than cross entropy", "dice", "entity_f1", "higher"),
    Claim("Self-adjusting is better than plain soft F1", "dice-adjusting", "entity_f1", "higher", against="dice"),
    Claim("Soft F1 finds entities better than focal loss", "dice", "entity_f1", "higher", against="focal"),
)


def experiment(arm: str, seed: int, options: Mapping[str, Any], folder: Path) -> Experiment:
    """One tagger, and three small networks on points."""
    from lossmith.tasks.text import TokenTagger, read_conll

    started = time.perf_counter()
    train, test = (read_conll(options[part]) for part in ("train", "test"))
    tagger = TokenTagger(
        options["model"],
        loss=LOSSES[arm],
        epochs=options["epochs"],
        batch_size=int(options["batch_size"]),
        learning_rate=float(options["learning_rate"]),
        width=int(options["width"]),
        seed=seed,
    )
    scores = tagger.fit(train).evaluate(test)
    metrics = {
        "entity_f1": scores.f1,
        "entity_precision": scores.precision,
        "entity_recall": scores.recall,
        "accuracy": scores.accuracy,
    }
    steps, curve = int(tagger.steps_), None
    for percent in (2, 5, 50):
        f1, accuracy, trained = gaussian(arm, seed, percent / 100, int(options["points"]), folder)
        metrics[f"gaussian/f1_{percent}"] = f1
        if percent == 50:
            metrics["gaussian/accuracy_50"] = accuracy
        steps += trained.steps
        curve = trained.curve if curve is None else curve
    assert curve is not None
    words = int(options["epochs"]) * sum(len(s.words) for s in train)
    return Experiment(metrics, Cost(tokens=words, steps=steps, seconds=time.perf_counter() - started), train=curve)


def gaussian(arm: str, seed: int, share: float, number: int, folder: Path) -> tuple[float, float, Any]:
    """F1 and accuracy of a small network; the positives are shifted along one of two directions."""
    import torch
    from torch import nn

    from lossmith.losses import class_weights, cross_entropy, set_dice_loss, set_tversky_loss
    from lossmith.registry import parse_spec
    from lossmith.training import Classification, SetClassification

    generator = torch.Generator().manual_seed(100 + seed)
    size = number + 20_000
    y = (torch.rand(size, generator=generator) < share).long()
    x = torch.randn(size, 20, generator=generator)
    other = torch.rand(size, generator=generator) < 0.3
    shift = torch.zeros(2, 20)
    shift[0, :5], shift[1, 5:10] = 2.6 / 5**0.5, 3.12 / 5**0.5
    x += y.unsqueeze(-1) * shift[other.long()]
    torch.manual_seed(seed)
    spec = parse_spec(LOSSES[arm])
    single = spec.name in ("dice_loss", "set_dice_loss", "set_tversky_loss")
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 1 if single else 2))
    objective: Any
    if spec.name == "set_dice_loss":
        objective = SetClassification(set_dice_loss, **spec.options)
    elif spec.name == "set_tversky_loss":
        objective = SetClassification(set_tversky_loss, **spec.options)
    elif spec.name == "weighted_cross_entropy":
        weights = class_weights(torch.bincount(y[:number], minlength=2)).float()
        objective = Classification(lambda logits, targets: cross_entropy(logits, targets) * weights[targets])
    else:
        from lossmith.registry import LOSSES as REGISTERED

        # A single logit is more than the registry's trial on two classes expects: the function itself is given.
        objective = Classification(REGISTERED.get(spec.name), **spec.options)
    trained = train_on_tensors(
        model,
        {"input": x[:number], "labels": y[:number]},
        objective,
        steps=15 * -(-number // 512),
        batch_size=512,
        seed=seed,
        folder=folder,
        learning_rate=3e-3,
        weight_decay=1e-2,
    )
    with torch.no_grad():
        logits, truth = model(x[number:]), y[number:] == 1
    found = (logits[:, 0] > 0) if single else logits.argmax(-1) == 1
    right = float((found & truth).sum())
    f1 = 2 * right / max(1.0, float(found.sum() + truth.sum()))
    return f1, float((found == truth).double().mean()), trained


def prepare(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Two CoNLL files: the user's, or dotted names in the standard library's documentation."""
    from lossmith.errors import InputError
    from lossmith.tasks.text.conll import read_conll, write_conll

    train, test = folder / "train.conll", folder / "test.conll"
    source = options["data"]
    if source is None:
        raise InputError(
            "this scale needs --data: a CoNLL file, or a folder with train.conll and dev.conll or test.conll"
        )
    if source != "python" and Path(source).is_dir():
        found = [Path(source) / f"{name}.conll" for name in ("train", "dev", "test")]
        tested = [path for path in found[1:] if path.exists()]
        if not found[0].exists() or not tested:
            raise InputError(f"{source} must hold train.conll and dev.conll or test.conll")
        return {"train": str(found[0]), "test": str(tested[-1])}
    if not test.exists():
        sentences = documentation(int(options["sentences"])) if source == "python" else read_conll(source)
        if len(sentences) < 10:
            raise InputError(f"{source} holds {len(sentences)} sentences: too few to train and test on")
        cut = int(0.8 * len(sentences))
        write_conll(train, sentences[:cut])
        write_conll(test, sentences[cut:])
    return {"train": str(train), "test": str(test)}


def documentation(number: int) -> list[Sentence]:
    """Sentences (6 to 32 words) of the embedded corpus's ``docs``; dotted names that begin with a module are tagged."""
    import random

    from lossmith.data import read_corpus
    from lossmith.tasks.text import Sentence

    modules = sys.stdlib_module_names
    sentences: list[Sentence] = []
    for document in read_corpus("python"):
        if document.domain != "docs":
            continue
        for text in re.split(r"(?<=[.!?:])\s+|\n\s*\n", document.text):
            words = re.findall(r"\w+|[^\w\s]", text)
            if not 6 <= len(words) <= 32:
                continue
            tags = ["O"] * len(words)
            i = 0
            while i < len(words):
                end = i + 1
                while end + 1 < len(words) and words[end] == "." and re.match(r"[A-Za-z_]", words[end + 1]):
                    end += 2
                if words[i] in modules and end > i + 1:
                    tags[i:end] = ["B-name"] + ["I-name"] * (end - i - 1)
                i = end
            sentences.append(Sentence(tuple(words), tuple(tags)))
    draw = random.Random(0)
    draw.shuffle(sentences)
    # Of sentences without a name as many as of those with one: a tenth of the words is then part of a name.
    named = [s for s in sentences if "B-name" in s.tags][: number // 2]
    others = [s for s in sentences if "B-name" not in s.tags][: number - len(named)]
    chosen = named + others
    draw.shuffle(chosen)
    return chosen


TAGGER = {"model": None, "batch_size": 32, "learning_rate": 2e-3, "width": 48}

STUDY = Study(
    slug="dice-loss",
    family="losses",
    question="Does a soft F1 help where the positive class is rare and F1 is the score?",
    paper=Paper("Dice Loss for Data-imbalanced NLP Tasks", 2020, "1911.02855"),
    arms=ARMS,
    baseline="ce",
    metric="entity_f1",
    metrics=(
        "entity_f1",
        "gaussian/f1_2",
        "gaussian/f1_5",
        "gaussian/f1_50",
        "gaussian/accuracy_50",
        "entity_precision",
        "entity_recall",
        "accuracy",
    ),
    lower_is_better=False,
    better=dict.fromkeys(("gaussian/f1_2", "gaussian/f1_5", "gaussian/f1_50", "gaussian/accuracy_50"), "higher"),
    claims=CLAIMS,
    seeds={"smoke": 2, "quick": 5, "full": 5},
    options={
        "smoke": {**TAGGER, "data": "python", "sentences": 60, "epochs": 1, "points": 600},
        "quick": {**TAGGER, "data": "python", "sentences": 600, "epochs": 4, "points": 8000},
        "full": {
            **TAGGER,
            "data": None,
            "model": "google-bert/bert-base-cased",
            "learning_rate": 3e-5,
            "sentences": 0,
            "epochs": 10,
            "points": 8000,
        },
    },
    experiment=experiment,
    prepare=prepare,
    data="a CoNLL file, or a folder with train.conll and dev.conll or test.conll",
    notes=(
        "entity_f1: whole entities, by seqeval. gaussian/f1_2 and so on: F1 at the threshold 1/2 with 2, 5 and 50 "
        "percent positives among 8,000 points, tested on 20,000. All arms have the same learning rates and steps.",
    ),
)
