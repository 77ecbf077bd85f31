"""Pruning while training, in both Trainers: layouts, resuming, counting, and the arms of a comparison."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from lossmith.data import PackedCollator, PaddedCollator, prepare
from lossmith.data.weighting import linupper
from lossmith.errors import InputError
from lossmith.registry import SPARSITIES
from lossmith.sparsity import PruningSchedule, SparsePretraining, sparse_pretraining
from lossmith.studies.arms import parse_arm
from lossmith.studies.compare import run_compare
from lossmith.studies.settings import Execution, make_settings
from lossmith.studies.sparse_arms import measured_lines
from lossmith.training import NextToken, SparsityCallback, Trainer
from lossmith.training.models import matmul_parameters, with_exact_norms

STEPS = 6
SCHEDULE = PruningSchedule(STEPS, 0.6, 1, 4)


@pytest.fixture(scope="module")
def corpus(text_folder: Path) -> Any:
    return prepare(text_folder, vocab_size=300, sequence_length=24)


def tiny(vocab: int) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    return with_exact_norms(LlamaForCausalLM(config).double())


def train(
    corpus: Any,
    folder: Path,
    *,
    micro: int = 8,
    packed: bool = False,
    weighting: Any = None,
    resume: Path | None = None,
    schedule: PruningSchedule = SCHEDULE,
    **options: Any,
) -> tuple[Trainer, SparsePretraining]:
    sparsity = SparsePretraining(schedule)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=8 // micro,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
        data_seed=3,
        **{"save_strategy": "no", **options},
    )
    trainer = Trainer(
        tiny(len(corpus.tokenizer)),
        arguments,
        objective=NextToken(),
        weighting=weighting,
        callbacks=[SparsityCallback(sparsity)],
        train_dataset=corpus.train,
        eval_dataset=corpus.validation,
        data_collator=PackedCollator() if packed else PaddedCollator(corpus.tokenizer.pad_token_id),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer, sparsity


def steps(trainer: Trainer) -> list[tuple[float, float]]:
    return [(m["loss"], m["grad_norm"]) for m in trainer.state.log_history if "grad_norm" in m]


def test_every_layout_gives_one_trajectory(corpus: Any, tmp_path: Path) -> None:
    """Losses are scored for the weighting after pruning, whatever the micro-batch."""
    reference = steps(train(corpus, tmp_path, weighting=linupper(r=0.3))[0])
    for layout in ({"micro": 2}, {"micro": 4, "packed": True}):
        found = steps(train(corpus, tmp_path, weighting=linupper(r=0.3), **layout)[0])  # type: ignore[arg-type]
        for a, b in zip(found, reference, strict=True):
            assert a == pytest.approx(b, rel=1e-9, abs=1e-9)


def test_the_average_and_the_flops_count_active_weights(corpus: Any, tmp_path: Path) -> None:
    trainer, sparsity = train(corpus, tmp_path)
    assert sparsity.average_parameters() == SCHEDULE.average_parameters(sparsity.number)
    whole = matmul_parameters(trainer.model)
    # Everything but the input embedding is prunable in a model whose head is not tied.
    assert whole == sparsity.number
    logged = [m["parameters"] for m in trainer.state.log_history if "grad_norm" in m]
    density = [SCHEDULE.density(step) for step in range(STEPS)]
    assert logged == [int(d * whole + 1e-6) for d in density]
    dense, _ = train(corpus, tmp_path, schedule=PruningSchedule(STEPS, 0.0, 1, 4))
    # Rows are of different lengths, so that the average of the FLOPs weighs steps by their positions.
    assert trainer.state.total_flos < dense.state.total_flos
    assert trainer.state.total_flos / dense.state.total_flos == pytest.approx(SCHEDULE.average_density, rel=0.05)
    assert "parameters" in dense.state.log_history[0]
    assert (trainer.model.lm_head.weight == 0).any()


@pytest.mark.parametrize("saved", [1, 2, 5])
def test_a_resumed_run_has_the_same_bits(corpus: Any, tmp_path: Path, saved: int) -> None:
    whole, sparsity = train(corpus, tmp_path / "whole", save_strategy="steps", save_steps=1)
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{saved}", tmp_path / "other" / f"checkpoint-{saved}")
    files = json.loads((tmp_path / "other" / f"checkpoint-{saved}" / "complete.json").read_text())["files"]
    assert "sparsity.safetensors" in files
    resumed, again = train(corpus, tmp_path / "elsewhere", resume=tmp_path / "other" / f"checkpoint-{saved}")
    assert steps(resumed) == steps(whole)
    assert resumed.state.total_flos == whole.state.total_flos
    assert again.events == sparsity.events
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_without_masks_is_said_and_made_up_for(corpus: Any, tmp_path: Path) -> None:
    train(corpus, tmp_path, save_strategy="steps", save_steps=5)
    (tmp_path / "checkpoint-5" / "sparsity.safetensors").unlink()
    with pytest.warns(UserWarning, match="has no sparsity.safetensors"):
        _, sparsity = train(corpus, tmp_path, resume=tmp_path / "checkpoint-5")
    assert sparsity.active == int(0.4 * sparsity.number)


class Squares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.layer(x) - x.flip(-1)).square().mean()}


def test_the_plain_trainer_of_transformers_prunes_saves_and_resumes(tmp_path: Path) -> None:
    rows = [{"x": row} for row in torch.randn(64, 8, generator=torch.Generator().manual_seed(1))]

    def plain(resume: str | None = None) -> tuple[nn.Module, SparsePretraining]:
        sparsity = sparse_pretraining(final=0.5)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), num_train_epochs=3, per_device_train_batch_size=8, save_steps=12,
            learning_rate=0.01, report_to="none", disable_tqdm=True, use_cpu=True, logging_steps=100,
        )  # fmt: skip
        model = Squares()
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[SparsityCallback(sparsity)])
        trainer.train(resume_from_checkpoint=resume)
        return model, sparsity

    model, sparsity = plain()
    assert int((model.layer.weight != 0).sum()) == sparsity.active == 32  # type: ignore[operator, union-attr]
    assert (tmp_path / "checkpoint-12" / "sparsity.safetensors").exists()
    resumed, again = plain(str(tmp_path / "checkpoint-12"))
    assert torch.equal(resumed.layer.weight, model.layer.weight)  # type: ignore[arg-type, union-attr]
    assert again.events == sparsity.events


def test_sharded_models_are_refused(tmp_path: Path) -> None:
    callback = SparsityCallback(SparsePretraining(SCHEDULE))
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    object.__setattr__(arguments, "fsdp", ["full_shard"])
    with pytest.raises(InputError, match="use it without FSDP and DeepSpeed"):
        callback.on_train_begin(arguments, None, None, model=None)
    with pytest.raises(TypeError, match="sparsity must be a SparsePretraining"):
        SparsityCallback(0.5)  # type: ignore[arg-type]


@pytest.mark.slow
def test_arms_of_a_comparison_name_their_weights(text_folder: Path, tmp_path: Path) -> None:
    settings = make_settings(
        {
            "data": str(text_folder), "model": "nano", "vocab_size": 300, "sequence_length": 32, "batch_size": 4,
            "tokens": 8 * 4 * 32, "eval_tokens": 500, "evaluations": 1, "seeds": 1,
            "model_overrides": {"tie_word_embeddings": False},
            "arms": [
                "baseline",
                "sparse: weights=sparse_pretraining(final=0.8, start=0.1, end=0.6)",
                "narrow: model_overrides={'intermediate_size': 48}",
            ],
        }
    )  # fmt: skip
    comparison = run_compare(settings, Execution(out=tmp_path, jobs=1))
    runs = {run.arm: run for run in comparison.runs}
    assert not [run.error for run in comparison.runs if run.error]
    records = {arm: tmp_path / "runs" / arm / "seed-0" / "result.json" for arm in runs}
    counts = {arm: json.loads(path.read_text())["parameters"] for arm, path in records.items()}
    number = 4 * 32 * 32 + 3 * 32 * 96 + 300 * 32
    assert counts["baseline"] == {"initial": number, "average": number, "final": number}
    assert counts["narrow"]["final"] == number - 3 * 32 * 48
    sparse = counts["sparse"]
    assert sparse["final"] == pytest.approx(0.2 * number, abs=1)
    assert sparse["final"] < sparse["average"] < sparse["initial"] == number
    ratio = runs["sparse"].cost.flops / runs["baseline"].cost.flops
    assert ratio == pytest.approx(sparse["average"] / number, rel=1e-9)
    assert any(note.startswith(f"sparse: {number:,} matrix parameters at the start") for note in comparison.notes)
    (line,) = measured_lines(tmp_path)
    assert line.startswith("sparse (seed 0) against dense, here (cpu, ")
    difference = runs["sparse"].metrics["eval/loss"] - runs["baseline"].metrics["eval/loss"]
    assert f"({difference:+.4f}, 95% interval " in line
    assert line in comparison.notes
    reasons = {found.arm: found.reason for found in comparison.forecasts}
    assert reasons["sparse"].startswith("the number of its weights changes while it trains")
    assert reasons["narrow"].startswith("too short")
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "runs/sparse/seed-0/model")
    matrices = [p for name, p in saved.named_parameters() if p.ndim == 2 and "embed" not in name]
    assert sum(int((p != 0).sum()) for p in matrices) == sparse["final"]


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("weights=sparse_pretrainning", "arm 'a': unknown sparsity 'sparse_pretrainning': did you mean"),
        ("weights=sparse_pretraining(final=1)", r"arm 'a': sparsity 'sparse_pretraining\(final=1\)': sparsity must be"),
        ("weights=sparse_pretraining(final=0.5, start=0.8)", "0 <= start < end <= 1, got 0.8, 0.75"),
        ("weights=sparse_pretraining(sparsity=0.5)", "has no option 'sparsity'"),
        ("weights=sparse_pretraining(final=0.6, structure='2:4')", "2:4 leaves 0.5 of the weights"),
        ("weights=0.5", "weights must be a name with options, got 0.5"),
        ("model_overrides=wide", "model_overrides must be like"),
    ],
)
def test_arms_with_mistakes_are_refused_before_anything_runs(text: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        parse_arm(f"a: {text}")


def test_a_shape_that_cannot_be_is_refused_with_its_reason() -> None:
    from lossmith.training.models import build_model

    with pytest.raises(InputError, match=r"model_overrides \{'hidden_size': 18\}: .*even rotary dimension"):
        build_model("nano", vocab_size=300, sequence_length=8, overrides={"hidden_size": 18})


def test_the_registry_has_both_kinds_of_weights() -> None:
    assert {"dense", "sparse_pretraining"} <= set(SPARSITIES.names())
    built = SPARSITIES.build("sparse_pretraining(final=0.5, start=0.25, end=0.75)")
    assert built.recipe == sparse_pretraining().recipe
