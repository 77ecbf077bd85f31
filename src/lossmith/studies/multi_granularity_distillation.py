"""Multi-granularity distillation: what do mended sequences, a clipped KL and phrases each add?

"Multi-Granularity Semantic Revision for Large Language Model Distillation", 2024, arXiv 2407.10068.

Three experiments. A small language model learns from a larger one to follow instructions whose right answers are known
(``--data``: the user's prompts and completions). ``planted``: a Markov chain whose errors are known: are they what is
mended? ``table``: a student of too low rank learns a table of next-token distributions: where does its capacity go?
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lossmith.files import read_json, replacing, write_json
from lossmith.reporting.comparison import Claim, Cost, Curve
from lossmith.studies.instruction_tasks import (
    judge,
    load_pairs,
    read_pairs,
    rouge_scorer,
    save_pairs,
    save_teacher,
    written_by,
)
from lossmith.studies.sharing import json_once
from lossmith.studies.study import Experiment, Paper, Study
from lossmith.studies.toy_languages import planted, table

# Options of training.MultiGranularityDistillation, by arm; "band" makes a learned band, of that variant.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "sft": {"distillation_weight": 0.0},
    "sequence-kd": {"distillation_weight": 0.0},
    "kd": {"loss": "distillation_kl", "responses": "dataset"},
    "reverse-kl": {"loss": "reverse_kl", "responses": "dataset"},
    "on-policy-jsd": {"loss": "jensen_shannon", "responses": "student"},
    "fixed-band": {"loss": "clipped_kl(upper=0.9)", "responses": "dataset"},
    "clipped": {"band": "rest", "responses": "dataset"},
    "clipped-paper": {"band": "paper", "responses": "dataset"},
    "clipped-normalised": {"band": "normalised", "responses": "dataset"},
    "spans": {"loss": "distillation_kl", "responses": "dataset", "span_weight": 1.0},
    "revised": {"loss": "distillation_kl"},
    "revised-at-random": {"loss": "distillation_kl", "position": "random"},
    "full": {"band": "rest", "span_weight": 1.0},
}

ARMS = {
    "sft": "fine-tuning on the completions, no teacher",
    "sequence-kd": "fine-tuning on completions that the teacher wrote",
    "kd": "completions + forward KL",
    "reverse-kl": "completions + reverse KL",
    "on-policy-jsd": "completions + JSD on what the student wrote (GKD)",
    "fixed-band": "completions + clipped KL, top 0.9 of the mass and the rest",
    "clipped": "completions + clipped KL with a learned band (rest class)",
    "clipped-paper": "the same, neither side normalised, as printed",
    "clipped-normalised": "the same, both sides normalised",
    "spans": "completions + forward KL + span correlation",
    "revised": "completions + forward KL on what the student wrote and the teacher mended",
    "revised-at-random": "the same, mended at a random place of disagreement",
    "full": "completions + learned band and span correlation on mended responses: the whole method",
}

# Those that differ in how sequences are mended, and those that differ in the token loss.
PLANTED = ("sft", "revised", "revised-at-random")
TABLE = ("sft", "kd", "reverse-kl", "on-policy-jsd", "fixed-band", "clipped", "clipped-paper", "clipped-normalised")

CLAIMS = (
    Claim("The whole method beats KD", "full", "rouge_l", "higher", "kd"),
    Claim("The whole method beats on-policy distillation", "full", "rouge_l", "higher", "on-policy-jsd"),
    Claim("Mended sequences beat the data set's", "revised", "rouge_l", "higher", "kd"),
    Claim("The clipped KL beats forward KL", "clipped", "rouge_l", "higher", "kd"),
    Claim("The clipped KL beats reverse KL", "clipped", "rouge_l", "higher", "reverse-kl"),
    Claim("Span correlation adds to forward KL", "spans", "rouge_l", "higher", "kd"),
    Claim("Mending raises the teacher's likelihood of what was written", "revised", "planted/gain", "higher"),
    Claim(
        "The place of most disagreement is better than a random one",
        "revised",
        "planted/gain",
        "higher",
        "revised-at-random",
    ),
    Claim(
        "A learned band puts capacity into the likeliest token", "clipped", "table/top1_agreement", "higher", "kd", 0.05
    ),
    Claim("It pays with a higher divergence on the whole", "clipped", "table/kl", "higher", "kd"),
    Claim(
        "Normalised on both sides it comes to nothing: as fine-tuning",
        "clipped-normalised",
        "table/top1_agreement",
        "equal",
        margin=0.03,
    ),
)


def experiment(arm: str, seed: int, options: Mapping[str, Any], folder: Path) -> Experiment:
    """One arm on the instructions, and on the two toy languages where it has a part in them."""
    with _collecting_what_is_new():
        metrics, cost, curve = language(arm, seed, options, folder)
    chosen = OBJECTIVES[arm]
    if arm in PLANTED:
        position = None if arm == "sft" else chosen.get("position", "largest")
        metrics |= planted(seed, position, sequences=int(options["planted_sequences"]))
    if arm in TABLE:
        metrics |= table(seed, chosen.get("loss"), chosen.get("band"), steps=int(options["table_steps"]))
    return Experiment(metrics, cost, train=curve)


def language(arm: str, seed: int, options: Mapping[str, Any], folder: Path) -> tuple[dict[str, float], Cost, Curve]:
    """A student that was fine-tuned a little goes on with the arm's objective."""
    import torch

    from lossmith.data import encode_completions, load_tokenizer
    from lossmith.training import MultiGranularityDistillation
    from lossmith.training.models import build_model, matmul_parameters

    pairs, tokenizer = load_pairs(options["pairs"]), load_tokenizer(options["teacher_folder"])
    limits = {"max_prompt": int(options["max_prompt"]), "max_completion": int(options["max_completion"])}
    rows, test = (encode_completions(tokenizer, x, **limits) for x in (pairs.student, pairs.test))
    length = sum(limits.values())
    teacher = build_model(options["teacher_folder"], vocab_size=len(tokenizer), sequence_length=length)
    started = time.perf_counter()
    student, before = _beginner(rows, seed, options, folder, tokenizer, length)
    torch.manual_seed(seed)  # the same from here whether the beginner was trained just now or before
    written = 0
    if arm == "sequence-kd":
        rows = written_by(teacher, rows, tokenizer, seed, limits["max_completion"])
        written = sum(len(row["input_ids"]) for row in rows)
    chosen = {"span_weight": 0.0, **OBJECTIVES[arm]}
    if (variant := chosen.pop("band", None)) is not None:
        from lossmith.heads import attach_adaptive_clipped_kl

        attach_adaptive_clipped_kl(student, len(tokenizer), variant=variant)
    objective = MultiGranularityDistillation(
        teacher, tokenizer, max_new_tokens=limits["max_completion"], phrases=options["phrases"], **chosen
    )
    state = _train(student, rows, objective, int(options["steps"]), seed, options, folder, tokenizer)
    cost = Cost(
        tokens=before.tokens + int(state.num_input_tokens_seen),
        steps=before.steps + int(options["steps"]),
        seconds=before.seconds + time.perf_counter() - started,
        flops=before.flops + float(state.total_flos) + 2 * matmul_parameters(teacher) * written,
    )
    answers = judge(student, teacher, tokenizer, test, seed=seed, max_new_tokens=limits["max_completion"])
    logged = [line for line in state.log_history if "loss_unweighted" in line]
    curve = Curve(
        steps=tuple(int(line["step"]) for line in logged),
        tokens=tuple(int(line["tokens"]) for line in logged),
        seconds=tuple(float(line["seconds"]) for line in logged),
        values=tuple(float(line["loss_unweighted"]) for line in logged),
    )
    metrics = {**dataclasses.asdict(answers), "teacher/rouge_l": float(options["teacher_rouge_l"])}
    return metrics, cost, curve


