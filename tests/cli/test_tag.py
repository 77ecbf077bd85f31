"""``lossmith tag`` as a user would type it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import command_line
import pytest

from lossmith.errors import InputError
from lossmith.tasks.text import Sentence, read_conll
from lossmith.tasks.text.conll import write_conll

run = partial(command_line.run, "tag")


@pytest.fixture
def conll(tmp_path: Path) -> Path:
    rows = [Sentence(("see", "mister", name), ("O", "O", "B-person")) for name in ("ann", "bob")] * 20
    write_conll(tmp_path / "train.conll", rows)
    return tmp_path / "train.conll"


def test_fit_predict_and_evaluate(conll: Path, tmp_path: Path) -> None:
    out = run(
        "fit", conll, "--out", tmp_path / "tagger", "--evaluate", conll, "--epochs", 15, "--learning-rate", 5e-3,
        "--loss", "set_dice_loss(alpha=0.01)",
    )  # fmt: skip
    assert "40 sentences" in out
    assert "F1 1.000" in out
    (tmp_path / "new.txt").write_text("see mister bob\n\nsee mister ann\n")
    run("predict", tmp_path / "tagger", tmp_path / "new.txt", "--out", tmp_path / "tagged.conll")
    assert [s.tags[-1] for s in read_conll(tmp_path / "tagged.conll")] == ["B-person", "B-person"]
    assert "bob\tB-person" in run("predict", tmp_path / "tagger", tmp_path / "new.txt")
    assert json.loads(run("evaluate", tmp_path / "tagger", conll, "--json"))["f1"] == 1.0


def test_wrong_input_is_one_sentence(conll: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not an empty folder"):
        run("fit", conll, "--out", tmp_path)
    with pytest.raises(InputError, match="--epochs must be > 0"):
        run("fit", conll, "--out", tmp_path / "x", "--epochs", 0)
    with pytest.raises(InputError, match="unknown loss 'dise'"):
        run("fit", conll, "--out", tmp_path / "x", "--loss", "dise")
    with pytest.raises(InputError, match="does not exist"):
        run("fit", tmp_path / "no.conll", "--out", tmp_path / "x")
    with pytest.raises(InputError, match="holds no token classifier"):
        run("evaluate", tmp_path, conll)
    assert not (tmp_path / "x").exists()
