"""From documents of any length to rows of at most ``sequence_length`` tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from ..errors import InputError, did_you_mean

# How much is looked at together to find good fits: more packs tighter, in more memory.
_BLOCK_PIECES, _BLOCK_TOKENS, _ALL_TOKENS = 4096, 1 << 20, 1 << 22


class Row(NamedTuple):
    """``tokens`` (int32), the lengths of the segments they consist of, and the domain."""

    tokens: np.ndarray
    segments: list[int]
    domain: int


Documents = Iterable[tuple[np.ndarray, int]]  # token ids and domain


def pack(documents: Documents, sequence_length: int, packing: str = "isolated") -> Iterator[Row]:
    """Turn documents into rows. In every convention each token of a document but its first is predicted once.

    To that end the pieces of a cut document overlap by one token: the last of a piece is the first, given
    but not predicted, of the next. Rows never mix domains.

    - ``"isolated"``: documents longer than a row are cut; pieces share a row (best fit, longest first, among
      the few thousand at hand), each as a segment of its own: attention and positions restart, and its first
      token is never predicted from the segment before.
    - ``"concatenated"``: the convention of GPT: the documents of a domain are joined and cut every
      ``sequence_length`` tokens; one segment per row, attention crosses documents. Where start and end token
      are the same, there is one between two documents.
    - ``"none"``: one piece per row.

    Args:
        documents: pairs of token ids (start token, text, end token) and domain.
        sequence_length: longest row, at least 2.
        packing: one of the above.

    >>> rows = pack([(np.arange(5), 0), (np.arange(2), 0)], 4)
    >>> [(row.tokens.tolist(), row.segments) for row in rows]
    [([0, 1, 2, 3], [4]), ([3, 4, 0, 1], [2, 2])]
    """
    check_packing(packing, sequence_length)
    return PACKINGS[packing](documents, sequence_length)


def check_packing(packing: str, sequence_length: int) -> None:
    """Raise unless :func:`pack` knows the convention and can cut to the length."""
    if packing not in PACKINGS:
        raise InputError(f"packing: unknown {packing!r}; {did_you_mean(str(packing), PACKINGS)}")
    if isinstance(sequence_length, bool) or not isinstance(sequence_length, int) or sequence_length < 2:
        raise InputError(f"sequence_length must be an integer of at least 2, got {sequence_length!r}")


def _cut(tokens: np.ndarray, length: int) -> Iterator[np.ndarray]:
    """Pieces of at most ``length`` tokens, each beginning with the last token of the one before."""
    for start in range(0, max(len(tokens) - 1, 1), length - 1):
        yield tokens[start : start + length]


def _one_piece_per_row(documents: Documents, length: int) -> Iterator[Row]:
    for tokens, domain in documents:
        for piece in _cut(tokens, length):
            yield Row(piece, [len(piece)], domain)


def _concatenated(documents: Documents, length: int) -> Iterator[Row]:
    rests: dict[int, np.ndarray] = {}
    for tokens, domain in documents:
        rest = rests.get(domain)
        if rest is not None:
            tokens = np.concatenate([rest, tokens[1:] if tokens[0] == rest[-1] else tokens])
        whole = max(len(tokens) - 1, 0) // (length - 1)
        for row in range(whole):
            start = row * (length - 1)
            yield Row(tokens[start : start + length], [length], domain)
        rests[domain] = tokens[whole * (length - 1) :].copy()  # a view would keep a long document alive
    for domain in sorted(rests):
        if len(rests[domain]) > 1:
            yield Row(rests[domain], [len(rests[domain])], domain)


def _isolated(documents: Documents, length: int) -> Iterator[Row]:
    blocks: dict[int, list[np.ndarray]] = {}
    sizes: dict[int, int] = {}
    for tokens, domain in documents:
        for piece in _cut(tokens, length):
            if len(piece) == length:
                yield Row(piece, [length], domain)
                continue
            blocks.setdefault(domain, []).append(piece.copy())
            sizes[domain] = sizes.get(domain, 0) + len(piece)
        if len(blocks.get(domain, ())) >= _BLOCK_PIECES or sizes.get(domain, 0) >= _BLOCK_TOKENS:
            yield from _best_fit(blocks.pop(domain), length, domain)
            del sizes[domain]
        elif sum(sizes.values()) >= _ALL_TOKENS:  # many domains
            largest = max(sizes, key=lambda domain: (sizes[domain], -domain))
            yield from _best_fit(blocks.pop(largest), length, largest)
            del sizes[largest]
    for domain in sorted(blocks):
        yield from _best_fit(blocks[domain], length, domain)


def _best_fit(pieces: list[np.ndarray], length: int, domain: int) -> Iterator[Row]:
    """Best fit decreasing: each piece, the longest first, goes where the least space is left."""
    bins: list[list[int]] = []
    by_space: list[list[int]] = [[] for _ in range(length + 1)]
    available = 0  # bit s is set where a bin with s places left exists
    for piece in sorted(range(len(pieces)), key=lambda i: -len(pieces[i])):
        need = len(pieces[piece])
        fitting = available >> need
        if fitting:
            space = need + (fitting & -fitting).bit_length() - 1
            chosen = by_space[space].pop()
            if not by_space[space]:
                available &= ~(1 << space)
            bins[chosen].append(piece)
        else:
            space, chosen = length, len(bins)
            bins.append([piece])
        by_space[space - need].append(chosen)
        available |= 1 << (space - need)
    for members in sorted(sorted(members) for members in bins):  # near the corpus' order
        segments = [pieces[i] for i in members]
        yield Row(np.concatenate(segments), [len(segment) for segment in segments], domain)


PACKINGS: dict[str, Callable[[Documents, int], Iterator[Row]]] = {
    "isolated": _isolated,
    "concatenated": _concatenated,
    "none": _one_piece_per_row,
}
