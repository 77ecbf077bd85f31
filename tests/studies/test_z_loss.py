"""The study of the Z-loss: smoke, toy size, the user's text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lossmith.errors import InputError
from lossmith.studies.settings import Execution
from lossmith.studies.study import get_study, run_study

STUDY = get_study("z-loss")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("z-loss")
    text = folder / "text.txt"
    text.write_text(" ".join(f"the {i % 7} cats saw {i % 5} dogs ." for i in range(400)))
    options = {**STUDY.options["smoke"], "data": str(text), "steps": 4, "vocabulary": 20}
    assert STUDY.prepare is not None
    return {**options, **STUDY.prepare(options, folder)}


@pytest.mark.slow
def test_smoke_measures_everything(tmp_path: Path) -> None:
    comparison = run_study(STUDY, "smoke", execution=Execution(out=tmp_path, jobs=2))
    assert not [run.error for run in comparison.runs if run.error]
    for run in comparison.runs:
        assert set(run.metrics) == set(STUDY.metrics)


@pytest.mark.parametrize("arm", list(STUDY.arms))
def test_every_arm_trains_and_repeats_itself(arm: str, prepared: dict[str, Any], tmp_path: Path) -> None:
    assert STUDY.experiment is not None
    first, again = (STUDY.experiment(arm, 0, prepared, tmp_path).metrics for _ in range(2))
    for name in STUDY.metrics:
        if name != "seconds_per_step":
            assert first[name] == again[name]
    # Twenty words: all are among the twenty best of a vocabulary of fewer.
    assert first["top1/error"] >= first["top10/error"]


def test_too_little_text_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("only a few words here")
    with pytest.raises(InputError, match="holds 5 words: too few for windows of 6"):
        run_study(STUDY, "smoke", data=str(tmp_path / "short.txt"), execution=Execution(out=tmp_path / "out"))
