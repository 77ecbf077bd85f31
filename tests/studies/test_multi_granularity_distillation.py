"""The study of distillation at three granularities: toy size, the user's file, and the full path on local models."""

from __future__ import annotations

import gc
import json
import re
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from lossmith.errors import InputError
from lossmith.studies import instruction_tasks
from lossmith.studies.instruction_tasks import TASKS, common_words, instructions, judge, read_pairs
from lossmith.studies.settings import Execution
from lossmith.studies.study import get_study, run_study
from lossmith.studies.toy_languages import table, table_teacher

STUDY = get_study("multi-granularity-distillation")
TOY = {"teacher_steps": 1, "warmup_steps": 1, "steps": 1, "test_examples": 5, "table_steps": 2, "planted_sequences": 20}


def options(**changes: Any) -> dict[str, Any]:
    return {**STUDY.options["smoke"], **TOY, **changes}


def run(arm: str, folder: Path, seed: int = 0, **changes: Any) -> Any:
    assert STUDY.prepare is not None
    assert STUDY.experiment is not None
    chosen = options(**changes)
    return STUDY.experiment(arm, seed, {**chosen, **STUDY.prepare(chosen, folder)}, folder / arm)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    assert STUDY.prepare is not None
    STUDY.prepare(options(), folder)
    return folder


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"what is {i} and one?", "completion": f" it is {i + 1}."} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
def test_smoke_measures_everything(tmp_path: Path) -> None:
    comparison = run_study(STUDY, "smoke", execution=Execution(out=tmp_path, jobs=2))
    assert not [r.error for r in comparison.runs if r.error]
    measured = {name for r in comparison.runs for name in r.metrics}
    assert measured == set(STUDY.metrics)
    for claim in STUDY.claims:  # whatever a claim compares has been measured
        for arm in (claim.arm, claim.against or STUDY.baseline):
            assert all(claim.metric in r.metrics for r in comparison.runs if r.arm == arm), (claim.text, arm)


@pytest.mark.parametrize("arm", ["sequence-kd", "on-policy-jsd", "clipped-normalised", "spans"])
def test_arms_of_every_kind_run(arm: str, teacher: Path) -> None:
    found = run(arm, teacher)
    assert all(numpy.isfinite(value) for value in found.metrics.values())
    assert {"rouge_l", "exact", "loss"} <= set(found.metrics)
    assert found.cost.steps == 2


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers_and_arms_share_their_beginning(teacher: Path) -> None:
    first = run("full", teacher)
    assert run("full", teacher).metrics == first.metrics
    assert run("full", teacher, seed=1).metrics != first.metrics
    # Whether the beginner was trained by this arm or by another one.
    (teacher / "student-0.json").unlink()
    assert run("full", teacher).metrics == first.metrics
    # Before the arm's own steps all students of a seed are the same.
    same = [run(arm, teacher, steps=0).metrics["loss"] for arm in ("sft", "full")]
    assert same[0] == same[1]


def test_generation_is_paid_for(teacher: Path) -> None:
    flops = {arm: run(arm, teacher).cost.flops for arm in ("sft", "kd", "on-policy-jsd", "revised")}
    assert flops["sft"] < flops["kd"] < flops["on-policy-jsd"] < flops["revised"]


def test_instructions_have_the_answers_that_their_rule_says() -> None:
    words = set(common_words())
    assert len(words) == 30
    for pair in instructions(60, seed=3):
        task, *asked = re.findall(r"\w+", pair.prompt)
        answer = pair.completion.removeprefix(f"words after {task}: ").split()
        assert answer == TASKS[task](asked)
        assert set(asked) <= words
    assert instructions(5, seed=1) == instructions(5, seed=1) != instructions(5, seed=2)


def test_no_test_question_is_among_the_students() -> None:
    pairs = read_pairs({**STUDY.options["quick"], "student_examples": 400, "test_examples": 200})
    assert len(pairs.test) == 200
    assert not {p.prompt for p in pairs.test} & {p.prompt for p in pairs.student}


def test_the_users_file_is_cut_into_two_parts(file: Path, tmp_path: Path) -> None:
    pairs = read_pairs(options(data=str(file)))
    assert len(pairs.test) == 5
    assert not set(pairs.test) & set(pairs.teacher)
    found = run("full", tmp_path, data=str(file))
    assert 0 <= found.metrics["rouge_l"] <= 1


