"""The study of PreSelect: its parts at toy size, and its full scale's path on small local models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lossmith.errors import InputError
from lossmith.studies.preselect_parts import PARTS, domains, model_losses, prepare_parts, read_part
from lossmith.studies.settings import Execution
from lossmith.studies.study import get_study, run_study

pytest.importorskip("fasttext", reason="needs the extra 'selection'")

STUDY = get_study("preselect")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> dict[str, Any]:
    """Two domains of the test corpus, a few passages of each."""
    folder = tmp_path_factory.mktemp("study")
    options = {**STUDY.options["smoke"], "data": str(text_folder), "target_domain": "numbers", "characters": 60}
    options |= {
        "models": [0.0, 1.0],
        "model_texts": 64,
        "reserve": 130,
        "pool": 80,
        "seeds": 60,
        "target": 10,
        "benchmark": 8,
    }
    options |= {"validation": 8, "batch_size": 4, "target_share": 0.2}
    return {**options, **prepare_parts(options, folder)}


def test_the_parts_are_disjoint_and_hold_what_they_should(prepared: dict[str, Any]) -> None:
    parts = {name: read_part(prepared["parts"], name) for name in PARTS}
    shares = {name: {kind: int(here.sum()) for kind, here in domains(rows)} for name, rows in parts.items()}
    assert shares["pool"] == {"target": 16, "other": 44, "junk": 20}
    assert shares["seeds"] == {"target": 12, "other": 33, "junk": 15}
    assert shares["reserve"] == {"target": 65, "other": 65, "junk": 0}
    assert shares["target"] == {"target": 10, "other": 0, "junk": 0}
    texts = [document.text for rows in parts.values() for document in rows]
    assert len(set(texts)) == len(texts)
    assert any(character.isdigit() for character in parts["target"][0].text)


def test_junk_is_other_text_in_another_order(prepared: dict[str, Any]) -> None:
    junk = [document.text for document in read_part(prepared["parts"], "pool") if document.domain == "junk"]
    assert all(len(text) == 60 for text in junk)
    spaces = [text.count(" ") for text in junk]
    assert min(spaces) > 3
    assert not any(" loss " in text and " weight " in text for text in junk)


def test_the_model_of_the_target_is_the_abler_one_and_every_seed_has_its_own(prepared: dict[str, Any]) -> None:
    losses, others = (model_losses(seed, prepared) for seed in (0, 1))
    assert losses.ability[1] > losses.ability[0]
    assert losses.seeds.shape == (2, 60)
    assert losses.pool.shape == (80,)
    assert losses.scored_tokens["seeds"] > 60 * 2 * 10
    assert not np.isclose(losses.seeds, others.seeds).any()
    done = Path(prepared["parts"]).parent / "models" / "seed-0" / "done.json"
    written = done.stat().st_mtime_ns
    assert np.array_equal(model_losses(0, prepared).seeds, losses.seeds)
    assert done.stat().st_mtime_ns == written


def test_predictive_passages_are_of_the_target(prepared: dict[str, Any], tmp_path: Path) -> None:
    assert STUDY.experiment is not None
    done = STUDY.experiment("preselect", 0, prepared, tmp_path)
    assert done.metrics["strength/target"] > done.metrics["strength/other"] + 0.5
    assert done.metrics["positives/target"] > 0.9
    assert np.isfinite(done.metrics["target/bpc"])
    assert done.cost.steps == 2
    assert done.cost.scored_tokens == pytest.approx(0.8 * model_losses(0, prepared).scored_tokens["seeds"], abs=1)


@pytest.mark.slow
def test_every_arm_keeps_as_much_and_repeats_itself(prepared: dict[str, Any], tmp_path: Path) -> None:
    assert STUDY.experiment is not None
    found = {arm: STUDY.experiment(arm, 0, prepared, tmp_path / arm) for arm in STUDY.arms}
    steps = {arm: done.cost.steps for arm, done in found.items()}
    assert steps.pop("random-10x") == 20
    assert set(steps.values()) == {2}
    assert found["oracle"].metrics["kept/target"] == 1.0
    assert found["random-10x"].metrics["kept/target"] == pytest.approx(0.2)
    assert STUDY.experiment("preselect", 0, prepared, tmp_path / "again").metrics == found["preselect"].metrics


def test_the_full_scale_runs_on_small_models_of_ones_own(
    prepared: dict[str, Any], tmp_path: Path, text_folder: Path
) -> None:
    """Models by folder, of two tokenizers; the target model from random weights; no junk."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from lossmith.data import read_corpus, train_tokenizer

    folders = []
    for number, size in enumerate((270, 300, 270, 300)):
        tokenizer = train_tokenizer((d.text for d in read_corpus(text_folder)), vocab_size=size)
        torch.manual_seed(number)
        shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        folders.append(str(tmp_path / f"model-{number}"))
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folders[-1])
        tokenizer.save_pretrained(folders[-1])
    names = (
        "data",
        "target_domain",
        "characters",
        "target_share",
        "pool",
        "seeds",
        "target",
        "benchmark",
        "validation",
    )
    options = {**STUDY.options["full"], **{name: prepared[name] for name in names}, "domain_field": None}
    options |= {"models": folders, "target_model": folders[1], "batch_size": 4, "sequence_length": 64}
    options |= prepare_parts(options, tmp_path / "study")
    assert STUDY.experiment is not None
    done = STUDY.experiment("preselect", 0, options, tmp_path / "run")
    assert "strength/junk" not in done.metrics
    assert np.isfinite(done.metrics["target/bpc"])


def test_what_cannot_serve_is_one_sentence(prepared: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "parts").symlink_to(prepared["parts"])
    options = {**prepared, "parts": str(tmp_path / "parts")}
    with pytest.raises(InputError, match=r"shares of the target between 0 and 1, got 1\.5"):
        model_losses(0, {**options, "models": [1.5, 0.5]})
    with pytest.raises(InputError, match=r"is to read 70 passages of 65 \(target\); enlarge 'reserve'"):
        model_losses(0, {**options, "models": [1.0], "model_texts": 70})
    with pytest.raises(InputError, match="give more text, or smaller parts"):
        prepare_parts({**options, "pool": 10**6}, tmp_path / "more")


@pytest.mark.slow
def test_smoke_measures_every_arm(tmp_path: Path) -> None:
    comparison = run_study(STUDY, "smoke", execution=Execution(out=tmp_path, jobs=2))
    assert not [run.error for run in comparison.runs if run.error]
    assert all("target/bpc" in run.metrics for run in comparison.runs)
