"""D-Pruner: can half of the weights go so that a domain keeps its quality, and general text too?

"Pruning as a Domain-specific LLM Extractor", NAACL 2024 Findings, arXiv 2405.06275.

A small language model learns from English documentation (general) and some code (the domain), once for each seed; every
arm prunes that model, without training it again, and is judged on other passages of both. ``--data`` takes the user's
own two domains; ``full`` prunes a published model for a textbook's domain.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lossmith.reporting.comparison import Claim, Cost
from lossmith.studies.selection_pool import passages_of_two, save_tokenizer, take, write_part
from lossmith.studies.sharing import json_once
from lossmith.studies.study import Experiment, Paper, Study

ARMS = {
    "magnitude": "the smallest of each matrix",
    "wanda": "magnitude times norm of the input, on general text",
    "sparsegpt": "Optimal Brain Surgeon with compensation, on general text",
    "sparsegpt-domain": "the same, on the domain's text",
    "general-only": "D-Pruner's general importance alone, nothing made up for",
    "domain-only": "the domain's gradient alone (no penalty)",
    "d-pruner": "both, the penalty as configured in the paper",
    "d-pruner-ratio": "both, the penalty's gradient ten times the loss's, in the scores alone (ours)",
    "dense": "nothing is removed",
}

CLAIMS = (
    Claim("D-Pruner keeps the domain better than SparseGPT", "d-pruner", "domain/loss@0.5", "lower", "sparsegpt"),
    Claim("It keeps the domain better than magnitude", "d-pruner", "domain/loss@0.5", "lower", "magnitude"),
    Claim("It keeps general text better than the domain alone", "d-pruner", "general/loss@0.5", "lower", "domain-only"),
    Claim("It keeps the domain better than general importance", "d-pruner", "domain/loss@0.5", "lower", "general-only"),
    Claim(
        "With a penalty that counts: general text better than the domain alone",
        "d-pruner-ratio",
        "general/loss@0.5",
        "lower",
        "domain-only",
    ),
    Claim(
        "With a penalty that counts: the domain better than general importance",
        "d-pruner-ratio",
        "domain/loss@0.5",
        "lower",
        "general-only",
    ),
    Claim("Both texts together better than the domain alone", "d-pruner-ratio", "both/loss@0.5", against="domain-only"),
    Claim("And better than general importance alone", "d-pruner-ratio", "both/loss@0.5", against="general-only"),
    Claim("SparseGPT beats magnitude on general text", "sparsegpt", "general/loss@0.5", "lower", "magnitude"),
)

# Disjoint passages, by what they are for.
PARTS = ("training", "domain", "general", "domain_validation", "general_validation")
SPARSITIES = (0.5, 0.7)


def prepare(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Cut both texts into passages, write disjoint parts and the tokenizer."""
    parts = folder / "parts"
    if not (parts / "tokenizer" / "tokenizer_config.json").exists():
        domain, general = _sources(options)
        chosen: dict[str, list[str]] = {}
        for name in PARTS[1:]:
            texts, what = (domain, "target domain") if name.startswith("domain") else (general, "other domains")
            chosen[name] = take(texts, int(options[name]), what, name)
        number = int(options["training"])
        share = round(float(options["domain_share"]) * number)
        chosen["training"] = take(domain, share, "target domain", "training")
        chosen["training"] += take(general, number - share, "other domains", "training")
        for name, texts in chosen.items():
            write_part(parts, name, ({"text": text} for text in texts))
        save_tokenizer(options["model"], lambda: chosen["training"], options, parts)
    return {"parts": str(parts)}


