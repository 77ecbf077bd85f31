"""What a comparison measured: the record that tables, plots and the HTML report are made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Direction = Literal["lower", "higher", "equal"]
Verdict = Literal["supported", "not supported", "inconclusive"]
Standing = Literal["better", "worse", "not told apart", "no interval", "failed"]


@dataclass(frozen=True, slots=True)
class Cost:
    """What one run spent; every pass over data counts, also those that only score."""

    tokens: int = 0
    steps: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    peak_memory_bytes: int = 0
    scored_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Curve:
    """One measured quantity along a run; the lists have equal lengths."""

    steps: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    seconds: tuple[float, ...] = ()
    values: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Run:
    """One arm under one seed; ``metrics`` are final values by name (``eval/loss``, ``eval/accuracy``)."""

    arm: str
    seed: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)
    train: Curve = field(default_factory=Curve)
    evaluation: Curve = field(default_factory=Curve)
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """A paired difference with a direction: ``metric`` of ``arm`` against that of ``against``.

    ``direction="lower"`` with ``margin=0.5`` claims ``arm <= against - 0.5``; with ``ratio=0.25`` (margin
    must be 0) it claims ``arm <= 0.25 * against``. ``"higher"`` likewise the other way. ``"equal"`` claims
    that the difference lies inside ``±margin``.
    """

    text: str
    arm: str
    metric: str
    direction: Direction = "lower"
    against: str | None = None
    margin: float = 0.0
    ratio: float = 1.0


@dataclass(frozen=True, slots=True)
class ForecastPoint:
    """The loss predicted at ``times`` the budget, ``tokens`` in all, with its interval."""

    times: float
    tokens: int
    loss: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a law, fitted to an arm's runs, predicts further out, and how well it did within them.

    ``missed`` is the mean relative error over the rest of the runs of the law fitted to their ``first`` part alone,
    ``missed_at_end`` the same at their end, with its sign; ``held`` the share of the rest that its intervals held.
    ``reason`` says why there is no forecast.
    """

    arm: str
    points: tuple[ForecastPoint, ...] = ()
    first: float = float("nan")
    missed: float = float("nan")
    missed_at_end: float = float("nan")
    held: float = float("nan")
    level: float = 0.9
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Arms, runs and what to judge them by. ``against=None`` in a claim means ``baseline``.

    ``arms`` maps each arm's name to its one-line description, in the order to show; ``metric`` is the name of
    the primary metric and ``metrics`` the names of all to show in the table, the primary first.
    ``lower_is_better`` speaks of the primary metric; ``better`` says the same of the others by name, and one
    that it does not name gets an interval but is never called better or worse. ``forecasts`` speak of the primary
    metric.
    """

    title: str
    question: str
    arms: Mapping[str, str]
    baseline: str
    metric: str
    metrics: tuple[str, ...]
    runs: tuple[Run, ...]
    lower_is_better: bool = True
    claims: tuple[Claim, ...] = ()
    level: float = 0.95
    configuration: Mapping[str, object] = field(default_factory=dict)
    environment: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    paper: str = ""
    better: Mapping[str, Literal["lower", "higher"]] = field(default_factory=dict)
    forecasts: tuple[Forecast, ...] = ()
