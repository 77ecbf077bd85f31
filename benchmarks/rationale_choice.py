"""Time and memory of the gradient of the chosen rationales next to that of all rationales.

    python benchmarks/rationale_choice.py [--questions 2] [--good 3] [--bad 4] [--input 64] [--target 32] [--repeats 5]

One step is: the losses of :class:`lossmith.training.RationaleDistillation` for a batch, and the gradients of a T5-like
student (width 256, two layers on each side, 32,128 tokens), float32. ``all`` is the plain way: each rationale with a
gradient; ``chosen`` is the default: all without a gradient, then two of each question again. Both give the same
numbers, which is checked first. Steps are interleaved in one process and the median is reported; memory is that of the
tensors that autograd keeps for the backward pass.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
from transformers import T5Config, T5ForConditionalGeneration

from lossmith.data import RationaleExample
from lossmith.training import RationaleDistillation, RationaleTable


class Numbers:
    """A tokenizer of texts that are numbers already."""

    pad_token_id = eos_token_id = 0
    mask_token = None

    def __call__(self, texts: list[str], verbose: bool = True) -> dict[str, list[list[int]]]:
        return {"input_ids": [[int(word) for word in text.split() if word.isdigit()] for text in texts]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("questions", 2), ("good", 3), ("bad", 4), ("input", 64), ("target", 32), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    generator = torch.Generator().manual_seed(0)

    def text(length: int) -> str:
        return " ".join(map(str, torch.randint(1, 32000, (length,), generator=generator).tolist()))

    examples = [
        RationaleExample(
            text(a.input),
            text(2),
            tuple(text(a.target) for _ in range(a.good)),
            tuple(text(a.target) for _ in range(a.bad)),
        )
        for _ in range(a.questions)
    ]
    torch.manual_seed(0)
    shape = {"d_model": 256, "d_kv": 64, "d_ff": 1024, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    model = T5ForConditionalGeneration(T5Config(**shape, decoder_start_token_id=0))
    table = RationaleTable(examples, Numbers(), max_input_length=2 * a.input, max_target_length=2 * a.target)
    batch = table.collate(range(a.questions))
    # Far beyond what an untrained model reaches, so that every question pushes a bad rationale away.
    ways = {
        "all": RationaleDistillation(table, margin=100.0, all_at_once=True),
        "chosen": RationaleDistillation(table, margin=100.0),
    }
    losses = [way(model, batch) for way in ways.values()]
    assert torch.allclose(*losses, rtol=1e-5, atol=1e-5), "the two ways differ"
    times: dict[str, list[float]] = {name: [] for name in ways}
    kept: dict[str, int] = {}
    for repeat in range(a.repeats + 1):
        for name, way in ways.items():
            model.zero_grad()
            sizes: dict[int, int] = {}

            def note(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
                storage = tensor.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
                return tensor

            if repeat == 0:
                with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                    loss = way(model, batch).mean()
                own = {p.untyped_storage().data_ptr() for p in model.parameters()}
                kept[name] = sum(size for pointer, size in sizes.items() if pointer not in own)
                continue
            started = time.perf_counter()
            loss = way(model, batch).mean()
            loss.backward()
            times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in times.items()}
    result = {
        "seconds": medians,
        "saved_bytes": kept,
        "time_ratio": medians["chosen"] / medians["all"],
        "memory_ratio": kept["chosen"] / kept["all"],
    }
    if a.json:
        print(json.dumps(result))
        return
    for name in ways:
        print(f"{name:8} {medians[name] * 1e3:9.1f} ms   {kept[name] / 2**20:8.1f} MiB kept for the backward pass")
    print(f"chosen / all: time {result['time_ratio']:.2f}, memory {result['memory_ratio']:.2f}")


if __name__ == "__main__":
    main()
