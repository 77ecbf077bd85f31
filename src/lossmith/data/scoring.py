"""Losses of a whole corpus: streamed, in blocks that survive a kill, in the order of the corpus."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..files import read_json, replacing, write_json, write_text
from .corpus import content_key, read_corpus
from .formats import Document
from .scoring_model import Scorer, score_ids
from .scoring_table import SUFFIXES, Block, merge_blocks, read_block_hashes, write_block

_BLOCK_CHARACTERS = 8_000_000

# Nats and numbers of predicted tokens of a block's documents, by model.
BlockScores = dict[str, tuple[np.ndarray, np.ndarray]]
# From numbered blocks of texts (and the positions per batch) to numbered scores, in any order.
Backend = Callable[[Iterator[tuple[int, Sequence[str]]], int], Iterator[tuple[int, BlockScores]]]


@dataclass(frozen=True, slots=True)
class ScoreSummary:
    """What :func:`score_corpus` did.

    Attributes:
        path: the table.
        documents: in the corpus.
        scored: of those, by this call; the others had been scored before, or are another shard's.
        rejected: documents to which some model gave no finite loss (known once complete).
        complete: whether the table is there; not before the last shard has ended.
    """

    path: Path
    documents: int
    scored: int
    rejected: int
    complete: bool


def document_hash(text: str) -> str:
    """What a document is recognised by: 64 bits of BLAKE2b of its UTF-8 form, as hexadecimal digits."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def score_corpus(
    source: str | os.PathLike[str],
    scorers: Mapping[str, Scorer],
    out: str | os.PathLike[str],
    *,
    text_field: str = "text",
    domain_field: str | None = None,
    batch_tokens: int = 16_384,
    block_documents: int = 1024,
    shard: tuple[int, int] = (0, 1),
    backend: Backend | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ScoreSummary:
    """Write every document's loss under every model, one row per document in the order of the corpus.

    The corpus is read as a stream. Blocks of ``block_documents`` are tokenised, cut into windows, sorted by length and
    scored by all models; a finished block is a file in ``OUT.partial/``, which appears whole or not at all. A call that
    was killed at any moment is continued by the same call, and ends with the same bytes.

    Args:
        source: see :func:`~lossmith.data.read_corpus`.
        scorers: by the name that their columns get.
        out: a ``.parquet`` or ``.jsonl`` file with the columns ``index, source, domain, hash, bytes`` and, for each
            model, ``NAME/tokens`` (predicted), ``NAME/nats`` (sum over them), ``NAME/nats_per_token`` and
            ``NAME/bits_per_byte``. Where a model gives no finite loss the numbers are null and the document stands,
            with its text, in ``OUT.rejected.jsonl``. ``OUT.plan.json`` says what was computed.
        text_field: field of the text.
        domain_field: field of the domain.
        batch_tokens: positions per batch, padding included.
        block_documents: documents per block, fewer if they are long. Memory grows with it, padding falls.
        shard: ``(k, n)``: this call does block k, k + n, ...; all n calls name the same ``out``, in any order or at the
            same time, also on machines that share the folder. The last one to end writes the table.
        backend: scores blocks elsewhere, such as :class:`~lossmith.data.RayScoring`; by default in this process.
            ``scorers`` then only tell what is computed.
        progress: told the number of documents done and of tokens scored.

    Raises:
        InputError: the corpus cannot be read or has changed since, ``out`` belongs to something else, an option is out
            of range.

    >>> import tempfile, pathlib
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> _ = (folder / "two.jsonl").write_text('{"text": "abc"}\\n{"text": "abcdef"}\\n')
    >>> scorer = Scorer(lambda ids, targets: (targets >= 0).sum(-1) * 0.5,
    ...                 lambda texts: [np.arange(len(t)) for t in texts], 8, "letters", "half a nat each")
    >>> score_corpus(folder / "two.jsonl", {"even": scorer}, folder / "scores.jsonl").documents
    2
    >>> from lossmith.data import read_scores
    >>> read_scores(folder / "scores.jsonl").column("even/nats").tolist()
    [1.0, 2.5]
    """
    out = Path(out)
    _check(scorers, out, batch_tokens, block_documents, shard)
    plan = _plan(source, scorers, text_field, domain_field, batch_tokens, block_documents)
    finished = _finished(out, plan)
    if finished is not None:
        return finished
    parts = _named(out, ".partial")
    _claim(parts, plan)
    documents = read_corpus(source, text_field=text_field, domain_field=domain_field)
    waiting: dict[int, tuple[int, list[Document], list[str]]] = {}
    total = scored = done_tokens = blocks = 0

    def missing() -> Iterator[tuple[int, list[str]]]:
        nonlocal total, blocks
        for number, block in enumerate(_blocks(documents, block_documents)):
            part = parts / f"block-{number:08}.parquet"
            if number % shard[1] == shard[0]:
                hashes = [document_hash(document.text) for document in block]
                if not part.exists():
                    waiting[number] = total, block, hashes
                    yield number, [document.text for document in block]
                elif read_block_hashes(part) != hashes:
                    raise InputError(f"{source}: the corpus has changed since {parts} was begun; remove that folder")
            total, blocks = total + len(block), number + 1
            if progress is not None:
                progress(total - sum(len(w[1]) for w in waiting.values()), done_tokens)

    results = _here(missing(), scorers, batch_tokens) if backend is None else backend(missing(), batch_tokens)
    try:
        for number, scores in results:
            start, block, hashes = waiting.pop(number)
            write_block(parts / f"block-{number:08}.parquet", Block(start, block, hashes, scores))
            scored += len(block)
            done_tokens += sum(int(tokens.sum()) for _, tokens in scores.values())
    except InputError:
        # A corpus that cannot be read leaves nothing where nothing is scored yet.
        if shard == (0, 1) and not any(parts.glob("block-*.parquet")):
            shutil.rmtree(parts, ignore_errors=True)
        raise
    if any(not (parts / f"block-{number:08}.parquet").exists() for number in range(blocks)):
        return ScoreSummary(out, total, scored, 0, False)
    rejected = _publish(out, parts, blocks, {**plan, "documents": total})
    return ScoreSummary(out, total, scored, rejected, True)


