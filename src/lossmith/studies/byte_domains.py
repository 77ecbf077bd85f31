"""Byte models on domains of very different size: the data, the model, and a loss per domain along the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from transformers.trainer_callback import TrainerCallback

from lossmith.data.sampling import TemperatureSampling
from lossmith.files import replacing
from lossmith.losses import cross_entropy
from lossmith.probes import GradientVarianceReport, measure_gradients
from lossmith.registry import SAMPLERS, WEIGHTINGS
from lossmith.studies.tensor_training import Trained, train_on_tensors
from lossmith.training.networks import WordWindow

LARGE, SMALL = "code", "docs"
# Bytes above 127, which are rare here, count as one symbol.
SYMBOLS, CONTEXT, EMBEDDING = 128, 8, 16

Chunks = dict[str, UInt8[Tensor, "chunks length"]]


@dataclass(frozen=True, slots=True)
class Curves:
    """Validation loss of both domains along a run, nats per byte."""

    steps: tuple[int, ...]
    large: tuple[float, ...]
    small: tuple[float, ...]


def write_chunks(path: Path, *, length: int, large: int, small: int, validation: int) -> None:
    """The embedded corpus as chunks of bytes: code and documentation, with documents of their own for validation.

    Args:
        path: a safetensors file.
        length: bytes of a chunk.
        large: chunks of code to train on, at most.
        small: chunks of documentation to draw from, at most.
        validation: chunks of each held out.
    """
    from safetensors.torch import save_file

    from lossmith.data import read_corpus

    kept: dict[str, list[bytes]] = {LARGE: [], SMALL: []}
    for document in read_corpus("python"):
        kept[str(document.domain)].append(document.text.encode() + b"\n")
    tensors = {}
    for name, most in ((LARGE, large), (SMALL, small)):
        order = torch.randperm(len(kept[name]), generator=torch.Generator().manual_seed(0)).tolist()
        documents = [kept[name][i] for i in order]
        held = max(1, len(documents) // 10)
        for split, part, number in (("validation", documents[:held], validation), ("train", documents[held:], most)):
            whole = torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8)
            chunks = whole[: len(whole) // length * length].view(-1, length)
            chosen = torch.randperm(len(chunks), generator=torch.Generator().manual_seed(1))[:number]
            tensors[f"{split}/{name}"] = chunks[chosen].clamp_max(SYMBOLS - 1)
    with replacing(path) as temporary:
        save_file(tensors, temporary)


def read_chunks(path: str | Path, split: str) -> Chunks:
    """The chunks of both domains."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    return {name: tensors[f"{split}/{name}"] for name in (LARGE, SMALL)}


def byte_model(seed: int, width: int) -> nn.Module:
    """Next byte from the last eight: embeddings and two hidden layers."""
    torch.manual_seed(seed)
    return WordWindow(SYMBOLS, CONTEXT, EMBEDDING, (width, width), nn.Sequential(nn.ReLU(), nn.Linear(width, SYMBOLS)))


def chunk_losses(model: nn.Module, batch: Mapping[str, Any]) -> Float[Tensor, " chunks"]:
    """Mean next-byte loss of each chunk, the first eight bytes given."""
    chunks = batch["chunk"].long()
    windows = chunks.unfold(-1, CONTEXT, 1)[:, :-1]
    logits = model(windows.flatten(0, 1)).view(*windows.shape[:2], -1)
    return cross_entropy(logits, chunks[:, CONTEXT:]).mean(-1)


@torch.no_grad()
def validation_losses(model: nn.Module, validation: Chunks) -> dict[str, float]:
    """Loss of each domain, nats per byte."""
    return {name: float(chunk_losses(model, {"chunk": chunks}).double().mean()) for name, chunks in validation.items()}


class _Watch(TrainerCallback):
    """Validation losses at evenly spaced steps."""

    def __init__(self, validation: Chunks, every: int):
        self.validation, self.every = validation, every
        self.found: dict[int, dict[str, float]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self.found[state.global_step] = validation_losses(model, self.validation)


def train_on_domains(
    model: nn.Module,
    train: Chunks,
    validation: Chunks,
    *,
    sampler: str,
    weighting: str = "uniform",
    steps: int,
    batch_size: int,
    evaluations: int,
    seed: int,
    folder: Path,
    learning_rate: float,
) -> tuple[Curves, Trained, float]:
    """Train on both domains; returns the curves, the cost, and how often the small domain was passed through.

    Args:
        model: trained in place.
        train: chunks to train on.
        validation: chunks to evaluate on.
        sampler: a name with options.
        weighting: likewise.
        steps: optimiser steps.
        batch_size: chunks per step.
        evaluations: along the run, the last at its end.
        seed: of the order.
        folder: scratch.
        learning_rate: constant.
    """
    transformers.utils.logging.set_verbosity_error()
    domains = torch.cat([torch.full((len(chunks),), number) for number, chunks in enumerate(train.values())])
    sampling = TemperatureSampling(SAMPLERS.build(sampler).tau, domains)
    weigh = WEIGHTINGS.build(weighting)
    if getattr(weigh, "by_domain", False):
        weigh = weigh.for_domains([len(chunks) for chunks in train.values()], steps)
    watch = _Watch(validation, max(1, steps // evaluations))
    trained = train_on_tensors(
        model,
        {"chunk": torch.cat(list(train.values())), "domain": domains},
        chunk_losses,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        folder=folder,
        weighting=weigh,
        sampler=sampling,
        tokens_per_example=next(iter(train.values())).shape[1] - CONTEXT,
        callbacks=[watch],
        learning_rate=learning_rate,
        logging_steps=max(1, steps // 20),
    )
    passes = sampling.draw(None, steps=steps, batch_size=batch_size, seed=seed).passes()
    curves = Curves(
        tuple(watch.found),
        tuple(losses[LARGE] for losses in watch.found.values()),
        tuple(losses[SMALL] for losses in watch.found.values()),
    )
    return curves, trained, float(passes[1])


def variance_of_gradient(
    model: nn.Module, train: Chunks, *, examples: int, tau: float, seed: int
) -> GradientVarianceReport:
    """The probe on some chunks of each domain."""
    generator = torch.Generator().manual_seed(seed)
    chosen = {
        name: list(chunks[torch.randperm(len(chunks), generator=generator)[:examples]].unsqueeze(1))
        for name, chunks in train.items()
    }
    sizes = {name: len(chunks) for name, chunks in train.items()}
    return measure_gradients(
        model, lambda model, chunk: chunk_losses(model, {"chunk": chunk}).sum(), chosen, sizes, tau=tau
    )
