"""The study of scaling-law estimation: smoke, families, published tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from lossmith.errors import InputError
from lossmith.laws import Reading, estimate, read_family
from lossmith.studies.model_families import CONTEXT, EMBEDDING, TRUTH, made_up_family, read_tables, train_family
from lossmith.studies.settings import Execution
from lossmith.studies.study import get_study, run_study

STUDY = get_study("scaling-law-estimation")
SMOKE = STUDY.options["smoke"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("families")
    options = {**SMOKE, "widths": [2, 4, 8, 16], "steps": 20, "trials": 2}
    assert STUDY.prepare is not None
    options |= STUDY.prepare(options, folder)
    train_family(0, options, Path(options["families"]))
    return options


@pytest.mark.slow
def test_smoke_measures_everything(tmp_path: Path) -> None:
    comparison = run_study(STUDY, "smoke", execution=Execution(out=tmp_path, jobs=2))
    assert not [run.error for run in comparison.runs if run.error]
    for run in comparison.runs:
        assert "family/are" in run.metrics
        assert run.cost.flops > 0


@pytest.mark.parametrize("arm", list(STUDY.arms))
def test_every_arm_predicts_and_repeats_itself(arm: str, trained: dict[str, Any], tmp_path: Path) -> None:
    assert STUDY.experiment is not None
    first, again = (STUDY.experiment(arm, 0, trained, tmp_path) for _ in range(2))
    assert set(first.metrics) == set(STUDY.metrics)
    assert {k: v for k, v in first.metrics.items() if v == v} == {k: v for k, v in again.metrics.items() if v == v}
    assert all(0 <= value < 50 for value in first.metrics.values() if value == value)
    assert first.cost.flops > 0


def test_a_trained_family_has_its_sizes_and_learns(trained: dict[str, Any]) -> None:
    path = Path(trained["families"]) / "family-0.csv"
    table = pd.read_csv(path)
    vocabulary = {
        (size - CONTEXT * EMBEDDING * width - width) / (EMBEDDING + width + 1)
        for width, size in zip(trained["widths"], sorted(table.params.unique()), strict=True)
    }
    # One vocabulary explains the parameters of all widths: embedding, two layers, biases.
    assert len(vocabulary) == 1
    for _, run in table.groupby("run"):
        losses = run.sort_values("tokens").loss.to_numpy()
        assert losses[-1] < losses[0] <= np.log(vocabulary.copy().pop()) + 0.5
    before = path.read_text()
    assert train_family(0, trained, path.parent).read_text() == before


def test_made_up_families_obey_their_law() -> None:
    table = made_up_family(0, sizes=5, checkpoints=40, run_noise=0.0, checkpoint_noise=0.0, transient=False)
    n, d = table.columns["params"], table.columns["tokens"]
    wanted = TRUTH["E"] + TRUTH["A"] * n ** -TRUTH["alpha"] + TRUTH["B"] * d ** -TRUTH["beta"]
    np.testing.assert_allclose(table.columns["loss"], wanted, rtol=1e-12)
    assert estimate(table).are < 1e-8
    noisy = made_up_family(0, sizes=5, checkpoints=40, run_noise=0.02, checkpoint_noise=0.0, transient=False)
    ratio = (noisy.columns["loss"] / wanted).reshape(6, 40)
    np.testing.assert_allclose(ratio, np.repeat(ratio[:, :1], 40, 1), rtol=1e-12)
    assert np.ptp(ratio[:-1, 0]) > 0.005
    np.testing.assert_allclose(ratio[-1], 1, rtol=1e-12)


def test_the_cut_matters_where_training_starts_off_the_law() -> None:
    from lossmith.laws import Protocol, estimate_pairs

    tables = [
        made_up_family(seed, sizes=5, checkpoints=80, run_noise=0.01, checkpoint_noise=0.003, transient=True)
        for seed in range(60)
    ]
    with_cut, without = (
        np.median([e.are for e in estimate_pairs([(t, Protocol(min_tokens=cut)) for t in tables])]) for cut in (None, 0)
    )
    assert with_cut < 0.5 * without


def test_the_users_tables_are_read_by_family(tmp_path: Path) -> None:
    frames = []
    for name, floor in (("llama", 1.7), ("mamba", 1.8)):
        n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e8, 1e10, 4), np.geomspace(1e9, 3e11, 20)))
        loss = floor + 400 * n**-0.34 + 1500 * d**-0.33
        frames.append(pd.DataFrame({"scaled_set": name, "num_params": n, "tokens_seen": d, "loss": loss}))
    pd.concat(frames).to_csv(tmp_path / "both.csv", index=False)
    frames[0].drop(columns="scaled_set").assign(
        tokens_seen=lambda f: np.log10(f.tokens_seen), epochs=lambda f: np.where(f.index % 3, 4.0, 1.0)
    ).to_csv(tmp_path / "logs.csv", index=False)
    found = read_tables(tmp_path, SMOKE)
    assert sorted(found) == ["both llama", "both mamba", "logs"]
    assert len(found["logs"]) == 27
    assert found["logs"].columns["tokens"].max() == pytest.approx(3e11, rel=0.5)


@pytest.mark.slow
def test_published_tables_run_through_the_same_code(real_data: Path, tmp_path: Path) -> None:
    comparison = run_study(
        STUDY,
        "smoke",
        data=str(real_data / "training-runs"),
        overrides={"trials": 1},
        execution=Execution(out=tmp_path, jobs=1),
    )
    errors = {run.arm: run.metrics["family/are"] for run in comparison.runs if run.seed == 1 and not run.error}
    assert errors["protocol"] < errors["best-seen"] < 0.1


def test_opt_is_predicted_as_well_as_in_the_paper(real_data: Path) -> None:
    reading = Reading(columns={"params": "model_size", "tokens": "num_token"}, log10=("tokens",))
    table = read_family(real_data / "training-runs" / "opt_trajectories.csv", reading)
    assert read_tables(real_data / "training-runs", SMOKE)["opt_trajectories"].columns["tokens"] == pytest.approx(
        table.columns["tokens"]
    )


def test_data_that_are_not_there_or_too_small_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no .*aggregated_eval"):
        run_study(STUDY, "full", execution=Execution(out=tmp_path / "out"))
    pd.DataFrame({"params": [1e8] * 9, "tokens": np.geomspace(1e9, 1e11, 9), "loss": 3.0}).to_csv(
        tmp_path / "one.csv", index=False
    )
    with pytest.raises(InputError, match="holds no family of at least 3 sizes"):
        run_study(STUDY, "smoke", data=str(tmp_path / "one.csv"), execution=Execution(out=tmp_path / "out2"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no tables"):
        run_study(STUDY, "smoke", data=str(tmp_path / "empty"), execution=Execution(out=tmp_path / "out3"))
