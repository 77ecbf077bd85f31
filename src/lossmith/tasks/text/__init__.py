"""Systems for text."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lossmith.tasks.text.conll import Sentence, read_conll
    from lossmith.tasks.text.pair_files import Pair, read_pairs
    from lossmith.tasks.text.pairs import PairClassifier, PairScores
    from lossmith.tasks.text.question_answering import QuestionScores, answer_losses, evaluate_questions
    from lossmith.tasks.text.rationale_student import RationaleScores, RationaleStudent
    from lossmith.tasks.text.tagging import TaggingScores, TokenTagger

_HOMES = {
    "QuestionScores": "question_answering",
    "RationaleScores": "rationale_student",
    "RationaleStudent": "rationale_student",
    "Pair": "pair_files",
    "PairClassifier": "pairs",
    "PairScores": "pairs",
    "Sentence": "conll",
    "TaggingScores": "tagging",
    "TokenTagger": "tagging",
    "answer_losses": "question_answering",
    "evaluate_questions": "question_answering",
    "read_conll": "conll",
    "read_pairs": "pair_files",
}

__all__ = [
    "Pair",
    "PairClassifier",
    "PairScores",
    "QuestionScores",
    "RationaleScores",
    "RationaleStudent",
    "Sentence",
    "TaggingScores",
    "TokenTagger",
    "answer_losses",
    "evaluate_questions",
    "read_conll",
    "read_pairs",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"lossmith.tasks.text.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'lossmith.tasks.text' has no attribute '{name}'")
