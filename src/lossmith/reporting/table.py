"""The final table of a comparison: means, paired differences, intervals, standings, costs and verdicts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from lossmith.reporting import findings
from lossmith.reporting.comparison import Claim, Comparison, Forecast, Run, Standing, Verdict
from lossmith.reporting.costs import CostDifference, CostMeans, cost_differences, mean_cost
from lossmith.reporting.statistics import (
    Interval,
    finished_values,
    judge,
    paired_differences,
    paired_interval,
    paired_p_value,
    smallest_detectable,
    standing,
)

DETECTION_POWER = 0.8


@dataclass(frozen=True, slots=True)
class MetricSummary:
    """One metric of one arm over its finished seeds, and its paired difference to the baseline.

    ``difference`` is ``None`` for the baseline itself; ``standing`` also where nobody said which way is
    better. ``p_value`` carries the interval's correction. ``detectable`` is the smallest true difference that
    this number of pairs would tell apart with 80 percent power (NaN where unknown). ``left_out`` are seeds
    that finished, but with a value that is missing or not finite.
    """

    name: str
    n: int
    mean: float
    sd: float
    difference: Interval | None
    standing: Standing | None
    p_value: float
    detectable: float
    left_out: tuple[int, ...] = ()
    lower_is_better: bool | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """A run without a usable primary metric, and why."""

    seed: int
    error: str


@dataclass(frozen=True, slots=True)
class ArmSummary:
    """One row: ``metrics`` in the comparison's order, ``cost`` means over the finished runs."""

    name: str
    description: str
    is_baseline: bool
    n_runs: int
    n_finished: int
    metrics: tuple[MetricSummary, ...]
    cost: CostMeans
    cost_differences: tuple[CostDifference, ...]
    failures: tuple[Failure, ...]

    @property
    def primary(self) -> MetricSummary:
        """The summary of the comparison's primary metric."""
        return self.metrics[0]

    @property
    def flags(self) -> tuple[CostDifference, ...]:
        """The cost differences to the baseline that are too large for a fair ranking."""
        return tuple(difference for difference in self.cost_differences if difference.flagged)


@dataclass(frozen=True, slots=True)
class ClaimSummary:
    """A claim, its verdict, the interval of its contrast, and the cost differences of the two arms."""

    claim: Claim
    against: str
    verdict: Verdict
    interval: Interval
    flags: tuple[CostDifference, ...]


@dataclass(frozen=True, slots=True)
class ComparisonTable:
    """Everything that the terminal, Markdown and HTML tables show, as numbers.

    ``arms`` has the baseline first and the others in the order given, never sorted by result. ``findings``
    say the result in sentences, ``footnotes`` how it was computed and what to beware of.
    """

    title: str
    question: str
    baseline: str
    metric: str
    lower_is_better: bool
    level: float
    comparisons: int
    arms: tuple[ArmSummary, ...]
    claims: tuple[ClaimSummary, ...]
    findings: tuple[str, ...]
    footnotes: tuple[str, ...]
    forecasts: tuple[Forecast, ...] = ()

    def to_json(self) -> dict[str, object]:
        """A plain dictionary for ``json.dumps``: numbers that are not finite become ``None``."""
        plain = _plain(dataclasses.asdict(self))
        assert isinstance(plain, dict)
        return plain

    def to_markdown(self) -> str:
        """The table as GitHub-flavoured Markdown."""
        from lossmith.reporting.markdown import table_to_markdown

        return table_to_markdown(self)


def summarise(comparison: Comparison) -> ComparisonTable:
    """Compute the final table.

    A run counts as failed when it has an error, or when its primary metric is missing or not finite; nothing
    of it enters a mean. Each arm is compared with the baseline over the seeds that both finished. Intervals
    and p-values are corrected for the number of arms other than the baseline, per metric; those of claims for
    the number of claims.

    Raises ``ValueError`` for a comparison that contradicts itself (a run of an arm that is not listed, two
    runs of one arm and seed, a baseline or claim that names no arm).

    >>> runs = [Run(a, s, {"eval/loss": l + s}) for a, l in (("base", 2.0), ("new", 1.5)) for s in range(3)]
    >>> arms = {"base": "", "new": ""}
    >>> table = summarise(Comparison("t", "q", arms, "base", "eval/loss", ("eval/loss",), tuple(runs)))
    >>> table.arms[1].primary.standing
    'better'
    """
    check(comparison)
    names = [comparison.baseline, *(name for name in comparison.arms if name != comparison.baseline)]
    comparisons = max(1, len(names) - 1)
    metrics = metric_names(comparison)
    runs = {name: [run for run in comparison.runs if run.arm == name] for name in names}
    failures = {name: _failures(runs[name], comparison.metric) for name in names}
    failed = {(name, failure.seed) for name in names for failure in failures[name]}
    sound = tuple(run for run in comparison.runs if (run.arm, run.seed) not in failed)
    costs = {name: mean_cost(run.cost for run in sound if run.arm == name) for name in names}
    arms = tuple(
        ArmSummary(
            name=name,
            description=comparison.arms[name],
            is_baseline=name == comparison.baseline,
            n_runs=len(runs[name]),
            n_finished=len(runs[name]) - len(failures[name]),
            metrics=tuple(_metric(comparison, sound, name, metric, comparisons) for metric in metrics),
            cost=costs[name],
            cost_differences=cost_differences(costs[name], costs[comparison.baseline]),
            failures=failures[name],
        )
        for name in names
    )
    claims = tuple(_claim(claim, comparison, sound, costs) for claim in comparison.claims)
    table = ComparisonTable(
        title=comparison.title,
        question=comparison.question,
        baseline=comparison.baseline,
        metric=comparison.metric,
        lower_is_better=comparison.lower_is_better,
        level=comparison.level,
        comparisons=comparisons,
        arms=arms,
        claims=claims,
        findings=(),
        footnotes=(),
        forecasts=comparison.forecasts,
    )
    return dataclasses.replace(
        table,
        findings=findings.findings(table, DETECTION_POWER),
        footnotes=findings.footnotes(table, DETECTION_POWER),
    )


