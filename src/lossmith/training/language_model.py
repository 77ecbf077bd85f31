"""One run of a language model: from a configuration to a finished run record, resumable at any moment."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lossmith.errors import InputError, is_disk_full
from lossmith.training.record import RunRecord, environment

# Learning rates that suit AdamW and the presets' widths; a loaded model is fine-tuned gently.
_LEARNING_RATES = {"nano": 8e-3, "tiny": 6e-3, "small": 2e-3, "base": 6e-4}

# What the run decides itself.
_RESERVED = {
    "max_steps": "--tokens",
    "num_train_epochs": "--tokens",
    "output_dir": "--out",
    "seed": "--seeds",
    "data_seed": "--seeds",
    "per_device_train_batch_size": "--micro-batch-size",
    "gradient_accumulation_steps": "--micro-batch-size",
    "use_cpu": "--device",
}


@dataclass(frozen=True, slots=True)
class LanguageModelRun:
    """Everything that decides the numbers of one run: an arm under a seed.

    ``batch_size`` is the number of sequences per optimiser step over all processes; ``micro_batch_size`` of them are
    in memory at a time in each process, the rest is gradient accumulation.
    """

    arm: str
    seed: int
    corpus: str
    steps: int
    model: str = "tiny"
    loss: str = "cross_entropy"
    weighting: str = "uniform"
    sampler: str = "shuffled"
    weights: str = "dense"
    sequence_length: int = 128
    batch_size: int = 16
    micro_batch_size: int | None = None
    layout: str = "padded"
    chunk_size: int | None = None
    dtype: str = "float32"
    attention: str = "sdpa"
    random_weights: bool = False
    model_overrides: Mapping[str, Any] = field(default_factory=dict)
    device: str = "auto"
    eval_rows: int | None = None
    evaluations: int = 5
    checkpoints: int = 4
    keep_checkpoints: bool = False
    threads: int = 1
    training: Mapping[str, Any] = field(default_factory=dict)


def check_training_options(options: Mapping[str, Any], *, where: str = "--set", also: Sequence[str] = ()) -> None:
    """Refuse names that ``transformers.TrainingArguments`` does not have, and those that lossmith decides.

    Args:
        options: what to check.
        where: what the message begins with.
        also: other names that are allowed there, for the hint.

    Raises:
        InputError: names the option and the nearest allowed one.
    """
    names = _training_option_names()
    for name in options:
        if name in _RESERVED:
            raise InputError(f"{where}: '{name}' is decided by {_RESERVED[name]}; use that instead")
        if name not in names:
            near = difflib.get_close_matches(name, [*also, *names], n=1, cutoff=0.5)
            # There are over a hundred names: too many to list.
            allowed = ", ".join([*also, "any name of transformers.TrainingArguments"])
            hint = f"did you mean '{near[0]}'? (allowed: {allowed})" if near else f"allowed: {allowed}"
            raise InputError(f"{where}: unknown option '{name}': {hint}")


@functools.cache
def _training_option_names() -> frozenset[str]:
    import transformers

    fields = dataclasses.fields(transformers.TrainingArguments)
    return frozenset(f.name for f in fields if f.init and f.name not in _RESERVED)


def run_language_model(run: LanguageModelRun, folder: str | Path, corpus_folder: str | Path) -> dict[str, Any]:
    """Train ``run`` in ``folder``, or continue it; a finished run is not run again.

    Args:
        run: what to train.
        folder: its run record.
        corpus_folder: the prepared corpus (:func:`lossmith.data.prepare`).

    Returns:
        The result: ``status`` ("finished" or "failed"), ``metrics``, ``cost`` and, when failed, ``error``.

    Raises:
        InputError: the disk is full, or the folder holds another run.
    """
    import torch

    torch.set_num_threads(run.threads)
    try:
        rank = int(os.environ.get("RANK", "0"))
        if rank != 0:
            return _train(run, Path(folder), Path(corpus_folder), None)
        record = RunRecord(folder, json.loads(json.dumps(asdict(run))))
        with record.lock():
            if (result := record.result()) is not None and _world_size() == 1:
                return result
            return _train(run, Path(folder), Path(corpus_folder), record)
    except Exception as error:
        if is_disk_full(error):
            raise InputError(
                f"the disk that holds {folder} is full; free some space and run the same command again to continue"
            ) from None
        raise


def _train(run: LanguageModelRun, folder: Path, corpus_folder: Path, record: RunRecord | None) -> dict[str, Any]:
    import torch
    import transformers

    from lossmith.data import PackedCollator, PaddedCollator, load_prepared
    from lossmith.files import write_json
    from lossmith.registry import SAMPLERS, SPARSITIES, WEIGHTINGS
    from lossmith.training.models import build_model, matmul_parameters
    from lossmith.training.objectives import NextToken
    from lossmith.training.sparsity import SparsityCallback
    from lossmith.training.trainer import NonFiniteLossError, Trainer, evaluation_metrics

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    started = time.time()
    corpus = load_prepared(corpus_folder)
    arguments = training_arguments(run, folder)
    world = arguments.world_size
    transformers.set_seed(run.seed)
    model = build_model(
        run.model,
        vocab_size=len(corpus.tokenizer),
        sequence_length=run.sequence_length,
        dtype=run.dtype,
        random_weights=run.random_weights,
        overrides=run.model_overrides,
        attention=run.attention,
        special_tokens={f"{n}_token_id": getattr(corpus.tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad")},
    )
    sparsity = SPARSITIES.build(run.weights)
    # Before the optimiser is made: it may replace layers.
    sparsity.attach(model, run.steps)
    callback = SparsityCallback(sparsity) if hasattr(sparsity, "before_step") else None
    validation = corpus.validation
    if run.eval_rows is not None and run.eval_rows < len(validation):
        # Evenly spaced, so that every domain stays represented.
        validation = validation.select([i * len(validation) // run.eval_rows for i in range(run.eval_rows)])
    trainer = Trainer(
        model,
        arguments,
        objective=NextToken(run.loss, chunk_size=run.chunk_size),
        weighting=WEIGHTINGS.build(run.weighting),
        sampler=SAMPLERS.build(run.sampler),
        domains=corpus.domains if len(corpus.domains) > 1 else (),
        record=record,
        callbacks=[callback] if callback is not None else None,
        train_dataset=corpus.train,
        eval_dataset=validation,
        data_collator=PackedCollator() if run.layout == "packed" else PaddedCollator(corpus.tokenizer.pad_token_id),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.remove_callback(transformers.ProgressCallback)
    checkpoint = None
    if record is not None:
        write_json(folder / "environment.json", {**environment(), "seed": run.seed})
        checkpoint = record.last_checkpoint()
        record.rewind(int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0)
    trainer.accelerator.wait_for_everyone()
    if world > 1 and record is None:
        from lossmith.training.trainer import last_complete_checkpoint

        checkpoint = last_complete_checkpoint(folder)
    result: dict[str, Any] = {"arm": run.arm, "seed": run.seed, "status": "finished"}
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if trainer.last_evaluation is None or trainer.evaluated_step != trainer.state.global_step:
            trainer.evaluate()
        evaluation = trainer.last_evaluation
        assert evaluation is not None
        metrics = evaluation_metrics(evaluation, prefix="eval", domains=corpus.domains)
        metrics = {"eval/" + name.removeprefix("eval_").replace("_loss", "/loss"): v for name, v in metrics.items()}
        metrics["eval/bits_per_byte"] = metrics["eval/loss"] * _targets_per_byte(corpus) / math.log(2)
        if record is not None:
            from lossmith.training.checkpoint import save_state

            examples = {
                "loss_sums": evaluation.loss_sums,
                "targets": evaluation.targets,
                "correct": evaluation.correct,
            }
            save_state(examples, folder / "evaluation.safetensors")
            trainer.save_model(str(folder / "model"))
            corpus.tokenizer.save_pretrained(folder / "model")
    except NonFiniteLossError as error:
        metrics = {}
        result |= {"status": "failed", "error": f"arm '{run.arm}', seed {run.seed}: {error}"}
    result["metrics"] = metrics
    state = trainer.state
    number = matmul_parameters(model)
    result["parameters"] = {"initial": number, "average": number, "final": number}
    if callback is not None:
        pruned = sparsity.number - sparsity.average_parameters(max(state.global_step, 1))
        result["parameters"] |= {"average": number - pruned, "final": number - callback.removed}
    logged = record.metrics() if record is not None else []
    result["cost"] = {
        "tokens": state.num_input_tokens_seen,
        "steps": state.global_step,
        "seconds": max((m.get("seconds") or 0.0 for m in logged), default=0.0),
        "flops": float(state.total_flos),
        "peak_memory_bytes": max((m.get("memory_bytes") or 0 for m in logged), default=0),
        "scored_tokens": max((m.get("scored_tokens") or 0 for m in logged), default=0),
    }
    result["wall_seconds"] = time.time() - started
    if record is not None:
        record.finish(result)
        for old in folder.glob("checkpoint-*"):
            if run.keep_checkpoints:
                _keep_weights(old)
            else:
                shutil.rmtree(old, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()
    del torch
    return result


def _keep_weights(checkpoint: Path) -> None:
    """Leave what the model can be loaded from, and remove what only training needs."""
    for path in checkpoint.iterdir():
        if path.is_file() and path.suffix != ".json" and not path.name.startswith("model"):
            path.unlink()


def training_arguments(run: LanguageModelRun, folder: Path) -> Any:
    """The ``transformers.TrainingArguments`` of a run.

    Raises:
        InputError: the batch cannot be divided among processes and micro-batches, or an option is not accepted.
    """
    import torch
    import transformers

    check_training_options(run.training)
    use_cpu = run.device == "cpu" or (run.device == "auto" and not torch.cuda.is_available())
    world = _world_size()
    micro = micro_batch(run.batch_size, run.micro_batch_size, world)
    options: dict[str, Any] = {
        "learning_rate": _LEARNING_RATES.get(run.model, 3e-4 if run.random_weights else 5e-5),
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, run.steps // 10),
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "logging_strategy": "steps",
        "logging_steps": max(1, run.steps // 1000),
        "eval_strategy": "steps",
        "eval_steps": max(1, -(-run.steps // max(run.evaluations, 1))),
        "per_device_eval_batch_size": max(micro, 8),
        "save_strategy": "steps",
        "save_steps": max(1, -(-run.steps // max(run.checkpoints, 1))),
        "save_total_limit": None if run.keep_checkpoints else 1,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": not use_cpu,
        "ddp_find_unused_parameters": False,
        "ddp_backend": "gloo" if use_cpu and world > 1 else None,
        "bf16": False,
        "fp16": False,
    }
    if run.evaluations < 1:
        options["eval_strategy"] = "no"
    options |= run.training
    try:
        return transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=run.steps,
            seed=run.seed,
            data_seed=run.seed,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=run.batch_size // (micro * world),
            use_cpu=use_cpu,
            **options,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"training options: {str(error).strip().splitlines()[0]}") from None


def micro_batch(batch_size: int, micro_batch_size: int | None, processes: int) -> int:
    """Sequences at a time in each process; what is left to a step is gradient accumulation.

    Raises:
        InputError: the batch cannot be divided.
    """
    micro = micro_batch_size or max(batch_size // processes, 1)
    if batch_size % (micro * processes):
        raise InputError(
            f"--batch-size {batch_size} is not a multiple of --micro-batch-size {micro} x {processes} process(es)"
        )
    return micro


def _world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _targets_per_byte(corpus: Any) -> float:
    """Every token but a segment's first is predicted once."""
    import pyarrow.compute as pc

    segments = pc.sum(pc.list_value_length(corpus.validation.data.column("segments"))).as_py()
    return (corpus.validation_tokens - segments) / corpus.validation_bytes
