"""Small models in which a question about the loss can be answered exactly, and the answers.

Names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .features import feature_frequencies, sample_features, with_density
    from .head_complexity import FeaturePoint, SweepPoint, complexity_sweep, complexity_sweep_features
    from .hidden_markov import HiddenMarkov, Posterior, entropy_rate, fit_hidden_markov
    from .linear_gaussian import (
        LinearGaussianHMM,
        MinNormHead,
        Population,
        conditional_risk,
        deterministic_equivalent,
        excess_risk,
        theoretical_risk,
    )
    from .overlaps import mean_absolute_overlap, mean_square_overlap, represented, welch_bound
    from .representation_learning import FreeFeatures, balanced_start, descend, rank_trajectory, singular_speeds
    from .signed_decay import SignedDecayAdamW, signed_decay_
    from .superposition import expected_exponent, loglog_slope, toy_loss, toy_outputs, truncation_loss
    from .toys import Toys, ToyTraining, train_toys

_HOMES = {
    "head_complexity": ("FeaturePoint", "SweepPoint", "complexity_sweep", "complexity_sweep_features"),
    "features": ("feature_frequencies", "sample_features", "with_density"),
    "hidden_markov": ("HiddenMarkov", "Posterior", "entropy_rate", "fit_hidden_markov"),
    "linear_gaussian": (
        "LinearGaussianHMM",
        "MinNormHead",
        "Population",
        "conditional_risk",
        "deterministic_equivalent",
        "excess_risk",
        "theoretical_risk",
    ),
    "overlaps": ("mean_absolute_overlap", "mean_square_overlap", "represented", "welch_bound"),
    "representation_learning": (
        "FreeFeatures",
        "balanced_start",
        "descend",
        "rank_trajectory",
        "singular_speeds",
    ),
    "signed_decay": ("SignedDecayAdamW", "signed_decay_"),
    "superposition": ("expected_exponent", "loglog_slope", "toy_loss", "toy_outputs", "truncation_loss"),
    "toys": ("ToyTraining", "Toys", "train_toys"),
}

__all__ = [
    "FeaturePoint",
    "FreeFeatures",
    "HiddenMarkov",
    "LinearGaussianHMM",
    "MinNormHead",
    "Population",
    "Posterior",
    "SignedDecayAdamW",
    "SweepPoint",
    "ToyTraining",
    "Toys",
    "balanced_start",
    "complexity_sweep",
    "complexity_sweep_features",
    "conditional_risk",
    "descend",
    "deterministic_equivalent",
    "entropy_rate",
    "excess_risk",
    "expected_exponent",
    "feature_frequencies",
    "fit_hidden_markov",
    "loglog_slope",
    "mean_absolute_overlap",
    "mean_square_overlap",
    "rank_trajectory",
    "represented",
    "sample_features",
    "signed_decay_",
    "singular_speeds",
    "theoretical_risk",
    "toy_loss",
    "toy_outputs",
    "train_toys",
    "truncation_loss",
    "welch_bound",
    "with_density",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