def metric_names(comparison: Comparison) -> tuple[str, ...]:
    """The metrics to show, the primary one first, each once."""
    return tuple(dict.fromkeys((comparison.metric, *comparison.metrics)))


def check(comparison: Comparison) -> None:
    """Raise ``ValueError`` where a comparison contradicts itself."""
    allowed = ", ".join(repr(name) for name in comparison.arms) or "none"
    if comparison.baseline not in comparison.arms:
        raise ValueError(f"baseline {comparison.baseline!r} is not one of the arms: {allowed}")
    seen: set[tuple[str, int]] = set()
    for run in comparison.runs:
        if run.arm not in comparison.arms:
            raise ValueError(f"a run has the arm {run.arm!r}, which is not one of the arms: {allowed}")
        if (run.arm, run.seed) in seen:
            raise ValueError(f"arm {run.arm!r} has two runs with seed {run.seed}; each arm and seed may run once")
        seen.add((run.arm, run.seed))
    for claim in comparison.claims:
        for name in (claim.arm, claim.against):
            if name is not None and name not in comparison.arms:
                raise ValueError(f"the claim {claim.text!r} names the arm {name!r}; the arms are {allowed}")


def failure_reason(run: Run, metric: str) -> str | None:
    """Why a run counts as failed, or ``None`` when it finished with a finite ``metric``."""
    if run.error is not None:
        return run.error or "failed without a message"
    value = run.metrics.get(metric)
    if value is None:
        return f"finished without {metric}"
    return None if math.isfinite(value) else f"{metric} is {value}"


def _failures(runs: Sequence[Run], metric: str) -> tuple[Failure, ...]:
    reasons = [(run.seed, failure_reason(run, metric)) for run in runs]
    return tuple(Failure(seed, reason) for seed, reason in sorted(reasons) if reason is not None)


def _metric(comparison: Comparison, runs: tuple[Run, ...], arm: str, metric: str, comparisons: int) -> MetricSummary:
    own = finished_values(runs, arm, metric)
    left_out = tuple(sorted(run.seed for run in runs if run.arm == arm and run.seed not in own))
    mean, sd = _mean_sd(list(own.values()))
    lower = _lower_is_better(comparison, metric)
    if arm == comparison.baseline:
        return MetricSummary(metric, len(own), mean, sd, None, None, math.nan, math.nan, left_out, lower)
    differences = list(paired_differences(own, finished_values(runs, comparison.baseline, metric)).values())
    interval = paired_interval(differences, level=comparison.level, comparisons=comparisons)
    detectable = math.nan
    if interval.n >= 2 and math.isfinite(interval.sd) and interval.sd > 0:
        detectable = smallest_detectable(
            interval.sd, interval.n, level=comparison.level, power=DETECTION_POWER, comparisons=comparisons
        )
    verdict: Standing | None = None if lower is None else standing(interval, lower)
    if not own:
        verdict = "failed" if metric == comparison.metric else verdict
    p_value = paired_p_value(differences, comparisons=comparisons)
    return MetricSummary(metric, len(own), mean, sd, interval, verdict, p_value, detectable, left_out, lower)


def _lower_is_better(comparison: Comparison, metric: str) -> bool | None:
    if metric == comparison.metric:
        return comparison.lower_is_better
    direction = comparison.better.get(metric)
    return None if direction is None else direction == "lower"


def _mean_sd(values: list[float]) -> tuple[float, float]:
    if not values:
        return math.nan, math.nan
    # The interval's arithmetic (safe for huge values) with any level.
    summary = paired_interval(values)
    return summary.estimate, summary.sd


def _claim(claim: Claim, comparison: Comparison, runs: tuple[Run, ...], costs: dict[str, CostMeans]) -> ClaimSummary:
    against = claim.against if claim.against is not None else comparison.baseline
    judgement = judge(
        claim, runs, baseline=comparison.baseline, level=comparison.level, comparisons=len(comparison.claims)
    )
    flags = tuple(d for d in cost_differences(costs[claim.arm], costs[against]) if d.flagged)
    return ClaimSummary(claim, against, judgement.verdict, judgement.interval, flags)


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
