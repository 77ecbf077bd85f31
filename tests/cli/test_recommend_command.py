"""``lossmith recommend`` on files of the user."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from lossmith.cli import app
from lossmith.errors import InputError
from lossmith.tasks.recommendation import synthetic_feedback

SMALL = ["--epochs", "3", "--batch-size", "256", "--dim", "4"]


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    made = synthetic_feedback(30, 50, per_user=10, noise=0.0)
    for name, table in (("train.txt", made.train), ("test.txt", made.test)):
        lines = [f"u{u}\ti{i}\t3" for u, i in zip(table.rows, table.indices, strict=True)]
        (folder / name).write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def trained(tables: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("trained") / "model"
    done = run("fit", str(tables), "--out", str(out), "--inject-noise", "0.3", "--validation", "0.2", *SMALL)
    return out, done


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["recommend", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_fit_says_what_it_read_and_how_good_it_is(trained: tuple[Path, str]) -> None:
    out, said = trained
    assert "30 users" in said
    assert "false interactions added" in said
    assert "within users" in said
    assert "Recall@20" in said
    assert {p.name for p in out.iterdir()} == {
        "config.json",
        "interactions.safetensors",
        "model.safetensors",
        "names.json",
    }


def test_predict_suspects_and_evaluate(trained: tuple[Path, str], tables: Path, tmp_path: Path) -> None:
    out, _ = trained
    run("predict", str(out), "--k", "4", "--user", "u3", "--out", str(tmp_path / "top.csv"))
    top = pd.read_csv(tmp_path / "top.csv")
    assert top["rank"].tolist() == [1, 2, 3, 4]
    assert set(top.user) == {"u3"}
    run("predict", str(out), "--k", "2", "--out", str(tmp_path / "all.parquet"))
    assert len(pd.read_parquet(tmp_path / "all.parquet")) == 60
    run("suspects", str(out), "--out", str(tmp_path / "s.tsv"))
    suspects = pd.read_csv(tmp_path / "s.tsv", sep="\t")
    assert suspects.suspicion.is_monotonic_decreasing
    found = json.loads(run("evaluate", str(out), str(tables / "test.txt"), "--k", "5", "--json"))
    assert 0 <= found["recall"]["5"] <= 1
    assert found["users"] == 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fit", "{t}/none.txt", "--out", "{o}"), "does not exist"),
        (("fit", "{t}/train.txt", "--out", "{t}"), "is not an empty folder"),
        (("fit", "{t}/train.txt", "--out", "{o}", "--denoise", "personal(tau=0)"), "tau must be > 0"),
        (("fit", "{t}/train.txt", "--out", "{o}", "--epochs", "0"), "epochs must be an integer >= 1"),
        (("fit", "{t}/train.txt", "--out", "{o}", "--learning-rate", "1e38"), "not finite at step .* --learning-rate"),
        (("fit", "{t}/train.txt", "--out", "{o}", "--validation", "1"), "--validation must be a share"),
        (("fit", "{t}/train.txt", "--out", "{o}", "--item-col", "film"), "has no column 'film'"),
        (("predict", "{t}", "--out", "{o}.csv"), "holds no recommender"),
        (("evaluate", "{m}", "{t}/test.txt", "--ndcg", "full"), "ndcg must be"),
        (("evaluate", "{m}", "{t}/test.txt", "--k", "0"), "--k must be at least 1, got 0"),
        (("predict", "{m}", "--user", "nobody", "--out", "{o}.csv"), "user 'nobody' is not in the training table"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(
    arguments: tuple[str, ...], message: str, trained: tuple[Path, str], tables: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    given = [a.format(t=tables, o=out, m=trained[0]) for a in arguments]
    with pytest.raises(InputError, match=message):
        CliRunner().invoke(app, ["recommend", *given], catch_exceptions=False)
    assert not list(tmp_path.iterdir())
