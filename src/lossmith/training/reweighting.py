"""Dynamic reweighting for a training loop of your own, without the Trainer."""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn

from lossmith.data.weighting import LossWeighting, Schedule, Strategy
from lossmith.losses import cross_entropy


class DynamicReweightedLoss(nn.Module):
    r"""Weighted next-token loss of a batch, from logits and labels.

    .. math:: L = W \sum_{i\ \text{on this process}} \mathrm{stopgrad}(w_i)\, \ell_i

    where :math:`\ell_i` is the mean cross entropy of sequence ``i`` and the weights are computed over the batches of
    all ``W`` processes. Averaging gradients over processes (DDP, FSDP) then gives the gradient of the global sum.

    Args:
        strategy: ``linupper``, ``quadratic``, ``extremes`` or ``linear``.
        r: temperature > 0, or a callable ``step -> r``.
        burn_in_steps: even weights for so many calls in training mode first.
        gather: gather losses over all processes of ``torch.distributed`` where it is initialised; ``False`` is
            another method (weights per process).
        ignore_index: target of tokens that do not count.

    Each call in training mode counts as a step. ``last_weights`` holds this process's weights of the last call. With
    gradient accumulation the weights are those of each micro-batch; :class:`lossmith.training.Trainer` does better.

    Source: Sow et al., 2025, arXiv 2502.06733.

    >>> criterion = DynamicReweightedLoss("linupper", r=0.4)
    >>> criterion(torch.zeros(2, 5, 3), torch.zeros(2, 5, dtype=torch.long))
    tensor(1.0986)
    """

    def __init__(
        self,
        strategy: Strategy = "linupper",
        r: Schedule = 0.4,
        *,
        burn_in_steps: int = 0,
        gather: bool = True,
        ignore_index: int = -100,
    ):
        super().__init__()
        self.weighting = LossWeighting(strategy, r, burn_in_steps=burn_in_steps)
        self.gather, self.ignore_index = gather, ignore_index
        self.last_weights: Tensor | None = None
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.step: Tensor

    def forward(
        self, logits: Float[Tensor, "sequences length classes"], labels: Int[Tensor, "sequences length"]
    ) -> Float[Tensor, ""]:
        """The loss to call ``backward`` on; labels are not shifted (the Hugging Face convention).

        Raises:
            ValueError: no sequence of the whole batch has a target, or a loss is not finite.
        """
        targets = labels[:, 1:]
        counts = (targets != self.ignore_index).sum(-1)
        rows = cross_entropy(logits[:, :-1], targets, ignore_index=self.ignore_index)
        losses = rows.sum(-1) / counts.clamp_min(1)
        world = dist.get_world_size() if self.gather and dist.is_available() and dist.is_initialized() else 1
        local = torch.stack([losses.detach().double(), counts.double()], dim=-1)
        every = [torch.empty_like(local) for _ in range(world)]
        if world > 1:
            dist.all_gather(every, local)
        else:
            every = [local]
        values, targets_of = torch.cat(every).unbind(-1)
        weights = torch.zeros_like(values)
        weights[targets_of > 0] = self.weighting(values[targets_of > 0], int(self.step))
        if self.training:
            self.step += 1
        rank = dist.get_rank() if world > 1 else 0
        self.last_weights = weights[rank * len(local) : (rank + 1) * len(local)].to(losses.dtype)
        return world * (self.last_weights * losses).sum()
