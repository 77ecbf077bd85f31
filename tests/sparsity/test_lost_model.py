"""Whole models with LOST layers: conversion, counts, files, merging, several architectures, comparisons."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lossmith.errors import InputError
from lossmith.registry import SPARSITIES
from lossmith.sparsity import (
    LOSTLinear,
    SLTrainLinear,
    convert_to_lost,
    load_lost,
    lost_report,
    merge_lost,
    target_layers,
)
from lossmith.training.models import build_model, extra_multiplications, matmul_parameters

TOKENS = torch.arange(24).view(2, 12)


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **{"tie_word_embeddings": False, **shape, **changes})).eval()


# hidden, inner, layers, heads, rank; millions of parameters: dense, density 0, 0.01, 0.05.
SIZES = [
    (512, 1376, 8, 8, 128, 58.07, 42.81, 43.02, 44.01),
    (768, 2048, 12, 12, 256, 134.11, 94.09, 94.78, 98.21),
    (1024, 2736, 24, 16, 256, 367.97, 185.48, 188.18, 200.28),
    (2048, 5461, 24, 32, 512, 1339.08, 609.82, 621.14, 669.52),
]


@pytest.mark.parametrize(("hidden", "inner", "layers", "heads", "rank", "dense", "none", "one", "five"), SIZES)
def test_parameters_of_the_published_sizes(
    hidden: int, inner: int, layers: int, heads: int, rank: int, dense: float, none: float, one: float, five: float
) -> None:
    """One block is built without memory, and counted; the rest is arithmetic."""
    with torch.device("meta"):
        config = LlamaConfig(
            vocab_size=32_000, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=1,
            num_attention_heads=heads, tie_word_embeddings=False,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    blocks = sum(p.numel() for p in model.model.layers[0].parameters())
    rest = sum(p.numel() for p in model.parameters()) - blocks
    assert (rest + layers * blocks) / 1e6 == pytest.approx(dense, abs=0.006)
    linears = target_layers(model)
    assert len(linears) == 7
    for density, expected in ((0.0, none), (0.01, one), (0.05, five)):
        saved = 0
        for linear in linears.values():
            assert isinstance(linear, nn.Linear)
            # The table's density 0 still has max(1, 0) columns.
            columns = max(1, int(density * linear.in_features))
            layer = LOSTLinear(linear.in_features, linear.out_features, rank, columns, device="meta")
            saved += linear.weight.numel() - sum(p.numel() for p in layer.parameters())
        assert (rest + layers * (blocks - saved)) / 1e6 == pytest.approx(expected, abs=0.006)


def test_the_report_counts_layers_and_memory() -> None:
    model = llama()
    dense = sum(p.numel() for p in model.parameters())
    report = convert_to_lost(model, rank=8, density=0.1)
    assert len(report.layers) == 14
    assert report == lost_report(model)
    assert report.dense == dense
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert report.training_bytes == 16 * report.parameters
    first = report.layers[0]
    assert (first.name, first.shape, first.rank, first.columns) == ("model.layers.0.self_attn.q_proj", (32, 32), 8, 3)
    assert first.parameters == 8 * 64 + 3 * 32
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    moments = sum(t.numel() * 4 for s in optimizer.state.values() for t in s.values() if t.ndim)
    gradients = sum(p.grad.numel() * 4 for p in model.parameters() if p.grad is not None)
    assert moments + gradients + 4 * report.parameters == report.training_bytes
    assert "parameters" in report.text()
    assert matmul_parameters(model) == report.parameters - 50 * 32 - 5 * 32


def test_embeddings_output_layer_and_norms_are_left_alone() -> None:
    model = llama()
    before = copy.deepcopy(model)
    convert_to_lost(model, rank=8, density=0.1)
    assert torch.equal(model.lm_head.weight, before.lm_head.weight)
    assert torch.equal(model.model.embed_tokens.weight, before.model.embed_tokens.weight)
    assert type(model.lm_head) is nn.Linear
    tied = llama(tie_word_embeddings=True)
    convert_to_lost(tied, rank=8)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_targets_and_ranks_by_name() -> None:
    model = llama()
    report = convert_to_lost(model, rank={"attn": 4, "mlp": 0.5}, targets=["q_proj", "down_proj"])
    assert [layer.rank for layer in report.layers] == [4, 16, 4, 16]
    with pytest.raises(
        InputError, match=r"names 'w1', with which no linear layer's name ends; there are \['down_proj'"
    ):
        convert_to_lost(llama(), targets=["w1"])
    with pytest.raises(InputError, match=r"layer model.layers.0.mlp.gate_proj: rank has no entry for it"):
        convert_to_lost(llama(), rank={"attn": 4})


def test_a_model_that_cannot_be_converted_is_unchanged() -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 3] = float("inf")
    with pytest.raises(InputError, match=r"layer model\.layers\.1\.mlp\.down_proj: weight has entries"):
        convert_to_lost(model, rank=8)
    with pytest.raises(InputError, match="at most the smaller side, 32, got 64"):
        convert_to_lost(model, rank=64)
    assert not [m for m in model.modules() if isinstance(m, LOSTLinear)]
    assert not hasattr(model.config, "lost")
    fine = llama()
    convert_to_lost(fine, rank=8)
    with pytest.raises(InputError, match="low-rank layers already"):
        convert_to_lost(fine, rank=8)
    with pytest.raises(InputError, match="no linear layer"):
        convert_to_lost(nn.Sequential(nn.ReLU()))
    with pytest.raises(InputError, match="no low-rank layer"):
        lost_report(llama())


def test_every_option_out_of_range_leaves_the_model_unchanged() -> None:
    model = llama()
    for options in (
        {"gamma": 2}, {"activation": "relu"}, {"choose": "best"}, {"start": "zero"}, {"complement_rank": 0},
        {"density": 2}, {"rank": 0},
    ):  # fmt: skip
        with pytest.raises(ValueError):
            convert_to_lost(model, **options)  # type: ignore[arg-type]
        assert not [m for m in model.modules() if isinstance(m, LOSTLinear)]


def test_conv1d_and_its_bias() -> None:
    """GPT-2's layers hold their matrix the other way round."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2)).eval()
    dense = model.transformer.h[0].mlp.c_fc
    with torch.no_grad():
        dense.bias.normal_()
    report = convert_to_lost(model, rank=0.25, density=0.1)
    layer = model.transformer.h[0].mlp.c_fc
    assert isinstance(layer, LOSTLinear)
    assert (layer.in_features, layer.out_features) == (32, 128)
    assert torch.equal(layer.bias, dense.bias)
    assert layer.values is not None
    assert torch.equal(layer.values, dense.weight.T[:, layer.index])
    assert len(report.layers) == 4
    assert torch.isfinite(model(input_ids=TOKENS).logits).all()


