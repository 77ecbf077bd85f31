import numpy as np
import pytest
import torch
from torch import Tensor

from lossmith.data import PackedCollator, PaddedCollator

ROWS = [
    {"input_ids": [5, 6, 7, 8, 9], "segments": [2, 3], "domain": 1, "index": 40},
    {"input_ids": [3, 4], "segments": [2], "domain": 0, "index": 7},
]


def test_padded_tensors_are_as_written_by_hand():
    batch = PaddedCollator(99)(ROWS)
    expected = {
        "input_ids": [[5, 6, 7, 8, 9], [3, 4, 99, 99, 99]],
        "labels": [[-100, 6, -100, 8, 9], [-100, 4, -100, -100, -100]],
        "position_ids": [[0, 1, 0, 1, 2], [0, 1, 2, 3, 4]],
        "example_ids": [[0] * 5, [1] * 5],
        "index": [40, 7],
        "domain": [1, 0],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


@pytest.mark.parametrize("collator", [PaddedCollator(99), PackedCollator()])
def test_a_row_without_segments_is_one_segment(collator):
    tokens = [[5, 6, 7, 8, 9], [], [3], [4, 5]]
    bare = collator([{"input_ids": ids} for ids in tokens])
    told = collator([{"input_ids": ids, "segments": [len(ids)]} for ids in tokens])
    mixed = collator(
        [{"input_ids": ids, **({"segments": [len(ids)]} if i % 2 else {})} for i, ids in enumerate(tokens)]
    )
    for name, tensor in told.items():
        assert torch.equal(bare[name], tensor), name
        assert torch.equal(mixed[name], tensor), name


def test_packed_tensors_are_as_written_by_hand():
    batch = PackedCollator()(ROWS)
    expected = {
        "input_ids": [[5, 6, 7, 8, 9, 3, 4]],
        "labels": [[-100, 6, -100, 8, 9, -100, 4]],
        "position_ids": [[0, 1, 0, 1, 2, 0, 1]],
        "example_ids": [[0, 0, 0, 0, 0, 1, 1]],
        "index": [40, 7],
        "domain": [1, 0],
    }
    assert {name: tensor.tolist() for name, tensor in batch.items()} == expected
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


@pytest.mark.parametrize("collator", [PaddedCollator(0), PackedCollator()])
@pytest.mark.parametrize("convert", [np.array, torch.tensor, lambda x: np.array(x, dtype=np.int32), tuple])
def test_rows_may_hold_lists_arrays_or_tensors(collator, convert):
    rows = [{**row, "input_ids": convert(row["input_ids"]), "segments": convert(row["segments"])} for row in ROWS]
    for name, tensor in collator(rows).items():
        assert torch.equal(tensor, collator(ROWS)[name])


@pytest.mark.parametrize("collator", [PaddedCollator(0), PackedCollator()])
def test_non_contiguous_tensors_and_numpy_scalars_are_fine(collator):
    rows = [{"input_ids": torch.arange(10)[::2], "index": np.int64(3), "domain": torch.tensor(1)}]
    batch = collator(rows)
    assert batch["input_ids"].tolist() == [[0, 2, 4, 6, 8]]
    assert batch["index"].tolist() == [3]


@pytest.mark.parametrize("collator", [PaddedCollator(0), PackedCollator()])
def test_an_empty_row_is_an_example_without_tokens(collator):
    batch = collator([{"input_ids": [], "segments": []}, {"input_ids": [1, 2]}])
    assert (batch["labels"] != -100).sum() == 1
    assert batch["index"].shape == (2,)
    assert collator([{"input_ids": []}])["input_ids"].shape == (1, 0)


@pytest.mark.parametrize("collator", [PaddedCollator(0), PackedCollator()])
@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "at least one row"),
        ([{"text": "x"}], "must have input_ids, got only: text"),
        ([{"input_ids": [1, 2, 3], "segments": [2]}], r"sum to the number of tokens \(3\)"),
        ([{"input_ids": [1, 2, 3], "segments": [4, -1]}], r"sum to the number of tokens \(3\)"),
        ([{"input_ids": [[1, 2]]}], "one list of integers"),
    ],
)
def test_rows_that_are_none_are_refused(collator, rows, message):
    with pytest.raises(ValueError, match=message):
        collator(rows)


def token_losses(model, batch) -> Tensor:
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    targets = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100
    )
    return losses[targets.flatten() != -100]


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config).double().eval()


# The eager attention of transformers computes its softmax in float32 whatever the model's type.
@pytest.mark.parametrize("attention, tolerance", [("sdpa", 1e-10), ("eager", 1e-6)])
@torch.no_grad()
def test_single_documents_padded_rows_and_packed_rows_give_the_same_losses(model, attention, tolerance):
    model.set_attn_implementation(attention)
    generator = np.random.default_rng(0)
    segments = [[5, 1, 7], [9], [1, 1, 2, 3], [2], [4, 4]]
    rows = [{"input_ids": generator.integers(0, 40, sum(s)), "segments": s} for s in segments]
    expected = []
    for row in rows:
        for document in np.split(row["input_ids"], np.cumsum(row["segments"])[:-1]):
            if len(document) > 1:
                ids = torch.as_tensor(document).unsqueeze(0)
                log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
                expected.append(-log_probs.gather(-1, ids[0, 1:, None]).squeeze(-1))
    for collator in (PaddedCollator(39), PackedCollator()):
        torch.testing.assert_close(token_losses(model, collator(rows)), torch.cat(expected), rtol=0, atol=tolerance)


@torch.no_grad()
def test_without_restarting_positions_the_losses_would_differ(model):
    # The fault that the collators avoid: attention that reaches into the document before.
    batch = PackedCollator()(ROWS)
    leaking = {**batch, "position_ids": torch.arange(7).unsqueeze(0)}
    assert not torch.allclose(token_losses(model, batch), token_losses(model, leaking))


@torch.no_grad()
def test_a_cache_would_let_attention_cross_documents(model):
    # Why the class says use_cache=False: with a cache, transformers does not look at the restarts.
    batch = PackedCollator()(ROWS)
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    apart, leaking = model(**inputs, use_cache=False).logits, model(**inputs, use_cache=True).logits
    assert not torch.allclose(apart, leaking)
