"""Nested state (optimisers, schedulers, random generators) in safetensors files: no pickle, nothing to execute."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lossmith.files import replacing

_STRUCTURE = "lossmith.structure"


def save_state(state: Any, path: str | Path) -> None:
    """Write nested dictionaries, lists and tuples of tensors, arrays, numbers, strings and ``None``.

    Tensors go into the safetensors file, the rest into its metadata as JSON.

    Raises:
        TypeError: a value of another type, named by its place.
    """
    tensors: dict[str, torch.Tensor] = {}
    structure = _describe(state, "state", tensors)
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={_STRUCTURE: json.dumps(structure)})


def load_state(path: str | Path, *, device: str | torch.device = "cpu") -> Any:
    """Read what :func:`save_state` wrote, with the same types, dtypes and bits."""
    with safe_open(path, framework="pt", device=str(device)) as file:
        structure = json.loads(file.metadata()[_STRUCTURE])
        return _restore(structure, file)


def random_state() -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's generators (CPU, and this process's CUDA devices)."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Put the generators back to what :func:`random_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def _describe(value: Any, place: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        # A copy, since safetensors refuses tensors that share memory.
        tensors[place] = value.detach().cpu().contiguous().clone()
        return {"tensor": place}
    if isinstance(value, np.ndarray):
        tensors[place] = torch.from_numpy(np.ascontiguousarray(value).copy())
        return {"array": place}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        keys = [key if isinstance(key, str | int) else str(key) for key in value]
        return {"dict": [[k, _describe(v, f"{place}.{k}", tensors)] for k, v in zip(keys, value.values(), strict=True)]}
    if isinstance(value, list | tuple):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_describe(item, f"{place}.{i}", tensors) for i, item in enumerate(value)]}
    raise TypeError(f"{place} is a {type(value).__name__}, which cannot be stored without pickle")


def _restore(node: Any, file: Any) -> Any:
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    if kind == "tensor":
        return file.get_tensor(content)
    if kind == "array":
        return file.get_tensor(content).numpy()
    if kind == "dict":
        return {key: _restore(item, file) for key, item in content}
    items = [_restore(item, file) for item in content]
    return tuple(items) if kind == "tuple" else items
