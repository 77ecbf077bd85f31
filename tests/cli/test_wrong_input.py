"""A user's mistake: one sentence, exit code 2, no traceback, nothing half-written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lossmith import cli

Lossmith = Callable[..., tuple[int, str, str]]


@pytest.fixture
def lossmith(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Lossmith:
    """Run the command line in this process, in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lossmith", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def refused(lossmith: Lossmith, *arguments: Any) -> str:
    """The sentence, after checking that it is one."""
    code, _, err = lossmith(*arguments)
    assert code == 2, err
    assert "Traceback" not in err
    sentences = [line for line in err.splitlines() if line.startswith("lossmith: ")]
    assert len(sentences) == 1, err
    assert not list(Path.cwd().rglob("*.tmp"))
    assert not list(Path.cwd().rglob("result.json"))
    return sentences[0].removeprefix("lossmith: ")


@pytest.mark.parametrize(
    ("arm", "expected"),
    [
        ("x: weighting=linuper(r=0.5)", "arm 'x': unknown weighting 'linuper': did you mean 'linupper'?"),
        ("x: weigting=linupper", "arm 'x': unknown option 'weigting': did you mean 'weighting'?"),
        ("x: learning_rat=1e-3", "arm 'x': unknown option 'learning_rat': did you mean 'learning_rate'?"),
        ("x: weighting=linupper(r=0)", "arm 'x': weighting 'linupper(r=0)': r must be > 0, got 0"),
        ("x: weighting=linupper(r=-0.5)", "arm 'x': weighting 'linupper(r=-0.5)': r must be > 0, got -0.5"),
        ("x: weighting=linupper(r=nan)", "arm 'x': weighting 'linupper(r=nan)': r must be > 0, got nan"),
        ("x: weighting=linupper(q=1)", "arm 'x': weighting 'linupper' has no option 'q'"),
        ("x: loss=focal_los", "arm 'x': unknown loss 'focal_los': did you mean 'focal_loss'?"),
        ("x: loss=z_loss(a=0)", "arm 'x': a must be a finite number > 0, got 0"),
        ("x: loss=cross_entropy(label_smoothing=2)", "arm 'x': label_smoothing must be in [0, 1), got 2"),
        ("x: seed=3", "arm 'x': 'seed' is decided by --seeds"),
        ("x: weighting", "'weighting' is not an assignment"),
    ],
)
def test_unknown_arm_options_name_the_nearest(lossmith: Lossmith, arm: str, expected: str) -> None:
    assert expected in refused(lossmith, "compare", "--arm", "baseline", "--arm", arm)
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--seeds", "-2"], "--seeds must be at least 1, got -2"),
        (["--seeds", "1,1"], "names a seed twice"),
        (["--tokens", "lots"], "tokens must be a whole number such as 300k or 2M, got 'lots'"),
        (["--arm", "a", "--arm", "a"], "two arms are called 'a'"),
        (["--baseline", "basline"], "--baseline 'basline' is not an arm: did you mean 'baseline'?"),
        (["--data", "not/there/at.txt"], "not/there/at.txt"),
        (["--data", "nothing_here"], "nothing_here"),
        (["--model", "tinny"], "--model tinny is neither a preset nor a folder: did you mean 'tiny'?"),
        (["--model", "./no/such/model"], "is neither a preset nor a folder"),
        (["--set", "learning_rte=1"], "unknown option 'learning_rte': did you mean 'learning_rate'?"),
        (["--set", "max_steps=5"], "'max_steps' is decided by --tokens"),
        (["--batch-size", "0"], "--batch-size: input should be greater than or equal to 1, got 0"),
        (["--level", "95"], "--level: input should be less than 1, got 95"),
        (["--dtype", "float8"], "--dtype: input should be 'float32'"),
        (["--packing", "isolatd"], "did you mean 'isolated'"),
        (["--sequence-length", "1"], "--sequence-length"),
        (["--vocab-size", "100"], "--vocab-size"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--backend", "slurm"], "--backend must be local or ray, got 'slurm'"),
        (["--config", "missing.yaml"], "--config missing.yaml does not exist"),
        (["--processes", "0"], "--processes must be at least 1, got 0"),
    ],
)
def test_options_out_of_range_are_named(
    lossmith: Lossmith, text_folder: Path, arguments: list[str], expected: str
) -> None:
    data = [] if "--data" in arguments else ["--data", str(text_folder)]
    assert expected in refused(lossmith, "compare", *data, *arguments)


