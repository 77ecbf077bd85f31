"""What every law must do."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from lossmith.errors import InputError
from lossmith.laws import SQUARES, Law, Objective, Terms, fit_terms
from lossmith.laws.fitted import Fitted
from lossmith.laws.newton import derivatives
from lossmith.laws.problem import Problem
from lossmith.laws.terms import Array, Inputs
from lossmith.registry import LAWS

every_law = pytest.mark.parametrize("name", LAWS.names())


def built(name: str) -> Law:
    """The law with its default options."""
    return LAWS.get(name)()


def shape(name: str) -> Terms:
    """Its terms, where it is a sum of terms."""
    terms = built(name).terms
    if not terms.terms:
        pytest.skip("is no sum of power-law terms")
    return terms


def inside(terms: Terms, rng: np.random.Generator) -> Array:
    """Parameters off every bound."""
    exponents = []
    for exponent in terms.exponents:
        # The middle of what is both allowed and usual, where there is such a range.
        low, high = max(exponent.lower, 0.2), min(exponent.upper, 0.9)
        if low >= high:
            low, high = exponent.lower, exponent.upper
        exponents.append(rng.uniform(low + 0.1 * (high - low), high - 0.1 * (high - low)))
    first = [2.0 + rng.uniform()]
    # What lowers the value must not turn it negative.
    rest = [rng.uniform(0.2, 0.6) * (1.0 if term.sign > 0 else 0.1) for term in terms.terms[1:]]
    return np.array(first + rest + exponents)


def inputs(terms: Terms, points: int, rng: np.random.Generator, width: float = 1.0) -> dict[str, Array]:
    """Positive columns in the terms' own quantities."""
    return {name: np.exp(rng.uniform(-width, width, points)) for name in terms.columns}


def example(name: str, **options: Any) -> tuple[Law, dict[str, Array]]:
    """The law, and measurements that obey it."""
    law = built(name)
    try:
        return law, law.example(**options)
    except NotImplementedError:
        pytest.skip("does not read plain tables, and gives no example")


def asked(law: Law, table: dict[str, Array]) -> dict[str, Any]:
    """The inputs of some rows."""
    return {name: values[:7] for name, values in table.items() if name != law.target}


@every_law
def test_it_says_what_it_is(name: str) -> None:
    """Name, formula, columns and documentation."""
    law = LAWS.get(name)
    assert law.name == name
    assert name == name.lower().replace("_", "-")
    assert law.__doc__
    assert len(law.__doc__) > 100
    assert law.formula.split("=")[0].strip()
    assert law.target in {column.name for column in law.needed}


@every_law
@pytest.mark.parametrize("objective", [Objective("log", 0.05), SQUARES], ids=["huber", "squares"])
def test_derivatives_are_those_of_finite_differences(name: str, objective: Objective) -> None:
    """First and second, of the objective in float64."""
    terms, rng = shape(name), np.random.default_rng(0)
    points, step = 25, 1e-6
    x, p = inputs(terms, points, rng), inside(terms, rng)[None]
    y = terms.predict(p[0], x)[None] * np.exp(0.2 * rng.standard_normal((1, points)))
    target = np.log(y) if objective.residual == "log" else y
    whole = Problem(Inputs.of(terms, x), y, target, np.ones((1, points)), objective, {}, 1)
    delta = np.full(1, objective.delta)
    gradient, hessian, _ = derivatives(whole, p, delta)
    for k in range(p.shape[1]):
        moved = np.zeros_like(p)
        moved[0, k] = step
        numeric = (whole.total(p + moved, delta) - whole.total(p - moved, delta)) / (2 * step)
        np.testing.assert_allclose(gradient[:, k], numeric, rtol=1e-5, atol=1e-6)
        change = derivatives(whole, p + moved, delta)[0] - derivatives(whole, p - moved, delta)[0]
        np.testing.assert_allclose(hessian[:, k], change / (2 * step), rtol=1e-4, atol=1e-4)


