"""Linear layers that multiply by the weights that are left only: what a pruned model needs to be faster on a CPU."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lossmith.sparsity.lost_layer import dense_weight
from lossmith.sparsity.lost_model import target_layers

# Rows that are multiplied at once, so that their part of the transposed input stays in the cache: the fastest of 16,
# 32, 64, 96 and 128 at widths from 512 to 4096, for sums over bags and for MKL's product of a CSR matrix.
_BAG_ROWS, _CSR_ROWS = 64, 32
# With fewer rows than this the sums over bags do not fill a vector register.
_FEW_ROWS = 8
# With more weights than this left neither product is faster.
_DENSEST = 0.5


class SparseLinear(nn.Module):
    """A linear layer whose matrix is held as compressed sparse rows (CSR); for inference on a CPU.

    Each output is a weighted sum of those inputs that its row still has: the sum that PyTorch's embedding bag forms,
    with generated code, for whole vectors of examples at a time and on all threads. In float64, and for fewer than
    eight rows in float32, MKL's product of a CSR matrix is faster and is used. Half precision is summed in float32.

    The weights are no parameters, and have no gradient; the input's is there. In a state dict the layer is the dense
    one: ``save_pretrained`` writes an ordinary checkpoint, and ``load_state_dict`` reads one.

    Args:
        weight: the pruned matrix, outputs x inputs, of a floating-point type of 16 bits or more.
        bias: of the layer.
        transposed: whether checkpoints hold it as inputs x outputs, as transformers' ``Conv1D`` does.

    Raises:
        ValueError: a type or a device that PyTorch has no fast product for.

    >>> layer = SparseLinear(torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]]))
    >>> layer(torch.tensor([[1.0, 2.0, 3.0]])).tolist(), layer
    ([[4.0, 1.0]], SparseLinear(in_features=3, out_features=2, weights=2, density=0.333, bias=False))
    """

    first: Tensor
    columns: Tensor
    values: Tensor
    bias: Tensor | None

    def __init__(
        self, weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None = None, *, transposed: bool = False
    ):
        super().__init__()
        if reason := _unfit(weight):
            raise ValueError(f"weight {reason}; a sparse layer needs 16, 32 or 64 bits a weight on a CPU")
        self.out_features, self.in_features = weight.shape
        self.transposed = transposed
        for name in ("first", "columns", "values"):
            self.register_buffer(name, None, persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self._hold(weight.detach())

    def _hold(self, weight: Tensor) -> None:
        with warnings.catch_warnings():
            # That the format is in beta.
            warnings.simplefilter("ignore")
            matrix = weight.to_sparse_csr()
        # MKL takes 32 bits: with 64 every product copies them.
        self.first, self.columns = matrix.crow_indices().int(), matrix.col_indices().int()
        self.values = matrix.values()

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The dense matrix, made anew."""
        return self._matrix().to_dense()

    @property
    def density(self) -> float:
        """Share of the weights that is left."""
        return self.values.numel() / (self.in_features * self.out_features)

    def _matrix(self) -> Tensor:
        return torch.sparse_csr_tensor(
            self.first, self.columns, self.values, (self.out_features, self.in_features), check_invariants=False
        )

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """The same as of the dense layer, up to rounding."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x must have {self.in_features} features, got shape {tuple(x.shape)}")
        if reason := _unfit(self.values):
            raise ValueError(f"a sparse layer {reason}; to_dense_linear(model) first")
        rows = x.reshape(-1, self.in_features).to(self.values.dtype)
        if torch.is_autocast_enabled(x.device.type):
            # It would ask for a product of half precision, which there is not.
            with torch.autocast(x.device.type, enabled=False):
                y = self._product(rows)
        else:
            y = self._product(rows)
        return y.view(*x.shape[:-1], self.out_features).to(x.dtype)  # type: ignore[no-any-return]

    def _product(self, rows: Tensor) -> Tensor:
        y: Tensor = _Product.apply(rows, self) if torch.is_grad_enabled() else _multiply(self, rows)
        return y if self.bias is None else y.add_(self.bias) if not y.requires_grad else y + self.bias

    def dense(self) -> nn.Module:
        """The layer as it was before, with the zeros."""
        weight, bias = self.weight, self.bias
        layer: Any
        if self.transposed:
            from transformers.pytorch_utils import Conv1D

            layer, weight = Conv1D(self.out_features, self.in_features), weight.T.contiguous()
        else:
            layer = nn.Linear(self.in_features, self.out_features, bias=bias is not None, dtype=weight.dtype)
        layer.weight = nn.Parameter(weight)
        if bias is not None:
            layer.bias = nn.Parameter(bias.clone())
        return layer.train(self.training)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Shape and density."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, weights={self.values.numel()}, "
            f"density={self.density:.3g}, bias={self.bias is not None}"
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = self.weight
        destination[f"{prefix}weight"] = weight.T.contiguous() if self.transposed else weight

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if (stored := state_dict.get(f"{prefix}weight")) is not None:
            weight = stored.T if self.transposed else stored
            if weight.shape != (self.out_features, self.in_features):
                args[-1].append(
                    f"size mismatch for {prefix}weight: {tuple(weight.shape)} in the checkpoint, "
                    f"{(self.out_features, self.in_features)} here."
                )
            else:
                self._hold(weight.detach().to(self.values))
        else:
            args[2].append(f"{prefix}weight")
        rest = {name: value for name, value in state_dict.items() if name != f"{prefix}weight"}
        super()._load_from_state_dict(rest, prefix, *args)


class _Product(torch.autograd.Function):
    """``x W^T`` with the gradient of ``x``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: SparseLinear) -> Tensor:
        ctx.layer = layer
        return _multiply(layer, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # Rare: not worth a second matrix by columns.
        return gradients[0] @ ctx.layer.weight, None


def _multiply(layer: SparseLinear, x: Tensor) -> Tensor:
    if not layer.values.numel() or not len(x):
        return x.new_zeros(len(x), layer.out_features)
    wide = x.dtype == torch.float64
    if wide or (x.dtype == torch.float32 and len(x) < _FEW_ROWS):
        matrix = layer._matrix()
        parts = [torch.mm(matrix, part.T.contiguous()) for part in x.split(_CSR_ROWS)]
        return torch.cat([part.T for part in parts]) if len(parts) > 1 else parts[0].T.contiguous()
    # Pieces of one size, the last filled up: with several threads they are transposed together, which is faster then.
    rows, pieces = max(len(x), _FEW_ROWS), -(-len(x) // _BAG_ROWS)
    size = -(-rows // pieces)
    if padding := pieces * size - len(x):
        x = F.pad(x, (0, 0, 0, padding))
    together = pieces > 1 and torch.get_num_threads() > 1
    blocks = x.view(pieces, size, -1).mT.contiguous() if together else [part.T.contiguous() for part in x.split(size)]
    sums = [
        F.embedding_bag(
            layer.columns, block, layer.first, mode="sum", per_sample_weights=layer.values, include_last_offset=True
        )
        for block in blocks
    ]
    if together:
        y = torch.stack(sums).mT.reshape(pieces * size, -1)
    else:
        y = x.new_empty(pieces * size, layer.out_features)
        for part, block in zip(y.split(size), sums, strict=True):
            part.copy_(block.T)
    return y[: len(y) - padding] if padding else y


@dataclass(frozen=True, slots=True)
class SparseLayers:
    """What became of a model's linear layers.

    Attributes:
        faster: by layer that was looked at, the time of the dense product over that of the sparse one.
        replaced: the layers that are sparse now.
        kept: by layer that stayed, why.
        rows: of the input that was measured with.
        threads: that it was measured with.
    """

    faster: dict[str, float]
    replaced: tuple[str, ...]
    kept: dict[str, str]
    rows: int
    threads: int

    def summary(self) -> str:
        """One sentence."""
        total = len(self.replaced) + len(self.kept)
        if not self.replaced:
            reasons = sorted(set(self.kept.values()))
            return f"none of the {total} linear layers is faster as a sparse matrix: {'; '.join(reasons[:3])}"
        ratios = [self.faster[name] for name in self.replaced if name in self.faster]
        speed = f", each {min(ratios):.1f} to {max(ratios):.1f}x as fast" if ratios else ""
        measured = f" (measured here with {self.rows} rows and {_threads(self.threads)})" if ratios else ""
        return f"{len(self.replaced)} of {total} linear layers are sparse matrices now{speed}{measured}"


def to_sparse_linear(
    model: nn.Module, *, rows: int = 128, only_faster: bool = True, targets: Sequence[str] | None = None
) -> SparseLayers:
    """Replace a pruned model's linear layers by :class:`SparseLinear` where that is faster, in place; for inference.

    Whether it is depends on the machine, the threads, the sparsity and the number of rows (tokens) at once: each kind
    of layer is measured first, dense and sparse in turn. Unstructured zeros pay from about 70 % on, at widths of about
    500 and more; in half precision on a CPU without instructions for it from 50 % on.

    Args:
        model: pruned, on a CPU.
        rows: tokens of a usual batch.
        only_faster: leave alone what is measured to be slower; else every layer that is half empty or more is replaced.
        targets: ends of names; default: all linear layers but the output layer.

    Raises:
        InputError: no linear layer.
        ValueError: rows below 1.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    >>> _ = nn.init.sparse_(model[0].weight, 0.9)
    >>> to_sparse_linear(model, only_faster=False).replaced
    ('0',)
    """
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    faster: dict[str, float] = {}
    replaced: list[str] = []
    kept: dict[str, str] = {}
    measured: dict[tuple[Any, ...], float] = {}
    for name, linear in target_layers(model, targets).items():
        weight = dense_weight(linear)
        if reason := _unfit(weight):
            kept[name] = reason
            continue
        density = int(torch.count_nonzero(weight)) / weight.numel()
        if density > _DENSEST:
            kept[name] = "more than half of the weights are left"
            continue
        bias: Any = linear.bias
        layer = SparseLinear(weight, bias, transposed=type(linear).__name__ == "Conv1D").train(linear.training)
        if only_faster:
            kind = (*weight.shape, weight.dtype, round(density, 2))
            if kind not in measured:
                measured[kind] = _speed(weight.contiguous(), layer, rows)
            faster[name] = measured[kind]
            if faster[name] < 1.05:
                kept[name] = "slower, or hardly faster, at this sparsity and size"
                continue
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
        replaced.append(name)
    return SparseLayers(faster, tuple(replaced), kept, rows, torch.get_num_threads())


def to_dense_linear(model: nn.Module) -> nn.Module:
    """Undo :func:`to_sparse_linear`, in place: the same weights, which can be trained again."""
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, SparseLinear)]:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.dense())
    return model


@torch.no_grad()
def _speed(weight: Tensor, layer: SparseLinear, rows: int, repeats: int = 7) -> float:
    """Median of the dense time over the sparse one, taken in turn."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, weight.shape[1], dtype=weight.dtype, generator=generator)
    ratios = []
    for number in range(repeats + 2):
        started = time.perf_counter()
        F.linear(x, weight)
        middle = time.perf_counter()
        _multiply(layer, x)
        ended = time.perf_counter()
        if number >= 2:
            ratios.append((middle - started) / (ended - middle))
    return statistics.median(ratios)


def _unfit(weight: Tensor) -> str:
    if weight.device.type != "cpu":
        return f"is on {weight.device.type}, not on a CPU"
    if weight.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        return f"is {str(weight.dtype).removeprefix('torch.')}, for which PyTorch has no sparse product on a CPU"
    return ""


def _threads(number: int) -> str:
    return f"{number} thread" + ("s" if number > 1 else "")
