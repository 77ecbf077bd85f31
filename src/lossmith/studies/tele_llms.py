"""Tele-LLMs: what does adapting a small model to a domain teach it, what does it forget, and is LoRA enough?

"Tele-LLMs: A Series of Specialized Large Language Models for Telecommunications", 2024, arXiv 2409.05314.

A small model is pre-trained on general text and trained further on two domains: full or by LoRA, on both or on one,
with or without general text replayed. Judged by the loss on held-out text of all three, and by questions: the second
halves of sentences of the domains, given the first (what a model recalls of its documents). ``--data`` takes the
user's own domains; ``full`` is TinyLlama on Tele-Data.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossmith.errors import InputError
from lossmith.files import write_text
from lossmith.reporting.comparison import Claim, Cost
from lossmith.studies.sharing import json_once
from lossmith.studies.study import Experiment, Paper, Study

if TYPE_CHECKING:
    from lossmith.data import PreparedCorpus

BASE, FULL = "base", "full"

ARMS = {
    BASE: "the model before adaptation",
    FULL: "all parameters, both domains",
    "full-low-rate": "the same at a third of the learning rate",
    "lora": "LoRA at the learning rate of full",
    "lora-high-rate": "LoRA at three times that",
    "only-first": "all parameters, the first domain alone",
    "only-second": "all parameters, the second domain alone",
    "replay": "all parameters, every second token general",
}
# What an arm changes: of the learning rate the multiple, of the domains those that count.
CHANGES: dict[str, dict[str, Any]] = {
    FULL: {},
    "full-low-rate": {"rate": 1 / 3},
    "lora": {"method": "lora"},
    "lora-high-rate": {"method": "lora", "rate": 3.0},
    "only-first": {"domains": (0,)},
    "only-second": {"domains": (1,)},
    "replay": {"replay": 0.5},
}

CLAIMS = (
    Claim("Adaptation lowers the loss on the first domain by 0.25", FULL, "first/loss", "lower", BASE, 0.25),
    Claim("It lowers the loss on the second domain by 0.15", FULL, "second/loss", "lower", BASE, 0.15),
    Claim("The model recalls more of its documents", FULL, "answer/loss", "lower", BASE),
    Claim("Nothing general is forgotten: within 0.05 nats", FULL, "general/loss", "lower", BASE, -0.05),
    Claim("LoRA learns less than 75 % as much", "lora", "first/share", "lower", FULL, 0.25),
    Claim("So does LoRA at three times the rate", "lora-high-rate", "first/share", "lower", FULL, 0.25),
    Claim("Gradients of LoRA are smaller", "lora", "gradient_norm", "lower", FULL),
    Claim("Replay prevents 80 % of the forgetting", "replay", "forgotten/share", "lower", FULL, 0.8),
    Claim("A specialist is better on its domain", "only-first", "first/loss", "lower", FULL),
    Claim("A specialist is worse on the other one", "only-first", "second/loss", "higher", FULL),
)


def experiment(arm: str, seed: int, options: Mapping[str, Any], folder: Path) -> Experiment:
    """One way of adapting the same model."""
    found, spent = _adapted(arm, seed, options)
    first, second = options["domains"]
    metrics = {
        "first/loss": found["losses"][first],
        "second/loss": found["losses"][second],
        "general/loss": found["losses"][options["general"]],
        "answer/loss": found["answer"],
    }
    if arm != BASE:
        full, base = (_adapted(name, seed, options)[0]["losses"] for name in (FULL, BASE))
        gain, lost = base[first] - full[first], full[options["general"]] - base[options["general"]]
        metrics |= {
            "gradient_norm": found["gradient_norm"],
            "first/share": (base[first] - metrics["first/loss"]) / gain,
            "forgotten/share": (metrics["general/loss"] - base[options["general"]]) / lost,
        }
    return Experiment(metrics, Cost(**spent))


def _adapted(arm: str, seed: int, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What an arm measured and what it cost, from its file or by training it now."""
    folder = Path(options["runs"]) / f"seed-{seed}" / arm

    def measured() -> dict[str, Any]:
        return _base(seed, options, folder) if arm == BASE else _train(arm, seed, options, folder)

    found = json_once(folder / "measured.json", measured)
    spent = found.pop("cost")
    return found, spent


