"""What ``weights=`` names: LOST, and what it is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from lossmith.sparsity.lost_layer import Activation, Columns, Decomposition, Start, check_mix, column_count, whole_rank
from lossmith.sparsity.lost_model import convert_to_lost, replace_layers
from lossmith.sparsity.lost_sltrain import SLTrainLinear, check_places


class LowRank:
    """Replaces a model's linear layers before training begins.

    Args:
        convert: what does it, in place.
    """

    def __init__(self, convert: Callable[[nn.Module], Any]):
        self.convert = convert

    def attach(self, model: nn.Module, steps: int | None = None) -> None:
        """Convert the model, in place; the steps of the run do not matter."""
        self.convert(model)


def lost(
    *,
    rank: float = 0.25,
    density: float = 0.01,
    gamma: float = 0.5,
    activation: Activation = "silu",
    columns: Columns = "svd",
    start: Start = "svd",
    complement_rank: int | None = None,
    decomposition: Decomposition = "svd",
    targets: str | Sequence[str] | None = None,
) -> LowRank:
    """LOST: ``weights=lost(rank=0.25, density=0.01)`` in an arm; a low-rank pair and a few full columns per layer.

    Args:
        rank: a whole number, or a share in (0, 1) of each layer's smaller side.
        density: share of the input channels whose columns are kept.
        gamma: weight of the low-rank pair.
        activation: between the factors: ``silu`` or ``none``, which can be merged.
        columns: chosen by ``svd``, ``norm`` or at ``random``.
        start: of the pair: ``svd`` or ``cola``.
        complement_rank: components that columns are chosen by; default: all the rest.
        decomposition: ``svd``, or ``gram``, which is faster for random first weights.
        targets: ends of names of layers; default: all linear layers but the output layer.

    Raises:
        ValueError: an option out of range.

    Source: arXiv 2508.02668.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    >>> lost(rank=8).attach(model)
    >>> model[0].rank, model[0].columns
    (8, 1)
    """
    _check(rank, density)
    check_mix(gamma, activation)
    if columns not in ("svd", "norm", "random"):
        raise ValueError(f"columns must be svd, norm or random, got {columns!r}")
    if start not in ("svd", "cola"):
        raise ValueError(f"start must be svd or cola, got {start!r}")
    if decomposition not in ("svd", "gram"):
        raise ValueError(f"decomposition must be svd or gram, got {decomposition!r}")
    if complement_rank is not None and (not isinstance(complement_rank, int) or complement_rank < 1):
        raise ValueError(f"complement_rank must be a whole number of at least 1 or none, got {complement_rank!r}")
    return LowRank(
        lambda model: convert_to_lost(
            model, rank, density, gamma=gamma, activation=activation, start=start, choose=columns,
            complement_rank=complement_rank, decomposition=decomposition, targets=_names(targets),
        )
    )  # fmt: skip


def low_rank(*, rank: float = 0.25, targets: str | Sequence[str] | None = None) -> LowRank:
    """Plain low rank, begun with the best approximation of the first weight: LOST without columns and activation.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    >>> low_rank(rank=0.5).attach(model)
    >>> model[0].rank, model[0].values
    (32, None)
    """
    return lost(rank=rank, density=0, activation=None, targets=targets)


def cola(*, rank: float = 0.25, targets: str | Sequence[str] | None = None) -> LowRank:
    """CoLA (Liu et al. 2025, arXiv 2502.10940): a pair with an activation between, random to begin with; no columns.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    >>> cola().attach(model)
    >>> model[0].activation
    'silu'
    """
    return lost(rank=rank, density=0, start="cola", targets=targets)


def sltrain(
    *,
    rank: float = 0.25,
    density: float = 0.03,
    alpha: float | None = None,
    targets: str | Sequence[str] | None = None,
) -> LowRank:
    """SLTrain (Han et al. 2024, arXiv 2406.02214): a pair plus weights at random places.

    Args:
        rank: a whole number, or a share in (0, 1) of each layer's smaller side.
        density: share of the matrix at whose places there are weights.
        alpha: the pair is multiplied by ``alpha / rank``; default: by 1.
        targets: ends of names of layers; default: all linear layers but the output layer.

    Raises:
        ValueError: an option out of range.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    >>> sltrain().attach(model)
    >>> model[0].entries
    122
    """
    check_places(density, alpha)
    _check(rank, density)
    return LowRank(
        lambda model: replace_layers(
            model,
            _names(targets),
            lambda name, linear: SLTrainLinear.from_linear(linear, rank, density, alpha=alpha),
        )
    )


def _check(rank: float, density: float) -> None:
    # No layer is known yet: any whole rank may fit.
    whole_rank(rank, 2**62)
    column_count(density, 1)


def _names(targets: str | Sequence[str] | None) -> Sequence[str] | None:
    return [targets] if isinstance(targets, str) else targets
