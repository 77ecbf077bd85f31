"""Laws that are sums of power-law terms, with exact first and second derivatives over whole batches of parameters.

.. math:: f(x) = \\sum_k c_k \\; s_k(x) \\prod_j x_j^{-\\theta_{e(k,j)}}

For fixed exponents :math:`\\theta` the rest is linear in the coefficients :math:`c`; the fit uses that.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_DEFAULT_GRID = (0.03, 0.08, 0.15, 0.22, 0.3, 0.38, 0.48, 0.6, 0.8, 1.1, 1.5, 2.2)
# Starts of the exponents beyond this number would cost more than they find.
_LARGEST_GRID = 1300


@dataclass(frozen=True, slots=True)
class Term:
    """One addend: ``coefficient * factor * column ** -exponent * ...``.

    Attributes:
        coefficient: name of the linear parameter.
        powers: column -> name of the exponent; the column enters as ``column ** -exponent``. Terms may share exponents.
        factor: column that multiplies the term (it may be zero or, with care, negative); none is 1.
        sign: 1, or -1 for a term that lowers the value while its coefficient stays non-negative.
        lower: bound of the coefficient: 0, or ``-inf`` for either sign.
    """

    coefficient: str
    powers: Mapping[str, str] = field(default_factory=dict)
    factor: str | None = None
    sign: float = 1.0
    lower: float = 0.0


@dataclass(frozen=True, slots=True)
class Exponent:
    """A non-linear parameter: bounds, and where the search for it starts."""

    name: str
    lower: float = 0.0
    upper: float = 5.0
    grid: tuple[float, ...] = _DEFAULT_GRID


@dataclass(frozen=True, slots=True)
class Terms:
    """A sum of terms: the shape of a law. Parameters are ordered: coefficients, then exponents.

    >>> law = Terms((Term("E"), Term("A", {"N": "alpha"})), (Exponent("alpha"),))
    >>> law.names
    ('E', 'A', 'alpha')
    >>> law.predict(np.array([1.5, 8.0, 0.5]), {"N": np.array([4.0, 16.0])}).tolist()
    [5.5, 3.5]
    """

    terms: tuple[Term, ...]
    exponents: tuple[Exponent, ...]

    def __post_init__(self) -> None:
        known = {exponent.name for exponent in self.exponents}
        used = {name for term in self.terms for name in term.powers.values()}
        if known != used:
            raise ValueError(f"the terms use the exponents {sorted(used)}, but {sorted(known)} are declared")
        if len(set(self.names)) != len(self.names):
            raise ValueError(f"parameter names must differ, got {self.names}")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters in their order."""
        return (*(term.coefficient for term in self.terms), *(exponent.name for exponent in self.exponents))

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the inputs."""
        found = [column for term in self.terms for column in (*term.powers, *([term.factor] if term.factor else []))]
        return tuple(dict.fromkeys(found))

    @property
    def lower(self) -> Array:
        """Lower bounds of the parameters."""
        return np.array([*(term.lower for term in self.terms), *(e.lower for e in self.exponents)])

    @property
    def upper(self) -> Array:
        """Upper bounds of the parameters."""
        return np.array([*(np.inf for _ in self.terms), *(e.upper for e in self.exponents)])

    def predict(self, parameters: Array, columns: Mapping[str, Array]) -> Array:
        """Values for parameters ``(..., P)`` at columns ``(n,)`` or ``(..., n)``; shape ``(..., n)``."""
        parameters = np.asarray(parameters, dtype=np.float64)
        prepared = Inputs.of(self, columns, centred=False)
        flat = parameters.reshape(-1, parameters.shape[-1])
        value = prepared.value(flat)
        return value.reshape(*parameters.shape[:-1], value.shape[-1])

    def grid(self, fixed: Mapping[str, float] | None = None) -> Array:
        """Starting exponents ``(G, exponents)``: the product of their grids, thinned where that is too many."""
        if not self.exponents:
            return np.zeros((1, 0))
        axes = [(fixed[e.name],) if fixed and e.name in fixed else e.grid for e in self.exponents]
        while np.prod([len(axis) for axis in axes]) > _LARGEST_GRID:
            longest = max(range(len(axes)), key=lambda i: len(axes[i]))
            axes[longest] = axes[longest][::2] if len(axes[longest]) > 3 else axes[longest][:1]
        return np.array(list(itertools.product(*axes)), dtype=np.float64).reshape(-1, len(axes))


@dataclass(frozen=True, slots=True)
class Inputs:
    """The columns of a law made ready: logarithms around their means, factors of size 1.

    Arrays are ``(1, n)`` where all problems of a batch share them, else ``(B, n)``. ``to_own`` and ``to_given`` change
    parameters between these units and those of the table.
    """

    terms: Terms
    logs: Mapping[str, Array]
    factors: tuple[Array | None, ...]
    means: Mapping[str, Array]
    sizes: tuple[Array, ...]

    @classmethod
    def of(
        cls, terms: Terms, columns: Mapping[str, Array], *, centred: bool = True, as_given: Collection[str] = ()
    ) -> Inputs:
        """Prepare ``columns``; ``centred=False`` leaves the units as they are, ``as_given`` those of these columns."""
        logs, means = {}, {}
        for name in dict.fromkeys(column for term in terms.terms for column in term.powers):
            logs[name] = np.log(np.atleast_2d(np.asarray(columns[name], dtype=np.float64)))
            moved = centred and name not in as_given
            means[name] = logs[name].mean(-1, keepdims=True) if moved else np.zeros((1, 1))
            logs[name] = logs[name] - means[name]
        factors: list[Array | None] = []
        sizes = []
        for term in terms.terms:
            factor = None
            size = np.ones((1, 1))
            if term.factor is not None:
                factor = np.atleast_2d(np.asarray(columns[term.factor], dtype=np.float64)) * term.sign
                if centred:
                    size = np.abs(factor).max(-1, keepdims=True)
                    size = np.where(size > 0, size, 1.0)
                    factor = factor / size
            elif term.sign != 1:
                factor = np.full((1, 1), term.sign)
            factors.append(factor)
            sizes.append(size)
        return cls(terms, logs, tuple(factors), means, tuple(sizes))

    def select(self, rows: NDArray[np.intp]) -> Inputs:
        """The problems ``rows`` of the batch; shared arrays stay shared."""

        def pick(array: Array | None) -> Array | None:
            return array if array is None or len(array) == 1 else array[rows]

        return Inputs(
            self.terms,
            {name: pick(log) for name, log in self.logs.items()},  # type: ignore[misc]
            tuple(pick(factor) for factor in self.factors),
            {name: pick(mean) for name, mean in self.means.items()},  # type: ignore[misc]
            tuple(pick(size) for size in self.sizes),  # type: ignore[misc]
        )

    def scale(self, parameters: Array) -> Array:
        """How much larger the coefficients are in these units: ``(B, terms)``, from exponents of ``(B, P)``."""
        exponents = self._exponents(parameters)
        columns = []
        for term, size in zip(self.terms.terms, self.sizes, strict=True):
            shift = sum((-exponents[e] * self.means[column][:, 0] for column, e in term.powers.items()), np.zeros(1))
            columns.append(np.broadcast_to(np.exp(shift) * size[:, 0], len(parameters)))
        return np.stack(columns, -1)

    def to_own(self, parameters: Array) -> Array:
        """Parameters of the table's units in these."""
        count = len(self.terms.terms)
        return np.concatenate([parameters[:, :count] * self.scale(parameters), parameters[:, count:]], -1)

    def to_given(self, parameters: Array) -> Array:
        """Parameters of these units in the table's."""
        count = len(self.terms.terms)
        return np.concatenate([parameters[:, :count] / self.scale(parameters), parameters[:, count:]], -1)

    def basis(self, parameters: Array) -> list[Array]:
        """The terms without their coefficients, each ``(B, n)`` (or ``(1, 1)`` for a constant)."""
        exponents = self._exponents(parameters)
        found = []
        for term, factor in zip(self.terms.terms, self.factors, strict=True):
            power: Array | None = None
            for column, name in term.powers.items():
                part = exponents[name][:, None] * self.logs[column]
                power = part if power is None else power + part
            if power is None:
                found.append(np.ones((1, 1)) if factor is None else factor)
            else:
                value = np.exp(np.negative(power, out=power), out=power)
                found.append(value if factor is None else value * factor)
        return found

    def value(self, parameters: Array, basis: Sequence[Array] | None = None) -> Array:
        """``f`` for parameters ``(B, P)``: ``(B, n)``."""
        basis = self.basis(parameters) if basis is None else basis
        total: Array | float = 0.0
        for k, part in enumerate(basis):
            total = total + parameters[:, k, None] * part
        every = [*self.logs.values(), *(factor for factor in self.factors if factor is not None)]
        # Shared arrays of one column, or none at all, leave one value.
        count = next((array.shape[-1] for array in every if array.shape[-1] != 1), 1)
        return np.broadcast_to(np.asarray(total), (len(parameters), count))

    def jacobian(self, parameters: Array, basis: Sequence[Array], count: int) -> Array:
        """``df/dp``: ``(B, P, n)``."""
        terms = self.terms.terms
        number = len(terms)
        out = np.empty((len(parameters), number + len(self.terms.exponents), count))
        out[:, number:] = 0
        index = {e.name: number + i for i, e in enumerate(self.terms.exponents)}
        for k, (term, part) in enumerate(zip(terms, basis, strict=True)):
            out[:, k] = part
            for column, name in term.powers.items():
                out[:, index[name]] -= parameters[:, k, None] * part * self.logs[column]
        return out

    def curvature(self, parameters: Array, basis: Sequence[Array], weights: Array) -> Array:
        """``sum_i weights_i d2f_i/dp2``: ``(B, P, P)``."""
        terms = self.terms.terms
        number = len(terms)
        size = number + len(self.terms.exponents)
        out = np.zeros((len(parameters), size, size))
        index = {e.name: number + i for i, e in enumerate(self.terms.exponents)}
        for k, (term, part) in enumerate(zip(terms, basis, strict=True)):
            powers = list(term.powers.items())
            for position, (column, name) in enumerate(powers):
                weighted = weights * part * self.logs[column]
                slope = -weighted.sum(-1)
                out[:, k, index[name]] += slope
                out[:, index[name], k] += slope
                for other_position in range(position, len(powers)):
                    other_column, other = powers[other_position]
                    value = parameters[:, k] * (weighted * self.logs[other_column]).sum(-1)
                    out[:, index[name], index[other]] += value
                    if other_position > position:
                        out[:, index[other], index[name]] += value
        return out

    def _exponents(self, parameters: Array) -> dict[str, Array]:
        number = len(self.terms.terms)
        return {e.name: parameters[:, number + i] for i, e in enumerate(self.terms.exponents)}
