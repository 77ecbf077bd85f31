"""Writing files so that nobody ever reads half of one."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossmith.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it takes its place, on any error it is removed.

    >>> import tempfile; folder = Path(tempfile.mkdtemp())
    >>> with replacing(folder / "a.txt") as temporary:
    ...     _ = temporary.write_text("whole")
    >>> (folder / "a.txt").read_text()
    'whole'
    """
    path = Path(path)
    check_file_place(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files private; a result is as readable as any file that the user makes.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | Path, content: bytes) -> Path:
    """Write ``content``, whole or not at all; returns the path."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    return Path(path)


def write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8, whole or not at all; what has no UTF-8 form (half of a surrogate pair) becomes a question mark."""
    return write_bytes(path, text.encode("utf-8", "replace"))


def write_json(path: str | Path, value: Any) -> None:
    """Write strict JSON, whole or not at all; numbers that are not finite become ``null``."""
    write_text(path, json.dumps(finite_or_none(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_picture(figure: Figure, path: str | Path) -> None:
    """Write a figure, whole or not at all, in the format that the name ends with; without an ending as PNG."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix.lstrip(".").lower() or "png", dpi=150)


def read_json(path: str | Path) -> Any:
    """Read a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def finite_or_none(value: Any) -> Any:
    """JSON has no NaN or infinity: replace them by ``None``, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite_or_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(item) for item in value]
    return value


def read_utf8(path: str | Path, what: str = "", *, encoding: str = "utf-8") -> str:
    """All of a text file.

    Args:
        path: of the file.
        what: the file is, for the sentence (``"CoNLL file"``).
        encoding: ``utf-8``, or ``utf-8-sig`` where editors may have left a mark at the start.

    Raises:
        InputError: no such file, or not UTF-8 (the byte is named).
    """
    name = f"{what} {path}" if what else str(path)
    try:
        return Path(path).read_text(encoding=encoding)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise InputError(f"{name} does not exist or is a folder") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 at byte {error.start}") from None


def check_file_place(path: str | Path, *sources: str | Path | None) -> None:
    """Refuse, before any work, to write a file where none can be, or over what is read.

    Args:
        path: of the file, which may exist.
        *sources: files and folders that are read; what is no path, such as a hub id, or ``None`` is passed over.

    Raises:
        InputError: a folder has the name, a folder above is a file or cannot be written to, or it is one of
            ``sources``.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"cannot write {path}: a folder has that name")
    for source in sources:
        if source is not None and path.exists() and Path(source).exists() and path.samefile(source):
            raise InputError(f"cannot write {path}: it is what is read; choose another place")
    _check_parents(path)


def check_new_folder(folder: str | Path) -> None:
    """Refuse, before any work, to write results into a folder that holds something, or where none can be made.

    Raises:
        InputError: it does, or is a file, or a folder above is a file or cannot be written to.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} exists and is not an empty folder; remove it or choose another")
    _check_parents(folder)


def _check_parents(path: Path) -> None:
    above = next((folder for folder in path.absolute().parents if folder.exists()), None)
    if above is None or not above.is_dir():
        raise InputError(f"cannot write into {path.parent}: it, or a folder above it, is a file")
    if not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"cannot write {path}: no permission to write into {above}")


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """Yield a new folder beside ``path``; on success it takes its place, on any error it is removed.

    Raises:
        InputError: ``path`` holds something already.

    >>> import tempfile; place = Path(tempfile.mkdtemp()) / "model"
    >>> with replacing_folder(place) as temporary:
    ...     _ = (temporary / "a.txt").write_text("whole")
    >>> [file.name for file in place.iterdir()]
    ['a.txt']
    """
    path = Path(path)
    check_new_folder(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        if path.exists():
            path.rmdir()
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def safetensors_header(path: str | Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file as it stands, and the byte at which its tensors begin.

    Raises:
        InputError: the header or the length of the file is wrong.
    """
    from safetensors import SafetensorError, safe_open

    try:
        # Checks the whole header and the length of the file.
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged: {error}") from None
    with Path(path).open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    return header, 8 + length