def score_block(texts: Sequence[str], scorers: Mapping[str, Scorer], batch_tokens: int) -> BlockScores:
    """Nats and tokens of a block under every model; models of one tokenisation share it."""
    encoded: dict[str, Sequence[np.ndarray]] = {}
    scores = {}
    for name, scorer in scorers.items():
        if scorer.encoding not in encoded:
            encoded[scorer.encoding] = scorer.encode(texts)
        scores[name] = score_ids(scorer, encoded[scorer.encoding], batch_tokens=batch_tokens)
    return scores


def _here(
    blocks: Iterator[tuple[int, Sequence[str]]], scorers: Mapping[str, Scorer], batch_tokens: int
) -> Iterator[tuple[int, BlockScores]]:
    for number, texts in blocks:
        yield number, score_block(texts, scorers, batch_tokens)


def _blocks(documents: Iterator[Document], size: int) -> Iterator[list[Document]]:
    """Cut at ``size`` documents or at 8 million characters, whichever is first: the same cuts on every reading."""
    while first := list(itertools.islice(documents, 1)):
        block, characters = first, len(first[0].text)
        while len(block) < size and characters < _BLOCK_CHARACTERS:
            following = next(documents, None)
            if following is None:
                break
            block.append(following)
            characters += len(following.text)
        yield block


def _check(
    scorers: Mapping[str, Scorer], out: Path, batch_tokens: int, block_documents: int, shard: tuple[int, int]
) -> None:
    if not scorers:
        raise InputError("scorers: expected at least one model, got none")
    if out.suffix not in SUFFIXES:
        raise InputError(f"out must end in {' or '.join(SUFFIXES)}, got {str(out)!r}")
    for name, value in {"batch_tokens": batch_tokens, "block_documents": block_documents}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")
    if not (len(shard) == 2 and 0 <= shard[0] < shard[1]):
        raise InputError(f"shard must be (k, n) with 0 <= k < n, got {shard!r}")


def _plan(
    source: str | os.PathLike[str],
    scorers: Mapping[str, Scorer],
    text_field: str,
    domain_field: str | None,
    batch_tokens: int,
    block_documents: int,
) -> dict[str, Any]:
    models = {
        name: {"weights": s.identity, "tokenizer": s.encoding, "max_length": s.max_length}
        for name, s in scorers.items()
    }
    return {
        "corpus": content_key(source) or os.fspath(source),
        "text_field": text_field,
        "domain_field": domain_field,
        "models": models,
        "batch_tokens": batch_tokens,
        "block_documents": block_documents,
    }


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Names of the parts of a plan that are not the same; the order of models counts."""
    names = [name for name in new if name != "models" and old.get(name) != new[name]]
    there, asked = old.get("models") or {}, new["models"]
    if list(there) != list(asked):
        names.append(f"models ({', '.join(there)} there, {', '.join(asked)} asked for)")
    return names + [f"model {name}" for name in asked if name in there and there[name] != asked[name]]


def _finished(out: Path, plan: Mapping[str, Any]) -> ScoreSummary | None:
    path = _named(out, ".plan.json")
    if out.exists() and path.exists():
        there = read_json(path)
        if changed := _differing(there, plan):
            raise InputError(f"{out} holds other scores, which differ in: {', '.join(changed)}; choose another file")
        shutil.rmtree(_named(out, ".partial"), ignore_errors=True)
        return ScoreSummary(out, int(there["documents"]), 0, int(there["rejected"]), True)
    if out.exists() and not _named(out, ".partial").is_dir():
        raise InputError(f"{out} exists already; remove it or choose another file")
    return None


def _claim(parts: Path, plan: Mapping[str, Any]) -> None:
    path = parts / "plan.json"
    if path.exists():
        if changed := _differing(read_json(path), plan):
            raise InputError(
                f"{parts} is what another scoring run has begun, which differs in: {', '.join(changed)}; "
                "continue that one, or remove the folder"
            )
        return
    write_json(path, plan)


def _publish(out: Path, parts: Path, blocks: int, plan: dict[str, Any]) -> int:
    with _locked(_named(out, ".lock")):
        path = _named(out, ".plan.json")
        if path.exists() and out.exists() and not parts.exists():
            return int(read_json(path)["rejected"])  # another shard was faster
        files = [parts / f"block-{number:08}.parquet" for number in range(blocks)]
        rejects = _named(out, ".rejected.jsonl")
        with replacing(out) as temporary:
            merge_blocks(files, temporary, out.suffix)
        lines = "".join(
            file.with_suffix(".rejected").read_text(encoding="utf-8")
            for file in files
            if file.with_suffix(".rejected").exists()
        )
        if lines:
            write_text(rejects, lines)
        else:
            rejects.unlink(missing_ok=True)
        rejected = len({json.loads(line)["index"] for line in lines.splitlines()})
        write_json(path, {**plan, "rejected": rejected})
        shutil.rmtree(parts, ignore_errors=True)
    _named(out, ".lock").unlink(missing_ok=True)
    return rejected


def _named(out: Path, ending: str) -> Path:
    return out.with_name(out.name + ending)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
