"""The critical mixture ratio from a log of continual pre-training, in Python and on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from lossmith.cli import app
from lossmith.errors import InputError
from lossmith.laws import CriticalMixture, CriticalRatio, FittedMixture, Reading
from lossmith.laws.mixture_curves import domain_change, general_change
from lossmith.laws.mixture_fit import _blocks, _standard_residuals

SHARES = (1 / 8, 1 / 4, 1 / 3, 1 / 2)
LAW = CriticalMixture(base_general=2.0, base_domain=1.7)


def log(
    shares: tuple[float, ...] = SHARES, *, unit: float = 1.0, noise: float = 0.0, seed: int = 0, **columns: Any
) -> pd.DataFrame:
    """The digest's case: dL_gen = 0.04 R^2 T^0.5 - 0.0008 T^0.9, so that T0(R) = (0.04 * 0.5 R^2 / 0.00072)^2.5."""
    ratio, t = (a.ravel() for a in np.meshgrid(shares, np.geomspace(0.1, 100, 30), indexing="ij"))
    rng = np.random.default_rng(seed)
    errors = noise * rng.standard_normal((2, len(t)))
    table = {
        "ratio": ratio,
        "tokens": unit * t,
        "general_loss": 2.0 + 0.04 * ratio**2 * t**0.5 - 0.0008 * t**0.9 + errors[0],
        "domain_loss": 1.7 + 0.2 * (t**-0.1 - 1.3) * ratio**0.2 + errors[1],
        **columns,
    }
    return pd.DataFrame(table)


@pytest.fixture(scope="module")
def exact() -> Any:
    return LAW.fit(log(), bootstrap=0)


def test_the_trend_and_its_turns_are_the_closed_form(exact: Any) -> None:
    found: CriticalRatio = exact.plan()
    times = [0.12410630, 3.97140146, 16.73545308, 127.08484681]
    np.testing.assert_allclose([share.critical_tokens for share in found.shares], times, rtol=1e-6)
    alpha, beta, s = found.curve
    # R = 0.18973666 T^0.2, with T in budgets of 100.
    assert alpha == pytest.approx(0.18973666 * 100**0.2, rel=1e-6)
    assert beta == pytest.approx(0, abs=1e-6)
    assert s == pytest.approx(0.2, rel=1e-6)
    assert found.trend == pytest.approx(0.47659694, abs=1e-7)
    assert [share.feasible for share in found.shares] == [True, True, True, False]


@pytest.mark.parametrize(
    ("tolerance", "within", "ratio", "binds"),
    [(0.05, 0.50119005, 0.47659694, "trend"), (0.03, 0.44854372, 0.44854372, "tolerance")],
)
def test_the_lower_of_trend_and_tolerance_binds(
    exact: Any, tolerance: float, within: float, ratio: float, binds: str
) -> None:
    found = exact.plan(tolerance=tolerance)
    assert found.within_tolerance == pytest.approx(within, abs=1e-7)
    assert found.ratio == pytest.approx(ratio, abs=1e-7)
    assert found.binds == binds


def test_a_larger_tolerance_never_lowers_the_ratio(exact: Any) -> None:
    ratios = [exact.plan(tolerance=eps).ratio for eps in (0, 0.01, 0.03, 0.05, 0.2, 3)]
    assert ratios == sorted(ratios)
    assert ratios[0] < ratios[-1]


@pytest.mark.parametrize("unit", [1e-3, 2e8])
def test_the_unit_of_tokens_changes_nothing(exact: Any, unit: float) -> None:
    found = LAW.fit(log(unit=unit), bootstrap=0).plan()
    assert found.ratio == pytest.approx(exact.plan().ratio, rel=1e-9)
    assert found.tokens == pytest.approx(100 * unit)


def test_general_loss_that_rises_at_every_share_with_no_tolerance_allows_no_domain_data() -> None:
    table = log()
    table["general_loss"] = 2 + 0.03 * (table["tokens"] / 100) ** 0.5 * (0.1 + table["ratio"])
    found = LAW.fit(table, bootstrap=0).plan(tolerance=0)
    assert found.ratio == 0
    assert any("no share" in note for note in found.notes)


