"""A corpus made ready for training: split, tokenised, packed, and kept in a cache."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ..errors import InputError
from .cache import cache_folder, publish, unfinished_folder
from .corpus import content_key, read_corpus
from .packing import Row, check_packing, pack
from .splitting import Spool, spool
from .tokenization import check_vocab_size, encode, load_tokenizer, tokenizer_key, train_tokenizer

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Raise it whenever the same documents and options would give other rows.
_FORMAT = 1
_TOKENIZER_TEXT = 20_000_000  # characters that a tokenizer is trained on, at most
_BATCH_ROWS = 1000
_SCHEMA = pa.schema(
    [
        ("input_ids", pa.list_(pa.int32())),
        ("segments", pa.list_(pa.int32())),
        ("domain", pa.int32()),
        ("index", pa.int64()),
    ]
)


@dataclass(frozen=True, eq=False)
class PreparedCorpus:
    """A corpus ready for training.

    Attributes:
        train: rows to train on, memory-mapped, in the corpus' order (not shuffled), with the columns
            ``input_ids`` (list of int32), ``segments`` (lengths of the row's segments, which sum to its
            length), ``domain`` (index into ``domains``) and ``index`` (the row's number).
        validation: rows to evaluate on; no document is in both.
        tokenizer: the tokenizer, with an end and a padding token.
        domains: names of the parts of the corpus, sorted.
        fingerprint: equal for equal contents and options.
        train_tokens: tokens in the rows of ``train`` (a token at which a document was cut counts twice).
        validation_tokens: tokens in the rows of ``validation``.
        validation_bytes: length of the validation documents in UTF-8: the sum of all validation losses (each
            token of a document is predicted once) over this is the loss per byte, comparable across
            tokenizers.
        documents: documents kept.
        duplicates: documents dropped because an earlier one has the same words.
        source: what was read.
        folder: where it is kept; :func:`load_prepared` opens it again.
    """

    train: datasets.Dataset
    validation: datasets.Dataset
    tokenizer: PreTrainedTokenizerBase
    domains: tuple[str, ...]
    fingerprint: str
    train_tokens: int
    validation_tokens: int
    validation_bytes: int
    documents: int
    duplicates: int
    source: str
    folder: Path


def prepare(
    source: str | os.PathLike[str] = "python",
    *,
    text_field: str = "text",
    domain_field: str | None = None,
    tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase | None = None,
    vocab_size: int = 2048,
    sequence_length: int = 128,
    packing: str = "isolated",
    validation_fraction: float = 0.05,
    cache_dir: str | os.PathLike[str] | None = None,
    split_seed: int = 0,
) -> PreparedCorpus:
    """Read, de-duplicate, split, tokenise and pack a corpus; from the cache if it has been done before.

    The corpus is streamed, so it may be larger than memory. Documents with the same words are kept once. The
    split is by document and drawn from the document's content and ``split_seed`` alone, so that no document
    is on both sides and none moves when others are added.

    Args:
        source: what :func:`~lossmith.data.read_corpus` reads; ``"python"`` is the embedded corpus.
        text_field: field or column of the text.
        domain_field: field or column of the domain's name.
        tokenizer: folder, hub id or instance; ``None`` trains byte-level BPE on (at most 20 million
            characters of) the training split.
        vocab_size: size of the tokenizer to train, at least 257; without effect on a given one.
        sequence_length: longest row in tokens, at least 2.
        packing: ``"isolated"``, ``"concatenated"`` or ``"none"``; see :func:`~lossmith.data.pack`.
        validation_fraction: share of the documents to evaluate on, between 0 and 1; each side gets at least
            one.
        cache_dir: where results are kept; else ``$LOSSMITH_CACHE``, else ``~/.cache/lossmith``.
        split_seed: another integer draws another split.

    Raises:
        lossmith.errors.InputError: for a bad option, an unreadable, empty or too small corpus, a tokenizer
            that cannot be loaded. Nothing is left behind.
    """
    check_packing(packing, sequence_length)
    _check_fraction(validation_fraction)
    if isinstance(split_seed, bool) or not isinstance(split_seed, int):
        raise InputError(f"split_seed must be an integer, got {split_seed!r}")
    if tokenizer is None:
        check_vocab_size(vocab_size)
    given = None if tokenizer is None else load_tokenizer(tokenizer)
    options = {
        "format": _FORMAT,
        "text_field": text_field,
        "domain_field": domain_field,
        "tokenizer": _training_key(vocab_size) if given is None else tokenizer_key(given),
        "sequence_length": sequence_length,
        "packing": packing,
        "validation_fraction": float(validation_fraction),
        "split_seed": split_seed,
    }
    documents = read_corpus(source, text_field=text_field, domain_field=domain_field)
    cache = cache_folder(cache_dir)
    key = content_key(source)
    if key is not None and (found := _open(cache / _fingerprint(key, options), given, str(source))):
        return found

    logger.info("preparing the corpus %s", source)
    started = time.monotonic()
    with unfinished_folder(cache) as work:
        spooled = spool(
            documents,
            work / "documents.arrow",
            validation_fraction=validation_fraction,
            split_seed=split_seed,
        )
        fingerprint = _fingerprint(key or spooled.digest, options)
        if key is None and (found := _open(cache / fingerprint, given, str(source))):
            return found
        ready = given or train_tokenizer(_training_texts(spooled), vocab_size=vocab_size)
        record = _write_rows(spooled, ready, work, sequence_length, packing)
        ready.save_pretrained(str(work / "tokenizer"))
        (work / "documents.arrow").unlink()
        record |= {"source": str(source), "options": options, "files": _sizes(work)}
        (work / "corpus.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        publish(work, cache / fingerprint, lambda folder: _record(folder) is not None)
    logger.info("prepared %d documents in %.1f s", spooled.documents, time.monotonic() - started)
    result = _open(cache / fingerprint, given, str(source))
    if result is None:
        raise OSError(f"the prepared corpus in {cache / fingerprint} was changed while it was being opened")
    return result


def load_prepared(folder: str | os.PathLike[str]) -> PreparedCorpus:
    """Open a corpus that :func:`prepare` made, by its ``folder``: what another process needs to train on it.

    Raises:
        lossmith.errors.InputError: where the folder does not hold a finished prepared corpus.
    """
    corpus = _open(Path(folder), None, None)
    if corpus is None:
        raise InputError(f"{os.fspath(folder)}: not the folder of a finished prepared corpus")
    return corpus


def _check_fraction(fraction: float) -> None:
    is_number = isinstance(fraction, (int, float)) and not isinstance(fraction, bool)
    if not is_number or not 0.0 < fraction < 1.0:
        raise InputError(f"validation_fraction must be a number between 0 and 1 (both excluded), got {fraction!r}")


def _training_key(vocab_size: int) -> str:
    import tokenizers

    return f"byte-level BPE {vocab_size} {tokenizers.__version__}"


def _fingerprint(key: str, options: dict[str, Any]) -> str:
    text = json.dumps([key, options], sort_keys=True)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _training_texts(spooled: Spool) -> Iterator[str]:
    """The training split, or an evenly spread sample of its documents where it is long."""
    total = sum(len(text) for batch in spooled.batches() for text, _, held_out in batch if not held_out)
    step = max(total / _TOKENIZER_TEXT, 1.0)
    position = 0.0
    for batch in spooled.batches():
        for text, _, held_out in batch:
            if not held_out:
                # One character in `step` is wanted: take a document whenever the count of those falls behind.
                position += len(text)
                if step == 1.0:
                    yield text
                elif position >= step * len(text):
                    position -= step * len(text)
                    yield text


def _write_rows(
    spooled: Spool, tokenizer: PreTrainedTokenizerBase, folder: Path, sequence_length: int, packing: str
) -> dict[str, Any]:
    record: dict[str, Any] = {
        "domains": spooled.domains, "documents": spooled.documents, "duplicates": spooled.duplicates,
        "validation_bytes": 0,
    }  # fmt: skip

    def encoded(wanted: bool) -> Iterator[tuple[Any, int]]:
        for batch in spooled.batches():
            chosen = [(text, domain) for text, domain, held_out in batch if held_out is wanted]
            if wanted:
                record["validation_bytes"] += sum(len(text.encode()) for text, _ in chosen)
            tokens = encode(tokenizer, [text for text, _ in chosen])
            yield from zip(tokens, (domain for _, domain in chosen), strict=True)

    for split, wanted in (("train", False), ("validation", True)):
        path = folder / f"{split}.arrow"
        tokens = _write_split(pack(encoded(wanted), sequence_length, packing), path)
        record[f"{split}_tokens"] = tokens
    return record


def _write_split(rows: Iterator[Row], path: Path) -> int:
    tokens = count = 0
    batch: list[Row] = []
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, _SCHEMA) as stream:

        def flush() -> None:
            nonlocal count
            columns = [
                [row.tokens for row in batch],
                [row.segments for row in batch],
                [row.domain for row in batch],
                range(count, count + len(batch)),
            ]
            arrays = [pa.array(column, type=field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
            stream.write_batch(pa.record_batch(arrays, schema=_SCHEMA))
            count += len(batch)
            batch.clear()

        for row in rows:
            batch.append(row)
            tokens += len(row.tokens)
            if len(batch) == _BATCH_ROWS:
                flush()
        if batch:
            flush()
    return tokens


def _sizes(folder: Path) -> dict[str, int]:
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()
    }


def _record(folder: Path) -> dict[str, Any] | None:
    """What was written about a finished corpus; ``None`` if it is not there or not whole."""
    try:
        record = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
        whole = all((folder / name).stat().st_size == size for name, size in record["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return record if whole else None


def _open(folder: Path, given: PreTrainedTokenizerBase | None, source: str | None) -> PreparedCorpus | None:
    record = _record(folder)
    if record is None:
        return None
    import datasets
    from transformers import AutoTokenizer

    tokenizer: Any = given
    if given is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder / "tokenizer"), local_files_only=True)
        except (OSError, ValueError):
            return None
    return PreparedCorpus(
        train=datasets.Dataset.from_file(str(folder / "train.arrow")),
        validation=datasets.Dataset.from_file(str(folder / "validation.arrow")),
        tokenizer=tokenizer,
        domains=tuple(name or ("all" if len(record["domains"]) == 1 else "other") for name in record["domains"]),
        fingerprint=folder.name,
        train_tokens=record["train_tokens"],
        validation_tokens=record["validation_tokens"],
        validation_bytes=record["validation_bytes"],
        documents=record["documents"],
        duplicates=record["duplicates"],
        source=record["source"] if source is None else source,
        folder=folder,
    )
