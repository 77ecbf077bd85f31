"""Plain SGD on the full matrix by autograd: what a spherical head must equal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lossmith.losses import spherical_softmax_loss, taylor_softmax_loss, z_loss

FEATURES, CLASSES = 6, 50


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - nn.functional.one_hot(targets, outputs.shape[-1])).square().sum(-1)


DENSE: dict[str, tuple[Any, dict[str, float]]] = {
    "z_loss": (z_loss, {"a": 0.7, "b": 2.0}),
    "taylor_softmax": (taylor_softmax_loss, {}),
    "spherical_softmax": (spherical_softmax_loss, {"eps": 0.1}),
    "squared_error": (squared_error, {}),
}


def batches(number: int, rows: int, *, seed: int = 0, scale: float = 1.0) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Hidden states, targets with repetitions, and weights by row."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            scale * torch.randn(rows, FEATURES, generator=generator, dtype=torch.float64),
            torch.randint(max(2, min(CLASSES, 3 * rows)), (rows,), generator=generator).clamp_max(CLASSES - 1),
            torch.rand(rows, generator=generator, dtype=torch.float64),
        )
        for _ in range(number)
    ]


def start(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return (0.3 * torch.randn(CLASSES, FEATURES, generator=generator, dtype=torch.float64)).to(dtype)


def dense_step(
    weight: Tensor, loss: str, hidden: Tensor, targets: Tensor, weights: Tensor, lr: float, decay: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """New weight, losses and gradient of hidden, by autograd on the full matrix."""
    function, options = DENSE[loss]
    weight, hidden = weight.clone().requires_grad_(), hidden.clone().requires_grad_()
    losses = function(hidden @ weight.T, targets, **options)
    (losses * weights).sum().backward()
    return (weight - lr * (weight.grad + decay * weight)).detach(), losses.detach(), hidden.grad
