"""Dual-head distillation: do labels and a teacher's logits need a head each?

Yang et al., "Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary Head", 2024,
arXiv 2411.08937.

Two experiments. ``mixture``: 50 classes of two Gaussian clusters each, a student too small for them; the cosine between
the gradients of the two losses is measured in the output layer and in the backbone at the end of training. ``images``:
scikit-learn's digits with 150 labelled examples, or the folder given by ``--data``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lossmith.reporting.comparison import Claim, Cost
from lossmith.studies.image_classification import (
    Split,
    build_network,
    load_teacher,
    predict,
    prepare_teacher,
    read_split,
)
from lossmith.studies.sharing import json_once
from lossmith.studies.study import Experiment, Paper, Study
from lossmith.studies.tensor_training import Trained, train_on_tensors

# What each arm adds to cross entropy (nothing: none); "weak" and "strong" are the options mixture_alpha and alpha.
ARMS_OPTIONS: dict[str, dict[str, Any]] = {
    "ce": {},
    "kd": {"loss": "distillation_kl(temperature=4)", "heads": "single"},
    "logits-only": {"loss": "binary_kl_norm", "heads": "single", "gamma": 0.0},
    "one-head": {"loss": "binary_kl_norm", "heads": "single"},
    "one-head-strong": {"loss": "binary_kl_norm", "heads": "single", "strong": True},
    "dual": {"loss": "binary_kl_norm"},
    "dual-strong": {"loss": "binary_kl_norm", "strong": True},
    "dual-mlp": {"loss": "binary_kl_norm", "auxiliary": "mlp"},
    "dual-aligned": {"loss": "binary_kl_norm", "aligned": True},
    "dual-plain": {"loss": "binary_kl"},
}

ARMS = {
    "ce": "cross entropy, no teacher",
    "kd": "cross entropy + KL at temperature 4, one head",
    "logits-only": "BinaryKL-Norm to the teacher alone, one head",
    "one-head": "cross entropy + BinaryKL-Norm on one head",
    "one-head-strong": "the same with the teacher's part five times as strong on the mixture",
    "dual": "DHKD: BinaryKL-Norm on an auxiliary linear head",
    "dual-strong": "the same with the teacher's part five times as strong on the mixture",
    "dual-mlp": "DHKD with a nonlinear auxiliary head",
    "dual-aligned": "DHKD (linear) with gradient alignment",
    "dual-plain": "two heads with plain BinaryKL",
}

CLAIMS = (
    Claim("On one head the two gradients oppose each other in the output layer", "one-head", "mixture/cosine_head"),
    Claim("The conflict sits in the head, not in the backbone", "one-head", "mixture/head_less_backbone"),
    Claim("A strong logit loss on one head harms", "one-head-strong", "mixture/accuracy", "lower", margin=0.02),
    Claim(
        "A second head repairs it",
        "dual-strong",
        "mixture/accuracy",
        "higher",
        against="one-head-strong",
    ),
    Claim("Two heads beat one at the weak setting", "dual", "mixture/accuracy", "higher", against="one-head"),
    Claim("DHKD beats cross entropy by 4 points on few images", "dual", "images/accuracy", "higher", margin=0.04),
    Claim("DHKD beats KD on few images", "dual", "images/accuracy", "higher", against="kd"),
)


def experiment(arm: str, seed: int, options: Mapping[str, Any], folder: Path) -> Experiment:
    """One arm on the mixture and on images."""
    started = time.perf_counter()
    metrics: dict[str, float] = {}
    mixture = _mixture(options)
    student, first = _train(arm, seed, {**options, **options["mixture"]}, folder, mixture, _mixture_teacher(options))
    metrics["mixture/accuracy"] = _accuracy(student, mixture)
    metrics |= _cosines(arm, student, mixture, _mixture_teacher(options), options["mixture"]["alpha"])
    # Without a stronger setting of its own there, a strong arm is on images what the weak one is: trained once.
    same = arm.removesuffix("-strong") if options["strong_alpha"] == options["alpha"] else arm
    path = Path(options["mixture_teacher_weights"]).parent / "trained-on-images" / f"{same}-seed-{seed}.json"
    spent = time.perf_counter() - started
    images = json_once(path, lambda: _on_images(same, seed, options, folder))
    metrics["images/accuracy"] = images["accuracy"]
    steps = first.steps + images["steps"]
    cost = Cost(
        tokens=steps * int(options["batch_size"]),
        steps=steps,
        seconds=spent + images["seconds"],
        flops=first.flops + images["flops"],
    )
    return Experiment(metrics, cost, train=first.curve)


def _on_images(arm: str, seed: int, options: Mapping[str, Any], folder: Path) -> dict[str, float]:
    started = time.perf_counter()
    images = read_split(options, seed)
    student, trained = _train(arm, seed, options, folder, images, load_teacher(options, images))
    return {
        "accuracy": _accuracy(student, images),
        "steps": trained.steps,
        "flops": trained.flops,
        "seconds": time.perf_counter() - started,
    }


def _train(
    arm: str, seed: int, options: Mapping[str, Any], folder: Path, split: Split, teacher: Any
) -> tuple[Any, Trained]:
    import torch

    from lossmith.data.images import Augmented
    from lossmith.heads import attach_dual_head, export_main_head
    from lossmith.training import Classification, DualHeadDistillation, GradientAlignedTrainer

    chosen = dict(ARMS_OPTIONS[arm])
    aligned, strong = chosen.pop("aligned", False), chosen.pop("strong", False)
    auxiliary = chosen.pop("auxiliary", "linear")
    torch.manual_seed(seed)
    student = build_network(options["student"], tuple(split.pixels.shape[1:]), split.classes)
    objective: Any = Classification()
    if chosen:
        alpha = options["strong_alpha"] if strong else options["alpha"]
        objective = DualHeadDistillation(teacher, alpha=alpha, task="classification", **chosen)
        if objective.heads == "dual":
            attach_dual_head(student, auxiliary, seed=seed)
    pixels = split.pixels[split.student]
    if options["padding"]:
        pixels = Augmented(pixels, padding=int(options["padding"]), seed=seed)
    batch_size = int(options["batch_size"])
    steps = int(options["epochs"]) * -(-len(split.student) // batch_size)

    def optimizers(model: Any) -> tuple[Any, Any]:
        optimizer = torch.optim.SGD(
            model.parameters(), lr=options["learning_rate"], momentum=0.9, weight_decay=options["weight_decay"]
        )
        milestones = [int(steps * share) for share in (0.625, 0.75, 0.875)]
        return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)

    trained = train_on_tensors(
        student,
        {"pixel_values": pixels, "labels": split.labels[split.student]},
        objective,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        folder=folder,
        trainer_class=GradientAlignedTrainer if aligned else None,
        optimizers=optimizers,
        max_grad_norm=0.0,
        use_cpu=not torch.cuda.is_available(),
    )
    if chosen and objective.heads == "dual":
        export_main_head(student)
    return student, trained


def _cosines(arm: str, student: Any, split: Split, teacher: Any, alpha: float) -> dict[str, float]:
    """Between the gradients of cross entropy and of the arm's logit loss, over the training set, in evaluation mode."""
    from lossmith.training import DualHeadDistillation, gradient_cosines

    chosen = ARMS_OPTIONS[arm]
    names = ("mixture/cosine_head", "mixture/cosine_backbone", "mixture/head_less_backbone")
    if not chosen:
        # One gradient only: nothing that could oppose it.
        return dict.fromkeys(names, 0.0)
    objective = DualHeadDistillation(teacher, chosen["loss"], heads="single", alpha=alpha, task="classification")
    batch = {"pixel_values": split.pixels[split.student], "labels": split.labels[split.student]}
    found = gradient_cosines(student.eval(), objective, batch, head=student.classifier)
    return dict(zip(names, (found.head, found.backbone, found.head - found.backbone), strict=True))


