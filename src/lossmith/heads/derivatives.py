# ruff: noqa: D102 - the methods are torch.autograd.Function's own protocol.
"""What makes the chunked computation differentiable: any number of times, in both directions, under ``vmap``.

With logits :math:`o = hW^\\top + b`, row losses :math:`\\ell(o)` and an upstream gradient :math:`g`,
everything is said with the slope :math:`G = \\partial \\langle g, \\ell \\rangle / \\partial o`. The
gradients are :math:`GW`, :math:`G^\\top h` and :math:`\\sum G`; a direction
:math:`(\\dot h, \\dot W, \\dot b)` moves the logits by
:math:`\\dot o = \\dot h W^\\top + h \\dot W^\\top + \\dot b` and the slope by
:math:`Q = \\partial \\langle G, \\dot o \\rangle / \\partial o`. The Hessian is symmetric, so that the same
two matrices per chunk serve the derivative of the gradients forwards (Hessian-vector products) and backwards
(double backward).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lossmith.heads.streaming import Gradients, RowLoss, losses_and_gradients, losses_only

Needs = tuple[bool, bool, bool]


class StreamedLosses(torch.autograd.Function):
    """One loss per row. The gradient recomputes each chunk: two products here with it, and four in all."""

    @staticmethod
    def forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, spec: RowLoss) -> Tensor:
        return losses_only(spec, hidden, weight, bias, targets)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        hidden, weight, bias, targets, ctx.spec = inputs
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.save_for_forward(hidden, weight, bias, targets)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, targets = ctx.saved_tensors
        needs = tuple(ctx.needs_input_grad[:3])
        return (*_gradients(upstream, hidden, weight, bias, targets, ctx.spec, needs), None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:  # type: ignore[override]
        hidden, weight, bias, targets = ctx.saved_tensors
        chunks = _moving_chunks(ctx.spec, None, hidden, weight, bias, targets, tangents[:3])
        return torch.cat([chunk.losses_moved for chunk in chunks])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        hidden, weight, bias, targets, spec = inputs
        if in_dims[1] is None and in_dims[2] is None:
            hidden, targets = (_batch_first(x, d, info) for x, d in ((hidden, in_dims[0]), (targets, in_dims[3])))
            losses = StreamedLosses.apply(hidden.flatten(0, 1), weight, bias, targets.flatten(0, 1), spec)
            return losses.unflatten(0, hidden.shape[:2]), 0
        return torch.stack([StreamedLosses.apply(*case) for case in _cases(info, in_dims, inputs)]), 0


class StreamedGradients(torch.autograd.Function):
    """The gradients of ``(upstream * losses).sum()``: a tuple of those that ``needs`` names."""

    @staticmethod
    def forward(
        upstream: Tensor,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        spec: RowLoss,
        needs: Needs,
    ) -> tuple[Tensor, ...]:
        _, found = losses_and_gradients(spec, hidden, weight, bias, targets, upstream, needs, want_losses=False)
        return _present(found)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.spec, ctx.needs = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *directions: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        upstream, hidden, weight, bias, targets = ctx.saved_tensors
        given = iter(directions)
        direction = tuple(next(given) if needed else None for needed in ctx.needs)
        wanted = ctx.needs_input_grad[1:4]
        grad_upstream, grad_hidden = [], []
        grad_weight: Tensor | None = None
        grad_bias: Tensor | None = None
        for chunk in _moving_chunks(ctx.spec, upstream, hidden, weight, bias, targets, direction):
            grad_upstream.append(chunk.losses_moved)
            if wanted[0]:
                grad_hidden.append(chunk.hidden_moved(chunk.slope_moved))
            if wanted[1]:
                grad_weight = _plus(grad_weight, chunk.weight_moved(chunk.slope_moved))
            if wanted[2]:
                grad_bias = _plus(grad_bias, chunk.slope_moved.sum(0))
        return (
            torch.cat(grad_upstream).to(upstream.dtype) if ctx.needs_input_grad[0] else None,
            torch.cat(grad_hidden).to(hidden.dtype) if wanted[0] else None,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, ...]:  # type: ignore[override]
        upstream, hidden, weight, bias, targets = ctx.saved_tensors
        grad_hidden = []
        grad_weight: Tensor | None = None
        grad_bias: Tensor | None = None
        moves = (ctx.spec, upstream, hidden, weight, bias, targets, tangents[1:4], tangents[0])
        for chunk in _moving_chunks(*moves):
            slope_moved = chunk.slope_moved + chunk.slope_of_upstream_moved
            grad_hidden.append(chunk.hidden_moved(slope_moved))
            if ctx.needs[1]:
                grad_weight = _plus(grad_weight, chunk.weight_moved(slope_moved))
            grad_bias = _plus(grad_bias, slope_moved.sum(0))
        found = (torch.cat(grad_hidden).to(hidden.dtype), grad_weight, grad_bias)
        like = (hidden, weight, bias)
        return tuple(
            f.to(x.dtype)
            for f, x, needed in zip(found, like, ctx.needs, strict=True)
            if needed and f is not None and x is not None
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        upstream, hidden, weight, bias, targets, spec, needs = inputs
        if in_dims[2] is None and in_dims[3] is None and needs == (True, False, False):
            upstream, hidden, targets = (
                _batch_first(x, d, info)
                for x, d in ((upstream, in_dims[0]), (hidden, in_dims[1]), (targets, in_dims[4]))
            )
            rows = (upstream.flatten(0, 1), hidden.flatten(0, 1))
            (grad,) = StreamedGradients.apply(*rows, weight, bias, targets.flatten(0, 1), spec, needs)
            return (grad.unflatten(0, hidden.shape[:2]),), (0,)
        found = [StreamedGradients.apply(*case) for case in _cases(info, in_dims, inputs)]
        stacked = tuple(torch.stack(parts) for parts in zip(*found, strict=True))
        return stacked, (0,) * len(stacked)


class WeightedLosses(torch.autograd.Function):
    """One loss per row, with the gradients for known row weights taken in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        row_weights: Tensor,
        spec: RowLoss,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, targets, row_weights)
        ctx.spec = spec
        needs = tuple(ctx.needs_input_grad[:3])
        losses, ctx.gradients = losses_and_gradients(spec, hidden, weight, bias, targets, row_weights, needs)
        assert losses is not None
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, targets, row_weights = ctx.saved_tensors
        # Used once: the caller may write into what it is given. A second backward recomputes.
        found, ctx.gradients = ctx.gradients, None
        # Under create_graph the gradients must themselves have a graph.
        scale = None if found is None or torch.is_grad_enabled() else _ratio(upstream, row_weights)
        if scale is None:
            del found
            needs = tuple(ctx.needs_input_grad[:3])
            return (*_gradients(upstream, hidden, weight, bias, targets, ctx.spec, needs), None, None, None)
        if scale != 1.0:
            for gradient in _present(found):
                gradient.mul_(scale)
        return found.hidden, found.weight, found.bias, None, None, None


