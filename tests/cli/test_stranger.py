"""A stranger's mistakes at every command: one sentence, exit code 2, and nothing left behind."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lossmith import cli

WORDS = ("loss", "weight", "model", "data", "step", "token", "batch", "head", "law", "probe", "mixture", "sample")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small right files, and wrong ones."""
    import torch

    from lossmith.data import train_tokenizer
    from lossmith.training.models import build_model

    place = tmp_path_factory.mktemp("stranger")
    texts = [" ".join(WORDS[(i * k + k * k) % len(WORDS)] for k in range(1, 40 + i)) for i in range(20)]
    tokenizer = train_tokenizer(texts, vocab_size=270)
    torch.manual_seed(0)
    model: Any = build_model("nano", vocab_size=len(tokenizer), sequence_length=64)
    for name in ("model", "other"):
        model.save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    model.save_pretrained(place / "bare")
    files = {
        "corpus.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in texts),
        "completions.jsonl": '{"prompt": "say red:", "completion": " red"}\n' * 4,
        "train.conll": "see\tO\nann\tB-person\n\n" * 8,
        "pairs.tsv": "one\ttwo\tsame\n" + "sun\tyes\t1\nrain\tno\t0\n" * 4,
        "clicks.csv": "user,item\n" + "".join(f"u{u},i{(u * 7 + k * 3) % 30}\n" for u in range(8) for k in range(5)),
        "questions.jsonl": '{"question": "a"}\n',
        "exam.jsonl": '{"question": "what ?", "answer": "loss", "id": "1"}\n',
        "points.csv": "params,tokens,loss\n"
        + "".join(
            f"{n},{d},{1.7 + 400 / n**0.34 + 410 / d**0.28}\n" for n in (1e6, 1e7, 1e8) for d in (1e8, 1e9, 1e10)
        ),
        "broken.jsonl": '{"params": 1}\n{"params": 2\n',
        "broken.py": "x = [1\n",
        "mine.py": "def fails(*given):\n    raise RuntimeError('service down')\n",
        "empty.jsonl": "",
        "number.jsonl": '{"question": "a"}\n{"question": 12}\n',
        "bought.csv": "customer,product\n" + "".join(f"c{u},p{u + k}\n" for u in range(8) for k in range(5)),
        "short.jsonl": '{"text": "loss"}\n',
    }
    for name, text in files.items():
        (place / name).write_text(text)
    (place / "garbage.json").write_bytes(random.Random(0).randbytes(500))
    (place / "folder").mkdir()
    (place / "folder" / "file").write_text("kept")
    return place


