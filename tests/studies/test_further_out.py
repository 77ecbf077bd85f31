"""Forecasts of larger budgets in comparisons."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from lossmith.laws import areas, schedule
from lossmith.reporting import Comparison, Forecast, Run, comparison_from_json, comparison_to_json, summarise
from lossmith.reporting.cells import grids
from lossmith.reporting.html import render_html
from lossmith.studies.further_out import forecast

STEPS = 600
RATES = schedule("cosine(peak=1e-3, warmup=60, floor=1e-4)").values(STEPS)
DECAY = 1 - 1 / (0.03 * STEPS)
TRUTH = (2.0, 0.6, 6.0, 0.5)


def law(rates: np.ndarray) -> np.ndarray:
    flat = np.concatenate([np.full(60, rates[60]), rates[60:]])
    first, second = areas(flat, DECAY)
    return TRUTH[0] + TRUTH[1] * first ** -TRUTH[3] - TRUTH[2] * second


def record(folder: Path, *, seed: int = 0, validations: int = 5, steps: int = STEPS, gap: float = 1.05) -> Path:
    """A run record whose validation loss lies ``gap`` above a noisy training loss that obeys the law."""
    folder.mkdir(parents=True)
    clean = law(RATES)
    noise = np.exp(0.02 * np.random.default_rng(seed).standard_normal(STEPS))
    lines = []
    for step in range(1, steps + 1):
        line = {"step": step, "learning_rate": RATES[step - 1], "tokens": 100 * step, "seconds": 0.1 * step}
        lines.append({**line, "train/loss": 99.0, "train/loss_unweighted": clean[step - 1] * noise[step - 1]})
        if step % (STEPS // validations) == 0:
            lines.append({"step": step, "tokens": 100 * step, "eval/loss": gap * clean[step - 1]})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize("validations", [5, 30])
def test_a_law_that_holds_is_extended_to_the_validation_loss(tmp_path: Path, validations: int) -> None:
    folders = [record(tmp_path / f"seed-{s}", seed=s, validations=validations) for s in range(3)]
    found = forecast("a", folders)
    assert found.reason == ""
    assert [point.times for point in found.points] == [2, 4, 8]
    assert [point.tokens for point in found.points] == [120_000, 240_000, 480_000]
    for point in found.points:
        longer = schedule(f"cosine(peak=1e-3, warmup={60 * point.times:g}, floor=1e-4)").values(
            int(point.times) * STEPS
        )
        begun = round(60 * point.times)
        first, second = areas(np.concatenate([np.full(begun, 1e-3), longer[begun:]]), DECAY)
        truth = 1.05 * (TRUTH[0] + TRUTH[1] * first[-1] ** -TRUTH[3] - TRUTH[2] * second[-1])
        assert point.low <= point.loss <= point.high
        assert point.loss == pytest.approx(truth, rel=0.02)
        assert point.low * 0.995 < truth < point.high * 1.005
    assert found.missed < (0.02 if validations == 5 else 0.002)
    assert found.held > 0.7


@pytest.mark.slow
def test_a_real_run_of_twice_the_budget_ends_inside_the_interval(tmp_path: Path) -> None:
    """Two comparisons of one model on the embedded corpus, the second with twice the tokens."""
    from lossmith.studies.compare import run_compare
    from lossmith.studies.settings import Execution, make_settings

    ends = []
    for tokens in (150_000, 300_000):
        settings = make_settings({
            "arms": ["baseline"], "model": "nano", "vocab_size": 512, "tokens": tokens, "seeds": 2,
            "eval_tokens": 10_000,
        })  # fmt: skip
        made = run_compare(settings, Execution(out=tmp_path / str(tokens), jobs=1))
        ends.append((made.forecasts[0], np.mean([run.metrics["eval/loss"] for run in made.runs])))
    (found, _), (_, measured) = ends
    assert found.reason == ""
    assert found.points[0].times == 2
    assert found.points[0].tokens == pytest.approx(300_000, rel=0.05)
    assert found.points[0].low < measured < found.points[0].high
    assert found.points[0].high - found.points[0].low < 1.5


def test_what_cannot_be_forecast_says_why(tmp_path: Path) -> None:
    folders = [record(tmp_path / "a")]
    assert "no run finished" in forecast("a", []).reason
    assert "too short: 40 logged" in forecast("a", [record(tmp_path / "short", steps=40)]).reason
    assert "another quantity" in forecast("a", folders, comparable=False).reason
    assert forecast("a", [record(tmp_path / "often", validations=20)], comparable=False).points
    (tmp_path / "a" / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": s, "tokens": s, "train/loss": 2.0}) + "\n" for s in range(1, 99))
    )
    assert "no learning rate" in forecast("a", folders).reason


def comparison(*forecasts: Forecast) -> Comparison:
    runs = tuple(Run(arm, seed, {"eval/loss": 2.0 + seed}) for arm in ("base", "new") for seed in range(3))
    return Comparison("t", "q", {"base": "", "new": ""}, "base", "eval/loss", ("eval/loss",), runs, forecasts=forecasts)


def test_reports_have_a_section_further_out(tmp_path: Path) -> None:
    found = forecast("base", [record(tmp_path / f"seed-{s}", seed=s) for s in range(3)])
    made = comparison(found, Forecast("new", reason="too short: 3 logged training losses, 60 are needed"))
    assert comparison_from_json(json.dumps(comparison_to_json(made))).forecasts[0] == found
    table = summarise(made)
    (grid,) = [grid for grid in grids(table) if grid.kind == "forecast"]
    assert [column.name for column in grid.columns] == ["arm", "2x", "4x", "8x", "missed by"]
    assert grid.rows[0][1].startswith(f"{found.points[0].loss:.2f} [")
    assert grid.rows[1] == ("new", "-", "-", "-", "-")
    assert any("no forecast of new: too short" in note for note in table.footnotes)
    assert any("fitted to the first 67% of the runs predicted the rest" in note for note in table.footnotes)
    assert "<h2>Further out</h2>" in render_html(made)
    assert "Further out" in table.to_markdown()
    assert table.to_json()["forecasts"][0]["arm"] == "base"  # type: ignore[index]


def test_comparisons_without_any_forecast_have_no_such_section() -> None:
    short = tuple(Forecast(arm, reason="too short") for arm in ("base", "new"))
    table = summarise(comparison(*short))
    assert all(grid.kind != "forecast" for grid in grids(table))
    assert "Further out: no forecast of base, new: too short." in table.footnotes
    plain = dataclasses.replace(comparison(), forecasts=())
    assert not any("Further out" in note for note in summarise(plain).footnotes)
