"""Upweighting: every example drawn alike, those of small domains counting more."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lossmith.data.sampling import with_schedule
from lossmith.data.temperature import Cooldown, Decay, check_temperature, scalarization_weights, temperature_at


@dataclass(frozen=True, slots=True)
class Scalarization:
    r"""Weights by domain whose expected loss is that of temperature sampling: a :class:`Weighting`.

    .. math:: L = \frac{1}{B} \sum_b w_{f(x_b)}(\tau)\, \ell_b, \qquad w_i(\tau) = p(i; \tau) / p(i; 1)

    The weights of a batch sum to 1 in expectation, not in each batch: dividing by their sum would weigh a domain by the
    company that it happens to be in, which is another objective.

    Args:
        tau: temperature > 0, or a :class:`~lossmith.data.Cooldown`.
        sizes: of the domains, by number; 0 for one without training examples. ``None``: the Trainer counts the column
            ``domain`` of its training data.
        steps: optimiser steps, for a schedule; the Trainer's own where it is ``None``.

    Source: arXiv 2410.04579, section 2.
    """

    tau: float | Cooldown = 5.0
    sizes: tuple[float, ...] | None = None
    steps: int | None = None

    by_domain = True
    sums_to_one = False

    def __post_init__(self) -> None:
        if not isinstance(self.tau, Cooldown):
            check_temperature(self.tau)
        elif self.steps is not None:
            self.tau.switch_step(self.steps)

    def needs_losses(self, step: int) -> bool:
        """Never: the weights are known before the forward pass."""
        return False

    def for_domains(self, sizes: Sequence[float] | np.ndarray, steps: int | None = None) -> Scalarization:
        """These weights for domains of such sizes; sizes and steps that are set stay."""
        own = tuple(float(size) for size in sizes) if self.sizes is None else self.sizes
        return dataclasses.replace(self, sizes=own, steps=steps if self.steps is None else self.steps)

    def weights(self, step: int = 0) -> Float[Tensor, " domains"]:
        """The weight of each domain at a step, in units of the mean.

        Raises:
            ValueError: the sizes are not known.
        """
        if self.sizes is None:
            raise ValueError("the sizes of the domains are not known: use for_domains(sizes), or the Trainer")
        sizes = torch.tensor(self.sizes, dtype=torch.float64)
        weights = torch.full_like(sizes, float("nan"))
        weights[sizes > 0] = scalarization_weights(sizes[sizes > 0], temperature_at(self.tau, step, self.steps))
        return weights

    def __call__(
        self, losses: Float[Tensor, " batch"], step: int = 0, *, domains: Int[Tensor, " batch"]
    ) -> Float[Tensor, " batch"]:
        """``w / batch`` for every example.

        Raises:
            ValueError: a domain that has no training examples.
        """
        weights = self.weights(step)
        numbers = domains.detach().long().cpu()
        if numbers.numel() and (int(numbers.min()) < 0 or int(numbers.max()) >= len(weights)):
            raise ValueError(f"domains must lie from 0 to {len(weights) - 1}, got {numbers.unique().tolist()}")
        chosen = weights[numbers]
        if bool(chosen.isnan().any()):
            missing = numbers[chosen.isnan()].unique().tolist()
            raise ValueError(f"domain {missing[0]} is in the batch but has no training examples")
        return (chosen / max(chosen.numel(), 1)).to(losses.detach())


def scalarization(
    tau: float | Cooldown = 5.0, *, switch: float | None = None, decay: Decay | None = None
) -> Scalarization:
    """Small domains count more, as temperature sampling would draw them more often. Options as of ``temperature``.

    Source: arXiv 2410.04579.

    >>> scalarization(tau=2).for_domains([900, 100]).weights()
    tensor([0.8333, 2.5000], dtype=torch.float64)
    """
    return Scalarization(with_schedule(tau, switch, decay))
