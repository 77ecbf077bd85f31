"""Removing, or keeping only, directions of the vectors that enter the output layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lossmith.errors import InputError
from lossmith.probes.spectrum import StreamingCovariance


def leading_directions(stream: StreamingCovariance, number: int) -> Float[Tensor, "features number"]:
    """Eigenvectors of the covariance with the largest eigenvalues."""
    features = len(stream.mean)
    if not 1 <= number <= features:
        raise ValueError(f"number must lie from 1 to {features}, got {number}")
    return torch.linalg.eigh(stream.covariance()).eigenvectors.flip(1)[:, :number]


@contextmanager
def ablate_directions(
    model: nn.Module,
    directions: Float[Tensor, "features number"],
    *,
    mode: Literal["remove", "retain"] = "remove",
    mean: Float[Tensor, " features"] | None = None,
) -> Iterator[None]:
    """While it lasts, the output layer sees ``h - V Vᵀ h`` (remove) or ``V Vᵀ h`` (retain).

    Args:
        model: with an output layer (``get_output_embeddings``).
        directions: orthonormal columns ``V``.
        mode: see above.
        mean: taken away before and added back after (the digest's choice; the paper does not say). At small scale,
            removal without it harms much more.

    Raises:
        InputError: the model has no output layer, or one of another size.
    """
    if mode not in ("remove", "retain"):
        raise InputError(f"mode must be remove or retain, got '{mode}'")
    find = getattr(model, "get_output_embeddings", None)
    layer = find() if find is not None else None
    if not isinstance(layer, nn.Linear):
        raise InputError(f"{type(model).__name__} has no output layer to ablate in front of")
    if directions.ndim != 2 or directions.shape[0] != layer.in_features:
        raise InputError(f"directions must have {layer.in_features} rows, got shape {tuple(directions.shape)}")

    def change(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = inputs[0]
        v = directions.to(hidden.device, hidden.dtype)
        centre = 0 if mean is None else mean.to(hidden.device, hidden.dtype)
        centred = hidden - centre
        along = (centred @ v) @ v.T
        return (centre + (along if mode == "retain" else centred - along), *inputs[1:])

    handle = layer.register_forward_pre_hook(change)
    try:
        yield
    finally:
        handle.remove()
