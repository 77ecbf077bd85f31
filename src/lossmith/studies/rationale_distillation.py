"""Rationale distillation: what do voted, contrasted and judged rationales of a teacher add to its labels?

"QCRD: Quality-guided Contrastive Rationale Distillation for Large Language Models", 2024, arXiv 2405.13014.

Arithmetic in two steps, with a rule-based teacher whose rationales are right with probability 0.6 and whose answers are
right with probability 0.8. ``--data`` takes JSONL files of questions, labels and recorded samples; ``full`` is T5-base.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossmith.reporting.comparison import Claim, Cost, Curve
from lossmith.studies.study import Experiment, Paper, Study

if TYPE_CHECKING:
    from lossmith.data import RationaleSamples
    from lossmith.tasks.text import RationaleStudent

# Method of the student, and options of its schedule.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "finetune": ("finetune", {}),
    "step-by-step": ("step-by-step", {}),
    "positives": ("positives", {}),
    "contrast": ("contrast", {}),
    "qcrd": ("qcrd", {}),
    "teacher-negatives": ("qcrd", {"negatives_per_question": 0}),
}
ARMS = {
    "finetune": "labels only",
    "step-by-step": "labels, and one sampled rationale (distilling step-by-step)",
    "positives": "labels, and the nearest of the rationales that win the vote",
    "contrast": "the same, and away from those that lose it and from the student's own earlier ones",
    "qcrd": "the same, weighed by a judge that learns along (the full method)",
    "teacher-negatives": "the full method without the student's own negatives",
}
CLAIMS = (
    Claim("Explaining one sampled rationale beats fine-tuning", "step-by-step", "accuracy", "higher"),
    Claim("The vote teaches better rationales", "positives", "rationale_accuracy", "higher", "step-by-step"),
    Claim("The vote teaches better answers", "positives", "accuracy", "higher", "step-by-step"),
    Claim("Negatives teach better answers", "contrast", "accuracy", "higher", "positives"),
    Claim("The judge teaches better answers", "qcrd", "accuracy", "higher", "contrast"),
    Claim("The full method beats step-by-step by a point", "qcrd", "accuracy", "higher", "step-by-step", 0.01),
    Claim("The student's own negatives help", "qcrd", "accuracy", "higher", "teacher-negatives"),
    Claim("Contrast separates wrong from right rationales", "contrast", "gap", "higher", "positives"),
)


def experiment(arm: str, seed: int, options: Mapping[str, Any], folder: Path) -> Experiment:
    """One student; answers, rationales, and how it and its judge tell right rationales from wrong ones."""
    from lossmith.data.arithmetic import rationale_holds
    from lossmith.tasks.text import RationaleStudent

    started = time.perf_counter()
    train, test = read(options, seed)
    method, schedule = METHODS[arm]
    student = RationaleStudent(
        options["model"],
        method=method,
        labels=options["labels"],
        batch_size=int(options["batch_size"]),
        learning_rate=float(options["learning_rate"]),
        max_input_length=int(options["max_input_length"]),
        max_target_length=int(options["max_target_length"]),
        width=int(options["width"]),
        seed=seed,
        schedule={"steps": options["iteration"], "pretraining_steps": options["pretraining_steps"], **schedule},
        options={"all_at_once": bool(options["all_at_once"])},
        folder=folder / "trainer",
        max_steps=int(options["steps"]),
    ).fit(train)
    seconds = time.perf_counter() - started
    known = options["data"] == "arithmetic"
    holds = (lambda row, said: rationale_holds(said, row.label, row.question)) if known else None
    scores = student.evaluate(test, answers=options["answers"], holds=holds)
    metrics: dict[str, float] = {"accuracy": scores.accuracy}
    if scores.rationale_accuracy is not None:
        metrics["rationale_accuracy"] = scores.rationale_accuracy
    metrics |= told_apart(student, test, known=known)
    steps = int(options["steps"])
    cost = Cost(tokens=student.tokens_, steps=steps, seconds=seconds, flops=student.flops_)
    logged = [line for line in student.history_ if "loss_unweighted" in line]
    curve = Curve(
        steps=tuple(int(line["step"]) for line in logged),
        tokens=tuple(int(line["tokens"]) for line in logged),
        seconds=tuple(float(line["seconds"]) for line in logged),
        values=tuple(float(line["loss_unweighted"]) for line in logged),
    )
    return Experiment(metrics, cost, train=curve)


def told_apart(student: RationaleStudent, rows: Sequence[RationaleSamples], *, known: bool) -> dict[str, float]:
    """The student's losses of right and wrong rationales for new questions, and the judge's area under the curve."""
    import torch

    from lossmith.data import RationaleExample
    from lossmith.data.arithmetic import rationale_holds
    from lossmith.data.rationales import normalized_answer
    from lossmith.training import RationaleDistillation, RationaleTable
    from lossmith.training.rationale_judge import area_under_curve

    examples = []
    for row in rows:
        right: list[str] = []
        wrong: list[str] = []
        for sample in row.samples:
            is_right = normalized_answer(sample.answer) == normalized_answer(row.label or "")
            if known:
                is_right = rationale_holds(sample.rationale, row.label, row.question)
            (right if is_right else wrong).append(sample.rationale)
        if right and wrong:
            examples.append(RationaleExample(row.question, row.label or "", tuple(right), tuple(wrong)))
    if not examples:
        return {}
    table = RationaleTable(
        examples,
        student.tokenizer_,
        max_input_length=student.max_input_length,
        max_target_length=student.max_target_length,
    )
    objective = RationaleDistillation(table, student.judge_)
    device = next(student.model_.parameters()).device
    losses, scores, kinds = [], [], []
    student.model_.eval()
    with torch.no_grad():
        for start in range(0, len(table), 32):
            batch = table.collate(range(start, min(start + 32, len(table))))
            batch = {name: value.to(device) for name, value in batch.items()}
            candidates, values = objective.rationale_losses(student.model_, batch)
            losses.append(values)
            kinds.append(candidates.is_good)
            if student.judge_ is not None:
                scores.append(objective.judge_scores(candidates))
    good, values = torch.cat(kinds), torch.cat(losses).double()
    right_loss, wrong_loss = float(values[good].mean()), float(values[~good].mean())
    found = {"right_loss": right_loss, "wrong_loss": wrong_loss, "gap": wrong_loss - right_loss}
    if scores:
        judged = torch.cat(scores)
        found["judge_auc"] = area_under_curve(judged[good], judged[~good])
    return found


def read(options: Mapping[str, Any], seed: int) -> tuple[list[RationaleSamples], list[RationaleSamples]]:
    """Training and test questions with the teacher's samples: other problems under each seed, or the user's files."""
    import random

    from lossmith.data import ArithmeticTeacher, arithmetic_problems, read_rationales, sample_rationales
    from lossmith.errors import InputError

    source = options["data"]
    if source is None:
        raise InputError(
            "this scale needs --data: a JSONL file of questions, labels and samples, or a folder with train.jsonl and "
            "test.jsonl"
        )
    if source == "arithmetic":
        train, test = int(options["train"]), int(options["test"])
        problems = arithmetic_problems(train + test, seed=seed, largest=int(options["largest"]), form="expression")
        teacher = ArithmeticTeacher(problems, accuracy=float(options["accuracy"]), seed=seed)
        rows = sample_rationales(teacher, problems, samples=int(options["samples"]))
        return rows[:train], rows[train:]
    if Path(source).is_dir():
        parts = [Path(source) / f"{name}.jsonl" for name in ("train", "test")]
        if not all(part.exists() for part in parts):
            raise InputError(f"{source} must hold train.jsonl and test.jsonl")
        return read_rationales(parts[0]), read_rationales(parts[1])
    rows = read_rationales(source)
    if len(rows) < 10:
        raise InputError(f"{source} holds {len(rows)} questions: too few to train and test on")
    random.Random(0).shuffle(rows)
    cut = int(0.8 * len(rows))
    return rows[:cut], rows[cut:]


def prepare(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Wrong files are to be known before anything is trained."""
    read(options, 0)
    return {}


