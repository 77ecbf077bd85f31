"""Tagged sentences in CoNLL files: one word per line, its tag in the last column, an empty line after each sentence."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lossmith.errors import InputError
from lossmith.files import read_utf8

_TAG = re.compile(r"^(O|[BIESLU]-\S+)$")


@dataclass(frozen=True, slots=True)
class Sentence:
    """Words and their tags (``O``, ``B-person``, ``I-person``; also IOBES and BILOU)."""

    words: tuple[str, ...]
    tags: tuple[str, ...]


def read_conll(path: str | Path, *, column: int = -1) -> list[Sentence]:
    """Read a CoNLL file; columns are separated by tabs or spaces, ``-DOCSTART-`` lines and comments are skipped.

    Args:
        path: the file.
        column: which column holds the tag.

    Raises:
        InputError: no such file, not UTF-8, no sentences, or a line that has no tag or something else than a tag there
            (the line is named).
    """
    path = Path(path)
    text = read_utf8(path, "CoNLL file")
    sentences: list[Sentence] = []
    words: list[str] = []
    tags: list[str] = []
    for number, line in enumerate([*text.split("\n"), ""], 1):
        line = line.rstrip("\r")
        if not line.strip() or line.startswith("-DOCSTART-"):
            if words:
                sentences.append(Sentence(tuple(words), tuple(tags)))
                words, tags = [], []
            continue
        columns = line.split("\t") if "\t" in line else line.split()
        if len(columns) < 2:
            if line.startswith("#"):
                continue
            raise InputError(f"{path}, line {number}: a word and its tag are needed, got {line.strip()!r}")
        tag = columns[column].strip()
        if not _TAG.match(tag) and line.startswith("# "):
            continue  # a comment, not the word "#"
        if not _TAG.match(tag):
            raise InputError(f"{path}, line {number}: {tag!r} is no tag (O, B-type, I-type, ...)")
        words.append(columns[0])
        tags.append(tag)
    if not sentences:
        raise InputError(f"CoNLL file {path} holds no sentences")
    return sentences


def write_conll(path: str | Path, sentences: Sequence[Sentence]) -> None:
    """Write words and tags, separated by tabs."""
    from lossmith.files import write_text

    blocks = ["".join(f"{w}\t{t}\n" for w, t in zip(s.words, s.tags, strict=True)) for s in sentences]
    write_text(path, "\n".join(blocks))
