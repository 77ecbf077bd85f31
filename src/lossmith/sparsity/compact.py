"""Checkpoints without their zeros: the values that are left, and a bit for every place."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lossmith.errors import InputError
from lossmith.files import read_json, replacing_folder, safetensors_header
from lossmith.sparsity.magnitude_files import _copy, _files, model_class

# Plain Transformers looks for model.safetensors, and says that it is missing: nothing is read by mistake.
_PREFIX, _MARK = "compact.", "lossmith_compact"
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}
_VALUES, _PLACES = ".nonzero_values", ".nonzero_bits"


@dataclass(frozen=True, slots=True)
class CompactReport:
    """Bytes of the weights before and after, and which tensors are stored without their zeros."""

    before: int
    after: int
    tensors: tuple[str, ...]

    @property
    def ratio(self) -> float:
        """Size after over size before."""
        return self.after / self.before

    def summary(self) -> str:
        """One line."""
        return (
            f"compact: {self.before / 2**20:,.1f} -> {self.after / 2**20:,.1f} MiB ({self.ratio:.2f}x), "
            f"{len(self.tensors)} tensors without their zeros"
        )


def save_compact(folder: str | Path, out: str | Path) -> CompactReport:
    r"""Write a checkpoint without its zeros.

    A tensor of n numbers of b bits with k that are not zero takes ``k b + n`` bits instead of ``n b``: half of the
    weights of float32 0.53 of the room, of bfloat16 0.56. One that would not become smaller is stored as it is. What is
    a zero is decided by its bits, so that ``-0.0`` and NaN come back too. Read and written piece by piece: the model
    may be larger than the memory.

    Args:
        folder: of a Hugging Face checkpoint, safetensors.
        out: new folder with ``compact.*.safetensors`` and everything else that ``folder`` has.

    Raises:
        InputError: no such folder, a missing shard (named), a damaged file; ``out`` is not empty.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is no folder of a model: it has no config.json")
    files = _files(folder)
    before = sum(path.stat().st_size for path in files)
    tensors: list[str] = []

    def write(target: Path) -> None:
        _copy(folder, target, weights=False)
        for path in files:
            tensors.extend(_compress(path, target / f"{_PREFIX}{path.name}"))

    target = _into(out, write)
    after = sum(path.stat().st_size for path in target.glob(f"{_PREFIX}*"))
    return CompactReport(before, after, tuple(tensors))


def is_compact(folder: str | Path) -> bool:
    """Whether a folder holds what :func:`save_compact` wrote."""
    return any(Path(folder).glob(f"{_PREFIX}*.safetensors"))


def expand_compact(folder: str | Path, out: str | Path) -> Path:
    """The checkpoint that :func:`save_compact` was given: weight files byte for byte, for plain Transformers.

    Raises:
        InputError: ``folder`` holds no compact checkpoint, lacks a shard, or is damaged; ``out`` is not empty.
    """
    folder = Path(folder)
    files = _compact_files(folder)

    def write(target: Path) -> None:
        _copy(folder, target, weights=False)
        for path in files:
            _expand(path, target / path.name.removeprefix(_PREFIX))

    return _into(out, write)


def load_compact(folder: str | Path, **options: Any) -> Any:
    """The model of a compact checkpoint, an ordinary one of Transformers.

    Args:
        folder: that :func:`save_compact` wrote.
        **options: of ``from_pretrained`` (``dtype``, ``attn_implementation``).

    Raises:
        InputError: as :func:`expand_compact`.
    """
    import torch
    import transformers
    from safetensors.torch import load

    folder = Path(folder)
    weights: dict[str, torch.Tensor] = {}
    for path in _compact_files(folder):
        parts: list[bytes] = []
        _expanded(path, parts.append)
        weights |= load(b"".join(parts))
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    options.setdefault("dtype", "auto")
    return model_class(config).from_pretrained(None, config=config, state_dict=weights, **options).eval()


def _into(out: str | Path, write: Callable[[Path], None]) -> Path:
    """Write a folder that is there only once it is complete."""
    with replacing_folder(out) as temporary:
        write(temporary)
    return Path(out)


