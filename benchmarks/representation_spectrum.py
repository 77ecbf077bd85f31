"""Spectrum of features: a streaming covariance against collecting everything and ``torch.linalg.svdvals``.

    python benchmarks/representation_spectrum.py [--tokens 200000] [--features 1024]

Features come in batches, as a model makes them (generated on the fly, which both pay alike and which is taken out of
the times). Both work in float64. Time: median over ``--repeats``, interleaved in one process. Memory: the kernel's
high-water mark of the resident set in a fresh process, less what was there before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from linear_loss import resident
from lossmith.probes import StreamingCovariance, rankme

BATCH = 4096


def batches(tokens: int, features: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, features + 1) ** -0.5
    for start in range(0, tokens, BATCH):
        yield torch.randn(min(BATCH, tokens - start), features, generator=generator) * scale


def streamed(tokens: int, features: int, dtype: torch.dtype = torch.float64) -> Tensor:
    stream = StreamingCovariance(features, dtype=dtype)
    for rows in batches(tokens, features):
        stream.update(rows)
    return stream.eigenvalues()


def collected(tokens: int, features: int) -> Tensor:
    rows = torch.cat([part.double() for part in batches(tokens, features)])
    rows -= rows.mean(0)
    return torch.linalg.svdvals(rows) ** 2 / len(rows)


WAYS = {
    "collect, svdvals": collected,
    "stream": streamed,
    "stream, float32": lambda tokens, features: streamed(tokens, features, torch.float32),
}


def peak(way: str, tokens: int, features: int) -> int:
    WAYS[way](features + 1, min(features, 64))  # the libraries' own buffers
    before = resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    WAYS[way](tokens, features)
    return resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak-of", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = (arguments.tokens, arguments.features)
    if arguments.peak_of:
        print(json.dumps(peak(arguments.peak_of, *shape)))
        return
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    ranks = {}
    for _ in range(arguments.repeats):
        start = time.perf_counter()
        for _ in batches(*shape):
            pass
        making = time.perf_counter() - start
        for way, run in WAYS.items():
            start = time.perf_counter()
            values = run(*shape)
            times[way].append(time.perf_counter() - start - making)
            ranks[way] = rankme(values)
    base = statistics.median(times["collect, svdvals"])
    print(f"{shape[0]} tokens x {shape[1]} features, {arguments.threads} threads")
    for way, taken in times.items():
        command = [sys.executable, __file__, "--peak-of", way, "--tokens", str(shape[0]), "--features", str(shape[1])]
        memory = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        middle = statistics.median(taken)
        print(
            f"{way:18} {middle:8.2f} s  {base / middle:6.2f}x as fast   peak {memory / 1e6:8.0f} MB   "
            f"RankMe {ranks[way]:.6f}"
        )


if __name__ == "__main__":
    main()