@every_law
def test_values_without_noise_are_found_again(name: str) -> None:
    """By the engine, in the terms' own quantities: the curve, whatever of the parameters it determines."""
    terms, rng = shape(name), np.random.default_rng(1)
    x = inputs(terms, 80, rng, 2.0)
    y = terms.predict(inside(terms, rng), x)
    fixed = built(name).fixed
    if fixed:
        truth = inside(terms, rng)
        for i, parameter in enumerate(terms.names):
            truth[i] = fixed.get(parameter, truth[i])
        y = terms.predict(truth, x)
    found = fit_terms(terms, x, y, fixed=fixed, objective=built(name).objective)
    np.testing.assert_allclose(terms.predict(found.parameters[0], x), y, rtol=1e-5)


@every_law
def test_options_survive_json(name: str) -> None:
    """What a file of a fitted law keeps."""
    law = built(name)
    text = json.dumps(law.options(), default=lambda value: None if value == float("inf") else str(value))
    assert type(law).from_options(json.loads(text.replace("Infinity", "null"))) == law


@every_law
def test_wrong_names_and_files_are_told_in_a_sentence(name: str) -> None:
    """A parameter, an input, a column or a file that is not there."""
    law = built(name)
    with pytest.raises(InputError, match=r"nonsense|none can be fixed"):
        LAWS.get(name)(fixed={"nonsense": 1.0})
    with pytest.raises(InputError) as caught:
        law.fit({"nonsense": [1.0, 2.0, 3.0]}, bootstrap=0)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"nonsense\.csv"):
        law.fit("nonsense.csv", bootstrap=0)


@every_law
def test_an_example_is_fitted_to_its_noise(name: str) -> None:
    """Predictions, residuals, limits, warnings and the summary."""
    law, table = example(name)
    fitted = law.fit(table, bootstrap=25, calibrated=False)
    where = asked(law, table)
    predicted = fitted.predict(**where)
    np.testing.assert_allclose(predicted, table[law.target][:7], rtol=0.02)
    assert len(fitted.residuals) == len(fitted.table)
    found = fitted.interval(0.9, **where)
    assert ((found.low <= found.value) & (found.value <= found.high)).all()
    narrow = fitted.interval(0.5, **where)
    assert (narrow.high - narrow.low <= found.high - found.low).all()
    for parameter in law.names:
        assert parameter in fitted.summary()


@every_law
def test_the_order_of_rows_does_not_matter(name: str) -> None:
    """Same minimum."""
    law, table = example(name)
    order = np.random.default_rng(2).permutation(len(table[law.target]))
    one = law.fit(table, bootstrap=0)
    other = law.fit({key: values[order] for key, values in table.items()}, bootstrap=0)
    np.testing.assert_allclose(other.predict(**asked(law, table)), one.predict(**asked(law, table)), rtol=1e-6)


@every_law
def test_the_file_gives_the_same_predictions_and_the_same_seed_the_same_limits(name: str, tmp_path: Any) -> None:
    """Bit by bit."""
    law, table = example(name)
    fitted = law.fit(table, bootstrap=10, calibrated=False, seed=5)
    fitted.to_json(tmp_path / "fitted.json")
    again = Fitted.from_json(tmp_path / "fitted.json")
    where = asked(law, table)
    assert np.array_equal(again.predict(**where), fitted.predict(**where))
    repeated = law.fit(table, bootstrap=10, calibrated=False, seed=5)
    assert np.array_equal(repeated.interval(0.8, **where).high, again.interval(0.8, **where).high)


@every_law
def test_the_plot_is_written_whole(name: str, tmp_path: Any) -> None:
    """As a picture of more than a frame."""
    law, table = example(name)
    law.fit(table, bootstrap=0).plot(tmp_path / "fit.png")
    assert (tmp_path / "fit.png").stat().st_size > 5_000


@every_law
def test_bad_rows_are_dropped_with_a_note_or_refused(name: str) -> None:
    """NaN is dropped; a loss that is not positive is not believed."""
    law, table = example(name)
    holes = {key: values.copy() for key, values in table.items()}
    holes[law.target][3] = np.nan
    fitted = law.fit(holes, bootstrap=0)
    assert len(fitted.table) == len(table[law.target]) - 1
    assert any("NaN" in note for note in fitted.notes)
    holes[law.target][3] = -1.0
    with pytest.raises(InputError, match="not positive"):
        law.fit(holes, bootstrap=0)


@every_law
def test_too_few_rows_are_refused(name: str) -> None:
    """With what is needed."""
    law, table = example(name)
    with pytest.raises(InputError, match="needs"):
        law.fit({key: values[:2] for key, values in table.items()}, bootstrap=0)
