"""Loss by width: one exponent for all families of models, one offset for each.

Liu, Liu and Gore, "Superposition Yields Robust Neural Scaling", 2025, arXiv 2505.10465.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from lossmith.errors import InputError, did_you_mean
from lossmith.laws.fitted import Fitted
from lossmith.laws.fitting import SQUARES, Objective
from lossmith.laws.law import Law
from lossmith.laws.sources import read_frame
from lossmith.laws.tables import LOSS, Column, Reading, Table, read_table
from lossmith.laws.terms import Array, Exponent, Term, Terms

#: Least squares of log loss: without an offset, ordinary regression of log loss on log width.
LOG_SQUARES = Objective("log", float("inf"))

WIDTH = Column(
    "width",
    ("m", "d_model", "hidden_size", "hidden", "n_embd", "dim", "model_dim"),
    "count",
    2.0,
    "width of the residual stream",
)
_GROUP = Column("group", kind="number", what="family and corpus")
_FAMILIES, _CORPORA = ("family", "model_family"), ("corpus", "dataset")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Width(Law):
    r"""``loss = E_g + A / width**alpha``: ``alpha`` and ``A`` are shared, the offset ``E`` is each group's own.

    Strong superposition gives ``alpha = 1``; the paper finds 0.91 +- 0.04 over four families of language models on four
    corpora, with 16 offsets.

    A group is a family of models on a corpus. Rows of one family and width share their mistakes: intervals
    resample them together.

    Attributes:
        by: headers of the group, joined by ``+``; by default ``family`` and ``corpus``, where the table has them;
            ``""`` for one offset.
        offset: whether there is one at all: the loss of a toy model has none.
        groups: the groups' labels; ``fit`` finds them.
        objective: least squares of the loss, as in the paper.

    Source: Liu et al. 2025, arXiv 2505.10465. The paper minimises by 20,000 steps of Adam; here the fit is exact.

    >>> import numpy as np
    >>> width = np.tile([512.0, 768, 1024, 2048], 2)
    >>> corpus = np.repeat(["c4", "pile"], 4)
    >>> loss = np.where(corpus == "c4", 2.1, 1.6) + 476 / width**0.91
    >>> fitted = Width().fit({"corpus": corpus, "width": width, "loss": loss}, bootstrap=0)
    >>> {name: round(value, 6) for name, value in fitted.parameters.items()}
    {'E[c4]': 2.1, 'E[pile]': 1.6, 'A': 476.0, 'alpha': 0.91}
    >>> round(float(fitted.predict(width=4096, group="pile")), 4)
    1.8457
    """

    name: ClassVar[str] = "width"
    formula: ClassVar[str] = "loss = E[group] + A / width^alpha"
    needed: ClassVar[tuple[Column, ...]] = (WIDTH, LOSS)

    objective: Objective = SQUARES
    by: str | None = None
    offset: bool = True
    groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups))
        if len(set(self.groups)) != len(self.groups):
            raise InputError(f"the groups of law width must differ, got {', '.join(self.groups)}")
        super().__post_init__()

    @property
    def terms(self) -> Terms:
        """One term per offset, and the power of the width."""
        offsets: tuple[Term, ...] = ()
        if self.offset:
            offsets = tuple(Term(f"E[{g}]", factor=f"in {g}") for g in self.groups) or (Term("E"),)
        return Terms((*offsets, Term("A", {"width": "alpha"})), (Exponent("alpha"),))

    def transform(self, columns: Mapping[str, Array]) -> Mapping[str, Array]:
        """The width, and for each group a column that is 1 in its rows."""
        codes = columns.get("group", np.zeros(len(columns["width"])))
        return {"width": columns["width"], **{f"in {g}": (codes == i + 1) * 1.0 for i, g in enumerate(self.groups)}}

    def read(self, source: Any, reading: Reading = Reading()) -> Table:
        """The measurements, with the number of each row's group (counted from 1) in the column ``group``."""
        return self._read(source, reading, self.groups)[1]

    def adapted(self, source: Any, reading: Reading) -> tuple[Width, Table]:
        """One offset for each group of the table."""
        groups, table = self._read(source, reading, self.groups)
        return dataclasses.replace(self, groups=groups), table

    def check(self, table: Table) -> None:
        """Refuse too few widths, also within a group."""
        super().check(table)
        if not self.offset:
            return
        for i, group in enumerate(self.groups):
            own = np.unique(table.columns["width"][table.columns["group"] == i + 1])
            if len(own) < 2:
                raise InputError(
                    f"{table.source}: group '{group}' has {len(own)} width{'s' * (len(own) != 1)}; its offset and the "
                    "slope cannot be told apart with fewer than 2: leave it out, or give all groups one offset (by='')"
                )

    def inputs(self, **given: Any) -> tuple[Mapping[str, Array], tuple[int, ...]]:
        """``width`` (a number or an array) and, where there are groups, ``group`` (a label)."""
        label = given.pop("group", None)
        columns, shape = super().inputs(**given)
        if not self.groups or not self.offset:
            if label is not None:
                raise InputError("this law width was fitted without groups: leave out group")
            return columns, shape
        if label not in self.groups:
            hint = did_you_mean(str(label), self.groups)
            raise InputError(f"law width needs group: {hint}" if label is None else f"unknown group '{label}': {hint}")
        number = len(columns["width"])
        return {**columns, **{f"in {g}": np.full(number, float(g == label)) for g in self.groups}}, shape

    def labels(self, **given: Any) -> list[str]:
        """What each value is predicted at."""
        label = given.pop("group", None)
        return [f"{line}, group={label}" if label else line for line in super().labels(**given)]

    @staticmethod
    def slope_error(fitted: Fitted) -> float:
        r"""The paper's standard error of ``alpha``, from the logarithms of the reducible losses.

        .. math:: \sqrt{\frac{\sum (\ln(L - E) - \ln(A m^{-\alpha}))^2}{\sum (\ln m - \overline{\ln m})^2 \, (n - 3)}}

        Points that are not above their offset have no logarithm and are left out. Intervals by resampling
        (``fitted.parameter_intervals()``) also see the uncertainty of the offsets, which this does not.
        """
        columns = fitted.law.transform(fitted.table.columns)
        power = fitted.parameters["A"] * columns["width"] ** -fitted.parameters["alpha"]
        left = fitted.table.columns["loss"] - (fitted.law.evaluate(fitted.best, columns) - power)
        used = left > 0
        if used.sum() <= 3:
            return float("nan")
        logs = np.log(columns["width"][used])
        errors = np.log(left[used]) - np.log(power[used])
        return float(np.sqrt((errors**2).sum() / ((logs - logs.mean()) ** 2).sum() / (used.sum() - 3)))

    def _read(self, source: Any, reading: Reading, known: tuple[str, ...]) -> tuple[tuple[str, ...], Table]:
        if isinstance(source, Table):
            return known, source
        name, frame = read_frame(source)
        for header, value in reading.where.items():
            if header in frame.columns:
                frame = frame[frame[header].astype(str) == str(value)]
        headers = self._headers([str(header) for header in frame.columns], name)
        if not headers or not self.offset:
            return (), read_table(source, self.needed, self.target, reading)
        # Names, not numbers: NaN among them is no group.
        whole = frame.dropna(subset=headers).reset_index(drop=True)
        without = len(frame) - len(whole)
        frame = whole
        labels = [" ".join(map(str, row)) for row in frame[headers].itertuples(index=False)]
        groups = known or tuple(dict.fromkeys(labels))
        if unknown := [label for label in labels if label not in groups]:
            raise InputError(f"{name}: unknown group '{unknown[0]}': {did_you_mean(unknown[0], groups)}")
        frame = frame.assign(group=[groups.index(label) + 1 for label in labels])
        try:
            table = read_table(frame, (*self.needed, _GROUP), self.target, reading)
        except InputError as error:
            raise InputError(str(error).replace("the table", name, 1)) from None
        notes = table.notes
        if without:
            notes = (*notes, f"{without} rows dropped: no {' or '.join(headers)}")
        runs = table.runs
        if reading.run is None and len(headers) > 1:
            first = dict(zip(labels, frame[headers[0]].astype(str), strict=True))
            codes = table.columns["group"].astype(int) - 1
            widths = table.columns["width"]
            runs = np.array([f"{first[groups[c]]} {w:g}" for c, w in zip(codes, widths, strict=True)], dtype=str)
        return groups, dataclasses.replace(table, runs=runs, notes=notes, source=name)

    def _headers(self, present: list[str], name: str) -> list[str]:
        if self.by is None:
            plain = {header.strip().lower(): header for header in present}
            return [found[0] for names in (_FAMILIES, _CORPORA) if (found := [plain[n] for n in names if n in plain])]
        headers = [part.strip() for part in self.by.split("+") if part.strip()]
        for header in headers:
            if header not in present:
                raise InputError(f"{name} has no column '{header}': {did_you_mean(header, present)}")
        return headers
