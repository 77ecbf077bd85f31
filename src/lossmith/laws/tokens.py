"""One curve by itself, and Chinchilla with fewer free parameters: laws for little data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from lossmith.laws.chinchilla import Chinchilla
from lossmith.laws.fitted import Fitted
from lossmith.laws.fitting import SQUARES, Objective
from lossmith.laws.law import Law
from lossmith.laws.tables import LOSS, TOKENS, Column
from lossmith.laws.terms import Array, Exponent, Term, Terms

#: Size part of Muennighoff et al. 2023 (arXiv 2305.16264): what to borrow where only one size was trained.
BORROWED = {"A": float(np.exp(6.255414)), "alpha": 0.3526596}


# exponent = first + second * ln(coefficient), over published families.
_ALPHA = (0.0116280, 0.05004588)
_BETA = (0.23710262, 0.03844353)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenLaw(Law):
    """``L = E + B / D**beta``: one model's curve by tokens.

    The size is part of ``E``. It is what is left of Chinchilla's law where all measurements are of one model: to
    predict the end of a training from its first part (about 30 % of it, by Choshen et al. 2024, arXiv 2410.11840).

    >>> import numpy as np
    >>> d = np.geomspace(1e9, 1e11, 20)
    >>> fitted = TokenLaw().fit({"tokens": d, "loss": 2.0 + 1500 * d**-0.33}, bootstrap=0)
    >>> round(float(fitted.predict(tokens=1e12)), 4)
    2.1645
    """

    name: ClassVar[str] = "tokens"
    formula: ClassVar[str] = "loss = E + B / tokens^beta"
    needed: ClassVar[tuple[Column, ...]] = (TOKENS, LOSS)

    @property
    def terms(self) -> Terms:
        """Two terms, one exponent."""
        return Terms((Term("E"), Term("B", {"tokens": "beta"})), (Exponent("beta"),))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TiedChinchilla(Law):
    r"""Chinchilla's law with three free parameters: the coefficients follow from the exponents.

    Over published families ``alpha`` and ``ln A`` lie near a line, ``beta`` and ``ln B`` as well:

    .. math:: \alpha = 0.0116280 + 0.05004588 \ln A, \qquad \beta = 0.23710262 + 0.03844353 \ln B

    so that ``A / N**alpha = A0 (N / N0)**-alpha`` with constants ``A0 = exp(-0.0116280 / 0.05004588)`` and
    ``N0 = exp(1 / 0.05004588)``, and ``B0``, ``D0`` likewise. For few or small models, where five parameters would
    follow the noise.

    Source: Choshen et al. 2024 (arXiv 2410.11840), the regression in its code.

    >>> import numpy as np
    >>> n, d = (a.ravel() for a in np.meshgrid([1e8, 1e9], np.geomspace(1e10, 1e12, 10)))
    >>> a, b = np.exp((0.35 - 0.0116280) / 0.05004588), np.exp((0.5 - 0.23710262) / 0.03844353)
    >>> loss = 1.7 + a / n**0.35 + b / d**0.5
    >>> fitted = TiedChinchilla().fit({"params": n, "tokens": d, "loss": loss}, bootstrap=0)
    >>> [round(fitted.parameters[name], 6) for name in ("E", "alpha", "beta")]
    [1.7, 0.35, 0.5]
    """

    name: ClassVar[str] = "tied-chinchilla"
    formula: ClassVar[str] = "loss = E + A0 (params/N0)^-alpha + B0 (tokens/D0)^-beta"
    needed: ClassVar[tuple[Column, ...]] = Chinchilla.needed

    objective: Objective = SQUARES

    def __post_init__(self) -> None:
        constants = {"A0": float(np.exp(-_ALPHA[0] / _ALPHA[1])), "B0": float(np.exp(-_BETA[0] / _BETA[1]))}
        object.__setattr__(self, "fixed", {**constants, **self.fixed})
        Law.__post_init__(self)

    @property
    def terms(self) -> Terms:
        """Those of Chinchilla, with coefficients that are constants."""
        return Terms(
            (Term("E"), Term("A0", {"params": "alpha"}), Term("B0", {"tokens": "beta"})),
            (Exponent("alpha"), Exponent("beta")),
        )

    def transform(self, columns: Mapping[str, Array]) -> Mapping[str, Array]:
        """In units of ``N0`` and ``D0``."""
        return {
            **columns,
            "params": columns["params"] * np.exp(-1 / _ALPHA[1]),
            "tokens": columns["tokens"] * np.exp(-1 / _BETA[1]),
        }

    def plan(self, fitted: Fitted, **wishes: Any) -> Any:
        """As :meth:`Chinchilla.plan`, by the coefficients that the exponents stand for."""
        samples = self._untied(fitted.samples)
        parameters = dict(zip(Chinchilla().names, self._untied(fitted.best[None])[0].tolist(), strict=True))
        plain = Fitted(
            Chinchilla(objective=self.objective),
            parameters,
            fitted.table,
            samples,
            fitted.objective,
            fitted.calibration,
            fitted.warnings,
        )
        return plain.plan(**wishes)

    def _untied(self, rows: Array) -> Array:
        """``E, A, B, alpha, beta`` for parameters ``(S, P)``."""
        e, alpha, beta = (rows[:, self.names.index(name)] for name in ("E", "alpha", "beta"))
        a, b = np.exp((alpha - _ALPHA[0]) / _ALPHA[1]), np.exp((beta - _BETA[0]) / _BETA[1])
        return np.stack([e, a, b, alpha, beta], -1)
