"""With how many weights: pruning a model while it is trained, or training a low-rank one from the start.

What ``weights=`` names in an arm is a function here that returns an object with ``attach(model, steps)``. One that has
``before_step(step)`` and ``after_step()`` besides is asked at every step. Names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lossmith.laws.sparse_compute import average_density, step_fractions, steps_for_compute

    from .lost_arms import LowRank, cola, lost, low_rank, sltrain
    from .lost_layer import LOSTLinear, LowRankStart, column_scores, lost_start
    from .lost_model import LOSTLayer, LOSTReport, convert_to_lost, load_lost, lost_report, merge_lost, target_layers
    from .lost_sltrain import SLTrainLinear
    from .magnitude import (
        SparsityReport,
        apply_masks,
        block_weights,
        erk_densities,
        mask_similarity,
        one_shot_masks,
        release_masks,
        sparsity_report,
    )
    from .masks import Prunable, magnitude_masks, prunable_weights
    from .pretraining import ComputeSchedule, Dense, SparsePretraining, dense, sparse_pretraining
    from .schedule import PruningSchedule


_HOMES = {
    "lost_arms": ("LowRank", "cola", "lost", "low_rank", "sltrain"),
    "lost_layer": ("LOSTLinear", "LowRankStart", "column_scores", "lost_start"),
    "lost_model": (
        "LOSTLayer",
        "LOSTReport",
        "convert_to_lost",
        "load_lost",
        "lost_report",
        "merge_lost",
        "target_layers",
    ),
    "lost_sltrain": ("SLTrainLinear",),
    "magnitude": (
        "SparsityReport",
        "apply_masks",
        "block_weights",
        "erk_densities",
        "mask_similarity",
        "one_shot_masks",
        "release_masks",
        "sparsity_report",
    ),
    "masks": ("Prunable", "magnitude_masks", "prunable_weights"),
    "pretraining": ("ComputeSchedule", "Dense", "SparsePretraining", "dense", "sparse_pretraining"),
    "schedule": ("PruningSchedule",),
    # The arithmetic of the compute is the law's.
    "lossmith.laws.sparse_compute": ("average_density", "step_fractions", "steps_for_compute"),
}

__all__ = [
    "ComputeSchedule",
    "Dense",
    "LOSTLayer",
    "LOSTLinear",
    "LOSTReport",
    "LowRank",
    "LowRankStart",
    "Prunable",
    "PruningSchedule",
    "SLTrainLinear",
    "SparsePretraining",
    "SparsityReport",
    "apply_masks",
    "average_density",
    "block_weights",
    "cola",
    "column_scores",
    "convert_to_lost",
    "dense",
    "erk_densities",
    "load_lost",
    "lost",
    "lost_report",
    "lost_start",
    "low_rank",
    "magnitude_masks",
    "mask_similarity",
    "merge_lost",
    "one_shot_masks",
    "prunable_weights",
    "release_masks",
    "sltrain",
    "sparse_pretraining",
    "sparsity_report",
    "step_fractions",
    "steps_for_compute",
    "target_layers",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module if "." in module else f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
