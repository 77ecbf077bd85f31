"""How many of an image's tokens a model needs, and until when: accuracy against what is dropped, with its cost."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lossmith.errors import InputError
from lossmith.files import finite_or_none, write_text
from lossmith.sparsity import Denoised, PruneSchedule

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

SELECTORS = ("random", "divprune", "one_nn", "fastv", "answer_attention", "vtw")
_PROGRESSIVE = (0.25, 0.5, 0.75)


class Answers(Protocol):
    """A batch of questions: the right answers' ids (batch, length), and which of their tokens count."""

    @property
    def answers(self) -> Tensor:
        """Ids of the right answers."""
        ...

    @property
    def counted(self) -> Tensor:
        """False where a token is not judged."""
        ...


@dataclass(frozen=True, slots=True)
class RedundancyPoint:
    """One schedule.

    Attributes:
        schedule: its text.
        selector, keep: how tokens are chosen, and the share that is there at the end.
        when: ``input``, ``after step N``, ``inside step N``, ``progressive`` or ``every step``.
        accuracy: share of right tokens.
        change: against the full model; ``low`` and ``high``: 95 % interval over examples.
        exact: share of answers that are right throughout.
        flops, seconds: over those of the full model. Passes that only score tokens are in both.
        committed: share of the answers' tokens that the full model had written when tokens were dropped.
        mixture: ``committed`` tokens right at the full model's rate, the others at the rate of dropping at the input:
            only an accuracy above it shows that lost information comes back. NaN without anything to compare with.
        divergence: KL divergence in nats from the full model's distribution of the tokens masked in both, by step.
        redundant: the interval of ``change`` lies above minus the tolerance.
    """

    schedule: str
    selector: str
    keep: float
    when: str
    accuracy: float
    change: float
    low: float
    high: float
    exact: float
    flops: float
    seconds: float
    committed: float
    mixture: float
    divergence: tuple[float, ...]
    redundant: bool

    @property
    def above_mixture(self) -> float:
        """Accuracy beyond the trivial mixture."""
        return self.accuracy - self.mixture


@dataclass(frozen=True, slots=True)
class RedundancyReport:
    """The full model, and one point for each schedule; ``skipped`` says which could not act, and why.

    ``accuracy``, ``exact``, ``flops`` and ``seconds`` are the full model's, the last two per question.
    """

    accuracy: float
    exact: float
    questions: int
    flops: float
    seconds: float
    visual: int
    tolerance: float
    points: tuple[RedundancyPoint, ...]
    skipped: tuple[str, ...] = field(default=())

    def point(self, schedule: str | PruneSchedule) -> RedundancyPoint:
        """The point of a schedule.

        Raises:
            KeyError: there is none.
        """
        wanted = str(PruneSchedule.parse(schedule))
        for point in self.points:
            if point.schedule == wanted:
                return point
        raise KeyError(f"no schedule {wanted}; there are {', '.join(p.schedule for p in self.points)}")

    def summary(self) -> str:
        """A line for the full model and two for each schedule, cheapest last."""
        lines = [
            f"full: {self.accuracy:.3f} of the tokens right, {self.exact:.3f} of the answers; {self.questions} "
            f"questions, {self.visual} visual tokens",
            # A schedule's numbers stand below its name: beside it they are wider than 80 columns.
            f"schedule\n{'FLOPs':>7} {'time':>6} {'right':>6} {'change':>7} {'95 % interval':>16} {'mixture':>8}",
        ]
        for p in sorted(self.points, key=lambda p: -p.flops):
            mixture = f"{p.mixture:8.3f}" if math.isfinite(p.mixture) else " " * 7 + "-"
            mark = "  redundant" if p.redundant else ""
            lines += [
                p.schedule + ("  dearer than the full model" if p.flops > 1 else ""),
                f"{p.flops:7.3f} {p.seconds:6.2f} {p.accuracy:6.3f} {p.change:+7.3f} "
                f"[{p.low:+.3f}, {p.high:+.3f}] {mixture}{mark}",
            ]
        lines += [f"left out: {reason}" for reason in self.skipped]
        return "\n".join(lines)

    def to_json(self, path: str | Path | None = None) -> str:
        """Everything; also written to ``path`` where one is given."""
        text = json.dumps(finite_or_none(asdict(self)), indent=2) + "\n"
        if path is not None:
            write_text(path, text)
        return text

    def to_frame(self) -> pandas.DataFrame:
        """One row for each schedule."""
        import pandas

        rows = [{**asdict(p), "above_mixture": p.above_mixture} for p in self.points]
        return pandas.DataFrame(rows).drop(columns=["divergence"], errors="ignore")

    def plot(self, path: str | Path | None = None) -> Figure:
        """Accuracy against the cost, a line for each selector."""
        from lossmith.probes.visual_redundancy_plot import redundancy_figure

        return redundancy_figure(self, path)


