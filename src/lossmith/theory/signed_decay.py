"""AdamW whose weight decay may be negative: then every row is drawn towards norm 1 instead of 0.

Liu, Liu and Gore, "Superposition Yields Robust Neural Scaling", 2025, arXiv 2505.10465.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

_TINY = 1e-8


@torch.no_grad()
def signed_decay_(weight: Float[Tensor, "*batch rows columns"], rate: float, decay: float | Tensor) -> Tensor:
    r"""Decay the rows of ``weight`` in place.

    .. math:: W_i \leftarrow \begin{cases} W_i - \eta\gamma W_i & \gamma \ge 0 \\
        W_i - \eta\gamma W_i \bigl(1/\|W_i\| - 1\bigr) & \gamma < 0 \end{cases}

    With :math:`\gamma < 0` a norm moves by :math:`\eta|\gamma|(1 - \|W_i\|)`: short rows grow, long ones shrink, the
    direction stays.

    Args:
        weight: rows are features.
        rate: learning rate, ``η``.
        decay: ``γ``, one number or one per matrix of the batch.

    Source: Liu et al. 2025, arXiv 2505.10465, the authors' ``adamw.py``.

    >>> signed_decay_(torch.tensor([[0.3, 0.4]]), 0.1, -1.0)
    tensor([[0.3300, 0.4400]])
    """
    gamma = torch.as_tensor(decay, dtype=weight.dtype, device=weight.device)[..., None, None]
    if not bool(gamma.any()):
        return weight
    factor = 1 - rate * gamma
    if bool((gamma < 0).any()):
        inverse = 1 / (torch.linalg.vector_norm(weight, dim=-1, keepdim=True) + _TINY)
        factor = torch.where(gamma < 0, 1 - rate * gamma * (inverse - 1), factor)
    return weight.mul_(factor)


class SignedDecayAdamW(torch.optim.Optimizer):
    """Adam with :func:`signed_decay_` applied before it, at the same (scheduled) learning rate.

    Args:
        params: tensors, or groups with their own options. Give biases a group with ``weight_decay=0``.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: of any sign; or a tensor with one value per matrix of a batch ``(batch, rows, columns)``.

    Raises:
        ValueError: options out of range; a decay other than 0 for something without rows.

    Source: Liu et al. 2025, arXiv 2505.10465. ``torch.optim.AdamW`` refuses a negative decay; with a positive one both
    take the same steps.

    >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
    >>> optimizer = SignedDecayAdamW([weight], lr=0.1, weight_decay=-1.0)
    >>> weight.grad = torch.zeros_like(weight)
    >>> optimizer.step()
    >>> weight.norm().item()
    4.599999...
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 0.0,
    ):
        if not lr >= 0:
            raise ValueError(f"lr must not be negative, got {lr}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must lie in [0, 1), got {betas}")
        if not eps >= 0:
            raise ValueError(f"eps must not be negative, got {eps}")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        for group in self.param_groups:
            decay = torch.as_tensor(group["weight_decay"])
            if not decay.isfinite().all():
                raise ValueError(f"weight_decay must be finite, got {group['weight_decay']}")
            if bool((decay != 0).any()) and any(p.ndim < 2 for p in group["params"]):
                raise ValueError("weight_decay is for matrices: give vectors a group with weight_decay=0")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            chosen = [p for p in group["params"] if p.grad is not None]
            if chosen:
                self._update(chosen, group)
        return loss

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        rate, (first, second) = group["lr"], group["betas"]
        gradients: list[Tensor] = []
        means, squares, steps = [], [], []
        for p in params:
            assert p.grad is not None
            if p.ndim >= 2:
                signed_decay_(p, rate, group["weight_decay"])
            state = self.state[p]
            if not state:
                state["step"] = 0
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            state["step"] += 1
            steps.append(state["step"])
            gradients.append(p.grad)
            means.append(state["exp_avg"])
            squares.append(state["exp_avg_sq"])
        torch._foreach_lerp_(means, gradients, 1 - first)
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - second)
        scales = torch._foreach_sqrt(squares)
        torch._foreach_div_(scales, [(1 - second**step) ** 0.5 for step in steps])
        torch._foreach_add_(scales, group["eps"])
        torch._foreach_addcdiv_(params, means, scales, [-rate / (1 - first**step) for step in steps])
