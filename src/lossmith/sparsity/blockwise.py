"""Calibrated pruning of a checkpoint with one block of it in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lossmith.errors import InputError, did_you_mean
from lossmith.files import check_new_folder, replacing_folder
from lossmith.sparsity.activation_magnitude import prune_by_inputs
from lossmith.sparsity.calibration import InputNorms, InputProducts
from lossmith.sparsity.calibration_stream import stream_layers
from lossmith.sparsity.checkpoint_names import parameter_sources
from lossmith.sparsity.magnitude import SparsityReport, block_weights
from lossmith.sparsity.magnitude_files import Place, _copy, _place, model_class, open_weights, stored_tensors
from lossmith.sparsity.masks import check_sparsity, parse_structure
from lossmith.sparsity.one_shot import OPTIONS, Calibration, _readable, _rows
from lossmith.sparsity.optimal_brain_surgeon import check_pattern, operate, turned
from lossmith.sparsity.restoring import check_finite

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

METHODS = ("wanda", "sparsegpt")
_TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class BlockwiseModel:
    """A model of Transformers whose repeated blocks are read from its files when they run, one at a time.

    Attributes:
        model: of the class that ``config.json`` names, in evaluation mode; what is not in a block is there, and the
            block that ran last; other blocks are on the meta device.

    Args:
        folder: of a checkpoint; :meth:`write` changes it.
        device: where the weights go.

    Raises:
        InputError: a folder that is no complete checkpoint; a model whose linear layers are not in one list of blocks.
    """

    def __init__(self, folder: str | Path, *, device: str | torch.device = "cpu"):
        self.folder, self.device = Path(folder), torch.device(device)
        self.model = _empty(self.folder)
        tensors = stored_tensors(self.folder)
        sources = parameter_sources(self.model, tensors)
        own = dict(self.model.named_parameters())
        tied = self.model.all_tied_weights_keys if hasattr(self.model, "all_tied_weights_keys") else {}
        self.places: dict[str, Place] = {
            name: _place(self.folder, name, weight, sources.get(name), tensors)
            for name, weight in own.items()
            if name in sources or name not in tied
        }
        self.blocks = _blocks(self.model)
        self._loaded: str | None = None
        if shared := [name for name in tied if self._block(name) is not None]:
            raise InputError(f"{shared[0]} shares its matrix with another layer, and cannot be read block by block")
        for name in self.places:
            if self._block(name) is None:
                self._set(name, self.read(name))
        self.model.tie_weights()
        for path, module in self.model.named_modules():
            for key, buffer in module._buffers.items():
                if buffer is None:
                    continue
                # Running means are in the files, angles of positions are not.
                if (source := sources.get(f"{path}.{key}")) is not None and buffer.is_floating_point():
                    buffer = _read(_place(self.folder, f"{path}.{key}", buffer, source, tensors))
                module._buffers[key] = buffer.to(self.device)
        for name in self.blocks:
            block = self.model.get_submodule(name)
            block.register_forward_pre_hook(lambda *_, name=name: self.load(name))  # type: ignore[misc]
        self.model.eval()

    def load(self, block: str) -> None:
        """Have this block in memory, and no other."""
        if block == self._loaded:
            return
        for name in self.places if self._loaded is not None else ():
            if self._block(name) == self._loaded:
                self._set(name, torch.empty_like(self.model.get_parameter(name), device="meta"))
        self._loaded = block
        for name in self.places:
            if self._block(name) == block:
                self._set(name, self.read(name))

    def parameter(self, name: str) -> nn.Parameter:
        """A parameter, read from the files if it is not there."""
        if (block := self._block(name)) is not None:
            self.load(block)
        return self.model.get_parameter(name)

    def read(self, name: str) -> Tensor:
        """What the files hold of a parameter, in their type."""
        return _read(self.places[name]).to(self.device)

    def write(self, name: str) -> None:
        """Put a parameter as it is now into the files."""
        path, offset, kind, _ = self.places[name]
        weight = self.model.get_parameter(name).detach().to(device="cpu", dtype=_TORCH[kind]).contiguous()
        stored = np.memmap(path, dtype=np.uint8, mode="r+", offset=offset, shape=(weight.nbytes,))
        stored[:] = weight.view(-1).view(torch.uint8).numpy()
        stored.flush()

    def _block(self, name: str) -> str | None:
        return next((block for block in self.blocks if name.startswith(f"{block}.")), None)

    def _set(self, name: str, value: Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        self.model.get_submodule(path)._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def _read(place: Place) -> Tensor:
    path, offset, kind, shape = place
    kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<i2"}
    numbers = np.array(np.memmap(path, dtype=kinds[kind], mode="r", offset=offset, shape=shape))
    return torch.from_numpy(numbers).view(_TORCH[kind])


def prune_blockwise(
    folder: str | Path,
    out: str | Path,
    sparsity: float = 0.5,
    *,
    calibration: Calibration,
    method: str = "wanda",
    tokenizer: PreTrainedTokenizerBase | None = None,
    pattern: str | None = None,
    targets: Literal["blocks", "all"] = "blocks",
    exclude: Sequence[str] = (),
    samples: int = 128,
    length: int = 2048,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> SparsityReport:
    """Write a copy of a checkpoint that Wanda or SparseGPT pruned, with one block of the model in memory at a time.

    The masks and weights are those of :func:`~lossmith.sparsity.prune` with the whole model in memory. Memory holds one
    block, what is in no block (embeddings, the output layer), the hidden states of the calibration rows, and one
    statistic. The files are copied, and every block is read four times: once to look for NaN, three times to run.

    Args:
        folder: of a checkpoint of Transformers, safetensors.
        out: a new folder, there only once it is complete.
        sparsity, calibration, tokenizer, pattern, targets, exclude, samples, length, seed, options: see
            :func:`~lossmith.sparsity.prune`.
        method: ``"wanda"`` or ``"sparsegpt"``. D-Pruner fine-tunes all weights together, and has no such way.
        device: where a block is computed.
        progress: told (done, total) after each matrix.

    Raises:
        InputError: as :func:`~lossmith.sparsity.prune_checkpoint` and :func:`~lossmith.sparsity.prune`; a model whose
            linear layers are not in one list of blocks.
        ValueError: numbers out of range, inputs that the pattern does not divide, weights that are not finite.
    """
    if method not in METHODS:
        raise InputError(f"method '{method}' does not work block by block: {did_you_mean(method, METHODS)}")
    if unknown := [name for name in options if name not in OPTIONS[method]]:
        raise InputError(f"method '{method}' has no option '{unknown[0]}': {did_you_mean(unknown[0], OPTIONS[method])}")
    check_sparsity(sparsity)
    check_new_folder(out)
    check_finite(_float_matrices(folder, targets))
    order = options.pop("order", "layer")
    statistic: Any = InputNorms if method == "wanda" else InputProducts
    change: Any = prune_by_inputs if method == "wanda" else operate
    rows = []
    with replacing_folder(out) as temporary:
        _copy(Path(folder), temporary)
        blockwise = BlockwiseModel(temporary, device=device)
        model = blockwise.model
        parse_structure(pattern)
        check_pattern(model, pattern, targets, exclude)
        total = len(block_weights(model, targets=targets, exclude=exclude).weights)
        flipped = turned(model)
        given: Mapping[str, Any] = {"samples": samples, "length": _readable(model, length), "seed": seed}
        batches = _rows(calibration, tokenizer, given)
        for weights, seen in stream_layers(model, batches, statistic, targets=targets, exclude=exclude, order=order):
            for name in weights:
                weight = blockwise.parameter(name)
                mask = change(weight, seen, sparsity, pattern=pattern, flip=name in flipped, name=name, **options)
                blockwise.write(name)
                rows.append((name, int((weight == 0).sum()), mask.numel()))
                progress(len(rows), total)
    return SparsityReport(tuple(rows), sum(p.numel() for p in model.parameters()))


def _float_matrices(folder: str | Path, targets: Literal["blocks", "all"]) -> Mapping[str, Tensor]:
    """Read one by one."""
    return open_weights(folder, targets=targets)


def _blocks(model: nn.Module) -> tuple[str, ...]:
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    holding = [name for name in lists if any(w.startswith(f"{name}.") for w in block_weights(model).weights)]
    outer = [name for name in holding if not any(name.startswith(f"{other}.") for other in holding)]
    if len(outer) != 1:
        raise InputError(
            f"{type(model).__name__} has blocks in several lists ({', '.join(outer[:3])}); only a single chain of them "
            "can be read block by block: load the model, and give it to lossmith.sparsity.prune"
        )
    listed: Any = model.get_submodule(outer[0])
    return tuple(f"{outer[0]}.{name}" for name, _ in listed.named_children())


def _empty(folder: Path) -> Any:
    """The model without weights; buffers, which no file has, are computed."""
    import transformers
    from accelerate import init_empty_weights

    open_weights(folder)  # says what is wrong with the folder
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    kind = model_class(config)
    with init_empty_weights(include_buffers=False):
        return kind(config) if hasattr(kind, "base_model_prefix") else kind.from_config(config)
