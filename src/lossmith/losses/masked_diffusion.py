"""The loss of masked diffusion: what a model that unmasks pays for the tokens that are masked."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def masked_diffusion_loss(
    token_losses: Float[Tensor, "*batch length"],
    masked: Bool[Tensor, "*batch length"],
    probability: Float[Tensor, "*batch"],
    *,
    counted: Bool[Tensor, "*batch length"] | None = None,
) -> Float[Tensor, "*batch"]:
    r"""A bound on the negative log likelihood per token, from one masking of each example.

    .. math:: \ell = \frac{1}{n\,t} \sum_{i \text{ masked}} \ell_i

    where each of the ``n`` tokens was masked with probability ``t``. The mean over ``t`` uniform in (0, 1] and over the
    maskings is at least the negative log likelihood of the sequence over ``n``.

    Args:
        token_losses: ``ℓ_i``, any row-wise loss (cross entropy) of the clean token given the masked sequence; what
            stands where nothing is masked has no influence, NaN neither.
        masked: which tokens were masked.
        probability: ``t`` in (0, 1], with which each was.
        counted: which tokens belong to the example; default: all. Others have loss and gradient exactly 0.

    Returns:
        One loss per example in nats per token, in float32 for half precision; 0 where nothing is masked or counted.

    Raises:
        ValueError: shapes that do not fit, a probability outside (0, 1].

    Source: "Large Language Diffusion Models", 2025, arXiv 2502.09992, equation 3; its weight is ``w(t) = 1/t``.

    Relations:
        At ``t = 1`` the mean cross entropy of a model that has to guess everything at once.
        :class:`lossmith.training.MaskedDiffusion` draws ``t`` and the masks.

    >>> masked_diffusion_loss(torch.tensor([[2.0, 5.0]]), torch.tensor([[True, False]]), torch.tensor([0.5]))
    tensor([2.])
    """
    if token_losses.shape != masked.shape or token_losses.shape[:-1] != probability.shape or token_losses.ndim < 1:
        raise ValueError(
            f"token_losses and masked must have one shape, probability that shape without the last dimension, got "
            f"{tuple(token_losses.shape)}, {tuple(masked.shape)} and {tuple(probability.shape)}"
        )
    if not token_losses.is_floating_point() or masked.dtype != torch.bool:
        raise TypeError(
            f"token_losses must be floating point and masked bool, got {token_losses.dtype}, {masked.dtype}"
        )
    if counted is not None and (counted.shape != masked.shape or counted.dtype != torch.bool):
        raise ValueError(f"counted must be bool of shape {tuple(masked.shape)}, got {tuple(counted.shape)}")
    wide = token_losses.float() if token_losses.dtype in (torch.float16, torch.bfloat16) else token_losses
    t = probability.to(wide.dtype)
    # Values cannot be looked at inside torch.func and torch.compile.
    traced = torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling()
    if not traced and not ((t > 0) & (t <= 1)).all():
        raise ValueError(f"probability must be in (0, 1], got {probability.flatten().tolist()[:8]}")
    kept = masked if counted is None else masked & counted
    total = wide.masked_fill(~kept, 0.0).sum(-1)
    length = wide.shape[-1] if counted is None else counted.sum(-1).clamp_min(1)
    return total / (length * t) if wide.shape[-1] else total
