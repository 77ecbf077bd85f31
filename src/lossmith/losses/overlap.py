"""Losses from the overlap of predicted and true sets (Dice, Tversky): soft F1 and soft F-beta, for imbalanced tasks.

Two levels. *Set level* is the differentiable F1: numerator and denominator are sums over all examples of a batch, and
that is what counters imbalance. *Example level* is what the paper prints: each example has a fraction of its own, which
is not F1 and does not counter imbalance, but judges each example alone.

The set-level losses still return one value per example, its share of the loss: the shares **sum** to the loss (it is
one number for the set, not a mean), and the gradient of that sum is the gradient of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lossmith.losses.classification import check_class_targets, check_target_range

# (1 - p)^alpha has an infinite slope at p = 1 for alpha < 1.
MOST = 1 - 1e-7


def dice_loss(
    logits: Float[Tensor, "*batch classes"],
    targets: Int[Tensor, "*batch"],
    *,
    alpha: float = 0.01,
    smooth: float = 1.0,
    square: bool = True,
    ignore_index: int = -100,
) -> Float[Tensor, "*batch"]:
    r"""Dice loss of each example by itself, as printed: summed over classes, one against the rest.

    .. math::
        \ell_i = \sum_c 1 - \frac{2 f_{ic} y_{ic} + \gamma}{f_{ic}^2 + y_{ic}^2 + \gamma},
        \qquad f = (1-p)^\alpha\, p

    with ``p`` the softmax of the logits, or the sigmoid of a single logit (then one class, targets 0 or 1).

    Args:
        logits: raw scores; half precision is computed in float32.
        targets: class indices, or ``ignore_index`` (loss and gradient exactly 0).
        alpha: self-adjusting exponent ``α >= 0``: confident examples fade. ``1`` is the printed DSC, which pushes right
            answers back to p = 1/2 (its minimum is at ``1/(1+α)``); released scripts use 0.01.
        smooth: ``γ > 0``.
        square: squared denominator; ``False``: ``f + y + γ``.
        ignore_index: target of examples that do not count.

    Returns:
        One loss in [0, classes] per example.

    With imbalanced classes use :func:`set_dice_loss`: this form is a weak penalty on each example and no soft F1.

    Source: Li et al., "Dice Loss for Data-imbalanced NLP Tasks", 2020, arXiv 1911.02855, equations 7 and 11;
    exponent and sum over classes as released.

    >>> dice_loss(torch.tensor([[2.0, 0.5, -1.0]]), torch.tensor([0]), alpha=0.0)
    tensor([0.0489])
    """
    _check(smooth, alpha=alpha)
    p, y, counted = _one_against_rest(logits, targets, ignore_index)
    f = _adjusted(p, alpha)
    denominator = f.square() + y.square() if square else f + y
    losses = 1 - (2 * f * y + smooth) / (denominator + smooth)
    return (losses * counted.unsqueeze(-1)).sum(-1)


def tversky_loss(
    logits: Float[Tensor, "*batch classes"],
    targets: Int[Tensor, "*batch"],
    *,
    false_positives: float = 0.5,
    false_negatives: float = 0.5,
    smooth: float = 1.0,
    ignore_index: int = -100,
) -> Float[Tensor, "*batch"]:
    r"""Tversky loss of each example by itself, as printed: summed over classes, one against the rest.

    .. math::
        \ell_i = \sum_c 1 - \frac{p y + \gamma}{p y + a\, p (1-y) + b\, (1-p)\, y + \gamma}

    Args:
        logits: raw scores; half precision is computed in float32.
        targets: class indices, or ``ignore_index`` (loss and gradient exactly 0).
        false_positives: ``a >= 0``, their weight (the paper's alpha; many libraries call it beta).
        false_negatives: ``b >= 0``, their weight.
        smooth: ``γ > 0``.
        ignore_index: target of examples that do not count.

    Source: Li et al., 2020, arXiv 1911.02855, equation 9.

    Relations:
        With ``a = b = 1/2`` the Dice loss without squares, with twice the smoothing. :func:`set_tversky_loss` is the
        form that counters imbalance.

    >>> tversky_loss(torch.tensor([[2.0, 0.5, -1.0]]), torch.tensor([0]))
    tensor([0.1564])
    """
    _check(smooth, false_positives=false_positives, false_negatives=false_negatives)
    p, y, counted = _one_against_rest(logits, targets, ignore_index)
    wrong = false_positives * p * (1 - y) + false_negatives * (1 - p) * y
    losses = wrong / (p * y + wrong + smooth)
    return (losses * counted.unsqueeze(-1)).sum(-1)


def set_dice_loss(
    logits: Float[Tensor, "*batch classes"],
    targets: Int[Tensor, "*batch"],
    *,
    alpha: float = 0.01,
    smooth: float = 1.0,
    square: bool = True,
    ohem_ratio: float = 0.0,
    ignore_classes: Sequence[int] = (),
    ignore_index: int = -100,
) -> Float[Tensor, "*batch"]:
    r"""Soft F1 of the whole batch, as shares that sum to it.

    .. math::
        L = \operatorname{mean}_c\;
            1 - \frac{2 \sum_i f_{ic} y_{ic} + \gamma}{\sum_i f_{ic}^2 + \sum_i y_{ic}^2 + \gamma}
          = \sum_i \operatorname{mean}_c \frac{(f_{ic} - y_{ic})^2}{\sum_j f_{jc}^2 + \sum_j y_{jc}^2 + \gamma}

    The second form is an identity; its summands are what is returned. With hard predictions and ``γ → 0`` it is one
    less F1.

    Args:
        logits: raw scores of all examples of the batch (all tokens of all sequences).
        targets: class indices, or ``ignore_index`` (share and gradient exactly 0).
        alpha: see :func:`dice_loss`.
        smooth: ``γ > 0``; 1 for batches of tokens. Small values leave batches without positives without gradient.
        square: squared denominator; ``False``: sums of ``f`` and ``y``, and shares ``(f + y - 2fy) / (...)``.
        ohem_ratio: hard negative mining: for each class only ``ratio`` times as many negatives as there are positives
            count, those of highest ``p`` (at least one); 0 is off.
        ignore_classes: classes left out of the mean (``O`` in tagging).
        ignore_index: target of examples that do not count.

    Returns:
        One share >= 0 per example; **sum them, do not average**. :class:`lossmith.training.SetClassification` does.

    The set is what one call is given: with gradient accumulation or several processes that would be a part of the
    batch.

    Source: Li et al., 2020, arXiv 1911.02855, footnote 3 and released code for binary tasks.

    >>> shares = set_dice_loss(torch.tensor([[2.0, 0.5, -1.0], [0.1, 0.2, 0.3]]), torch.tensor([0, 1]))
    >>> shares.shape
    torch.Size([2])
    """
    _check(smooth, alpha=alpha)
    if not (ohem_ratio >= 0 and math.isfinite(ohem_ratio)):
        raise ValueError(f"ohem_ratio must be a finite number >= 0, got {ohem_ratio}")
    p, y, counted = _one_against_rest(logits, targets, ignore_index)
    kept = _classes(p.shape[-1], ignore_classes)
    p, y = p[..., kept].flatten(0, -2), y[..., kept].flatten(0, -2)
    mask = counted.reshape(-1, 1).to(p.dtype).expand_as(p)
    if ohem_ratio > 0:
        mask = mask * _hard_negatives(p, y, mask, ohem_ratio)
    f, y = _adjusted(p, alpha) * mask, y * mask
    if square:
        shares, denominator = (f - y).square(), (f.square() + y.square()).sum(0)
    else:
        shares, denominator = f + y - 2 * f * y, (f + y).sum(0)
    return (shares / (denominator + smooth)).mean(-1).reshape(targets.shape)


def set_tversky_loss(
    logits: Float[Tensor, "*batch classes"],
    targets: Int[Tensor, "*batch"],
    *,
    false_positives: float = 0.5,
    false_negatives: float = 0.5,
    smooth: float = 1.0,
    ignore_classes: Sequence[int] = (),
    ignore_index: int = -100,
) -> Float[Tensor, "*batch"]:
    r"""Soft F-beta of the whole batch, as shares that sum to it.

    .. math::
        L = \operatorname{mean}_c \frac{a \sum_i p (1-y) + b \sum_i (1-p)\, y}
                                       {\sum_i p y + a \sum_i p (1-y) + b \sum_i (1-p)\, y + \gamma}

    Arguments as in :func:`tversky_loss` and :func:`set_dice_loss`; sum the shares.

    >>> set_tversky_loss(torch.tensor([[2.0], [-1.0]]), torch.tensor([1, 0]), false_negatives=0.7).shape
    torch.Size([2])
    """
    _check(smooth, false_positives=false_positives, false_negatives=false_negatives)
    p, y, counted = _one_against_rest(logits, targets, ignore_index)
    kept = _classes(p.shape[-1], ignore_classes)
    p, y = p[..., kept].flatten(0, -2), y[..., kept].flatten(0, -2)
    mask = counted.reshape(-1, 1).to(p.dtype)
    wrong = (false_positives * p * (1 - y) + false_negatives * (1 - p) * y) * mask
    denominator = (p * y * mask + wrong).sum(0) + smooth
    return (wrong / denominator).mean(-1).reshape(targets.shape)


# A target that is ruled out has the largest loss, which is not infinite.
dice_loss.bounded = True  # type: ignore[attr-defined]
tversky_loss.bounded = True  # type: ignore[attr-defined]
# What an objective must know: these are losses of a set, in shares.
set_dice_loss.relates_examples = True  # type: ignore[attr-defined]
set_tversky_loss.relates_examples = True  # type: ignore[attr-defined]


def class_weights(counts: Sequence[float] | Tensor, *, offset: float = 1.0) -> Float[Tensor, " classes"]:
    r"""Weights of classes for weighted cross entropy: ``log10((n - n_t) / n_t + K)``.

    Args:
        counts: how often each class occurs, ``n_t > 0``.
        offset: ``K``.

    Multiply row losses by ``class_weights(counts)[targets]``. Source: Li et al., 2020, arXiv 1911.02855, section 3.2.

    >>> class_weights([800, 150, 50])
    tensor([0.0969, 0.8239, 1.3010], dtype=torch.float64)
    """
    numbers = torch.as_tensor(counts, dtype=torch.float64)
    if numbers.ndim != 1 or len(numbers) < 2 or not bool((numbers > 0).all()):
        raise ValueError(f"counts must be positive numbers of 2 or more classes, got {counts}")
    return torch.log10((numbers.sum() - numbers) / numbers + offset)


def _check(smooth: float, **weights: float) -> None:
    if not (smooth > 0 and math.isfinite(smooth)):
        raise ValueError(f"smooth must be a finite number > 0, got {smooth}")
    for name, value in weights.items():
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be a finite number >= 0, got {value}")


def _one_against_rest(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities and truths of each class, and which examples count; the others are all zeros."""
    check_class_targets(logits, targets)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    counted = targets != ignore_index
    targets = targets.long().masked_fill(~counted, 0)
    classes = logits.shape[-1]
    check_target_range(targets, max(2, classes))
    logits = logits.masked_fill(~counted.unsqueeze(-1), 0.0)
    if classes == 1:
        return logits.sigmoid(), targets.unsqueeze(-1).to(logits.dtype), counted
    y = torch.arange(classes, device=targets.device) == targets.unsqueeze(-1)
    return logits.softmax(-1), y.to(logits.dtype), counted


def _adjusted(p: Tensor, alpha: float) -> Tensor:
    return p if alpha == 0 else (1 - p.clamp_max(MOST)).pow(alpha) * p


def _classes(classes: int, ignored: Sequence[int]) -> list[int]:
    for c in ignored:
        if not 0 <= c < classes:
            raise ValueError(f"ignore_classes must be in [0, {classes}), got {c}")
    kept = [c for c in range(classes) if c not in set(ignored)]
    if not kept:
        raise ValueError("ignore_classes leaves no class")
    return kept


def _hard_negatives(p: Tensor, y: Tensor, mask: Tensor, ratio: float) -> Tensor:
    """1 for positives and, in each class, for the ``ratio * positives`` negatives of highest ``p``."""
    negative = (y == 0) & (mask > 0)
    number = (ratio * (y * mask).sum(0)).floor().long().clamp_min(1)
    order = p.detach().masked_fill(~negative, -1.0).argsort(dim=0, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(p), device=p.device)[:, None].expand_as(order))
    return ((y > 0) | (negative & (rank < number))).to(p.dtype)