@contextmanager
def _collecting_what_is_new() -> Iterator[None]:
    """Within it the garbage collector passes over what was there before, such as the modules of transformers.

    The Trainer calls it once, which takes a third of a second then: as long as ten steps of a small model.
    """
    if gc.get_freeze_count():  # the caller's own, which is not to be undone
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        gc.unfreeze()


def _beginner(
    rows: Sequence[Any], seed: int, options: Mapping[str, Any], folder: Path, tokenizer: Any, length: int
) -> tuple[Any, Cost]:
    """The student after fine-tuning a little, the same for all arms of a seed, and what that cost.

    Only the first arm of a seed really trains it; its cost is every arm's.
    """
    import torch
    from safetensors.torch import load_model, save_model

    torch.manual_seed(seed)
    student = _model(options["student"], options["student_overrides"], tokenizer, length)
    path = Path(options["teacher_folder"]).parent / f"student-{seed}.safetensors"

    def train() -> dict[str, Any]:
        started = time.perf_counter()
        state = _train(student, rows, None, int(options["warmup_steps"]), seed, options, folder, tokenizer)
        cost = Cost(
            tokens=int(state.num_input_tokens_seen),
            steps=int(options["warmup_steps"]),
            seconds=time.perf_counter() - started,
            flops=float(state.total_flos),
        )
        with replacing(path) as temporary:
            save_model(student, str(temporary))
        return dataclasses.asdict(cost)

    cost = Cost(**json_once(path.with_suffix(".json"), train))
    load_model(student, path)
    return student, cost


