"""Temperature: how often domains of very different size are drawn, or how much their examples count instead."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from lossmith.errors import did_you_mean

Decay = Literal["step", "linear", "cosine"]


@dataclass(frozen=True, slots=True)
class Cooldown:
    r"""A temperature that changes once while a model is trained: high first, so that small domains are learned fast,
    then low, before they are learned by heart.

    Args:
        start: temperature at first.
        end: temperature in the end. Above ``start`` it is the reverse, which is worse on small domains.
        switch: the first optimiser step at ``end``, or (below 1) the share of all steps that comes before it.
        decay: ``step`` changes at once; ``linear`` and ``cosine`` go gradually and arrive at ``switch``. In the paper
            many small steps are worse than one.

    Written ``5 -> 1`` where names have options: ``sampler=temperature(tau=5 -> 1)``.

    Source: Li et al., "Upsample or Upweight? Balanced Training on Heavily Imbalanced Datasets", 2025,
    arXiv 2410.04579, section 4.

    >>> schedule = Cooldown(5, 1, switch=0.5)
    >>> [schedule.at(step, steps=6) for step in range(6)]
    [5.0, 5.0, 5.0, 1.0, 1.0, 1.0]
    """

    start: float = 5.0
    end: float = 1.0
    switch: float = 0.5
    decay: Decay = "step"

    def __post_init__(self) -> None:
        check_temperature(self.start, "the first temperature")
        check_temperature(self.end, "the last temperature")
        if self.decay not in get_args(Decay):
            raise ValueError(f"unknown decay '{self.decay}': {did_you_mean(str(self.decay), get_args(Decay))}")
        if self.decay != "step" and not (math.isfinite(self.start) and math.isfinite(self.end)):
            raise ValueError(f"a {self.decay} decay needs finite temperatures, got {self.start:g} and {self.end:g}")
        switch = self.switch
        if isinstance(switch, bool) or not isinstance(switch, int | float):
            raise TypeError(f"switch must be a number, got {switch!r}")
        if not (0 < switch < 1 or (switch >= 1 and switch == int(switch) and not isinstance(switch, float))):
            raise ValueError(
                f"switch must be a share between 0 and 1 (both excluded) or a step, a whole number >= 1; got {switch}"
            )

    def switch_step(self, steps: int | None = None) -> int:
        """The first step at ``end``.

        Raises:
            ValueError: a share of an unknown number of ``steps``, or a switch after the last one.
        """
        if self.switch >= 1:
            if steps is not None and self.switch >= steps:
                raise ValueError(f"switch is step {self.switch}, but there are only {steps} steps")
            return int(self.switch)
        if steps is None:
            raise ValueError(f"switch={self.switch:g} is a share of the steps, and their number is not known here")
        return round(self.switch * steps)

    def at(self, step: int, steps: int | None = None) -> float:
        """The temperature at a step (from 0), of ``steps``."""
        switch = self.switch_step(steps)
        if step >= switch:
            return float(self.end)
        if self.decay == "step":
            return float(self.start)
        way = step / switch
        if self.decay == "cosine":
            way = (1 - math.cos(math.pi * way)) / 2
        return float(self.start + way * (self.end - self.start))


def cooldown(start: float = 5.0, end: float = 1.0, *, switch: float = 0.5, decay: Decay = "step") -> Cooldown:
    """A :class:`Cooldown`, by the name that options use."""
    return Cooldown(start, end, switch, decay)


def temperature_at(tau: float | Cooldown, step: int, steps: int | None = None) -> float:
    """The temperature at a step of a constant or of a schedule."""
    return tau.at(step, steps) if isinstance(tau, Cooldown) else float(tau)


def temperature_probabilities(sizes: Sequence[float] | Tensor, tau: float = 5.0) -> Float[Tensor, " domains"]:
    r"""How likely each domain is to be drawn at a temperature.

    .. math:: p(i; \tau) = \frac{|D_i|^{1/\tau}}{\sum_j |D_j|^{1/\tau}}

    ``tau=1`` is proportional to size, ``inf`` the same for all; below 1 large domains get more than their share. mT5's
    ``alpha`` is ``1 / tau``.

    Args:
        sizes: positive, in one unit: documents, sequences or tokens. The temperature has another effect in each.
        tau: > 0.

    Returns:
        Probabilities in float64.

    Raises:
        ValueError: no domain, a size that is not positive and finite, ``tau`` not above 0.

    Source: arXiv 2410.04579, section 2.

    >>> temperature_probabilities([1_000_000, 10_000, 100], tau=2)
    tensor([0.9009, 0.0901, 0.0090], dtype=torch.float64)
    """
    return _log_probabilities(sizes, tau).exp()


def scalarization_weights(sizes: Sequence[float] | Tensor, tau: float = 5.0) -> Float[Tensor, " domains"]:
    r"""Weights that have, with proportional sampling, the expectation of temperature sampling.

    .. math:: w_i(\tau) = \frac{p(i; \tau)}{p(i; 1)}, \qquad \mathbb{E}_{i \sim p(\cdot; 1)}[w_i] = 1

    The loss is the plain mean of ``w * loss``. Dividing by the sum of the batch's weights instead would be another
    objective.

    Arguments, errors and source as of :func:`temperature_probabilities`.

    >>> scalarization_weights([900, 100], tau=2)
    tensor([0.8333, 2.5000], dtype=torch.float64)
    """
    return (_log_probabilities(sizes, tau) - _log_probabilities(sizes, 1.0)).exp()


def weight_second_moment(sizes: Sequence[float] | Tensor, tau: float = 5.0) -> float:
    r"""Second moment of the weights: by how much upweighting multiplies the second moment of the gradient.

    .. math:: F(\tau) = \sum_i \frac{p(i; \tau)^2}{p(i; 1)} = \mathbb{E}_{p(\cdot; 1)}[w^2] \ge 1

    1 at ``tau=1`` or where all sizes are equal; it never falls as ``tau >= 1`` grows. ``1 / F`` is the share of a batch
    that effectively counts.

    Arguments and errors as of :func:`temperature_probabilities`; source: arXiv 2410.04579, theorems 2 and 3.

    >>> round(weight_second_moment([900, 100], tau=5), 9)
    1.946555442
    """
    return float((2 * _log_probabilities(sizes, tau) - _log_probabilities(sizes, 1.0)).logsumexp(0).exp())


def check_temperature(tau: object, name: str = "tau") -> None:
    """Refuse what is not a temperature; warn of one below 1."""
    if isinstance(tau, bool) or not isinstance(tau, int | float):
        raise TypeError(f"{name} must be a number > 0 or a schedule such as 5 -> 1, got {tau!r}")
    if not tau > 0:
        raise ValueError(f"{name} must be > 0, got {tau}")
    if tau < 1:
        warnings.warn(f"{name} = {tau:g} is below 1: large domains get more than their share", stacklevel=3)


def _log_probabilities(sizes: Sequence[float] | Tensor, tau: float) -> Tensor:
    check_temperature(tau)
    values = torch.as_tensor(sizes, dtype=torch.float64).detach()
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"sizes must be one number per domain, at least one; got shape {tuple(values.shape)}")
    for number, size in enumerate(values.tolist()):
        if not (size > 0 and math.isfinite(size)):
            raise ValueError(f"sizes must be positive and finite, but domain {number} has {size:g}")
    # In logs neither 1e12 ** (1 / tau) nor a ratio of small probabilities leaves the range.
    return torch.log_softmax(values.log() / tau, dim=0)
