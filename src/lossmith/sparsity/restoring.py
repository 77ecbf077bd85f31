"""Changing a model's weights in place, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def unchanged_on_failure() -> Iterator[Callable[[Tensor], None]]:
    """Yield a function to be called on each weight before it is changed: after any error all are as they were.

    Later layers are judged by the outputs of earlier, pruned ones, so that nothing can be written at the end. Copies
    are held in the memory of the CPU, until the pass is over.

    >>> weight = torch.ones(2)
    >>> try:
    ...     with unchanged_on_failure() as keep:
    ...         keep(weight)
    ...         weight[0] = 0
    ...         raise KeyboardInterrupt
    ... except KeyboardInterrupt:
    ...     print(weight)
    tensor([1., 1.])
    """
    own: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(weight: Tensor) -> None:
        if id(weight) not in own:
            own[id(weight)] = weight, weight.detach().to("cpu", copy=True)

    try:
        yield keep
    except BaseException:
        with torch.no_grad():
            for weight, before in own.values():
                weight.copy_(before)
        raise


def check_finite(weights: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError`` for the first of the weights that are NaN or infinite, before hours are spent on others."""
    for name, weight in weights.items():
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{name} has weights that are NaN or infinite, which have no rank")
