"""What the arms of the study of PreSelect share: the parts of the corpus, the models to rank, and their losses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lossmith.errors import InputError
from lossmith.studies.selection_pool import (
    new_model,
    passages_of_two,
    save_tokenizer,
    take,
    training_options,
    write_part,
)
from lossmith.studies.sharing import json_once

if TYPE_CHECKING:
    from lossmith.data import Document, Scorer

PARTS = ("pool", "seeds", "target", "benchmark", "validation", "reserve")


@dataclass(frozen=True, slots=True)
class ModelLosses:
    """What the models say.

    Attributes:
        ability: minus each model's bits per character on the benchmark, ``(models,)``.
        seeds: nats of the seed passages, ``(models, passages)``.
        pool: nats of the pool's passages under the ablest model.
        scored_tokens: of ``seeds`` and of ``pool``.
    """

    ability: np.ndarray
    seeds: np.ndarray
    pool: np.ndarray
    scored_tokens: Mapping[str, int]


def prepare_parts(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Cut the corpus into disjoint parts.

    ``pool`` and ``seeds`` hold ``target_share`` of the target domain and ``junk_share`` of passages of other domains
    with their characters shuffled; ``reserve``, from which the models draw their texts, holds half and half; the other
    parts hold the target domain alone.
    """
    parts = folder / "parts"
    if not (parts / "tokenizer" / "tokenizer_config.json").exists():
        target, other = passages_of_two(options)
        generator = np.random.default_rng(0)
        mixed = (float(options["target_share"]), float(options["junk_share"]))
        shares = {"pool": mixed, "seeds": mixed, "reserve": (0.5, 0.0)}
        for name in PARTS:
            size, (share, junk) = int(options[name]), shares.get(name, (1.0, 0.0))
            wanted = {"target": round(share * size), "junk": round(junk * size)}
            wanted["other"] = size - sum(wanted.values())
            rows = [("target", text) for text in take(target, wanted["target"], "target domain", name)]
            rows += [("other", text) for text in take(other, wanted["other"], "other domains", name)]
            shuffled = take(other, wanted["junk"], "other domains", name)
            rows += [("junk", "".join(generator.permutation(list(text)))) for text in shuffled]
            order = generator.permutation(len(rows))
            lines = [{"text": rows[i][1], "domain": rows[i][0]} for i in order]
            write_part(parts, name, lines)
        save_tokenizer(
            options["target_model"], lambda: (document.text for document in read_part(parts, "reserve")), options, parts
        )
    return {"parts": str(parts)}


def read_part(parts: str | Path, name: str) -> list[Document]:
    """One of :data:`PARTS`; the domain of a passage is ``target``, ``other`` or ``junk``."""
    from lossmith.data import read_corpus

    return list(read_corpus(Path(parts) / f"{name}.jsonl", domain_field="domain"))


def domains(documents: list[Document]) -> Iterator[tuple[str, np.ndarray]]:
    """Which documents are of each kind."""
    names = np.array([document.domain for document in documents])
    for name in ("target", "other", "junk"):
        yield name, names == name


def model_losses(seed: int, options: Mapping[str, Any]) -> ModelLosses:
    """Losses under the models of ``seed``, or under those that are given, which are the same for all seeds.

    The arms that need them share them: the first one trains and scores, the others read.
    """
    from lossmith.data import bits_per_character, read_scores, score_corpus

    parts, trained = Path(options["parts"]), any(not isinstance(given, str) for given in options["models"])
    folder = parts.parent / "models" / (f"seed-{seed}" if trained else "given")
    names = [f"model-{i}" for i in range(len(options["models"]))]
    characters = [len(document.text) for document in read_part(parts, "benchmark")]

    def score() -> dict[str, Any]:
        scorers = {
            name: _scorer(i, given, seed, options, folder)
            for i, (name, given) in enumerate(zip(names, options["models"], strict=True))
        }
        for part in ("benchmark", "seeds"):
            score_corpus(parts / f"{part}.jsonl", scorers, folder / f"{part}.parquet")
        table = read_scores(folder / "benchmark.parquet")
        bits = np.stack([bits_per_character(table.column(f"{name}/nats"), characters) for name in names])
        ability = -np.average(bits, axis=1, weights=characters)
        best = names[int(ability.argmax())]
        score_corpus(parts / "pool.jsonl", {best: scorers[best]}, folder / "pool.parquet")
        return {"ability": ability.tolist(), "best": best}

    done = json_once(folder / "done.json", score)
    seeds, pool = (read_scores(folder / f"{part}.parquet") for part in ("seeds", "pool"))
    return ModelLosses(
        ability=np.array(done["ability"]),
        seeds=np.stack([seeds.column(f"{name}/nats") for name in names]),
        pool=pool.column(f"{done['best']}/nats"),
        scored_tokens={
            "seeds": int(sum(seeds.column(f"{name}/tokens").sum() for name in names)),
            "pool": int(pool.column(f"{done['best']}/tokens").sum()),
        },
    )


def _scorer(number: int, given: str | float, seed: int, options: Mapping[str, Any], folder: Path) -> Scorer:
    """A model by folder or hub id, or one that is trained on a mixture with the share ``given`` of the target."""
    import torch

    from lossmith.data import language_model_scorer, load_tokenizer
    from lossmith.training.models import build_model
    from lossmith.training.text_training import train_on_texts

    length = int(options["sequence_length"])
    if isinstance(given, str):
        tokenizer = load_tokenizer(given)
        model: Any = build_model(given, vocab_size=len(tokenizer), sequence_length=length)
    else:
        if not 0 <= given <= 1:
            raise InputError(f"models must be hub ids, folders or shares of the target between 0 and 1, got {given!r}")
        tokenizer = load_tokenizer(Path(options["parts"]) / "tokenizer")
        # One start for all models of a seed, so that only the texts make the difference.
        model = new_model(options, tokenizer, seed, target=False)
        texts = _mixture(float(given), int(options["model_texts"]), (seed, number), options)
        train_on_texts(
            model, tokenizer, texts, folder=folder / f"model-{number}", seed=seed, **training_options(options)
        )
    if torch.cuda.is_available():
        model = model.cuda()
    return language_model_scorer(model, tokenizer, max_length=length)


def _mixture(share: float, size: int, seed: tuple[int, int], options: Mapping[str, Any]) -> list[str]:
    """Passages of the reserve, drawn without replacement, ``share`` of them of the target."""
    generator, texts = np.random.default_rng(seed), []
    reserve = read_part(options["parts"], "reserve")
    for kind, wanted in (("target", round(share * size)), ("other", size - round(share * size))):
        there = [document.text for document in reserve if document.domain == kind]
        if wanted > len(there):
            raise InputError(f"a model is to read {wanted} passages of {len(there)} ({kind}); enlarge 'reserve'")
        texts += [there[i] for i in generator.permutation(len(there))[:wanted]]
    return texts
