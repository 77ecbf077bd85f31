"""Losses at shares and budgets that were not trained, from the curves of those that were."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lossmith.errors import InputError
from lossmith.laws.mixture_curves import domain_change, general_change, power_law
from lossmith.laws.mixture_fit import DOMAIN_NAMES, GENERAL_NAMES, Cells
from lossmith.laws.mixture_table import Size
from lossmith.laws.resampling import Fit
from lossmith.laws.tables import Table
from lossmith.laws.terms import Array

#: Parameters of one share.
NAMES = (*GENERAL_NAMES, *DOMAIN_NAMES)


@dataclass(frozen=True, slots=True)
class MixtureFit(Fit):
    """The table with curves for every share: what residuals and plots of a :class:`Fitted` use."""

    sizes: tuple[Size, ...]
    table: Table

    def value(self, parameters: Array) -> Array:
        """The fitted losses of the table's rows."""
        parameters = np.asarray(parameters, dtype=np.float64)
        cells = Cells.of(self.table, self.sizes)
        flat = parameters.reshape(-1, len(cells.rows) // 2, len(NAMES))
        out = np.empty((len(flat), len(self.table)))
        for row, one in enumerate(flat):
            out[row, cells.rows[cells.present]] = cells.value(one)[cells.present]
        return (out + self.columns["base"]).reshape(*parameters.shape[:-1], len(self.table))

    def size(self) -> Array:
        """The logarithm of the domain tokens."""
        return np.log(self.columns["tokens"] * np.maximum(self.columns["ratio"], 1e-3))

    def measures(self) -> list[Array]:
        """The domain tokens alone."""
        return [self.size()]


def over_shares(curves: Array, size: Size, part: int, times: Array, which: np.ndarray, ratios: Array) -> Array:
    """Changes ``(S, n)`` at ``ratios`` and ``times[which]``, for the curves ``(S, K, 8)`` of one size's shares."""
    change = (domain_change, general_change)[1 - part]
    parameters = curves[..., 5:] if part else curves[..., :5]
    at = change(parameters[:, None], times[:, None])
    shares = np.array(size.ratios)
    used = shares > 0 if part else size.mixed
    laws = power_law(shares[used], at[..., used].reshape(-1, int(used.sum())))
    laws = laws.reshape(len(curves), len(times), 3)
    found = domain_change(laws[:, which], np.where(ratios > 0, ratios, 1.0))
    for outside in np.flatnonzero(~used):
        # A share that the law leaves out is known where it was trained.
        rows = ratios == shares[outside]
        found[:, rows] = at[..., outside][:, which[rows]]
    return found


def check_inputs(arrays: Mapping[str, Array], sizes: tuple[Size, ...]) -> None:
    """Refuse what cannot be predicted: shares outside [0, 1], models that were not in the log, and so on."""
    ratio = arrays["ratio"]
    if not ((ratio >= 0) & (ratio <= 1)).all():
        raise InputError(f"ratio must lie between 0 and 1, got {ratio.flat[np.argmin((ratio >= 0) & (ratio <= 1))]:g}")
    for name in ("tokens", "base"):
        if name in arrays and not (np.isfinite(arrays[name]).all() and (arrays[name] > 0).all()):
            raise InputError(f"{name} must be positive and finite, got {arrays[name].min():g}")
    if not np.isin(arrays["domain"], (0, 1)).all():
        raise InputError("domain must be 0 (general loss) or 1 (domain loss)")
    there = [size.params for size in sizes]
    if not np.isin(arrays["params"], there).all():
        raise InputError(
            f"the log has no such model (sizes are not extrapolated); params may be "
            f"{', '.join(f'{p:.6g}' for p in there)}"
        )
    if (ratio == 0).any() and not all(0.0 in size.ratios for size in sizes):
        raise InputError("ratio 0 was not trained, and a power law of the share says nothing of it")
