"""D-Pruner with one block of the model in memory: importances, gradients and updates go through files.

A block's output is computed without a graph, and again with one when its gradient is asked for (Chen et al., "Training
Deep Nets with Sublinear Memory Cost", 2016, arXiv 1604.06174); its weights are read from the model's files both times,
and written back once they have moved. The arithmetic, and its order, is that of the whole model in memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lossmith.errors import InputError
from lossmith.sparsity.calibration import Batch, InputProducts
from lossmith.sparsity.calibration_stream import stream_layers
from lossmith.sparsity.d_pruner import judge, stream_masks
from lossmith.sparsity.d_pruner_domain import Descent, DescentOptions, Loss, count_texts
from lossmith.sparsity.magnitude import block_weights
from lossmith.sparsity.one_shot import reached, split_options
from lossmith.sparsity.optimal_brain_surgeon import turned

if TYPE_CHECKING:
    from lossmith.sparsity.blockwise import BlockwiseModel

# Of each matrix: its name, its zeros and its weights.
Rows = list[tuple[str, int, int]]


class StoredTensors(MutableMapping[str, Tensor]):
    """Tensors in a folder, read when they are asked for and written when they are set.

    Args:
        folder: is made; what is in it is not looked at.
        device: where tensors that are read go.

    >>> import tempfile
    >>> stored = StoredTensors(Path(tempfile.mkdtemp()) / "scores")
    >>> stored["a"] = torch.zeros(2)
    >>> stored["a"] += 1
    >>> stored["a"], list(stored)
    (tensor([1., 1.]), ['a'])
    """

    def __init__(self, folder: Path, *, device: str | torch.device = "cpu"):
        self.folder, self.device = folder, device
        folder.mkdir()
        # A name may be longer than a file's.
        self._files: dict[str, Path] = {}

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(np.load(self._files[name])).to(self.device)

    def __setitem__(self, name: str, value: Tensor) -> None:
        path = self._files.setdefault(name, self.folder / f"{len(self._files)}.npy")
        np.save(path, value.detach().cpu().numpy())

    def __delitem__(self, name: str) -> None:
        self._files.pop(name).unlink()

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files


def d_pruner_by_blocks(
    blockwise: BlockwiseModel,
    folder: Path,
    scratch: Path,
    sparsity: float,
    domain: Sequence[Batch],
    general: Sequence[Batch],
    *,
    loss: Loss,
    pattern: str | None,
    which: Mapping[str, Any],
    options: Mapping[str, Any],
    progress: Callable[[int, int], None] | None,
) -> tuple[Rows, tuple[float, ...]]:
    """Prune the files that ``blockwise`` reads, a copy of those in ``folder``, by D-Pruner.

    Args:
        scratch: a new folder for importances, in float32 (float64 of float64 weights); it is removed.
        domain, general: batches.
        pattern, loss, progress: see :func:`~lossmith.sparsity.prune`.
        which: ``targets`` and ``exclude``.
        options: of D-Pruner.

    Returns:
        A row for each matrix, and the losses of the fine-tuning.
    """
    apply_to, of_masks, of_pass, rest = split_options(options)
    numbers = DescentOptions(**rest)
    texts = count_texts(domain, numbers.texts)
    model = blockwise.model
    scratch.mkdir()
    importance = StoredTensors(scratch / "general", device=blockwise.device)
    flipped = turned(model)
    order = of_pass.pop("order", "layer")
    for weights, seen in stream_layers(model, general, InputProducts, **which, order=order):
        for name in weights:
            weight = blockwise.parameter(name)
            importance[name] = judge(weight, seen.hessian(), sparsity, name=name, flip=name in flipped, **of_pass)
            blockwise.write(name)
    blockwise.restore(folder)
    # Names alone: a parameter that is held stays in memory.
    wanted = list(block_weights(model, **which).weights)
    # What the masks are asked for is checked before hours are spent on the scores.
    for _ in stream_masks(model, importance, sparsity, pattern=pattern, **of_masks, **which):
        pass
    scores = StoredTensors(scratch / "domain", device=blockwise.device)
    for name in wanted:
        scores[name] = torch.zeros_like(importance[name])
    half = any(kind == "F16" for _, _, kind, _ in blockwise.places.values())
    state = Descent(numbers, texts, importance, scores, scale=2.0**16 if half else 1.0)
    with training(blockwise, state, wanted):
        losses = state.run(model, domain, loss, progress)
    if apply_to == "original":
        blockwise.restore(folder)
    for name in wanted:
        scores[name] = reached(name, scores[name], importance[name], blockwise.read(name))
    rows: Rows = []
    for name, mask in stream_masks(model, scores, sparsity, pattern=pattern, **of_masks, **which):
        weight = blockwise.parameter(name)
        with torch.no_grad():
            weight.masked_fill_(~mask, 0)
        blockwise.write(name)
        rows.append((name, int((weight == 0).sum()), mask.numel()))
    shutil.rmtree(scratch)
    return rows, losses


@contextmanager
def training(blockwise: BlockwiseModel, state: Descent, scored: Sequence[str]) -> Iterator[None]:
    """Have backward passes through ``blockwise.model`` give each gradient to ``state``, and keep what it changes.

    Blocks that ran are written back to the files when they have their gradients, what is in no block at the end.
    """
    model = blockwise.model
    # Of a block that was read again the last.
    handles: dict[str, Any] = {}
    free = blockwise.trainable | set(scored)

    def prepare(names: Sequence[str]) -> None:
        for name in names:
            parameter = model.get_parameter(name)
            if name in free and not parameter.requires_grad:
                parameter.requires_grad_(True)
                handles[name] = parameter.register_post_accumulate_grad_hook(partial(state.take, name))

    def write(names: Sequence[str]) -> None:
        for name in names:
            if name in free and state.coefficient is not None:
                blockwise.write(name)

    forwards = {}
    prepare(outside := blockwise.members(None))
    for name in blockwise.blocks:
        block = model.get_submodule(name)
        forwards[block] = block.forward
        block.forward = partial(_run, blockwise, name, block.forward, prepare, write)  # type: ignore[method-assign]
    try:
        with torch.enable_grad():
            yield
        for name in outside:
            blockwise.write(name)
    finally:
        for block in forwards:
            del block.forward
        for handle in handles.values():
            handle.remove()
        for parameter in model.parameters():
            parameter.requires_grad_(False)


def _run(
    blockwise: BlockwiseModel,
    name: str,
    forward: Callable[..., Any],
    prepare: Callable[[Sequence[str]], None],
    write: Callable[[Sequence[str]], None],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """A block's output, whose graph is made when its gradient comes."""
    keyword = not args
    hidden = kwargs.pop("hidden_states") if keyword else args[0]
    if any(isinstance(other, Tensor) and other.requires_grad for other in _tensors((args[1:], kwargs))):
        raise InputError(f"{name} is given more than hidden states that gradients flow through: load the whole model")
    rest: list[Any] = []

    def run(inputs: Tensor) -> Tensor:
        output = forward(*args, hidden_states=inputs, **kwargs) if keyword else forward(inputs, *args[1:], **kwargs)
        if isinstance(output, Tensor):
            return output
        if any(isinstance(other, Tensor) for other in _tensors(output[1:])):
            raise InputError(f"{name} gives on more than hidden states: load the whole model")
        rest[:] = [output]
        return output[0]

    def backward(inputs: Tensor, gradient: Tensor) -> None:
        blockwise.load(name)
        prepare(members := blockwise.members(name))
        torch.autograd.backward(run(inputs), gradient)
        write(members)

    # Without a tensor that needs a gradient there would be no backward pass.
    anchor = torch.zeros((), requires_grad=True)
    found = _Recomputed.apply(hidden, anchor, run, backward)  # type: ignore[no-untyped-call]
    return type(rest[0])([found, *rest[0][1:]]) if rest else found


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, anchor: Tensor, run: Any, backward: Any) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(hidden)
        ctx.own = backward
        output: Tensor = run(hidden)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            inputs = ctx.saved_tensors[0].detach().requires_grad_(True)
            ctx.own(inputs, gradient)
        return inputs.grad, None, None, None


def _tensors(value: Any) -> Iterator[Any]:
    """The leaves of tuples, lists and dictionaries."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
    else:
        yield value
