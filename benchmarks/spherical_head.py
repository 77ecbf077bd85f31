"""A training step of an output layer with very many classes: SphericalHead next to the usual ways.

    python benchmarks/spherical_head.py [--shapes 256x128 512x128] [--classes 793471] [--zipf]
    python benchmarks/spherical_head.py --flat                 # the cost for 1e4 to 1e7 classes
    python benchmarks/spherical_head.py --network              # a whole training step, with the share of each part
    python benchmarks/spherical_head.py --compiled             # what torch.compile makes of the bare arithmetic

A shape is features x batch. One step is: loss, gradient of hidden, plain SGD of the whole output matrix, float32. All
candidates in one process, in rounds: the slow ones one step per round, the fast ones many; reported are the median and
the median over rounds of the ratio to SphericalHead within the round. Its stabilisation is on; a rewriting of its
factor is also forced, and the longest step with and without it is reported in units of the median step. Peak memory: in
a fresh process, the high-water mark of the resident set during steps less that before them.

Arithmetic floor: with d features, m rows (m < d) and one factor, a step has seven products of 2 m d² and four of 2 m² d
operations, and nothing that grows with the classes but the gather and scatter of m rows. ``floor`` times these products
alone. What lies between them is many operations on little data; ``--compiled`` shows how much of that a compiler
removes: the formulas of one step in four compiled functions, without autograd, checks, conditioning or float64 (needs a
C++ compiler).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linear_loss import resident
from lossmith.heads import HierarchicalSoftmax, SphericalHead

Step = Callable[[Tensor, Tensor], None]
LR = 0.1


def draw_targets(classes: int, rows: int, zipf: bool, generator: torch.Generator) -> Tensor:
    if not zipf:
        return torch.randint(classes, (rows,), generator=generator)
    # p(k) ~ 1/k by inversion of its integral.
    return (classes ** torch.rand(rows, generator=generator)).long().clamp_max(classes) - 1


def spherical(classes: int, features: int) -> tuple[Step, SphericalHead]:
    head = SphericalHead(features, classes, loss="z_loss", a=0.1, b=10.0)

    def step(hidden: Tensor, targets: Tensor) -> None:
        head(hidden.requires_grad_(), targets).mean().backward()
        head.step(LR)

    return step, head


def dense(classes: int, features: int, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Step:
    weight = nn.Parameter(1e-3 * torch.randn(classes, features))
    optimizer = torch.optim.SGD([weight], lr=LR)

    def step(hidden: Tensor, targets: Tensor) -> None:
        optimizer.zero_grad()
        loss(hidden.requires_grad_(), weight, targets).backward()
        optimizer.step()

    return step


def fused(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=min(1024, len(hidden)))
    return F.linear_cross_entropy(hidden, weight, targets, options=options)


def module(layer: nn.Module, loss: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> Step:
    optimizer = torch.optim.SGD(layer.parameters(), lr=LR)

    def step(hidden: Tensor, targets: Tensor) -> None:
        optimizer.zero_grad()
        loss(layer, hidden.requires_grad_(), targets).backward()
        optimizer.step()

    return step


def peers(classes: int, features: int) -> dict[str, Callable[[], Step]]:
    cutoffs = [c for c in (2000, 20_000, 200_000) if c < classes]
    return {
        "log-softmax": lambda: dense(classes, features, lambda h, w, t: F.cross_entropy(h @ w.T, t)),
        "linear_cross_entropy": lambda: dense(classes, features, fused),
        "AdaptiveLogSoftmaxWithLoss": lambda: module(
            nn.AdaptiveLogSoftmaxWithLoss(features, classes, cutoffs), lambda layer, h, t: layer(h, t).loss
        ),
        "hierarchical, two levels": lambda: module(
            HierarchicalSoftmax(features, classes), lambda layer, h, t: layer(h, t).mean()
        ),
    }


def floor(features: int, rows: int) -> Callable[[], None]:
    x, small, square = torch.randn(rows, features), torch.randn(rows, rows), torch.randn(features, features)

    def products() -> None:
        for _ in range(4):
            x @ square
            if rows < features:
                x @ x.T
        for _ in range(3):
            x.T @ x
        if rows < features:
            small @ x

    return products


def timed(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def compare(classes: int, features: int, rows: int, zipf: bool, rounds: int, threads: int) -> dict:
    generator = torch.Generator().manual_seed(0)

    def batch() -> tuple[Tensor, Tensor]:
        return torch.randn(rows, features, generator=generator), draw_targets(classes, rows, zipf, generator)

    ours, head = spherical(classes, features)
    alone = floor(features, rows)
    for _ in range(20):
        ours(*batch())
        alone()
    results: dict[str, dict] = {}
    own = [sys.executable, __file__, "--classes", str(classes), "--threads", str(threads)]
    quiet: list[float] = []
    ratios_to_floor = []
    for name, build in peers(classes, features).items():
        peer = build()
        peer(*batch())
        seconds, ratios = [], []
        for _ in range(rounds):
            seconds.append(timed(functools.partial(peer, *batch())))
            mine = [timed(functools.partial(ours, *batch())) for _ in range(50)]
            least = [timed(alone) for _ in range(20)]
            quiet += mine
            ratios.append(seconds[-1] / statistics.median(mine))
            ratios_to_floor.append(statistics.median(mine) / statistics.median(least))
        results[name] = {"seconds": statistics.median(seconds), "times_slower": statistics.median(ratios)}
        del peer
    middle = statistics.median(quiet)
    head._pace, head._busy = max(512, classes // 1000), True
    rewriting = [timed(functools.partial(ours, *batch())) for _ in range(300)]
    memory = subprocess.run([*own, "--memory-of", f"{features}x{rows}"], capture_output=True, text=True, check=True)
    return {
        "classes": classes,
        "features": features,
        "rows": rows,
        "targets": "zipf" if zipf else "uniform",
        "peers": results,
        "milliseconds": 1e3 * middle,
        "to_floor": statistics.median(ratios_to_floor),
        "longest_step": max(quiet) / middle,
        "rewriting_median": statistics.median(rewriting) / middle,
        "rewriting_longest": max(rewriting) / middle,
        "consistency": head.consistency(),
        "factor_matrix_megabytes": classes * features * 4 / 1e6,
        "peak_megabytes_beyond_it": int(memory.stdout) / 1e6,
    }


def peak_memory(classes: int, features: int, rows: int) -> int:
    step, head = spherical(classes, features)
    hidden, targets = torch.randn(rows, features), torch.randint(classes, (rows,))
    head._pace, head._busy = max(512, classes // 1000), True
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(20):
        step(hidden.clone(), targets)
    return resident("VmHWM") - before


def compiled(classes: int, features: int, rows: int) -> Callable[[], None]:
    """One step's formulas for the Z-loss; see :mod:`lossmith.heads.factored` for what they are."""
    a, b = 0.1, 10.0

    @torch.compile(dynamic=False)
    def forward(h: Tensor, gram: Tensor, parts: Tensor, v: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        with_gram, chosen, rotated = h @ gram, v[targets], h @ parts.T
        s, centred = rotated[:, -1], (with_gram * h).sum(-1)
        o = (chosen * rotated[:, :features]).sum(-1) + rotated[:, features]
        inverse = torch.threshold(centred / classes, 0.0, float("inf")).rsqrt()
        z = (o - s / classes) * inverse
        by_z = torch.sigmoid(a * (b - z)) * inverse
        two_q = by_z * z * inverse / classes
        by_s = (by_z - two_q * s) / classes
        with_gram = with_gram + torch.outer(s / classes, parts[-1])
        return F.softplus(a * (b - z)) / a, with_gram, rotated, chosen, -by_z / rows, two_q / rows, by_s / rows

    @torch.compile(dynamic=False)
    def backward(h: Tensor, with_gram: Tensor, chosen: Tensor, y: Tensor, two_q: Tensor, by_s: Tensor, parts: Tensor):
        sparse = torch.cat([y[:, None] * chosen, y[:, None], by_s[:, None]], 1) @ parts
        return sparse, two_q[:, None] * h, sparse + two_q[:, None] * with_gram

    @torch.compile(dynamic=False)
    def inner(
        h: Tensor, sparse: Tensor, weighted: Tensor, of_h: Tensor, y: Tensor, two_q: Tensor, by_s: Tensor, t: Tensor
    ):
        same = torch.where(t[:, None] == t[None], y[:, None] * y[None], 0.0)
        half = 0.5 * (weighted @ (of_h + sparse).T + same) + torch.outer(y + 0.5 * classes * by_s, by_s)
        m, hidden = half + half.T, h @ h.T
        e = hidden * (LR * two_q)
        return m, e, (m * hidden).sum(), e.abs().sum(-1).amax()

    @torch.compile(dynamic=False)
    def update(h, rotated, weighted, of_h, y, by_s, m, e, recent, moments, inverse, parts, base, gram):  # type: ignore[no-untyped-def]
        start = h @ inverse
        p = start + e @ (start + e @ start)
        new = torch.addmm(recent, rotated.T, weighted, alpha=-LR)
        new = torch.cat([new[:-2], new[-2:] - LR * (torch.stack([by_s, y + classes * by_s]) @ h)])
        lost = recent[-1] - new[-1]
        moments = torch.addmm(moments, (of_h - 0.5 * LR * (m @ h)).T, h, alpha=-LR)
        moments = moments + torch.outer(parts[-1] - 0.5 * lost, lost) / classes
        inverse = torch.addmm(inverse, weighted.T, p, alpha=LR)
        return new, moments, inverse, base + new, gram + moments + moments.T, -LR * y[:, None] * p

    v = 1e-3 * torch.randn(classes, features)
    gram, inverse = 1e-6 * classes * torch.eye(features), torch.eye(features)
    parts = torch.cat([inverse, torch.zeros(2, features)])
    state = [torch.zeros_like(parts), torch.zeros_like(gram), inverse, parts, gram]

    batches = itertools.cycle([(torch.randn(rows, features), torch.randint(classes, (rows,))) for _ in range(200)])

    @torch.no_grad()
    def step() -> None:
        h, t = next(batches)
        _, with_gram, rotated, chosen, y, two_q, by_s = forward(h, state[4], state[3], v, t)
        sparse, weighted, of_h = backward(h, with_gram, chosen, y, two_q, by_s, state[3])
        m, e, norm, size = inner(h, sparse, weighted, of_h, y, two_q, by_s, t)
        float(norm), float(size)
        *state[:], shift = update(h, rotated, weighted, of_h, y, by_s, m, e, *state[:4], parts, gram)
        v.index_add_(0, t, shift)

    return step


def bound(classes: int, shape: str, rounds: int) -> str:
    features, rows = map(int, shape.split("x"))
    step, products = compiled(classes, features, rows), floor(features, rows)
    for _ in range(10):
        step()
    ratios = []
    for _ in range(3 * rounds):
        mine = statistics.median(timed(step) for _ in range(50))
        ratios.append(mine / statistics.median(timed(products) for _ in range(50)))
    return (
        f"{features} features, batch {rows}: compiled, without autograd, {statistics.median(ratios):.2f} x the matrix "
        f"products alone ({min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} rounds)"
    )


def flat(rounds: int) -> list[dict]:
    found = []
    for classes in (10**4, 10**5, 10**6, 10**7):
        step, _ = spherical(classes, 256)
        generator = torch.Generator().manual_seed(0)
        batches = [
            (torch.randn(128, 256, generator=generator), torch.randint(classes, (128,), generator=generator))
            for _ in range(50 * rounds)
        ]
        seconds = [timed(functools.partial(step, *batch)) for batch in batches][10:]
        found.append({"classes": classes, "milliseconds": 1e3 * statistics.median(seconds)})
    return found


def network(classes: int, rounds: int) -> dict:
    """The papers' language model: ten words of 512 dimensions, ReLU layers 2048-2048-512, batches of 200."""
    words = nn.Embedding(classes, 512, sparse=True)
    nn.init.normal_(words.weight, std=1e-3)
    body = nn.Sequential(nn.Linear(5120, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 512))
    optimizer = torch.optim.SGD([*words.parameters(), *body.parameters()], lr=LR)
    generator = torch.Generator().manual_seed(0)
    ours, _ = spherical(classes, 512)
    peer = dense(classes, 512, lambda h, w, t: F.cross_entropy(h @ w.T, t))

    def step(output: Step) -> tuple[float, float]:
        context = torch.randint(classes, (200, 10), generator=generator)
        targets = torch.randint(classes, (200,), generator=generator)
        start = time.perf_counter()
        optimizer.zero_grad()
        hidden = body(words(context).flatten(1))
        leaf = hidden.detach()
        middle = time.perf_counter()
        output(leaf, targets)
        spent = time.perf_counter() - middle
        hidden.backward(leaf.grad)
        optimizer.step()
        return time.perf_counter() - start, spent

    step(ours), step(peer)
    rows = [(step(peer), [step(ours) for _ in range(5)]) for _ in range(rounds)]
    mine = [s for _, several in rows for s in several]
    return {
        "log-softmax seconds": statistics.median(p[0] for p, _ in rows),
        "spherical seconds": statistics.median(s[0] for s in mine),
        "times faster": statistics.median(p[0] / statistics.median(s[0] for s in several) for p, several in rows),
        "share of output layer, log-softmax": statistics.median(p[1] / p[0] for p, _ in rows),
        "share of output layer, spherical": statistics.median(s[1] / s[0] for s in mine),
    }


def show(r: dict) -> None:
    print(f"\n{r['classes']:,} classes, {r['features']} features, batch {r['rows']}, {r['targets']} targets")
    print(
        f"SphericalHead: {r['milliseconds']:.2f} ms a step, {r['to_floor']:.2f} x the matrix products alone; longest "
        f"step {r['longest_step']:.1f} x the median; while rewriting {r['rewriting_median']:.1f} x, longest "
        f"{r['rewriting_longest']:.1f} x"
    )
    print(
        f"memory: factor matrix {r['factor_matrix_megabytes']:.0f} MB, peak beyond it during steps "
        f"{r['peak_megabytes_beyond_it']:.0f} MB; statistics against the matrix afterwards: "
        + ", ".join(f"{k} {v:.1e}" for k, v in r["consistency"].items())
    )
    for name, p in r["peers"].items():
        print(f"  {name:30s} {p['seconds']:8.3f} s   {p['times_slower']:8.1f} x SphericalHead")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["256x128", "512x128"])
    parser.add_argument("--classes", type=int, default=793_471)
    parser.add_argument("--zipf", action="store_true", help="targets with p(k) ~ 1/k instead of uniform ones")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--flat", action="store_true")
    parser.add_argument("--network", action="store_true")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.memory_of:
        print(peak_memory(arguments.classes, *map(int, arguments.memory_of.split("x"))))
        return
    if not arguments.json:
        print(f"torch {torch.__version__}, {arguments.threads} threads, {arguments.rounds} rounds")
    if arguments.compiled:
        for shape in arguments.shapes:
            print(bound(arguments.classes, shape, arguments.rounds))
        return
    if arguments.flat or arguments.network:
        found = flat(arguments.rounds) if arguments.flat else network(arguments.classes, arguments.rounds)
        if arguments.json:
            print(json.dumps(found))
        elif isinstance(found, list):
            for row in found:
                print(f"{row['classes']:>12,} classes: {row['milliseconds']:.2f} ms a step (256 features, batch 128)")
        else:
            for name, value in found.items():
                print(f"{name:40s} {value:8.3f}")
        return
    for shape in arguments.shapes:
        features, rows = map(int, shape.split("x"))
        result = compare(arguments.classes, features, rows, arguments.zipf, arguments.rounds, arguments.threads)
        if arguments.json:
            print(json.dumps(result))
        else:
            show(result)


if __name__ == "__main__":
    main()
