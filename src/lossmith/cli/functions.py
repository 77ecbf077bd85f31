"""Functions of the user's own, named on the command line."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lossmith.errors import InputError


@dataclass(frozen=True, slots=True)
class NamedFunction:
    """A user's function: what goes wrong in it is said in a sentence that begins with its name."""

    function: Callable[..., Any]
    name: str

    def __call__(self, *arguments: Any) -> Any:
        """The function's answer."""
        try:
            return self.function(*arguments)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"{self.name} ended with {type(error).__name__}: {error}") from error


def function_named(name: str, option: str) -> Callable[..., Any]:
    """What ``module:function`` names; modules in the current folder count.

    Raises:
        InputError: not of this form, no such module or function, or not callable; begins with ``option``. What the
            function itself raises later becomes such an error, too.

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
    except Exception as error:
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        raise InputError(f"{option} {name}: the module {module} cannot be imported ({kind}{error})") from None
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise InputError(f"{option} {name}: {getattr(found, '__name__', module)} has no '{part}'")
        found = getattr(found, part)
    if not callable(found):
        raise InputError(f"{option} {name} is not callable")
    return NamedFunction(found, f"{option} {name}")
