"""The study of model complexity under tuned heads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lossmith.data import train_tokenizer
from lossmith.errors import InputError
from lossmith.studies.hmm_complexity import ARMS, STUDY, experiment, read_features

SMOKE = STUDY.options["smoke"]


def test_every_arm_has_its_risks(tmp_path: Path) -> None:
    found = {arm: experiment(arm, 0, SMOKE, tmp_path).metrics for arm in ("0.05", "1", "1-ridge", "10")}
    assert set(found) <= set(ARMS)
    assert found["1"]["excess"] > found["0.05"]["excess"]
    assert found["1-ridge"]["excess"] < found["1"]["excess"]
    assert all("features" in metrics for metrics in found.values())


def test_the_users_features(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    x = draw.standard_normal((80, 30))
    table = np.c_[x, (x[:, 0] > 0).astype(int)]
    header = ",".join(f"f{i}" for i in range(31))
    np.savetxt(tmp_path / "f.csv", table, delimiter=",", header=header, comments="")
    options = {**SMOKE, "data": str(tmp_path / "f.csv")}
    assert "accuracy" in experiment("0.2", 0, options, tmp_path).metrics
    # Wider than the user's features: no measurement, not an error.
    assert "features" not in experiment("10", 0, options, tmp_path).metrics
    (tmp_path / "bad.csv").write_text("a,b\n1,x\n")
    with pytest.raises(InputError, match="must hold numbers"):
        read_features(tmp_path / "bad.csv")
    with pytest.raises(InputError, match="must be a"):
        read_features(tmp_path / "f.txt")


def test_full_takes_features_of_a_frozen_model(tmp_path: Path) -> None:
    texts = [f"{'good' if i % 2 else 'bad'} number {i}" for i in range(60)]
    tokenizer: Any = train_tokenizer(texts, vocab_size=280)
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaModel(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [json.dumps({"text": text, "label": i % 2}) for i, text in enumerate(texts)]
    (tmp_path / "texts.jsonl").write_text("\n".join(rows))
    options = {
        **STUDY.options["full"],
        "model": str(tmp_path / "model"),
        "data": str(tmp_path / "texts.jsonl"),
        "rows": 60,
        "feature_examples": 20,
        "repeats": 2,
        "splits": 2,
        "examples": 20,
        "states": 4,
    }
    assert experiment("0.2", 0, options, tmp_path).metrics["accuracy"] >= 0
