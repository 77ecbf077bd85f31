"""PreSelect: is a document whose losses rank models as their abilities do also one to learn from?

"Predictive Data Selection: The Data That Predicts Is the Data That Teaches", 2025, arXiv 2503.00808.

Six models of known ability are given: each has read as many passages, from none of the target domain to nothing else,
and is ranked by its bits per character on a benchmark of the target. In a pool of code and junk (characters
shuffled) hides one tenth of documentation. Each method keeps a tenth of the pool; a language model is trained on it
from random weights in a single pass and judged on other documentation. ``--data`` takes the user's own domains;
``full`` has published models rank web text.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossmith.reporting.comparison import Claim, Cost
from lossmith.studies.preselect_parts import ModelLosses, domains, model_losses, prepare_parts, read_part
from lossmith.studies.selection_pool import new_model, training_options
from lossmith.studies.study import Experiment, Paper, Study

if TYPE_CHECKING:
    import numpy as np

    from lossmith.data import Document

ARMS = {
    "random": "a tenth of the pool, drawn at random",
    "random-10x": "ten times as much: all of the pool",
    "perplexity": "the fewest bits per character under the best model (scores the whole pool with it)",
    "ngram-importance": "resampled by hashed n-grams of a sample of the target, after DSIR",
    "target-classifier": "fastText: a sample of the target against random passages, after DCLM",
    "two-models": "as preselect, with the weakest and the strongest model alone",
    "preselect": "fastText: passages whose losses rank all six models rightly against those that do not",
    "oracle": "all passages of the target domain",
}

CLAIMS = (
    Claim("PreSelect beats random data of the same size", "preselect", "target/bpc", "lower"),
    Claim("It beats ten times the data at random", "preselect", "target/bpc", "lower", "random-10x"),
    Claim("It beats the perplexity filter", "preselect", "target/bpc", "lower", "perplexity"),
    Claim("It beats n-gram importance", "preselect", "target/bpc", "lower", "ngram-importance"),
    Claim("It beats a classifier of the target", "preselect", "target/bpc", "lower", "target-classifier"),
    Claim("Six models find better data than two", "preselect", "target/bpc", "lower", "two-models"),
    Claim("Fewer junk passages pass six models than two", "preselect", "perfect/junk", "lower", "two-models"),
)


def experiment(arm: str, seed: int, options: Mapping[str, Any], folder: Path) -> Experiment:
    """Select by one method, train on it, judge on held-out text of the target domain."""
    import numpy as np

    from lossmith.data import bits_per_character, language_model_scorer, load_tokenizer, score_texts, select_lowest
    from lossmith.training.text_training import train_on_texts

    # Made by the first arm that needs them, before its clock starts: their cost is nobody's, see the notes.
    losses = model_losses(seed, options) if arm in ("perplexity", "two-models", "preselect") else None
    started = time.perf_counter()
    parts = Path(options["parts"])
    pool = read_part(parts, "pool")
    scores, metrics, scored = _scores(arm, pool, losses, seed, options)
    keep = float(options["keep"]) * (10 if arm == "random-10x" else 1)
    chosen = select_lowest(-scores, keep=min(1.0, keep))
    tokenizer = load_tokenizer(parts / "tokenizer")
    model: Any = new_model(options, tokenizer, seed, target=True)
    texts = [pool[i].text for i in chosen]
    used = train_on_texts(model, tokenizer, texts, folder=folder, seed=seed, **training_options(options))
    validation = [document.text for document in read_part(parts, "validation")]
    judge = language_model_scorer(model, tokenizer, max_length=int(options["sequence_length"]))
    nats, _ = score_texts(judge, validation)
    metrics |= {"target/bpc": float(bits_per_character(nats.sum(), sum(map(len, validation))))}
    metrics |= {f"kept/{name}": float(np.mean(here[chosen])) for name, here in domains(pool)}
    cost = Cost(
        tokens=round(used["tokens"]),
        steps=round(used["steps"]),
        seconds=time.perf_counter() - started,
        flops=used["flops"],
        scored_tokens=round(scored),
    )
    return Experiment(metrics, cost)


def _scores(
    arm: str, pool: list[Document], losses: ModelLosses | None, seed: int, options: Mapping[str, Any]
) -> tuple[np.ndarray, dict[str, float], float]:
    """One number per passage of the pool, the highest to be kept; what was seen on the way; tokens scored for it."""
    import numpy as np

    from lossmith.data import DocumentClassifier, NgramImportance, resampling_scores

    generator = np.random.default_rng(seed)
    parts, texts = Path(options["parts"]), [document.text for document in pool]
    if arm.startswith("random"):
        return generator.random(len(pool)), {}, 0.0
    if arm == "oracle":
        return np.array([float(document.domain == "target") for document in pool]), {}, 0.0
    if arm == "perplexity":
        assert losses is not None
        return -losses.pool / [len(text) for text in texts], {}, losses.scored_tokens["pool"]
    seeds = read_part(parts, "seeds")
    # Another sample of the seed passages for every seed.
    sample = np.sort(generator.permutation(len(seeds))[: round(float(options["seed_share"]) * len(seeds))])
    if arm in ("ngram-importance", "target-classifier"):
        target = [document.text for document in read_part(parts, "target")]
        if arm == "ngram-importance":
            weights = NgramImportance.fit(target, texts).log_weights(texts)
            return -resampling_scores(weights, seed=seed), {}, 0.0
        others = [seeds[i].text for i in generator.permutation(sample)[: len(target)]]
        return DocumentClassifier.fit(target, others, seed=seed).log_odds(texts), {}, 0.0
    assert losses is not None
    used = np.arange(len(losses.ability))
    if arm == "two-models":
        used = np.array([losses.ability.argmin(), losses.ability.argmax()])
    classifier, metrics = _predictive_classifier(
        [seeds[i] for i in sample], losses.seeds[used][:, sample], losses.ability[used], seed
    )
    scored = losses.scored_tokens["seeds"] * float(options["seed_share"]) * len(used) / len(losses.ability)
    return classifier.log_odds(texts), metrics, scored


def _predictive_classifier(
    seeds: list[Document], losses: np.ndarray, ability: np.ndarray, seed: int
) -> tuple[Any, dict[str, float]]:
    import numpy as np

    from lossmith.data import DocumentClassifier, predictive_strength, strength_labels

    strength = predictive_strength(losses, ability)
    labels = strength_labels(strength, seed=seed)
    metrics: dict[str, float] = {}
    for name, here in domains(seeds):
        if here.any():
            metrics |= {f"strength/{name}": float(strength[here].mean())}
            metrics |= {f"perfect/{name}": float((strength[here] == 1).mean())}
    metrics["positives/target"] = float(np.mean([seeds[i].domain == "target" for i in labels.positives]))
    positives, negatives = ([seeds[i].text for i in some] for some in (labels.positives, labels.negatives))
    return DocumentClassifier.fit(positives, negatives, seed=seed), metrics


COMMON = {
    "data": "python",
    "text_field": "text",
    "domain_field": None,
    "target_domain": None,
    "target_share": 0.1,
    "junk_share": 0.25,
    "keep": 0.1,
    "seed_share": 0.8,
    "models": [0.0, 0.1, 0.2, 0.4, 0.7, 1.0],
    "model": "nano",
    "target_model": "nano",
    "learning_rate": 8e-3,
    "batch_size": 8,
}

STUDY = Study(
    slug="preselect",
    family="data",
    question="Is a document whose losses rank models as their abilities do also one to learn from?",
    paper=Paper(
        "Predictive Data Selection: The Data That Predicts Is the Data That Teaches",
        2025,
        "2503.00808",
    ),
    arms=ARMS,
    baseline="random",
    metric="target/bpc",
    metrics=(
        "target/bpc",
        "kept/target",
        "kept/junk",
        "strength/target",
        "strength/other",
        "strength/junk",
        "perfect/junk",
        "positives/target",
    ),
    claims=CLAIMS,
    seeds={"smoke": 2, "quick": 4, "full": 3},
    options={
        "smoke": {
            **COMMON,
            "models": [0.0, 0.4, 1.0],
            "characters": 120,
            "model_texts": 48,
            "reserve": 144,
            "pool": 240,
            "seeds": 200,
            "target": 20,
            "benchmark": 16,
            "validation": 20,
            "vocab_size": 300,
            "sequence_length": 128,
        },
        "quick": {
            **COMMON,
            "characters": 128,
            "model_texts": 1_200,
            "reserve": 4_800,
            "pool": 5_000,
            "seeds": 2_500,
            "target": 200,
            "benchmark": 200,
            "validation": 300,
            "vocab_size": 512,
            "sequence_length": 128,
        },
        "full": {
            **COMMON,
            "data": "DKYoon/SlimPajama-6B",
            "domain_field": "meta.redpajama_set_name",
            "target_domain": "RedPajamaBook",
            "target_share": 0.04,
            "junk_share": 0.0,
            "models": [f"EleutherAI/pythia-{size}" for size in ("160m", "410m", "1b", "1.4b", "2.8b", "6.9b")],
            "target_model": "EleutherAI/pythia-410m",
            "learning_rate": 1e-3,
            "batch_size": 256,
            "characters": 2_000,
            "model_texts": 0,
            "reserve": 0,
            "pool": 1_600_000,
            "seeds": 100_000,
            "target": 12_000,
            "benchmark": 2_000,
            "validation": 2_000,
            "vocab_size": None,
            "sequence_length": 1_024,
        },
    },
    experiment=experiment,
    prepare=prepare_parts,
    data="text in several domains, of which the smallest (or target_domain) is the target",
    better={
        "kept/target": "higher",
        "kept/junk": "lower",
        "strength/target": "higher",
        "perfect/junk": "lower",
        "positives/target": "higher",
    },
    notes=(
        "target/bpc: bits per character on held-out text of the target domain. kept/KIND: share of that kind in what "
        "was kept. strength/KIND: mean predictive strength of the seed passages, perfect/KIND: share of them that rank "
        "all models rightly, positives/target: share of the target among those. The models that are ranked are given: "
        "their training is no part of the cost.",
    ),
)
