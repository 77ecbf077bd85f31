"""A linear layer as a low-rank pair and a few full columns, both taken from the spectrum of its first weight.

"LOST: Low-rank and Sparse Pre-training for Large Language Models", 2025, arXiv 2508.02668.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

Activation = Literal["silu"] | None
Columns = Literal["svd", "norm", "random"]
Start = Literal["svd", "cola"]
Decomposition = Literal["svd", "gram"]


@dataclass(frozen=True, slots=True)
class LowRankStart:
    """What a layer begins with.

    Attributes:
        A: what reads, ``(in, rank)``.
        B: what writes, ``(out, rank)``.
        index: the input channels that are read in full, ascending.
        values: their columns, ``(out, columns)``.
    """

    A: Float[Tensor, "in rank"]
    B: Float[Tensor, "out rank"]
    index: Int[Tensor, " columns"]
    values: Float[Tensor, "out columns"]


def whole_rank(rank: float, smaller: int) -> int:
    """A rank as a whole number: below 1 it is a share of the smaller side, rounded down, at least 1.

    Raises:
        ValueError: not in (0, ``smaller``].

    >>> whole_rank(0.25, 512), whole_rank(128, 512)
    (128, 128)
    """
    number = not isinstance(rank, bool) and isinstance(rank, int | float) and math.isfinite(rank)
    if not number or rank <= 0 or (rank >= 1 and rank != int(rank)):
        raise ValueError(f"rank must be a share in (0, 1) or a whole number of at least 1, got {rank!r}")
    found = max(1, int(rank * smaller + 1e-9)) if rank < 1 else int(rank)
    if found > smaller:
        raise ValueError(f"rank must be at most the smaller side, {smaller}, got {rank!r}")
    return found


def column_count(density: float, inputs: int) -> int:
    """How many columns are kept: ``floor(density * inputs)``, at least one; none for density 0.

    Raises:
        ValueError: a density outside [0, 1].
    """
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 <= density <= 1:
        raise ValueError(f"density must be in [0, 1], the share of the columns that is kept, got {density!r}")
    return max(1, int(density * inputs + 1e-9)) if density > 0 else 0


@torch.no_grad()
def column_scores(
    weight: Float[Tensor, "out in"], rank: int, *, complement_rank: int | None = None
) -> Float[Tensor, " in"]:
    r"""Norm of every column of what a rank leaves over.

    .. math:: c_j = \Big\| \Big(\sum_{i=r+1}^{r+k} s_i u_i v_i^\top\Big)_{:,j} \Big\|_2
        = \sqrt{\textstyle\sum_{i=r+1}^{r+k} s_i^2 v_{ji}^2}

    Args:
        weight: in the layout of ``nn.Linear``.
        rank: components that the low-rank pair has.
        complement_rank: ``k``; default: all the rest.

    >>> column_scores(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 1).tolist()
    [0.0, 2.0, 1.0]
    """
    _, values, rows = _svd(weight)
    return _scores(values, rows, rank, complement_rank)


@torch.no_grad()
def lost_start(
    weight: Float[Tensor, "out in"],
    rank: int,
    columns: int,
    *,
    start: Start = "svd",
    choose: Columns = "svd",
    complement_rank: int | None = None,
    decomposition: Decomposition = "svd",
) -> LowRankStart:
    r"""The low-rank pair and the columns that a weight begins with (section 3).

    With :math:`W = U S V^\top`: :math:`A = V_r S_r^{1/2}`, :math:`B = U_r S_r^{1/2}`; the columns are those where what
    is left over has most energy (:func:`column_scores`), and their values are **W's own**, so that part of them is
    there twice, as in the author's code. The sign of a component is free in an SVD, but not in a layer with an
    activation: the entry of largest magnitude of each column of ``A`` is made positive.

    Args:
        weight: in the layout of ``nn.Linear``; decomposed in float32, or in float64 if it is float64.
        rank: of the pair.
        columns: how many are kept.
        start: ``"svd"``, or ``"cola"``: both factors normal, standard deviation ``(rank * (in + out)) ** -0.25``.
        choose: ``"svd"``; as controls ``"norm"`` (the columns of ``W`` of largest norm) and ``"random"`` (torch's
            global generator).
        complement_rank: see :func:`column_scores`; the author's code has 256 for pre-training.
        decomposition: ``"svd"``, or ``"gram"``: eigenvectors of ``W^T W`` (or of ``W W^T``, if that is smaller), two to
            five times as fast at widths of 1000 to 3000 and the same to rounding, but for components below about 3e-4
            of the largest (float32), of which it knows nothing: for random first weights, which have none.

    Raises:
        ValueError: a weight that is not a finite matrix, or no complement to choose columns by.
    """
    if weight.ndim != 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise ValueError(f"weight must be a matrix of floating point, got shape {tuple(weight.shape)}, {weight.dtype}")
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("weight has entries that are not finite; it cannot be decomposed")
    if start not in ("svd", "cola"):
        raise ValueError(f"start must be 'svd' or 'cola', got {start!r}")
    if choose not in ("svd", "norm", "random"):
        raise ValueError(f"choose must be 'svd', 'norm' or 'random', got {choose!r}")
    if decomposition not in ("svd", "gram"):
        raise ValueError(f"decomposition must be 'svd' or 'gram', got {decomposition!r}")
    if complement_rank is not None and (not isinstance(complement_rank, int) or complement_rank < 1):
        raise ValueError(f"complement_rank must be a whole number of at least 1 or none, got {complement_rank!r}")
    outputs, inputs = weight.shape
    by_spectrum = columns > 0 and choose == "svd"
    if by_spectrum and rank >= min(outputs, inputs):
        raise ValueError(
            f"rank {rank} leaves nothing over of a weight of {outputs} x {inputs} to choose columns by; lower the "
            "rank, or choose columns by 'norm' or at 'random'"
        )
    decompose = _svd if decomposition == "svd" else _gram
    left, values, rows = decompose(weight) if start == "svd" or by_spectrum else (weight, weight, weight)
    if start == "svd":
        root = values[:rank].sqrt()
        A, B = rows[:rank].T * root, left[:, :rank] * root
        sign = A.gather(0, A.abs().argmax(0, keepdim=True)).sign()
        A, B = A * sign, B * sign
    else:
        deviation = (rank * (inputs + outputs)) ** -0.25
        A = torch.randn(inputs, rank).to(weight.device) * deviation
        B = torch.randn(outputs, rank).to(weight.device) * deviation
    if choose == "random":
        order = torch.randperm(inputs).to(weight.device) if columns else torch.arange(inputs, device=weight.device)
    else:
        scores = _scores(values, rows, rank, complement_rank) if by_spectrum else weight.float().norm(dim=0)
        order = scores.argsort(descending=True, stable=True)
    index = order[:columns].sort().values
    return LowRankStart(A.to(weight).contiguous(), B.to(weight).contiguous(), index, weight[:, index].contiguous())


class NotDense(nn.Module):
    """A layer that plain Transformers must not take for the linear one whose place it has.

    Its state dict holds a ``weight`` of one zero besides: a loader that knows nothing of the layer stops at the shape,
    where it would otherwise leave its own weight random, with a warning only. No memory is held for it.
    """

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = next(self.parameters()).new_zeros(1)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        mark = state_dict.get(f"{prefix}weight")
        if mark is not None and mark.shape != (1,):
            args[-1].append(
                f"size mismatch for {prefix}weight: a dense matrix {tuple(mark.shape)} in the checkpoint, a low-rank "
                "layer here."
            )
        rest = {name: value for name, value in state_dict.items() if name != f"{prefix}weight"}
        super()._load_from_state_dict(rest, prefix, *args)


class LOSTLinear(NotDense):
    r"""A linear layer as a low-rank pair, an activation between its factors, and a few full columns.

    .. math:: y = \gamma\, \phi(x A) B^\top + (1 - \gamma)\, x_I W_s^\top + b

    ``x`` is read once in full, by ``A``, and otherwise only at the channels ``I``; the dense matrix is never there,
    neither forward nor backward. Backward keeps ``x`` and ``x A`` alone.

    Without columns the pair has weight 1: a plain low-rank layer, or CoLA's with the activation. Made with
    :meth:`from_linear`; the constructor reserves parameters, to be filled by ``load_state_dict``.

    Args:
        in_features: length of ``x``.
        out_features: length of ``y``.
        rank: of the pair, a whole number.
        columns: how many are kept.
        gamma: weight of the pair, in [0, 1]; fixed.
        activation: ``"silu"`` or ``None``.
        bias: whether there is one.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: a number out of range.

    >>> layer = LOSTLinear.from_linear(nn.Linear(512, 1376, bias=False), rank=128, density=0.05)
    >>> layer
    LOSTLinear(in_features=512, out_features=1376, rank=128, columns=25, gamma=0.5, activation='silu', bias=False)
    >>> layer(torch.randn(2, 7, 512)).shape, sum(p.numel() for p in layer.parameters())
    (torch.Size([2, 7, 1376]), 276064)
    """

    index: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        columns: int,
        *,
        gamma: float = 0.5,
        activation: Activation = "silu",
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not 0 <= columns <= in_features:
            raise ValueError(f"columns must be between 0 and in_features, {in_features}, got {columns!r}")
        check_mix(gamma, activation)
        self.in_features, self.out_features = in_features, out_features
        self.rank, self.columns = whole_rank(int(rank), min(in_features, out_features)), columns
        self.gamma, self.activation = float(gamma), activation
        self.A = nn.Parameter(torch.zeros(in_features, self.rank, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.zeros(out_features, self.rank, device=device, dtype=dtype))
        self.values = nn.Parameter(torch.zeros(out_features, columns, device=device, dtype=dtype)) if columns else None
        # In checkpoints: the choice belongs to the first weight, which is gone.
        self.register_buffer("index", torch.arange(columns, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        rank: float,
        density: float = 0.05,
        *,
        gamma: float = 0.5,
        activation: Activation = "silu",
        start: Start = "svd",
        choose: Columns = "svd",
        complement_rank: int | None = None,
        decomposition: Decomposition = "svd",
    ) -> LOSTLinear:
        """From a layer's weight, which may be random or trained; the bias is taken over.

        Args:
            linear: an ``nn.Linear`` or transformers' ``Conv1D``.
            rank: a whole number, or a share in (0, 1) of the smaller side.
            density: share of the input channels whose columns are kept (the paper calls it sparsity); 0: none.
            gamma: weight of the low-rank pair.
            activation: between the factors, ``"silu"`` or ``None``.
            start: see :func:`lost_start`.
            choose: see :func:`lost_start`.
            complement_rank: see :func:`column_scores`.
            decomposition: see :func:`lost_start`.

        Raises:
            ValueError: an option out of range, or a weight that is not finite.
        """
        weight = dense_weight(linear)
        outputs, inputs = weight.shape
        number, columns = whole_rank(rank, min(outputs, inputs)), column_count(density, inputs)
        check_mix(gamma, activation)
        first = lost_start(
            weight, number, columns, start=start, choose=choose, complement_rank=complement_rank,
            decomposition=decomposition,
        )  # fmt: skip
        bias: Tensor | None = linear.bias  # type: ignore[assignment]
        layer = cls(
            inputs, outputs, number, columns, gamma=gamma, activation=activation, bias=bias is not None,
            device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
        with torch.no_grad():
            layer.A.copy_(first.A)
            layer.B.copy_(first.B)
            layer.index.copy_(first.index)
            if layer.values is not None:
                layer.values.copy_(first.values)
            if layer.bias is not None and bias is not None:
                layer.bias.copy_(bias)
        return layer.train(linear.training)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """See the class."""
        A: Tensor = self.A
        B: Tensor = self.B
        values: Tensor | None = self.values
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            # Here, and not inside: backward runs without autocast.
            dtype = torch.get_autocast_dtype(kind)
            x, A, B = x.to(dtype), A.to(dtype), B.to(dtype)
            values = None if values is None else values.to(dtype)
        rows = x.reshape(-1, x.shape[-1])
        gamma = self.gamma if values is not None else 1.0
        y = _Product.apply(rows, A, B, values, self.index, gamma, self.activation == "silu")
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The same function as an ``nn.Linear``.

        Raises:
            RuntimeError: the layer has an activation, so that no matrix is the same function.
        """
        if self.activation is not None:
            raise RuntimeError(
                "a LOST layer with an activation between its factors is no matrix and cannot be merged; train with "
                "activation=none for that"
            )
        gamma = self.gamma if self.values is not None else 1.0
        weight = gamma * (self.B @ self.A.T)
        if self.values is not None:
            weight.index_add_(1, self.index, (1 - gamma) * self.values)
        return as_linear(weight, self.bias).train(self.training)

    def extra_repr(self) -> str:
        """Shape and options."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"columns={self.columns}, gamma={self.gamma:g}, activation={self.activation!r}, "
            f"bias={self.bias is not None}"
        )


@torch.no_grad()
def as_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer with copies of these."""
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=bias is not None, device=weight.device, dtype=weight.dtype)
    linear.weight.copy_(weight)
    if bias is not None:
        linear.bias.copy_(bias)
    return linear


