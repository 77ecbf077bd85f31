"""PreSelect's measure of a document: do its losses rank some models as their abilities do?

"Predictive Data Selection: The Data That Predicts Is the Data That Teaches", 2025, arXiv 2503.00808.
"""

from __future__ import annotations

import heapq
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike

from ..errors import InputError, did_you_mean
from .formats import Document

TIES = ("strict", "half")
POSITIVES = ("perfect", "quantile")


def bits_per_character(nats: ArrayLike, characters: ArrayLike) -> np.ndarray:
    r"""Bits that a model needs for a character of a text: comparable between models of different tokenizers.

    .. math:: C = \frac{\sum_t -\log_2 p(x_t \mid x_{<t})}{T}

    Args:
        nats: negative log probability of each text, summed over its tokens.
        characters: numbers of characters (code points, ``len(text)``) of the same texts, not of tokens.

    Raises:
        ValueError: a text has no character, or the shapes do not fit.

    Source: arXiv 2503.00808, section 2.

    >>> bits_per_character([120.0], [100]).round(6).tolist()
    [1.731234]
    """
    lengths = np.asarray(characters, dtype=np.float64)
    if lengths.size and not lengths.min() >= 1:
        raise ValueError(f"every text must have at least 1 character, got {lengths.min():g}")
    values: np.ndarray = np.asarray(nats, dtype=np.float64) / (lengths * math.log(2))
    return values


def predictive_strength(losses: ArrayLike, benchmark: ArrayLike, *, ties: str = "strict") -> np.ndarray:
    r"""The share of pairs of models that a document's losses rank as the models' benchmark does.

    .. math:: S(d) = \frac{2}{N (N - 1)} \sum_{i < j} 1[C_i(d) > C_j(d)], \qquad B_1 < B_2 < \ldots < B_N

    1: the better a model, the lower its loss. 0: the other way round, or all losses are equal. Without ties
    :math:`S = (1 + \tau) / 2` with Kendall's rank correlation of benchmark and minus loss. Losses of one document may
    have any common factor, so that total nats do as well as :func:`bits_per_character`.

    Args:
        losses: ``(models, documents)``, of the whole text under each model; in bfloat16 many would tie.
        benchmark: ``(models,)``, higher is better; minus a loss will do. Only their order counts.
        ties: ``"strict"`` counts two equal losses as wrong (the paper), ``"half"`` as half right.

    Returns:
        ``(documents,)``, float64, NaN where a loss is not finite. A pair that ties in the benchmark has no right order
        and is never right, as in the released code.

    Raises:
        ValueError: shapes do not fit, there are fewer than 2 models, all benchmark values are equal or one is not
            finite, or ``ties`` is unknown.

    Relations: with two models this is the sign of ScalingFilter's quality factor.

    Source: arXiv 2503.00808, section 2, equation 2.

    >>> losses = [[1.0, 0.9, 0.8], [0.8, 0.9, 1.0], [0.9, 0.9, 0.9], [0.5, 0.9, 1.1]]
    >>> predictive_strength(losses, [0.3, 0.5, 0.4, 0.9]).tolist()
    [1.0, 0.0, 0.0]
    """
    if ties not in TIES:
        raise ValueError(f"unknown ties '{ties}': {did_you_mean(ties, TIES)}")
    values, ability = np.asarray(losses, dtype=np.float64), np.asarray(benchmark, dtype=np.float64)
    if values.ndim != 2 or ability.shape != values.shape[:1]:
        raise ValueError(
            f"losses must be (models, documents) and benchmark (models,), got {values.shape} and {ability.shape}"
        )
    if len(ability) < 2 or not np.isfinite(ability).all() or len(set(ability.tolist())) < 2:
        raise ValueError(f"benchmark must hold at least 2 finite values that differ, got {ability.tolist()}")
    right = np.zeros(values.shape[1])
    order = np.argsort(ability, kind="stable")
    for worse, better in combinations(order.tolist(), 2):
        if ability[worse] < ability[better]:
            right += values[worse] > values[better]
            if ties == "half":
                right += 0.5 * (values[worse] == values[better])
    right[~np.isfinite(values).all(axis=0)] = np.nan
    # Divided once, last: right / pairs is exactly 1 where all are right.
    pairs = len(ability) * (len(ability) - 1) // 2
    strength: np.ndarray = right / pairs
    return strength


