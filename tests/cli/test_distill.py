"""``lossmith distill`` as a user would type it."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import command_line
import pytest
import torch

from lossmith.data import load_tokenizer, train_tokenizer
from lossmith.errors import InputError
from lossmith.training import distill_language_model
from lossmith.training.models import build_model

SIZES = ("--max-prompt", 12, "--max-completion", 8, "--batch-size", 4, "--phrases", "words")


run = partial(command_line.run, "distill")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distill")
    rows = [{"prompt": f"say {word}:", "completion": f" {word} {word}"} for word in ("red", "blue", "green", "pink")]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 3))
    tokenizer = train_tokenizer([row["prompt"] + row["completion"] for row in rows], vocab_size=280)
    for seed, name in enumerate(("teacher", "student")):
        torch.manual_seed(seed)
        model: Any = build_model("nano", vocab_size=len(tokenizer), sequence_length=64)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def models(folder: Path) -> tuple[Any, ...]:
    return ("--teacher", folder / "teacher", "--student", folder / "student")


def test_a_student_is_trained_and_saved(folder: Path, tmp_path: Path) -> None:
    pairs = folder / "pairs.jsonl"
    out = run(pairs, *models(folder), "--out", tmp_path / "x", "--evaluate", pairs, "--learning-rate", 5e-3, *SIZES)
    assert "12 completions, 3 steps" in out
    found = re.search(r"loss of 12 completions: (\S+) before, (\S+) after", out)
    assert found is not None
    assert float(found[2]) < float(found[1])
    assert "mended" in out
    tokenizer = load_tokenizer(tmp_path / "x")
    loaded: Any = build_model(str(tmp_path / "x"), vocab_size=len(tokenizer), sequence_length=64)
    assert not [name for name, _ in loaded.named_parameters() if "clipped" in name]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x"]


def test_any_distillation_loss_on_the_data_sets_completions(folder: Path, tmp_path: Path) -> None:
    out = run(
        folder / "pairs.jsonl", *models(folder), "--out", tmp_path / "x", "--loss", "reverse_kl(temperature=2)",
        "--responses", "dataset", "--span-weight", 0, "--epochs", 0.4, *SIZES,
    )  # fmt: skip
    assert "1 steps" in out
    assert "mended" not in out


def test_a_schedule_may_replay(folder: Path, tmp_path: Path) -> None:
    pairs = folder / "pairs.jsonl"
    run(pairs, *models(folder), "--out", tmp_path / "x", "--evaluate", pairs, "--replay", 0.5, *SIZES)
    assert (tmp_path / "x" / "model.safetensors").exists()


def test_from_python_the_history_is_there(folder: Path) -> None:
    from lossmith.data import read_completions

    pairs = read_completions(folder / "pairs.jsonl")
    made = distill_language_model(
        str(folder / "student"), str(folder / "teacher"), pairs, batch_size=6, max_prompt=12, max_completion=8,
        phrases="words",
    )  # fmt: skip
    assert [line["step"] for line in made.history] == [1, 2]
    assert {"upper", "lower", "kept", "corrected"} <= set(made.history[0])
    assert made.before is None


def test_wrong_input_is_one_sentence_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    pairs, out = folder / "pairs.jsonl", ("--out", tmp_path / "x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(InputError, match="is not an empty folder"):
        run(pairs, *models(folder), "--out", tmp_path / "full")
    for words, message in (
        (("--loss", "reverse_lk"), "did you mean 'reverse_kl'"),
        (("--responses", "teacher"), "responses must be revised or student or dataset"),
        (("--epochs", 0), "epochs and learning_rate must be > 0"),
        (("--distillation-weight", -1), "distillation_weight must be a finite number >= 0"),
        (("--replay", 2), "threshold must lie between 0 and 1, got 2"),
        (("--dtype", "float8"), "unknown --dtype 'float8'"),
        (("--max-completion", 5000), "is longer than the 2048 positions"),
        (("--prompt-field", "question"), "there is no field 'question'"),
    ):
        with pytest.raises(InputError, match=message):
            run(pairs, *models(folder), *out, *SIZES, *words)
    with pytest.raises(InputError, match="is not a file with prompts and completions"):
        run(tmp_path / "none.jsonl", *models(folder), *out)
    with pytest.raises(InputError, match=r"cannot load .*none"):
        run(pairs, "--teacher", folder / "teacher", "--student", tmp_path / "none", *out)
    other = train_tokenizer(["other words entirely"], vocab_size=280)
    build_model("nano", vocab_size=280, sequence_length=64).save_pretrained(tmp_path / "other")  # type: ignore[operator]
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="different tokenizers"):
        run(pairs, "--teacher", tmp_path / "other", "--student", folder / "student", *out, *SIZES)
    assert not (tmp_path / "x").exists()
