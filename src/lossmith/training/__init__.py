"""The engine: the Hugging Face Trainer with an objective and example weights; run records."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lossmith.training.distillation import Distillation
    from lossmith.training.dual_head import DualHeadDistillation, GradientAlignedTrainer, gradient_cosines
    from lossmith.training.objectives import Classification, ExampleEvaluation, NextToken, Objective
    from lossmith.training.record import RunRecord
    from lossmith.training.reweighting import DynamicReweightedLoss
    from lossmith.training.sequence_revision import Revision, correct_and_regenerate, find_error_positions
    from lossmith.training.set_classification import SetClassification
    from lossmith.training.span_extraction import SpanExtraction
    from lossmith.training.sparsity import SparsityCallback
    from lossmith.training.spherical import SphericalHeadCallback, SphericalObjective
    from lossmith.training.trainer import Evaluation, NonFiniteLossError, Trainer

_HOMES = {
    "Classification": "objectives",
    "Distillation": "distillation",
    "DualHeadDistillation": "dual_head",
    "DynamicReweightedLoss": "reweighting",
    "Evaluation": "trainer",
    "ExampleEvaluation": "objectives",
    "GradientAlignedTrainer": "dual_head",
    "NextToken": "objectives",
    "NonFiniteLossError": "trainer",
    "Objective": "objectives",
    "Revision": "sequence_revision",
    "RunRecord": "record",
    "SetClassification": "set_classification",
    "SpanExtraction": "span_extraction",
    "SparsityCallback": "sparsity",
    "SphericalHeadCallback": "spherical",
    "SphericalObjective": "spherical",
    "Trainer": "trainer",
    "correct_and_regenerate": "sequence_revision",
    "find_error_positions": "sequence_revision",
    "gradient_cosines": "dual_head",
}

__all__ = [
    "Classification",
    "Distillation",
    "DualHeadDistillation",
    "DynamicReweightedLoss",
    "Evaluation",
    "ExampleEvaluation",
    "GradientAlignedTrainer",
    "NextToken",
    "NonFiniteLossError",
    "Objective",
    "Revision",
    "RunRecord",
    "SetClassification",
    "SpanExtraction",
    "SparsityCallback",
    "SphericalHeadCallback",
    "SphericalObjective",
    "Trainer",
    "correct_and_regenerate",
    "find_error_positions",
    "gradient_cosines",
]


def __getattr__(name: str) -> Any:
    # transformers takes seconds to import: the command line must be able to answer `list` without it.
    if name in _HOMES:
        return getattr(importlib.import_module(f"lossmith.training.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'lossmith.training' has no attribute '{name}'")
