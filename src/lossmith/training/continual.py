"""Continual pre-training on a mixture: general data replayed beside the data of a domain, both losses watched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
import transformers
from torch import nn
from transformers.trainer_callback import TrainerCallback

from lossmith.data import PaddedCollator
from lossmith.data.mixture import MixtureSampler
from lossmith.errors import InputError, did_you_mean
from lossmith.training.language_model import micro_batch
from lossmith.training.objectives import NextToken
from lossmith.training.trainer import Trainer, evaluation_metrics

if TYPE_CHECKING:
    from lossmith.data import PreparedCorpus


class MixtureTrainer(Trainer):
    """A :class:`lossmith.training.Trainer` whose batches have parts of the training data in given shares.

    Args:
        model: as for ``Trainer``.
        args: with ``max_steps``; the order of examples depends on ``data_seed`` (or ``seed``) alone.
        parts: for each part the indices of its examples in ``train_dataset``.
        shares: of the examples, or of the tokens where ``lengths`` are given; see
            :class:`lossmith.data.MixtureSampler`, which also says how exactly batches keep them.
        lengths: tokens of every example of ``train_dataset``.
        **kwargs: as for ``Trainer``.

    Raises:
        lossmith.errors.InputError: shares that do not fit the parts.
        ValueError: no ``max_steps``.
    """

    def __init__(
        self,
        model: Any = None,
        args: transformers.TrainingArguments | None = None,
        *,
        parts: Sequence[Sequence[int]],
        shares: Sequence[float],
        lengths: Sequence[int] | None = None,
        **kwargs: Any,
    ):
        if args is None or args.max_steps <= 0:
            raise ValueError("a mixture has no epochs: give args with max_steps")
        self.parts, self.shares, self.lengths = parts, shares, lengths
        super().__init__(model, args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> MixtureSampler:
        args = self.args
        per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return MixtureSampler(
            self.parts,
            self.shares,
            total=args.max_steps * per_step,
            seed=args.seed if args.data_seed is None else args.data_seed,
            lengths=self.lengths,
        )


@dataclass(frozen=True, slots=True)
class MixtureLog:
    """Both losses along one run of continual pre-training: a share's rows for :class:`lossmith.laws.CriticalMixture`.

    Attributes:
        ratio: share of domain tokens.
        tokens: positions trained on, at each evaluation.
        general_loss, domain_loss: nats per token on held-out text, at each evaluation.
        base_general, base_domain: the same before the first step.
        steps: optimiser steps.
        flops, seconds: of training.
    """

    ratio: float
    tokens: tuple[int, ...]
    general_loss: tuple[float, ...]
    domain_loss: tuple[float, ...]
    base_general: float
    base_domain: float
    steps: int
    flops: float
    seconds: float

    def rows(self, **more: Any) -> list[dict[str, Any]]:
        """One row per evaluation, with the columns that the law needs, and ``more`` (``run``, ``params``)."""
        shared = {"ratio": self.ratio, "base_general": self.base_general, "base_domain": self.base_domain, **more}
        return [
            {**shared, "tokens": tokens, "general_loss": general, "domain_loss": domain}
            for tokens, general, domain in zip(self.tokens, self.general_loss, self.domain_loss, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class MixtureRows:
    """Which rows of a corpus are general and which belong to the domain.

    Attributes:
        general, domain: indices of training rows.
        validation: indices of validation rows, evenly spaced within each.
        numbers: the corpus' numbers of the two domains.
    """

    general: tuple[int, ...]
    domain: tuple[int, ...]
    validation: tuple[int, ...]
    numbers: tuple[int, int]

    @classmethod
    def of(cls, corpus: PreparedCorpus, general: str, domain: str, *, eval_rows: int | None = None) -> MixtureRows:
        """Find two domains of a prepared corpus by name.

        Args:
            corpus: see :func:`lossmith.data.prepare`.
            general: domain that must not be forgotten.
            domain: domain to be learnt.
            eval_rows: validation rows of each, all by default.

        Raises:
            InputError: no such domain (names those that are there), or one without text on a side.
        """
        for what, name in (("general", general), ("domain", domain)):
            if name not in corpus.domains:
                raise InputError(
                    f"{what}: {corpus.source} has no domain '{name}': {did_you_mean(name, corpus.domains)}"
                )
        if general == domain:
            raise InputError(f"general and domain are both '{general}': a mixture needs two")
        found: list[tuple[int, ...]] = []
        validation: list[int] = []
        for name in (general, domain):
            number = corpus.domains.index(name)
            train, held_out = (
                np.flatnonzero(split.data.column("domain").to_numpy() == number).tolist()
                for split in (corpus.train, corpus.validation)
            )
            if not train or not held_out:
                raise InputError(f"{corpus.source} has too little text of domain '{name}' to train and to evaluate on")
            if eval_rows is not None and eval_rows < len(held_out):
                held_out = [held_out[i * len(held_out) // eval_rows] for i in range(eval_rows)]
            found.append(tuple(train))
            validation += held_out
        numbers = (corpus.domains.index(general), corpus.domains.index(domain))
        return cls(found[0], found[1], tuple(sorted(validation)), numbers)


def continual_pretraining(
    model: nn.Module,
    corpus: PreparedCorpus,
    rows: MixtureRows,
    *,
    ratio: float,
    steps: int,
    batch_size: int,
    seed: int,
    folder: str | Path,
    micro_batch_size: int | None = None,
    evaluations: int = 20,
    loss: str = "cross_entropy",
    **arguments: Any,
) -> MixtureLog:
    """Train ``model`` in place on ``ratio`` domain tokens and ``1 - ratio`` general tokens, watching both losses.

    The learning rate is constant after a warm-up of 1 % of the steps unless ``arguments`` say otherwise: a decaying
    rate lowers both losses by itself, and hides when general loss turns.

    Args:
        model: any causal language model, as it is before.
        corpus: the text.
        rows: which rows of it are general and domain.
        ratio: share of domain tokens, 0 to 1.
        steps: optimiser steps.
        batch_size: rows per step.
        seed: of the order: the same for every ratio, so that all of them see the same rows of a part in the same order.
        folder: for the Trainer's own files.
        micro_batch_size: rows in memory at a time; the rest of a batch is gradient accumulation.
        evaluations: how often, at even distances; a law needs at least 8.
        loss: a registered loss.
        **arguments: of ``transformers.TrainingArguments``.

    Raises:
        InputError: a ratio outside [0, 1], or more evaluations than steps.
    """
    if not 0 <= ratio <= 1:
        raise InputError(f"ratio must lie between 0 and 1, got {ratio:g}")
    if not 1 <= evaluations <= steps:
        raise InputError(f"evaluations must lie between 1 and the {steps} steps, got {evaluations}")
    transformers.utils.logging.set_verbosity_error()
    lengths = pc.list_value_length(corpus.train.data.column("input_ids")).to_numpy()
    options = {
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": max(1, steps // 100),
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "logging_steps": max(1, steps // evaluations),
        **arguments,
    }
    micro = micro_batch(batch_size, micro_batch_size, 1)
    args = training_arguments(
        folder, steps=steps, batch_size=micro, seed=seed, gradient_accumulation_steps=batch_size // micro, **options
    )
    watched = _Watch(steps, evaluations)
    trainer = MixtureTrainer(
        model,
        args,
        objective=NextToken(loss),
        parts=[rows.general, rows.domain],
        shares=[1 - ratio, ratio],
        lengths=lengths,
        train_dataset=corpus.train,
        eval_dataset=corpus.validation.select(rows.validation),
        data_collator=PaddedCollator(int(corpus.tokenizer.pad_token_id)),  # type: ignore[arg-type]
        callbacks=[watched],
    )
    trainer.remove_callback(transformers.PrinterCallback)

    watched.losses = lambda: _losses(trainer, rows)
    trainer.evaluate()
    trainer.train()
    (_, before), *after = watched.found
    return MixtureLog(
        ratio=float(ratio),
        tokens=tuple(tokens for tokens, _ in after),
        general_loss=tuple(pair[0] for _, pair in after),
        domain_loss=tuple(pair[1] for _, pair in after),
        base_general=before[0],
        base_domain=before[1],
        steps=steps,
        flops=float(trainer.state.total_flos),
        seconds=float(max(line.get("seconds", 0.0) for line in trainer.state.log_history)),
    )


def _losses(trainer: Trainer, rows: MixtureRows) -> tuple[float, float]:
    """General and domain loss of the trainer's last evaluation."""
    assert trainer.last_evaluation is not None
    names = tuple(map(str, range(max(rows.numbers) + 1)))
    found = evaluation_metrics(trainer.last_evaluation, domains=names)
    return found[f"eval_{rows.numbers[0]}_loss"], found[f"eval_{rows.numbers[1]}_loss"]


def training_arguments(
    folder: str | Path, *, steps: int, batch_size: int, seed: int, **options: Any
) -> transformers.TrainingArguments:
    """``transformers.TrainingArguments`` of a quiet run in one process that leaves no checkpoints.

    Raises:
        InputError: an option that is not accepted.
    """
    import torch

    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "eval_strategy": "no"}
    values = {
        **quiet,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "per_device_eval_batch_size": max(batch_size, 8),
        **options,
    }
    try:
        return transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            seed=seed,
            data_seed=seed,
            **values,
        )
    except (TypeError, ValueError) as error:
        raise InputError(f"training options: {str(error).strip().splitlines()[0]}") from None


class _Watch(TrainerCallback):
    """Asks for evaluations at even distances, the last one after the last step, and keeps what they find."""

    def __init__(self, steps: int, evaluations: int):
        self.at = {round(steps * (i + 1) / evaluations) for i in range(evaluations)}
        self.found: list[tuple[int, tuple[float, float]]] = []
        self.losses: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_evaluate |= state.global_step in self.at

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found.append((int(state.num_input_tokens_seen), self.losses()))
