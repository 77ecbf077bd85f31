"""LOST: is a model of low-rank pairs and a few full columns worth one of full rank?

"LOST: Low-rank and Sparse Pre-training for Large Language Models", 2025, arXiv 2508.02668.

Two tasks. One layer learns a matrix whose make-up is known: of low rank, with three strong columns and some noise. And
a byte-level Llama-style model of two blocks learns real text; the arms but the full one have as many weights as each
other. ``--data`` takes a text; ``full`` is LLaMA 60M on C4.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossmith.reporting.comparison import Claim, Cost, Curve
from lossmith.studies.settings import CompareSettings, make_settings
from lossmith.studies.study import Experiment, Paper, Study
from lossmith.studies.tensor_training import train_on_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn

ARMS = {
    "full": "full rank",
    "low_rank": "a plain pair, begun with the SVD",
    "cola": "a pair with SiLU between, begun at random",
    "sltrain": "a plain pair plus weights at random places",
    "lost": "LOST: a pair with SiLU, and columns by the rest of the spectrum",
    "linear": "LOST without SiLU",
    "random": "LOST without SiLU, columns at random",
}

CLAIMS = (
    Claim(
        "Columns make up for what a pair of as many weights misses: at most 0.6 of the error on a known matrix",
        "linear", "layer/error", against="low_rank", ratio=0.6,
    ),
    Claim("The spectrum finds the columns: a quarter of the error of random ones", "linear", "layer/error",
          against="random", ratio=0.25),
    Claim("LOST ends within 0.3 nats of full rank with a quarter of the blocks' weights", "lost", "loss", margin=-0.3),
    Claim("LOST is no worse than full rank (0.02 nats)", "lost", "loss", margin=-0.02),
    Claim("LOST is better than a plain pair of as many weights", "lost", "loss", against="low_rank"),
    Claim("LOST is better than CoLA", "lost", "loss", against="cola"),
    Claim("LOST is better than SLTrain", "lost", "loss", against="sltrain"),
    Claim("Columns of the spectrum are no worse than random ones (0.02 nats)", "linear", "loss", against="random",
          margin=-0.02),
)  # fmt: skip

SIZE, RANK, STRONG = 64, 6, 3
WIDTH, INNER, BYTES = 96, 256, 256
# Pairs without columns have the ranks that make up for them.
_ALONE = {"attn": 14, "mlp": 15}
_LINEAR = ("low_rank", "sltrain", "linear", "random")
_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "low_rank": {"density": 0, "activation": None},
    "cola": {"density": 0, "start": "cola"},
    "lost": {},
    "linear": {"activation": None},
    "random": {"activation": None, "choose": "random"},
}


def experiment(arm: str, seed: int, options: Mapping[str, Any], folder: Path) -> Experiment:
    """The language model, and for arms without an activation, whose layers can be a matrix, the known one."""
    metrics, cost, curve = language_model(arm, seed, options, folder / "text")
    if arm in _LINEAR:
        metrics |= known_matrix(arm, seed, int(options["layer_steps"]), folder / "layer")
    return Experiment(metrics, cost, train=curve)


def known_matrix(arm: str, seed: int, steps: int, folder: Path) -> dict[str, float]:
    """A layer that begins with a matrix of low rank with strong columns learns to do what the matrix does.

    A pair alone has rank 8 and 1,024 weights, the others rank 6 and three columns (960) or as many places.
    """
    import torch
    from torch import nn

    from lossmith.sparsity import LOSTLinear, SLTrainLinear

    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(SIZE, RANK, generator=generator) @ torch.randn(RANK, SIZE, generator=generator) / RANK**0.5
    strong = torch.randperm(SIZE, generator=generator)[:STRONG]
    weight[:, strong] += 3 * torch.randn(SIZE, STRONG, generator=generator)
    weight += 0.05 * torch.randn(SIZE, SIZE, generator=generator)
    dense = nn.Linear(SIZE, SIZE, bias=False)
    with torch.no_grad():
        dense.weight.copy_(weight)
    torch.manual_seed(seed)
    density = STRONG / SIZE
    if arm == "sltrain":
        layer: nn.Module = SLTrainLinear.from_linear(dense, RANK, density)
    else:
        alone = _OPTIONS[arm].get("density") == 0
        layer = LOSTLinear.from_linear(dense, 8 if alone else RANK, **{"density": density, **_OPTIONS[arm]})
    x = torch.randn(256 * steps, SIZE, generator=generator)
    train_on_tensors(
        layer,
        {"x": x, "y": x @ weight.T},
        lambda layer, batch: (layer(batch["x"]) - batch["y"]).square().mean(-1),
        steps=steps,
        batch_size=256,
        seed=seed,
        folder=folder,
        learning_rate=1e-2,
        lr_scheduler_type="linear",
        weight_decay=0.0,
        max_grad_norm=1e9,
    )
    x = torch.randn(4096, SIZE, generator=generator)
    with torch.no_grad():
        error = float((layer(x) - x @ weight.T).square().mean() / (x @ weight.T).square().mean())
    metrics = {"layer/error": error}
    if isinstance(layer, LOSTLinear) and layer.columns:
        metrics["layer/found"] = float(len({*layer.index.tolist()} & {*strong.tolist()}))
    return metrics


def converted(arm: str, model: nn.Module) -> None:
    """Replace the model's layers as the arm does."""
    from lossmith.sparsity import convert_to_lost, sltrain

    if arm == "sltrain":
        # As many places as LOST's columns have entries.
        sltrain(rank=12, density=0.0426).attach(model)
    elif arm != "full":
        alone = _OPTIONS[arm].get("density") == 0
        convert_to_lost(model, _ALONE if alone else 12, **{"density": 0.05, **_OPTIONS[arm]})


