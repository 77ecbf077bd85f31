"""Softmax alternatives of the spherical family: losses of the target's output, the sum and the sum of squares."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lossmith.losses.classification import check_class_targets, safe_inputs


def taylor_softmax_loss(
    logits: Float[Tensor, "*batch classes"],
    targets: Int[Tensor, "*batch"],
    *,
    ignore_index: int = -100,
) -> Float[Tensor, "*batch"]:
    r"""Negative log likelihood under the second-order Taylor softmax.

    .. math:: \ell = -\log\frac{1 + o_c + o_c^2/2}{\sum_k (1 + o_k + o_k^2/2)}

    Args:
        logits: raw scores ``o``; half precision is computed in float32.
        targets: class indices ``c``, or ``ignore_index`` (loss and gradient exactly 0).
        ignore_index: target of examples that do not count.

    Returns:
        One loss in nats per example. Each term is at least 1/2, so that no constant is needed. A logit of ``-inf`` is
        a class ruled out, as in the other losses: its term is 0 (not the infinity of the polynomial).

    Source: de Brébisson and Vincent, "An Exploration of Softmax Alternatives Belonging to the Spherical Loss Family",
    2016, arXiv 1511.05042.

    Relations:
        A member of the spherical family: :class:`lossmith.heads.SphericalHead` trains it at a cost that does not depend
        on the number of classes.

    >>> taylor_softmax_loss(torch.tensor([[2.0, -1.0, 0.5, 0.0, -0.5]]), torch.tensor([0]))
    tensor([0.5596])
    """
    logits, targets, ignored = _checked(logits, targets, ignore_index)
    # Scaled by the largest |o| so that squares do not overflow: log(1 + o + o²/2) = 2 log r + log(r⁻² + o/r² + ...).
    ruled_out = logits == -math.inf
    finite = logits.masked_fill(ruled_out, 0.0)
    scale = finite.detach().abs().amax(-1, keepdim=True).clamp_min(1.0)
    o = finite / scale
    terms = (1 / scale.square() + o / scale + o.square() / 2).masked_fill(ruled_out, 0.0)
    return _share(terms, targets).masked_fill(ignored, 0.0)


def spherical_softmax_loss(
    logits: Float[Tensor, "*batch classes"],
    targets: Int[Tensor, "*batch"],
    *,
    eps: float = 1e-2,
    ignore_index: int = -100,
) -> Float[Tensor, "*batch"]:
    r"""Negative log likelihood under the spherical softmax.

    .. math:: \ell = -\log\frac{o_c^2 + \varepsilon}{\sum_k (o_k^2 + \varepsilon)}

    Args:
        logits: raw scores ``o``; their sign is lost.
        targets: class indices ``c``, or ``ignore_index`` (loss and gradient exactly 0).
        eps: ``ε > 0``; results depend on it a good deal.
        ignore_index: target of examples that do not count.

    Returns:
        One loss in nats per example; a logit of ``-inf`` is a class ruled out.

    Source: de Brébisson and Vincent, 2016, arXiv 1511.05042; the form with squares is Ollivier's.

    Relations:
        :func:`taylor_softmax_loss` keeps the sign and needs no constant. Trained at constant cost by
        :class:`lossmith.heads.SphericalHead`.

    >>> spherical_softmax_loss(torch.tensor([[2.0, -1.0, 0.5, 0.0, -0.5]]), torch.tensor([0]), eps=1e-3)
    tensor([0.3191])
    """
    if not (eps > 0 and math.isfinite(eps)):
        raise ValueError(f"eps must be a finite number > 0, got {eps}")
    logits, targets, ignored = _checked(logits, targets, ignore_index)
    ruled_out = logits == -math.inf
    finite = logits.masked_fill(ruled_out, 0.0)
    scale = finite.detach().abs().amax(-1, keepdim=True).clamp_min(1.0)
    terms = ((finite / scale).square() + eps / scale.square()).masked_fill(ruled_out, 0.0)
    return _share(terms, targets).masked_fill(ignored, 0.0)


def _checked(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    check_class_targets(logits, targets)
    return safe_inputs(logits, targets, ignore_index)


def _share(terms: Tensor, targets: Tensor) -> Tensor:
    chosen = terms.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    # log of a term that is 0 (a target ruled out) is an infinite loss.
    return torch.log(terms.sum(-1)) - torch.log(chosen)
