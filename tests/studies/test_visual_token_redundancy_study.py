"""The study of visual token redundancy: every arm, shared models, and a user's own questions at full scale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lossmith.errors import InputError
from lossmith.studies.study import get_study

STUDY = get_study("visual-token-redundancy")
TINY = {**STUDY.options["smoke"], "steps": 2, "questions": 16, "test_questions": 4}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


SLOW = ("divprune", "one-nn", "fastv", "sparsevlm")


@pytest.mark.parametrize("arm", [pytest.param(a, marks=pytest.mark.slow) if a in SLOW else a for a in STUDY.arms])
def test_every_arm_measures_what_its_claims_need(arm: str, models: Path, tmp_path: Path) -> None:
    assert STUDY.experiment is not None
    found = STUDY.experiment(arm, 1, {**TINY, "models": str(models)}, tmp_path)
    for claim in STUDY.claims:
        if claim.arm == arm or (claim.against or STUDY.baseline) == arm:
            # The full model's own differences are zero without being said.
            assert claim.metric in found.metrics
    assert found.cost.flops > 0
    assert ("scratch/long/recovery" in found.metrics) == (arm != "layer-skipping")
    assert sorted(p.name for p in models.iterdir() if p.is_dir() and "training" not in p.name) == [
        "adapted-1",
        "scratch-1",
    ]


@pytest.fixture
def own(tmp_path: Path) -> dict[str, Any]:
    """Small models with weights, and a table of questions with long and short answers."""
    from transformers import LlamaConfig, LlamaForCausalLM, SiglipConfig, SiglipModel

    from lossmith.data import train_tokenizer

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    shapes: Any = {"vision_config": {**small, "image_size": 8, "patch_size": 4}, "text_config": small}
    SiglipModel(SiglipConfig(**shapes)).save_pretrained(tmp_path / "siglip")
    tokenizer = train_tokenizer(["what colour red green everything is red here today"], vocab_size=270)
    config = LlamaConfig(**{**small, "num_hidden_layers": 2}, vocab_size=len(tokenizer))  # type: ignore[arg-type]
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    rows = []
    for number in range(12):
        Image.new("RGB", (10, 10), (20 * number, 0, 0)).save(tmp_path / f"{number}.png")
        for prompt, said in (("what colour", "red"), ("describe", "everything is red here today")):
            rows.append({"image": f"{number}.png", "prompt": prompt, "completion": said})
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "vision": str(tmp_path / "siglip"),
        "trunk": str(tmp_path / "llama"),
        "data": str(tmp_path / "questions.jsonl"),
        "steps": 2,
        "batch_size": 4,
        "test_questions": 4,
    }


@pytest.mark.slow
def test_own_questions_and_models_take_the_path_of_the_full_scale(own: dict[str, Any], tmp_path: Path) -> None:
    assert STUDY.experiment is not None
    for arm in ("answer-attention", "layer-skipping"):
        found = STUDY.experiment(arm, 0, {**STUDY.options["full"], **own}, tmp_path)
        assert "scratch/long/progressive" in found.metrics
        assert "adapted/long/progressive" in found.metrics
    from lossmith.tasks.multimodal import ImageAnswerer

    kinds = {kind: ImageAnswerer.from_pretrained(tmp_path / f"{kind}-0") for kind in ("scratch", "adapted")}
    assert kinds["adapted"].model_.shifted
    assert not kinds["scratch"].model_.shifted
    assert kinds["scratch"].model_.shape == kinds["adapted"].model_.shape
    assert kinds["scratch"].tokenizer_.get_vocab() == kinds["adapted"].tokenizer_.get_vocab()


def test_questions_of_one_length_only_are_refused(own: dict[str, Any], tmp_path: Path) -> None:
    assert STUDY.experiment is not None
    options = {**STUDY.options["full"], **own, "short_words": 9}
    with pytest.raises(InputError, match="no long answers"):
        STUDY.experiment("full", 0, options, tmp_path)
    with pytest.raises(InputError, match="needs --data"):
        STUDY.experiment("full", 1, {**STUDY.options["full"], "vision": None, "trunk": None}, tmp_path)