def _accuracy(student: Any, split: Split) -> float:
    logits = predict(student, split.pixels, split.test)
    return float((logits.argmax(-1) == split.labels[split.test]).double().mean())


def _mixture(options: Mapping[str, Any]) -> Split:
    """50 classes, each of two Gaussian clusters in 32 dimensions; the same for all seeds."""
    import torch

    generator = torch.Generator().manual_seed(7)
    classes, dimension, number = 50, 32, 2 * int(options["mixture"]["examples"])
    means = 0.75 * torch.randn(classes, 2, dimension, generator=generator)
    labels = torch.randint(classes, (number,), generator=generator)
    cluster = torch.randint(2, (number,), generator=generator)
    points = means[labels, cluster] + torch.randn(number, dimension, generator=generator)
    train, test = torch.arange(number).chunk(2)
    # In the shape of images: one row of 32 pixels.
    return Split(points.reshape(number, 1, 1, dimension), labels, classes, train, train, test)


def _mixture_teacher(options: Mapping[str, Any]) -> Any:
    from safetensors.torch import load_file

    teacher = build_network(MIXTURE_TEACHER, (1, 1, 32), 50)
    teacher.load_state_dict(load_file(options["mixture_teacher_weights"]))
    return teacher.eval()


def prepare(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Both teachers, trained once for all arms and seeds."""
    import torch
    from safetensors.torch import save_file

    from lossmith.files import replacing
    from lossmith.training import Classification

    path = folder / "mixture-teacher.safetensors"
    if not path.exists():
        split = _mixture(options)
        torch.manual_seed(0)
        teacher = build_network(MIXTURE_TEACHER, (1, 1, 32), 50)
        train_on_tensors(
            teacher,
            {"pixel_values": split.pixels[split.teacher], "labels": split.labels[split.teacher]},
            Classification(),
            steps=int(options["mixture"]["teacher_epochs"]) * -(-len(split.teacher) // 64),
            batch_size=64,
            seed=0,
            folder=folder / "teacher",
            learning_rate=2e-3,
            weight_decay=0.1,
        )
        with replacing(path) as temporary:
            save_file(teacher.state_dict(), temporary)
    return {"mixture_teacher_weights": str(path), **prepare_teacher(options, folder)}


MIXTURE_TEACHER = "mlp(256, 256, normalise=true)"
MIXTURE = {
    "student": "mlp(24, 24, normalise=true)",
    "alpha": 0.2,
    "strong_alpha": 1.0,
    "batch_size": 64,
    "learning_rate": 0.05,
    "weight_decay": 5e-4,
    "padding": 0,
}
DIGITS = {
    "data": "digits",
    "size": None,
    "teacher": "mlp(256, 256)",
    "student": "mlp(16, 16)",
    "teacher_examples": 1000,
    "student_examples": 150,
    "alpha": 1.0,
    "strong_alpha": 1.0,
    "batch_size": 64,
    "learning_rate": 0.05,
    "weight_decay": 5e-4,
    "padding": 0,
}

STUDY = Study(
    slug="dual-head-distillation",
    family="heads",
    question="Do labels and a teacher's logits need a head each?",
    paper=Paper(
        "Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary Head", 2024, "2411.08937"
    ),
    arms=ARMS,
    baseline="ce",
    metric="mixture/accuracy",
    metrics=(
        "mixture/accuracy",
        "images/accuracy",
        "mixture/cosine_head",
        "mixture/cosine_backbone",
        "mixture/head_less_backbone",
    ),
    lower_is_better=False,
    better={"images/accuracy": "higher"},
    claims=CLAIMS,
    seeds={"smoke": 2, "quick": 5, "full": 3},
    options={
        "smoke": {
            **DIGITS,
            "teacher_epochs": 3,
            "epochs": 3,
            "mixture": {**MIXTURE, "examples": 500, "teacher_epochs": 2, "epochs": 1},
        },
        "quick": {
            **DIGITS,
            "teacher_epochs": 40,
            "epochs": 80,
            "mixture": {**MIXTURE, "examples": 4000, "teacher_epochs": 12, "epochs": 10},
        },
        "full": {
            **DIGITS,
            "data": None,
            "size": 224,
            "teacher": "microsoft/resnet-34",
            "student": "microsoft/resnet-18",
            "teacher_examples": 1_231_167,
            "student_examples": 1_231_167,
            "teacher_epochs": 0,
            "epochs": 100,
            "alpha": 0.1,
            "strong_alpha": 1.0,
            "batch_size": 256,
            "learning_rate": 0.1,
            "weight_decay": 1e-4,
            "padding": 16,
            "mixture": {**MIXTURE, "examples": 4000, "teacher_epochs": 12, "epochs": 15},
        },
    },
    experiment=experiment,
    prepare=prepare,
    data="a folder with one sub-folder of images per class",
    notes=(
        "mixture/cosine_head and mixture/cosine_backbone: cosine between the gradients of cross entropy and of the "
        "arm's logit loss, in the output layer's weight and in all before it, at the end of training, both losses on "
        "the head used at inference; head_less_backbone is their difference. 0 by definition without a teacher.",
        "On the mixture the teacher's part has weight 0.2, in the strong arms 1; on the digits always 1. The data and "
        "the teachers are the same for all seeds; seeds change the student's weights, its examples and their order.",
    ),
)
