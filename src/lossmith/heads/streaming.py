"""Row losses of a linear layer and their first derivatives, a chunk of rows at a time.

Everything here runs on plain tensors, outside of any differentiation or transform: data-dependent shortcuts
(rows that do not count, rows without weight) and buffers written in place are allowed. What makes it
differentiable is in :mod:`lossmith.heads.derivatives`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lossmith.heads.softmax import SoftmaxKernel

HALF = (torch.float16, torch.bfloat16)
Rows = slice | Tensor

# Logits of one chunk, in bytes. Below about 256 rows a CPU's matrix products slow down; from 32 to 128 MiB no
# difference was measured (4 cores, 32768 classes), so the middle, for the sake of memory.
CHUNK_BYTES = 64 * 2**20
# A CPU makes logits a few percent faster in blocks of classes, if its cores are not busy with something else; the
# other two products gain nothing.
CLASS_BLOCK = 2048
# A loss that autograd differentiates holds a few matrices of the size of the logits.
AUTOGRAD_COPIES = 4


@dataclass(frozen=True, slots=True)
class RowLoss:
    """A row-wise loss with its options, as the chunked computation needs it."""

    loss: Callable[..., Tensor]
    options: Mapping[str, Any]
    ignore_index: int | None
    chunk_size: int | None
    product_dtype: torch.dtype
    fused: SoftmaxKernel | None

    def rows(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of each row of ``logits``."""
        losses = self.loss(logits, targets, **self.options)
        if not isinstance(losses, Tensor) or losses.shape != logits.shape[:1]:
            found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"loss must return one value per row, a tensor of shape {tuple(logits.shape[:1])} for logits "
                f"of shape {tuple(logits.shape)}, got {found}"
            )
        return losses

    def rows_of_buffer(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The same for rows that all count, with leave to overwrite ``logits``."""
        return self.fused.values(logits, targets) if self.fused else self.rows(logits, targets)

    @property
    def logits_dtype(self) -> torch.dtype:
        """Logits and sums over rows are float32 where the operands of the products are half precision."""
        return torch.float32 if self.product_dtype in HALF else self.product_dtype

    def chunk_rows(self, rows: int, features: int, classes: int) -> int:
        """How many rows to take at a time."""
        if self.chunk_size is not None:
            return self.chunk_size
        row_bytes = classes * self.logits_dtype.itemsize * (1 if self.fused else AUTOGRAD_COPIES)
        # With very many classes the weight is large, too: then a third of its size may be spent on a chunk.
        most = max(CHUNK_BYTES // row_bytes, features // 3, 1)
        chunks = max(-(-rows // most), 1)
        return max(-(-rows // chunks), 1)


@dataclass(slots=True)
class Gradients:
    """Gradients of the weighted sum of row losses; ``None`` where none was asked for."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


@torch.no_grad()
def losses_only(spec: RowLoss, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """One loss per row; exactly 0 where the target is ``ignore_index``."""
    if spec.fused:
        spec.fused.check_targets(targets, weight.shape[0])
    layer = _Layer(spec, hidden, weight, bias)
    counted = _counted(spec, targets)
    losses = None
    for rows in layer.chunks(counted):
        logits = layer.logits(_take(hidden, rows))
        losses = _put(losses, rows, spec.rows_of_buffer(logits, _take(targets, rows)), hidden.shape[0])
    assert losses is not None
    return losses


@torch.no_grad()
def losses_and_gradients(
    spec: RowLoss,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    factors: Tensor,
    needs: tuple[bool, bool, bool],
    *,
    want_losses: bool = True,
) -> tuple[Tensor | None, Gradients]:
    """Losses, and the gradients of ``(factors * losses).sum()`` (where ``needs`` says).

    Rows with factor 0 cost no gradient, and nothing at all if ``want_losses`` is false.
    """
    if spec.fused:
        spec.fused.check_targets(targets, weight.shape[0])
    layer = _Layer(spec, hidden, weight, bias)
    factors = factors.to(spec.logits_dtype)
    counted, active = _counted(spec, targets), factors != 0
    idle = None
    if not bool(active.all()):
        if want_losses:
            idle = ~active if counted is None else counted & ~active
        counted = active if counted is None else counted & active

    losses = None
    if idle is not None and bool(idle.any()):
        for rows in layer.chunks(idle):
            logits = layer.logits(_take(hidden, rows))
            losses = _put(losses, rows, spec.rows_of_buffer(logits, _take(targets, rows)), hidden.shape[0])

    for rows in layer.chunks(counted):
        h, f = layer.operand(_take(hidden, rows)), _take(factors, rows)
        logits = layer.logits(h)
        if spec.fused:
            values, slope = spec.fused.values_and_slopes_(logits, _take(targets, rows))
            layer.add_gradients(rows, h, slope, f, needs)
        else:
            values, slope = _autograd_slopes(spec, logits, _take(targets, rows), f)
            layer.add_gradients(rows, h, slope, None, needs)
        if want_losses:
            losses = _put(losses, rows, values, hidden.shape[0])
    return losses, layer.gradients(needs)


def _autograd_slopes(spec: RowLoss, logits: Tensor, targets: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        logits = logits.detach().requires_grad_()
        losses = spec.rows(logits, targets)
    if not losses.requires_grad:
        return losses, torch.zeros_like(logits)
    (slopes,) = torch.autograd.grad(losses, logits, factors.to(losses.dtype), materialize_grads=True)
    return losses.detach(), slopes


class _Layer:
    """The linear layer: its products, and the sums of its gradients over chunks."""

    def __init__(self, spec: RowLoss, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.dtype = spec.logits_dtype
        # Only GPUs multiply half precision into float32; elsewhere the factors are widened first (a CPU is
        # also many times faster that way).
        mixed = spec.product_dtype in HALF and hidden.device.type == "cuda"
        self.operand_dtype = spec.product_dtype if mixed else self.dtype
        self.size = spec.chunk_rows(hidden.shape[0], *reversed(weight.shape))
        self.wide_weight = self.operand(weight)
        self.wide_bias = None if bias is None else bias.to(self.dtype)
        self.buffer: Tensor | None = None
        self.grad_hidden: Tensor | None = None
        self.grad_weight: Tensor | None = None
        self.grad_bias: Tensor | None = None

    def operand(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.operand_dtype)

    def chunks(self, counted: Tensor | None) -> Iterator[Rows]:
        """Slices of all rows, or index tensors of the rows that count; at least one, if only an empty one."""
        if counted is None:
            total = self.hidden.shape[0]
            for start in range(0, max(total, 1), self.size):
                yield slice(start, min(start + self.size, total))
        else:
            yield from counted.nonzero().squeeze(-1).split(self.size)

    def logits(self, hidden: Tensor) -> Tensor:
        hidden, rows = self.operand(hidden), hidden.shape[0]
        if self.operand_dtype != self.dtype:
            logits = torch.mm(hidden, self.wide_weight.t(), out_dtype=self.dtype)
            return logits if self.wide_bias is None else logits.add_(self.wide_bias)
        if self.buffer is None or self.buffer.shape[0] < rows:
            self.buffer = torch.empty(rows, self.weight.shape[0], dtype=self.dtype, device=hidden.device)
        out = self.buffer[:rows]
        classes = out.shape[1]
        step = CLASS_BLOCK if hidden.device.type == "cpu" else classes
        for start in range(0, classes, step):
            block = slice(start, min(start + step, classes))
            if self.wide_bias is None:
                torch.mm(hidden, self.wide_weight[block].t(), out=out[:, block])
            else:
                torch.addmm(self.wide_bias[block], hidden, self.wide_weight[block].t(), out=out[:, block])
        return out

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        if self.operand_dtype != self.dtype:
            return torch.mm(a.to(self.operand_dtype), b, out_dtype=self.dtype)
        return torch.mm(a, b)

    def add_gradients(
        self, rows: Rows, h: Tensor, slope: Tensor, factors: Tensor | None, needs: tuple[bool, bool, bool]
    ) -> None:
        """Add a chunk; ``factors`` scale the rows on the side of the features, which is the smaller one."""
        slope = slope.to(self.dtype)
        if needs[2]:
            if self.grad_bias is None:
                self.grad_bias = slope.new_zeros(self.weight.shape[0])
            if factors is None:
                self.grad_bias += slope.sum(0)
            else:
                self.grad_bias.addmv_(slope.t(), factors)
        if needs[0]:
            grad = self.product(slope, self.wide_weight)
            if factors is not None:
                grad.mul_(factors.unsqueeze(-1))
            self.grad_hidden = _put(self.grad_hidden, rows, grad.to(self.hidden.dtype), self.hidden.shape[0])
        if needs[1]:
            if factors is not None:
                h = h * factors.unsqueeze(-1).to(h.dtype)
            if self.grad_weight is None:
                self.grad_weight = self.product(slope.t(), h)
            elif self.operand_dtype == self.dtype:
                self.grad_weight.addmm_(slope.t(), h)
            else:
                self.grad_weight += self.product(slope.t(), h)

    def gradients(self, needs: tuple[bool, bool, bool]) -> Gradients:
        def finished(needed: bool, total: Tensor | None, like: Tensor | None) -> Tensor | None:
            if not needed or like is None:
                return None
            return torch.zeros_like(like) if total is None else total.to(like.dtype)

        return Gradients(
            finished(needs[0], self.grad_hidden, self.hidden),
            finished(needs[1], self.grad_weight, self.weight),
            finished(needs[2], self.grad_bias, self.bias),
        )


def _counted(spec: RowLoss, targets: Tensor) -> Tensor | None:
    """Which rows count; ``None`` for all of them."""
    if spec.ignore_index is None:
        return None
    counted = targets != spec.ignore_index
    return None if bool(counted.all()) else counted


def _take(tensor: Tensor, rows: Rows) -> Tensor:
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)


def _put(total: Tensor | None, rows: Rows, values: Tensor, size: int) -> Tensor:
    """Write the rows of a chunk into the whole, which starts as zeros."""
    if total is None:
        if isinstance(rows, slice) and values.shape[0] == size:
            return values
        total = values.new_zeros(size, *values.shape[1:])
    total[rows] = values
    return total