def language_model(
    arm: str, seed: int, options: Mapping[str, Any], folder: Path
) -> tuple[dict[str, float], Cost, Curve]:
    """Two blocks of width 96 on bytes; the loss in nats per byte on the last tenth of the text."""
    import torch

    from lossmith.losses import cross_entropy
    from lossmith.training.models import build_model, extra_multiplications, matmul_parameters

    length, batch_size, steps = 64, int(options["batch_size"]), int(options["steps"])
    data = torch.frombuffer(bytearray(Path(options["text"]).read_bytes()), dtype=torch.uint8).long()
    rows = data[: len(data) // (length + 1) * (length + 1)].view(-1, length + 1)
    known, held_out = rows[: len(rows) * 9 // 10], rows[len(rows) * 9 // 10 :]
    held_out = held_out[:: max(len(held_out) // int(options["held_out"]), 1)]
    torch.manual_seed(seed)
    shape = {"hidden_size": WIDTH, "intermediate_size": INNER}
    model = build_model("tiny", vocab_size=BYTES, sequence_length=length, overrides=shape)
    converted(arm, model)
    number = matmul_parameters(model)
    multiplied = number + extra_multiplications(model)

    def loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        logits = model(input_ids=batch["rows"][:, :-1]).logits
        return cross_entropy(logits, batch["rows"][:, 1:]).mean(-1)

    started = time.perf_counter()
    trained = train_on_tensors(
        model,
        {"rows": known},
        loss,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        folder=folder,
        tokens_per_example=length,
        use_cpu=not torch.cuda.is_available(),
        learning_rate=float(options["learning_rate"]),
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=max(steps // 10, 1),
        weight_decay=0.01,
        max_grad_norm=0.5,
    )
    seconds = time.perf_counter() - started
    model.eval()
    with torch.no_grad():
        parts = [loss(model, {"rows": part.to(model.device)}).double() for part in held_out.split(64)]  # type: ignore[arg-type]
    tokens = steps * batch_size * length
    cost = Cost(tokens=tokens, steps=steps, seconds=seconds, flops=6.0 * multiplied * tokens)
    metrics = {"loss": float(torch.cat(parts).mean()), "parameters": float(number)}
    return metrics, cost, trained.curve


def prepare(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The beginning of the user's text, or of the embedded corpus."""
    from lossmith.data import read_corpus
    from lossmith.errors import InputError
    from lossmith.files import write_text

    path, text = folder / "text.txt", ""
    if not path.exists():
        for document in read_corpus(str(options.get("data") or "python")):
            text += document.text + "\n"
            if len(text) >= options["characters"]:
                break
        if len(text) < 2000:
            raise InputError(f"--data {options.get('data')} has {len(text)} characters; the study needs 2000 or more")
        write_text(path, text[: int(options["characters"])])
    return {"text": str(path)}


def comparison(scale: str, data: str | None) -> tuple[CompareSettings, tuple[Claim, ...]]:
    """``full``: LLaMA 60M on C4, rank 128, 10,000 steps of 512 sequences of 256 tokens."""
    low = {"learning_rate": 6e-3}
    arms: list[dict[str, Any]] = [
        {"full": {"learning_rate": 1e-3}},
        {"low_rank": {"weights": "low_rank(rank=128)", **low}},
        {"cola": {"weights": "cola(rank=128)", **low}},
        {"sltrain": {"weights": "sltrain(rank=128, density=0.03, alpha=32)", "learning_rate": 3e-3}},
        {"lost": {"weights": "lost(rank=128, density=0.05, gamma=0.5)", **low}},
        {"lost_0.7": {"weights": "lost(rank=128, density=0.05, gamma=0.7)", **low}},
        {"lost_0.9": {"weights": "lost(rank=128, density=0.05, gamma=0.9)", **low}},
        {"lost_few": {"weights": "lost(rank=128, density=0.01, gamma=0.7)", **low}},
        {"random": {"weights": "lost(rank=128, density=0.05, columns=random)", **low}},
    ]
    values: dict[str, Any] = {
        "data": data or "allenai/c4",
        "arms": arms,
        "baseline": "full",
        "model": "small",
        "model_overrides": {
            "hidden_size": 512,
            "intermediate_size": 1376,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "tie_word_embeddings": False,
            "initializer_range": 0.02,
        },
        "vocab_size": 32_000,
        "packing": "concatenated",
        "sequence_length": 256,
        "batch_size": 512,
        "tokens": 10_000 * 512 * 256,
        "eval_tokens": 10_000_000,
        "evaluations": 10,
        "training": {
            "lr_scheduler_type": "cosine_with_min_lr",
            "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
            "warmup_steps": 2000,
            "weight_decay": 0.01,
            "adam_beta2": 0.999,
            "max_grad_norm": 0.5,
        },
    }
    claims = (
        Claim("LOST is no worse than full rank (0.02 nats)", "lost", "eval/loss", margin=-0.02),
        Claim("LOST is better than a plain pair", "lost", "eval/loss", against="low_rank"),
        Claim("LOST is better than CoLA", "lost", "eval/loss", against="cola"),
        Claim("LOST is better than SLTrain", "lost", "eval/loss", against="sltrain"),
        Claim("Columns of the spectrum are no worse than random ones (0.02 nats)", "lost", "eval/loss",
              against="random", margin=-0.02),
    )  # fmt: skip
    return make_settings(values), claims


STUDY = Study(
    slug="lost",
    family="sparsity",
    question="Is a model of low-rank pairs and a few full columns worth one of full rank?",
    paper=Paper("LOST: Low-rank and Sparse Pre-training for Large Language Models", 2025, "2508.02668"),
    arms=ARMS,
    baseline="full",
    metric="loss",
    metrics=("loss", "layer/error", "layer/found", "parameters"),
    better={"layer/error": "lower", "layer/found": "higher"},
    claims=CLAIMS,
    seeds={"smoke": 2, "quick": 5, "full": 3},
    options={
        "smoke": {
            "steps": 6,
            "batch_size": 4,
            "learning_rate": 6e-3,
            "characters": 40_000,
            "held_out": 20,
            "layer_steps": 20,
        },
        "quick": {
            "steps": 100,
            "batch_size": 8,
            "learning_rate": 6e-3,
            "characters": 1_500_000,
            "held_out": 300,
            "layer_steps": 800,
        },
    },
    experiment=experiment,
    prepare=prepare,
    comparison=comparison,
    data="a text, or a folder or data set of texts",
    notes=(
        "loss: nats per byte on the last tenth of the text. parameters: all matrices, the output layer among them.",
        "layer/error: mean squared error of one layer that has learned a known matrix, over that of zero; layer/found: "
        "how many of its three strong columns were kept."
        " Arms with SiLU are not asked: their layers are no matrices.",
        "One learning rate for all arms, not tuned. Cost is that of the language model.",
    ),
)
