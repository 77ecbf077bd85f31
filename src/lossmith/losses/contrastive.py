"""Contrast between several good and several bad targets of one example: a loss over losses.

The inputs are not logits but losses and scores of whole sequences, one row per example and one column per candidate.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Scheme = Literal["minmax", "maxmin", "sampling", "mean", "weighted_mean"]
SCHEMES: tuple[str, ...] = get_args(Scheme)


def contrastive_rationale_loss(
    positive_losses: Float[Tensor, "*batch positives"],
    negative_losses: Float[Tensor, "*batch negatives"],
    positive_scores: Float[Tensor, "*batch positives"] | None = None,
    negative_scores: Float[Tensor, "*batch negatives"] | None = None,
    *,
    positive_mask: Bool[Tensor, "*batch positives"] | None = None,
    negative_mask: Bool[Tensor, "*batch negatives"] | None = None,
    beta: float = 0.2,
    margin: float = 3.0,
    scheme: Scheme = "minmax",
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*batch"]:
    r"""Fit the nearest good rationale, push the nearest bad one away until its loss reaches a margin.

    .. math::
        \ell = s^+_{a} \, l^+_{a} - \beta\,(1 - s^-_{b})\, \min(l^-_{b} - \delta,\, 0), \qquad
        a = \arg\min_j l^+_j, \quad b = \arg\max_j l^-_j

    where ``l`` are the student's losses of the rationales of one question (mean negative log likelihood per token)
    and ``s`` a judge's scores of their quality. A good rationale counts as much as it is thought good, a bad one as
    much as it is thought bad.

    Args:
        positive_losses: ``l⁺ >= 0`` of the rationales to learn.
        negative_losses: ``l⁻ >= 0`` of those to move away from; there may be none (no columns).
        positive_scores: ``s⁺`` in [0, 1]; constants. ``None``: 1.
        negative_scores: ``s⁻`` in [0, 1]; constants. ``None``: 0.
        positive_mask: false where a column is only filling; whatever stands there has no influence.
        negative_mask: the same. An example without negatives has only the first part.
        beta: ``β >= 0``, weight of pushing away.
        margin: ``δ >= 0`` (nats per token): a negative whose loss has reached it is left alone. Without a margin the
            loss has no lower bound, and generation degenerates.
        scheme: which rationales of a question count. ``"minmax"`` as above: the easiest of each kind, the best of those
            that the paper compares; if *any* negative has reached the margin, none is pushed. ``"maxmin"``: the hardest
            of each kind; ``"sampling"``: one of each at random; ``"mean"``: mean loss times mean score;
            ``"weighted_mean"``: mean of loss times score.
        generator: of the choice in ``"sampling"``.

    Returns:
        One loss per example, bounded below by 0. The gradient is ``s⁺`` in the chosen positive's loss,
        ``-β(1 - s⁻)`` in the chosen negative's below the margin, and 0 elsewhere; the choice is not differentiated.

    Source: "QCRD: Quality-guided Contrastive Rationale Distillation for Large Language Models", 2024,
    arXiv 2405.13014, equations 3 to 7. The equations do not say which rationale's score is meant: here the chosen
    one's.

    Relations:
        With one positive, ``beta=0`` and no scores this is the loss of the rationale itself, as in "Distilling
        step-by-step". :class:`lossmith.training.RationaleDistillation` computes the losses and scores.

    >>> good, bad = torch.tensor([[1.2, 0.8, 2.0]]), torch.tensor([[2.5, 2.0, 1.0]])
    >>> contrastive_rationale_loss(good, bad, torch.tensor([[0.9, 0.7, 0.95]]), torch.tensor([[0.1, 0.3, 0.6]]))
    tensor([0.6500])
    """
    check_contrast(beta, margin, scheme)
    positive_losses, positive_scores, good = _prepared("positive", positive_losses, positive_scores, positive_mask, 1.0)
    negative_losses, negative_scores, bad = _prepared("negative", negative_losses, negative_scores, negative_mask, 0.0)
    if positive_losses.shape[:-1] != negative_losses.shape[:-1]:
        raise ValueError(
            f"positive_losses and negative_losses must be of the same examples, got {tuple(positive_losses.shape)} "
            f"and {tuple(negative_losses.shape)}"
        )
    # Not clamp: at the margin itself its gradient would be 1. Not "<": NaN must not look like a loss beyond the margin.
    distances = torch.where(negative_losses >= margin, torch.zeros_like(negative_losses), negative_losses - margin)
    distances = distances.masked_fill(~bad, 0.0)
    badness = (1 - negative_scores).masked_fill(~bad, 0.0)
    if scheme == "mean":
        return _mean(positive_losses, good) * _mean(positive_scores, good) - beta * (
            _mean(distances, bad) * _mean(badness, bad)
        )
    if scheme == "weighted_mean":
        return _mean(positive_losses * positive_scores, good) - beta * _mean(distances * badness, bad)
    chosen_good = choose_rationale(positive_losses, good, positive=True, scheme=scheme, generator=generator)
    chosen_bad = choose_rationale(negative_losses, bad, positive=False, scheme=scheme, generator=generator)
    return _at(positive_losses * positive_scores, chosen_good) - beta * _at(distances * badness, chosen_bad)


def rationale_quality_loss(
    positive_scores: Float[Tensor, "*batch positives"],
    negative_scores: Float[Tensor, "*batch negatives"],
    *,
    positive_mask: Bool[Tensor, "*batch positives"] | None = None,
    negative_mask: Bool[Tensor, "*batch negatives"] | None = None,
) -> Float[Tensor, "*batch"]:
    r"""What a judge of rationales minimises: scores of the good ones up, of the bad ones down.

    .. math:: \ell = \log \sum_j e^{s^-_j} - \log \sum_j e^{s^+_j}

    Args:
        positive_scores: ``s⁺`` in (0, 1), **after** the sigmoid: with logits the loss would have no lower bound.
        negative_scores: ``s⁻`` in (0, 1).
        positive_mask: false where a column is only filling.
        negative_mask: the same.

    Returns:
        One value per example, within ``log(k/m) ± 1`` for ``m`` good and ``k`` bad ones; 0 (and no gradient) for an
        example that lacks either kind. Gradients are ``-softmax(s⁺)`` and ``softmax(s⁻)``.

    Source: "QCRD", 2024, arXiv 2405.13014, equation 2. The denominator holds the negatives only.

    >>> rationale_quality_loss(torch.tensor([[1.0]]), torch.tensor([[0.0]]))
    tensor([-1.])
    """
    positive_scores, _, good = _prepared("positive", positive_scores, None, positive_mask, 1.0)
    negative_scores, _, bad = _prepared("negative", negative_scores, None, negative_mask, 0.0)
    both = good.any(-1) & bad.any(-1)
    # Rows without both kinds sum over zeros instead: logsumexp of nothing has a gradient of NaN.
    good, bad = good | ~both.unsqueeze(-1), bad | ~both.unsqueeze(-1)
    if positive_scores.shape[-1] == 0 or negative_scores.shape[-1] == 0:
        return positive_scores.sum(-1) * 0 + negative_scores.sum(-1) * 0
    loss = _logsumexp(negative_scores, bad) - _logsumexp(positive_scores, good)
    return loss.masked_fill(~both, 0.0)


def choose_rationale(
    losses: Float[Tensor, "*batch columns"],
    mask: Bool[Tensor, "*batch columns"],
    *,
    positive: bool,
    scheme: Scheme = "minmax",
    generator: torch.Generator | None = None,
) -> Int[Tensor, "*batch"]:
    """The column that counts under a scheme that chooses one; -1 where the mask leaves none.

    >>> choose_rationale(torch.tensor([[2.0, 1.0]]), torch.tensor([[True, True]]), positive=True)
    tensor([1])
    """
    if scheme not in ("minmax", "maxmin", "sampling"):
        raise ValueError(f"scheme '{scheme}' counts all rationales; minmax, maxmin and sampling choose one")
    if losses.shape[-1] == 0:
        return torch.full(losses.shape[:-1], -1, dtype=torch.long, device=losses.device)
    key = losses.detach()
    if scheme == "sampling":
        # A generator draws on its own device only.
        device = losses.device if generator is None else generator.device
        key = torch.rand(losses.shape, generator=generator, device=device).to(losses.device)
    least = positive == (scheme == "minmax")
    key = key.masked_fill(~mask, math.inf if least else -math.inf)
    column = key.argmin(-1) if least else key.argmax(-1)
    return torch.where(mask.any(-1), column, torch.full_like(column, -1))


def check_contrast(beta: float, margin: float, scheme: str) -> None:
    """Refuse options out of range."""
    for name, value in (("beta", beta), ("margin", margin)):
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be a finite number >= 0, got {value}")
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {', '.join(SCHEMES)}, got '{scheme}'")


def _prepared(
    kind: str, losses: Tensor, scores: Tensor | None, mask: Tensor | None, default: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Floating point of at least float32, constant scores, and no influence of what the mask leaves out."""
    if not losses.is_floating_point():
        raise TypeError(f"{kind} losses and scores must be floating point, got {losses.dtype}")
    if losses.ndim == 0:
        raise ValueError(f"{kind} losses and scores need a last dimension, one column per rationale")
    for name, other in (("scores", scores), ("mask", mask)):
        if other is not None and other.shape != losses.shape:
            raise ValueError(
                f"{kind}_{name} must have the shape of the {kind} losses, {tuple(losses.shape)}, "
                f"got {tuple(other.shape)}"
            )
    if mask is None:
        mask = torch.ones_like(losses, dtype=torch.bool)
    losses = losses.to(torch.promote_types(losses.dtype, torch.float32)).masked_fill(~mask, 0.0)
    if scores is None:
        scores = torch.full_like(losses, default)
    return losses, scores.detach().to(losses.dtype).masked_fill(~mask, 0.0), mask


def _at(values: Tensor, column: Tensor) -> Tensor:
    """Each row's value in its column; 0 where that is -1."""
    if values.shape[-1] == 0:
        return values.sum(-1)
    found = values.gather(-1, column.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return found.masked_fill(column < 0, 0.0)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return values.sum(-1) / mask.sum(-1).clamp_min(1)


def _logsumexp(scores: Tensor, mask: Tensor) -> Tensor:
    return torch.logsumexp(scores.masked_fill(~mask, -math.inf), -1)
