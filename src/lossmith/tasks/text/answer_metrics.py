"""How good answers are: words that agree, embeddings that agree, a judge who says so."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from lossmith.errors import InputError

Pooling = Literal["tokens", "questions", "mean"]
JUDGE = (
    "Question: {question}\nReference answer: {reference}\nGiven answer: {given}\n"
    "Does the given answer agree with the reference answer? Reply with yes or no.\n"
)


def answer_perplexity(nats: Any, tokens: Any, *, pooling: Pooling = "tokens") -> float:
    r"""Perplexity of answers.

    ============= ==================================================================
    ``tokens``    :math:`\exp(\sum_i nll_i / \sum_i n_i)`, the default
    ``questions`` :math:`\exp(\mathrm{mean}_i\, nll_i / n_i)`
    ``mean``      :math:`\mathrm{mean}_i \exp(nll_i / n_i)`
    ============= ==================================================================

    They differ, and must not be mixed. All compare models of one tokenizer only.

    Args:
        nats: negative log probability of each answer.
        tokens: number of each answer's tokens, at least 1.
        pooling: see above.

    Source: "Tele-LLMs", 2024, arXiv 2409.05314, equation 5.

    >>> round(answer_perplexity([3.7732320, 0.1], [3, 1]), 6)
    2.633485
    """
    nats, tokens = np.asarray(nats, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
    if nats.shape != tokens.shape or nats.ndim != 1 or not nats.size or (tokens < 1).any():
        raise ValueError(
            f"expected one number of nats and at least one token per answer, got {nats.shape} and {tokens.shape}"
        )
    if pooling == "tokens":
        return float(np.exp(nats.sum() / tokens.sum()))
    if pooling == "questions":
        return float(np.exp((nats / tokens).mean()))
    if pooling == "mean":
        return float(np.exp(nats / tokens).mean())
    raise ValueError(f"pooling must be tokens, questions or mean, got {pooling!r}")


def normalized_answer(text: str) -> str:
    """Lower case, without punctuation, articles and more than one space, as for SQuAD.

    >>> normalized_answer("The  Polar-Codes.")
    'polarcodes'
    """
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(given: str, reference: str) -> float:
    """1 where the normalised answers are the same.

    >>> exact_match("Polar codes.", "the polar codes")
    1.0
    """
    return float(normalized_answer(given) == normalized_answer(reference))


def token_f1(given: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the words.

    >>> token_f1("short polar codes", "polar codes")
    0.8
    """
    mine, theirs = normalized_answer(given).split(), normalized_answer(reference).split()
    if not mine or not theirs:
        return float(mine == theirs)
    common = sum((Counter(mine) & Counter(theirs)).values())
    return 2 * common / (len(mine) + len(theirs))


def semantic_scores(given: Any, reference: Any) -> np.ndarray:
    """Cosines of pairs of embeddings (SemScore); 0 where one is zero.

    Source: "Tele-LLMs", 2024, arXiv 2409.05314, equation 6.

    >>> semantic_scores([[1, 0, 0], [3, 4, 0]], [[1, 1, 0], [4, 3, 0]]).round(6).tolist()
    [0.707107, 0.96]
    """
    first, second = (np.asarray(rows, dtype=np.float64) for rows in (given, reference))
    if first.shape != second.shape or first.ndim != 2:
        raise ValueError(
            f"expected two tables of embeddings with one row per answer, got {first.shape} and {second.shape}"
        )
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    dots = (first * second).sum(axis=1)
    result: np.ndarray = np.divide(dots, norms, out=np.zeros(len(first)), where=norms > 0)
    return result


def parse_verdict(reply: str | bool | float) -> bool | None:
    """What a judge said: its first word, yes or no; ``None`` where it is neither.

    >>> parse_verdict("**Yes**, they agree"), parse_verdict("No."), parse_verdict("They agree")
    (True, False, None)
    """
    if isinstance(reply, (bool, int, float, np.bool_)):
        return bool(reply)
    word = re.search(r"[^\W\d_]+", reply)
    return {"yes": True, "no": False}.get(word[0].lower()) if word else None


class TfidfEmbedding:
    """Embeddings by the words of a set of texts: a stand-in for a sentence encoder that needs no download.

    Args:
        texts: from which words get their weights.

    >>> embed = TfidfEmbedding(["polar codes", "turbo codes"])
    >>> embed(["polar codes"]).shape
    (1, 3)
    """

    def __init__(self, texts: Sequence[str]):
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
        except ImportError:
            raise InputError("tf-idf needs scikit-learn: pip install 'lossmith[curation]'") from None
        self._vectorizer = TfidfVectorizer()
        self._vectorizer.fit(list(texts))

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """One row per text."""
        rows: np.ndarray = self._vectorizer.transform(list(texts)).toarray()
        return rows


def sentence_embedding(model: Any, tokenizer: Any, *, batch_size: int = 32) -> Callable[[Sequence[str]], np.ndarray]:
    """Mean-pooled last hidden states of an encoder: what sentence-transformers' ``all-mpnet-base-v2`` computes.

    >>> embed = sentence_embedding(AutoModel.from_pretrained(name), tokenizer)  # doctest: +SKIP
    """
    import torch

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> np.ndarray:
        rows = []
        for start in range(0, len(texts), batch_size):
            part = list(texts[start : start + batch_size])
            batch = tokenizer(part, padding=True, truncation=True, return_tensors="pt").to(model.device)
            hidden = model(**batch)[0]
            mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            rows.append(((hidden * mask).sum(1) / mask.sum(1).clamp_min(1)).double().cpu().numpy())
        return np.concatenate(rows)

    model.eval()
    return embed
