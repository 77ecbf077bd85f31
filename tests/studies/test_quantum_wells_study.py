"""The study of the quantum wells."""

from __future__ import annotations

from pathlib import Path

import pytest

from lossmith.studies.quantum_wells import ARMS, STUDY, experiment
from lossmith.studies.settings import Execution
from lossmith.studies.study import run_study

TOY = {"steps": 5, "hidden": [6], "tolerance": 1e-2}


@pytest.mark.slow
def test_smoke_measures_everything(tmp_path: Path) -> None:
    comparison = run_study(STUDY, "smoke", execution=Execution(out=tmp_path, jobs=2))
    assert {run.arm for run in comparison.runs} == set(ARMS)
    for run in comparison.runs:
        assert set(STUDY.metrics) <= set(run.metrics), run.error
        assert run.cost.steps > 0 or run.arm == "projection"


def test_projection_is_accurate_at_once(tmp_path: Path) -> None:
    found = experiment("projection", 0, {**STUDY.options["quick"]}, tmp_path)
    assert found.metrics["digits"] > 5
    assert found.metrics["barrier/nodes"] == 0


def test_the_norm_term_is_what_differs(tmp_path: Path) -> None:
    with_norm, without = (experiment(arm, 0, {**TOY, "steps": 120}, tmp_path) for arm in ("norm", "no-norm"))
    assert without.metrics["barrier/norm_error"] > 2 * with_norm.metrics["barrier/norm_error"]


def test_a_table_of_the_users(tmp_path: Path) -> None:
    (tmp_path / "v.csv").write_text("0,0\n0.5,30\n1,0\n")
    found = experiment("projection", 0, {**TOY, "data": str(tmp_path / "v.csv")}, tmp_path)
    assert found.metrics["barrier/energy_error"] < 1e-3


@pytest.mark.slow
def test_full_takes_the_same_path(tmp_path: Path) -> None:
    found = experiment("norm", 0, {**STUDY.options["full"], "steps": 50}, tmp_path)
    assert found.cost.steps == 150
