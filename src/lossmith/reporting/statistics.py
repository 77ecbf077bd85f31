"""Paired differences over seeds: intervals, standings, verdicts, and how many seeds an effect needs.

Runs of two arms under one seed share initialisation and data order, so the noise that both have in common
cancels in their difference; everything here works on those differences. With few seeds the interval is
Student's t; when several arms are judged at once, Bonferroni's correction keeps the chance of *any* false
"better" or "worse" at ``1 - level``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from lossmith.reporting.comparison import Claim, Run, Standing, Verdict


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean difference with its confidence interval; ``low`` and ``high`` are NaN where there is none.

    ``level`` is the level asked for over the whole family of comparisons, ``n`` the number of pairs, ``sd``
    the standard deviation of the differences (NaN below two), ``method`` one sentence that names test and
    correction.
    """

    estimate: float
    low: float
    high: float
    level: float
    n: int
    sd: float
    method: str


def paired_interval(differences: Iterable[float], *, level: float = 0.95, comparisons: int = 1) -> Interval:
    r"""Student's t interval for the mean of paired differences.

    .. math:: \bar d \pm t_{n-1}\!\left(1 - \frac{1 - level}{2\,comparisons}\right) \frac{s}{\sqrt n}

    Zero or one difference give no interval (NaN bounds). Differences without any spread give one of zero
    width. A difference that is not finite is a ``ValueError``: leave that pair out, and say so. Source:
    Student (1908); Dunn (1961) for the correction.

    >>> interval = paired_interval([-0.2, -0.1, -0.3])
    >>> round(interval.estimate, 3), round(interval.low, 3), round(interval.high, 3)
    (-0.2, -0.448, 0.048)
    >>> paired_interval([-0.2]).low
    nan
    """
    _check_family(level, comparisons)
    values = np.asarray([float(value) for value in differences], dtype=np.float64)
    if not np.isfinite(values).all():
        bad = float(values[~np.isfinite(values)][0])
        raise ValueError(f"differences must be finite numbers, got {bad}: leave out the pairs of failed runs")
    method = _method(level, comparisons)
    n = len(values)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, level, 0, math.nan, method)
    if n == 1:
        return Interval(float(values[0]), math.nan, math.nan, level, 1, math.nan, method)
    if (values == values[0]).all():  # exactly: a mean of equal numbers may differ from them in the last bit
        value = float(values[0])
        return Interval(value, value, value, level, n, 0.0, method)
    # Dividing by the largest keeps the squares of very large (or tiny) differences finite.
    scale = float(np.abs(values).max())
    estimate = float((values / scale).mean()) * scale
    sd = float((values / scale).std(ddof=1)) * scale
    half = critical_value(n - 1, level=level, comparisons=comparisons) * (sd / math.sqrt(n))
    return Interval(estimate, estimate - half, estimate + half, level, n, sd, method)


def paired_p_value(differences: Sequence[float], *, comparisons: int = 1) -> float:
    """Two-sided p-value of the paired t-test, times ``comparisons`` (at most 1); NaN below two pairs.

    It is below ``1 - level`` exactly when ``paired_interval`` with the same correction leaves out zero.

    >>> round(paired_p_value([-0.2, -0.1, -0.3]), 4)
    0.0742
    """
    interval = paired_interval(differences, comparisons=comparisons)
    if interval.n < 2:
        return math.nan
    if interval.sd == 0.0:
        return 1.0 if interval.estimate == 0.0 else 0.0
    t = interval.estimate / (interval.sd / math.sqrt(interval.n))
    return min(1.0, comparisons * 2.0 * float(special.stdtr(interval.n - 1, -abs(t))))


def standing(interval: Interval, lower_is_better: bool) -> Standing:
    """What an interval of ``arm - baseline`` says: it must leave out zero to say better or worse.

    >>> standing(paired_interval([-0.2, -0.21, -0.19]), lower_is_better=True)
    'better'
    >>> standing(paired_interval([0.0, 0.0]), lower_is_better=True)
    'not told apart'
    """
    if math.isnan(interval.low) or math.isnan(interval.high):
        return "no interval"
    if interval.low <= 0.0 <= interval.high:
        return "not told apart"
    return "better" if (interval.high < 0.0) == lower_is_better else "worse"


