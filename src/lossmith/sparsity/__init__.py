"""With how many weights: pruning a model while it is trained.

What ``weights=`` names in an arm is a function here that returns an object with ``attach(model, steps)``. One that has
``before_step(step)`` and ``after_step()`` besides is asked at every step. Names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lossmith.laws.sparse_compute import average_density, step_fractions, steps_for_compute

    from .masks import Prunable, magnitude_masks, prunable_weights
    from .pretraining import ComputeSchedule, Dense, SparsePretraining, dense, sparse_pretraining
    from .schedule import PruningSchedule


_HOMES = {
    "masks": ("Prunable", "magnitude_masks", "prunable_weights"),
    "pretraining": ("ComputeSchedule", "Dense", "SparsePretraining", "dense", "sparse_pretraining"),
    "schedule": ("PruningSchedule",),
    # The arithmetic of the compute is the law's.
    "lossmith.laws.sparse_compute": ("average_density", "step_fractions", "steps_for_compute"),
}

__all__ = [
    "ComputeSchedule",
    "Dense",
    "Prunable",
    "PruningSchedule",
    "SparsePretraining",
    "average_density",
    "dense",
    "magnitude_masks",
    "prunable_weights",
    "sparse_pretraining",
    "step_fractions",
    "steps_for_compute",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module if "." in module else f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
