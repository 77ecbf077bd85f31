"""The run record: the folder of one run, safe to kill at any moment.

::

    config.json            what was asked for
    environment.json       versions, device, threads, seed, git revision
    metrics.jsonl          one line per log, appended and flushed as it comes
    checkpoint-<step>/     model.safetensors, optimizer.safetensors, ..., complete.json (written last)
    result.json            written once, at the end: its presence means that the run is finished

A checkpoint without ``complete.json``, or whose files have other sizes than it lists, was being written when the
process died: it is ignored and removed at the next start. A half-written last line of ``metrics.jsonl`` is dropped.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lossmith.errors import InputError
from lossmith.files import finite_or_none, read_json, write_json, write_text

_COMPLETE = "complete.json"


class RunRecord:
    """One run's folder. Opening it repairs what a killed process left half-written.

    >>> import tempfile
    >>> record = RunRecord(tempfile.mkdtemp(), config={"seed": 0})
    >>> record.append({"step": 1, "train/loss": 2.5})
    >>> record.metrics()
    [{'step': 1, 'train/loss': 2.5}]
    """

    def __init__(self, folder: str | Path, config: Mapping[str, Any] | None = None):
        """Open ``folder``, creating it when ``config`` is given.

        Raises:
            InputError: the folder holds the record of a run with another configuration.
        """
        self.folder = Path(folder)
        if config is None:
            self.config: Any = read_json(self.folder / "config.json")
            return
        self.config = json.loads(json.dumps(finite_or_none(dict(config))))
        path = self.folder / "config.json"
        if path.exists():
            if changed := differences(read_json(path), self.config):
                raise InputError(f"{self.folder} holds another run, which differs in {'; '.join(changed[:4])}")
        else:
            write_json(path, self.config)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold this record against other processes; the lock ends with the process, however it ends."""
        with locked(self.folder):
            yield

    def append(self, metrics: Mapping[str, Any]) -> None:
        """Add one line to ``metrics.jsonl``."""
        line = json.dumps(finite_or_none(dict(metrics)), allow_nan=False) + "\n"
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(line)

    def metrics(self) -> list[dict[str, Any]]:
        """All whole lines of ``metrics.jsonl``."""
        return read_json_lines(self.folder / "metrics.jsonl")

    def rewind(self, step: int) -> None:
        """Forget metrics after ``step``: what a resumed run will log again."""
        path = self.folder / "metrics.jsonl"
        if path.exists():
            kept = [line for line in self.metrics() if line.get("step", 0) <= step]
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def last_checkpoint(self) -> Path | None:
        """The newest whole checkpoint; half-written ones are removed."""
        found = []
        for folder in self.folder.glob("checkpoint-*"):
            if not re.fullmatch(r"checkpoint-\d+", folder.name):
                continue
            if is_complete(folder):
                found.append(folder)
            else:
                shutil.rmtree(folder, ignore_errors=True)
        return max(found, key=checkpoint_step, default=None)

    def result(self) -> dict[str, Any] | None:
        """What :meth:`finish` wrote, or ``None`` while the run is not finished."""
        path = self.folder / "result.json"
        return read_json(path) if path.exists() else None

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write ``result.json``: the run is over."""
        write_json(self.folder / "result.json", dict(result))


def mark_complete(checkpoint: str | Path) -> None:
    """Declare ``checkpoint`` whole: list its files and sizes in ``complete.json``."""
    checkpoint = Path(checkpoint)
    sizes = {
        str(p.relative_to(checkpoint)): p.stat().st_size
        for p in sorted(checkpoint.rglob("*"))
        if p.is_file() and p.name != _COMPLETE
    }
    write_json(checkpoint / _COMPLETE, {"files": sizes})


def is_complete(checkpoint: str | Path) -> bool:
    """Whether every file that ``complete.json`` lists is there in full."""
    checkpoint = Path(checkpoint)
    try:
        sizes = read_json(checkpoint / _COMPLETE)["files"]
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


def checkpoint_step(checkpoint: str | Path) -> int:
    """The step in a checkpoint folder's name.

    >>> checkpoint_step("runs/a/checkpoint-300")
    300
    """
    return int(Path(checkpoint).name.rpartition("-")[2])


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file; a missing file has none, a half-written last line does not count."""
    if not path.exists():
        return []
    lines = []
    with path.open("rb") as file:
        for raw in file:
            try:
                line = json.loads(raw) if raw.endswith(b"\n") else None
            except ValueError:
                line = None
            if isinstance(line, dict):
                lines.append(line)
    return lines


@contextmanager
def locked(folder: Path, *, wait_seconds: float = 20.0) -> Iterator[None]:
    """Hold ``folder`` against other lossmith processes (``flock``: released when the process ends, even by SIGKILL)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"cannot write into {folder}: it, or a folder above it, is a file") from None
    with (folder / ".lock").open("a") as file:
        deadline = time.monotonic() + wait_seconds
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise InputError(
                        f"another lossmith process is working in {folder}; wait for it or choose another folder"
                    ) from None
                time.sleep(0.2)
        yield


@contextmanager
def removed_if_bare(folder: Path) -> Iterator[None]:
    """Leave no ``folder`` behind an error where it holds nothing but the lock."""
    try:
        yield
    except BaseException:
        if folder.is_dir() and {path.name for path in folder.iterdir()} <= {".lock"}:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def differences(old: Any, new: Any, place: str = "") -> list[str]:
    """Where two JSON values differ: ``key: old -> new``.

    >>> differences({"seed": 1, "model": {"name": "tiny"}}, {"seed": 1, "model": {"name": "small"}})
    ["model.name ('tiny' there, 'small' asked for)"]
    """
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted({*old, *new}):
            found += differences(old.get(key), new.get(key), f"{place}.{key}" if place else key)
        return found
    return [] if old == new else [f"{place} ({old!r} there, {new!r} asked for)"]


def environment() -> dict[str, Any]:
    """What the numbers may depend on besides the configuration."""
    import torch

    packages = (
        "lossmith",
        "torch",
        "transformers",
        "accelerate",
        "datasets",
        "tokenizers",
        "numpy",
        "safetensors",
    )
    versions = {}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "versions": versions,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processor": _processor(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cores": available_cores(),
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "git": git_revision(Path.cwd()),
    }


def git_revision(folder: Path) -> dict[str, Any] | None:
    """Commit and cleanliness of the user's folder, or ``None`` when it is not a git checkout."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "modified": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def available_cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
