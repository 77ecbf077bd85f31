"""Pruning a checkpoint on disk, one matrix at a time: the model may be larger than the memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lossmith.errors import InputError
from lossmith.files import check_new_folder, read_json, replacing_folder, safetensors_header
from lossmith.sparsity.checkpoint_names import Source, parameter_sources
from lossmith.sparsity.magnitude import SparsityReport, _check, block_weights
from lossmith.sparsity.masks import largest_of_groups, parse_structure, warn_of_stacked
from lossmith.sparsity.threshold import KthSmallest

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
# How a type lies in the file, and which of its bits are not the sign.
_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
# Of a matrix: the file, where it begins, its type and its shape.
Place = tuple[Path, int, str, tuple[int, ...]]


class StoredWeights(Mapping[str, Tensor]):
    """The prunable matrices of a checkpoint's folder, read from disk one by one; see :func:`open_weights`."""

    def __init__(self, places: Mapping[str, Place], flipped: frozenset[str], all_: int):
        self.places, self.flipped, self.parameters = places, flipped, all_

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(_values(self.stored(name), self.places[name][2]))

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def stored(self, name: str, mode: Literal["r", "r+"] = "r") -> np.memmap[Any, Any]:
        """The matrix in its file; bfloat16 as the bits."""
        path, offset, kind, shape = self.places[name]
        return np.memmap(path, dtype=_TYPES[kind], mode=mode, offset=offset, shape=shape)


