"""The output layer of any language model, in blocks: of a model in memory, or read from disk without the rest of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lossmith.errors import InputError

# Elements of a block.
_BLOCK = 1 << 22


@dataclass(frozen=True, slots=True)
class Unembedding:
    """A matrix with one row per token, wherever it is kept.

    Attributes:
        name: of the model.
        parameter: what the matrix is called in it.
        rows: tokens.
        dimensions: length of a row.
        width: of the model's residual stream, where known; OPT-350m has 1024, but rows of 512.
        dtype: in which it is kept.
        tied: whether it is the input embedding, too; ``None`` where there is no model around it.
        bias: the output layer's, where it has one.
        read: rows from one number to another, as a tensor.
    """

    name: str
    parameter: str
    rows: int
    dimensions: int
    width: int | None
    dtype: str
    tied: bool | None
    bias: Tensor | None
    read: Callable[[int, int], Tensor]

    def blocks(self, rows: int | None = None, dtype: torch.dtype = torch.float64) -> Iterator[tuple[int, Tensor]]:
        """The matrix in order: the number of a block's first row, and the block, which may be the model's own memory.

        Args:
            rows: of a block; by default four million numbers' worth.
            dtype: of the blocks.

        Raises:
            InputError: a value is not finite (the row is named).
        """
        size = rows if rows is not None else max(1, _BLOCK // self.dimensions)
        if size < 1:
            raise ValueError(f"blocks need at least one row, got {size}")
        for first in range(0, self.rows, size):
            # Widened first: the narrowest types know no isfinite.
            block = self.read(first, min(first + size, self.rows)).to(dtype)
            if not block.isfinite().all():
                row = first + int((~block.isfinite()).any(-1).nonzero()[0])
                raise InputError(f"{self.parameter} of {self.name} has a value in row {row} that is not finite")
            yield first, block


def find_unembedding(source: Any) -> Unembedding:
    """The output layer of a model.

    Args:
        source: a folder or hub id (then only the configuration and the output layer are read, from ``safetensors``), a
            Hugging Face model, anything with ``get_output_embeddings()``, an output layer, or its weight.

    Raises:
        InputError: there is no such model, it has no output layer over tokens, or its weights are pickled.
        TypeError: something else.

    >>> head = torch.nn.Linear(8, 100)
    >>> found = find_unembedding(head)
    >>> found.rows, found.dimensions, found.bias.shape
    (100, 8, torch.Size([100]))
    """
    if isinstance(source, Tensor):
        return _in_memory("the matrix", "weight", source, None, None, None)
    if isinstance(source, str | Path):
        return _from_files(str(source))
    if hasattr(source, "get_output_embeddings"):
        return _of_model(source, _model_name(source))
    if isinstance(source, nn.Module) and isinstance(weight := getattr(source, "weight", None), Tensor):
        return _in_memory(type(source).__name__, "weight", weight, getattr(source, "bias", None), None, None)
    raise TypeError(f"model must be a name, a model with output embeddings or a matrix, got {type(source).__name__}")


def _model_name(model: Any) -> str:
    return getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__


def _head(model: Any, name: str) -> Any:
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        head = None
    if head is None or not isinstance(getattr(head, "weight", None), Tensor):
        raise InputError(
            f"{name} ({type(model).__name__}) has no unembedding: give a model with an output layer over tokens, "
            "such as a causal language model"
        )
    return head


def _tied(model: Any, weight: Tensor) -> bool:
    embeddings = model.get_input_embeddings()
    own = getattr(embeddings, "weight", None)
    return own is weight or (own is not None and own.device.type != "meta" and own.data_ptr() == weight.data_ptr())


def _width(model: Any, dimensions: int) -> int:
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    return int(getattr(config, "hidden_size", None) or dimensions)


def _of_model(model: Any, name: str) -> Unembedding:
    head = _head(model, name)
    names = [n for n, p in model.named_parameters(remove_duplicate=False) if p is head.weight]
    parameter = names[-1] if names else "the output layer"
    width = _width(model, head.weight.shape[-1])
    return _in_memory(name, parameter, head.weight, getattr(head, "bias", None), _tied(model, head.weight), width)


def _in_memory(
    name: str, parameter: str, weight: Tensor, bias: Tensor | None, tied: bool | None, width: int | None
) -> Unembedding:
    if weight.ndim != 2 or weight.shape[0] < 2 or weight.shape[1] < 1:
        raise ValueError(f"{parameter} must be a matrix with at least two rows, got shape {tuple(weight.shape)}")
    if not weight.is_floating_point():
        raise TypeError(f"{parameter} must hold floating-point numbers, got {weight.dtype}")
    kept = weight.detach()
    dtype = str(kept.dtype).removeprefix("torch.")
    own_bias = bias.detach().double().cpu() if isinstance(bias, Tensor) else None
    rows, dimensions = kept.shape
    return Unembedding(
        name, parameter, rows, dimensions, width, dtype, tied, own_bias, lambda first, last: kept[first:last].cpu()
    )


def _from_files(name: str) -> Unembedding:
    """Only the configuration and the tensors wanted: a model of any size needs no more memory than a block."""
    folder = Path(name).expanduser()
    if folder.is_file():
        raise InputError(f"{name} is a file; give the folder that holds config.json and model.safetensors")
    if not folder.is_dir():
        _check_cached(name)
    empty = _skeleton(name)
    head = _head(empty, name)
    tensors = _Tensors.open(name)
    own = [n for n, p in empty.named_parameters(remove_duplicate=False) if p is head.weight]
    tied = _tied(empty, head.weight)
    others: list[str] = []
    if not tied:
        embeddings = empty.get_input_embeddings()
        others = [n for n, p in empty.named_parameters(remove_duplicate=False) if p is embeddings.weight]
    prefix = empty.base_model_prefix
    key = tensors.find(own, others, prefix, tuple(head.weight.shape))
    if key is None:
        # Weights that transformers renames or joins while loading.
        return _of_model(_loaded(name, type(empty)), name)
    bias = None
    if getattr(head, "bias", None) is not None:
        names = [n for n, p in empty.named_parameters(remove_duplicate=False) if p is head.bias]
        found = tensors.find(names, [], prefix, tuple(head.bias.shape))
        if found is None:
            return _of_model(_loaded(name, type(empty)), name)
        bias = tensors.slice(found)[:].double()
    rows, dimensions = tensors.shape(key)
    width = _width(empty, dimensions)
    matrix = tensors.slice(key)
    dtype = str(matrix[0:1].dtype).removeprefix("torch.")
    return Unembedding(name, key, rows, dimensions, width, dtype, tied, bias, lambda first, last: matrix[first:last])


def _check_cached(name: str) -> None:
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(name, "config.json", _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):
        found = None
    if found is None:
        raise InputError(f"{name} is neither a folder nor a model on the hub that can be reached")


def _skeleton(name: str) -> Any:
    """The model without its numbers."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{name} cannot be read: {_first_line(error)}") from None
    architecture = (getattr(config, "architectures", None) or [None])[0]
    cls = getattr(transformers, architecture, None) if architecture else None
    try:
        with torch.device("meta"):
            return cls._from_config(config) if cls else transformers.AutoModelForCausalLM.from_config(config)
    except (ValueError, AttributeError) as error:
        raise InputError(f"{name} has no unembedding: {_first_line(error)}") from None


