"""Small models in which a question about the loss can be answered exactly, and the answers.

Names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bayes_mixture import (
        BayesMixture,
        BoundResult,
        as_log_prior,
        bernoulli_divergence,
        bernoulli_regret,
        prequential_codelength,
        regret_bound,
    )
    from .context_free import PCFG
    from .features import feature_frequencies, sample_features, with_density
    from .gradient_variance import GradientVariances, gradient_moments, gradient_variances
    from .head_complexity import FeaturePoint, SweepPoint, complexity_sweep, complexity_sweep_features
    from .hidden_markov import HiddenMarkov, Posterior, entropy_rate, fit_hidden_markov
    from .hypothesis_weight import (
        AnnealedEvidence,
        BooleanPrior,
        GaussianComplexity,
        annealed_log_evidence,
        boolean_inputs,
        boolean_regret,
        complexity_gaussian,
        log_ball_mass,
        sample_boolean_prior,
    )
    from .langevin import SGLD, PosteriorEnsemble, distill_ensemble, sample_posterior, stationary_variance
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
    "langevin": ("SGLD", "PosteriorEnsemble", "distill_ensemble", "sample_posterior", "stationary_variance"),
    "hypothesis_weight": (
        "AnnealedEvidence",
        "BooleanPrior",
        "GaussianComplexity",
        "annealed_log_evidence",
        "boolean_inputs",
        "boolean_regret",
        "complexity_gaussian",
        "log_ball_mass",
        "sample_boolean_prior",
    ),
    "bayes_mixture": (
        "BayesMixture",
        "BoundResult",
        "as_log_prior",
        "bernoulli_divergence",
        "bernoulli_regret",
        "prequential_codelength",
        "regret_bound",
    ),
    "head_complexity": ("FeaturePoint", "SweepPoint", "complexity_sweep", "complexity_sweep_features"),
    "context_free": ("PCFG",),
    "features": ("feature_frequencies", "sample_features", "with_density"),
    "gradient_variance": ("GradientVariances", "gradient_moments", "gradient_variances"),
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
    "PCFG",
    "SGLD",
    "AnnealedEvidence",
    "BayesMixture",
    "BooleanPrior",
    "BoundResult",
    "FeaturePoint",
    "FreeFeatures",
    "GaussianComplexity",
    "GradientVariances",
    "HiddenMarkov",
    "LinearGaussianHMM",
    "MinNormHead",
    "Population",
    "Posterior",
    "PosteriorEnsemble",
    "SignedDecayAdamW",
    "SweepPoint",
    "ToyTraining",
    "Toys",
    "annealed_log_evidence",
    "as_log_prior",
    "balanced_start",
    "bernoulli_divergence",
    "bernoulli_regret",
    "boolean_inputs",
    "boolean_regret",
    "complexity_gaussian",
    "complexity_sweep",
    "complexity_sweep_features",
    "conditional_risk",
    "descend",
    "deterministic_equivalent",
    "distill_ensemble",
    "entropy_rate",
    "excess_risk",
    "expected_exponent",
    "feature_frequencies",
    "fit_hidden_markov",
    "gradient_moments",
    "gradient_variances",
    "log_ball_mass",
    "loglog_slope",
    "mean_absolute_overlap",
    "mean_square_overlap",
    "prequential_codelength",
    "rank_trajectory",
    "regret_bound",
    "represented",
    "sample_boolean_prior",
    "sample_features",
    "sample_posterior",
    "signed_decay_",
    "singular_speeds",
    "stationary_variance",
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
