r"""Estimating a law from small models: which measurements to fit, and how far off the prediction of the large one is.

.. math:: \mathrm{ARE} = \frac{1}{n} \sum_i \frac{|L_i - \hat L_i|}{L_i}
    \qquad\text{over the last 30 \% of the target's training}

Choshen, Zhang and Andreas, "A Hitchhiker's Guide to Scaling Law Estimation", 2024, arXiv 2410.11840. A *family* is a
table of models that differ in size and tokens only; its *target* is the largest of them. The others are fitted, the
target is predicted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from lossmith.errors import InputError
from lossmith.laws.batches import fit_many
from lossmith.laws.chinchilla import Chinchilla
from lossmith.laws.fitted import Fitted
from lossmith.laws.fitting import SQUARES
from lossmith.laws.law import Law
from lossmith.laws.sources import read_frame
from lossmith.laws.tables import LOSS, PARAMS, TOKENS, Reading, Table, read_table
from lossmith.laws.terms import Array

#: Choshen et al. 2024: the first 10 billion tokens are not fitted.
MIN_TOKENS = 1e10
# Of the largest run, where it is too short for that: past warm-up and the first fast fall.
_MIN_SHARE = 0.04


@dataclass(frozen=True, slots=True)
class Protocol:
    """Which measurements are fitted, and by what.

    Attributes:
        law: what is fitted; by default Chinchilla's with least squares on the loss, as in the paper.
        min_tokens: checkpoints with so many tokens or fewer are not fitted; ``None`` is 10 billion, or 4 % of the
            longest run where that is less (ours: the paper's models all train for hundreds of billions); 0 keeps all.
        first: only this first share of every run's training is fitted, to see what less training would have told.
            Measured by each run's own tokens and with the end included (the paper's code measures by the longest run,
            and drops its last checkpoint).
        last: only this last share of every run's training is fitted; 0 keeps end points only.
        models: only so many of the models, by ``choose``; all by default.
        choose: ``"smallest"`` models, or the ``"largest"`` below the target.
        target: what is predicted: the ``"largest"`` model or the ``"smallest"``.
        test_share: last share of the target's training that is predicted.
    """

    law: Law = field(default_factory=lambda: Chinchilla(objective=SQUARES))
    min_tokens: float | None = None
    first: float = 1.0
    last: float = 1.0
    models: int | None = None
    choose: Literal["smallest", "largest"] = "smallest"
    target: Literal["largest", "smallest"] = "largest"
    test_share: float = 0.3

    def __post_init__(self) -> None:
        if not 0 < self.first <= 1:
            raise ValueError(f"first must lie in (0, 1], got {self.first}")
        if not 0 <= self.last <= 1:
            raise ValueError(f"last must lie in [0, 1], got {self.last}")
        if not 0 < self.test_share <= 1:
            raise ValueError(f"test_share must lie in (0, 1], got {self.test_share}")
        if self.models is not None and self.models < 1:
            raise ValueError(f"models must be at least 1, got {self.models}")
        if self.min_tokens is not None and not self.min_tokens >= 0:
            raise ValueError(f"min_tokens must not be negative, got {self.min_tokens}")
        for name, value in (("target", self.target), ("choose", self.choose)):
            if value not in ("largest", "smallest"):
                raise ValueError(f"{name} must be 'largest' or 'smallest', got {value!r}")

    def cut(self, table: Table) -> float:
        """The number of tokens up to which nothing is fitted."""
        if self.min_tokens is not None:
            return self.min_tokens
        return min(MIN_TOKENS, _MIN_SHARE * float(table.columns["tokens"].max()))


@dataclass(frozen=True, slots=True)
class Estimate:
    """A law estimated from small models, judged on the target.

    Attributes:
        are: mean absolute relative error over the target's last measurements; NaN where the law could not be fitted.
        mse: mean squared error there.
        best_seen: ARE of the lowest loss among the fitted measurements, which needs no law.
        last_seen: ARE of the mean of the last five points of the largest fitted model.
        models: sizes that were fitted.
        points: measurements that were fitted.
        flops: ``6 params tokens`` of the training that these measurements needed.
        scale_up: target's size over the largest fitted.
        fitted: the law; ``None`` where it could not be fitted.
        reason: why not.
        first: share of the training that was fitted.
    """

    are: float
    mse: float
    best_seen: float
    last_seen: float
    models: tuple[float, ...]
    points: int
    flops: float
    scale_up: float
    fitted: Fitted | None
    reason: str = ""
    first: float = 1.0


def absolute_relative_error(measured: Any, predicted: Any) -> float:
    """``mean(|measured - predicted| / measured)``; not symmetric.

    >>> round(absolute_relative_error([2.0, 4.0], [2.2, 4.4]), 12)
    0.1
    """
    measured = np.asarray(measured, dtype=np.float64)
    return float((np.abs(measured - np.asarray(predicted, dtype=np.float64)) / measured).mean())


def read_family(source: Any, reading: Reading = Reading()) -> Table:
    """The checkpoints of one family of models, as :func:`lossmith.laws.read_table` reads them."""
    return read_table(source, (PARAMS, TOKENS, LOSS), "loss", reading)


def read_families(source: Any, by: str = "scaled_set", reading: Reading = Reading()) -> dict[str, Table]:
    """The families of a table, told apart by the column ``by``; those of one size, which have no target, are left out.

    Raises:
        InputError: no such column.
    """
    name, frame = read_frame(source)
    if by not in frame.columns:
        there = ", ".join(map(str, frame.columns))
        raise InputError(f"{name} has no column '{by}' to tell families apart; its columns are: {there}")
    found = {}
    for value in sorted(map(str, frame[by].dropna().unique())):
        table = read_family(frame, dataclasses.replace(reading, where={**reading.where, by: value}))
        if len(np.unique(table.columns["params"])) > 1:
            found[value] = table
    return found


def split_family(table: Table, protocol: Protocol = Protocol()) -> tuple[Table, Table]:
    """What is fitted, and what is predicted: the last part of the target's training.

    Raises:
        InputError: one size only, or nothing left to fit.
    """
    size, tokens = table.columns["params"], table.columns["tokens"]
    sizes = np.unique(size)
    if len(sizes) < 2:
        raise InputError(
            f"{table.source} holds one size of model ({sizes[0]:.3g} parameters); a family has at least two, of which "
            "the largest is predicted"
        )
    goal = sizes[-1] if protocol.target == "largest" else sizes[0]
    target = (size == goal) & (tokens >= (1 - protocol.test_share) * tokens[size == goal].max())
    others = sizes[sizes != goal]
    if protocol.models is not None:
        take_small = protocol.choose == "smallest"
        others = others[: protocol.models] if take_small else others[-protocol.models :]
    own_end = _end_of_run(table)
    kept = np.isin(size, others) & (tokens <= protocol.first * own_end)
    cut = protocol.cut(table)
    if kept.any() and not (kept & (tokens > cut)).any():
        raise InputError(
            f"min_tokens={cut:g} removes all {int(kept.sum())} rows that would be fitted; the largest has "
            f"{tokens[kept].max():.3g} tokens"
        )
    kept &= tokens > cut
    if protocol.last < 1:
        # The end of what is left, so that "first" and "last" can be combined.
        kept &= tokens >= (1 - protocol.last) * _end_of_run(table, kept)
    if not kept.any():
        raise InputError(f"no measurement of {table.source} lies in the first {100 * protocol.first:g}% of its run")
    return table.select(kept), table.select(target)


def estimate(source: Any, protocol: Protocol = Protocol(), *, reading: Reading = Reading()) -> Estimate:
    """Fit the small models of a family by a protocol, predict the target, and compare.

    Args:
        source: a family, as for :func:`lossmith.laws.read_table`.
        protocol: what is fitted.
        reading: units and headers.

    Raises:
        InputError: one size only, or nothing left to fit. What is left but too little for the law gives NaN, and why.

    >>> import numpy as np
    >>> n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e8, 1e10, 5), np.geomspace(5e8, 3e11, 30)))
    >>> loss = 1.7 + 400 * n**-0.34 + 1500 * d**-0.33
    >>> found = estimate({"params": n, "tokens": d, "loss": loss})
    >>> found.are < 1e-9, len(found.models), round(found.scale_up, 2)
    (True, 4, 3.16)
    """
    table = read_family(source, reading)
    split_family(table, protocol)
    return estimate_all(table, [protocol])[0]


def estimate_all(table: Table, protocols: Sequence[Protocol]) -> list[Estimate]:
    """:func:`estimate` for several protocols on one family."""
    return estimate_pairs([(table, protocol) for protocol in protocols])


def estimate_pairs(pairs: Sequence[tuple[Table, Protocol]]) -> list[Estimate]:
    """:func:`estimate` for many families and protocols; those with one law share a call of the engine.

    Nothing is raised: where a law cannot be fitted, ``are`` is NaN and ``reason`` says why.
    """
    found: list[Estimate | None] = [None] * len(pairs)
    splits: dict[int, tuple[Table, Table]] = {}
    groups: dict[str, list[int]] = {}
    for i, (table, protocol) in enumerate(pairs):
        try:
            splits[i] = split_family(table, protocol)
            protocol.law.check(splits[i][0])
        except InputError as error:
            found[i] = _judge(*splits[i], None, str(error), protocol) if i in splits else _nothing(str(error), protocol)
        else:
            groups.setdefault(repr(protocol.law), []).append(i)
    for members in groups.values():
        law = pairs[members[0]][1].law
        for i, fitted in zip(members, fit_many(law, [splits[i][0] for i in members], bootstrap=0), strict=True):
            found[i] = _judge(*splits[i], fitted, "", pairs[i][1])
    return [one for one in found if one is not None]


def estimation_grid(
    source: Any,
    *,
    shares: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 1.0),
    models: Sequence[int] | None = None,
    protocol: Protocol = Protocol(),
    reading: Reading = Reading(),
) -> list[Estimate]:
    """ARE by how many models are trained and how far: what an estimate of a given cost is worth.

    Args:
        source: a family.
        shares: first shares of the training.
        models: numbers of models, from the smallest; by default 2 up to all.
        protocol: the rest.
        reading: units and headers.

    Returns:
        One estimate for each pair, by models, then shares; where nothing can be fitted, ``are`` is NaN with the reason.
    """
    table = read_family(source, reading)
    available = len(np.unique(table.columns["params"])) - 1
    numbers = list(models) if models is not None else steps_of_models(available)
    for number in numbers:
        if not 1 <= number <= available:
            raise InputError(f"models must lie between 1 and {available} (all but the target), got {number}")
    wanted = [dataclasses.replace(protocol, models=k, first=p) for k in numbers for p in shares]
    return estimate_all(table, wanted)


def steps_of_models(available: int) -> list[int]:
    """2, 3, ... up to ``available``; in steps of 10 above 60, of a fifth above 20, as in the paper's code."""
    if available < 2:
        return [available] if available else []
    step = 10 if available > 60 else available // 5 if available > 20 else 1
    numbers = list(range(2, available + 1, step))
    return numbers if numbers[-1] == available else [*numbers, available]


