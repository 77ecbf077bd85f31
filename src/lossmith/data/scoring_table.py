"""Tables of scores: blocks while they are made, one Parquet or JSONL file when they are whole, and reading it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, did_you_mean
from ..files import replacing, write_text
from .formats import Document, reason

SUFFIXES = (".parquet", ".jsonl")
_MEASURES = ("tokens", "nats", "nats_per_token", "bits_per_byte")


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive documents with their nats and numbers of predicted tokens by model."""

    start: int
    documents: Sequence[Document]
    hashes: Sequence[str]
    scores: Mapping[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, slots=True)
class Scores:
    """A table of scores in memory: one row per document, in the order of the corpus.

    Attributes:
        path: where it was read from.
        models: names, in the order in which they were given.
        columns: numbers by column (NaN where there is none), and ``hash``.
    """

    path: Path
    models: tuple[str, ...]
    columns: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.columns["hash"])

    def column(self, name: str) -> np.ndarray:
        """A column by its name.

        Raises:
            InputError: there is none of that name.
        """
        if name not in self.columns:
            model = name.rpartition("/")[0]
            raise InputError(f"{self.path} has no scores of model {model!r}: {did_you_mean(model, self.models)}")
        return self.columns[name]


def read_scores(path: str | os.PathLike[str]) -> Scores:
    """Read what :func:`~lossmith.data.score_corpus` wrote (Parquet or JSONL).

    Raises:
        InputError: the file is missing, is not such a table, or its index is not 0, 1, 2, ...
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"scores: there is no file {str(path)!r}")
    try:
        table = _read_jsonl(path) if path.suffix == ".jsonl" else _read_parquet(path)
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: not readable as a table of scores ({reason(error)})") from None
    models = tuple(name.removesuffix("/nats") for name in table if name.endswith("/nats"))
    if not models or not {"index", "hash"} <= table.keys():
        raise InputError(f"{path} is no table of scores: it needs the columns index, hash and NAME/nats")
    if table["index"] != list(range(len(table["hash"]))):
        raise InputError(f"{path}: the column index must be 0, 1, 2, ...; rows are missing, doubled or out of order")
    names = ["bytes", *(f"{model}/{measure}" for model in models for measure in _MEASURES)]
    columns = {name: np.array(table[name], dtype=float) for name in names if name in table}  # None becomes NaN
    return Scores(path, models, {**columns, "hash": np.array(table["hash"], dtype=str)})


def _read_parquet(path: Path) -> dict[str, list[Any]]:
    import pyarrow.parquet as pq

    names = [n for n in pq.read_schema(path).names if n not in ("source", "domain")]
    columns: dict[str, list[Any]] = pq.read_table(path, columns=names).to_pydict()
    return columns


def _read_jsonl(path: Path) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {}
    with path.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream):
            row = json.loads(line)
            if not isinstance(row, dict) or (number and row.keys() != columns.keys()):
                raise ValueError(f"line {number + 1} has other columns than the first")
            for name, value in row.items():
                columns.setdefault(name, []).append(value)
    return columns


def write_block(path: Path, block: Block) -> None:
    """One block as a Parquet file; what was rejected is written first, so that a block's file means all of it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sizes = np.array([len(document.text.encode()) for document in block.documents], dtype=np.int64)
    table: dict[str, Any] = {
        "index": np.arange(block.start, block.start + len(block.documents), dtype=np.int64),
        "source": [document.source for document in block.documents],
        "domain": [document.domain for document in block.documents],
        "hash": list(block.hashes),
        "bytes": sizes,
    }
    rejected: list[dict[str, Any]] = []
    for model, (nats, tokens) in block.scores.items():
        missing = ~np.isfinite(nats)
        table[f"{model}/tokens"] = tokens
        table[f"{model}/nats"] = pa.array(nats, mask=missing)
        table[f"{model}/nats_per_token"] = pa.array(nats / np.maximum(tokens, 1), mask=missing)
        table[f"{model}/bits_per_byte"] = pa.array(nats / math.log(2) / np.maximum(sizes, 1), mask=missing)
        for i in np.flatnonzero(missing).tolist():
            document = block.documents[i]
            reject = {"index": block.start + i, "source": document.source, "domain": document.domain}
            why = "the model gave no finite loss" if tokens[i] > 0 else "no token to predict"
            rejected.append({**reject, "model": model, "reason": why, "text": document.text})
    if rejected:
        lines = [json.dumps(r, ensure_ascii=False) + "\n" for r in sorted(rejected, key=lambda r: r["index"])]
        write_text(path.with_suffix(".rejected"), "".join(lines))
    with replacing(path) as temporary:
        pq.write_table(pa.table(table), temporary)


def read_block_hashes(path: Path) -> list[str]:
    """The hashes of a block's documents."""
    import pyarrow.parquet as pq

    hashes: list[str] = pq.read_table(path, columns=["hash"]).column("hash").to_pylist()
    return hashes


def merge_blocks(files: Sequence[Path], target: Path, suffix: str) -> None:
    """All blocks as one file, one block in memory at a time."""
    import pyarrow.parquet as pq

    if suffix == ".jsonl":
        with target.open("w", encoding="utf-8") as stream:
            for file in files:
                stream.writelines(_lines(pq.read_table(file)))
        return
    with pq.ParquetWriter(target, pq.read_schema(files[0])) as writer:
        for file in files:
            writer.write_table(pq.read_table(file))


def _lines(table: Any) -> Iterator[str]:
    for row in table.to_pylist():
        yield json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
