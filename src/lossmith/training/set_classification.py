"""Classification by a loss of the whole batch (soft F1) instead of a mean over examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from lossmith.losses import class_weights, cross_entropy, set_dice_loss, set_tversky_loss
from lossmith.registry import LOSSES, parse_spec
from lossmith.training.objectives import Batch, Classification

#: Losses of a whole batch, in shares.
SET_LOSSES: dict[str, Callable[..., Tensor]] = {"set_dice_loss": set_dice_loss, "set_tversky_loss": set_tversky_loss}


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


def takes_single_logit(loss: str) -> bool:
    """Whether a loss given by name can train one logit for two classes, as the Dice loss's authors do."""
    return parse_spec(loss).name in (*SET_LOSSES, "dice_loss", "tversky_loss")


def classification_objective(loss: str, counts: Sequence[int]) -> Classification:
    """The objective of a loss given by name and options.

    Args:
        loss: any registered loss, ``weighted_cross_entropy`` (classes weighed by their frequency, see
            :func:`lossmith.losses.class_weights`), or a loss of the whole batch, ``set_dice_loss`` or
            ``set_tversky_loss``.
        counts: how often each class occurs in training.

    >>> type(classification_objective("set_dice_loss(alpha=0.01)", [90, 10])).__name__
    'SetClassification'
    """
    spec = parse_spec(loss)
    if spec.name in SET_LOSSES:
        return SetClassification(SET_LOSSES[spec.name], **spec.options)
    if spec.name == "weighted_cross_entropy":
        weights = class_weights(list(counts), **spec.options)

        def weighted(logits: Tensor, targets: Tensor) -> Tensor:
            return cross_entropy(logits, targets) * weights.to(logits)[targets.clamp_min(0)]

        return Classification(weighted)
    if takes_single_logit(loss):
        # The registry's trial of a name is on two classes; these take one logit as well.
        return Classification(LOSSES.get(spec.name), **spec.options)
    return Classification(loss)
