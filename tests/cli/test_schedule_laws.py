"""Laws of schedules on the command line: fit, predict, plan."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from lossmith.cli import app
from lossmith.errors import InputError
from lossmith.laws import areas, schedule

TRAINED = {"flat": "constant(peak=1e-3)", "falls": "cosine(peak=1e-3, floor=1e-4)"}


def run(*words: str) -> str:
    result = CliRunner().invoke(app, list(words))
    if result.exception is not None:
        raise result.exception
    return result.output


@pytest.fixture
def curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "curves"
    folder.mkdir()
    at = np.arange(100, 3001, 25)
    for k, (name, text) in enumerate(TRAINED.items()):
        rates = schedule(text).values(3000)
        first, second = areas(rates, 0.99)
        noise = np.exp(1e-3 * np.random.default_rng(k).standard_normal(len(at)))
        loss = (2.6 + 0.5 * first**-0.6 - 4 * second)[at - 1] * noise
        pd.DataFrame({"step": at, "lr": rates[at - 1], "loss": loss}).to_csv(folder / f"{name}.csv", index=False)
    monkeypatch.chdir(tmp_path)
    return folder


def test_fit_predict_and_plan_with_schedules(curves: Path) -> None:
    shown = run("fit", str(curves), "--law", "lr-annealing(decay=0.99)", "--bootstrap", "40", "--plot", "fit.png")
    assert "234 points of 2 runs" in shown
    assert Path("fit.png").stat().st_size > 10_000
    rates = schedule("wsd(peak=1e-3, decay=0.2)").values(3000)
    first, second = areas(rates, 0.99)
    truth = 2.6 + 0.5 * first[-1] ** -0.6 - 4 * second[-1]
    words = ["predict", "fitted.json", "--schedule", "wsd(peak=1e-3, decay=0.2)", "--steps", "3000"]
    rows = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert len(rows) == 20
    assert rows[-1]["at"] == "step 3000 of wsd(peak=0.001, decay=0.2)"
    assert rows[-1]["loss"] == pytest.approx(truth, rel=2e-3)
    assert rows[-1]["low"] < truth < rows[-1]["high"]
    run(*words, "--out", "all.csv")
    assert len(pd.read_csv("all.csv")) == 1000
    plan = json.loads(run("plan", "fitted.json", "--steps", "3000", "--what-if", TRAINED["flat"], "--what-if",
                          "wsd(peak=1e-3)", "--json"))  # fmt: skip
    assert [c["schedule"] for c in plan["candidates"]] == ["wsd(peak=0.001)", "constant(peak=0.001)"]
    assert "best" in run("plan", "fitted.json", "--steps", "3000", "--set", "top=3", "--set", "floor=0")


def test_a_schedule_stands_in_for_rates_that_were_not_logged(curves: Path) -> None:
    for path in curves.glob("*.csv"):
        pd.read_csv(path).drop(columns="lr").to_csv(path, index=False)
    words = ["fit", str(curves), "--law", "lr-annealing(decay=0.99)", "--bootstrap", "0"]
    with pytest.raises(InputError, match="has no learning rate"):
        run(*words)
    shown = run(*words, "--schedule", f"falls: {TRAINED['falls'][:-1]}, steps=3000)", "--schedule", TRAINED["flat"])
    assert "alpha    0.6" in shown or "alpha    0.59" in shown


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["fit", "curves/falls.csv", "--law", "lr-annealing"], "one schedule only"),
        (["fit", "curves", "--law", "lr-anealing"], "did you mean 'lr-annealing'"),
        (["fit", "curves", "--law", "lr-annealing(decay=2)"], "decay must lie inside"),
        (["fit", "curves", "--law", "chinchilla", "--schedule", "constant(peak=1)"], "is none"),
        (["predict", "fitted.json", "--at", "params=3"], "no input 'params'"),
        (["predict", "fitted.json", "--schedule", "cosine(peak=1e-3)"], "no length of its own"),
        (["plan", "fitted.json", "--flops", "1e20"], "plans schedules"),
        (["plan", "fitted.json"], "plan needs steps"),
    ],
)
def test_wrong_words_get_one_sentence(curves: Path, words: list[str], sentence: str) -> None:
    if "fitted.json" in words:
        run("fit", str(curves), "--law", "lr-annealing(decay=0.99)", "--bootstrap", "0")
    with pytest.raises(InputError, match=sentence):
        run(*words)
