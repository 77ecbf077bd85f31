"""How low will it get, and what will it cost: laws fitted to measured losses.

``law.fit(runs) -> fitted``; ``fitted.predict(...)``, ``.interval(level)``, ``.plan(...)``. Runs come from run records,
a CSV or a DataFrame. Nothing else of lossmith is imported here but its errors, files and registry; names are imported
when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .chinchilla import BESIROGLU, HOFFMANN, Chinchilla, Plan
    from .fitted import Fitted, Interval
    from .fitting import HUBER_LOG, SQUARES, Objective, Solution, fit_terms
    from .law import Law
    from .tables import Column, Reading, Table, read_table
    from .terms import Exponent, Term, Terms

_HOMES = {
    "chinchilla": ("BESIROGLU", "HOFFMANN", "Chinchilla", "Plan"),
    "fitted": ("Fitted", "Interval"),
    "fitting": ("HUBER_LOG", "SQUARES", "Objective", "Solution", "fit_terms"),
    "law": ("Law",),
    "tables": ("Column", "Reading", "Table", "read_table"),
    "terms": ("Exponent", "Term", "Terms"),
}

__all__ = [
    "BESIROGLU",
    "HOFFMANN",
    "HUBER_LOG",
    "SQUARES",
    "Chinchilla",
    "Column",
    "Exponent",
    "Fitted",
    "Interval",
    "Law",
    "Objective",
    "Plan",
    "Reading",
    "Solution",
    "Table",
    "Term",
    "Terms",
    "fit_terms",
    "read_table",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