def _sources(options: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Passages of the domain and of general text: two domains of one corpus, or two corpora."""
    from itertools import islice

    from lossmith.data import read_corpus

    if options["data"] is not None:
        return passages_of_two(options)
    found = []
    needed = sum(int(options[name]) for name in PARTS)
    for source, column in (
        (options["domain_data"], "domain_field_text"),
        (options["general_data"], "general_field_text"),
    ):
        documents = islice(read_corpus(source, text_field=options[column]), 4 * needed)
        found.append(list(dict.fromkeys(document.text for document in documents)))
    return found[0], found[1]


def experiment(arm: str, seed: int, options: Mapping[str, Any], folder: Path) -> Experiment:
    """Prune the seed's model by one method at each sparsity; losses in nats per token on both held-out texts."""
    from lossmith.data import load_tokenizer
    from lossmith.sparsity import TextEvaluation, apply_masks, prune

    tokenizer: Any = load_tokenizer(Path(options["parts"]) / "tokenizer")
    model = _dense_model(seed, options, folder.parents[2] / "models" / f"seed-{seed}", tokenizer)
    length = int(options["sequence_length"])
    scored = {
        name: TextEvaluation([tokenizer(t, truncation=True, max_length=length)["input_ids"] for t in texts])
        for name in ("domain", "general")
        if (texts := _read(options, f"{name}_validation"))
    }
    started = time.perf_counter()
    metrics: dict[str, float] = {}
    spent = {"steps": 0, "tokens": 0, "scored_tokens": 0}
    masks = _shared_masks(arm, seed, options, model, tokenizer, spent)
    for sparsity in SPARSITIES:
        pruned = copy.deepcopy(model)
        if sparsity in masks:
            apply_masks(pruned, masks[sparsity])
        elif arm != "dense":
            text = "domain" if arm == "sparsegpt-domain" else "general"
            own: dict[str, Any] = {"method": "uniform"} if arm == "magnitude" else {"method": arm.split("-")[0]}
            if arm != "magnitude":
                rows = _rows(options, tokenizer, text, seed)
                spent["scored_tokens"] = sum(row["input_ids"].numel() for row in rows)
                own["calibration"] = rows
            prune(pruned, sparsity, seed=seed, **own)
        losses = {name: _mean(evaluate(pruned)) for name, evaluate in scored.items()}
        metrics |= {f"{name}/loss@{sparsity:g}": value for name, value in losses.items()}
        metrics[f"both/loss@{sparsity:g}"] = sum(losses.values()) / 2
    return Experiment(metrics, Cost(seconds=time.perf_counter() - started, **spent))


def _shared_masks(
    arm: str, seed: int, options: Mapping[str, Any], model: Any, tokenizer: Any, spent: dict[str, int]
) -> dict[float, Any]:
    """Masks of arms whose importance is computed once for all sparsities."""
    from lossmith.sparsity import dual_importance, general_importance, importance_masks, text_batches

    if arm not in ("general-only", "domain-only", "d-pruner", "d-pruner-ratio"):
        return {}
    importance: Any = None
    if arm != "domain-only":
        rows = _rows(options, tokenizer, "general", seed)
        importance = general_importance(model, rows, sparsity=SPARSITIES[0])
        spent["scored_tokens"] = sum(row["input_ids"].numel() for row in rows)
    if arm != "general-only":
        texts = _shuffled(_read(options, "domain"), seed)
        batches = text_batches(texts, tokenizer, max_length=int(options["sequence_length"]))
        epochs = int(options["epochs"])
        ratio: dict[str, Any] = {"reg_ratio": 10.0, "reg_in_update": False} if arm == "d-pruner-ratio" else {}
        found = dual_importance(model, batches, general=importance, epochs=epochs, **ratio)
        importance = found.scores
        spent["steps"] = len(found.losses)
        spent["tokens"] = epochs * sum(batch["input_ids"].numel() for batch in batches)
    return {sparsity: importance_masks(model, importance, sparsity) for sparsity in SPARSITIES}


def _dense_model(seed: int, options: Mapping[str, Any], folder: Path, tokenizer: Any) -> Any:
    """The model that all arms of a seed prune: trained by whichever comes first, or the one that is named."""
    import transformers

    from lossmith.sparsity import load_causal_model
    from lossmith.training.models import build_model
    from lossmith.training.text_training import train_on_texts

    if options["model"] is not None:
        return load_causal_model(options["model"])[0]
    length = int(options["sequence_length"])

    def train() -> dict[str, float]:
        transformers.set_seed(seed)
        model: Any = build_model(options["preset"], vocab_size=len(tokenizer), sequence_length=length)
        cost = train_on_texts(
            model,
            tokenizer,
            _read(options, "training"),
            folder=folder / "run",
            epochs=float(options["training_epochs"]),
            batch_size=int(options["batch_size"]),
            max_length=length,
            seed=seed,
            learning_rate=float(options["learning_rate"]),
        )
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        return cost

    json_once(folder / "cost.json", train)
    return load_causal_model(str(folder / "model"))[0]


def _rows(options: Mapping[str, Any], tokenizer: Any, name: str, seed: int) -> list[dict[str, Any]]:
    from lossmith.sparsity import calibration_rows

    length, samples = int(options["calibration_length"]), int(options["samples"])
    return calibration_rows(_shuffled(_read(options, name), seed), tokenizer, samples=samples, length=length, seed=seed)


def _read(options: Mapping[str, Any], name: str) -> list[str]:
    lines = (Path(options["parts"]) / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line)["text"] for line in lines if line]


