"""Which weights stay: one ranking by magnitude over all layers, unstructured or N of every M.

Jin et al. 2025, arXiv 2501.12486 (released code: ``prune``).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lossmith.errors import InputError
from lossmith.sparsity.schedule import kept_of

_STRUCTURE = re.compile(r"(\d+):(\d+)")


@dataclass(frozen=True, slots=True)
class Prunable:
    """The weights of a model that may be pruned.

    Attributes:
        weights: matrices of linear layers by their name in ``named_parameters()``.
        tied: linear layers that share their matrix with an embedding, which is not pruned.
        excluded: linear layers that the user excluded.
    """

    weights: Mapping[str, nn.Parameter]
    tied: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()

    @property
    def number(self) -> int:
        """How many weights there are."""
        return sum(weight.numel() for weight in self.weights.values())


def prunable_weights(model: nn.Module, *, exclude: Sequence[str] = ()) -> Prunable:
    """The matrices of a model's linear layers (``nn.Linear``, transformers' ``Conv1D``), its output layer among them.

    Embeddings, norms and biases are neither pruned nor counted. A matrix that several linear layers share counts once;
    an output layer that shares its matrix with the input embedding is left out: pruning it would prune the embedding.

    Args:
        model: any module.
        exclude: parts of names (``"lm_head"``, ``"layers.0."``) whose layers are left alone.

    Raises:
        InputError: nothing is left to prune, or an exclusion that fits no layer.

    >>> sorted(prunable_weights(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 8), nn.Linear(8, 9))).weights)
    ['1.weight', '2.weight']
    """
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    weights: dict[str, nn.Parameter] = {}
    tied, excluded, seen = [], [], set()
    for name, module in model.named_modules():
        if not (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"):
            continue
        weight = module.weight
        full = f"{name}.weight" if name else "weight"
        if any(part in full for part in exclude):
            excluded.append(full)
        elif not isinstance(weight, nn.Parameter) or weight.ndim != 2 or weight.numel() == 0:
            continue
        elif id(weight) in embedded:
            tied.append(full)
        elif id(weight) not in seen:
            seen.add(id(weight))
            weights[full] = weight
    if unused := [part for part in exclude if not any(part in name for name in excluded)]:
        there = [*weights, *tied]
        shown = ", ".join(there[:6]) + (", ..." if len(there) > 6 else "")
        raise InputError(f"exclude names '{unused[0]}', which is in no linear layer's name; there are {shown}")
    if not weights:
        reason = ""
        if tied:
            reason = f"; {', '.join(tied)} shares its matrix with an embedding and cannot be pruned without it"
        elif excluded:
            reason = "; all of them are excluded"
        raise InputError(f"{type(model).__name__} has no linear layer to prune{reason}")
    return Prunable(weights, tuple(tied), tuple(excluded))


def magnitude_masks(
    weights: Mapping[str, Float[Tensor, "rows columns"]],
    density: float,
    *,
    masks: Mapping[str, Bool[Tensor, "rows columns"]] | None = None,
    structure: str | None = None,
    scores: Mapping[str, Float[Tensor, "rows columns"]] | None = None,
    variant: Literal["exact", "released"] = "exact",
) -> dict[str, Bool[Tensor, "rows columns"]]:
    """The largest weights over all layers in one ranking: ``int(density * n)`` of the ``n`` weights.

    Args:
        weights: matrices by name; ``n`` is the number of all their elements.
        density: share of them that stays, in (0, 1].
        masks: what stayed so far. Masks only shrink: a weight that is gone never comes back.
        structure: ``"2:4"`` (or any ``"N:M"``): of every M neighbours in a row the N largest are ranked before all
            other weights, so that they stay as long as the density is N/M or more, and at N/M exactly they remain.
        scores: what to rank by, instead of the magnitude; not negative.
        variant: ``"exact"`` keeps the number asked for (of equal scores the earlier ones go first); ``"released"`` is
            the released code: whatever equals the threshold stays, and with a structure whatever is above the global
            threshold *or* among the N largest, so that the density in the end is higher than asked for and the result
            is no N:M matrix.

    Returns:
        ``True`` where a weight stays, on each weight's device.

    Raises:
        ValueError: a density out of range, weights that are not finite, a structure that does not fit.

    >>> layers = {"first": torch.tensor([[0.1, -0.9, 0.4]]), "second": torch.tensor([[0.2, -0.3, 0.8]])}
    >>> [mask.int().tolist() for mask in magnitude_masks(layers, 0.5).values()]
    [[[0, 1, 1]], [[0, 0, 1]]]
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must lie in (0, 1], got {density}")
    if variant not in ("exact", "released"):
        raise ValueError(f"variant must be 'exact' or 'released', got {variant!r}")
    group = parse_structure(structure)
    if not weights:
        raise ValueError("there are no weights to rank")
    ranked: dict[str, Tensor] = {}
    protected: dict[str, Tensor] = {}
    for name, weight in weights.items():
        score = (weight if scores is None else scores[name]).detach()
        # bfloat16 and float16 have exact forms in float32.
        score = score.abs().to(torch.float64 if score.dtype == torch.float64 else torch.float32)
        if not bool(torch.isfinite(score).all()):
            raise ValueError(f"{name} has weights that are NaN or infinite, which have no rank")
        if masks is not None:
            # Below every live weight, also one that is 0.
            score = torch.where(masks[name], score, -1.0)
        if group is not None:
            protected[name] = largest_of_groups(score, *group, name=name)
        ranked[name] = score
    device = next(iter(ranked.values())).device
    number = sum(score.numel() for score in ranked.values())
    kept = kept_of(number, density)
    if group is not None and density < group[0] / group[1]:
        raise ValueError(f"density {density:g} is below the {group[0]}/{group[1]} that {structure} keeps")
    if variant == "exact":
        ranked = {name: torch.where(protected[name], torch.inf, s) for name, s in ranked.items()} if group else ranked
    together = torch.cat([score.reshape(-1).to(device) for score in ranked.values()])
    if number == kept:
        found = torch.ones_like(together, dtype=torch.bool)
    else:
        # The element at index n - kept of the ascending order.
        threshold = _kth_smallest(together, number - kept)
        found = together > threshold
        equal = together == threshold
        if variant == "exact":
            found[torch.nonzero(equal).squeeze(-1)[int(found.sum()) + int(equal.sum()) - kept :]] = True
        else:
            found |= equal
    result = {}
    for (name, score), part in zip(ranked.items(), found.split([s.numel() for s in ranked.values()]), strict=True):
        mask = part.reshape(score.shape).to(score.device)
        if group is not None and variant == "released":
            mask = mask | protected[name]
        result[name] = mask if masks is None else mask & masks[name]
    return result


