"""Peak memory and time of streamed distillation next to full logits.

    python benchmarks/distillation_memory.py [--rows 1024] [--features 256] [--teacher-features 512] [--classes 128256]

One step is: the loss of each row against the teacher, and the gradients of the student's hidden states and output
layer, in float32. Each candidate runs in a fresh process; memory is the kernel's own high-water mark of the resident
set during the step, less the resident set before it and the gradients that the step leaves. Time is the median of
``--repeats`` steps of all candidates, interleaved in one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_loss import resident
from lossmith.heads import linear_distillation_loss
from lossmith.registry import DISTILLATION_LOSSES

LOSSES = ("distillation_kl", "reverse_kl", "jensen_shannon", "decoupled_kl", "plackett_luce_distillation")


def inputs(rows: int, features: int, teacher_features: int, classes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, teacher_hidden = (torch.randn(rows, f, generator=generator) for f in (features, teacher_features))
    weight = torch.randn(classes, features, generator=generator) / features**0.5
    teacher_weight = torch.randn(classes, teacher_features, generator=generator) / teacher_features**0.5
    targets = torch.randint(classes, (rows,), generator=generator)
    return [hidden.requires_grad_(), weight.requires_grad_(), teacher_hidden, teacher_weight, targets]


def step(way: str, loss: str, tensors: list[Tensor]) -> None:
    hidden, weight, teacher_hidden, teacher_weight, targets = tensors
    hidden.grad = weight.grad = None
    if way == "streamed":
        values = linear_distillation_loss(loss, *tensors)
    else:
        with torch.no_grad():
            teacher = F.linear(teacher_hidden, teacher_weight)
        values = DISTILLATION_LOSSES.get(loss)(F.linear(hidden, weight), teacher, targets)
    values.mean().backward()


def peak(way: str, loss: str, shape: tuple[int, int, int, int]) -> int:
    step(way, loss, inputs(8, 4, 4, 16))  # the libraries' own buffers
    tensors = inputs(*shape)
    before = resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    step(way, loss, tensors)
    gradients = sum(t.grad.numel() * t.grad.element_size() for t in tensors[:2] if t.grad is not None)
    return resident("VmHWM") - before - gradients


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--features", type=int, default=256)
    parser.add_argument("--teacher-features", type=int, default=512)
    parser.add_argument("--classes", type=int, default=128256)
    parser.add_argument("--losses", nargs="+", default=list(LOSSES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = (arguments.rows, arguments.features, arguments.teacher_features, arguments.classes)
    if arguments.peak_of:
        print(peak(*arguments.peak_of, shape))
        return
    results = {}
    tensors = inputs(*shape)
    own = [word for word in sys.argv[1:] if word != "--json"]
    for loss in arguments.losses:
        seconds: dict[str, list[float]] = {"full logits": [], "streamed": []}
        for _ in range(arguments.repeats):
            for way, kept in seconds.items():
                start = time.perf_counter()
                step(way, loss, tensors)
                kept.append(time.perf_counter() - start)
        command = [sys.executable, __file__, *own, "--peak-of"]
        memory = {
            way: int(subprocess.run([*command, way, loss], capture_output=True, text=True, check=True).stdout)
            for way in seconds
        }
        results[loss] = {
            "seconds": {way: statistics.median(kept) for way, kept in seconds.items()},
            "time_ratio": statistics.median(
                a / b for a, b in zip(seconds["streamed"], seconds["full logits"], strict=True)
            ),
            "megabytes": {way: number / 1e6 for way, number in memory.items()},
            "memory_ratio": memory["streamed"] / memory["full logits"],
        }
    if arguments.json:
        print(json.dumps({"shape": shape, "losses": results}))
        return
    print(f"torch {torch.__version__}, {arguments.threads} threads; rows, student, teacher, classes = {shape}, float32")
    print(
        f"{'':30s} {'full MB':>9s} {'streamed MB':>12s} {'ratio':>7s} {'full s':>8s} {'streamed s':>11s} {'ratio':>7s}"
    )
    for loss, r in results.items():
        mb, s = r["megabytes"], r["seconds"]
        print(
            f"{loss:30s} {mb['full logits']:9.0f} {mb['streamed']:12.0f} {r['memory_ratio']:7.3f} "
            f"{s['full logits']:8.2f} {s['streamed']:11.2f} {r['time_ratio']:7.2f}"
        )


if __name__ == "__main__":
    main()
