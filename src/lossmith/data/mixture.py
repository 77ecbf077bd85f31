"""Drawing from several parts of a corpus in given shares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

from lossmith.errors import InputError


class MixtureSampler(Sampler[int]):
    """Indices of ``total`` examples of which every part has its share, as exactly as whole examples allow.

    The next example comes from the part that is furthest behind its share, counted in tokens where ``lengths`` are
    given: after any number of examples, and so in every batch, a part is less than one example away from its share
    (with two parts of equal lengths; with more parts or lengths, a few). Within a part, examples come in one random
    permutation after another.

    The order within a part depends on ``seed`` and the part's place alone: runs with other shares see the same
    examples of a part in the same order, so that they can be compared. It does not depend on batch size, processes or
    any global generator; iterating again gives the same, which is how a resumed run continues.

    Args:
        parts: for each part the indices of its examples.
        shares: non-negative, summing to 1; a part with share 0 may be empty.
        total: how many examples to draw.
        seed: of the permutations.
        lengths: tokens of every example of the data set, by index; without, examples count the same.

    Raises:
        lossmith.errors.InputError: shares that do not sum to 1 or do not belong to the parts, an empty part with a
        share.

    >>> sampler = MixtureSampler([range(100), range(100, 104)], [0.75, 0.25], total=8, seed=0)
    >>> [int(index >= 100) for index in sampler]
    [0, 0, 1, 0, 0, 0, 1, 0]
    """

    def __init__(
        self,
        parts: Sequence[Sequence[int]],
        shares: Sequence[float],
        *,
        total: int,
        seed: int,
        lengths: Sequence[int] | None = None,
    ):
        self.parts = [np.asarray(part, dtype=np.int64) for part in parts]
        self.shares = [float(share) for share in shares]
        self.total, self.seed = total, seed
        self.lengths = None if lengths is None else np.asarray(lengths, dtype=np.int64)
        if len(self.shares) != len(self.parts) or not self.parts:
            raise InputError(f"there are {len(self.parts)} parts but {len(self.shares)} shares")
        if not all(0 <= share <= 1 for share in self.shares) or abs(sum(self.shares) - 1) > 1e-9:
            raise InputError(
                f"shares must lie between 0 and 1 and sum to 1, got {', '.join(f'{s:g}' for s in self.shares)}"
            )
        for number, (part, share) in enumerate(zip(self.parts, self.shares, strict=True)):
            if share > 0 and len(part) == 0:
                raise InputError(f"part {number + 1} has share {share:g} but no examples")
        if self.lengths is not None:
            largest = max((int(part.max()) for part in self.parts if len(part)), default=-1)
            if len(self.lengths) <= largest:
                raise InputError(f"lengths has {len(self.lengths)} entries, but there is an example {largest}")
            if any((self.lengths[part] <= 0).any() for part in self.parts):
                raise InputError("lengths must be positive for every example of a part")

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        streams = [examples_of_part(part, number, self.seed) for number, part in enumerate(self.parts)]
        waiting = [next(stream) if share > 0 else -1 for stream, share in zip(streams, self.shares, strict=True)]
        drawn = [0] * len(self.parts)
        spent = 0
        for _ in range(self.total):
            # Aiming half an example ahead keeps both sides of a share equally near.
            behind = [
                share * (spent + self._length(index)) - tokens - 0.5 * self._length(index) if share > 0 else -np.inf
                for share, tokens, index in zip(self.shares, drawn, waiting, strict=True)
            ]
            chosen = max(range(len(behind)), key=behind.__getitem__)
            index = waiting[chosen]
            drawn[chosen] += self._length(index)
            spent += self._length(index)
            waiting[chosen] = next(streams[chosen])
            yield index

    def _length(self, index: int) -> int:
        return 1 if self.lengths is None else int(self.lengths[index])


def examples_of_part(part: np.ndarray, number: int, seed: int) -> Iterator[int]:
    """The examples of part ``number`` without end, in one random permutation after another."""
    turn = 0
    while True:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + turn) * 97 + number)
        yield from part[torch.randperm(len(part), generator=generator).numpy()].tolist()
        turn += 1
