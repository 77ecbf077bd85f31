"""How far a model repeats its corpus: infinity-gram probabilities, their correlation with the model's; pass@k."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lossmith.errors import InputError


class InfinityGram:
    """Next-token probabilities from the longest suffix of a context that a corpus holds.

    ``P(w | context) = count(suffix w) / count(suffix)``, the suffix as long as its count (with a token after it) is
    above 0; with no suffix left, unigram frequencies. A suffix array over the user's own corpus: O(n) memory,
    O(log n) per look-up. Infini-gram, Liu et al. 2024, arXiv 2401.17377.

    Args:
        tokens: the corpus, one sequence of token ids (documents joined by a separator).

    >>> model = InfinityGram([1, 2, 3, 1, 2, 4, 1, 2, 3])
    >>> model.probability([9, 1, 2], 3), model.suffix_length([9, 1, 2])
    (0.6666666666666666, 2)
    """

    def __init__(self, tokens: ArrayLike) -> None:
        self.tokens = np.asarray(tokens)
        if self.tokens.ndim != 1 or not len(self.tokens) or self.tokens.dtype.kind not in "iu":
            raise InputError(f"tokens must be a sequence of token ids, got shape {self.tokens.shape}")
        self.order = _suffix_array(self.tokens)

    def count(self, phrase: Sequence[int]) -> int:
        """Occurrences of a phrase; of the empty one, all places."""
        low, high = self._range(phrase)
        return high - low

    def suffix_length(self, context: Sequence[int]) -> int:
        """Tokens of the longest suffix of ``context`` that occurs with a token after it."""
        return self._backed_off(context)[0]

    def probability(self, context: Sequence[int], token: int) -> float:
        """``P(token | context)``."""
        length, followed = self._backed_off(context)
        suffix = list(context[len(context) - length :])
        return self.count([*suffix, token]) / followed

    def log_probability(self, context: Sequence[int], answer: Sequence[int]) -> float:
        """``Σ ln P`` of an answer's tokens, those of probability 0 skipped, as the paper's code does.

        NaN where all of them are 0.
        """
        context = list(context)
        total, seen = 0.0, False
        for token in answer:
            p = self.probability(context, token)
            if p > 0:
                total, seen = total + math.log(p), True
            context.append(token)
        return total if seen else math.nan

    def _backed_off(self, context: Sequence[int]) -> tuple[int, int]:
        # A suffix of a phrase occurs wherever the phrase does: lengths can be bisected.
        low, high = 0, len(context)
        while low < high:
            middle = (low + high + 1) // 2
            if self._followed(context[len(context) - middle :]):
                low = middle
            else:
                high = middle - 1
        return low, self._followed(context[len(context) - low :])

    def _followed(self, phrase: Sequence[int]) -> int:
        at_end = len(phrase) > 0 and self.tokens[-len(phrase) :].tolist() == list(phrase)
        return self.count(phrase) - int(at_end)

    def _range(self, phrase: Sequence[int]) -> tuple[int, int]:
        low, high = 0, len(self.order)
        for depth, token in enumerate(phrase):
            low, high = self._narrow(low, high, depth, token, left=True), self._narrow(low, high, depth, token)
            if low >= high:
                return low, low
        return low, high

    def _narrow(self, low: int, high: int, depth: int, token: int, *, left: bool = False) -> int:
        """First place in ``[low, high)`` of the order whose token at ``depth`` is not below (or above) ``token``."""
        while low < high:
            middle = (low + high) // 2
            place = self.order[middle] + depth
            value = self.tokens[place] if place < len(self.tokens) else -1
            if value < token or (not left and value == token):
                low = middle + 1
            else:
                high = middle
        return low


def _suffix_array(tokens: NDArray[np.integer]) -> NDArray[np.int64]:
    """Suffixes in their order, by doubling the length that is sorted by (Manber and Myers)."""
    number = len(tokens)
    rank = np.unique(tokens, return_inverse=True)[1].astype(np.int64) + 1
    step = 1
    while True:
        after = np.zeros(number, dtype=np.int64)
        after[: max(0, number - step)] = rank[step:]
        key = rank * (int(rank.max()) + 1) + after
        order = np.argsort(key, kind="stable")
        differs = np.concatenate([[True], key[order][1:] != key[order][:-1]])
        rank[order] = np.cumsum(differs)
        if rank.max() == number or step >= number:
            return order
        step *= 2


def distributional_memorization(model_logp: ArrayLike, ngram_logp: ArrayLike) -> float:
    """Spearman's correlation over items between a model's and an infinity-gram's log-probability of the answers.

    Ranks of products and of their logarithms are the same, and logarithms do not underflow. Items with a NaN are left
    out, pairwise.

    Raises:
        ValueError: different numbers of items, or fewer than 3 pairs.
    """
    from scipy.stats import spearmanr

    model, ngram = np.asarray(model_logp, dtype=np.float64), np.asarray(ngram_logp, dtype=np.float64)
    if model.shape != ngram.shape or model.ndim != 1:
        raise ValueError(f"one value for each item is needed, got shapes {model.shape} and {ngram.shape}")
    known = ~(np.isnan(model) | np.isnan(ngram))
    if known.sum() < 3:
        raise ValueError(f"at least 3 items with both values are needed, got {int(known.sum())}")
    return float(spearmanr(model[known], ngram[known]).statistic)


def pass_at_k(samples: ArrayLike, correct: ArrayLike, k: int) -> float:
    """Mean over problems of ``1 - C(N - c, k) / C(N, k)``: the chance that ``k`` of ``N`` samples hold a right one.

    Raises:
        ValueError: ``k`` above the number of samples, or more right samples than samples.

    >>> round(pass_at_k([10], [3], 1), 12), pass_at_k([10], [8], 3)
    (0.3, 1.0)
    """
    n, c = np.broadcast_arrays(np.atleast_1d(np.asarray(samples)), np.atleast_1d(np.asarray(correct)))
    if k < 1 or (n < k).any():
        raise ValueError(f"k must lie from 1 to the number of samples ({int(n.min())}), got {k}")
    if (c < 0).any() or (c > n).any():
        raise ValueError("correct must lie from 0 to the number of samples")
    return float(
        np.mean(
            [
                1.0 if N - right < k else 1 - float(np.prod(1 - k / np.arange(N - right + 1, N + 1)))
                for N, right in zip(n.tolist(), c.tolist(), strict=True)
            ]
        )
    )
