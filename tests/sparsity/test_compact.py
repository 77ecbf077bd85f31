"""Checkpoints without their zeros: the same bytes back, the size that the formula says, loud failures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lossmith.errors import InputError
from lossmith.sparsity.compact import expand_compact, is_compact, load_compact, save_compact
from lossmith.sparsity.magnitude_files import open_weights, prune_checkpoint


def gpt2(path: Path, *, dtype: torch.dtype = torch.float32, width: int = 16, **options: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=width, n_layer=2, n_head=2, n_positions=16, vocab_size=50)).to(dtype)
    model.save_pretrained(path, **options)
    return model


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shards", ["8KB", "1GB"])
def test_every_file_comes_back_byte_for_byte(shards: str, dtype: torch.dtype, tmp_path: Path) -> None:
    gpt2(tmp_path / "dense", dtype=dtype, max_shard_size=shards)
    prune_checkpoint(tmp_path / "dense", tmp_path / "pruned", 0.5)
    report = save_compact(tmp_path / "pruned", tmp_path / "compact")
    assert report.after == sum(path.stat().st_size for path in (tmp_path / "compact").glob("*.safetensors"))
    assert is_compact(tmp_path / "compact")
    assert not is_compact(tmp_path / "pruned")
    expand_compact(tmp_path / "compact", tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "pruned")


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_the_size_is_that_of_the_values_and_a_bit_for_each_place(
    sparsity: float, dtype: torch.dtype, width: int, tmp_path: Path
) -> None:
    """Half of float32: 0.531 of the matrices, of bfloat16 0.5625; the target is 0.60."""
    gpt2(tmp_path / "dense", dtype=dtype, width=128)
    prune_checkpoint(tmp_path / "dense", tmp_path / "pruned", sparsity)
    report = save_compact(tmp_path / "pruned", tmp_path / "compact")
    matrices = sum(int(np.prod(shape)) for *_, shape in open_weights(tmp_path / "pruned").places.values())
    saved = matrices * width - (round((1 - sparsity) * matrices) * width + matrices / 8)
    # Biases of zeros go too; headers come on top.
    assert report.before - report.after == pytest.approx(saved, abs=6000)
    assert sparsity > 0.5 or report.ratio < 0.60


def test_a_plain_model_comes_out_and_a_plain_loader_fails_loudly(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    gpt2(tmp_path / "dense")
    prune_checkpoint(tmp_path / "dense", tmp_path / "pruned", 0.7)
    save_compact(tmp_path / "pruned", tmp_path / "compact")
    model, wanted = load_compact(tmp_path / "compact"), AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert type(model) is type(wanted)
    assert model.state_dict().keys() == wanted.state_dict().keys()
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in wanted.state_dict().items())
    assert model.lm_head.weight is model.transformer.wte.weight
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "compact")
    with pytest.raises(InputError, match=r"is a compact checkpoint; `lossmith prune .* --expand"):
        prune_checkpoint(tmp_path / "compact", tmp_path / "twice", 0.8)


def test_a_sharded_compact_checkpoint_fails_loudly_in_a_plain_loader(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    gpt2(tmp_path / "dense", max_shard_size="8KB")
    save_compact(tmp_path / "dense", tmp_path / "compact")
    with pytest.raises(OSError, match="model-0000"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "compact")
    with pytest.raises(InputError, match="is a compact checkpoint"):
        open_weights(tmp_path / "compact")


@pytest.mark.slow
def test_pruned_and_expanded_models_say_the_same_in_a_new_process(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    gpt2(tmp_path / "dense")
    prune_checkpoint(tmp_path / "dense", tmp_path / "pruned", 0.5)
    save_compact(tmp_path / "pruned", tmp_path / "compact")
    expand_compact(tmp_path / "compact", tmp_path / "plain")
    tokens = torch.arange(12)[None]
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A; assert 'lossmith' not in sys.modules;"
        "print(A.from_pretrained(sys.argv[1])(torch.arange(12)[None]).logits.double().sum().item())"
    )
    said = subprocess.run([sys.executable, "-c", code, str(tmp_path / "plain")], capture_output=True, text=True)
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")(tokens).logits.double().sum()
    assert float(said.stdout) == pytest.approx(float(wanted), rel=1e-6)


def test_odd_tensors_come_back_exactly(tmp_path: Path) -> None:
    """Negative zero, NaN, infinities, integers, booleans, nothing at all, one number, all zeros, own metadata."""
    folder = tmp_path / "odd"
    gpt2(folder)
    tensors = {
        "signed": torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf")] + [0.0] * 300),
        "half": torch.tensor([0.0, -0.0, 1e-8, 6e4] + [0.0] * 300).half(),
        "double": torch.eye(9, dtype=torch.float64),
        "whole": torch.tensor([0, 1, 0, -5] * 10),
        "flags": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(0.0),
        "none": torch.zeros(5, 7, 11),
        "dense": torch.ones(13),
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", "why": "ü"})
    report = save_compact(folder, tmp_path / "compact")
    assert {"signed", "half", "double", "none"} <= set(report.tensors)
    assert not {"dense", "empty", "flags"} & set(report.tensors)
    expand_compact(tmp_path / "compact", tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(folder)


def test_damage_and_missing_parts_are_named(tmp_path: Path) -> None:
    gpt2(tmp_path / "whole", max_shard_size="8KB")
    prune_checkpoint(tmp_path / "whole", tmp_path / "dense", 0.5)
    save_compact(tmp_path / "dense", tmp_path / "compact")
    lost = sorted((tmp_path / "compact").glob("compact.*"))[1]
    lost.rename(tmp_path / "aside")
    for use in (
        lambda: expand_compact(tmp_path / "compact", tmp_path / "x"),
        lambda: load_compact(tmp_path / "compact"),
    ):
        with pytest.raises(InputError, match=f"lacks {lost.name}"):
            use()
    lost.write_bytes((tmp_path / "aside").read_bytes()[:100])
    with pytest.raises(InputError, match="is damaged"):
        expand_compact(tmp_path / "compact", tmp_path / "x")
    # A safetensors file that is whole, but has a value too few.
    tensors = load_file(tmp_path / "aside")
    name = next(n for n in tensors if n.endswith(".nonzero_values") and len(tensors[n]))
    tensors[name] = tensors[name][:-1].clone()
    from safetensors import safe_open

    with safe_open(tmp_path / "aside", framework="pt") as file:
        save_file(tensors, lost, metadata=file.metadata())
    with pytest.raises(InputError, match=r"is damaged: .* values for"):
        expand_compact(tmp_path / "compact", tmp_path / "x")
    save_file(tensors, lost)
    with pytest.raises(InputError, match="does not say what it was made of"):
        expand_compact(tmp_path / "compact", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    assert not list(tmp_path.glob(".x*"))
    with pytest.raises(InputError, match="exists and is not an empty folder"):
        save_compact(tmp_path / "dense", tmp_path / "compact")
    with pytest.raises(InputError, match="holds no compact checkpoint"):
        load_compact(tmp_path / "dense")
    with pytest.raises(InputError, match=r"has no config\.json"):
        save_compact(tmp_path, tmp_path / "x")
