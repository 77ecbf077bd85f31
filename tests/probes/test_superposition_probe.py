"""The superposition of an unembedding: the same as over all pairs, for any model, in bounded memory."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lossmith.errors import InputError
from lossmith.probes import find_unembedding, superposition

SMALL = {"vocab_size": 90, "bos_token_id": 1, "eos_token_id": 2}


def obvious(weight: torch.Tensor) -> tuple[float, float]:
    """Mean square and mean absolute cosine over all pairs, one by one, in float64."""
    unit = nn.functional.normalize(weight.double(), dim=-1)
    cosines = [float(unit[i] @ unit[j]) for i in range(len(unit)) for j in range(i)]
    return sum(c * c for c in cosines) / len(cosines), sum(map(abs, cosines)) / len(cosines)


def saved(folder: Path, architecture: str) -> tuple[str, Any]:
    """A small model of an architecture, in memory and on disk."""
    import transformers

    kinds = {
        "gpt2": (transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, **SMALL), "GPT2LMHeadModel"),
        "llama": (
            transformers.LlamaConfig(
                hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, **SMALL
            ),
            "LlamaForCausalLM",
        ),
        "opt": (
            transformers.OPTConfig(
                hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=24, word_embed_proj_dim=8, **SMALL
            ),
            "OPTForCausalLM",
        ),
        "neox": (
            transformers.GPTNeoXConfig(
                hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, **SMALL
            ),
            "GPTNeoXForCausalLM",
        ),
        "bert": (
            transformers.BertConfig(
                hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=90
            ),
            "BertForMaskedLM",
        ),
        "encoder": (
            transformers.BertConfig(
                hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=90
            ),
            "BertModel",
        ),
    }
    config, name = kinds[architecture]
    torch.manual_seed(0)
    model = getattr(transformers, name)(config)
    model.save_pretrained(folder)
    return str(folder), model


@given(rows=st.integers(2, 30), columns=st.integers(1, 12), block=st.integers(1, 40), seed=st.integers(0, 5))
def test_blocks_of_any_size_give_what_all_pairs_give(rows: int, columns: int, block: int, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) + 0.3
    square, absolute = obvious(weight)
    report = superposition(weight, block_rows=block, pair_rows=100)
    assert report.mean_square_overlap == pytest.approx(square, rel=1e-9, abs=1e-12)
    assert report.mean_absolute_overlap == pytest.approx(absolute, rel=1e-5, abs=1e-6)
    assert report.absolute_error == 0
    assert report.mean_square_overlap >= report.welch - 1e-12
    assert sum(report.cosines.counts) == rows * (rows - 1)
    centred = weight.double() - weight.double().mean(0)
    if (centred.norm(dim=-1) > 1e-3).all():
        assert report.centred_mean_square_overlap == pytest.approx(obvious(centred)[0], rel=1e-6, abs=1e-9)


def test_the_worked_example_and_the_frames_that_reach_the_bound() -> None:
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    report = superposition(weight)
    assert report.mean_square_overlap == pytest.approx(1 / 3)
    assert report.mean_absolute_overlap == pytest.approx(0.4666667, abs=1e-6)
    assert (report.welch, report.one_over_m, report.represented) == (0.25, 0.5, 1.0)
    mercedes = torch.tensor([[math.cos(a), math.sin(a)] for a in (0.0, 2 * math.pi / 3, 4 * math.pi / 3)])
    assert superposition(mercedes).mean_square_overlap == pytest.approx(0.25, abs=1e-7)
    assert superposition(torch.eye(6)).mean_square_overlap == 0


def test_many_random_rows_overlap_by_one_over_m_and_a_sample_of_rows_says_how_sure_it_is() -> None:
    weight = torch.randn(6000, 64, generator=torch.Generator().manual_seed(0))
    report = superposition(weight, pair_rows=300)
    assert report.ratio == pytest.approx(1, abs=0.005)
    assert report.centred_ratio == pytest.approx(1, abs=0.005)
    # Mean of |cos| of random directions: Gamma(m/2) / (sqrt(pi) Gamma((m+1)/2)).
    exact = math.exp(math.lgamma(32) - math.lgamma(32.5)) / math.sqrt(math.pi)
    assert report.mean_absolute_overlap == pytest.approx(exact, abs=5 * report.absolute_error + 1e-4)
    assert 0 < report.absolute_error < 1e-3


def test_a_common_direction_is_seen_and_taken_away() -> None:
    """Softmax does not see what all rows share; squared overlaps do."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3000, 32, generator=generator)
    shifted = superposition(weight + 3 * torch.ones(32))
    assert shifted.ratio > 20
    assert shifted.centred_ratio == pytest.approx(superposition(weight).centred_ratio, rel=1e-4)
    assert shifted.mean_row > 0.9


