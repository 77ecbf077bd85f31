"""What an objective and a weighting cost per step, next to the plain transformers.Trainer with the same model.

Runs the peer and ours in one process, interleaved, and prints the ratio of the medians over repeats.

    python benchmarks/trainer_overhead.py --model tiny --steps 30 --repeats 7
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from typing import Any

import torch
import transformers

from lossmith.data import PaddedCollator
from lossmith.data.sampling import PermutationStream
from lossmith.data.weighting import linupper
from lossmith.training import NextToken, Trainer
from lossmith.training.models import build_model

transformers.utils.logging.set_verbosity_error()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--sequence-length", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    candidates = {
        "transformers.Trainer": (None, None),
        "objective, uniform": (NextToken(), None),
        "objective, linupper": (NextToken(), linupper(r=0.4)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(options.repeats + 1):
        for name, (objective, weighting) in candidates.items():
            passed = seconds_per_step(options, objective, weighting)
            if repeat > 0:
                seconds[name].append(passed)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    peer = "transformers.Trainer"
    ratios = {
        name: statistics.median([a / b for a, b in zip(values, seconds[peer], strict=True)])
        for name, values in seconds.items()
    }
    if options.json:
        print(json.dumps({"milliseconds_per_step": {n: 1e3 * m for n, m in medians.items()}, "ratio": ratios}))
        return
    print(
        f"model {options.model}, {options.batch_size} x {options.sequence_length} tokens, vocabulary "
        f"{options.vocab_size}, {options.threads} thread(s), median of {options.repeats} x {options.steps} steps"
    )
    for name, median in medians.items():
        print(f"{name:24} {1e3 * median:9.2f} ms/step   ratio {ratios[name]:.3f}")


def seconds_per_step(options: argparse.Namespace, objective: Any, weighting: Any) -> float:
    """One training run; the first five steps, which set everything up, are not counted."""
    generator = torch.Generator().manual_seed(0)
    length = options.sequence_length
    rows = [
        {"input_ids": row.tolist(), "segments": [length], "index": i, "domain": 0}
        for i, row in enumerate(torch.randint(options.vocab_size, (512, length), generator=generator))
    ]
    torch.manual_seed(0)
    model = build_model(options.model, vocab_size=options.vocab_size, sequence_length=length)
    collator = PaddedCollator(0)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=options.steps + 5,
            per_device_train_batch_size=options.batch_size,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=10,
            use_cpu=True,
            remove_unused_columns=False,
        )
        trainer = Trainer(
            model,
            arguments,
            objective=objective,
            weighting=weighting,
            train_dataset=rows,
            data_collator=collator if objective else Plain(collator),
            callbacks=[clock],
        )
        if objective is None:
            total = (options.steps + 5) * options.batch_size
            trainer._get_train_sampler = lambda dataset=None: PermutationStream(len(rows), total=total, seed=42)  # type: ignore[method-assign]
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return (clock.times[-1] - clock.times[4]) / options.steps


class Plain:
    """What the plain Trainer's model understands of a batch."""

    def __init__(self, collator: PaddedCollator):
        self.collator = collator

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.collator(rows)
        return {name: batch[name] for name in ("input_ids", "labels", "position_ids")}


class Clock(transformers.TrainerCallback):
    """The time at the end of every step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter())


if __name__ == "__main__":
    main()
