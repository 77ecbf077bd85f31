"""Potentials in one dimension: the textbook wells, formulas, tables and functions of the user."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lossmith.errors import InputError, did_you_mean
from lossmith.files import read_utf8

Array = NDArray[np.float64]

# Cells in which jumps are looked for: a narrower step than this share of the interval is not seen.
_SCAN = 4096
# exp(-2 q m) where the walls that stand for open space are: what they change of an energy, relative.
_OPEN = 1e-8


@dataclass(frozen=True)
class Potential:
    """``V(x)`` between two walls of infinite height.

    Attributes:
        name: for tables and plots.
        function: values at an array of places.
        interval: the walls ``(a, b)``.
        jumps: places inside where ``V`` jumps. Points never lie on them, and trial functions may bend there.
        knots: places inside where ``V`` has a kink.
        steps: values between the jumps where ``V`` is constant there: levels are then known to the last digit.
        bound: number of bound states, where the walls stand for open space.
        options: what it was made from.
    """

    name: str
    function: Callable[[Array], Array]
    interval: tuple[float, float]
    jumps: tuple[float, ...] = ()
    knots: tuple[float, ...] = ()
    steps: tuple[float, ...] | None = None
    bound: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_interval(self.interval)
        a, b = self.interval
        if any(not a < place < b for place in (*self.jumps, *self.knots)):
            raise ValueError(f"jumps and knots must lie inside ({a:g}, {b:g}), got {self.jumps} and {self.knots}")

    def __call__(self, x: ArrayLike) -> Array:
        """Values at ``x``.

        Raises:
            InputError: a value that is not finite.
        """
        places = np.asarray(x, dtype=np.float64)
        with np.errstate(all="ignore"):
            values = np.broadcast_to(np.asarray(self.function(places), dtype=np.float64), places.shape)
        if not np.isfinite(values).all():
            where = float(places[~np.isfinite(values)].flat[0])
            raise InputError(f"potential {self.name} is not finite at x = {where:g}; choose an interval where it is")
        return values

    @property
    def edges(self) -> Array:
        """Walls, jumps and knots in their order."""
        return np.unique([self.interval[0], *self.jumps, *self.knots, self.interval[1]])


def infinite_well(width: float = 1.0) -> Potential:
    """``V = 0`` on ``[0, width]``: ``E_n = (n π / width)²``.

    >>> infinite_well().interval
    (0.0, 1.0)
    """
    _positive(width=width)
    return Potential("infinite well", np.zeros_like, (0.0, float(width)), steps=(0.0,), options={"width": width})


def finite_well(
    depth: float, width: float, interval: tuple[float, float] | None = None, *, states: int = 1
) -> Potential:
    """``V = 0`` over ``width`` in the middle, ``depth`` outside.

    Args:
        depth: height of the sides above the floor.
        width: of the floor.
        interval: walls; by default the well stands in open space around 0: the walls are so far away that
            ``states`` levels do not feel them (relative change below 1e-7).
        states: how many bound states are wanted.

    Raises:
        InputError: a size that is not positive, or more bound states than there are in open space,
            ``⌈√depth · width / π⌉``.

    >>> finite_well(50, 1).bound
    3
    """
    _positive(depth=depth, width=width)
    bound = None
    if interval is None:
        # A level exactly at the rim is not bound.
        bound = max(1, math.ceil(math.sqrt(depth) * width / math.pi * (1 - 1e-12)))
        if states > bound:
            raise InputError(
                f"a well of depth {depth:g} and width {width:g} has {bound} bound state{'s' * (bound != 1)}, {states} "
                "are wanted; ask for fewer, or give an interval: between walls there are always more"
            )
        half = width / 2 + _margin(depth, width, states)
        interval = (-half, half)
    a, b = check_interval(interval)
    left, right = (a + b - width) / 2, (a + b + width) / 2
    _inside(width, (a, b))
    return Potential(
        "finite well",
        lambda x: np.where((x > left) & (x < right), 0.0, float(depth)),
        (a, b),
        (left, right),
        steps=(float(depth), 0.0, float(depth)),
        bound=bound,
        options={"depth": depth, "width": width},
    )


def barrier(height: float, width: float, interval: tuple[float, float] = (0.0, 1.0)) -> Potential:
    """``V = height`` over ``width`` in the middle of a box, 0 elsewhere.

    >>> barrier(20, 0.2).jumps
    (0.4, 0.6)
    """
    _positive(height=height, width=width)
    a, b = check_interval(interval)
    left, right = (a + b - width) / 2, (a + b + width) / 2
    _inside(width, (a, b))
    return Potential(
        "barrier",
        lambda x: np.where((x > left) & (x < right), float(height), 0.0),
        (a, b),
        (left, right),
        steps=(0.0, float(height), 0.0),
        options={"height": height, "width": width},
    )


def steps(edges: Sequence[float], values: Sequence[float]) -> Potential:
    """Constant between edges: ``values[i]`` from ``edges[i]`` to ``edges[i + 1]``.

    >>> steps([0, 1, 3], [5, 0])(np.array([0.5, 2.0])).tolist()
    [5.0, 0.0]
    """
    places, heights = np.asarray(edges, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if places.ndim != 1 or heights.shape != (len(places) - 1,) or not (np.diff(places) > 0).all():
        raise InputError(f"edges must rise and be one more than values, got {list(edges)} and {list(values)}")
    if not (np.isfinite(places).all() and np.isfinite(heights).all()):
        raise InputError("edges and values must be finite")

    def function(x: Array) -> Array:
        return heights[np.clip(np.searchsorted(places, x, side="right") - 1, 0, len(heights) - 1)]

    inner = tuple(float(place) for place in places[1:-1])
    walls = (float(places[0]), float(places[-1]))
    options = {"edges": places.tolist(), "values": heights.tolist()}
    return Potential("steps", function, walls, inner, steps=tuple(heights.tolist()), options=options)


def table(source: str | Path | ArrayLike, *, name: str | None = None) -> Potential:
    """Straight lines between measured points; the same place twice is a jump.

    Args:
        source: CSV file with two columns, place and potential (a header may be there), or an array ``(points, 2)``.
        name: for tables and plots; by default the file's.

    Raises:
        InputError: fewer than 2 points, places that fall, values that are not finite.

    >>> table([[0, 0], [1, 2], [1, 5], [2, 5]])(np.array([0.5, 1.5])).tolist()
    [1.0, 5.0]
    """
    if isinstance(source, str | Path):
        title, points = name or Path(source).name, _read_points(Path(source))
    else:
        title, points = name or "table", np.asarray(source, dtype=np.float64)
    if points.ndim != 2 or points.shape[-1] != 2 or len(points) < 2:
        raise InputError(f"{title} must have at least 2 rows of two columns (place, potential), got {points.shape}")
    if not np.isfinite(points).all():
        row = int(np.flatnonzero(~np.isfinite(points).all(-1))[0])
        raise InputError(f"{title}: row {row + 1} is not finite: {points[row].tolist()}")
    x, v = points.T
    if (np.diff(x) < 0).any():
        row = int(np.flatnonzero(np.diff(x) < 0)[0])
        raise InputError(f"{title}: places must not fall, but row {row + 2} ({x[row + 1]:g}) follows {x[row]:g}")
    twice = np.flatnonzero(np.diff(x) == 0)
    if len(twice) and (np.diff(twice) == 1).any():
        raise InputError(f"{title}: a place may be there twice (a jump), not more often")
    a, b = float(x[0]), float(x[-1])
    check_interval((a, b))
    jumps = tuple(float(place) for place in x[twice] if a < place < b)
    flat = tuple(float(place) for place in np.unique(x)[1:-1] if place not in jumps)
    return Potential(title, lambda at: np.interp(at, x, v), (a, b), jumps, flat, options={"points": points.tolist()})


def formula(text: str, interval: tuple[float, float]) -> Potential:
    """An expression in ``x``: ``"x**2"``, ``"20*exp(-x**2) + abs(x)"``, ``"Piecewise((0, abs(x) < 1), (50, True))"``.

    Raises:
        InputError: not an expression in ``x`` alone.

    >>> formula("x**2 / 2", (-5, 5))(np.array([2.0])).tolist()
    [2.0]
    """
    import sympy

    variable = sympy.Symbol("x", real=True)
    try:
        expression = sympy.sympify(text, locals={"x": variable})
        others = sorted(str(symbol) for symbol in expression.free_symbols - {variable})
        function = sympy.lambdify(variable, expression, "numpy")
        function(np.array([0.5]))
    except Exception as error:  # sympy raises whatever its parser meets
        others = sorted(str(s) for s in getattr(locals().get("expression"), "free_symbols", set()) - {variable})
        if not others:
            raise InputError(f"formula {text!r} is not an expression in x ({type(error).__name__}: {error})") from None
    if others:
        raise InputError(f"formula {text!r} must be in x alone, it also has {', '.join(others)}")
    return from_function(function, interval, name=text)


def from_function(
    function: Callable[[Array], Any], interval: tuple[float, float], *, name: str | None = None
) -> Potential:
    """Any function of an array of places. Jumps are found by bisection; they must be 1/4096 of the interval apart.

    >>> from_function(lambda x: np.where(x < 0.3, 0, 7), (0, 1)).jumps
    (0.3,)
    """
    a, b = check_interval(interval)
    title = name or str(getattr(function, "__name__", "potential"))
    plain = Potential(title, function, (a, b))
    found = _jumps(plain)
    return Potential(title, function, (a, b), found)


POTENTIALS: dict[str, Callable[..., Potential]] = {
    "infinite_well": infinite_well,
    "finite_well": finite_well,
    "barrier": barrier,
    "steps": steps,
    "table": table,
    "formula": formula,
}


def get_potential(name: str, **options: Any) -> Potential:
    """A potential by its name.

    Raises:
        InputError: unknown name or option.
    """
    key = name.lower().replace("-", "_").replace(" ", "_")
    if key not in POTENTIALS:
        raise InputError(f"unknown potential '{name}': {did_you_mean(key, POTENTIALS)}")
    try:
        return POTENTIALS[key](**options)
    except TypeError as error:
        raise InputError(f"potential {name}: {error}") from None


def check_interval(interval: Sequence[float]) -> tuple[float, float]:
    """The walls as two numbers.

    Raises:
        InputError: not ``a < b``, or not finite.
    """
    try:
        a, b = (float(wall) for wall in interval)
    except (TypeError, ValueError):
        raise InputError(f"interval must be two numbers, got {interval!r}") from None
    if not (math.isfinite(a) and math.isfinite(b) and a < b):
        raise InputError(f"interval must have finite walls a < b, got ({a:g}, {b:g})")
    return a, b


def _positive(**sizes: float) -> None:
    for name, size in sizes.items():
        if not (math.isfinite(size) and size > 0):
            raise InputError(f"{name} must be positive and finite, got {size:g}")


def _inside(width: float, interval: tuple[float, float]) -> None:
    if width >= interval[1] - interval[0]:
        raise InputError(f"width {width:g} must be less than the interval's, {interval[1] - interval[0]:g}")


def _margin(depth: float, width: float, states: int) -> float:
    """How far from the well the walls must be so that the highest wanted level does not feel them."""
    # Level n lies where z = k w / 2 solves z = n π / 2 - arcsin(z / z0): the left side rises, the right side falls.
    z0 = math.sqrt(depth) * width / 2
    low, high = max(0.0, (states - 1) * math.pi / 2), min(z0, states * math.pi / 2)
    for _ in range(200):
        z = (low + high) / 2
        low, high = (z, high) if z < states * math.pi / 2 - math.asin(min(1.0, z / z0)) else (low, z)
    q = 2 / width * math.sqrt(max(z0**2 - low**2, 1e-12 * z0**2))
    return -math.log(_OPEN) / (2 * q)


def _jumps(potential: Potential) -> tuple[float, ...]:
    a, b = potential.interval
    # Not the middle of anything: places of jumps tend to be round numbers.
    grid = a + (b - a) * (np.arange(_SCAN) + 0.4142) / _SCAN
    values = potential(grid)
    rises = np.abs(np.diff(values))
    spread = float(values.max() - values.min())
    if spread == 0:
        return ()
    found = []
    # A smooth function rises by about spread / _SCAN in a cell, a steep one by more: bisection tells.
    for cell in np.flatnonzero(rises > 4 * spread / _SCAN):
        low, high = grid[cell], grid[cell + 1]
        v_low, v_high = values[cell], values[cell + 1]
        while high - low > 1e-13 * (b - a) and (middle := (low + high) / 2) not in (low, high):
            v = float(potential(np.array([middle]))[0])
            low, high, v_low, v_high = (
                (middle, high, v, v_high) if abs(v_high - v) > abs(v - v_low) else (low, middle, v_low, v)
            )
        if abs(v_high - v_low) > 0.5 * rises[cell] or abs(v_high - v_low) > 1e-3 * spread:
            # The shortest decimal number in the last cell is more likely meant than its middle.
            found.append(_shortest(low, high))
    if len(found) > 64:
        raise InputError(f"potential {potential.name} jumps at more than 64 places; give it as steps or as a table")
    return tuple(found)


def _shortest(low: float, high: float) -> float:
    for digits in range(17):
        number = round((low + high) / 2, digits)
        if low <= number <= high:
            return float(number)
    return float(high)


def _read_points(path: Path) -> Array:
    lines = read_utf8(path).splitlines()
    rows: list[list[float]] = []
    for number, line in enumerate(lines, 1):
        cells = line.replace(",", " ").replace(";", " ").split()
        if not cells or cells[0].startswith("#"):
            continue
        try:
            rows.append([float(cell) for cell in cells])
        except ValueError:
            if not rows:
                continue  # the header
            raise InputError(f"{path}, line {number}: expected two numbers (place, potential), got {line!r}") from None
        if len(rows[-1]) != 2:
            raise InputError(f"{path}, line {number}: expected two numbers (place, potential), got {line!r}")
    if not rows:
        raise InputError(f"{path} holds no numbers; expected lines of place, potential")
    return np.array(rows)
