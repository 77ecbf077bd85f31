"""Public faults of scaling-law fits: the faulty form fails what ours passes."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import logsumexp

from lossmith.laws import Chinchilla, Protocol, Reading, estimate, read_family, split_family


def curves(run_noise: float = 0.0, noise: float = 0.0, seed: int = 0, sizes: int = 6) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    n, d = np.meshgrid(np.geomspace(1e8, 7e10, sizes), np.geomspace(2e10, 3e11, 30), indexing="ij")
    loss = 1.7 + 400 * n**-0.34 + 1500 * d**-0.33
    loss = loss * np.exp(run_noise * rng.standard_normal((sizes, 1)) + noise * rng.standard_normal(n.shape))
    return {"params": n.ravel(), "tokens": d.ravel(), "loss": loss.ravel()}


def test_the_mean_of_the_losses_stops_the_optimiser_early() -> None:
    """L-BFGS-B stops by absolute gradients: averaged over points they are small from the start (Besiroglu et al.)."""
    table = curves(noise=0.01)
    n, d, y = (np.log(table[name]) for name in ("params", "tokens", "loss"))

    def total(p: np.ndarray) -> float:
        r = np.abs(logsumexp([p[0] - p[3] * n, p[1] - p[4] * d, np.full_like(n, p[2])], axis=0) - y)
        return float(np.where(r <= 1e-3, r * r / 2, 1e-3 * (r - 5e-4)).sum())

    starts = [[a, b, 0.5, s, s] for a in (5, 10) for b in (5, 10) for s in (0.25, 0.5)]
    options = {"maxiter": 10_000}
    averaged = [
        total(minimize(lambda p: total(p) / len(y), start, method="L-BFGS-B", options=options).x) for start in starts
    ]
    ours = Chinchilla().fit(table, bootstrap=0)
    assert ours.objective == pytest.approx(total(_logged(ours.parameters)), rel=1e-9)
    assert min(averaged) > 1.001 * ours.objective


def _logged(p: dict[str, float]) -> np.ndarray:
    return np.array([np.log(p["A"]), np.log(p["B"]), np.log(p["E"]), p["alpha"], p["beta"]])


def test_a_strict_end_of_training_drops_the_last_checkpoint() -> None:
    table = read_family(curves())
    fitted, _ = split_family(table, Protocol(min_tokens=0, first=1.0))
    faulty = table.columns["tokens"] < 1.0 * table.columns["tokens"].max()
    small = table.columns["params"] < 7e10
    assert len(fitted) == int(small.sum())
    assert int((faulty & small).sum()) == len(fitted) - 5


def test_perplexities_fitted_as_losses_give_another_error() -> None:
    table = curves(run_noise=0.01, seed=2)
    nats = estimate(table).are
    as_losses = {**table, "loss": np.exp(table["loss"])}
    faulty = estimate(as_losses, reading=Reading(unit="nats")).are
    read = estimate({"params": table["params"], "tokens": table["tokens"], "ppl": np.exp(table["loss"])}).are
    assert read == pytest.approx(nats, rel=1e-6)
    assert abs(faulty / nats - 1) > 0.5


def test_resampling_checkpoints_as_if_they_were_runs_gives_limits_too_narrow() -> None:
    table = curves(run_noise=0.01, noise=0.001, sizes=12)
    whole = Chinchilla().fit(table | {"run": table["params"].astype(str)}, bootstrap=100, calibrated=False)
    points = Chinchilla().fit(table | {"run": np.arange(360)}, bootstrap=100, calibrated=False)
    inputs = {"params": 7e11, "tokens": 3e11}
    right, faulty = (f.interval(0.9, kind="law", **inputs) for f in (whole, points))
    assert float(faulty.high - faulty.low) < 0.6 * float(right.high - right.low)