@pytest.fixture
def said(workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command that must be refused; its sentence."""
    monkeypatch.chdir(workplace)
    monkeypatch.syspath_prepend(str(workplace))

    def run(command: str, *more: str) -> str:
        before = everything(workplace)
        monkeypatch.setattr(sys, "argv", ["lossmith", *command.split(), *more])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        err = capsys.readouterr().err
        assert ended.value.code == 2, err
        sentences = [line for line in err.splitlines() if line.startswith("lossmith: ")]
        assert len(sentences) == 1, err
        assert everything(workplace) == before
        return sentences[0].removeprefix("lossmith: ")

    return run


def everything(place: Path) -> dict[str, bytes | None]:
    return {str(p): p.read_bytes() if p.is_file() else None for p in place.rglob("*") if "__pycache__" not in p.parts}


TRAINED = {
    "adapt": "adapt corpus.jsonl --model model --steps 1 --sequence-length 32 --out",
    "distill": "distill completions.jsonl --teacher model --student other --out",
    "pairs": "pairs fit pairs.tsv --first one --second two --label same --out",
    "recommend": "recommend fit clicks.csv --epochs 1 --dim 4 --out",
    "tag": "tag fit train.conll --out",
    "prune": "prune model --out",
}
WRITTEN = {
    "fit": "fit points.csv --bootstrap 2 --out",
    "questions": "questions corpus.jsonl --generate mine:fails --out",
    "rationale sample": "rationale sample questions.jsonl --teacher model --out",
    "select": "select corpus.jsonl --method random --number 2 --out",
    "probe": "probe model --out",
}
SEEDED = [*(f"{TRAINED[name]} new" for name in TRAINED if name != "prune"), WRITTEN["select"] + " new.jsonl"]
SEEDED += [
    "fit points.csv --bootstrap 2",
    "solve-well infinite",
    "rationale sample questions.jsonl --teacher model --out n",
]
SEEDED += ["prune model --out new --method wanda --calibration corpus.jsonl", "visual fit shapes --out new"]


@pytest.mark.parametrize("command", SEEDED)
def test_a_seed_that_no_generator_takes(said: Any, command: str) -> None:
    assert said(command, "--seed", "-1") == "--seed must be a whole number from 0 to 4294967295, got -1"


@pytest.mark.parametrize("command", [*TRAINED.values()])
def test_an_output_folder_that_cannot_be_made_is_told_before_the_work(
    said: Any, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert said(command, "points.csv/new").startswith("cannot write into points.csv")
    assert "folder exists and is not an empty folder" in said(command, "folder")
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    assert "no permission to write into" in said(command, "new/place")


@pytest.mark.parametrize("command", [*WRITTEN.values()])
def test_an_output_file_that_cannot_be_made_is_told_before_the_work(said: Any, command: str) -> None:
    name = "new.jsonl" if "select" in command else "new.json"
    assert said(command, f"points.csv/{name}").startswith("cannot write into points.csv")


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("select corpus.jsonl --method random --number 2 --out corpus.jsonl", "corpus.jsonl: it is what is read"),
        ("score corpus.jsonl --model model --out ./corpus.jsonl", "corpus.jsonl: it is what is read"),
        ("questions corpus.jsonl --generate mine:fails --out corpus.jsonl", "corpus.jsonl: it is what is read"),
        ("rationale sample questions.jsonl --teacher model --out questions.jsonl", "it is what is read"),
        ("fit points.csv --bootstrap 2 --out points.csv", "points.csv: it is what is read"),
        (
            "adapt corpus.jsonl --model model --out new --learning-rate nan",
            "--learning-rate must be above 0 and finite",
        ),
        ("adapt corpus.jsonl --model model --out new --steps 0", "--steps must be at least 1, got 0"),
        ("adapt corpus.jsonl --model model --out new --batch-size 0", "--batch-size must be at least 1, got 0"),
        ("adapt corpus.jsonl --model model --out new --micro-batch-size 0", "--micro-batch-size must be at least 1"),
        (
            "adapt corpus.jsonl --model model --out new --questions exam.jsonl --number -1",
            "--number must be at least 1",
        ),
        (
            "adapt corpus.jsonl --model model --out new --questions exam.jsonl --judge mine:fails --sequence-length 32",
            "--judge mine:fails ended with RuntimeError: service down",
        ),
        (
            "adapt corpus.jsonl --model model --out new --steps 3 --sequence-length 32 --learning-rate 1e30",
            "choose a smaller learning rate",
        ),
        ("questions corpus.jsonl --generate mine:fails --out new.jsonl", "mine:fails ended with RuntimeError: service"),
        (
            "questions corpus.jsonl --generate broken:x --out new.jsonl",
            "the module broken cannot be imported (SyntaxEr",
        ),
        ("questions corpus.jsonl --generate mine:fails --limit 0 --out new.jsonl", "--limit must be at least 1, got 0"),
        (
            "questions corpus.jsonl --model model --max-new-tokens 0 --out new.jsonl",
            "--max-new-tokens must be at least 1",
        ),
        ("tag fit train.conll --out new --learning-rate inf", "--learning-rate must be above 0 and finite, got inf"),
        ("tag fit train.conll --out new --model nowhere", "the tokenizer of nowhere cannot be loaded: "),
        ("tag fit train.conll --out new --model bare", "the tokenizer of bare cannot be loaded: Couldn't instantiate"),
        (
            "tag fit train.conll --out new --loss set_dice_loss(alpha=nan)",
            "alpha must be a finite number >= 0, got nan",
        ),
        ("tag evaluate model train.conll", "model holds a LlamaForCausalLM, not a model for token classification"),
        ("pairs predict model pairs.tsv", "pairs.tsv, pair 1: 3 columns"),
        ("pairs evaluate model pairs.tsv --first one --second two --label same", "not a model for sequence class"),
        ("recommend fit clicks.csv --out new --k 0", "--k must be at least 1, got 0"),
        ("recommend fit corpus.jsonl --out new", "corpus.jsonl: a table is text (.csv, .tsv, .txt), .json or .parquet"),
        ("recommend predict model --out new.txt", "new.txt must end in .csv, .tsv or .parquet"),
        ("recommend fit bought.csv --out new", "bought.csv, line 1: 'customer,product' looks like a header with names"),
        ("rationale sample number.jsonl --teacher model --out new.jsonl", "line 2: 'question' must be text, got the n"),
        (
            "distill completions.jsonl --teacher model --student other --out new --max-prompt 100000",
            "--max-prompt + --max-completion = 100256 is longer than the 2048 positions of --teacher model",
        ),
        (
            "score corpus.jsonl --model model --out new.parquet --max-length 100000",
            "--max-length 100000 is longer than the 2048 positions of --model model",
        ),
        ("prune model --sweep --eval short.jsonl", "--eval short.jsonl has "),
        ("prune model --out new --method wanda --calibration corpus.jsonl --length 0", "--length must be at least 2"),
        ("prune model --out new --method wanda --calibration corpus.jsonl --samples 0", "--samples must be at least 1"),
        ("fit broken.jsonl", "broken.jsonl, line 2: not JSON"),
        ("fit points.csv --scale tokens=nan", "--scale takes name=number, got 'tokens=nan'"),
        ("fit points.csv --plot points.csv/fit.png", "cannot write into points.csv"),
        ("predict garbage.json --at params=1,tokens=1", "garbage.json is not UTF-8 at byte "),
        ("solve-well function mine.py:fails --interval -1 1", "mine.py:fails ended with RuntimeError: service down"),
        ("solve-well function broken.py:x --interval -1 1", "broken.py cannot be run (SyntaxError: "),
        ("solve-well infinite --max-steps 0", "--max-steps must be at least 1, got 0"),
        ("score empty.jsonl --model model --out new.parquet", "empty.jsonl: the corpus is empty"),
        ("score corpus.jsonl --model model --text-field body --out new.parquet", "there is no field 'body'"),
        ("score corpus.jsonl --model model --target empty.jsonl --out new.parquet", "empty.jsonl: the corpus is empty"),
        ("select corpus.jsonl --method preselect --number 2 --out new.jsonl", "--method preselect needs --models"),
        (
            "select corpus.jsonl --method preselect --models model,other --number 2 --out new.jsonl",
            "--method preselect needs --targets",
        ),
        (
            "select corpus.jsonl --method preselect --models model,nowhere --model-scores 1,2 --number 2 --out n.jsonl",
            "cannot load 'nowhere'",
        ),
        ("curate empty.jsonl --out new.jsonl", "there are no documents in empty.jsonl"),
        ("probe model --what superposition(pair_rows=nan)", "pair_rows must be at least 1, got nan"),
        ("visual fit shapes --out new --patch-size 0", "--patch-size must be at least 1, got 0"),
        ("study dynamic-reweighting --scale smoke --out new --jobs 0", "--jobs must be at least 1, got 0"),
        ("study dynamic-reweighting --scale smoke --out points.csv", "cannot write into points.csv"),
    ],
)
def test_one_sentence_and_nothing_left(said: Any, command: str, sentence: str) -> None:
    assert sentence in said(command)


def test_what_is_asked_of_a_fitted_law(said: Any, workplace: Path, tmp_path: Path, capsys: Any) -> None:
    fitted = tmp_path / "fitted.json"
    sys.argv = ["lossmith", "fit", "points.csv", "--bootstrap", "0", "--out", str(fitted)]
    with pytest.raises(SystemExit):
        cli.main()
    assert "params must be a number, got 'x'" in said("predict", str(fitted), "--at", "params=x, tokens=1")
    assert "--schedule is for laws of learning-rate" in said("predict", str(fitted), "--schedule", "cosine(peak=1e-3)")
    assert "--steps belongs to --schedule" in said("predict", str(fitted), "--at", "params=1, tokens=1", "--steps", "9")
    assert "by the law chinchilla takes no 'steps'" in said("plan", str(fitted), "--steps", "9")
    sys.argv = ["lossmith", "predict", str(fitted), "--at", "params=7B, tokens=1T"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert "params=7e+09, tokens=1e+12" in capsys.readouterr().out


def test_curate_says_why_the_first_document_is_not_there(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(sys, "argv", ["lossmith", "curate", "garbage.json", "--out", str(tmp_path / "new.jsonl")])
    with pytest.raises(SystemExit):
        cli.main()
    assert "the first, garbage.json:1-: garbage.json: not UTF-8" in capsys.readouterr().err


def test_a_fault_of_a_library_keeps_its_traceback(said: Any, monkeypatch: pytest.MonkeyPatch, workplace: Path) -> None:
    from lossmith.cli import study

    def fails() -> None:
        int("x" * 3)

    def refuses() -> None:
        raise ValueError("k must be at least 1")

    # A function of a library, which is not Lossmith's, and one that is.
    monkeypatch.setattr(sys, "argv", ["lossmith", "list"])
    monkeypatch.setattr("lossmith.studies.study.studies", fails)
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main()
    refusing = type(refuses)(refuses.__code__, vars(study))
    monkeypatch.setattr("lossmith.studies.study.studies", refusing)
    assert said("list") == "k must be at least 1"
    monkeypatch.setenv("LOSSMITH_TRACEBACK", "1")
    with pytest.raises(ValueError, match="k must be"):
        cli.main()


@pytest.mark.parametrize(
    ("command", "kept"),
    [
        ("recommend fit clicks.csv --epochs 1000000 --dim 4 --out new", "nothing is kept of what was not finished"),
        ("study dynamic-reweighting --scale smoke --jobs 1 --out new", "the same command continues where it was"),
    ],
)
@pytest.mark.slow
def test_ctrl_c_is_one_line_and_code_130(workplace: Path, tmp_path: Path, command: str, kept: str) -> None:
    command = command.replace("clicks.csv", str(workplace / "clicks.csv"))
    process = subprocess.Popen(
        [sys.executable, "-m", "lossmith", *command.split()],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    time.sleep(8)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == f"lossmith: stopped; {kept}"
    assert "Traceback" not in err
    if "recommend" in command:
        assert not list(tmp_path.iterdir())