def test_general_loss_that_never_rises_allows_every_share_and_says_so() -> None:
    table = log()
    table["general_loss"] = 2 - 0.03 * (table["tokens"] / 100) ** 0.5 * (1 - 0.5 * table["ratio"])
    found = LAW.fit(table, bootstrap=0).plan()
    assert found.ratio == 1
    assert found.binds == "nothing"
    assert any("0.5 or above" in note for note in found.notes)


def test_a_finite_multiplier_turns_earlier(exact: Any) -> None:
    found = [exact.plan(lagrange=value, tolerance=1) for value in (30, 1000, np.inf)]
    times = np.array([[share.critical_tokens for share in plan.shares] for plan in found])
    assert (times[0, 1:] < times[1, 1:]).all()
    assert (times[1] < times[2]).all()
    assert found[1].ratio == pytest.approx(found[2].ratio, abs=2e-3)


def test_other_budgets_follow_the_trend_and_say_when_they_are_extrapolated(exact: Any) -> None:
    for tokens in (10.0, 50.0):
        found = exact.plan(tokens=tokens, tolerance=1)
        assert found.ratio == pytest.approx(0.18973666 * tokens**0.2, rel=1e-6)
        assert not found.notes
    further = exact.plan(tokens=400, tolerance=1)
    assert further.ratio == pytest.approx(0.18973666 * 400**0.2, rel=1e-6)
    assert any("extrapolated: 4 times" in note for note in further.notes)


def test_a_held_out_share_and_budget_are_predicted(exact: Any) -> None:
    predicted = exact.predict(ratio=0.42, tokens=np.array([20.0, 100.0]))
    np.testing.assert_allclose(predicted, [2 + 0.04 * 0.42**2 * t**0.5 - 0.0008 * t**0.9 for t in (20, 100)], rtol=1e-7)
    domain = exact.predict(ratio=0.42, tokens=60.0, part="domain")
    assert float(domain) == pytest.approx(1.7 + 0.2 * (60**-0.1 - 1.3) * 0.42**0.2, rel=1e-7)
    assert exact.law.labels(ratio=0.42, tokens=60.0, part="domain") == ["ratio=0.42, tokens=60, part=domain"]


def test_share_0_is_predicted_where_it_was_trained_and_only_there(exact: Any) -> None:
    with pytest.raises(InputError, match="ratio 0 was not trained"):
        exact.predict(ratio=0.0, tokens=60.0)
    table = log((0.0, *SHARES))
    table.loc[table["ratio"] == 0, "domain_loss"] = 1.65
    fitted = LAW.fit(table, bootstrap=0)
    assert float(fitted.predict(ratio=0.0, tokens=100.0)) == pytest.approx(2 - 0.0008 * 100**0.9, rel=1e-6)
    assert fitted.plan().trend == pytest.approx(0.47659694, abs=1e-6)


def test_forgetting_without_replay_does_not_bend_the_law() -> None:
    """A run without replay that forgets a nat more than the law changes nothing below it, and is itself reported."""
    table = log((*SHARES, 1.0))
    alone = table["ratio"] == 1
    table.loc[alone, "general_loss"] += (table.loc[alone, "tokens"] / 100) ** 0.5
    fitted = LAW.fit(table, bootstrap=0)
    found = fitted.plan(tolerance=0.03)
    assert found.ratio == pytest.approx(0.44854372, abs=1e-6)
    assert float(fitted.predict(ratio=1.0, tokens=100.0)) == pytest.approx(3.4 - 0.0008 * 100**0.9, rel=1e-6)
    # What the law would allow is not allowed where the run without replay broke it.
    assert fitted.plan(tolerance=0.5).within_tolerance == 0.5
    assert fitted.plan(tolerance=9.0).within_tolerance == 1


