"""Which examples count, and how often: corpora, their preparation, and weightings.

:func:`prepare` is the usual entrance: it reads a corpus, splits, tokenises and packs it. The collators make
batches of its rows. :mod:`lossmith.data.weighting` says how much each example of a batch counts.

Names are imported when they are first used, so that importing the package stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .collation import PackedCollator, PaddedCollator
    from .corpus import read_corpus
    from .formats import Document
    from .packing import pack
    from .phrases import PhraseFinder, phrase_tokens
    from .prepared import PreparedCorpus, load_prepared, prepare
    from .python_corpus import read_python_corpus
    from .tokenization import load_tokenizer, train_tokenizer

__all__ = [
    "Document",
    "PackedCollator",
    "PaddedCollator",
    "PhraseFinder",
    "PreparedCorpus",
    "load_prepared",
    "load_tokenizer",
    "pack",
    "phrase_tokens",
    "prepare",
    "read_corpus",
    "read_python_corpus",
    "train_tokenizer",
]

_HOMES = {
    "collation": ("PackedCollator", "PaddedCollator"),
    "corpus": ("read_corpus",),
    "formats": ("Document",),
    "packing": ("pack",),
    "phrases": ("PhraseFinder", "phrase_tokens"),
    "prepared": ("PreparedCorpus", "load_prepared", "prepare"),
    "python_corpus": ("read_python_corpus",),
    "tokenization": ("load_tokenizer", "train_tokenizer"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
