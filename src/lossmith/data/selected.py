"""From indices back to documents: a selected part of a corpus as a file, checked against what was scored."""

from __future__ import annotations

import gzip
import io
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import InputError
from ..files import replacing
from .corpus import read_corpus
from .scoring import document_hash


@dataclass(frozen=True, slots=True)
class Selection:
    """What was written.

    Attributes:
        path: the file.
        candidates: documents of the corpus.
        kept: documents in the file.
        domains: kept documents by domain, and all of them.
    """

    path: Path
    candidates: int
    kept: int
    domains: dict[str, tuple[int, int]]


def write_selection(
    source: str | os.PathLike[str],
    indices: Sequence[int] | np.ndarray,
    out: str | os.PathLike[str],
    *,
    scores: Sequence[float] | np.ndarray | None = None,
    hashes: Sequence[str] | np.ndarray | None = None,
    text_field: str = "text",
    domain_field: str | None = None,
) -> Selection:
    """Write the chosen documents, in the order of the corpus, as JSONL with ``text, domain, source, index, score``.

    Args:
        source: see :func:`~lossmith.data.read_corpus`.
        indices: which documents, in any order.
        out: a ``.jsonl`` or ``.jsonl.gz`` file.
        scores: of every document.
        hashes: of every document as it was scored (``read_scores(...).column("hash")``).
        text_field: field of the text.
        domain_field: field of the domain.

    Raises:
        InputError: the corpus is not the one that was scored (number or hash of documents), or ``out`` has another
            ending. Then no file is written.

    >>> import tempfile, pathlib
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> _ = (folder / "two.jsonl").write_text('{"text": "one"}\\n{"text": "two"}\\n')
    >>> write_selection(folder / "two.jsonl", [1], folder / "selected.jsonl").kept
    1
    """
    out = Path(out)
    if not out.name.endswith((".jsonl", ".jsonl.gz")):
        raise InputError(f"out must end in .jsonl or .jsonl.gz, got {str(out)!r}")
    wanted = {int(i) for i in indices}
    everything: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    number = 0
    documents = read_corpus(source, text_field=text_field, domain_field=domain_field)
    with replacing(out) as temporary, _text_file(temporary, compressed=out.suffix == ".gz") as stream:
        for number, document in enumerate(documents, 1):
            index = number - 1
            if hashes is not None and (index >= len(hashes) or document_hash(document.text) != hashes[index]):
                what = "has more documents than" if index >= len(hashes) else f"differs, at document {index}, from what"
                raise InputError(f"{source}: the corpus {what} was scored ({len(hashes)}); score it again")
            everything[document.domain] += 1
            if index in wanted:
                kept[document.domain] += 1
                row: dict[str, Any] = {"text": document.text, "domain": document.domain, "source": document.source}
                row["index"] = index
                if scores is not None:
                    row["score"] = float(scores[index]) if math.isfinite(scores[index]) else None
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        if hashes is not None and number != len(hashes):
            raise InputError(f"{source}: the corpus has {number} documents, scored were {len(hashes)}; score it again")
        if wanted and max(wanted) >= number:
            raise InputError(f"{source}: index {max(wanted)} was selected, the corpus has {number} documents")
    domains = {name: (kept[name], everything[name]) for name in sorted(everything)}
    return Selection(out, number, sum(kept.values()), domains)


@contextmanager
def _text_file(path: Path, *, compressed: bool) -> Iterator[IO[str]]:
    if not compressed:
        with path.open("w", encoding="utf-8") as stream:
            yield stream
        return
    # No time and no name inside, so that the same selection gives the same bytes.
    with (
        path.open("wb") as raw,
        gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed,
        io.TextIOWrapper(packed, encoding="utf-8") as stream,
    ):
        yield stream
