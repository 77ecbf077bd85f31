"""Losses of scores of (user, item) pairs, for feedback that only says what was used, not what was disliked."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def bpr_loss(
    positive_scores: Float[Tensor, "*#batch"], negative_scores: Float[Tensor, "*#batch"]
) -> Float[Tensor, "*batch"]:
    r"""Bayesian personalised ranking: an item that was used should score above one that was not.

    .. math:: \ell = -\log \sigma(s^+ - s^-) = \mathrm{softplus}(s^- - s^+)

    Args:
        positive_scores: scores ``s⁺`` of items that the user has used.
        negative_scores: scores ``s⁻`` of items that the user has not; broadcast against the positive ones, so that a
            pool of positives shares one negative.

    Returns:
        One loss in nats per pair; half precision is accumulated in float32.

    Source: Rendle, Freudenthaler, Gantner and Schmidt-Thieme, "BPR: Bayesian Personalized Ranking from Implicit
    Feedback", UAI 2009, arXiv 1205.2618.

    Relations:
        Depends on the margin alone; :func:`implicit_bce_loss` also on where 0 is.

    >>> bpr_loss(torch.tensor([[2.0, -0.5]]), torch.tensor([[0.2]]))
    tensor([[0.1530, 1.1032]])
    """
    positive, negative = _floating(positive_scores, negative_scores)
    return F.softplus(negative - positive)


def implicit_bce_loss(
    positive_scores: Float[Tensor, "*#batch"], negative_scores: Float[Tensor, "*#batch"]
) -> Float[Tensor, "*batch"]:
    r"""Binary cross entropy of an item that was used and of one that was not.

    .. math:: \ell = \mathrm{softplus}(-s^+) + \mathrm{softplus}(s^-)

    Args:
        positive_scores: logits ``s⁺`` of items that the user has used.
        negative_scores: logits ``s⁻`` of items that the user has not.

    Returns:
        One loss in nats per pair; half precision is accumulated in float32.

    Relations:
        ``torch.nn.functional.binary_cross_entropy_with_logits(reduction="none")`` of both scores, added.
        :func:`bpr_loss` takes the same arguments.

    >>> implicit_bce_loss(torch.tensor([0.0]), torch.tensor([0.0]))
    tensor([1.3863])
    """
    positive, negative = _floating(positive_scores, negative_scores)
    return F.softplus(-positive) + F.softplus(negative)


def _floating(positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    for name, scores in (("positive_scores", positive), ("negative_scores", negative)):
        if not scores.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {scores.dtype}")
    pairs = zip(reversed(positive.shape), reversed(negative.shape), strict=False)
    if any(a != b and 1 not in (a, b) for a, b in pairs):
        raise ValueError(
            "positive_scores and negative_scores must have shapes that broadcast, got "
            f"{tuple(positive.shape)} and {tuple(negative.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(positive.dtype, negative.dtype), torch.float32)
    return positive.to(dtype), negative.to(dtype)
