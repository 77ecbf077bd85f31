"""Training any model with a :class:`lossmith.heads.SphericalHead` in the Trainer."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.trainer_callback import TrainerCallback

from lossmith.errors import InputError
from lossmith.heads import SphericalHead
from lossmith.training.objectives import (
    IGNORE_INDEX,
    Batch,
    ExampleEvaluation,
    accepted_inputs,
    forward_replaced,
    shifted,
    unwrapped,
)


class SphericalObjective:
    """An objective: the model's :class:`SphericalHead` judges what enters it.

    The head stands in the place of the model's output layer (``model.classifier = SphericalHead.from_linear(...)``).
    Losses are averaged over the unmasked tokens of each example; scores of all classes are never computed in training.

    Args:
        task: ``"classification"`` (of examples or tokens), ``"next_token"`` (labels are shifted), or ``"auto"``: next
            token where labels are shaped like ``input_ids``.

    Evaluation reports the head's own loss and the first choice's accuracy: the Z-loss defines no probabilities.

    Give the Trainer :class:`SphericalHeadCallback` as well: it is what updates the head.
    """

    def __init__(self, task: Literal["auto", "classification", "next_token"] = "auto"):
        if task not in ("auto", "classification", "next_token"):
            raise ValueError(f"task must be auto, classification or next_token, got '{task}'")
        self.task = task

    def __call__(self, model: nn.Module, batch: Batch) -> Float[Tensor, examples]:
        """One loss per example; 0 for an example without targets."""
        hidden, targets, head = self._into_head(model, batch)
        losses = head(hidden, targets)
        return losses if losses.ndim == 1 else losses.flatten(1).sum(-1) / self.target_counts(batch).clamp_min(1)

    def target_counts(self, batch: Batch) -> Int[Tensor, examples]:
        """Number of unmasked targets of each example (the first token of a text is none to a language model)."""
        labels = batch["labels"]
        if labels.ndim > 1 and self._is_next_token(batch):
            labels = labels[:, 1:]
        return (labels != IGNORE_INDEX).reshape(len(labels), -1).sum(-1)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batch: Batch) -> ExampleEvaluation:
        """The head's own loss and correct first choices, per example."""
        hidden, targets, head = self._into_head(model, batch)
        losses = head(hidden, targets).reshape(len(targets), -1).sum(-1)
        keep = targets != IGNORE_INDEX
        correct = torch.zeros(targets.shape, dtype=torch.long, device=targets.device)
        correct[keep] = (head.topk(hidden[keep], 1).indices[:, 0] == targets[keep]).long()
        return ExampleEvaluation(losses, self.target_counts(batch), correct.reshape(len(targets), -1).sum(-1))

    def _into_head(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, SphericalHead]:
        head = spherical_head(model)
        seen: list[Tensor] = []

        def forward(hidden: Tensor, *_: Any) -> Tensor:
            seen.append(hidden)
            return hidden[..., :1]

        with forward_replaced(head, forward):
            model(**accepted_inputs(unwrapped(model), batch))
        if len(seen) != 1:
            raise InputError(f"the model called its spherical head {len(seen)} times in one pass; it must be once")
        labels = batch["labels"]
        return seen[0], shifted(labels) if labels.ndim > 1 and self._is_next_token(batch) else labels, head

    def _is_next_token(self, batch: Batch) -> bool:
        ids = batch.get("input_ids")
        same = isinstance(ids, Tensor) and ids.shape == batch["labels"].shape
        return self.task == "next_token" or (self.task == "auto" and same)


class SphericalHeadCallback(TrainerCallback):
    """Updates the model's :class:`SphericalHead` whenever the optimiser makes its step.

    Args:
        lr_scale: the head's learning rate is the optimiser's (its first group's) times this, so that it follows the
            Trainer's schedule.

    - Gradient accumulation is exact: the head collects the micro-batches' gradients until the step.
    - Gradient clipping: the Trainer's ``max_grad_norm`` does not see the head, which is no parameter; give the head its
      own ``max_grad_norm`` (its gradient's norm is computed exactly).
    - Several processes, and gradient scaling (float16), are refused: each process would train a head of its own.
    - Checkpoints hold the head with the model; a resumed run goes on bit for bit.
    """

    def __init__(self, lr_scale: float = 1.0):
        if not 0 < lr_scale < float("inf"):
            raise ValueError(f"lr_scale must be a finite number > 0, got {lr_scale}")
        self.lr_scale = lr_scale

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse what could not be exact."""
        if args.world_size > 1:
            raise InputError("a spherical head trains on one process; each would have a head of its own")
        if args.fp16:
            raise InputError("a spherical head cannot undo the gradient scaling of float16; use bf16 or float32")
        spherical_head(kwargs["model"])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The head's own step."""
        optimizer: Any = kwargs["optimizer"]
        spherical_head(kwargs["model"]).step(self.lr_scale * float(optimizer.param_groups[0]["lr"]))


def spherical_head(model: nn.Module) -> SphericalHead:
    """The model's spherical head."""
    for module in unwrapped(model).modules():
        if isinstance(module, SphericalHead):
            return module
    raise InputError("the model has no SphericalHead in the place of its output layer")


def topk_errors(
    scores_or_head: Tensor | Any, hidden: Tensor | None, targets: Int[Tensor, " rows"], ks: tuple[int, ...]
) -> dict[int, float]:
    """Share of rows whose target is not among the ``k`` best classes, for each ``k``.

    Args:
        scores_or_head: scores of all classes, or a head with ``topk(hidden, k)``.
        hidden: last hidden states, for a head.
        targets: class indices.
        ks: in any order; with ``k`` classes or fewer the error is 0.
    """
    classes = scores_or_head.shape[-1] if isinstance(scores_or_head, Tensor) else scores_or_head.num_classes
    most = min(max(ks), classes)
    if isinstance(scores_or_head, Tensor):
        best = scores_or_head.topk(most, -1).indices
    else:
        best = scores_or_head.topk(hidden, most).indices
    found = best == targets.unsqueeze(-1)
    return {k: 1 - float(found[:, :k].any(-1).double().mean()) for k in ks}
