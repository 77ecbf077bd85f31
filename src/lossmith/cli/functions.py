"""Functions of the user's own, named on the command line."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from lossmith.errors import InputError


def function_named(name: str, option: str) -> Callable[..., Any]:
    """What ``module:function`` names; modules in the current folder count.

    Raises:
        InputError: not of this form, no such module or function, or not callable; begins with ``option``.

    >>> function_named("math:sqrt", "--judge")(9.0)
    3.0
    """
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise InputError(f"{option} must be written module:function, got '{name}'")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{option} {name}: the module {module} cannot be imported ({error})") from None
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise InputError(f"{option} {name}: {getattr(found, '__name__', module)} has no '{part}'")
        found = getattr(found, part)
    if not callable(found):
        raise InputError(f"{option} {name} is not callable")
    return found  # type: ignore[no-any-return]
