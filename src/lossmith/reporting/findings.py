"""The result in sentences, and the footnotes that say how it was computed and what to beware of."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lossmith.reporting.formatting import interval_text, number, one_line, plural
from lossmith.reporting.statistics import seeds_needed

if TYPE_CHECKING:
    from lossmith.reporting.table import ArmSummary, ComparisonTable


def findings(table: ComparisonTable, power: float) -> tuple[str, ...]:
    """One sentence per arm other than the baseline, in the order given."""
    baseline, *others = table.arms
    if not any(arm.n_finished for arm in table.arms):
        return ("No run finished, so there is nothing to compare.",)
    if not others:
        own = baseline.primary
        spread = f" (sd {number(own.sd)} over {plural(own.n, 'seed')})" if own.n > 1 else " (one seed)"
        return (f"The only arm, {_name(baseline.name)}, reached {table.metric} {number(own.mean, own.sd)}{spread}.",)
    return tuple(_finding(table, arm, power) for arm in others)


def _finding(table: ComparisonTable, arm: ArmSummary, power: float) -> str:
    name, base, own = _name(arm.name), _name(table.baseline), arm.primary
    interval = own.difference
    assert interval is not None
    if arm.n_finished == 0:
        tried = f"none of its {plural(arm.n_runs, 'run')}" if arm.n_runs else "no run of it"
        return f"{name} cannot be judged: {tried} finished."
    if interval.n == 0:
        return f"{name} cannot be judged: it shares no finished seed with {base}."
    by = f"{table.metric} {number(interval.estimate, (interval.high - interval.low) / 2, sign=True)}"
    if interval.n == 1:
        return f"{name} cannot be told from {base} by one seed ({by}): an interval needs at least two."
    seen = (
        f"{by}, {100 * table.level:.10g}% interval {interval_text(interval.low, interval.high)}, "
        f"{plural(interval.n, 'seed')}"
    )
    if interval.sd == 0 and interval.estimate == 0:
        return f"{name} gave exactly the same {table.metric} as {base} under {plural(interval.n, 'seed')}."
    unequal = f"; its cost differs: {', '.join(flag.text for flag in arm.flags)}" if arm.flags else ""
    if own.standing == "not told apart":
        return f"{name} is not told apart from {base} ({seen}){_more_seeds(table, arm, power)}{unequal}."
    without_spread = "; every seed gave the same difference" if interval.sd == 0 else ""
    return f"{name} is {own.standing} than {base} ({seen}{without_spread}){unequal}."


def _more_seeds(table: ComparisonTable, arm: ArmSummary, power: float) -> str:
    interval = arm.primary.difference
    assert interval is not None
    if interval.estimate == 0 or not math.isfinite(interval.sd) or interval.sd == 0:
        return ""
    n = seeds_needed(interval.estimate, interval.sd, level=table.level, power=power, comparisons=table.comparisons)
    if n <= interval.n:
        return ""
    about = f"about {n}" if n <= 100 else "more than 100"
    return f"; to tell a difference as small as this one from noise would take {about} seeds"


def footnotes(table: ComparisonTable, power: float) -> tuple[str, ...]:
    """Method, correction and level; what could have been detected; unequal costs; failed runs."""
    notes: list[str] = []
    base, others = _name(table.baseline), table.arms[1:]
    if others:
        notes.append(_method(table, base))
        notes.extend(_detectable(table, power))
    for arm in others:
        if arm.flags:
            differences = ", ".join(flag.text for flag in arm.flags)
            notes.append(
                f"† {_name(arm.name)} did not cost the same as {base}: {differences}. "
                "Read its result at that price; it is not ranked."
            )
    if any(difference.quantity == "scored_tokens" for arm in others for difference in arm.flags):
        notes.append("Scoring counts tokens that were only scored, in percent of the baseline's training tokens.")
    notes.extend(_further_out(table))
    for arm in table.arms:
        if arm.failures:
            whole = f"{len(arm.failures)} of {plural(arm.n_runs, 'run')} of {_name(arm.name)} failed"
            rest = "; its numbers describe only the runs that finished" if arm.n_finished else ""
            errors = "; ".join(f"seed {f.seed}: {one_line(f.error, 160)}" for f in arm.failures)
            notes.append(f"{whole}{rest}. {errors}")
        for metric in arm.metrics[1:]:
            if metric.left_out and metric.n:
                seeds = ", ".join(str(seed) for seed in metric.left_out)
                notes.append(
                    f"{metric.name} of {_name(arm.name)} is missing or not finite for seed {seeds}; "
                    "it is left out there."
                )
    return tuple(notes)


def _further_out(table: ComparisonTable) -> list[str]:
    found = [forecast for forecast in table.forecasts if forecast.points]
    reasons: dict[str, list[str]] = {}
    for forecast in table.forecasts:
        if not forecast.points:
            reasons.setdefault(one_line(forecast.reason, 200), []).append(_name(forecast.arm))
    notes = [f"Further out: no forecast of {', '.join(arms)}: {reason}." for reason, arms in reasons.items()]
    if not found:
        return notes
    misses = ", ".join(
        f"{_name(forecast.arm)} {100 * forecast.missed_at_end:+.2g}% at the end, {100 * forecast.held:.0f}% inside"
        for forecast in found
    )
    return [
        *notes,
        "Further out: the annealing law, fitted to each arm's runs, at the same schedule stretched over more steps of "
        f"fresh data. As a test, the law fitted to the first {100 * found[0].first:.0f}% of the runs predicted the "
        f"rest: {misses} its {100 * found[0].level:g}% intervals. One schedule determines the law weakly; "
        "runs under two schedules, fitted with lossmith fit, say more.",
    ]


def _method(table: ComparisonTable, base: str) -> str:
    counts = sorted({arm.primary.difference.n for arm in table.arms[1:] if arm.primary.difference})
    n = plural(counts[0], "pair") if len(counts) == 1 else f"{counts[0]} to {counts[-1]} pairs"
    correction = (
        f", Bonferroni-corrected for {table.comparisons} arms (p-values too)"
        if table.comparisons > 1
        else " (one comparison: no correction)"
    )
    return (
        f"Differences are arm minus {base}, paired by seed ({n} per arm); intervals are Student t at "
        f"{100 * table.level:.10g}%{correction}. An arm is better or worse only if its whole interval is on "
        "one side of zero; ± is one standard deviation over seeds."
    )


def _detectable(table: ComparisonTable, power: float) -> list[str]:
    found = sorted(
        (arm.primary.detectable, arm.primary.difference.n)
        for arm in table.arms[1:]
        if arm.primary.difference is not None and math.isfinite(arm.primary.detectable)
    )
    if not found:
        if all(arm.primary.difference is None or arm.primary.difference.n < 2 for arm in table.arms[1:]):
            return ["Fewer than two finished pairs give no interval; run more seeds."]
        return []
    sizes = [f"{size:.2g}" for size in dict.fromkeys((found[0][0], found[-1][0]))]
    spread = "" if len(set(sizes)) == 1 else ", depending on the arm"
    return [
        f"With this many seeds and this much noise, the smallest true difference in {table.metric} that "
        f"would be told apart with {100 * power:.0f}% chance is {' to '.join(dict.fromkeys(sizes))}{spread}."
    ]


def _name(name: str) -> str:
    return one_line(name, 60) or "(unnamed)"
