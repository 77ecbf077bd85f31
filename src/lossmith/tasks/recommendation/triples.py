"""Drawing (user, positives, negative) for a whole batch at once, the same ones whatever the layout of the batch.

Random numbers are a function of the seed and the number of the example, not of what was drawn before: arms of a
comparison see the same users, positives and negatives, and so does a run that was resumed or cut into micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lossmith.errors import InputError
from lossmith.tasks.recommendation.interactions import Interactions

STREAMS = 1024
USER, NEGATIVE, CHOICE, POOL = 0, 1, 2, 3  # which of an example's random numbers is for what


@dataclass(frozen=True, slots=True)
class Triples:
    """A batch: users, for each a pool of interactions (places in the table) and their items, one negative item.

    ``choice`` is a uniform number per example, for whoever draws from the pool.
    """

    users: Int[Tensor, " batch"]
    pool: Int[Tensor, "batch pool"]
    items: Int[Tensor, "batch pool"]
    negatives: Int[Tensor, " batch"]
    choice: Float[Tensor, " batch"]


class TripleSource:
    """Draws examples by their numbers.

    Args:
        interactions: the positives.
        seed: of everything.
        by_interaction: draw users as often as they have interactions, instead of all equally often.

    A negative is drawn uniformly from the items that the user has not used, in one look-up, without rejection.

    Raises:
        InputError: a user has used every item, so that there is no negative.

    >>> table = Interactions.from_pairs("aabb", "xyyz")
    >>> TripleSource(table).draw(torch.arange(4), 2).items.shape
    torch.Size([4, 2])
    """

    def __init__(self, interactions: Interactions, *, seed: int = 0, by_interaction: bool = False):
        counts, n_items = interactions.counts, len(interactions.items)
        if len(interactions) == 0:
            raise InputError("there are no interactions")
        if (full := np.flatnonzero(counts >= n_items)).size:
            raise InputError(
                f"user '{interactions.users[full[0]]}' has used all {n_items} items (as have {full.size - 1} others): "
                "there is no item left to contrast with; leave such users out"
            )
        self.seed, self.n_items, self.n_interactions = int(seed), n_items, len(interactions)
        self.by_interaction = by_interaction
        rows = interactions.rows
        within = np.arange(len(rows)) - interactions.indptr[rows]
        # For each positive, the number of its user's unused items below it; ascending over the whole table.
        unused_below = rows * (n_items + 1) + interactions.indices - within
        self._tensors = {
            "indptr": torch.from_numpy(interactions.indptr),
            "counts": torch.from_numpy(counts),
            "indices": torch.from_numpy(interactions.indices),
            "rows": torch.from_numpy(rows),
            "unused_below": torch.from_numpy(unused_below),
            "users": torch.from_numpy(np.flatnonzero(counts)),
        }

    def draw(self, example: Int[Tensor, " batch"], pool_size: int = 1) -> Triples:
        """The examples of these numbers, with ``pool_size`` positives of the user each.

        Positives are distinct where the user has as many, else drawn with replacement.
        """
        if not 1 <= pool_size <= STREAMS - POOL:
            raise ValueError(f"pool_size must be between 1 and {STREAMS - POOL}, got {pool_size}")
        t = self._on(example.device)
        chance = uniform(self.seed, example, POOL + pool_size)
        if self.by_interaction:
            users = t["rows"][_below(chance[:, USER], len(t["rows"]))]
        else:
            users = t["users"][_below(chance[:, USER], len(t["users"]))]
        counts = t["counts"][users]
        pool = _subsets(chance[:, POOL:], counts) + t["indptr"][users].unsqueeze(-1)
        negatives = self.nth_unused(users, _below(chance[:, NEGATIVE], self.n_items - counts))
        return Triples(users, pool, t["indices"][pool], negatives, chance[:, CHOICE])

    def negatives(self, users: Int[Tensor, " users"], each: int) -> Int[Tensor, "users each"]:
        """``each`` random unused items per user, with replacement; other ones than those of training."""
        chance = uniform(self.seed + 1, users, POOL + each)[:, POOL:]
        room = self.n_items - self._on(users.device)["counts"][users]
        return self.nth_unused(users.unsqueeze(-1), _below(chance, room.unsqueeze(-1)))

    def nth_unused(self, users: Int[Tensor, "*batch"], rank: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
        """The ``rank``-th item, counted from 0, that the user has not used."""
        t = self._on(rank.device)
        key = users * (self.n_items + 1) + rank
        return rank + torch.searchsorted(t["unused_below"], key, right=True) - t["indptr"][users]

    def _on(self, device: torch.device) -> dict[str, Tensor]:
        if self._tensors["rows"].device != device:
            self._tensors = {name: tensor.to(device) for name, tensor in self._tensors.items()}
        return self._tensors


def uniform(seed: int, example: Int[Tensor, " batch"], columns: int) -> Float[Tensor, "batch columns"]:
    """Numbers in [0, 1) that depend on seed, example and column alone: SplitMix64 as a counter-based generator."""
    counter = example.unsqueeze(-1) * STREAMS + torch.arange(1, columns + 1, device=example.device)
    bits = split_mix(counter * _signed(0x9E3779B97F4A7C15) + _signed(seed * 0xD1342543DE82EF95))
    return ((bits >> 11) & (2**53 - 1)).double() * 2.0**-53


def split_mix(z: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014), on int64 with wrap-around."""
    # A right shift of int64 copies the sign: the mask makes it logical.
    z = (z ^ ((z >> 30) & (2**34 - 1))) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ ((z >> 27) & (2**37 - 1))) * _signed(0x94D049BB133111EB)
    return z ^ ((z >> 31) & (2**33 - 1))


def _signed(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


def _below(chance: Tensor, limit: Tensor | int) -> Tensor:
    return (chance * limit).long()


def _subsets(chance: Float[Tensor, "batch pool"], counts: Int[Tensor, " batch"]) -> Int[Tensor, "batch pool"]:
    """Uniform subsets of ``range(count)`` by Floyd's algorithm; with replacement where the count is below the size."""
    size = chance.shape[1]
    enough = (counts >= size).unsqueeze(-1)
    last = counts.unsqueeze(-1) + torch.arange(-size, 0, device=counts.device)
    found = _below(chance, torch.where(enough, last + 1, counts.unsqueeze(-1)))
    for j in range(1, size):
        taken = (found[:, :j] == found[:, j : j + 1]).any(-1)
        found[:, j] = torch.where(taken & enough[:, 0], last[:, j], found[:, j])
    return found
