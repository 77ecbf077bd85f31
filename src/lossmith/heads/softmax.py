"""Cross entropy and its slope in one pass of softmax, in the memory of the logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SoftmaxKernel:
    """:func:`lossmith.losses.cross_entropy` on the logits of one chunk, which it overwrites."""

    ignore_index: int
    label_smoothing: float
    log_partition_penalty: float

    def check_targets(self, targets: Tensor, classes: int) -> None:
        """Name a class index that does not exist (on a CPU: elsewhere looking would wait for the device)."""
        if targets.device.type != "cpu" or targets.numel() == 0:
            return
        wrong = ((targets < 0) | (targets >= classes)) & (targets != self.ignore_index)
        if bool(wrong.any()):
            found = int(targets[wrong][0])
            raise ValueError(
                f"targets must be class indices in [0, {classes}) or ignore_index={self.ignore_index}, got {found}"
            )

    def values(self, logits: Tensor, targets: Tensor) -> Tensor:
        """One loss per row. Overwrites ``logits``; rows to ignore must have been taken out."""
        return self._losses(logits, targets)[0]

    def values_and_slopes_(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        r"""One loss per row, and its derivative by each logit, written over ``logits``.

        .. math:: \partial\ell/\partial o_k = (1 + 2\lambda \log Z)\, p_k - (1-\varepsilon) [k = c] -
        \varepsilon/C
        """
        losses, log_partition, probs = self._losses(logits, targets)
        if self.log_partition_penalty:
            probs.mul_((1 + 2 * self.log_partition_penalty * log_partition).unsqueeze(-1))
        if self.label_smoothing:
            probs.sub_(self.label_smoothing / logits.shape[-1])
        hit = torch.full((1, 1), self.label_smoothing - 1, dtype=probs.dtype, device=probs.device)
        probs.scatter_add_(-1, targets.long().unsqueeze(-1), hit.expand(targets.shape[0], 1))
        return losses, probs

    def _losses(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        expected = logits.gather(-1, targets.long().unsqueeze(-1)).squeeze(-1)
        if self.label_smoothing:
            expected = (1 - self.label_smoothing) * expected + self.label_smoothing * logits.mean(-1)
        largest = logits.amax(-1)
        probs = torch.softmax(logits, -1, out=logits)
        # The largest probability is 1 / sum_k exp(o_k - max): at least 1/C, so that its logarithm never
        # underflows.
        log_partition = largest - probs.amax(-1).log()
        losses = log_partition - expected
        if self.log_partition_penalty:
            losses = losses + self.log_partition_penalty * log_partition.square()
        # A row ruled out altogether has no distribution: -inf - (-inf), as in the plain formula.
        return losses.masked_fill(largest == -math.inf, math.nan), log_partition, probs
