"""Training models that unmask their answers, and the autoregressive training that they may start from."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lossmith.heads import linear_loss
from lossmith.losses import masked_diffusion_loss
from lossmith.registry import Spec
from lossmith.training.objectives import IGNORE_INDEX, Batch, ExampleEvaluation, LossFunction, bind_loss


class AnsweringModel(Protocol):
    """What the objectives here need of a model."""

    mask_token_id: int
    lm_head: nn.Linear

    def answer_hidden(
        self, batch: Batch, answer_ids: Int[Tensor, "batch length"], *, causal: bool = False
    ) -> Float[Tensor, "batch length width"]:
        """What enters ``lm_head`` at each token of the answer, given the batch's image and prompt."""
        ...


class MaskedDiffusion:
    """Masked diffusion of answers: mask each token with a probability drawn anew, predict those that are masked.

    Args:
        loss: a registered row-wise loss by name, or a function.
        floor: smallest masking probability; drawn is ``t`` uniform in ``[floor, 1]``, and weighed by ``1/t``.
        generator: of the draws; default: torch's own, which a resumed run finds as it was.
        chunk_size: see :func:`lossmith.heads.linear_loss`; logits are made a chunk at a time.
        **options: of ``loss``.

    The batch holds what the model needs, and ``labels`` (examples, length): the answers, -100 where a shorter one is
    filled up. The model is an :class:`AnsweringModel` such as
    :class:`lossmith.tasks.multimodal.MultimodalDiffusionModel`.

    Source: see :func:`lossmith.losses.masked_diffusion_loss`.

    >>> MaskedDiffusion(floor=0.05).floor
    0.05
    """

    def __init__(
        self,
        loss: str | Spec | LossFunction = "cross_entropy",
        *,
        floor: float = 1e-3,
        generator: torch.Generator | None = None,
        chunk_size: int | None = None,
        **options: Any,
    ):
        if not 0 < floor <= 1:
            raise ValueError(f"floor must be in (0, 1], got {floor}")
        self.loss, self.floor = bind_loss(loss, **options), floor
        self.generator, self.chunk_size = generator, chunk_size

    def __call__(self, model: Any, batch: Batch) -> Float[Tensor, examples]:
        """One loss per example, in nats per token of its answer."""
        labels = batch["labels"]
        t, masked = self.draw(labels)
        tokens = self._token_losses(model, batch, masked, causal=False)
        return masked_diffusion_loss(tokens, masked, t, counted=labels != IGNORE_INDEX)

    def draw(self, labels: Int[Tensor, "examples length"]) -> tuple[Float[Tensor, examples], Bool[Tensor, ...]]:
        """A masking probability for each example, and which of its tokens are masked."""
        numbers = torch.rand(len(labels), labels.shape[1] + 1, generator=self.generator).to(labels.device)
        t = self.floor + (1 - self.floor) * numbers[:, 0]
        return t, (numbers[:, 1:] < t.unsqueeze(1)) & (labels != IGNORE_INDEX)

    def target_counts(self, batch: Batch) -> Int[Tensor, examples]:
        """Tokens of each answer."""
        return (batch["labels"] != IGNORE_INDEX).sum(-1)

    @torch.no_grad()
    def evaluate(self, model: Any, batch: Batch) -> ExampleEvaluation:
        """Cross entropy of the answers, each guessed at once from nothing but masks."""
        return _evaluation(model, batch, causal=False)

    def _token_losses(self, model: Any, batch: Batch, masked: Tensor, *, causal: bool) -> Tensor:
        ids = batch["labels"].masked_fill(masked | (batch["labels"] == IGNORE_INDEX), model.mask_token_id)
        hidden = model.answer_hidden(batch, ids, causal=causal)
        targets = batch["labels"].masked_fill(~masked, IGNORE_INDEX)
        return linear_loss(self.loss, hidden, model.lm_head.weight, targets, chunk_size=self.chunk_size)


class NextAnswerToken:
    """Autoregressive training of the same model: each token of the answer from those before it, all seen causally.

    What an adapted diffusion model was before. Arguments and batch are those of :class:`MaskedDiffusion`; the value is
    the mean loss over the answer's tokens. The model must predict each token from the place before it (``shifted``).

    >>> NextAnswerToken("focal_loss(gamma=1)").target_counts({"labels": torch.tensor([[3, 4, -100]])})
    tensor([2])
    """

    def __init__(
        self, loss: str | Spec | LossFunction = "cross_entropy", *, chunk_size: int | None = None, **options: Any
    ):
        self.loss, self.chunk_size = bind_loss(loss, **options), chunk_size

    def __call__(self, model: Any, batch: Batch) -> Float[Tensor, examples]:
        """Mean loss of each answer's tokens; 0 for an answer without any."""
        if not model.shifted:
            raise ValueError(
                "next-token training needs a model that predicts each token from the place before it: shifted=True"
            )
        labels = batch["labels"]
        hidden = model.answer_hidden(batch, labels.masked_fill(labels == IGNORE_INDEX, 0), causal=True)
        rows = linear_loss(self.loss, hidden, model.lm_head.weight, labels, chunk_size=self.chunk_size)
        return rows.sum(-1) / self.target_counts(batch).clamp_min(1)

    def target_counts(self, batch: Batch) -> Int[Tensor, examples]:
        """Tokens of each answer."""
        return (batch["labels"] != IGNORE_INDEX).sum(-1)

    @torch.no_grad()
    def evaluate(self, model: Any, batch: Batch) -> ExampleEvaluation:
        """Cross entropy of the answers, token by token."""
        return _evaluation(model, batch, causal=True)


def _evaluation(model: Any, batch: Batch, *, causal: bool) -> ExampleEvaluation:
    labels = batch["labels"]
    counted = labels != IGNORE_INDEX
    ids = labels.masked_fill(~counted, 0) if causal else torch.full_like(labels, model.mask_token_id)
    hidden = model.answer_hidden(batch, ids, causal=causal)
    rows = linear_loss("cross_entropy", hidden, model.lm_head.weight, labels)
    right = (model.lm_head(hidden).argmax(-1) == labels) & counted
    return ExampleEvaluation(rows.sum(-1), counted.sum(-1), right.sum(-1))