class _Product(torch.autograd.Function):
    """``gamma phi(x A) B^T + (1 - gamma) x_I W_s^T``; keeps ``x`` and ``x A``, which is narrow."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, B: Tensor, values: Tensor | None, index: Tensor, gamma: float, silu: bool
    ) -> Tensor:
        inner = x @ A
        y = (F.silu(inner) if silu else inner) @ B.T
        if values is not None:
            y = torch.addmm(y, x.index_select(1, index), values.T, beta=gamma, alpha=1 - gamma)
        ctx.save_for_backward(x, A, B, values, index, inner)
        ctx.gamma, ctx.silu = gamma, silu
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (g,) = gradients
        x, A, B, values, index, inner = ctx.saved_tensors
        gamma, silu = ctx.gamma, ctx.silu
        if torch.is_grad_enabled():
            # A second derivative goes through x A as well, which the graph does not know.
            inner = x @ A
        needs_x, needs_A, needs_B, needs_values = ctx.needs_input_grad[:4]
        grad_x = grad_A = grad_B = grad_values = None
        gate = torch.sigmoid(inner) if silu else None
        if needs_B:
            grad_B = gamma * (g.T @ (inner * gate if gate is not None else inner))
        if needs_x or needs_A:
            grad_inner = gamma * (g @ B)
            if gate is not None:
                grad_inner = grad_inner * gate * (1 + inner * (1 - gate))
            grad_A = x.T @ grad_inner if needs_A else None
            grad_x = grad_inner @ A.T if needs_x else None
        if values is not None:
            if needs_values:
                grad_values = (1 - gamma) * (g.T @ x.index_select(1, index))
            if grad_x is not None:
                grad_x = grad_x.index_add(1, index, (1 - gamma) * (g @ values))
        return grad_x, grad_A, grad_B, grad_values, None, None, None


def dense_weight(linear: nn.Module) -> Tensor:
    """A linear layer's matrix as ``(out, in)``.

    Raises:
        TypeError: neither an ``nn.Linear`` nor transformers' ``Conv1D``.
    """
    transposed = type(linear).__name__ == "Conv1D"
    if not (isinstance(linear, nn.Linear) or transposed):
        raise TypeError(f"linear must be an nn.Linear or transformers' Conv1D, got {type(linear).__name__}")
    weight: Tensor = linear.weight.detach()  # type: ignore[operator,union-attr,assignment]
    return weight.T if transposed else weight


def check_mix(gamma: float, activation: str | None) -> None:
    """Refuse a weight of the pair, or an activation, that cannot be meant."""
    if isinstance(gamma, bool) or not isinstance(gamma, int | float) or not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be in [0, 1], the weight of the low-rank pair, got {gamma!r}")
    if activation not in ("silu", None):
        raise ValueError(f"activation must be 'silu' or none, got {activation!r}")


def _svd(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    exact = weight if weight.dtype == torch.float64 else weight.float()
    left, values, rows = torch.linalg.svd(exact, full_matrices=False)
    return left, values, rows


def _gram(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    exact = weight if weight.dtype == torch.float64 else weight.float()
    wide = exact.shape[0] < exact.shape[1]
    squares, vectors = torch.linalg.eigh(exact @ exact.T if wide else exact.T @ exact)
    values, vectors = squares.flip(0).clamp_min(0).sqrt(), vectors.flip(1)
    # What has no length has no direction; a component is always multiplied by its value again.
    length = values.clamp_min(torch.finfo(exact.dtype).eps * float(values[0]) + torch.finfo(exact.dtype).tiny)
    if wide:
        return vectors, values, (vectors.T @ exact) / length[:, None]
    return (exact @ vectors) / length, values, vectors.T


def _scores(values: Tensor, rows: Tensor, rank: int, complement_rank: int | None) -> Tensor:
    end = len(values) if complement_rank is None else rank + complement_rank
    return (values[rank:end, None] * rows[rank:end]).norm(dim=0)
