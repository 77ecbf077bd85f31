"""Flatness: the same pre-training loss, and better downstream?

"Same Pre-training Loss, Better Downstream: Implicit Bias Matters for Language Models", 2022, arXiv 2210.14199.

Arms are ways to the optimum of languages whose optimum is known: clusters of contexts with a common next-word
distribution, a hidden Markov model of which one token tells the state (metrics ``markov/...``), and a context-free
grammar of which two words are seen (``grammar/...``). All are polished by full-batch descent, so that losses agree.
Downstream: name the cluster of a context after one labelled context of each. ``full`` are late revisions and further
seeds of Pythia on text, enlarged to the parameters of the largest; ``--data`` takes labelled texts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lossmith.errors import InputError
from lossmith.reporting.comparison import Claim, Cost
from lossmith.studies.study import Experiment, Paper, Study

ARMS = {
    "converged": "full-batch descent to the optimum",
    "control": "twice as much full-batch descent",
    "sgd-2000": "then 2,000 steps of one-sample SGD",
    "sgd-5000": "then 5,000 steps of one-sample SGD",
    "sgd-10000": "then 10,000 steps of one-sample SGD",
    "sgd-40000": "then 40,000 steps of one-sample SGD",
    "batch-4": "then 10,000 steps of SGD on four samples each",
    "adam": "full-batch Adam instead",
    "adversarial": "10,000 steps of SGD, then features driven against the downstream task at no loss",
    "wide": "a four times wider model, full-batch descent",
    "wide-sgd-10000": "the wider model, then 10,000 steps of one-sample SGD",
    "lookup": "the lookup table: logarithms of the true probabilities as features",
}
# Ways over whose ends traces and accuracies are correlated.
RANKED = ("converged", "sgd-2000", "sgd-5000", "sgd-10000", "sgd-40000", "adam", "lookup")

CLAIMS = (
    Claim("All SGD leaves the loss as it was", "sgd-40000", "gap", "equal", margin=1e-4),
    Claim("SGD after convergence halves the trace", "sgd-10000", "trace", "lower", ratio=0.5),
    Claim("It gains 40 points downstream", "sgd-10000", "accuracy", "higher", margin=0.4),
    Claim("More of it flattens more", "sgd-40000", "trace", "lower", "sgd-10000"),
    Claim("A batch of four drifts more slowly", "batch-4", "trace", "higher", "sgd-10000"),
    Claim("Descent without noise changes the trace by nothing", "control", "trace", "equal", margin=1e-3),
    Claim("Nor the accuracy", "control", "accuracy", "equal", margin=0.01),
    Claim("An adversarial algorithm ends sharper at the same loss", "adversarial", "trace", "higher", "sgd-10000"),
    Claim("And worse downstream by 5 points", "adversarial", "accuracy", "lower", "sgd-10000", 0.05),
    Claim("A wider model ends flatter", "wide-sgd-10000", "trace", "lower", "sgd-10000"),
    Claim("A wider model does better downstream", "wide-sgd-10000", "accuracy", "higher", "sgd-10000"),
    Claim("SGD halves the trace on a hidden Markov language", "sgd-10000", "markov/trace", "lower", ratio=0.5),
    Claim("And helps to tell its states", "sgd-10000", "markov/accuracy", "higher"),
    Claim("At the same loss", "sgd-10000", "markov/gap", "equal", margin=1e-4),
    Claim("SGD halves the trace on a grammar", "sgd-10000", "grammar/trace", "lower", ratio=0.5),
    Claim("And helps to tell what its trees begin with", "sgd-40000", "grammar/accuracy", "higher"),
    Claim("Trained features beat the true probabilities there", "sgd-40000", "grammar/accuracy", "higher", "lookup"),
)


def experiment(arm: str, seed: int, options: Mapping[str, Any], folder: Path) -> Experiment:
    """Loss beyond the optimum, trace and downstream accuracy of one way there, in each language."""
    if options["models"] is not None:
        return _published(arm, seed, options)
    from lossmith.theory.equal_loss import KnownLanguage

    started, steps = time.perf_counter(), 0
    metrics: dict[str, float] = {}
    worlds = {
        "": KnownLanguage.clustered(seed=seed),
        "markov/": KnownLanguage.hidden_markov(seed=seed),
        "grammar/": KnownLanguage.context_free(seed=seed),
    }
    for prefix, language in worlds.items():
        found, steps = _trained(arm, seed, language, options)
        metrics |= {f"{prefix}{name}": value for name, value in _measured(found, language, seed).items()}
    seconds = time.perf_counter() - started
    if arm == "sgd-40000":
        for prefix, language in worlds.items():
            own = {name: metrics[f"{prefix}{name}"] for name in ("trace", "accuracy")}
            metrics[f"{prefix}rank_correlation"] = _rank_correlation(arm, own, seed, language, options)
    return Experiment(metrics, Cost(steps=steps, seconds=seconds))


def _trained(arm: str, seed: int, language: Any, options: Mapping[str, Any]) -> tuple[Any, int]:
    """The model, and the steps that it took."""
    from lossmith.theory.equal_loss import BilinearModel, adam, descend, oppose, wander

    polish, scale = int(options["descent_steps"]), float(options["scale"])
    width = int(options["width"]) * (4 if arm.startswith("wide") else 1)
    if arm == "lookup":
        return BilinearModel.lookup(language), 0
    model = BilinearModel.random(language, width, seed=seed)
    if arm == "adam":
        steps = max(1, round(2000 * scale))
        return descend(adam(model, language, steps), language, polish), steps + polish
    model = descend(model, language, polish)
    if arm in ("converged", "wide"):
        return model, polish
    if arm == "control":
        return descend(model, language, polish), 2 * polish
    noisy = max(1, round(scale * (10_000 if arm in ("adversarial", "batch-4") else int(arm.rpartition("-")[2]))))
    model = wander(model, language, noisy, batch_size=4 if arm == "batch-4" else 1, seed=seed)
    steps = noisy + 2 * polish
    if arm == "adversarial":
        more = max(1, round(1000 * scale))
        model = oppose(descend(model, language, polish), language, more, strength=options["strength"], seed=seed)
        steps += more + polish
    return descend(model, language, polish), steps


def _measured(model: Any, language: Any, seed: int) -> dict[str, float]:
    import torch

    from lossmith.probes import score_norms
    from lossmith.theory.equal_loss import one_shot_accuracy

    every = torch.arange(len(language.frequency))
    # Logits are bilinear: the Hessian's trace is that of the Fisher matrix, whatever the labels.
    norms, _ = score_norms(model.module(), [(every, torch.zeros_like(every))], labels="exact")
    return {
        "trace": float(norms.numpy() @ language.frequency),
        "accuracy": one_shot_accuracy(model, language, seed=seed),
        "gap": model.excess_loss(language),
    }


def _rank_correlation(
    own: str, measured: Mapping[str, float], seed: int, language: Any, options: Mapping[str, Any]
) -> float:
    """Of trace and accuracy, over some arms of this seed, one of which is measured already."""
    from scipy.stats import spearmanr

    found = [
        measured if arm == own else _measured(_trained(arm, seed, language, options)[0], language, seed)
        for arm in RANKED
    ]
    return float(spearmanr([f["trace"] for f in found], [f["accuracy"] for f in found]).statistic)


def _published(arm: str, seed: int, options: Mapping[str, Any]) -> Experiment:
    """A published checkpoint: loss and trace on a corpus, and a head on few labelled texts."""
    from transformers import AutoModelForCausalLM

    from lossmith.data import load_tokenizer
    from lossmith.probes import flatness

    started = time.perf_counter()
    name, revision = options["models"][arm]
    # A local folder holds one folder for each revision.
    local = Path(name) / str(revision)
    where, which = (str(local), {}) if local.is_dir() else (name, {"revision": revision})
    model: Any = AutoModelForCausalLM.from_pretrained(where, **which).float()
    tokenizer: Any = load_tokenizer(where)
    report = flatness(
        model,
        str(options["corpus"]),
        tokenizer=tokenizer,
        samples=int(options["samples"]),
        max_length=int(options["sequence_length"]),
        n_probes=int(options["n_probes"]),
        # Traces compare in one parameter space: smaller models are measured in that of the wide arms.
        **({} if arm.startswith("wide") else options["enlarged"]),
        seed=seed,
    )
    accuracy = _few_shot_accuracy(model, tokenizer, options, seed)
    metrics = {
        "trace": report.trace.trace,
        "accuracy": accuracy,
        "gap": report.trace.loss,
        "saturation": report.checkpoints[-1].saturation,
    }
    scored = report.trace.positions * (int(options["n_probes"]) + 2)
    return Experiment(metrics, Cost(seconds=time.perf_counter() - started, scored_tokens=scored))


def _few_shot_accuracy(model: Any, tokenizer: Any, options: Mapping[str, Any], seed: int) -> float:
    import datasets
    import numpy as np

    from lossmith.probes import extract_last_token_features

    source = str(options.get("data") or options["texts"])
    rows = (
        datasets.load_dataset("json", data_files=source, split="train")
        if Path(source).exists()
        else datasets.load_dataset(source, split="train")
    )
    if missing := {"text", "label"} - set(rows.column_names):
        raise InputError(f"{source} lacks {' and '.join(sorted(missing))}; it holds {', '.join(rows.column_names)}")
    rows = rows.shuffle(seed=0).select(range(min(len(rows), int(options["rows"]))))
    features = (
        extract_last_token_features(model, tokenizer, rows["text"], min_length=1, max_length=256).double().numpy()
    )
    labels = np.array(rows["label"])
    classes = np.unique(labels)
    rng, shots = np.random.default_rng(seed), int(options["shots"])
    least = min(int((labels == c).sum()) for c in classes)
    if len(classes) < 2 or least <= shots:
        raise InputError(
            f"{source} needs two classes or more with over {shots} texts each, got {least} in the smallest"
        )
    chosen = np.concatenate([rng.choice(np.flatnonzero(labels == c), shots, replace=False) for c in classes])
    rest = np.setdiff1d(np.arange(len(labels)), chosen)
    centred = features - features[chosen].mean(0)
    head = np.linalg.pinv(centred[chosen]) @ (labels[chosen, None] == classes)
    return float((classes[(centred[rest] @ head).argmax(1)] == labels[rest]).mean())


SMALL = {"models": None, "width": 32, "descent_steps": 4000, "scale": 1.0, "strength": 0.1}
PYTHIA = "EleutherAI/pythia-70m"

STUDY = Study(
    slug="flatness",
    family="probes",
    question="Of models with the same pre-training loss, does the flatter one do better downstream?",
    paper=Paper(
        "Same Pre-training Loss, Better Downstream: Implicit Bias Matters for Language Models", 2022, "2210.14199"
    ),
    arms=ARMS,
    baseline="converged",
    metric="accuracy",
    metrics=(
        "accuracy",
        "trace",
        "gap",
        "markov/accuracy",
        "markov/trace",
        "markov/gap",
        "grammar/accuracy",
        "grammar/trace",
        "grammar/gap",
        "rank_correlation",
        "markov/rank_correlation",
        "grammar/rank_correlation",
    ),
    lower_is_better=False,
    better={
        "trace": "lower",
        "markov/accuracy": "higher",
        "markov/trace": "lower",
        "grammar/accuracy": "higher",
        "grammar/trace": "lower",
    },
    claims=CLAIMS,
    seeds={"smoke": 2, "quick": 6, "full": 3},
    options={
        "smoke": {**SMALL, "descent_steps": 100, "scale": 0.01},
        "quick": SMALL,
        "full": {
            "models": {
                "converged": [PYTHIA, "step100000"],
                "control": [PYTHIA, "step101000"],
                "sgd-2000": [PYTHIA, "step102000"],
                "sgd-5000": [PYTHIA, "step105000"],
                "sgd-10000": [PYTHIA, "step110000"],
                "sgd-40000": [PYTHIA, "step140000"],
                "batch-4": [f"{PYTHIA}-seed2", "step100000"],
                "lookup": [f"{PYTHIA}-seed3", "step100000"],
                "adam": [f"{PYTHIA}-seed1", "step100000"],
                "adversarial": [f"{PYTHIA}-deduped", "step100000"],
                "wide": ["EleutherAI/pythia-410m", "step100000"],
                "wide-sgd-10000": ["EleutherAI/pythia-410m", "step110000"],
            },
            # From 512 to 1,024 and from 6 layers to 24: the heads of both are of size 64.
            "enlarged": {"enlarge": 2, "layers": 24},
            "corpus": "HuggingFaceFW/fineweb:sample-10BT:train",
            "samples": 1000,
            "sequence_length": 256,
            "n_probes": 4,
            "texts": "fancyzhx/ag_news",
            "rows": 4096,
            "shots": 16,
        },
    },
    experiment=experiment,
    data="labelled texts for the head: JSONL with text and label (at scale full)",
    notes=(
        "trace: of the Hessian of the population loss, exact; gap: nats beyond the language's optimum (at scale full: "
        "the loss itself, which no longer agrees between models, so that claims about traces mean little there). "
        "rank_correlation: Spearman's, of trace and accuracy over seven arms of a seed, noted with the arm sgd-40000.",
    ),
)
