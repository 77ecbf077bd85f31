"""Learning-rate schedules as objects: written as text, read as numbers per step, run in any PyTorch training.

Optimiser steps count from 1; the rate used *at* step ``s`` is ``schedule.values(steps)[s - 1]``, which is what
``transformers.get_scheduler`` and ``torch.optim.lr_scheduler`` set after ``s - 1`` calls of ``scheduler.step()``.

Lengths (``warmup``, ``stable``, ``decay``, ``milestones``) are steps where they are 1 or more, and shares of the whole
training where they are below 1.

>>> schedule("wsd(peak=3e-4, warmup=2, stable=3, decay=2)").values().tolist()
[0.0, 0.00015, 0.0003, 0.0003, 0.0003, 0.0003, 0.00015]
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lossmith.errors import InputError, did_you_mean
from lossmith.laws.terms import Array
from lossmith.registry import Spec, parse_spec

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR

_DECAYS = ("linear", "cosine", "1-sqrt", "exponential")


@dataclass(frozen=True, slots=True)
class Schedule:
    """A learning rate for every optimiser step.

    Attributes:
        spec: how it is written; :func:`schedule` reads it back.
        peak: the highest rate.
        length: number of steps that its own description fixes; ``None`` where the length of the training decides.
        rule: ``(step numbers from 0, steps of the whole training) -> rates``.

    >>> cosine(peak=1.0, warmup=2).values(6).round(3).tolist()
    [0.0, 0.5, 1.0, 0.854, 0.5, 0.146]
    """

    spec: str
    peak: float
    length: int | None
    rule: Callable[[Array, int], Array]

    def __str__(self) -> str:
        return self.spec

    def values(self, steps: int | None = None) -> Array:
        """The rate of each step ``1..steps``: ``(steps,)`` float64.

        Args:
            steps: of the training. A schedule with a ``length`` of its own needs none; fewer steps give its beginning,
                more steps stay at its last rate.

        Raises:
            InputError: the number of steps is neither given nor known.
        """
        total = self.length if self.length is not None else steps
        if total is None:
            raise InputError(f"schedule {self.spec} has no length of its own: say how many steps")
        wanted = whole_number("steps", total if steps is None else steps, least=1)
        return np.asarray(
            self.rule(np.arange(wanted, dtype=np.float64), whole_number("steps", total, least=1)), np.float64
        )

    def lambda_lr(self, optimizer: Optimizer, steps: int | None = None, *, last_epoch: int = -1) -> LambdaLR:
        """The schedule for an optimiser whose own learning rate is the peak, as Hugging Face's schedulers take it.

        Give it to ``transformers.Trainer(..., optimizers=(optimizer, scheduler))``, or call ``step()`` after every
        optimiser step. Parameter groups with other rates keep their ratio to the first.

        Args:
            optimizer: any.
            steps: of the training, where the schedule has no length of its own.
            last_epoch: for resuming, as in PyTorch.

        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
        >>> scheduler = linear(peak=0.5).lambda_lr(optimizer, steps=4)
        >>> scheduler.get_last_lr()
        [0.5]
        """
        from torch.optim.lr_scheduler import LambdaLR

        factors = self.values(steps) / self.peak
        return LambdaLR(optimizer, lambda step: float(factors[min(step, len(factors) - 1)]), last_epoch)


def constant(peak: float, *, warmup: float = 0) -> Schedule:
    """A linear warm-up from 0, then always ``peak`` (``constant_with_warmup`` in Hugging Face)."""
    peak = positive_rate("peak", peak)
    return _made("constant", locals(), lambda i, total: _warmed(i, _count(warmup, total), peak, np.full(len(i), peak)))


def cosine(
    peak: float, *, steps: int | None = None, warmup: float = 0, floor: float = 0.0, cycles: float = 0.5
) -> Schedule:
    """Half a cosine wave from ``peak`` to ``floor`` (``cosine`` and ``cosine_with_min_lr`` in Hugging Face).

    Args:
        peak: highest rate.
        steps: of the whole training; by default the length that :meth:`Schedule.values` is asked for.
        warmup: linear, from 0.
        floor: last rate.
        cycles: waves; 0.5 only falls.
    """
    peak, floor = positive_rate("peak", peak), _floor(floor, peak)

    def rule(i: Array, total: int) -> Array:
        progress = _progress(i, _count(warmup, total), total)
        return _warmed(i, _count(warmup, total), peak, floor + (peak - floor) * _wave(2 * cycles * progress))

    return _made("cosine", locals(), rule, steps)


def linear(peak: float, *, steps: int | None = None, warmup: float = 0, floor: float = 0.0) -> Schedule:
    """A straight line from ``peak`` to ``floor`` after a linear warm-up (``linear`` in Hugging Face)."""
    peak, floor = positive_rate("peak", peak), _floor(floor, peak)

    def rule(i: Array, total: int) -> Array:
        begun = _count(warmup, total)
        return _warmed(i, begun, peak, floor + (peak - floor) * (1 - _progress(i, begun, total)))

    return _made("linear", locals(), rule, steps)


def wsd(
    peak: float,
    *,
    warmup: float = 0,
    stable: int | None = None,
    decay: float = 0.1,
    floor: float = 0.0,
    shape: str = "linear",
    steps: int | None = None,
) -> Schedule:
    """Warm-up, stable, decay (``warmup_stable_decay`` in Hugging Face, whose default shape is ``cosine``).

    Args:
        peak: rate of the stable part.
        warmup: linear, from ``floor``.
        stable: steps at ``peak``; by default all that the other parts leave.
        decay: length of the last part.
        floor: last rate.
        shape: of the decay: ``linear``, ``cosine``, ``1-sqrt`` or ``exponential`` (which needs a floor above 0).
        steps: of the whole training, where ``stable`` does not say it.
    """
    peak, floor = positive_rate("peak", peak), _floor(floor, peak)
    if shape not in _DECAYS:
        raise InputError(f"shape must be one of {', '.join(_DECAYS)}, got '{shape}'")
    if shape == "exponential" and floor == 0:
        raise InputError("an exponential decay never reaches 0: give a floor above 0")
    if stable is not None:
        if warmup % 1 or decay % 1:
            raise InputError("with stable in steps, warmup and decay must be steps too, not shares")
        whole = int(warmup) + int(stable) + int(decay)
        if steps is not None and steps != whole:
            raise InputError(f"steps={steps} is not warmup + stable + decay = {whole}; leave one of them out")
        steps = whole

    def rule(i: Array, total: int) -> Array:
        begun, tail = _count(warmup, total), _count(decay, total)
        if begun + tail > total:
            raise InputError(f"warm-up ({begun} steps) and decay ({tail}) are longer than the training ({total})")
        progress = np.clip((i - (total - tail)) / max(tail, 1), 0.0, 1.0)
        # Without a decay the floor is never reached.
        progress = progress if tail else np.zeros(len(i))
        rates = peak * (floor / peak) ** progress if shape == "exponential" else floor + (peak - floor) * fall(progress)
        return _warmed(i, begun, peak, rates, floor)

    falls = {"linear": lambda p: 1 - p, "cosine": _wave, "1-sqrt": lambda p: 1 - np.sqrt(p)}
    fall: Callable[[Array], Array] = falls.get(shape, falls["linear"])
    return _made("wsd", locals(), rule, steps)


def multi_step(
    peak: float,
    *,
    milestones: Sequence[float],
    factor: float | Sequence[float] = 0.1,
    warmup: float = 0,
    steps: int | None = None,
) -> Schedule:
    """Constant parts with drops (``torch.optim.lr_scheduler.MultiStepLR``): two stages have one milestone.

    Args:
        peak: rate of the first part.
        milestones: steps already made when the rate drops.
        factor: what the rate is multiplied by at each milestone; or one factor *of the peak* for each of them.
        warmup: linear, from 0.
        steps: of the whole training.
    """
    peak = positive_rate("peak", peak)
    places = [milestones] if isinstance(milestones, int | float) else list(milestones)
    for place in places:
        _length("milestones", place)
    if isinstance(factor, int | float):
        levels = [float(factor) ** (k + 1) for k in range(len(places))]
    else:
        levels = [float(f) for f in factor]
    if len(levels) != len(places):
        raise InputError(f"multi_step has {len(places)} milestones but {len(levels)} factors")
    if not all(0 <= level <= 1 for level in levels):
        raise InputError(f"factor must lie between 0 and 1, got {factor}")

    def rule(i: Array, total: int) -> Array:
        at = [_count(place, total) for place in places]
        if sorted(at) != at:
            raise InputError(f"milestones must rise, got {places}")
        return _warmed(i, _count(warmup, total), peak, peak * np.array([1.0, *levels])[np.searchsorted(at, i, "right")])

    return _made("multi_step", locals(), rule, steps)


def inverse_sqrt(peak: float, *, warmup: float = 0, timescale: int | None = None) -> Schedule:
    """The rate falls with the square root of the steps (``inverse_sqrt`` in Hugging Face).

    Args:
        peak: rate at the end of the warm-up.
        warmup: linear, from 0.
        timescale: steps after which the rate has fallen to ``1 / sqrt(2)``; by default the warm-up, or 10,000.
    """
    peak = positive_rate("peak", peak)

    def rule(i: Array, total: int) -> Array:
        begun = _count(warmup, total)
        scale = timescale or begun or 10_000
        return _warmed(i, begun, peak, peak / np.sqrt(1 + np.maximum(i - begun, 0) / scale))

    return _made("inverse_sqrt", locals(), rule)


def cyclic(
    peak: float, *, cycles: int, steps: int | None = None, warmup: float = 0, rewarm: int = 0, floor: float = 0.0
) -> Schedule:
    """Cosine waves that begin again, each with a warm-up of its own (``cosine_with_restarts`` in Hugging Face).

    Args:
        peak: highest rate of every cycle.
        cycles: how many, all of one length.
        steps: of the whole training.
        warmup: of the first cycle: linear, from 0.
        rewarm: steps of the linear rise from ``floor`` to ``peak`` that later cycles begin with.
        floor: last rate of every cycle.
    """
    peak, floor = positive_rate("peak", peak), _floor(floor, peak)
    number, rise = whole_number("cycles", cycles, least=1), whole_number("rewarm", rewarm, least=0)

    def rule(i: Array, total: int) -> Array:
        begun = _count(warmup, total)
        period = max(total - begun, 1) / number
        if rise >= period:
            raise InputError(f"a cycle has {period:g} steps, too few to re-warm for {rise}")
        done = np.maximum(i - begun, 0)
        cycle = np.minimum(done // period, number - 1)
        inside = done - cycle * period
        rising = (cycle > 0) & (inside < rise)
        start = np.where(cycle > 0, rise, 0)
        fallen = floor + (peak - floor) * _wave(np.clip((inside - start) / (period - start), 0.0, 1.0))
        rates = np.where(rising, floor + (peak - floor) * inside / max(rise, 1), fallen)
        return _warmed(i, begun, peak, rates)

    return _made("cyclic", locals(), rule, steps)


def chain(*parts: Schedule | Spec | str) -> Schedule:
    """One schedule after another: continual training, re-warming, several decays from one run.

    Every part but the last needs a length of its own.

    >>> chain(cosine(1.0, steps=2), constant(0.5)).values(4).round(6).tolist()
    [1.0, 0.5, 0.5, 0.5]
    """
    if not parts:
        raise InputError("chain needs at least one schedule")
    made = [schedule(part) for part in parts]
    for part in made[:-1]:
        if part.length is None:
            raise InputError(f"{part.spec} is not the last of a chain and needs steps=...")
    before = sum(part.length or 0 for part in made[:-1])
    length = None if made[-1].length is None else before + made[-1].length

    def rule(i: Array, total: int) -> Array:
        if total <= before and length is None:
            raise InputError(f"a chain needs more than {before} steps, got {total}")
        pieces = [part.values() for part in made[:-1]] + [made[-1].values(total - before)]
        return _held(np.concatenate(pieces), i)

    peak = max(part.peak for part in made)
    return Schedule(f"chain({', '.join(part.spec for part in made)})", peak, length, rule)


def listed(rates: Sequence[float] | Array, *, name: str | None = None) -> Schedule:
    """A rate for every step, as given."""
    values = np.asarray(rates, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise InputError(f"rates must be a list of numbers, got shape {values.shape}")
    if not np.isfinite(values).all() or (values < 0).any() or not (values > 0).any():
        raise InputError("rates must be finite and not negative, and not all 0")
    shown = name or f"listed([{', '.join(f'{v:g}' for v in values[:3])}{', ...' if len(values) > 3 else ''}])"
    return Schedule(shown, float(values.max()), len(values), lambda i, total: _held(values, i))


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    made.__name__: made for made in (constant, cosine, linear, wsd, multi_step, inverse_sqrt, cyclic, chain, listed)
}


def schedule(given: Schedule | Spec | str | Sequence[float] | Array) -> Schedule:
    """A schedule from its text, from a CSV file, or from a list of rates.

    >>> str(schedule("cosine(peak=3e-4, warmup=100, floor=3e-5)"))
    'cosine(peak=0.0003, warmup=100, floor=3e-05)'

    Raises:
        InputError: an unknown name or option, or a value out of range.
    """
    if isinstance(given, Schedule):
        return given
    if isinstance(given, str):
        if "(" not in given and Path(given).suffix:
            from lossmith.laws.recorded_schedules import from_file

            return from_file(given)
        given = parse_spec(given)
    if not isinstance(given, Spec):
        return listed(given)
    factory = SCHEDULES.get(given.name)
    if factory is None:
        raise InputError(f"unknown schedule '{given.name}': {did_you_mean(given.name, SCHEDULES)}")
    parameters = inspect.signature(factory).parameters
    for option in given.options:
        if option not in parameters:
            raise InputError(f"schedule '{given.name}' has no option '{option}': {did_you_mean(option, parameters)}")
    try:
        bound = inspect.signature(factory).bind(*given.arguments, **given.options)
    except TypeError as error:
        raise InputError(f"schedule '{given}': {error}") from None
    try:
        return factory(*bound.args, **bound.kwargs)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"schedule '{given}': {error}") from None


def _made(name: str, given: dict[str, Any], rule: Callable[[Array, int], Array], length: int | None = None) -> Schedule:
    """The schedule called ``name``, written with those of its factory's arguments that are not the default."""
    parameters = inspect.signature(SCHEDULES[name]).parameters
    options = {key: given[key] for key, p in parameters.items() if key in given and given[key] != p.default}
    if "stable" in options:
        options.pop("steps", None)
    for key in ("warmup", "decay", "cycles", "timescale"):
        if key in parameters and given[key] is not parameters[key].default:
            _length(key, given[key], positive=key in ("cycles", "timescale"))
    text = ", ".join(f"{key}={list(v) if isinstance(v, tuple) else v!r}" for key, v in options.items())
    own = None if length is None else whole_number("steps", length, least=1)
    return Schedule(f"{name}({text.replace(chr(39), '')})", given["peak"], own, rule)


