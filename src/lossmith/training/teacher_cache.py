"""What a frozen teacher said about an example, kept on disk."""

from __future__ import annotations

import hashlib
import uuid
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lossmith.errors import InputError
from lossmith.files import read_json, write_json

SHARD_BYTES = 64 * 2**20
_SAMPLED = 1024


class TeacherCache:
    """Tensors by the content of the example they belong to, in safetensors files that only ever grow in number.

    Args:
        folder: created where it is missing. Several processes may share it: each writes files of its own.
        teacher: whose outputs these are; a folder that belongs to another teacher is refused.

    Files are written under a temporary name and renamed, so that a killed run leaves none half-written: it loses at
    most the last ``SHARD_BYTES``, which are then computed again.
    """

    def __init__(self, folder: str | Path, teacher: nn.Module):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        identity = {"teacher": fingerprint(teacher)}
        path = self.folder / "teacher.json"
        if path.exists() and read_json(path) != identity:
            raise InputError(f"cache {folder} holds the outputs of another teacher; choose another folder")
        write_json(path, identity)
        self._places: dict[str, Path] = {}
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._read: set[Path] = set()
        self._look()
        # What is left is written when the cache is no longer used, or the interpreter ends.
        self._finalizer = weakref.finalize(self, _write, self.folder, self._pending)

    def get(self, key: str) -> Tensor | None:
        """The tensor of ``key``, or ``None``."""
        if key in self._pending:
            return self._pending[key]
        if key not in self._places:
            return None
        from safetensors import safe_open

        with safe_open(self._places[key], framework="pt") as shard:
            return shard.get_tensor(key)

    def put(self, key: str, value: Tensor) -> None:
        """Keep ``value``; it is on disk after :meth:`flush`, or when ``SHARD_BYTES`` have come together."""
        self._pending[key] = value.detach().cpu().contiguous().clone()
        self._pending_bytes += value.numel() * value.element_size()
        if self._pending_bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is not on disk yet."""
        _write(self.folder, self._pending)
        self._pending_bytes = 0
        self._look()

    def __len__(self) -> int:
        return len(self._places.keys() | self._pending.keys())

    def _look(self) -> None:
        from safetensors import safe_open

        for path in sorted(set(self.folder.glob("outputs-*.safetensors")) - self._read):
            with safe_open(path, framework="pt") as shard:
                self._places |= dict.fromkeys(shard.keys(), path)
            self._read.add(path)


def content_key(rows: Iterable[tuple[str, Tensor]]) -> str:
    """A name for one example: a hash of its inputs' names, types, shapes and values."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in rows:
        value = value.detach().cpu().contiguous()
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fingerprint(model: nn.Module) -> str:
    """A hash of the names, shapes and up to 1024 evenly spaced values of every parameter and buffer."""
    digest = hashlib.blake2b(digest_size=16)
    state: Mapping[str, Any] = model.state_dict()
    for name, value in sorted(state.items()):
        if isinstance(value, Tensor):
            flat = value.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // _SAMPLED)].cpu().contiguous()
            digest.update(f"{name}:{value.dtype}:{tuple(value.shape)};".encode())
            digest.update(sample.view(torch.uint8).numpy().tobytes() if sample.numel() else b"")
    return digest.hexdigest()


def _write(folder: Path, pending: dict[str, Tensor]) -> None:
    if not pending:
        return
    from safetensors.torch import save

    from lossmith.files import write_bytes

    write_bytes(folder / f"outputs-{uuid.uuid4().hex}.safetensors", save(pending))
    pending.clear()
