"""Time to a given accuracy of a well's ground state: ours, DeepXDE, and a classical eigen-solver.

    python benchmarks/quantum_wells.py [--well infinite|finite|barrier] [--accuracy 1e-4] [--repeats 3]

DeepXDE (``pip install deepxde``) has no eigenvalue problem of its own: it gets the same residual, norm, network, points
and trained energy as ``solve_schrodinger(method="residual")``, walls as a hard constraint, float64, Adam. All begin at
the same distance from the level. The clock stops when the energy first lies, and 200 steps later still lies, within
``--accuracy`` of the exact one, or at ``--limit`` seconds. Candidates run one after the other in one process, seed by
seed; the ratio is that of the medians. Also: time per step of both, and of derivatives by nested autograd.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from lossmith.tasks.physics import (
    Potential,
    Trial,
    barrier,
    exact_levels,
    finite_differences,
    finite_well,
    infinite_well,
    midpoints,
    schrodinger_residual_loss,
    solve_schrodinger,
)

WELLS = {"infinite": infinite_well(), "finite": finite_well(20, 0.5, (0, 1)), "barrier": barrier(20, 0.2)}
WEIGHT, RATE, ENERGY_RATE, POINTS, HIDDEN, CHECK = 1000.0, 2e-3, 2e-2, 200, (20, 20, 20), 100


class Reached(Exception):
    """The energy was right twice in a row."""


class Watch:
    """Notes when the energy first became, and stayed, right."""

    def __init__(self, level: float, accuracy: float, limit: float) -> None:
        self.level, self.accuracy, self.limit = level, accuracy, limit
        self.start = time.perf_counter()
        self.first: float | None = None
        self.looks = 0

    def look(self, energy: float) -> None:
        now = time.perf_counter() - self.start
        right = abs(energy / self.level - 1) <= self.accuracy
        self.looks = self.looks + 1 if right else 0
        if self.looks == 1:
            self.first = now
        if self.looks == 3 or now > self.limit:
            raise Reached


def timed(run: Callable[[Watch], None], level: float, accuracy: float, limit: float) -> float:
    watch = Watch(level, accuracy, limit)
    with contextlib.suppress(Reached):
        run(watch)
    return watch.first if watch.looks and watch.first is not None else float("inf")


def ours_projected(potential: Potential, seed: int, accuracy: float) -> float:
    start = time.perf_counter()
    levels = solve_schrodinger(potential, tolerance=accuracy, seed=seed)
    taken = time.perf_counter() - start
    return taken if abs(levels.energies[0] / exact_levels(potential)[0] - 1) <= accuracy else float("inf")


def ours_residual(potential: Potential, seed: int, start: float) -> Callable[[Watch], None]:
    def run(watch: Watch) -> None:
        solve_schrodinger(
            potential,
            method="residual",
            energy_init=start,
            norm_weight=WEIGHT,
            hidden=HIDDEN,
            seed=seed,
            max_steps=30 * CHECK * 20,
            progress=lambda step: watch.look(step.energies[0]),
        )

    return run


def deepxde(potential: Potential, seed: int, start: float) -> Callable[[Watch], None]:
    os.environ.setdefault("DDE_BACKEND", "pytorch")
    import deepxde as dde

    dde.config.set_default_float("float64")
    dde.config.set_random_seed(seed)
    a, b = potential.interval

    def run(watch: Watch) -> None:
        energy = dde.Variable(start)
        values = torch.tensor(potential(midpoints(potential, POINTS).x.numpy()))[:, None]

        def equation(x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
            bend = dde.grad.hessian(y, x)
            norm = (b - a) * (y**2).mean() - 1
            v = values if len(x) == len(values) else torch.tensor(potential(x.detach().numpy()))
            return [-bend + (v - energy) * y, norm.expand(len(x), 1)]

        class Midpoints(dde.geometry.Interval):
            def uniform_points(self, n: int, boundary: bool = True) -> np.ndarray:
                return midpoints(potential, n).x.numpy()[:, None]

        data = dde.data.PDE(Midpoints(a, b), equation, [], num_domain=POINTS, train_distribution="uniform")
        net = dde.nn.FNN([1, *HIDDEN, 1], "tanh", "Glorot uniform")
        net.apply_output_transform(lambda x, y: 4 / (b - a) ** 2 * (x - a) * (b - x) * y)
        with torch.no_grad():
            x = torch.tensor(midpoints(potential, POINTS).x.numpy()[:, None])
            size = ((b - a) * (net(x) ** 2).mean()).sqrt()
            net.linears[-1].weight.div_(size)
            net.linears[-1].bias.div_(size)
        model = dde.Model(data, net)
        model.compile("adam", lr=RATE, loss_weights=[1, WEIGHT], external_trainable_variables=[energy], verbose=0)
        model.opt.param_groups[0]["lr"] = RATE
        # The energy's own rate, as ours has it.
        for group in model.opt.param_groups:
            group["params"] = [p for p in group["params"] if p is not energy]
        model.opt.add_param_group({"params": [energy], "lr": ENERGY_RATE})

        class Look(dde.callbacks.Callback):
            def on_batch_end(self) -> None:
                if self.model.train_state.step % CHECK == 0:
                    watch.look(float(energy.detach()))

        model.train(iterations=10**6, display_every=10**7, callbacks=[Look()], verbose=0)

    return run


def per_step(potential: Potential, repeats: int) -> dict[str, float]:
    """Milliseconds of a loss with its gradient, by closed form and by nested autograd, interleaved."""
    grid = midpoints(potential, POINTS)
    trial = Trial(potential.interval, hidden=HIDDEN)
    times: dict[str, list[float]] = {"closed form": [], "nested autograd": []}
    for _ in range(20 * repeats):
        for name, psi in (("closed form", trial.jet), ("nested autograd", trial)):
            start = time.perf_counter()
            trial.zero_grad()
            schrodinger_residual_loss(psi, grid.x, grid.v, 10.0)[0].backward()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(taken) for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--well", choices=WELLS, default="barrier")
    parser.add_argument("--accuracy", type=float, default=1e-4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for one candidate")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    potential = WELLS[arguments.well]
    level = float(exact_levels(potential)[0])
    start = 0.75 * level
    limits = (level, arguments.accuracy, arguments.limit)
    peer = True
    try:
        import deepxde as _  # noqa: F401
    except ImportError:
        peer = False
        print("deepxde is not installed (pip install deepxde): only ours", file=sys.stderr)
    times: dict[str, list[float]] = {}
    solve_schrodinger(potential, tolerance=1e-2)  # imports and first-call costs
    finite_differences(potential, points=4000)
    for seed in range(arguments.repeats):
        runs = {
            "ours, projection": lambda s=seed: ours_projected(potential, s, arguments.accuracy),
            "ours, residual": lambda s=seed: timed(ours_residual(potential, s, start), *limits),
        }
        if peer:
            runs["DeepXDE"] = lambda s=seed: timed(deepxde(potential, s, start), *limits)
        for name, run in runs.items():
            times.setdefault(name, []).append(run())
        begun = time.perf_counter()
        found = finite_differences(potential, points=4000).energies[0]
        times.setdefault("finite differences", []).append(time.perf_counter() - begun)
    print(f"{arguments.well} well, level {level:.9g}, to {arguments.accuracy:g} relative, limit {arguments.limit:g} s")
    base = statistics.median(times["ours, projection"])
    for name, taken in times.items():
        middle = statistics.median(taken)
        shown = ", ".join("not reached" if t == float("inf") else f"{t:.3f}" for t in taken)
        print(f"{name:20} {middle:9.4f} s  {middle / base:8.2f}x ours   [{shown}]")
    print(f"finite differences at 4000 points are within {abs(found / level - 1):.1e}")
    for name, taken_ms in per_step(potential, arguments.repeats).items():
        print(f"loss and gradient by {name}: {taken_ms:.2f} ms")


if __name__ == "__main__":
    main()
