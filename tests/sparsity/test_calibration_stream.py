"""Inputs of every layer once those before it are pruned; rows of tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_models import small_gpt2_model, small_llama
from torch import nn

from lossmith.errors import InputError
from lossmith.sparsity import (
    InputProducts,
    calibration_rows,
    calibration_stream,
    sparsegpt,
    stream_layers,
    text_batches,
)


def _tokens(*lengths: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(50, (2, length), generator=generator)} for length in lengths]


@pytest.mark.parametrize("build", [small_gpt2_model, small_llama])
def test_keeping_blocks_outputs_is_the_same_as_running_the_whole_model(
    build: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build()
    slow = copy.deepcopy(model)
    batches = _tokens(20, 20, 7)
    sparsegpt(model, batches)
    monkeypatch.setattr(calibration_stream, "_chain", lambda *_: None)
    sparsegpt(slow, batches)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, slow.state_dict()[name]), name


def test_every_layer_sees_the_inputs_that_pruned_layers_produce() -> None:
    model = small_llama(tie_word_embeddings=False).double()
    batches = _tokens(12, 9)
    streamed = stream_layers(model, batches, InputProducts, targets="all")
    order = []
    for weights, seen in streamed:
        # An obvious reference: run the whole model as it is now, and look at this layer.
        name = next(iter(weights))
        order.append(sorted(weights))
        expected = InputProducts()
        layer = model.get_submodule(name.removesuffix(".weight"))
        handle = layer.register_forward_pre_hook(lambda _, args, into=expected: into.add(args[0]))
        for batch in batches:
            model(**batch)
        handle.remove()
        assert torch.allclose(seen.hessian(), expected.hessian(), rtol=1e-9), name
        with torch.no_grad():
            for weight in weights.values():
                weight.mul_(0.5)
    assert [len(names) for names in order] == [3, 1, 2, 1, 3, 1, 2, 1, 1]
    assert order[-1] == ["lm_head.weight"]


def test_by_block_all_of_a_block_sees_it_unpruned() -> None:
    model = small_llama().double()
    dense = copy.deepcopy(model)
    found = {}
    for weights, seen in stream_layers(model, _tokens(12), InputProducts, order="block"):
        found |= dict.fromkeys(weights, seen)
        with torch.no_grad():
            for weight in weights.values():
                weight.zero_()
    of_dense = {}
    for weights, seen in stream_layers(dense, _tokens(12), InputProducts):
        of_dense |= dict.fromkeys(weights, seen)
    first, second = "model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.q_proj.weight"
    assert torch.allclose(found[first].hessian(), of_dense[first].hessian(), rtol=1e-10)
    assert not torch.allclose(found[second].hessian(), of_dense[second].hessian(), rtol=1e-3)


def test_modes_gradients_and_hooks_are_left_as_they_were() -> None:
    model = small_llama()
    model.train()
    for _ in stream_layers(model, _tokens(8), InputProducts):
        assert torch.is_grad_enabled()
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    stopped = stream_layers(model, _tokens(8), InputProducts)
    next(stopped)
    stopped.close()
    assert model.training


class _Shared(nn.Module):
    """A layer that runs twice, and one that only some batches reach."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.rare, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.twice(self.twice(x).relu())
        return self.last(self.rare(x) if len(x) > 3 else x)


def test_shared_layers_count_all_of_their_calls_and_rare_ones_are_found() -> None:
    net = _Shared()
    batches = [torch.randn(2, 4), torch.randn(5, 4)]
    seen = {name: s for weights, s in stream_layers(net, batches, InputProducts, targets="all") for name in weights}
    assert {name: s.sequences for name, s in seen.items()} == {"twice.weight": 4, "rare.weight": 1, "last.weight": 2}
    with pytest.raises(InputError, match=r"rare.weight is not reached"):
        list(stream_layers(net, batches[:1], InputProducts, targets="all"))


def test_models_without_a_chain_or_linear_layers() -> None:
    with pytest.raises(InputError, match="no linear layer"):
        list(stream_layers(nn.Sequential(nn.Embedding(4, 4)), [torch.zeros(1, dtype=torch.long)], InputProducts))
    with pytest.raises(InputError, match="no calibration batches"):
        list(stream_layers(small_llama(), [], InputProducts))
    with pytest.raises(ValueError, match="order must be"):
        list(stream_layers(small_llama(), _tokens(4), InputProducts, order="none"))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from lossmith.data import train_tokenizer

    return train_tokenizer(["weights that matter to one domain and in general " * 4], vocab_size=300)


def test_rows_are_equally_long_drawn_by_seed_and_no_more_than_needed(tokenizer: Any) -> None:
    texts = [f"text {i} of weights that matter" for i in range(300)]
    used = []

    def stream() -> Any:
        for text in texts:
            used.append(text)
            yield text

    rows = calibration_rows(stream(), tokenizer, samples=5, length=16, batch_size=2, seed=1)
    assert [tuple(row["input_ids"].shape) for row in rows] == [(2, 16), (2, 16), (1, 16)]
    assert len(used) < 100
    again = calibration_rows(texts, tokenizer, samples=5, length=16, batch_size=2, seed=1)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(rows, again, strict=True))
    other = calibration_rows(texts, tokenizer, samples=5, length=16, batch_size=2, seed=2)
    assert not torch.equal(rows[0]["input_ids"], other[0]["input_ids"])
    short = calibration_rows(["one"], tokenizer, samples=5, length=64)
    assert len(short) == 1
    assert short[0]["input_ids"].shape[1] < 64


@pytest.mark.parametrize("make", [calibration_rows, text_batches])
@pytest.mark.parametrize("texts", [[], ["", "  \n"]])
def test_texts_without_tokens_are_refused(make: Any, texts: list[str], tokenizer: Any) -> None:
    with pytest.raises(InputError, match="no usable tokens"):
        make(texts, tokenizer)


def test_domain_texts_are_cut_and_padded_with_ignored_labels(tokenizer: Any) -> None:
    first, second = text_batches(["weights", "weights " * 40, "domain"], tokenizer, batch_size=2, max_length=10)
    assert first["input_ids"].shape == (2, 10)
    assert int((first["labels"][0] != -100).sum()) < 9
    assert int((first["labels"][1] != -100).sum()) == 9
    assert second["input_ids"].shape[0] == 1


class _Tied(nn.Module):
    """One matrix in two layers of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))
        self.blocks[2][0].weight = self.blocks[0][0].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_a_matrix_in_two_layers_is_judged_by_the_inputs_of_both() -> None:
    torch.manual_seed(0)
    net, x = _Tied().double(), torch.randn(32, 4, dtype=torch.float64)
    seen = {name: s for weights, s in stream_layers(net, [x], InputProducts) for name in weights}
    assert list(seen) == ["blocks.0.0.weight", "blocks.1.0.weight"]
    hidden = net.blocks[1](net.blocks[0](x))
    # Two calls of one batch: the mean of two sequences' products.
    assert torch.allclose(seen["blocks.0.0.weight"].hessian(), x.T @ x + hidden.T @ hidden)
    inner = net.blocks[0](x)
    assert torch.allclose(seen["blocks.1.0.weight"].hessian(), 2 * inner.T @ inner)
