"""Changing a model's weights in place, or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def unchanged_on_failure() -> Iterator[Callable[[Tensor], None]]:
    """Yield a function to be called on each weight before it is changed: after any error all are as they were.

    Later layers are judged by the outputs of earlier, pruned ones, so that nothing can be written at the end. Copies
    are held in a temporary file until the pass is over: they take room on the disk, not in memory.

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
    own: dict[int, tuple[Tensor, int]] = {}
    with tempfile.TemporaryFile() as file:

        def keep(weight: Tensor) -> None:
            if id(weight) not in own and weight.numel():
                numbers = weight.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
                place = file.seek(0, os.SEEK_END)
                file.write(numbers.numpy().data)
                own[id(weight)] = weight, place

        try:
            yield keep
        except BaseException:
            with torch.no_grad():
                for weight, place in own.values():
                    file.seek(place)
                    numbers = bytearray(file.read(weight.nbytes))
                    weight.copy_(torch.frombuffer(numbers, dtype=weight.dtype).reshape(weight.shape))
            raise


def check_finite(weights: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError`` for the first of the weights that are NaN or infinite, before hours are spent on others."""
    for name, weight in weights.items():
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{name} has weights that are NaN or infinite, which have no rank")
