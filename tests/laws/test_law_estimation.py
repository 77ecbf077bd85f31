from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lossmith.errors import InputError
from lossmith.laws import (
    BORROWED,
    SQUARES,
    Chinchilla,
    Protocol,
    Reading,
    TiedChinchilla,
    TokenLaw,
    absolute_relative_error,
    estimate,
    estimation_grid,
    leave_one_out,
    read_families,
    read_family,
    split_family,
)

OPT = Reading(columns={"params": "model_size", "tokens": "num_token"}, log10=("tokens",), unit="nats")


def family(sizes: int = 5, checkpoints: int = 40, low: float = 2e10, noise: float = 0.0, target: float = 7e10):
    n, d = np.meshgrid([*np.geomspace(1e8, 7e9, sizes), target], np.geomspace(low, 3e11, checkpoints), indexing="ij")
    n, d = n.ravel(), d.ravel()
    loss = 1.7 + 400 * n**-0.34 + 1500 * d**-0.33
    loss = loss * np.exp(noise * np.random.default_rng(0).standard_normal(len(n)))
    return pd.DataFrame({"num_params": n, "tokens_seen": d, "loss": loss})


def test_noise_free_families_are_predicted_exactly() -> None:
    found = estimate(family())
    assert found.are < 1e-9
    assert found.fitted.parameters["beta"] == pytest.approx(0.33, rel=1e-8)
    assert found.scale_up == pytest.approx(10)
    assert found.models == pytest.approx(np.geomspace(1e8, 7e9, 5))


def test_the_error_is_relative_to_what_was_measured() -> None:
    assert absolute_relative_error([2.0, 3.0], [2.0, 3.0]) == 0
    loss = np.array([2.0, 3.0])
    assert absolute_relative_error(loss, 1.1 * loss) == pytest.approx(0.1)
    assert absolute_relative_error(1.1 * loss, loss) == pytest.approx(0.1 / 1.1)


def test_the_cut_removes_exactly_the_rows_up_to_it() -> None:
    table = read_family(family(low=5e8))
    tokens = table.columns["tokens"]
    edge = float(np.sort(np.unique(tokens))[10])
    own, target = split_family(table, Protocol(min_tokens=edge))
    small = table.columns["params"] < 7e10
    assert len(own) == int((small & (tokens > edge)).sum())
    assert own.columns["tokens"].min() > edge
    # The target is not cut, and none of it is fitted.
    assert own.columns["params"].max() < 7e10
    assert target.columns["tokens"].min() >= 0.7 * 3e11
    assert set(target.columns["params"]) == {7e10}
    # The default: ten billion, or 4 % of a run that is too short for that.
    assert Protocol().cut(table) == 1e10
    assert Protocol().cut(read_family(family(low=1e8).assign(tokens_seen=lambda f: f.tokens_seen / 1e3))) == 0.04 * 3e8


def test_first_and_last_shares_are_of_each_runs_own_training_with_its_end() -> None:
    frame = family(sizes=3, checkpoints=10)
    short = frame[(frame.num_params > 1e9) | (frame.tokens_seen < 1e11)]
    table = read_family(short)
    own, _ = split_family(table, Protocol(min_tokens=0))
    assert own.columns["tokens"].max() == pytest.approx(3e11)
    half, _ = split_family(table, Protocol(min_tokens=0, first=0.5))
    for size in np.unique(half.columns["params"]):
        whole = table.columns["tokens"][table.columns["params"] == size].max()
        kept = half.columns["tokens"][half.columns["params"] == size]
        assert kept.max() <= 0.5 * whole
    ends, _ = split_family(table, Protocol(min_tokens=0, last=0.0))
    assert len(ends) == 3


@pytest.mark.parametrize("scaled", [1.0, 3.0])
def test_loss_scale_does_not_change_the_error(scaled: float) -> None:
    frame = family(noise=0.01)
    plain, other = estimate(frame), estimate(frame.assign(loss=scaled * frame.loss))
    assert other.are == pytest.approx(plain.are, rel=1e-5)


def test_the_number_of_models_and_their_choice_are_respected() -> None:
    frame = family()
    assert estimate(frame, Protocol(models=3)).models == pytest.approx(np.geomspace(1e8, 7e9, 5)[:3])
    assert estimate(frame, Protocol(models=3, choose="largest")).models == pytest.approx(np.geomspace(1e8, 7e9, 5)[2:])
    down = estimate(frame, Protocol(target="smallest"))
    assert min(down.models) > 1e8
    assert down.are < 1e-8


def test_one_model_is_enough_with_a_borrowed_size_part() -> None:
    frame = family()
    truth = Chinchilla(objective=SQUARES, fixed={"A": 400.0, "alpha": 0.34})
    assert estimate(frame, Protocol(models=1, law=truth)).are < 1e-9
    borrowed = estimate(frame, Protocol(models=1, law=Chinchilla(objective=SQUARES, fixed=BORROWED)))
    assert borrowed.fitted.parameters["A"] == pytest.approx(np.exp(6.255414))
    assert 0 < borrowed.are < 0.2
    without = estimate(frame, Protocol(models=1))
    assert np.isnan(without.are)
    assert "needs at least 3 to find alpha" in without.reason