def largest_of_groups(score: Tensor, n: int, m: int, *, name: str = "a weight") -> Bool[Tensor, "rows columns"]:
    """``True`` for the ``n`` largest of every ``m`` neighbours in a row; of equal ones the first.

    Raises:
        ValueError: the last dimension is not a multiple of ``m``.
    """
    if score.shape[-1] % m:
        raise ValueError(f"{name} has {score.shape[-1]} inputs, not a multiple of {m}, which {n}:{m} needs")
    groups = score.reshape(*score.shape[:-1], -1, m)
    order = torch.sort(groups, dim=-1, descending=True, stable=True).indices[..., :n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True).reshape(score.shape)


def check_sparsity(sparsity: float) -> None:
    """Raise ``ValueError`` unless it is a share in [0, 1), ``TypeError`` unless it is a number."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float | np.integer | np.floating):
        raise TypeError(f"sparsity must be a number in [0, 1), got {sparsity!r}")
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must lie in [0, 1), got {sparsity}")


def warn_of_stacked(model: nn.Module) -> None:
    """Say which weights look like several matrices in one parameter (experts): only linear layers are pruned."""
    stacked = [name for name, weight in model.named_parameters() if weight.ndim == 3 and _is_stacked(model, name)]
    if stacked:
        share = sum(model.get_parameter(name).numel() for name in stacked) / sum(p.numel() for p in model.parameters())
        warnings.warn(
            f"{stacked[0]}" + (f" and {len(stacked) - 1} more" if len(stacked) > 1 else "") + " hold many matrices in "
            f"one parameter (experts), which is not pruned: {share:.0%} of all parameters stay as they are",
            stacklevel=3,
        )


def _is_stacked(model: nn.Module, name: str) -> bool:
    """Convolutions over one dimension and single rows (positions, tokens of classes) are none."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return not isinstance(owner, nn.Conv1d | nn.ConvTranspose1d) and min(model.get_parameter(name).shape) > 1


def parse_structure(structure: str | None) -> tuple[int, int] | None:
    """``"2:4"`` as ``(2, 4)``; ``None`` for no structure.

    Raises:
        ValueError: another text, or N not in 1 to M - 1.
    """
    if structure is None or structure == "none":
        return None
    match = _STRUCTURE.fullmatch(str(structure))
    if match is None or not 1 <= int(match[1]) < int(match[2]):
        raise ValueError(f"structure must be 'none' or N:M with 1 <= N < M, such as 2:4, got {structure!r}")
    return int(match[1]), int(match[2])


def _kth_smallest(values: Tensor, index: int) -> Tensor:
    # numpy's selection is over ten times faster than torch.kthvalue, which is slower than a sort on a GPU.
    if values.device.type == "cpu":
        return torch.as_tensor(np.partition(values.numpy(), index)[index])
    return torch.sort(values).values[index]
