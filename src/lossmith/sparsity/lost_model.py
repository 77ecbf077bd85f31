"""Whole models with LOST layers: convert, count, merge, save and load.

"LOST: Low-rank and Sparse Pre-training for Large Language Models", 2025, arXiv 2508.02668.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lossmith.errors import InputError
from lossmith.sparsity.lost_layer import (
    Activation,
    Columns,
    Decomposition,
    LOSTLinear,
    Start,
    column_count,
    dense_weight,
    whole_rank,
)
from lossmith.sparsity.lost_sltrain import SLTrainLinear

# Gradient and Adam's two moments, besides the parameter itself.
_COPIES = 4


@dataclass(frozen=True, slots=True)
class LOSTLayer:
    """One layer of a :class:`LOSTReport`; ``dense`` and ``parameters`` count matrices, not biases."""

    name: str
    shape: tuple[int, int]
    rank: int
    columns: int
    dense: int
    parameters: int


@dataclass(frozen=True, slots=True)
class LOSTReport:
    """What became of a model.

    Attributes:
        layers: those that were replaced.
        parameters: of the whole model, trainable, now.
        dense: what it had, or would have, with dense layers.
        bytes_per_parameter: of the model's floating-point type.
    """

    layers: tuple[LOSTLayer, ...]
    parameters: int
    dense: int
    bytes_per_parameter: float

    @property
    def flops_ratio(self) -> float:
        """Multiplications of the replaced layers over those of dense ones."""
        return sum(layer.parameters for layer in self.layers) / sum(layer.dense for layer in self.layers)

    @property
    def training_bytes(self) -> int:
        """Parameters, gradients and Adam's two moments."""
        return round(_COPIES * self.bytes_per_parameter * self.parameters)

    @property
    def dense_training_bytes(self) -> int:
        """The same of the dense model."""
        return round(_COPIES * self.bytes_per_parameter * self.dense)

    def text(self) -> str:
        """A line per layer and the totals."""
        width = max((len(layer.name) for layer in self.layers), default=0)
        lines = [
            f"{layer.name:{width}}  {layer.shape[0]} x {layer.shape[1]}  rank {layer.rank}, {layer.columns} columns  "
            f"{layer.dense:,} -> {layer.parameters:,}"
            for layer in self.layers
        ]
        lines.append(
            f"{self.dense:,} -> {self.parameters:,} parameters ({self.parameters / self.dense:.3f}); with "
            f"gradients and Adam {self.dense_training_bytes / 2**20:,.1f} -> {self.training_bytes / 2**20:,.1f} MiB; "
            f"{self.flops_ratio:.3f} of the layers' FLOPs"
        )
        return "\n".join(lines)


