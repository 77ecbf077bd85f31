"""Logs of continual pre-training, read for the critical mixture ratio.

A log has one row per evaluation: the share of domain data, the tokens so far, the losses on held-out general and
domain text. Read, each becomes two rows, one per loss, with the loss of the same model before continual pre-training
beside it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from lossmith.errors import InputError
from lossmith.laws.tables import PARAMS, TOKENS, Column, Reading, Table, read_table
from lossmith.laws.terms import Array

RATIO = Column(
    "ratio", ("R", "domain_ratio", "domain_share", "mixture_ratio", "share"), what="share of domain tokens, 0 to 1"
)
# No size is too small: nothing here depends on the unit of tokens.
CPT_TOKENS = Column("tokens", ("T", *TOKENS.aliases[1:]), what="tokens of continual pre-training")
GENERAL = Column("general_loss", ("loss_general", "eval/general/loss", "L_gen"), what="loss on held-out general text")
DOMAIN = Column("domain_loss", ("loss_domain", "eval/domain/loss", "L_dom"), what="loss on held-out domain text")
BASE_GENERAL = Column("base_general", ("base_general_loss", "general_loss_before"), optional=True)
BASE_DOMAIN = Column("base_domain", ("base_domain_loss", "domain_loss_before"), optional=True)
SIZE = dataclasses.replace(PARAMS, optional=True)
RATE = Column("learning_rate", ("lr",), optional=True)
#: What a log may hold.
LOG = (RATIO, CPT_TOKENS, GENERAL, DOMAIN, BASE_GENERAL, BASE_DOMAIN, SIZE, RATE)

# Free parameters of general loss over tokens are five.
FEWEST_POINTS, FEWEST_RATIOS = 8, 3
_FACTORS = {"bits": np.log(2)}


@dataclass(frozen=True, slots=True)
class Size:
    """One model's continual pre-training.

    Attributes:
        params: its number of parameters; 0 where the log does not say.
        ratios: shares of domain data tried, increasing.
        tokens: budget that all of them have reached.
        first: tokens at the first evaluation.
        base_general, base_domain: losses before (mean over runs).
    """

    params: float
    ratios: tuple[float, ...]
    tokens: float
    first: float
    base_general: float
    base_domain: float

    @property
    def mixed(self) -> np.ndarray:
        """Which shares the laws of general loss over the share are fitted to.

        Those between 0 and 1, as the paper prefers: without any replay a model forgets far more than a power law of the
        share can follow. Share 1 is used where fewer than 3 others are there.
        """
        ratios = np.array(self.ratios)
        between = (ratios > 0) & (ratios < 1)
        return between if between.sum() >= FEWEST_RATIOS else ratios > 0


def read_log(source: Any, reading: Reading, base_general: float | None, base_domain: float | None) -> Table:
    """Read a log; rows beyond the budget that every share has reached are dropped, with a note.

    The columns are ``ratio``, ``tokens``, ``domain`` (1 for domain loss, 0 for general loss), ``params``, ``base``
    and ``loss``, the target. Losses before continual pre-training come from the arguments, from the columns
    ``base_general`` and ``base_domain``, or from rows with 0 tokens.

    Raises:
        InputError: a share outside [0, 1], negative tokens, losses that are not positive, too few shares or
        evaluations,
            losses before that are not known, learning rates that differ between shares.
    """
    if isinstance(source, Table):
        return source
    wide = read_table(source, LOG, GENERAL.name, reading)
    columns = {name: values.copy() for name, values in wide.columns.items()}
    name, notes = wide.source, list(wide.notes)
    _check_values(columns, name)
    _to_nats(columns, reading.unit, name, notes)
    columns.setdefault(SIZE.name, np.zeros(len(wide)))
    runs = _labels(wide.runs, columns)
    before = {
        GENERAL.name: _before(columns, runs, GENERAL, BASE_GENERAL, base_general, name),
        DOMAIN.name: _before(columns, runs, DOMAIN, BASE_DOMAIN, base_domain, name),
    }
    _check_schedule(columns, name, notes)
    kept = (columns[CPT_TOKENS.name] > 0) & _within_budget(columns, name, notes)
    parts = []
    for number, column in enumerate((GENERAL.name, DOMAIN.name)):
        parts.append(
            {
                "ratio": columns[RATIO.name][kept],
                "tokens": columns[CPT_TOKENS.name][kept],
                "domain": np.full(int(kept.sum()), float(number)),
                "params": columns[SIZE.name][kept],
                "base": before[column][kept],
                "loss": columns[column][kept],
            }
        )
    joined = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    return Table(joined, "loss", np.tile(runs[kept], 2), tuple(notes), name)


def sizes_of(table: Table) -> tuple[Size, ...]:
    """The models of a table that :func:`read_log` made.

    Raises:
        InputError: one has too few shares, or a share too few evaluations.
    """
    columns = table.columns
    found = []
    for params in np.unique(columns["params"]):
        rows = columns["params"] == params
        what = f"{table.source}{f', model of {params:.4g} parameters' if params else ''}"
        ratios = np.unique(columns["ratio"][rows])
        if (number := int((ratios > 0).sum())) < FEWEST_RATIOS:
            raise InputError(
                f"{what} has {number} share{'s' * (number != 1)} of domain data above 0 "
                f"({', '.join(f'{r:g}' for r in ratios)}); law critical-mixture needs at least {FEWEST_RATIOS}"
            )
        for ratio in ratios:
            points = len(np.unique(columns["tokens"][rows & (columns["ratio"] == ratio)]))
            if points < FEWEST_POINTS:
                raise InputError(
                    f"{what} has {points} evaluation{'s' * (points != 1)} at share {ratio:g}; the curve of general "
                    f"loss needs at least {FEWEST_POINTS}"
                )
        tokens = columns["tokens"][rows]
        reached = min(tokens[columns["ratio"][rows] == ratio].max() for ratio in ratios)
        general, domain = (columns["base"][rows & (columns["domain"] == part)].mean() for part in (0, 1))
        found.append(
            Size(
                float(params),
                tuple(ratios.tolist()),
                float(reached),
                float(tokens.min()),
                float(general),
                float(domain),
            )
        )
    return tuple(found)


def _check_values(columns: dict[str, Array], name: str) -> None:
    ratio = columns[RATIO.name]
    if ((ratio < 0) | (ratio > 1)).any():
        wrong = ratio[(ratio < 0) | (ratio > 1)][0]
        percent = "; are they percentages? Then say scale ratio=0.01" if 1 < ratio.max() <= 100 else ""
        raise InputError(f"{name}: ratio must lie between 0 and 1, got {wrong:g}{percent}")
    if (columns[CPT_TOKENS.name] < 0).any():
        raise InputError(f"{name}: tokens must not be negative, got {columns[CPT_TOKENS.name].min():g}")
    for column in (GENERAL, DOMAIN, BASE_GENERAL, BASE_DOMAIN):
        if column.name in columns and (columns[column.name] <= 0).any():
            raise InputError(f"{name}: {column.name} must be positive, got {columns[column.name].min():g}")
    if SIZE.name in columns and (columns[SIZE.name] <= 0).any():
        raise InputError(f"{name}: params must be positive, got {columns[SIZE.name].min():g}")


def _to_nats(columns: dict[str, Array], unit: str | None, name: str, notes: list[str]) -> None:
    losses = [c.name for c in (GENERAL, DOMAIN, BASE_GENERAL, BASE_DOMAIN) if c.name in columns]
    if unit is None and (highest := max(columns[loss].max() for loss in losses)) > 20:
        raise InputError(
            f"{name}: a loss reaches {highest:g}, too much for nats: is it a perplexity? Then say unit perplexity; "
            "else unit nats"
        )
    for loss in losses:
        if unit == "perplexity":
            if (columns[loss] <= 1).any():
                raise InputError(
                    f"{name}: {loss} is said to be a perplexity, but holds {columns[loss].min():g}, not above 1"
                )
            columns[loss] = np.log(columns[loss])
        columns[loss] = columns[loss] * _FACTORS.get(unit or "", 1.0)
    if unit in ("bits", "perplexity"):
        notes.append(f"losses read as {unit}; tolerance and results are in nats")


def _labels(runs: np.ndarray, columns: dict[str, Array]) -> np.ndarray:
    """A run's label; without one, each share of each size is one run."""
    if not all(str(run).startswith("row ") for run in runs) and len(set(runs)) > len(np.unique(columns[SIZE.name])):
        return runs
    pairs = zip(columns[SIZE.name], columns[RATIO.name], strict=True)
    return np.array([f"{f'{size:.4g}, ' if size else ''}share {ratio:g}" for size, ratio in pairs], dtype=str)


