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
from lossmith.sparsity.calibration import Batch, InputNorms, InputProducts
from lossmith.sparsity.calibration_stream import stream_layers
from lossmith.sparsity.checkpoint_names import parameter_sources
from lossmith.sparsity.d_pruner_blockwise import Rows, d_pruner_by_blocks
from lossmith.sparsity.d_pruner_domain import DescentOptions, Loss, next_token_loss
from lossmith.sparsity.magnitude import SparsityReport, block_weights
from lossmith.sparsity.magnitude_files import Place, _copy, _place, model_class, open_weights, stored_tensors
from lossmith.sparsity.masks import check_sparsity, parse_structure
from lossmith.sparsity.one_shot import OPTIONS, Calibration, _domain, _readable, _rows, split_options
from lossmith.sparsity.optimal_brain_surgeon import check_pattern, operate, turned
from lossmith.sparsity.restoring import check_finite

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

METHODS = ("wanda", "sparsegpt", "d-pruner")
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
        # Fixed sines for positions are parameters too.
        self.trainable = {name for name, parameter in own.items() if parameter.requires_grad}
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

    def restore(self, folder: str | Path) -> None:
        """Put all parameters of another folder with the same files into these."""
        for name, (path, offset, kind, shape) in self.places.items():
            size = int(np.prod(shape)) * _TORCH[kind].itemsize
            there = np.memmap(Path(folder) / path.name, dtype=np.uint8, mode="r", offset=offset, shape=(size,))
            here = np.memmap(path, dtype=np.uint8, mode="r+", offset=offset, shape=(size,))
            here[:] = there
            here.flush()
            if not (parameter := self.model.get_parameter(name)).is_meta:
                with torch.no_grad():
                    parameter.copy_(self.read(name))

    def members(self, block: str | None) -> list[str]:
        """Names of a block's parameters, or of those that are in no block."""
        return [name for name in self.places if self._block(name) == block]

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
    general: Calibration | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    pattern: str | None = None,
    targets: Literal["blocks", "all"] = "blocks",
    exclude: Sequence[str] = (),
    samples: int = 128,
    length: int = 2048,
    max_length: int = 1024,
    batch_size: int = 8,
    loss: Loss = next_token_loss,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> SparsityReport:
    """Write a copy of a checkpoint that was pruned with one block of the model in memory at a time.

    The masks and weights are those of :func:`~lossmith.sparsity.prune` with the whole model in memory. Memory holds one
    block, what is in no block (embeddings, the output layer), the hidden states of the calibration rows, and one
    statistic. The files are copied, and every block is read four times: once to look for NaN, three times to run.

    D-Pruner needs, besides, the hidden states of one batch of the domain before every block, and one block's gradients;
    for each batch every block is read four times, computed twice for each backward pass, and written once. Its two
    importances, float32, lie beside the copy until it is complete.

    Args:
        folder: of a checkpoint of Transformers, safetensors.
        out: a new folder, there only once it is complete.
        sparsity, calibration, general, tokenizer, pattern, targets, exclude, samples, length, max_length, batch_size,
            loss, seed, options: see :func:`~lossmith.sparsity.prune`.
        method: ``"wanda"``, ``"sparsegpt"`` or ``"d-pruner"``.
        device: where a block is computed.
        progress: told (done, total) after each matrix; of D-Pruner, after each step of its fine-tuning.

    Raises:
        InputError: as :func:`~lossmith.sparsity.prune_checkpoint` and :func:`~lossmith.sparsity.prune`; a model whose
            linear layers are not in one list of blocks.
        ValueError: numbers out of range, inputs that the pattern does not divide, weights that are not finite.
    """
    if method not in METHODS:
        raise InputError(f"method '{method}' does not work block by block: {did_you_mean(method, METHODS)}")
    if unknown := [name for name in options if name not in OPTIONS[method]]:
        raise InputError(f"method '{method}' has no option '{unknown[0]}': {did_you_mean(unknown[0], OPTIONS[method])}")
    if (general is None) == (method == "d-pruner"):
        needs = "needs general: open-domain texts" if general is None else "takes no general texts"
        raise InputError(f"method '{method}' {needs}")
    check_sparsity(sparsity)
    if method == "d-pruner":
        # Before hours are spent on the general pass.
        DescentOptions(**split_options(options)[-1])
    check_new_folder(out)
    check_finite(_float_matrices(folder, targets))
    with replacing_folder(out) as temporary:
        _copy(Path(folder), temporary)
        blockwise = BlockwiseModel(temporary, device=device)
        model = blockwise.model
        parse_structure(pattern)
        check_pattern(model, pattern, targets, exclude)
        which = {"targets": targets, "exclude": exclude}
        given: Mapping[str, Any] = {"samples": samples, "length": _readable(model, length), "seed": seed}
        if method == "d-pruner":
            rows, _ = d_pruner_by_blocks(
                blockwise, Path(folder), temporary / ".importance", sparsity,
                _domain(model, calibration, tokenizer, batch_size, max_length), _rows(general, tokenizer, given),
                loss=loss, pattern=pattern, which=which, options=options, progress=progress,
            )  # fmt: skip
        else:
            batches = _rows(calibration, tokenizer, given)
            how: dict[str, Any] = {"pattern": pattern, **options}
            rows = _by_inputs(blockwise, batches, sparsity, method, which, how, progress)
    return SparsityReport(tuple(rows), sum(p.numel() for p in model.parameters()))


def _by_inputs(
    blockwise: BlockwiseModel,
    batches: Sequence[Batch],
    sparsity: float,
    method: str,
    which: Mapping[str, Any],
    options: dict[str, Any],
    progress: Callable[[int, int], None] | None,
) -> Rows:
    """Wanda and SparseGPT."""
    model = blockwise.model
    order = options.pop("order", "layer")
    statistic: Any = InputNorms if method == "wanda" else InputProducts
    change: Any = prune_by_inputs if method == "wanda" else operate
    total, flipped = len(block_weights(model, **which).weights), turned(model)
    rows: Rows = []
    for weights, seen in stream_layers(model, batches, statistic, **which, order=order):
        for name in weights:
            weight = blockwise.parameter(name)
            mask = change(weight, seen, sparsity, flip=name in flipped, name=name, **options)
            blockwise.write(name)
            rows.append((name, int((weight == 0).sum()), mask.numel()))
            if progress is not None:
                progress(len(rows), total)
    return rows


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
