"""Masks for other tools: 2:4 for PyTorch's semi-structured tensors, torch.nn.utils.prune, plain Transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import lossmith.sparsity.semi_structured as module
from lossmith.errors import InputError
from lossmith.sparsity.magnitude import apply_masks, one_shot_masks, release_masks
from lossmith.sparsity.semi_structured import is_two_of_four, to_semi_structured


def two_of_four(rows: int = 64, columns: int = 128) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(columns, rows), nn.ReLU(), nn.Linear(rows, columns))
    return apply_masks(model, one_shot_masks(model, method="2:4", targets="all"))  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pytorch_compresses_our_masks_and_gives_the_same_matrix_back(dtype: torch.dtype) -> None:
    """PyTorch's own conversion, which the GPU kernels read: half of the values and two bits for each."""
    from torch.sparse._semi_structured_conversions import (
        sparse_semi_structured_from_dense_cutlass,
        sparse_semi_structured_to_dense_cutlass,
    )

    weight = two_of_four()[0].weight.detach().to(dtype)
    assert is_two_of_four(weight)
    values, places = sparse_semi_structured_from_dense_cutlass(weight)
    assert values.numel() == weight.numel() // 2
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, places), weight)


def test_what_is_two_of_four() -> None:
    model = two_of_four()
    assert is_two_of_four(model[0].weight)
    assert is_two_of_four(torch.zeros(3, 8))
    # The other way round, shifted by one, or of a width that four does not divide.
    assert not is_two_of_four(model[0].weight.T)
    assert not is_two_of_four(model[0].weight.roll(1, dims=1))
    assert not is_two_of_four(torch.zeros(3, 6))
    assert not is_two_of_four(torch.zeros(8))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
def test_without_a_gpu_it_is_refused_and_the_model_is_unchanged() -> None:
    model = two_of_four().half()
    with pytest.raises(
        InputError, match=r"layer 0 is on cpu; 2:4 kernels need an NVIDIA GPU of compute capability 8\.0"
    ):
        to_semi_structured(model)
    assert type(model[0].weight) is nn.Parameter


def test_layers_that_do_not_fit_are_named_before_any_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the question for the device answered."""
    converted: list[torch.Size] = []
    monkeypatch.setattr(module, "_missing", lambda weight: "")
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda w: converted.append(w.shape) or w)
    with pytest.raises(InputError, match="layer 0 is 24 x 128; 2:4 kernels need outputs that are a multiple of 32 and"):
        to_semi_structured(two_of_four(24, 128))
    with pytest.raises(InputError, match="none of the 2 linear layers is 2:4; prune with --method nm"):
        to_semi_structured(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    with pytest.raises(InputError, match="no linear layer"):
        to_semi_structured(nn.Sequential(nn.ReLU()))
    assert not converted
    # A dense layer beside the pruned ones stays.
    assert to_semi_structured(nn.Sequential(*two_of_four(), nn.Linear(128, 64))) == ("0", "2")
    assert converted == [(64, 128), (128, 64)]


@pytest.mark.parametrize(
    ("capability", "dtype", "message"),
    [((7, 5), torch.float16, "compute capability 7.5"), ((9, 0), torch.float32, "is float32")],
)
def test_gpus_and_types_that_cannot_are_refused(
    capability: tuple[int, int], dtype: torch.dtype, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OnGpu:
        device = torch.device("cuda", 0)

    weight: Any = OnGpu()
    weight.dtype = dtype
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert message in module._missing(weight)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="needs an NVIDIA GPU of compute capability 8.0 or later",
)
def test_on_a_gpu_outputs_are_those_of_the_dense_product() -> None:
    model = two_of_four(256, 512).half().cuda()
    x = torch.randn(64, 512, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        wanted = model(x)
        assert to_semi_structured(model) == ("0", "2")
        torch.testing.assert_close(model(x), wanted, rtol=1e-2, atol=1e-2)


def test_masks_are_those_of_torch_prune() -> None:
    """Held by us or given to PyTorch's own function: the same buffers, and PyTorch takes ours off."""
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    theirs = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    theirs.load_state_dict(ours.state_dict())
    masks = one_shot_masks(ours, 0.5, targets="all")
    for name, mask in masks.items():
        torch_prune.custom_from_mask(theirs.get_submodule(name.removesuffix(".weight")), "weight", mask)
    apply_masks(ours, masks, hold=True)
    assert [n for n, _ in ours.named_buffers()] == [n for n, _ in theirs.named_buffers()]
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), theirs.buffers(), strict=True))
    x = torch.randn(3, 16)
    assert torch.equal(ours(x), theirs(x))
    # The other way: their global pruning has our number of zeros, and our release makes it plain.
    other = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
    parts = [(layer, "weight") for layer in other]
    wanted = one_shot_masks(other, 0.5, targets="all")
    torch_prune.global_unstructured(parts, torch_prune.L1Unstructured, amount=0.5)
    assert all(torch.equal(layer.weight_mask.bool(), m) for layer, m in zip(other, wanted.values(), strict=True))
    release_masks(other)
    assert not torch_prune.is_pruned(other)
    for layer in ours:
        torch_prune.remove(layer, "weight")
    assert {n for n, _ in ours.named_parameters()} == {"0.weight", "0.bias", "1.weight", "1.bias"}


@pytest.mark.parametrize(
    ("sparsity", "message"), [(1.0, r"\[0, 1\)"), (-0.1, r"\[0, 1\)"), (float("nan"), r"\[0, 1\)")]
)
def test_sparsities_out_of_range_are_refused(sparsity: float, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        one_shot_masks(two_of_four(), sparsity, targets="all")


def test_patterns_that_cannot_be_meant_are_refused() -> None:
    model = two_of_four()
    for pattern in ("4:2", "0:4", "4:4", "2:0"):
        with pytest.raises(ValueError, match="N < M"):
            one_shot_masks(model, method=pattern, targets="all")
    with pytest.raises(ValueError, match=r"0\.weight has 128 inputs, not a multiple of 5, which 2:5 needs"):
        one_shot_masks(model, method="2:5", targets="all")


def test_a_matrix_that_is_tied_to_an_embedding_is_left_alone_everywhere() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from lossmith.sparsity import sparsity_report, target_layers, to_sparse_linear

    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=20, tie_word_embeddings=True, **shape))
    before = model.lm_head.weight.detach().clone()
    apply_masks(model, one_shot_masks(model, 0.9, targets="all"))
    assert torch.equal(model.lm_head.weight, before)
    assert "lm_head.weight" not in {name for name, *_ in sparsity_report(model, targets="all").layers}
    assert "lm_head" not in target_layers(model)
    assert "lm_head" not in to_sparse_linear(model, only_faster=False).replaced
    assert model.lm_head.weight is model.model.embed_tokens.weight
