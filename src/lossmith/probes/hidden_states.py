"""Hidden states of any Hugging Face language model, as a stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lossmith.errors import InputError

Pooling = Literal["last", "mean", "all"]


@torch.no_grad()
def hidden_states(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str],
    *,
    layer: int = -1,
    pooling: Pooling = "last",
    max_length: int = 512,
    min_length: int = 33,
    samples: int | None = None,
    batch_size: int = 16,
) -> Iterator[Tensor]:
    """Features of texts, batch by batch, in float32.

    The last layer is taken after the final norm: the vectors that enter the output layer. Tokens are those of the text;
    padding never counts, whichever side it is on.

    Args:
        model: causal or bidirectional.
        tokenizer: its tokeniser.
        texts: one after the other; those shorter than ``min_length`` tokens are left out.
        layer: index into the hidden states, 0 the embeddings, -1 the last.
        pooling: ``last``: one row per text, of its last token; ``mean``: one row per text; ``all``: one per token.
        max_length: tokens of a text that are used.
        min_length: tokens that a text must have.
        samples: stop after so many texts.
        batch_size: texts at a time.

    Yields:
        ``(rows, features)``.

    Raises:
        InputError: no such layer, a model without hidden states, an unknown pooling.
    """
    if pooling not in ("last", "mean", "all"):
        raise InputError(f"pooling must be last, mean or all, got '{pooling}'")
    if max_length < 1 or min_length < 1 or batch_size < 1:
        raise InputError("max_length, min_length and batch_size must be at least 1")
    model.eval()
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    batch: list[list[int]] = []
    taken = 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, truncation=True, max_length=max_length)["input_ids"]
        if len(ids) < min_length:
            continue
        batch.append(list(ids))
        taken += 1
        if len(batch) == batch_size:
            yield _forward(model, batch, layer, pooling, pad, device)
            batch = []
        if samples is not None and taken >= samples:
            break
    if batch:
        yield _forward(model, batch, layer, pooling, pad, device)


def _forward(
    model: nn.Module, batch: list[list[int]], layer: int, pooling: Pooling, pad: int, device: torch.device
) -> Tensor:
    longest = max(map(len, batch))
    ids = torch.full((len(batch), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(batch):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = 1
    output = model(input_ids=ids.to(device), attention_mask=mask.to(device), output_hidden_states=True)
    states = getattr(output, "hidden_states", None)
    if states is None:
        raise InputError(f"{type(model).__name__} returns no hidden states")
    if not -len(states) <= layer < len(states):
        raise InputError(f"layer must lie from {-len(states)} to {len(states) - 1}, got {layer}")
    hidden = states[layer].float()
    lengths = mask.sum(1).to(device)
    if pooling == "last":
        return hidden[torch.arange(len(batch), device=device), lengths - 1]
    if pooling == "mean":
        weights = mask.to(device, hidden.dtype)
        return torch.einsum("btd,bt->bd", hidden, weights) / lengths[:, None]
    return hidden[mask.to(device).bool()]


def extract_last_token_features(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[str],
    *,
    max_length: int = 512,
    min_length: int = 33,
    batch_size: int = 16,
    layer: int = -1,
) -> Tensor:
    """Hidden states of the last token of each text, ``(texts, features)``; see :func:`hidden_states`.

    Raises:
        InputError: no text is long enough.
    """
    parts = list(
        hidden_states(
            model, tokenizer, texts, layer=layer, max_length=max_length, min_length=min_length, batch_size=batch_size
        )
    )
    if not parts:
        raise InputError(f"no text has {min_length} tokens or more")
    return torch.cat(parts)
