"""The order in which training examples are drawn: all alike, or by their domains.

What ``sampler=`` names. A sampling is an object with ``draw(dataset, steps=, batch_size=, seed=)``, which returns a
``torch.utils.data.Sampler`` of ``steps * batch_size`` indices; what is drawn for optimiser step ``s`` are the indices
from ``s * batch_size`` on, whatever the micro-batches, processes and workers that they are dealt to.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch.utils.data import Sampler

from lossmith.data.mixture import examples_of_part
from lossmith.data.temperature import (
    Cooldown,
    Decay,
    check_temperature,
    cooldown,
    temperature_at,
    temperature_probabilities,
)

__all__ = [
    "DomainSampler",
    "PermutationStream",
    "Sampling",
    "Shuffled",
    "TemperatureSampler",
    "TemperatureSampling",
    "Unimax",
    "cooldown",
    "domain_parts",
    "domains_of",
    "shuffled",
    "temperature",
    "unimax",
    "unimax_probabilities",
]

# Optimiser steps whose domains are drawn at once.
_BLOCK = 256


@runtime_checkable
class Sampling(Protocol):
    """What :class:`lossmith.training.Trainer` accepts as ``sampler=``."""

    def draw(self, dataset: Any, *, steps: int, batch_size: int, seed: int) -> Sampler[int]:
        """Indices of ``dataset`` for ``steps`` optimiser steps of ``batch_size`` examples (over all processes)."""
        ...


class PermutationStream(Sampler[int]):
    """``total`` indices: one random permutation of all examples after another, the last one cut.

    The order depends on ``seed`` alone: not on the arm, the micro-batch size, the number of processes or the state of
    any global generator. There is no short batch between two passes.

    >>> list(PermutationStream(3, total=5, seed=0)) == list(PermutationStream(3, total=5, seed=0))
    True
    """

    def __init__(self, size: int, *, total: int, seed: int):
        if size < 1:
            raise ValueError(f"the data set must hold at least one example, got {size}")
        self.size, self.total, self.seed = size, total, seed

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        left, number = self.total, 0
        while left > 0:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            yield from torch.randperm(self.size, generator=generator)[:left].tolist()
            left, number = left - self.size, number + 1


class DomainSampler(Sampler[int]):
    """Draws a domain for each example, independently, then the domain's next example.

    Within a domain examples come in one random permutation after another, as in
    :class:`lossmith.data.MixtureSampler`. Both depend on ``seed`` alone, and the random number behind each choice of a
    domain does not depend on the probabilities: runs that differ in them stay as similar as they can be. Iterating
    again gives the same, which is how a resumed run continues.

    Args:
        parts: for each domain the indices of its examples.
        probabilities: ``step -> one probability per domain``.
        total: how many examples to draw.
        batch_size: examples per optimiser step, over all processes and micro-batches.
        seed: of everything random.

    Raises:
        ValueError: no domain, an empty one, a batch size below 1.
    """

    def __init__(
        self,
        parts: Sequence[Sequence[int]] | Sequence[np.ndarray],
        probabilities: Callable[[int], Sequence[float] | torch.Tensor | np.ndarray],
        *,
        total: int,
        batch_size: int = 1,
        seed: int = 0,
    ):
        self.parts = [np.asarray(part, dtype=np.int64) for part in parts]
        if not self.parts:
            raise ValueError("there must be at least one domain, got none")
        if empty := [number for number, part in enumerate(self.parts) if len(part) == 0]:
            raise ValueError(f"domain {empty[0]} has no examples; leave it out")
        if batch_size < 1 or total < 0:
            raise ValueError(f"batch_size must be at least 1 and total at least 0, got {batch_size} and {total}")
        if len(self.parts) == 1:
            warnings.warn("there is only one domain: drawing by domains changes nothing", stacklevel=2)
        self.probabilities, self.total, self.batch_size, self.seed = probabilities, total, batch_size, seed

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        streams = [examples_of_part(part, number, self.seed) for number, part in enumerate(self.parts)]
        for block in self.domains():
            for domain in block.tolist():
                yield next(streams[domain])

    def domains(self) -> Iterator[np.ndarray]:
        """The domains drawn, in order, some hundred steps at a time."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + 499_979)
        first, last = 0, -(-self.total // self.batch_size)
        while first < last:
            steps = range(first, min(first + _BLOCK, last))
            uniform = torch.rand(len(steps), self.batch_size, dtype=torch.float64, generator=generator).numpy()
            drawn = np.empty(uniform.shape, dtype=np.int64)
            for row, step in enumerate(steps):
                borders = np.cumsum(np.asarray(self.probabilities(step), dtype=np.float64))
                # Rounding must not leave a gap above the last border.
                borders[-1] = np.inf
                drawn[row] = np.searchsorted(borders, uniform[row], side="right")
            yield drawn.reshape(-1)[: self.total - first * self.batch_size]
            first = steps.stop

    def counts(self) -> np.ndarray:
        """How many examples of each domain all draws hold."""
        found = np.zeros(len(self.parts), dtype=np.int64)
        for block in self.domains():
            found += np.bincount(block, minlength=len(found))
        return found

    def passes(self) -> np.ndarray:
        """How often each domain's examples are drawn on average: the epochs of each domain."""
        return self.counts() / np.array([len(part) for part in self.parts])


class TemperatureSampler(DomainSampler):
    r"""Draws domain ``i`` with probability :math:`|D_i|^{1/\tau} / \sum_j |D_j|^{1/\tau}`, then its next example.

    A :class:`~lossmith.data.Cooldown` changes ``tau`` exactly at the first example of its step; the order within each
    domain goes on where it was.

    Args:
        parts: for each domain the indices of its examples; their numbers are the sizes.
        tau: temperature > 0, or a schedule.
        total: how many examples to draw.
        batch_size: examples per optimiser step, over all processes and micro-batches: what makes steps of examples.
        seed: of everything random.

    Raises:
        ValueError: as :class:`DomainSampler`; ``tau`` not above 0; a switch after the last step.

    Source: arXiv 2410.04579, sections 2 and 4. The draws are independent from example to example.

    >>> sampler = TemperatureSampler([range(90), range(90, 100)], Cooldown(100, 1), total=40, batch_size=4, seed=0)
    >>> from_small = [index >= 90 for index in sampler]
    >>> sum(from_small[:20]), sum(from_small[20:])
    (14, 0)
    """

    def __init__(
        self,
        parts: Sequence[Sequence[int]] | Sequence[np.ndarray],
        tau: float | Cooldown = 5.0,
        *,
        total: int,
        batch_size: int = 1,
        seed: int = 0,
    ):
        sizes = [len(part) for part in parts]
        steps = -(-total // max(batch_size, 1))
        if isinstance(tau, Cooldown):
            tau.switch_step(steps)
        else:
            check_temperature(tau)
        kept: dict[float, np.ndarray] = {}

        def probabilities(step: int) -> np.ndarray:
            now = temperature_at(tau, step, steps)
            if now not in kept:
                kept.clear()
                kept[now] = temperature_probabilities(sizes, now).numpy()
            return kept[now]

        super().__init__(parts, probabilities, total=total, batch_size=batch_size, seed=seed)
        self.tau = tau


@dataclass(frozen=True, slots=True)
class Shuffled:
    """All examples alike, in one random permutation after another: the default."""

    def draw(self, dataset: Any, *, steps: int, batch_size: int, seed: int) -> PermutationStream:
        """See :class:`Sampling`."""
        return PermutationStream(len(dataset), total=steps * batch_size, seed=seed)


@dataclass(frozen=True, slots=True)
class TemperatureSampling:
    """Temperature sampling of a data set with a column ``domain``; see :class:`TemperatureSampler`.

    Args:
        tau: temperature > 0, or a :class:`~lossmith.data.Cooldown`.
        domains: the number of each example's domain, where the data set has no such column.
    """

    tau: float | Cooldown = 5.0
    domains: Any = None

    def __post_init__(self) -> None:
        if not isinstance(self.tau, Cooldown):
            check_temperature(self.tau)

    def draw(self, dataset: Any, *, steps: int, batch_size: int, seed: int) -> TemperatureSampler:
        """See :class:`Sampling`."""
        parts = domain_parts(domains_of(dataset) if self.domains is None else self.domains)
        return TemperatureSampler(parts, self.tau, total=steps * batch_size, batch_size=batch_size, seed=seed)


@dataclass(frozen=True, slots=True)
class Unimax:
    """As even as it can be without passing through any domain more often than ``epochs`` times; see :func:`unimax`."""

    epochs: float = 4.0
    domains: Any = None

    def __post_init__(self) -> None:
        if isinstance(self.epochs, bool) or not isinstance(self.epochs, int | float) or not 0 < self.epochs < math.inf:
            raise ValueError(f"epochs must be a finite number > 0, got {self.epochs!r}")

    def draw(self, dataset: Any, *, steps: int, batch_size: int, seed: int) -> DomainSampler:
        """See :class:`Sampling`."""
        parts = domain_parts(domains_of(dataset) if self.domains is None else self.domains)
        shares = unimax_probabilities([len(part) for part in parts], steps * batch_size, epochs=self.epochs)
        return DomainSampler(parts, lambda step: shares, total=steps * batch_size, batch_size=batch_size, seed=seed)


def shuffled() -> Shuffled:
    """All examples alike: one random permutation after another. The default."""
    return Shuffled()


def temperature(
    tau: float | Cooldown = 5.0, *, switch: float | None = None, decay: Decay | None = None
) -> TemperatureSampling:
    """Small domains more often than their size says: ``temperature(tau=5)``, ``temperature(tau=5 -> 1)``.

    Args:
        tau: 1 is proportional, ``inf`` all domains alike; or a schedule.
        switch: of the schedule: share of the steps (0.5) or a step.
        decay: of the schedule: ``step``, ``linear`` or ``cosine``.

    Source: arXiv 2410.04579.

    >>> temperature(Cooldown(5, 1), switch=0.25).tau.switch
    0.25
    """
    return TemperatureSampling(with_schedule(tau, switch, decay))


def unimax(epochs: float = 4.0) -> Unimax:
    """All domains alike, but none passed through more often than ``epochs`` times (in expectation).

    Source: Chung et al., "UniMax: Fairer and more Effective Language Sampling for Large-Scale Multilingual
    Pretraining", 2023, arXiv 2304.09151, algorithm 1.
    """
    return Unimax(epochs)


def with_schedule(tau: float | Cooldown, switch: float | None, decay: Decay | None) -> float | Cooldown:
    """``tau`` with options of its schedule changed."""
    if switch is None and decay is None:
        return tau
    if not isinstance(tau, Cooldown):
        raise ValueError(f"switch and decay belong to a schedule such as tau=5 -> 1, but tau is {tau}")
    changes: dict[str, Any] = {"switch": switch, "decay": decay}
    return dataclasses.replace(tau, **{name: value for name, value in changes.items() if value is not None})


def unimax_probabilities(sizes: Sequence[float], budget: float, *, epochs: float = 4.0) -> torch.Tensor:
    """Shares of UniMax: from the smallest domain on an even part of what is left, or ``epochs`` passes if that is less.

    Args:
        sizes: of the domains.
        budget: examples drawn in all, in the unit of the sizes.
        epochs: passes through a domain at most; where all domains together cannot fill the budget, each exceeds it in
            the same proportion.

    >>> unimax_probabilities([1000, 100, 10], budget=200, epochs=3)
    tensor([0.4250, 0.4250, 0.1500], dtype=torch.float64)
    """
    temperature_probabilities(sizes, 1.0)
    left, share = float(budget), [0.0] * len(sizes)
    order = sorted(range(len(sizes)), key=lambda number: sizes[number])
    for place, number in enumerate(order):
        share[number] = min(left / (len(order) - place), epochs * sizes[number])
        left -= share[number]
    values = torch.tensor(share, dtype=torch.float64)
    return values / values.sum()


def domain_parts(numbers: Any) -> list[np.ndarray]:
    """The indices of each domain that occurs, in the order of the domains' numbers.

    Args:
        numbers: the number of each example's domain.

    Raises:
        ValueError: something else.
    """
    found = _checked(numbers)
    return [np.flatnonzero(found == number) for number in np.unique(found).tolist()]


def domains_of(dataset: Any) -> np.ndarray:
    """The number of each example's domain: the column ``domain`` of a Hugging Face data set or of a list of rows.

    Raises:
        ValueError: there is no such column.
    """
    if hasattr(dataset, "column_names"):
        if "domain" not in dataset.column_names:
            raise ValueError(f"the data set needs a column 'domain', it has {', '.join(dataset.column_names)}")
        return _checked(dataset.select_columns(["domain"]).with_format("numpy")[:]["domain"])
    if not all(isinstance(row, Mapping) and "domain" in row for row in dataset):
        raise ValueError("every row of the data set needs a 'domain', the number of its domain")
    return _checked([row["domain"] for row in dataset])


def _checked(data: Any) -> np.ndarray:
    numbers = np.asarray(data)
    if numbers.ndim != 1 or not len(numbers) or not np.issubdtype(numbers.dtype, np.integer) or numbers.min() < 0:
        raise ValueError(
            f"domains must be one whole number >= 0 per example, got {numbers.dtype} of shape {numbers.shape}"
        )
    return numbers.astype(np.int64)