def _shuffled(texts: Sequence[str], seed: int) -> list[str]:
    import random

    return random.Random(seed).sample(texts, len(texts))


def _mean(measured: Any) -> float:
    values, tokens = measured
    return float((values * tokens).sum() / tokens.sum())


SMALL = {
    "data": "python",
    "target_domain": "code",
    "text_field": "text",
    "domain_field": None,
    "model": None,
    "preset": "tiny",
    "vocab_size": 512,
    "characters": 256,
    "sequence_length": 128,
    "calibration_length": 128,
    "domain_share": 0.25,
    "batch_size": 8,
    "learning_rate": 6e-3,
    "training_epochs": 1,
    "domain_data": None,
    "domain_field_text": "text",
    "general_data": None,
    "general_field_text": "text",
}

STUDY = Study(
    slug="d-pruner",
    family="sparsity",
    question="Can half of the weights go so that a domain keeps its quality, and general text too?",
    paper=Paper("Pruning as a Domain-specific LLM Extractor", 2024, "2405.06275"),
    arms=ARMS,
    baseline="magnitude",
    metric="domain/loss@0.5",
    metrics=(
        "domain/loss@0.5",
        "general/loss@0.5",
        "both/loss@0.5",
        "domain/loss@0.7",
        "general/loss@0.7",
        "both/loss@0.7",
    ),
    better={f"{name}/loss@{s:g}": "lower" for name in ("domain", "general", "both") for s in SPARSITIES},
    claims=CLAIMS,
    seeds={"smoke": 2, "quick": 5, "full": 3},
    options={
        "smoke": {
            **SMALL,
            "preset": "nano",
            "training": 64,
            "domain": 16,
            "general": 32,
            "domain_validation": 8,
            "general_validation": 8,
            "samples": 8,
            "epochs": 1,
        },
        "quick": {
            **SMALL,
            "training": 2800,
            "domain": 160,
            "general": 320,
            "domain_validation": 40,
            "general_validation": 40,
            "samples": 64,
            "epochs": 1,
        },
        "full": {
            **SMALL,
            "data": None,
            "target_domain": None,
            "model": "Qwen/Qwen2.5-0.5B",
            "domain_data": "MedRAG/textbooks",
            "domain_field_text": "content",
            "general_data": "Salesforce/wikitext:wikitext-103-raw-v1:train",
            "sequence_length": 1024,
            "calibration_length": 2048,
            "training": 0,
            "domain": 1000,
            "general": 20000,
            "domain_validation": 300,
            "general_validation": 300,
            "samples": 128,
            "epochs": 5,
        },
    },
    prepare=prepare,
    experiment=experiment,
    data="a corpus of two domains: a folder of folders (set target_domain), or a file with domain_field",
    notes=(
        "domain/loss@s, general/loss@s: nats per token on held-out passages with a share s of each matrix of the "
        "blocks removed and no training afterwards; both: their mean. dense: the whole model, at every s.",
        "Seeds change the model's start, the order of its training, and the calibration rows; passages are the same.",
        "General importance is computed at half sparsity for both sparsities. Cost: tokens and steps of the domain's "
        "fine-tuning, scored tokens of calibration; the training that all arms share is not counted.",
    ),
)
