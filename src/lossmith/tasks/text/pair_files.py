"""Labelled pairs of texts in TSV, CSV and JSONL files."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lossmith.errors import InputError
from lossmith.files import read_utf8

# What the usual corpora call their columns: GLUE, MSRP, QQP, SNLI, PAWS.
FIRST = ("sentence1", "#1 String", "question1", "premise", "text_a", "first", "sentence_A")
SECOND = ("sentence2", "#2 String", "question2", "hypothesis", "text_b", "second", "sentence_B")
LABEL = ("label", "Quality", "is_duplicate", "gold_label", "entailment_judgment")


class Pair(NamedTuple):
    """Two texts and their label (``"1"`` and ``"0"`` for paraphrases, or any names)."""

    first: str
    second: str
    label: str


def read_pairs(
    path: str | Path, *, first: str | None = None, second: str | None = None, label: str | None = None
) -> list[Pair]:
    """Read a table with a header: ``.tsv`` or ``.txt`` (tabs; quotes are plain characters), ``.csv``, or ``.jsonl``.

    Args:
        path: the file, UTF-8, with or without a byte order mark.
        first, second, label: names of the columns; by default those of GLUE (``sentence1``, ``sentence2``, ``label``),
            MSRP (``#1 String``, ``#2 String``, ``Quality``), QQP, SNLI, SICK and PAWS are known.

    Raises:
        InputError: no such file, another ending, an unknown or missing column, a line with too few columns or an empty
            label (the line is named), no pairs.
    """
    path = Path(path)
    if path.suffix not in (".tsv", ".txt", ".csv", ".jsonl"):
        raise InputError(
            f"{path}: pairs are read from .tsv (or .txt), .csv and .jsonl files, got '{path.suffix or path.name}'"
        )
    text = read_utf8(path, "pairs file", encoding="utf-8-sig")
    chosen: list[str] | None = None
    pairs: list[Pair] = []
    for line, record in _records(path, text):
        if chosen is None:
            wanted = (("first", first, FIRST), ("second", second, SECOND), ("label", label, LABEL))
            chosen = [_column(path, record, *option) for option in wanted]
        missing = [name for name in chosen if record.get(name) is None or not str(record[name]).strip()]
        if missing:
            raise InputError(f"{path}:{line}: the column '{missing[0]}' is missing or empty")
        pairs.append(Pair(*(str(record[name]) for name in chosen)))
    if not pairs:
        raise InputError(f"pairs file {path} holds no pairs")
    return pairs


def _records(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise InputError(f"{path}:{number}: not JSON ({error})") from None
            if not isinstance(record, dict):
                raise InputError(f"{path}:{number}: must be a JSON object, got {type(record).__name__}")
            yield number, record
        return
    # Not splitlines: texts may hold separators that only Unicode calls line ends.
    lines = text.split("\n")
    if path.suffix in (".tsv", ".txt"):
        rows = csv.reader((line.rstrip("\r") for line in lines), delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        rows = csv.reader(line + "\n" for line in lines)
    header: list[str] | None = None
    try:
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            if header is None:
                header = [name.strip() for name in row]
            elif len(row) != len(header):
                raise InputError(f"{path}:{rows.line_num}: {len(row)} columns, but the header has {len(header)}")
            else:
                yield rows.line_num, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise InputError(f"{path}:{rows.line_num}: not readable as a table ({error})") from None


def _column(path: Path, record: Mapping[str, Any], option: str, name: str | None, known: Sequence[str]) -> str:
    there = ", ".join(str(key) for key in record)
    if name is not None:
        if name not in record:
            raise InputError(f"{path} has no column '{name}' ({option}), only: {there}")
        return name
    for candidate in known:
        if candidate in record:
            return candidate
    raise InputError(f"{path}: say which column is {option}; it has {there}")
