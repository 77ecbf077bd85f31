"""The order in which training examples are drawn."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class PermutationStream(Sampler[int]):
    """``total`` indices: one random permutation of all examples after another, the last one cut.

    The order depends on ``seed`` alone: not on the arm, the micro-batch size, the number of processes or the state of
    any global generator. There is no short batch between two passes.

    >>> list(PermutationStream(3, total=5, seed=0)) == list(PermutationStream(3, total=5, seed=0))
    True
    """

    def __init__(self, size: int, *, total: int, seed: int):
        if size < 1:
            raise ValueError(f"the data set must hold at least one example, got {size}")
        self.size, self.total, self.seed = size, total, seed

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        left, number = self.total, 0
        while left > 0:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            yield from torch.randperm(self.size, generator=generator)[:left].tolist()
            left, number = left - self.size, number + 1
