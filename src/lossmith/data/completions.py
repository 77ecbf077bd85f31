"""Prompts with completions: files, token ids and batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .collation import IGNORED
from .formats import Document, Fields, read_text, reader_of
from .hub import is_hub_id, read_hub
from .tokenization import start_token


@dataclass(frozen=True, slots=True)
class Completion:
    """What is given, and what is to follow."""

    prompt: str
    completion: str


def read_completions(
    source: str | Path, *, prompt_field: str = "prompt", completion_field: str = "completion"
) -> list[Completion]:
    """Prompts and completions of a JSONL, JSON, CSV, TSV or Parquet file (perhaps compressed), or of the hub.

    Args:
        source: the file, or a hub id ``owner/name[:config[:split]]``.
        prompt_field: the column of the prompts; ``instruction+context`` joins two by an end of line, blank ones left
            out.
        completion_field: the column of the completions, likewise. Records whose completion is blank are left out.

    Raises:
        InputError: no such file or column, a record that is not text, or nothing in it; with the file and line.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "pairs.jsonl"
    >>> _ = path.write_text('{"prompt": "2 + 2 =", "completion": " 4"}\\n')
    >>> read_completions(path)
    [Completion(prompt='2 + 2 =', completion=' 4')]
    """

    def column(names: str) -> list[str]:
        parts = [[d.text for d in _documents(source, name.strip())] for name in names.split("+")]
        return ["\n".join(text for text in row if text.strip()) for row in zip(*parts, strict=True)]

    pairs = [Completion(*row) for row in zip(column(prompt_field), column(completion_field), strict=True)]
    pairs = [pair for pair in pairs if pair.completion.strip()]
    if not pairs:
        raise InputError(f"{source} holds no completions (column {completion_field!r})")
    return pairs


def encode_completions(
    tokenizer: Any, pairs: Sequence[Completion], *, max_prompt: int = 256, max_completion: int = 256
) -> list[dict[str, Any]]:
    """Token ids of prompts and completions, with labels for the completion alone.

    Args:
        tokenizer: a Hugging Face tokenizer.
        pairs: what to encode.
        max_prompt: longest prompt in tokens, the starting one included; of a longer one the end is kept.
        max_completion: longest completion in tokens; a longer one is cut, and has no end token then.

    Returns:
        One row per pair: ``input_ids``, ``labels`` (-100 at the prompt) and ``index``. A row begins with the
        tokenizer's beginning token (its end token, where it has none) and ends with its end token.

    >>> from lossmith.data import train_tokenizer
    >>> tokenizer = train_tokenizer(["ab"], vocab_size=257)
    >>> encode_completions(tokenizer, [Completion("a", "b")])[0]
    {'input_ids': [0, 65, 66, 0], 'labels': [-100, -100, 66, 0], 'index': 0}
    """
    if max_prompt < 1 or max_completion < 1:
        raise InputError(f"max_prompt and max_completion must be at least 1, got {max_prompt} and {max_completion}")
    if not pairs:
        return []

    def tokens(texts: list[str]) -> list[list[int]]:
        ids: Any = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        return [list(row) for row in ids]

    start, end = start_token(tokenizer), int(tokenizer.eos_token_id)
    rows = []
    prompts, completions = tokens([p.prompt for p in pairs]), tokens([p.completion for p in pairs])
    for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        prompt = [start, *prompt[max(0, len(prompt) - max_prompt + 1) :]]
        completion = [*completion, end][:max_completion]
        labels = [IGNORED] * len(prompt) + completion
        rows.append({"input_ids": prompt + completion, "labels": labels, "index": index})
    return rows


@dataclass(frozen=True, slots=True)
class CompletionCollator:
    """Rows of :func:`encode_completions` as a batch, padded on the right.

    Args:
        pad_token_id: what stands in ``input_ids`` where a row has ended.

    Returns ``input_ids``, ``labels`` (-100 at prompts and padding), ``attention_mask`` (each of shape (n, T)) and
    ``index`` (n,).

    >>> rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [5, 8], "labels": [-100, 8]}]
    >>> CompletionCollator(0)(rows)["labels"].tolist()
    [[-100, 6, 7], [-100, 8, -100]]
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate ``rows``."""
        if not rows:
            raise ValueError("a batch must have at least one row, got none")
        fill = {"input_ids": self.pad_token_id, "labels": IGNORED}
        columns = {
            name: torch.nn.utils.rnn.pad_sequence(
                [torch.as_tensor(row[name], dtype=torch.long) for row in rows], batch_first=True, padding_value=value
            )
            for name, value in fill.items()
        }
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        mask = (torch.arange(columns["labels"].shape[1]) < lengths.unsqueeze(1)).long()
        index = torch.tensor([int(row.get("index", -1)) for row in rows])
        return {**columns, "attention_mask": mask, "index": index}


def _documents(source: str | Path, field: str) -> Iterator[Document]:
    """The texts of one column, in order."""
    path = Path(source).expanduser()
    if path.is_file():
        reader = reader_of(path)
        if reader is read_text:
            raise InputError(f"{path} is no table: prompts and completions need JSONL, JSON, CSV, TSV or Parquet")
        return reader(path, "", Fields(field))
    if path.is_dir() or not is_hub_id(str(source)):
        raise InputError(f"{source} is not a file with prompts and completions (JSONL, JSON, CSV, TSV or Parquet)")
    return read_hub(str(source), Fields(field))
