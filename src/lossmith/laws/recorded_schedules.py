"""Schedules that others made: from files, from PyTorch, from runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lossmith.laws.schedules import Schedule, listed, positive_rate, whole_number
from lossmith.laws.terms import Array

if TYPE_CHECKING:
    from torch.optim import Optimizer


def from_file(path: str | Path) -> Schedule:
    """Rates of a CSV with columns ``step`` and ``lr``, filled in between as :func:`lossmith.laws.every_step` does."""
    from lossmith.laws.curves import read_rates

    return listed(read_rates(path), name=str(path))


def from_scheduler(make: Callable[[Optimizer], Any], peak: float, steps: int) -> Schedule:
    """The rates of any PyTorch scheduler, read off by stepping a dummy optimiser.

    >>> import torch
    >>> from_scheduler(lambda o: torch.optim.lr_scheduler.StepLR(o, 2), peak=1.0, steps=5).values().round(3).tolist()
    [1.0, 1.0, 0.1, 0.1, 0.01]
    """
    import torch

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=positive_rate("peak", peak))
    scheduler = make(optimizer)
    rates = []
    for _ in range(whole_number("steps", steps, least=1)):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return listed(rates, name=f"{type(scheduler).__name__}, {steps} steps")


def stretched(rates: Array, steps: int) -> Schedule:
    """The same shape over another number of steps: what a run twice as long would use.

    >>> stretched(np.array([4.0, 2.0]), 4).values().tolist()
    [4.0, 3.5, 2.5, 2.0]
    """
    old = np.asarray(rates, dtype=np.float64)
    middle = (np.arange(whole_number("steps", steps, least=1)) + 0.5) * len(old) / steps - 0.5
    return listed(np.interp(middle, np.arange(len(old)), old), name=f"the same schedule over {steps} steps")
