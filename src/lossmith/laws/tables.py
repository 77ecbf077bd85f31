"""Tables of measured losses: reading them from anywhere, and refusing what cannot be meant.

A table has one row per measurement. What a law calls ``params``, ``tokens`` and ``loss`` is found under the usual names
of others too (``N``, ``num_params``, ``tokens_seen``, ``ppl``, ...), or where the user says.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from lossmith.errors import InputError, did_you_mean
from lossmith.laws.sources import read_frame
from lossmith.laws.terms import Array

if TYPE_CHECKING:
    import pandas as pd

_SUFFIX = {"k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
_AMOUNT = re.compile(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([kmbgt]?)\s*", re.IGNORECASE)
UNITS = ("nats", "bits", "perplexity")
# The name under which the readers of curves know it.
_frame = read_frame


@dataclass(frozen=True, slots=True)
class Column:
    """A quantity that a law needs, and the names by which tables call it.

    Attributes:
        name: the law's own name.
        aliases: other headers, compared without case and punctuation.
        kind: ``"count"`` (positive, large: parameters, tokens), ``"loss"`` or ``"number"`` (positive, any size).
        smallest: a count below this is not credible as it stands (billions, or a logarithm).
        what: in words, for messages.
        optional: the law can do without, or derive it.
    """

    name: str
    aliases: tuple[str, ...] = ()
    kind: str = "number"
    smallest: float = 0.0
    what: str = ""
    optional: bool = False


PARAMS = Column(
    "params",
    ("N", "num_params", "parameters", "n_params", "model_size", "model size", "size", "non_embedding_params"),
    "count",
    1000.0,
    "number of parameters",
)
TOKENS = Column(
    "tokens",
    ("D", "tokens_seen", "num_tokens", "num_token", "token_num", "training_tokens", "n_tokens"),
    "count",
    20_000.0,
    "training tokens seen",
)
FLOPS = Column(
    "flops", ("C", "flop", "training_flop", "training_flops", "compute", "total_flos"), "count", 1e6, "FLOPs"
)
LOSS = Column(
    "loss",
    ("L", "eval_loss", "val_loss", "validation_loss", "test_loss", "eval/loss", "perf", "cross_entropy"),
    "loss",
    what="loss in nats per token",
)
_PERPLEXITY = ("ppl", "perplexity")
_RUN = ("run", "model_name", "run_name", "run_id")


@dataclass(frozen=True, slots=True)
class Table:
    """Measurements ready to be fitted.

    Attributes:
        columns: quantities by the law's names, each ``(n,)`` float64.
        target: name of the column that the law predicts.
        runs: label of the run that each row belongs to: rows of one run are not independent.
        notes: what reading did (rows dropped, units changed), one sentence each.
        source: where it comes from.
    """

    columns: Mapping[str, Array]
    target: str
    runs: np.ndarray
    notes: tuple[str, ...] = ()
    source: str = "table"

    def __len__(self) -> int:
        return len(self.columns[self.target])

    def select(self, rows: np.ndarray) -> Table:
        """The rows of a mask or of indices."""
        return Table(
            {k: v[rows] for k, v in self.columns.items()}, self.target, self.runs[rows], self.notes, self.source
        )


@dataclass(frozen=True, slots=True)
class Reading:
    """What the user says about a table.

    Attributes:
        columns: law's name -> header in the table, where the usual names do not do; a number is a constant.
        run: header (or several, joined by ``+``) that names the run of a row; default: ``run``, ``model_name``, or,
            where tokens grow along rows of one size, the size.
        unit: of the loss: ``nats``, ``bits`` or ``perplexity``; default: by the header.
        log10: names whose values are decimal logarithms.
        scale: name -> factor (``tokens=1e9`` for billions); a factor of 1 says that small values are meant.
        above: name -> limit: only rows whose quantity is larger are read (``tokens=1e10`` leaves early training out).
        where: conditions on other columns, ``header -> value``: only such rows are read.
    """

    columns: Mapping[str, str | float] = field(default_factory=dict)
    run: str | None = None
    unit: str | None = None
    log10: tuple[str, ...] = ()
    scale: Mapping[str, float] = field(default_factory=dict)
    above: Mapping[str, float] = field(default_factory=dict)
    where: Mapping[str, Any] = field(default_factory=dict)


def read_table(source: Any, needed: Sequence[Column], target: str = "loss", reading: Reading = Reading()) -> Table:
    """Read measurements.

    Args:
        source: a :class:`Table`, a DataFrame, a mapping of columns, a list of rows, a path of a CSV, TSV, JSON, JSONL
            or Parquet file, or a folder of run records.
        needed: what the law needs; ``tokens`` may be derived from ``flops`` and ``params`` (``D = C / 6N``).
        target: which of them the law predicts.
        reading: what the user says about it.

    Returns:
        Positive, finite float64 columns without repeated rows.

    Raises:
        InputError: a missing column (names what is there), values that are not positive, or of another unit than they
            say, and so on: one sentence each.
    """
    if isinstance(source, Table):
        return source
    name, frame = read_frame(source)
    notes: list[str] = list(frame.attrs.get("notes", ()))
    if reading.where:
        frame = _filtered(frame, reading.where, name)
    if len(frame) == 0:
        raise InputError(f"{name} has no rows")
    known = {column.name for column in needed} | {"flops"}
    for option, names in (
        ("log10", reading.log10),
        ("scale", reading.scale),
        ("columns", reading.columns),
        ("above", reading.above),
    ):
        for wrong in set(names) - known:
            raise InputError(f"{option} names '{wrong}', which the law does not use: {did_you_mean(wrong, known)}")
    if reading.unit is not None and reading.unit not in UNITS:
        raise InputError(f"unit must be {', '.join(UNITS)}, got '{reading.unit}'")
    headers = {column.name: _header(column, frame, reading, name) for column in needed}
    frame = _drop_incomplete(frame, [h for h in headers.values() if isinstance(h, str)], notes, name)
    values: dict[str, Array] = {}
    for column in needed:
        header = headers[column.name]
        if header is None:
            continue
        if isinstance(header, float):
            values[column.name] = np.full(len(frame), header)
        else:
            values[column.name] = _numbers(frame, header, column, reading, notes, name)
    if "tokens" in headers and "tokens" not in values:
        values["tokens"] = _derived_tokens(frame, values, reading, notes, name)
    for column in needed:
        if column.name not in values and not column.optional:
            raise InputError(_missing(column, frame, name))
    _check_ratio(values, reading, name)
    runs = _runs(frame, values, reading, name, notes)
    table = _above(Table(values, target, runs, tuple(notes), name), reading.above)
    return _without_repeats(table)


def _filtered(frame: pd.DataFrame, where: Mapping[str, Any], name: str) -> pd.DataFrame:
    for header, value in where.items():
        if header not in frame.columns:
            raise InputError(f"{name} has no column '{header}': {did_you_mean(header, map(str, frame.columns))}")
        kept = frame[frame[header].astype(str) == str(value)]
        if len(kept) == 0:
            present = ", ".join(sorted(set(frame[header].astype(str)))[:12])
            raise InputError(f"{name} has no row where {header} is {value}; there are {present}")
        frame = kept
    return frame.reset_index(drop=True)


def _plain(header: object) -> str:
    return re.sub(r"[^a-z0-9]", "", str(header).lower())


def _header(column: Column, frame: pd.DataFrame, reading: Reading, name: str) -> str | float | None:
    """Where a column is: what the user says, its own name, or an alias."""
    if column.name in reading.columns:
        said = reading.columns[column.name]
        if isinstance(said, int | float):
            return float(said)
        if said not in frame.columns:
            try:
                return float(said)
            except ValueError:
                pass
            raise InputError(f"{name} has no column '{said}': {did_you_mean(said, map(str, frame.columns))}")
        return said
    aliases = (column.name, *column.aliases, *(_PERPLEXITY if column.kind == "loss" else ()))
    by_plain: dict[str, list[str]] = {}
    for header in frame.columns:
        by_plain.setdefault(_plain(header), []).append(str(header))
    found = [header for alias in aliases for header in by_plain.get(_plain(alias), ())]
    if not found and column.kind == "loss":
        found = [str(h) for h in frame.columns if _plain(h).endswith("loss")]
        if len(found) > 1:
            raise InputError(
                f"{name} has several losses ({', '.join(found)}); say which is meant: {column.name}=HEADER"
            )
    return found[0] if found else None


def _missing(column: Column, frame: pd.DataFrame, name: str) -> str:
    there = ", ".join(map(str, frame.columns))
    return (
        f"{name} has no column for '{column.name}' ({column.what or 'needed by the law'}); its columns are: {there}; "
        f"say which one it is, or give a number for all rows"
    )


def _drop_incomplete(frame: pd.DataFrame, headers: list[str], notes: list[str], name: str) -> pd.DataFrame:
    import pandas as pd

    whole = frame[headers].notna().all(axis=1) if headers else pd.Series(True, index=frame.index)
    dropped = int((~whole).sum())
    if dropped == len(frame):
        raise InputError(f"every row of {name} lacks a value in one of {', '.join(headers)}")
    if dropped:
        notes.append(f"{dropped} of {len(frame)} rows dropped: a value is missing or NaN")
    return frame[whole].reset_index(drop=True)


def _numbers(frame: pd.DataFrame, header: str, column: Column, reading: Reading, notes: list[str], name: str) -> Array:
    values = np.array([amount(value) for value in frame[header]], dtype=np.float64)
    if np.isnan(values).any():
        row = int(np.flatnonzero(np.isnan(values))[0])
        raise InputError(f"{name}, row {row + 1}: '{frame[header].iloc[row]}' in column '{header}' is not a number")
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values))[0])
        raise InputError(f"{name}, row {row + 1}: column '{header}' is infinite")
    if column.name in reading.log10:
        if values.max() > 40:
            raise InputError(f"{name}: column '{header}' is said to be log10, but holds {values.max():g}")
        values = 10.0**values
        notes.append(f"'{header}' read as log10")
    values = values * reading.scale.get(column.name, 1.0)
    wrong = values <= 0
    if column.kind in ("count", "loss") and wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise InputError(
            f"{name}: {int(wrong.sum())} values of '{header}' are not positive "
            f"(row {row + 1}: {values[row]:g}); {column.what or column.name} must be"
        )
    declared = column.name in reading.log10 or column.name in reading.scale
    if column.kind == "count" and not declared and values.max() < column.smallest:
        raise InputError(_wrong_unit(values, header, column, name))
    if column.kind == "loss":
        values = _in_nats(values, header, reading.unit, notes, name)
    return values


def amount(value: Any) -> float:
    """A number, also written ``125m`` or ``1.3b``; NaN where it is none."""
    if isinstance(value, str):
        match = _AMOUNT.fullmatch(value.replace(",", "").replace("_", ""))
        return float(match[1]) * _SUFFIX.get(match[2].lower(), 1.0) if match else float("nan")
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def _wrong_unit(values: Array, header: str, column: Column, name: str) -> str:
    low, high = values.min(), values.max()
    # Powers of ten between a thousand and a hundred quintillion.
    logs = low >= 3 and high <= 22 and high - low < 8
    guess = (
        f"they look like log10 (then say log10 {column.name})"
        if logs
        else f"they look like millions or billions (then say scale {column.name}=1e9)"
    )
    return (
        f"{name}: '{header}' lies between {low:g} and {high:g}, too small for {column.what}: {guess}; "
        f"if they are meant so, say scale {column.name}=1"
    )


def _check_ratio(values: Mapping[str, Array], reading: Reading, name: str) -> None:
    """Millions or billions in one column and plain numbers in the other."""
    said = {"params", "tokens"} & {*reading.scale, *reading.log10}
    if said or "params" not in values or "tokens" not in values:
        return
    ratio = float(np.median(values["tokens"] / values["params"]))
    if not 1e-4 <= ratio <= 1e6:
        small = "params" if ratio > 1 else "tokens"
        raise InputError(
            f"{name}: there are {ratio:.2g} tokens per parameter, which cannot be; is '{small}' in millions or "
            f"billions (then say scale {small}=1e6 or 1e9)? If they are meant so, say scale {small}=1"
        )


def _in_nats(values: Array, header: str, unit: str | None, notes: list[str], name: str) -> Array:
    if unit is None and _plain(header) in _PERPLEXITY:
        unit = "perplexity"
        notes.append(f"'{header}' read as perplexity: its logarithm, in nats, is fitted")
    if unit is None and values.max() > 20:
        raise InputError(
            f"{name}: '{header}' reaches {values.max():g}, too much for a loss in nats: is it a perplexity? "
            "Then say unit perplexity; else unit nats"
        )
    if unit == "perplexity":
        if (values <= 1).any():
            raise InputError(f"{name}: '{header}' is said to be a perplexity, but holds {values.min():g}, not above 1")
        return np.log(values)
    return values * np.log(2) if unit == "bits" else values


def _derived_tokens(
    frame: pd.DataFrame, values: Mapping[str, Array], reading: Reading, notes: list[str], name: str
) -> Array:
    header = _header(FLOPS, frame, reading, name)
    if header is None or "params" not in values:
        raise InputError(_missing(TOKENS, frame, name))
    flops = (
        np.full(len(frame), header)
        if isinstance(header, float)
        else _numbers(frame, header, FLOPS, reading, notes, name)
    )
    notes.append(f"tokens computed as {header} / (6 params)")
    return flops / (6 * values["params"])


def _runs(
    frame: pd.DataFrame, values: Mapping[str, Array], reading: Reading, name: str, notes: list[str]
) -> np.ndarray:
    if reading.run is not None:
        parts = [part.strip() for part in reading.run.split("+")]
        for part in parts:
            if part not in frame.columns:
                raise InputError(
                    f"{name} has no column '{part}' for runs: {did_you_mean(part, map(str, frame.columns))}"
                )
        return np.array([" ".join(map(str, row)) for row in frame[parts].itertuples(index=False)], dtype=str)
    present = {_plain(header): header for header in frame.columns}
    sizes = values.get("params")
    for alias in _RUN:
        if (found := present.get(_plain(alias))) is not None:
            labels = frame[found].astype(str).to_numpy(dtype=str)
            # One name for a family of sizes: a run is a size of it.
            if sizes is not None and len(set(labels)) < len(set(zip(labels, sizes, strict=True))):
                labels = np.array([f"{a} {b:.4g}" for a, b in zip(labels, sizes, strict=True)], dtype=str)
            return labels
    if sizes is not None and "tokens" in values and len(np.unique(sizes)) < len(sizes) / 4:
        # Many rows per size: checkpoints of one run.
        notes.append("rows of one size are taken for checkpoints of one run; if they are not, say run")
        return np.array([f"{size:.4g}" for size in sizes], dtype=str)
    return np.array([f"row {i + 1}" for i in range(len(frame))], dtype=str)


def _above(table: Table, limits: Mapping[str, float]) -> Table:
    for name, limit in limits.items():
        kept = table.columns[name] > limit
        if not kept.any():
            raise InputError(
                f"above {name}={limit:g} removes all {len(table)} rows of {table.source}; the largest is "
                f"{table.columns[name].max():.3g}"
            )
        note = f"{int((~kept).sum())} of {len(table)} rows left out: {name} not above {limit:g}"
        chosen = table.select(kept)
        table = Table(chosen.columns, chosen.target, chosen.runs, (*table.notes, note), table.source)
    return table


def _without_repeats(table: Table) -> Table:
    """Drop rows that repeat another in every number (a row number is no run of its own)."""
    stacked = np.stack(list(table.columns.values()), -1)
    labels = np.array([("" if run.startswith("row ") else run) for run in table.runs])
    _, codes = np.unique(labels, return_inverse=True)
    _, first = np.unique(np.column_stack([stacked, codes]), axis=0, return_index=True)
    if len(first) == len(table):
        return table
    kept = table.select(np.sort(first))
    dropped = len(table) - len(kept)
    return Table(
        kept.columns, kept.target, kept.runs, (*kept.notes, f"{dropped} rows dropped: they repeat others"), kept.source
    )
