"""``lossmith score`` and ``lossmith select`` on a user's files, and what wrong input gets."""

from __future__ import annotations

import gzip
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import command_line
import pytest
import torch

from lossmith.data import read_scores, train_tokenizer
from lossmith.errors import InputError

run = partial(command_line.run, with_stderr=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed corpus, two models of one tokenizer, and their scores."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("select")
    texts = [f"document {i} " + "of some words " * (i % 7) for i in range(40)]
    with gzip.open(folder / "corpus.jsonl.gz", "wt") as stream:
        stream.writelines(json.dumps({"text": text, "kind": "ab"[i % 2]}) + "\n" for i, text in enumerate(texts))
    tokenizer = train_tokenizer(texts, vocab_size=270)
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    for seed, name in enumerate(("prior", "conditional")):
        torch.manual_seed(seed)
        config = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=2, **shape)
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    models = ["--model", folder / "prior", "--model", folder / "conditional"]
    said = run(
        "score", folder / "corpus.jsonl.gz", *models, "--out", folder / "scores.parquet", "--domain-field", "kind"
    )
    assert "40 documents, 40 scored now" in said
    return folder


def test_the_selected_documents_are_those_of_the_largest_fall(place: Path, tmp_path: Path) -> None:
    options = ["--scores", place / "scores.parquet", "--domain-field", "kind"]
    said = run("select", place / "corpus.jsonl.gz", *options, "--keep", "10%", "--out", tmp_path / "out.jsonl.gz")
    assert "kept 4 of 40 documents" in said
    with gzip.open(tmp_path / "out.jsonl.gz", "rt") as stream:
        rows = [json.loads(line) for line in stream]
    table = read_scores(place / "scores.parquet")
    fall = table.column("conditional/nats_per_token") - table.column("prior/nats_per_token")
    assert {row["index"] for row in rows} == set(sorted(range(40), key=lambda i: (fall[i], i))[:4])
    assert [row["index"] for row in rows] == sorted(row["index"] for row in rows)
    assert all(row["score"] == pytest.approx(fall[row["index"]], abs=1e-12) for row in rows)
    run("select", place / "corpus.jsonl.gz", *options, "--keep", "0.1", "--out", tmp_path / "again.jsonl.gz")
    assert (tmp_path / "again.jsonl.gz").read_bytes() == (tmp_path / "out.jsonl.gz").read_bytes()


@pytest.mark.parametrize("method", ["random", "ngram-importance", "conditional-only"])
def test_the_baselines_keep_as_many(place: Path, tmp_path: Path, method: str) -> None:
    (tmp_path / "target.jsonl").write_text('{"text": "of some words of some words"}\n')
    given = ["--method", method, "--scores", place / "scores.parquet", "--target", tmp_path / "target.jsonl"]
    run("select", place / "corpus.jsonl.gz", *given, "--number", 7, "--out", tmp_path / "out.jsonl")
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 7


def test_a_corpus_other_than_the_scored_one_is_refused_and_leaves_no_file(place: Path, tmp_path: Path) -> None:
    with gzip.open(place / "corpus.jsonl.gz", "rt") as stream:
        lines = stream.readlines()
    for name, changed in {"more": [*lines, lines[0]], "fewer": lines[:-1], "other": [lines[1], *lines[1:]]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(changed))
        with pytest.raises(InputError, match="score it again"):
            run(
                *("select", tmp_path / f"{name}.jsonl", "--scores", place / "scores.parquet", "--tau", 4),
                *("--out", tmp_path / "out.jsonl"),
            )
    assert not list(tmp_path.glob("*out.jsonl*"))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--keep", "0"], "--keep must be a share"),
        (["--keep", "150%"], "--keep must be a share"),
        (["--keep", "x"], "--keep must be a share"),
        ([], "exactly one of --keep, --tau and --number"),
        (["--keep", "10%", "--tau", "2"], "exactly one"),
        (["--tau", "41"], "at least 41"),
        (["--number", "41"], "40 candidates"),
        (["--keep", "1", "--marginal", "prio"], "did you mean 'prior'"),
        (["--keep", "1", "--marginal", "conditional"], "needs two that differ"),
        (["--keep", "1", "--normalize", "byte"], "--unknown normalize|unknown normalize"),
        (["--keep", "1", "--method", "colour-filter"], "did you mean 'color-filter'"),
        (["--keep", "1", "--method", "ngram-importance"], "needs --target"),
    ],
)
def test_what_cannot_be_selected_is_one_sentence(place: Path, tmp_path: Path, arguments: list[str], match: str) -> None:
    given = ["--scores", place / "scores.parquet", *arguments, "--out", tmp_path / "out.jsonl"]
    with pytest.raises(InputError, match=match):
        run("select", place / "corpus.jsonl.gz", *given)
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--shard", "0/3"], "--shard must be K/N"),
        (["--shard", "1/2", "--jobs", "2"], "--jobs must be"),
        (["--shard", "1/2", "--ray", "local"], "--ray divides the corpus itself"),
        (["--gpus-per-job", "1"], "--gpus-per-job belongs to --ray"),
        (["--dtype", "float23"], "did you mean 'float32'"),
        (["--device", "gpu"], "unknown --device"),
        (["--max-length", "9999"], "longer than the 2048 positions"),
        (["--model", "same/prior"], "two models are called 'prior'"),
    ],
)
def test_what_cannot_be_scored_is_one_sentence(place: Path, tmp_path: Path, arguments: list[str], match: str) -> None:
    given = ["--model", place / "prior", *arguments, "--out", tmp_path / "scores.parquet"]
    with pytest.raises(InputError, match=match):
        run("score", place / "corpus.jsonl.gz", *given)


def test_a_target_fine_tunes_the_conditional_model_once(place: Path, tmp_path: Path) -> None:
    """Every text of the target is the same: its loss must fall most there."""
    (tmp_path / "target.jsonl").write_text('{"text": "document 3 of some words of some words of some words"}\n' * 160)
    given = ["--model", place / "prior", "--target", tmp_path / "target.jsonl", "--learning-rate", "0.01"]
    for _ in range(2):
        run("score", place / "corpus.jsonl.gz", *given, "--out", tmp_path / "scores.parquet")
    table = read_scores(tmp_path / "scores.parquet")
    assert table.models == ("prior", "conditional")
    fall = table.column("prior/nats_per_token") - table.column("conditional/nats_per_token")
    lengths = table.column("bytes")
    assert fall[lengths > 60].mean() > fall[lengths < 20].mean() > 0
    with pytest.raises(InputError, match="fine-tuned from or on something else"):
        run("score", place / "corpus.jsonl.gz", *given[:-1], "0.02", "--out", tmp_path / "scores.parquet")


@pytest.mark.slow
def test_processes_side_by_side_give_the_same_bytes(place: Path, tmp_path: Path) -> None:
    shutil.copy(place / "corpus.jsonl.gz", tmp_path / "corpus.jsonl.gz")
    pytest.importorskip("ray")
    ways = {"one": (), "two": ("--jobs", 2), "ray": ("--ray", "local", "--jobs", 2)}
    for name, way in ways.items():
        given = ["--model", place / "prior", "--block-documents", 8, *way]
        run("score", tmp_path / "corpus.jsonl.gz", *given, "--out", tmp_path / f"{name}.parquet")
    one, two, ray = ((tmp_path / f"{name}.parquet").read_bytes() for name in ways)
    assert one == two == ray