def leave_one_out(source: Any, protocol: Protocol = Protocol(), *, reading: Reading = Reading()) -> dict[float, float]:
    """ARE without each fitted model, by its size.

    The paper's finding is that this does **not** tell which model does harm: removing the one that fits the others
    worst gave the worst prediction in 58 % of cases. It shows how much rests on one model, no more.
    """
    table = read_family(source, reading)
    own, _ = split_family(table, protocol)
    found = {}
    for size in np.unique(own.columns["params"]):
        rest = table.select(table.columns["params"] != size)
        found[float(size)] = estimate_all(rest, [protocol])[0].are
    return found


def _judge(own: Table, target: Table, fitted: Fitted | None, reason: str, protocol: Protocol) -> Estimate:
    measured = target.columns["loss"]
    size, tokens, loss = own.columns["params"], own.columns["tokens"], own.columns["loss"]
    largest = size == size.max()
    ends = loss[largest][np.argsort(tokens[largest], kind="stable")][-5:]
    spent = sum(6 * s * tokens[size == s].max() for s in np.unique(size))
    predicted = np.full(len(measured), np.nan)
    if fitted is not None:
        wanted = [column.name for column in fitted.law.needed if column.name != fitted.law.target]
        predicted = fitted.predict(**{name: target.columns[name] for name in wanted})
    return Estimate(
        are=absolute_relative_error(measured, predicted),
        mse=float(((measured - predicted) ** 2).mean()),
        best_seen=absolute_relative_error(measured, loss.min()),
        last_seen=absolute_relative_error(measured, ends.mean()),
        models=tuple(np.unique(size).tolist()),
        points=len(own),
        flops=float(spent),
        scale_up=float(target.columns["params"].max() / size.max()),
        fitted=fitted,
        reason=reason,
        first=protocol.first,
    )


def _nothing(reason: str, protocol: Protocol) -> Estimate:
    nan = float("nan")
    return Estimate(nan, nan, nan, nan, (), 0, 0.0, nan, None, reason, protocol.first)


def _end_of_run(table: Table, rows: np.ndarray | None = None) -> Array:
    """Most tokens of each row's run, among ``rows``."""
    kept = np.ones(len(table), dtype=bool) if rows is None else rows
    _, codes = np.unique(table.runs, return_inverse=True)
    most = np.zeros(codes.max() + 1)
    np.maximum.at(most, codes[kept], table.columns["tokens"][kept])
    return most[codes]
