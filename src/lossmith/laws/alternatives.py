"""What if: trainings ranked by the loss that a fitted law predicts, with limits of the differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lossmith.errors import InputError
from lossmith.laws.tables import amount
from lossmith.registry import parse_assignments

if TYPE_CHECKING:
    from lossmith.laws.fitted import Fitted


@dataclass(frozen=True, slots=True)
class Alternative:
    """One training.

    Attributes:
        params: parameters.
        tokens: training tokens.
        flops: ``6 params tokens``.
        loss: predicted.
        low, high: limits of the loss of such a run; NaN without bootstrap refits.
        above: how much more than the best alternative's.
        above_low, above_high: limits of that difference. Both losses depend on the same uncertain parameters, so that
            it is surer than either.
    """

    params: float
    tokens: float
    flops: float
    loss: float
    low: float
    high: float
    above: float
    above_low: float
    above_high: float


@dataclass(frozen=True, slots=True)
class Alternatives:
    """Trainings, best first.

    Attributes:
        ranked: see :class:`Alternative`.
        level: of the limits.
    """

    ranked: tuple[Alternative, ...]
    level: float

    def text(self) -> str:
        """A table, for people."""
        limits = np.isfinite(self.ranked[0].low)
        head = f"{'loss':>6}"
        if limits:
            head += f"  {f'{100 * self.level:g}% limits':^16}"
        # Within 80 columns.
        wide = 26 if limits else 14
        lines = [f"{head}  {'above the best':^{wide}}  {'params':>8} {'tokens':>8} {'FLOPs':>8}"]
        for one in self.ranked:
            line = f"{one.loss:6.4f}"
            if limits:
                line += f"  [{one.low:.4f}, {one.high:.4f}]"
            more = "" if one is self.ranked[0] else f"{one.above:+.4f}"
            if limits and more:
                more += f" [{one.above_low:+.4f}, {one.above_high:+.4f}]"
            lines.append(f"{line}  {more:{wide}}  {one.params:8.3g} {one.tokens:8.3g} {one.flops:8.3g}")
        return "\n".join(lines)


def rank_trainings(
    fitted: Fitted,
    what_if: Sequence[str | Mapping[str, Any]],
    *,
    flops: float | None = None,
    level: float = 0.9,
    optimum: tuple[float, float] | None = None,
) -> Alternatives:
    """Rank trainings by their predicted loss.

    Args:
        fitted: a fit of Chinchilla's law, or of one with the same inputs.
        what_if: each with ``params`` and ``tokens``; where ``flops`` is given one of them, or ``ratio`` (tokens per
            parameter), is enough. As text: ``"params=7e9, tokens=2e12"``.
        flops: budget for those that leave something open.
        level: of the limits.
        optimum: parameters and tokens of one more training to rank, the law's own choice.

    Raises:
        InputError: something else than these, or not enough to know both.
    """
    if not 0 < level < 1:
        raise InputError(f"level must lie between 0 and 1, got {level:g}")
    pairs = [_completed(one, flops) for one in what_if] + ([optimum] if optimum is not None else [])
    size, data = (np.array(values, dtype=np.float64) for values in zip(*pairs, strict=True))
    loss = fitted.predict(params=size, tokens=data)
    best = int(loss.argmin())
    low = high = above_low = above_high = np.full(len(loss), np.nan)
    if len(fitted.samples):
        found = fitted.interval(level, params=size, tokens=data)
        low, high = found.low, found.high
        draws = fitted.predict_samples(params=size, tokens=data)
        gaps = draws - draws[:, best : best + 1]
        # Around the fit's own difference, and as much wider as predicting upwards has shown to be needed.
        centred = (gaps - np.median(gaps, 0)) * fitted.calibration.factor + (loss - loss[best])
        above_low, above_high = np.quantile(centred, [(1 - level) / 2, (1 + level) / 2], axis=0)
    columns = (size, data, 6 * size * data, loss, low, high, loss - loss[best], above_low, above_high)
    order = np.argsort(loss, kind="stable")
    names = Alternative.__slots__
    rows = [Alternative(**{name: float(v[i]) for name, v in zip(names, columns, strict=True)}) for i in order]
    return Alternatives(tuple(rows), level)


def _completed(asked: str | Mapping[str, Any], flops: float | None) -> tuple[float, float]:
    given = parse_assignments(asked) if isinstance(asked, str) else dict(asked)
    if unknown := set(given) - {"params", "tokens", "ratio"}:
        raise InputError(f"what_if takes params, tokens and ratio (tokens per parameter), got '{sorted(unknown)[0]}'")
    values: dict[str, float] = {}
    for name, value in given.items():
        try:
            values[name] = amount(value) if isinstance(value, str) else float(value)
        except (TypeError, ValueError):
            raise InputError(f"what_if: {name} must be a number, got '{value}'") from None
        if np.isnan(values[name]):
            raise InputError(f"what_if: {name} must be a number, got '{value}'")
        if not (np.isfinite(values[name]) and values[name] > 0):
            raise InputError(f"what_if: {name} must be positive and finite, got {values[name]:g}")
    size, data, ratio = (values.get(name) for name in ("params", "tokens", "ratio"))
    known = len(values)
    if known == 1 and flops is not None:
        product = flops / 6
        if ratio is not None:
            return (product / ratio) ** 0.5, (product * ratio) ** 0.5
        return (size, product / size) if size is not None else (product / data, data)  # type: ignore[operator, return-value]
    if known == 2:
        if ratio is None:
            return size, data  # type: ignore[return-value]
        return (size, size * ratio) if size is not None else (data / ratio, data)  # type: ignore[operator, return-value]
    raise InputError(
        f"what_if needs two of params, tokens and ratio{', or one of them with flops' if flops is None else ''}; got "
        f"{', '.join(values) or 'nothing'}"
    )
