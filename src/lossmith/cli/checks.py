"""What numbers on the command line must be: checked before any work, in the words of the house."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import typer

from lossmith.errors import InputError

_LARGEST_SEED = 2**32 - 1


def at_least(least: int) -> Callable[..., Any]:
    """A callback for an option, alone or repeated, that must not be smaller than ``least``."""

    def check(param: typer.CallbackParam, value: Any) -> Any:
        for number in value if isinstance(value, list | tuple) else [value]:
            if number is not None and number < least:
                raise InputError(f"{_name(param)} must be at least {least}, got {number}")
        return value

    return check


def above_zero(param: typer.CallbackParam, value: float | None) -> float | None:
    """A callback for an option that must be finite and above 0, such as a learning rate."""
    if value is not None and not 0 < value < math.inf:
        raise InputError(f"{_name(param)} must be above 0 and finite, got {value:g}")
    return value


def seed(param: typer.CallbackParam, value: int) -> int:
    """A callback for ``--seed``: what NumPy and PyTorch both take."""
    if not 0 <= value <= _LARGEST_SEED:
        raise InputError(f"{_name(param)} must be a whole number from 0 to {_LARGEST_SEED}, got {value}")
    return value


def _name(param: typer.CallbackParam) -> str:
    return max(param.opts, key=len)