def open_weights(folder: str | Path, *, targets: Literal["blocks", "all"] = "blocks") -> StoredWeights:
    """The matrices of a Hugging Face checkpoint that may be pruned, without loading it.

    Args:
        folder: with ``config.json`` and ``model.safetensors``, or shards and their index.
        targets: see :func:`~lossmith.sparsity.block_weights`.

    Returns:
        By the names that the parameters have in the model, which are not always those in the files.

    Raises:
        InputError: no such folder, a missing shard (named), a damaged file, a type that is not floating point, a matrix
            that Transformers makes of its tensors otherwise than by taking one or an equal part of its rows.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} is no folder of a model: it has no config.json")
    tensors = stored_tensors(folder)
    skeleton = _skeleton(folder)
    flipped = {f"{name}.weight" for name, module in skeleton.named_modules() if type(module).__name__ == "Conv1D"}
    warn_of_stacked(skeleton)
    sources = parameter_sources(skeleton, tensors)
    places = {
        name: _place(folder, name, weight, sources.get(name), tensors)
        for name, weight in block_weights(skeleton, targets=targets).weights.items()
    }
    all_ = sum(int(np.prod(shape)) for *_, shape in tensors.values())
    return StoredWeights(places, frozenset(flipped & places.keys()), all_)


def stored_tensors(folder: Path) -> dict[str, Place]:
    """All tensors of a checkpoint by their names in the files."""
    return {
        name: (file, offset, kind, shape)
        for file in _files(folder)
        for name, (offset, kind, shape) in _header(file).items()
    }


def _place(folder: Path, name: str, weight: Tensor, source: Source | None, tensors: Mapping[str, Place]) -> Place:
    if source is None:
        raise InputError(f"{folder} has no tensor {name}, which its config.json promises")
    file, offset, kind, shape = tensors[source.tensor]
    if kind not in _TYPES:
        raise InputError(f"{source.tensor} in {folder} is stored as {kind}; {', '.join(_TYPES)} can be pruned")
    if source.parts == 0:
        raise InputError(
            f"{folder} stores {name} as part of {source.tensor} in another form, which cannot be pruned in its file: "
            "load the model, and give it to lossmith.sparsity.prune"
        )
    if source.parts > 1 and shape[0] % source.parts == 0:
        rows = shape[0] // source.parts
        shape = (rows, *shape[1:])
        offset += source.part * int(np.prod(shape)) * np.dtype(_TYPES[kind]).itemsize
    if shape != tuple(weight.shape):
        raise InputError(
            f"{source.tensor} in {folder} gives {name} the shape {list(shape)}, its config.json {list(weight.shape)}"
        )
    return file, offset, kind, shape


def prune_checkpoint(
    folder: str | Path,
    out: str | Path,
    sparsity: float = 0.5,
    *,
    method: str = "magnitude",
    targets: Literal["blocks", "all"] = "blocks",
) -> SparsityReport:
    """Write a pruned copy of a checkpoint: the same files with zeros in place of the removed weights.

    Two passes find the threshold (see :class:`~lossmith.sparsity.KthSmallest`), a third writes; memory holds one
    matrix. The copy loads in plain Transformers; it is as large as the original, since zeros take room.

    Args:
        folder: see :func:`open_weights`.
        out: a new folder, there only once it is complete.
        sparsity: share to remove, in [0, 1). N:M patterns have their own.
        method: ``"magnitude"``, ``"uniform"`` or ``"N:M"``; see :func:`~lossmith.sparsity.one_shot_masks`.
        targets: see :func:`~lossmith.sparsity.block_weights`.

    Raises:
        InputError: as :func:`open_weights`; ``out`` is not empty; other methods; NaN or infinite weights.
        ValueError: sparsity out of range, inputs that M does not divide.
    """
    _check(sparsity, method)
    if method in ("random", "erk"):
        raise InputError(
            f"method '{method}' is for comparisons in memory; files are pruned by magnitude, uniform or N:M"
        )
    folder, out = Path(folder), Path(out)
    check_new_folder(out)
    weights = open_weights(folder, targets=targets)
    group = parse_structure(method) if ":" in method else None
    if group is not None:
        for name, (_, _, _, shape) in weights.places.items():
            if (inputs := shape[0] if name in weights.flipped else shape[1]) % group[1]:
                raise ValueError(f"{name} has {inputs} inputs, not a multiple of {group[1]}, which {method} needs")
    search = _search(weights, round(sparsity * sum(w.size for w in map(weights.stored, weights)))) if (
        method == "magnitude"
    ) else None  # fmt: skip
    with replacing_folder(out) as temporary:
        _copy(folder, temporary)
        copied = {name: (temporary / p.name, o, k, s) for name, (p, o, k, s) in weights.places.items()}
        target = StoredWeights(copied, weights.flipped, weights.parameters)
        rows = []
        for name in target:
            stored = target.stored(name, "r+")
            size = _magnitude(stored, target.places[name][2], name)
            if group is not None:
                turned = torch.from_numpy(size.T if name in target.flipped else size)
                mask = ~largest_of_groups(turned, *group, name=name).numpy()
                gone = mask.T if name in target.flipped else mask
            elif search is not None:
                gone = search.smaller(size)
            else:
                gone = _search({name: size}, round(sparsity * size.size)).smaller(size)
            stored[gone] = 0
            stored.flush()
            rows.append((name, int(np.count_nonzero(stored == 0)), int(stored.size)))
    return SparsityReport(tuple(rows), weights.parameters)


def _search(weights: Mapping[str, Any], number: int) -> KthSmallest:
    search = KthSmallest(number)
    while not search.done:
        for name in weights:
            if isinstance(weights, StoredWeights):
                search.see(_magnitude(weights.stored(name), weights.places[name][2], name))
            else:
                search.see(weights[name])
        search.close()
    return search


def _values(stored: np.memmap[Any, Any], kind: str) -> NDArray[Any]:
    if kind == "BF16":
        # The upper half of a float32.
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return np.array(stored)


def _magnitude(stored: np.memmap[Any, Any], kind: str, name: str) -> NDArray[np.float32]:
    values = np.abs(_values(stored, kind).astype(np.float32, copy=False))
    if not np.isfinite(values).all():
        raise InputError(f"{name} has weights that are NaN or infinite, which have no rank")
    return values


def _files(folder: Path) -> list[Path]:
    if (folder / _INDEX).is_file():
        try:
            names = sorted(set(read_json(folder / _INDEX)["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            raise InputError(f"{folder / _INDEX} is no index of shards") from None
    else:
        names = [_SINGLE]
    for name in names:
        if not (folder / name).is_file():
            if (folder / f"compact.{name}").is_file():
                raise InputError(
                    f"{folder} is a compact checkpoint; `lossmith prune {folder} --expand --out DIR` first"
                )
            kind = "its index names" if names != [_SINGLE] else "a checkpoint needs (pickled weights are not read)"
            raise InputError(f"{folder} lacks {name}, which {kind}")
    return [folder / name for name in names]


def _header(path: Path) -> dict[str, tuple[int, str, tuple[int, ...]]]:
    """Offset, type and shape of each tensor of a safetensors file."""
    header, start = safetensors_header(path)
    header.pop("__metadata__", None)
    return {n: (start + v["data_offsets"][0], v["dtype"], tuple(v["shape"])) for n, v in header.items()}


def model_class(config: Any) -> Any:
    """The class of transformers that a configuration names; without a name a causal language model."""
    import transformers

    return getattr(transformers, (config.architectures or ["AutoModelForCausalLM"])[0])


def _skeleton(folder: Path) -> nn.Module:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        kind = model_class(config)
        with torch.device("meta"):
            model: nn.Module = kind(config) if hasattr(kind, "base_model_prefix") else kind.from_config(config)
    except Exception as error:  # a different kind for every way in which a configuration can be wrong
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{folder / 'config.json'} describes no model of transformers: {reason}") from None
    return model


def _copy(folder: Path, target: Path, *, weights: bool = True) -> None:
    """Everything but other forms of the weights and folders (checkpoints); the weights too, unless told."""
    target.mkdir(parents=True, exist_ok=True)
    files = {path.name for path in _files(folder)} if weights else set()
    for path in folder.iterdir():
        if path.is_file() and (
            path.name in files or path.suffix not in {".bin", ".safetensors", ".pt", ".h5", ".msgpack"}
        ):
            shutil.copyfile(path, target / path.name)
