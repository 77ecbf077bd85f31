"""Norm and clipping where some gradients are sparse (embeddings, trees), which torch's own functions refuse."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def has_sparse_gradients(model: nn.Module) -> bool:
    """Whether any parameter's gradient is sparse."""
    return any(p.grad is not None and p.grad.is_sparse for p in model.parameters())


def norm_with_sparse_gradients(model: nn.Module) -> Tensor:
    """Norm of all gradients together; rows that a sparse gradient names twice are added first."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.stack([(g.coalesce().values() if g.is_sparse else g).norm() for g in gradients]).norm()


def clip_sparse_gradients(model: nn.Module, most: float) -> Tensor:
    """Scale all gradients down to norm ``most``, in place; returns the norm before."""
    norm = norm_with_sparse_gradients(model)
    scale = (most / (norm + 1e-6)).clamp_max(1.0)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(scale)
    return norm
