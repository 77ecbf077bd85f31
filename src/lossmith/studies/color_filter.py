"""CoLoR-Filter: can two small models find the data that a target domain needs, and how much data does that save?

"CoLoR-Filter: Conditional Loss Reduction Filtering for Targeted Language Model Pre-training", 2024, arXiv 2406.10670.

A pool of passages, nine in ten of them code, hides one in ten of English documentation. Each method keeps a tenth
of the pool; a language model is trained on it from random weights in a single pass and judged on other documentation.
Random selections of 2, 4 and 8 times the size say how much data the choice is worth. ``--data`` takes the user's own
domains; ``full`` finds books in web text with GPT-2.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossmith.reporting.comparison import Claim, Cost
from lossmith.studies.selection_pool import (
    auc,
    new_model,
    prepare_parts,
    read_part,
    scored_pool,
    training_options,
)
from lossmith.studies.sharing import tensors_once
from lossmith.studies.study import Experiment, Paper, Study

if TYPE_CHECKING:
    import numpy as np

    from lossmith.studies.selection_pool import Text

ARMS = {
    "random": "a tenth of the pool, drawn at random",
    "random-2x": "twice as much, at random",
    "random-4x": "four times as much",
    "random-8x": "eight times as much",
    "conditional-only": "the lowest loss under the model of the target",
    "color-filter": "the largest fall of the loss from the generic model to the model of the target",
    "rho-down": "online: the largest gap between the learner's loss and that of the model of the target",
    "ngram-importance": "resampled by hashed n-grams, after DSIR",
    "oracle": "all passages of the target domain",
}

CLAIMS = (
    Claim("CoLoR-Filter beats random data of the same size", "color-filter", "target/loss", "lower"),
    Claim("It beats twice the data at random", "color-filter", "target/loss", "lower", "random-2x"),
    Claim("It beats four times the data at random", "color-filter", "target/loss", "lower", "random-4x"),
    Claim("It beats eight times the data at random", "color-filter", "target/loss", "lower", "random-8x"),
    Claim(
        "It beats selection by the conditional loss alone", "color-filter", "target/loss", "lower", "conditional-only"
    ),
    Claim(
        "It beats RHO-down, whose learner has to start from nothing", "color-filter", "target/loss", "lower", "rho-down"
    ),
    Claim("It beats n-gram importance", "color-filter", "target/loss", "lower", "ngram-importance"),
    Claim(
        "It finds the target better (AUC) than the conditional loss by 0.2",
        "color-filter",
        "auc",
        "higher",
        "conditional-only",
        0.2,
    ),
)


def experiment(arm: str, seed: int, options: Mapping[str, Any], folder: Path) -> Experiment:
    """Select by one method, train on it, judge on held-out text of the target domain."""
    import numpy as np

    from lossmith.data import language_model_scorer, load_tokenizer, score_texts
    from lossmith.training.text_training import train_on_texts

    started = time.perf_counter()
    parts = Path(options["parts"])
    pool = read_part(parts, "pool")
    tokenizer = load_tokenizer(parts / "tokenizer")
    model: Any = new_model(options, tokenizer, seed, target=True)
    spent = {"tokens": 0.0, "scored_tokens": 0.0, "flops": 0.0}
    metrics: dict[str, float] = {}
    if arm == "rho-down":
        chosen, steps, spent = _rho_down(model, tokenizer, pool, seed, options, folder)
    else:
        scores, spent = _scores(arm, pool, seed, options)
        chosen = _chosen(arm, scores, pool, seed, options)
        if arm in ("color-filter", "conditional-only", "ngram-importance"):
            metrics["auc"] = auc(scores, [text.is_target for text in pool])
        texts = [pool[i].text for i in chosen]
        used = train_on_texts(model, tokenizer, texts, folder=folder, seed=seed, **training_options(options))
        steps = int(used["steps"])
        spent = {**spent, "tokens": spent["tokens"] + used["tokens"], "flops": spent["flops"] + used["flops"]}
    validation = [text.text for text in read_part(parts, "validation")]
    judge = language_model_scorer(model, tokenizer, max_length=int(options["sequence_length"]))
    nats, tokens = score_texts(judge, validation)
    metrics |= {
        "target/loss": float(nats.sum() / tokens.sum()),
        "purity": float(np.mean([pool[i].is_target for i in chosen])),
        "kept": float(len(chosen)),
    }
    cost = Cost(
        tokens=round(spent["tokens"]),
        steps=steps,
        seconds=time.perf_counter() - started,
        flops=spent["flops"],
        scored_tokens=round(spent["scored_tokens"]),
    )
    return Experiment(metrics, cost)


def _scores(arm: str, pool: list[Text], seed: int, options: Mapping[str, Any]) -> tuple[np.ndarray, dict[str, float]]:
    """One number per passage of the pool, the lowest to be kept, and the tokens that it took."""
    import numpy as np

    from lossmith.data import color_filter_scores, resampling_scores

    free = {"tokens": 0.0, "scored_tokens": 0.0, "flops": 0.0}
    if arm == "ngram-importance":
        return resampling_scores(_log_weights(pool, options), seed=seed), free
    if arm in ("color-filter", "conditional-only"):
        table, spent = scored_pool(seed, options)
        nats, tokens = table.column("conditional/nats"), table.column("conditional/tokens")
        marginal = table.column("marginal/nats") if arm == "color-filter" else np.zeros(len(table))
        if arm == "conditional-only":
            spent = {**spent, "scored_tokens": spent["scored_tokens"] / 2}
        return color_filter_scores(marginal, nats, tokens), spent
    return np.array([0.0 if text.is_target else 1.0 for text in pool]), free


def _log_weights(pool: list[Text], options: Mapping[str, Any]) -> np.ndarray:
    """The pool's importance by n-grams: of every seed the same, counted once."""
    import torch

    from lossmith.data import NgramImportance

    def count() -> dict[str, torch.Tensor]:
        texts = [text.text for text in pool]
        target = [text.text for text in read_part(options["parts"], "target")]
        return {"log_weights": torch.from_numpy(NgramImportance.fit(target, texts).log_weights(texts))}

    return tensors_once(Path(options["parts"]).parent / "ngrams.safetensors", count)["log_weights"].numpy()


