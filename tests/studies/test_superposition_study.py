"""The study of superposition: smoke, toy size, one's own models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lossmith.errors import InputError
from lossmith.studies.settings import Execution
from lossmith.studies.study import get_study, run_study
from lossmith.studies.superposition import DECAYS, SHAPES
from lossmith.studies.width_families import OPEN_MODELS, measure_families

STUDY = get_study("superposition")
OPTIONS = dict(STUDY.options["smoke"])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> list[str]:
    """Four GPT-2s of three widths from random weights, with a tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from lossmith.data import prepare

    tokenizer = prepare(text_folder, vocab_size=300).tokenizer
    folder = tmp_path_factory.mktemp("models")
    paths = []
    for number, width in enumerate((8, 12, 16, 16)):
        torch.manual_seed(number)
        config = GPT2Config(n_embd=width, n_layer=1, n_head=2, n_positions=32, vocab_size=len(tokenizer))
        path = folder / f"{number}-{width}"
        GPT2LMHeadModel(config).save_pretrained(path)
        tokenizer.save_pretrained(path)
        paths.append(str(path))
    return paths


@pytest.mark.slow
def test_smoke_measures_everything(tmp_path: Path) -> None:
    comparison = run_study(STUDY, "smoke", execution=Execution(out=tmp_path, jobs=2))
    assert not [run.error for run in comparison.runs if run.error]
    measured = {arm: set() for arm in STUDY.arms}
    for run in comparison.runs:
        measured[run.arm] |= set(run.metrics)
    assert set(STUDY.metrics) <= set().union(*measured.values())
    for claim in STUDY.claims:
        assert claim.metric in measured[claim.against or STUDY.baseline]


@pytest.mark.parametrize("arm", [*DECAYS, "truncation", "one-over-m"])
def test_every_arm_measures_and_repeats_itself(arm: str, tmp_path: Path) -> None:
    assert STUDY.experiment is not None
    first, again = (STUDY.experiment(arm, 1, OPTIONS, tmp_path) for _ in range(2))
    assert first.metrics == again.metrics
    assert "exponent" in first.metrics
    if arm in DECAYS:
        assert {f"{shape}/loss" for shape in SHAPES} <= first.metrics.keys()
        assert first.cost.tokens == 40 * 32 * 3 * 5
        assert first.train.values
        assert STUDY.experiment(arm, 2, OPTIONS, tmp_path).metrics != first.metrics


def test_the_theory_arms_are_the_closed_forms(tmp_path: Path) -> None:
    from lossmith.theory import feature_frequencies, truncation_loss

    assert STUDY.experiment is not None
    weak = STUDY.experiment("truncation", 0, OPTIONS, tmp_path).metrics
    assert weak["power1/loss"] == pytest.approx(truncation_loss(feature_frequencies("power", 40), 8))
    strong = STUDY.experiment("one-over-m", 0, OPTIONS, tmp_path).metrics
    assert strong["exponent"] == strong["overlap"] == 1.0


def test_given_models_are_measured_by_the_code_path_of_full(
    models: list[str], text_folder: Path, tmp_path: Path
) -> None:
    """``full`` names 27 models and four corpora; here four local ones and the user's text."""
    assert sum(map(len, OPEN_MODELS.values())) == 27
    full = STUDY.options["full"]
    assert full["models"] == OPEN_MODELS
    options: dict[str, Any] = {**full, "models": models, "data": str(text_folder), "texts": 3}
    assert STUDY.prepare is not None
    assert STUDY.experiment is not None
    options |= STUDY.prepare(options, tmp_path)
    assert options["corpora"] == {"data": str(text_folder)}
    measured = STUDY.experiment("language-models", 0, options, tmp_path)
    # Embeddings from random weights are random vectors.
    assert measured.metrics["overlap"] == pytest.approx(1, abs=0.1)
    assert measured.metrics["overlap_slope"] == pytest.approx(1, abs=0.1)
    assert 4 < measured.metrics["models/loss"] < 8
    assert measured.cost.scored_tokens == 4 * 3 * 31


def test_losses_are_those_of_the_model_itself(models: list[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lossmith.studies.width_families import corpus_losses

    text = "loss weight model data 12 34"
    loss, count = corpus_losses(models[0], {"own": [text, "x"]}, 32)["own"]
    tokenizer, model = AutoTokenizer.from_pretrained(models[0]), AutoModelForCausalLM.from_pretrained(models[0]).eval()
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert count == ids.shape[1] - 1
    assert loss == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-5)


def test_too_few_widths_and_missing_models_are_one_sentence(models: list[str], text_folder: Path) -> None:
    options = {"corpora": {"data": str(text_folder)}, "texts": 1, "max_length": 32}
    with pytest.raises(InputError, match=r"at least 3 widths are needed, got \[16\]"):
        measure_families(models[2:], options)
    with pytest.raises(InputError, match="no-such-model cannot be read"):
        measure_families([*models, "no-such-model"], options)
    with pytest.raises(InputError, match="must be a list of names"):
        measure_families("gpt2", options)


@pytest.mark.slow
def test_models_are_trained_where_none_are_given(text_folder: Path, tmp_path: Path) -> None:
    assert STUDY.prepare is not None
    assert STUDY.experiment is not None
    options = {**OPTIONS, "data": str(text_folder), "max_length": 32, "model_batch_size": 2}
    options |= STUDY.prepare(options, tmp_path)
    first, again = (STUDY.experiment("language-models", 0, options, tmp_path / str(i)) for i in range(2))
    assert first.metrics == again.metrics
    assert first.cost.tokens == 4 * 3 * 2 * 32
    assert first.cost.scored_tokens > 0
    assert (tmp_path / "0" / "width-16" / "model" / "model.safetensors").is_file()
