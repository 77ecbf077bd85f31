"""Cutting long texts into passages, so that one large file still has documents to split and shuffle."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

BLANK_LINE = re.compile(r"\n[ \t]*\n+")
LINE_END = re.compile(r"\n")
# A blank line before something that starts in the first column: between two top-level statements of Python.
TOP_LEVEL = re.compile(r"\n[ \t]*\n+(?=[A-Za-z_@#])")

PASSAGE_CHARACTERS = 4000


class Passage(NamedTuple):
    """A piece of a longer text and the number (from 1) of the line where it starts."""

    text: str
    line: int


def passages(
    pieces: Iterable[str],
    *,
    size: int = PASSAGE_CHARACTERS,
    borders: tuple[re.Pattern[str], ...] = (BLANK_LINE, LINE_END),
) -> Iterator[Passage]:
    """Cut a text, given as a stream of pieces, into passages of about ``size`` characters.

    A passage ends at the best of ``borders`` that is found, at its first place between ``size`` and
    ``1.5 * size`` characters or else its last between ``size / 2`` and ``size``; where there is none, after
    exactly ``size`` characters. Concatenating the passages gives back the text. What comes out depends on the
    text alone, not on how it was cut into pieces, and never more than ``1.5 * size`` characters and one piece
    are held.

    Args:
        pieces: the text in order, in pieces of any length.
        size: wished length in characters, at least 2.
        borders: patterns to cut behind, best first.

    >>> [p.text for p in passages(["one\\n\\ntwo\\n", "\\nthree"], size=4)]
    ['one\\n\\n', 'two\\n\\n', 'three']
    """
    longest = size + size // 2
    buffer, line = "", 1
    for piece in pieces:
        buffer += piece
        start = 0
        # Strictly longer, so that a text that just fits stays whole whether or not more pieces are announced.
        while len(buffer) - start > longest:
            end = _cut(buffer, start, size, longest, borders)
            text = buffer[start:end]
            yield Passage(text, line)
            line += text.count("\n")
            start = end
        buffer = buffer[start:]
    if buffer:
        yield Passage(buffer, line)


def _cut(text: str, start: int, size: int, longest: int, borders: tuple[re.Pattern[str], ...]) -> int:
    # The end of the search window may split a run of blank lines; the window is the same for every way of
    # cutting the text into pieces, so the result is too.
    for border in borders:
        if match := border.search(text, start + size, start + longest):
            return match.end()
        if found := list(border.finditer(text, start + size // 2, start + size)):
            return found[-1].end()
    return start + size
