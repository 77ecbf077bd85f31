"""The study of the universality lens."""

from __future__ import annotations

from pathlib import Path

import pytest

from lossmith.studies.settings import Execution
from lossmith.studies.study import run_study
from lossmith.studies.universality_lens import ARMS, STUDY, experiment


@pytest.mark.slow
def test_smoke_measures_everything(tmp_path: Path) -> None:
    comparison = run_study(STUDY, "smoke", execution=Execution(out=tmp_path, jobs=2))
    assert {run.arm for run in comparison.runs} == set(ARMS)
    assert all(run.error is None for run in comparison.runs)


def test_simple_truths_cost_less_than_their_weight(tmp_path: Path) -> None:
    options = {**STUDY.options["quick"], "draws": 10_000, "sequences": 10}
    found = {arm: experiment(arm, 0, options, tmp_path).metrics for arm in ("constant", "bit", "constant-wide")}
    assert found["constant"]["regret"] < found["bit"]["regret"]
    assert found["constant-wide"]["parameters"] > 15 * found["constant"]["parameters"]
    assert all(metrics["regret_over_bound"] < 1.1 for metrics in found.values())
