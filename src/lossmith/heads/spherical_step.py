"""Between autograd and a spherical head: targets in, losses out, and the gradient that the head keeps for its step."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lossmith.heads.factored import Gradient
from lossmith.heads.spherical_family import Derivatives

if TYPE_CHECKING:
    from lossmith.heads.spherical import SphericalHead

Targets = Tensor | tuple[Tensor, Tensor]
Method = TypeVar("Method", bound=Callable[..., Any])


def exactly(method: Method) -> Method:
    """Without gradients, and under autocast in the head's own type: bfloat16 would spoil the statistics."""

    @functools.wraps(method)
    def wrapped(head: SphericalHead, *arguments: Any, **options: Any) -> Any:
        device = head.v.device.type
        with torch.no_grad():
            if not torch.is_autocast_enabled(device):
                return method(head, *arguments, **options)
            with torch.autocast(device, enabled=False):
                return method(head, *arguments, **options)

    return cast("Method", wrapped)


class Unscaled(NamedTuple):
    """What a forward pass leaves for its backward pass.

    ``parts`` has of each factor in use its rows [U; ω; w̄], and which targets it serves (``None``: all).
    """

    hidden: Tensor
    found: Derivatives
    indices: Tensor
    gathered: Float[Tensor, "rows targets features"]
    with_gram: Tensor
    parts: list[tuple[Tensor, Tensor | None]]
    rotated: dict[str, Tensor]

    def times(self, scale: Float[Tensor, " rows"]) -> Gradient:
        """The gradient of the sum of the losses times ``scale``."""
        found = self.found
        by_s, two_q, by_targets = found.by_s * scale, found.two_q * scale, found.by_targets * scale.unsqueeze(-1)
        sparse_part: Tensor | None = None
        for rows, mine in self.parts:
            y = by_targets if mine is None else by_targets * mine
            if y.shape[1] == 1:
                weighted, total = y * self.gathered[:, 0], y
            else:
                weighted, total = torch.einsum("mk,mkd->md", y, self.gathered), y.sum(-1, keepdim=True)
            # The column sums count once.
            of_sums = by_s if sparse_part is None else torch.zeros_like(by_s)
            part = torch.cat((weighted, total, of_sums.unsqueeze(-1)), 1) @ rows
            sparse_part = part if sparse_part is None else sparse_part + part
        assert sparse_part is not None
        along = two_q.unsqueeze(-1)
        return Gradient(
            self.hidden,
            two_q,
            by_s,
            by_targets,
            by_targets.sum(-1) if by_targets.shape[1] != 1 else by_targets[:, 0],
            self.indices,
            sparse_part,
            along * self.hidden,
            torch.addcmul(sparse_part, along, self.with_gram),
            self.rotated,
        )


class SphericalLosses(torch.autograd.Function):
    """Losses by row; its backward leaves the scaled gradient of ``W`` with the head."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, indices: Tensor, values: Tensor, head: SphericalHead) -> Tensor:
        """See :class:`lossmith.heads.SphericalHead`."""
        losses, gradient = head._forward(hidden.detach(), indices, values)
        ctx.head, ctx.gradient, ctx.changes = head, gradient, head._changes
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None, None, None]:
        """The gradient of the hidden states."""
        if torch.is_grad_enabled():
            raise RuntimeError("a spherical head has no second derivatives; take those of the dense loss of its scores")
        head, g = ctx.head, ctx.gradient
        if ctx.changes != head._changes:
            raise RuntimeError(
                "the head has made a step or was materialised since this loss was computed; run the forward pass again"
            )
        return head._collect(g, upstream.detach()), None, None, None


def read_targets(targets: Targets, batch: torch.Size, head: SphericalHead) -> tuple[Tensor, Tensor, Tensor | None]:
    """Indices and values (rows x K), and which rows count (``None``: all); see :meth:`SphericalHead.forward`."""
    classes, dtype = head.num_classes, head.v.dtype
    if isinstance(targets, tuple):
        indices, values = targets
    elif targets.is_floating_point():
        if targets.shape != (*batch, classes):
            raise ValueError(f"dense targets must have shape {(*batch, classes)}, got {tuple(targets.shape)}")
        width = max(1, int((targets != 0).sum(-1).max())) if targets.numel() else 1
        # The places of the nonzeros come first in a stable sort.
        indices = (targets == 0).to(torch.uint8).sort(dim=-1, stable=True).indices[..., :width]
        values = targets.gather(-1, indices)
    else:
        if targets.shape != batch:
            raise ValueError(f"targets must have the shape {tuple(batch)}, got {tuple(targets.shape)}")
        indices, counted = targets.long().reshape(-1, 1), None
        if 0 <= head.ignore_index < classes or not _in_range(indices, classes):
            counted = (indices != head.ignore_index).squeeze(-1)
            indices = indices.masked_fill(~counted.unsqueeze(-1), 0)
            _check_range(indices, classes)
        return indices, torch.ones_like(indices, dtype=dtype), counted
    if not head.loss.several:
        raise ValueError(f"{head.loss.name} takes one class index per row; only squared_error takes valued targets")
    if indices.shape != values.shape or indices.shape[:-1] != batch:
        raise ValueError(
            f"indices and values must both have shape {(*batch, 'K')}, got {tuple(indices.shape)} and "
            f"{tuple(values.shape)}"
        )
    flat = indices.reshape(-1, indices.shape[-1]).long()
    _check_range(flat, classes)
    if flat.shape[-1] > 1 and not isinstance(targets, Tensor):
        ordered = flat.sort(-1).values
        if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
            raise ValueError("a row names the same class twice; add its values up")
    return flat, values.reshape(flat.shape).detach().to(dtype), None


def _check_range(indices: Int[Tensor, "rows targets"], classes: int) -> None:
    if not _in_range(indices, classes):
        bad = indices[(indices < 0) | (indices >= classes)][0]
        raise ValueError(f"targets must be in [0, {classes}), got {int(bad)}")


def _in_range(indices: Int[Tensor, "rows targets"], classes: int) -> bool:
    if not indices.numel():
        return True
    least, most = torch.aminmax(indices)
    return int(least) >= 0 and int(most) < classes


def best_of(blocks: Iterator[tuple[int, Tensor]], k: int) -> torch.return_types.topk:
    """The ``k`` largest scores of each row and their classes; ``blocks`` are (first class, scores)."""
    values, indices = torch.empty(0), torch.empty(0, dtype=torch.long)
    for start, scores in blocks:
        best = scores.topk(min(k, scores.shape[-1]), dim=-1)
        if start:
            values = torch.cat([values, best.values], -1)
            indices = torch.cat([indices, best.indices + start], -1)
        else:
            values, indices = best.values, best.indices
        merged = values.topk(min(k, values.shape[-1]), dim=-1)
        values, indices = merged.values, indices.gather(-1, merged.indices)
    return torch.return_types.topk((values, indices))


def root(square: Tensor) -> float:
    """A norm from its square, which rounding may have made negative."""
    # In this order max keeps NaN.
    return math.sqrt(max(float(square), 0.0))
