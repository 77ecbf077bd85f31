"""Adapting a language model to a domain: continual pre-training, full or by LoRA, with forgetting measured."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow.compute as pc
import transformers
from torch import nn

from lossmith.data import PaddedCollator, read_corpus
from lossmith.errors import InputError, did_you_mean
from lossmith.files import replacing
from lossmith.training.continual import MixtureTrainer, training_arguments
from lossmith.training.language_model import micro_batch
from lossmith.training.low_rank_adaptation import LowRankAdaptation
from lossmith.training.models import matmul_parameters
from lossmith.training.objectives import NextToken
from lossmith.training.trainer import Trainer, evaluation_metrics

if TYPE_CHECKING:
    from lossmith.data import PreparedCorpus

METHODS = ("full", "lora")
GENERAL = "general"


@dataclass(frozen=True, slots=True)
class Adaptation:
    """What adaptation did.

    Attributes:
        method: ``full`` or ``lora``.
        before, after: nats per token on held-out text, by domain; the general text's under its own name.
        general: that name; empty where there is no general text.
        tokens: predicted in training.
        steps: optimiser steps.
        flops: of training; LoRA computes no gradients of the frozen weights, which are a third of the work.
        seconds: of training.
        gradient_norm: mean over the logged steps, before clipping.
        trainable: parameters that were trained.
    """

    method: str
    before: Mapping[str, float]
    after: Mapping[str, float]
    general: str
    tokens: int
    steps: int
    flops: float
    seconds: float
    gradient_norm: float
    trainable: int

    @property
    def forgetting(self) -> float | None:
        """How far the loss on general text has risen; ``None`` without general text."""
        return self.after[self.general] - self.before[self.general] if self.general else None

    def summary(self) -> str:
        """Losses before and after, by domain."""
        # A part of the domain with hardly any text has nothing held out.
        lines = [f"{'nats per token':<20}{'before':>9}{'after':>9}{'change':>9}"]
        for name in [name for name in self.before if name != self.general] + [self.general] * bool(self.general):
            before, after = self.before[name], self.after[name]
            shown = f"{name} (general)" if name == self.general and name != GENERAL else name
            lines.append(f"{shown:<20}{before:>9.4f}{after:>9.4f}{after - before:>+9.4f}")
        return "\n".join(lines)


def combine_sources(
    domain: str,
    general: str | None,
    path: str | Path,
    *,
    text_field: str = "text",
    category_field: str | None = None,
    general_field: str = "text",
) -> Path:
    """Write the texts of a domain and general ones into one JSONL file, each with its ``domain``.

    Args:
        domain: a corpus, as ``lossmith curate`` writes it or anything that ``read_corpus`` reads.
        general: another one, or ``None``.
        path: of the file to write.
        text_field: the column of the domain's texts.
        category_field: the column that names its parts; without, it is one part called ``domain``.
        general_field: the column of the general texts.

    Raises:
        InputError: a part of the domain is called ``general``.
    """

    def lines() -> Iterator[str]:
        for document in read_corpus(domain, text_field=text_field, domain_field=category_field):
            name = (document.domain or "domain") if category_field else "domain"
            if name == GENERAL and general is not None:
                raise InputError(f"{document.source}: a part of the domain must not be called '{GENERAL}'")
            yield json.dumps({"text": document.text, "domain": name}) + "\n"
        if general is not None:
            for document in read_corpus(general, text_field=general_field):
                yield json.dumps({"text": document.text, "domain": GENERAL}) + "\n"

    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        stream.writelines(lines())
    return Path(path)


def adapt_language_model(
    model: nn.Module,
    corpus: PreparedCorpus,
    *,
    folder: str | Path,
    domains: Sequence[str] | None = None,
    general: str | None = GENERAL,
    replay_fraction: float = 0.0,
    method: Literal["full", "lora"] = "full",
    rank: int = 16,
    alpha: float | None = None,
    target_modules: str | list[str] = "all-linear",
    adapter: str | Path | None = None,
    epochs: float = 1.0,
    steps: int | None = None,
    batch_size: int = 16,
    micro_batch_size: int | None = None,
    seed: int = 0,
    loss: str = "cross_entropy",
    eval_rows: int | None = None,
    **arguments: Any,
) -> tuple[nn.Module, Adaptation]:
    """Continue pre-training on a domain, perhaps with general text replayed beside it, and measure both.

    The mean next-token loss over packed rows; AdamW (0.9, 0.95) with weight decay 0.1, warm-up of 3 % and a cosine to
    zero; learning rate 1e-4, which suits about a billion parameters (4e-5 for 2, 1e-5 for 8; LoRA takes 3 to 10 times
    as much). Losses are those of all validation rows of a domain, before the first step and after the last.

    Args:
        model: a causal language model, trained in place.
        corpus: see :func:`lossmith.data.prepare`; ``packing="concatenated"`` is the usual one.
        folder: for the Trainer's own files.
        domains: to train on; by default all but ``general``.
        general: the domain that is not to be forgotten; measured, and replayed where ``replay_fraction`` says so. By
            default ``general`` where the corpus has it.
        replay_fraction: share of the tokens that are general; 0 is the paper's, 0.1 to 0.3 keep a small model from
            forgetting.
        method: ``full``, or ``lora`` (the package ``peft``), whose weights are merged at the end.
        rank, alpha, target_modules: of LoRA, see :class:`LowRankAdaptation`.
        adapter: folder to keep the adapter in, before it is merged.
        epochs: passes over the domain.
        steps: optimiser steps instead.
        batch_size: rows per step.
        micro_batch_size: rows in memory at a time.
        seed: of the order, and of the adapters; the same for both methods.
        loss: a registered loss.
        eval_rows: validation rows of each domain, evenly spaced; all by default.
        **arguments: of ``transformers.TrainingArguments``.

    Returns:
        The adapted model, which with LoRA is the merged one, and what was measured.

    Raises:
        InputError: no such domain, a replay fraction outside [0, 1) or without general text, an unknown method.

    Source: "Tele-LLMs: A Series of Specialized Large Language Models for Telecommunications", 2024, arXiv 2409.05314;
    replay is not part of it.

    >>> model, found = adapt_language_model(model, corpus, folder="run", method="lora")  # doctest: +SKIP
    >>> print(found.summary())  # doctest: +SKIP
    """
    if method not in METHODS:
        raise InputError(f"unknown method '{method}': {did_you_mean(method, METHODS)}")
    if not 0 <= replay_fraction < 1:
        raise InputError(f"replay_fraction must be at least 0 and less than 1, got {replay_fraction:g}")
    parts = AdaptationRows.of(corpus, domains, general, eval_rows)
    if replay_fraction and not parts.general:
        raise InputError("replay_fraction needs general text: give a corpus with a general domain that has rows")
    transformers.utils.logging.set_verbosity_error()
    if steps is None:
        if not epochs > 0:
            raise InputError(f"epochs must be above 0, got {epochs:g}")
        steps = max(1, round(epochs * len(parts.domain) / (1 - replay_fraction) / batch_size))
    before = domain_losses(model, corpus, rows=parts.validation, batch_size=batch_size, folder=folder)
    total = sum(p.numel() for p in model.parameters())
    adaptation = None
    if method == "lora":
        adaptation = LowRankAdaptation(model, rank=rank, alpha=alpha, target_modules=target_modules, seed=seed)
    weights = matmul_parameters(model)
    trainable = adaptation.trainable if adaptation else total
    micro = micro_batch(batch_size, micro_batch_size, 1)
    options = {
        "learning_rate": 1e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, round(0.03 * steps)),
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "logging_steps": max(1, steps // 50),
        **arguments,
    }
    trainer = MixtureTrainer(
        model,
        training_arguments(
            folder, steps=steps, batch_size=micro, seed=seed, gradient_accumulation_steps=batch_size // micro, **options
        ),
        objective=NextToken(loss),
        parts=[parts.general, parts.domain],
        shares=[replay_fraction, 1 - replay_fraction],
        lengths=pc.list_value_length(corpus.train.data.column("input_ids")).to_numpy(),
        train_dataset=corpus.train,
        data_collator=PaddedCollator(int(corpus.tokenizer.pad_token_id)),  # type: ignore[arg-type]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    flops = float(trainer.state.total_flos)
    if adaptation is not None:
        if adapter is not None:
            adaptation.save_adapter(adapter)
        model = adaptation.merge()
        # Forward, and gradients of what each layer reads: two thirds; gradients of the adapters' own weights.
        flops *= (4 * weights + 2 * trainable) / (6 * weights)
    after = domain_losses(model, corpus, rows=parts.validation, batch_size=batch_size, folder=folder)
    norms = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
    return model, Adaptation(
        method=method,
        before=before,
        after=after,
        general=parts.name,
        tokens=int(trainer.state.num_input_tokens_seen),
        steps=steps,
        flops=flops,
        seconds=float(max((line.get("seconds", 0.0) for line in trainer.state.log_history), default=0.0)),
        gradient_norm=float(np.mean(norms)) if norms else float("nan"),
        trainable=trainable,
    )


def domain_losses(
    model: nn.Module,
    corpus: PreparedCorpus,
    *,
    folder: str | Path,
    rows: Sequence[int] | None = None,
    batch_size: int = 16,
) -> dict[str, float]:
    """Nats per token on the validation rows of each domain (of ``rows``, or all)."""
    data = corpus.validation if rows is None else corpus.validation.select(list(rows))
    trainer = Trainer(
        model,
        training_arguments(folder, steps=1, batch_size=batch_size, seed=0),
        objective=NextToken(),
        eval_dataset=data,
        data_collator=PaddedCollator(int(corpus.tokenizer.pad_token_id)),  # type: ignore[arg-type]
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.evaluate()
    assert trainer.last_evaluation is not None
    if len(corpus.domains) == 1:
        return {corpus.domains[0]: evaluation_metrics(trainer.last_evaluation)["eval_loss"]}
    names = tuple(map(str, range(len(corpus.domains))))
    found = evaluation_metrics(trainer.last_evaluation, domains=names)
    losses = {name: found.get(f"eval_{number}_loss") for number, name in enumerate(corpus.domains)}
    return {name: float(loss) for name, loss in losses.items() if loss is not None}


@dataclass(frozen=True, slots=True)
class AdaptationRows:
    """Which rows of a corpus are trained on, and which judge.

    Attributes:
        domain: training rows of the domains.
        general: training rows of the general text.
        validation: rows of all domains to judge on.
        name: of the general text's domain; empty where there is none.
    """

    domain: tuple[int, ...]
    general: tuple[int, ...]
    validation: tuple[int, ...]
    name: str

    @classmethod
    def of(
        cls, corpus: PreparedCorpus, domains: Sequence[str] | None, general: str | None, eval_rows: int | None
    ) -> AdaptationRows:
        """Find them in a prepared corpus; see :func:`adapt_language_model` for the arguments and errors."""
        if general is not None and general not in corpus.domains:
            if general != GENERAL:
                raise InputError(
                    f"general: {corpus.source} has no domain '{general}': {did_you_mean(general, corpus.domains)}"
                )
            general = None
        for name in domains or ():
            if name not in corpus.domains:
                raise InputError(f"{corpus.source} has no domain '{name}': {did_you_mean(name, corpus.domains)}")
        chosen = [name for name in (domains or corpus.domains) if name != general]
        if not chosen:
            raise InputError(f"{corpus.source} has no text but the general one")
        train, held_out = (split.data.column("domain").to_numpy() for split in (corpus.train, corpus.validation))

        def rows(column: Any, names: Sequence[str | None]) -> list[int]:
            wanted = [corpus.domains.index(name) for name in names if name is not None]
            return [int(row) for row in np.flatnonzero(np.isin(column, wanted))]

        validation: list[int] = []
        for name in corpus.domains:
            found = rows(held_out, [name])
            if eval_rows is not None and eval_rows < len(found):
                found = [found[i * len(found) // eval_rows] for i in range(eval_rows)]
            if not found and (name == general or chosen == [name]):
                raise InputError(
                    f"{corpus.source} has too little text of '{name}' to judge on: no document of it is held out; give "
                    "more documents"
                )
            validation += found
        domain = rows(train, chosen)
        if not domain:
            raise InputError(f"{corpus.source} has no row to train on in {', '.join(chosen)}")
        return cls(tuple(domain), tuple(rows(train, [general])), tuple(sorted(validation)), general or "")
