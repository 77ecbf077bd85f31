"""A pruned checkpoint beside its dense one: language models with and without text, encoders, pictures, no room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lossmith.sparsity.measured_checkpoint as module
from lossmith.errors import InputError
from lossmith.sparsity.compact import save_compact
from lossmith.sparsity.magnitude import apply_masks, one_shot_masks
from lossmith.sparsity.magnitude_files import prune_checkpoint
from lossmith.sparsity.measured_checkpoint import compare_checkpoints, load_checkpoint


def test_a_language_model_has_all_four_numbers(small_gpt2: Path, text_folder: Path, tmp_path: Path) -> None:
    prune_checkpoint(small_gpt2, tmp_path / "pruned", 0.5)
    found = compare_checkpoints(small_gpt2, tmp_path / "pruned", data=str(text_folder), texts=5, repeats=1)
    assert found.pruned.file_ratio == pytest.approx(1, abs=0.01)
    assert found.pruned.memory_ratio == 1
    assert found.pruned.quality is not None
    assert found.pruned.quality.examples <= 5
    assert found.sparse is None
    assert "none of the 8 linear layers is faster as a sparse matrix" in found.summary()


def test_a_compact_checkpoint_is_the_same_model_in_a_smaller_file(small_gpt2: Path, tmp_path: Path) -> None:
    prune_checkpoint(small_gpt2, tmp_path / "pruned", 0.9)
    size = save_compact(tmp_path / "pruned", tmp_path / "compact").after
    found = compare_checkpoints(small_gpt2, tmp_path / "compact", texts=3, repeats=1)
    assert found.pruned.sparse.file_bytes == size
    assert "smaller on disk, as large in memory" in found.pruned.verdict
    given = compare_checkpoints(small_gpt2, tmp_path / "pruned", texts=3, file=size, repeats=1)
    assert given.pruned.sparse.file_bytes == size
    assert given.pruned.quality == found.pruned.quality


def test_faster_layers_have_a_line_of_their_own(
    small_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lossmith.sparsity.sparse_linear._speed", lambda weight, layer, rows: 2.0)
    prune_checkpoint(small_gpt2, tmp_path / "pruned", 0.9)
    found = compare_checkpoints(small_gpt2, tmp_path / "pruned", texts=3, repeats=1)
    assert found.sparse is not None
    assert found.sparse.memory_ratio < 1
    assert found.sparse.quality is not None
    assert found.pruned.quality is not None
    assert found.sparse.quality.sparse == pytest.approx(found.pruned.quality.sparse, abs=1e-5)
    assert "with sparse matrices against dense, here" in found.summary()


def _models(kind: str) -> Any:
    import transformers as t

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    if kind == "bert":
        return t.BertForSequenceClassification(t.BertConfig(vocab_size=50, max_position_embeddings=20, **small))
    if kind == "vit":
        return t.ViTForImageClassification(t.ViTConfig(image_size=16, patch_size=4, **small))
    if kind == "clip":
        text = {**small, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 20}
        vision = {**small, "image_size": 16, "patch_size": 4}
        return t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    if kind == "t5":
        config = t.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
        return t.T5ForConditionalGeneration(config)
    return t.GPT2LMHeadModel(t.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=20, vocab_size=50))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("bert", "BertForSequenceClassification is no causal"),
        ("vit", "ViTForImageClassification is no causal"),
        ("clip", "CLIPModel is no causal"),
        ("t5", "T5ForConditionalGeneration is no causal"),
        ("gpt2", "has no tokenizer"),
    ],
)
def test_other_models_are_measured_without_a_loss(kind: str, reason: str, tmp_path: Path, text_folder: Path) -> None:
    torch.manual_seed(0)
    model = _models(kind)
    model.save_pretrained(tmp_path / "dense")
    apply_masks(model, one_shot_masks(model, 0.5)).save_pretrained(tmp_path / "pruned")
    found = compare_checkpoints(tmp_path / "dense", tmp_path / "pruned", repeats=1)
    assert found.pruned.quality is None
    assert found.notes[0].startswith("loss not measured: ")
    assert reason in found.summary()
    with pytest.raises(InputError, match=r"the loss on .* cannot be measured"):
        compare_checkpoints(tmp_path / "dense", tmp_path / "pruned", data=str(text_folder), repeats=1)


def test_a_model_that_wants_other_inputs_is_not_measured(tmp_path: Path) -> None:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    sound = {"conv_dim": (8,), "conv_kernel": (3,), "conv_stride": (2,), "num_conv_pos_embedding_groups": 2}
    config = Wav2Vec2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, **sound)
    Wav2Vec2Model(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="not measured: Wav2Vec2Model does not run on made-up input_ids"):
        compare_checkpoints(tmp_path, tmp_path, repeats=1)


def test_a_model_with_low_rank_layers_is_loaded_as_it_was_saved(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from lossmith.sparsity import LOSTLinear, convert_to_lost

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, intermediate_size=64, max_position_embeddings=20, **sizes))
    model.save_pretrained(tmp_path / "dense")
    convert_to_lost(model, rank=4)
    model.save_pretrained(tmp_path / "lost")
    loaded: Any = load_checkpoint(tmp_path / "lost")
    assert not loaded.training
    assert isinstance(loaded.model.layers[0].self_attn.q_proj, LOSTLinear)
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model.eval()(tokens).logits)
    found = compare_checkpoints(tmp_path / "dense", tmp_path / "lost", repeats=1, max_length=8)
    assert found.layers is None
    assert "smaller on disk" in found.summary().splitlines()[0]
    assert "sparse matri" not in found.summary()


def test_models_that_do_not_fit_are_not_loaded(small_gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_free_memory", lambda: 1000)
    with pytest.raises(InputError, match=r"not measured: both models at once need about .* MiB, 0 MiB are free"):
        compare_checkpoints(small_gpt2, small_gpt2)
    monkeypatch.undo()
    free = module._free_memory()
    assert free is None or free > 2**20


def test_a_folder_without_a_model_is_named(small_gpt2: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no \.safetensors"):
        compare_checkpoints(small_gpt2, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be loaded"):
        compare_checkpoints(small_gpt2, tmp_path)
