"""Time and peak memory of ``lossmith.heads.linear_loss`` next to other ways to the same losses and gradients.

    python benchmarks/linear_loss.py [--shapes 4096x512x32768 ...] [--repeats 5] [--threads N] [--json]

One step is: row losses, a weighted or plain sum, and the gradients of hidden and weight, in float32. The lines
``floor`` are the matrix products alone, which every exact candidate has to do.

Time: all candidates in one process, one step of each per round, in an order that rotates from round to round;
the median over the rounds, and the median over the rounds of the ratio to the best peer within the same
round. Memory: each candidate in a fresh process: the peak of the resident set during one step (the kernel's
own high-water mark, reset before the step) minus the resident set before it, minus the size of the gradients
that the step leaves.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lossmith.heads import linear_loss

Step = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
CHUNKS = (128, 256, 512, 1024)
GOALS = {"known weights": 0.9, "unknown weights": 1.3, "memory of plain": 0.1}


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), targets)


def plain_weighted(hidden: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor) -> Tensor:
    return (row_weights * F.cross_entropy(F.linear(hidden, weight), targets, reduction="none")).sum()


def torch_plain(hidden: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor) -> Tensor:
    return F.linear_cross_entropy(hidden, weight, targets)


def torch_mean(chunk: int | None) -> Step:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
    return lambda h, w, t, rw: F.linear_cross_entropy(h, w, t, reduction="mean", options=options)


def torch_rows(chunk: int | None) -> Step:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
    return lambda h, w, t, rw: (rw * F.linear_cross_entropy(h, w, t, reduction="none", options=options)).sum()


def ours_known(hidden: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor) -> Tensor:
    return (row_weights * linear_loss("cross_entropy", hidden, weight, targets, row_weights=row_weights)).sum()


def ours_from_losses(hidden: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor) -> Tensor:
    losses = linear_loss("cross_entropy", hidden, weight, targets)
    return (losses.detach().softmax(0) * losses).sum()


def products(number: int, chunk: int = 512) -> Step:
    """The matrix products alone, without any softmax or copy: nothing exact can be faster.

    Three where the rows' weights are known (logits, gradient of hidden, gradient of weight), four where the logits
    have to be computed again for the backward pass.
    """

    def step(hidden: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor) -> Tensor:
        with torch.no_grad():
            hidden.grad, weight.grad = torch.empty_like(hidden), torch.zeros_like(weight)
            logits = hidden.new_empty(min(chunk, len(hidden)), len(weight))
            for _ in range(number - 3):
                for rows in hidden.split(chunk):
                    torch.mm(rows, weight.T, out=logits[: len(rows)])
            for start in range(0, len(hidden), chunk):
                rows = hidden[start : start + chunk]
                chosen = torch.mm(rows, weight.T, out=logits[: len(rows)])
                torch.mm(chosen, weight, out=hidden.grad[start : start + chunk])
                weight.grad.addmm_(chosen.T, rows)
        return torch.zeros((), requires_grad=True)

    return step


def candidates() -> dict[str, Step]:
    found: dict[str, Step] = {
        "plain, mean": plain,
        "plain, weighted rows": plain_weighted,
        "torch linear_cross_entropy, no options": torch_plain,
    }
    for chunk in (None, *CHUNKS):
        setting = "default options" if chunk is None else f"chunks of {chunk}"
        found[f"torch linear_cross_entropy, mean, {setting}"] = torch_mean(chunk)
        found[f"torch linear_cross_entropy, weighted rows, {setting}"] = torch_rows(chunk)
    found["floor: three matrix products"] = products(3)
    found["floor: four matrix products"] = products(4)
    found["ours, known weights"] = ours_known
    found["ours, weights from the losses"] = ours_from_losses
    return found


def liger_is_missing() -> str:
    """Why Liger-Kernel's chunked losses are not among the candidates."""
    try:
        import liger_kernel.transformers  # noqa: F401
    except Exception as error:
        return f"Liger-Kernel skipped: {type(error).__name__}: {error}"
    return "Liger-Kernel skipped: its kernels are written in Triton and do not run on a CPU"


def inputs(rows: int, features: int, classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, features, generator=generator).requires_grad_()
    weight = (torch.randn(classes, features, generator=generator) / features**0.5).requires_grad_()
    targets = torch.randint(classes, (rows,), generator=generator)
    return hidden, weight, targets, torch.rand(rows, generator=generator)


def step(candidate: Step, hidden: Tensor, weight: Tensor, targets: Tensor, row_weights: Tensor) -> None:
    hidden.grad = weight.grad = None
    candidate(hidden, weight, targets, row_weights).backward()


