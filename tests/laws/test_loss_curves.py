"""Curves from every kind of log, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from lossmith.errors import InputError
from lossmith.laws import LossCurve, Reading, read_curves

STEPS = np.arange(10, 101, 10)
RATES = np.linspace(1e-3, 1e-4, 10)
LOSSES = 3 - 0.01 * np.arange(10)


def frame(**columns: Any) -> pd.DataFrame:
    return pd.DataFrame({"step": STEPS, "lr": RATES, "loss": LOSSES, **columns})


def check(curve: LossCurve) -> None:
    np.testing.assert_array_equal(curve.steps, STEPS)
    np.testing.assert_allclose(curve.losses, LOSSES)
    assert curve.rates.shape == (100,)
    np.testing.assert_allclose(curve.rates[STEPS - 1], RATES)


def test_a_csv_a_folder_and_a_frame_give_the_same_curves(tmp_path: Path) -> None:
    (tmp_path / "100M").mkdir()
    frame().to_csv(tmp_path / "100M" / "cosine.csv", index=False)
    check(read_curves(frame())[0])
    check(read_curves(tmp_path / "100M" / "cosine.csv")[0])
    (curve,) = read_curves(tmp_path)
    check(curve)
    assert (curve.name, curve.params) == ("100M/cosine", 1e8)


def test_several_runs_in_one_table_are_told_apart() -> None:
    both = pd.concat([frame(run="a"), frame(run="b")])
    curves = read_curves(both)
    assert [curve.name for curve in curves] == ["a", "b"]
    assert len(read_curves(both, Reading(where={"run": "b"}))) == 1
    check(read_curves(both.rename(columns={"run": "which"}), Reading(run="which"))[1])


def test_a_trainer_state_of_hugging_face_is_read(tmp_path: Path) -> None:
    history = [{"step": int(s), "learning_rate": r, "loss": 9.9} for s, r in zip(STEPS, RATES, strict=True)]
    history += [{"step": int(s), "eval_loss": v} for s, v in zip(STEPS, LOSSES, strict=True)]
    (tmp_path / "run-1").mkdir()
    (tmp_path / "run-1" / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (tmp_path / "run-1" / "checkpoint-50").mkdir()
    (tmp_path / "run-1" / "checkpoint-50" / "trainer_state.json").write_text(json.dumps({"log_history": history[:5]}))
    (curve,) = read_curves(tmp_path)
    check(curve)
    assert curve.name == "run-1"
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "trainer_state.json").write_text("[]")
    with pytest.raises(InputError, match="log_history"):
        read_curves(tmp_path)


def test_checkpoints_alone_are_read_by_the_newest(tmp_path: Path) -> None:
    for last in (5, 10, 9):
        history = [
            {"step": int(s), "learning_rate": r, "loss": v} for s, r, v in zip(STEPS, RATES, LOSSES, strict=True)
        ]
        folder = tmp_path / "my-run" / f"checkpoint-{10 * last}"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history[:last]}))
        (folder / "config.json").write_text("{}")
    (curve,) = read_curves(tmp_path)
    check(curve)
    assert curve.name == "my-run"


@pytest.mark.parametrize("kind", [list, np.float16, np.float32, "strided", "tensor"])
def test_numbers_of_every_kind_are_taken(kind: Any) -> None:
    losses = np.linspace(3, 2, 10)
    given: Any = losses.tolist() if kind is list else losses
    if kind == "strided":
        given = np.repeat(losses, 2)[::2]
    elif kind == "tensor":
        given = torch.tensor(losses, dtype=torch.float32)
    elif kind is not list:
        given = losses.astype(kind)
    curve = LossCurve.of("a", STEPS, given, RATES.repeat(10))
    assert curve.losses.dtype == np.float64
    np.testing.assert_allclose(curve.losses, losses, rtol=1e-3)


def test_a_run_record_is_read_by_its_training_loss_where_it_was_validated_too_seldom(tmp_path: Path) -> None:
    lines = [
        {"step": int(s), "learning_rate": r, "train/loss_unweighted": v, "train/loss": 5.0}
        for s, r, v in zip(STEPS, RATES, LOSSES, strict=True)
    ]
    lines.insert(5, {"step": 50, "eval/loss": 2.9})
    folder = tmp_path / "runs" / "a" / "seed-0"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.json").write_text("{}")
    (folder / "result.json").write_text("{}")
    (curve,) = read_curves(tmp_path)
    check(curve)
    assert curve.name == "runs/a/seed-0"
    assert "measured only 1 times" in curve.notes[0]


def test_an_export_of_weights_and_biases_is_read(tmp_path: Path) -> None:
    exported = pd.DataFrame({
        "Step": STEPS,
        "my run - train/learning_rate": RATES,
        "my run - eval/loss": LOSSES,
        "my run - eval/loss__MIN": LOSSES,
        "my run - eval/loss__MAX": LOSSES,
    })  # fmt: skip
    check(read_curves(exported)[0])
    both = exported.assign(**{"other - eval/loss": LOSSES + 1, "other - train/learning_rate": RATES})
    both.to_csv(tmp_path / "chart.csv", index=False)
    curves = {curve.name: curve for curve in read_curves(tmp_path)}
    check(curves["my run"])
    np.testing.assert_allclose(curves["other"].losses, LOSSES + 1)


def test_an_event_file_of_tensorboard_is_read(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "run")) as writer:
        for step, rate, loss in zip(STEPS, RATES, LOSSES, strict=True):
            writer.add_scalar("train/learning_rate", rate, int(step))
            writer.add_scalar("eval/loss", loss, int(step))
    (curve,) = read_curves(tmp_path)
    np.testing.assert_allclose(curve.losses, LOSSES, rtol=1e-6)
    np.testing.assert_allclose(curve.rates[STEPS - 1], RATES, rtol=1e-6)


def test_rows_without_a_loss_repeated_steps_and_step_0_do_not_count() -> None:
    logged = pd.concat([
        pd.DataFrame({"step": [0], "lr": [0.0], "loss": [9.0]}),
        frame(),
        pd.DataFrame({"step": [105, 100], "lr": [1e-4, 1e-4], "loss": [np.nan, LOSSES[-1]]}),
    ])  # fmt: skip
    (curve,) = read_curves(logged)
    np.testing.assert_array_equal(curve.steps, STEPS)
    assert "1 of 13 rows dropped: the loss is missing or NaN" in curve.notes[0]
    assert "logged twice" in curve.notes[1]


def test_a_schedule_stands_in_for_a_learning_rate_that_was_not_logged() -> None:
    (curve,) = read_curves(frame().drop(columns="lr"), schedules={"*": "cosine(peak=1e-3, steps=100)"})
    assert curve.rates[0] == 1e-3
    with pytest.raises(InputError, match=r"has no learning rate.*step, loss"):
        read_curves(frame().drop(columns="lr"))


def test_units_are_read_as_said() -> None:
    (curve,) = read_curves(frame(loss=np.exp(LOSSES) + 20), Reading(unit="perplexity"))
    np.testing.assert_allclose(curve.losses, np.log(np.exp(LOSSES) + 20))
    (curve,) = read_curves(frame(), Reading(unit="bits"))
    np.testing.assert_allclose(curve.losses, LOSSES * np.log(2))


@pytest.mark.parametrize(
    "table, reading, sentence",
    [
        (frame(loss=LOSSES - 2.95), Reading(), "losses must be positive"),
        (frame(loss=[np.inf, *LOSSES[1:]]), Reading(unit="nats"), "positive and finite"),
        (frame(loss=LOSSES + 30), Reading(), "is it a perplexity"),
        (frame(loss=[str(v) for v in LOSSES[:-1]] + ["high"]), Reading(), "'high' in column 'loss' is not a number"),
        (frame(lr=-RATES), Reading(), "not negative"),
        (frame(lr=0 * RATES), Reading(), "not all 0"),
        (frame(loss=np.nan), Reading(), "no row has both a step"),
        (frame(step=STEPS + 0.5), Reading(), "whole numbers"),
        (frame().drop(columns="step"), Reading(), "no column for the step"),
        (frame().drop(columns="loss"), Reading(), "no column for the loss.*step, lr"),
        (frame(), Reading(columns={"loss": "ppl"}), "no column 'ppl'"),
        (frame(), Reading(columns={"lr": "eta"}), "no column 'eta'"),
        (frame(), Reading(run="seed"), "no column 'seed'"),
        (frame(params=STEPS), Reading(), "different numbers of parameters"),
    ],
)
def test_wrong_logs_are_refused_in_one_sentence(table: pd.DataFrame, reading: Reading, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        read_curves(table, reading)


def test_missing_files_and_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no file"):
        read_curves(tmp_path / "nothing.csv")
    with pytest.raises(InputError, match="holds no loss curve"):
        read_curves(tmp_path)


def test_windows_average_neighbours() -> None:
    curve = LossCurve.of("a", STEPS, LOSSES, np.full(100, 1e-3)).averaged(5)
    np.testing.assert_allclose(curve.losses, LOSSES.reshape(5, 2).mean(1))
    np.testing.assert_array_equal(curve.steps, [15, 35, 55, 75, 95])
    assert curve.first(0.5).steps.tolist() == [15, 35]


def test_the_curves_of_a_comparison_are_its_runs_logs(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mine"
    for run in ("a", "b"):
        place = folder / "runs" / run / "seed-0"
        place.mkdir(parents=True)
        lines = [{"step": t, "train/loss": 3 - t / 100, "learning_rate": 1e-3} for t in range(1, 60)]
        (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    # Tables and settings of another shape, which are no curves.
    (folder / "compare.json").write_text('{"seeds": [0], "arms": {"a": {}}}')
    (folder / "table.json").write_text('{"rows": []}')
    for source in (tmp_path / "runs", folder):
        assert [curve.name.rpartition("runs/")[2] for curve in read_curves(source)] == ["a/seed-0", "b/seed-0"]
