"""Training a causal language model on a list of texts in memory, each a row of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedTokenizerBase

from lossmith.data import PaddedCollator
from lossmith.data.tokenization import encode
from lossmith.errors import InputError
from lossmith.training.continual import training_arguments
from lossmith.training.objectives import NextToken
from lossmith.training.overhead import garbage_frozen
from lossmith.training.trainer import Trainer


def train_on_texts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    folder: str | Path,
    epochs: float = 1.0,
    batch_size: int = 16,
    max_length: int = 512,
    seed: int = 0,
    **arguments: Any,
) -> dict[str, float]:
    """Train ``model`` in place on ``texts`` in random order; returns what it cost (``tokens, steps, flops``).

    Defaults are those of CoLoR-Filter's conditional model: one epoch, learning rate 1e-3 with a warm-up of 5 % and a
    cosine, AdamW with beta 0.9 and 0.95 without weight decay, clipping at 1.

    Args:
        model: a causal language model.
        tokenizer: the model's.
        texts: each is framed by the start and the end token.
        folder: for the Trainer's own files.
        epochs: passes over the texts.
        batch_size: texts per step.
        max_length: what is longer is cut into rows of so many tokens.
        seed: of the order.
        **arguments: of ``transformers.TrainingArguments``.

    Raises:
        InputError: there is no text, or ``epochs`` is not above 0.

    >>> train_on_texts(model, tokenizer, ["a text"], folder="runs/conditional")  # doctest: +SKIP
    """
    if not texts or not epochs > 0 or max_length < 2:
        raise InputError(
            f"expected texts, epochs above 0 and max_length of at least 2, got {len(texts)}, {epochs} and {max_length}"
        )
    transformers.utils.logging.set_verbosity_error()
    encoded = [ids.tolist() for ids in encode(tokenizer, list(texts))]
    step = max_length - 1
    rows = [{"input_ids": ids[s : s + max_length]} for ids in encoded for s in range(0, len(ids) - 1, step)]
    steps = math.ceil(epochs * len(rows) / batch_size)
    options = {
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, steps // 20),
        "weight_decay": 0.0,
        "adam_beta2": 0.95,
        "logging_steps": max(1, steps // 20),
        **arguments,
    }
    trainer = Trainer(
        model,
        training_arguments(
            folder, steps=steps, batch_size=batch_size, seed=seed, remove_unused_columns=False, **options
        ),
        objective=NextToken(),
        train_dataset=rows,
        data_collator=PaddedCollator(int(tokenizer.pad_token_id)),  # type: ignore[arg-type]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    with garbage_frozen():
        trainer.train()
    tokens = round(sum(len(row["input_ids"]) for row in rows) * steps * batch_size / len(rows))
    return {"tokens": float(tokens), "steps": float(steps), "flops": float(trainer.state.total_flos)}
