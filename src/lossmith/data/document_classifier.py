"""A fastText classifier of documents, kept as one number per word, and its pass over a corpus."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import struct
import tempfile
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..files import replacing
from .corpus import read_corpus
from .formats import Document

_LABEL = "__label__"
_END = "</s>"
_BUCKETS = 2_000_000
_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 1_024, 2_000_000
_MAGIC, _VERSION, _SOFTMAX, _SUPERVISED = 793_712_314, 12, 3, 3
# Magic and version; then dim, ws, epoch, minCount, neg, wordNgrams, loss, model, bucket, minn, maxn, lrUpdateRate, t.
_ARGUMENTS = struct.Struct("<2i12id")
# Entries, words, labels, tokens, pruned entries.
_DICTIONARY = struct.Struct("<3i2q")
_MATRIX = struct.Struct("<?2q")


class DocumentClassifier:
    r"""Tells documents that are like some positives from those that are like some negatives: fastText, two labels.

    The features of a document are its words and hashed pairs of words, each with a vector :math:`v`; their mean goes
    through a softmax of two outputs. Only the difference of the outputs counts, so that the vectors can be replaced by
    their products with it, one number per feature, without changing any score:

    .. math:: \log \frac{P(1 \mid d)}{P(0 \mid d)} = (o_1 - o_0) \cdot \frac{1}{|d|} \sum_{f \in d} v_f
              = \frac{1}{|d|} \sum_{f \in d} w_f, \qquad w_f = (o_1 - o_0) \cdot v_f

    Of 800 MB 8 are left, which scoring looks up about twice as fast. :meth:`fit` makes a classifier, :meth:`load` reads
    the file of any fastText classifier with two labels, and what :meth:`save` writes is such a file again.

    Words are what stands between white space, with case and punctuation, as fastText has it.

    Source: Joulin et al., *Bag of Tricks for Efficient Text Classification*, 2016, arXiv 1607.01759; as used for data
    selection in arXiv 2503.00808, section 2 and appendix.

    >>> classifier = DocumentClassifier.fit(["the sea is deep"] * 50, ["x = y + 1"] * 50, epochs=50)
    >>> (classifier.log_odds(["the deep", "y = x", "unheard"]) > [1, -1, 1]).tolist()
    [True, False, False]
    """

    def __init__(self, content: bytes, positive: str = "1"):
        """From the bytes of a file that :meth:`save` has written; see :meth:`load`."""
        module = _fasttext()
        self.content, self.positive = content, positive
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "classifier.bin")
            path.write_bytes(content)
            # Not load_model, which prints a warning.
            self._model = module.FastText._FastText(model_path=str(path))
        labels = [label.removeprefix(_LABEL) for label in self._model.get_labels()]
        if positive not in labels:
            raise InputError(f"positive: the classifier has the labels {' and '.join(labels)}, not {positive!r}")
        self._sign = 1.0 if labels[1] == positive else -1.0
        # A view of the one number that the library writes there.
        import fasttext_pybind

        self._vector = fasttext_pybind.Vector(1)
        self._number = np.array(self._vector, copy=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return DocumentClassifier, (self.content, self.positive)

    @classmethod
    def fit(
        cls,
        positives: Iterable[str],
        negatives: Iterable[str],
        *,
        epochs: int = 5,
        learning_rate: float = 0.1,
        dimension: int = 100,
        word_ngrams: int = 2,
        buckets: int | None = None,
        correct_end: bool = True,
        threads: int = 1,
        seed: int = 0,
    ) -> DocumentClassifier:
        """Train on two kinds of documents, in random order.

        Args:
            positives: what to keep.
            negatives: what not.
            epochs: passes over the documents (paper 5, released code 3).
            learning_rate: at the start; it falls linearly to 0.
            dimension: of the vectors.
            word_ngrams: longest sequence of words that is a feature.
            buckets: for hashed sequences; training needs ``4 * dimension`` bytes for each. By default two for each word
                of the documents, and at most fastText's 2,000,000.
            correct_end: give no weight to the end token that fastText adds to every document, whose share falls with a
                document's length.
            threads: more than 1 is faster, and not reproducible.
            seed: of the order.

        Raises:
            InputError: there is no word on one of the sides, or an option is out of range.
        """
        for name, value in {
            "epochs": epochs,
            "dimension": dimension,
            "word_ngrams": word_ngrams,
            "threads": threads,
        }.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"{name} must be a whole number of at least 1, got {value!r}")
        if buckets is not None and not 1 <= buckets < 2**31:
            raise InputError(f"buckets must be a whole number of at least 1 and below 2**31, got {buckets!r}")
        if not 0 < learning_rate < float("inf"):
            raise InputError(f"learning_rate must be above 0, got {learning_rate}")
        module = _fasttext()
        lines = []
        for name, label, texts in (("positives", 1, positives), ("negatives", 0, negatives)):
            found = [f"{_LABEL}{label} {line}\n" for line in map(_line, texts) if not line.isspace() and line]
            if not found:
                raise InputError(f"{name}: there is no word in them to learn from")
            lines += found
        if buckets is None:
            buckets = min(_BUCKETS, 2 * sum(len(line.split()) for line in lines))
        order = np.random.default_rng(seed).permutation(len(lines))
        sizes = {"dim": dimension, "wordNgrams": word_ngrams, "bucket": buckets, "minn": 0, "maxn": 0, "minCount": 1}
        options = {**sizes, "lr": learning_rate, "epoch": epochs, "loss": "softmax", "thread": threads, "verbose": 0}
        with tempfile.TemporaryDirectory() as folder:
            training, trained = Path(folder, "training.txt"), Path(folder, "trained.bin")
            with training.open("w", encoding="utf-8", newline="\n") as stream:
                stream.writelines(lines[i] for i in order)
            try:
                model = module.train_supervised(str(training), **options)
            except RuntimeError as error:  # NaN: the library's only word for it
                raise InputError(f"the classifier cannot be trained ({error}); try a lower learning_rate") from None
            end = model.get_word_id(_END) if correct_end else None
            model.save_model(str(trained))
            del model
            return cls(_compact(trained, zero=end))

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, positive: str = "1") -> DocumentClassifier:
        """Read a classifier that this class, or fastText, has written.

        Args:
            path: of a ``.bin`` file: supervised, softmax, two labels, not quantised.
            positive: its label for what to keep, without ``__label__``.

        Raises:
            InputError: it is no such file, or has other labels.
        """
        return cls(_compact(Path(path)), positive)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file that :meth:`load`, and fastText with all that uses it, can read; whole or not at all."""
        with replacing(Path(path)) as temporary:
            temporary.write_bytes(self.content)

    def log_odds(self, texts: Sequence[str]) -> np.ndarray:
        """How much more likely each text is a positive than a negative: above 0 where it is, float64.

        It ranks as the probability does, which rounds to 1 where the classifier is sure.
        """
        score, vector, number = self._model.f.getSentenceVector, self._vector, self._number
        scores = np.empty(len(texts))
        for i, text in enumerate(texts):
            score(vector, _line(text) + "\n")
            scores[i] = number[0]
        return self._sign * scores

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """The probability that each text is a positive."""
        from scipy.special import expit

        values: np.ndarray = expit(self.log_odds(texts))
        return values

    def word_weights(self) -> dict[str, float]:
        """What each word adds to the log odds of a document of one feature; the most positive first."""
        words = self._model.get_words(on_unicode_error="replace")
        weights = [self._sign * float(self._model.get_input_vector(i)[0]) for i in range(len(words))]
        return dict(sorted(zip(words, weights, strict=True), key=lambda pair: -pair[1]))


