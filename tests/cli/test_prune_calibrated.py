"""lossmith prune with text: a model that has learnt two domains."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lossmith.cli import app
from lossmith.errors import InputError


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    """A small model, and a file for each domain."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from lossmith.data import train_tokenizer
    from lossmith.training.text_training import train_on_texts

    folder = tmp_path_factory.mktemp("prune")
    texts = {}
    for domain in ("letters", "numbers"):
        texts[domain] = [path.read_text()[:200] for path in sorted((text_folder / domain).glob("*.txt"))]
        lines = [json.dumps({"text": text}) for text in texts[domain]]
        (folder / f"{domain}.jsonl").write_text("\n".join(lines))
    both = texts["letters"] + texts["numbers"]
    tokenizer = train_tokenizer(both, vocab_size=300)
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    model = LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=64, vocab_size=len(tokenizer), **shape))
    train_on_texts(model, tokenizer, both, folder=folder / "run", epochs=1, max_length=64, use_cpu=True)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def _run(workplace: Path, *arguments: object) -> str:
    given = [str(workplace / a) if str(a).endswith((".jsonl", "model")) else str(a) for a in arguments]
    result = CliRunner().invoke(app, ["prune", *given])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


@pytest.mark.parametrize(
    "method", ["wanda", "sparsegpt(block_size=32)", "d-pruner(epochs=1, reg_ratio=10)", "uniform", "nm"]
)
def test_says_perplexities_of_both_texts_before_and_after(method: str, workplace: Path, tmp_path: Path) -> None:
    output = _run(
        workplace, "model", "--method", method, "--calibration", "numbers.jsonl", "--general", "letters.jsonl",
        "--samples", 8, "--out", tmp_path / "pruned",
    )  # fmt: skip
    assert re.search(r"(50|49)\.\d\d% of the prunable weights are zero", output)
    for domain in ("numbers", "letters"):
        assert re.search(
            rf"perplexity of .*{domain}.jsonl: [\d.]+ -> [\d.]+ \(.*95% interval.*6 held-out texts", output
        )
    assert ("domain texts are longer" in output) == method.startswith("d-pruner")
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_the_file_is_what_was_scored_and_loads_in_a_new_process(workplace: Path, tmp_path: Path) -> None:
    from lossmith.sparsity import load_causal_model
    from lossmith.sparsity.essential_text import TextEvaluation
    from lossmith.sparsity.one_shot_text import _rows, _split, prune_language_model

    source = str(workplace / "numbers.jsonl")
    found = prune_language_model(
        str(workplace / "model"), tmp_path / "out", method="sparsegpt", calibration=source, samples=4
    )
    kept, held = _split(source, "text", 1)
    assert len(held) == 6
    assert not {*kept} & {*held}
    loaded, tokenizer = load_causal_model(str(tmp_path / "out"))
    losses, _ = TextEvaluation(_rows(tokenizer, held, 64))(loaded)
    assert found.quality[0].losses[:, 1] == pytest.approx(losses, abs=1e-6)
    rise, low, high = found.quality[0].rise()
    assert low <= rise <= high
    code = (
        "import sys, transformers as t; m = t.AutoModelForCausalLM.from_pretrained(sys.argv[1]);"
        "i = t.AutoTokenizer.from_pretrained(sys.argv[1])('1 2 3', return_tensors='pt').input_ids;"
        "print(m(i).logits.double().sum().item()); assert 'lossmith' not in sys.modules"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    with torch.no_grad():
        here = loaded(tokenizer("1 2 3", return_tensors="pt").input_ids).logits.double().sum().item()
    assert float(out.stdout) == pytest.approx(here, abs=1e-5)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt(block_size=32)", "d-pruner(epochs=1)"])
def test_block_by_block_writes_the_same_files(method: str, workplace: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    arguments = ("model", "--method", method, "--calibration", "numbers.jsonl", "--samples", 8)
    if method.startswith("d-pruner"):
        arguments += ("--general", "letters.jsonl")
    _run(workplace, *arguments, "--out", tmp_path / "whole", "--no-measure")
    output = _run(workplace, *arguments, "--blockwise", "--out", tmp_path / "blocks", "--no-measure")
    assert "50.00% of the prunable weights are zero" in output
    assert "perplexity not measured: the model is never in memory as a whole" in output
    whole, blocks = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "blocks"))
    assert whole.keys() == blocks.keys()
    assert all(torch.equal(weight, blocks[name]) for name, weight in whole.items())
    assert (tmp_path / "blocks" / "tokenizer.json").is_file()


def _write(path: Path, texts: list[Any]) -> str:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return str(path)


NUMBERS, LETTERS, OUT = ("--calibration", "numbers.jsonl"), ("--general", "letters.jsonl"), ("--out", "nowhere")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("d-pruner",), "--out FOLDER"),
        (("d-pruner", *OUT), "needs --calibration"),
        (("d-pruner", *NUMBERS, *OUT), "needs --general"),
        (("d-pruner(ratio=1)", *NUMBERS, *LETTERS, *OUT), "has no option 'ratio'"),
        (("d-pruner(lam=-1)", *NUMBERS, *LETTERS, *OUT), "lam must be"),
        (("d-pruner(lam", *NUMBERS, *OUT), "cannot be read"),
        (("wanda", "--sweep"), "do not go with"),
        (("wanda", "--calibration", "missing.jsonl", *OUT), "no file or folder"),
        (("wanda", *NUMBERS, "--samples", "0", *OUT), "--samples must be at least 1, got 0"),
        (("sparsegpt", *NUMBERS, "--pattern", "2:5", *OUT), "not a multiple of 5"),
        (("magnitude", *LETTERS, *OUT), "--general goes with --calibration"),
        (("magnitude(x=1)", *OUT), "takes no value"),
        (("wanda", *NUMBERS, *LETTERS, *OUT, "--blockwise"), "with --general d-pruner alone"),
        (("d-pruner", *NUMBERS, *OUT, "--blockwise"), "needs --general"),
        (("d-pruner(lam=-1)", *NUMBERS, *LETTERS, *OUT, "--blockwise"), "lam must be"),
        (("magnitude", *OUT, "--blockwise"), "--blockwise goes with"),
        (("wandra",), "did you mean 'wanda'"),
    ],
)
def test_wrong_input_is_one_sentence(arguments: tuple[str, ...], sentence: str, workplace: Path) -> None:
    with pytest.raises(InputError, match=sentence):
        _run(workplace, "model", "--method", *arguments)
    assert not Path("nowhere").exists()


def test_texts_that_are_too_few_or_blank_are_named(workplace: Path, tmp_path: Path) -> None:
    for texts, sentence in (
        (["one"], "has 1 different texts; at least 2 are needed"),
        (["one", " one "], "has 1 different texts"),
        (["", " "], "the corpus is empty"),
    ):
        source = _write(tmp_path / "few.jsonl", texts)
        with pytest.raises(InputError, match=sentence):
            _run(workplace, "model", "--method", "wanda", "--calibration", source, "--out", tmp_path / "out")
    source = _write(tmp_path / "few.jsonl", ["one", "two"])
    with pytest.raises(InputError, match="at least 3 are needed"):
        _run(
            workplace, "model", "--method", "d-pruner", "--calibration", source, "--general", "letters.jsonl",
            "--out", tmp_path / "out",
        )  # fmt: skip
    assert not (tmp_path / "out").exists()