def _train(
    model: Any,
    rows: Sequence[Any],
    objective: Any,
    steps: int,
    seed: int,
    options: Mapping[str, Any],
    folder: Path,
    tokenizer: Any,
    *,
    batch_size: int | None = None,
    learning_rate: float | None = None,
) -> Any:
    """The Trainer's state after ``steps`` steps."""
    import torch
    import transformers

    from lossmith.data import CompletionCollator
    from lossmith.training import NextToken, Trainer

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=batch_size or int(options["batch_size"]),
        learning_rate=learning_rate or float(options["learning_rate"]),
        lr_scheduler_type="cosine",
        weight_decay=0.01,
        seed=seed,
        data_seed=seed,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(
        model,
        arguments,
        objective=objective or NextToken(),
        train_dataset=rows,
        data_collator=CompletionCollator(tokenizer.pad_token_id),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    if steps:
        trainer.train()
    return trainer.state


def _model(name: str, overrides: Mapping[str, Any], tokenizer: Any, length: int) -> Any:
    from lossmith.training.models import PRESETS, build_model

    return build_model(
        name,
        vocab_size=len(tokenizer),
        sequence_length=length,
        overrides=overrides if name in PRESETS else None,
        special_tokens={"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id},
    )


def prepare(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The tokenizer and the teacher, for all arms and seeds; a teacher of the hub is fine-tuned first, too."""
    import torch

    from lossmith.data import encode_completions, load_tokenizer, train_tokenizer
    from lossmith.training.models import PRESETS

    rouge_scorer()  # what is missing is to be said before anything is trained
    target, path = folder / "teacher", folder / "pairs.json"
    if not path.exists():
        save_pairs(read_pairs(options), path)
    if not target.exists():
        pairs = load_pairs(path)
        if options["teacher"] in PRESETS:
            texts = [pair.prompt + pair.completion for pair in pairs.teacher[:5000]]
            tokenizer: Any = train_tokenizer(texts, vocab_size=int(options["vocabulary"]))
        else:
            tokenizer = load_tokenizer(options["teacher"])
        limits = {"max_prompt": int(options["max_prompt"]), "max_completion": int(options["max_completion"])}
        torch.manual_seed(0)
        model = _model(options["teacher"], options["teacher_overrides"], tokenizer, sum(limits.values()))
        rows = encode_completions(tokenizer, pairs.teacher, **limits)
        _train(
            model,
            rows,
            None,
            int(options["teacher_steps"]),
            0,
            options,
            folder / "teacher-training",
            tokenizer,
            batch_size=int(options["teacher_batch_size"]),
            learning_rate=float(options["teacher_learning_rate"]),
        )
        save_teacher(model, tokenizer, target)
    judged = folder / "teacher.json"
    if not judged.exists():
        tokenizer = load_tokenizer(str(target))
        limits = {"max_prompt": int(options["max_prompt"]), "max_completion": int(options["max_completion"])}
        model = _model(str(target), {}, tokenizer, sum(limits.values()))
        rows = encode_completions(tokenizer, load_pairs(path).test, **limits)
        answers = judge(model, model, tokenizer, rows, seed=0, max_new_tokens=limits["max_completion"])
        write_json(judged, dataclasses.asdict(answers))
    return {
        "teacher_folder": str(target),
        "pairs": str(path),
        "teacher_rouge_l": read_json(judged)["rouge_l"],
    }


SMALL = {
    "data": "instructions",
    "prompt_field": "prompt",
    "completion_field": "completion",
    "teacher": "tiny",
    "teacher_overrides": {"hidden_size": 64, "intermediate_size": 128},
    "teacher_batch_size": 32,
    "teacher_learning_rate": 6e-3,
    "student": "nano",
    "student_overrides": {"num_hidden_layers": 2, "intermediate_size": 64},
    "vocabulary": 400,
    "max_prompt": 12,
    "max_completion": 12,
    "batch_size": 32,
    "learning_rate": 8e-3,
    "phrases": "words",
}

STUDY = Study(
    slug="multi-granularity-distillation",
    family="training",
    question="What do mended sequences, a clipped KL and phrases each add to distillation?",
    paper=Paper("Multi-Granularity Semantic Revision for Large Language Model Distillation", 2024, "2407.10068"),
    arms=ARMS,
    baseline="sft",
    metric="rouge_l",
    metrics=(
        "rouge_l",
        "exact",
        "top1_agreement",
        "loss",
        "teacher_kl",
        "teacher/rouge_l",
        "planted/found",
        "planted/gain",
        "table/top1_agreement",
        "table/kl",
        "table/band",
    ),
    lower_is_better=False,
    better={"exact": "higher", "loss": "lower", "teacher_kl": "lower"},
    claims=CLAIMS,
    seeds={"smoke": 2, "quick": 5, "full": 3},
    options={
        "smoke": {
            **SMALL,
            "teacher_examples": 200,
            "student_examples": 40,
            "test_examples": 10,
            "teacher_steps": 10,
            "warmup_steps": 2,
            "steps": 2,
            "planted_sequences": 30,
            "table_steps": 5,
        },
        "quick": {
            **SMALL,
            "teacher_examples": 10_000,
            "student_examples": 400,
            "test_examples": 200,
            "teacher_steps": 300,
            "warmup_steps": 100,
            "steps": 20,
            "planted_sequences": 500,
            "table_steps": 400,
        },
        "full": {
            **SMALL,
            "data": "databricks/databricks-dolly-15k",
            "prompt_field": "instruction+context",
            "completion_field": "response",
            "teacher": "openai-community/gpt2-xl",
            "student": "openai-community/gpt2",
            "max_prompt": 256,
            "max_completion": 256,
            "batch_size": 16,
            "learning_rate": 5e-4,
            "teacher_batch_size": 8,
            "teacher_learning_rate": 5e-5,
            "teacher_examples": 14_000,
            "student_examples": 14_000,
            "test_examples": 500,
            "teacher_steps": 5250,
            "warmup_steps": 2600,
            "steps": 8000,
            "phrases": "auto",
            "planted_sequences": 500,
            "table_steps": 1500,
        },
    },
    experiment=experiment,
    prepare=prepare,
    data="a file of prompts and completions (JSONL, CSV, Parquet)",
    notes=(
        "rouge_l: of answers sampled at temperature 1; exact: likeliest answers that are right; top1_agreement, loss "
        "and teacher_kl: over the right answers' tokens. The teacher and the data are the same for all seeds; seeds "
        "change the student's weights, its order of examples and all samples.",
        "planted/...: a Markov chain of 20 tokens whose student is wrong after three of them. found: share of mended "
        "places that are those; gain: in the teacher's mean log likelihood per token. table/...: 300 contexts, 200 "
        "tokens, a student of rank 6 for a teacher of rank 24; band: mean width of the learned band. Only arms whose "
        "part in it differs have these numbers. teacher/rouge_l: the teacher's own.",
    ),
)
