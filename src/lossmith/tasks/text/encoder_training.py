"""Training an encoder on rows that fit into memory, in silence: what the tagger and the classifier of pairs share."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn


def train_encoder(
    model: nn.Module,
    rows: Sequence[Any],
    objective: Any,
    collate: Callable[..., Any],
    *,
    epochs: float,
    batch_size: int,
    learning_rate: float,
    seed: int,
    **training: Any,
) -> int:
    """Train in place with :class:`lossmith.training.Trainer`; leaves no files.

    Args:
        model: trained.
        rows: examples.
        objective: see :class:`lossmith.training.Objective`.
        collate: rows -> batch.
        epochs: passes over the rows.
        batch_size: rows per step.
        learning_rate: of AdamW, with a linear schedule.
        seed: of order and dropout.
        **training: further ``transformers.TrainingArguments``, which go before these.

    Returns:
        Optimiser steps.
    """
    import transformers

    from lossmith.training import Trainer

    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "output_dir": folder,
            "num_train_epochs": epochs,
            "per_device_train_batch_size": batch_size,
            "learning_rate": learning_rate,
            "seed": seed,
            "data_seed": seed,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "logging_strategy": "no",
            "use_cpu": not torch.cuda.is_available(),
            **training,
        }
        arguments = transformers.TrainingArguments(**options)
        trainer = Trainer(model, arguments, objective=objective, train_dataset=rows, data_collator=collate)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        return int(trainer.state.global_step)
