"""One-shot pruning: which weights of a trained model go, in one step.

"The Emergence of Essential Sparsity in Large Pre-trained Models: The Weights that Matter", 2023, arXiv 2306.03805
(released code: ``pruner.py``). Masks are ``True`` where a weight stays. Sparsity counts the prunable matrices only.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from lossmith.errors import InputError
from lossmith.sparsity.masks import Prunable, check_sparsity, largest_of_groups, parse_structure, prunable_weights
from lossmith.sparsity.threshold import KthSmallest

METHODS = ("magnitude", "uniform", "random", "erk")
Masks = dict[str, Bool[Tensor, "rows columns"]]


def block_weights(
    model: nn.Module, *, targets: Literal["blocks", "all"] = "blocks", exclude: Sequence[str] = ()
) -> Prunable:
    """The matrices that the paper prunes: linear layers (``Conv1D`` too) inside a model's repeated blocks.

    Args:
        model: any module.
        targets: ``"blocks"``: inside an ``nn.ModuleList``, so never embeddings, pooler or heads; ``"all"``: every
            linear layer, see :func:`~lossmith.sparsity.prunable_weights`.
        exclude: parts of names of layers to leave alone.

    Raises:
        InputError: there is none; the linear layers that are outside are listed.
        ValueError: other ``targets``.

    >>> sorted(block_weights(nn.Sequential(nn.ModuleList([nn.Linear(4, 4)]), nn.Linear(4, 2))).weights)
    ['0.0.weight']
    """
    if targets not in ("blocks", "all"):
        raise ValueError(f"targets must be 'blocks' or 'all', got {targets!r}")
    every = prunable_weights(model, exclude=exclude)
    if targets == "all":
        return every
    lists = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList))
    inside = {name: weight for name, weight in every.weights.items() if lists and name.startswith(lists)}
    if not inside:
        raise InputError(
            f"{type(model).__name__} has no linear layer in repeated blocks (an nn.ModuleList); its linear layers are "
            f"{', '.join(list(every.weights)[:6])}; targets='all' prunes those"
        )
    outside = tuple(name for name in every.weights if name not in inside)
    return Prunable(inside, every.tied, (*every.excluded, *outside))


def one_shot_masks(
    model: nn.Module | Mapping[str, Tensor],
    sparsity: float = 0.5,
    *,
    method: str = "magnitude",
    targets: Literal["blocks", "all"] = "blocks",
    exclude: Sequence[str] = (),
    seed: int = 0,
) -> Masks:
    """Masks that remove ``round(sparsity * N)`` of the ``N`` prunable weights in one step.

    Args:
        model: a module, or matrices by name (outputs x inputs).
        sparsity: share to remove, in [0, 1). Not used by N:M, whose pattern says it.
        method: ``"magnitude"``: the smallest over all matrices, one threshold; ``"uniform"``: of each matrix its own
            ``round(sparsity * n)`` smallest; ``"random"``: anywhere; ``"erk"``: each weight stays with its layer's
            Erdos-Renyi density (see :func:`erk_densities`), so that the number is random; ``"N:M"`` such as
            ``"2:4"``: the N largest of every M neighbours along the *inputs* stay.
        targets, exclude: of a module, see :func:`block_weights`.
        seed: of the random methods.

    Returns:
        ``True`` where a weight stays. Magnitudes are compared as float32; of equal ones the earlier go first, so that
        the zeros of a lower sparsity are among those of a higher one.

    Raises:
        ValueError: sparsity out of range, NaN or infinite weights, inputs that M does not divide (the layer is named).
        InputError: an unknown method, nothing to prune.

    >>> layers = {"a": torch.tensor([[0.5, -0.1, 0.3, 0.05]]), "b": torch.tensor([[0.15, -0.9, 0.02, 0.4]])}
    >>> [mask.int().tolist() for mask in one_shot_masks(layers, 0.5).values()]
    [[[1, 0, 1, 0]], [[0, 1, 0, 1]]]
    """
    _check(sparsity, method)
    weights, flipped = _matrices(model, targets, exclude)
    if not weights:
        raise InputError("there are no weights to prune")
    if ":" in method:
        group = parse_structure(method)
        assert group is not None
        masks = {}
        for name, weight in weights.items():
            magnitude = _magnitude(weight, name)
            magnitude = magnitude.T if name in flipped else magnitude
            mask = largest_of_groups(magnitude, *group, name=name)
            masks[name] = (mask.T if name in flipped else mask).contiguous()
        return masks
    if method == "magnitude":
        return _remove(weights, round(sparsity * sum(w.numel() for w in weights.values())))
    if method == "uniform":
        return {k: _remove({k: w}, round(sparsity * w.numel()))[k] for k, w in weights.items()}
    generator = torch.Generator().manual_seed(seed)
    if method == "random":
        drawn = {name: torch.rand(w.shape, generator=generator, dtype=torch.float32) for name, w in weights.items()}
        masks = _remove(drawn, round(sparsity * sum(w.numel() for w in weights.values())))
    else:
        densities = erk_densities([(w.shape[0], w.shape[1]) for w in weights.values()], sparsity)
        masks = {
            name: torch.rand(w.shape, generator=generator, dtype=torch.float64) < density
            for (name, w), density in zip(weights.items(), densities, strict=True)
        }
    return {name: mask.to(weights[name].device) for name, mask in masks.items()}


def erk_densities(shapes: Sequence[tuple[int, int]], sparsity: float) -> list[float]:
    """Erdos-Renyi-kernel densities: ``eps (out + in) / (out in)``, so that ``1 - sparsity`` of all weights stay.

    A layer whose density would exceed 1 becomes dense, leaves the equation, and ``eps`` is solved again.

    >>> [round(d, 6) for d in erk_densities([(768, 768)] * 4 + [(3072, 768)] * 2, 0.3)[3:5]]
    [0.933333, 0.583333]
    """
    _check(sparsity, "erk")
    dense: set[int] = set()
    while True:
        open_ = [i for i in range(len(shapes)) if i not in dense]
        if not open_:
            return [1.0] * len(shapes)
        budget = (1 - sparsity) * sum(a * b for a, b in shapes) - sum(shapes[i][0] * shapes[i][1] for i in dense)
        eps = budget / sum(sum(shapes[i]) for i in open_)
        raw = {i: eps * sum(shapes[i]) / (shapes[i][0] * shapes[i][1]) for i in open_}
        largest = max(raw.values())
        # Rounding must not make a layer that is just dense leave the equation for ever.
        if largest <= 1 + 1e-12:
            return [1.0 if i in dense else min(1.0, raw[i]) for i in range(len(shapes))]
        dense |= {i for i, density in raw.items() if density == largest}


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor], *, hold: bool = False) -> nn.Module:
    """Put zeros where ``masks`` are ``False``, in place.

    Args:
        model: what the masks are of.
        masks: by name of a parameter, or of a linear layer's ``weight``.
        hold: keep them in training: ``torch.nn.utils.prune`` then computes ``weight_orig * mask`` at every forward
            pass, pruned weights have no gradient, and :func:`release_masks` (or ``torch.nn.utils.prune.remove``)
            makes a plain model of it. Set it before the optimiser is made.

    Raises:
        InputError: a mask for a parameter that is not there, or of another shape.
    """
    found: list[tuple[Tensor, Tensor]] = []
    # All of them are looked at before the first is changed.
    for name, mask in masks.items():
        path, _, leaf = name.rpartition(".")
        try:
            weight = getattr(model.get_submodule(path), leaf)
        except AttributeError:
            raise InputError(f"the masks name {name}, which {type(model).__name__} does not have") from None
        if weight.shape != mask.shape:
            raise InputError(f"the mask of {name} has shape {tuple(mask.shape)}, the weight {tuple(weight.shape)}")
        found.append((weight, mask.to(device=weight.device, dtype=torch.bool)))
    for weight, mask in found:
        with torch.no_grad():
            # Not a product: what is removed may be NaN.
            weight.masked_fill_(~mask, 0)
        for module, leaf in _users(model, weight) if hold else ():
            torch_prune.custom_from_mask(module, leaf, mask)
    return model


def _users(model: nn.Module, weight: Tensor) -> list[tuple[nn.Module, str]]:
    """All modules that have a parameter, with its name there: layers may share it."""
    return [
        (m, name) for m in model.modules() for name, own in list(m.named_parameters(recurse=False)) if own is weight
    ]


def release_masks(model: nn.Module) -> nn.Module:
    """Make zeros of held masks part of the weights; parameters have their own names again."""
    for module in model.modules():
        for name, _ in list(module.named_buffers(recurse=False)):
            if name.endswith("_mask") and hasattr(module, name.removesuffix("_mask") + "_orig"):
                torch_prune.remove(module, name.removesuffix("_mask"))
    return model


@dataclass(frozen=True, slots=True)
class SparsityReport:
    """Zeros of a model: ``layers`` holds (name, zeros, weights); ``parameters`` counts all, tied ones once."""

    layers: tuple[tuple[str, int, int], ...]
    parameters: int

    @property
    def zeros(self) -> int:
        """In the prunable matrices."""
        return sum(zeros for _, zeros, _ in self.layers)

    @property
    def sparsity(self) -> float:
        """Share of the prunable weights that are zero."""
        return self.zeros / sum(number for _, _, number in self.layers)

    @property
    def of_all(self) -> float:
        """The same zeros as a share of all parameters."""
        return self.zeros / self.parameters

    def summary(self) -> str:
        """A line per matrix and the totals."""
        lines = [f"{name}  {zeros:,} of {number:,}  {zeros / number:.1%}" for name, zeros, number in self.layers]
        lines.append(f"{self.sparsity:.2%} of the prunable weights are zero: {self.of_all:.2%} of all parameters")
        return "\n".join(lines)


def sparsity_report(model: nn.Module, *, targets: Literal["blocks", "all"] = "blocks") -> SparsityReport:
    """Zeros of each prunable matrix, and their share of prunable weights and of all parameters."""
    weights = block_weights(model, targets=targets).weights
    rows = tuple((name, int((w.detach() == 0).sum()), w.numel()) for name, w in weights.items())
    return SparsityReport(rows, sum(parameter.numel() for parameter in model.parameters()))


def mask_similarity(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, float]:
    """How far two masks keep the same weights: ``cosine`` and ``jaccard``, over all and for each layer.

    ``cosine`` is ``sum(m m') / sqrt(sum m sum m')``; two random masks of one density d have about d. Both are 1 for
    masks that keep nothing.

    >>> one, other = {"w": torch.tensor([[True, True, False]])}, {"w": torch.tensor([[True, False, True]])}
    >>> mask_similarity(one, other)["cosine"]
    0.5
    """
    if a.keys() != b.keys():
        raise ValueError(f"the masks are of different layers: {', '.join(sorted(a.keys() ^ b.keys())[:4])}")
    result, totals = {}, np.zeros(3)
    for name in a:
        one, other = a[name].bool(), b[name].bool().to(a[name].device)
        counts = np.array([int((one & other).sum()), int(one.sum()), int(other.sum())], dtype=np.float64)
        totals += counts
        result[f"{name}/cosine"] = _cosine(counts)
    common, first, second = totals
    union = first + second - common
    return {"cosine": _cosine(totals), "jaccard": float(common / union) if union else 1.0, **result}


def _cosine(counts: np.ndarray) -> float:
    common, first, second = counts
    return float(common / np.sqrt(first * second)) if first and second else float(first == second)


def _check(sparsity: float, method: str) -> None:
    check_sparsity(sparsity)
    if ":" in method:
        parse_structure(method)
    elif method not in METHODS:
        raise InputError(f"unknown method '{method}': there are {', '.join(METHODS)} and N:M such as 2:4")


def _matrices(
    model: nn.Module | Mapping[str, Tensor], targets: Literal["blocks", "all"], exclude: Sequence[str]
) -> tuple[dict[str, Tensor], set[str]]:
    """Matrices by name, and which of them are stored inputs x outputs."""
    if not isinstance(model, nn.Module):
        return dict(model), set()
    found = block_weights(model, targets=targets, exclude=exclude).weights
    weights: dict[str, Tensor] = {name: w.detach() for name, w in found.items()}
    number = sum(w.numel() for w in weights.values())
    if (zeros := sum(int((w == 0).sum()) for w in weights.values())) > 0.01 * number:
        warnings.warn(f"{zeros / number:.0%} of the weights are zero already; they count as the smallest", stacklevel=3)
    flipped = {f"{n}.weight" if n else "weight" for n, m in model.named_modules() if type(m).__name__ == "Conv1D"}
    return weights, flipped


def _magnitude(weight: Tensor, name: str) -> Tensor:
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{name} has weights that are NaN or infinite, which have no rank")
    return weight.detach().abs().to(torch.float32)


def _remove(weights: Mapping[str, Tensor], number: int) -> Masks:
    """Without the ``number`` smallest; matrices are visited one by one, never held together."""
    search = KthSmallest(number)
    while not search.done:
        for name, weight in weights.items():
            search.see(_magnitude(weight, name).cpu().numpy())
        search.close()
    return {
        name: torch.from_numpy(~search.smaller(_magnitude(w, name).cpu().numpy())).to(w.device)
        for name, w in weights.items()
    }
