"""Systems for text."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lossmith.tasks.text.conll import Sentence, read_conll
    from lossmith.tasks.text.tagging import TaggingScores, TokenTagger

_HOMES = {"Sentence": "conll", "read_conll": "conll", "TaggingScores": "tagging", "TokenTagger": "tagging"}

__all__ = ["Sentence", "TaggingScores", "TokenTagger", "read_conll"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"lossmith.tasks.text.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'lossmith.tasks.text' has no attribute '{name}'")
