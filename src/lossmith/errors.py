"""The errors that a user, not a developer, has to read."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable


class InputError(ValueError):
    """A mistake in what the user gave: one sentence that names the argument or file, what was found, what is allowed.

    The command line prints the sentence and exits with code 2; from Python it is an ordinary ``ValueError``.
    """


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """Name the nearest of ``allowed`` and list them all.

    >>> did_you_mean("linuper", ["linupper", "quadratic"])
    "did you mean 'linupper'? (allowed: linupper, quadratic)"
    """
    allowed = sorted(allowed)
    near = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    listing = ", ".join(allowed) if allowed else "none"
    return f"did you mean '{near[0]}'? (allowed: {listing})" if near else f"allowed: {listing}"


def is_disk_full(error: BaseException) -> bool:
    """Whether ``error`` (an ``OSError``, or a native library's wrapping of one) says that the disk is full."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error).lower()
    return "no space left on device" in text or "disk quota exceeded" in text
