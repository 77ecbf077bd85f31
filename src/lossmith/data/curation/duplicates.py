"""Near duplicates: found by MinHash, verified word by word."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from lossmith.errors import InputError

from .domain import Duplicates

_WORD = re.compile(r"\w+")


def shingles(text: str, size: int) -> set[bytes]:
    """All sequences of ``size`` consecutive words, in lower case; the whole text where it has fewer.

    >>> sorted(shingles("To be, or not", 3))
    [b'be or not', b'to be or']
    """
    words = _WORD.findall(text.lower())
    if len(words) <= size:
        return {" ".join(words).encode()}
    return {" ".join(words[i : i + size]).encode() for i in range(len(words) - size + 1)}


def jaccard(first: set[bytes], second: set[bytes]) -> float:
    """Size of what two sets share over the size of both together.

    >>> jaccard({b"a", b"b"}, {b"b", b"c"})
    0.3333333333333333
    """
    either = len(first | second)
    return len(first & second) / either if either else 1.0


class NearDuplicates:
    r"""An index of texts that finds, for a new one, the earlier one that it nearly equals.

    Candidates come from locality-sensitive hashing of MinHash signatures (the package ``datasketch``); each is then
    compared in full, so that nothing is dropped for a collision. A pair at the threshold itself is missed with a
    probability of some percent, one well above it hardly ever.

    Args:
        rules: size of shingles, number of permutations, similarity.
        fetch: gives the text that was added under an index: texts are not held in memory.

    Raises:
        InputError: ``datasketch`` is missing.

    >>> texts = ["a b c d e f g h i j k l m n o p q r s t u v", "a b c d e f g h i j k l m n o p q r s t u v w"]
    >>> index = NearDuplicates(Duplicates(), texts.__getitem__)
    >>> index.add(0, texts[0])
    >>> index.find(texts[1])
    (0, 0.9473684210526315)
    """

    def __init__(self, rules: Duplicates, fetch: Callable[[int], str]):
        try:
            import datasketch
        except ImportError:
            raise InputError("near duplicates need datasketch: pip install 'lossmith[curation]'") from None
        self.rules, self._fetch = rules, fetch
        # Candidates are verified: rather one too many than one too few.
        self._index: Any = datasketch.MinHashLSH(
            threshold=rules.similarity, num_perm=rules.permutations, weights=(0.1, 0.9)
        )
        self._empty: Any = datasketch.MinHash(num_perm=rules.permutations, hashfunc=_hash)
        self._last: tuple[str, set[bytes], Any] | None = None

    def find(self, text: str) -> tuple[int, float] | None:
        """The most similar earlier text that is similar enough, and how similar it is; the earliest of several."""
        mine, signature = self._signature(text)
        found: list[tuple[float, int]] = []
        for index in self._index.query(signature):
            similarity = jaccard(mine, shingles(self._fetch(index), self.rules.shingle))
            if similarity >= self.rules.similarity:
                found.append((-similarity, index))
        if not found:
            return None
        negative, index = min(found)
        return index, -negative

    def add(self, index: int, text: str) -> None:
        """Let later texts be compared with this one."""
        self._index.insert(index, self._signature(text)[1])

    def _signature(self, text: str) -> tuple[set[bytes], Any]:
        if self._last is None or self._last[0] is not text:
            mine = shingles(text, self.rules.shingle)
            signature = self._empty.copy()
            signature.update_batch(sorted(mine))
            self._last = (text, mine, signature)
        return self._last[1], self._last[2]


def _hash(value: bytes) -> int:
    import xxhash

    return int(xxhash.xxh32_intdigest(value))
