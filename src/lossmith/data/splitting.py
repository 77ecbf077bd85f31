"""One pass over a corpus: drop duplicates, draw the split, keep what is needed to read it again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from ..errors import InputError
from .formats import Document

# 64-bit offsets: a batch of long documents may hold more than the 2 GiB that 32-bit offsets reach.
_SCHEMA = pa.schema([("text", pa.large_string()), ("domain", pa.int32()), ("draw", pa.uint64())])
_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 512, 1 << 20


@dataclass(frozen=True)
class Spool:
    """The kept documents of a corpus in one compressed file, each with its split.

    Attributes:
        path: the file (Arrow IPC stream).
        domains: names in sorted order; a document's domain is an index into them.
        documents: how many were kept.
        duplicates: how many were dropped because an earlier one has the same words.
        digest: a hash of the documents' contents and domains, in order.
        thresholds: per domain, the largest draw that puts a document into the validation split.
    """

    path: Path
    domains: tuple[str, ...]
    documents: int
    duplicates: int
    digest: str
    thresholds: tuple[int, ...]
    _ranks: tuple[int, ...]

    def batches(self) -> Iterator[list[tuple[str, int, bool]]]:
        """Batches of ``(text, domain, is in validation)`` in the corpus' order."""
        with pa.OSFile(str(self.path), "rb") as file, pa.ipc.open_stream(file) as stream:
            for batch in stream:
                columns = (batch.column(name).to_pylist() for name in ("text", "domain", "draw"))
                rows = ((text, self._ranks[number], draw) for text, number, draw in zip(*columns, strict=True))
                yield [(text, domain, draw <= self.thresholds[domain]) for text, domain, draw in rows]


def content_digest(text: str) -> bytes:
    """16 bytes that are equal for texts that differ only in white space.

    >>> content_digest(" a  b\\n") == content_digest("a b")
    True
    """
    return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()


def split_draw(digest: bytes, split_seed: int) -> int:
    """A number, uniform over 64 bits, that depends on a document's content and the seed alone."""
    return int.from_bytes(hashlib.blake2b(digest + str(split_seed).encode(), digest_size=8).digest())


def spool(documents: Iterable[Document], path: Path, *, validation_fraction: float, split_seed: int) -> Spool:
    """Write the documents that no earlier one equals to ``path``, and draw the split.

    A document goes to validation if its draw is below ``validation_fraction``: so adding documents to a
    corpus never moves the others. The exception is a domain large enough to expect a document on a side and
    left without one there, and a corpus with an empty side: the document with the nearest draw is moved.

    Memory: 16 bytes (plus the set's overhead) per document kept, and one batch.

    Raises:
        lossmith.errors.InputError: for fewer than two different documents.
    """
    seen: set[bytes] = set()
    numbers: dict[str, int] = {}  # domain -> number in order of appearance
    draws: list[_Draws] = []
    duplicates = 0
    stream_digest = hashlib.blake2b(digest_size=16)
    with pa.OSFile(str(path), "wb") as file:
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        with pa.ipc.new_stream(file, _SCHEMA, options=options) as stream:
            texts: list[str] = []
            batch_domains: list[int] = []
            batch_draws: list[int] = []
            characters = 0

            def flush() -> None:
                nonlocal characters
                stream.write_batch(pa.record_batch([texts, batch_domains, batch_draws], schema=_SCHEMA))
                for column in (texts, batch_domains, batch_draws):
                    column.clear()
                characters = 0

            for document in documents:
                digest = content_digest(document.text)
                if digest in seen:
                    duplicates += 1
                    continue
                seen.add(digest)
                number = numbers.setdefault(document.domain, len(numbers))
                if number == len(draws):
                    draws.append(_Draws())
                draw = split_draw(digest, split_seed)
                draws[number].add(draw, validation_fraction)
                stream_digest.update(hashlib.blake2b(document.text.encode(), digest_size=16).digest())
                stream_digest.update(document.domain.encode() + b"\0")
                texts.append(document.text)
                batch_domains.append(number)
                batch_draws.append(draw)
                characters += len(document.text)
                if len(texts) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
                    flush()
            if texts:
                flush()
    if len(seen) < 2:
        raise InputError(
            f"data: a training and a validation split need at least 2 different documents, got {len(seen)}"
        )
    domains = tuple(sorted(numbers))
    rank = {name: position for position, name in enumerate(domains)}
    ranks = tuple(rank[name] for name in numbers)
    by_rank = sorted(zip(ranks, draws, strict=True), key=lambda item: item[0])
    thresholds = _thresholds([item[1] for item in by_rank], validation_fraction)
    return Spool(path, domains, len(seen), duplicates, stream_digest.hexdigest(), thresholds, ranks)


class _Draws:
    """What is remembered of a domain's draws: how many on either side, and the extremes."""

    def __init__(self) -> None:
        self.documents = self.validation = 0
        self.smallest, self.largest = 1 << 64, -1

    def add(self, draw: int, fraction: float) -> None:
        self.documents += 1
        self.validation += draw <= _threshold(fraction)
        self.smallest, self.largest = min(self.smallest, draw), max(self.largest, draw)


def _threshold(fraction: float) -> int:
    return int(fraction * 2.0**64) - 1


def _thresholds(draws: list[_Draws], fraction: float) -> tuple[int, ...]:
    thresholds = [_threshold(fraction)] * len(draws)
    for domain, drawn in enumerate(draws):
        if drawn.documents < 2:
            continue
        if drawn.validation == 0 and drawn.documents * fraction >= 1:
            thresholds[domain] = drawn.smallest
        if drawn.validation == drawn.documents and drawn.documents * (1 - fraction) >= 1:
            thresholds[domain] = drawn.largest - 1
    if all(drawn.smallest > threshold for drawn, threshold in zip(draws, thresholds, strict=True)):
        domain = min(range(len(draws)), key=lambda domain: draws[domain].smallest)
        thresholds[domain] = draws[domain].smallest
    if all(drawn.largest <= threshold for drawn, threshold in zip(draws, thresholds, strict=True)):
        domain = max(range(len(draws)), key=lambda domain: draws[domain].largest)
        thresholds[domain] = draws[domain].largest - 1
    return tuple(thresholds)
