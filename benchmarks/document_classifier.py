"""Documents per second of ``lossmith.data.classify_corpus`` next to the plain loop over fastText.

    python benchmarks/document_classifier.py [--documents 20000] [--buckets 2000000] [--repeats 5] [--jobs 1 2] [--json]

The plain loop, as released selection pipelines have it: for each line of the file ``json.loads``, newlines replaced by
spaces, ``model.predict(text, k=2)``, the probability of the label 1. Ours: one pass of ``classify_corpus`` over the
same file with the same classifier, which ``DocumentClassifier`` has loaded from the same file of fastText (dimension
100, words and hashed pairs of words), in one process and with several. The number of words of a document is lognormal
with a median of 150.

Both classifiers are loaded before the clock starts; the processes of ours start while it runs. One pass each per round,
in one process, in an order that alternates; the median over the rounds, and the median of the ratios within a round.
Besides the seconds of the clock, those of this process's processor: what one core can do on a busy machine, and, where
other processes classify, how many documents this one can read and hand out, which is the most that any number of them
can do.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fasttext
import numpy as np

from lossmith.data import DocumentClassifier, classify_corpus, read_corpus


def write_files(corpus: Path, training: Path, documents: int) -> int:
    """Documents of the embedded corpus's words, code or not by label; returns the number of characters."""
    generator = np.random.default_rng(0)
    words: tuple[list[str], list[str]] = ([], [])
    for document in read_corpus("python"):
        words["code" in document.domain].extend(document.text.split())
    lengths = np.clip(generator.lognormal(5.0, 0.8, documents), 5, 3_000).astype(int)
    characters = 0
    with corpus.open("w", encoding="utf-8") as rows, training.open("w", encoding="utf-8") as lines:
        for i, length in enumerate(lengths):
            kind = words[i % 2]
            start = int(generator.integers(0, len(kind) - 3_000))
            text = " ".join(word + "\n" * (n % 12 == 11) for n, word in enumerate(kind[start : start + length]))
            characters += len(text)
            rows.write(json.dumps({"text": text}) + "\n")
            if i < 4_000:
                lines.write(f"__label__{i % 2} {' '.join(text.split())}\n")
    return characters


def plain(path: Path, model: Any) -> np.ndarray:
    """The loop that one writes."""
    found = []
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            labels, values = model.predict(json.loads(line)["text"].replace("\n", " "), k=2)
            found.append(values[labels.index("__label__1")])
    return np.array(found)


def ours(path: Path, classifier: DocumentClassifier, jobs: int) -> np.ndarray:
    """Log odds as probabilities."""
    odds, _ = classify_corpus(path, classifier, jobs=jobs)
    return 1 / (1 + np.exp(-odds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=20_000)
    parser.add_argument("--buckets", type=int, default=2_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--jobs", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        corpus, training, trained = (Path(folder, name) for name in ("corpus.jsonl", "training.txt", "trained.bin"))
        characters = write_files(corpus, training, given.documents)
        options = {"dim": 100, "wordNgrams": 2, "bucket": given.buckets, "epoch": 1, "thread": 1, "verbose": 0}
        model = fasttext.train_supervised(str(training), **options)
        model.save_model(str(trained))
        start = time.perf_counter()
        classifier = DocumentClassifier.load(trained)
        loading = time.perf_counter() - start
        sizes = trained.stat().st_size, len(classifier.content)
        ways: dict[str, Callable[[], np.ndarray]] = {"plain": functools.partial(plain, corpus, model)}
        ways |= {f"ours, {jobs} processes": functools.partial(ours, corpus, classifier, jobs) for jobs in given.jobs}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        processor: dict[str, list[float]] = {way: [] for way in ways}
        found = {}
        for repeat in range(given.repeats):
            for way in list(ways)[:: 1 if repeat % 2 else -1]:
                start, used = time.perf_counter(), time.process_time()
                found[way] = ways[way]()
                seconds[way].append(time.perf_counter() - start)
                processor[way].append(time.process_time() - used)
    speed = {way: given.documents / statistics.median(times) for way, times in seconds.items()}
    core = {way: given.documents / statistics.median(times) for way, times in processor.items()}
    ratio = {
        way: statistics.median(a / b for a, b in zip(seconds["plain"], times, strict=True))
        for way, times in seconds.items()
    }
    difference = max(float(np.abs(found["plain"] - values).max()) for values in found.values())
    result = {
        "documents": given.documents,
        "characters_per_document": characters / given.documents,
        "megabytes": {"fasttext": sizes[0] / 1e6, "ours": sizes[1] / 1e6},
        "seconds_to_load": loading,
        "documents_per_second": speed,
        "documents_per_processor_second": core,
        "times_faster": ratio,
        "largest_difference": difference,
    }
    if given.json:
        print(json.dumps(result))
        return
    print(f"{given.documents} documents of {characters / given.documents:.0f} characters on average")
    print(f"classifier: {sizes[0] / 1e6:.0f} MB, here {sizes[1] / 1e6:.0f} MB, made from it in {loading:.1f} s")
    print(f"largest difference of a probability: {difference:.1e}")
    for way in ways:
        print(
            f"{way:18s} {speed[way]:8.0f} documents/s, {ratio[way]:5.2f} times as fast; "
            f"{core[way]:8.0f} documents per second of this process's processor"
        )


if __name__ == "__main__":
    main()
