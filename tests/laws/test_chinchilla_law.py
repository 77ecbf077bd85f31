from __future__ import annotations

import numpy as np
import pytest

from lossmith.errors import InputError
from lossmith.laws import SQUARES, Chinchilla, Fitted

TRUTH = {"E": 1.7, "A": 400.0, "B": 1500.0, "alpha": 0.34, "beta": 0.33}


def law(n: np.ndarray | float, d: np.ndarray | float) -> np.ndarray:
    return TRUTH["E"] + TRUTH["A"] * np.power(n, -TRUTH["alpha"]) + TRUTH["B"] * np.power(d, -TRUTH["beta"])


def table(noise: float = 0.0, seed: int = 0) -> dict[str, np.ndarray]:
    n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e8, 7e9, 5), np.geomspace(2e10, 3e11, 40), indexing="ij"))
    rng = np.random.default_rng(seed)
    return {"params": n, "tokens": d, "loss": law(n, d) * np.exp(noise * rng.standard_normal(len(n)))}


@pytest.mark.parametrize("objective", [Chinchilla().objective, SQUARES], ids=["huber", "squares"])
def test_noise_free_parameters_are_recovered(objective) -> None:
    fitted = Chinchilla(objective=objective).fit(table(), bootstrap=0)
    for name, value in TRUTH.items():
        assert fitted.parameters[name] == pytest.approx(value, rel=1e-9)
    assert float(fitted.predict(params=7e10, tokens=3e11)) == pytest.approx(2.0268766292736986, rel=1e-12)


def test_value_agrees_with_the_form_in_logarithms() -> None:
    value = float(Chinchilla().evaluate(np.array(list(TRUTH.values())), {"params": [7e9], "tokens": [3e11]})[0])
    assert value == pytest.approx(2.1244780067491402, rel=1e-14)
    addends = [
        np.log(TRUTH["A"]) - TRUTH["alpha"] * np.log(7e9),
        np.log(TRUTH["B"]) - TRUTH["beta"] * np.log(3e11),
        np.log(TRUTH["E"]),
    ]
    assert value == pytest.approx(float(np.exp(np.logaddexp.reduce(addends))), rel=1e-14)


def test_units_of_inputs_change_the_coefficient_as_a_power() -> None:
    base, wide = table(0.01), table(0.01)
    wide["params"] = 1000 * wide["params"]
    one, other = Chinchilla().fit(base, bootstrap=0), Chinchilla().fit(wide, bootstrap=0)
    assert other.parameters["alpha"] == pytest.approx(one.parameters["alpha"], rel=1e-7)
    assert other.parameters["A"] == pytest.approx(one.parameters["A"] * 1000 ** one.parameters["alpha"], rel=1e-6)
    assert float(other.predict(params=7e13, tokens=3e11)) == pytest.approx(
        float(one.predict(params=7e10, tokens=3e11)), rel=1e-9
    )


def test_scaled_and_shifted_losses_change_only_what_they_must() -> None:
    base = table(0.01)
    squares = Chinchilla(objective=SQUARES)
    one = squares.fit(base, bootstrap=0).parameters
    scaled = squares.fit({**base, "loss": 3 * base["loss"]}, bootstrap=0).parameters
    shifted = squares.fit({**base, "loss": base["loss"] + 0.5}, bootstrap=0).parameters
    for name in TRUTH:
        factor = 3 if name in "EAB" else 1
        assert scaled[name] == pytest.approx(factor * one[name], rel=1e-6)
        assert shifted[name] == pytest.approx(one[name] + 0.5 * (name == "E"), rel=1e-6)


def test_order_and_doubling_of_rows_do_not_matter() -> None:
    base = table(0.01)
    one = Chinchilla().fit(base, bootstrap=0).parameters
    order = np.random.default_rng(1).permutation(len(base["loss"]))
    mixed = Chinchilla().fit({k: v[order] for k, v in base.items()}, bootstrap=0).parameters
    # Twice the same rows in different runs: not a repetition that reading would drop.
    double = {k: np.concatenate([v, v]) for k, v in base.items()} | {"run": np.repeat(["a", "b"], len(order))}
    doubled = Chinchilla().fit(double, bootstrap=0).parameters
    for name in TRUTH:
        assert mixed[name] == pytest.approx(one[name], rel=1e-6)
        assert doubled[name] == pytest.approx(one[name], rel=1e-6)