def _loaded(name: str, cls: Any) -> Any:
    try:
        return cls.from_pretrained(name, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{name} cannot be loaded: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


class _Tensors:
    """The ``safetensors`` files of a model, by tensor."""

    def __init__(self, name: str, files: dict[str, str]):
        self.name, self.files = name, files

    @classmethod
    def open(cls, name: str) -> _Tensors:
        from safetensors import safe_open

        single = _file(name, "model.safetensors")
        if single is not None:
            with safe_open(single, framework="pt") as file:
                return cls(name, dict.fromkeys(file.keys(), "model.safetensors"))
        index = _file(name, "model.safetensors.index.json")
        if index is not None:
            return cls(name, json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"])
        if _file(name, "pytorch_model.bin") or _file(name, "pytorch_model.bin.index.json"):
            raise InputError(
                f"{name} has only pickled weights (pytorch_model.bin), which could run code; save it again with "
                "save_pretrained"
            )
        raise InputError(f"{name} has no weights (model.safetensors)")

    def find(self, names: list[str], others: list[str], prefix: str, shape: tuple[int, ...]) -> str | None:
        """The tensor that has one of ``names``, with or without the model's prefix; else the only one of this shape."""
        for name in names:
            for key in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
                if key in self.files and self.shape(key) == shape:
                    return key
        taken = {k for name in others for k in (name, name.removeprefix(f"{prefix}."))}
        keys = [key for key in self.files if key not in taken and key.endswith(".weight") and len(shape) == 2]
        alike = [key for key in keys if self.shape(key) == shape]
        return alike[0] if len(alike) == 1 else None

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.slice(key).get_shape())

    def slice(self, key: str) -> Any:
        """A view of a tensor on disk; indexing reads."""
        from safetensors import safe_open

        path = _file(self.name, self.files[key])
        if path is None:
            raise InputError(f"{self.name} lacks {self.files[key]}, which its index names")
        # Closed when the view is.
        return safe_open(path, framework="pt").get_slice(key)


def _file(name: str, file: str) -> str | None:
    """A file of a folder, or of a model on the hub: downloaded, or from the cache."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return str(folder / file) if (folder / file).exists() else None
    from transformers.utils.hub import cached_file

    try:
        return cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{name} cannot be read: {_first_line(error)}") from None
