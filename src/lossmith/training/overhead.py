"""What a training pays beside its steps."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def garbage_frozen() -> Iterator[None]:
    """Keep the garbage collector away from what is loaded already, while a training runs.

    Accelerate collects garbage when a training begins: 0.2 s over all modules, a third of a short training.

    >>> with garbage_frozen():
    ...     "train"
    'train'
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
