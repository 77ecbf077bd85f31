"""``lossmith select --method preselect`` on a user's files, and what wrong input gets."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import command_line
import numpy as np
import pytest
import torch

from lossmith.data import DocumentClassifier, predictive_strength, read_scores, train_tokenizer
from lossmith.errors import InputError

pytest.importorskip("fasttext", reason="needs the extra 'selection'")

NUMBER, SEEDS = 900, 60
PROSE = ["the", "sea", "was", "deep", "and", "blue", "under", "a", "quiet", "sky"]
CODE = ["x", "=", "y", "+", "1", ";", "return", "f", "(", "z", ")", "{", "}"]


run = partial(command_line.run, with_stderr=True)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of two kinds, evaluation texts of one of them, and three models that know it more and more."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from lossmith.training.text_training import train_on_texts

    folder = tmp_path_factory.mktemp("preselect")
    generator = np.random.default_rng(0)

    def prose() -> str:
        return " ".join(generator.choice(PROSE, 12))

    def code() -> str:
        return " ".join(generator.choice(CODE, 12))

    def rows(texts: list[tuple[str, str]]) -> str:
        return "".join(json.dumps({"text": text, "kind": kind}) + "\n" for kind, text in texts)

    corpus = [("prose", prose()) if i % 3 == 0 else ("code", code()) for i in range(NUMBER)]
    (folder / "corpus.jsonl").write_text(rows(corpus))
    (folder / "eval.jsonl").write_text(rows([("prose", prose()) for _ in range(12)]))
    tokenizer = train_tokenizer([text for _, text in corpus], vocab_size=280)
    for share in (0, 50, 100):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
        )
        model = LlamaForCausalLM(config)
        texts = [prose() if i < share else code() for i in range(100)]
        train_on_texts(model, tokenizer, texts, folder=folder / "runs", batch_size=4, learning_rate=0.02)
        model.save_pretrained(folder / f"m{share}")
        tokenizer.save_pretrained(folder / f"m{share}")
    return folder


def arguments(place: Path, out: Path, **changes: Any) -> list[Any]:
    """The command, with options changed, added, or left out (None)."""
    models = ",".join(str(place / f"m{share}") for share in (50, 0, 100))
    options = {"method": "preselect", "models": models, "targets": place / "eval.jsonl", "domain-field": "kind"}
    options |= {
        "keep": "20%",
        "seed-documents": SEEDS,
        "out": out,
        **{k.replace("_", "-"): v for k, v in changes.items()},
    }
    corpus = options.pop("corpus", place / "corpus.jsonl")
    flat = [part for name, value in options.items() if value is not None for part in (f"--{name}", value)]
    return ["select", corpus, *flat]


@pytest.fixture(scope="module")
def selected(place: Path) -> tuple[str, Path]:
    """What the command says, and its file."""
    return run(*arguments(place, place / "out.jsonl")), place / "out.jsonl"


def test_it_ranks_the_models_and_keeps_what_their_losses_rank_alike(selected: tuple[str, Path]) -> None:
    said, out = selected
    assert "models, the best first: m100" in said
    assert said.index("m100") < said.index("m50") < said.index("m0 ")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert all(row["domain"] == "prose" for row in rows)
    # A fifth of the characters of what can be selected, exceeded by less than a document.
    corpus = [json.loads(line) for line in (out.parent / "corpus.jsonl").read_text().splitlines()]
    seeds = [json.loads(line) for line in (out.parent / "out.jsonl.preselect" / "seeds.jsonl").read_text().splitlines()]
    held = {row["index"] for row in seeds}
    assert len(held) == SEEDS
    assert not held & {row["index"] for row in rows}
    there = sum(len(row["text"]) for i, row in enumerate(corpus) if i not in held)
    kept = sum(len(row["text"]) for row in rows)
    assert 0.2 * there < kept < 0.2 * there + 80
    scores = [row["score"] for row in rows]
    assert max(scores) < 0  # minus log odds


def test_the_report_says_what_the_classifier_goes_by(selected: tuple[str, Path]) -> None:
    folder = selected[1].parent / "out.jsonl.preselect"
    report = json.loads((folder / "report.json").read_text())
    assert list(report["models"]) == ["m100", "m50", "m0"]
    assert sum(report["strength"].values()) == SEEDS
    assert report["strength_of_domains"]["prose"] > 0.9 > 0.5 > report["strength_of_domains"]["code"]
    assert set(report["words_for"][:3]) <= set(PROSE)
    nats = [read_scores(folder / f"seeds.{name}.parquet").column(f"{name}/nats") for name in report["models"]]
    strength = predictive_strength(nats, list(report["models"].values()))
    assert report["positives"] == int((strength == 1).sum())


def test_the_same_command_continues_to_the_same_bytes_and_another_is_refused(
    selected: tuple[str, Path], place: Path
) -> None:
    out = selected[1]
    before = out.read_bytes()
    table = place / "out.jsonl.preselect" / "seeds.m50.parquet"
    written = table.stat().st_mtime_ns
    run(*arguments(place, out, jobs=1))
    assert out.read_bytes() == before
    assert table.stat().st_mtime_ns == written
    with pytest.raises(InputError, match=r"was made for something else: seeds.seed .0 there, 1 asked for"):
        run(*arguments(place, out, seed=1))


def test_a_classifier_that_is_there_selects_without_models(
    selected: tuple[str, Path], place: Path, tmp_path: Path
) -> None:
    file = place / "out.jsonl.preselect" / "classifier.bin"
    options = {"models": None, "targets": None, "classifier": file, "keep": None, "number": 10}
    run(*arguments(place, tmp_path / "ten.jsonl", **options))
    rows = [json.loads(line) for line in (tmp_path / "ten.jsonl").read_text().splitlines()]
    texts = [json.loads(line)["text"] for line in (place / "corpus.jsonl").read_text().splitlines()]
    odds = DocumentClassifier.load(file).log_odds(texts)
    assert {row["index"] for row in rows} == set(np.argsort(-odds, kind="stable")[:10].tolist())


def test_losses_and_abilities_may_be_given(selected: tuple[str, Path], place: Path, tmp_path: Path) -> None:
    """Seed documents of one's own, scored by ``lossmith score``; the order of the models from a file."""
    seeds = place / "out.jsonl.preselect" / "seeds.jsonl"
    shutil.copy(seeds, tmp_path / "seeds.jsonl")
    models = [part for share in (0, 50, 100) for part in ("--model", place / f"m{share}")]
    run("score", tmp_path / "seeds.jsonl", *models, "--out", tmp_path / "losses.parquet")
    (tmp_path / "scores.yaml").write_text("m0: 30\nm100: 50.5\nm50: 40\n")
    options: dict[str, Any] = {"models": None, "targets": None, "seed-corpus": tmp_path / "seeds.jsonl"}
    options |= {"scores": tmp_path / "losses.parquet", "domain-field": None}
    run(*arguments(place, tmp_path / "out.jsonl", **options, model_scores=tmp_path / "scores.yaml"))
    made = (tmp_path / "out.jsonl.preselect" / "classifier.bin").read_bytes()
    assert made == (place / "out.jsonl.preselect" / "classifier.bin").read_bytes()
    # Here nothing is held out.
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) > len(selected[1].read_text().splitlines())
    with pytest.raises(InputError, match="one number for each of m0, m50, m100, got 2"):
        run(*arguments(place, tmp_path / "o.jsonl", **options, model_scores="1,2"))
    (tmp_path / "seeds.jsonl").write_text(seeds.read_text() + '{"text": "one more", "domain": "", "index": 9}\n')
    with pytest.raises(InputError, match=r"was not made from .* as it is; score it again"):
        run(*arguments(place, tmp_path / "p.jsonl", **options, model_scores="1,2,3"))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"models": None}, "needs --models m1,m2"),
        ({"models": "m0"}, "at least 2 models"),
        ({"targets": None}, "needs --targets, texts that an able model predicts well, or --model-scores"),
        ({"model_scores": "1,2"}, "one number for each of m50, m0, m100, got 2"),
        ({"model_scores": "1,2,x"}, "--model-scores must be numbers"),
        ({"model_scores": "1,1,1"}, "at least 2 finite values that differ"),
        ({"model_scores": "nothing.yaml"}, "nothing.yaml does not exist"),
        ({"seed_documents": 1}, "--seed-documents must be at least 2"),
        ({"targets": "missing.jsonl"}, "missing.jsonl"),
        ({"positives": "best"}, "unknown --positives 'best'"),
        ({"jobs": 0}, "--jobs must be at least 1"),
        ({"epochs": 0}, "--epochs must be at least 1"),
        ({"classifier": "c.bin"}, "--classifier is ready to use: leave --models out"),
        ({"classifier": "c.bin", "models": None}, "c.bin cannot be read as a classifier"),
        ({"scores": "table.parquet"}, "--scores are losses of the documents of --seed-corpus"),
        ({"keep": "0"}, "--keep must be a share"),
        ({"models": "missing_a/b,missing_c/d"}, "missing_a/b"),
    ],
)
def test_what_cannot_be_selected_is_one_sentence(
    place: Path, tmp_path: Path, changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(InputError, match=match):
        run(*arguments(place, tmp_path / "out.jsonl", **changes))
    assert not (tmp_path / "out.jsonl").exists()


def test_more_epochs_are_surer(selected: tuple[str, Path], place: Path, tmp_path: Path) -> None:
    run(*arguments(place, tmp_path / "out.jsonl", epochs=50))
    best = [
        min(json.loads(line)["score"] for line in path.read_text().splitlines())
        for path in (tmp_path / "out.jsonl", selected[1])
    ]
    assert best[0] < 10 * best[1] < 0


def test_another_kind_of_file_is_refused_before_anything_is_scored(place: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--out must end in \.jsonl or \.jsonl\.gz, got"):
        run(*arguments(place, tmp_path / "selected.txt"))
    assert list(tmp_path.iterdir()) == []


def test_a_tenth_of_a_small_domain_at_most_is_held_out(selected: tuple[str, Path], place: Path, tmp_path: Path) -> None:
    lines = (place / "corpus.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "corpus.jsonl").write_text("".join(lines[:303]))
    said = run(*arguments(place, tmp_path / "out.jsonl", corpus=tmp_path / "corpus.jsonl", seed_documents=1_000))
    assert "30 seed documents, held out" in said  # of 101 and 202
    assert "30 documents have no finite score, or were held out" in said
    (tmp_path / "few.jsonl").write_text("".join(lines[:9]))
    with pytest.raises(InputError, match="is too small to hold seed documents out of it"):
        run(*arguments(place, tmp_path / "few_out.jsonl", corpus=tmp_path / "few.jsonl"))
