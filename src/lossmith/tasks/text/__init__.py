"""Systems for text."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lossmith.tasks.text.conll import Sentence, read_conll
    from lossmith.tasks.text.pair_files import Pair, read_pairs
    from lossmith.tasks.text.pairs import PairClassifier, PairScores
    from lossmith.tasks.text.rationale_student import RationaleScores, RationaleStudent
    from lossmith.tasks.text.tagging import TaggingScores, TokenTagger

_HOMES = {
    "RationaleScores": "rationale_student",
    "RationaleStudent": "rationale_student",
    "Pair": "pair_files",
    "PairClassifier": "pairs",
    "PairScores": "pairs",
    "Sentence": "conll",
    "TaggingScores": "tagging",
    "TokenTagger": "tagging",
    "read_conll": "conll",
    "read_pairs": "pair_files",
}

__all__ = [
    "Pair",
    "PairClassifier",
    "PairScores",
    "RationaleScores",
    "RationaleStudent",
    "Sentence",
    "TaggingScores",
    "TokenTagger",
    "read_conll",
    "read_pairs",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"lossmith.tasks.text.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'lossmith.tasks.text' has no attribute '{name}'")
