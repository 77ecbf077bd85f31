"""Training on implicit feedback: the objective for :class:`lossmith.training.Trainer`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lossmith.errors import InputError, did_you_mean
from lossmith.losses import bpr_loss
from lossmith.tasks.recommendation.backbones import Scored
from lossmith.tasks.recommendation.denoising import Denoising, draw_column
from lossmith.tasks.recommendation.triples import TripleSource

LOSSES = ("bpr", "bce")


class ImplicitFeedback:
    """One loss per example number: draws the example's triple, chooses from its pool, scores it.

    Args:
        source: of the triples.
        loss: ``bpr`` (:func:`lossmith.losses.bpr_loss`) or ``bce`` (:func:`lossmith.losses.implicit_bce_loss`).
        denoising: what to choose and how much it counts.
        l2: times the squared norm of each triple's embeddings, added to its loss.
        batch_size: examples per step.
        steps_per_epoch: steps per epoch.

    The batch holds ``index``, the numbers of the examples in the order of training. ``drawn`` counts, for each
    interaction of the table, how often it was trained on (as much as it counted).
    """

    def __init__(
        self,
        source: TripleSource,
        *,
        loss: str = "bpr",
        denoising: Denoising,
        l2: float = 1e-4,
        batch_size: int = 2048,
        steps_per_epoch: int = 1,
    ):
        if loss not in LOSSES:
            raise InputError(f"unknown loss '{loss}': {did_you_mean(loss, LOSSES)}")
        if not l2 >= 0:
            raise ValueError(f"l2 must be >= 0, got {l2}")
        self.source, self.loss, self.denoising, self.l2 = source, loss, denoising, l2
        self.batch_size, self.steps_per_epoch = batch_size, steps_per_epoch
        self.relates_examples = denoising.relates_examples
        self.drawn = torch.zeros(source.n_interactions, dtype=torch.float64)

    def __call__(self, model: nn.Module, batch: Mapping[str, Any], /) -> Float[Tensor, " batch"]:
        """Losses of the batch's examples."""
        example = batch["index"]
        step = int(example[0]) // self.batch_size
        warm = step < self.denoising.warmup_epochs * self.steps_per_epoch
        size = 1 if warm else self.denoising.pool_size
        pool, scored = self._scored(model, example, size)
        positive, negative = scored.positive, scored.negative
        if self.loss == "bpr":
            parts = [(bpr_loss(positive, negative), True)]
        else:
            parts = [(F.softplus(-positive), True), (F.softplus(negative), False)]
        total = self.l2 * scored.squared_norm
        for part, is_positive in parts:
            weights = self.denoising.weights(part.detach(), step, positive=is_positive)
            total = total + (part if weights is None else weights * part)
            if is_positive and torch.is_grad_enabled():
                self._count(pool.gather(1, scored.column.unsqueeze(1)).squeeze(1), weights)
        return total

    def pool_losses(self, positive: Float[Tensor, "*batch"], negative: Float[Tensor, "*batch"]) -> Tensor:
        """Losses that the pool is compared by: with ``bce`` the positive part alone."""
        return bpr_loss(positive, negative) if self.loss == "bpr" else F.softplus(-positive)

    def _scored(self, model: nn.Module, example: Tensor, size: int) -> tuple[Tensor, Scored]:
        if size > 1 and self.denoising.across_users:
            flat = (example.unsqueeze(1) * size + torch.arange(size, device=example.device)).flatten()
            triples = self.source.draw(flat)
            users, pool, items, negatives = (
                x.view(-1, size) for x in (triples.users, triples.pool, triples.items, triples.negatives)
            )
            choice = triples.choice.view(-1, size)[:, 0]
        else:
            triples = self.source.draw(example, size)
            users, negatives = triples.users.unsqueeze(1), triples.negatives.unsqueeze(1)
            pool, items, choice = triples.pool, triples.items, triples.choice

        def choose(positive: Tensor, negative: Tensor) -> Tensor:
            return draw_column(self.denoising.probabilities(self.pool_losses(positive, negative)), choice)

        return pool, model(users, items, negatives, choose if size > 1 else None)

    def _count(self, places: Tensor, weights: Tensor | None) -> None:
        if self.drawn.device != places.device:
            self.drawn = self.drawn.to(places.device)
        amount = torch.ones_like(places, dtype=torch.float64) if weights is None else weights.double()
        self.drawn.index_add_(0, places, amount)
