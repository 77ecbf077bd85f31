"""``lossmith rationale`` as a user would type it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import command_line
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from lossmith.data import ArithmeticTeacher, arithmetic_problems, sample_rationales, train_tokenizer, write_rationales
from lossmith.errors import InputError

SMALL = ("--epochs", 2, "--batch-size", 4, "--max-target-length", 16, "--max-input-length", 32)


run = partial(command_line.run, "rationale")


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Path:
    problems = arithmetic_problems(16, largest=4, form="expression")
    path = tmp_path_factory.mktemp("rationales") / "train.jsonl"
    write_rationales(path, sample_rationales(ArithmeticTeacher(problems), problems, samples=3))
    return path


def test_vote_fit_predict_and_evaluate(train: Path, tmp_path: Path) -> None:
    assert "16 questions" in run("vote", train, "--out", tmp_path / "voted.jsonl")
    first = json.loads((tmp_path / "voted.jsonl").read_text().splitlines()[0])
    assert set(first) == {"question", "label", "positives", "negatives", "reference"}
    out = run("fit", train, "--out", tmp_path / "student", "--evaluate", train, *SMALL)
    assert "8 steps; saved in" in out
    assert "of 16 questions, rationales 0." in out
    (tmp_path / "new.jsonl").write_text('{"question": "1 + 1 + 1"}\n{"question": "2 + 2 - 1"}\n')
    run("predict", tmp_path / "student", tmp_path / "new.jsonl", "--out", tmp_path / "answers.jsonl", "--explain")
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [set(row) for row in rows] == [{"question", "answer", "rationale"}] * 2
    printed = run("predict", tmp_path / "student", tmp_path / "new.jsonl")
    assert [json.loads(line)["answer"] for line in printed.splitlines()] == [row["answer"] for row in rows]
    scores = json.loads(run("evaluate", tmp_path / "student", train, "--json"))
    assert set(scores) == {"accuracy", "rationale_accuracy", "questions"}


def test_a_local_model_is_asked_and_never_twice(train: Path, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["<Explanation>: one <Answer>: two"], vocab_size=260)
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "q.jsonl").write_text('{"question": "a"}\n{"question": "b", "label": "c"}\n')
    out = run(
        "sample", tmp_path / "q.jsonl", "--teacher", tmp_path / "model", "--samples", 2, "--max-new-tokens", 4,
        "--out", tmp_path / "s.jsonl", "--examples", train,
    )  # fmt: skip
    assert "0 rationales for 2 questions" in out  # random weights never find the form
    rows = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert [row["dropped"] for row in rows] == [2, 2]
    assert not (tmp_path / "s.jsonl.part").exists()
    with pytest.raises(InputError, match="no rationale to learn from: 2 questions and 4 outputs without an answer"):
        run("vote", tmp_path / "s.jsonl", "--labels", "teacher")


def test_wrong_input_is_one_sentence(train: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not an empty folder"):
        run("fit", train, "--out", tmp_path.parent)
    with pytest.raises(InputError, match="does not exist"):
        run("fit", tmp_path / "no.jsonl", "--out", tmp_path / "x")
    with pytest.raises(InputError, match="unknown method 'qrcd': did you mean 'qcrd'"):
        run("fit", train, "--out", tmp_path / "x", "--method", "qrcd")
    with pytest.raises(InputError, match="beta must be a finite number >= 0, got -1"):
        run("fit", train, "--out", tmp_path / "x", "--beta", -1)
    with pytest.raises(InputError, match="margin must be"):
        run("fit", train, "--out", tmp_path / "x", "--margin", "nan")
    with pytest.raises(InputError, match="negative_lag must be at least 1, got 0"):
        run("fit", train, "--out", tmp_path / "x", "--negative-lag", 0)
    with pytest.raises(InputError, match="labels must be gold or teacher, got 'silver'"):
        run("fit", train, "--out", tmp_path / "x", "--labels", "silver")
    with pytest.raises(InputError, match=r"holds no student \(rationale_student.json\)"):
        run("evaluate", tmp_path, train)
    (tmp_path / "bare.jsonl").write_text('{"question": "a"}\n')
    with pytest.raises(InputError, match="line 1: 'samples' is needed"):
        run("vote", tmp_path / "bare.jsonl")
    with pytest.raises(InputError, match="tokenizer: cannot load"):
        run("sample", tmp_path / "bare.jsonl", "--teacher", tmp_path / "no", "--out", tmp_path / "s.jsonl")
    assert not (tmp_path / "x").exists()