def test_layers_with_one_matrix_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    assert list(target_layers(model)) == ["2"]
    assert list(target_layers(nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8)))) == ["1"]


@pytest.mark.parametrize("spec", ["lost(rank=8, density=0.1)", "sltrain(rank=8)", "cola(rank=8)", "low_rank(rank=8)"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_model_comes_back_with_its_channels(spec: str, tied: bool, tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=tied)
    SPARSITIES.build(spec).attach(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(tmp_path)
    assert len(json.loads((tmp_path / "config.json").read_text())["lost"]) == 14
    again = load_lost(tmp_path)
    assert torch.equal(again(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)
    model.save_pretrained(tmp_path / "pieces", max_shard_size="20KB")
    assert (tmp_path / "pieces" / "model.safetensors.index.json").exists()
    pieces = load_lost(tmp_path / "pieces")
    assert torch.equal(pieces(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)
    next((tmp_path / "pieces").glob("*.safetensors")).unlink()
    with pytest.raises(InputError, match="lacks model-0000"):
        load_lost(tmp_path / "pieces")


def test_a_saved_model_is_a_model_of_a_comparison(tmp_path: Path) -> None:
    """AutoModel would leave its layers random; from its configuration alone it is dense again."""
    model = llama()
    convert_to_lost(model, rank=8, density=0.1)
    model.save_pretrained(tmp_path)
    again = build_model(str(tmp_path), vocab_size=50, sequence_length=16).eval()
    assert torch.equal(again(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)
    fresh = build_model(str(tmp_path), vocab_size=50, sequence_length=16, random_weights=True)
    assert not hasattr(fresh.config, "lost")
    assert list(target_layers(fresh))


def test_half_precision_comes_back(tmp_path: Path) -> None:
    model = llama().to(torch.bfloat16)
    convert_to_lost(model, rank=8, density=0.1)
    model.save_pretrained(tmp_path)
    again = load_lost(tmp_path)
    assert again.dtype == torch.bfloat16
    # Not the outputs: .to() has rounded the model's rotary frequencies as well.
    theirs = model.state_dict()
    assert all(torch.equal(weight, theirs[name]) for name, weight in again.state_dict().items())


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(InputError, match="holds a dense model"):
        load_lost(tmp_path / "dense")
    with pytest.raises(InputError, match=r"has no config\.json"):
        load_lost(tmp_path / "nothing")
    convert_to_lost(model, rank=8, density=0.1)
    model.save_pretrained(tmp_path / "lost")
    path = tmp_path / "lost" / "config.json"
    config = json.loads(path.read_text())
    config["lost"]["model.layers.1.mlp.up_proj"]["columns"] = 5
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"size mismatch for model\.layers\.1\.mlp\.up_proj"):
        load_lost(tmp_path / "lost")
    del config["lost"]["model.layers.1.mlp.up_proj"]
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"size mismatch for model\.layers\.1\.mlp\.up_proj\.weight"):
        load_lost(tmp_path / "lost")


@pytest.mark.parametrize("spec", ["lost(rank=8, density=0.1)", "cola(rank=8)", "sltrain(rank=8)"])
def test_plain_transformers_stops_at_low_rank_layers(spec: str, tmp_path: Path) -> None:
    """Whatever class loads them: random layers with a warning only would go unnoticed."""
    model = llama()
    SPARSITIES.build(spec).attach(model)
    model.save_pretrained(tmp_path)
    for kind in (AutoModelForCausalLM, LlamaForCausalLM, AutoModel):
        with pytest.raises(RuntimeError, match="mismatch"):
            kind.from_pretrained(tmp_path)
    assert torch.equal(load_lost(tmp_path)(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)
    # Nor does a low-rank layer take a dense matrix.
    with pytest.raises(RuntimeError, match=r"a dense matrix \(32, 32\) in the checkpoint, a low-rank layer here"):
        model.load_state_dict(llama().state_dict())


def test_folders_of_earlier_versions_have_no_mark_and_load(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = llama()
    convert_to_lost(model, rank=8, density=0.1)
    model.save_pretrained(tmp_path)
    kept = {n: w for n, w in load_file(tmp_path / "model.safetensors").items() if w.shape != (1,)}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(load_lost(tmp_path)(input_ids=TOKENS).logits, model(input_ids=TOKENS).logits)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["lost(rank=8, density=0.1, activation=none)", "sltrain(rank=8)"])
def test_a_merged_model_loads_in_plain_transformers_in_a_new_process(spec: str, tmp_path: Path) -> None:
    model = llama()
    SPARSITIES.build(spec).attach(model)
    with torch.no_grad():
        before = model(input_ids=TOKENS).logits
        merge_lost(model).save_pretrained(tmp_path)
    if spec.startswith("sltrain"):
        plain = AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(plain(input_ids=TOKENS).logits, before, rtol=1e-4, atol=1e-5)
        return
    code = (
        "import sys, torch, transformers; from safetensors.torch import save_file;"
        f"m = transformers.AutoModelForCausalLM.from_pretrained(r'{tmp_path}').eval();"
        "y = m(input_ids=torch.arange(24).view(2, 12)).logits.detach();"
        f"save_file({{'y': y}}, r'{tmp_path / 'y.safetensors'}'); assert 'lossmith' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)
    from safetensors.torch import load_file

    torch.testing.assert_close(load_file(tmp_path / "y.safetensors")["y"], before, rtol=1e-4, atol=1e-5)


def test_a_model_with_activations_is_not_merged() -> None:
    model = llama()
    convert_to_lost(model, rank=8)
    with pytest.raises(RuntimeError, match="cannot be merged"):
        merge_lost(model)
    assert len(lost_report(model).layers) == 14


def test_channels_come_from_the_checkpoint_not_from_the_new_weights() -> None:
    one, other = llama(), llama()
    with torch.no_grad():
        for p in other.parameters():
            p.normal_()
    for model in (one, other):
        convert_to_lost(model, rank=8, density=0.2)
    name = "model.layers.0.mlp.up_proj"
    assert one.get_submodule(name).index.tolist() != other.get_submodule(name).index.tolist()
    other.load_state_dict(one.state_dict())
    assert torch.equal(other(input_ids=TOKENS).logits, one(input_ids=TOKENS).logits)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lost(rank=0)", "rank must be"),
        ("lost(density=2)", "density must be"),
        ("lost(gamma=-1)", "gamma must be"),
        ("lost(activation=relu)", "activation must be"),
        ("lost(columns=best)", "columns must be"),
        ("lost(start=zero)", "start must be"),
        ("lost(decomposition=qr)", "decomposition must be"),
        ("lost(sparsity=0.1)", "has no option 'sparsity'"),
        ("sltrain(density=0)", "density must be"),
        ("cola(rank=1.5)", "rank must be"),
    ],
)
def test_arms_refuse_what_cannot_be_meant_before_anything_is_spent(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SPARSITIES.build(spec)


def test_building_an_arm_consumes_no_random_numbers() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    for name in ("lost", "sltrain", "cola", "low_rank"):
        SPARSITIES.build(name)
    assert torch.equal(torch.rand(3), expected)


def test_the_values_of_sltrain_count_as_parameters_of_a_product() -> None:
    model = llama()
    SPARSITIES.build("sltrain(rank=8, density=0.1)").attach(model)
    layers = [m for m in model.modules() if isinstance(m, SLTrainLinear)]
    assert matmul_parameters(model) == sum(8 * (m.in_features + m.out_features) + m.entries for m in layers) + 50 * 32


@pytest.mark.parametrize("spec", ["sltrain(rank=8, density=0.1)", "lost(rank=8)", "low_rank(rank=8)"])
def test_flops_are_those_of_the_product_that_is_made(spec: str) -> None:
    """SLTrain multiplies by the dense matrix, whatever its parameters; the others by their own."""
    dense, model = llama(), llama()
    SPARSITIES.build(spec).attach(model)
    multiplied = matmul_parameters(model) + extra_multiplications(model)
    if spec.startswith("sltrain"):
        assert multiplied == matmul_parameters(dense) > matmul_parameters(model)
    else:
        assert multiplied == matmul_parameters(model)
    assert extra_multiplications(dense) == 0


@pytest.mark.slow
def test_a_comparison_counts_the_flops_of_sltrain(text_folder: Path, tmp_path: Path) -> None:
    from lossmith.studies.compare import run_compare
    from lossmith.studies.settings import Execution, make_settings

    arms = ["dense", {"sltrain": {"weights": "sltrain(rank=4)"}}, {"lost": {"weights": "lost(rank=4)"}}]
    settings = make_settings(
        {
            "data": str(text_folder), "arms": arms, "model": "nano", "vocab_size": 300, "sequence_length": 16,
            "batch_size": 2, "tokens": 64, "eval_tokens": 100, "evaluations": 1, "seeds": 1,
        }
    )  # fmt: skip
    found = run_compare(settings, Execution(out=tmp_path / "out", jobs=1))
    assert not [run.error for run in found.runs if run.error]
    flops = {run.arm: run.cost.flops for run in found.runs}
    assert flops["sltrain"] == flops["dense"] > flops["lost"]
