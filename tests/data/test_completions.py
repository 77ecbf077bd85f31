"""Prompts and completions from files to batches."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from lossmith.data import Completion, CompletionCollator, encode_completions, read_completions, train_tokenizer
from lossmith.errors import InputError

ROWS = [{"prompt": "a?", "completion": "b"}, {"prompt": "", "completion": "c"}, {"prompt": "d", "completion": " "}]


def jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_records_are_read_and_blank_completions_left_out(name: str, tmp_path: Path) -> None:
    assert read_completions(jsonl(tmp_path / name, ROWS)) == [Completion("a?", "b"), Completion("", "c")]


def test_tables_and_other_column_names(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("instruction,context,response\ndo,this,done\ndo,,well\n")
    pairs = read_completions(tmp_path / "a.csv", prompt_field="instruction+context", completion_field="response")
    assert pairs == [Completion("do\nthis", "done"), Completion("do", "well")]


def test_labels_are_of_the_completion_alone() -> None:
    tokenizer = train_tokenizer(["ab"], vocab_size=257)
    a, b, end = tokenizer("a")["input_ids"][0], tokenizer("b")["input_ids"][0], tokenizer.eos_token_id
    (row,) = encode_completions(tokenizer, [Completion("aab", "ba")])
    assert row["input_ids"] == [end, a, a, b, b, a, end]
    assert row["labels"] == [-100] * 4 + [b, a, end]
    (row,) = encode_completions(tokenizer, [Completion("aab", "baa")], max_prompt=3, max_completion=2)
    assert row["input_ids"] == [end, a, b, b, a]  # the prompt's end, the completion's beginning, no end token
    assert encode_completions(tokenizer, []) == []


def test_a_text_that_spells_the_end_token_does_not_end_there() -> None:
    tokenizer = train_tokenizer(["ab"], vocab_size=257)
    (row,) = encode_completions(tokenizer, [Completion("<|endoftext|>", "a<|endoftext|>b")])
    assert row["input_ids"].count(tokenizer.eos_token_id) == 2


def test_batches_are_padded_on_the_right() -> None:
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "index": 4},
        {"input_ids": [5, 8], "labels": [-100, 8], "index": 2},
    ]
    batch = CompletionCollator(9)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 8, 9]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, 8, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["index"].tolist() == [4, 2]
    with pytest.raises(ValueError, match="at least one row"):
        CompletionCollator(0)([])


def test_what_is_wrong_with_a_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a file with prompts and completions"):
        read_completions(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match=r"a\.jsonl:1: there is no field 'prompt'"):
        read_completions(jsonl(tmp_path / "a.jsonl", [{"question": "a", "completion": "b"}]))
    with pytest.raises(InputError, match=r"b\.jsonl:2: the field 'completion' must be a string, got a number"):
        read_completions(jsonl(tmp_path / "b.jsonl", [ROWS[0], {"prompt": "a", "completion": 3}]))
    with pytest.raises(InputError, match="holds no completions"):
        read_completions(jsonl(tmp_path / "c.jsonl", [ROWS[2]]))
    (tmp_path / "d.txt").write_text("a\n")
    with pytest.raises(InputError, match="is no table"):
        read_completions(tmp_path / "d.txt")
    with pytest.raises(InputError, match="max_prompt and max_completion must be at least 1, got 0 and 5"):
        encode_completions(None, [], max_prompt=0, max_completion=5)


def test_questions_of_geoquery_become_completions(real_data: Path, tmp_path: Path) -> None:
    """A real file of questions and their formal meanings, written as JSONL."""
    path = real_data / "geoquery" / "test.txt"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    found = re.findall(r"^parse\(\[(.*?)\], (.*)\)\.$", path.read_text(encoding="utf-8"), re.MULTILINE)
    rows: list[dict[str, object]] = [{"prompt": q.replace(",", " "), "completion": m} for q, m in found]
    assert len(rows) > 200
    pairs = read_completions(jsonl(tmp_path / "geo.jsonl", rows))
    tokenizer = train_tokenizer((p.completion for p in pairs), vocab_size=400)
    for pair, row in zip(pairs, encode_completions(tokenizer, pairs), strict=True):
        completion = [t for t in row["labels"] if t != -100]
        assert tokenizer.decode(completion[:-1]) == pair.completion