def test_the_first_part_of_a_curve_predicts_its_end() -> None:
    d = np.geomspace(1e10, 3e11, 60)
    loss = 2.1 + 1500 * d**-0.33
    early = d <= 0.3 * d.max()
    fitted = TokenLaw().fit({"tokens": d[early], "loss": loss[early]}, bootstrap=0)
    np.testing.assert_allclose(fitted.predict(tokens=d), loss, rtol=1e-8)


def test_tied_coefficients_follow_from_the_exponents() -> None:
    fitted = TiedChinchilla().fit(family(sizes=2, noise=0.01), bootstrap=0)
    e, alpha, beta = (fitted.parameters[name] for name in ("E", "alpha", "beta"))
    a, b = np.exp((alpha - 0.0116280) / 0.05004588), np.exp((beta - 0.23710262) / 0.03844353)
    n, d = 3e9, 1e11
    assert float(fitted.predict(params=n, tokens=d)) == pytest.approx(e + a * n**-alpha + b * d**-beta, rel=1e-9)
    assert len(fitted.law.names) - len(fitted.law.fixed) == 3


def test_a_tied_law_plans_as_the_law_that_it_stands_for() -> None:
    fitted = TiedChinchilla().fit(family(sizes=3, noise=0.01), bootstrap=20, calibrated=False)
    plan = fitted.plan(flops=1e22)
    assert plan.loss == pytest.approx(float(fitted.predict(params=plan.params, tokens=plan.tokens)), rel=1e-9)
    around = plan.params * np.geomspace(0.3, 3, 501)
    assert fitted.predict(params=around, tokens=1e22 / (6 * around)).min() >= plan.loss * (1 - 1e-9)
    assert plan.params_limits[0] <= plan.params <= plan.params_limits[1]


def test_the_grid_gives_one_estimate_per_cell_with_its_cost() -> None:
    cells = estimation_grid(family(), shares=(0.5, 1.0), models=(2, 3, 5))
    assert [len(cell.models) for cell in cells] == [2, 2, 3, 3, 5, 5]
    assert np.isnan(cells[0].are)
    assert "needs at least 3" in cells[0].reason
    assert all(cell.are < 1e-6 for cell in cells[2:])
    assert cells[4].flops == pytest.approx(cells[5].flops * 0.5, rel=0.1)
    assert cells[3].flops < cells[5].flops
    with pytest.raises(InputError, match="models must lie between 1 and 5"):
        estimation_grid(family(), models=(6,))


def test_leaving_out_a_model_changes_what_rests_on_it() -> None:
    frame = family(noise=0.0)
    spoilt = frame.assign(loss=np.where(np.isclose(frame.num_params, 1e8), 1.2 * frame.loss, frame.loss))
    errors = leave_one_out(spoilt)
    assert len(errors) == 5
    assert errors[1e8] < 1e-8 < min(error for size, error in errors.items() if size > 1e8)


def test_families_are_read_apart_and_those_of_one_size_left_out() -> None:
    table = pd.concat([family().assign(scaled_set="a"), family(sizes=1, target=1e8).assign(scaled_set="b")])
    assert list(read_families(table)) == ["a"]
    with pytest.raises(InputError, match="no column 'set' to tell families apart"):
        read_families(table, "set")


@pytest.mark.parametrize(
    ("table", "protocol", "message"),
    [
        (family(sizes=1, target=1e8), Protocol(), "holds one size of model"),
        (family().assign(tokens_seen=lambda f: f.tokens_seen / 100), Protocol(min_tokens=1e10),
         r"min_tokens=1e\+10 removes all 200 rows that would be fitted; the largest has 3e\+09 tokens"),
        (family(checkpoints=5), Protocol(first=0.01), "no measurement of the table lies in the first 1%"),
        (family().drop(columns="num_params"), Protocol(), "no column for 'params'"),
    ],
)  # fmt: skip
def test_wrong_families_get_a_sentence(table, protocol, message) -> None:
    with pytest.raises(InputError, match=message):
        estimate(table, protocol)


@pytest.mark.parametrize("wrong", [{"first": 0}, {"last": 2}, {"models": 0}, {"target": "best"}, {"min_tokens": -1}])
def test_wrong_protocols_are_refused(wrong) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Protocol(**wrong)


@pytest.mark.parametrize(
    ("unit", "cut", "percent"),
    [("nats", 0, 16.5), ("nats", 1e9, 16.7), ("nats", 5e9, 17.4), ("nats", 1e10, 7.4), ("nats", 2e10, 7.2),
     ("nats", 5e10, 5.1), ("perplexity", 0, 5.0), ("perplexity", 1e10, 3.1), ("perplexity", 5e10, 2.2)],
)  # fmt: skip
def test_the_published_effect_of_the_cut_is_reproduced_on_opt(real_data, unit: str, cut: float, percent: float) -> None:
    """Figures of the protocol's own code: perplexities as if they were losses ("nats"), and their logarithms."""
    reading = Reading(columns=OPT.columns, log10=OPT.log10, unit=unit)
    found = estimate(real_data / "training-runs" / "opt_trajectories.csv", Protocol(min_tokens=cut), reading=reading)
    # Two minima of the same flat objective may differ by a point.
    assert 100 * found.are == pytest.approx(percent, abs=1)
    assert 100 * found.best_seen == pytest.approx(14.3 if unit == "nats" else 5.8, abs=0.1)
