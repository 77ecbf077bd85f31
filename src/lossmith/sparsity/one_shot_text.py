"""Pruning a language model on texts from files, judged on parts of them that it never sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lossmith.errors import InputError
from lossmith.files import check_new_folder, replacing_folder
from lossmith.sparsity.essential_text import TextEvaluation, load_causal_model
from lossmith.sparsity.magnitude import SparsityReport
from lossmith.sparsity.one_shot import CALIBRATED, prune

# Held out of every file; no more than so many texts of it are scored.
_HELD_OUT, _SCORED = 0.1, 200
# Characters that are read of a source, whatever calibration needs, so that every method is scored on the same texts.
_READ = 50_000_000


@dataclass(frozen=True, slots=True)
class TextQuality:
    """Losses of held-out texts before and after; ``losses`` are in nats per token, (texts x 2)."""

    source: str
    losses: np.ndarray
    tokens: np.ndarray

    def perplexity(self, after: bool = True) -> float:
        """Of all tokens together."""
        return math.exp(float(np.average(self.losses[:, int(after)], weights=self.tokens)))

    def rise(self, *, level: float = 0.95, draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
        """The perplexity after over that before, minus 1, and an interval over texts drawn with replacement.

        The interval is NaN for fewer than five texts.
        """
        change = self.losses[:, 1] - self.losses[:, 0]

        def mean(rows: Any) -> Any:
            return (change[rows] * self.tokens[rows]).sum(-1) / self.tokens[rows].sum(-1)

        found = math.expm1(float(mean(np.arange(len(change)))))
        if len(change) < 5:
            return found, math.nan, math.nan
        rows = np.random.default_rng(seed).integers(len(change), size=(draws, len(change)))
        low, high = np.quantile(np.expm1(mean(rows)), [(1 - level) / 2, (1 + level) / 2])
        return found, float(low), float(high)

    def summary(self) -> str:
        """One line."""
        found, low, high = self.rise()
        interval = "" if math.isnan(low) else f", 95% interval {low:+.1%} to {high:+.1%} over texts"
        before, after = self.perplexity(False), self.perplexity()
        return (
            f"perplexity of {self.source}: {before:.4g} -> {after:.4g} ({found:+.1%}{interval}; "
            f"{len(self.tokens)} held-out texts, {int(self.tokens.sum()):,} tokens)"
        )


@dataclass(frozen=True, slots=True)
class PrunedLanguageModel:
    """What :func:`prune_language_model` did: zeros, held-out quality of each source, texts that were cut."""

    report: SparsityReport
    quality: tuple[TextQuality, ...]
    cut: int
    losses: tuple[float, ...]


def prune_language_model(
    model: str,
    out: str | Path,
    sparsity: float = 0.5,
    *,
    method: str = "d-pruner",
    calibration: str,
    general: str | None = None,
    text_field: str = "text",
    domain_texts: int = 1000,
    samples: int = 128,
    length: int = 2048,
    max_length: int = 1024,
    batch_size: int = 8,
    pattern: str | None = None,
    targets: Literal["blocks", "all"] = "blocks",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> PrunedLanguageModel:
    """Prune a causal language model of Transformers on files, and save it.

    A tenth of each source's texts (by their content, so that a text that is there twice is on one side) is held out,
    and up to 200 of them are scored before and after. Of a longer source the first 50 million characters are read.

    Args:
        model: folder or hub id, with its tokenizer.
        out: a new folder, there only once it is complete; plain Transformers loads it.
        sparsity, method, pattern, targets, samples, length, max_length, batch_size, seed, progress, options: see
            :func:`~lossmith.sparsity.prune`.
        calibration: text, JSONL, CSV, Parquet, a folder or a hub id; see :func:`~lossmith.data.read_corpus`. Methods
            that look at no text are scored on it.
        general: the same; D-Pruner's open-domain text, for other methods only scored.
        text_field: where the text is.
        domain_texts: D-Pruner's, at most.

    Raises:
        InputError: as :func:`~lossmith.sparsity.prune`; ``out`` is not empty; a source with too few texts.

    >>> prune_language_model(
    ...     "my_model", "pruned", calibration="domain.jsonl", general="general.jsonl"
    ... )  # doctest: +SKIP
    """
    check_new_folder(out)
    if method == "d-pruner" and general is None:
        raise InputError("method 'd-pruner' needs general: open-domain texts")
    loaded, tokenizer = load_causal_model(model)
    longest = getattr(loaded.config, "max_position_embeddings", None) or max(length, max_length)
    sources = {calibration: (2 if method == "d-pruner" else 1)} | ({general: 1} if general is not None else {})
    parts = {name: _split(name, text_field, least) for name, least in sources.items()}
    scored = {
        name: TextEvaluation(_rows(tokenizer, held, min(max_length, longest))) for name, (_, held) in parts.items()
    }
    before = {name: evaluate(loaded) for name, evaluate in scored.items()}
    domain = parts[calibration][0]
    cut = 0
    if method == "d-pruner":
        domain = domain[:domain_texts]
        # The frame takes two tokens.
        cut = sum(len(ids) + 2 > min(max_length, longest) for ids in tokenizer(domain, verbose=False)["input_ids"])
        options["general"] = parts[general][0]  # type: ignore[index]
    found = prune(
        loaded,
        sparsity,
        method=method,
        calibration=domain if method in CALIBRATED else None,
        tokenizer=tokenizer,
        pattern=pattern,
        targets=targets,
        samples=samples,
        length=length,
        max_length=max_length,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
        **options,
    )
    quality = []
    for name, evaluate in scored.items():
        after, tokens = evaluate(loaded)
        quality.append(TextQuality(name, np.stack([before[name][0], after], axis=1), tokens))
    _save(loaded, tokenizer, Path(out))
    return PrunedLanguageModel(found.report, tuple(quality), cut, found.losses)


def prune_language_model_blockwise(
    model: str | Path,
    out: str | Path,
    sparsity: float = 0.5,
    *,
    method: str = "wanda",
    calibration: str,
    general: str | None = None,
    text_field: str = "text",
    domain_texts: int = 1000,
    **options: Any,
) -> SparsityReport:
    """:func:`prune_language_model` for folders that are larger than the memory; nothing is scored.

    The calibration texts are the same, so that the weights are.

    Args:
        model: folder of a model and its tokenizer.
        out, calibration, general, text_field, domain_texts: see :func:`prune_language_model`.
        sparsity, method, options: see :func:`~lossmith.sparsity.prune_blockwise`.

    Raises:
        InputError: as :func:`~lossmith.sparsity.prune_blockwise`; a source with too few texts; no tokenizer.

    >>> prune_language_model_blockwise("my_model", "pruned", calibration="text.jsonl")  # doctest: +SKIP
    """
    import torch
    from transformers import AutoTokenizer

    from lossmith.sparsity.blockwise import prune_blockwise

    check_new_folder(out)
    if not Path(model).is_dir():
        raise InputError(f"{model} is no folder; block by block is read from one")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    except Exception as error:  # a different kind for every way in which a folder can be wrong
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"the tokenizer in {model} cannot be loaded: {reason}") from None
    texts, _ = _split(calibration, text_field, 2 if method == "d-pruner" else 1)
    if general is not None:
        texts = texts[:domain_texts]
        options["general"], _ = _split(general, text_field, 1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return prune_blockwise(
        model, out, sparsity, method=method, calibration=texts, tokenizer=tokenizer, device=device, **options
    )


def _split(source: str, text_field: str, least: int) -> tuple[list[str], list[str]]:
    """Texts to calibrate on and held-out ones, each different."""
    from lossmith.data import read_corpus
    from lossmith.data.splitting import content_digest, split_draw

    texts: dict[bytes, str] = {}
    characters = 0
    for document in read_corpus(source, text_field=text_field):
        texts.setdefault(content_digest(document.text), document.text)
        characters += len(document.text)
        if characters > _READ:
            break
    if len(texts) < least + 1:
        raise InputError(
            f"{source} has {len(texts)} different texts; at least {least + 1} are needed, one of them to score the "
            "model on"
        )
    number = max(1, round(_HELD_OUT * len(texts)))
    held = set(sorted(texts, key=lambda digest: split_draw(digest, 0))[:number])
    kept = [text for digest, text in texts.items() if digest not in held]
    return kept, [text for digest, text in texts.items() if digest in held][:_SCORED]


def _rows(tokenizer: Any, texts: Sequence[str], length: int) -> list[list[int]]:
    return [tokenizer(text, truncation=True, max_length=length)["input_ids"] for text in texts]


def _save(model: Any, tokenizer: Any, out: Path) -> None:
    with replacing_folder(out) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
