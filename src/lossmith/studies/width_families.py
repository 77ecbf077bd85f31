"""Language models of several widths: trained on the spot or given, and what their width does to overlaps and loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lossmith.errors import InputError
from lossmith.reporting.comparison import Cost

#: The models of Liu et al. 2025, arXiv 2505.10465: 27 of four families.
OPEN_MODELS: dict[str, list[str]] = {
    "OPT": [f"facebook/opt-{size}" for size in ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b")],
    "GPT-2": [f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")],
    "Qwen2.5": [f"Qwen/Qwen2.5-{size}" for size in ("0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B")],
    "Pythia": [f"EleutherAI/pythia-{size}" for size in ("70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b")],
}


@dataclass(frozen=True, slots=True)
class Families:
    """What the widths of some models say.

    Attributes:
        overlap: mean over models of dimensions times mean squared overlap; 1 for random vectors.
        centred_overlap: the same without the mean row.
        overlap_slope: by how much the logarithm of the squared overlap falls with that of the dimensions.
        represented: mean share of tokens longer than half the mean norm.
        exponent: of the width law, shared by all families and corpora.
        loss: of the widest model, in nats per token, mean over corpora.
        tokens: scored.
    """

    overlap: float
    centred_overlap: float
    overlap_slope: float
    represented: float
    exponent: float
    loss: float
    tokens: int


def prepare_families(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Where models are to be trained: text held out for them, and their tokenizer, as files."""
    if options["models"]:
        if options["data"] is not None:
            return {"corpora": {"data": options["data"]}}
        return {}
    import json

    from lossmith.data import prepare
    from lossmith.files import write_text

    corpus = prepare(options["data"], vocab_size=int(options["vocab_size"]), sequence_length=int(options["max_length"]))
    path = folder / "held-out.jsonl"
    rows = islice(corpus.validation["input_ids"], int(options["texts"]))
    texts = [str(corpus.tokenizer.decode(row, skip_special_tokens=True)) for row in rows]
    write_text(path, "".join(json.dumps({"text": text}) + "\n" for text in texts if text.strip()))
    return {"corpora": {"held-out": str(path)}, "prepared": str(corpus.folder)}


def train_family(seed: int, options: Mapping[str, Any], folder: Path) -> tuple[dict[str, list[str]], Cost]:
    """One-layer Llamas of several widths on the same batches, saved with their tokenizer; and what that cost."""
    import torch

    from lossmith.data import load_prepared
    from lossmith.studies.tensor_training import train_on_tensors
    from lossmith.training import NextToken
    from lossmith.training.models import build_model

    corpus = load_prepared(options["prepared"])
    length, batch = int(options["max_length"]), int(options["model_batch_size"])
    wanted = int(options["model_steps"]) * batch
    # Whole rows only: they stack without padding.
    full = [row for row in islice(corpus.train["input_ids"], 4 * wanted) if len(row) == length][:wanted]
    if len(full) < batch:
        raise InputError(f"{options['data']} holds too little text: {len(full)} rows of {length} tokens")
    rows = torch.tensor(full)
    paths, steps, flops = [], 0, 0.0
    for width in options["model_widths"]:
        torch.manual_seed(seed)
        heads = 2 if int(width) % 2 == 0 else 1
        model = build_model(
            "nano",
            vocab_size=len(corpus.tokenizer),
            sequence_length=length,
            overrides={
                "hidden_size": int(width),
                "intermediate_size": 3 * int(width),
                "num_attention_heads": heads,
                "num_key_value_heads": heads,
                "initializer_range": 0.5 / int(width) ** 0.5,
            },
        )
        trained = train_on_tensors(
            model,
            {"input_ids": rows, "labels": rows},
            NextToken(),
            steps=int(options["model_steps"]),
            batch_size=batch,
            seed=seed,
            folder=folder / f"width-{width}",
            tokens_per_example=length,
            learning_rate=1e-2,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, int(options["model_steps"]) // 20),
        )
        path = folder / f"width-{width}" / "model"
        model.save_pretrained(path)  # type: ignore[operator]
        corpus.tokenizer.save_pretrained(path)
        paths.append(str(path))
        steps, flops = steps + trained.steps, flops + trained.flops
    return {"Llama": paths}, Cost(tokens=steps * batch * length, steps=steps, flops=flops)