def classify_corpus(
    source: str | os.PathLike[str],
    classifier: DocumentClassifier,
    *,
    text_field: str = "text",
    jobs: int = 1,
    allowed: Callable[[Document], bool] | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The log odds of every document of a corpus, which is read as a stream, and its number of characters.

    Args:
        source: see :func:`~lossmith.data.read_corpus`.
        classifier: see :class:`DocumentClassifier`.
        text_field: field of the text.
        jobs: processes side by side; this one reads. More than 1 needs the usual ``if __name__ == "__main__":`` in a
            script.
        allowed: a filter of your own (safety, language, documents held out); where it says no the score is NaN.
        progress: told the number of documents done.

    Returns:
        Log odds and characters, in the order of the corpus. 16 bytes per document are held.

    Raises:
        InputError: the corpus cannot be read, or ``jobs`` is below 1.

    >>> import tempfile, pathlib
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "two.jsonl"
    >>> _ = file.write_text('{"text": "deep sea"}\\n{"text": "y = 1"}\\n')
    >>> classifier = DocumentClassifier.fit(["the sea is deep"] * 50, ["x = y + 1"] * 50, epochs=50)
    >>> scores, characters = classify_corpus(file, classifier)
    >>> (scores > 0).tolist(), characters.tolist()
    ([True, False], [8, 5])
    """
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
        raise InputError(f"jobs must be a whole number of at least 1, got {jobs!r}")
    scores, characters, done = array("d"), array("q"), 0
    refused: list[int] = []

    def batches() -> Iterator[list[str]]:
        batch: list[str] = []
        size = 0
        for document in read_corpus(source, text_field=text_field):
            if allowed is not None and not allowed(document):
                refused.append(len(characters))
            characters.append(len(document.text))
            batch.append(document.text)
            size += len(document.text)
            if len(batch) == _BATCH_DOCUMENTS or size >= _BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    for values in _scored_batches(batches(), classifier, jobs):
        scores.frombytes(values.tobytes())
        done += len(values)
        if progress is not None:
            progress(done)
    found = np.array(scores)
    found[refused] = np.nan
    return found, np.array(characters)


def _scored_batches(batches: Iterator[list[str]], classifier: DocumentClassifier, jobs: int) -> Iterator[np.ndarray]:
    """In order; a few batches at a time, so that the corpus is never held."""
    if jobs == 1:
        yield from map(classifier.log_odds, batches)
        return
    with ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(classifier,)
    ) as pool:
        waiting: deque[Future[np.ndarray]] = deque()
        for batch in batches:
            waiting.append(pool.submit(_score_in_worker, batch))
            if len(waiting) > 3 * jobs:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


_in_worker: list[DocumentClassifier] = []


def _start_worker(classifier: DocumentClassifier) -> None:
    _in_worker[:] = [classifier]


def _score_in_worker(texts: list[str]) -> np.ndarray:
    return _in_worker[0].log_odds(texts)


def _line(text: str) -> str:
    """A text as fastText is to see it: on one line, with nothing in it that fastText takes for its own marks."""
    if not text.isascii():
        text = text.encode("utf-8", "replace").decode()  # halves of surrogate pairs
    if _END in text:
        text = text.replace(_END, "< /s>")  # it would end the document here
    if _LABEL in text:
        text = text.replace(_LABEL, "_label_")  # it would be a third label
    return text.replace("\n", " ")


def _compact(path: Path, zero: int | None = None) -> bytes:
    """The file of a classifier with one number per feature instead of a vector (see the class)."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            head = _ARGUMENTS.unpack_from(data, 0)
            _, words, labels, _, pruned = _DICTIONARY.unpack_from(data, _ARGUMENTS.size)
            dimension, loss, kind, buckets = head[2], head[8], head[9], head[10]
            if head[:2] != (_MAGIC, _VERSION) or kind != _SUPERVISED:
                raise InputError(f"{path} is no classifier of fastText")
            if labels != 2 or loss != _SOFTMAX or pruned > 0:
                raise InputError(
                    f"{path} must be a classifier of 2 labels, trained with loss='softmax' and not quantised; it has "
                    f"{labels} labels"
                )
            # The matrices are at the end of the file.
            rows = words + buckets
            output = size - _MATRIX.size - 2 * dimension * 4
            start = output - _MATRIX.size - rows * dimension * 4
            if start < _ARGUMENTS.size or _MATRIX.unpack_from(data, start) != (False, rows, dimension):
                raise InputError(f"{path} is cut short, or quantised; give the .bin file of a classifier")
            shape = {"dtype": "<f4", "offset": output + _MATRIX.size, "count": 2 * dimension}
            outputs = np.frombuffer(data, **shape).reshape(2, dimension).astype(np.float64)
            direction = outputs[1] - outputs[0]
            weights = np.empty(rows, dtype="<f4")
            for first in range(0, rows, 65_536):
                count = min(65_536, rows - first)
                offset = start + _MATRIX.size + first * dimension * 4
                block = np.frombuffer(data, "<f4", count * dimension, offset).reshape(count, dimension)
                weights[first : first + count] = block @ direction
                del block
            if zero is not None and zero >= 0:
                weights[zero] = 0.0
            if not np.isfinite(weights).all():
                raise InputError(f"{path} has weights that are not finite")
            return b"".join(
                (
                    data[:8],
                    struct.pack("<i", 1),
                    data[12:start],
                    _MATRIX.pack(False, rows, 1),
                    weights.tobytes(),
                    _MATRIX.pack(False, 2, 1),
                    np.array([-0.5, 0.5], dtype="<f4").tobytes(),
                )
            )
    except (OSError, struct.error, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read as a classifier of fastText ({error})") from None


def _fasttext() -> Any:
    try:
        import fasttext
    except ImportError:
        raise InputError("document classifiers need fastText: pip install 'lossmith[selection]'") from None
    return fasttext
