"""``lossmith probe`` on a small model from a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lossmith.cli import app
from lossmith.errors import InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import GPT2Config, GPT2LMHeadModel

    path = tmp_path_factory.mktemp("probe") / "model"
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=90, bos_token_id=1, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(path)
    return str(path)


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["probe", *arguments])
    if isinstance(result.exception, InputError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_it_prints_a_summary_and_writes_report_and_plot(folder: str, tmp_path: Path) -> None:
    plot, out = tmp_path / "plot.svg", tmp_path / "report.json"
    text = run(folder, "--what", "superposition(pair_rows=20)", "--plot", str(plot), "--out", str(out))
    assert "90 x 16, float32, tied to the input embedding" in text
    assert "(20 rows with all others)" in text
    assert "<svg" in plot.read_text()
    written = json.loads(out.read_text())
    printed = json.loads(run(folder, "--json", "--what", "superposition(pair_rows=20)"))
    assert printed == written
    assert written["mean_square_overlap"] == pytest.approx(1 / 16, rel=0.1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--what", "superpositon"], "unknown probe 'superpositon': did you mean 'superposition'"),
        (["--what", "superposition(pairs=3)"], "has no option 'pairs': did you mean 'pair_rows'"),
        (["--what", "superposition(pair_rows=0)"], "pair_rows must be at least 1, got 0"),
        (["--data", "x.txt"], "takes no --data"),
        (["--plot", "x.gif"], r"must end in \.png, \.svg or \.pdf"),
    ],
)
def test_wrong_input_is_one_sentence(arguments: list[str], message: str, folder: str) -> None:
    with pytest.raises(InputError, match=message):
        run(folder, *arguments)


def test_a_model_that_is_not_there_is_one_sentence() -> None:
    with pytest.raises(InputError, match="neither a folder nor a model on the hub"):
        run("no-such-model")
