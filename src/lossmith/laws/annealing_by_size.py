"""The annealing law over several model sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from lossmith.errors import InputError
from lossmith.laws.annealing import RATE, STEP, LRAnnealing
from lossmith.laws.curves import LossCurve
from lossmith.laws.fitting import Solution
from lossmith.laws.resampling import Calibration, Fit
from lossmith.laws.tables import LOSS, PARAMS, Column, Table
from lossmith.laws.terms import Array, Exponent, Term, Terms


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizedLRAnnealing(LRAnnealing):
    """The same over several model sizes ``N``: ``L = L0 + A S1^-alpha + B N^-beta - C N^gamma S2``.

    The paper says that its equation extends to the size; this form of it is ours, because the published one could not
    be read. ``N`` counts parameters without embeddings. Two sizes determine ``L0`` and ``B`` only where ``beta`` is
    given: ``SizedLRAnnealing(fixed={"beta": 0.26})``.
    """

    name: ClassVar[str] = "lr-annealing-size"
    formula: ClassVar[str] = "L = L0 + A*S1^-alpha + B*N^-beta - C*N^gamma*S2"
    needed: ClassVar[tuple[Column, ...]] = (STEP, RATE, PARAMS, LOSS)

    @property
    def terms(self) -> Terms:
        """The law's and one of the size; the annealing grows with a power of the size."""
        return Terms(
            (
                Term("L0"),
                Term("A", {"area": "alpha"}),
                Term("B", {"params": "beta"}),
                Term("C", {"inverse_params": "gamma"}, factor="annealing", sign=-1),
            ),
            (
                Exponent("alpha"),
                Exponent("beta", grid=(0.05, 0.1, 0.2, 0.3, 0.5, 0.8)),
                Exponent("gamma", lower=-3.0, upper=3.0, grid=(-0.2, 0.0, 0.2, 0.4)),
            ),
        )

    def transform(self, columns: Mapping[str, Array]) -> Mapping[str, Array]:
        """Adds ``1 / N``, whose power ``-gamma`` is the law's."""
        return {**columns, "inverse_params": 1 / columns["params"]}

    def warnings(
        self, fit: Fit, solution: Solution, samples: Array, calibration: Calibration = Calibration()
    ) -> tuple[str, ...]:
        """What the data cannot determine."""
        # The size and its inverse are one quantity.
        return tuple(w for w in super().warnings(fit, solution, samples, calibration) if "inverse_params" not in w)

    def _extra(self, curve: LossCurve) -> dict[str, Array]:
        if curve.params is None:
            raise InputError(
                f"{curve.name} has no number of parameters: give a column params, params=NUMBER, or put each size's "
                "curves into a folder named like 100M"
            )
        return {"params": np.full(len(curve.steps), float(curve.params))}

    def _asked(self) -> tuple[str, ...]:
        return ("params",)

    def _predicting(self, first: Array, second: Array, given: Mapping[str, Any]) -> Mapping[str, Array]:
        params = given.get("params")
        if not isinstance(params, int | float) or isinstance(params, bool) or not (np.isfinite(params) and params > 0):
            raise InputError(f"law {self.name} needs params, a positive number, to predict; got {params!r}")
        size = np.full(len(first), float(params))
        return self.transform({"area": first, "annealing": second, "params": size})

    def check(self, table: Table) -> None:
        """As for one size; and enough sizes.

        Raises:
            InputError: fewer than three sizes, unless exponents are given.
        """
        super().check(table)
        sizes = len(np.unique(table.columns["params"]))
        needed = 3 - ("beta" in self.fixed) - ("beta" in self.fixed and "gamma" in self.fixed and "B" in self.fixed)
        if sizes < needed:
            raise InputError(
                f"{table.source} has {sizes} size{'s' * (sizes != 1)} of model; law {self.name} needs at least "
                f"{needed} (or 2 with beta given)"
            )

    def _held(self, table: Table) -> LRAnnealing:
        if not np.any(table.columns["annealing"] != 0) and "C" not in self.fixed:
            raise InputError(f"no run of {table.source} anneals, and law {self.name} needs one for C and gamma")
        return self