def _warmed(i: Array, warmup: int, peak: float, rates: Array, start: float = 0.0) -> Array:
    return np.where(i < warmup, start + (peak - start) * i / max(warmup, 1), rates)


def _progress(i: Array, warmup: int, total: int) -> Array:
    return np.clip((i - warmup) / max(total - warmup, 1), 0.0, 1.0)


def _wave(progress: Array) -> Array:
    return 0.5 * (1 + np.cos(np.pi * progress))


def _held(values: Array, i: Array) -> Array:
    return values[np.minimum(i.astype(np.int64), len(values) - 1)]


def _count(length: float, total: int) -> int:
    """A length in steps."""
    return round(length * total) if 0 < length < 1 else int(length)


def whole_number(name: str, value: Any, *, least: int) -> int:
    """``value`` as a whole number of at least ``least``; an :class:`InputError` that calls it ``name`` otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise InputError(f"{name} must be a whole number, got {value!r}")
    if not np.isfinite(value) or value != int(value) or value < least:
        raise InputError(f"{name} must be a whole number of at least {least}, got {value:g}")
    return int(value)


def positive_rate(name: str, value: Any) -> float:
    """``value`` as a positive finite number; an :class:`InputError` that calls it ``name`` otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise InputError(f"{name} must be a number, got {value!r}")
    if not (np.isfinite(value) and value > 0):
        raise InputError(f"{name} must be positive and finite, got {value:g}")
    return float(value)


def _length(name: str, value: Any, *, positive: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise InputError(f"{name} must be a number, got {value!r}")
    if not np.isfinite(value) or value < 0 or (positive and value == 0):
        raise InputError(f"{name} must be finite and {'positive' if positive else 'not negative'}, got {value:g}")


def _floor(value: float, peak: float) -> float:
    if value != 0:
        positive_rate("floor", value)
    if value > peak:
        raise InputError(f"floor must not exceed the peak {peak:g}, got {value:g}")
    return float(value)
