"""The probe of visual redundancy: what it counts, against runs that are written down."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lossmith.errors import InputError
from lossmith.probes import visual_redundancy
from lossmith.sparsity import Denoised, DenoisingStep, PruneSchedule

LENGTH, VISUAL = 4, 8


@dataclass(frozen=True, eq=False)
class Group:
    answers: Tensor
    counted: Tensor


def group(rows: int = 6) -> Group:
    counted = torch.ones(rows, LENGTH, dtype=torch.bool)
    counted[0, 3] = False
    return Group(torch.ones(rows, LENGTH, dtype=torch.long), counted)


def answers(wrong: int, flops: float, rows: int = 6) -> Denoised:
    """The last ``wrong`` tokens of each answer are wrong; token ``i`` was committed in step ``i``."""
    ids = torch.ones(rows, LENGTH, dtype=torch.long)
    ids[:, LENGTH - wrong :] = 0
    when = torch.arange(LENGTH).expand(rows, -1)
    p = torch.full((rows, LENGTH, 2), math.log(0.5)) if wrong == 0 else torch.log(torch.tensor([0.25, 0.75]))
    trace = tuple(DenoisingStep(VISUAL, 0.5, 1, p.expand(rows, LENGTH, 2)) for _ in range(LENGTH))
    return Denoised(ids, when, torch.zeros(rows, 1), flops, 1.0, trace, LENGTH)


def denoise(_: Any, schedule: PruneSchedule | None) -> Denoised:
    if schedule is None:
        return answers(0, 100.0)
    if schedule.step == "input":
        return answers(2, 50.0)
    return answers(1, 120.0 if schedule.uses == "logits" else 80.0)


def test_a_point_holds_accuracy_change_cost_and_mixture() -> None:
    report = visual_redundancy(
        denoise, [group()], layers=2, visual=VISUAL, selectors=("random",), keeps=(0.5,), steps=("input", 1)
    )
    assert report.accuracy == report.exact == 1.0
    assert report.questions == 6
    # 23 tokens count; at the input 2 of each answer are wrong, but one of those does not count.
    start = report.point("random(step=input, keep=0.5)")
    assert start.accuracy == pytest.approx(12 / 23)
    assert start.flops == 0.5
    assert math.isnan(start.mixture)
    later = report.point("random(step=1, keep=0.5)")
    assert later.committed == pytest.approx(12 / 23)
    assert later.mixture == pytest.approx(12 / 23 * 1.0 + 11 / 23 * 12 / 23)
    assert later.above_mixture == pytest.approx(18 / 23 - later.mixture)
    assert later.change == pytest.approx(-5 / 23)
    assert later.low < later.change < later.high
    assert later.exact == pytest.approx(1 / 6)
    assert (later.when, start.when) == ("after step 1", "input")
    divergence = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert later.divergence == pytest.approx((divergence,) * LENGTH)


def test_the_interval_is_that_of_paired_examples() -> None:
    """A model that is right in half of the examples only: the ratio's linearised standard error."""
    rows = 40

    def half(_: Any, schedule: PruneSchedule | None) -> Denoised:
        found = answers(0, 1.0, rows)
        if schedule is not None:
            found.ids[: rows // 2] = 0
        return found

    full = Group(torch.ones(rows, LENGTH, dtype=torch.long), torch.ones(rows, LENGTH, dtype=torch.bool))
    report = visual_redundancy(half, [full], layers=1, visual=8, selectors=("random",), keeps=(0.5,), steps=("input",))
    point = report.points[0]
    error = 0.5 / math.sqrt(rows - 1)
    assert point.high - point.low == pytest.approx(2 * 1.96 * error)
    assert not point.redundant


def test_no_change_is_redundant_and_a_dearer_schedule_says_so(tmp_path: Path) -> None:
    report = visual_redundancy(
        lambda g, s: answers(0, 120.0 if s is not None and s.uses == "logits" else 100.0 if s is None else 70.0),
        [group()],
        layers=2,
        visual=VISUAL,
        selectors=("answer_logits", "vtw", "fastv"),
        keeps=(0.5,),
        steps=("mid",),
    )
    assert all(p.redundant and p.change == 0 for p in report.points)
    lines = {line.split("(")[0]: line for line in report.summary().splitlines() if "(" in line}
    assert "dearer than the full model" in lines["answer_logits"]
    assert "dearer" not in lines["vtw"]
    assert report.point("vtw(layer=0, every_step=True)").when == "every step"
    assert report.point("fastv(keep=0.5, step=mid, layer=0)").when == "inside step 1"
    stored = json.loads(report.to_json(tmp_path / "report.json"))
    assert stored["points"][0]["mixture"] is None
    assert json.loads((tmp_path / "report.json").read_text()) == stored
    assert len(report.to_frame()) == 3
    report.plot(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000
    with pytest.raises(KeyError, match="no schedule random"):
        report.point("random")


def test_answers_that_stop_early_do_not_move_the_places() -> None:
    """Mid is a half of the steps that were asked for, not of those that were taken."""

    def stopped(g: Any, schedule: PruneSchedule | None) -> Denoised:
        found = denoise(g, schedule)
        return Denoised(found.ids, found.committed_at, found.kept_indices, found.flops, 1.0, found.trace[:2], LENGTH)

    report = visual_redundancy(
        stopped, [group()], layers=2, visual=VISUAL, selectors=("random",), keeps=(0.5,), steps=("mid", "late")
    )
    assert [p.when for p in report.points] == ["after step 1", "after step 2"]
    assert all(len(p.divergence) == 2 for p in report.points)


def test_schedules_that_coincide_are_run_once_and_those_that_never_act_are_named() -> None:
    seen: list[str] = []

    def watch(g: Any, schedule: PruneSchedule | None) -> Denoised:
        seen.append(str(schedule))
        found = denoise(g, schedule)
        # A loop of two steps.
        return Denoised(found.ids, found.committed_at // 2, found.kept_indices, found.flops, 1.0, found.trace[:2], 2)

    report = visual_redundancy(
        watch,
        [group()],
        layers=2,
        visual=VISUAL,
        selectors=("random",),
        keeps=(0.5,),
        steps=("mid", "late", 0, 5, "progressive"),
    )
    # Of two steps, mid and late are both the first, after which half is gone progressively, too.
    assert seen == ["None", "random(keep=0.5, step=mid)"]
    assert len(report.skipped) == 1
    assert "step 5 of 2" in report.skipped[0]
    assert "left out" in report.summary()


def test_wrong_input_is_refused_in_a_sentence() -> None:
    options: dict[str, Any] = {"layers": 2, "visual": VISUAL}
    with pytest.raises(InputError, match="no questions"):
        visual_redundancy(denoise, [], **options)
    nobody = Group(torch.ones(2, 3).long(), torch.zeros(2, 3).bool())
    with pytest.raises(InputError, match="no questions with answers that count"):
        visual_redundancy(denoise, [nobody], **options)
    with pytest.raises(InputError, match="tolerance"):
        visual_redundancy(denoise, [group()], tolerance=-1, **options)
    with pytest.raises(InputError, match="layer 7 of 2"):
        visual_redundancy(denoise, [group()], selectors=("vtw",), layer=7, **options)
    with pytest.raises(InputError, match="did you mean 'random'"):
        visual_redundancy(denoise, [group()], selectors=("randm",), **options)
    with pytest.raises(InputError, match="keep must be"):
        visual_redundancy(denoise, [group()], keeps=(0.0,), **options)