def critical_value(df: float, *, level: float = 0.95, comparisons: int = 1) -> float:
    """The two-sided Student t quantile after Bonferroni's correction.

    >>> round(critical_value(2), 3)
    4.303
    """
    _check_family(level, comparisons)
    return -float(special.stdtrit(df, (1.0 - level) / (2.0 * comparisons)))


def power(effect: float, sd: float, n: int, *, level: float = 0.95, comparisons: int = 1) -> float:
    r"""Chance that ``n`` pairs tell a true mean difference ``effect`` from zero, with the right sign.

    The t statistic follows the noncentral t distribution, :math:`P(T_{n-1}(|effect| \sqrt n / sd) >
    t_{crit})`; exact for normal differences of standard deviation ``sd``. Below two pairs the power is 0.

    >>> round(power(1.0, 1.0, 10), 3)
    0.803
    """
    _check_spread(sd)
    if n < 2:
        return 0.0
    if effect == 0.0:
        return (1.0 - level) / (2.0 * comparisons)
    if sd == 0.0:
        return 1.0
    threshold = critical_value(n - 1, level=level, comparisons=comparisons)
    return _power(abs(effect) / sd * math.sqrt(n), n - 1, threshold)


def smallest_detectable(sd: float, n: int, *, level: float = 0.95, power: float = 0.8, comparisons: int = 1) -> float:
    """The smallest true difference that ``n`` pairs tell from zero with chance ``power``.

    Infinite below two pairs.

    >>> round(smallest_detectable(1.0, 10), 3)
    0.996
    """
    _check_spread(sd)
    _check_power(power)
    _check_family(level, comparisons)
    if n < 2:
        return math.inf
    threshold = critical_value(n - 1, level=level, comparisons=comparisons)
    low, high = 0.0, 1.0
    while _power(high, n - 1, threshold) < power:
        low, high = high, 2.0 * high
    for _ in range(60):  # 2^-60 of the bracket is below the precision of the distribution itself
        middle = 0.5 * (low + high)
        low, high = (middle, high) if _power(middle, n - 1, threshold) < power else (low, middle)
    return high * sd / math.sqrt(n)


def seeds_needed(effect: float, sd: float, *, level: float = 0.95, power: float = 0.8, comparisons: int = 1) -> int:
    """The fewest pairs that tell a true difference ``effect`` from zero with chance ``power`` (at least two).

    >>> seeds_needed(1.0, 1.0)
    10
    """
    _check_spread(sd)
    _check_power(power)
    _check_family(level, comparisons)
    if not math.isfinite(effect) or effect == 0.0:
        raise ValueError(f"effect must be a finite number other than 0, got {effect}")
    ratio = abs(effect) / sd if sd else math.inf
    if ratio < 1e-4:  # more than 10^8 pairs: the t distribution is the normal one to more digits than there are here
        z = special.ndtri(power) - special.ndtri((1.0 - level) / (2.0 * comparisons))
        return math.ceil((max(float(z), 0.0) / max(ratio, 1e-150)) ** 2)

    def enough(n: int) -> bool:
        if math.isinf(ratio):
            return True
        threshold = critical_value(n - 1, level=level, comparisons=comparisons)
        return _power(ratio * math.sqrt(n), n - 1, threshold) >= power

    low, high = 1, 2
    while not enough(high):  # power grows with n: double, then bisect
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def finished_values(runs: Iterable[Run], arm: str, metric: str) -> dict[int, float]:
    """Final values of ``metric`` by seed, of the runs of ``arm`` that finished with a finite one."""
    values: dict[int, float] = {}
    for run in runs:
        if run.arm == arm and run.error is None:
            value = run.metrics.get(metric)
            if value is not None and math.isfinite(value):
                values[run.seed] = float(value)
    return values


def paired_differences(
    arm: Mapping[int, float], against: Mapping[int, float], *, ratio: float = 1.0
) -> dict[int, float]:
    """``arm - ratio * against`` by seed, over the seeds that both have.

    >>> paired_differences({0: 3.0, 1: 5.0}, {1: 4.0, 2: 1.0})
    {1: 1.0}
    """
    both = {seed: arm[seed] - ratio * against[seed] for seed in sorted(arm.keys() & against.keys())}
    return {seed: value for seed, value in both.items() if math.isfinite(value)}


@dataclass(frozen=True, slots=True)
class Judgement:
    """A claim's verdict, and the interval of ``arm - ratio * against`` that it was computed from."""

    claim: Claim
    verdict: Verdict
    interval: Interval


