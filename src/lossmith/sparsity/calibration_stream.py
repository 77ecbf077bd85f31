"""Going through a model layer by layer, with the inputs that each layer has once those before it are pruned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from lossmith.errors import InputError
from lossmith.sparsity.calibration import Batch, call
from lossmith.sparsity.magnitude import block_weights

# By the name of a matrix, the layers that have it: usually one.
Layers = Mapping[str, Sequence[nn.Module]]


class Statistic(Protocol):
    """What is kept of a layer's inputs: :class:`InputProducts`, :class:`InputNorms`, or one's own."""

    def add(self, inputs: Tensor, /) -> None:
        """Count a batch of inputs."""


S = TypeVar("S", bound=Statistic)


def stream_layers(
    model: nn.Module,
    batches: Sequence[Batch],
    statistic: Callable[[], S],
    *,
    targets: Literal["blocks", "all"] = "blocks",
    exclude: Sequence[str] = (),
    order: Literal["layer", "block"] = "layer",
) -> Iterator[tuple[dict[str, nn.Parameter], S]]:
    """Yield the matrices that read the same input, with a statistic of that input; the caller prunes them in place.

    Each is yielded once, in the order in which the model runs them; what comes later sees the inputs that the pruned
    ones produce. Where the model is a chain of blocks (any usual language model), the outputs of a block are computed
    once and kept, so that the whole costs a few forward passes and memory for one statistic and one block's inputs.
    Other models run from the start for every layer. What blocks are given besides the hidden states (masks, positions)
    is taken from the model as it was at first.

    Args:
        model: runs in evaluation mode, without gradients.
        batches: what it is called with.
        statistic: makes an empty one.
        targets, exclude: see :func:`~lossmith.sparsity.block_weights`.
        order: ``"layer"``: inputs from all pruned layers before; ``"block"``: from all pruned blocks before (one pass
            per block; the default of the code that SparseGPT released), with as many statistics as a block has inputs.

    Raises:
        InputError: no batches, nothing to prune, a layer that the batches never reach (named), inputs that are not
            finite (the layer is named).
    """
    if order not in ("layer", "block"):
        raise ValueError(f"order must be 'layer' or 'block', got {order!r}")
    if not len(batches):
        raise InputError("there are no calibration batches")
    wanted = block_weights(model, targets=targets, exclude=exclude).weights
    was_training = model.training
    model.eval()
    try:
        layers = _holders(model, wanted)
        for stage, own in _stages(model, batches, layers):
            yield from _through(stage, {name: layers[name] for name in own}, statistic, order)
            stage.finish()
    finally:
        model.train(was_training)


@dataclass(slots=True)
class _Stage:
    """A module and what it is called with, batch by batch."""

    run: Callable[[int], Any]
    number: int
    finish: Callable[[], None] = lambda: None


class _Stop(Exception):
    """The pass has come as far as it must."""


def _through(
    stage: _Stage, layers: Layers, statistic: Callable[[], S], order: str
) -> Iterator[tuple[dict[str, nn.Parameter], S]]:
    groups, repeated = _groups(stage, layers)
    kept = []
    for number, names in enumerate(groups):
        found = statistic()
        kept.append((names, found))
        # A layer that runs several times (shared between blocks) must not stop the pass at its first call.
        if order == "layer" or number == len(groups) - 1:
            watched = {g[0]: s for g, s in kept}
            stop = None if names[0] in repeated or order == "block" else layers[names[0]][0]
            _pass(stage, {layer: s for name, s in watched.items() for layer in layers[name]}, stop)
            for members, seen in kept:
                _check(members[0], seen)
                yield {name: _weight(layers[name][0]) for name in members}, seen
            kept = []


def _groups(stage: _Stage, layers: Layers) -> tuple[list[list[str]], set[str]]:
    """Layers that read the same tensor, in the order of their first call, and those that run more than once."""
    groups: list[list[str]] = []
    grouped: set[str] = set()
    repeated: set[str] = set()
    for number in range(stage.number):
        # By the tensor that they read; it is kept, so that its identity stays its own.
        here: list[tuple[Tensor, list[str]]] = []
        for name, tensor in _calls(stage, layers, number):
            if any(name in names for _, names in here):
                repeated.add(name)
                continue
            same = next((names for known, names in here if known is tensor), None)
            if same is None:
                here.append((tensor, [name]))
            else:
                same.append(name)
        for _, names in here:
            alone = [[name] for name in names if name in repeated]
            together = [name for name in names if name not in repeated]
            for group in (together, *alone):
                if new := [name for name in group if name not in grouped]:
                    groups.append(new)
                    grouped.update(new)
        # One batch says it all, unless it does not reach some layers (experts).
        if grouped == layers.keys():
            break
    if missing := [name for name in layers if name not in grouped]:
        raise InputError(f"{missing[0]} is not reached by the calibration data; exclude it or give more of it")
    return groups, repeated


def _calls(stage: _Stage, layers: Layers, number: int) -> list[tuple[str, Tensor]]:
    """Which layer was called with what, for one batch."""
    calls: list[tuple[str, Tensor]] = []
    with ExitStack() as stack, torch.no_grad():
        for name, layer in ((name, layer) for name, own in layers.items() for layer in own):

            def seen(_: Any, args: Any, kwargs: Any, name: str = name) -> None:
                calls.append((name, _first(args, kwargs)))

            stack.callback(layer.register_forward_pre_hook(seen, with_kwargs=True).remove)
        stage.run(number)
    return calls


def _pass(stage: _Stage, watched: Mapping[nn.Module, Statistic], stop: nn.Module | None) -> None:
    for number in range(stage.number):
        with ExitStack() as stack, torch.no_grad():
            for layer, statistic in watched.items():

                def seen(module: Any, args: Any, kwargs: Any, statistic: Statistic = statistic) -> None:
                    statistic.add(_first(args, kwargs))
                    if module is stop:
                        raise _Stop

                stack.callback(layer.register_forward_pre_hook(seen, with_kwargs=True).remove)
            with suppress(_Stop):
                stage.run(number)


def _stages(model: nn.Module, batches: Sequence[Batch], layers: Layers) -> Iterator[tuple[_Stage, list[str]]]:
    """The layers before the blocks, each block, the layers after them; the whole model where it is no chain."""
    whole = _Stage(lambda i: call(model, batches[i]), len(batches))
    chain = _chain(model, batches, layers)
    if chain is None:
        yield whole, list(layers)
        return
    names, before = chain
    inside = {name: next((b for b in names if name.startswith(f"{b}.")), None) for name in layers}
    if first := [name for name in layers if inside[name] is None and name in before]:
        yield whole, first
    blocks = [model.get_submodule(name) for name in names]
    calls = _block_calls(model, batches, blocks)
    for index, (name, block) in enumerate(zip(names, blocks, strict=True)):
        stage = _Stage(lambda i, b=block, n=index: calls[i].run(b, n), len(batches))  # type: ignore[misc]
        own = [layer for layer in layers if inside[layer] == name]
        if own:
            yield stage, own
        if index < len(blocks) - 1:
            with torch.no_grad():
                for i, one in enumerate(calls):
                    one.hidden = _hidden(stage.run(i))
    if last := [name for name in layers if inside[name] is None and name not in before]:
        yield whole, last


@dataclass(slots=True)
class _BlockCall:
    """The hidden states of one batch before the present block, and what each block is given besides."""

    hidden: Tensor
    keyword: bool
    others: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)

    def run(self, block: nn.Module, index: int) -> Any:
        args, kwargs = self.others[index]
        if self.keyword:
            return block(*args, hidden_states=self.hidden, **kwargs)
        return block(self.hidden, *args, **kwargs)


def _block_calls(model: nn.Module, batches: Sequence[Batch], blocks: Sequence[nn.Module]) -> list[_BlockCall]:
    found: list[_BlockCall] = []
    # The usual model gives all of its blocks the same: then later batches stop at the first block.
    same = False
    for batch in batches:
        seen = _given(model, batch, blocks[:1] if same else blocks) * (len(blocks) if same else 1)
        keyword = not seen[0][0]
        hidden = _first(*seen[0])
        rest = [(a[1:], {k: v for k, v in kw.items() if not (keyword and k == "hidden_states")}) for a, kw in seen]
        same = same or (not found and all(_is_same(rest[0], other) for other in rest))
        found.append(_BlockCall(hidden, keyword, rest))
    return found


def _given(model: nn.Module, batch: Batch, blocks: Sequence[nn.Module]) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What each of the blocks is called with; the pass ends at the last of them."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    with ExitStack() as stack, torch.no_grad():

        def record(module: Any, args: Any, kwargs: Any) -> None:
            seen.append((args, kwargs))
            if module is blocks[-1]:
                raise _Stop

        for block in blocks:
            stack.callback(block.register_forward_pre_hook(record, with_kwargs=True).remove)
        with suppress(_Stop):
            call(model, batch)
    return seen


def _is_same(one: tuple[tuple[Any, ...], dict[str, Any]], other: tuple[tuple[Any, ...], dict[str, Any]]) -> bool:
    if len(one[0]) != len(other[0]) or one[1].keys() != other[1].keys():
        return False
    pairs = [*zip(one[0], other[0], strict=True), *((one[1][k], other[1][k]) for k in one[1])]
    return all(a is b for a, b in pairs)


def _chain(model: nn.Module, batches: Sequence[Batch], layers: Layers) -> tuple[list[str], set[str]] | None:
    """The blocks' names if each block's input is the output of the one before, and which layers run before them."""
    # Only outermost lists: blocks may hold lists of their own.
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    holding = [name for name in lists if any(layer.startswith(f"{name}.") for layer in layers)]
    outer = [name for name in holding if not any(name.startswith(f"{other}.") for other in holding)]
    if len(outer) != 1:
        return None
    listed: Any = model.get_submodule(outer[0])
    names = [f"{outer[0]}.{index}" for index, _ in listed.named_children()]
    blocks = [model.get_submodule(name) for name in names]
    if _shared(model, names, layers):
        return None
    inputs: list[Tensor | None] = []
    outputs: list[Any] = []
    before: set[str] = set()

    def enter(_: Any, args: Any, kwargs: Any) -> None:
        first = args[0] if args else kwargs.get("hidden_states")
        inputs.append(first if isinstance(first, Tensor) else None)

    def leave(_: Any, args: Any, output: Any) -> None:
        outputs.append(_hidden(output))

    with ExitStack() as stack, torch.no_grad():
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(leave).remove)
        for name, layer in ((name, layer) for name, own in layers.items() for layer in own):

            def note(_: Any, args: Any, name: str = name) -> None:
                if not inputs:
                    before.add(name)

            stack.callback(layer.register_forward_pre_hook(note).remove)
        call(model, batches[0])
    if (
        len(inputs) != len(blocks)
        or len(outputs) != len(blocks)
        or inputs[0] is None
        or len(set(blocks)) != len(blocks)
    ):
        return None
    if any(later is not earlier for earlier, later in zip(outputs, inputs[1:], strict=False)):
        return None
    return names, before


def _holders(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> Layers:
    """The layers with each matrix: some models have one matrix in several."""
    names = {id(weight): name for name, weight in weights.items()}
    found: dict[str, list[nn.Module]] = {name: [] for name in weights}
    for module in model.modules():
        if (name := names.get(id(module._parameters.get("weight")))) is not None:
            found[name].append(module)
    return found


def _shared(model: nn.Module, blocks: Sequence[str], layers: Layers) -> bool:
    """Whether a matrix is in several blocks, or in a block and outside: what one of them sees is not all of it."""
    owners = {id(layer): name for name, own in layers.items() for layer in own}
    places: dict[str, set[str | None]] = {name: set() for name in layers}
    for path, module in model.named_modules(remove_duplicate=False):
        if (name := owners.get(id(module))) is not None:
            places[name].add(next((block for block in blocks if path.startswith(f"{block}.")), None))
    return any(len(found) > 1 for found in places.values())


def _hidden(output: Any) -> Any:
    return output[0] if isinstance(output, tuple | list) else output


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    found: Tensor = args[0] if args else kwargs["hidden_states" if "hidden_states" in kwargs else "input"]
    return found


def _weight(layer: nn.Module) -> nn.Parameter:
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _check(name: str, statistic: Any) -> None:
    total = getattr(statistic, "total", None)
    if isinstance(total, Tensor) and not bool(torch.isfinite(total).all()):
        raise InputError(
            f"{name} sees inputs that are NaN or infinite: the model or the calibration data is damaged, or the model "
            "needs more range than half precision has"
        )
