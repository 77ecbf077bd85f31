"""What the arms of a selection study share: a pool that hides texts of a target, and the models that score it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lossmith.errors import InputError
from lossmith.files import write_text
from lossmith.studies.sharing import json_once

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from lossmith.data import Scores

PARTS = ("pool", "prior", "target", "validation")


@dataclass(frozen=True, slots=True)
class Text:
    """A passage, and whether it is of the target domain (known to the study, not to the methods)."""

    text: str
    is_target: bool


def prepare_parts(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Cut the corpus into passages and write the disjoint parts: no passage is in two of them, nor twice in one.

    ``pool`` and ``prior`` hold ``target_share`` of the target domain, ``target`` and ``validation`` nothing else.
    """
    parts = folder / "parts"
    if not (parts / "tokenizer" / "tokenizer_config.json").exists():
        target, other = passages_of_two(options)
        share, sizes = float(options["target_share"]), {name: int(options[name]) for name in PARTS}
        for name in PARTS:
            wanted = sizes[name] if name in ("target", "validation") else round(share * sizes[name])
            rows = [Text(text, True) for text in take(target, wanted, "target domain", name)]
            rows += [Text(text, False) for text in take(other, sizes[name] - wanted, "other domains", name)]
            order = np.random.default_rng(0).permutation(len(rows))
            lines = [{"text": rows[i].text, "domain": "target" if rows[i].is_target else "other"} for i in order]
            write_part(parts, name, lines)
        save_tokenizer(options["model"], lambda: (text.text for text in read_part(parts, "prior")), options, parts)
    return {"parts": str(parts)}


def write_part(parts: Path, name: str, rows: Iterable[Mapping[str, str]]) -> None:
    """A part as JSON lines, whole or not at all."""
    write_text(parts / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def save_tokenizer(
    model: str | None, texts: Callable[[], Iterable[str]], options: Mapping[str, Any], parts: Path
) -> None:
    """The tokenizer of ``model``; for a preset, or without a model, one that ``texts()`` train. Written last."""
    from lossmith.data import load_tokenizer, train_tokenizer
    from lossmith.training.models import PRESETS

    if model is None or model in PRESETS:
        tokenizer: Any = train_tokenizer(texts(), vocab_size=int(options["vocab_size"]))
    else:
        tokenizer = load_tokenizer(model)
    tokenizer.save_pretrained(parts / "tokenizer")


def read_part(parts: str | Path, name: str) -> list[Text]:
    """One of :data:`PARTS`."""
    lines = (Path(parts) / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
    return [Text(row["text"], row["domain"] == "target") for line in lines if line for row in [json.loads(line)]]


def passages_of_two(options: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Passages of the target domain and of the others; documents in random order, the passages of one together."""
    from lossmith.data import read_corpus

    size = int(options["characters"])
    documents = list(
        read_corpus(options["data"], text_field=options["text_field"], domain_field=options["domain_field"])
    )
    domains = sorted({document.domain for document in documents})
    wanted = options["target_domain"]
    if len(domains) < 2 or (wanted is not None and wanted not in domains):
        raise InputError(
            f"the study needs a corpus of several domains with the target domain {wanted!r} among them, got: "
            f"{', '.join(name or '(none)' for name in domains)}; give folders of domains, or set domain_field"
        )
    if wanted is None:
        wanted = min(domains, key=lambda name: sum(len(d.text) for d in documents if d.domain == name))
    order = np.random.default_rng(0).permutation(len(documents))
    found: tuple[list[str], list[str]] = ([], [])
    seen: set[str] = set()
    for i in order:
        text = documents[i].text
        pieces = [text[s : s + size] for s in range(0, len(text) - size + 1, size)]
        for piece in pieces:
            if piece not in seen and not piece.isspace():
                seen.add(piece)
                found[0 if documents[i].domain == wanted else 1].append(piece)
    return found


def take(texts: list[str], number: int, what: str, part: str) -> list[str]:
    """The first ``number`` of ``texts``, which are removed there; ``what`` and ``part`` are for the message."""
    if number > len(texts):
        raise InputError(
            f"the {what} of the corpus have only {len(texts)} passages left for the part '{part}', which needs "
            f"{number}; give more text, or smaller parts"
        )
    taken = texts[:number]
    del texts[:number]
    return taken


def new_model(options: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, seed: int, *, target: bool) -> nn.Module:
    """The auxiliary model before it is trained, or the target model: random weights under ``seed``."""
    import transformers

    from lossmith.training.models import PRESETS, build_model

    transformers.set_seed(1000 * target + seed)
    name = options["target_model"] if target else options["model"]
    return build_model(
        name,
        vocab_size=len(tokenizer),
        sequence_length=int(options["sequence_length"]),
        random_weights=target and name not in PRESETS,
    )


def scored_pool(seed: int, options: Mapping[str, Any]) -> tuple[Scores, dict[str, float]]:
    """Losses of the pool under the marginal and the conditional model of ``seed``, and what all that cost in tokens.

    The arms that need them share them: the first one trains and scores, the others read. The conditional model stays
    in the seed's folder, ``conditional``.
    """
    from lossmith.data import language_model_scorer, load_tokenizer, read_scores, score_corpus
    from lossmith.training.text_training import train_on_texts

    parts = Path(options["parts"])
    folder = seed_folder(seed, options)
    table = folder / "scores.parquet"

    def train_and_score() -> dict[str, float]:
        tokenizer = load_tokenizer(parts / "tokenizer")
        model: Any = new_model(options, tokenizer, seed, target=False)
        training = training_options(options)
        spent = {"tokens": 0.0, "flops": 0.0}
        scorers = {}
        for name, part, epochs in (("marginal", "prior", options["prior_epochs"]), ("conditional", "target", 1)):
            if epochs:
                texts = [text.text for text in read_part(parts, part)]
                # A fresh optimiser and schedule on the same weights.
                used = train_on_texts(
                    model, tokenizer, texts, folder=folder / name, epochs=epochs, seed=seed, **training
                )
                spent = {key: spent[key] + used[key] for key in spent}
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
            scorers[name] = language_model_scorer(
                _loaded(folder / name), tokenizer, max_length=int(options["sequence_length"])
            )
        score_corpus(parts / "pool.jsonl", scorers, table)
        scored = 2 * int(read_scores(table).column("marginal/tokens").sum())
        return {**spent, "scored_tokens": scored}

    cost = json_once(folder / "cost.json", train_and_score)
    return read_scores(table), cost


def seed_folder(seed: int, options: Mapping[str, Any]) -> Path:
    """Where the models and scores of a seed are."""
    return Path(options["parts"]).parent / "auxiliary" / f"seed-{seed}"


def _loaded(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
    return model.cuda() if torch.cuda.is_available() else model


def training_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """What all trainings of the study have in common, auxiliary and target alike, as in the paper."""
    return {
        "batch_size": int(options["batch_size"]),
        "max_length": int(options["sequence_length"]),
        "learning_rate": float(options["learning_rate"]),
    }


def auc(scores: Sequence[float] | np.ndarray, is_target: Sequence[bool] | np.ndarray) -> float:
    """How often a text of the target has a lower score than another text (ties count half).

    >>> auc([0.1, 0.4, 0.3, 0.9], [True, True, False, False])
    0.75
    """
    from scipy.stats import rankdata

    truth = np.asarray(is_target, dtype=bool)
    ranks = rankdata(-np.asarray(scores, dtype=float))
    inside = int(truth.sum())
    return float((ranks[truth].sum() - inside * (inside + 1) / 2) / (inside * (len(truth) - inside)))
