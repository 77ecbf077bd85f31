"""The physics as a training loss: residual of the equation, norm, orthogonality."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lossmith.tasks.physics.trial import Jet


class ResidualParts(NamedTuple):
    """What a loss is made of.

    Attributes:
        pde: mean squared residual of each state, ``(states,)``.
        norm: ``∫ψ²`` of each state, ``(states,)``.
        overlap: ``Σ_{j<k} (∫ψ_j ψ_k)²``.
        residual: at each point, ``(n, states)``.
    """

    pde: Tensor
    norm: Tensor
    overlap: Tensor
    residual: Tensor


def schrodinger_residual_loss(
    psi: Callable[[Tensor], Tensor | Jet],
    x: Float[Tensor, " n"],
    potential: Callable[[Tensor], Tensor] | Tensor,
    energy: float | Tensor,
    *,
    norm_weight: float = 1000.0,
    overlap_weight: float | None = None,
    weights: Float[Tensor, " n"] | None = None,
    length: float | None = None,
) -> tuple[Tensor, ResidualParts]:
    r"""Physics-informed loss of the stationary Schroedinger equation, for any differentiable ``psi``.

    .. math:: L = \sum_k \Big[\frac{1}{b-a}\int r_k^2 + \lambda \big(\textstyle\int\psi_k^2 - 1\big)^2\Big]
        + \mu \sum_{j<k} \big(\textstyle\int \psi_j\psi_k\big)^2, \qquad r_k = -\psi_k'' + (V - E_k)\,\psi_k

    Units: ``ħ²/2m = 1``. Without the norm's term ``psi = 0`` solves the equation; with it the norm's minimum for a
    fixed shape is ``max(0, 1 - ρ/2λ)`` (``ρ`` the residual of the shape at norm 1): ``psi`` collapses if
    ``norm_weight`` is below half of what the residual begins with.

    Source: "Physics-Informed Neural Networks for One-Dimensional Quantum Well Problems", 2025, arXiv 2504.05367
    (residual and norm); orthogonality as in arXiv 2203.00451.

    Args:
        psi: a :class:`Trial`'s ``jet`` (values with closed-form derivatives), or any function of ``x`` that returns
            ``(n,)`` or ``(n, states)``, which is differentiated twice by autograd.
        x: collocation points.
        potential: values at ``x``, or a function of it.
        energy: a number, or ``(states,)``, trainable or not.
        norm_weight: ``λ``; at least about ``E²`` where ``energy`` is trained.
        overlap_weight: ``μ``, default ``λ``.
        weights: quadrature weights; default: equal, for midpoints.
        length: ``b - a``; default: the sum of ``weights``, or what equally spaced midpoints ``x`` stand for.

    Returns:
        The loss and its parts.

    Raises:
        ValueError: fewer than 2 points without weights, or shapes that do not fit.

    >>> x = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    >>> loss, parts = schrodinger_residual_loss(lambda x: 30**0.5 * x * (1 - x), x, 0 * x, torch.pi**2)
    >>> round(parts.pde.item(), 1)  # 120 - 20 π² + π⁴
    20.0
    """
    if x.ndim != 1 or len(x) < 2:
        raise ValueError(f"x must have shape (n,) with n >= 2, got {tuple(x.shape)}")
    if weights is None:
        span = length if length is not None else float((x[-1] - x[0]).abs()) * len(x) / (len(x) - 1)
        weights = torch.full_like(x, span / len(x))
    else:
        span = length if length is not None else float(weights.sum())
    value, second = _with_second_derivative(psi, x)
    v = potential(x) if callable(potential) else potential
    if v.shape != x.shape:
        raise ValueError(f"potential must have one value for each of {len(x)} points, got shape {tuple(v.shape)}")
    residual = -second + v[:, None] * value - torch.as_tensor(energy, dtype=x.dtype, device=x.device) * value
    pde = (weights[:, None] * residual**2).sum(0) / span
    gram = (value.T * weights) @ value
    norm = gram.diagonal()
    overlap = gram.triu(1).square().sum()
    loss = pde.sum() + norm_weight * (norm - 1).square().sum()
    if len(gram) > 1:
        loss = loss + (norm_weight if overlap_weight is None else overlap_weight) * overlap
    return loss, ResidualParts(pde, norm, overlap, residual)


def _with_second_derivative(psi: Callable[[Tensor], Tensor | Jet], x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        places = x if x.requires_grad else x.detach().requires_grad_()
        found = psi(places)
        if isinstance(found, Jet):
            return found.value, found.second
        columns = found[:, None] if found.ndim == 1 else found
        if columns.shape[0] != len(x):
            raise ValueError(f"psi must return {len(x)} rows, got shape {tuple(found.shape)}")
        seconds = []
        for column in columns.T:
            # Each value depends on its own place only, so that the gradient of the sum is the derivative.
            (slope,) = torch.autograd.grad(column.sum(), places, create_graph=True)
            if slope.requires_grad:
                (slope,) = torch.autograd.grad(slope.sum(), places, create_graph=True)
            else:
                slope = torch.zeros_like(slope)  # of a straight line
            seconds.append(slope)
        return columns, torch.stack(seconds, -1)
