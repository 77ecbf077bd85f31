"""Traces of Hessians: blocks of products from one graph against a loop in the manner of PyHessian.

    python benchmarks/flatness.py [--layers 2] [--width 128] [--probes 16]

The loop is that of PyHessian's ``trace``: for each random vector, each batch's gradient is made anew with its graph
(``create_graph=True``), and differentiated along the vector. Both work on the same small transformer, batches and
number of products. ``ggn`` and ``fisher`` estimate the Gauss-Newton part alone, ``fisher`` with one draw of labels.
Processor time, which other work on the machine moves less: median over ``--repeats``, interleaved in one process.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from lossmith.probes import Curvature, hessian_trace


def loop(model: Any, batches: list[dict[str, Tensor]], probes: int) -> float:
    parameters = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for _ in range(probes):
        vector = [torch.randint(0, 2, p.shape, generator=generator).to(p.dtype) * 2 - 1 for p in parameters]
        for batch in batches:
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
            gradient = torch.autograd.grad(loss, parameters, create_graph=True)
            product = torch.autograd.grad(gradient, parameters, grad_outputs=vector)
            total += float(sum((v * h).sum() for v, h in zip(vector, product, strict=True)))
    return total / probes / len(batches)


def main() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--vocabulary", type=int, default=1000)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--probes", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.width,
        intermediate_size=4 * arguments.width,
        num_hidden_layers=arguments.layers,
        num_attention_heads=4,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).eval()
    shape = (arguments.batch_size, arguments.length)
    batches = [
        {"input_ids": ids, "labels": ids} for ids in torch.randint(arguments.vocabulary, (arguments.batches, *shape))
    ]
    ways = {
        "loop": lambda: loop(model, batches, arguments.probes),
        "hutchinson": lambda: hessian_trace(model, batches, n_probes=arguments.probes).trace,
        "ggn": lambda: hessian_trace(model, batches, n_probes=arguments.probes, estimator="ggn").trace,
        "fisher": lambda: hessian_trace(model, batches, n_probes=1, estimator="fisher").trace,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(arguments.repeats + 1):
        for name, way in ways.items():
            started = time.process_time()
            value = way()
            if repeat:
                times[name].append(time.process_time() - started)
            else:
                print(f"{name:>12}: trace {value:.5g}")
    size = Curvature(model, batches).size
    print(
        f"{size} parameters, {arguments.batches} batches of {shape[0]} x {shape[1]}, {arguments.probes} products each"
    )
    base = statistics.median(times["loop"])
    for name, taken in times.items():
        middle = statistics.median(taken)
        print(f"{name:>12}: {middle:.3f} s, {base / middle:.2f} times as fast as the loop")


if __name__ == "__main__":
    main()
