"""Faults of training loops: each check passes with our Trainer and fails with the faulty one.

Where the installed transformers still has the fault, its own Trainer is the exhibit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from lossmith.data import PaddedCollator
from lossmith.data.weighting import uniform
from lossmith.training import NextToken, NonFiniteLossError, Trainer

transformers.utils.logging.set_verbosity_error()

LENGTHS = [3, 20, 5, 4, 18, 3, 19, 6]
ROWS = [{"input_ids": [(7 * i + k * k) % 40 for k in range(n)], "index": i} for i, n in enumerate(LENGTHS)]


def model() -> nn.Module:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=40, **shape))


def arguments(folder: Path, **options: Any) -> transformers.TrainingArguments:
    defaults: dict[str, Any] = {
        "max_steps": 1,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "use_cpu": True,
    }
    return transformers.TrainingArguments(str(folder), **{**defaults, **options})


def for_transformers(rows: Any) -> dict[str, Tensor]:
    """The same batch without our columns."""
    batch = PaddedCollator(0)(rows)
    return {name: batch[name] for name in ("input_ids", "labels", "position_ids")}


def trained(trainer: transformers.Trainer) -> list[dict[str, float]]:
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


def test_the_mean_of_micro_batch_means_is_not_the_mean_over_tokens(tmp_path: Path) -> None:
    def check(train: Callable[[int], float]) -> None:
        assert train(2) == pytest.approx(train(8), rel=1e-6)

    def step_loss(micro_batch: int, objective: Callable[..., Tensor], weighting: Any) -> float:
        size = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": 8 // micro_batch}
        return trained(
            Trainer(
                model(), arguments(tmp_path, **size), objective=objective, weighting=weighting, train_dataset=ROWS,
                data_collator=PaddedCollator(0),
            )
        )[0]["loss"]  # fmt: skip

    def token_mean_of_the_micro_batch(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        counts = NextToken().target_counts(batch)
        return ((NextToken()(model, batch) * counts).sum() / counts.sum()).expand(len(counts))

    check(lambda micro_batch: step_loss(micro_batch, NextToken(), uniform(length_weighted=True)))
    with pytest.raises(AssertionError):
        check(lambda micro_batch: step_loss(micro_batch, token_mean_of_the_micro_batch, None))


def test_a_loss_that_is_not_a_number_must_not_become_a_number_in_the_log(tmp_path: Path) -> None:
    """transformers logs the mean of the losses before it, unless logging_nan_inf_filter is False."""

    class Poisoned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(1, 1)

        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            losses = self.inner(x)[:, 0].square() + torch.where(x[:, 0] > 5, torch.nan, 0.0)
            return {"loss": losses.mean(), "losses": losses}

    data = [{"x": torch.tensor([float(i)])} for i in range(8)]
    options = {"max_steps": 8, "per_device_train_batch_size": 1, "lr_scheduler_type": "constant"}

    def check(make: Callable[[], transformers.Trainer]) -> None:
        trainer = make()
        try:
            logged = trained(trainer)
        except NonFiniteLossError:
            return
        assert any(not math.isfinite(line["loss"]) for line in logged), "the log shows only numbers"

    check(
        lambda: Trainer(
            Poisoned(), arguments(tmp_path, **options), train_dataset=data,
            objective=lambda model, batch: model(batch["x"])["losses"],
        )
    )  # fmt: skip
    with pytest.raises(AssertionError, match="only numbers"):
        check(lambda: transformers.Trainer(Poisoned(), arguments(tmp_path, **options), train_dataset=data))


def test_a_checkpoint_must_not_hold_pickles(tmp_path: Path) -> None:
    def check(trainer: transformers.Trainer) -> None:
        trained(trainer)
        files = [path for path in Path(str(trainer.args.output_dir)).rglob("*") if path.is_file()]
        assert files
        # torch.save writes a zip archive around a pickle; a bare pickle begins with its protocol.
        pickled = [
            path.name for path in files if path.read_bytes()[:2] in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05")
        ]
        assert pickled == []

    options = {"save_strategy": "steps", "save_steps": 1}
    check(
        Trainer(
            model(), arguments(tmp_path / "ours", **options), objective=NextToken(), train_dataset=ROWS,
            data_collator=PaddedCollator(0),
        )
    )  # fmt: skip
    with pytest.raises(AssertionError):
        check(
            transformers.Trainer(
                model(), arguments(tmp_path / "theirs", **options), train_dataset=ROWS, data_collator=for_transformers
            )
        )


def test_the_batch_size_must_not_change_an_evaluation(tmp_path: Path) -> None:
    """The mean of batch means depends on which examples shared a batch."""

    def check(evaluate: Callable[[int], float]) -> None:
        assert evaluate(3) == pytest.approx(evaluate(8), rel=1e-6)

    def ours(size: int) -> float:
        trainer = Trainer(
            model(), arguments(tmp_path, per_device_eval_batch_size=size), objective=NextToken(), eval_dataset=ROWS,
            data_collator=PaddedCollator(0),
        )  # fmt: skip
        return trainer.evaluate()["eval_loss"]

    def mean_of_batch_means(size: int) -> float:
        trainer = transformers.Trainer(
            model(), arguments(tmp_path, per_device_eval_batch_size=size), eval_dataset=ROWS,
            data_collator=for_transformers,
        )  # fmt: skip
        return trainer.evaluate()["eval_loss"]

    check(ours)
    with pytest.raises(AssertionError):
        check(mean_of_batch_means)