def judge(
    claim: Claim,
    runs: Iterable[Run],
    *,
    baseline: str | None = None,
    level: float = 0.95,
    comparisons: int = 1,
) -> Judgement:
    """Judge a claim by the interval of its paired contrast ``arm - ratio * against``.

    ``supported`` when the whole interval lies on the claimed side of the margin, ``not supported`` when all
    of it lies on the other side, else ``inconclusive`` (also: fewer than two seeds that both arms finished).
    Two arms that agree in every bit support ``equal``; they neither support nor contradict a plain ``lower``
    or ``higher``. ``baseline`` stands in where ``claim.against`` is ``None``.

    >>> runs = [Run("a", s, {"loss": 1.0 + s}) for s in range(3)] + [
    ...     Run("b", s, {"loss": 1.5 + s + s / 100}) for s in range(3)
    ... ]
    >>> judge(Claim("a is lower", "a", "loss", against="b"), runs).verdict
    'supported'
    """
    against = claim.against if claim.against is not None else baseline
    if against is None:
        raise ValueError(f"the claim {claim.text!r} names no arm to compare against, and no baseline was given")
    _check_claim(claim)
    runs = tuple(runs)
    differences = paired_differences(
        finished_values(runs, claim.arm, claim.metric),
        finished_values(runs, against, claim.metric),
        ratio=claim.ratio,
    )
    interval = paired_interval(differences.values(), level=level, comparisons=comparisons)
    return Judgement(claim, _verdict(claim, interval), interval)


def verdict(
    claim: Claim,
    runs: Iterable[Run],
    *,
    baseline: str | None = None,
    level: float = 0.95,
    comparisons: int = 1,
) -> Verdict:
    """Only the verdict of :func:`judge`."""
    return judge(claim, runs, baseline=baseline, level=level, comparisons=comparisons).verdict


def _verdict(claim: Claim, interval: Interval) -> Verdict:
    low, high = interval.low, interval.high
    if math.isnan(low) or math.isnan(high):
        return "inconclusive"
    if claim.direction == "equal":
        if -claim.margin <= low and high <= claim.margin:
            return "supported"
        return "not supported" if low > claim.margin or high < -claim.margin else "inconclusive"
    plain = claim.margin == 0.0 and claim.ratio == 1.0
    if plain and low == high == 0.0:
        return "inconclusive"
    if claim.direction == "higher":  # mirror it, so that the claimed side is always below
        low, high = -high, -low
    if high <= -claim.margin:
        return "supported"
    return "not supported" if low > -claim.margin else "inconclusive"


def _power(noncentrality: float, df: int, threshold: float) -> float:
    return 1.0 - float(special.nctdtr(df, noncentrality, threshold))


def _method(level: float, comparisons: int) -> str:
    text = f"paired by seed, Student t, {100 * level:.10g}% level"
    if comparisons == 1:
        return text
    return f"{text}, Bonferroni-corrected for {comparisons} comparisons"


def _check_family(level: float, comparisons: int) -> None:
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must lie between 0 and 1, both excluded, got {level}")
    if comparisons < 1:
        raise ValueError(f"comparisons must be at least 1, got {comparisons}")


def _check_spread(sd: float) -> None:
    if not (math.isfinite(sd) and sd >= 0.0):
        raise ValueError(f"sd must be a finite number of at least 0, got {sd}")


def _check_power(power: float) -> None:
    if not 0.0 < power < 1.0:
        raise ValueError(f"power must lie between 0 and 1, both excluded, got {power}")


def _check_claim(claim: Claim) -> None:
    name = f"the claim {claim.text!r}"
    if claim.direction not in ("lower", "higher", "equal"):
        raise ValueError(f"{name} has direction {claim.direction!r}, allowed are 'lower', 'higher' and 'equal'")
    if not (math.isfinite(claim.margin) and math.isfinite(claim.ratio)):
        raise ValueError(f"{name} has margin {claim.margin} and ratio {claim.ratio}: both must be finite numbers")
    if claim.direction == "equal" and claim.margin < 0.0:
        raise ValueError(f"{name} has margin {claim.margin}, but 'equal' needs one of at least 0")
    if claim.direction != "equal" and claim.ratio != 1.0 and claim.margin != 0.0:
        raise ValueError(f"{name} has both a margin ({claim.margin}) and a ratio ({claim.ratio}): give one of them")
