"""The study of dynamic reweighting: runs at smoke, and its full scale on a small local model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lossmith.errors import InputError
from lossmith.reporting import judge, write_all
from lossmith.studies.settings import Execution
from lossmith.studies.study import get_study, run_study

STUDY = get_study("dynamic_reweighting")


@pytest.mark.slow
def test_smoke_measures_everything_and_a_second_start_reads_it_back(tmp_path: Path) -> None:
    execution = Execution(out=tmp_path, jobs=2)
    comparison = run_study(STUDY, "smoke", execution=execution)
    assert not [run.error for run in comparison.runs if run.error]
    assert len(comparison.runs) == 4 * 2
    for run in comparison.runs:
        assert set(run.metrics) == set(STUDY.metrics)
        assert run.train.values
    written = write_all(comparison, tmp_path)
    assert "report.html" in written
    verdicts = {
        c.text: judge(c, comparison.runs, baseline="uniform", comparisons=len(STUDY.claims)) for c in STUDY.claims
    }
    assert {v.verdict for v in verdicts.values()} <= {"supported", "not supported", "inconclusive"}
    again = run_study(STUDY, "smoke", execution=execution)
    assert [run.metrics for run in again.runs] == [run.metrics for run in comparison.runs]
    with pytest.raises(InputError, match="holds another study"):
        run_study(STUDY, "quick", execution=execution)


@pytest.mark.slow
def test_one_experiment_at_toy_size_is_deterministic(tmp_path: Path) -> None:
    """The same arm and seed give the same numbers; another seed gives others."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"def f{i}(x):\n    return x + {i * i}\n\n" for i in range(800)))
    options = {"regression_steps": 5, "steps": 22, "text": str(text)}
    assert STUDY.experiment is not None
    first = STUDY.experiment("linupper", 0, options, tmp_path)
    assert STUDY.experiment("linupper", 0, options, tmp_path).metrics == first.metrics
    assert STUDY.experiment("linupper", 1, options, tmp_path).metrics != first.metrics


@pytest.mark.slow
def test_the_regression_orders_the_strategies_as_reasoned(tmp_path: Path) -> None:
    """The research digest's requirement at its own size, one seed: LinUpper below a quarter of uniform."""
    from lossmith.studies.dynamic_reweighting import regression

    loss = {
        arm: regression(arm, 0, steps=800, folder=tmp_path) for arm in ("uniform", "linupper", "quadratic", "extremes")
    }
    assert loss["linupper"] < 0.25 * loss["uniform"]
    assert loss["quadratic"] < 0.7 * loss["uniform"]
    assert loss["extremes"] >= loss["uniform"]


def test_full_scale_is_the_papers_recipe() -> None:
    assert STUDY.comparison is not None
    settings, claims = STUDY.comparison("full", None)
    assert settings.data == "DKYoon/SlimPajama-6B"
    assert (settings.tokens, settings.sequence_length, settings.batch_size) == (20_000 * 48 * 512, 512, 48)
    assert settings.model_overrides == {"n_layer": 36, "n_head": 24, "n_embd": 768}
    assert {str(arm.options["weighting"]) for arm in settings.arms} >= {"linupper(r=0.4, burn_in_steps=1000)"}
    assert all(claim.metric == "eval/loss" for claim in claims)


@pytest.mark.slow
def test_full_scale_runs_on_a_small_local_gpt2(tmp_path: Path, text_folder: Path) -> None:
    """The same code path with a GPT-2 of one layer from a local folder."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from lossmith.data import prepare

    GPT2LMHeadModel(GPT2Config(vocab_size=512, n_positions=64, n_embd=24, n_layer=1, n_head=24)).save_pretrained(
        tmp_path / "gpt2"
    )
    prepare(text_folder, vocab_size=300).tokenizer.save_pretrained(tmp_path / "gpt2")
    changes: dict[str, Any] = {
        "model": str(tmp_path / "gpt2"),
        "tokens": 3 * 4 * 32,
        "batch_size": 4,
        "sequence_length": 32,
        "eval_tokens": 500,
        "evaluations": 1,
        "model_overrides": {"n_layer": 2, "n_head": 2, "n_embd": 24},
        "training": {"warmup_steps": 1},
    }
    execution = Execution(out=tmp_path / "out", jobs=2)
    comparison = run_study(STUDY, "full", seeds=1, data=str(text_folder), execution=execution, overrides=changes)
    assert not [run.error for run in comparison.runs if run.error]
    config = json.loads((tmp_path / "out/runs/linupper/seed-0/model/config.json").read_text())
    assert config["n_layer"] == 2
    assert {c.text for c in comparison.claims}
