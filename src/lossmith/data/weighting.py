"""Weightings: how much each example of a batch counts, decided from the losses of that batch.

A weighting is a callable ``weights = weighting(losses, step)``: one non-negative weight per example, summing to 1
over the whole optimiser step, without gradient. Those here implement "Dynamic Loss-Based Sample Reweighting for
Improved Large Language Model Pretraining" (Sow et al., 2025, arXiv 2502.06733) and its uniform baseline.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from lossmith.data.scalarization import Scalarization, scalarization
from lossmith.data.temperature import cooldown
from lossmith.errors import did_you_mean

Strategy = Literal["linupper", "quadratic", "extremes", "linear"]
Schedule = float | Callable[[int], float] | None
Variant = Literal["step", "released"]

__all__ = [
    "LossWeighting",
    "Scalarization",
    "UniformWeighting",
    "WeightStatistics",
    "Weighting",
    "constant",
    "cooldown",
    "extremes",
    "linear",
    "linupper",
    "loss_weights",
    "quadratic",
    "scalarization",
    "uniform",
    "warmup",
    "weight_statistics",
]


@runtime_checkable
class Weighting(Protocol):
    """What :class:`lossmith.training.Trainer` accepts as ``weighting=``; a plain function is enough.

    Optional attributes are used where they exist: ``needs_losses(step) -> bool`` (False lets the trainer know
    the weights before the forward pass), ``per_micro_batch: bool`` (weights are normalised inside each micro-batch
    over all processes), ``length_weighted: bool`` (multiply by the number of targets, normalise again). With
    ``by_domain: bool`` it is called with ``domains=``, the number of each example's domain, after
    ``for_domains(sizes, steps)``; ``sums_to_one = False`` says that weights sum to 1 in expectation alone.
    """

    def __call__(self, losses: Float[Tensor, batch], step: int, /) -> Float[Tensor, batch]:
        """Weights of ``losses`` at optimiser step ``step`` (counted from 0)."""
        ...


def loss_weights(
    losses: Float[Tensor, batch],
    strategy: Strategy = "linupper",
    *,
    r: float | None = 0.4,
    delta: float = 1.0,
    clip_quantile: float | None = None,
) -> Float[Tensor, batch]:
    r"""Weights of one batch from its losses: min-max normalise, shape, softmax.

    .. math::
        h_i = \delta\,\frac{2 l_i - l_{\max} - l_{\min}}{\max(l_{\max} - l_{\min},\ 10^{-6})}, \qquad
        w_i = \frac{e^{f(h_i)/r}}{\sum_j e^{f(h_j)/r}}

    ============  ==========================  ======================================================
    strategy      f(h)                        meaning
    ============  ==========================  ======================================================
    linupper      ``min(h + delta, delta)``   easy examples lose weight, hard ones are capped
    quadratic     ``1 - h^2 / delta^2``       the middle counts most
    extremes      ``abs(h)``                  both ends count most
    linear        ``(h + delta) / 2``         rises over the whole range (in the authors' code only)
    ============  ==========================  ======================================================

    Args:
        losses: losses of the whole batch (all processes, all micro-batches), in nats; detached here.
        strategy: the shape function ``f``.
        r: temperature > 0; small is aggressive, large is even; ``None`` or ``inf`` gives exactly ``1 / batch``.
        delta: half-width of the normalised range; the paper and its code use 1.
        clip_quantile: clip losses to ``[1-q, q]`` quantiles first, against outliers that take the whole range;
            off by default.

    Returns:
        Positive weights that sum to 1, in the dtype of ``losses`` (float32 for half precision). With
        ``delta=1``, ``batch * w_i <= exp(1 / r)``.

    Raises:
        ValueError: ``r`` not positive, an unknown strategy, losses not one-dimensional, empty, or not finite.

    Source: arXiv 2502.06733, section 3; the softmax is the solution of
    ``max_w sum_i w_i f_i - r KL(w || uniform)``.

    >>> loss_weights(torch.tensor([1.0, 2.0, 3.0, 5.0]), "linupper", r=1.0)
    tensor([0.1237, 0.2039, 0.3362, 0.3362])
    """
    if strategy not in get_args(Strategy):
        raise ValueError(f"unknown strategy '{strategy}': {did_you_mean(str(strategy), get_args(Strategy))}")
    if r is not None and not r > 0:
        raise ValueError(f"r must be > 0 (or None for even weights), got {r}")
    if not (delta > 0 and math.isfinite(delta)):
        raise ValueError(f"delta must be a finite number > 0, got {delta}")
    if clip_quantile is not None and not 0.5 < clip_quantile <= 1:
        raise ValueError(f"clip_quantile must be in (0.5, 1], got {clip_quantile}")
    if losses.ndim != 1:
        raise ValueError(f"losses must have one dimension, one loss per example, got shape {tuple(losses.shape)}")
    if losses.numel() == 0:
        raise ValueError("losses must hold at least one example that has a target, got none")
    dtype = losses.dtype if losses.dtype in (torch.float32, torch.float64) else torch.float32
    # float64: in half precision the differences of similar losses are mostly rounding.
    values = losses.detach().to(torch.float32 if losses.device.type == "mps" else torch.float64)
    finite = torch.isfinite(values)
    if not finite.all():
        bad = (~finite).nonzero().flatten().tolist()
        raise ValueError(f"losses must be finite; examples {bad[:8]} are {values[bad[:8]].tolist()}")
    if r is None or math.isinf(r):
        return torch.full_like(values, 1.0 / values.numel()).to(dtype)
    if clip_quantile is not None:
        low, high = torch.quantile(values, torch.tensor([1 - clip_quantile, clip_quantile]).to(values))
        values = values.clamp(low, high)
    low, high = values.min(), values.max()
    # (l - min) - (max - l) keeps the digits that 2 l - (max + min) would cancel away.
    h = delta * ((values - low) - (high - values)) / (high - low).clamp_min(1e-6)
    if strategy == "linupper":
        f = torch.clamp_max(h + delta, delta)
    elif strategy == "quadratic":
        f = 1 - (h / delta).square()
    elif strategy == "extremes":
        f = h.abs()
    else:
        f = 0.5 * (h + delta)
    g = torch.exp((f - f.max()) / r)
    return (g / g.sum()).to(dtype)


def constant(r: float) -> Callable[[int], float]:
    """The schedule that is ``r`` at every step."""
    _check_temperature(r)
    return lambda step: r


def warmup(r: float, steps: int = 2000, *, r_initial: float = 100.0) -> Callable[[int], float]:
    """``r_initial`` (nearly even weights) for the first ``steps`` optimiser steps, then ``r``.

    The authors' large-model code does this with 100 and 2000, since early losses do not rank examples usefully.

    >>> schedule = warmup(0.4, steps=10)
    >>> schedule(9), schedule(10)
    (100.0, 0.4)
    """
    _check_temperature(r)
    _check_temperature(r_initial, "r_initial")
    if steps < 0:
        raise ValueError(f"steps must be >= 0, got {steps}")
    return lambda step: r_initial if step < steps else r


@dataclass(frozen=True, slots=True)
class UniformWeighting:
    """Every example counts the same (or, with ``length_weighted``, every target token does)."""

    length_weighted: bool = False
    per_micro_batch: bool = False

    def needs_losses(self, step: int) -> bool:
        """Never: the weights are known before the forward pass."""
        return False

    def __call__(self, losses: Float[Tensor, batch], step: int = 0) -> Float[Tensor, batch]:
        """``1 / batch`` for every example."""
        return torch.full_like(losses.detach(), 1.0 / max(losses.numel(), 1))


@dataclass(frozen=True, slots=True)
class LossWeighting:
    """A strategy of :func:`loss_weights` with its schedule: a :class:`Weighting`.

    Args:
        strategy: ``linupper``, ``quadratic``, ``extremes`` or ``linear``.
        r: temperature > 0, or a callable ``step -> r``; ``None`` is even weights.
        delta: half-width of the normalised range.
        burn_in_steps: even weights for that many optimiser steps first (the authors' GPT-2 runs use 1000).
        clip_quantile: see :func:`loss_weights`.
        length_weighted: multiply each weight by the example's number of targets and normalise again, so that with
            even weights every token counts the same.
        variant: ``"step"`` normalises over the whole optimiser step, so that gradient accumulation does not change
            the method; ``"released"`` does it inside each micro-batch (over all processes), as the released code.
    """

    strategy: Strategy = "linupper"
    r: Schedule = 0.4
    delta: float = 1.0
    burn_in_steps: int = 0
    clip_quantile: float | None = None
    length_weighted: bool = False
    variant: Variant = "step"

    def __post_init__(self) -> None:
        if self.variant not in get_args(Variant):
            raise ValueError(f"unknown variant '{self.variant}': {did_you_mean(str(self.variant), get_args(Variant))}")
        if self.burn_in_steps < 0:
            raise ValueError(f"burn_in_steps must be >= 0, got {self.burn_in_steps}")
        if self.r is not None and not callable(self.r):
            _check_temperature(self.r)
        loss_weights(torch.zeros(2), self.strategy, r=1.0, delta=self.delta, clip_quantile=self.clip_quantile)

    @property
    def per_micro_batch(self) -> bool:
        """Whether the weights sum to 1 over each micro-batch instead of over the optimiser step."""
        return self.variant == "released"

    def temperature(self, step: int) -> float | None:
        """``r`` at ``step``; ``None`` while weights are even."""
        if step < self.burn_in_steps:
            return None
        r = self.r(step) if callable(self.r) else self.r
        return None if r is None or math.isinf(r) else r

    def needs_losses(self, step: int) -> bool:
        """Whether the weights of ``step`` depend on its losses; not during burn-in or with ``r`` infinite."""
        return self.temperature(step) is not None

    def __call__(self, losses: Float[Tensor, batch], step: int = 0) -> Float[Tensor, batch]:
        """Weights of the whole batch; see :func:`loss_weights`."""
        r = self.temperature(step)
        if losses.numel() == 1 and r is not None:
            warnings.warn(
                f"{self.strategy} weighting of a batch of one example has no effect: its weight is always 1",
                stacklevel=2,
            )
        return loss_weights(losses, self.strategy, r=r, delta=self.delta, clip_quantile=self.clip_quantile)


def uniform(*, length_weighted: bool = False) -> UniformWeighting:
    """No reweighting: the baseline. Bypasses the softmax (a softmax of the losses themselves is *not* uniform)."""
    return UniformWeighting(length_weighted)


def linupper(
    r: Schedule = 0.4,
    *,
    delta: float = 1.0,
    burn_in_steps: int = 0,
    clip_quantile: float | None = None,
    length_weighted: bool = False,
    variant: Variant = "step",
) -> LossWeighting:
    """Down-weight examples already learned, cap the hardest: the paper's best. Options as :class:`LossWeighting`."""
    return LossWeighting("linupper", r, delta, burn_in_steps, clip_quantile, length_weighted, variant)


def quadratic(
    r: Schedule = 0.4,
    *,
    delta: float = 1.0,
    burn_in_steps: int = 0,
    clip_quantile: float | None = None,
    length_weighted: bool = False,
    variant: Variant = "step",
) -> LossWeighting:
    """Examples in the middle of the batch's range count most. Options as :class:`LossWeighting`."""
    return LossWeighting("quadratic", r, delta, burn_in_steps, clip_quantile, length_weighted, variant)


def extremes(
    r: Schedule = 0.4,
    *,
    delta: float = 1.0,
    burn_in_steps: int = 0,
    clip_quantile: float | None = None,
    length_weighted: bool = False,
    variant: Variant = "step",
) -> LossWeighting:
    """The easiest and the hardest examples count most. Options as :class:`LossWeighting`."""
    return LossWeighting("extremes", r, delta, burn_in_steps, clip_quantile, length_weighted, variant)


def linear(
    r: Schedule = 0.4,
    *,
    delta: float = 1.0,
    burn_in_steps: int = 0,
    clip_quantile: float | None = None,
    length_weighted: bool = False,
    variant: Variant = "step",
) -> LossWeighting:
    """Weight rises with the loss over the whole range: in the released code only. Options as :class:`LossWeighting`."""
    return LossWeighting("linear", r, delta, burn_in_steps, clip_quantile, length_weighted, variant)


@dataclass(frozen=True, slots=True)
class WeightStatistics:
    """How uneven the weights of a step were."""

    effective_sample_size: float
    largest_relative_weight: float
    loss_min: float
    loss_mean: float
    loss_max: float


def weight_statistics(losses: Float[Tensor, batch], weights: Float[Tensor, batch]) -> WeightStatistics:
    """Effective sample size ``1 / sum w²``, ``batch * max w``, and the range of the losses.

    >>> weight_statistics(torch.tensor([1.0, 3.0]), torch.tensor([0.5, 0.5])).effective_sample_size
    2.0
    """
    w, values = weights.detach().double(), losses.detach().double()
    low, high = torch.aminmax(values)
    summary = torch.stack([1 / w.square().sum(), w.numel() * w.max(), low, values.mean(), high]).tolist()
    return WeightStatistics(*summary)


def _check_temperature(r: float, name: str = "r") -> None:
    if isinstance(r, bool) or not isinstance(r, int | float):
        raise TypeError(f"{name} must be a number > 0 or a schedule, got {r!r}")
    if not r > 0:
        raise ValueError(f"{name} must be > 0, got {r}")
