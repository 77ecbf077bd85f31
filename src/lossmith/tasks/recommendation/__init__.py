"""Recommenders from implicit feedback, part of which is noise."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lossmith.tasks.recommendation.backbones import Backbone, LightGCN, MatrixFactorization, NeuMF
    from lossmith.tasks.recommendation.denoising import DENOISING, Denoising, personal_loss_probabilities
    from lossmith.tasks.recommendation.interactions import Interactions
    from lossmith.tasks.recommendation.noise import (
        SyntheticFeedback,
        inject_noise,
        split_interactions,
        synthetic_feedback,
    )
    from lossmith.tasks.recommendation.objective import ImplicitFeedback
    from lossmith.tasks.recommendation.recommender import Recommender
    from lossmith.tasks.recommendation.scores import RankingScores, noise_auc, ranking_scores
    from lossmith.tasks.recommendation.triples import TripleSource

_HOMES = {
    "Backbone": "backbones",
    "DENOISING": "denoising",
    "Denoising": "denoising",
    "ImplicitFeedback": "objective",
    "Interactions": "interactions",
    "LightGCN": "backbones",
    "MatrixFactorization": "backbones",
    "NeuMF": "backbones",
    "RankingScores": "scores",
    "Recommender": "recommender",
    "SyntheticFeedback": "noise",
    "TripleSource": "triples",
    "inject_noise": "noise",
    "noise_auc": "scores",
    "personal_loss_probabilities": "denoising",
    "ranking_scores": "scores",
    "split_interactions": "noise",
    "synthetic_feedback": "noise",
}

__all__ = [
    "DENOISING",
    "Backbone",
    "Denoising",
    "ImplicitFeedback",
    "Interactions",
    "LightGCN",
    "MatrixFactorization",
    "NeuMF",
    "RankingScores",
    "Recommender",
    "SyntheticFeedback",
    "TripleSource",
    "inject_noise",
    "noise_auc",
    "personal_loss_probabilities",
    "ranking_scores",
    "split_interactions",
    "synthetic_feedback",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"lossmith.tasks.recommendation.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'lossmith.tasks.recommendation' has no attribute '{name}'")