def test_data_that_cannot_be_read_names_file_and_place(lossmith: Lossmith, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("  \n")
    assert "empty.txt" in refused(lossmith, "compare", "--data", empty)
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"good text\n" * 3 + b"\xff\xfe")
    sentence = refused(lossmith, "compare", "--data", binary)
    assert "binary.txt" in sentence
    assert "30" in sentence
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "one"}\n{"text": "two"\n')
    sentence = refused(lossmith, "compare", "--data", lines)
    assert "lines.jsonl" in sentence
    assert "2" in sentence
    lines.write_text('{"text": "one"}\n{"body": "two"}\n')
    sentence = refused(lossmith, "compare", "--data", lines)
    assert "'text'" in sentence
    assert "body" in sentence


def test_a_corpus_too_small_for_the_budget_says_how_much_there_is(lossmith: Lossmith, text_folder: Path) -> None:
    sentence = refused(lossmith, "compare", "--data", text_folder, "--tokens", "50M")
    assert "too small for the budget" in sentence
    assert "--max-epochs" in sentence


def test_an_output_folder_of_another_comparison_is_refused(lossmith: Lossmith, text_folder: Path) -> None:
    Path("out").mkdir()
    Path("out/compare.json").write_text(json.dumps({"data": "other"}))
    sentence = refused(lossmith, "compare", "--data", text_folder, "--out", "out")
    assert "out holds another comparison" in sentence
    assert Path("out/compare.json").read_text() == '{"data": "other"}'
    Path("file").write_text("")
    assert "--out file is a file" in refused(lossmith, "compare", "--data", text_folder, "--out", "file")


def test_a_bad_config_file_is_named_with_its_line(lossmith: Lossmith) -> None:
    Path("a.yaml").write_text("tokens: 1000\nseeds: [1, 2\n")
    assert "--config a.yaml is not YAML (line 3)" in refused(lossmith, "compare", "--config", "a.yaml")
    Path("a.yaml").write_text("token: 1000\n")
    assert "unknown setting 'token': did you mean 'tokens'?" in refused(lossmith, "compare", "--config", "a.yaml")
    Path("a.yaml").write_text("- 1\n")
    assert "must hold 'setting: value' lines" in refused(lossmith, "compare", "--config", "a.yaml")


def test_models_that_do_not_fit_are_refused(lossmith: Lossmith, text_folder: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from lossmith.data import prepare

    config = LlamaConfig(
        vocab_size=260, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    config.save_pretrained(tmp_path / "bare")
    sentence = refused(lossmith, "compare", "--data", text_folder, "--model", tmp_path / "bare")
    assert "has no weights (model.safetensors)" in sentence
    LlamaForCausalLM(config).save_pretrained(tmp_path / "whole")
    corpus = prepare(text_folder, vocab_size=400)
    assert isinstance(corpus.tokenizer, PreTrainedTokenizerFast)
    corpus.tokenizer.save_pretrained(tmp_path / "tokenizer")
    sentence = refused(
        lossmith,
        "compare",
        "--data",
        text_folder,
        "--model",
        tmp_path / "whole",
        "--tokenizer",
        tmp_path / "tokenizer",
    )
    assert "vocabulary mismatch: the tokenizer has" in sentence
    assert "embeddings for 260" in sentence
    (tmp_path / "whole" / "model.safetensors").rename(tmp_path / "whole" / "pytorch_model.bin")
    assert "only pickled weights" in refused(lossmith, "compare", "--data", text_folder, "--model", tmp_path / "whole")
    (tmp_path / "whole" / "config.json").write_text("{")
    assert "config.json is not JSON" in refused(
        lossmith, "compare", "--data", text_folder, "--model", tmp_path / "whole"
    )


def test_a_batch_that_does_not_divide_is_refused(lossmith: Lossmith, text_folder: Path) -> None:
    arguments = [
        "--data",
        text_folder,
        "--model",
        "nano",
        "--tokens",
        "4k",
        "--vocab-size",
        "300",
        "--sequence-length",
        "32",
    ]
    sentence = refused(lossmith, "compare", *arguments, "--batch-size", "6", "--micro-batch-size", "4")
    assert "--batch-size 6 is not a multiple of --micro-batch-size 4" in sentence
    sentence = refused(lossmith, "compare", *arguments, "--batch-size", "6", "--processes", "4")
    assert "--batch-size 6 is not a multiple of --micro-batch-size 1 x 4 process(es)" in sentence


def test_unknown_studies_and_scales_name_the_nearest(lossmith: Lossmith) -> None:
    assert "unknown study 'dynamic-reweightin': did you mean 'dynamic-reweighting'?" in refused(
        lossmith, "study", "dynamic-reweightin"
    )
    assert "unknown scale 'quik': did you mean 'quick'?" in refused(
        lossmith, "study", "dynamic-reweighting", "--scale", "quik"
    )
    assert "--seeds must be at least 1, got 0" in refused(lossmith, "study", "dynamic-reweighting", "--seeds", "0")
    assert "has no option 'model'" in refused(lossmith, "study", "dynamic-reweighting", "--model", "tiny")
    assert "no comparison.json" in refused(lossmith, "report", ".")
    assert "is not a folder" in refused(lossmith, "report", "nowhere")


@pytest.mark.parametrize("arguments", [["compare", "--sedes", "3"], ["compar"], ["study"], ["report"]])
def test_usage_errors_have_exit_code_2_and_no_traceback(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "lossmith", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_help_version_and_list(lossmith: Lossmith) -> None:
    code, out, _ = lossmith("--version")
    assert (code, out.split()[0]) == (0, "lossmith")
    for command in ([], ["compare"], ["study"], ["list"], ["report"]):
        code, out, _ = lossmith(*command, "--help")
        assert code == 0
        assert "Usage" in out
    code, out, _ = lossmith("list", "--json")
    rows = json.loads(out)
    assert {"slug", "family", "question", "paper"} <= rows[0].keys()
    assert "dynamic-reweighting" in [row["slug"] for row in rows]
    code, out, _ = lossmith("list")
    assert "dynamic-reweighting" in out


def test_a_full_disk_is_one_sentence(lossmith: Lossmith, text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lossmith.training.trainer as trainer

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device", "runs")

    monkeypatch.setattr(trainer, "mark_complete", full)
    arguments = [
        "--data",
        text_folder,
        "--model",
        "nano",
        "--tokens",
        "2k",
        "--vocab-size",
        "300",
        "--sequence-length",
        "32",
    ]
    sentence = refused(lossmith, "compare", *arguments, "--arm", "baseline", "--seeds", "1", "--out", "out")
    assert "the disk that holds" in sentence
    assert "is full" in sentence
    assert not list(Path("out").rglob("checkpoint-*"))
