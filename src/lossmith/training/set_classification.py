"""Classification by a loss of the whole batch (soft F1) instead of a mean over examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from lossmith.losses import set_dice_loss
from lossmith.training.objectives import Batch, Classification


class SetClassification(Classification):
    """Classification of examples, or of their tokens, by a set-level loss (:func:`lossmith.losses.set_dice_loss`).

    Args:
        loss: row-wise function ``(logits, targets) -> shares`` whose shares sum to the loss of the set.
        **options: of ``loss``.

    Each example's value is its share (of all its tokens) times the number of examples with targets, so that the
    Trainer's mean over examples is the loss of the set.

    The set is the batch of one optimiser step. Cut into micro-batches, or spread over processes, it would be another
    loss: the Trainer refuses both.

    >>> import torch
    >>> objective = SetClassification(alpha=0.0)
    >>> batch = {"input": torch.zeros(4, 3), "labels": torch.tensor([0, 1, 0, -100])}
    >>> objective(torch.nn.Linear(3, 2), batch).shape
    torch.Size([4])
    """

    #: Told to the Trainer.
    relates_examples = True

    def __init__(self, loss: Callable[..., Tensor] = set_dice_loss, **options: Any):
        super().__init__(loss, **options)

    def __call__(self, model: nn.Module, batch: Batch) -> Float[Tensor, examples]:
        """One value per example; their mean over examples with targets is the loss of the set."""
        shares = self.rows(model, batch)
        counted = (self.target_counts(batch) > 0).sum()
        return shares.reshape(len(shares), -1).sum(-1) * counted
