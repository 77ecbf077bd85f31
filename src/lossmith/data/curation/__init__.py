"""From folders of documents to a corpus of one domain: read, clean, filter, drop duplicates, account for the rest.

:func:`lossmith.data.curate` is the entrance; a :class:`Domain`, usually a YAML file, says what belongs.
"""

from __future__ import annotations

from .contamination import Contamination
from .decoding import Unreadable
from .domain import Domain, built_in_domains, load_domain
from .duplicates import NearDuplicates
from .pipeline import curate
from .relevance import BagOfWordsClassifier, KeywordFinder
from .report import CurationReport
from .sources import SetAside, SourceDocument, read_sources

__all__ = [
    "BagOfWordsClassifier",
    "Contamination",
    "CurationReport",
    "Domain",
    "KeywordFinder",
    "NearDuplicates",
    "SetAside",
    "SourceDocument",
    "Unreadable",
    "built_in_domains",
    "curate",
    "load_domain",
    "read_sources",
]
