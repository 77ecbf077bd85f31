"""One-shot pruning with compensation: Optimal Brain Surgeon column by column.

Frantar, Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", 2023, arXiv 2301.00774
(released code: ``sparsegpt.py``); Hassibi, Stork, Wolff, "Optimal Brain Surgeon and general network pruning", 1993.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lossmith.sparsity.calibration import Batch, InputProducts
from lossmith.sparsity.calibration_stream import stream_layers
from lossmith.sparsity.magnitude import Masks, block_weights
from lossmith.sparsity.masks import check_sparsity, largest_of_groups, parse_structure
from lossmith.sparsity.restoring import check_finite, unchanged_on_failure


@dataclass(frozen=True, slots=True)
class Surgery:
    """What :func:`surgeon` found.

    Attributes:
        weight: with zeros, and what remains moved to make up for them.
        mask: ``True`` where a weight stays.
        importance: ``w^2 / U_jj^2``, twice the squared error that removing this weight alone costs, given that the
            columns before it are done.
        error: half the squared error ``tr(D H D^T)``, ``D`` the change of the weight, ``H`` with its damping.
        damping: what was added to the diagonal, as a share of its mean.
    """

    weight: Float[Tensor, "outputs inputs"]
    mask: Bool[Tensor, "outputs inputs"]
    importance: Float[Tensor, "outputs inputs"]
    error: float
    damping: float


def surgeon(
    weight: Float[Tensor, "outputs inputs"],
    hessian: Float[Tensor, "inputs inputs"],
    sparsity: float = 0.5,
    *,
    pattern: str | None = None,
    block_size: int = 128,
    damping: float = 0.01,
    count: Literal["exact", "released"] = "exact",
    name: str = "the weight",
) -> Surgery:
    r"""Remove weights of a matrix, and move the others so that its outputs change least.

    With :math:`H^{-1} = U^\top U` (``U`` upper triangular), columns from the left to the right: a removed weight costs
    :math:`w_j^2 / 2 U_{jj}^2`, and the columns behind it move by :math:`-w_j U_{j,j:} / U_{jj}`.
    :math:`U_{jj}^2` is the corner of the inverse of the *trailing* part :math:`H_{j:,j:}`, not :math:`(H^{-1})_{jj}`.

    Args:
        weight: of a linear layer.
        hessian: of the squared error over the calibration inputs; see :class:`~lossmith.sparsity.InputProducts`.
        sparsity: share to remove, in [0, 1); the smallest of each block of columns.
        pattern: ``"2:4"``: two of every four inputs stay, chosen as the columns come; ``sparsity`` is not used.
        block_size: columns whose choice is made together.
        damping: added to the diagonal, as a share of its mean. Ten times as much is tried, three times, where the
            Cholesky factor does not exist (with a warning).
        count: ``"exact"``: ``round(sparsity * n)`` over the matrix; ``"released"``: the released code's
            ``importance <= sorted[int(sparsity * n)]`` of each block, one more, and all weights of inputs that were
            always zero. In both such weights have importance 0 and go first.
        name: for messages.

    Returns:
        A :class:`Surgery`; float64 for float64 weights, else float32.

    Raises:
        ValueError: shapes that do not fit, a sparsity out of range, values that are not finite, inputs that the
            pattern does not divide.
        torch.linalg.LinAlgError: no Cholesky factor with a thousand times the damping; ``name`` is in the message.

    >>> found = surgeon(torch.tensor([[0.2, 1.0]]), torch.tensor([[1.0, 0.5], [0.5, 1.0]]), damping=0)
    >>> found.weight.tolist(), found.mask.tolist()
    ([[0.0, 1.100000023841858]], [[False, True]])
    """
    if weight.ndim != 2 or hessian.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(
            f"the Hessian of {name} {tuple(weight.shape)} must be square over its inputs, got {hessian.shape}"
        )
    check_sparsity(sparsity)
    if count not in ("exact", "released"):
        raise ValueError(f"count must be 'exact' or 'released', got {count!r}")
    if block_size < 1 or not damping >= 0:
        raise ValueError(f"block_size must be at least 1 and damping at least 0, got {block_size} and {damping}")
    group = parse_structure(pattern)
    rows, columns = weight.shape
    if group is not None and columns % group[1]:
        raise ValueError(f"{name} has {columns} inputs, not a multiple of {group[1]}, which {pattern} needs")
    kind = torch.float64 if weight.dtype == torch.float64 else torch.float32
    current = weight.detach().to(kind, copy=True)
    if not bool(torch.isfinite(current).all()) or not bool(torch.isfinite(hessian).all()):
        raise ValueError(f"{name} or its Hessian has values that are NaN or infinite")
    upper, dead, used = _upper(hessian.to(kind), damping, name)
    if count == "released":
        current[:, dead] = 0
    size = block_size if group is None else -(-block_size // group[1]) * group[1]
    mask = torch.ones_like(current, dtype=torch.bool)
    importance = torch.empty_like(current)
    error = 0.0
    for start in range(0, columns, size):
        end = min(start + size, columns)
        block, corner = current[:, start:end], upper[start:end, start:end]
        diagonal = corner.diagonal()
        errors = torch.zeros_like(block)
        if group is None:
            scores = (block / diagonal).square()
            scores[:, dead[start:end]] = 0
            importance[:, start:end] = scores
            number = round(sparsity * rows * end) - round(sparsity * rows * start)
            mask[:, start:end] = _kept(scores, number, sparsity, count)
        for j in range(end - start):
            if group is not None and j % group[1] == 0:
                part = slice(j, j + group[1])
                scores = (block[:, part] / diagonal[part]).square()
                scores[:, dead[start:end][part]] = 0
                importance[:, start:end][:, part] = scores
                mask[:, start:end][:, part] = largest_of_groups(scores, *group, name=name)
            gone = ~mask[:, start + j]
            errors[:, j] = torch.where(gone, block[:, j] / diagonal[j], 0.0)
            block[:, j:] -= errors[:, j, None] * corner[j, j:]
            # Exactly, not up to rounding.
            block[:, j].masked_fill_(gone, 0)
        current[:, end:] -= errors @ upper[start:end, end:]
        error += 0.5 * float(errors.square().sum())
    return Surgery(current, mask, importance, error, used)


def sparsegpt(
    model: nn.Module,
    batches: Sequence[Batch],
    sparsity: float = 0.5,
    *,
    pattern: str | None = None,
    block_size: int = 128,
    damping: float = 0.01,
    count: Literal["exact", "released"] = "exact",
    order: Literal["layer", "block"] = "layer",
    targets: Literal["blocks", "all"] = "blocks",
    exclude: Sequence[str] = (),
) -> Masks:
    """Prune a model in place with :func:`surgeon`, matrix by matrix, on the inputs that pruned layers produce.

    Memory beyond the model: one Hessian (inputs x inputs, float32; matrices that read the same input share it), its
    factor, one matrix and the inputs of one block. A temporary file holds a copy of the matrices, so that the model is
    as it was after any error.

    Args:
        model: any module with linear layers (``Conv1D`` too).
        batches: see :func:`~lossmith.sparsity.calibration_rows`.
        sparsity, pattern, block_size, damping, count: see :func:`surgeon`.
        order, targets, exclude: see :func:`~lossmith.sparsity.stream_layers`.

    Returns:
        Masks by name, ``True`` where a weight stays.

    >>> from lossmith.sparsity import sparsegpt
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> {name: int(mask.sum()) for name, mask in sparsegpt(net, [torch.randn(32, 4)], targets="all").items()}
    {'0.weight': 16, '2.weight': 8}
    """
    check_sparsity(sparsity)
    check_pattern(model, pattern, targets, exclude)
    check_finite(block_weights(model, targets=targets, exclude=exclude).weights)
    masks = {}
    flipped = turned(model)
    with unchanged_on_failure() as keep:
        for weights, seen in stream_layers(
            model, batches, InputProducts, targets=targets, exclude=exclude, order=order
        ):
            for name, weight in weights.items():
                keep(weight)
                masks[name] = operate(
                    weight,
                    seen,
                    sparsity,
                    flip=name in flipped,
                    pattern=pattern,
                    block_size=block_size,
                    damping=damping,
                    count=count,
                    name=name,
                )
    return masks


def operate(
    weight: Tensor,
    seen: InputProducts,
    sparsity: float,
    *,
    flip: bool = False,
    name: str = "the weight",
    **options: Any,
) -> Bool[Tensor, "rows columns"]:
    """Prune one matrix in place by :func:`surgeon`; returns its mask. ``flip``: it is stored inputs x outputs."""
    matrix = weight.detach().T if flip else weight.detach()
    found = surgeon(matrix, seen.hessian(), sparsity, name=name, **options)
    mask = (found.mask.T if flip else found.mask).contiguous()
    if not bool(torch.isfinite(found.weight.to(weight.dtype)).all()):
        raise ValueError(
            f"what is left of {name} would have to grow beyond {str(weight.dtype).removeprefix('torch.')}: "
            "load the model in a type with more range, or give a larger damping"
        )
    with torch.no_grad():
        weight.copy_(found.weight.T if flip else found.weight)
        # What rounds to zero in half precision is still one that stays; what goes is zero in any.
        weight.masked_fill_(~mask, 0)
    return mask


def check_pattern(
    model: nn.Module, pattern: str | None, targets: Literal["blocks", "all"], exclude: Sequence[str]
) -> None:
    """Raise ``ValueError`` for inputs that the pattern does not divide, before anything is pruned."""
    if (group := parse_structure(pattern)) is None:
        return
    flipped = turned(model)
    for name, weight in block_weights(model, targets=targets, exclude=exclude).weights.items():
        if (inputs := weight.shape[0 if name in flipped else 1]) % group[1]:
            raise ValueError(f"{name} has {inputs} inputs, not a multiple of {group[1]}, which {pattern} needs")


def turned(model: nn.Module) -> set[str]:
    """Names of matrices that are stored inputs x outputs (transformers' ``Conv1D``)."""
    return {f"{n}.weight" if n else "weight" for n, m in model.named_modules() if type(m).__name__ == "Conv1D"}


def _upper(hessian: Tensor, damping: float, name: str) -> tuple[Tensor, Tensor, float]:
    """The factor, which inputs were always zero, and the damping that it took; three matrices at a time."""
    dead = hessian.diagonal() == 0
    matrix = hessian.clone()
    matrix.diagonal()[dead] = 1
    plain = matrix.diagonal().clone()
    for attempt in range(4):
        share = damping * 10**attempt if damping else (0 if attempt == 0 else 0.001 * 10**attempt)
        matrix.diagonal().copy_(plain + share * plain.mean())
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if int(failed) == 0:
            inverse = torch.cholesky_inverse(lower)
            del lower
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if int(failed) == 0 and bool(torch.isfinite(upper).all()):
                if attempt:
                    warnings.warn(f"the Hessian of {name} is nearly singular: damping {share:g}", stacklevel=3)
                return upper, dead, share
    raise torch.linalg.LinAlgError(
        f"the Hessian of {name} has no Cholesky factor with a damping of {share:g} of its mean diagonal: give more "
        "calibration data or a larger damping"
    )


def _kept(scores: Tensor, number: int, sparsity: float, count: str) -> Tensor:
    flat = scores.flatten()
    if count == "released":
        return scores > flat.sort().values[int(flat.numel() * sparsity)]
    kept = torch.ones_like(flat, dtype=torch.bool)
    kept[torch.sort(flat, stable=True).indices[:number]] = False
    return kept.reshape(scores.shape)
