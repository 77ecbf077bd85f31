"""Domains drawn by temperature or weighed by it, in the Trainer: one trajectory whatever the layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from lossmith.data import PackedCollator, PaddedCollator, TemperatureSampler, prepare
from lossmith.data.sampling import Sampling, domain_parts, domains_of, temperature
from lossmith.data.temperature import Cooldown, scalarization_weights, temperature_probabilities
from lossmith.data.weighting import Scalarization, Weighting, scalarization
from lossmith.training import NextToken, Trainer
from lossmith.training.models import with_exact_norms

transformers.utils.logging.set_verbosity_error()


@pytest.fixture(scope="module")
def corpus(text_folder: Path) -> Any:
    whole = prepare(text_folder, vocab_size=300, sequence_length=24)
    # Imbalanced, and out of order: 9 rows of the first domain.
    numbers = torch.tensor(whole.train["domain"])
    few, many = (numbers == 0).nonzero()[:9, 0].tolist(), (numbers == 1).nonzero()[:200, 0].tolist()
    return whole.train.select([*many[:50], *few, *many[50:]]), whole.tokenizer


def tiny(vocab: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    return with_exact_norms(LlamaForCausalLM(config).double())


def train(
    corpus: Any, folder: Path, *, collator: Any = None, resume: Any = None, chunk: int | None = None, **options: Any
) -> tuple[Trainer, list[tuple[float, float]]]:
    rows, tokenizer = corpus
    parts = {name: options.pop(name, None) for name in ("weighting", "sampler")}
    defaults: dict[str, Any] = {
        "max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "lr_scheduler_type": "constant",
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True,
        "seed": 3, "data_seed": 3,
    }  # fmt: skip
    trainer = Trainer(
        tiny(len(tokenizer)),
        TrainingArguments(output_dir=str(folder), **{**defaults, **options}),
        objective=NextToken(chunk_size=chunk),
        train_dataset=rows,
        data_collator=collator or PaddedCollator(tokenizer.pad_token_id),
        **parts,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, [(m["loss"], m["grad_norm"]) for m in trainer.state.log_history if "grad_norm" in m]


BOTH: dict[str, dict[str, Any]] = {
    "cooldown": {"sampler": temperature(Cooldown(5, 1, switch=3))},
    "upweight": {"weighting": scalarization(Cooldown(5, 1, switch=3))},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BOTH)
def test_every_layout_gives_one_trajectory(corpus: Any, tmp_path: Path, name: str) -> None:
    """Micro-batch size, accumulation, chunk size, padded or packed: float64 to 1e-9 per step."""
    whole = train(corpus, tmp_path, **BOTH[name])[1]
    for micro, packed, chunk, workers in [(4, False, None, 0), (1, False, 7, 0), (8, True, 5, 0), (2, True, None, 2)]:
        found = train(
            corpus, tmp_path, **BOTH[name], collator=PackedCollator() if packed else None, chunk=chunk,
            per_device_train_batch_size=micro, gradient_accumulation_steps=8 // micro, dataloader_num_workers=workers,
        )[1]  # fmt: skip
        assert len(found) == len(whole) == 6
        for a, b in zip(found, whole, strict=True):
            assert a == pytest.approx(b, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", BOTH)
def test_a_run_resumed_on_either_side_of_the_switch_is_bit_identical(corpus: Any, tmp_path: Path, name: str) -> None:
    options: dict[str, Any] = {**BOTH[name], "save_strategy": "steps", "save_steps": 2}
    trainer, log = train(corpus, tmp_path, **options)
    for step in (2, 4):
        resumed, _ = train(corpus, tmp_path / "again", resume=str(tmp_path / f"checkpoint-{step}"), **options)
        for a, b in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True):
            assert torch.equal(a, b)
    assert len(log) == 6


def test_batches_are_those_of_the_sampler_and_switch_at_an_optimiser_step(corpus: Any, tmp_path: Path) -> None:
    rows, _ = corpus
    seen: list[int] = []

    class Spy(PaddedCollator):
        def __call__(self, rows: Any) -> Any:
            seen.extend(row["index"] for row in rows)
            return super().__call__(rows)

    train(
        corpus, tmp_path, collator=Spy(0), sampler=temperature(Cooldown(5, 1, switch=3)),
        per_device_train_batch_size=2, gradient_accumulation_steps=4,
    )  # fmt: skip
    expected = TemperatureSampler(
        domain_parts(domains_of(rows)), Cooldown(5, 1, switch=3), total=48, batch_size=8, seed=3
    )
    assert seen == [rows[i]["index"] for i in expected]


def test_upweighting_is_the_plain_mean_of_weight_times_loss(corpus: Any, tmp_path: Path) -> None:
    """Not divided by the sum of the batch's weights, which is not 1 in any of these batches."""
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Spy(NextToken):
        def __call__(self, model: nn.Module, batch: Any) -> torch.Tensor:
            losses = super().__call__(model, batch)
            kept.append((losses.detach(), batch["domain"]))
            return losses

    rows, tokenizer = corpus
    arguments = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=8, logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(
        tiny(len(tokenizer)), arguments, objective=Spy(), weighting=scalarization(tau=5),
        train_dataset=rows, data_collator=PaddedCollator(tokenizer.pad_token_id),
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    weights = scalarization_weights([9, 200], 5)
    logged = [m["loss"] for m in trainer.state.log_history if "grad_norm" in m]
    sums = []
    for (losses, domains), loss in zip(kept, logged, strict=True):
        assert loss == pytest.approx(float((weights[domains] * losses).sum() / 8), rel=1e-12)
        sums.append(float(weights[domains].sum() / 8))
    assert all(abs(total - 1) > 0.05 for total in sums)


def test_theorem_1_full_batch_gradients_of_upsampling_and_upweighting_agree(corpus: Any) -> None:
    """Every example enumerated: the gradient of the expected loss is one and the same."""
    rows, tokenizer = corpus
    model = tiny(len(tokenizer))
    batch = PaddedCollator(tokenizer.pad_token_id)(rows.to_list())
    losses = NextToken()(model, batch)
    sizes = torch.bincount(batch["domain"])
    for tau in (1.0, 2.0, 5.0, float("inf")):
        drawn = (temperature_probabilities(sizes, tau) / sizes)[batch["domain"]]
        weighed = Scalarization(tau).for_domains(sizes.numpy())(losses, domains=batch["domain"])
        gradients = [
            torch.autograd.grad((w * losses).sum(), list(model.parameters()), retain_graph=True)
            for w in (drawn, weighed)
        ]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_the_trainer_counts_the_domains_but_keeps_sizes_that_are_given(corpus: Any, tmp_path: Path) -> None:
    found = train(corpus, tmp_path, weighting=scalarization(tau=2), max_steps=1)[0].weighting
    assert found.sizes == (9, 200)
    given = scalarization(tau=2).for_domains([1, 1])
    assert train(corpus, tmp_path, weighting=given, max_steps=1)[0].weighting.sizes == (1, 1)
    assert isinstance(given, Weighting)
    assert isinstance(temperature(), Sampling)


def test_what_is_missing_is_said(corpus: Any, tmp_path: Path) -> None:
    rows, _ = corpus
    blind = rows.remove_columns(["domain"])
    collator = PaddedCollator(0)
    for options in BOTH.values():
        with pytest.raises(ValueError, match="column 'domain'"):
            train((blind, corpus[1]), tmp_path, **options)
    with pytest.raises(ValueError, match="batches with 'domain'"):
        train(
            corpus, tmp_path, weighting=scalarization(),
            collator=lambda rows: {k: v for k, v in collator(rows).items() if k != "domain"},
        )  # fmt: skip
    with pytest.raises(ValueError, match="max_steps"):
        train(corpus, tmp_path, sampler=temperature(), max_steps=-1)
    with pytest.raises(ValueError, match="only 6 steps"):
        train(corpus, tmp_path, sampler=temperature(Cooldown(5, 1, switch=6)))
    with pytest.raises(ValueError, match="only 6 steps"):
        train(corpus, tmp_path, weighting=scalarization(Cooldown(5, 1, switch=6)))
    losses = torch.ones(2)
    with pytest.raises(ValueError, match="not known"):
        scalarization()(losses, domains=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="no training examples"):
        scalarization().for_domains([5, 0, 2])(losses, domains=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="from 0 to 1"):
        scalarization().for_domains([5, 2])(losses, domains=torch.tensor([0, 7]))
