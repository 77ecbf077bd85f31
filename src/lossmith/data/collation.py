"""From rows of a prepared corpus to the tensors that a causal language model trains on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True, slots=True)
class PaddedCollator:
    """One row of tensors per example, padded on the right to the longest.

    Args:
        pad_token_id: what stands in ``input_ids`` where an example has ended.

    Called with a list of ``n`` rows (mappings with ``input_ids``, ``segments``, ``domain``, ``index``), it
    returns

    ================ ======== =====================================================================
    ``input_ids``    (n, T)   tokens
    ``labels``       (n, T)   tokens, not shifted; -100 in padding and at each segment's first token
    ``position_ids`` (n, T)   position in the segment, from 0; in padding they count on
    ``example_ids``  (n, T)   which of the n examples a token belongs to
    ``index``        (n,)     the rows' numbers in the corpus
    ``domain``       (n,)     the rows' domains
    ================ ======== =====================================================================

    all int64. There is no attention mask: a causal model never looks right, where the padding is, and
    ``transformers`` keeps segments apart by the restarts of ``position_ids`` where no mask is given **and no
    cache is used**: call the model with ``use_cache=False``, or attention silently crosses segments.

    >>> rows = [{"input_ids": [5, 6, 7], "segments": [2, 1]}, {"input_ids": [8]}]
    >>> PaddedCollator(0)(rows)["labels"].tolist()
    [[-100, 6, -100], [-100, -100, -100]]
    """

    pad_token_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate ``rows``; see the class."""
        parts = [_example(row) for row in rows]
        shape = (len(parts), max((len(tokens) for tokens, _, _ in parts), default=0))
        input_ids = torch.full(shape, self.pad_token_id, dtype=torch.int64)
        labels = torch.full(shape, IGNORED, dtype=torch.int64)
        # Right for a row of one segment, padding included.
        position_ids = torch.arange(shape[1]).repeat(shape[0], 1)
        for i, (row, (tokens, label, positions)) in enumerate(zip(rows, parts, strict=True)):
            length = len(tokens)
            input_ids[i, :length], labels[i, :length] = tokens, label
            if row.get("segments") is not None:
                after = int(positions[-1]) + 1 if length else 0
                position_ids[i, :length] = positions
                position_ids[i, length:] = torch.arange(after, after + shape[1] - length)
        example_ids = torch.arange(shape[0]).unsqueeze(1).repeat(1, shape[1])
        return _batch(rows, input_ids, labels, position_ids, example_ids)


@dataclass(frozen=True, slots=True)
class PackedCollator:
    """All examples in one row of tensors, without padding.

    The tensors are those of :class:`PaddedCollator` with shape (1, T), T the number of tokens of all
    examples; ``index`` and ``domain`` still have one entry per example. The per-token losses are the same in
    both layouts.

    >>> PackedCollator()([{"input_ids": [5, 6]}, {"input_ids": [8, 9]}])["position_ids"].tolist()
    [[0, 1, 0, 1]]
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Collate ``rows``; see the class."""
        parts = [_example(row) for row in rows]
        if not parts:
            return PaddedCollator(0)(rows)  # raises
        input_ids, labels, position_ids = (torch.cat(column).unsqueeze(0) for column in zip(*parts, strict=True))
        lengths = torch.tensor([len(tokens) for tokens, _, _ in parts])
        example_ids = torch.repeat_interleave(torch.arange(len(parts)), lengths).unsqueeze(0)
        return _batch(rows, input_ids, labels, position_ids, example_ids)


def _example(row: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, labels and positions of one row."""
    if "input_ids" not in row:
        raise ValueError(f"a row must have input_ids, got only: {', '.join(map(str, row)) or 'nothing'}")
    tokens = torch.as_tensor(row["input_ids"], dtype=torch.int64)
    if tokens.ndim != 1:
        raise ValueError(f"input_ids of a row must be one list of integers, got shape {tuple(tokens.shape)}")
    segments = row.get("segments")
    if segments is None:
        labels = tokens.clone()
        labels[:1] = IGNORED
        return tokens, labels, torch.arange(len(tokens))
    lengths = torch.as_tensor(segments, dtype=torch.int64)
    if int(lengths.sum()) != len(tokens) or bool((lengths < 0).any()):
        raise ValueError(
            f"segments must be lengths that sum to the number of tokens ({len(tokens)}), got {lengths.tolist()}"
        )
    starts = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    positions = torch.arange(len(tokens)) - starts
    return tokens, tokens.masked_fill(positions == 0, IGNORED), positions


def _batch(
    rows: Sequence[Mapping[str, Any]],
    input_ids: Tensor,
    labels: Tensor,
    position_ids: Tensor,
    example_ids: Tensor,
) -> dict[str, Tensor]:
    if not rows:
        raise ValueError("a batch must have at least one row, got none")
    return {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": position_ids,
        "example_ids": example_ids,
        "index": torch.tensor([int(row.get("index", -1)) for row in rows]),
        "domain": torch.tensor([int(row.get("domain", 0)) for row in rows]),
    }
