"""Dynamic reweighting: does weighing each sequence by its own loss help pre-training?

Sow et al., "Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining", 2025,
arXiv 2502.06733.

Four data sets whose answer can be reasoned about: a linear regression and a character model whose training data are
mostly redundant (where the idea should help), the same character model on clean data (no difference expected) and
with noise among the data (where weight must not go, and LinUpper sends it). With ``--data``, and at ``full``, the arms
are language models on real text.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossmith.reporting.comparison import Claim, Cost, Curve
from lossmith.studies.settings import SMOKE, CompareSettings, make_settings
from lossmith.studies.study import Experiment, Paper, Study
from lossmith.studies.tensor_training import train_on_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

ARMS = {
    "uniform": "every sequence counts the same",
    "linupper": "easy sequences lose weight, hard ones are capped, r = 0.4",
    "quadratic": "sequences of middling loss count most, r = 0.4",
    "extremes": "the easiest and the hardest count most, r = 0.4",
}

CLAIMS = (
    Claim(
        "LinUpper needs far fewer steps on redundant regression data",
        "linupper",
        "regression/test_loss",
        ratio=0.25,
    ),
    Claim("Quadratic helps on redundant regression data", "quadratic", "regression/test_loss", ratio=0.7),
    Claim("Extremes does not help on redundant regression data", "extremes", "regression/test_loss", "higher"),
    Claim("LinUpper is at least 0.5 nats better on redundant text", "linupper", "redundant/loss", margin=0.5),
    Claim("Quadratic helps on redundant text", "quadratic", "redundant/loss"),
    Claim(
        "LinUpper is better than Quadratic on redundant text",
        "linupper",
        "redundant/loss",
        against="quadratic",
    ),
    Claim("Extremes harms on redundant text", "extremes", "redundant/loss", "higher"),
    Claim(
        "LinUpper makes no difference (0.05 nats) on clean text",
        "linupper",
        "clean/loss",
        "equal",
        margin=0.05,
    ),
    Claim(
        "LinUpper gives noise more than its share of the weight",
        "linupper",
        "noisy/weight_on_noise",
        "higher",
    ),
)


def experiment(arm: str, seed: int, options: Mapping[str, Any], folder: Path) -> Experiment:
    """All four data sets for one arm and seed."""
    text = Path(options["text"]).read_text(encoding="utf-8")
    started = time.perf_counter()
    metrics = {"regression/test_loss": regression(arm, seed, steps=options["regression_steps"], folder=folder)}
    character = {"text": text, "steps": options["steps"], "folder": folder}
    loss, train = character_model(arm, seed, redundant=0.9, **character)
    metrics["redundant/loss"] = loss
    metrics["clean/loss"], _ = character_model(arm, seed, redundant=0.0, **character)
    watch: list[float] = []
    metrics["noisy/loss"], _ = character_model(arm, seed, redundant=0.0, noisy=0.1, watch=watch, **character)
    metrics["noisy/weight_on_noise"] = sum(watch) / len(watch)
    steps = int(options["steps"])
    tokens = 3 * steps * 64 * CHUNK
    seconds = time.perf_counter() - started
    return Experiment(metrics, Cost(tokens=tokens, steps=3 * steps, seconds=seconds), train=train)


def regression(arm: str, seed: int, *, steps: int, folder: Path) -> float:
    """Noiseless linear regression, 95 % of the examples in a 5-dimensional subspace; loss on isotropic data."""
    import torch
    from torch import nn

    generator = torch.Generator().manual_seed(seed)
    dimension, size, plane = 50, 4000, 5
    solution = torch.randn(dimension, generator=generator)
    basis = torch.linalg.qr(torch.randn(dimension, plane, generator=generator)).Q
    inside = torch.randn(size, plane, generator=generator) @ basis.T / math.sqrt(plane)
    isotropic = torch.randn(size, dimension, generator=generator) / math.sqrt(dimension)
    rare = torch.rand(size, generator=generator) < 0.05
    x = torch.where(rare.unsqueeze(1), isotropic, inside)
    rows = {"x": x, "y": x @ solution}
    model = nn.Linear(dimension, 1, bias=False)
    nn.init.zeros_(model.weight)

    def half_square(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        return 0.5 * (model(batch["x"]).squeeze(-1) - batch["y"]).square()

    _train(
        model,
        rows,
        half_square,
        arm,
        seed,
        folder,
        steps=steps,
        optim="sgd",
        learning_rate=0.5,
        lr_scheduler_type="constant",
        max_grad_norm=1e9,
    )
    test = torch.randn(4000, dimension, generator=generator) / math.sqrt(dimension)
    with torch.no_grad():
        return float(0.5 * (model(test).squeeze(-1) - test @ solution).square().mean())


CHUNK, CONTEXT, WIDTH, REPEATED = 32, 8, 96, 40


def character_model(
    arm: str,
    seed: int,
    *,
    text: str,
    steps: int,
    folder: Path,
    redundant: float,
    noisy: float = 0.0,
    watch: list[float] | None = None,
) -> tuple[float, Curve]:
    """Next-character model (an MLP over 8 characters); loss on fresh chunks, and the training curve.

    Args:
        arm: weighting.
        seed: of data, weights and order.
        text: real text.
        steps: optimiser steps of 64 chunks.
        folder: scratch.
        redundant: share of the training chunks that come from a fixed set of 40.
        noisy: share of the training chunks that are replaced by random characters.
        watch: receives, at every reweighted step, the weight on noise divided by its share of the batch.
    """
    import torch
    from torch import nn

    from lossmith.losses import cross_entropy

    alphabet = sorted(set(text))
    codes = torch.tensor([alphabet.index(c) for c in alphabet])
    lookup = {c: int(i) for c, i in zip(alphabet, codes, strict=True)}
    data = torch.tensor([lookup[c] for c in text])
    generator = torch.Generator().manual_seed(1000 + seed)
    chunks = data[: len(data) // CHUNK * CHUNK].view(-1, CHUNK)
    chunks = chunks[torch.randperm(len(chunks), generator=generator)]
    validation, repeated, fresh = chunks[:200], chunks[200 : 200 + REPEATED], chunks[200 + REPEATED :]
    number = steps * 64
    again = torch.rand(number, generator=generator) < redundant
    rows = fresh[torch.randint(len(fresh), (number,), generator=generator)]
    rows[again] = repeated[torch.randint(REPEATED, (int(again.sum()),), generator=generator)]
    noise = torch.rand(number, generator=generator) < noisy
    rows[noise] = torch.randint(len(alphabet), (int(noise.sum()), CHUNK), generator=generator)

    torch.manual_seed(seed)
    embedded = 16
    model = nn.Sequential(
        nn.Embedding(len(alphabet), embedded),
        nn.Flatten(-2),
        nn.Linear(CONTEXT * embedded, WIDTH),
        nn.Tanh(),
        nn.Linear(WIDTH, len(alphabet)),
    )

    def chunk_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        windows = batch["chunk"].unfold(-1, CONTEXT, 1)[:, :-1]
        return cross_entropy(model(windows), batch["chunk"][:, CONTEXT:]).mean(-1)

    training = {"chunk": rows, "noise": noise}
    weighting = _watched(arm, watch) if watch is not None else None
    curve = _train(model, training, chunk_loss, arm, seed, folder, steps=steps, weighting=weighting, learning_rate=2e-3)
    with torch.no_grad():
        return float(chunk_loss(model, {"chunk": validation}).mean()), curve


def _train(
    model: nn.Module,
    columns: Mapping[str, Tensor],
    objective: Callable[..., Tensor],
    arm: str,
    seed: int,
    folder: Path,
    *,
    steps: int,
    weighting: Any = None,
    **arguments: Any,
) -> Curve:
    from lossmith.registry import WEIGHTINGS

    return train_on_tensors(
        model,
        columns,
        objective,
        steps=steps,
        batch_size=64,
        seed=seed,
        folder=folder,
        weighting=weighting or WEIGHTINGS.build(_spec(arm)),
        tokens_per_example=CHUNK,
        **arguments,
    ).curve


def _spec(arm: str) -> str:
    return "uniform" if arm == "uniform" else f"{arm}(r=0.4, burn_in_steps=20)"


class _watched:
    """The arm's weighting, noting how much weight falls on noise."""

    def __init__(self, arm: str, noted: list[float]):
        from lossmith.registry import WEIGHTINGS

        self.weighting, self.noted = WEIGHTINGS.build(_spec(arm)), noted
        self._noise: torch.Tensor | None = None

    def needs_losses(self, step: int) -> bool:
        return True

    def attach(self, objective: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def remembering(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
            self._noise = batch["noise"]
            return objective(model, batch)

        return remembering

    def __call__(self, losses: Tensor, step: int) -> Tensor:
        weights = self.weighting(losses, step)
        assert self._noise is not None
        share = self._noise.double().mean()
        if share > 0 and step >= 20:
            self.noted.append(float(weights[self._noise].sum() / share))
        return weights


def prepare(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Real text for the character model, read once: the beginning of the embedded corpus, printable ASCII."""
    from lossmith.data import read_corpus
    from lossmith.files import write_text

    path = folder / "text.txt"
    if not path.exists():
        text = ""
        for document in read_corpus("python"):
            text += "".join(c for c in document.text if c == "\n" or " " <= c <= "~") + "\n"
            if len(text) >= options["characters"]:
                break
        write_text(path, text[: options["characters"]])
    return {"text": str(path)}


def comparison(scale: str, data: str | None) -> tuple[CompareSettings, tuple[Claim, ...]]:
    """The arms as language models: on the user's data, or (``full``) the paper's GPT-2 with 684M parameters."""
    burn_in = {"smoke": 2, "quick": 20, "full": 1000}[scale]
    arms = ["uniform: weighting=uniform"]
    arms += [f"{a}: weighting={a}(r=0.4, burn_in_steps={burn_in})" for a in ("linupper", "quadratic", "extremes")]
    values: dict[str, Any] = {"arms": arms, "baseline": "uniform"}
    if data is not None:
        values["data"] = data
    if scale == "smoke":
        values |= SMOKE
    if scale == "full":
        values |= {
            "data": data or "DKYoon/SlimPajama-6B",
            "domain_field": None if data else "meta.redpajama_set_name",
            "model": "openai-community/gpt2",
            "random_weights": True,
            "model_overrides": {"n_layer": 36, "n_head": 24, "n_embd": 768},
            "packing": "concatenated",
            "sequence_length": 512,
            "batch_size": 48,
            "tokens": 20_000 * 48 * 512,
            "eval_tokens": 2_000_000,
            "evaluations": 10,
            "training": {
                "learning_rate": 5e-4,
                "lr_scheduler_type": "cosine_with_min_lr",
                "lr_scheduler_kwargs": {"min_lr": 1e-4},
                "warmup_steps": 500,
                "weight_decay": 0.01,
            },
        }
    claims = (
        Claim("LinUpper reaches a lower validation loss than uniform weights", "linupper", "eval/loss"),
        Claim(
            "LinUpper is the best of the three strategies (against Quadratic)",
            "linupper",
            "eval/loss",
            against="quadratic",
        ),
        Claim(
            "LinUpper is the best of the three strategies (against Extremes)",
            "linupper",
            "eval/loss",
            against="extremes",
        ),
    )
    return make_settings(values), claims


STUDY = Study(
    slug="dynamic-reweighting",
    family="data",
    question="Does weighing each sequence by its own loss help pre-training, and when?",
    paper=Paper(
        "Dynamic Loss-Based Sample Reweighting for Improved Large Language Model Pretraining",
        2025,
        "2502.06733",
    ),
    arms=ARMS,
    baseline="uniform",
    metric="redundant/loss",
    metrics=("redundant/loss", "regression/test_loss", "clean/loss", "noisy/loss", "noisy/weight_on_noise"),
    claims=CLAIMS,
    seeds={"smoke": 2, "quick": 4, "full": 3},
    options={
        "smoke": {"regression_steps": 40, "steps": 25, "characters": 60_000},
        "quick": {"regression_steps": 800, "steps": 400, "characters": 1_000_000},
    },
    experiment=experiment,
    prepare=prepare,
    comparison=comparison,
    better={"regression/test_loss": "lower", "clean/loss": "lower", "noisy/loss": "lower"},
    notes=(
        "redundant/loss: nats per character on fresh text after training on batches of which 90 % repeat 40 chunks; "
        "regression/test_loss: 95 % of the examples lie in 5 of 50 dimensions; clean/loss: no repetition; "
        "noisy/loss: 10 % of the chunks are random characters; noisy/weight_on_noise: their weight over their share.",
    ),
)
