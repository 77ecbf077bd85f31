"""With how many weights: pruning a model while it is trained, or training a low-rank one from the start.

What ``weights=`` names in an arm is a function here that returns an object with ``attach(model, steps)``. One that has
``before_step(step)`` and ``after_step()`` besides is asked at every step. Names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lossmith.laws.sparse_compute import average_density, step_fractions, steps_for_compute

    from .activation_magnitude import wanda, wanda_scores
    from .blockwise import BlockwiseModel, prune_blockwise
    from .calibration import InputNorms, InputProducts, calibration_rows, text_batches
    from .calibration_stream import stream_layers
    from .compact import CompactReport, expand_compact, is_compact, load_compact, save_compact
    from .d_pruner import general_importance, importance_masks, regularized_gradient, taylor_term
    from .d_pruner_domain import DomainImportance, dual_importance, next_token_loss
    from .essential import EssentialCurve, Knee, essential_point, essential_sparsity, find_knee
    from .essential_text import TextEvaluation, load_causal_model, text_evaluation
    from .essential_tickets import Sparsification, lottery_masks, sparsification
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
    from .magnitude_files import StoredWeights, open_weights, prune_checkpoint
    from .masks import Prunable, magnitude_masks, prunable_weights
    from .measured import AgainstDense, Footprint, QualityChange, compare_with_dense, file_bytes
    from .measured_checkpoint import CheckpointComparison, compare_checkpoints, load_checkpoint
    from .one_shot import Pruned, prune
    from .one_shot_text import (
        PrunedLanguageModel,
        TextQuality,
        prune_language_model,
        prune_language_model_blockwise,
    )
    from .optimal_brain_surgeon import Surgery, sparsegpt, surgeon
    from .pretraining import ComputeSchedule, Dense, SparsePretraining, dense, sparse_pretraining
    from .schedule import PruningSchedule
    from .semi_structured import is_two_of_four, to_semi_structured
    from .sparse_linear import SparseLayers, SparseLinear, to_dense_linear, to_sparse_linear
    from .threshold import KthSmallest
    from .visual_tokens import prune_visual_tokens
    from .visual_tokens_cost import TransformerShape, decode_flops, denoising_flops, prefill_flops, visual_flops
    from .visual_tokens_decode import denoise_generate, transfer_counts
    from .visual_tokens_denoiser import Denoised, Denoiser, DenoisingStep
    from .visual_tokens_schedule import PruneSchedule
    from .visual_tokens_select import nearest_neighbour, select_tokens


_HOMES = {
    "activation_magnitude": (
        "wanda",
        "wanda_scores",
    ),
    "blockwise": ("BlockwiseModel", "prune_blockwise"),
    "calibration": (
        "InputNorms",
        "InputProducts",
        "calibration_rows",
        "text_batches",
    ),
    "calibration_stream": ("stream_layers",),
    "d_pruner": (
        "general_importance",
        "importance_masks",
        "regularized_gradient",
        "taylor_term",
    ),
    "d_pruner_domain": (
        "DomainImportance",
        "dual_importance",
        "next_token_loss",
    ),
    "one_shot": (
        "Pruned",
        "prune",
    ),
    "one_shot_text": (
        "PrunedLanguageModel",
        "TextQuality",
        "prune_language_model",
        "prune_language_model_blockwise",
    ),
    "optimal_brain_surgeon": (
        "Surgery",
        "sparsegpt",
        "surgeon",
    ),
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
    "essential": (
        "EssentialCurve",
        "Knee",
        "essential_point",
        "essential_sparsity",
        "find_knee",
    ),
    "essential_tickets": (
        "Sparsification",
        "lottery_masks",
        "sparsification",
    ),
    "essential_text": (
        "TextEvaluation",
        "load_causal_model",
        "text_evaluation",
    ),
    "magnitude_files": (
        "StoredWeights",
        "open_weights",
        "prune_checkpoint",
    ),
    "threshold": ("KthSmallest",),
    "masks": ("Prunable", "magnitude_masks", "prunable_weights"),
    "pretraining": ("ComputeSchedule", "Dense", "SparsePretraining", "dense", "sparse_pretraining"),
    "schedule": ("PruningSchedule",),
    "visual_tokens": ("prune_visual_tokens",),
    "visual_tokens_cost": (
        "TransformerShape",
        "decode_flops",
        "denoising_flops",
        "prefill_flops",
        "visual_flops",
    ),
    "visual_tokens_decode": (
        "denoise_generate",
        "transfer_counts",
    ),
    "visual_tokens_denoiser": (
        "Denoised",
        "Denoiser",
        "DenoisingStep",
    ),
    "visual_tokens_schedule": ("PruneSchedule",),
    "visual_tokens_select": (
        "nearest_neighbour",
        "select_tokens",
    ),
    "compact": ("CompactReport", "expand_compact", "is_compact", "load_compact", "save_compact"),
    "measured": ("AgainstDense", "Footprint", "QualityChange", "compare_with_dense", "file_bytes"),
    "sparse_linear": ("SparseLayers", "SparseLinear", "to_dense_linear", "to_sparse_linear"),
    "semi_structured": ("is_two_of_four", "to_semi_structured"),
    "measured_checkpoint": ("CheckpointComparison", "compare_checkpoints", "load_checkpoint"),
    # The arithmetic of the compute is the law's.
    "lossmith.laws.sparse_compute": ("average_density", "step_fractions", "steps_for_compute"),
}

__all__ = [
    "AgainstDense",
    "BlockwiseModel",
    "CheckpointComparison",
    "CompactReport",
    "ComputeSchedule",
    "Denoised",
    "Denoiser",
    "DenoisingStep",
    "Dense",
    "DomainImportance",
    "EssentialCurve",
    "Footprint",
    "InputNorms",
    "InputProducts",
    "Knee",
    "KthSmallest",
    "LOSTLayer",
    "LOSTLinear",
    "LOSTReport",
    "LowRank",
    "LowRankStart",
    "Prunable",
    "PruneSchedule",
    "Pruned",
    "PrunedLanguageModel",
    "PruningSchedule",
    "QualityChange",
    "SLTrainLinear",
    "SparseLayers",
    "SparseLinear",
    "SparsePretraining",
    "Sparsification",
    "SparsityReport",
    "StoredWeights",
    "Surgery",
    "TextEvaluation",
    "TextQuality",
    "TransformerShape",
    "apply_masks",
    "average_density",
    "block_weights",
    "calibration_rows",
    "cola",
    "column_scores",
    "compare_checkpoints",
    "compare_with_dense",
    "convert_to_lost",
    "decode_flops",
    "denoise_generate",
    "denoising_flops",
    "dense",
    "dual_importance",
    "erk_densities",
    "essential_point",
    "essential_sparsity",
    "expand_compact",
    "file_bytes",
    "find_knee",
    "general_importance",
    "importance_masks",
    "is_compact",
    "is_two_of_four",
    "load_causal_model",
    "load_checkpoint",
    "load_compact",
    "load_lost",
    "lost",
    "lost_report",
    "lost_start",
    "lottery_masks",
    "low_rank",
    "magnitude_masks",
    "mask_similarity",
    "merge_lost",
    "nearest_neighbour",
    "next_token_loss",
    "one_shot_masks",
    "open_weights",
    "prefill_flops",
    "prunable_weights",
    "prune",
    "prune_blockwise",
    "prune_checkpoint",
    "prune_language_model",
    "prune_language_model_blockwise",
    "prune_visual_tokens",
    "regularized_gradient",
    "release_masks",
    "save_compact",
    "select_tokens",
    "sltrain",
    "sparse_pretraining",
    "sparsegpt",
    "sparsification",
    "sparsity_report",
    "step_fractions",
    "steps_for_compute",
    "stream_layers",
    "surgeon",
    "target_layers",
    "taylor_term",
    "text_batches",
    "text_evaluation",
    "to_dense_linear",
    "to_semi_structured",
    "to_sparse_linear",
    "transfer_counts",
    "visual_flops",
    "wanda",
    "wanda_scores",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module if "." in module else f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
