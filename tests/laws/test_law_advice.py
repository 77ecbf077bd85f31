from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lossmith.errors import InputError
from lossmith.laws import SQUARES, TiedChinchilla, advise, estimate

SIZES = [*np.geomspace(1e8, 7e9, 5), 7e10]


def family(sizes=SIZES, checkpoints: int = 80, early: float = 0.0, run: float = 0.0, own: float = 0.0, seed: int = 0):
    rng = np.random.default_rng(seed)
    n, d = np.meshgrid(sizes, np.geomspace(5e8, 3e11, checkpoints), indexing="ij")
    loss = 1.7 + 400 * n**-0.34 + 1500 * d**-0.33 + early * np.exp(-d / 2.5e9)
    loss = loss * np.exp(run * rng.standard_normal((len(sizes), 1)) + own * rng.standard_normal(n.shape))
    return pd.DataFrame({"params": n.ravel(), "tokens": d.ravel(), "loss": loss.ravel()})


def test_early_training_is_advised_against_with_the_measured_effect() -> None:
    advice = advise(family(early=3.0, run=0.01, own=0.003), target_params=1e12)
    first = advice.recommendations[0]
    assert first.do == "Fit the whole curves, without the first 10 billion tokens."
    assert first.measured["nothing left out"] > 2 * first.measured["whole curves without the beginning"]
    assert advice.check.are == pytest.approx(first.measured["whole curves without the beginning"])
    assert estimate(family(early=3.0, run=0.01, own=0.003), advice.protocol).are == pytest.approx(advice.check.are)
    assert "14.3 times larger is within reach" in advice.recommendations[-1].do


def test_where_the_table_speaks_clearly_against_a_rule_the_advice_follows_the_table() -> None:
    # A table whose curves leave the law late: only early measurements tell the end (by construction).
    frame = family()
    frame["loss"] += np.where(frame.tokens < 0.9 * 3e11, 0.2 * np.sin(np.log(frame.tokens) * 3), 0.0)
    advice = advise(frame)
    first = advice.recommendations[0]
    best = min((e, n) for n, e in first.measured.items() if e == e)[1]
    assert best != "whole curves without the beginning"
    assert first.do == f"Fit: {best}."
    assert "speaks clearly against" in first.because
    assert advice.check.are == pytest.approx(first.measured[best])


@pytest.mark.parametrize(("run", "own", "told"), [(0.02, 0.0005, True), (0.0, 0.02, False)])
def test_noise_of_whole_runs_is_told_from_noise_of_checkpoints(run: float, own: float, told: bool) -> None:
    sizes = [*np.geomspace(1e8, 7e9, 9), 7e10]
    first = advise(family(sizes, run=run, own=own)).recommendations[0]
    assert ("more models or seeds will" in first.because) == told


def test_few_sizes_get_fewer_free_parameters_or_borrow_them() -> None:
    two = advise(family(SIZES[3:]))
    assert isinstance(two.protocol.law, TiedChinchilla)
    one = advise(family(SIZES[4:]))
    assert one.protocol.law.fixed["alpha"] == pytest.approx(0.3526596)
    assert one.protocol.law.objective == SQUARES
    alone = advise(family(SIZES[5:]), target_params=1e13)
    assert alone.check is None
    assert "Train more sizes" in alone.recommendations[0].do
    assert "farther than has been checked" in alone.recommendations[-1].do


def test_a_law_no_better_than_the_best_loss_seen_is_not_recommended() -> None:
    # The largest model is no better than the small ones were: the law promises more.
    frame = family()
    small = frame.params < 7e10
    frame.loc[~small, "loss"] = frame.loss[small].min()
    advice = advise(frame)
    assert advice.check.best_seen == pytest.approx(0, abs=1e-12)
    assert any("Do not trust this law" in one.do for one in advice.recommendations)


def test_end_points_only_are_told_to_be_too_little() -> None:
    ends = family(np.geomspace(1e8, 7e10, 12)).groupby("params").tail(1)
    assert advise(ends).recommendations[0].do == "Record the loss at many checkpoints of every run."


def test_the_text_numbers_every_recommendation_with_its_reason() -> None:
    advice = advise(family(own=0.01))
    lines = advice.text().splitlines()
    assert len(lines) == 2 * len(advice.recommendations)
    assert lines[0].startswith("1. ")


def test_a_target_that_is_no_size_is_refused() -> None:
    with pytest.raises(InputError, match="target_params must be positive and finite, got -1"):
        advise(family(), target_params=-1)


def test_opt_gets_the_advice_of_the_paper(real_data) -> None:
    from lossmith.laws import Reading

    reading = Reading(columns={"params": "model_size", "tokens": "num_token"}, log10=("tokens",))
    advice = advise(real_data / "training-runs" / "opt_trajectories.csv", reading=reading)
    first = advice.recommendations[0]
    assert first.do == "Fit the whole curves, without the first 10 billion tokens."
    assert first.measured["whole curves without the beginning"] == pytest.approx(0.031, abs=0.01)
    assert advice.check.are < advice.check.best_seen
