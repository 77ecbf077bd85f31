"""The study of flatness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lossmith.data import train_tokenizer
from lossmith.errors import InputError
from lossmith.studies.flatness import ARMS, STUDY, experiment
from lossmith.studies.settings import Execution
from lossmith.studies.study import run_study

TEXTS = [f"number {i} is followed by {i + 1}, and {i * i} is its square" for i in range(60)]


@pytest.mark.slow
def test_smoke_measures_everything(tmp_path: Path) -> None:
    comparison = run_study(STUDY, "smoke", execution=Execution(out=tmp_path, jobs=2))
    assert {run.arm for run in comparison.runs} == set(ARMS)
    assert not any(run.error for run in comparison.runs)


@pytest.mark.slow
def test_arms_start_alike_and_move_as_they_say(tmp_path: Path) -> None:
    found = {arm: experiment(arm, 0, STUDY.options["smoke"], tmp_path) for arm in ("converged", "control", "sgd-40000")}
    again = experiment("control", 0, STUDY.options["smoke"], tmp_path)
    assert again.metrics == found["control"].metrics
    assert found["control"].cost.steps == 2 * found["converged"].cost.steps == 200
    assert found["control"].metrics["gap"] < found["converged"].metrics["gap"]
    assert found["sgd-40000"].metrics["trace"] < found["control"].metrics["trace"]
    assert set(found["sgd-40000"].metrics) == set(STUDY.metrics)


def full(tmp_path: Path) -> dict[str, Any]:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    tokenizer: Any = train_tokenizer(TEXTS, vocab_size=300)
    torch.manual_seed(0)
    for revision in ("step100000", "step110000"):
        config = GPTNeoXConfig(
            vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
        GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "pythia" / revision)
        tokenizer.save_pretrained(tmp_path / "pythia" / revision)
    corpus, labelled = tmp_path / "corpus.jsonl", tmp_path / "labelled.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    labelled.write_text("\n".join(json.dumps({"text": t, "label": i % 2}) for i, t in enumerate(TEXTS)))
    models = {
        arm: [str(tmp_path / "pythia"), revision] for arm, (_, revision) in STUDY.options["full"]["models"].items()
    }
    small: dict[str, Any] = {
        "models": models,
        "corpus": str(corpus),
        "data": str(labelled),
        "samples": 8,
        "sequence_length": 16,
    }
    small["enlarged"] = {"enlarge": 2, "layers": 2}
    return {**STUDY.options["full"], **small, "shots": 4, "n_probes": 2}


@pytest.mark.slow
def test_full_takes_published_revisions_and_the_users_labelled_texts(tmp_path: Path) -> None:
    options = full(tmp_path)
    found = [experiment(arm, 0, options, tmp_path).metrics for arm in ("converged", "sgd-10000")]
    assert found[0]["trace"] != found[1]["trace"]
    assert all(0 <= metrics["accuracy"] <= 1 for metrics in found)
    with pytest.raises(InputError, match="over 30 texts each, got 30 in the smallest"):
        experiment("converged", 0, {**options, "shots": 30}, tmp_path)
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": "a"}))
    with pytest.raises(InputError, match="lacks label; it holds text"):
        experiment("converged", 0, {**options, "data": str(other)}, tmp_path)
