"""Whether a text belongs to a domain: by its words, or by a classifier trained on labelled texts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lossmith.errors import InputError

from ..formats import Fields, read_text, reader_of

_TRUE = {"1", "1.0", "true", "yes", "relevant", "positive"}
_FALSE = {"0", "0.0", "false", "no", "irrelevant", "negative"}


class KeywordFinder:
    """Which terms of a list a text holds, whole words, in any case.

    Args:
        terms: a star stands for the rest of a word, a space for any white space, a hyphen for itself or a space.

    >>> KeywordFinder(["beamform*", "path loss"]).find("Beamforming against path\\nloss, and more beamformers")
    {'beamform*': 2, 'path loss': 1}
    """

    def __init__(self, terms: Sequence[str]):
        self.terms = tuple(dict.fromkeys(term.strip() for term in terms))
        # The longest first, so that "radio access network" is not found as "radio".
        self._ordered = sorted(self.terms, key=lambda term: (-len(term), term))
        self._pattern = re.compile(
            r"(?<!\w)(?:" + "|".join(f"({_as_pattern(term)})" for term in self._ordered) + r")(?!\w)", re.IGNORECASE
        )

    def find(self, text: str) -> dict[str, int]:
        """How often each term occurs; only those that do."""
        counts: dict[str, int] = {}
        if self.terms:
            for match in self._pattern.finditer(text):
                term = self._ordered[(match.lastindex or 1) - 1]
                counts[term] = counts.get(term, 0) + 1
        return {term: counts[term] for term in self.terms if term in counts}


def _as_pattern(term: str) -> str:
    pieces = re.split(r"([*\s-]+)", term)
    known = {"*": r"\w*", "-": r"[-\s]?"}
    return "".join(known.get(piece, r"\s+" if piece.isspace() else re.escape(piece)) for piece in pieces)


@dataclass(frozen=True, slots=True)
class BagOfWordsClassifier:
    """The probability that a text is of the domain, by logistic regression on its words and pairs of words.

    Attributes:
        pipeline: scikit-learn's.
        texts: how many it was trained on.
        accuracy: balanced accuracy by cross-validation; ``None`` where a class has fewer than five texts.
    """

    pipeline: Any
    texts: int
    accuracy: float | None

    @classmethod
    def fit(cls, texts: Sequence[str], labels: Sequence[bool]) -> BagOfWordsClassifier:
        """Train on labelled texts; a few hundred do.

        Raises:
            InputError: all labels are the same, or scikit-learn is missing.

        >>> texts = [f"{word} antenna" for word in "abcde"] + [f"{word} recipe" for word in "abcde"]
        >>> classifier = BagOfWordsClassifier.fit(texts, [True] * 5 + [False] * 5)
        >>> classifier("an antenna") > 0.5 > classifier("a recipe")
        True
        """
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
            from sklearn.linear_model import LogisticRegression
            from sklearn.model_selection import StratifiedKFold, cross_val_score
            from sklearn.pipeline import make_pipeline
        except ImportError:
            raise InputError("a classifier needs scikit-learn: pip install 'lossmith[curation]'") from None
        smaller = min(sum(map(bool, labels)), len(labels) - sum(map(bool, labels)))
        if len(texts) != len(labels) or smaller == 0:
            raise InputError(
                f"a classifier needs texts of both labels, got {len(texts)} texts and {sum(map(bool, labels))} of "
                f"{len(labels)} labels true"
            )
        pipeline = make_pipeline(
            TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, max_features=200_000),
            # Little shrinkage: rows have norm 1.
            LogisticRegression(C=10.0, class_weight="balanced", max_iter=1000),
        )
        accuracy = None
        if smaller >= 5:
            folds = StratifiedKFold(5, shuffle=True, random_state=0)
            accuracy = float(
                cross_val_score(pipeline, list(texts), list(labels), cv=folds, scoring="balanced_accuracy").mean()
            )
        try:
            pipeline.fit(list(texts), list(labels))
        except ValueError as error:
            raise InputError(f"a classifier cannot be trained on these texts: {error}") from None
        return cls(pipeline, len(texts), accuracy)

    @classmethod
    def from_file(cls, path: str | Path, *, text_field: str = "text", label_field: str = "label") -> Any:
        """Train on a JSONL, JSON, CSV or Parquet file with texts and labels (1, true, yes, relevant; 0, false, ...).

        Raises:
            InputError: no such file or field, or a label that is neither.
        """
        path = Path(path)
        if not path.is_file():
            raise InputError(f"relevance.labelled: there is no file {path}")
        if reader_of(path) is read_text:
            raise InputError(f"relevance.labelled: {path} is no table (JSONL, JSON, CSV, TSV or Parquet)")
        texts, labels = [], []
        for record in reader_of(path)(path, "", Fields(text_field, label_field)):
            label = record.domain.strip().lower()
            if label not in _TRUE | _FALSE:
                raise InputError(
                    f"{record.source}: the label {record.domain!r} is neither true (1, true, yes, relevant) nor false"
                )
            texts.append(record.text)
            labels.append(label in _TRUE)
        return cls.fit(texts, labels)

    def __call__(self, text: str) -> float:
        """Between 0 and 1."""
        return float(self.pipeline.predict_proba([text])[0, 1])