def visual_redundancy(
    denoise: Callable[[Any, PruneSchedule | None], Denoised],
    groups: Sequence[Answers],
    *,
    layers: int,
    visual: int,
    selectors: Sequence[str] = SELECTORS,
    keeps: Sequence[float] = (0.5, 0.25),
    steps: Sequence[int | str] = ("input", "mid", "late", "progressive"),
    layer: int | None = None,
    schedules: Sequence[str | PruneSchedule] = (),
    keep_positions: bool = False,
    tolerance: float = 0.02,
    progress: Callable[[int, int], None] | None = None,
) -> RedundancyReport:
    """Answer the same questions under many pruning schedules, and compare with the full model.

    Args:
        denoise: answers a group under a schedule (``None``: the full model); keeps ``log_probabilities`` in the trace
            if divergences are wanted. :meth:`lossmith.tasks.multimodal.ImageAnswerer.redundancy` makes one.
        groups: batches of questions with right answers.
        layers: of the model.
        visual: its visual tokens per image.
        selectors: see :class:`lossmith.sparsity.PruneSchedule`. ``vtw`` is layer skipping: all visual tokens leave in
            every step after ``layer``, whatever ``keeps`` and ``steps``.
        keeps: shares that stay.
        steps: after which is dropped: numbers, ``input``, ``mid``, ``late``; ``progressive``: a quarter of the tokens
            after each quarter of the steps, whatever ``keeps``.
        layer: inside which ``fastv`` and ``vtw`` drop (``fastv`` in that step, not after it); default: the middle one.
        schedules: further ones. With none at all only the full model is measured.
        keep_positions: of all of them.
        tolerance: fall of the accuracy that still counts as redundant.
        progress: told how many schedules of how many are done.

    Raises:
        InputError: no questions, nothing counted, an unknown selector, a share or layer that cannot be.

    Source: "A Comprehensive Study on Visual Token Redundancy for Discrete Diffusion-based Multimodal Large Language
    Models", 2025, arXiv 2511.15098; the trivial mixture and the intervals are ours.
    """
    if not groups or not any(bool(g.counted.any()) for g in groups):
        raise InputError("no questions with answers that count")
    if not tolerance >= 0:
        raise InputError(f"tolerance must be at least 0, got {tolerance}")
    if layer is not None and not 0 <= layer < layers:
        raise InputError(f"there is no layer {layer} of {layers} (the first is 0)")
    # Of two layers the first: after the last one nothing is left to save.
    middle = (layers - 1) // 2 if layer is None else layer
    wanted = _schedules(selectors, keeps, steps, middle, schedules, keep_positions)
    full = _Runs(denoise, groups)
    runs: dict[PruneSchedule, _Runs] = {}
    skipped: list[str] = []
    seen: set[Any] = set()
    for number, schedule in enumerate(wanted):
        try:
            cuts = [schedule.cuts(steps=full.of(g).steps, layers=layers, visual=visual) for g in groups]
        except ValueError as error:
            if "never fires" not in str(error) or schedule.layer is not None:
                raise InputError(f"{schedule}: {error}") from None
            # Of few steps not every share is a step.
            skipped.append(f"{schedule} ({error})")
            continue
        # In few steps, mid and late may be one.
        same = (schedule.selector, schedule.keep_positions, schedule.sort, schedule.groups, tuple(map(tuple, cuts)))
        if same in seen:
            continue
        seen.add(same)
        runs[schedule] = _Runs(denoise, groups, schedule, full)
        if progress is not None:
            progress(number + 1, len(wanted))
    points = [_point(s, run, full, runs, layers, visual, tolerance) for s, run in runs.items()]
    questions = sum(len(g.answers) for g in groups)
    return RedundancyReport(
        accuracy=full.accuracy,
        exact=full.exact,
        questions=questions,
        flops=full.flops / questions,
        seconds=full.seconds / questions,
        visual=visual,
        tolerance=tolerance,
        points=tuple(points),
        skipped=tuple(skipped),
    )


def _schedules(
    selectors: Sequence[str],
    keeps: Sequence[float],
    steps: Sequence[int | str],
    layer: int,
    more: Sequence[str | PruneSchedule],
    keep_positions: bool,
) -> list[PruneSchedule]:
    found: list[dict[str, Any]] = []
    for name in selectors:
        selector = name.replace("-", "_")
        if selector == "vtw":
            found.append({"selector": selector, "layer": layer, "every_step": True})
            continue
        for step in steps:
            if step == "progressive":
                found.append({"selector": selector, "progressive": _PROGRESSIVE})
                continue
            inside = {"layer": layer} if selector == "fastv" and step != "input" else {}
            found += [{"selector": selector, "step": step, "keep": keep, **inside} for keep in keeps]
    built = [PruneSchedule.parse({**options, "keep_positions": keep_positions}) for options in found]
    built += [PruneSchedule.parse(text) for text in more]
    return list(dict.fromkeys(schedule for schedule in built if schedule is not None))