def test_the_file_gives_back_the_same_predictions_and_intervals(tmp_path) -> None:
    fitted = Chinchilla().fit(table(0.01), bootstrap=30)
    fitted.to_json(tmp_path / "fitted.json")
    again = Fitted.from_json(tmp_path / "fitted.json")
    assert again.parameters == fitted.parameters
    assert again.warnings == fitted.warnings
    inputs = {"params": [1e10, 7e10], "tokens": 3e11}
    assert np.array_equal(again.interval(0.8, **inputs).low, fitted.interval(0.8, **inputs).low)
    assert np.array_equal(again.residuals, fitted.residuals)


def test_the_plan_is_the_best_size_for_the_budget() -> None:
    fitted = Chinchilla().fit(table(0.01), bootstrap=30)
    plan = fitted.plan(flops=1e22)
    assert 6 * plan.params * plan.tokens == pytest.approx(1e22)
    sizes = plan.params * np.geomspace(0.2, 5, 2001)
    losses = fitted.predict(params=sizes, tokens=1e22 / (6 * sizes))
    assert losses.min() == pytest.approx(plan.loss, rel=1e-9)
    assert plan.params_limits[0] < plan.params < plan.params_limits[1]
    # The cheapest way to that loss is that plan.
    back = fitted.plan(loss=plan.loss)
    assert back.params == pytest.approx(plan.params)
    assert back.flops == pytest.approx(1e22)


def test_wrong_wishes_are_refused_in_a_sentence() -> None:
    fitted = Chinchilla().fit(table(), bootstrap=0)
    with pytest.raises(InputError, match=r"flops .* or loss"):
        fitted.plan()
    with pytest.raises(InputError, match="does not reach a loss of 1"):
        fitted.plan(loss=1.0)
    with pytest.raises(InputError, match="no input 'parms': did you mean 'params'"):
        fitted.predict(parms=1e9, tokens=1e9)
    with pytest.raises(InputError, match="needs tokens to predict"):
        fitted.predict(params=1e9)
    with pytest.raises(InputError, match="params must be positive"):
        fitted.predict(params=-1, tokens=1e9)
    with pytest.raises(InputError, match="params must be a number, got 'seven'"):
        fitted.predict(params="seven", tokens=1e9)
    with pytest.raises(ValueError, match="bootstrap=200"):
        fitted.interval(params=1e9, tokens=1e9)
    for wrong in (float("nan"), -1.0, 9.0):
        with pytest.raises(InputError, match="alpha must lie between 0 and 5"):
            Chinchilla(fixed={"alpha": wrong})
    with pytest.raises(TypeError, match="rows or a path, got NoneType"):
        Chinchilla().fit(None)
    with pytest.raises(InputError, match="column N must have one dimension, got 2"):
        Chinchilla().fit({"N": np.ones((2, 2)), "D": 1e9, "loss": 2.0})


def test_inputs_may_be_amounts_arrays_or_empty() -> None:
    fitted = Chinchilla().fit(table(), bootstrap=10, calibrated=False)
    assert float(fitted.predict(params="7b", tokens="300b")) == pytest.approx(2.1244780067491402, rel=1e-9)
    assert fitted.predict(params=np.geomspace(1e8, 1e9, 6).reshape(2, 3), tokens=[1e10, 2e10, 3e10]).shape == (2, 3)
    assert fitted.predict(params=[], tokens=1e9).shape == (0,)
    assert fitted.interval(params=[], tokens=1e9).low.shape == (0,)


def test_parameters_are_recovered_to_rounding() -> None:
    fitted = Chinchilla(objective=SQUARES).fit(table(), bootstrap=0)
    for name, value in TRUTH.items():
        assert fitted.parameters[name] == pytest.approx(value, rel=1e-12)
