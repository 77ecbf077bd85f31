"""The cells of the tables as text, the same for terminal, Markdown and HTML."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from lossmith.reporting.formatting import (
    NONE,
    count,
    interval_text,
    memory,
    number,
    one_line,
    p_text,
    relative,
    seconds,
)
from lossmith.reporting.table import ArmSummary, ClaimSummary, ComparisonTable, MetricSummary


@dataclass(frozen=True, slots=True)
class Column:
    """A heading; numeric columns are set flush right."""

    name: str
    numeric: bool = False


@dataclass(frozen=True, slots=True)
class Grid:
    """A titled table of text; every row has as many cells as there are columns, the first naming the row."""

    kind: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]


def grids(table: ComparisonTable) -> tuple[Grid, ...]:
    """One for each metric (the primary first), then cost, forecasts and claims; those without rows are left out."""
    metrics = [metric(table, index) for index in range(len(table.arms[0].metrics))]
    return tuple(grid for grid in (*metrics, cost(table), forecasts(table), claims(table)) if grid.rows)


def metric(table: ComparisonTable, index: int = 0) -> Grid:
    """One metric of every arm; the primary one (``index=0``) also has the cost flags."""
    name = table.arms[0].metrics[index].name
    columns = [
        Column("arm"),
        Column("seeds", True),
        Column("mean ± sd", True),
        Column("difference", True),
        Column(f"{100 * table.level:.10g}% interval", True),
        Column("p", True),
        Column("standing"),
    ]
    rows = []
    for arm in table.arms:
        own = arm.metrics[index]
        seeds = str(own.n) if own.n == arm.n_runs else f"{own.n} of {arm.n_runs}"
        row = [label(arm.name), seeds, mean_text(own), *_difference(own), standing_text(arm, own)]
        if index == 0:
            row.append("unequal †" if arm.flags else "equal" if arm.cost.n and not arm.is_baseline else NONE)
        rows.append(tuple(row))
    if index == 0:
        columns.append(Column("cost"))
    better = {True: " (lower is better)", False: " (higher is better)", None: ""}[
        table.arms[0].metrics[index].lower_is_better
    ]
    return Grid("result" if index == 0 else "metric", f"{name}{better}", tuple(columns), tuple(rows))


def cost(table: ComparisonTable) -> Grid:
    """Mean cost of the finished runs, with the difference to the baseline; a dash was not measured."""
    shown: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("tokens", "tokens", count),
        ("steps", "steps", count),
        ("scored_tokens", "scored", count),
        ("flops", "compute", lambda value: count(value, "FLOP")),
        ("seconds", "time", seconds),
        ("peak_memory_bytes", "memory", memory),
    )
    columns = (Column("arm"), *(Column(name, True) for _, name, _ in shown))
    rows = []
    for arm in table.arms:
        if arm.cost.n:
            marks = {d.quantity: f" ({relative(d.relative)})" for d in arm.cost_differences}
            values = [text(getattr(arm.cost, field)) + marks.get(field, "") for field, _, text in shown]
            rows.append((label(arm.name), *values))
    return Grid("cost", "Cost per run (mean of the finished runs)", columns, tuple(rows))


def claims(table: ComparisonTable) -> Grid:
    """Claims with their verdicts."""
    columns = (Column("claim"), Column("contrast"), Column("interval", True), Column("verdict"))
    rows = tuple(
        (
            label(claim.claim.text),
            contrast_text(claim),
            interval_text(claim.interval.low, claim.interval.high),
            claim.verdict + (" †" if claim.flags else ""),
        )
        for claim in table.claims
    )
    n = len(table.claims)
    corrected = f", corrected for {n} claims" if n > 1 else ""
    title = f"Claims, judged by paired contrasts ({100 * table.level:.10g}% level{corrected})"
    return Grid("claims", title, columns, rows)


def forecasts(table: ComparisonTable) -> Grid:
    """The loss that a law predicts at larger budgets, and by how much it missed the end of these runs."""
    times = list(dict.fromkeys(point.times for found in table.forecasts for point in found.points))
    columns = (Column("arm"), *(Column(f"{t:g}x", True) for t in times), Column("missed by", True))
    rows = []
    for found in table.forecasts:
        at = {point.times: point for point in found.points}
        if not at:
            # Footnotes say why.
            rows.append((label(found.arm), *[NONE] * (len(times) + 1)))
            continue
        texts = []
        for t in times:
            spread = (at[t].high - at[t].low) / 2
            loss, low, high = (number(value, spread) for value in (at[t].loss, at[t].low, at[t].high))
            texts.append(f"{loss} [{low}, {high}]")
        rows.append((label(found.arm), *texts, f"{100 * found.missed:.2g}%"))
    level = f", {100 * table.forecasts[0].level:g}% intervals" if table.forecasts else ""
    title = f"Further out: {table.metric} predicted by the annealing law at larger budgets{level}"
    return Grid("forecast", title, columns, tuple(rows) if times else ())


def label(name: str) -> str:
    """A name that is never empty and stays on one line."""
    return one_line(name) or "(unnamed)"


def mean_text(metric: MetricSummary) -> str:
    """``mean ± sd``."""
    mean = number(metric.mean, metric.sd)
    return f"{mean} ± {number(metric.sd, metric.sd)}" if metric.n > 1 and not math.isnan(metric.sd) else mean


def standing_text(arm: ArmSummary, metric: MetricSummary) -> str:
    """The standing, with a dagger where the cost is unequal."""
    if arm.is_baseline:
        return "baseline" if arm.n_finished else "failed"
    return (metric.standing or NONE) + (" †" if arm.flags and metric.standing in ("better", "worse") else "")


def contrast_text(summary: ClaimSummary) -> str:
    """The inequality that was tested.

    The margin's sign is folded in: ``arm <= against - 0.5``.
    """
    claim = summary.claim
    arm, against = label(claim.arm), label(summary.against)
    other = against if claim.ratio == 1.0 else f"{claim.ratio:g} x {against}"
    if claim.direction == "equal":
        return f"{claim.metric}: {arm} = {other} within {claim.margin:g}"
    relation, sign = ("<=", "-") if claim.direction == "lower" else (">=", "+")
    if claim.margin < 0:
        sign = "+" if sign == "-" else "-"
    margin = f" {sign} {abs(claim.margin):g}" if claim.margin else ""
    strict = "<" if relation == "<=" else ">"
    plain = claim.margin == 0 and claim.ratio == 1
    return f"{claim.metric}: {arm} {strict if plain else relation} {other}{margin}"


def _difference(metric: MetricSummary) -> tuple[str, str, str]:
    interval = metric.difference
    if interval is None:
        return NONE, NONE, NONE
    spread = (interval.high - interval.low) / 2 if interval.n > 1 else math.nan
    return (
        number(interval.estimate, spread, sign=True),
        interval_text(interval.low, interval.high),
        p_text(metric.p_value),
    )
