"""From a teacher, a student and a file of prompts with completions to a trained student in a folder."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lossmith.data import Completion, CompletionCollator, encode_completions, load_tokenizer
from lossmith.errors import InputError
from lossmith.files import replacing_folder
from lossmith.heads import attach_adaptive_clipped_kl, detach_adaptive_clipped_kl


@dataclass(frozen=True, slots=True)
class DistilledModel:
    """A trained student.

    Attributes:
        model: the student, in evaluation mode, without the band's network.
        tokenizer: of both models.
        steps: optimiser steps.
        before: loss of the completions to judge on, nats per token, before training; ``None`` without them.
        after: the same after training.
        history: what :class:`lossmith.training.MultiGranularityCallback` kept.
    """

    model: Any
    tokenizer: Any
    steps: int
    before: float | None
    after: float | None
    history: tuple[Mapping[str, float], ...]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model and tokenizer, whole or not at all.

        Raises:
            InputError: the folder exists and is not empty.
        """
        with replacing_folder(folder) as unfinished:
            self.model.save_pretrained(unfinished)
            self.tokenizer.save_pretrained(unfinished)


def distill_language_model(
    student: str,
    teacher: str,
    train: Sequence[Completion],
    *,
    evaluate: Sequence[Completion] = (),
    loss: str | None = None,
    band: str = "rest",
    epochs: float = 1.0,
    batch_size: int = 8,
    learning_rate: float = 5e-5,
    max_prompt: int = 256,
    max_completion: int = 256,
    dtype: str = "float32",
    replay_threshold: float | None = None,
    seed: int = 0,
    report: Callable[[str], None] | None = None,
    **options: Any,
) -> DistilledModel:
    """Distil one Hugging Face causal language model into another on prompts with completions.

    Args:
        student: folder or hub id.
        teacher: folder or hub id, of the same tokenizer.
        train: what to learn from.
        evaluate: what to judge on, before and after.
        loss: a distillation loss; ``None``: the clipped KL with a learned band, of the variant
        band: see :class:`lossmith.heads.AdaptiveClippedKL`.
        epochs: passes over ``train``.
        batch_size: examples per step.
        learning_rate: of AdamW, falling to 0 along a cosine.
        max_prompt: see :func:`lossmith.data.encode_completions`.
        max_completion: the same; also the longest response that the student writes.
        dtype: of both models.
        replay_threshold: begin a :class:`lossmith.training.ReplaySchedule` there; ``None``: new responses in each step.
        seed: of order, samples and the band's network.
        report: told a line of progress now and then.
        **options: of :class:`lossmith.training.MultiGranularityDistillation`.

    Raises:
        InputError: models that cannot be loaded or have different tokenizers, options out of range.
    """
    import torch
    import transformers

    from lossmith.training.models import build_model
    from lossmith.training.multi_granularity import MultiGranularityCallback, MultiGranularityDistillation
    from lossmith.training.replay import ReplaySchedule
    from lossmith.training.trainer import Trainer

    if not (0 < epochs < float("inf") and batch_size >= 1 and 0 < learning_rate < float("inf")):
        raise InputError(
            f"epochs and learning_rate must be > 0 and batch_size >= 1, got {epochs}, {learning_rate}, {batch_size}"
        )
    if not train:
        raise InputError("there are no completions to learn from")
    tokenizer, theirs = load_tokenizer(student), load_tokenizer(teacher)
    length = max_prompt + max_completion
    models = [
        build_model(
            name,
            vocab_size=len(tokenizer),
            sequence_length=length,
            dtype=dtype,
            option=option,
            length_option="--max-prompt + --max-completion =",
        )
        for option, name in (("--teacher", teacher), ("--student", student))
    ]
    torch.manual_seed(seed)
    if loss is None:
        attach_adaptive_clipped_kl(models[1], variant=band)  # type: ignore[arg-type]
    replay = None if replay_threshold is None else ReplaySchedule(replay_threshold)
    try:
        objective = MultiGranularityDistillation(
            models[0],
            tokenizer,
            loss=loss,
            teacher_tokenizer=theirs,
            replay=replay,
            max_new_tokens=max_completion,
            **options,
        )
    except ValueError as error:
        raise InputError(str(error)) from None
    rows, judged = (
        encode_completions(tokenizer, x, max_prompt=max_prompt, max_completion=max_completion)
        for x in (train, evaluate)
    )
    steps = max(1, round(epochs * len(rows) / batch_size))
    callback = MultiGranularityCallback(objective)
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=batch_size,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            seed=seed,
            data_seed=seed,
            eval_strategy="steps" if judged and replay is not None else "no",
            eval_steps=max(1, steps // 10),
            logging_steps=-(-steps // 20),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = Trainer(
            models[1],
            arguments,
            objective=objective,
            train_dataset=rows,
            eval_dataset=judged or None,
            data_collator=CompletionCollator(int(tokenizer.pad_token_id)),  # type: ignore[arg-type]
            callbacks=[callback, *([_progress(report)] if report is not None else [])],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        before = trainer.evaluate()["eval_loss"] if judged else None
        trainer.train()
        after = trainer.evaluate()["eval_loss"] if judged else None
    model = detach_adaptive_clipped_kl(models[1]).eval()
    return DistilledModel(model, tokenizer, steps, before, after, tuple(callback.history))


def _progress(report: Callable[[str], None]) -> Any:
    """A callback that tells step, loss and the time that is left."""
    from transformers.trainer_callback import TrainerCallback

    class Progress(TrainerCallback):
        started = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.started = time.monotonic()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs and state.global_step:
                left = (time.monotonic() - self.started) / state.global_step * (state.max_steps - state.global_step)
                report(f"step {state.global_step}/{state.max_steps}, loss {logs['loss']:.4f}, about {left:.0f} s left")

    return Progress()
