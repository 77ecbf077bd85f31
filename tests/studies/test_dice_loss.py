"""The study of the Dice loss: smoke, toy size, the user's files, and the full path on a small local model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lossmith.errors import InputError
from lossmith.studies.dice_loss import documentation
from lossmith.studies.settings import Execution
from lossmith.studies.study import get_study, run_study
from lossmith.tasks.text import Sentence, TokenTagger
from lossmith.tasks.text.conll import write_conll

STUDY = get_study("dice-loss")
TOY = {"epochs": 0.5, "points": 200, "sentences": 40}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conll")
    rows = [Sentence(("see", "Ann", str(i)), ("O", "B-person", "O")) for i in range(30)]
    write_conll(folder / "train.conll", rows)
    write_conll(folder / "dev.conll", rows[:10])
    return folder


def run(arm: str, folder: Path, **changes: Any) -> Any:
    options = {**STUDY.options["smoke"], **TOY, **changes}
    assert STUDY.prepare is not None
    assert STUDY.experiment is not None
    return STUDY.experiment(arm, 0, {**options, **STUDY.prepare(options, folder)}, folder).metrics


@pytest.mark.slow
def test_smoke_measures_everything(tmp_path: Path) -> None:
    comparison = run_study(STUDY, "smoke", execution=Execution(out=tmp_path, jobs=2))
    assert not [r.error for r in comparison.runs if r.error]
    for r in comparison.runs:
        assert set(r.metrics) == set(STUDY.metrics)


@pytest.mark.parametrize(
    "arm", [pytest.param(a, marks=() if a in ("ce", "dice-adjusting") else pytest.mark.slow) for a in STUDY.arms]
)
def test_every_arm_runs_on_the_users_files(arm: str, files: Path, tmp_path: Path) -> None:
    metrics = run(arm, tmp_path, data=str(files))
    assert set(metrics) == set(STUDY.metrics)
    assert all(0 <= value <= 1 for value in metrics.values())


def test_names_in_the_documentation_are_rare_and_tagged_as_the_rule_says() -> None:
    sentences = documentation(80)
    words = [pair for s in sentences for pair in zip(s.words, s.tags, strict=True)]
    assert 0.005 < sum(tag != "O" for _, tag in words) / len(words) < 0.25
    import sys

    assert {word for word, tag in words if tag == "B-name"} <= sys.stdlib_module_names


def test_full_scale_goes_through_the_same_code_with_a_local_model(files: Path, tmp_path: Path) -> None:
    TokenTagger(epochs=0.1, width=32, layers=1).fit([Sentence(("a", "b"), ("O", "B-x"))] * 4).save_pretrained(
        tmp_path / "model"
    )
    full = STUDY.options["full"]
    metrics = run("dice", tmp_path, **{**full, **TOY, "model": str(tmp_path / "model"), "data": str(files)})
    assert set(metrics) == set(STUDY.metrics)


def test_wrong_data_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs --data: a CoNLL file"):
        run_study(STUDY, "full", seeds=1, execution=Execution(out=tmp_path / "a", jobs=1))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"must hold train\.conll"):
        run_study(STUDY, "smoke", data=str(tmp_path / "empty"), execution=Execution(out=tmp_path / "b", jobs=1))
