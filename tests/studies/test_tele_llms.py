"""The study of Tele-LLMs: its arms at toy size, and its full scale's path on a small local model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lossmith.errors import InputError
from lossmith.studies.settings import Execution
from lossmith.studies.study import get_study, run_study

pytest.importorskip("peft", reason="the extra lora is not installed")

STUDY = get_study("tele-llms")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> dict[str, Any]:
    """Three domains of sentences."""
    folder = tmp_path_factory.mktemp("tele")
    for name in ("letters", "numbers"):
        shutil.copytree(text_folder / name, folder / "corpus" / name)
    (folder / "corpus" / "sentences").mkdir()
    words = ["loss", "weight", "model", "data", "step", "token", "batch", "head", "law", "probe", "mixture"]
    for i in range(40):
        text = " ".join("The " + " ".join(words[(i * k + j) % 11] for j in range(9)) + " ends." for k in range(1, 6))
        (folder / "corpus" / "sentences" / f"{i}.txt").write_text(text)
    options = {
        **STUDY.options["smoke"],
        "data": str(folder / "corpus"),
        "general": "letters",
        "domains": ["numbers", "sentences"],
        "sequence_length": 48,
        "steps": 4,
        "pretrain_steps": 6,
    }
    assert STUDY.prepare is not None
    return {**options, **STUDY.prepare(options, folder / "out")}


def test_arms_start_from_the_same_model_and_are_compared_with_it(prepared: dict[str, Any], tmp_path: Path) -> None:
    assert STUDY.experiment is not None
    found = {arm: STUDY.experiment(arm, 0, prepared, tmp_path) for arm in ("base", "full", "lora")}
    losses = {arm: done.metrics["first/loss"] for arm, done in found.items()}
    assert losses["full"] < losses["lora"] < losses["base"]
    full, lora = found["full"].metrics, found["lora"].metrics
    assert full["first/share"] == 1.0
    assert lora["first/share"] == pytest.approx(
        (losses["base"] - losses["lora"]) / (losses["base"] - losses["full"]), rel=1e-9
    )
    assert lora["gradient_norm"] < full["gradient_norm"]
    assert all(np.isfinite(done.metrics["answer/loss"]) for done in found.values())
    assert found["full"].cost.steps == prepared["pretrain_steps"] + prepared["steps"] == found["lora"].cost.steps
    assert found["lora"].cost.flops < found["full"].cost.flops
    # From its file, not trained again.
    assert STUDY.experiment("lora", 0, prepared, tmp_path).metrics == lora


def test_pre_training_and_replay_share_no_row(prepared: dict[str, Any]) -> None:
    from lossmith.data import load_prepared
    from lossmith.studies.tele_llms import _general_half

    corpus = load_prepared(prepared["corpus"])
    first, second = ({row["index"] for row in _general_half(corpus, prepared, half)} for half in (0, 1))
    general = corpus.domains.index("letters")
    both = {row["index"] for row in corpus.train if row["domain"] == general}
    others = {row["index"] for row in corpus.train if row["domain"] != general}
    assert first & second == others
    assert first | second == both | others


def test_the_full_scale_runs_on_a_small_model_of_ones_own(prepared: dict[str, Any], tmp_path: Path) -> None:
    """A pre-trained model by folder, the domain and the general text in two files, questions of the user's."""
    from transformers import AutoTokenizer

    assert STUDY.experiment is not None
    assert STUDY.prepare is not None
    STUDY.experiment("base", 0, prepared, tmp_path)
    model = tmp_path / "model"
    shutil.copytree(Path(prepared["runs"]) / "seed-0" / "base" / "model", model)
    AutoTokenizer.from_pretrained(Path(prepared["corpus"]) / "tokenizer").save_pretrained(model)
    root = Path(prepared["data"])
    rows = [
        {"content": path.read_text(), "category": path.parent.name}
        for name in ("numbers", "sentences")
        for path in sorted((root / name).iterdir())
    ]
    (tmp_path / "tele.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "exam.jsonl").write_text('{"Statement": "What ends?", "Answer": "The law ends.", "id": "a_1"}\n')
    options = {
        **STUDY.options["full"],
        "data": str(tmp_path / "tele.jsonl"),
        "general_data": str(root / "letters"),
        "domains": ["numbers", "sentences"],
        "questions_file": str(tmp_path / "exam.jsonl"),
        "model": str(model),
        "sequence_length": 48,
        "batch_size": 4,
        "micro_batch_size": 2,
        "steps": 2,
        "eval_rows": 4,
        "validation_fraction": 0.2,
        "rank": 2,
    }
    options |= STUDY.prepare(options, tmp_path / "out")
    done = STUDY.experiment("lora", 0, options, tmp_path / "run")
    assert all(np.isfinite(value) for value in done.metrics.values())
    assert done.cost.steps == 2


def test_a_corpus_that_cannot_serve_is_one_sentence(text_folder: Path, tmp_path: Path) -> None:
    assert STUDY.prepare is not None
    options = {**STUDY.options["smoke"], "data": str(text_folder)}
    with pytest.raises(
        InputError, match=r"needs general text, called 'code', and two domains; .* has: letters, numbers"
    ):
        STUDY.prepare(options, tmp_path / "a")


@pytest.mark.slow
def test_smoke_measures_every_arm(tmp_path: Path) -> None:
    comparison = run_study(STUDY, "smoke", execution=Execution(out=tmp_path, jobs=2))
    assert not [run.error for run in comparison.runs if run.error]
    assert all("answer/loss" in run.metrics for run in comparison.runs)
