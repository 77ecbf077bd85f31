"""What sparsity is worth on this machine: files, sparse products and low-rank models beside the dense ones.

Everything is measured in one process, in turn. A ratio above 1 is a gain: dense time over sparse time. Beside the
median of paired ratios stands that of the two fastest passes, which other work on the machine disturbs least.

    python benchmarks/sparsity_pays.py --widths 1024 2048 --rows 1 32 128 512 --threads 4
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from lossmith.sparsity import (
    SparseLinear,
    apply_masks,
    compare_with_dense,
    convert_to_lost,
    lost_start,
    one_shot_masks,
    prune_checkpoint,
    save_compact,
    to_sparse_linear,
)


def in_turn(first: Callable[[], object], second: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """Median of first over second, the same of the fastest of each, and the median time of the first."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(repeats + 2):
        for run, own in zip((first, second), times, strict=True):
            started = time.perf_counter()
            run()
            if number >= 2:
                own.append(time.perf_counter() - started)
    ratio = statistics.median(a / b for a, b in zip(*times, strict=True))
    return ratio, min(times[0]) / min(times[1]), statistics.median(times[0])


def llama(hidden: int, layers: int = 2, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=hidden, intermediate_size=(8 * hidden // 3 + 63) // 64 * 64,
        num_hidden_layers=layers, num_attention_heads=8, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def files() -> None:
    """Two Llama-style blocks of width 512 and an embedding of 512 tokens, which is not pruned."""
    print("files: compact over dense (target at 50 %: 0.60)")
    for dtype in (torch.float32, torch.bfloat16):
        for sparsity in (0.5, 0.9):
            with tempfile.TemporaryDirectory() as folder:
                llama(512, dtype=dtype).save_pretrained(f"{folder}/dense")
                prune_checkpoint(f"{folder}/dense", f"{folder}/pruned", sparsity)
                started = time.perf_counter()
                report = save_compact(f"{folder}/pruned", f"{folder}/compact")
                seconds = time.perf_counter() - started
                speed = report.before / 2**20 / seconds
                assert not list(Path(folder, "compact").glob("model*.safetensors"))
            bits = torch.finfo(dtype).bits
            print(
                f"  {str(dtype)[6:]:9} {sparsity:.0%} zeros: {report.ratio:.3f}  (values and places alone: "
                f"{1 - sparsity + 1 / bits:.3f}), {speed:,.0f} MiB/s"
            )


def products(arguments: argparse.Namespace) -> None:
    print("one layer: dense time over sparse time, median (fastest); target 1.5 at 90 % from width 1024 on")
    for width in arguments.widths:
        weight = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
        order = torch.rand(width, width, generator=torch.Generator().manual_seed(1))
        for sparsity in arguments.sparsities:
            pruned = weight.masked_fill(order < sparsity, 0)
            layer = SparseLinear(pruned)
            found = []
            for rows in arguments.rows:
                x = torch.randn(rows, width, generator=torch.Generator().manual_seed(2))
                with torch.no_grad():
                    ratio, best, seconds = in_turn(
                        lambda: F.linear(x, pruned),  # noqa: B023
                        lambda: layer(x),  # noqa: B023
                        arguments.repeats,
                    )
                found.append(f"{rows} rows {ratio:.2f} ({best:.2f}) of {seconds * 1e3:.2f} ms")
            print(f"  {width} x {width}, {sparsity:.0%} zeros: {'; '.join(found)}")


def models(arguments: argparse.Namespace) -> None:
    """A pass over 128 tokens of two blocks."""
    tokens = torch.arange(128)[None] % 512
    for width in arguments.widths:
        dense, pruned = llama(width), llama(width)
        apply_masks(pruned, one_shot_masks(pruned, 0.9))
        print(f"model of width {width}: {to_sparse_linear(pruned).summary()}")
        print("  " + compare_with_dense(dense, pruned, tokens, name="90 % zeros", repeats=arguments.repeats).summary())
        low = llama(width)
        convert_to_lost(low, 0.125, 0.01, decomposition="gram")
        print(
            "  "
            + compare_with_dense(
                dense, low, tokens, name="low rank 1/8 and columns", repeats=arguments.repeats
            ).summary()
        )


def conversion(arguments: argparse.Namespace) -> None:
    """Time of LOST's first decomposition, exact against the Gram matrix."""
    for width in arguments.widths:
        weight = 0.02 * torch.randn(width, width, generator=torch.Generator().manual_seed(0))
        ratio, _, seconds = in_turn(
            lambda: lost_start(weight, width // 4, width // 20),  # noqa: B023
            lambda: lost_start(weight, width // 4, width // 20, decomposition="gram"),  # noqa: B023
            1,
        )
        print(f"decomposition of {width} x {width}: {seconds:.2f} s, by the Gram matrix {ratio:.1f}x as fast")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 128, 512])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.8, 0.9, 0.95])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", choices=["files", "products", "models", "conversion"], nargs="+")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.threads} thread(s), torch {torch.__version__}")
    parts: dict[str, Callable[[], None]] = {
        "files": files,
        "products": lambda: products(arguments),
        "models": lambda: models(arguments),
        "conversion": lambda: conversion(arguments),
    }
    for name in arguments.only or parts:
        parts[name]()


if __name__ == "__main__":
    main()
