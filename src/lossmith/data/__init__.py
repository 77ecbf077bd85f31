"""Which examples count, and how often: corpora, their preparation, and weightings.

:func:`prepare` is the usual entrance: it reads a corpus, splits, tokenises and packs it. The collators make
batches of its rows. :mod:`lossmith.data.weighting` says how much each example of a batch counts.

Names are imported when they are first used, so that importing the package stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .arithmetic import ArithmeticTeacher, arithmetic_problems
    from .collation import PackedCollator, PaddedCollator
    from .color_filter import color_filter_scores, rho_down, select_at_random, select_lowest, selection_cost
    from .completions import Completion, CompletionCollator, encode_completions, read_completions
    from .corpus import read_corpus
    from .curation import CurationReport, curate, load_domain
    from .document_classifier import DocumentClassifier, classify_corpus
    from .formats import Document
    from .image_questions import ImageQuestion, digit_questions, read_image_questions, shape_questions
    from .mixture import MixtureSampler
    from .ngram_importance import NgramImportance, resampling_scores
    from .packing import pack
    from .phrases import PhraseFinder, phrase_tokens
    from .prepared import PreparedCorpus, load_prepared, prepare
    from .preselect import (
        StrengthLabels,
        bits_per_character,
        character_threshold,
        predictive_strength,
        sample_documents,
        strength_labels,
    )
    from .python_corpus import read_python_corpus
    from .questions import Question, QuestionSet, cloze_questions, generate_questions, read_questions
    from .rationale_sampling import RecordedTeacher, sample_rationales
    from .rationales import (
        ContrastiveRationales,
        RationaleExample,
        RationaleSamples,
        SampledRationale,
        build_contrastive_rationales,
        read_rationales,
        write_rationales,
    )
    from .sampling import DomainSampler, TemperatureSampler, unimax_probabilities
    from .scoring import ScoreSummary, document_hash, score_corpus
    from .scoring_model import Scorer, language_model_scorer, score_texts
    from .scoring_ray import RayScoring
    from .scoring_table import Scores, read_scores
    from .selected import Selection, write_selection
    from .temperature import Cooldown, scalarization_weights, temperature_probabilities, weight_second_moment
    from .tokenization import load_tokenizer, train_tokenizer

__all__ = [
    "ArithmeticTeacher",
    "Completion",
    "CompletionCollator",
    "ContrastiveRationales",
    "Cooldown",
    "CurationReport",
    "Document",
    "DocumentClassifier",
    "DomainSampler",
    "ImageQuestion",
    "MixtureSampler",
    "NgramImportance",
    "PackedCollator",
    "PaddedCollator",
    "PhraseFinder",
    "PreparedCorpus",
    "Question",
    "QuestionSet",
    "RationaleExample",
    "RationaleSamples",
    "RayScoring",
    "RecordedTeacher",
    "SampledRationale",
    "ScoreSummary",
    "Scorer",
    "Scores",
    "Selection",
    "StrengthLabels",
    "TemperatureSampler",
    "arithmetic_problems",
    "bits_per_character",
    "build_contrastive_rationales",
    "character_threshold",
    "classify_corpus",
    "cloze_questions",
    "color_filter_scores",
    "curate",
    "digit_questions",
    "document_hash",
    "encode_completions",
    "generate_questions",
    "language_model_scorer",
    "load_domain",
    "load_prepared",
    "load_tokenizer",
    "pack",
    "phrase_tokens",
    "predictive_strength",
    "prepare",
    "read_completions",
    "read_corpus",
    "read_image_questions",
    "read_python_corpus",
    "read_questions",
    "read_rationales",
    "read_scores",
    "resampling_scores",
    "rho_down",
    "sample_documents",
    "sample_rationales",
    "scalarization_weights",
    "score_corpus",
    "score_texts",
    "select_at_random",
    "select_lowest",
    "selection_cost",
    "shape_questions",
    "strength_labels",
    "temperature_probabilities",
    "train_tokenizer",
    "unimax_probabilities",
    "weight_second_moment",
    "write_rationales",
    "write_selection",
]

_HOMES = {
    "arithmetic": ("ArithmeticTeacher", "arithmetic_problems"),
    "collation": ("PackedCollator", "PaddedCollator"),
    "completions": ("Completion", "CompletionCollator", "encode_completions", "read_completions"),
    "corpus": ("read_corpus",),
    "document_classifier": ("DocumentClassifier", "classify_corpus"),
    "curation": ("CurationReport", "curate", "load_domain"),
    "formats": ("Document",),
    "image_questions": ("ImageQuestion", "digit_questions", "read_image_questions", "shape_questions"),
    "mixture": ("MixtureSampler",),
    "packing": ("pack",),
    "phrases": ("PhraseFinder", "phrase_tokens"),
    "preselect": (
        "StrengthLabels",
        "bits_per_character",
        "character_threshold",
        "predictive_strength",
        "sample_documents",
        "strength_labels",
    ),
    "prepared": ("PreparedCorpus", "load_prepared", "prepare"),
    "python_corpus": ("read_python_corpus",),
    "questions": ("Question", "QuestionSet", "cloze_questions", "generate_questions", "read_questions"),
    "rationale_sampling": ("RecordedTeacher", "sample_rationales"),
    "rationales": (
        "ContrastiveRationales",
        "RationaleExample",
        "RationaleSamples",
        "SampledRationale",
        "build_contrastive_rationales",
        "read_rationales",
        "write_rationales",
    ),
    "color_filter": ("color_filter_scores", "rho_down", "select_at_random", "select_lowest", "selection_cost"),
    "ngram_importance": ("NgramImportance", "resampling_scores"),
    "sampling": ("DomainSampler", "TemperatureSampler", "unimax_probabilities"),
    "scoring": ("ScoreSummary", "document_hash", "score_corpus"),
    "scoring_model": ("Scorer", "language_model_scorer", "score_texts"),
    "scoring_ray": ("RayScoring",),
    "scoring_table": ("Scores", "read_scores"),
    "selected": ("Selection", "write_selection"),
    "temperature": ("Cooldown", "scalarization_weights", "temperature_probabilities", "weight_second_moment"),
    "tokenization": ("load_tokenizer", "train_tokenizer"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