@dataclass(frozen=True, slots=True)
class StrengthLabels:
    """Documents to train a classifier on: indices, in the order of the documents.

    Attributes:
        positives: those whose losses predict.
        negatives: those whose losses do not.
        rule: what chose them, ``"perfect"`` or ``"quantile"``.
        histogram: number of documents by strength, from 0 up.
        missing: documents without a strength.
    """

    positives: np.ndarray
    negatives: np.ndarray
    rule: str
    histogram: dict[float, int]
    missing: int


def strength_labels(
    strength: ArrayLike, *, positives: str = "perfect", share: float = 0.2, seed: int = 0
) -> StrengthLabels:
    """Choose the documents that show a classifier what to keep, and what not.

    Args:
        strength: of every document, NaN where there is none (those are left out and counted).
        positives: ``"perfect"`` takes all documents of strength 1, and as many negatives from strength 0 upwards;
            where no document has strength 1 (weak or very similar models) it warns and falls back to ``"quantile"``,
            which takes ``share`` from the top and as much from the bottom.
        share: of the documents, above 0 and at most 0.5.
        seed: of the draw among equals at the border.

    Raises:
        ValueError: an option is out of range.
        InputError: there are no positives or no negatives, with the histogram of what there is.

    Source: arXiv 2503.00808, section 2; the fall-back is this package's.

    >>> labels = strength_labels([1.0, 0.0, 0.4, 1.0, 0.2, float("nan")])
    >>> labels.positives.tolist(), labels.negatives.tolist(), labels.missing
    ([0, 3], [1, 4], 1)
    """
    if positives not in POSITIVES:
        raise ValueError(f"unknown positives '{positives}': {did_you_mean(positives, POSITIVES)}")
    if not 0 < share <= 0.5:
        raise ValueError(f"share must lie in (0, 0.5], got {share}")
    values = np.asarray(strength, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"strength must be one number per document, got shape {values.shape}")
    usable = np.flatnonzero(~np.isnan(values))
    levels, counts = np.unique(values[usable], return_counts=True)
    histogram = {float(level): int(count) for level, count in zip(levels, counts, strict=True)}
    generator = np.random.default_rng(seed)
    # Ascending; equals in random order.
    ascending = usable[np.lexsort((generator.random(len(usable)), values[usable]))]
    rule, number = positives, int((values[usable] == 1).sum())
    if rule == "perfect" and number == 0 and len(histogram) > 1:
        warnings.warn(
            f"no document ranks all models rightly (strength: {_shown(histogram)}); taking the top and bottom "
            f"{share:.0%} instead",
            stacklevel=2,
        )
        rule = "quantile"
    if rule == "quantile":
        number = int(Fraction(str(share)) * len(usable))
    high = ascending[len(ascending) - number :]
    low = ascending[: min(number, len(ascending) - number)]
    if len(high) == 0 or len(low) == 0 or values[low].max() >= values[high].min():
        raise InputError(
            "there are no documents to tell apart: strength needs to be high for some and low for others, got "
            f"{_shown(histogram)} (number of documents by strength); take models that differ more, or more documents"
        )
    return StrengthLabels(np.sort(high), np.sort(low), rule, histogram, len(values) - len(usable))


def _shown(histogram: dict[float, int]) -> str:
    return ", ".join(f"{level:.3g}: {count}" for level, count in histogram.items()) or "none at all"


