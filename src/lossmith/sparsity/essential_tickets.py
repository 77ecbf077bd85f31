"""What essential sparsity is compared with: lottery-ticket masks, and how sparse a model was along its training.

"The Emergence of Essential Sparsity in Large Pre-trained Models: The Weights that Matter", 2023, arXiv 2306.03805.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from lossmith.sparsity.magnitude import Masks, _remove, apply_masks, block_weights, release_masks
from lossmith.sparsity.threshold import KthSmallest


def lottery_masks(
    model: nn.Module | Callable[[], nn.Module],
    finetune: Callable[[nn.Module], object],
    sparsity: float,
    *,
    rate: float = 0.1,
    targets: Literal["blocks", "all"] = "blocks",
    exclude: Sequence[str] = (),
) -> Masks:
    """Iterative magnitude pruning: fine-tune, remove the smallest ``rate`` of what is left, go back to the old weights.

    Args:
        model: the pre-trained model, copied, or a function that loads it afresh.
        finetune: trains a masked model in place.
        sparsity: of the last round, exactly ``round(sparsity * N)`` weights.
        rate: of the remaining weights, removed in each round. The paper's rate is not known; 0.1 is that of earlier
            work on BERT.
        targets, exclude: see :func:`~lossmith.sparsity.block_weights`.

    Raises:
        ValueError: sparsity not in [0, 1), rate not in (0, 1).
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must lie in [0, 1), got {sparsity}")
    if not 0 < rate < 1:
        raise ValueError(f"rate must lie in (0, 1), got {rate}")
    masks: Masks = {}
    density = 1.0
    while not masks or density > 1 - sparsity:
        density = max(1 - sparsity, density * (1 - rate))
        ticket = copy.deepcopy(model) if isinstance(model, nn.Module) else model()
        masks = masks or {
            name: torch.ones_like(weight, dtype=torch.bool)
            for name, weight in block_weights(ticket, targets=targets, exclude=exclude).weights.items()
        }
        apply_masks(ticket, masks, hold=True)
        finetune(ticket)
        release_masks(ticket)
        number = sum(mask.numel() for mask in masks.values())
        # What is gone is below every weight that is left, also one that is 0.
        ranks = {
            name: torch.where(mask, torch.nextafter(_float32(ticket, name), torch.tensor(torch.inf)), 0.0)
            for name, mask in masks.items()
        }
        masks = _remove(ranks, round((1 - density) * number))
    return masks


def _float32(model: nn.Module, name: str) -> Tensor:
    return model.get_parameter(name).detach().abs().float().cpu()


@dataclass(frozen=True, slots=True)
class Sparsification:
    """Shares of small weights along a training.

    Attributes:
        names: of the checkpoints, in their order.
        threshold: a weight below it is small.
        shares: of all prunable weights, by checkpoint.
        layers: the same of each matrix.
    """

    names: tuple[str, ...]
    threshold: float
    shares: tuple[float, ...]
    layers: Mapping[str, tuple[float, ...]]

    @property
    def jump(self) -> tuple[str, float]:
        """Between which checkpoint and the one before the share grew most, and by how much."""
        steps = np.diff(self.shares)
        largest = int(np.argmax(steps))
        return self.names[largest + 1], float(steps[largest])

    def summary(self) -> str:
        """A line per checkpoint, and the largest jump."""
        lines = [
            f"{name}  {share:.2%} below {self.threshold:.4g}"
            for name, share in zip(self.names, self.shares, strict=True)
        ]
        name, size = self.jump
        return "\n".join([*lines, f"largest jump: {size:+.2%} at {name}"])


def sparsification(
    checkpoints: Mapping[str, Mapping[str, Tensor]],
    *,
    share: float = 0.5,
    scale_free: bool = False,
) -> Sparsification:
    """How many weights were small at each checkpoint of *one* run: does the model become sparse at once?

    The threshold is the magnitude that removes ``share`` of the weights of the last checkpoint, the same for all: it
    tells drift to zero, which a quantile of each checkpoint could not.

    Args:
        checkpoints: by name, in order, matrices by name, such as ``block_weights(model).weights`` or
            :func:`~lossmith.sparsity.open_weights`, which reads one matrix at a time.
        share: of the last checkpoint, in (0, 1).
        scale_free: divide each matrix by its root mean square first.

    >>> early, late = torch.ones(2, 8), torch.tensor([[0.0] * 8, [1.0] * 8])
    >>> sparsification({"1": {"w": early}, "2": {"w": late}}).shares
    (0.0, 0.5)
    """
    if len(checkpoints) < 2:
        raise ValueError(f"at least 2 checkpoints are needed, got {len(checkpoints)}")
    if not 0 < share < 1:
        raise ValueError(f"share must lie in (0, 1), got {share}")
    names = tuple(checkpoints)
    matrices = list(checkpoints[names[-1]])
    for name in names:
        if set(checkpoints[name]) != set(matrices):
            odd = sorted(set(checkpoints[name]) ^ set(matrices))[0]
            raise ValueError(f"checkpoint {name} and {names[-1]} do not have the same matrices: {odd}")

    def size(checkpoint: str, matrix: str) -> np.ndarray:
        value = checkpoints[checkpoint][matrix].detach().abs().float().cpu()
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{matrix} of checkpoint {checkpoint} has weights that are NaN or infinite")
        return (value / value.square().mean().sqrt().clamp_min(1e-30) if scale_free else value).numpy()

    search = KthSmallest(max(1, round(share * sum(checkpoints[names[-1]][m].numel() for m in matrices))))
    while not search.done:
        for matrix in matrices:
            search.see(size(names[-1], matrix))
        search.close()
    # Among equal ones at the threshold all are small.
    threshold, counts, numbers = search.value, np.zeros((len(names), len(matrices))), np.zeros(len(matrices))
    for i, name in enumerate(names):
        for j, matrix in enumerate(matrices):
            value = size(name, matrix)
            counts[i, j], numbers[j] = np.count_nonzero(value <= threshold), value.size
    layers = {m: tuple((counts[:, j] / numbers[j]).tolist()) for j, m in enumerate(matrices)}
    return Sparsification(names, threshold, tuple((counts.sum(axis=1) / numbers.sum()).tolist()), layers)