def _compact_files(folder: Path) -> list[Path]:
    if not is_compact(folder):
        raise InputError(f"{folder} holds no compact checkpoint (no {_PREFIX}*.safetensors)")
    index = folder / "model.safetensors.index.json"
    names = set(read_json(index)["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    for name in sorted(names):
        if not (folder / f"{_PREFIX}{name}").is_file():
            raise InputError(f"{folder} lacks {_PREFIX}{name}; copy the whole folder")
    return [folder / f"{_PREFIX}{name}" for name in sorted(names)]


def _compress(path: Path, target: Path) -> list[str]:
    """One file; returns the tensors that became smaller. Two passes: sizes for the header, then the contents."""
    header, start = safetensors_header(path)
    made: dict[str, Any] = {}
    position = 0

    def entry(name: str, kind: str, shape: list[int], size: int) -> None:
        nonlocal position
        made[name] = {"dtype": kind, "shape": shape, "data_offsets": [position, position + size]}
        position += size

    order = sorted((name for name in header if name != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    smaller: list[str] = []
    for name in order:
        kind, shape, (first, last) = header[name]["dtype"], header[name]["shape"], header[name]["data_offsets"]
        width = _BYTES.get(kind, 0)
        number = (last - first) // width if width else 0
        kept = int(np.count_nonzero(_numbers(path, start + first, number, width))) if number else 0
        if number and kept * width + -(-number // 8) < number * width:
            smaller.append(name)
            entry(name + _VALUES, kind, [kept], kept * width)
            entry(name + _PLACES, "U8", [-(-number // 8)], -(-number // 8))
        else:
            entry(name, kind, shape, last - first)
    with path.open("rb") as source:
        original = source.read(start)[8:].decode()
    text = json.dumps({"__metadata__": {_MARK: original}, **made}).encode()
    text += b" " * (-len(text) % 8)
    with target.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            first, last = header[name]["data_offsets"]
            if name + _VALUES in made:
                width = _BYTES[header[name]["dtype"]]
                numbers = _numbers(path, start + first, (last - first) // width, width)
                there = numbers != 0
                file.write(numbers[there].tobytes())
                file.write(np.packbits(there).tobytes())
            else:
                file.write(_numbers(path, start + first, last - first, 1).tobytes())
    return smaller


def _expand(path: Path, target: Path) -> None:
    with target.open("wb") as file:
        _expanded(path, file.write)


def _expanded(path: Path, write: Callable[[bytes], Any]) -> None:
    """The bytes of the original file."""
    header, start = safetensors_header(path)
    original = (header.get("__metadata__") or {}).get(_MARK)
    if original is None:
        raise InputError(f"{path} is no compact file: its header does not say what it was made of")
    write(len(original.encode()).to_bytes(8, "little") + original.encode())
    before = json.loads(original)
    before.pop("__metadata__", None)
    for name in sorted(before, key=lambda n: before[n]["data_offsets"]):
        if name in header:
            first, last = header[name]["data_offsets"]
            write(_numbers(path, start + first, last - first, 1).tobytes())
            continue
        width = _BYTES[before[name]["dtype"]]
        number = (before[name]["data_offsets"][1] - before[name]["data_offsets"][0]) // width
        try:
            (first, last), (places, end) = (header[name + part]["data_offsets"] for part in (_VALUES, _PLACES))
        except KeyError:
            raise InputError(f"{path} is damaged: it lacks {name}") from None
        there = np.unpackbits(_numbers(path, start + places, end - places, 1), count=number).astype(bool)
        values = _numbers(path, start + first, (last - first) // width, width)
        if int(there.sum()) != len(values):
            raise InputError(f"{path} is damaged: {name} has {len(values)} values for {int(there.sum())} places")
        numbers = np.zeros(number, dtype=values.dtype)
        numbers[there] = values
        write(numbers.tobytes())


def _numbers(path: Path, offset: int, number: int, width: int) -> NDArray[Any]:
    """A tensor's numbers as unsigned integers, from the file."""
    if not number:
        return np.zeros(0, dtype=f"<u{width}")
    return np.memmap(path, dtype=f"<u{width}", mode="r", offset=offset, shape=(number,))
