from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize, nnls

from lossmith.laws import HUBER_LOG, SQUARES, Exponent, Objective, Term, Terms, fit_terms
from lossmith.laws.newton import derivatives
from lossmith.laws.problem import Problem
from lossmith.laws.projection import nonnegative
from lossmith.laws.terms import Inputs

SHAPES = {
    "chinchilla": Terms(
        (Term("E"), Term("A", {"N": "alpha"}), Term("B", {"D": "beta"})), (Exponent("alpha"), Exponent("beta"))
    ),
    "shared exponent": Terms((Term("E"), Term("A", {"N": "a"}), Term("B", {"D": "a"})), (Exponent("a"),)),
    "two powers in a term": Terms(
        (Term("E"), Term("A", {"N": "a", "D": "b"}), Term("B", {"D": "b"})), (Exponent("a"), Exponent("b"))
    ),
    "one exponent twice in a term": Terms((Term("E"), Term("A", {"N": "a", "D": "a"})), (Exponent("a"),)),
    "a term that lowers": Terms((Term("E"), Term("A", {"N": "a"}), Term("C", factor="S", sign=-1)), (Exponent("a"),)),
    "a factor with a power": Terms(
        (Term("E", lower=-np.inf), Term("C", {"D": "b"}, factor="S")), (Exponent("b", -1.0, 2.0),)
    ),
}


def columns(points: int = 30, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"N": 10 ** rng.uniform(0, 2, points), "D": 10 ** rng.uniform(0, 3, points), "S": rng.uniform(0, 1, points)}


def problem(terms: Terms, objective: Objective, count: int, seed: int = 0) -> Problem:
    rng = np.random.default_rng(seed)
    inputs = Inputs.of(terms, columns())
    y = rng.uniform(2, 4, (count, 30))
    weights = rng.integers(0, 4, (count, 30)).astype(float)
    return Problem(inputs, y, np.log(y) if objective.residual == "log" else y, weights, objective, {}, count)


