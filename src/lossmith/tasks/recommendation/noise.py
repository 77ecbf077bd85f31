"""False positives on purpose, held-out parts, and feedback whose noise is known."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lossmith.errors import InputError
from lossmith.tasks.recommendation.interactions import Interactions, unused_items


def split_interactions(
    interactions: Interactions, *, train: float = 0.7, test: float = 0.2, least: int = 10, seed: int = 0
) -> tuple[Interactions, Interactions, Interactions]:
    """A random split of each user's items: training, validation (the rest), test.

    Args:
        interactions: of users, all of whom keep their numbers.
        train: share of each user's items, rounded down, but at least one.
        test: share of each user's items, rounded down.
        least: users with fewer items are left out of all parts.
        seed: of the split.

    The shares and ``least`` are those of the released code of "Personalized Denoising Implicit Feedback".

    >>> table = Interactions.from_pairs(["a"] * 10, range(10))
    >>> [len(part) for part in split_interactions(table)]
    [7, 1, 2]
    """
    if not (0 < train <= 1 and 0 <= test < 1 and train + test <= 1 + 1e-12):
        raise InputError(f"train and test must be shares whose sum is at most 1, got {train} and {test}")
    counts = interactions.counts
    if not (counts >= max(1, least)).any():
        raise InputError(f"no user has {least} interactions or more (the most is {counts.max()})")
    rows = interactions.rows
    # A random order within each user.
    order = np.lexsort([np.random.default_rng(seed).random(len(rows)), rows])
    place = np.arange(len(rows)) - interactions.indptr[rows]
    n = counts[rows]
    # A product such as 0.7 * 10 must not fall below the whole number that it is.
    n_train, n_test = np.maximum(np.floor(train * n + 1e-9), 1), np.floor(test * n + 1e-9)
    part = np.where(place < n_train, 0, np.where(place < n_train + n_test, 2, 1))
    part[n < least] = -1
    items = interactions.indices[order]
    first, second, third = (interactions.with_pairs(rows[part == p], items[part == p]) for p in range(3))
    return first, second, third


def inject_noise(
    interactions: Interactions, ratio: float, *, exclude: Interactions | None = None, seed: int = 0
) -> tuple[Interactions, npt.NDArray[np.bool_]]:
    """Add ``floor(ratio * n)`` random unused items to each user with ``n`` items.

    Args:
        interactions: the true ones.
        ratio: noise per true interaction.
        exclude: interactions, by the same numbers, that are not noise either (a test table). The released code leaves
            them in, so that some of its noise is not.
        seed: of the noise.

    Returns:
        The larger table, and which of its interactions are noise. A user who has nearly all items gets fewer.

    >>> noisy, is_noise = inject_noise(Interactions.from_pairs("aaab", "wxyz"), 0.5)
    >>> len(noisy), int(is_noise.sum())
    (5, 1)
    """
    if not 0 <= ratio < math.inf:
        raise InputError(f"the noise ratio must be a finite number >= 0, got {ratio}")
    if exclude is not None and (exclude.users, exclude.items) != (interactions.users, interactions.items):
        raise InputError("exclude must have the same users and items as the interactions")
    draw, rows, items = np.random.default_rng(seed), [], []
    for u, count in enumerate(interactions.counts):
        used = interactions.items_of(u)
        if exclude is not None:
            used = np.union1d(used, exclude.items_of(u))
        room = len(interactions.items) - len(used)
        extra = min(math.floor(ratio * count + 1e-9), room)
        if extra:
            items.append(unused_items(used, np.sort(draw.choice(room, extra, replace=False))))
            rows.append(np.full(extra, u))
    if not rows:
        return interactions, np.zeros(len(interactions), bool)
    added = interactions.with_pairs(np.concatenate(rows), np.concatenate(items))
    noisy = interactions.with_pairs(
        np.concatenate([interactions.rows, added.rows]), np.concatenate([interactions.indices, added.indices])
    )
    return noisy, added.contains(noisy.rows, noisy.indices)


@dataclass(frozen=True, slots=True, eq=False)
class SyntheticFeedback:
    """Feedback of users whose tastes are known: training table with noise, which of it is noise, test table."""

    train: Interactions
    noisy: npt.NDArray[np.bool_]
    test: Interactions


def synthetic_feedback(
    users: int = 600,
    items: int = 800,
    *,
    per_user: int = 40,
    noise: float = 0.3,
    factors: int = 8,
    spread: float = 0.0,
    seed: int = 0,
) -> SyntheticFeedback:
    """Users pick by taste, popularity and chance; false positives are added at random.

    Args:
        users: how many.
        items: how many.
        per_user: items that each user picks; 70 % are for training, 20 % for the test.
        noise: false positives per training interaction.
        factors: of the tastes.
        spread: how much users differ in how predictable they are: the standard deviation of the logarithm of the
            strength of their taste.
        seed: of everything.

    >>> feedback = synthetic_feedback(50, 100, per_user=10)
    >>> len(feedback.train), int(feedback.noisy.sum()), len(feedback.test)
    (450, 100, 100)
    """
    if not 1 <= per_user < items:
        raise InputError(f"per_user must be at least 1 and below the number of items, {items}, got {per_user}")
    draw = np.random.default_rng(seed)
    tastes = draw.standard_normal((users, factors)) * np.exp(spread * draw.standard_normal((users, 1)))
    liking = tastes @ draw.standard_normal((items, factors)).T / math.sqrt(factors) * 2
    # Adding Gumbel noise and taking the best draws without replacement from the softmax.
    liking += draw.standard_normal(items) + draw.gumbel(size=(users, items))
    picked = np.argpartition(-liking, per_user, axis=1)[:, :per_user]
    every = Interactions.from_pairs(
        np.repeat(np.arange(users), per_user),
        picked.ravel(),
        known_users=[str(u) for u in range(users)],
        known_items=[str(i) for i in range(items)],
    )
    train, _, test = split_interactions(every, least=1, seed=seed + 1)
    noisy, is_noise = inject_noise(train, noise, exclude=every, seed=seed + 2)
    return SyntheticFeedback(noisy, is_noise, test)
