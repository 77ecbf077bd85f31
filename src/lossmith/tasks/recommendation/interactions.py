"""Who used what: the table of interactions that recommenders learn from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lossmith.errors import InputError

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Interactions:
    """Users, items, and the items of each user: row ``u`` holds ``indices[indptr[u]:indptr[u + 1]]``, ascending.

    Attributes:
        users: names of the rows.
        items: names of the columns.
        indptr: where each user's items begin.
        indices: items, user by user.
        merged: interactions that were given several times and count once.
        dropped_users: users that were given without any item.

    >>> table = Interactions.from_pairs(["ann", "bob", "ann"], ["x", "x", "y"])
    >>> len(table), table.users, table.items
    (3, ('ann', 'bob'), ('x', 'y'))
    """

    users: tuple[str, ...]
    items: tuple[str, ...]
    indptr: Indices
    indices: Indices
    merged: int = 0
    dropped_users: int = 0

    @classmethod
    def from_pairs(
        cls,
        users: Iterable[object],
        items: Iterable[object],
        *,
        known_users: Sequence[str] | None = None,
        known_items: Sequence[str] | None = None,
        dropped_users: int = 0,
    ) -> Interactions:
        """From two columns of equal length; names become strings and are numbered as they come.

        Args:
            users: one per interaction.
            items: one per interaction.
            known_users: numbers users by this list instead; users in the list may have no interaction.
            known_items: numbers items by this list instead.
            dropped_users: carried along.

        Raises:
            InputError: no interactions, columns of different lengths, or a name that is not in a given list.
        """
        user_names, item_names = _names(users, "user"), _names(items, "item")
        if len(user_names) != len(item_names):
            raise InputError(
                f"users and items must have the same length, got {len(user_names)} and {len(item_names)} entries"
            )
        if not user_names:
            raise InputError("there are no interactions")
        rows, every_user = _numbered(user_names, known_users, "user")
        columns, every_item = _numbered(item_names, known_items, "item")
        keys = np.unique(rows * len(every_item) + columns)
        rows, indices = keys // len(every_item), keys % len(every_item)
        return cls(
            every_user,
            every_item,
            _starts(rows, len(every_user)),
            indices,
            merged=len(user_names) - len(keys),
            dropped_users=dropped_users,
        )

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def rows(self) -> Indices:
        """The user of each interaction."""
        return np.repeat(np.arange(len(self.users)), self.counts)

    @property
    def counts(self) -> Indices:
        """Interactions of each user."""
        return np.diff(self.indptr)

    def items_of(self, user: int) -> Indices:
        """The items of one user, by number, ascending."""
        return self.indices[self.indptr[user] : self.indptr[user + 1]]

    def with_pairs(self, rows: Indices, indices: Indices) -> Interactions:
        """The same users and items with other interactions, by number."""
        keys = np.unique(np.asarray(rows, np.int64) * len(self.items) + np.asarray(indices, np.int64))
        rows, indices = keys // len(self.items), keys % len(self.items)
        return Interactions(self.users, self.items, _starts(rows, len(self.users)), indices)

    def renamed(self, other: Interactions) -> Interactions:
        """The interactions whose names ``other`` knows, by its numbers."""
        users = {name: i for i, name in enumerate(other.users)}
        items = {name: i for i, name in enumerate(other.items)}
        rows = np.array([users.get(name, -1) for name in self.users], np.int64)[self.rows]
        columns = np.array([items.get(name, -1) for name in self.items], np.int64)[self.indices]
        known = (rows >= 0) & (columns >= 0)
        return other.with_pairs(rows[known], columns[known])

    def contains(self, rows: Indices, indices: Indices) -> npt.NDArray[np.bool_]:
        """Whether each (user, item), by number, is here."""
        keys = self.rows * len(self.items) + self.indices
        wanted = np.asarray(rows, np.int64) * len(self.items) + np.asarray(indices, np.int64)
        place = np.searchsorted(keys, wanted)
        return (place < len(keys)) & (keys[np.minimum(place, len(keys) - 1)] == wanted) if len(keys) else wanted < 0

    def summary(self) -> str:
        """One line."""
        share = len(self) / max(1, len(self.users) * len(self.items))
        notes = [f"{self.merged} repeated"] * bool(self.merged)
        notes += [f"{self.dropped_users} users without items left out"] * bool(self.dropped_users)
        return f"{len(self.users)} users, {len(self.items)} items, {len(self)} interactions ({share:.2%})" + "".join(
            f"; {note}" for note in notes
        )


def unused_items(items: Indices, ranks: Indices) -> Indices:
    """The ``rank``-th of the numbers 0, 1, 2 ... that are not among ``items`` (ascending, distinct).

    >>> unused_items(np.array([0, 1, 4]), np.array([0, 1, 2])).tolist()
    [2, 3, 5]
    """
    # items[i] - i numbers lie below items[i] without being among them.
    return ranks + np.searchsorted(items - np.arange(len(items)), ranks, side="right")


def _names(given: Iterable[object], what: str) -> list[str]:
    names = []
    for place, name in enumerate(given):
        if name is None or name != name:  # NaN, as pandas has it
            raise InputError(f"the {what} of interaction {place} is missing")
        names.append(str(name))
    return names


def _numbered(names: list[str], known: Sequence[str] | None, what: str) -> tuple[Indices, tuple[str, ...]]:
    numbers: dict[str, int] = {name: i for i, name in enumerate(known)} if known is not None else {}
    if known is None:
        found = [numbers.setdefault(name, len(numbers)) for name in names]
    else:
        if strange := next((name for name in names if name not in numbers), None):
            raise InputError(f"{what} '{strange}' is not in the given list of {what}s")
        found = [numbers[name] for name in names]
    return np.array(found, np.int64), tuple(numbers)


def _starts(rows: Indices, users: int) -> Indices:
    return np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=users))]).astype(np.int64)
