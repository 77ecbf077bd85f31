"""Runs of continual pre-training that several arms of a study share: each is trained once per seed and kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossmith.errors import InputError
from lossmith.files import read_json, write_text
from lossmith.studies.sharing import json_once

if TYPE_CHECKING:
    from lossmith.data import PreparedCorpus
    from lossmith.training.continual import MixtureLog, MixtureRows


def prepare_corpus(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Read, split and tokenise the text once; returns where it is and where runs are kept.

    The embedded corpus is cut to ``characters`` of either domain. A preset trains its tokenizer, a model by path or
    hub id brings its own.
    """
    from lossmith.data import prepare
    from lossmith.training.models import PRESETS

    source, fields = options["data"], {"text_field": options["text_field"], "domain_field": options["domain_field"]}
    if source == "python":
        source, fields = folder / "corpus.jsonl", {"domain_field": "domain"}
        if not source.exists():
            write_text(source, _excerpt(int(options["characters"])))
    corpus = prepare(
        source,
        tokenizer=None if options["model"] in PRESETS else options["model"],
        vocab_size=int(options["vocab_size"]),
        sequence_length=int(options["sequence_length"]),
        packing="concatenated",
        **fields,
    )
    _rows(corpus, options)
    return {"corpus": str(corpus.folder), "logs": str(folder / "logs")}


def mixture_log(seed: int, ratio: float, options: Mapping[str, Any]) -> MixtureLog:
    """The log of one share of domain data under one seed: from its file, or by training it now."""
    from lossmith.training.continual import MixtureLog, continual_pretraining

    folder = Path(options["logs"]) / f"seed-{seed}" / f"share-{ratio:.4f}"

    def train() -> dict[str, Any]:
        model, corpus, _ = base_model(seed, options)
        log = continual_pretraining(
            model,
            corpus,
            _replayed(corpus, options),
            ratio=ratio,
            steps=int(options["steps"]),
            batch_size=int(options["batch_size"]),
            micro_batch_size=options["micro_batch_size"],
            # Not the order in which the base was trained.
            seed=1000 + seed,
            folder=folder / "trainer",
            evaluations=int(options["evaluations"]),
            learning_rate=float(options["learning_rate"]),
            per_device_eval_batch_size=int(options["eval_batch_size"]),
        )
        return dataclasses.asdict(log)

    found = json_once(folder / "log.json", train)
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in found.items()}
    return MixtureLog(**values)


def base_model(seed: int, options: Mapping[str, Any]) -> tuple[Any, PreparedCorpus, dict[str, float]]:
    """The model before continual pre-training, the corpus, and what pre-training cost (tokens, steps, FLOPs, seconds).

    A preset is pre-trained here on half of the general text; the other half is what continual pre-training replays. A
    model by path or hub id is taken as it is.
    """
    import transformers

    from lossmith.data import load_prepared
    from lossmith.training.continual import continual_pretraining
    from lossmith.training.models import PRESETS, build_model

    transformers.utils.logging.disable_progress_bar()
    corpus = load_prepared(options["corpus"])
    shape: dict[str, Any] = {"vocab_size": len(corpus.tokenizer), "sequence_length": int(options["sequence_length"])}
    if options["model"] not in PRESETS:
        transformers.set_seed(seed)
        return (
            build_model(options["model"], **shape),
            corpus,
            dict.fromkeys(("tokens", "steps", "flops", "seconds"), 0.0),
        )
    folder = Path(options["logs"]) / f"seed-{seed}" / "base"

    def train() -> dict[str, float]:
        transformers.set_seed(seed)
        model: Any = build_model(options["model"], **shape)
        steps = int(options["pretrain_steps"])
        rows = _rows(corpus, options)
        log = continual_pretraining(
            model,
            corpus,
            dataclasses.replace(rows, general=rows.general[::2]),
            ratio=0.0,
            steps=steps,
            batch_size=int(options["batch_size"]),
            micro_batch_size=options["micro_batch_size"],
            seed=seed,
            folder=folder / "trainer",
            evaluations=1,
            learning_rate=float(options["pretrain_learning_rate"]),
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 10),
            per_device_eval_batch_size=int(options["eval_batch_size"]),
        )
        model.save_pretrained(folder / "model")
        return {"tokens": log.tokens[-1], "steps": log.steps, "flops": log.flops, "seconds": log.seconds}

    cost = json_once(folder / "cost.json", train)
    return build_model(str(folder / "model"), **shape), corpus, cost


def write_logs(options: Mapping[str, Any]) -> Path:
    """All logs so far in one CSV, for ``lossmith fit --law critical-mixture``."""
    import pandas as pd

    from lossmith.training.continual import MixtureLog

    root = Path(options["logs"])
    rows = []
    for path in sorted(root.glob("seed-*/share-*/log.json")):
        rows += MixtureLog(**read_json(path)).rows(run=path.parent.parent.name)
    return write_text(root / "log.csv", pd.DataFrame(rows).to_csv(index=False))


def first_part(logs: Sequence[MixtureLog], share: float) -> list[MixtureLog]:
    """The logs cut to a share of their budget, and what that would have cost."""
    cut = []
    for log in logs:
        # Rows differ a little in length.
        end = sum(tokens <= 1.001 * share * log.tokens[-1] for tokens in log.tokens)
        spent = end / len(log.tokens)
        cut.append(
            dataclasses.replace(
                log,
                tokens=log.tokens[:end],
                general_loss=log.general_loss[:end],
                domain_loss=log.domain_loss[:end],
                steps=round(spent * log.steps),
                flops=spent * log.flops,
                seconds=spent * log.seconds,
            )
        )
    return cut


def _rows(corpus: PreparedCorpus, options: Mapping[str, Any]) -> MixtureRows:
    from lossmith.training.continual import MixtureRows

    return MixtureRows.of(corpus, options["general"], options["domain"], eval_rows=options["eval_rows"])


def _replayed(corpus: PreparedCorpus, options: Mapping[str, Any]) -> MixtureRows:
    from lossmith.training.models import PRESETS

    rows = _rows(corpus, options)
    if options["model"] not in PRESETS:
        return rows
    if len(rows.general) < 2:
        raise InputError(
            f"{corpus.source} has too little text of domain '{options['general']}' to pre-train and replay"
        )
    return dataclasses.replace(rows, general=rows.general[1::2])


def _excerpt(characters: int) -> str:
    """The embedded corpus as JSON lines, up to about ``characters`` of either domain."""
    import json

    from lossmith.data import read_corpus

    left = {"docs": characters, "code": characters}

    def lines() -> Iterator[str]:
        for document in read_corpus("python"):
            if left[document.domain] > 0:
                left[document.domain] -= len(document.text)
                yield json.dumps({"text": document.text, "domain": document.domain}) + "\n"
            if max(left.values()) <= 0:
                return

    return "".join(lines())
