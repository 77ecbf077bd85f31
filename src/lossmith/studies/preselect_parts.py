"""What the arms of the study of PreSelect share: the parts of the corpus, the given models, and their losses."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lossmith.errors import InputError
from lossmith.files import read_json, write_json, write_text
from lossmith.studies.selection_pool import new_model, passages_of_two, take, training_options

if TYPE_CHECKING:
    from lossmith.data import Document, Scorer

PARTS = ("pool", "seeds", "target", "benchmark", "validation")


def prepare_parts(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Cut the corpus into disjoint parts, train the models of known ability (or load them), and score.

    ``pool`` and ``seeds`` hold ``target_share`` of the target domain and ``junk_share`` of passages of other domains
    with their characters shuffled; ``target``, ``benchmark`` and ``validation`` hold the target domain alone.
    """
    from lossmith.data import read_scores, score_corpus

    parts = folder / "parts"
    done = parts / "done.json"
    if not done.exists():
        if not (parts / "tokenizer" / "tokenizer_config.json").exists():
            _cut(options, parts)
        scorers = {f"model-{i}": _scorer(i, given, options, parts) for i, given in enumerate(options["models"])}
        for name in ("benchmark", "seeds"):
            score_corpus(parts / f"{name}.jsonl", scorers, parts / f"{name}.parquet")
        ability = benchmark_scores(parts)
        best = f"model-{int(np.argmax(ability))}"
        score_corpus(parts / "pool.jsonl", {best: scorers[best]}, parts / "pool.parquet")
        tables = {name: read_scores(parts / f"{name}.parquet") for name in ("seeds", "pool")}
        scored = {name: int(sum(t.column(f"{model}/tokens").sum() for model in t.models)) for name, t in tables.items()}
        write_json(done, {"benchmark": ability.tolist(), "scored_tokens": scored})
    return {"parts": str(parts)}


def benchmark_scores(parts: Path) -> np.ndarray:
    """How able each model is: minus its bits per character on the benchmark's passages."""
    from lossmith.data import bits_per_character, read_scores

    table = read_scores(parts / "benchmark.parquet")
    characters = [len(document.text) for document in read_part(parts, "benchmark")]
    bits = [bits_per_character(table.column(f"{model}/nats"), characters) for model in table.models]
    return -np.array([float(np.average(one, weights=characters)) for one in bits])


def read_part(parts: str | Path, name: str) -> list[Document]:
    """One of :data:`PARTS`, or ``model-0``, ...; the domain of a passage is ``target``, ``other`` or ``junk``."""
    from lossmith.data import read_corpus

    return list(read_corpus(Path(parts) / f"{name}.jsonl", domain_field="domain"))


def _cut(options: Mapping[str, Any], parts: Path) -> None:
    from lossmith.data import load_tokenizer, train_tokenizer
    from lossmith.training.models import PRESETS

    target, other = passages_of_two(options)
    generator = np.random.default_rng(0)
    sizes = {name: (int(options[name]), _shares(options, name)) for name in PARTS}
    for i, given in enumerate(options["models"]):
        if not isinstance(given, str):
            sizes[f"model-{i}"] = int(options["model_texts"]), (float(given), 0.0)
    for name, (size, (share, junk)) in sizes.items():
        wanted = {"target": round(share * size), "junk": round(junk * size)}
        wanted["other"] = size - sum(wanted.values())
        rows = [("target", text) for text in take(target, wanted["target"], "target domain", name)]
        rows += [("other", text) for text in take(other, wanted["other"], "other domains", name)]
        shuffled = take(other, wanted["junk"], "other domains", name)
        rows += [("junk", "".join(generator.permutation(list(text)))) for text in shuffled]
        order = generator.permutation(len(rows))
        lines = [{"text": rows[i][1], "domain": rows[i][0]} for i in order]
        write_text(parts / f"{name}.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    if options["target_model"] in PRESETS:
        # The words of the models' texts, target and other alike.
        texts = (text.text for name in sizes if name.startswith("model-") for text in read_part(parts, name))
        tokenizer: Any = train_tokenizer(texts, vocab_size=int(options["vocab_size"]))
    else:
        tokenizer = load_tokenizer(options["target_model"])
    tokenizer.save_pretrained(parts / "tokenizer")


def _shares(options: Mapping[str, Any], name: str) -> tuple[float, float]:
    mixed = name in ("pool", "seeds")
    return (float(options["target_share"]), float(options["junk_share"])) if mixed else (1.0, 0.0)


def _scorer(number: int, given: str | float, options: Mapping[str, Any], parts: Path) -> Scorer:
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
        tokenizer = load_tokenizer(parts / "tokenizer")
        # One start for all, so that only the texts make the difference.
        model = new_model(options, tokenizer, 0, target=False)
        texts = [document.text for document in read_part(parts, f"model-{number}")]
        train_on_texts(model, tokenizer, texts, folder=parts / f"model-{number}", seed=0, **training_options(options))
    if torch.cuda.is_available():
        model = model.cuda()
    return language_model_scorer(model, tokenizer, max_length=length)


def scored_tokens(parts: str | Path) -> dict[str, int]:
    """Tokens that the models have scored, by part."""
    found: dict[str, int] = read_json(Path(parts) / "done.json")["scored_tokens"]
    return found


def domains(documents: list[Document]) -> Iterator[tuple[str, np.ndarray]]:
    """Which documents are of each kind."""
    names = np.array([document.domain for document in documents])
    for name in ("target", "other", "junk"):
        yield name, names == name