@pytest.mark.parametrize("objective", [Objective("log", 0.1), Objective("log", 5.0), SQUARES, Objective("linear", 0.3)])
@pytest.mark.parametrize("shape", SHAPES)
def test_first_and_second_derivatives_are_those_of_finite_differences(shape: str, objective: Objective) -> None:
    terms = SHAPES[shape]
    rng = np.random.default_rng(1)
    count = len(terms.names)
    p = rng.uniform(0.3, 0.9, (3, count))
    p[:, 0] += 1.5
    whole = problem(terms, objective, 3)
    delta = np.full(3, objective.delta)
    gradient, hessian, _ = derivatives(whole, p, delta)
    step = 1e-5
    for k in range(count):
        moved = np.zeros(count)
        moved[k] = step
        numeric = (whole.total(p + moved, delta) - whole.total(p - moved, delta)) / (2 * step)
        np.testing.assert_allclose(gradient[:, k], numeric, rtol=1e-6, atol=1e-7)
        above, below = derivatives(whole, p + moved, delta)[0], derivatives(whole, p - moved, delta)[0]
        # A kink of the Huber loss within the step would show; with these numbers there is none.
        np.testing.assert_allclose(hessian[:, k], (above - below) / (2 * step), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("unknowns", [1, 3, 4, 6])
def test_bounded_least_squares_agrees_with_scipy(unknowns: int) -> None:
    rng = np.random.default_rng(unknowns)
    matrices, right = rng.standard_normal((20, 12, unknowns)), rng.standard_normal((20, 12))
    gram = matrices.transpose(0, 2, 1) @ matrices
    found = nonnegative(gram, (matrices.transpose(0, 2, 1) @ right[..., None])[..., 0], np.ones(unknowns, dtype=bool))
    for matrix, b, x in zip(matrices, right, found, strict=True):
        np.testing.assert_allclose(x, nnls(matrix, b)[0], atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("objective", [HUBER_LOG, SQUARES], ids=["huber", "squares"])
def test_every_shape_recovers_its_parameters_without_noise(shape: str, objective: Objective) -> None:
    terms = SHAPES[shape]
    truth = np.array([{"E": 2.0, "A": 3.0, "B": 5.0, "C": 0.7}.get(n, 0.45) for n in terms.names])
    x = columns(60)
    found = fit_terms(terms, x, terms.predict(truth, x), objective=objective)
    np.testing.assert_allclose(found.parameters[0], truth, rtol=1e-6)
    assert found.converged[0]


def noisy(batch: int = 4, points: int = 60) -> tuple[dict[str, np.ndarray], np.ndarray]:
    x = columns(points, seed=3)
    rng = np.random.default_rng(4)
    clean = 1.8 + 3 * x["N"] ** -0.5 + 2 * x["D"] ** -0.35
    return x, clean * np.exp(0.01 * rng.standard_t(3, (batch, points)))


def test_no_start_of_scipy_finds_a_lower_objective() -> None:
    x, y = noisy()
    found = fit_terms(SHAPES["chinchilla"], x, y)

    def total(p: np.ndarray, target: np.ndarray) -> float:
        value = np.exp(p[2]) + np.exp(p[0] - p[3] * np.log(x["N"])) + np.exp(p[1] - p[4] * np.log(x["D"]))
        r = np.abs(np.log(value) - np.log(target))
        return float(np.where(r <= 1e-3, r * r / 2, 1e-3 * (r - 5e-4)).sum())

    for row in range(2):
        best = min(
            minimize(total, [a, b, 0.5, s, s], args=(y[row],), method="L-BFGS-B").fun
            for a in (0.0, 2.0)
            for b in (0.0, 2.0)
            for s in (0.3, 0.8)
        )
        assert found.objective[row] <= best * (1 + 1e-9)


def test_a_batch_gives_what_single_fits_give() -> None:
    x, y = noisy()
    together = fit_terms(SHAPES["chinchilla"], x, y)
    for row in range(len(y)):
        alone = fit_terms(SHAPES["chinchilla"], x, y[row])
        np.testing.assert_allclose(alone.objective[0], together.objective[row], rtol=1e-12)
        np.testing.assert_allclose(alone.parameters[0], together.parameters[row], rtol=1e-6)


def test_integer_weights_are_repeated_points() -> None:
    x, y = noisy(1)
    weights = np.random.default_rng(5).integers(0, 3, 60)
    weighted = fit_terms(SHAPES["chinchilla"], x, y, weights=weights)
    repeated = fit_terms(
        SHAPES["chinchilla"], {k: np.repeat(v, weights) for k, v in x.items()}, np.repeat(y[0], weights)
    )
    np.testing.assert_allclose(weighted.objective, repeated.objective, rtol=1e-10)
    np.testing.assert_allclose(weighted.parameters, repeated.parameters, rtol=1e-5)


@pytest.mark.parametrize("fixed", [{"alpha": 0.4}, {"A": 3.0}, {"A": 3.0, "alpha": 0.5}, {"E": 1.8, "B": 2.0}])
@pytest.mark.parametrize("objective", [HUBER_LOG, SQUARES], ids=["huber", "squares"])
def test_given_parameters_stay_and_the_others_are_at_their_minimum(fixed, objective) -> None:
    terms = SHAPES["chinchilla"]
    x, y = noisy(1)
    found = fit_terms(terms, x, y[0], fixed=fixed, objective=objective)
    p = found.parameters[0]
    for name, value in fixed.items():
        assert p[terms.names.index(name)] == value
    assert found.converged[0]
    whole = Problem(
        Inputs.of(terms, x, centred=False), y, np.log(y) if objective.residual == "log" else y, np.ones((1, 60)),
        objective, {}, 1,
    )  # fmt: skip
    delta = np.full(1, objective.delta)
    for k in (k for k, name in enumerate(terms.names) if name not in fixed):
        for factor in (1 - 1e-4, 1 + 1e-4):
            moved = p.copy()
            moved[k] *= factor
            assert whole.total(moved[None], delta)[0] >= found.objective[0] * (1 - 1e-12)


def test_the_same_call_gives_the_same_bits() -> None:
    x, y = noisy()
    one, other = (fit_terms(SHAPES["chinchilla"], x, y) for _ in range(2))
    assert np.array_equal(one.parameters, other.parameters)


def test_outliers_move_a_robust_fit_little_and_squares_much() -> None:
    x, y = noisy(1)
    spoilt = y.copy()
    spoilt[0, :3] *= 1.5
    errors = []
    for objective in (HUBER_LOG, SQUARES):
        clean = fit_terms(SHAPES["chinchilla"], x, y, objective=objective).parameters
        moved = fit_terms(SHAPES["chinchilla"], x, spoilt, objective=objective).parameters
        errors.append(np.abs(SHAPES["chinchilla"].predict(moved, x) / SHAPES["chinchilla"].predict(clean, x) - 1).max())
    assert errors[0] < 0.02
    assert errors[1] > 3 * errors[0]


def test_a_coefficient_that_would_be_negative_is_zero() -> None:
    x = columns(60)
    found = fit_terms(SHAPES["chinchilla"], x, 5 - 2 * x["N"] ** -0.3 + x["D"] ** -0.5)
    assert found.parameters[0, 1] == 0
    assert (found.parameters >= 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": np.array([1.0, 2.0])}, r"has shape \(1, 30\)"),
        ({"target": np.full(30, np.nan)}, "target has values that are not finite"),
        ({"target": np.zeros(30)}, "target must be positive"),
        ({"columns": {"N": np.ones(30)}}, r"columns lacks \['D'\]"),
        ({"columns": {"N": np.zeros(30), "D": np.ones(30)}}, "column N must be positive"),
        ({"weights": np.zeros(30)}, "weights must not be negative, and not all zero"),
        ({"weights": -np.ones(30)}, "weights must not be negative"),
        ({"fixed": {"gamma": 1.0}}, "fixed names no parameter"),
        ({"starts": 0}, "starts must be at least 1"),
        ({"columns": {"N": np.ones(0), "D": np.ones(0)}, "target": np.ones(0)}, "no points"),
    ],
)
def test_wrong_input_is_named(change, message) -> None:
    given = {"columns": columns(), "target": np.full(30, 2.0), **change}
    with pytest.raises(ValueError, match=message):
        fit_terms(SHAPES["chinchilla"], given.pop("columns"), given.pop("target"), **given)


def test_half_precision_and_strided_columns_are_taken() -> None:
    x, y = noisy(1)
    plain = fit_terms(SHAPES["chinchilla"], x, y)
    wide = {k: np.stack([v, v], 1)[:, 0] for k, v in x.items()}
    assert np.array_equal(fit_terms(SHAPES["chinchilla"], wide, np.asfortranarray(y)).parameters, plain.parameters)
    half = fit_terms(SHAPES["chinchilla"], {k: v.astype(np.float16) for k, v in x.items()}, y.astype(np.float16))
    assert half.converged[0]
    np.testing.assert_allclose(SHAPES["chinchilla"].predict(half.parameters, x), y, rtol=0.2)


def test_huge_ranges_do_not_overflow() -> None:
    rng = np.random.default_rng(0)
    n, d = 10 ** rng.uniform(3, 60, 80), 10 ** rng.uniform(3, 60, 80)
    found = fit_terms(SHAPES["chinchilla"], {"N": n, "D": d}, 2 + 10 * n**-0.1 + 7 * d**-0.2)
    np.testing.assert_allclose(found.parameters[0], [2, 10, 7, 0.1, 0.2], rtol=1e-5)


def test_a_law_of_one_constant_is_a_robust_mean() -> None:
    y = np.array([1.0, 1.1, 1.2, 1.3, 90.0])
    found = fit_terms(Terms((Term("E"),), ()), {}, y)
    assert found.parameters[0, 0] == pytest.approx(1.2, abs=2e-3)
