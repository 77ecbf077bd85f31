"""``lossmith pairs`` as a user would type it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import command_line
import pytest

from lossmith.errors import InputError

run = partial(command_line.run, "pairs")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = [f"{word}\t{'yes' if i % 2 else 'no'}\t{i % 2}\n" for i, word in enumerate(["rain", "sun", "fog"] * 16)]
    (tmp_path / "train.tsv").write_text("one\ttwo\tsame\n" + "".join(rows))
    return tmp_path / "train.tsv"


COLUMNS = ("--first", "one", "--second", "two", "--label", "same")


def test_fit_predict_and_evaluate(table: Path, tmp_path: Path) -> None:
    out = run(
        "fit", table, "--out", tmp_path / "classifier", "--evaluate", table, "--epochs", 12, "--learning-rate", 5e-3,
        "--loss", "set_dice_loss(alpha=0.01)", *COLUMNS,
    )  # fmt: skip
    assert "48 pairs" in out
    assert "F1 1.000" in out
    (tmp_path / "new.txt").write_text("sun\tyes\nsun\tno\n")
    assert run("predict", tmp_path / "classifier", tmp_path / "new.txt").split() == ["1", "0"]
    assert json.loads(run("evaluate", tmp_path / "classifier", table, "--json", *COLUMNS))["f1"] == 1.0


def test_wrong_input_is_one_sentence(table: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not an empty folder"):
        run("fit", table, "--out", tmp_path, *COLUMNS)
    with pytest.raises(InputError, match="--epochs must be > 0"):
        run("fit", table, "--out", tmp_path / "x", "--epochs", 0, *COLUMNS)
    with pytest.raises(InputError, match="say which column is first; it has one, two, same"):
        run("fit", table, "--out", tmp_path / "x")
    with pytest.raises(ValueError, match="unknown loss 'dise'"):
        run("fit", table, "--out", tmp_path / "x", "--loss", "dise", *COLUMNS)
    with pytest.raises(InputError, match="holds no classifier of pairs"):
        run("evaluate", tmp_path, table, *COLUMNS)
    (tmp_path / "new.txt").write_text("sun\tyes\nalone\n")
    with pytest.raises(InputError, match=r"new\.txt, pair 2: 1 columns"):
        run("predict", tmp_path, tmp_path / "new.txt")
    assert not (tmp_path / "x").exists()
