"""Superposition: training many toys, and measuring a large unembedding, next to the obvious way.

    python benchmarks/superposition.py                     # toys and probe
    python benchmarks/superposition.py --what probe --rows 128256 --columns 4096 --slice 4096

toys: a sweep of widths, weight decays and seeds. ``obvious`` does what the released script does: one toy at a time,
dense examples drawn anew at each step, autograd, the signed decay and Adam on each parameter. Both make the same number
of steps of every toy; rounds are interleaved, reported is the median over rounds of the ratio of seconds.

probe: mean squared overlap over all pairs of rows. ``obvious`` multiplies blocks of 8,192 rows with each other in
float64, as the released script does; of a large matrix it is given ``--slice`` rows against all, and its time is
multiplied accordingly. Ours (``lossmith.probes.superposition``) also does everything else that its report holds. Peak
memory: of a fresh process that reads the matrix from a safetensors file, above what it has before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from lossmith.probes import superposition
from lossmith.theory import SignedDecayAdamW, ToyTraining, feature_frequencies, toy_loss, train_toys

BLOCK = 8192


def obvious_toys(p: torch.Tensor, widths: list[int], decays: list[float], seeds: int, training: ToyTraining) -> None:
    features = len(p)
    probabilities = p.float()
    for width in widths:
        for decay in decays:
            for seed in range(seeds):
                torch.manual_seed(seed)
                weight = torch.nn.Parameter(torch.randn(features, width) / width**0.5)
                bias = torch.nn.Parameter(torch.randn(features))
                optimizer = SignedDecayAdamW([{"params": [weight], "weight_decay": decay}, {"params": [bias]}])
                for step in range(training.steps):
                    on = torch.rand(training.batch_size, features) < probabilities
                    x = on * 2 * torch.rand(training.batch_size, features)
                    for group in optimizer.param_groups:
                        group["lr"] = training.learning_rate * training.schedule(step)
                    optimizer.zero_grad()
                    (toy_loss(x, weight, bias).mean() / features).backward()
                    optimizer.step()


def bench_toys(args: argparse.Namespace) -> None:
    for features, batch in args.toys:
        p = feature_frequencies("power", features)
        widths = [max(1, features // share) for share in (100, 40, 20, 10)]
        decays = [-1.0, 0.0, 1.0]
        few = ToyTraining(steps=args.steps, batch_size=batch, averaged=1)
        train_toys(p, widths[:1], training=few)
        ratios, ours = [], []
        for _ in range(args.rounds):
            started = time.perf_counter()
            train_toys(p, widths, weight_decays=decays, seeds=range(args.seeds), training=few)
            middle = time.perf_counter()
            obvious_toys(p, widths, decays, args.seeds, few)
            ended = time.perf_counter()
            ours.append((middle - started) / (len(widths) * len(decays) * args.seeds * args.steps))
            ratios.append((ended - middle) / (middle - started))
        print(
            f"toys, {features} features, batch {batch}, widths {widths}, {len(decays)} decays x {args.seeds} seeds: "
            f"{1e6 * statistics.median(ours):.0f} us per toy and step; obvious takes {statistics.median(ratios):.2f}x "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


def obvious_overlap(weight: torch.Tensor, rows: int) -> float:
    """Sum of squared cosines of the first ``rows`` rows with all rows, in blocks."""
    unit = torch.nn.functional.normalize(weight.double(), dim=-1)
    total = 0.0
    for i in range(0, rows, BLOCK):
        for j in range(0, len(unit), BLOCK):
            total += float((unit[i : min(i + BLOCK, rows)] @ unit[j : j + BLOCK].T).square().sum())
    return (total - rows) / (rows * (len(unit) - 1))


def bench_probe(args: argparse.Namespace) -> None:
    weight = torch.randn(args.rows, args.columns)
    share = min(args.slice, args.rows)
    ratios, times, found, expected = [], [], 0.0, 0.0
    for _ in range(args.rounds):
        started = time.perf_counter()
        found = superposition(weight).mean_square_overlap
        middle = time.perf_counter()
        expected = obvious_overlap(weight, share)
        ended = time.perf_counter()
        times.append(middle - started)
        # Half of the pairs, since the matrix of cosines is symmetric.
        ratios.append((ended - middle) * args.rows / share / 2 / (middle - started))
    print(
        f"probe, {args.rows} x {args.columns}: {statistics.median(times):.2f} s; all pairs take "
        f"{statistics.median(ratios):.1f}x ({min(ratios):.1f} to {max(ratios):.1f}); "
        f"mean square {found:.9g}, by pairs{'' if share == args.rows else f' of {share} rows'} {expected:.9g}"
    )
    with tempfile.TemporaryDirectory() as folder:
        _save(Path(folder), weight)
        del weight
        done = subprocess.run(
            [sys.executable, __file__, "--what", "memory", "--model", folder],
            capture_output=True,
            text=True,
            check=True,
        )
    used = json.loads(done.stdout.splitlines()[-1])
    print(
        f"probe from disk: {used['seconds']:.1f} s, peak memory {used['peak']:.0f} MiB above the process's own; "
        f"the matrix alone is {args.rows * args.columns * 4 / 2**20:.0f} MiB"
    )


def _save(folder: Path, weight: torch.Tensor) -> None:
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    rows, columns = weight.shape
    save_file({"lm_head.weight": weight}, folder / "model.safetensors")
    LlamaConfig(
        vocab_size=rows,
        hidden_size=columns,
        num_hidden_layers=1,
        num_attention_heads=1,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)


def memory(model: str) -> None:
    """Peak of the anonymous memory: pages of the file itself are the system's to drop."""
    import threading

    import transformers

    transformers.utils.logging.set_verbosity_error()
    superposition(torch.randn(100, 8))
    from lossmith.probes import find_unembedding

    find_unembedding(model)
    before, peak, over = _anonymous(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.005):
            peak = max(peak, _anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    superposition(model)
    seconds = time.perf_counter() - started
    over.set()
    watcher.join()
    print(json.dumps({"peak": peak - before, "seconds": seconds}))


def _anonymous() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    return 0.0


def shape(text: str) -> tuple[int, int]:
    first, second = text.split("x")
    return int(first), int(second)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=["all", "toys", "probe", "memory"], default="all")
    parser.add_argument("--toys", type=shape, nargs="+", default=[(200, 256), (1000, 2048)], help="features x batch")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=32_000)
    parser.add_argument("--columns", type=int, default=1024)
    parser.add_argument("--slice", type=int, default=32_000, help="rows that the obvious way is given")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.what == "memory":
        memory(args.model)
        return
    print(f"torch {torch.__version__}, {args.threads} threads, {args.rounds} rounds, interleaved")
    if args.what in ("all", "toys"):
        bench_toys(args)
    if args.what in ("all", "probe"):
        bench_probe(args)


if __name__ == "__main__":
    main()
