"""2:4 models on GPUs that multiply by them at up to twice the speed: PyTorch's semi-structured tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lossmith.errors import InputError
from lossmith.sparsity.lost_layer import dense_weight
from lossmith.sparsity.lost_model import target_layers

_TYPES = (torch.float16, torch.bfloat16)
# What PyTorch's kernels ask of matrices of these types.
_ROWS, _COLUMNS = 32, 64


def is_two_of_four(weight: Float[Tensor, "out in"]) -> bool:
    """Whether at most two of every four neighbours along the inputs are not zero.

    >>> is_two_of_four(torch.tensor([[1.0, 0.0, 0.0, 2.0]])), is_two_of_four(torch.tensor([[1.0, 3.0, 0.0, 2.0]]))
    (True, False)
    """
    if weight.ndim != 2 or weight.shape[1] % 4:
        return False
    return bool((torch.count_nonzero(weight.reshape(weight.shape[0], -1, 4), dim=-1) <= 2).all())


def to_semi_structured(model: nn.Module, *, targets: Sequence[str] | None = None) -> tuple[str, ...]:
    """Hand a 2:4-pruned model's matrices to ``torch.sparse.to_sparse_semi_structured``, in place; for inference.

    Layers that are not 2:4 (an output layer that was left alone) stay as they are. The matrices cannot be saved any
    more: ``save_pretrained`` first.

    Args:
        model: pruned with ``method="2:4"``, in float16 or bfloat16 on an NVIDIA GPU of compute capability 8.0 or later.
        targets: ends of names of layers; default: all linear layers but the output layer.

    Returns:
        The layers whose matrix is semi-structured now.

    Raises:
        InputError: another device or type; no layer is 2:4; one that is has a size that the kernels cannot take (named,
            with the rule). The model is unchanged.
    """
    found = target_layers(model, targets)
    chosen: dict[str, nn.Linear] = {}
    for name, linear in found.items():
        weight = dense_weight(linear)
        if reason := _missing(weight):
            raise InputError(f"layer {name} {reason}")
        if not is_two_of_four(weight):
            continue
        rows, columns = weight.shape
        if rows % _ROWS or columns % _COLUMNS:
            raise InputError(
                f"layer {name} is {rows} x {columns}; 2:4 kernels need outputs that are a multiple of {_ROWS} and "
                f"inputs that are one of {_COLUMNS}"
            )
        if not isinstance(linear, nn.Linear):
            raise InputError(f"layer {name} is a {type(linear).__name__}, whose matrix lies the other way round")
        chosen[name] = linear
    if not chosen:
        raise InputError(
            f"none of the {len(found)} linear layers is 2:4; prune with --method nm --pattern 2:4, or "
            "one_shot_masks(model, method='2:4'), first"
        )
    convert: Any = torch.sparse.to_sparse_semi_structured
    for linear in chosen.values():
        linear.weight = nn.Parameter(convert(linear.weight.detach().contiguous()), requires_grad=False)
    return tuple(chosen)


def _missing(weight: Tensor) -> str:
    """What a matrix lacks for the kernels, if anything."""
    if weight.device.type != "cuda":
        return f"is on {weight.device.type}; 2:4 kernels need an NVIDIA GPU of compute capability 8.0 or later"
    capability = torch.cuda.get_device_capability(weight.device)
    if capability < (8, 0):
        return f"is on a GPU of compute capability {capability[0]}.{capability[1]}; 2:4 kernels need 8.0 or later"
    if weight.dtype not in _TYPES:
        return f"is {str(weight.dtype).removeprefix('torch.')}; 2:4 kernels here take float16 or bfloat16"
    return ""
