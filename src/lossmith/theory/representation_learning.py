"""How gradient descent shapes features: the smallest model with a bottleneck.

Features ``F`` of examples and an output layer ``W`` are both free; the loss is the sum of the cross-entropies of
``Z = F W``. From a balanced start (``FᵀF = W Wᵀ``) both have the same singular values, and each grows at a speed
proportional to itself: large directions win.

"Tracing the Representation Geometry of Language Models from Pretraining to Post-training", NeurIPS 2025,
arXiv 2509.23024, Theorems 1 and 2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class FreeFeatures(NamedTuple):
    """A batch of models: features ``(runs, examples, d)``, output layers ``(runs, d, classes)``, labels."""

    features: Float[Tensor, "runs examples d"]
    output: Float[Tensor, "runs d classes"]
    labels: Int[Tensor, " examples"]


def labels_of_counts(counts: tuple[int, ...]) -> Int[Tensor, " examples"]:
    """Labels with ``counts[c]`` examples of class ``c``.

    >>> labels_of_counts((2, 1)).tolist()
    [0, 0, 1]
    """
    if not counts or min(counts) < 0 or sum(counts) < 1:
        raise ValueError(f"counts must not be negative, with at least one example, got {counts}")
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


def balanced_start(
    counts: tuple[int, ...], d: int, *, runs: int = 1, scale: float = 0.05, seed: int = 0
) -> FreeFeatures:
    """Random output layers, and features with ``FᵀF = W Wᵀ``.

    Args:
        counts: examples of each class.
        d: features.
        runs: models, with seeds of their own.
        scale: standard deviation of ``W``.
        seed: of the first model.

    Raises:
        ValueError: fewer examples than features.
    """
    labels = labels_of_counts(counts)
    if len(labels) < d:
        raise ValueError(f"a balanced start needs at least as many examples as features, got {len(labels)} and {d}")
    generator = torch.Generator().manual_seed(seed)
    w = scale * torch.randn(runs, d, len(counts), generator=generator, dtype=torch.float64)
    frame, _ = torch.linalg.qr(torch.randn(runs, len(labels), d, generator=generator, dtype=torch.float64))
    return FreeFeatures(balanced_features(w, frame), w, labels)


def balanced_features(
    output: Float[Tensor, "runs d classes"], frame: Float[Tensor, "runs examples d"]
) -> Float[Tensor, "runs examples d"]:
    """``F = Q (W Wᵀ)^½`` for orthonormal columns ``Q``: then ``FᵀF = W Wᵀ``."""
    values, vectors = torch.linalg.eigh(output @ output.mT)
    root = vectors * values.clamp_min(0).sqrt()[..., None, :] @ vectors.mT
    return frame @ root


def error_signal(model: FreeFeatures) -> Float[Tensor, "runs examples classes"]:
    """``A = softmax(Z) - Y``, the gradient of the loss in the logits."""
    y = torch.nn.functional.one_hot(model.labels, model.output.shape[-1]).to(model.output.dtype)
    return torch.softmax(model.features @ model.output, -1) - y


def summed_loss(model: FreeFeatures) -> Float[Tensor, " runs"]:
    """Sum of the examples' cross-entropies."""
    logp = torch.log_softmax(model.features @ model.output, -1)
    return -logp[:, torch.arange(len(model.labels)), model.labels].sum(-1)


def descend(model: FreeFeatures, lr: float) -> FreeFeatures:
    """One step of gradient descent: ``F - η A Wᵀ`` and ``W - η Fᵀ A``, both with the old values."""
    a = error_signal(model)
    return FreeFeatures(
        model.features - lr * a @ model.output.mT, model.output - lr * model.features.mT @ a, model.labels
    )


def singular_speeds(model: FreeFeatures) -> tuple[Tensor, Tensor]:
    """Singular values ``σ`` of a balanced model, ``(runs, d)``, and their speeds under gradient flow, ``-g_i σ_i``.

    ``g_i = u_iᵀ A v_i`` with ``u`` the left singular vectors of ``F`` and ``v`` the right ones of ``W`` (Theorem 2).
    """
    u, s, shared = torch.linalg.svd(model.features, full_matrices=False)
    # W's left singular vectors are F's right ones: its right ones follow with their signs.
    v = (shared @ model.output) / s[..., None].clamp_min(1e-300)
    g = torch.einsum("rnk,rnc,rkc->rk", u, error_signal(model), v)
    return s, -g * s


def rank_trajectory(model: FreeFeatures, lr: float, steps: int) -> tuple[Tensor, Tensor]:
    """Effective ranks of the centred features and losses, each ``(steps + 1, runs)``, under gradient descent."""
    ranks, losses = [], []
    for step in range(steps + 1):
        centred = model.features - model.features.mean(1, keepdim=True)
        values = torch.linalg.eigvalsh(centred.mT @ centred).clamp_min(0)
        p = values / values.sum(-1, keepdim=True).clamp_min(1e-300)
        ranks.append(torch.exp(-torch.special.xlogy(p, p).sum(-1)))
        losses.append(summed_loss(model))
        if step < steps:
            model = descend(model, lr)
    return torch.stack(ranks), torch.stack(losses)
