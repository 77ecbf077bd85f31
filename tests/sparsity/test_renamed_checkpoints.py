"""Checkpoints whose tensors have other names than the parameters of the model, or hold several of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lossmith.errors import InputError
from lossmith.sparsity import apply_masks, one_shot_masks, prune_checkpoint
from lossmith.sparsity.checkpoint_names import Source, parameter_sources
from lossmith.sparsity.magnitude_files import open_weights

SHAPE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
PICTURE: dict[str, Any] = {"image_size": 16, "patch_size": 8}


def _vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**PICTURE, **SHAPE, num_labels=3))


def _vit_base() -> Any:
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(**PICTURE, **SHAPE))


def _clip() -> Any:
    from transformers import CLIPConfig, CLIPModel

    text = {**SHAPE, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1}
    return CLIPModel(CLIPConfig(text_config=text, vision_config={**PICTURE, **SHAPE}, projection_dim=8))


def _bert() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(vocab_size=50, **SHAPE))


def _llava() -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        text_config=LlamaConfig(vocab_size=50, **SHAPE), vision_config=CLIPVisionConfig(**PICTURE, **SHAPE)
    )
    return LlavaForConditionalGeneration(config)


def _dinov2() -> Any:
    """Its file has one matrix for two layers of the model, cut by rows."""
    from transformers import Dinov2Config, Dinov2Model

    return Dinov2Model(Dinov2Config(**PICTURE, **SHAPE, mlp_ratio=2, use_swiglu_ffn=True))


@pytest.mark.parametrize("method", ["magnitude", "uniform", "2:4"])
@pytest.mark.parametrize(
    ("build", "renamed"),
    [(_vit, True), (_vit_base, True), (_clip, False), (_bert, False), (_llava, True), (_dinov2, True)],
)
def test_files_with_other_names_are_pruned_like_the_model(
    build: Callable[[], Any], renamed: bool, method: str, tmp_path: Path
) -> None:
    import transformers
    from safetensors.torch import load_file

    torch.manual_seed(0)
    model = build()
    model.save_pretrained(tmp_path / "dense", max_shard_size="16KB")
    names = {name for path in (tmp_path / "dense").glob("*.safetensors") for name in load_file(path)}
    masks = one_shot_masks(model, 0.4, method=method)
    assert bool(masks.keys() - names) is renamed
    report = prune_checkpoint(tmp_path / "dense", tmp_path / "pruned", 0.4, method=method)
    assert {name for name, _, _ in report.layers} == masks.keys()
    assert report.zeros == sum(int((~mask).sum()) for mask in masks.values())

    apply_masks(model, masks)
    again = type(model).from_pretrained(tmp_path / "pruned")
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    # Plain Transformers finds the same, and every tensor, with the class that it chooses itself.
    loaded, info = transformers.AutoModel.from_pretrained(tmp_path / "pruned", output_loading_info=True)
    # A classifier's file has no pooler; that is all.
    assert all(name.startswith("pooler.") for name in info["missing_keys"])
    part = getattr(again, again.base_model_prefix, again) if type(loaded) is not type(again) else again
    for name, weight in part.state_dict().items():
        assert torch.equal(weight, loaded.state_dict()[name]), name
    names = set(loaded.state_dict())
    assert all(name in names or name.removeprefix(f"{again.base_model_prefix}.") in names for name in masks)


def test_bases_of_models_with_a_head_and_heads_of_bases_are_found() -> None:
    with torch.device("meta"):
        head, base = _vit(), _vit_base()
    query = "encoder.layer.1.attention.attention.query.weight"
    for name in (query, f"vit.{query}"):
        assert parameter_sources(base, [name]) == {"layers.1.attention.q_proj.weight": Source(name)}
        assert parameter_sources(head, [name]) == {"vit.layers.1.attention.q_proj.weight": Source(name)}
    assert parameter_sources(base, ["classifier.weight", "nothing"]) == {}


def test_half_precision_files_with_other_names(tmp_path: Path) -> None:
    for kind in (torch.bfloat16, torch.float16):
        folder = tmp_path / str(kind).removeprefix("torch.")
        torch.manual_seed(0)
        _dinov2().to(kind).save_pretrained(folder)
        report = prune_checkpoint(folder, folder / "pruned", 0.3, method="uniform")
        stored = open_weights(folder / "pruned")
        # Every matrix has its own share, those that lie in one tensor too.
        assert all(zeros == round(0.3 * number) for _, zeros, number in report.layers)
        assert {name: int((stored[name] == 0).sum()) for name in stored} == {n: z for n, z, _ in report.layers}


def test_a_matrix_that_is_made_of_tensors_in_another_way_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import conversion_mapping
    from transformers.core_model_loading import Transpose, WeightConverter

    _vit_base().save_pretrained(tmp_path / "dense")
    rule = WeightConverter("attention.attention.query.weight", "attention.q_proj.weight", operations=[Transpose()])
    rules = conversion_mapping.get_checkpoint_conversion_mapping("ViTModel")
    rest = [r for r in rules if "attention.query" not in r.source_patterns]
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: [*rest, rule])
    with pytest.raises(InputError, match=r"layers\.0\.attention\.q_proj\.weight as part of .*query\.weight in another"):
        prune_checkpoint(tmp_path / "dense", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense"]
