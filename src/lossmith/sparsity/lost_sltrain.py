"""SLTrain's layer, LOST's nearest neighbour: a low-rank pair plus weights at random places.

Han et al., "SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining", 2024,
arXiv 2406.02214.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lossmith.sparsity.lost_layer import NotDense, as_linear, dense_weight, whole_rank


class SLTrainLinear(NotDense):
    r"""A linear layer as a low-rank pair plus weights at random places, fixed for ever.

    .. math:: W = s\, B A^\top + S, \qquad y = x W^\top + b

    ``A`` begins as ``nn.Linear`` does, ``B`` at zero, the values of ``S`` uniform in :math:`\pm 1/\sqrt{in}`. Unlike
    :class:`LOSTLinear` it multiplies by the dense matrix, made anew forward and backward, as the released code does:
    memory of parameters and optimiser is saved, time is not.

    Args:
        in_features: length of ``x``.
        out_features: length of ``y``.
        rank: of the pair.
        entries: how many places ``S`` has.
        scale: ``s``; the released configurations have ``alpha / rank`` with alpha from 8 to 32.
        bias: whether there is one.
        device: of the parameters.
        dtype: of the parameters.
    """

    places: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        entries: int,
        *,
        scale: float = 1.0,
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.in_features, self.out_features, self.entries = in_features, out_features, entries
        self.rank, self.scale = whole_rank(int(rank), min(in_features, out_features)), float(scale)
        self.A = nn.Parameter(torch.zeros(in_features, self.rank, device=device, dtype=dtype))
        self.B = nn.Parameter(torch.zeros(out_features, self.rank, device=device, dtype=dtype))
        # A row: matrices are what counts as multiplied.
        self.values = nn.Parameter(torch.zeros(1, entries, device=device, dtype=dtype))
        self.register_buffer("places", torch.arange(entries, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_linear(
        cls, linear: nn.Module, rank: float, density: float = 0.03, *, alpha: float | None = None
    ) -> SLTrainLinear:
        """With the shape and the bias of a layer; random numbers come from torch's global generator.

        Args:
            linear: an ``nn.Linear`` or transformers' ``Conv1D``.
            rank: a whole number, or a share in (0, 1) of the smaller side.
            density: share of the matrix that ``S`` has.
            alpha: ``scale`` is ``alpha / rank``; default: the rank.

        Raises:
            ValueError: an option out of range.
        """
        check_places(density, alpha)
        weight = dense_weight(linear)
        outputs, inputs = weight.shape
        number, entries = whole_rank(rank, min(outputs, inputs)), max(1, int(density * weight.numel() + 1e-9))
        bias: Tensor | None = linear.bias  # type: ignore[assignment]
        scale = 1.0 if alpha is None else alpha / number
        layer = cls(
            inputs, outputs, number, entries, scale=scale, bias=bias is not None, device=weight.device,
            dtype=weight.dtype,
        )  # fmt: skip
        bound = inputs**-0.5
        with torch.no_grad():
            layer.A.copy_(torch.empty(inputs, number).uniform_(-bound, bound))
            layer.values.copy_(torch.empty(1, entries).uniform_(-bound, bound))
            layer.places.copy_(torch.randperm(outputs * inputs)[:entries].sort().values)
            if layer.bias is not None and bias is not None:
                layer.bias.copy_(bias)
        return layer.train(linear.training)

    @property
    def extra_multiplications(self) -> int:
        """Per token, besides one for each parameter: the product is that of the dense matrix.

        Making the matrix costs ``rank * in * out`` more, once per pass and not per token; it is not counted.
        """
        own = self.rank * (self.in_features + self.out_features) + self.entries
        return self.in_features * self.out_features - own

    @property
    def columns(self) -> int:
        """None is kept as a whole."""
        return 0

    def weight(self) -> Float[Tensor, "out in"]:
        """The dense matrix."""
        return _weight(self.A, self.B, self.values, self.places, self.scale)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """See the class."""
        from torch.utils.checkpoint import checkpoint

        def product(x: Tensor, A: Tensor, B: Tensor, values: Tensor) -> Tensor:
            return F.linear(x, _weight(A, B, values, self.places, self.scale), self.bias)

        if not torch.is_grad_enabled():
            return product(x, self.A, self.B, self.values)
        # The dense matrix is not kept between forward and backward.
        y: Tensor = checkpoint(product, x, self.A, self.B, self.values, use_reentrant=False, preserve_rng_state=False)
        return y

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The same function as an ``nn.Linear``."""
        return as_linear(self.weight(), self.bias).train(self.training)

    def extra_repr(self) -> str:
        """Shape and options."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"entries={self.entries}, scale={self.scale:g}, bias={self.bias is not None}"
        )


def check_places(density: float, alpha: float | None) -> None:
    """Refuse a share of the entries, or a scale, that cannot be meant."""
    if isinstance(density, bool) or not isinstance(density, int | float) or not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], the share of the entries that is kept, got {density!r}")
    if alpha is not None and not (isinstance(alpha, int | float) and 0 < alpha < math.inf):
        raise ValueError(f"alpha must be a positive number, got {alpha!r}")


def _weight(A: Tensor, B: Tensor, values: Tensor, places: Tensor, scale: float) -> Tensor:
    dense = scale * (B @ A.T)
    return dense.view(-1).index_add(0, places, values[0].to(dense.dtype)).view_as(dense)
