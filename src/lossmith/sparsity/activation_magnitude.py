"""Pruning by magnitude times activation.

Sun, Liu, Bair, Kolter, "A Simple and Effective Pruning Approach for Large Language Models", 2023, arXiv 2306.11695
(released code: ``prune.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lossmith.sparsity.calibration import Batch, InputNorms
from lossmith.sparsity.calibration_stream import stream_layers
from lossmith.sparsity.magnitude import Masks, block_weights
from lossmith.sparsity.masks import check_sparsity, largest_of_groups, parse_structure
from lossmith.sparsity.optimal_brain_surgeon import check_pattern, turned
from lossmith.sparsity.restoring import check_finite, unchanged_on_failure


def wanda_scores(
    weight: Float[Tensor, "outputs inputs"], squared_norms: Float[Tensor, " inputs"]
) -> Float[Tensor, "outputs inputs"]:
    r"""Magnitude times the norm of its input, :math:`S_{ij} = |W_{ij}| \, \lVert X_j \rVert_2`; float32 or float64.

    The square is twice the error of removing the weight alone, without compensation: :math:`w^2 H_{jj}`.

    >>> wanda_scores(torch.tensor([[1.0, -2.0]]), torch.tensor([9.0, 1.0])).tolist()
    [[3.0, 2.0]]
    """
    kind = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return weight.detach().abs().to(kind) * squared_norms.to(kind).sqrt()


def wanda(
    model: nn.Module,
    batches: Sequence[Batch],
    sparsity: float = 0.5,
    *,
    pattern: str | None = None,
    compare: Literal["row", "matrix"] = "row",
    order: Literal["layer", "block"] = "layer",
    targets: Literal["blocks", "all"] = "blocks",
    exclude: Sequence[str] = (),
) -> Masks:
    """Prune a model in place by :func:`wanda_scores`; nothing else moves.

    A temporary file holds a copy of the matrices meanwhile: after any error the model is as it was.

    Args:
        model: any module with linear layers (``Conv1D`` too).
        batches: see :func:`~lossmith.sparsity.calibration_rows`.
        sparsity: share to remove, in [0, 1).
        pattern: ``"2:4"``: two of every four inputs stay.
        compare: ``"row"``: ``round(sparsity * inputs)`` of every output's weights go; ``"matrix"``: of all of a
            matrix's together.
        order, targets, exclude: see :func:`~lossmith.sparsity.stream_layers`.

    Returns:
        Masks by name, ``True`` where a weight stays.

    Raises:
        ValueError: a sparsity out of range, weights that are not finite, inputs that the pattern does not divide.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> {name: int(mask.sum()) for name, mask in wanda(net, [torch.randn(32, 4)], targets="all").items()}
    {'0.weight': 16, '2.weight': 8}
    """
    check_sparsity(sparsity)
    if compare not in ("row", "matrix"):
        raise ValueError(f"compare must be 'row' or 'matrix', got {compare!r}")
    check_pattern(model, pattern, targets, exclude)
    check_finite(block_weights(model, targets=targets, exclude=exclude).weights)
    masks = {}
    flipped = turned(model)
    with unchanged_on_failure() as keep:
        for weights, seen in stream_layers(model, batches, InputNorms, targets=targets, exclude=exclude, order=order):
            for name, weight in weights.items():
                keep(weight)
                masks[name] = prune_by_inputs(
                    weight, seen, sparsity, pattern=pattern, compare=compare, flip=name in flipped, name=name
                )
    return masks


def prune_by_inputs(
    weight: Tensor,
    seen: InputNorms,
    sparsity: float,
    *,
    pattern: str | None = None,
    compare: Literal["row", "matrix"] = "row",
    flip: bool = False,
    name: str = "the weight",
) -> Bool[Tensor, "rows columns"]:
    """Prune one matrix in place; returns its mask. ``flip``: it is stored inputs x outputs."""
    scores = wanda_scores(weight.T if flip else weight, seen.squared())
    if not bool(torch.isfinite(scores).all()):
        raise ValueError(f"{name} has scores that are NaN or infinite: its inputs are too large")
    if (group := parse_structure(pattern)) is not None:
        mask = largest_of_groups(scores, *group, name=name)
    else:
        rows = scores if compare == "row" else scores.reshape(1, -1)
        mask = _largest(rows, sparsity).reshape(scores.shape)
    mask = (mask.T if flip else mask).contiguous()
    with torch.no_grad():
        weight.masked_fill_(~mask, 0)
    return mask


def _largest(scores: Tensor, sparsity: float) -> Tensor:
    """All but the ``round(sparsity * n)`` smallest of each row; of equal ones the earlier go first."""
    number = round(sparsity * scores.shape[1])
    gone = torch.sort(scores, dim=1, stable=True).indices[:, :number]
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, gone, False)