def _chosen(arm: str, scores: np.ndarray, pool: list[Text], seed: int, options: Mapping[str, Any]) -> np.ndarray:
    from lossmith.data import select_at_random, select_lowest

    if arm.startswith("random"):
        times = int(arm.removeprefix("random").strip("-x") or 1)
        number = min(len(pool), times * (len(pool) // int(options["tau"])))
        return select_at_random(len(pool), number, seed=seed)
    return select_lowest(scores, tau=int(options["tau"]))


def _rho_down(
    model: Any, tokenizer: Any, pool: list[Text], seed: int, options: Mapping[str, Any], folder: Path
) -> tuple[np.ndarray, int, dict[str, float]]:
    """As the other arms' training, except that each batch is chosen when its turn comes.

    The fixed model is the conditional one (the paper's "RHO-down + prior").
    """
    import numpy as np
    import torch
    import transformers

    from lossmith.data import PaddedCollator, language_model_scorer, rho_down
    from lossmith.data.scoring_model import score_ids
    from lossmith.training import NextToken

    table, spent = scored_pool(seed, options)
    fixed = table.column("conditional/nats") / table.column("conditional/tokens")
    training, tau = training_options(options), int(options["tau"])
    number, length = len(pool) // tau, int(training["max_length"])
    steps = -(-number // training["batch_size"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=training["learning_rate"], betas=(0.9, 0.95), weight_decay=0.0)
    schedule = transformers.get_scheduler("cosine", optimizer, max(1, steps // 20), steps)
    collate, objective = PaddedCollator(int(tokenizer.pad_token_id)), NextToken()
    scorer = language_model_scorer(model, tokenizer, max_length=length)
    encoded = scorer.encode([text.text for text in pool])
    seen = {"trained": 0, "scored": 0}

    def learner_losses(chosen: np.ndarray) -> np.ndarray:
        nats, tokens = score_ids(scorer, [encoded[i] for i in chosen])
        seen["scored"] += int(tokens.sum())
        return nats / tokens

    def learn(chosen: np.ndarray) -> None:
        rows = [{"input_ids": encoded[i].tolist()[:length]} for i in chosen]
        batch = {name: value.to(device) for name, value in collate(rows).items()}
        objective(model, batch).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        seen["trained"] += sum(len(row["input_ids"]) for row in rows)

    chosen = rho_down(
        fixed, learner_losses, learn, number=number, batch_size=int(training["batch_size"]), tau=tau, seed=seed
    )
    spent = {
        "tokens": spent["tokens"] + seen["trained"],
        "scored_tokens": spent["scored_tokens"] / 2 + seen["scored"],
        "flops": spent["flops"],
    }
    return np.asarray(chosen), steps, spent


PARTS = {
    "data": "python",
    "text_field": "text",
    "domain_field": None,
    "target_domain": None,
    "target_share": 0.1,
    "tau": 10,
    "model": "nano",
    "target_model": "nano",
    "learning_rate": 8e-3,
    "batch_size": 16,
    "prior_epochs": 1,
}

STUDY = Study(
    slug="color-filter",
    family="data",
    question="Can two small models find the data that a target domain needs, and how much data does that save?",
    paper=Paper(
        "CoLoR-Filter: Conditional Loss Reduction Filtering for Targeted Language Model Pre-training",
        2024,
        "2406.10670",
    ),
    arms=ARMS,
    baseline="random",
    metric="target/loss",
    metrics=("target/loss", "auc", "purity", "kept"),
    claims=CLAIMS,
    seeds={"smoke": 2, "quick": 5, "full": 3},
    options={
        "smoke": {
            **PARTS,
            "characters": 120,
            "pool": 240,
            "prior": 160,
            "target": 60,
            "validation": 20,
            "vocab_size": 300,
            "sequence_length": 128,
        },
        "quick": {
            **PARTS,
            "batch_size": 4,
            "characters": 128,
            "pool": 4_800,
            "prior": 1_600,
            "target": 300,
            "validation": 300,
            "vocab_size": 512,
            "sequence_length": 128,
        },
        "full": {
            **PARTS,
            "data": "DKYoon/SlimPajama-6B",
            "domain_field": "meta.redpajama_set_name",
            "target_domain": "RedPajamaBook",
            "target_share": 0.04,
            "tau": 16,
            "model": "openai-community/gpt2",
            "target_model": "openai-community/gpt2",
            "prior_epochs": 0,
            "learning_rate": 1e-3,
            "batch_size": 256,
            "characters": 2_000,
            "pool": 1_600_000,
            "prior": 1,
            "target": 12_000,
            "validation": 2_000,
            "vocab_size": None,
            "sequence_length": 512,
        },
    },
    experiment=experiment,
    prepare=prepare_parts,
    data="text in several domains, of which the smallest (or target_domain) is the target",
    better={"auc": "higher", "purity": "higher"},
    notes=(
        "target/loss: nats per token on held-out text of the target domain. auc: how often a passage of the target "
        "ranks before another. purity: share of the target domain in what was kept; kept: passages. Tokens include the "
        "training of the two small models, scored tokens their passes over the pool.",
    ),
)