def character_threshold(scores: ArrayLike, characters: ArrayLike, keep: float) -> float:
    """The score down to which documents are kept, best first, to have a share of all characters.

    The score of the first document at which the running number of characters exceeds ``keep`` times the total; keep
    whatever scores at least as much. A tenth of the documents is not a tenth of the data.

    Args:
        scores: of the documents (or of a sample of them), the highest best.
        characters: of the same documents.
        keep: share of all characters, above 0 and at most 1.

    Returns:
        The threshold; at ``keep=1`` the lowest score.

    Raises:
        ValueError: there is no document, a score is NaN, the lengths differ or ``keep`` is out of range.

    Source: arXiv 2503.00808, released code (``find_threshold.py``).

    >>> character_threshold([0.9, 0.2, 0.8, 0.55, 0.7], [100, 1000, 300, 50, 550], 0.1)
    0.8
    """
    values, lengths = np.asarray(scores, dtype=np.float64), np.asarray(characters, dtype=np.int64)
    if not 0 < keep <= 1:
        raise ValueError(f"keep must lie in (0, 1], got {keep}")
    if values.ndim != 1 or values.shape != lengths.shape or not len(values) or np.isnan(values).any():
        raise ValueError(
            "scores and characters must be lists of one length, not empty and without NaN, got "
            f"{values.shape} and {lengths.shape} with {int(np.isnan(values).sum())} NaN"
        )
    order = np.argsort(-values, kind="stable")
    running = np.cumsum(lengths[order])
    share = Fraction(str(keep))
    # Whole numbers: the running count exceeds share * total where it exceeds the rounded-down product.
    first = int(np.searchsorted(running, int(share * int(running[-1])), side="right"))
    return float(values[order[min(first, len(order) - 1)]])


def sample_documents(
    read: Callable[[], Iterable[Document]],
    number: int,
    *,
    domains: int = 3_000,
    largest_share: float = 1.0,
    seed: int = 0,
) -> list[tuple[int, Document]]:
    """A random sample with an equal part of each of the most frequent domains (web hosts): the seed documents.

    Two passes, of which the first counts the domains; in memory only the sample. A domain that is too small for its
    part gives what it has; then the sample is smaller than ``number``.

    Args:
        read: starts a pass over the corpus.
        number: of documents in the sample, over all domains.
        domains: how many of the most frequent ones take part.
        largest_share: of the documents of a domain, to leave enough of a small one outside the sample.
        seed: of the draw.

    Returns:
        Documents with their positions in the corpus, in that order.

    Raises:
        ValueError: ``number`` or ``domains`` is below 1, or ``largest_share`` does not lie in (0, 1].

    Source: arXiv 2503.00808, section 3: 3,000 domains of 300 documents each.

    >>> corpus = [Document(str(i), domain="ab"[i % 2]) for i in range(10)]
    >>> sorted(document.domain for _, document in sample_documents(lambda: corpus, 4))
    ['a', 'a', 'b', 'b']
    """
    if number < 1 or domains < 1:
        raise ValueError(f"number and domains must be at least 1, got {number} and {domains}")
    if not 0 < largest_share <= 1:
        raise ValueError(f"largest_share must lie in (0, 1], got {largest_share}")
    share = Fraction(str(largest_share))
    counts = Counter(document.domain for document in read())
    frequent = sorted(counts, key=lambda name: (-counts[name], name))[: min(domains, number)]
    part, more = divmod(number, max(1, len(frequent)))
    parts = {name: min(part + (place < more), int(share * counts[name])) for place, name in enumerate(frequent)}
    generator = np.random.default_rng(seed)
    # The documents with the largest random keys are a uniform sample, whatever is still to come.
    piles: dict[str, list[tuple[float, int, Document]]] = {name: [] for name in frequent}
    for index, document in enumerate(read()):
        key = float(generator.random())
        if (pile := piles.get(document.domain)) is None:
            continue
        if len(pile) < parts[document.domain]:
            heapq.heappush(pile, (key, index, document))
        elif pile and key > pile[0][0]:
            heapq.heapreplace(pile, (key, index, document))
    chosen = [(index, document) for pile in piles.values() for _, index, document in pile]
    return sorted(chosen, key=lambda pair: pair[0])
