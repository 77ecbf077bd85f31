"""A pruned checkpoint beside the one that it comes from: the lines that every pruning ends with."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lossmith.errors import InputError
from lossmith.sparsity.compact import is_compact, load_compact
from lossmith.sparsity.essential_text import text_evaluation
from lossmith.sparsity.lost_model import load_lost
from lossmith.sparsity.magnitude_files import model_class
from lossmith.sparsity.measured import AgainstDense, compare_with_dense, file_bytes
from lossmith.sparsity.sparse_linear import SparseLayers, to_sparse_linear


@dataclass(frozen=True, slots=True)
class CheckpointComparison:
    """Two checkpoints on this machine.

    Attributes:
        pruned: as the files are, zeros multiplied like other numbers.
        layers: which layers are faster as sparse matrices; ``None`` where none is a plain linear one.
        sparse: with those; ``None`` where there are none.
        notes: what was not measured, and why.
    """

    pruned: AgainstDense
    layers: SparseLayers | None
    sparse: AgainstDense | None
    notes: tuple[str, ...] = ()

    def summary(self) -> str:
        """A line for each."""
        lines = [self.pruned.summary()]
        if self.layers is not None:
            lines.append(self.layers.summary())
        if self.sparse is not None:
            lines.append(self.sparse.summary())
        return "\n".join([*lines, *self.notes])


def compare_checkpoints(
    dense: str | Path,
    pruned: str | Path,
    *,
    data: str | None = None,
    texts: int = 32,
    max_length: int = 128,
    file: int | None = None,
    repeats: int = 7,
) -> CheckpointComparison:
    """Load a checkpoint and its pruned copy, plain or compact, and measure both on the CPU.

    The loss is that of a causal language model with a tokenizer in its folder; other models are measured without.

    Args:
        dense, pruned: folders.
        data: text for the loss, as ``lossmith compare --data`` takes it; default: the corpus that comes with Python.
        texts: how many; 0: no loss.
        max_length: tokens of a text, and of the pass whose time is taken.
        file: bytes of the pruned weights on disk, if they are not those of ``pruned``.
        repeats: see :func:`~lossmith.sparsity.compare_with_dense`.

    Raises:
        InputError: a folder that holds no model, text that cannot be read, or not enough memory for both at once.
    """
    sizes = [file_bytes(folder) for folder in (dense, pruned)]
    # A sparse copy of the layers stands beside the dense ones for a moment.
    needed, free = sizes[0] + 2 * sizes[1], _free_memory()
    if free is not None and needed > 0.9 * free:
        raise InputError(
            f"not measured: both models at once need about {needed / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free"
        )
    before, after = load_checkpoint(dense), load_checkpoint(pruned)
    inputs, length = _inputs(before, max_length)
    evaluate, notes = None, []
    try:
        evaluate = _evaluation(before, dense, data, texts, length) if texts else None
    except _NotText as reason:
        if data is not None:
            raise InputError(f"the loss on {data} cannot be measured: {reason}") from None
        notes.append(f"loss not measured: {reason}")
    options: dict[str, Any] = {"evaluate": evaluate, "repeats": repeats}
    files = (sizes[0], sizes[1] if file is None else file)
    found = compare_with_dense(before, after, inputs, files=files, name="pruned", **options)
    layers = sparse = None
    # Low-rank layers are what they are.
    with contextlib.suppress(InputError):
        layers = to_sparse_linear(after, rows=length)
    if layers is not None and layers.replaced:
        sparse = compare_with_dense(before, after, inputs, files=files, name="with sparse matrices", **options)
    return CheckpointComparison(found, layers, sparse, tuple(notes))


class _NotText(Exception):
    """The model is none that text can be measured with."""


def load_checkpoint(folder: str | Path) -> nn.Module:
    """The model of a folder of this machine, ready to be measured: plain, compact, or with low-rank layers.

    Args:
        folder: as ``save_pretrained``, :func:`~lossmith.sparsity.save_compact` or a run with ``weights=lost(...)``
            wrote it. Of the architecture that ``config.json`` names, in the type of numbers that is stored.

    Raises:
        InputError: it cannot be loaded; the reason is named.

    >>> import tempfile, transformers
    >>> config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30)
    >>> folder = tempfile.mkdtemp()
    >>> transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    >>> type(load_checkpoint(folder)).__name__
    'GPT2LMHeadModel'
    """
    from transformers import AutoConfig

    folder = Path(folder)
    try:
        if is_compact(folder):
            return load_compact(folder)  # type: ignore[no-any-return]
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if getattr(config, "lost", None):
            return load_lost(folder).eval()  # type: ignore[no-any-return]
        kind = model_class(config)
        return kind.from_pretrained(folder, dtype="auto", use_safetensors=True, local_files_only=True).eval()  # type: ignore[no-any-return]
    except Exception as error:  # a different kind for every way in which a folder can be wrong
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{folder} cannot be loaded: {reason}") from None


def _inputs(model: Any, max_length: int) -> tuple[Mapping[str, Tensor], int]:
    """One pass: a text of random tokens, a picture, or both; and how many rows its layers see."""
    inputs, length = _made_up(model, max_length)
    try:
        with torch.no_grad():
            model(**inputs)
    except Exception as error:  # a different kind for everything that a model may want besides
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"not measured: {type(model).__name__} does not run on made-up {' and '.join(inputs)}: {reason}"
        ) from None
    return inputs, length


def _made_up(model: Any, max_length: int) -> tuple[dict[str, Tensor], int]:
    config = model.config
    generator = torch.Generator().manual_seed(0)
    if getattr(model, "main_input_name", "") == "pixel_values":
        return {"pixel_values": _picture(config, model.dtype, generator)}, max_length
    # Of a model of pictures and texts, its text part.
    text = config.get_text_config()
    length = min(max_length, getattr(text, "max_position_embeddings", None) or max_length)
    tokens = torch.randint(text.vocab_size, (1, length), generator=generator)
    if getattr(config, "is_encoder_decoder", False):
        return {"input_ids": tokens, "decoder_input_ids": tokens}, length
    # Two encoders side by side (CLIP), which want both.
    if hasattr(model, "get_image_features") and hasattr(model, "get_text_features"):
        return {"input_ids": tokens, "pixel_values": _picture(config.vision_config, model.dtype, generator)}, length
    return {"input_ids": tokens}, length


def _picture(config: Any, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    size, channels = getattr(config, "image_size", 224), getattr(config, "num_channels", 3)
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(1, channels, height, width, generator=generator, dtype=dtype)


def _evaluation(model: Any, folder: str | Path, data: str | None, texts: int, length: int) -> Any:
    from transformers import AutoTokenizer

    if not re.search("CausalLM|LMHead", type(model).__name__):
        raise _NotText(f"{type(model).__name__} is no causal language model")
    # For some models transformers makes an empty tokenizer of nothing.
    if not any(Path(folder).glob("tokenizer*")) and not any(Path(folder).glob("vocab.*")):
        raise _NotText(f"{folder} has no tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise _NotText(f"the tokenizer in {folder} cannot be loaded: {reason}") from None
    return text_evaluation(data or "python", tokenizer, texts=texts, max_length=length)


def _free_memory() -> int | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = re.search(r"MemAvailable:\s*(\d+) kB", file.read())
        return int(found[1]) * 1024 if found else None
    except OSError:
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        except (ValueError, OSError, AttributeError):
            return None
