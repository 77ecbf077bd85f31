"""Forward-backward and Baum-Welch on many sequences: ours against hmmlearn, same likelihood.

    python benchmarks/hidden_markov.py [--states 16] [--tokens 50] [--sequences 256] [--length 200]

Needs ``pip install hmmlearn``. Candidates run in one process, interleaved; the ratio is that of the medians of the
process's own time. hmmlearn has two implementations, in logarithms (its default) and with scaling.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lossmith.theory import HiddenMarkov, fit_hidden_markov


def peers(model: HiddenMarkov, **options: Any) -> dict[str, Any]:
    from hmmlearn.hmm import CategoricalHMM

    made = {}
    for implementation in ("log", "scaling"):
        peer = CategoricalHMM(
            len(model.start), n_features=model.emission.shape[1], implementation=implementation, init_params="",
            startprob_prior=1.0, transmat_prior=1.0, emissionprob_prior=1.0, **options,
        )  # fmt: skip
        peer.startprob_, peer.transmat_, peer.emissionprob_ = (
            part.numpy() for part in (model.start, model.transition, model.emission)
        )
        made[f"hmmlearn, {implementation}"] = peer
    return made


def report(title: str, times: dict[str, list[float]], values: dict[str, float]) -> None:
    base = statistics.median(times["ours"])
    print(title)
    for name, taken in times.items():
        middle = statistics.median(taken)
        print(f"  {name:20} {1e3 * middle:9.1f} ms  {middle / base:6.2f}x ours   {values[name]:.10f}")
    spread = max(values.values()) - min(values.values())
    print(f"  largest difference of the values: {spread / abs(values['ours']):.1e} (relative)")


def measure(runs: dict[str, Callable[[], float]], repeats: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    values = {}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.process_time()
            values[name] = run()
            times[name].append(time.process_time() - start)
    return times, values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=50)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--length", type=int, default=200)
    parser.add_argument("--steps", type=int, default=5, help="of Baum-Welch")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = HiddenMarkov.random(arguments.states, arguments.tokens, concentration=0.3)
    tokens, _ = model.sample(arguments.sequences, arguments.length)
    flat, lengths = tokens.reshape(-1, 1).numpy(), [arguments.length] * arguments.sequences
    fixed = peers(model)

    def scored(peer: Any) -> Callable[[], float]:
        return lambda: float(peer.score(flat, lengths))

    def both(peer: Any) -> Callable[[], float]:
        return lambda: float(peer.score_samples(flat, lengths)[0])

    shape = f"{arguments.sequences} x {arguments.length} tokens, {arguments.states} states"
    report(
        f"likelihood, {shape}",
        *measure(
            {"ours": lambda: float(model.log_likelihood(tokens).sum())} | {n: scored(p) for n, p in fixed.items()},
            arguments.repeats,
        ),
    )
    report(
        f"posteriors, {shape}",
        *measure(
            {"ours": lambda: float(model.posterior(tokens).log_likelihood.sum())}
            | {n: both(p) for n, p in fixed.items()},
            arguments.repeats,
        ),
    )
    start = HiddenMarkov.random(arguments.states, arguments.tokens, concentration=5.0, seed=1)

    def fitted(name: str) -> Callable[[], float]:
        def run() -> float:
            peer = peers(start, n_iter=arguments.steps, tol=-np.inf)[name]
            peer.fit(flat, lengths)
            return float(peer.score(flat, lengths))

        return run

    def ours() -> float:
        found, _ = fit_hidden_markov(
            tokens,
            arguments.states,
            initial=start,
            vocabulary=arguments.tokens,
            max_steps=arguments.steps,
            tolerance=-1,
        )
        return float(found.log_likelihood(tokens).sum())

    report(
        f"{arguments.steps} steps of Baum-Welch, {shape}",
        *measure({"ours": ours} | {name: fitted(name) for name in fixed}, max(1, arguments.repeats // 2)),
    )


if __name__ == "__main__":
    main()
