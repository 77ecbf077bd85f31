"""Plackett-Luce distillation: is one ranking a better lesson than the teacher's probabilities?

"PLD: A Choice-Theoretic List-Wise Knowledge Distillation", 2025, arXiv 2506.12542.

A small image classifier learns from a larger one, on few examples: with true labels, and with 30 % of the labels drawn
at random, where weighing the label by the teacher's trust in it should show. ``--data`` takes a folder of images;
``full`` is the paper's ResNet-50 from ResNet-152.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lossmith.reporting.comparison import Claim, Cost
from lossmith.studies.image_classification import (
    build_network,
    load_teacher,
    noisy_labels,
    predict,
    prepare_teacher,
    rank_correlation,
    read_split,
)
from lossmith.studies.study import Experiment, Paper, Study
from lossmith.studies.tensor_training import Trained, train_on_tensors

NOISE = 0.3

# Options of training.Distillation, by arm; the weights of the mixtures are those of the digest's experiment.
OBJECTIVES: dict[str, dict[str, Any] | None] = {
    "ce": None,
    "label-smoothing": None,
    "kd": {"loss": "distillation_kl(temperature=2)", "label_weight": 0.1, "distillation_weight": 0.9},
    "dkd": {"loss": "decoupled_kl(temperature=2)", "label_weight": 1.0},
    "dist": {"loss": "dist(beta=2, gamma=2)", "label_weight": 1.0},
    "pld": {"loss": "plackett_luce_distillation(temperature=1)"},
    "pld-2": {"loss": "plackett_luce_distillation(temperature=2)"},
    "pld-4": {"loss": "plackett_luce_distillation(temperature=4)"},
    "list-mle": {"loss": "plackett_luce_distillation(weights=uniform)"},
    "p-list-mle": {"loss": "plackett_luce_distillation(weights=position)"},
}

ARMS = {
    "ce": "cross entropy on the labels, no teacher",
    "label-smoothing": "cross entropy with label smoothing 0.1, no teacher",
    "kd": "0.1 cross entropy + 0.9 KL at temperature 2",
    "dkd": "cross entropy + decoupled KL (1, 8) at temperature 2",
    "dist": "cross entropy + 2 correlation over classes + 2 over examples",
    "pld": "Plackett-Luce, teacher's weights at temperature 1",
    "pld-2": "Plackett-Luce, temperature 2",
    "pld-4": "Plackett-Luce, temperature 4",
    "list-mle": "Plackett-Luce, all ranks count the same",
    "p-list-mle": "Plackett-Luce, weights fall by half from rank to rank",
}

CLAIMS = (
    Claim("PLD beats cross entropy by 5 points with noisy labels", "pld", "noisy/accuracy", "higher", margin=0.05),
    Claim("PLD needs no mixing weight to be within a point of KD", "pld", "noisy/accuracy", "higher", "kd", -0.01),
    Claim("PLD beats KD with true labels", "pld", "accuracy", "higher", "kd"),
    Claim("PLD beats DIST with true labels", "pld", "accuracy", "higher", "dist"),
    Claim("The teacher's weights beat uniform ones (ListMLE)", "pld", "noisy/accuracy", "higher", "list-mle"),
    Claim("A higher temperature follows the teacher's order", "pld-4", "noisy/rank_correlation", "higher", "pld"),
)


def experiment(arm: str, seed: int, options: Mapping[str, Any], folder: Path) -> Experiment:
    """One student on true labels and one on noisy ones."""
    split = read_split(options, seed)
    teacher = load_teacher(options, split)
    teachers = predict(teacher, split.pixels, split.test)
    metrics: dict[str, float] = {"teacher/accuracy": _accuracy(teachers, split.labels[split.test])}
    started, runs = time.perf_counter(), []
    for prefix, noise in (("", 0.0), ("noisy/", NOISE)):
        labels = noisy_labels(split.labels[split.student], split.classes, noise, seed)
        student, trained = _train(arm, seed, options, folder, split, labels, teacher)
        runs.append(trained)
        logits = predict(student, split.pixels, split.test)
        metrics[f"{prefix}accuracy"] = _accuracy(logits, split.labels[split.test])
        metrics[f"{prefix}rank_correlation"] = rank_correlation(logits, teachers)
    cost = Cost(
        tokens=sum(r.steps for r in runs) * int(options["batch_size"]),
        steps=sum(r.steps for r in runs),
        seconds=time.perf_counter() - started,
        flops=sum(r.flops for r in runs),
    )
    return Experiment(metrics, cost, train=runs[-1].curve)


def _train(
    arm: str, seed: int, options: Mapping[str, Any], folder: Path, split: Any, labels: Any, teacher: Any
) -> tuple[Any, Trained]:
    import torch

    from lossmith.data.images import Augmented
    from lossmith.training import Classification, Distillation

    torch.manual_seed(seed)
    student = build_network(options["student"], split.pixels.shape[1:], split.classes)
    if (chosen := OBJECTIVES[arm]) is not None:
        objective: Any = Distillation(teacher, task="classification", **chosen)
    else:
        objective = Classification(label_smoothing=0.1 if arm == "label-smoothing" else 0.0)
    pixels = split.pixels[split.student]
    if options["padding"]:
        pixels = Augmented(pixels, padding=int(options["padding"]), seed=seed)
    batch_size = int(options["batch_size"])
    trained = train_on_tensors(
        student,
        {"pixel_values": pixels, "labels": labels},
        objective,
        steps=int(options["epochs"]) * -(-len(labels) // batch_size),
        batch_size=batch_size,
        seed=seed,
        folder=folder,
        lr_scheduler_type="cosine",
        learning_rate=float(options["learning_rate"]),
        weight_decay=float(options["weight_decay"]),
        use_cpu=not torch.cuda.is_available(),
    )
    return student, trained


def _accuracy(logits: Any, labels: Any) -> float:
    return float((logits.argmax(-1) == labels).double().mean())


DIGITS = {
    "data": "digits",
    "size": None,
    "teacher": "mlp(256, 256)",
    "student": "mlp(8)",
    "teacher_examples": 1000,
    "student_examples": 300,
    "batch_size": 64,
    "learning_rate": 1e-2,
    "weight_decay": 1e-2,
    "padding": 0,
}

STUDY = Study(
    slug="plackett-luce-distillation",
    family="losses",
    question="Is one ranking of the classes a better lesson than the teacher's probabilities?",
    paper=Paper("PLD: A Choice-Theoretic List-Wise Knowledge Distillation", 2025, "2506.12542"),
    arms=ARMS,
    baseline="ce",
    metric="noisy/accuracy",
    metrics=("noisy/accuracy", "accuracy", "noisy/rank_correlation", "rank_correlation", "teacher/accuracy"),
    lower_is_better=False,
    better={"accuracy": "higher"},
    claims=CLAIMS,
    seeds={"smoke": 2, "quick": 6, "full": 3},
    options={
        "smoke": {**DIGITS, "teacher_epochs": 4, "epochs": 3},
        "quick": {**DIGITS, "teacher_epochs": 40, "epochs": 60},
        "full": {
            "data": None,
            "size": 224,
            "teacher": "microsoft/resnet-152",
            "student": "microsoft/resnet-50",
            "teacher_examples": 1_231_167,
            "student_examples": 1_231_167,
            "teacher_epochs": 0,
            "epochs": 100,
            "batch_size": 256,
            "learning_rate": 1e-3,
            "weight_decay": 0.02,
            "padding": 16,
        },
    },
    experiment=experiment,
    prepare=prepare_teacher,
    data="a folder with one sub-folder of images per class",
    notes=(
        "noisy/...: 30 % of the student's training labels are drawn at random. rank_correlation: Spearman's, between "
        "the student's and the teacher's order of the classes, mean over the test images.",
    ),
)
