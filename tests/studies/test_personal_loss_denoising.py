"""The study of personal-loss denoising."""

from __future__ import annotations

from pathlib import Path

import pytest

from lossmith.errors import InputError
from lossmith.studies.personal_loss_denoising import ARMS, STUDY, WAYS, experiment
from lossmith.studies.settings import Execution
from lossmith.studies.study import run_study
from lossmith.tasks.recommendation import synthetic_feedback

SMOKE = STUDY.options["smoke"]


@pytest.mark.slow
def test_every_arm_has_its_metrics_and_its_cost(tmp_path: Path) -> None:
    assert set(WAYS) == set(ARMS)
    comparison = run_study(STUDY, "smoke", seeds=1, execution=Execution(out=tmp_path / "run", jobs=1))
    assert all(run.error is None for run in comparison.runs)
    found = {run.arm: run for run in comparison.runs}
    assert set(found) == set(ARMS)
    for arm, one in found.items():
        assert {"recall", "ndcg", "noise_share", "auc", "personal_auc"} <= set(one.metrics)
        assert ("clean/recall" in one.metrics) == (arm in ("plain", "pld", "pld-soft"))
        assert ("uneven/auc" in one.metrics) == (arm in ("pooled", "pld"))
        assert (one.cost.scored_tokens > 0) == (arm in ("pooled", "pld", "pld-soft"))
        assert one.cost.steps == found["plain"].cost.steps
    # Two of three epochs after warm-up, a pool of five and a negative.
    assert found["pld"].cost.scored_tokens == found["plain"].cost.tokens * 6 * 2 // 3


def test_the_users_own_table(tmp_path: Path) -> None:
    made = synthetic_feedback(40, 60, per_user=15, noise=0.0)
    for name, table in (("train.txt", made.train), ("test.txt", made.test)):
        lines = [f"{table.users[u]} {table.items[i]}" for u, i in zip(table.rows, table.indices, strict=True)]
        (tmp_path / name).write_text("\n".join(lines))
    for data in (tmp_path, tmp_path / "train.txt"):
        found = experiment("pld", 0, {**SMOKE, "data": str(data)}, tmp_path)
        assert 0 <= found.metrics["recall"] <= 1
        assert "uneven/auc" not in found.metrics


def test_full_is_the_same_code_on_the_users_table(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="scale full needs --data"):
        experiment("plain", 0, STUDY.options["full"], tmp_path)
    made = synthetic_feedback(30, 50, per_user=20, noise=0.0)
    lines = [f"{u}\t{i}" for u, i in zip(made.train.rows, made.train.indices, strict=True)]
    (tmp_path / "t.tsv").write_text("\n".join(lines))
    options = {**STUDY.options["full"], "data": str(tmp_path / "t.tsv"), "epochs": 2, "backbone": "lightgcn"}
    assert experiment("pld", 0, options, tmp_path).metrics["noise_share"] > 0
