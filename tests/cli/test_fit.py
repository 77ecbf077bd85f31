"""``lossmith fit``, ``predict``, ``plan`` and ``advise`` as a user would type them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from command_line import run

from lossmith.errors import InputError


def points(noise: float = 0.002) -> pd.DataFrame:
    n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e7, 1e9, 6), np.geomspace(1e9, 1e11, 6)))
    rng = np.random.default_rng(0)
    loss = (1.7 + 400 * n**-0.34 + 1500 * d**-0.33) * np.exp(noise * rng.standard_normal(36))
    return pd.DataFrame({"N": n, "D": d, "final": loss, "family": np.where(np.arange(36) % 2, "odd", "even")})


@pytest.fixture
def table(tmp_path: Path) -> Path:
    points().to_csv(tmp_path / "points.csv", index=False)
    return tmp_path / "points.csv"


@pytest.fixture
def fitted(table: Path, tmp_path: Path) -> Path:
    run("fit", table, "--loss", "final", "--bootstrap", 40, "--out", tmp_path / "fitted.json")
    return tmp_path / "fitted.json"


def test_fit_writes_the_law_a_picture_and_a_summary(table: Path, tmp_path: Path) -> None:
    out = run(
        "fit", table, "--loss", "final", "--bootstrap", 40, "--backtest",
        "--out", tmp_path / "law.json", "--plot", tmp_path / "law.svg",
    )  # fmt: skip
    assert "loss = E + A / params^alpha + B / tokens^beta" in out
    assert "36 points of 6 runs" in out
    assert "note: rows of one size are taken for checkpoints of one run" in out
    assert "backtest: the largest 1 runs hidden (6 points" in out
    assert json.loads((tmp_path / "law.json").read_text())["parameters"]["alpha"] == pytest.approx(0.34, abs=0.05)
    assert (tmp_path / "law.svg").read_text().startswith("<?xml")


def test_json_has_what_the_text_has(table: Path, tmp_path: Path) -> None:
    value = json.loads(
        run("fit", table, "--loss", "final", "--bootstrap", 40, "--json", "--backtest", "--out", tmp_path / "f.json")
    )
    assert set(value["parameters"]) == {"E", "A", "B", "alpha", "beta"}
    assert value["intervals"]["alpha"][0] < value["parameters"]["alpha"] < value["intervals"]["alpha"][1]
    assert value["backtest"]["points"] == 6


def test_units_conditions_and_given_parameters_reach_the_fit(tmp_path: Path) -> None:
    points(0).assign(D=lambda f: np.log10(f["D"]), N=lambda f: f["N"] / 1e6).to_csv(tmp_path / "t.csv", index=False)
    value = json.loads(
        run(
            "fit", tmp_path / "t.csv", "--loss", "final", "--log10", "tokens", "--scale", "params=1e6",
            "--where", "family=odd", "--above", "tokens=1.1e9", "--fix", "alpha=0.34", "--objective", "squares",
            "--bootstrap", 0, "--json", "--out", tmp_path / "f.json",
        )
    )  # fmt: skip
    assert value["parameters"]["A"] == pytest.approx(400, rel=1e-6)
    assert value["options"]["fixed"] == {"alpha": 0.34}
    # 36 points, half of them odd, a sixth of those of the lowest tokens.
    table = json.loads((tmp_path / "f.json").read_text())["table"]
    assert len(table["runs"]) == 15


def test_predict_prints_and_writes_values_with_limits(fitted: Path, tmp_path: Path) -> None:
    out = run(
        "predict", fitted, "--at", "params=1e10, tokens=1e12", "--at", "N=1e9,D=1e12", "--out", tmp_path / "p.csv"
    )
    assert "90% limits" in out
    with (tmp_path / "p.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    assert float(rows[0]["low"]) < float(rows[0]["loss"]) < float(rows[0]["high"])
    assert float(rows[0]["loss"]) == pytest.approx(1.7 + 400 * 1e10**-0.34 + 1500 * 1e12**-0.33, rel=0.03)


def test_plan_says_size_tokens_and_loss(fitted: Path, tmp_path: Path) -> None:
    out = run("plan", fitted, "--flops", 1e21, "--plot", tmp_path / "plan.png")
    assert "tokens per parameter" in out
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    value = json.loads(run("plan", fitted, "--flops", 1e21, "--json"))
    assert 6 * value["params"] * value["tokens"] == pytest.approx(1e21)


def test_what_if_ranks_trainings_with_the_best_first(fitted: Path) -> None:
    value = json.loads(
        run("plan", fitted, "--flops", 1e21, "--what-if", "params=1e8", "--what-if", "ratio=20", "--json")
    )["ranked"]
    plan = json.loads(run("plan", fitted, "--flops", 1e21, "--json"))
    assert len(value) == 3
    assert value[0]["params"] == pytest.approx(plan["params"])
    assert [one["above"] for one in value] == sorted(one["above"] for one in value)
    assert value[0]["above_low"] == value[0]["above_high"] == 0
    last = value[-1]
    assert (last["params"], last["tokens"]) == pytest.approx((1e8, 1e21 / 6e8))
    # What is shared by both does not blur the difference.
    assert last["above_high"] - last["above_low"] < last["high"] - last["low"]
    text = run("plan", fitted, "--what-if", "params=1e8, tokens=1e10", "--what-if", "params=1e9,ratio=20")
    assert "above the best" in text


def test_families_are_fitted_each_by_itself(table: Path, tmp_path: Path) -> None:
    out = run("fit", table, "--loss", "final", "--by", "family", "--bootstrap", 0, "--out", tmp_path / "laws")
    assert sorted(path.name for path in (tmp_path / "laws").iterdir()) == ["even.json", "odd.json"]
    assert [line.split()[0] for line in out.splitlines()[1:3]] == ["even", "odd"]


def test_advise_gives_numbered_recommendations_and_a_grid(tmp_path: Path) -> None:
    n, d = np.meshgrid(np.geomspace(1e8, 1e10, 6), np.geomspace(5e8, 3e11, 30))
    loss = 1.7 + 400 * n**-0.34 + 1500 * d**-0.33
    frame = pd.DataFrame({"params": n.ravel(), "tokens": d.ravel(), "loss": loss.ravel()})
    frame.to_csv(tmp_path / "runs.csv", index=False)
    out = run("advise", tmp_path / "runs.csv", "--target", 1e12, "--grid")
    assert out.startswith("1. Fit the whole curves, without the first 10 billion tokens.")
    assert "first 100%" in out
    value = json.loads(run("advise", tmp_path / "runs.csv", "--json"))
    assert value["error"] < 1e-6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fit", "{table}"], "no column for 'loss' .* N, D, final, family"),
        (["fit", "{table}", "--law", "chinchila"], "did you mean 'chinchilla'"),
        (["fit", "{table}", "--loss", "final", "--objective", "l1"], "--objective must be huber or squares, got 'l1'"),
        (["fit", "{table}", "--loss", "final", "--fix", "gamma=1"], "no parameter 'gamma' to fix"),
        (["fit", "{table}", "--loss", "final", "--fix", "alpha"], "--fix takes name=value, got 'alpha'"),
        (["fit", "{table}", "--loss", "final", "--fix", "alpha=x"], "--fix takes name=number"),
        (["fit", "{table}", "--loss", "final", "--bootstrap", "-1"], "--bootstrap must not be negative"),
        (["fit", "{table}", "--loss", "final", "--plot", "x.bmp"], r"must end in \.png"),
        (["fit", "{table}", "--loss", "final", "--by", "kind"], "no column 'kind' to group by"),
        (["fit", "{table}", "--loss", "final", "--by", "family", "--out", "a.json"], "--out must be a folder"),
        (["fit", "{table}", "--loss", "final", "--above", "tokens=1e20"], "removes all 36 rows"),
        (["fit", "{table}", "--law", "lr-annealing", "--by", "family"], "is fitted to one table at a time"),
        (["fit", "{table}", "--law", "lr-annealing", "--above", "tokens=1e9"], "--above is for laws of quantities"),
        (["fit", "none.csv"], "there is no file or folder none.csv"),
        (["predict", "{fitted}"], "say what to predict"),
        (["predict", "{fitted}", "--at", "params=1e9"], "needs tokens to predict"),
        (["predict", "{fitted}", "--at", "params=1e9, tokens=1e9", "--level", "2"], "--level must lie between 0 and 1"),
        (["predict", "{table}", "--at", "params=1e9"], "is not a fitted law"),
        (["plan", "{fitted}"], r"needs flops \(a budget\) or loss \(a goal\)"),
        (["plan", "{fitted}", "--loss", "1"], "does not reach a loss of 1"),
        (["plan", "{fitted}", "--flops", "1e21", "--set", "speed=3"], "by the law chinchilla takes no 'speed'"),
        (["plan", "{fitted}", "--what-if", "params=1e9"], "needs two of params, tokens and ratio"),
        (["plan", "{fitted}", "--what-if", "width=1e9"], "what_if takes params, tokens and ratio"),
        (["plan", "{fitted}", "--what-if", "params=x, tokens=1"], "params must be a number, got 'x'"),
        (["plan", "{fitted}", "--flops", "-1"], "flops must be positive"),
        (["plan", "{fitted}", "--flops", "1e21", "--what-if", "ratio=20", "--plot", "a.png"], "without --what-if"),
        (["advise", "{table}", "--loss", "final", "--target", "-3"], "target_params must be positive"),
    ],
)  # fmt: skip
def test_mistakes_get_one_sentence(
    words: list[str], message: str, table: Path, fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=message) as caught:
        run(*(word.format(table=table, fitted=fitted) for word in words))
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before
