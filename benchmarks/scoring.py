"""Documents per second and peak memory of ``lossmith.data.score_corpus`` next to the plain loop.

    python benchmarks/scoring.py [--documents 200] [--vocabulary 8192] [--repeats 3] [--threads 1] [--json]

The plain loop: batches of 16 documents in the order of the corpus, tokenised, padded to the longest of the batch, with
an attention mask; the model's full logits; cross entropy of each token; the mean of each document. The corpus is skewed
in length: the number of words is lognormal, from 4 to 400. Both read the same file, use the same model in float32 and
cut nothing; ours also writes its table.

Time: both in one process, one pass each per round, in an order that alternates; the median over the rounds, and the
median over the rounds of the ratio within a round. Memory: each in a fresh process: the peak of the resident set during
the pass (the kernel's own high-water mark, reset before it) minus the resident set before it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from lossmith.data import language_model_scorer, read_corpus, read_scores, score_corpus, train_tokenizer
from lossmith.data.tokenization import encode

LONGEST, BATCH = 1024, 16


def write_corpus(path: Path, documents: int) -> None:
    """Words of the embedded corpus, in documents whose lengths are lognormal."""
    generator = np.random.default_rng(0)
    words = [
        word for _, document in zip(range(400), read_corpus("python"), strict=False) for word in document.text.split()
    ]
    lengths = np.clip(generator.lognormal(3.6, 1.2, documents), 4, 400).astype(int)
    starts = generator.integers(0, len(words) - 400, documents)
    rows = [{"text": " ".join(words[s : s + n])} for s, n in zip(starts, lengths, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def build(path: Path, vocabulary: int) -> tuple[Any, Any]:
    """A small Llama of random weights with a large vocabulary."""
    tokenizer = train_tokenizer((document.text for document in read_corpus(path)), vocab_size=2048)
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3}
    config = LlamaConfig(vocab_size=vocabulary, num_attention_heads=4, max_position_embeddings=4096, **shape)
    return LlamaForCausalLM(config).eval(), tokenizer


def plain(path: Path, model: Any, tokenizer: Any, max_length: int) -> np.ndarray:
    """The loop that one writes."""
    found: list[float] = []
    texts = [document.text for document in read_corpus(path)]
    for start in range(0, len(texts), BATCH):
        encoded = [ids[:max_length] for ids in encode(tokenizer, texts[start : start + BATCH])]
        longest = max(len(ids) for ids in encoded)
        ids = torch.full((len(encoded), longest), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(encoded):
            ids[row, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
            mask[row, : len(tokens)] = 1
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        found += (losses.double().sum(-1) / mask[:, 1:].sum(-1)).tolist()
    return np.array(found)


def ours(path: Path, model: Any, tokenizer: Any, max_length: int) -> np.ndarray:
    """The engine, reading the file and writing the table."""
    with tempfile.TemporaryDirectory() as folder:
        scorer = language_model_scorer(model, tokenizer, max_length=max_length)
        score_corpus(path, {"m": scorer}, Path(folder, "scores.parquet"), batch_tokens=4096)
        return read_scores(Path(folder, "scores.parquet")).column("m/nats_per_token")


WAYS: dict[str, Callable[..., np.ndarray]] = {"plain": plain, "ours": ours}


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def peak_memory(path: Path, way: str, vocabulary: int) -> int:
    """Bytes beyond model and tokenizer; to be called in a fresh process."""
    model, tokenizer = build(path, vocabulary)
    small = path.with_name("small.jsonl")
    small.write_text('{"text": "a few words"}\n')
    WAYS[way](small, model, tokenizer, LONGEST)  # the libraries' own buffers
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    WAYS[way](path, model, tokenizer, LONGEST)
    return resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.memory_of:
        print(peak_memory(Path(given.memory_of[1]), given.memory_of[0], given.vocabulary))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "corpus.jsonl")
        write_corpus(path, given.documents)
        model, tokenizer = build(path, given.vocabulary)
        # Rows of the longest document: nothing is cut, so that both do the same work.
        longest = max(len(ids) for ids in encode(tokenizer, [document.text for document in read_corpus(path)]))
        limit = min(4096, longest + 1)
        difference = float(np.abs(plain(path, model, tokenizer, limit) - ours(path, model, tokenizer, limit)).max())
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for repeat in range(given.repeats):
            for way in list(WAYS)[:: 1 if repeat % 2 else -1]:
                start = time.perf_counter()
                WAYS[way](path, model, tokenizer, limit)
                seconds[way].append(time.perf_counter() - start)
        command = [sys.executable, __file__, "--threads", str(given.threads), "--vocabulary", str(given.vocabulary)]
        memory = {
            way: int(subprocess.run([*command, "--memory-of", way, str(path)], capture_output=True, check=True).stdout)
            for way in WAYS
        }
    result = {
        "documents": given.documents,
        "vocabulary": given.vocabulary,
        "longest": longest,
        "largest_difference": difference,
        "seconds": {way: statistics.median(s) for way, s in seconds.items()},
        "times_faster": statistics.median(a / b for a, b in zip(seconds["plain"], seconds["ours"], strict=True)),
        "megabytes": {way: m / 1e6 for way, m in memory.items()},
        "memory_to_plain": memory["ours"] / memory["plain"],
    }
    if given.json:
        print(json.dumps(result))
        return
    print(
        f"torch {torch.__version__}, {given.threads} threads, {given.documents} documents, {given.vocabulary} classes"
    )
    print(f"longest document {longest} tokens; largest difference of a document's nats per token {difference:.1e}")
    for way in WAYS:
        print(f"{way:6s} {result['seconds'][way]:8.2f} s {result['megabytes'][way]:8.0f} MB")
    print(f"ours is {result['times_faster']:.2f} times as fast, with {result['memory_to_plain']:.2f} of the memory")


if __name__ == "__main__":
    main()
