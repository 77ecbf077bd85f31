"""The student as a whole: every method, real models by folder, saving, and learning what can be learned."""

from __future__ import annotations

import csv
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM

from lossmith.data import (
    ArithmeticTeacher,
    RationaleSamples,
    SampledRationale,
    arithmetic_problems,
    sample_rationales,
    train_tokenizer,
)
from lossmith.errors import InputError
from lossmith.tasks.text import RationaleStudent
from lossmith.tasks.text.rationale_student import METHODS

PROBLEMS = arithmetic_problems(12, largest=3, form="expression")
ROWS = sample_rationales(ArithmeticTeacher(PROBLEMS), PROBLEMS, samples=3)
SMALL: dict[str, Any] = {
    "width": 16,
    "batch_size": 6,
    "epochs": 2,
    "max_input_length": 24,
    "max_target_length": 16,
    "schedule": {"steps": 1, "pretraining_steps": 2},
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_answers_and_explains_and_comes_back_from_its_folder(method: str, tmp_path: Path) -> None:
    student = RationaleStudent(method=method, **SMALL).fit(ROWS)
    questions = [row.question for row in ROWS[:3]]
    said = student.predict(questions), student.explain(questions)
    student.save_pretrained(tmp_path)
    again = RationaleStudent.from_pretrained(tmp_path)
    assert (again.predict(questions), again.explain(questions)) == said
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path).num_parameters() == student.model_.num_parameters()
    if method == "qcrd":
        scores = student.judge_rationales(questions, ["1 + 1 = 2", "so", ""])
        assert again.judge_rationales(questions, ["1 + 1 = 2", "so", ""]) == scores
        assert all(0 < s < 1 for s in scores)
    else:
        with pytest.raises(InputError, match=f"trained by '{method}' has no judge"):
            again.judge_rationales(questions, ["a", "b", "c"])


def test_the_same_seed_gives_the_same_student_and_methods_start_alike() -> None:
    ends = [
        torch.cat([p.detach().flatten() for p in RationaleStudent(seed=5, **SMALL).fit(ROWS).model_.parameters()])
        for _ in range(2)
    ]
    assert torch.equal(*ends)


@pytest.mark.slow
def test_a_few_questions_are_learned_with_their_rationales() -> None:
    rows = [
        RationaleSamples(q, a, (SampledRationale(r, a),), r)
        for q, r, a in (("sky", "it is day", "blue"), ("grass", "it grows", "green"), ("night", "no sun", "black"))
    ]
    student = RationaleStudent(
        method="positives", epochs=150, batch_size=3, width=32, learning_rate=5e-3, max_target_length=16
    ).fit(rows)
    scores = student.evaluate(rows)
    assert (scores.accuracy, scores.rationale_accuracy) == (1.0, 1.0)


def test_answers_may_be_expressions() -> None:
    student = RationaleStudent(method="finetune", **SMALL).fit(ROWS)
    student.predict = lambda questions: ["( 8.0 - 3.0 )", "nonsense"]  # type: ignore[method-assign]
    rows = [RationaleSamples("q", "5"), RationaleSamples("q2", "1 + 1")]
    assert student.evaluate(rows, answers="arithmetic").accuracy == 0.5
    assert student.evaluate(rows).accuracy == 0.0
    assert student.evaluate(rows).rationale_accuracy is None


def test_a_model_of_another_family_is_taught_from_its_folder(tmp_path: Path) -> None:
    tokenizer = train_tokenizer([row.question for row in ROWS], vocab_size=262)
    config = BartConfig(
        vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=0, forced_eos_token_id=None,
    )  # fmt: skip
    BartForConditionalGeneration(config).save_pretrained(tmp_path / "bart")
    tokenizer.save_pretrained(tmp_path / "bart")
    student = RationaleStudent(tmp_path / "bart", **SMALL).fit(ROWS)
    assert len(student.predict(["1 + 1 + 1"])) == 1
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    with pytest.raises(InputError, match="holds no sequence-to-sequence model"):
        RationaleStudent(tmp_path / "llama", **SMALL).fit(ROWS)


def test_labels_of_the_teacher_need_no_labels() -> None:
    rows = [RationaleSamples(row.question, None, row.samples) for row in ROWS]
    student = RationaleStudent(labels="teacher", method="contrast", **SMALL).fit(rows)
    assert student.rationales_.vote_accuracy is None
    with pytest.raises(InputError, match="question 1 has no label"):
        RationaleStudent(method="contrast", **SMALL).fit(rows)
    with pytest.raises(InputError, match="evaluation needs questions with labels"):
        student.evaluate(rows)


def test_one_question_with_one_rationale_is_enough_for_every_part() -> None:
    rows = [RationaleSamples("q", "a", (SampledRationale("r", "a"),))]
    assert len(RationaleStudent(**{**SMALL, "epochs": 8}).fit(rows).predict(["q"])) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "x"}, "unknown method 'x'"),
        ({"epochs": 0}, "epochs and learning_rate must be > 0"),
        ({"schedule": {"lag": 3}}, "unknown option 'lag' of the schedule"),
        ({"options": {"scheme": "x"}}, "scheme must be one of"),
    ],
)
def test_wrong_options_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RationaleStudent(**{**SMALL, **change}).fit(ROWS)
    with pytest.raises(InputError, match="has not been trained"):
        RationaleStudent().predict(["q"])


@pytest.mark.slow
def test_explanations_written_by_people_are_rationales(real_data: Path) -> None:
    """Posts, the aspect of wellness that they touch, and the words that show it."""
    with next(real_data.glob("wellness-dimensions/*.csv")).open(encoding="utf-8", errors="replace") as file:
        posts = [row for row in csv.DictReader(file) if row["Explanations"].strip()]
    posts = random.Random(0).sample(posts, 120)  # the file is sorted by aspect
    rows = [
        RationaleSamples(p["Text"], p["Aspect"], (SampledRationale(p["Explanations"], p["Aspect"]),), p["Explanations"])
        for p in posts
    ]
    student = RationaleStudent(epochs=3, width=32, max_input_length=64, max_target_length=24).fit(rows[:100])
    scores = student.evaluate(rows[100:])
    assert scores.questions == 20
    assert 0 <= scores.accuracy <= 1
