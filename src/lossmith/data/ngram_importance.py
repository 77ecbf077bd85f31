"""Importance of texts for a target by hashed n-grams, after DSIR."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import InputError

_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True, slots=True)
class NgramImportance:
    r"""Log ratio of two bags of hashed n-grams: the target's over the corpus's.

    .. math:: w(x) = \sum_{g \in x} \log \frac{p_\mathrm{target}(h(g))}{p_\mathrm{corpus}(h(g))}

    :meth:`fit` makes one from texts.

    Attributes:
        log_ratios: of each of the buckets.
        order: longest n-gram, in words.

    Source: Xie et al., *Data Selection for Language Models via Importance Resampling*, 2023, arXiv 2302.03169. Hashed
    words and pairs of words into 10,000 buckets, as there; the counts are smoothed by adding one, since a small target
    leaves many buckets empty.

    >>> importance = NgramImportance.fit(["a poem of the sea", "the sea"], ["x = 1", "y = x", "the sea"])
    >>> importance.log_weights(["of the sea", "x = y"]).round(1).tolist()
    [2.6, -3.6]
    """

    log_ratios: np.ndarray
    order: int = 2

    @classmethod
    def fit(
        cls,
        target: Iterable[str],
        corpus: Iterable[str],
        *,
        buckets: int = 10_000,
        order: int = 2,
        smoothing: float = 1.0,
    ) -> NgramImportance:
        """Count both.

        Args:
            target: texts of the target.
            corpus: texts of what is selected from (a sample is enough).
            buckets: number of them.
            order: longest n-gram, in words.
            smoothing: added to every count.

        Raises:
            InputError: the target or the corpus has no word, or an option is out of range.
        """
        if buckets < 1 or order < 1 or not smoothing > 0:
            raise InputError(
                f"buckets and order must be at least 1 and smoothing above 0, got {buckets}, {order} and {smoothing}"
            )
        logs = []
        for name, texts in (("target", target), ("corpus", corpus)):
            counts = np.zeros(buckets)
            for text in texts:
                np.add.at(counts, _buckets(text, buckets, order), 1.0)
            if counts.sum() == 0:
                raise InputError(f"{name}: there is no word in it to count")
            logs.append(np.log(counts + smoothing) - np.log(counts.sum() + smoothing * buckets))
        return cls(logs[0] - logs[1], order)

    def log_weights(self, texts: Sequence[str]) -> np.ndarray:
        """The logarithm of each text's importance weight."""
        buckets = len(self.log_ratios)
        return np.array([self.log_ratios[_buckets(text, buckets, self.order)].sum() for text in texts], dtype=float)


def resampling_scores(log_weights: np.ndarray | Sequence[float], *, seed: int = 0) -> np.ndarray:
    """Scores whose lowest k are a sample of k without replacement, in proportion to the weights (Gumbel top-k).

    >>> resampling_scores([0.0, 50.0]).argmin()
    np.int64(1)
    """
    values = np.asarray(log_weights, dtype=float)
    return -(values + np.random.default_rng(seed).gumbel(size=len(values)))


def _buckets(text: str, buckets: int, order: int) -> list[int]:
    words = _WORD.findall(text.lower())
    grams = words + [" ".join(words[i : i + n]) for n in range(2, order + 1) for i in range(len(words) - n + 1)]
    return [zlib.crc32(gram.encode("utf-8", "replace")) % buckets for gram in grams]