def test_full_scale_goes_through_the_same_code_with_local_models(file: Path, tmp_path: Path) -> None:
    from lossmith.data import train_tokenizer
    from lossmith.training.models import build_model

    tokenizer = train_tokenizer([file.read_text()], vocab_size=300)
    for name in ("teacher", "student"):
        torch.manual_seed(0)
        model: Any = build_model("nano", vocab_size=len(tokenizer), sequence_length=600)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    changes = {
        **STUDY.options["full"],
        **TOY,
        "data": str(file),
        "prompt_field": "prompt",
        "completion_field": "completion",
        "teacher": str(tmp_path / "teacher"),
        "student": str(tmp_path / "student"),
        "max_completion": 12,
        "batch_size": 4,
    }
    assert 0 <= run("full", tmp_path / "out", **changes).metrics["rouge_l"] <= 1


@pytest.mark.slow
def test_questions_of_geoquery_can_be_distilled(real_data: Path, tmp_path: Path) -> None:
    path = real_data / "geoquery" / "train.txt"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    found = re.findall(r"^parse\(\[(.*?)\], (.*)\)\.$", path.read_text(encoding="utf-8"), re.MULTILINE)
    rows = [{"prompt": q.replace(",", " ") + "\n", "completion": m} for q, m in found]
    (tmp_path / "geo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = run("full", tmp_path, data=str(tmp_path / "geo.jsonl"), max_prompt=40, max_completion=60).metrics
    assert numpy.isfinite(metrics["loss"])


def test_the_tables_teacher_is_fixed_by_its_seed() -> None:
    assert table_teacher(0).shape == (300, 200)
    assert torch.equal(table_teacher(0), table_teacher(0))
    assert not torch.equal(table_teacher(0), table_teacher(1))


def test_the_table_of_an_arm_is_the_same_whatever_arm_came_before() -> None:
    first = table(0, "reverse_kl", None, steps=3)
    table(0, None, "paper", steps=3)
    assert table(0, "reverse_kl", None, steps=3) == first
    table(1, None, None, steps=3)
    assert table(0, "reverse_kl", None, steps=3) == first
    assert table(1, "reverse_kl", None, steps=3) != first


def test_answers_are_the_same_however_many_are_asked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from lossmith.data import encode_completions, train_tokenizer
    from lossmith.training.models import build_model

    pairs = instructions(70, seed=0)
    tokenizer = train_tokenizer([pair.prompt + pair.completion for pair in pairs], vocab_size=300)
    torch.manual_seed(0)
    student, teacher = (build_model("nano", vocab_size=len(tokenizer), sequence_length=48).double() for _ in range(2))
    rows = encode_completions(tokenizer, pairs, max_prompt=24, max_completion=24)
    together = judge(student, teacher, tokenizer, rows, seed=0, max_new_tokens=3)
    monkeypatch.setattr(instruction_tasks, "_LOGITS_AT_ONCE", 1)  # 64 and 6
    apart = judge(student, teacher, tokenizer, rows, seed=0, max_new_tokens=3)
    for name in ("exact", "top1_agreement", "loss", "teacher_kl"):  # rouge_l is of samples, which are others
        assert getattr(apart, name) == pytest.approx(getattr(together, name), rel=1e-6), name


def test_the_garbage_collector_is_left_as_it_was(teacher: Path) -> None:
    assert gc.get_freeze_count() == 0
    run("sft", teacher, steps=0)
    assert gc.get_freeze_count() == 0
    gc.freeze()
    try:
        run("sft", teacher, steps=0)
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()


def test_wrong_data_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "few.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(InputError, match="at least 10 prompts with completions are needed, got 1"):
        run_study(STUDY, "smoke", data=str(tmp_path / "few.jsonl"), execution=Execution(out=tmp_path / "a", jobs=1))
    with pytest.raises(InputError, match="is not a file with prompts and completions"):
        run_study(STUDY, "smoke", data=str(tmp_path / "none.jsonl"), execution=Execution(out=tmp_path / "b", jobs=1))
    with pytest.raises(InputError, match="hub cannot be reached"):
        run_study(STUDY, "full", seeds=1, execution=Execution(out=tmp_path / "c", jobs=1))


def test_a_missing_package_is_named_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(InputError, match=r"pip install 'lossmith\[generation\]'"):
        run("sft", tmp_path)
