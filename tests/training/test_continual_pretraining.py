"""Continual pre-training on a mixture: exact shares, the same numbers again, logs that a law can read."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from lossmith.data import PaddedCollator, PreparedCorpus, prepare
from lossmith.errors import InputError
from lossmith.training import MixtureLog, MixtureRows, MixtureTrainer, NextToken, continual_pretraining
from lossmith.training.models import build_model


@pytest.fixture(scope="module")
def corpus(text_folder: Path) -> PreparedCorpus:
    return prepare(text_folder, vocab_size=300, sequence_length=32, packing="concatenated", validation_fraction=0.2)


@pytest.fixture(scope="module")
def rows(corpus: PreparedCorpus) -> MixtureRows:
    return MixtureRows.of(corpus, "letters", "numbers", eval_rows=6)


@pytest.fixture(scope="module")
def model(corpus: PreparedCorpus) -> Any:
    torch.manual_seed(0)
    return build_model("nano", vocab_size=len(corpus.tokenizer), sequence_length=32)


def trained(model: Any, corpus: PreparedCorpus, rows: MixtureRows, folder: Path, **options: Any) -> MixtureLog:
    given = {"ratio": 0.5, "steps": 16, "batch_size": 8, "seed": 0, "evaluations": 8, "learning_rate": 5e-3, **options}
    return continual_pretraining(copy.deepcopy(model), corpus, rows, folder=folder, **given)


def test_a_domain_is_found_by_name_with_evenly_spaced_validation_rows(
    corpus: PreparedCorpus, rows: MixtureRows
) -> None:
    domains = np.array(corpus.train["domain"])
    assert (domains[list(rows.general)] == corpus.domains.index("letters")).all()
    assert (domains[list(rows.domain)] == corpus.domains.index("numbers")).all()
    assert len(rows.general) + len(rows.domain) == len(domains)
    held_out = np.array(corpus.validation["domain"])[list(rows.validation)]
    assert [(held_out == number).sum() for number in rows.numbers] == [6, 6]


@pytest.mark.parametrize(
    ("general", "domain", "message"),
    [("letter", "numbers", "did you mean 'letters'"), ("letters", "letters", "needs two")],
)
def test_domains_that_are_not_there_are_refused(
    corpus: PreparedCorpus, general: str, domain: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        MixtureRows.of(corpus, general, domain)


def test_batches_have_the_share_of_domain_rows(
    model: Any, corpus: PreparedCorpus, rows: MixtureRows, tmp_path: Path
) -> None:
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=12, per_device_train_batch_size=8, use_cpu=True, report_to="none"
    )
    trainer = MixtureTrainer(
        model,
        args,
        objective=NextToken(),
        parts=[rows.general, rows.domain],
        shares=[0.75, 0.25],
        train_dataset=corpus.train,
        data_collator=PaddedCollator(0),
    )
    number = rows.numbers[1]
    assert [int((batch["domain"] == number).sum()) for batch in trainer.get_train_dataloader()] == [2] * 12


@pytest.mark.slow
def test_more_domain_data_serve_the_domain_and_cost_general_text(
    model: Any, corpus: PreparedCorpus, rows: MixtureRows, tmp_path: Path
) -> None:
    logs = [trained(model, corpus, rows, tmp_path, ratio=ratio, steps=40) for ratio in (0.0, 1.0)]
    assert logs[0].base_general == logs[1].base_general
    assert logs[0].general_loss[-1] < logs[1].general_loss[-1]
    assert logs[1].domain_loss[-1] < logs[0].domain_loss[-1]


def test_a_log_counts_what_was_trained_and_has_a_row_for_every_evaluation(
    model: Any, corpus: PreparedCorpus, rows: MixtureRows, tmp_path: Path
) -> None:
    log = trained(model, corpus, rows, tmp_path)
    assert len(log.tokens) == len(log.general_loss) == len(log.domain_loss) == 8
    # 31 of the 32 tokens of a whole row are predicted.
    assert log.tokens[-1] == pytest.approx(16 * 8 * 31, rel=0.03)
    assert log.steps == 16
    assert log.flops > 0
    table = log.rows(run="seed 0")
    assert len(table) == 8
    assert table[0] | {"run": "seed 0", "ratio": 0.5, "base_general": log.base_general} == table[0]


def test_the_same_seed_gives_the_same_bits_and_micro_batches_the_same_numbers(
    model: Any, corpus: PreparedCorpus, rows: MixtureRows, tmp_path: Path
) -> None:
    one, again = (trained(model, corpus, rows, tmp_path) for _ in range(2))
    assert one.general_loss == again.general_loss
    micro = trained(model, corpus, rows, tmp_path, micro_batch_size=2)
    np.testing.assert_allclose(micro.general_loss, one.general_loss, rtol=2e-5)
    assert micro.tokens == one.tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.2}, "ratio must lie between 0 and 1"),
        ({"evaluations": 99}, "between 1 and the 16 steps"),
        ({"micro_batch_size": 3}, "not a multiple"),
        ({"learning_rates": 1e-3}, "training options"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(
    model: Any, corpus: PreparedCorpus, rows: MixtureRows, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        trained(model, corpus, rows, tmp_path, **options)


def test_a_mixture_has_no_epochs(model: Any, tmp_path: Path) -> None:
    args = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="max_steps"):
        MixtureTrainer(model, args, parts=[range(2)], shares=[1.0])


def test_a_resumed_mixture_is_the_uninterrupted_one(
    model: Any, corpus: PreparedCorpus, rows: MixtureRows, tmp_path: Path
) -> None:
    def train(folder: Path, resume: str | None = None) -> Any:
        args = transformers.TrainingArguments(
            str(folder),
            max_steps=8,
            per_device_train_batch_size=4,
            save_steps=5,
            lr_scheduler_type="constant",
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        )
        trainer = MixtureTrainer(
            copy.deepcopy(model),
            args,
            objective=NextToken(),
            parts=[rows.general, rows.domain],
            shares=[2 / 3, 1 / 3],
            train_dataset=corpus.train,
            data_collator=PaddedCollator(0),
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model

    whole, resumed = train(tmp_path / "a"), train(tmp_path / "b", str(tmp_path / "a" / "checkpoint-5"))
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
