"""When a student should write new responses, and when old ones or the data set's will do."""

from __future__ import annotations

from collections import deque
from typing import Literal

import torch

from lossmith.errors import InputError

Source = Literal["generate", "replay", "dataset"]


class ReplaySchedule:
    r"""Adaptive off-policy schedule: the student writes more when validation stops improving, less towards the end.

    In each step ``u`` is drawn from [0, 1). With the threshold ``φ``, and ``s`` the part of training that is done:

    ========================================== ======================================
    ``u < φ (1 - s)``, or ``u < φ`` and the    new responses, which go into the
    buffer is not full                         buffer
    else ``u < φ``                             responses drawn from the buffer
    else                                       the data set's
    ========================================== ======================================

    After a validation whose loss is not less than the lowest so far plus ``tolerance``, ``φ`` grows by ``increase``.

    Args:
        threshold: ``φ`` at first. With 0 the student writes nothing until validation gets worse.
        capacity: sequences kept; the oldest go first.
        increase: see above.
        tolerance: see above.

    Random choices come from torch's global generator. The buffer is not part of a checkpoint: a resumed run begins with
    an empty one.

    Source: Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models", 2024, arXiv 2402.03898,
    its released code.

    >>> schedule = ReplaySchedule(threshold=1.0, capacity=2)
    >>> schedule.choose()
    'generate'
    """

    def __init__(self, threshold: float = 0.2, *, capacity: int = 1000, increase: float = 0.1, tolerance: float = 0.1):
        if not 0 <= threshold <= 1:
            raise InputError(f"threshold must lie between 0 and 1, got {threshold}")
        if capacity < 1:
            raise InputError(f"capacity must be at least 1, got {capacity}")
        if not (0 <= increase <= 1 and 0 <= tolerance < float("inf")):
            raise InputError(
                f"increase must lie between 0 and 1 and tolerance be a finite number >= 0, got {increase}, {tolerance}"
            )
        self.threshold, self.increase, self.tolerance = threshold, increase, tolerance
        self.buffer: deque[tuple[list[int], list[int]]] = deque(maxlen=capacity)
        #: The part of training that is done, from 0 to 1.
        self.progress = 0.0
        self._lowest = float("inf")

    def choose(self) -> Source:
        """Where the next batch's responses come from."""
        draw = float(torch.rand(()))
        full = len(self.buffer) == self.buffer.maxlen
        if draw < self.threshold * (1 - self.progress) or (draw < self.threshold and not full):
            return "generate"
        return "replay" if draw < self.threshold else "dataset"

    def add(self, prompts: list[list[int]], responses: list[list[int]]) -> None:
        """Keep what the student wrote."""
        self.buffer.extend(zip(prompts, responses, strict=True))

    def draw(self, number: int) -> tuple[list[list[int]], list[list[int]]]:
        """So many prompts and responses from the buffer, with replacement where it holds fewer."""
        if not self.buffer:
            raise ValueError("the buffer is empty")
        if number <= len(self.buffer):
            chosen = torch.randperm(len(self.buffer))[:number].tolist()
        else:
            chosen = torch.randint(len(self.buffer), (number,)).tolist()
        pairs = [self.buffer[i] for i in chosen]
        return [p for p, _ in pairs], [r for _, r in pairs]

    def observe(self, validation_loss: float) -> None:
        """Tell the loss of a validation."""
        if validation_loss >= self._lowest + self.tolerance:
            self.threshold = min(1.0, self.threshold + self.increase)
        self._lowest = min(self._lowest, validation_loss)