def test_large_matrices_in_float32_agree_with_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(4000, 48, generator=torch.Generator().manual_seed(1)) + 0.2
    exact = superposition(weight)
    monkeypatch.setattr("lossmith.probes.superposition_report._SMALL", 0.0)
    fast = superposition(weight)
    assert fast.mean_square_overlap == pytest.approx(exact.mean_square_overlap, rel=2e-6)
    assert fast.centred_mean_square_overlap == pytest.approx(exact.centred_mean_square_overlap, rel=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_other_dtypes_and_strides_are_measured_as_they_are(dtype: torch.dtype) -> None:
    weight = torch.randn(12, 40, generator=torch.Generator().manual_seed(0)).to(dtype).T
    assert not weight.is_contiguous()
    before = weight.clone()
    report = superposition(weight)
    assert torch.equal(weight.double(), before.double())
    assert report.mean_square_overlap == pytest.approx(obvious(weight)[0], rel=1e-9)
    assert report.dtype == str(dtype).removeprefix("torch.")


def test_dead_and_repeated_rows_are_counted_and_the_dead_left_out() -> None:
    weight = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([weight, torch.zeros(3, 6), weight[:2]])
    report = superposition(padded, block_rows=4)
    assert (report.dead, report.duplicates) == (3, 2)
    living = torch.cat([weight, weight[:2]])
    assert report.mean_square_overlap == pytest.approx(obvious(living)[0], rel=1e-9)
    assert report.mean_absolute_overlap == pytest.approx(obvious(living)[1], rel=1e-5)
    centred = living.double() - living.double().mean(0)
    assert report.centred_mean_square_overlap == pytest.approx(obvious(centred)[0], rel=1e-9)
    assert "3 rows have no direction" in report.summary()
    assert "2 rows repeat others" in report.summary()


@pytest.mark.parametrize(
    "architecture, shape, width, tied",
    [
        ("gpt2", (90, 16), 16, True),
        ("llama", (90, 16), 16, False),
        ("opt", (90, 8), 16, True),
        ("neox", (90, 16), 16, False),
        ("bert", (90, 16), 16, True),
    ],
)
def test_from_disk_it_is_that_of_the_model_in_memory(
    architecture: str, shape: tuple[int, int], width: int, tied: bool, tmp_path: Path
) -> None:
    folder, model = saved(tmp_path / "model", architecture)
    from_disk, in_memory = superposition(folder), superposition(model)
    assert (from_disk.rows, from_disk.dimensions) == shape
    assert (from_disk.width, from_disk.tied) == (width, tied)
    assert (in_memory.width, in_memory.tied) == (width, tied)
    assert from_disk.mean_square_overlap == in_memory.mean_square_overlap
    assert from_disk.norms == in_memory.norms
    assert (from_disk.bias is not None) == (architecture == "bert")
    head = model.get_output_embeddings().weight.detach()
    # The padding token of some models has a row of zeros.
    head = head[head.norm(dim=-1) > 0]
    assert from_disk.mean_square_overlap == pytest.approx(obvious(head)[0], rel=1e-6)


def test_from_disk_only_blocks_of_the_output_layer_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with the weights in several files, and with the old names of GPT-2, which lack the prefix."""
    from safetensors.torch import load_file, save_file

    folder, model = saved(tmp_path / "model", "gpt2")
    expected = superposition(model)
    path = tmp_path / "model" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(path).items()}
    path.unlink()
    first = {name: value for name, value in tensors.items() if name != "wte.weight"}
    save_file(first, tmp_path / "model" / "model-00001-of-00002.safetensors")
    save_file({"wte.weight": tensors["wte.weight"]}, tmp_path / "model" / "model-00002-of-00002.safetensors")
    index = {n: f"model-0000{2 if n == 'wte.weight' else 1}-of-00002.safetensors" for n in tensors}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "model" / "model-00001-of-00002.safetensors").unlink()
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)
    found = find_unembedding(folder)
    assert found.parameter == "wte.weight"
    assert [(first, tuple(block.shape)) for first, block in found.blocks(40)] == [
        (0, (40, 16)),
        (40, (40, 16)),
        (80, (10, 16)),
    ]
    assert superposition(folder).mean_square_overlap == expected.mean_square_overlap


def test_models_without_unembedding_and_broken_ones_are_one_sentence(tmp_path: Path) -> None:
    encoder, model = saved(tmp_path / "encoder", "encoder")
    for source in (encoder, model):
        with pytest.raises(InputError, match="has no unembedding: give a model with an output layer over tokens"):
            superposition(source)
    folder, model = saved(tmp_path / "model", "gpt2")
    with torch.no_grad():
        model.transformer.wte.weight[7, 3] = math.nan
    with pytest.raises(InputError, match=r"wte\.weight|lm_head\.weight"):
        superposition(model)
    model.save_pretrained(folder)
    with pytest.raises(InputError, match=r"transformer\.wte\.weight of .* has a value in row 7 that is not finite"):
        superposition(folder, block_rows=5)
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no weights \(model\.safetensors\)"):
        superposition(folder)
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match="only pickled weights"):
        superposition(folder)
    with pytest.raises(InputError, match="neither a folder nor a model on the hub"):
        superposition(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="is a file; give the folder"):
        superposition(tmp_path / "model" / "config.json")


def test_wrong_matrices_and_options_are_named() -> None:
    for weight, message in (
        (torch.ones(1, 4), "at least two rows"),
        (torch.ones(4), "at least two rows"),
        (torch.zeros(3, 4), "0 rows with a direction"),
    ):
        with pytest.raises(ValueError, match=message):
            superposition(weight)
    with pytest.raises(TypeError, match=r"torch\.int64"):
        superposition(torch.ones(3, 4, dtype=torch.long))
    with pytest.raises(TypeError, match="got dict"):
        superposition({})
    with pytest.raises(ValueError, match="block_rows"):
        superposition(torch.eye(3), block_rows=0)


def test_a_report_is_drawn_and_written(tmp_path: Path) -> None:
    report = superposition(nn.Linear(8, 50))
    assert report.bias is not None
    assert "bias" in report.summary()
    report.plot(tmp_path / "probe.png")
    assert (tmp_path / "probe.png").read_bytes().startswith(b"\x89PNG")
    value = json.loads(report.to_json(tmp_path / "probe.json"))
    assert value == json.loads((tmp_path / "probe.json").read_text())
    assert value["ratio"] == pytest.approx(value["mean_square_overlap"] * 8)
    assert sum(value["norm_histogram"]["counts"]) == 50
    superposition(torch.eye(3)).plot(tmp_path / "same-norms.svg")