def target_layers(model: nn.Module, targets: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """The linear layers that are replaced: all but the output layer, or those whose names end so.

    An output layer (``get_output_embeddings()``), layers that share their matrix with an embedding or with each other,
    and subclasses of ``nn.Linear``, whose owners read their matrix themselves, are left alone.

    Raises:
        InputError: no linear layer, or a target that is at the end of no layer's name.

    >>> list(target_layers(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 8), nn.Linear(8, 9)), targets=["1"]))
    ['1']
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    found = {
        name: module
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or type(module).__name__ == "Conv1D")
        and module is not head
        and id(module.weight) not in embedded
    }
    times: dict[int, int] = {}
    for module in found.values():
        times[id(module.weight)] = times.get(id(module.weight), 0) + 1
    found = {name: module for name, module in found.items() if times[id(module.weight)] == 1 and name}
    kinds = sorted({name.rpartition(".")[2] for name in found})
    for target in targets or ():
        if not any(_ends(name, target) for name in found):
            raise InputError(f"targets names '{target}', with which no linear layer's name ends; there are {kinds}")
    if not found:
        raise InputError(f"{type(model).__name__} has no linear layer to replace, besides its output layer")
    return {n: m for n, m in found.items() if targets is None or any(_ends(n, target) for target in targets)}


def convert_to_lost(
    model: nn.Module,
    rank: float | Mapping[str, float] = 0.25,
    density: float = 0.01,
    *,
    gamma: float = 0.5,
    activation: Activation = "silu",
    start: Start = "svd",
    choose: Columns = "svd",
    complement_rank: int | None = None,
    decomposition: Decomposition = "svd",
    targets: Sequence[str] | None = None,
) -> LOSTReport:
    """Replace a model's linear layers by :class:`LOSTLinear`, in place, before its optimiser is made.

    Every Hugging Face causal model whose layers are ``nn.Linear`` or ``Conv1D``, or any other module. A layer that
    would not become smaller is replaced all the same. ``model.config`` remembers the shape, so that ``save_pretrained``
    and :func:`load_lost` work.

    Args:
        model: with its first weights, random or trained.
        rank: a whole number, or a share in (0, 1) of each layer's smaller side; or by part of a name,
            ``{"attn": 128, "mlp": 0.5}``.
        density: share of the input channels whose columns are kept.
        gamma: weight of the low-rank pair.
        activation: ``"silu"`` or ``None``; without it the model can be merged.
        start: ``"svd"`` or ``"cola"``.
        choose: ``"svd"``, ``"norm"`` or ``"random"``.
        complement_rank: see :func:`lossmith.sparsity.column_scores`.
        decomposition: ``"svd"`` or ``"gram"``, which is faster: see :func:`lossmith.sparsity.lost_start`.
        targets: ends of names (``"q_proj"``); default: all linear layers but the output layer.

    Raises:
        InputError: an option out of range for a layer, which is named; nothing to replace. The model is unchanged.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    >>> report = convert_to_lost(model, rank=0.25, density=0.05)
    >>> report.layers[0].parameters, report.dense, report.parameters
    (2240, 8320, 4608)
    """

    def replace(name: str, linear: nn.Module) -> LOSTLinear:
        return LOSTLinear.from_linear(
            linear, rank_of(name, rank), density, gamma=gamma, activation=activation, start=start, choose=choose,
            complement_rank=complement_rank, decomposition=decomposition,
        )  # fmt: skip

    def check(name: str, linear: nn.Module) -> None:
        outputs, inputs = dense_weight(linear).shape
        number, columns = whole_rank(rank_of(name, rank), min(outputs, inputs)), column_count(density, inputs)
        if decomposition not in ("svd", "gram"):
            raise ValueError(f"decomposition must be 'svd' or 'gram', got {decomposition!r}")
        if columns and choose == "svd" and number >= min(outputs, inputs):
            raise ValueError(
                f"rank {number} leaves nothing over of a weight of {outputs} x {inputs} to choose columns by"
            )
        if not bool(torch.isfinite(dense_weight(linear)).all()):
            raise ValueError("weight has entries that are not finite; it cannot be decomposed")

    replace_layers(model, targets, replace, check)
    return lost_report(model)


def rank_of(name: str, rank: float | Mapping[str, float]) -> float:
    """The rank of a layer: the first part that is in its name counts."""
    if not isinstance(rank, Mapping):
        return rank
    for part, value in rank.items():
        if part in name:
            return value
    raise ValueError(f"rank has no entry for it; there are {', '.join(map(str, rank))}")


def replace_layers(
    model: nn.Module,
    targets: Sequence[str] | None,
    replace: Callable[[str, nn.Module], nn.Module],
    check: Callable[[str, nn.Module], None] = lambda name, linear: None,
) -> None:
    """Put another layer in the place of each target; all are checked before the first is replaced."""
    targets = [targets] if isinstance(targets, str) else targets
    if any(True for _ in _low_rank_layers(model)):
        raise InputError(f"{type(model).__name__} has low-rank layers already; convert a dense model")
    found = target_layers(model, targets)
    for step in (check, replace):
        for name, linear in found.items():
            try:
                layer = step(name, linear)
            except ValueError as error:
                raise InputError(f"layer {name}: {error}") from None
            if isinstance(layer, nn.Module):
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, layer)
    config: Any = getattr(model, "config", None)
    if config is not None:
        config.lost = {name: _shape(layer) for name, layer in _low_rank_layers(model)}


def lost_report(model: nn.Module) -> LOSTReport:
    """Parameters, FLOPs and training memory of a converted model, per layer and in all.

    Raises:
        InputError: no layer of it was converted.
    """
    layers = tuple(
        LOSTLayer(
            name,
            (layer.out_features, layer.in_features),
            layer.rank,
            layer.columns,
            layer.out_features * layer.in_features,
            sum(p.numel() for n, p in layer.named_parameters() if n != "bias"),
        )
        for name, layer in _low_rank_layers(model)
    )
    if not layers:
        raise InputError(f"{type(model).__name__} has no low-rank layer; convert it first")
    trained = [p for p in model.parameters() if p.requires_grad]
    number = sum(p.numel() for p in trained)
    size = sum(p.numel() * p.element_size() for p in trained) / max(number, 1)
    saved = sum(layer.dense - layer.parameters for layer in layers)
    return LOSTReport(layers, number, number + saved, size)


def merge_lost(model: nn.Module) -> nn.Module:
    """Replace low-rank layers by the ``nn.Linear`` of the same function, in place: for plain Transformers.

    Raises:
        RuntimeError: a layer has an activation between its factors. The model is unchanged.
    """
    merged = {name: layer.merged() for name, layer in _low_rank_layers(model)}
    for name, linear in merged.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, linear)
    config: Any = getattr(model, "config", None)
    if hasattr(config, "lost"):
        del config.lost
    return model


def load_lost(folder: str | Path, **options: Any) -> Any:
    """A causal model with low-rank layers from the folder that ``save_pretrained`` wrote.

    Nothing is decomposed and no column is chosen again: shapes come from ``config.json``, channels from the weights.
    ``AutoModelForCausalLM.from_pretrained`` does not know the layers, and stops at their shapes.

    Args:
        folder: with ``config.json`` and safetensors.
        **options: of ``AutoModelForCausalLM.from_config`` (``dtype``, ``attn_implementation``).

    Raises:
        InputError: no such folder, a folder of a dense model, a missing shard, or weights of another shape, with the
            layer named.
    """
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(folder).expanduser()
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json; give a folder written by save_pretrained")
    config = AutoConfig.from_pretrained(folder)
    if not getattr(config, "lost", None):
        raise InputError(f"{folder} holds a dense model; load it with AutoModelForCausalLM.from_pretrained")
    options.setdefault("dtype", config.dtype)
    model = AutoModelForCausalLM.from_config(config, **options)
    for name, shape in config.lost.items():
        parent, _, last = name.rpartition(".")
        linear = model.get_submodule(name)
        kind = SLTrainLinear if "scale" in shape else LOSTLinear
        dtype = dense_weight(linear).dtype
        setattr(model.get_submodule(parent), last, kind(**shape, dtype=dtype))
    weights: dict[str, torch.Tensor] = {}
    for path in _weight_files(folder):
        weights |= load_file(path)
    try:
        missing, unknown = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise InputError(f"{folder}: {str(error).strip().splitlines()[-1].strip()}") from None
    tied = set(getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or ())
    if wrong := sorted({*missing} - tied) + sorted(unknown):
        raise InputError(f"{folder}: the weights do not fit config.json, which differs in {wrong[0]}")
    model.tie_weights()
    return model.eval()


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    for name in sorted(names):
        if not (folder / name).is_file():
            raise InputError(f"{folder} lacks {name}; copy the whole folder that save_pretrained wrote")
    return [folder / name for name in sorted(names)]


def _shape(layer: LOSTLinear | SLTrainLinear) -> dict[str, Any]:
    """The constructor's arguments."""
    shape: dict[str, Any] = {
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "rank": layer.rank,
        "bias": layer.bias is not None,
    }
    if isinstance(layer, SLTrainLinear):
        return {**shape, "entries": layer.entries, "scale": layer.scale}
    return {**shape, "columns": layer.columns, "gamma": layer.gamma, "activation": layer.activation}


def _low_rank_layers(model: nn.Module) -> Iterator[tuple[str, LOSTLinear | SLTrainLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, LOSTLinear | SLTrainLinear):
            yield name, module


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
