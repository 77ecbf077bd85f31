"""The study of CoLoR-Filter: its parts at toy size, and its full scale's path on a small local model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lossmith.data import NgramImportance
from lossmith.errors import InputError
from lossmith.studies.color_filter import _log_weights
from lossmith.studies.selection_pool import auc, prepare_parts, read_part, scored_pool, seed_folder
from lossmith.studies.settings import Execution
from lossmith.studies.study import get_study, run_study

STUDY = get_study("color-filter")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> dict[str, Any]:
    """Two domains of the test corpus, a few passages of each."""
    folder = tmp_path_factory.mktemp("study")
    options = {**STUDY.options["smoke"], "data": str(text_folder), "target_domain": "numbers", "characters": 60}
    options |= {"pool": 80, "prior": 40, "target": 16, "validation": 8, "batch_size": 4}
    return {**options, **prepare_parts(options, folder)}


def test_the_parts_are_disjoint_and_hold_what_they_should(prepared: dict[str, Any]) -> None:
    parts = {name: read_part(prepared["parts"], name) for name in ("pool", "prior", "target", "validation")}
    assert {name: len(rows) for name, rows in parts.items()} == {"pool": 80, "prior": 40, "target": 16, "validation": 8}
    assert sum(row.is_target for row in parts["pool"]) == 8
    assert all(row.is_target for row in parts["target"] + parts["validation"])
    texts = [row.text for rows in parts.values() for row in rows]
    assert len(set(texts)) == len(texts)
    assert any(character.isdigit() for character in parts["target"][0].text)


def test_the_online_arm_takes_as_many_steps_and_passages_as_the_others(
    prepared: dict[str, Any], tmp_path: Path
) -> None:
    assert STUDY.experiment is not None
    done = STUDY.experiment("rho-down", 0, prepared, tmp_path)
    assert done.metrics["kept"] == 8
    assert done.cost.steps == 2
    assert np.isfinite(done.metrics["target/loss"])


def test_importance_by_ngrams_is_counted_once_for_all_seeds(
    prepared: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = read_part(prepared["parts"], "pool")
    texts, target = [row.text for row in pool], [row.text for row in read_part(prepared["parts"], "target")]
    expected = NgramImportance.fit(target, texts).log_weights(texts)
    assert np.array_equal(_log_weights(pool, prepared), expected)
    monkeypatch.delattr(NgramImportance, "fit")
    assert np.array_equal(_log_weights(pool, prepared), expected)


@pytest.mark.slow
def test_every_arm_keeps_what_it_should_and_repeats_itself(prepared: dict[str, Any], tmp_path: Path) -> None:
    assert STUDY.experiment is not None
    found = {arm: STUDY.experiment(arm, 0, prepared, tmp_path / arm) for arm in STUDY.arms}
    kept = {arm: done.metrics["kept"] for arm, done in found.items()}
    assert [kept.pop(f"random{x}") for x in ("", "-2x", "-4x", "-8x")] == [8, 16, 32, 64]
    assert set(kept.values()) == {8}
    assert found["oracle"].metrics["purity"] == 1.0
    assert found["random-4x"].cost.steps == 4 * found["oracle"].cost.steps == 8
    assert all(np.isfinite(done.metrics["target/loss"]) for done in found.values())
    assert STUDY.experiment("oracle", 0, prepared, tmp_path / "again").metrics == found["oracle"].metrics


def test_the_full_scale_runs_on_a_small_model_of_ones_own(prepared: dict[str, Any], tmp_path: Path) -> None:
    """A pre-trained marginal model by folder, with its tokenizer; no training on generic text."""
    assert STUDY.experiment is not None
    scored_pool(0, prepared)
    model = seed_folder(0, prepared) / "marginal"
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(Path(prepared["parts"]) / "tokenizer").save_pretrained(model)
    options = {
        **STUDY.options["full"],
        **{k: prepared[k] for k in ("data", "target_domain", "characters", "target_share")},
    }
    options |= {"model": str(model), "target_model": str(model), "domain_field": None, "tau": 10, "batch_size": 4}
    options |= {"pool": 80, "prior": 40, "target": 16, "validation": 8, "sequence_length": 64}
    options |= prepare_parts(options, tmp_path)
    done = STUDY.experiment("color-filter", 0, options, tmp_path / "run")
    assert done.metrics["kept"] == 8
    assert 0 <= done.metrics["auc"] <= 1
    assert done.cost.scored_tokens > 0


def test_a_corpus_that_cannot_serve_is_one_sentence(text_folder: Path, tmp_path: Path) -> None:
    options = {**STUDY.options["smoke"], "data": str(text_folder)}
    with pytest.raises(InputError, match="target domain 'poems' among them, got: letters, numbers"):
        prepare_parts({**options, "target_domain": "poems"}, tmp_path)
    with pytest.raises(InputError, match="give more text, or smaller parts"):
        prepare_parts({**options, "pool": 10**6}, tmp_path)


def test_auc_counts_pairs() -> None:
    generator = np.random.default_rng(0)
    scores, truth = generator.integers(0, 9, 60) / 3, generator.random(60) < 0.3
    pairs = [(a < b) + 0.5 * (a == b) for a in scores[truth] for b in scores[~truth]]
    assert auc(scores, truth) == pytest.approx(float(np.mean(pairs)), rel=1e-12)


@pytest.mark.slow
def test_smoke_measures_every_arm(tmp_path: Path) -> None:
    comparison = run_study(STUDY, "smoke", execution=Execution(out=tmp_path, jobs=2))
    assert not [run.error for run in comparison.runs if run.error]
    assert all("target/loss" in run.metrics for run in comparison.runs)
