"""Low-rank models in the Trainer: layouts, resuming with the checkpoint's channels, FLOPs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from lossmith.registry import SPARSITIES
from lossmith.sparsity import LOSTLinear
from lossmith.training import NextToken, Trainer
from lossmith.training.models import matmul_parameters, with_exact_norms

ROWS = torch.randint(32, (40, 12), generator=torch.Generator().manual_seed(0))


def train(folder: Path, *, micro: int = 8, seed: int = 0, resume: Path | None = None, **options: Any) -> Trainer:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = with_exact_norms(LlamaForCausalLM(config).double())
    SPARSITIES.build("lost(rank=4, density=0.2, columns=random)").attach(model)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=5, per_device_train_batch_size=micro, gradient_accumulation_steps=8 // micro,
        learning_rate=1e-2, logging_steps=1, report_to="none", disable_tqdm=True, use_cpu=True, seed=3, data_seed=3,
        **{"save_strategy": "no", **options},
    )  # fmt: skip
    trainer = Trainer(
        model,
        arguments,
        objective=NextToken(),
        train_dataset=range(len(ROWS)),
        data_collator=lambda rows: {"input_ids": ROWS[rows], "labels": ROWS[rows]},
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


def test_every_layout_gives_one_trajectory(tmp_path: Path) -> None:
    whole, pieces = train(tmp_path), train(tmp_path, micro=2)
    for a, b in zip(whole.model.parameters(), pieces.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    tokens = 5 * 8 * 12
    assert whole.state.total_flos == pytest.approx(6 * matmul_parameters(whole.model) * tokens, rel=1e-9)


def test_a_resumed_run_has_the_same_bits_and_the_checkpoints_channels(tmp_path: Path) -> None:
    """The resumed run chooses other channels at first; the checkpoint's count."""
    whole = train(tmp_path / "a", save_strategy="steps", save_steps=2)
    resumed = train(tmp_path / "b", seed=9, resume=tmp_path / "a" / "checkpoint-2")
    layers = [m for m in whole.model.modules() if isinstance(m, LOSTLinear)]
    others = [m for m in resumed.model.modules() if isinstance(m, LOSTLinear)]
    assert len(layers) == 7
    assert all(torch.equal(a.index, b.index) for a, b in zip(layers, others, strict=True))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
