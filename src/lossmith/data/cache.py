"""The folder of prepared corpora: each appears whole, in one step, whoever else works on it."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import InputError
from .formats import reason

_PREFIX = "partial-"


def cache_folder(cache_dir: str | os.PathLike[str] | None) -> Path:
    """The cache's folder, made if need be: ``cache_dir``, ``$LOSSMITH_CACHE`` or ``~/.cache/lossmith``."""
    folder = Path(cache_dir or os.environ.get("LOSSMITH_CACHE") or "~/.cache/lossmith").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cache_dir: {str(folder)!r} cannot be used as a folder ({reason(error)})") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"cache_dir: {str(folder)!r} cannot be written to")
    return folder


@contextmanager
def unfinished_folder(cache: Path) -> Iterator[Path]:
    """A folder to work in, on the cache's file system; gone at the end unless :func:`publish` renamed it."""
    _remove_abandoned(cache)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=cache))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(work: Path, target: Path, is_whole: Callable[[Path], bool]) -> None:
    """Give the finished folder its name in one step; another process that was faster has made the same."""
    os.chmod(work, 0o777 & ~_umask())  # mkdtemp's folder is for the owner alone
    for _ in range(3):
        try:
            os.rename(work, target)
            return
        except OSError:
            if not target.exists():
                raise
            if is_whole(target):
                return
            # Damaged from outside: out of the way, by a rename so that no reader sees half of it.
            shutil.rmtree(_moved_aside(target), ignore_errors=True)


def _moved_aside(folder: Path) -> Path:
    aside = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=folder.parent))
    with suppress(FileNotFoundError):  # another process has cleared it
        os.rename(folder, aside)  # onto an empty folder
    return aside


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _remove_abandoned(cache: Path, age: float = 24 * 3600.0) -> None:
    """Delete what killed processes left behind; a day is longer than any that still works is silent."""
    for folder in cache.glob(_PREFIX + "*"):
        try:
            newest = max(path.stat().st_mtime for path in [folder, *folder.iterdir()])
        except OSError:
            continue
        if time.time() - newest > age:
            shutil.rmtree(folder, ignore_errors=True)
