"""Schedules: the same rates as Hugging Face and PyTorch, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import get_scheduler
from transformers.optimization import get_wsd_schedule

from lossmith.errors import InputError
from lossmith.laws import LossCurve, every_step, schedule, warmup_steps
from lossmith.laws.recorded_schedules import from_scheduler, stretched
from lossmith.laws.schedules import (
    SCHEDULES,
    chain,
    constant,
    cosine,
    cyclic,
    inverse_sqrt,
    linear,
    listed,
    multi_step,
    wsd,
)

PEAK, STEPS, WARMUP = 3e-4, 60, 7


def optimizer(rate: float = PEAK) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)


def rates_of(made: Any, own: torch.optim.Optimizer, steps: int) -> np.ndarray:
    rates = []
    for _ in range(steps):
        rates.append(own.param_groups[0]["lr"])
        own.step()
        made.step()
    return np.array(rates)


@pytest.mark.parametrize(
    "ours, theirs, options",
    [
        (constant(PEAK, warmup=WARMUP), "constant_with_warmup", {}),
        (linear(PEAK, warmup=WARMUP), "linear", {}),
        (cosine(PEAK, warmup=WARMUP), "cosine", {}),
        (cosine(PEAK), "cosine", {"warmup": 0}),
        (cosine(PEAK, warmup=WARMUP, floor=0.1 * PEAK), "cosine_with_min_lr", {"min_lr_rate": 0.1}),
        (cyclic(PEAK, cycles=3, warmup=WARMUP), "cosine_with_restarts", {"num_cycles": 3}),
        (inverse_sqrt(PEAK, warmup=WARMUP), "inverse_sqrt", {}),
        (inverse_sqrt(PEAK, warmup=WARMUP, timescale=20), "inverse_sqrt", {"timescale": 20}),
    ],
    ids=str,
)
def test_rates_are_those_of_hugging_face(ours: Any, theirs: str, options: dict[str, Any]) -> None:
    own = optimizer()
    warmup = options.pop("warmup", WARMUP)
    made = get_scheduler(theirs, own, warmup, STEPS, scheduler_specific_kwargs=options)
    np.testing.assert_allclose(ours.values(STEPS), rates_of(made, own, STEPS), rtol=1e-12, atol=1e-18)


@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
def test_wsd_is_that_of_hugging_face_also_past_its_end(shape: str) -> None:
    own = optimizer()
    made = get_wsd_schedule(own, WARMUP, 10, num_stable_steps=20, decay_type=shape, min_lr_ratio=0.1)
    ours = wsd(PEAK, warmup=WARMUP, stable=20, decay=10, floor=0.1 * PEAK, shape=shape)
    assert ours.length == WARMUP + 30
    np.testing.assert_allclose(ours.values(45), rates_of(made, own, 45), rtol=1e-12)


def test_multi_step_is_that_of_pytorch() -> None:
    own = optimizer()
    made = torch.optim.lr_scheduler.MultiStepLR(own, [10, 25], gamma=0.3)
    np.testing.assert_allclose(
        multi_step(PEAK, milestones=[10, 25], factor=0.3).values(STEPS), rates_of(made, own, STEPS), rtol=1e-12
    )


@pytest.mark.parametrize(
    "text",
    [
        "constant(peak=0.001)",
        "cosine(peak=0.001, steps=50, warmup=5, floor=0.0001)",
        "linear(peak=0.001, warmup=0.1)",
        "wsd(peak=0.001, warmup=5, stable=35, decay=10)",
        "wsd(peak=0.001, decay=0.2, floor=1e-05, shape=exponential)",
        "multi_step(peak=0.001, milestones=[0.5, 0.75], factor=[0.3, 0.1])",
        "inverse_sqrt(peak=0.001, warmup=5)",
        "cyclic(peak=0.001, cycles=2, rewarm=5, floor=0.0001)",
        "chain(cosine(peak=0.001, steps=20, floor=0.0001), wsd(peak=0.0005, warmup=5, stable=15, decay=10))",
    ],
)
def test_text_is_read_and_written_back_the_same(text: str) -> None:
    made = schedule(text)
    assert str(made) == text
    again = schedule(str(made))
    np.testing.assert_array_equal(made.values(50), again.values(50))
    assert made.values(50).shape == (50,)
    assert made.values(50).max() == pytest.approx(made.peak)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_the_scheduler_sets_the_rates_of_the_schedule_in_an_optimiser(name: str) -> None:
    texts = {
        "wsd": "wsd(peak=3e-4, warmup=7, decay=0.2)",
        "multi_step": "multi_step(peak=3e-4, milestones=[20, 40])",
        "cyclic": "cyclic(peak=3e-4, cycles=2, rewarm=4)",
        "chain": "chain(cosine(peak=3e-4, steps=30), constant(peak=1e-4))",
        "listed": f"listed({[3e-4] * 30 + [1e-4] * 30})",
    }
    made = schedule(texts.get(name, f"{name}(peak=3e-4, warmup=7)"))
    own = optimizer()
    np.testing.assert_allclose(rates_of(made.lambda_lr(own, STEPS), own, STEPS), made.values(STEPS), atol=1e-18)


def test_a_resumed_scheduler_goes_on_where_it_was() -> None:
    own = optimizer()
    scheduler = cosine(PEAK).lambda_lr(own, STEPS)
    rates_of(scheduler, own, 20)
    other = optimizer()
    resumed = cosine(PEAK).lambda_lr(other, STEPS)
    resumed.load_state_dict(scheduler.state_dict())
    other.load_state_dict(own.state_dict())
    np.testing.assert_allclose(rates_of(resumed, other, 40), cosine(PEAK).values(STEPS)[20:], rtol=1e-12)


def test_parameter_groups_keep_their_ratio() -> None:
    first, second = torch.zeros(1, requires_grad=True), torch.zeros(1, requires_grad=True)
    own = torch.optim.SGD([{"params": [first], "lr": PEAK}, {"params": [second], "lr": 10 * PEAK}])
    scheduler = linear(PEAK).lambda_lr(own, 4)
    own.step()
    scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.75 * PEAK, 7.5 * PEAK])


def test_any_scheduler_of_pytorch_becomes_a_schedule() -> None:
    made = from_scheduler(lambda own: torch.optim.lr_scheduler.OneCycleLR(own, PEAK, total_steps=20), PEAK, 20)
    assert made.length == 20
    assert made.values().max() == pytest.approx(PEAK)


def test_rewarming_rises_from_the_floor_to_the_peak() -> None:
    values = cyclic(1.0, cycles=2, rewarm=4, floor=0.2).values(40)
    np.testing.assert_allclose(values[20:25], [0.2, 0.4, 0.6, 0.8, 1.0])
    joined = chain(wsd(1.0, stable=5, decay=5, floor=0.1), wsd(1.0, warmup=5, stable=5, decay=5, floor=0.1))
    assert joined.length == 25
    np.testing.assert_allclose(joined.values()[10:16], [0.1, 0.28, 0.46, 0.64, 0.82, 1.0])


def test_a_stretched_schedule_keeps_its_shape_and_its_mean() -> None:
    rates = cosine(1.0, floor=0.1).values(100)
    longer = stretched(rates, 400).values()
    assert longer.mean() == pytest.approx(rates.mean(), rel=1e-3)
    np.testing.assert_allclose(longer[1::4], rates, atol=0.02)
    np.testing.assert_array_equal(stretched(rates, 100).values(), rates)


def test_logged_rates_are_interpolated_but_jumps_stay_jumps() -> None:
    steps = np.arange(10, 101, 10)
    smooth = cosine(1.0, steps=100).values()
    # A straight line over h misses by at most h^2 / 8 times the curvature.
    bound = 10**2 / 8 * 0.5 * (np.pi / 100) ** 2
    np.testing.assert_allclose(every_step(steps, smooth[steps - 1], 100)[9:], smooth[9:], atol=bound)
    jumps = multi_step(1.0, milestones=[45], factor=0.1).values(100)
    np.testing.assert_allclose(every_step(steps, jumps[steps - 1], 100), jumps)


def test_a_warm_up_logged_now_and_then_is_still_one() -> None:
    rates = cosine(1.0, warmup=100).values(1000)
    steps = np.arange(30, 1001, 30)
    filled = every_step(steps, rates[steps - 1], 1000)
    np.testing.assert_allclose(filled[:90], rates[:90], atol=1e-12)
    assert 90 <= warmup_steps(filled) <= 120
    assert 199 <= warmup_steps(stretched(rates, 2000).values()) <= 201


def test_a_csv_of_rates_is_a_schedule(tmp_path: Path) -> None:
    path = tmp_path / "rates.csv"
    path.write_text("step,lr\n1,0.1\n3,0.3\n5,0.1\n")
    np.testing.assert_allclose(schedule(str(path)).values(), [0.1, 0.2, 0.3, 0.2, 0.1])


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("wsdd(peak=1)", "did you mean 'wsd'"),
        ("wsd(peek=1)", "did you mean 'peak'"),
        ("wsd()", "peak"),
        ("cosine(peak=-1)", "peak must be positive"),
        ("cosine(peak=hello)", "peak must be a number"),
        ("cosine(peak=1e-3, floor=1)", "floor must not exceed the peak"),
        ("constant(peak=1e-3, warmup=-5)", "warmup must be finite and not negative"),
        ("constant(peak=1e-3, warmup=inf)", "warmup must be finite"),
        ("wsd(peak=1e-3, decay=nan)", "decay must be finite"),
        ("cosine(peak=1e-3, cycles=0)", "cycles must be finite and positive"),
        ("inverse_sqrt(peak=1e-3, timescale=-1)", "timescale must be finite and positive"),
        ("multi_step(peak=1e-3, milestones=[x])", "milestones must be a number|cannot be read"),
        ("wsd(peak=1, shape=exponential)", "never reaches 0"),
        ("wsd(peak=1, shape=round)", "shape must be one of"),
        ("wsd(peak=1, stable=5, decay=5, steps=11)", "is not warmup"),
        ("wsd(peak=1, stable=5, decay=0.5)", "not shares"),
        ("multi_step(peak=1, milestones=[3, 5], factor=[0.5])", "2 milestones but 1 factors"),
        ("chain(constant(peak=1), constant(peak=1))", "needs steps"),
        ("listed([])", "list of numbers"),
        ("listed([0, 0])", "not all 0"),
        ("nowhere.csv", "no file"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        schedule(text)


@pytest.mark.parametrize("steps", [0, -3, 2.5, float("nan"), None])
def test_a_number_of_steps_that_is_none_is_refused(steps: Any) -> None:
    with pytest.raises(InputError, match="steps"):
        cosine(1.0).values(steps)


def test_parts_longer_than_the_training_are_refused() -> None:
    with pytest.raises(InputError, match="longer than the training"):
        wsd(1.0, warmup=8, decay=5).values(10)
    with pytest.raises(InputError, match="too few to re-warm"):
        cyclic(1.0, cycles=5, rewarm=5).values(20)
    with pytest.raises(InputError, match="milestones must rise"):
        multi_step(1.0, milestones=[5, 3]).values(10)


def test_a_curve_needs_a_rate_for_every_step() -> None:
    with pytest.raises(InputError, match="needed for every step: 5 of 9"):
        LossCurve.of("a", [3, 9], [2.0, 1.0], [0.1] * 5)
    assert len(LossCurve.of("a", [3, 9], [2.0, 1.0], listed([0.1] * 9)).rates) == 9