def _base(seed: int, options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Pre-train a preset on half of the general text (the other half is for replay); else take the model as it is."""
    import transformers

    from lossmith.data import load_prepared
    from lossmith.training.adaptation import adapt_language_model, domain_losses
    from lossmith.training.models import PRESETS, build_model

    transformers.utils.logging.disable_progress_bar()
    corpus = load_prepared(options["corpus"])
    transformers.set_seed(seed)
    length = int(options["sequence_length"])
    model: Any = build_model(options["model"], vocab_size=len(corpus.tokenizer), sequence_length=length)
    cost = {"tokens": 0, "steps": 0, "seconds": 0.0, "flops": 0.0}
    if options["model"] in PRESETS:
        half = dataclasses.replace(corpus, train=_general_half(corpus, options, 0))
        model, done = adapt_language_model(
            model,
            half,
            folder=folder / "trainer",
            domains=[options["general"]],
            general=None,
            steps=int(options["pretrain_steps"]),
            batch_size=int(options["batch_size"]),
            seed=seed,
            eval_rows=1,
            learning_rate=float(options["pretrain_learning_rate"]),
        )
        cost = {name: getattr(done, name) for name in cost}
        model.save_pretrained(folder / "model")
    rows = _validation(corpus, options)
    losses = domain_losses(model, corpus, rows=rows, folder=folder / "trainer", batch_size=int(options["batch_size"]))
    return {"losses": losses, "answer": _answer_loss(model, corpus, options), "gradient_norm": None, "cost": cost}


def _train(arm: str, seed: int, options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    import transformers

    from lossmith.data import load_prepared
    from lossmith.training.adaptation import adapt_language_model
    from lossmith.training.models import PRESETS, build_model

    _, before = _adapted(BASE, seed, options)
    transformers.utils.logging.disable_progress_bar()
    corpus = load_prepared(options["corpus"])
    changes = CHANGES[arm]
    if options["model"] in PRESETS:
        name = str(Path(options["runs"]) / f"seed-{seed}" / BASE / "model")
        corpus = dataclasses.replace(corpus, train=_general_half(corpus, options, 1))
    else:
        name = options["model"]
    transformers.set_seed(seed)
    shape: dict[str, Any] = {"vocab_size": len(corpus.tokenizer), "sequence_length": int(options["sequence_length"])}
    model, done = adapt_language_model(
        build_model(name, **shape),
        corpus,
        folder=folder / "trainer",
        domains=[options["domains"][i] for i in changes.get("domains", (0, 1))],
        general=options["general"],
        replay_fraction=changes.get("replay", 0.0),
        method=changes.get("method", "full"),
        rank=int(options["rank"]),
        steps=int(options["steps"]),
        batch_size=int(options["batch_size"]),
        micro_batch_size=options["micro_batch_size"],
        # Not the order in which the base was trained.
        seed=1000 + seed,
        eval_rows=options["eval_rows"],
        learning_rate=float(options["learning_rate"]) * changes.get("rate", 1.0),
        **options["arguments"],
    )
    cost = {name: before[name] + getattr(done, name) for name in before}
    answer = _answer_loss(model, corpus, options)
    return {"losses": done.after, "answer": answer, "gradient_norm": done.gradient_norm, "cost": cost}


def _validation(corpus: PreparedCorpus, options: Mapping[str, Any]) -> list[int]:
    """The rows on which all arms are judged."""
    from lossmith.training.adaptation import AdaptationRows

    return list(AdaptationRows.of(corpus, None, options["general"], options["eval_rows"]).validation)


def _general_half(corpus: PreparedCorpus, options: Mapping[str, Any], half: int) -> Any:
    """The training rows with every second of the general ones only: of half 0 or 1."""
    import numpy as np

    general = corpus.train.data.column("domain").to_numpy() == corpus.domains.index(options["general"])
    number = np.cumsum(general) - 1
    return corpus.train.select(np.flatnonzero(~general | (number % 2 == half)).tolist()).flatten_indices()


def _answer_loss(model: Any, corpus: PreparedCorpus, options: Mapping[str, Any]) -> float:
    """Nats per token of the answers to the study's questions: the logarithm of their perplexity."""
    import math

    from lossmith.data.questions import read_questions
    from lossmith.tasks.text.answer_metrics import answer_perplexity
    from lossmith.tasks.text.question_answering import answer_losses

    questions = read_questions(options["questions_file"]).questions[: int(options["questions"])]
    length = {"max_length": int(options["sequence_length"]), "batch_size": int(options["batch_size"])}
    nats, tokens = answer_losses(model, corpus.tokenizer, questions, prompt=options["prompt"], **length)
    return math.log(answer_perplexity(nats, tokens))


def prepare(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The text, split and tokenised once, and the questions."""
    from lossmith.data import prepare as prepare_corpus
    from lossmith.data import read_corpus
    from lossmith.training.adaptation import combine_sources
    from lossmith.training.models import PRESETS

    path = folder / "corpus.jsonl"
    fields = {"text_field": options["text_field"], "category_field": options["category_field"]}
    if not path.exists():
        if options["data"] == "python":
            write_text(path, _embedded(int(options["characters"])))
        elif options["general_data"] is not None:
            combine_sources(options["data"], options["general_data"], path, **fields)
        else:
            documents = read_corpus(
                options["data"], text_field=options["text_field"], domain_field=options["category_field"]
            )
            write_text(path, "".join(json.dumps({"text": d.text, "domain": d.domain}) + "\n" for d in documents))
    corpus = prepare_corpus(
        path,
        domain_field="domain",
        tokenizer=None if options["model"] in PRESETS else options["model"],
        vocab_size=int(options["vocab_size"]),
        sequence_length=int(options["sequence_length"]),
        packing="concatenated",
        validation_fraction=float(options["validation_fraction"]),
    )
    domains = list(options["domains"] or [name for name in corpus.domains if name != options["general"]][:2])
    missing = [name for name in (*domains, options["general"]) if name not in corpus.domains]
    if len(domains) != 2 or missing:
        raise InputError(
            f"the study needs general text, called '{options['general']}', and two domains; {options['data']} has: "
            f"{', '.join(corpus.domains)} (set general= and domains=)"
        )
    for split, rows in (("train", corpus.train), ("be judged", corpus.validation)):
        there = set(rows.data.column("domain").to_pylist())
        for name in (*domains, options["general"]):
            if corpus.domains.index(name) not in there:
                raise InputError(f"{options['data']} has too little text of '{name}' to {split} on; give more of it")
    questions = options["questions_file"] or str(_write_cloze(path, domains, options, folder))
    return {
        "corpus": str(corpus.folder),
        "runs": str(folder / "adapted"),
        "domains": domains,
        "questions_file": questions,
    }


def _write_cloze(path: Path, domains: list[str], options: Mapping[str, Any], folder: Path) -> Path:
    """Questions from all over the domains' text."""
    from lossmith.data import read_corpus
    from lossmith.data.questions import QuestionSet, cloze_questions

    documents = [d for d in read_corpus(path, domain_field="domain") if d.domain in domains]
    found = cloze_questions(documents)
    every = max(1, len(found) // int(options["questions"]))
    if not found:
        raise InputError(f"there is no sentence in {options['data']} to make a question of; set questions_file=")
    QuestionSet(tuple(found[::every])).write(folder / "questions.jsonl")
    return folder / "questions.jsonl"


def _embedded(characters: int) -> str:
    """General text is code; the domains are the language reference and docstrings of the standard library."""
    from lossmith.data import read_corpus

    left = {"code": characters, "reference": characters, "docstrings": characters}

    def lines() -> Iterator[str]:
        for document in read_corpus("python"):
            name = "code"
            if document.domain == "docs":
                name = "reference" if document.source.startswith("topic ") else "docstrings"
            if left[name] > 0:
                left[name] -= len(document.text)
                yield json.dumps({"text": document.text, "domain": name}) + "\n"

    return "".join(lines())


EMBEDDED: dict[str, Any] = {
    "data": "python",
    "general_data": None,
    "text_field": "text",
    "category_field": None,
    "general": "code",
    "domains": ["reference", "docstrings"],
    "questions_file": None,
    "validation_fraction": 0.1,
    "prompt": "{question}",
    "model": "nano",
    # Bytes: losses are nats per byte.
    "vocab_size": 257,
    "sequence_length": 96,
    "batch_size": 16,
    "micro_batch_size": None,
    "rank": 4,
    "pretrain_learning_rate": 8e-3,
    "learning_rate": 2e-3,
    "arguments": {},
}

STUDY = Study(
    slug="tele-llms",
    family="data",
    question="What does adapting a model to a domain teach it, what does it forget, and is LoRA enough?",
    paper=Paper(
        "Tele-LLMs: A Series of Specialized Large Language Models for Telecommunications",
        2024,
        "2409.05314",
    ),
    arms=ARMS,
    baseline=BASE,
    metric="first/loss",
    metrics=(
        "first/loss",
        "second/loss",
        "general/loss",
        "answer/loss",
        "gradient_norm",
        "first/share",
        "forgotten/share",
    ),
    better={"second/loss": "lower", "general/loss": "lower", "answer/loss": "lower"},
    claims=CLAIMS,
    seeds={"smoke": 2, "quick": 4, "full": 3},
    options={
        "smoke": {
            **EMBEDDED,
            "characters": 100_000,
            "validation_fraction": 0.2,
            "questions": 8,
            "eval_rows": 8,
            "pretrain_steps": 20,
            "steps": 8,
        },
        "quick": {
            **EMBEDDED,
            "characters": 500_000,
            "questions": 200,
            "eval_rows": 150,
            "pretrain_steps": 600,
            "steps": 150,
        },
        "full": {
            **EMBEDDED,
            "data": "AliMaatouk/Tele-Data",
            "general_data": "DKYoon/SlimPajama-6B",
            "text_field": "content",
            "category_field": "category",
            "general": "general",
            "domains": ["arxiv", "standard"],
            "prompt": "Question: {question}\nAnswer:",
            "model": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
            "vocab_size": 32_000,
            "characters": 0,
            "sequence_length": 2048,
            "batch_size": 256,
            "micro_batch_size": 4,
            "rank": 16,
            "learning_rate": 4e-5,
            "questions": 10_000,
            "eval_rows": 500,
            "pretrain_steps": 0,
            "steps": 4800,
            "arguments": {"bf16": True, "gradient_checkpointing": True},
        },
    },
    experiment=experiment,
    prepare=prepare,
    data="a folder with one sub-folder of general text (set general=) and two of domains, or a table with a field "
    "that names them (set category_field=)",
    notes=(
        "first, second and general: nats per token (bytes in the embedded corpus) on held-out text; answer/loss: nats "
        "per token of the second halves of sentences of the domains, given the first. first/share: the fall of the "
        "first domain's loss, forgotten/share: the rise of the general loss, both as parts of those of full.",
        "Costs include pre-training, which all arms share.",
    ),
)
