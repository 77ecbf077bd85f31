"""The k smallest of more numbers than fit into memory, exactly."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class KthSmallest:
    """Finds the ``k`` smallest of non-negative float32 numbers that are shown in pieces, twice.

    The bits of such numbers, read as integers, have the order of the numbers: the first pass counts their upper
    halves, the second the lower halves of those in the bin that holds the ``k``-th. The result is exact, with 64-bit
    counts and memory for 65,536 of them. Of equal numbers those shown first are the smaller ones.

    >>> search, numbers = KthSmallest(2), np.array([3, 1, 1, 2, 1], np.float32)
    >>> while not search.done:
    ...     search.see(numbers)
    ...     search.close()
    >>> search.smaller(numbers).tolist()
    [False, True, True, False, False]
    """

    def __init__(self, k: int):
        if k < 0:
            raise ValueError(f"k must be at least 0, got {k}")
        self.k, self.done = k, k == 0
        self._rest = k
        self._upper: int | None = None
        self._threshold = -1
        self._counts = np.zeros(1 << 16, dtype=np.int64)

    @property
    def value(self) -> float:
        """The ``k``-th smallest number; of ``k = 0`` zero."""
        return float(np.array([max(self._threshold, 0)], np.uint32).view(np.float32)[0])

    def see(self, numbers: NDArray[np.float32]) -> None:
        """Count a piece."""
        bits = _bits(numbers)
        if self._upper is not None:
            bits = bits[bits >> 16 == self._upper] & 0xFFFF
        else:
            bits = bits >> 16
        self._counts += np.bincount(bits, minlength=1 << 16)

    def close(self) -> None:
        """End a pass.

        Raises:
            ValueError: fewer than ``k`` numbers were shown.
        """
        below = np.cumsum(self._counts)
        if below[-1] < self._rest:
            raise ValueError(f"{self.k} numbers were asked for, {below[-1]} were shown")
        found = int(np.searchsorted(below, self._rest))
        self._rest -= int(below[found] - self._counts[found])
        self._counts = np.zeros(1 << 16, dtype=np.int64)
        if self._upper is None:
            self._upper = found
        else:
            self._threshold, self.done = self._upper << 16 | found, True

    def smaller(self, numbers: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Which of a piece are among the ``k`` smallest; pieces in the order of the passes."""
        bits = _bits(numbers)
        result: NDArray[np.bool_] = bits < self._threshold
        equal = np.flatnonzero(bits == self._threshold)[: self._rest]
        self._rest -= len(equal)
        result[equal] = True
        return result.reshape(numbers.shape)


def _bits(numbers: NDArray[np.float32]) -> NDArray[np.int64]:
    return np.ascontiguousarray(numbers, dtype=np.float32).reshape(-1).view(np.uint32).astype(np.int64)
