"""lossmith prune on a small model of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lossmith.cli import app
from lossmith.errors import InputError


def _run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["prune", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


@pytest.mark.parametrize("method", ["magnitude", "uniform", "nm"])
def test_writes_a_model_with_half_of_its_weights(method: str, small_gpt2: Path, tmp_path: Path) -> None:
    output = _run(small_gpt2, "--method", method, "--out", tmp_path / "pruned")
    assert "50.00% of the prunable weights are zero" in output
    assert "pruned against dense, here (cpu, " in output
    assert "(1.00x); peak memory" in output
    assert "as large on disk, as large in memory" in output
    assert "95% interval" in output
    assert "none of the 8 linear layers is faster as a sparse matrix" in output
    assert "--compact leaves them out" in output
    assert (tmp_path / "pruned" / "tokenizer.json").is_file()


def test_a_compact_model_is_smaller_and_comes_back(small_gpt2: Path, text_folder: Path, tmp_path: Path) -> None:
    options = ("--sparsity", 0.9, "--eval", text_folder, "--texts", 4, "--max-length", 20)
    output = _run(small_gpt2, *options, "--compact", "--out", tmp_path / "small")
    assert "smaller on disk, as large in memory" in output
    assert "loss" in output
    assert not list((tmp_path / "small").glob("model*.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    _run(small_gpt2, *options, "--no-measure", "--out", tmp_path / "plain")
    _run(tmp_path / "small", "--expand", "--out", tmp_path / "again")
    for path in (tmp_path / "plain").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name


def test_what_cannot_be_measured_is_said_and_the_model_is_there(
    small_gpt2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lossmith.sparsity.measured_checkpoint._free_memory", lambda: 1000)
    output = _run(small_gpt2, "--out", tmp_path / "pruned")
    assert "not measured: both models at once need about" in output
    assert (tmp_path / "pruned" / "model.safetensors").is_file()
    assert "faster" not in _run(small_gpt2, "--no-measure", "--out", tmp_path / "other")


def test_sweep_writes_the_curve(small_gpt2: Path, text_folder: Path, tmp_path: Path) -> None:
    output = _run(
        small_gpt2, "--sweep", "--eval", text_folder, "--grid", "0:0.9:0.3", "--texts", 8, "--max-length", 500,
        "--out", tmp_path / "curve.json", "--plot", tmp_path / "curve.png", "--method", "nm",
    )  # fmt: skip
    assert "essential sparsity" in output
    assert "knee at" in output
    assert "2:4" in output
    found = json.loads((tmp_path / "curve.json").read_text())
    assert [row["sparsity"] for row in found["rows"]] == [0, 0.3, 0.6, 0.9]
    assert (tmp_path / "curve.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--method", "magnitud"), "unknown method 'magnitud'"),
        (("--sparsity", "1"), r"--sparsity must lie in \[0, 1\)"),
        (("--targets", "some"), "--targets must be"),
        ((), "--out FOLDER"),
        (("--eval", "/nowhere/x.txt", "--out", "nowhere"), "/nowhere/x.txt"),
        (("--plot", "x.png"), "--plot belongs to --sweep"),
        (("--sweep", "--compact"), "--compact goes without --sweep"),
        (("--expand",), "--out FOLDER says where the plain model goes"),
        (("--expand", "--out", "nowhere"), "holds no compact checkpoint"),
        (("--sparsity", "-0.1"), r"--sparsity must lie in \[0, 1\), got -0.1"),
        (("--method", "nm", "--pattern", "4:2", "--out", "nowhere"), "N < M"),
        (("--method", "nm", "--pattern", "2:5", "--out", "nowhere"), "not a multiple of 5"),
        (("--sweep",), "--sweep needs --eval"),
        (("--sweep", "--grid", "0:x"), "is not from:to:step"),
        (("--sweep", "--eval", "x", "--plot", "x.txt"), "must end in"),
        (("--sweep", "--eval", "x", "--tolerance", "-1"), "--tolerance"),
    ],
)
def test_wrong_input_is_one_sentence(arguments: tuple[str, ...], sentence: str, small_gpt2: Path) -> None:
    with pytest.raises(InputError, match=sentence):
        _run(small_gpt2, *arguments)
    assert not Path("nowhere").exists()
