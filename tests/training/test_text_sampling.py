"""Texts as token ids: many at once, and as one batch."""

from __future__ import annotations

import pytest
import torch

from lossmith.data import train_tokenizer
from lossmith.training.text_sampling import encoded, padded

TEXTS = ["2 + 3 = 5 ; 5 - 1 = 4", "", "4", "2 + 3"]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("max_length", [3, 64])
def test_many_texts_are_encoded_as_each_alone(is_causal: bool, max_length: int) -> None:
    tokenizer = train_tokenizer(TEXTS * 3, vocab_size=280)
    texts = [*TEXTS, "4" + tokenizer.eos_token]
    rows = encoded(tokenizer, texts, max_length, is_causal=is_causal)
    assert rows == [encoded(tokenizer, [text], max_length, is_causal=is_causal)[0] for text in texts]
    assert all(1 <= len(row) <= max_length for row in rows)
    if not is_causal:
        assert all(row.count(tokenizer.eos_token_id) == 1 and row[-1] == tokenizer.eos_token_id for row in rows)
        assert rows[-1] == rows[2]
    assert encoded(tokenizer, [], max_length) == []


@pytest.mark.parametrize("left", [False, True])
def test_rows_are_filled_up_on_the_side_that_is_asked_for(left: bool) -> None:
    rows = [[5, 6, 7], [], [8]]
    ids, mask = padded(rows, -100, left)
    assert ids.dtype == mask.dtype == torch.long
    assert ids.shape == mask.shape == (3, 3)
    for row, line, there in zip(rows, ids, mask.bool(), strict=True):
        assert line[there].tolist() == row
        assert (line[~there] == -100).all()
        assert there.tolist() == sorted(there.tolist(), reverse=not left)
    assert padded([], 0)[0].shape == (0, 0)
    assert padded([[], []], 0)[1].shape == (2, 0)
