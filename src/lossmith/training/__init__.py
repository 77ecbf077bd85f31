"""The engine: the Hugging Face Trainer with an objective and example weights; run records."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lossmith.training.adaptation import (
        Adaptation,
        AdaptationRows,
        adapt_language_model,
        combine_sources,
        domain_losses,
    )
    from lossmith.training.continual import MixtureLog, MixtureRows, MixtureTrainer, continual_pretraining
    from lossmith.training.distillation import Distillation
    from lossmith.training.dual_head import DualHeadDistillation, GradientAlignedTrainer, gradient_cosines
    from lossmith.training.language_model_distillation import DistilledModel, distill_language_model
    from lossmith.training.low_rank_adaptation import LowRankAdaptation
    from lossmith.training.masked_diffusion import MaskedDiffusion, NextAnswerToken
    from lossmith.training.multi_granularity import MultiGranularityCallback, MultiGranularityDistillation
    from lossmith.training.objectives import Classification, ExampleEvaluation, NextToken, Objective
    from lossmith.training.rationale_distillation import RationaleDistillation
    from lossmith.training.rationale_judge import RationaleJudge
    from lossmith.training.rationale_table import RationaleTable
    from lossmith.training.rationale_trainer import RationaleSchedule, RationaleTrainer
    from lossmith.training.record import RunRecord
    from lossmith.training.replay import ReplaySchedule
    from lossmith.training.reweighting import DynamicReweightedLoss
    from lossmith.training.sequence_revision import Revision, correct_and_regenerate, find_error_positions
    from lossmith.training.sequence_to_sequence import SequenceToSequence
    from lossmith.training.set_classification import SetClassification
    from lossmith.training.span_extraction import SpanExtraction
    from lossmith.training.sparsity import SparsityCallback
    from lossmith.training.spherical import SphericalHeadCallback, SphericalObjective
    from lossmith.training.text_sampling import ModelTeacher, generate_texts
    from lossmith.training.trainer import Evaluation, NonFiniteLossError, Trainer

_HOMES = {
    "Adaptation": "adaptation",
    "AdaptationRows": "adaptation",
    "Classification": "objectives",
    "Distillation": "distillation",
    "DistilledModel": "language_model_distillation",
    "DualHeadDistillation": "dual_head",
    "DynamicReweightedLoss": "reweighting",
    "Evaluation": "trainer",
    "ExampleEvaluation": "objectives",
    "GradientAlignedTrainer": "dual_head",
    "LowRankAdaptation": "low_rank_adaptation",
    "MaskedDiffusion": "masked_diffusion",
    "MixtureLog": "continual",
    "MixtureRows": "continual",
    "MixtureTrainer": "continual",
    "ModelTeacher": "text_sampling",
    "MultiGranularityCallback": "multi_granularity",
    "MultiGranularityDistillation": "multi_granularity",
    "NextAnswerToken": "masked_diffusion",
    "NextToken": "objectives",
    "NonFiniteLossError": "trainer",
    "Objective": "objectives",
    "RationaleDistillation": "rationale_distillation",
    "RationaleJudge": "rationale_judge",
    "RationaleSchedule": "rationale_trainer",
    "RationaleTable": "rationale_table",
    "RationaleTrainer": "rationale_trainer",
    "ReplaySchedule": "replay",
    "Revision": "sequence_revision",
    "RunRecord": "record",
    "SequenceToSequence": "sequence_to_sequence",
    "SetClassification": "set_classification",
    "SpanExtraction": "span_extraction",
    "SparsityCallback": "sparsity",
    "SphericalHeadCallback": "spherical",
    "SphericalObjective": "spherical",
    "Trainer": "trainer",
    "adapt_language_model": "adaptation",
    "combine_sources": "adaptation",
    "continual_pretraining": "continual",
    "correct_and_regenerate": "sequence_revision",
    "distill_language_model": "language_model_distillation",
    "domain_losses": "adaptation",
    "find_error_positions": "sequence_revision",
    "generate_texts": "text_sampling",
    "gradient_cosines": "dual_head",
}

__all__ = [
    "Adaptation",
    "AdaptationRows",
    "Classification",
    "Distillation",
    "DistilledModel",
    "DualHeadDistillation",
    "DynamicReweightedLoss",
    "Evaluation",
    "ExampleEvaluation",
    "GradientAlignedTrainer",
    "LowRankAdaptation",
    "MaskedDiffusion",
    "MixtureLog",
    "MixtureRows",
    "MixtureTrainer",
    "ModelTeacher",
    "MultiGranularityCallback",
    "MultiGranularityDistillation",
    "NextAnswerToken",
    "NextToken",
    "NonFiniteLossError",
    "Objective",
    "RationaleDistillation",
    "RationaleJudge",
    "RationaleSchedule",
    "RationaleTable",
    "RationaleTrainer",
    "ReplaySchedule",
    "Revision",
    "RunRecord",
    "SequenceToSequence",
    "SetClassification",
    "SpanExtraction",
    "SparsityCallback",
    "SphericalHeadCallback",
    "SphericalObjective",
    "Trainer",
    "adapt_language_model",
    "combine_sources",
    "continual_pretraining",
    "correct_and_regenerate",
    "distill_language_model",
    "domain_losses",
    "find_error_positions",
    "generate_texts",
    "gradient_cosines",
]


def __getattr__(name: str) -> Any:
    # transformers takes seconds to import: the command line must be able to answer `list` without it.
    if name in _HOMES:
        return getattr(importlib.import_module(f"lossmith.training.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'lossmith.training' has no attribute '{name}'")
