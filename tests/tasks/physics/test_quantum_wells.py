"""Potentials, classical references and the solver."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lossmith.errors import InputError
from lossmith.tasks.physics import (
    Levels,
    Potential,
    barrier,
    exact_levels,
    finite_differences,
    finite_well,
    formula,
    from_function,
    infinite_well,
    midpoints,
    solve_schrodinger,
    steps,
    table,
)
from lossmith.tasks.physics.projection import error_bounds

OPEN_WELL = finite_well(50, 1, states=3)


# ---- references ----------------------------------------------------------------------------------------------------


def test_finite_differences_on_the_infinite_well() -> None:
    assert finite_differences(infinite_well()).energies[0] == pytest.approx(9.86960389, abs=5e-9)
    found = finite_differences(infinite_well(), 3)
    np.testing.assert_allclose(found.energies, [(n * math.pi) ** 2 for n in (1, 2, 3)], rtol=2e-6)
    sines = math.sqrt(2) * np.sin(math.pi * np.outer(found.points, [1, 2, 3]))
    np.testing.assert_allclose(np.abs(found.states), np.abs(sines), atol=1e-5)


@pytest.mark.parametrize(
    ("potential", "level"),
    [
        (finite_well(20, 0.5, (0, 1)), 13.018068469237269),
        (finite_well(20, 2, (-2, 2)), 1.639696291848),
        (barrier(20, 0.2), 16.912240701717195),
        (barrier(5, 0.2), 11.760769251520),
        (infinite_well(2), math.pi**2 / 4),
    ],
)
def test_two_classical_methods_agree_with_the_known_levels(potential: Potential, level: float) -> None:
    assert exact_levels(potential)[0] == pytest.approx(level, rel=1e-12)
    assert finite_differences(potential).energies[0] == pytest.approx(level, rel=2e-6)


def test_known_levels_above_the_ground_and_of_the_open_well() -> None:
    assert exact_levels(barrier(20, 0.2), 2)[1] == pytest.approx(40.403821009129910, rel=1e-12)
    # Its walls stand where they change the ninth digit.
    assert exact_levels(finite_well(20, 2))[0] == pytest.approx(1.639480147533, rel=1e-7)


@pytest.mark.parametrize(
    ("make", "half_width", "known"),
    [
        (lambda c: barrier(20, 2 * c), 0.1, 16.9449),
        (lambda c: finite_well(20, 2 * c, (0, 1)), 0.25, 12.9749),
    ],
)
def test_points_on_the_walls_would_shift_the_edges(
    make: Callable[[float], Potential], half_width: float, known: float
) -> None:
    """200 points from wall to wall put the jump midway between two of them, which is not where it is."""
    shifted = []
    for x in (np.linspace(0, 1, 200), midpoints(make(half_width), 200).x.numpy()):
        inside = x[np.abs(x - 0.5) < half_width]
        edge = (inside.min() + x[x < inside.min()].max()) / 2
        shifted.append(exact_levels(make(0.5 - edge))[0])
    exact = exact_levels(make(half_width))[0]
    assert shifted[0] == pytest.approx(known, abs=5e-5)
    assert abs(shifted[0] - exact) > 1e-3 * exact
    assert shifted[1] == pytest.approx(exact, rel=1e-12)


def test_levels_solve_the_transcendental_equations() -> None:
    (first,) = exact_levels(finite_well(20, 0.5, (0, 1)))
    k, q = math.sqrt(first), math.sqrt(20 - first)
    assert k * math.tan(k / 4) == pytest.approx(q / math.tanh(q / 4), rel=1e-10)
    even, odd = exact_levels(barrier(20, 0.2), 2)
    k, q = math.sqrt(even), math.sqrt(20 - even)
    assert q * math.tanh(q * 0.1) == pytest.approx(-k / math.tan(k * 0.4), rel=1e-10)
    k, p = math.sqrt(odd), math.sqrt(odd - 20)
    assert p / math.tan(p * 0.1) == pytest.approx(-k / math.tan(k * 0.4), rel=1e-10)
    for level in exact_levels(OPEN_WELL, 3)[::2]:
        k, q = math.sqrt(level), math.sqrt(50 - level)
        assert k * math.tan(k / 2) == pytest.approx(q, rel=1e-6)


def test_limits_of_the_height() -> None:
    assert exact_levels(finite_well(1e-9, 0.5, (0, 1)))[0] == pytest.approx(math.pi**2, rel=1e-9)
    assert exact_levels(finite_well(1e12, 0.5, (0, 1)))[0] == pytest.approx(39.478, rel=1e-5)
    assert exact_levels(barrier(1e12, 0.2))[0] == pytest.approx(61.685, rel=1e-5)


def test_thick_barriers_do_not_overflow() -> None:
    first, second = exact_levels(barrier(1e4, 8, (-5, 5)), 2)
    assert first == pytest.approx(second, rel=1e-9)
    # Both sides are wells of width 1 with one soft wall, which reaches about 1/100 into the barrier.
    assert first == pytest.approx((math.pi / 1.01) ** 2, rel=1e-3)


# ---- potentials ----------------------------------------------------------------------------------------------------


def test_bound_states_of_the_open_well_are_counted() -> None:
    assert OPEN_WELL.bound == 3
    assert finite_well(0.01, 1).bound == 1
    with pytest.raises(InputError, match="has 3 bound states, 4 are wanted"):
        finite_well(50, 1, states=4)
    with pytest.raises(InputError, match="has 3 bound states, 4 are wanted"):
        solve_schrodinger(OPEN_WELL, states=4)
    # The walls do not matter: twice as far, the same levels.
    wide = finite_well(50, 1, (2 * OPEN_WELL.interval[0], 2 * OPEN_WELL.interval[1]))
    np.testing.assert_allclose(exact_levels(OPEN_WELL, 3), exact_levels(wide, 3), rtol=1e-7)


@pytest.mark.parametrize("place", [1 / 3, 0.25, -0.7071])
def test_jumps_are_found(place: float) -> None:
    found = from_function(lambda x: np.where(x < place, x**2, 3.0 + x), (-1, 1)).jumps
    assert len(found) == 1
    assert found[0] == pytest.approx(place, abs=1e-12)


def test_steep_is_no_jump() -> None:
    assert from_function(lambda x: np.exp(-((x / 0.01) ** 2)), (-1, 1)).jumps == ()
    assert formula("tanh(500*x)", (-1, 1)).jumps == ()


def test_tables(tmp_path: Path) -> None:
    path = tmp_path / "well.csv"
    path.write_text("x,V\n# comment\n0,0\n1,2\n1,5\n2,5\n")
    potential = table(path)
    assert potential.jumps == (1.0,)
    assert potential([0.5, 1.5]).tolist() == [1.0, 5.0]
    for text, message in [
        ("", "holds no numbers"),
        ("x,V\n0,0\n1,a\n", "line 3"),
        ("0,0,1\n", "line 1"),
        ("0,0\n", "at least 2 rows"),
        ("1,0\n0,0\n", "must not fall"),
        ("0,0\n1,nan\n", "row 2 is not finite"),
        ("0,0\n1,1\n1,2\n1,3\n2,0\n", "not more often"),
    ]:
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            table(path)
    with pytest.raises(InputError, match="does not exist"):
        table(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("text", "message"), [("x + y", "also has y"), ("x**", "not an expression"), ("foo(x)", "not an expression")]
)
def test_formulas_that_are_none(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        formula(text, (0, 1))


def test_wrong_sizes_and_potentials() -> None:
    with pytest.raises(InputError, match="width must be positive"):
        infinite_well(-1)
    with pytest.raises(InputError, match="depth must be positive"):
        finite_well(-3, 1)
    with pytest.raises(InputError, match="less than the interval"):
        barrier(20, 1)
    with pytest.raises(InputError, match="a < b"):
        barrier(20, 0.1, (1, 0))
    with pytest.raises(InputError, match="not finite at x = 0"):
        Potential("pole", lambda x: 1 / x, (-1, 1))([0.0])
    with pytest.raises(InputError, match="must rise"):
        steps([0, 0, 1], [1, 2])
    with pytest.raises(InputError, match="did you mean 'barrier'"):
        solve_schrodinger("barier", height=1, width=0.1)
    with pytest.raises(InputError, match="needs an interval"):
        solve_schrodinger(np.square)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"states": 0}, "states must be at least 1"),
        ({"tolerance": 0.0}, "tolerance must be positive"),
        ({"method": "adam"}, "unknown method"),
        ({"energy": 1.0}, "belongs to method='residual'"),
        ({"method": "residual", "energy": 1.0, "energy_init": 2.0}, "exclude each other"),
        ({"method": "residual", "energy_init": [1.0, 2.0]}, "1 finite number"),
        ({"method": "residual", "n_collocation": 9}, "at least 10"),
        ({"method": "residual", "activation": "relu"}, "no second derivative"),
        ({"max_steps": -1}, "max_steps"),
        ({"kinetic": math.nan}, "kinetic"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        solve_schrodinger(infinite_well(), **options)  # type: ignore[arg-type]


# ---- solving -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "potential", [infinite_well(), finite_well(20, 0.5, (0, 1)), OPEN_WELL, barrier(20, 0.2)], ids=lambda p: p.name
)
def test_three_states_of_the_textbook_wells_to_1e_4(potential: Potential) -> None:
    levels = solve_schrodinger(potential, states=3)
    exact = exact_levels(potential, 3)
    np.testing.assert_allclose(levels.energies, exact, rtol=1e-4)
    assert (np.abs(levels.energies - exact) <= levels.errors).all()
    assert levels.nodes == (0, 1, 2)
    assert levels.warnings == ()
    assert (levels.compare().overlaps > 0.9999).all()
    assert levels.seconds < 60


def test_ground_states_of_symmetric_wells_are_even() -> None:
    levels = solve_schrodinger(barrier(20, 0.2))
    x = np.linspace(0, 0.5, 101)
    psi = levels.wavefunctions(x)[:, 0]
    np.testing.assert_allclose(psi, levels.wavefunctions(1 - x)[:, 0], atol=1e-2 * psi.max())
    assert levels.wavefunctions([-1.0, 0.0, 1.0, 2.0]).tolist() == [[0.0]] * 4


def random_potential(draw: np.random.Generator, kind: int) -> Potential:
    length = draw.uniform(0.5, 8)
    a = -draw.uniform(0, length)
    scale = (math.pi / length) ** 2
    if kind == 0:
        inner = np.sort(draw.uniform(a + 0.05 * length, a + 0.95 * length, draw.integers(1, 6)))
        return steps([a, *inner, a + length], draw.uniform(0, 60, len(inner) + 1) * scale)
    if kind == 1:
        centres, widths = draw.uniform(a, a + length, 5), draw.uniform(0.05, 0.3, 5) * length
        heights = draw.uniform(0, 60, 5) * scale

        def bumps(x: np.ndarray) -> np.ndarray:
            return (heights * np.exp(-(((x[:, None] - centres) / widths) ** 2))).sum(-1)

        return from_function(bumps, (a, a + length))
    x = np.linspace(a, a + length, draw.integers(4, 12))
    return table(np.stack([x, draw.uniform(0, 80, len(x)) * scale], 1))


@pytest.mark.parametrize("batch", [pytest.param(i, marks=pytest.mark.slow if i else ()) for i in range(10)])
def test_random_potentials_have_no_trivial_and_no_duplicate_states(batch: int) -> None:
    draw = np.random.default_rng(batch)
    for number in range(10 if batch else 3):
        potential = random_potential(draw, number % 3)
        levels = solve_schrodinger(potential, states=4, tolerance=1e-3)
        known = levels.compare(points=8001)
        np.testing.assert_allclose(levels.energies, known.energies, rtol=1e-3)
        x = np.linspace(*potential.interval, 4001)
        psi = levels.wavefunctions(x)
        np.testing.assert_allclose((psi.T @ psi) * (x[1] - x[0]), np.eye(4), atol=1e-3)


def test_units() -> None:
    """Twice the kinetic energy in twice the potential is twice the energy; the oscillator of atomic units."""
    levels = solve_schrodinger(formula("x**2 / 2", (-8, 8)), states=3, kinetic=0.5)
    np.testing.assert_allclose(levels.energies, [0.5, 1.5, 2.5], rtol=1e-4)
    np.testing.assert_allclose(levels.rayleigh, levels.energies, rtol=1e-12)
    assert levels.history[-1].energies[0] == pytest.approx(0.5, rel=1e-4)


def test_nearly_degenerate_levels() -> None:
    levels = solve_schrodinger(barrier(20, 1, (-2, 2)), states=2)
    np.testing.assert_allclose(levels.energies, [3.27068697, 3.32255116], rtol=1e-5)
    assert levels.nodes == (0, 1)


def test_error_bounds_hold_alone_and_together() -> None:
    alone = error_bounds(np.array([1.0]), 2.0, np.array([1e-4]))
    assert alone[0] == pytest.approx(1e-4 / (1 - 1e-2))
    pair = error_bounds(np.array([1.0, 1.0 + 1e-9]), 2.0, np.array([1e-6, 1e-6]))
    assert (pair < 3e-6).all()
    assert error_bounds(np.array([1.0]), 1.0, np.array([1e-4]))[0] == 1e-2


def test_too_few_steps_are_said() -> None:
    levels = solve_schrodinger(finite_well(2000, 1, (-1, 1)), states=4, hidden=(5,), max_steps=0)
    assert any("above the tolerance" in line for line in levels.warnings)
    assert len(levels.history) == 1


def test_same_seed_same_bits_and_saved_levels_come_back(tmp_path: Path) -> None:
    first, second = (solve_schrodinger(barrier(20, 0.2), states=2, seed=3) for _ in range(2))
    assert first.energies.tolist() == second.energies.tolist()
    first.save(tmp_path / "levels")
    loaded = Levels.load(tmp_path / "levels")
    x = np.linspace(0, 1, 50)
    np.testing.assert_array_equal(loaded.wavefunctions(x), first.wavefunctions(x))
    assert loaded.energies.tolist() == first.energies.tolist()
    assert loaded.history == first.history
    np.testing.assert_allclose(loaded.compare().energies, first.compare().energies, rtol=1e-14)
    solve_schrodinger(np.square, interval=(-5, 5)).save(tmp_path / "smooth")
    assert Levels.load(tmp_path / "smooth").compare().relative_errors[0] == pytest.approx(0, abs=1e-4)
    with pytest.raises(InputError, match=r"no levels\.json"):
        Levels.load(tmp_path)


def test_the_plot(tmp_path: Path) -> None:
    solve_schrodinger(OPEN_WELL, states=3).plot().savefig(tmp_path / "levels.png")
    assert (tmp_path / "levels.png").stat().st_size > 10_000


# ---- the paper's training ------------------------------------------------------------------------------------------


def test_residual_training_moves_the_energy_to_the_level() -> None:
    levels = solve_schrodinger(barrier(20, 0.2), method="residual", energy_init=16.0, hidden=(12, 12), max_steps=600)
    assert levels.energies[0] == pytest.approx(16.91, rel=2e-2)
    assert levels.norms[0] == pytest.approx(1, abs=0.15)
    assert levels.history[0].loss > levels.history[-1].loss
    assert levels.history[-1].step == 600


def test_without_the_norm_the_function_collapses_and_the_result_says_so() -> None:
    levels = solve_schrodinger(
        barrier(20, 0.2), method="residual", energy_init=10.0, hidden=(12, 12), norm_weight=0.0, max_steps=800, lr=5e-3
    )
    assert levels.norms[0] < 0.1
    assert any("collapsed" in line for line in levels.warnings)


def test_jumps_between_points_are_checked() -> None:
    levels = solve_schrodinger(barrier(20, 0.213), method="residual", max_steps=1)
    assert any("not midway" in line for line in levels.warnings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("potential", "options", "level"),
    [
        (infinite_well(), {"energy": math.pi**2, "lr": 1e-3}, math.pi**2),
        (finite_well(20, 0.5, (0, 1)), {"energy_init": 8.0}, 13.018068),
        (barrier(20, 0.2), {"energy_init": 10.0}, 16.912241),
    ],
)
def test_residual_training_with_the_defaults(potential: Potential, options: dict[str, float], level: float) -> None:
    levels = solve_schrodinger(potential, method="residual", **options)  # type: ignore[arg-type]
    assert levels.energies[0] == pytest.approx(level, rel=1e-2)
    assert levels.compare().overlaps[0] > 0.999
    assert levels.norms[0] == pytest.approx(1, abs=0.15)
    assert levels.nodes == (0,)
