"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from lossmith.errors import InputError


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Write to a temporary name in the same folder, then rename; the folder is made where it is missing.

    An ``OSError`` (a full disk) leaves the old file, if any, and no temporary one. ``InputError`` where a
    folder's name is taken by a file, or the file's by a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"cannot write {path}: a folder has that name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"cannot write into {path.parent}: it, or a folder above it, is a file") from None
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; a report is as readable as any file that the user makes.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path


def write_text(path: str | Path, content: str) -> Path:
    """Write UTF-8 as :func:`write_bytes`; half of a surrogate pair becomes a question mark."""
    return write_bytes(path, content.encode("utf-8", "replace"))