def test_a_share_law_that_misses_says_so() -> None:
    table = log((1 / 8, 1 / 4, 1 / 3, 1 / 2, 3 / 4))
    table.loc[table["ratio"] == 1 / 3, "general_loss"] += 0.2 * (table["tokens"] / 100) ** 0.5
    assert any("equation 5 misses" in note for note in LAW.fit(table, bootstrap=0).plan().notes)


def test_sizes_have_their_own_curves() -> None:
    small, large = log(params=1e8, unit=1e8), log(params=1e9, unit=1e8, base_general=2.5)
    large["general_loss"] += 0.5
    # Twice the rise: sqrt(2) times the share at the same turn.
    large["general_loss"] -= 0.02 * large["ratio"] ** 2 * (large["tokens"] / 1e8) ** 0.5
    table = pd.concat([small.assign(base_general=2.0), large]).assign(base_domain=1.7)
    fitted = CriticalMixture(tolerance=1.0).fit(table, bootstrap=0)
    assert fitted.plan(params=1e8).ratio == pytest.approx(0.47659694, abs=1e-6)
    assert fitted.plan(params=1e9).ratio == pytest.approx(0.47659694 * 2**0.5, abs=1e-5)
    assert "1e+08 parameters" in fitted.summary()
    with pytest.raises(InputError, match="several models"):
        fitted.plan()
    with pytest.raises(InputError, match="no model of 5e"):
        fitted.plan(params=5e8)
    with pytest.raises(InputError, match="say for which model"):
        fitted.predict(ratio=0.3, tokens=1e9)


def test_rows_before_the_first_step_are_the_losses_before() -> None:
    start = pd.DataFrame({"ratio": SHARES, "tokens": 0.0, "general_loss": 2.0, "domain_loss": 1.7})
    fitted = CriticalMixture().fit(pd.concat([start, log()]), bootstrap=0)
    assert fitted.plan().ratio == pytest.approx(0.47659694, abs=1e-6)
    with pytest.raises(InputError, match="does not say what general_loss was before"):
        CriticalMixture().fit(log(), bootstrap=0)


def test_runs_from_different_models_are_changes_against_their_own() -> None:
    """Two seeds whose models start 0.3 nats apart are one curve."""
    seeds = []
    for seed, start in enumerate((1.85, 2.15)):
        table = log(run=f"seed {seed}", base_general=start, base_domain=1.7)
        table["general_loss"] += start - 2.0
        seeds.append(table)
    fitted = CriticalMixture().fit(pd.concat(seeds), bootstrap=0)
    assert fitted.plan().ratio == pytest.approx(0.47659694, abs=1e-6)
    assert float(fitted.predict(ratio=0.4, tokens=100.0)) == pytest.approx(2 + 0.4 * 0.16 - 0.0008 * 100**0.9)


def test_shares_trained_further_than_others_are_cut_and_percentages_scaled() -> None:
    table = log()
    table = table[(table["ratio"] < 0.5) | (table["tokens"] < 80)]
    fitted = LAW.fit(table, bootstrap=0)
    assert fitted.plan().tokens == pytest.approx(78.8, abs=0.1)
    assert any("share 0.5 was not trained further" in note for note in fitted.notes)
    percent = log().assign(ratio=lambda t: 100 * t["ratio"])
    with pytest.raises(InputError, match="percentages"):
        LAW.fit(percent, bootstrap=0)
    scaled = LAW.fit(percent, bootstrap=0, reading=Reading(scale={"ratio": 0.01}))
    assert scaled.plan().ratio == pytest.approx(0.47659694, abs=1e-6)


