"""The study of rationale distillation: smoke, every arm, the user's files, and the full path on a small local model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import T5Config, T5ForConditionalGeneration

from lossmith.data import RationaleSamples, train_tokenizer, write_rationales
from lossmith.errors import InputError
from lossmith.studies.rationale_distillation import read
from lossmith.studies.settings import Execution
from lossmith.studies.study import get_study, run_study

STUDY = get_study("rationale-distillation")
SMOKE = STUDY.options["smoke"]


def run(arm: str, folder: Path, **options: Any) -> dict[str, float]:
    assert STUDY.experiment is not None
    return dict(STUDY.experiment(arm, 0, {**SMOKE, **options}, folder).metrics)


@pytest.mark.slow
def test_smoke_measures_everything(tmp_path: Path) -> None:
    comparison = run_study(STUDY, "smoke", execution=Execution(out=tmp_path, jobs=2))
    assert not [r.error for r in comparison.runs if r.error]
    for r in comparison.runs:
        assert set(r.metrics) == set(STUDY.metrics) - (set() if "judge_auc" in r.metrics else {"judge_auc"})


@pytest.mark.parametrize("arm", list(STUDY.arms))
def test_every_arm_runs(arm: str, tmp_path: Path) -> None:
    metrics = run(arm, tmp_path)
    judged = arm in ("qcrd", "teacher-negatives")
    assert set(metrics) == set(STUDY.metrics) - (set() if judged else {"judge_auc"})
    assert 0 <= metrics["accuracy"] <= 1
    assert metrics["gap"] == pytest.approx(metrics["wrong_loss"] - metrics["right_loss"])


def test_other_seeds_are_other_problems_and_test_questions_are_new() -> None:
    train, test = read(SMOKE, 0)
    assert {r.reference for r in train}.isdisjoint(r.reference for r in test)
    assert [r.question for r in read(SMOKE, 1)[0]] != [r.question for r in train]
    assert (len(train), len(test)) == (SMOKE["train"], SMOKE["test"])


def test_full_scale_goes_through_the_same_code_with_a_local_model_and_the_users_files(tmp_path: Path) -> None:
    rows = read(SMOKE, 0)[0]
    tokenizer = train_tokenizer([f"predict: {r.question} {r.reference}" for r in rows], vocab_size=280)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, tie_word_embeddings=False,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0, pad_token_id=0, eos_token_id=0,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    (tmp_path / "data").mkdir()
    write_rationales(tmp_path / "data" / "train.jsonl", rows[:20])
    write_rationales(tmp_path / "data" / "test.jsonl", rows[20:])
    full = {**STUDY.options["full"], "model": str(tmp_path / "t5"), "data": str(tmp_path / "data")}
    few = {"steps": 3, "batch_size": 4, "pretraining_steps": 2, "max_target_length": 16, "iteration": 1}
    metrics = run("qcrd", tmp_path, **{**full, **few, "answers": "arithmetic"})
    assert set(metrics) == set(STUDY.metrics)


def test_one_file_is_split_the_same_way_for_all(tmp_path: Path) -> None:
    rows = [RationaleSamples(f"q{i}", "a", (), "r") for i in range(20)]
    write_rationales(tmp_path / "a.jsonl", [RationaleSamples(r.question, r.label, (), "r", 1) for r in rows])
    train, test = read({**SMOKE, "data": str(tmp_path / "a.jsonl")}, 0)
    assert (len(train), len(test)) == (16, 4)
    assert read({**SMOKE, "data": str(tmp_path / "a.jsonl")}, 7) == (train, test)


def test_wrong_data_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs --data: a JSONL file of questions"):
        run_study(STUDY, "full", seeds=1, execution=Execution(out=tmp_path / "a", jobs=1))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"must hold train\.jsonl and test\.jsonl"):
        run_study(STUDY, "smoke", data=str(tmp_path / "empty"), execution=Execution(out=tmp_path / "b", jobs=1))
    (tmp_path / "few.jsonl").write_text('{"question": "q", "label": "a", "rationale": "r"}\n')
    with pytest.raises(InputError, match="holds 1 questions: too few"):
        run_study(STUDY, "smoke", data=str(tmp_path / "few.jsonl"), execution=Execution(out=tmp_path / "c", jobs=1))
