"""The study of representation geometry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lossmith.data import train_tokenizer
from lossmith.studies.representation_geometry import ARMS, STUDY, experiment, prepare
from lossmith.studies.settings import Execution
from lossmith.studies.study import run_study

TEXTS = [f"number {i} is followed by {i + 1}, and {i * i} is its square" for i in range(200)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return path


@pytest.mark.slow
def test_smoke_measures_everything(tmp_path: Path) -> None:
    comparison = run_study(STUDY, "smoke", execution=Execution(out=tmp_path, jobs=2))
    assert {run.arm for run in comparison.runs} == set(ARMS)
    assert all(set(STUDY.metrics) <= set(run.metrics) for run in comparison.runs)


def test_the_users_text(corpus: Path, tmp_path: Path) -> None:
    options = {**STUDY.options["smoke"], "vocab_size": 300, "data": str(corpus)}
    options |= prepare(options, tmp_path)
    start = experiment("start", 0, options, tmp_path / "a")
    end = experiment("end", 0, options, tmp_path / "b")
    assert end.metrics["loss"] < start.metrics["loss"]
    assert (start.cost.steps, end.cost.steps) == (0, 8)
    removed = experiment("end-removed", 0, options, tmp_path / "c")
    assert removed.metrics["rankme"] == end.metrics["rankme"]
    assert removed.metrics["loss"] != end.metrics["loss"]


def test_full_takes_published_revisions(corpus: Path, tmp_path: Path) -> None:
    tokenizer: Any = train_tokenizer(TEXTS, vocab_size=300)
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    for revision in ("step0", "step143000"):
        config = GPTNeoXConfig(
            vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        )
        GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "pythia" / revision)
        tokenizer.save_pretrained(tmp_path / "pythia" / revision)
    options = {
        **STUDY.options["full"],
        "model": str(tmp_path / "pythia"),
        "data": str(corpus),
        "sequence_length": 8,
        "samples": 100,
        "ranks": [2, 20],
        "directions": 2,
    }
    assert prepare(options, tmp_path) == {}
    found = [experiment(arm, 0, options, tmp_path).metrics for arm in ("start", "end-retained")]
    assert found[0]["rankme"] != found[1]["rankme"]
    assert all(set(metrics) == set(STUDY.metrics) for metrics in found)
