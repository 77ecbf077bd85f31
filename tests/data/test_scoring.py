"""Scoring a corpus: the losses of the plain model, one pass, in order, whatever kills it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lossmith.data import (
    RayScoring,
    Scorer,
    document_hash,
    language_model_scorer,
    load_tokenizer,
    read_scores,
    score_corpus,
    score_texts,
    train_tokenizer,
)
from lossmith.data.scoring import score_block
from lossmith.data.tokenization import encode
from lossmith.errors import InputError


def byte_ids(texts: Any) -> list[np.ndarray]:
    return [np.frombuffer(b"\0" + text.encode(), dtype=np.uint8).astype(np.int32) for text in texts]


def pair_losses(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """A number that depends on every pair of neighbours, and on nothing else."""
    rows = torch.sin(ids.double() * 1.7 + targets.double() * 0.3) + 1.5
    return torch.where(targets >= 0, rows, 0.0).sum(-1)


def scorer(losses: Any = pair_losses, **changes: Any) -> Scorer:
    return Scorer(
        **{"losses": losses, "encode": byte_ids, "max_length": 32, "encoding": "b", "identity": "1", **changes}
    )


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    texts = [f"{i} " + "word " * (i * i % 37) for i in range(150)]
    path.write_text("".join(json.dumps({"text": t, "kind": "ab"[i % 2]}) + "\n" for i, t in enumerate(texts)))
    return path


@pytest.fixture(scope="module")
def language_model() -> tuple[Any, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = train_tokenizer(["some words of a small text, again and again " * 9], vocab_size=280)
    shape: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=2, **shape)).double()
    return model, tokenizer


def test_scores_are_those_of_the_hugging_face_loss_one_text_at_a_time(language_model: tuple[Any, Any]) -> None:
    model, tokenizer = language_model
    texts = ["a", "some words", "é", "again and again of a small text, " * 3]
    model.train()
    nats, tokens = score_texts(language_model_scorer(model, tokenizer, chunk_size=5), texts, batch_tokens=70)
    assert model.training
    model.eval()
    for text, total, count in zip(texts, nats, tokens, strict=True):
        ids = torch.tensor(encode(tokenizer, [text])[0].astype(np.int64))[None]
        with torch.no_grad():
            plain = model(input_ids=ids, labels=ids).loss
        # Llama's norms round to float32 whatever the weights' dtype.
        assert total / count == pytest.approx(float(plain), abs=1e-5)


def test_a_model_whose_logits_are_not_a_plain_product_is_scored_by_its_own_logits(language_model: Any) -> None:
    model, tokenizer = language_model

    class Capped(torch.nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return 3.0 * torch.tanh(model(ids).logits / 3.0)

    ids = torch.tensor(encode(tokenizer, ["some words"])[0].astype(np.int64))
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(Capped()(ids[None])[0, :-1], ids[1:], reduction="sum")
    nats, _ = score_texts(language_model_scorer(Capped(), tokenizer), ["some words"])
    assert nats[0] == pytest.approx(float(expected), rel=1e-6)


def test_every_token_of_a_long_text_is_predicted_once_with_one_token_of_context() -> None:
    """Loss that looks one token back: windows change nothing."""
    text = "abcdefg " * 40
    whole, tokens = score_texts(scorer(max_length=1000), [text])
    cut, same = score_texts(scorer(max_length=7), [text], batch_tokens=20)
    assert tokens == same == len(text)
    assert cut == pytest.approx(whole, rel=1e-12)


def test_a_table_has_a_row_per_document_in_order_and_its_units_fit(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.parquet"
    doubled = scorer(lambda ids, targets: 2 * pair_losses(ids, targets), identity="2")
    done = score_corpus(corpus, {"one": scorer(), "two": doubled}, out, block_documents=16, domain_field="kind")
    assert (done.documents, done.scored, done.complete) == (150, 150, True)
    table = read_scores(out)
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    assert table.column("hash").tolist() == [document_hash(t) for t in texts]
    assert table.models == ("one", "two")
    nats = table.column("one/nats")
    assert nats == pytest.approx(score_texts(scorer(), texts)[0], rel=1e-12)
    assert table.column("two/nats") == pytest.approx(2 * nats, rel=1e-12)
    assert table.column("one/nats_per_token") == pytest.approx(nats / [len(t) for t in texts])
    assert table.column("one/bits_per_byte") == pytest.approx(nats / np.log(2) / [len(t) for t in texts])
    assert (
        score_corpus(corpus, {"one": scorer(), "two": doubled}, out, block_documents=16, domain_field="kind").scored
        == 0
    )


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_shards_in_any_order_give_the_bytes_of_one_run(corpus: Path, tmp_path: Path, suffix: str) -> None:
    whole, parts = tmp_path / f"whole{suffix}", tmp_path / f"parts{suffix}"
    score_corpus(corpus, {"m": scorer()}, whole, block_documents=16)
    ends = [score_corpus(corpus, {"m": scorer()}, parts, block_documents=16, shard=(k, 3)).complete for k in (2, 0, 1)]
    assert ends == [False, False, True]
    assert whole.read_bytes() == parts.read_bytes()
    assert sorted(p.name for p in tmp_path.glob("parts*")) == [f"parts{suffix}", f"parts{suffix}.plan.json"]
    assert read_scores(whole).column("m/nats").tolist() == read_scores(parts).column("m/nats").tolist()


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[4])
from test_scoring import pair_losses, score_corpus, scorer
calls = 0
def dying(ids, targets):
    global calls
    calls += 1
    if calls > int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return pair_losses(ids, targets)
score_corpus(sys.argv[1], {"m": scorer(dying)}, sys.argv[2], block_documents=16)
"""


