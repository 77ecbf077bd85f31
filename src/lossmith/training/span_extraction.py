"""Finding an answer's first and last token: span extraction in the form of machine reading comprehension."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lossmith.losses import set_dice_loss
from lossmith.training.objectives import IGNORE_INDEX, Batch, ExampleEvaluation, accepted_inputs, unwrapped


class SpanExtraction:
    r"""Each position is a yes-or-no example: is it the first (last) token of a span?

    .. math:: \ell = \tfrac12 \bigl(L(\text{starts}) + L(\text{ends})\bigr)

    Args:
        loss: a loss of the whole batch in shares (:func:`lossmith.losses.set_dice_loss`), or a row-wise loss that takes
            a single logit per position; one start among hundreds of positions is what the Dice loss is for.
        **options: of ``loss``.

    For models with ``start_logits`` and ``end_logits`` (``AutoModelForQuestionAnswering``). The batch holds the model's
    inputs and ``start_positions`` and ``end_positions``: either one index per example (SQuAD; -100 where there is no
    answer), or 0 and 1 for each position (several spans; -100 where masked). Positions outside of ``attention_mask``
    (and of ``span_mask``, where given: the context without the question) do not count.

    With a loss in shares the values' mean over examples is the loss of the set, as in
    :class:`lossmith.training.SetClassification`.

    Source: Li et al., "Dice Loss for Data-imbalanced NLP Tasks", 2020, arXiv 1911.02855, and its code for SQuAD.
    """

    def __init__(self, loss: Callable[..., Tensor] = set_dice_loss, **options: Any):
        self.loss, self.options = loss, options
        self.relates_examples = bool(getattr(loss, "relates_examples", False))

    def __call__(self, model: nn.Module, batch: Batch) -> Float[Tensor, examples]:
        """One value per example."""
        inputs = {k: v for k, v in accepted_inputs(unwrapped(model), batch).items() if not k.endswith("_positions")}
        output = model(**inputs)
        total = torch.zeros(())
        for name in ("start", "end"):
            logits = getattr(output, f"{name}_logits")
            labels = self._labels(batch, name, logits.shape)
            values = self.loss(logits.unsqueeze(-1), labels, **self.options).sum(-1)
            if self.relates_examples:
                values = values * len(values)
            else:
                values = values / (labels != IGNORE_INDEX).sum(-1).clamp_min(1)
            total = total.to(values) + values / 2
        return total

    def target_counts(self, batch: Batch) -> Int[Tensor, examples]:
        """Every example counts: one without an answer says that there is none."""
        return torch.ones(len(batch["start_positions"]), dtype=torch.long, device=batch["start_positions"].device)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batch: Batch) -> ExampleEvaluation:
        """The objective's own loss, and whether both ends of the best span are right (one index per example)."""
        losses = self(model, batch)
        inputs = {k: v for k, v in accepted_inputs(unwrapped(model), batch).items() if not k.endswith("_positions")}
        output = model(**inputs)
        correct = torch.zeros(len(losses), dtype=torch.long, device=losses.device)
        if batch["start_positions"].ndim == 1:
            spans = best_spans(output.start_logits, output.end_logits, self._counted(batch, output.start_logits.shape))
            truth = torch.stack([batch["start_positions"], batch["end_positions"]], -1)
            correct = (spans == truth).all(-1).long()
        return ExampleEvaluation(losses, self.target_counts(batch), correct)

    def _labels(self, batch: Batch, name: str, shape: torch.Size) -> Int[Tensor, "examples length"]:
        positions = batch[f"{name}_positions"]
        if positions.ndim == 1:
            if bool((positions >= shape[1]).any()):
                raise ValueError(f"{name}_positions must be below the length {shape[1]}, got {int(positions.max())}")
            labels = (torch.arange(shape[1], device=positions.device) == positions.unsqueeze(-1)).long()
        elif positions.shape == shape:
            labels = positions.long()
        else:
            raise ValueError(
                f"{name}_positions must be one index per example or have shape {tuple(shape)}, got "
                f"{tuple(positions.shape)}"
            )
        return labels.masked_fill(~self._counted(batch, shape), IGNORE_INDEX)

    @staticmethod
    def _counted(batch: Batch, shape: torch.Size) -> Tensor:
        counted = torch.ones(shape, dtype=torch.bool, device=batch["start_positions"].device)
        for mask in ("attention_mask", "span_mask"):
            if mask in batch:
                counted = counted & batch[mask].bool()
        return counted


def best_spans(
    start_logits: Float[Tensor, "examples length"],
    end_logits: Float[Tensor, "examples length"],
    counted: Tensor | None = None,
    *,
    longest: int = 30,
) -> Int[Tensor, "examples 2"]:
    """First and last position of each example's best span: the largest sum of logits, the end not before the start.

    >>> best_spans(torch.tensor([[0.0, 6.0, 1.0]]), torch.tensor([[9.0, 0.0, 4.0]]))
    tensor([[1, 2]])
    """
    length = start_logits.shape[1]
    if counted is not None:
        start_logits = start_logits.masked_fill(~counted, -torch.inf)
        end_logits = end_logits.masked_fill(~counted, -torch.inf)
    scores = start_logits.unsqueeze(2) + end_logits.unsqueeze(1)
    place = torch.arange(length, device=scores.device)
    distance = place.unsqueeze(0) - place.unsqueeze(1)
    scores = scores.masked_fill((distance < 0) | (distance >= longest), -torch.inf)
    best = scores.flatten(1).argmax(-1)
    return torch.stack([best // length, best % length], -1)
