"""Scores of visual tokens from attention: who looks at them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

#: Attention logits ``(batch, heads, queries, tokens)`` of a layer, for a range of queries (``None``: for all); padding
#: must be at minus infinity. A model that never has them passes ``None`` instead of the function.
AttentionLogits = Callable[[slice | None], Tensor]


def received_by_all(logits: Float[Tensor, "batch heads queries tokens"]) -> Float[Tensor, "batch tokens"]:
    r"""FastV, as the study's code computes it: heads are averaged *before* the softmax, and all queries count.

    .. math:: a = \mathrm{softmax}\bigl(\tfrac1H \sum_h q_h k_h^\top / \sqrt{d_h}\bigr), \qquad s_j = \sum_q a_{qj}

    Padding is a query, too: its rows must have been left out.
    """
    return torch.softmax(logits.float().mean(1), dim=-1).sum(1)


def received_by_each(logits: Float[Tensor, "batch heads queries tokens"]) -> Float[Tensor, "batch queries tokens"]:
    """What each query pays to each token, averaged over heads after the softmax."""
    return torch.softmax(logits.float(), dim=-1).mean(1)


def mean_of_queries(
    paid: Float[Tensor, "batch queries tokens"], counted: Bool[Tensor, "batch queries"]
) -> Float[Tensor, "batch tokens"]:
    """Mean over the queries that count; of all of them for an example where none does."""
    counted = counted | ~counted.any(1, keepdim=True)
    weights = counted.to(paid.dtype)
    return (paid * weights.unsqueeze(-1)).sum(1) / weights.sum(1, keepdim=True)


def raters(
    to_visual: Float[Tensor, "batch texts visual"], real: Bool[Tensor, "batch texts"]
) -> Bool[Tensor, "batch texts"]:
    """Text tokens that look at the image more than the mean text token does: those who judge in SparseVLM.

    The rule is that of the original method as it is remembered; the study's code for it was not at hand.
    """
    looking = to_visual.sum(-1).masked_fill(~real, 0.0)
    mean = looking.sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp_min(1)
    return (looking >= mean) & real
