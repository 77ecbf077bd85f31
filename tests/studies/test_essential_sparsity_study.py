"""The study of essential sparsity: every arm, and a language model of one's own at full scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lossmith.studies.study import get_study

STUDY = get_study("essential-sparsity")
TINY = {
    **STUDY.options["smoke"],
    "grid": [0, 0.5, 0.9, 0.98],
    "pretraining_steps": 4,
    "finetuning_steps": 2,
    "network": "mlp(16, 16)",
}


SLOW = ("uniform", "random", "erk", "lottery")


@pytest.mark.parametrize("arm", [pytest.param(a, marks=pytest.mark.slow) if a in SLOW else a for a in STUDY.arms])
def test_every_arm_measures_what_its_claims_need(arm: str, tmp_path: Path) -> None:
    assert STUDY.experiment is not None
    options: dict[str, Any] = TINY if arm != "lottery" else {**TINY, "finetuning_steps": 1}
    found = STUDY.experiment(arm, 1, options, tmp_path)
    for claim in STUDY.claims:
        if claim.arm == arm or (claim.against or STUDY.baseline) == arm:
            assert claim.metric in found.metrics
    assert found.cost.steps > 0


def test_a_language_model_takes_the_path_of_the_full_scale(tmp_path: Path, text_folder: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from lossmith.data import prepare

    tokenizer = prepare(text_folder, vocab_size=300).tokenizer
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=64, vocab_size=len(tokenizer))
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    own = {"model": str(tmp_path / "model"), "data": str(text_folder), "texts": 4, "max_length": 16}
    assert STUDY.experiment is not None
    for arm in ("dense", "magnitude", "two-of-four", "lottery"):
        found = STUDY.experiment(arm, 0, {**STUDY.options["full"], **own}, tmp_path)
        assert ("self/score@0.5" in found.metrics) == (arm != "lottery")
        assert found.cost.scored_tokens > 0


def test_arms_of_a_seed_share_what_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pre-training, one fine-tuning without pruning; the score is that of an arm that is alone."""
    import lossmith.studies.tensor_training as training

    assert STUDY.experiment is not None
    assert STUDY.prepare is not None
    alone = STUDY.experiment("two-of-four", 0, TINY, tmp_path / "alone")
    done = []
    original = training.train_on_tensors
    monkeypatch.setattr(training, "train_on_tensors", lambda *a, **k: done.append(k["steps"]) or original(*a, **k))
    options = {**TINY, **STUDY.prepare(TINY, tmp_path)}
    dense = STUDY.experiment("dense", 0, options, tmp_path / "dense")
    assert done == [4, 2, 4, 2]
    shared = STUDY.experiment("two-of-four", 0, options, tmp_path / "pattern")
    assert done == [4, 2, 4, 2, 2]
    assert shared.metrics == alone.metrics
    assert shared.cost.steps == dense.cost.steps == 6
