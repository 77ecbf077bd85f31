"""Training a small network on examples that are held in memory, for studies."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossmith.reporting.comparison import Curve

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Trained:
    """The curve of the training loss, and what the training cost."""

    curve: Curve
    steps: int
    flops: float


def train_on_tensors(
    model: nn.Module,
    columns: Mapping[str, Tensor],
    objective: Callable[..., Tensor],
    *,
    steps: int,
    batch_size: int,
    seed: int,
    folder: Path,
    weighting: Any = None,
    sampler: Any = None,
    tokens_per_example: int = 1,
    trainer_class: type | None = None,
    callbacks: Sequence[Any] = (),
    optimizers: Callable[[nn.Module], tuple[Any, Any]] | None = None,
    **arguments: Any,
) -> Trained:
    """Minimise ``objective`` for ``steps`` steps of ``batch_size`` examples.

    Args:
        model: trained in place.
        columns: tensors with one row per example, by the names that ``objective`` expects in a batch.
        objective: see :class:`lossmith.training.Objective`.
        steps: optimiser steps.
        batch_size: examples per step.
        seed: of the order of the examples and of dropout: the same for every arm.
        folder: for the Trainer's own files.
        weighting, sampler: see :class:`lossmith.training.Trainer`.
        tokens_per_example: for the curve.
        trainer_class: a subclass of :class:`lossmith.training.Trainer`.
        callbacks: of ``transformers.Trainer``.
        optimizers: makes an optimiser and a learning-rate schedule, instead of those that ``arguments`` name.
        **arguments: of ``transformers.TrainingArguments``.
    """
    import transformers

    from lossmith.training import Trainer
    from lossmith.training.overhead import garbage_frozen

    transformers.utils.logging.set_verbosity_error()
    weighting_objective = weighting.attach(objective) if hasattr(weighting, "attach") else objective
    options = {
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 10,
        "use_cpu": True,
        **arguments,
    }
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        seed=seed,
        data_seed=seed,
        **options,
    )
    trainer = (trainer_class or Trainer)(
        model,
        args,
        objective=weighting_objective,
        weighting=weighting,
        **({"sampler": sampler} if sampler is not None else {}),
        callbacks=list(callbacks),
        **({"optimizers": optimizers(model)} if optimizers is not None else {}),
        train_dataset=range(len(next(iter(columns.values())))),
        data_collator=functools.partial(_rows, columns),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    with garbage_frozen():
        trainer.train()
    logged = [line for line in trainer.state.log_history if "loss_unweighted" in line]
    curve = Curve(
        steps=tuple(int(line["step"]) for line in logged),
        tokens=tuple(int(line["step"]) * batch_size * tokens_per_example for line in logged),
        seconds=tuple(line["seconds"] for line in logged),
        values=tuple(line["loss_unweighted"] for line in logged),
    )
    return Trained(curve, steps, float(trainer.state.total_flos))


def _rows(columns: Mapping[str, Tensor], indices: list[int]) -> dict[str, Tensor]:
    """A batch, looked up as a whole: much faster than stacking single examples."""
    import torch

    places = torch.tensor(indices)
    return {name: column[places] for name, column in columns.items()}
