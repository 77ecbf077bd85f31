"""``lossmith curate``, ``questions`` and ``adapt`` in a row, on a user's folder; what wrong input gets."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import command_line
import pytest

from lossmith.errors import InputError

pytest.importorskip("datasketch", reason="the extra curation is not installed")
SOURCES = Path(__file__).parents[1] / "data" / "curation_sources"


run = partial(command_line.run, with_stderr=True)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_from_sources_to_a_model_that_is_judged(place: Path, text_folder: Path) -> None:
    pytest.importorskip("peft", reason="the extra lora is not installed")
    said = run("curate", SOURCES / "wiki", "--domain", "telecom", "--out", "corpus.jsonl")
    assert "5 documents found" in said
    assert "2 documents kept" in said
    (place / "my_writer.py").write_text(
        "def write(prompt):\n"
        "    return 'Question: Which codes protect the control channel of 5G?\\nAnswer: Polar codes'\n"
        "def agree(prompt):\n"
        "    return 'yes'\n"
    )
    said = run("questions", "corpus.jsonl", "--generate", "my_writer:write", "--out", "exam.jsonl")
    assert "1 questions from 2 documents, 1 rejected" in said
    # Named by its id, so that curate can leave it out.
    assert json.loads((place / "exam.jsonl").read_text())["id"] == "polar.md"
    given = ["--model", "nano", "--general", text_folder / "letters", "--sequence-length", 64, "--steps", 4]
    said = run(
        *(
            "adapt",
            text_folder / "numbers",
            *given,
            "--method",
            "lora",
            "--rank",
            2,
            "--replay",
            0.25,
            "--out",
            "model",
        ),
        *("--questions", "exam.jsonl", "--judge", "my_writer:agree", "--learning-rate", 0.01),
    )
    assert "domain" in said
    assert "general" in said
    assert "judge" in said
    report = json.loads((place / "model" / "adaptation.json").read_text())
    assert report["after"]["domain"] < report["before"]["domain"]
    assert report["questions"]["judge"]["after"] == 1.0
    assert {path.name for path in (place / "model").iterdir()} >= {"model.safetensors", "adapter", "tokenizer.json"}
    said = run("adapt", text_folder / "numbers", "--model", "model", *given[2:], "--out", "again")
    again = json.loads((place / "again" / "adaptation.json").read_text())
    assert again["before"]["domain"] == pytest.approx(report["after"]["domain"], rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["curate", "nothing", "--out", "c.jsonl"], "there is no file or folder"),
        (["curate", SOURCES, "--out", "c.jsonl", "--domain", "telecomm"], "built in: telecom"),
        (["curate", SOURCES, "--out", "c.jsonl", "--relevance", "nothing:here"], "cannot be imported"),
        (["curate", SOURCES, "--out", "c.jsonl", "--relevance", "math"], "must be written module:function"),
        (["curate", SOURCES, "--out", "c.jsonl", "--questions", "exam.jsonl"], "is no file of questions"),
        (["curate", SOURCES, "--out", "c.jsonl", "--jobs", "0"], "--jobs must be at least 1"),
        (["questions", SOURCES, "--out", "q.jsonl"], "give one of --model and --generate"),
        (["questions", SOURCES, "--out", "q.jsonl", "--generate", "math:pie"], "math has no 'pie'"),
        (["questions", SOURCES, "--out", "q.jsonl", "--generate", "math:pi"], "is not callable"),
        (["adapt", SOURCES, "--model", "nano", "--out", "m", "--replay", "0.1"], "--replay needs --general"),
        (["adapt", SOURCES, "--model", "nano", "--out", "m", "--method", "lorra"], "did you mean 'lora'"),
        (["adapt", SOURCES, "--model", "nano", "--out", "m", "--judge", "math:sqrt"], "--judge needs --questions"),
        (["adapt", SOURCES, "--model", "nanoo", "--out", "m"], "neither a preset nor a folder"),
    ],
)
@pytest.mark.usefixtures("place")
def test_a_mistake_is_one_sentence_and_leaves_nothing(arguments: list[Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        run(*arguments)
    assert not [path for path in Path().iterdir() if path.name != "my_writer.py"]