def test_bits_and_perplexities_become_nats() -> None:
    bits = log()
    bits[["general_loss", "domain_loss"]] /= np.log(2)
    law = CriticalMixture(base_general=2.0, base_domain=1.7)
    assert law.fit(bits, bootstrap=0, reading=Reading(unit="bits")).plan().ratio == pytest.approx(0.4766, abs=1e-4)
    powers = log()
    powers[["general_loss", "domain_loss"]] = np.exp(powers[["general_loss", "domain_loss"]] + 2)
    with pytest.raises(InputError, match="is it a perplexity"):
        law.fit(powers, bootstrap=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[t["ratio"] > 0.3], "2 shares of domain data above 0"),
        (lambda t: t[(t["ratio"] > 0.2) | (t["tokens"] > 30)], "at share 0.125"),
        (lambda t: t.assign(ratio=-t["ratio"]), "between 0 and 1"),
        (lambda t: t.assign(tokens=-t["tokens"]), "tokens must not be negative"),
        (lambda t: t.assign(general_loss=-t["general_loss"]), "general_loss must be positive"),
        (lambda t: t.drop(columns="domain_loss"), "no column for 'domain_loss'"),
        (lambda t: t.assign(params=0.0), "values of 'params' are not positive"),
        (lambda t: t.assign(lr=np.where(t["ratio"] > 0.3, 1e-4, 2e-4)), "under one schedule"),
        (lambda t: t.iloc[:0], "no rows"),
        (lambda t: t.assign(general_loss=np.inf), "infinite"),
        (lambda t: t.assign(general_loss=np.nan), "lacks a value"),
    ],
)
def test_a_log_that_cannot_be_meant_is_refused_in_one_sentence(change: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        LAW.fit(change(log()), bootstrap=0)
    assert "\n" not in str(caught.value)


def test_a_decaying_rate_is_noted() -> None:
    table = log()
    table["lr"] = 1e-4 * (1 - 0.9 * table["tokens"] / 100)
    assert any("not constant" in note for note in LAW.fit(table, bootstrap=0).notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": -0.1}, "tolerance must not be negative"),
        ({"lagrange": 0.0}, "lagrange must be positive"),
        ({"base_general": 0.0}, "base_general must be positive"),
        ({"scan": 0.5}, "scan must be at least 1"),
        ({"fixed": {"s2": 0.5}}, "none can be fixed"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CriticalMixture(**options)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"tokens": 0}, "tokens must be positive"),
        ({"tolerance": "much"}, "tolerance must be a number"),
        ({"tolerance": -1}, "tolerance must not be negative"),
        ({"level": 1.0}, "level must lie"),
        ({"mixture": False}, "plans mixtures only"),
    ],
)
def test_wishes_out_of_range_are_refused(exact: Any, wish: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        exact.plan(**wish)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"ratio": 1.2, "tokens": 5}, "between 0 and 1"),
        ({"ratio": 0.2}, "needs tokens"),
        ({"ratio": 0.2, "tokens": 5, "part": "other"}, "general or domain"),
        ({"ratio": 0.2, "tokens": -5}, "tokens must be positive"),
        ({"ratio": 0.2, "tokens": 5, "steps": 1}, "no input 'steps'"),
        ({"ratio": "half", "tokens": 5}, "must be a number"),
    ],
)
def test_predictions_out_of_range_are_refused(exact: Any, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        exact.predict(**inputs)


def test_noisy_curves_have_limits_that_hold_the_truth_and_are_the_same_again(tmp_path: Path) -> None:
    table = log(noise=0.002, unit=1e6)
    fitted = LAW.fit(table, bootstrap=50)
    found = fitted.plan()
    assert found.limits[0] <= 0.47659694 <= found.limits[1]
    assert 0 < found.limits[1] - found.limits[0] < 0.2
    assert LAW.fit(table, bootstrap=50).plan().limits == found.limits
    inside = fitted.interval(0.9, ratio=0.42, tokens=1e8)
    assert inside.low < inside.value < inside.high
    fitted.to_json(tmp_path / "fitted.json")
    again = FittedMixture.from_json(tmp_path / "fitted.json")
    assert again.plan() == found
    assert again.law == fitted.law
    fitted.plot(tmp_path / "mixture.svg")
    assert (tmp_path / "mixture.svg").stat().st_size > 10_000


@pytest.mark.slow
def test_limits_from_one_run_a_share_hold_the_truth_about_as_often_as_they_say() -> None:
    held = 0
    for seed in range(30):
        found = LAW.fit(log(noise=0.003, seed=seed), bootstrap=60, seed=seed).plan(level=0.9)
        held += found.limits[0] <= 0.47659694 <= found.limits[1]
    # 90% of 30 with three standard deviations (5) less.
    assert held >= 22


def test_several_runs_a_share_are_resampled_whole() -> None:
    """Each run's turn lies elsewhere and has no noise of its own: only drawing runs can show the spread."""
    runs = []
    for seed, factor in enumerate((0.8, 0.9, 1.1, 1.2)):
        table = log(run=f"seed {seed}")
        table["general_loss"] = (
            2 + factor * 0.04 * table["ratio"] ** 2 * table["tokens"] ** 0.5 - (0.0008 * table["tokens"] ** 0.9)
        )
        runs.append(table)
    found = LAW.fit(pd.concat(runs), bootstrap=100).plan(tolerance=1)
    # The share at the trend is proportional to factor ** -0.5; the mean of four factors has standard deviation 0.08.
    assert 0.02 < (found.limits[1] - found.limits[0]) / found.ratio < 0.25
    assert found.limits[0] < 0.47659694 < found.limits[1]


def test_blocks_are_neighbours_and_residuals_are_as_large_as_errors() -> None:
    rng = np.random.default_rng(0)
    drawn = np.abs(_blocks(rng, np.arange(1.0, 28.0), 50))
    assert drawn.shape == (50, 27)
    steps = np.diff(drawn.reshape(50, 9, 3), axis=2)
    assert ((steps == 1) | (steps == -26)).all()
    t = np.linspace(0.05, 1, 20)
    for curve, change in (
        (np.array([0.1, -0.1, 0.0, 0.5, 0.9]), general_change),
        (np.array([0.2, 0, -0.3]), domain_change),
    ):
        sizes = []
        for seed in range(200):
            errors = np.random.default_rng(seed).standard_normal(20)
            columns = np.stack([change(curve + 1e-6 * unit, t) - change(curve, t) for unit in np.eye(len(curve))], -1)
            residuals = errors - columns @ np.linalg.lstsq(columns, errors, rcond=None)[0]
            sizes.append(_standard_residuals(curve, t, residuals).std())
        assert np.mean(sizes) == pytest.approx(1, abs=0.06)


def run_cli(*words: str | Path) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_line_fits_plans_and_predicts(tmp_path: Path) -> None:
    log(unit=2e8).to_csv(tmp_path / "log.csv", index=False)
    fitted = tmp_path / "fitted.json"
    law = "critical-mixture(base_general=2.0, base_domain=1.7)"
    done = run_cli("fit", tmp_path / "log.csv", "--law", law, "--bootstrap", 0, "--out", fitted)
    assert done.exit_code == 0, done.output
    assert "47.7% domain data" in done.output
    plan = run_cli("plan", fitted, "--mixture", "--set", "tolerance=0.03", "--tokens", "2e10", "--json")
    found = json.loads(plan.output)
    assert found["ratio"] == pytest.approx(0.44854372, abs=1e-6)
    assert found["binds"] == "tolerance"
    assert "set by the trend" in run_cli("plan", fitted, "--mixture").output
    predicted = run_cli("predict", fitted, "--at", "ratio=0.25, tokens=2e10, part=domain", "--json")
    assert json.loads(predicted.output)[0]["loss"] == pytest.approx(1.7 + 0.2 * (100**-0.1 - 1.3) * 0.25**0.2)


def test_asking_another_law_for_a_mixture_is_refused(tmp_path: Path) -> None:
    from lossmith.laws import Chinchilla

    n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e7, 1e9, 4), np.geomspace(1e9, 1e11, 4)))
    table = {"params": n, "tokens": d, "loss": 1.7 + 400 * n**-0.34 + 1500 * d**-0.33}
    Chinchilla().fit(table, bootstrap=0).to_json(tmp_path / "fitted.json")
    refused = run_cli("plan", tmp_path / "fitted.json", "--mixture")
    assert isinstance(refused.exception, InputError)
    assert "needs a fitted critical-mixture law" in str(refused.exception)
    with pytest.raises(InputError, match="holds law chinchilla"):
        FittedMixture.from_json(tmp_path / "fitted.json")