def test_a_backend_that_answers_in_another_order_gives_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    def backwards(blocks: Any, batch_tokens: int) -> Any:
        for number, texts in reversed(list(blocks)):
            yield number, score_block(texts, {"a": scorer()}, batch_tokens)

    told: list[int] = []
    options: dict[str, Any] = {"block_documents": 16}
    score_corpus(corpus, {"a": scorer()}, tmp_path / "here.parquet", **options)
    there = score_corpus(
        corpus,
        {"a": scorer()},
        tmp_path / "there.parquet",
        backend=backwards,
        progress=lambda documents, _: told.append(documents),
        **options,
    )
    assert (tmp_path / "here.parquet").read_bytes() == (tmp_path / "there.parquet").read_bytes()
    assert (there.scored, there.complete) == (150, True)


@pytest.mark.slow
def test_a_ray_worker_that_dies_is_replaced_and_the_bytes_are_the_same(corpus: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    died = tmp_path / "died"

    def load() -> dict[str, Scorer]:
        # By value: workers do not know this module.
        def losses(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            if not died.exists():
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return torch.where(targets >= 0, torch.sin(ids * 1.7 + targets * 0.3).double() + 1.5, 0.0).sum(-1)

        def ids(texts: Any) -> list[np.ndarray]:
            return [np.frombuffer(b"\0" + text.encode(), dtype=np.uint8).astype(np.int32) for text in texts]

        return {"a": Scorer(losses, ids, 32, "b", "1")}

    backend = RayScoring(load, workers=2)
    done = score_corpus(corpus, load(), tmp_path / "ray.parquet", block_documents=16, backend=backend)
    assert died.exists()
    score_corpus(corpus, load(), tmp_path / "here.parquet", block_documents=16)
    assert done.scored == 150
    assert (tmp_path / "ray.parquet").read_bytes() == (tmp_path / "here.parquet").read_bytes()


def test_ray_is_asked_for_something_that_it_can_give() -> None:
    with pytest.raises(InputError, match="workers must be at least 1, got 0"):
        RayScoring(dict, workers=0)
    with pytest.raises(InputError, match="gpus must be at least 0, got -1"):
        RayScoring(dict, gpus=-1)


def test_a_killed_run_continues_to_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole.parquet", tmp_path / "broken.parquet"
    score_corpus(corpus, {"m": scorer()}, whole, block_documents=16)
    command = [sys.executable, "-c", KILLED, str(corpus), str(broken), "4", str(Path(__file__).parent)]
    assert subprocess.run(command, check=False, timeout=120).returncode == -signal.SIGKILL
    assert not broken.exists()
    before = len(list(tmp_path.glob("broken.parquet.partial/block-*.parquet")))
    assert 0 < before < 10
    done = score_corpus(corpus, {"m": scorer()}, broken, block_documents=16)
    assert done.scored == 150 - 16 * before
    assert broken.read_bytes() == whole.read_bytes()


def test_a_document_without_a_finite_loss_is_set_aside_and_not_lost(corpus: Path, tmp_path: Path) -> None:
    def fails(ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return torch.where((ids == ord("7")).any(-1), float("nan"), pair_losses(ids, targets))

    out = tmp_path / "scores.jsonl"
    done = score_corpus(corpus, {"good": scorer(), "bad": scorer(fails, identity="2")}, out, block_documents=64)
    rows = [json.loads(line) for line in (tmp_path / "scores.jsonl.rejected.jsonl").read_text().splitlines()]
    expected = [i for i in range(150) if "7" in str(i)]
    assert [row["index"] for row in rows] == expected
    assert done.rejected == len(expected)
    assert rows[0]["text"].startswith("7 ")
    assert rows[0]["model"] == "bad"
    table = read_scores(out)
    assert len(table) == 150
    assert np.flatnonzero(np.isnan(table.column("bad/nats"))).tolist() == expected
    assert np.isfinite(table.column("good/nats")).all()


def test_another_corpus_model_or_option_is_refused_and_named(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.parquet"
    score_corpus(corpus, {"m": scorer()}, out, block_documents=16, shard=(0, 2))
    with pytest.raises(InputError, match="model m"):
        score_corpus(corpus, {"m": scorer(identity="2")}, out, block_documents=16)
    with pytest.raises(InputError, match="block_documents"):
        score_corpus(corpus, {"m": scorer()}, out, block_documents=17)
    corpus.write_text(corpus.read_text().replace("word", "ward"))
    with pytest.raises(InputError, match="corpus"):
        score_corpus(corpus, {"m": scorer()}, out, block_documents=16)
    taken = tmp_path / "taken.parquet"
    taken.write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        score_corpus(corpus, {"m": scorer()}, taken)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"out": "scores.csv"}, r"\.parquet or \.jsonl"),
        ({"batch_tokens": 0}, "batch_tokens must be"),
        ({"block_documents": True}, "block_documents must be"),
        ({"shard": (2, 2)}, "shard must be"),
        ({"scorers": {}}, "at least one model"),
    ],
)
def test_bad_options_are_one_sentence(corpus: Path, tmp_path: Path, change: dict[str, Any], match: str) -> None:
    given = {"out": "scores.parquet", "scorers": {"m": scorer()}, **change}
    with pytest.raises(InputError, match=match):
        score_corpus(corpus, given.pop("scorers"), tmp_path / given.pop("out"), **given)


def test_a_tokenizer_larger_than_the_model_is_refused(language_model: tuple[Any, Any]) -> None:
    model, _ = language_model
    large = train_tokenizer([f"word{i} word{i}" for i in range(300)], vocab_size=600)
    with pytest.raises(InputError, match="vocabulary mismatch"):
        language_model_scorer(model, load_tokenizer(large))
    with pytest.raises(InputError, match="max_length"):
        scorer(max_length=1)


def test_real_text_is_scored_in_order(real_data: Path, tmp_path: Path) -> None:
    done = score_corpus(real_data / "tinyshakespeare", {"m": scorer()}, tmp_path / "scores.parquet")
    assert read_scores(done.path).column("bytes").sum() > 1_000_000