def _before(
    columns: dict[str, Array], runs: np.ndarray, loss: Column, base: Column, given: float | None, name: str
) -> Array:
    """The loss before continual pre-training for every row; never guessed from the first evaluation."""
    if given is not None:
        return np.full(len(runs), given)
    if base.name in columns:
        return columns[base.name]
    start = columns[CPT_TOKENS.name] == 0
    before = np.full(len(runs), np.nan)
    for size in np.unique(columns[SIZE.name]):
        rows = columns[SIZE.name] == size
        # A run's own model where it was evaluated, else the mean of the others: all start from one model.
        before[rows] = columns[loss.name][rows & start].mean() if (rows & start).any() else np.nan
    for run in np.unique(runs):
        own = runs == run
        if (own & start).any():
            before[own] = columns[loss.name][own & start].mean()
    if np.isnan(before).any():
        raise InputError(
            f"{name} does not say what {loss.name} was before continual pre-training: give {base.name} (an option of "
            "the law or a column), or a row with 0 tokens"
        )
    return before


def _check_schedule(columns: dict[str, Array], name: str, notes: list[str]) -> None:
    """An annealed learning rate lowers the loss by itself: shares under different schedules cannot be compared."""
    if RATE.name not in columns:
        return
    schedules: dict[tuple[float, float], tuple[float, float]] = {}
    keys = zip(columns[SIZE.name], columns[CPT_TOKENS.name], strict=True)
    for key, rate, ratio in zip(keys, columns[RATE.name], columns[RATIO.name], strict=True):
        other, first = schedules.setdefault(key, (rate, ratio))
        if abs(rate - other) > 1e-3 * abs(other):
            raise InputError(
                f"{name}: at {key[1]:g} tokens the learning rate is {other:g} for share {first:g} and {rate:g} for "
                f"share {ratio:g}; all shares must be trained under one schedule"
            )
    settled = columns[CPT_TOKENS.name] > 0.1 * columns[CPT_TOKENS.name].max()
    rates = columns[RATE.name][settled]
    if len(rates) and rates.min() < 0.99 * rates.max():
        notes.append("the learning rate is not constant: its decay lowers losses by itself, and moves the turns")


def _within_budget(columns: dict[str, Array], name: str, notes: list[str]) -> np.ndarray:
    kept = np.ones(len(columns[RATIO.name]), dtype=bool)
    for size in np.unique(columns[SIZE.name]):
        rows = columns[SIZE.name] == size
        ends = {
            ratio: columns[CPT_TOKENS.name][rows & (columns[RATIO.name] == ratio)].max()
            for ratio in columns[RATIO.name][rows]
        }
        budget = min(ends.values())
        # Rows of a corpus differ in length: a percent is no further training.
        beyond = rows & (columns[CPT_TOKENS.name] > 1.01 * budget)
        if beyond.any():
            shortest = min(ends, key=lambda ratio: ends[ratio])
            notes.append(
                f"{int(beyond.sum())} rows beyond {budget:.4g} tokens dropped: share {shortest:g} was not trained "
                "further"
            )
        kept &= ~beyond
    return kept