def undivided_losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, spec: RowLoss) -> Tensor:
    """One loss per row from all logits at once, in operations that torch differentiates itself."""
    hidden, weight = hidden.to(spec.logits_dtype), weight.to(spec.logits_dtype)
    if spec.ignore_index is not None:
        hidden = torch.where((targets == spec.ignore_index).unsqueeze(-1), hidden.new_zeros(()), hidden)
    logits = hidden @ weight.T
    return spec.rows(logits if bias is None else logits + bias.to(spec.logits_dtype), targets)


def _ratio(upstream: Tensor, row_weights: Tensor) -> float | None:
    """The ``c`` with ``upstream = c * row_weights`` to a few roundings, or ``None`` if there is none."""
    if upstream.numel() == 0:
        return None
    slack = 4 * torch.finfo(upstream.dtype).eps
    row_weights = row_weights.to(upstream.dtype).double()
    at = row_weights.abs().argmax()
    scale = upstream[at].double() / row_weights[at]
    close = (upstream - scale * row_weights).abs() <= slack * (scale * row_weights).abs()
    return float(scale) if bool(close.all()) else None


def _gradients(
    upstream: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    spec: RowLoss,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if not any(needs):
        return None, None, None
    found = iter(StreamedGradients.apply(upstream, hidden, weight, bias, targets, spec, needs))
    in_hidden, in_weight, in_bias = (next(found) if needed else None for needed in needs)
    return in_hidden, in_weight, in_bias


@dataclass(slots=True)
class _MovingChunk:
    """A chunk of rows whose layer moves in a direction: slopes ``G`` and ``Q``, as above."""

    hidden: Tensor
    hidden_direction: Tensor | None
    weight: Tensor
    weight_direction: Tensor | None
    slope: Tensor
    slope_moved: Tensor
    losses_moved: Tensor
    slope_of_upstream_moved: Tensor

    def hidden_moved(self, slope_moved: Tensor) -> Tensor:
        """The change of ``G W``."""
        moved = slope_moved @ self.weight
        return moved if self.weight_direction is None else moved + self.slope @ self.weight_direction

    def weight_moved(self, slope_moved: Tensor) -> Tensor:
        """The change of ``Gᵀ h``."""
        moved = slope_moved.T @ self.hidden
        return moved if self.hidden_direction is None else moved + self.slope.T @ self.hidden_direction


def _moving_chunks(
    spec: RowLoss,
    upstream: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    direction: tuple[Tensor | None, ...],
    upstream_moved: Tensor | None = None,
) -> Iterator[_MovingChunk]:
    """Only operations that every transform understands: no writing in place, nothing that depends on data."""
    dtype = spec.logits_dtype

    def wide(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype)

    weight = weight.to(dtype)
    bias = wide(bias)
    hidden_direction, weight_direction, bias_direction = (wide(moved) for moved in direction)
    size = spec.chunk_rows(hidden.shape[0], *reversed(weight.shape))
    for start in range(0, max(hidden.shape[0], 1), size):
        rows = slice(start, start + size)
        chunk_targets = targets[rows]
        ignored = None if spec.ignore_index is None else (chunk_targets == spec.ignore_index).unsqueeze(-1)
        h, h_direction = (
            # Not even NaN may leak from a row that does not count: 0 * NaN is NaN, where() is not.
            x if x is None or ignored is None else torch.where(ignored, x.new_zeros(()), x)
            for x in (hidden[rows].to(dtype), None if hidden_direction is None else hidden_direction[rows])
        )
        assert h is not None
        logits = h @ weight.T
        if bias is not None:
            logits = logits + bias
        logits_direction = torch.zeros_like(logits)
        if h_direction is not None:
            logits_direction = logits_direction + h_direction @ weight.T
        if weight_direction is not None:
            logits_direction = logits_direction + h @ weight_direction.T
        if bias_direction is not None:
            logits_direction = logits_direction + bias_direction
        yield _MovingChunk(
            h,
            h_direction,
            weight,
            weight_direction,
            *_slopes(
                spec,
                logits,
                chunk_targets,
                logits_direction,
                None if upstream is None else upstream[rows],
                None if upstream_moved is None else upstream_moved[rows],
            ),
        )


def _slopes(
    spec: RowLoss,
    logits: Tensor,
    targets: Tensor,
    direction: Tensor,
    upstream: Tensor | None,
    upstream_moved: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``G``, ``Q``, the losses' change in the direction, and ``G`` for the upstream gradient's change."""

    def along(logits: Tensor, upstream: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        losses, pull = torch.func.vjp(lambda o: spec.rows(o, targets), logits)  # type: ignore[misc]
        (slope,) = pull(upstream.to(losses.dtype))
        of_moved = slope.new_zeros(()) if upstream_moved is None else pull(upstream_moved.to(losses.dtype))[0]
        return (slope * direction).sum(), (slope, of_moved)

    if upstream is None:
        # <G(g), direction> is linear in g: its slope there, the losses' change, is the same for every g.
        upstream = logits.new_zeros(logits.shape[0])
    moved, (slope, of_moved) = torch.func.grad(along, argnums=(0, 1), has_aux=True)(logits, upstream)
    return slope, moved[0], moved[1], of_moved


def _plus(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total + part


def _present(found: Gradients) -> tuple[Tensor, ...]:
    return tuple(g for g in (found.hidden, found.weight, found.bias) if g is not None)


def _batch_first(tensor: Tensor, dim: int | None, info: Any) -> Tensor:
    if dim is None:
        return tensor.expand(info.batch_size, *tensor.shape)
    return tensor.movedim(dim, 0)


def _cases(info: Any, in_dims: tuple[Any, ...], inputs: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """One set of inputs per example of the batch: one after another needs the memory of one."""
    for i in range(info.batch_size):
        yield tuple(
            x if dim is None or not isinstance(x, Tensor) else x.select(dim, i)
            for x, dim in zip(inputs, in_dims, strict=True)
        )
