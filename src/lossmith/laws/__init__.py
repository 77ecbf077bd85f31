"""How low will it get, and what will it cost: laws fitted to measured losses.

``law.fit(runs) -> fitted``; ``fitted.predict(...)``, ``.interval(level)``, ``.plan(...)``. Runs come from run records,
a CSV or a DataFrame. Nothing else of lossmith is imported here but its errors, files and registry; names are imported
when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .advice import Advice, Recommendation, advise
    from .alternatives import Alternative, Alternatives, rank_trainings
    from .annealing import LRAnnealing
    from .annealing_by_size import SizedLRAnnealing
    from .average_parameter import AverageParameter, CountFit, compare_counts
    from .backtesting import Backtest, backtest
    from .batches import fit_groups, fit_many
    from .chinchilla import BESIROGLU, HOFFMANN, Chinchilla, Plan
    from .critical_mixture import CriticalMixture, FittedMixture
    from .critical_ratio import CriticalRatio, TriedShare
    from .curves import LossCurve, every_step, read_curves
    from .estimation import (
        Estimate,
        Protocol,
        absolute_relative_error,
        estimate,
        estimate_all,
        estimate_pairs,
        estimation_grid,
        leave_one_out,
        read_families,
        read_family,
        split_family,
    )
    from .fitted import Fitted, Interval
    from .fitting import HUBER_LOG, SQUARES, Objective, Solution, fit_terms
    from .law import Law
    from .lr_areas import areas, warmup_steps
    from .schedule_plan import Candidate, SchedulePlan, rank_schedules
    from .schedules import Schedule, schedule
    from .sparse_plan import SparsePlan, plan_sparse
    from .tables import Column, Reading, Table, read_table
    from .terms import Exponent, Term, Terms
    from .tokens import BORROWED, TiedChinchilla, TokenLaw
    from .width import LOG_SQUARES, Width

_HOMES = {
    "annealing": ("LRAnnealing",),
    "annealing_by_size": ("SizedLRAnnealing",),
    "advice": ("Advice", "Recommendation", "advise"),
    "alternatives": ("Alternative", "Alternatives", "rank_trainings"),
    "average_parameter": ("AverageParameter", "CountFit", "compare_counts"),
    "backtesting": ("Backtest", "backtest"),
    "batches": ("fit_groups", "fit_many"),
    "chinchilla": ("BESIROGLU", "HOFFMANN", "Chinchilla", "Plan"),
    "critical_mixture": ("CriticalMixture", "FittedMixture"),
    "critical_ratio": ("CriticalRatio", "TriedShare"),
    "curves": ("LossCurve", "every_step", "read_curves"),
    "estimation": (
        "Estimate",
        "Protocol",
        "absolute_relative_error",
        "estimate",
        "estimate_all",
        "estimate_pairs",
        "estimation_grid",
        "leave_one_out",
        "read_families",
        "read_family",
        "split_family",
    ),
    "tokens": ("BORROWED", "TiedChinchilla", "TokenLaw"),
    "fitted": ("Fitted", "Interval"),
    "fitting": ("HUBER_LOG", "SQUARES", "Objective", "Solution", "fit_terms"),
    "law": ("Law",),
    "lr_areas": ("areas", "warmup_steps"),
    "schedule_plan": ("Candidate", "SchedulePlan", "rank_schedules"),
    "schedules": ("Schedule", "schedule"),
    "sparse_plan": ("SparsePlan", "plan_sparse"),
    "tables": ("Column", "Reading", "Table", "read_table"),
    "terms": ("Exponent", "Term", "Terms"),
    "width": ("LOG_SQUARES", "Width"),
}

__all__ = [
    "BESIROGLU",
    "BORROWED",
    "HOFFMANN",
    "HUBER_LOG",
    "LOG_SQUARES",
    "SQUARES",
    "Advice",
    "Alternative",
    "Alternatives",
    "AverageParameter",
    "Backtest",
    "Candidate",
    "Chinchilla",
    "Column",
    "CountFit",
    "CriticalMixture",
    "CriticalRatio",
    "Estimate",
    "Exponent",
    "Fitted",
    "FittedMixture",
    "Interval",
    "LRAnnealing",
    "Law",
    "LossCurve",
    "Objective",
    "Plan",
    "Protocol",
    "Reading",
    "Recommendation",
    "Schedule",
    "SchedulePlan",
    "SizedLRAnnealing",
    "Solution",
    "SparsePlan",
    "Table",
    "Term",
    "Terms",
    "TiedChinchilla",
    "TokenLaw",
    "TriedShare",
    "Width",
    "absolute_relative_error",
    "advise",
    "areas",
    "backtest",
    "compare_counts",
    "estimate",
    "estimate_all",
    "estimate_pairs",
    "estimation_grid",
    "every_step",
    "fit_groups",
    "fit_many",
    "fit_terms",
    "leave_one_out",
    "plan_sparse",
    "rank_schedules",
    "rank_trainings",
    "read_curves",
    "read_families",
    "read_family",
    "read_table",
    "schedule",
    "split_family",
    "warmup_steps",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
