"""Training an encoder on rows that fit into memory, in silence: what the tagger and the classifier of pairs share."""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lossmith.errors import InputError


def load_encoder(kind: Any, name: str | Path, **options: Any) -> tuple[Any, Any]:
    """The tokenizer and the model of a folder or hub id, the output layer new.

    Args:
        kind: class with ``from_pretrained``, such as ``AutoModelForTokenClassification``.
        name: folder or hub id.
        **options: of the configuration.

    Raises:
        InputError: it cannot be loaded, or the folder holds no tokenizer.
    """
    from transformers import AutoTokenizer

    from lossmith.data.formats import reason

    what = "tokenizer"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        what = "model"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the output layer is new is what is wanted
            return tokenizer, kind.from_pretrained(name, ignore_mismatched_sizes=True, **options)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"the {what} of {name} cannot be loaded: {reason(error)}") from None


def check_head(config: Any, head: str, name: str | Path) -> None:
    """Refuse a saved model that was trained for something else: its output layer would be new, and so random.

    Raises:
        InputError: the configuration names classes, and none of them ends with ``head``.
    """
    classes = getattr(config, "architectures", None) or []
    if classes and not any(one.endswith(head) for one in classes):
        wanted = re.sub("([A-Z])", r" \1", head).lower()
        raise InputError(f"{name} holds a {classes[0]}, not a model{wanted}")


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
