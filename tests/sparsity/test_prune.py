"""One way in for every method."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lossmith.errors import InputError
from lossmith.sparsity import one_shot_masks, prune, release_masks

METHODS = ("magnitude", "uniform", "random", "erk", "wanda", "sparsegpt", "d-pruner")
TEXTS = [f"weight {i} matters to a domain, and {i * i} in general" for i in range(24)]


def _llama(**options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 300, "max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=24, **shape, **options))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from lossmith.data import train_tokenizer

    return train_tokenizer(TEXTS, vocab_size=300)


def _arguments(method: str, tokenizer: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"method": method}
    if method in ("wanda", "sparsegpt", "d-pruner"):
        found |= {"calibration": TEXTS, "tokenizer": tokenizer, "samples": 8}
    if method == "d-pruner":
        found |= {"general": TEXTS[::-1], "epochs": 1, "reg_ratio": 10.0}
    return found


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_zeros_masks_and_a_report(method: str, tokenizer: Any) -> None:
    model = _llama()
    found = prune(model, 0.5, **_arguments(method, tokenizer))
    assert found.report.sparsity == pytest.approx(0.5, abs=0.02 if method == "erk" or method == "random" else 1e-3)
    for name, mask in found.masks.items():
        assert bool((model.get_parameter(name)[~mask] == 0).all())
    assert bool(torch.isfinite(model(torch.arange(8)[None]).logits).all())
    assert len(found.losses) == (3 if method == "d-pruner" else 0)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "d-pruner"])
def test_patterns_hold_for_every_method_that_ranks(method: str, tokenizer: Any) -> None:
    found = prune(_llama(), pattern="2:4", **_arguments(method, tokenizer))
    for mask in found.masks.values():
        assert bool((mask.reshape(mask.shape[0], -1, 4).sum(-1) == 2).all())


def test_masks_can_be_held_in_training_and_released(tokenizer: Any) -> None:
    model = _llama()
    found = prune(model, 0.5, hold=True, **_arguments("sparsegpt", tokenizer))
    assert found.report.sparsity == pytest.approx(0.5, abs=1e-3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.arange(8)[None]
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    release_masks(model)
    assert all(bool((model.get_parameter(name)[~mask] == 0).all()) for name, mask in found.masks.items())


def test_finetuned_weights_can_be_the_ones_that_are_pruned(tokenizer: Any) -> None:
    model, other = _llama(), _llama()
    own = copy.deepcopy(model.state_dict())
    arguments = _arguments("d-pruner", tokenizer)
    masks = prune(model, 0.5, **arguments).masks
    again = prune(other, 0.5, apply_to="finetuned", **arguments).masks
    name = next(iter(masks))
    assert torch.equal(masks[name], again[name])
    assert torch.equal(model.state_dict()[name], own[name] * masks[name])
    assert not torch.allclose(other.state_dict()[name], model.state_dict()[name])


def test_the_same_seed_gives_the_same_masks(tokenizer: Any) -> None:
    arguments = _arguments("d-pruner", tokenizer)
    first, second = (prune(_llama(), 0.5, seed=3, **arguments).masks for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_plain_methods_are_those_of_one_shot_masks() -> None:
    expected = one_shot_masks(_llama(), 0.3, method="uniform")
    found = prune(_llama(), 0.3, method="uniform").masks
    assert all(torch.equal(found[name], mask) for name, mask in expected.items())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"method": "wandra"}, "did you mean 'wanda'"),
        ({"method": "wanda", "calibration": None}, "needs calibration"),
        ({"method": "wanda", "general": TEXTS}, "takes no general"),
        ({"method": "d-pruner", "general": None}, "needs general"),
        ({"method": "sparsegpt", "tokenizer": None}, "need a tokenizer"),
        ({"method": "sparsegpt", "calibration": []}, "is empty"),
        ({"method": "sparsegpt", "calibration": ["", " "]}, "no usable tokens"),
        ({"method": "d-pruner", "calibration": ["one text"]}, "at least 2 texts, got 1"),
        ({"method": "d-pruner", "apply_to": "both"}, "apply_to must be"),
        ({"method": "magnitude", "damping": 0.1}, "has no option 'damping'"),
        ({"method": "random", "pattern": "2:4"}, "takes no pattern"),
        ({"method": "nm"}, "needs pattern"),
        ({"method": "sparsegpt", "sparsity": 1.0}, "sparsity must lie"),
        ({"method": "sparsegpt", "pattern": "2:5"}, "not a multiple of 5"),
    ],
)
def test_wrong_input_is_one_sentence(change: dict[str, Any], sentence: str, tokenizer: Any) -> None:
    arguments = {**_arguments(change["method"], tokenizer), **change}
    model = _llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=sentence):
        prune(model, **arguments)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_whose_only_linear_layer_is_its_embedding_is_refused() -> None:
    tied = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8, bias=False))
    tied[1].weight = tied[0].weight
    with pytest.raises(InputError, match="shares its matrix with an embedding"):
        prune(tied, method="wanda", calibration=[torch.zeros(2, 3, dtype=torch.long)], targets="all")


@pytest.mark.slow
def test_plain_transformers_gives_the_same_outputs_in_a_new_process(tokenizer: Any, tmp_path: Path) -> None:
    expected = []
    for method in ("wanda", "sparsegpt", "d-pruner"):
        model = _llama()
        prune(model, 0.5, **_arguments(method, tokenizer))
        model.eval().save_pretrained(tmp_path / method)
        expected.append(model(torch.arange(8)[None]).logits.double().sum().item())
    code = (
        "import sys, torch, transformers\n"
        "for path in sys.argv[1:]:\n"
        "    m = transformers.AutoModelForCausalLM.from_pretrained(path).eval()\n"
        "    print(m(torch.arange(8)[None]).logits.double().sum().item())\n"
        "assert 'lossmith' not in sys.modules"
    )
    folders = [str(tmp_path / method) for method in ("wanda", "sparsegpt", "d-pruner")]
    out = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, check=True)
    # Two processes add in the same order; printed digits are all.
    assert [float(line) for line in out.stdout.split()] == pytest.approx(expected, abs=1e-5)