def measure_families(models: Mapping[str, Iterable[str]] | Iterable[str], options: Mapping[str, Any]) -> Families:
    """Overlaps of the unembeddings, losses on the corpora, and the width law through them.

    Args:
        models: names by family, or only names (then a model's type is its family).
        options: ``corpora`` (name -> what :func:`lossmith.data.read_corpus` reads), ``texts`` of each, ``max_length``.

    Raises:
        InputError: too few widths for the law, a model or corpus that cannot be read.
    """
    import numpy as np
    import torch

    from lossmith.laws import Width
    from lossmith.probes import superposition
    from lossmith.theory import loglog_slope

    members = [(family, name) for family, names in _by_family(models).items() for name in names]
    reports = [superposition(name) for _, name in members]
    if len({report.dimensions for report in reports}) < 3:
        raise InputError(f"models of at least 3 widths are needed, got {sorted({r.dimensions for r in reports})}")
    slope = loglog_slope(
        torch.tensor([float(report.dimensions) for report in reports]),
        torch.tensor([report.mean_square_overlap for report in reports]),
    )
    rows: dict[str, list[Any]] = {"family": [], "corpus": [], "width": [], "loss": []}
    texts = {corpus: _texts(source, int(options["texts"])) for corpus, source in options["corpora"].items()}
    tokens = 0
    for (family, name), report in zip(members, reports, strict=True):
        losses = corpus_losses(name, texts, int(options["max_length"]))
        for corpus, (loss, count) in losses.items():
            tokens += count
            for column, value in zip(
                rows, (family, corpus, float(report.width or report.dimensions), loss), strict=True
            ):
                rows[column].append(value)
    fitted = Width().fit(rows, bootstrap=0)
    widest = max(rows["width"])
    return Families(
        overlap=float(np.mean([report.ratio for report in reports])),
        centred_overlap=float(np.mean([report.centred_ratio for report in reports])),
        overlap_slope=float(slope.exponent),
        represented=float(np.mean([report.represented_of_mean for report in reports])),
        exponent=fitted.parameters["alpha"],
        loss=float(np.mean([loss for loss, width in zip(rows["loss"], rows["width"], strict=True) if width == widest])),
        tokens=tokens,
    )


def corpus_losses(name: str, texts: Mapping[str, list[str]], max_length: int) -> dict[str, tuple[float, int]]:
    """Cross entropy of a model by corpus, in nats, as a mean over tokens; and how many tokens that was.

    Each text is cut at ``max_length`` tokens and scored alone; its first token is predicted only where the tokenizer
    puts one before it.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lossmith.losses import cross_entropy

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model: Any = AutoModelForCausalLM.from_pretrained(name, use_safetensors=True, dtype="auto")
    except (OSError, ValueError) as error:
        raise InputError(f"{name} cannot be loaded: {str(error).splitlines()[0]}") from None
    model = model.to(device).eval()
    limit = min(max_length, int(getattr(model.config, "max_position_embeddings", max_length)))
    found = {}
    for corpus, some in texts.items():
        total, count = 0.0, 0
        for text in some:
            ids = tokenizer(text, truncation=True, max_length=limit, return_tensors="pt")["input_ids"].to(device)
            if ids.shape[1] < 2:
                continue
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, :-1]
            total += float(cross_entropy(logits.float(), ids[0, 1:]).double().sum())
            count += ids.shape[1] - 1
        if not count:
            raise InputError(f"corpus '{corpus}' has no text of two tokens or more for {name}")
        found[corpus] = total / count, count
    return found


def _texts(source: str, number: int) -> list[str]:
    from lossmith.data import read_corpus

    return [document.text for document in islice(read_corpus(source), number)]


def _by_family(models: Mapping[str, Iterable[str]] | Iterable[str]) -> dict[str, list[str]]:
    if isinstance(models, Mapping):
        return {str(family): list(names) for family, names in models.items()}
    if isinstance(models, str):
        raise InputError(f"models must be a list of names, got '{models}'; write models=['{models}', ...]")
    from transformers import AutoConfig

    families: dict[str, list[str]] = {}
    for name in models:
        try:
            family = AutoConfig.from_pretrained(name).model_type
        except (OSError, ValueError) as error:
            raise InputError(f"{name} cannot be read: {str(error).splitlines()[0]}") from None
        families.setdefault(family, []).append(str(name))
    return families