class _Runs:
    """The answers to all groups under one schedule; only of the full model they are kept, to compare with."""

    def __init__(
        self,
        denoise: Callable[[Any, PruneSchedule | None], Denoised],
        groups: Sequence[Answers],
        schedule: PruneSchedule | None = None,
        full: _Runs | None = None,
    ):
        self.groups = groups
        self.kept: dict[int, Denoised] = {}
        self.flops = self.seconds = 0.0
        self._sums: list[float] = []
        self._counts: list[int] = []
        rights = []
        for group in groups:
            found = denoise(group, schedule)
            self.flops += found.flops * len(found.ids)
            self.seconds += found.seconds
            hits = (found.ids[:, : group.answers.shape[1]].cpu() == group.answers) & group.counted
            rights.append(hits.sum(1))
            if full is None:
                self.kept[id(group)] = found
            else:
                self._compare(found, full.of(group))
        self.right = torch.cat(rights)
        self.counts = torch.cat([g.counted.sum(1) for g in groups])
        self.accuracy = float(self.right.sum() / self.counts.sum())
        self.exact = float((self.right == self.counts).double().mean())

    def of(self, group: Answers) -> Denoised:
        """The full model's answers to a group."""
        return self.kept[id(group)]

    @property
    def divergence(self) -> tuple[float, ...]:
        """By step: mean KL(full, pruned) over the tokens that are masked in both."""
        return tuple(s / c if c else math.nan for s, c in zip(self._sums, self._counts, strict=True))

    def _compare(self, ours: Denoised, theirs: Denoised) -> None:
        for step, (one, other) in enumerate(zip(ours.trace, theirs.trace, strict=False)):
            if one.log_probabilities is None or other.log_probabilities is None:
                return
            if step == len(self._sums):
                self._sums.append(0.0)
                self._counts.append(0)
            p, q = other.log_probabilities.double(), one.log_probabilities.double()
            terms = torch.where(p > -torch.inf, p.exp() * (p - q), 0.0)
            masked = _masked(ours, step) & _masked(theirs, step)
            self._sums[step] += float(terms.sum(-1)[masked].sum())
            self._counts[step] += int(masked.sum())


def _masked(run: Denoised, step: int) -> Tensor:
    """Which tokens were masked when a step began; what was never committed still is."""
    return (run.committed_at >= step) | (run.committed_at < 0)


def _point(
    schedule: PruneSchedule,
    run: _Runs,
    full: _Runs,
    runs: dict[PruneSchedule, _Runs],
    layers: int,
    visual: int,
    tolerance: float,
) -> RedundancyPoint:
    change = run.accuracy - full.accuracy
    # A ratio of sums over examples: the usual linearised error of paired differences.
    total = full.counts.sum().double()
    residuals = (run.right - full.right).double() - change * full.counts
    n = len(residuals)
    error = float(residuals.square().sum().sqrt() / total) * math.sqrt(n / max(1, n - 1))
    low, high = change - 1.96 * error, change + 1.96 * error
    cuts = [schedule.cuts(steps=full.of(g).steps, layers=layers, visual=visual) for g in full.groups]
    # What the trivial mixture compares with: the same, before the first step.
    same = dataclasses.replace(schedule, step="input", layer=None, every_step=False) if schedule.keep else None
    committed, mixture = 0.0, math.nan
    if not schedule.progressive and not schedule.every_step:
        written = [
            ((full.of(g).committed_at[:, : g.counted.shape[1]].cpu() <= _last(cut)) & g.counted).sum()
            for g, cut in zip(full.groups, cuts, strict=True)
        ]
        committed = float(torch.stack(written).sum() / full.counts.sum())
        if same in runs and same != schedule:
            mixture = committed * full.accuracy + (1 - committed) * runs[same].accuracy
    return RedundancyPoint(
        schedule=str(schedule),
        selector=schedule.selector,
        keep=cuts[0][-1].left / visual,
        when=_when(schedule, cuts[0][0].step),
        accuracy=run.accuracy,
        change=change,
        low=low,
        high=high,
        exact=run.exact,
        flops=run.flops / full.flops,
        seconds=run.seconds / full.seconds,
        committed=committed,
        mixture=mixture,
        divergence=run.divergence,
        redundant=low > -tolerance,
    )


def _last(cuts: Sequence[Any]) -> int:
    """The last step whose tokens are chosen from the whole image."""
    cut = cuts[0]
    return int(cut.step) if cut.layer is None else int(cut.step) - 1


def _when(schedule: PruneSchedule, step: int) -> str:
    if schedule.progressive:
        return "progressive"
    if schedule.every_step:
        return "every step"
    if step < 0:
        return "input"
    return f"{'after' if schedule.layer is None else 'inside'} step {step}"