SMALL = {
    "data": "arithmetic",
    "model": None,
    "labels": "gold",
    "answers": "text",
    "samples": 5,
    "accuracy": 0.6,
    "width": 64,
    "batch_size": 48,
    "learning_rate": 3e-3,
    "max_input_length": 64,
    "max_target_length": 14,
    # So small a model gains nothing by choosing first: a pass costs more than its rows.
    "all_at_once": True,
}

STUDY = Study(
    slug="rationale-distillation",
    family="losses",
    question="What do voted, contrasted and judged rationales of a teacher add to its labels?",
    paper=Paper(
        "QCRD: Quality-guided Contrastive Rationale Distillation for Large Language Models", 2024, "2405.13014"
    ),
    arms=ARMS,
    baseline="finetune",
    metric="accuracy",
    metrics=("accuracy", "rationale_accuracy", "gap", "right_loss", "wrong_loss", "judge_auc"),
    lower_is_better=False,
    better={"rationale_accuracy": "higher", "gap": "higher", "judge_auc": "higher"},
    claims=CLAIMS,
    seeds={"smoke": 2, "quick": 5, "full": 3},
    options={
        "smoke": {
            **SMALL,
            "train": 24,
            "test": 10,
            "largest": 4,
            "width": 16,
            "batch_size": 12,
            "steps": 6,
            "iteration": 2,
            "pretraining_steps": 3,
        },
        "quick": {
            **SMALL,
            "train": 120,
            "test": 72,
            "largest": 4,
            "batch_size": 24,
            "learning_rate": 6e-3,
            "steps": 108,
            "iteration": 9,
            "pretraining_steps": 20,
        },
        "full": {
            **SMALL,
            "data": None,
            "model": "google/t5-v1_1-base",
            "train": 0,
            "test": 0,
            "largest": 0,
            "batch_size": 64,
            "learning_rate": 5e-5,
            "max_input_length": 1024,
            "max_target_length": 256,
            "all_at_once": False,
            "steps": 10_000,
            "iteration": None,
            "pretraining_steps": 500,
        },
    },
    experiment=experiment,
    prepare=prepare,
    data="a JSONL file of questions, labels and samples, or a folder with train.jsonl and test.jsonl",
    notes=(
        "rationale_accuracy: share of rationales for new questions whose equations are all true and come to the answer "
        "(with --data: that equal the known one). right_loss, wrong_loss: the student's cross entropy (nats per token) "
        "of the teacher's right and wrong rationales for new questions; gap: their difference. judge_auc: probability "
        "that the judge scores a right one above a wrong one.",
    ),
)