def times(shape: tuple[int, ...], repeats: int, chosen: dict[str, Step]) -> dict[str, list[float]]:
    tensors = inputs(*shape)
    names = list(chosen)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for candidate in chosen.values():
        step(candidate, *tensors)
    for repeat in range(repeats):
        turn = repeat * (len(names) // max(repeats, 1) or 1) % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            step(chosen[name], *tensors)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def peak_memory(shape: tuple[int, ...], name: str) -> int:
    """Bytes beyond inputs and gradients; to be called in a fresh process."""
    candidate = candidates()[name]
    step(candidate, *inputs(64, 32, 128))  # the libraries' own buffers
    tensors = inputs(*shape)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    step(candidate, *tensors)
    gradients = sum(t.grad.numel() * t.grad.element_size() for t in tensors[:2] if t.grad is not None)
    return resident("VmHWM") - before - gradients


def peak_memory_in_fresh_process(shape: tuple[int, ...], name: str, threads: int) -> int:
    command = [sys.executable, __file__, "--threads", str(threads), "--memory-of", name, "--shapes"]
    done = subprocess.run([*command, "x".join(map(str, shape))], capture_output=True, text=True, check=True)
    return int(done.stdout)


def best(seconds: dict[str, list[float]], prefix: str) -> str:
    return min((n for n in seconds if n.startswith(prefix)), key=lambda n: statistics.median(seconds[n]))


def paired_ratio(seconds: dict[str, list[float]], name: str, to: str) -> float:
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[to], strict=True))


def report(shape: tuple[int, ...], repeats: int, threads: int) -> dict[str, object]:
    """Find torch's best settings on a short run, then time the finalists together."""
    everything = candidates()
    trial = times(shape, min(repeats, 2), {n: c for n, c in everything.items() if n.startswith("torch")})
    mean = best(trial, "torch linear_cross_entropy, mean")
    rows = best(trial, "torch linear_cross_entropy, weighted rows")
    kept = ("plain", "ours", "floor")
    finalists = [n for n in everything if n in (mean, rows) or n.startswith(kept) or "no options" in n]
    seconds = times(shape, repeats, {n: everything[n] for n in finalists})
    memory = {n: peak_memory_in_fresh_process(shape, n, threads) for n in finalists}
    peers = [n for n in finalists if not n.startswith(("ours", "floor"))]
    peer = min(peers, key=lambda n: statistics.median(seconds[n]))
    weighted = min((n for n in peers if "weighted" in n), key=lambda n: statistics.median(seconds[n]))
    return {
        "shape": shape,
        "trial": {n: statistics.median(s) for n, s in trial.items()},
        "best_peer": peer,
        "best_weighted_peer": weighted,
        "candidates": {
            n: {
                "seconds": statistics.median(seconds[n]),
                "to_best_peer": paired_ratio(seconds, n, peer),
                "to_best_weighted_peer": paired_ratio(seconds, n, weighted),
                "megabytes": memory[n] / 1e6,
                "memory_to_plain": memory[n] / memory["plain, mean"],
            }
            for n in finalists
        },
    }


def show(result: dict) -> None:
    rows, features, classes = result["shape"]
    print(f"\nrows={rows} features={features} classes={classes}, float32")
    print("torch's settings, seconds in a short run:")
    for name, seconds in result["trial"].items():
        print(f"  {name:60s} {seconds:7.3f}")
    print(f"best peer: {result['best_peer']}; doing the weighted work: {result['best_weighted_peer']}")
    print(f"{'':60s} {'s':>7s} {'/ best':>7s} {'/ weighted':>10s} {'MB':>7s} {'/ plain':>8s}")
    for name, c in result["candidates"].items():
        print(
            f"{name:60s} {c['seconds']:7.3f} {c['to_best_peer']:7.2f} {c['to_best_weighted_peer']:10.2f} "
            f"{c['megabytes']:7.0f} {c['memory_to_plain']:8.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["4096x512x32768", "2048x768x128256"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="print one JSON object per shape instead of tables")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes]
    if arguments.memory_of:
        print(peak_memory(shapes[0], arguments.memory_of))
        return
    if not arguments.json:
        print(f"torch {torch.__version__}, {arguments.threads} threads, {arguments.repeats} repeats")
        print(liger_is_missing())
        print("goals:", ", ".join(f"{what} <= {ratio}" for what, ratio in GOALS.items()))
    for shape in shapes:
        result = report(shape, arguments.repeats, arguments.threads)
        if arguments.json:
            print(json.dumps(result))
        else:
            show(result)


if __name__ == "__main__":
    main()
