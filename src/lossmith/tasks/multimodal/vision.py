"""From pictures to visual tokens: a small patch encoder, or any vision encoder of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lossmith.errors import InputError


class PatchEncoder(nn.Module):
    """Square patches, each through one linear layer, with a learned vector for its place.

    Args:
        image_size: height and width in pixels.
        patch_size: of a patch; divides ``image_size``.
        channels: of the picture.
        width: of the features.

    >>> PatchEncoder(16, 4, 1, 32)(torch.zeros(2, 1, 16, 16)).shape
    torch.Size([2, 16, 32])
    """

    def __init__(self, image_size: int, patch_size: int, channels: int, width: int):
        super().__init__()
        if image_size < 1 or patch_size < 1 or image_size % patch_size:
            raise InputError(f"patch_size {patch_size} does not divide image_size {image_size}")
        self.cut = nn.Conv2d(channels, width, patch_size, stride=patch_size)
        self.places = nn.Parameter(torch.randn((image_size // patch_size) ** 2, width) / width**0.5)

    def forward(self, pixels: Float[Tensor, "images channels size size"]) -> Float[Tensor, "images patches width"]:
        """Features of the patches, row by row."""
        return self.cut(pixels).flatten(2).transpose(1, 2) + self.places


class VisionEncoder(nn.Module):
    """Features of an image's patches.

    Args:
        config: ``{"model_type": "patches", "image_size": 16, "patch_size": 4, "num_channels": 1, "hidden_size": 64}``
            for the :class:`PatchEncoder`, or any vision configuration of transformers as a dictionary (CLIP, SigLIP,
            ViT, DINOv2 ...), whose class and register tokens are left out.
        encoder: one with weights, instead of random ones.
        mean, std: pixels in [0, 1] are taken to ``(pixel - mean) / std``.
    """

    def __init__(self, config: Mapping[str, Any], encoder: nn.Module | None = None, *, mean: Any = 0.5, std: Any = 0.5):
        super().__init__()
        for name in ("model_type", "image_size", "patch_size", "hidden_size"):
            if name not in config:
                raise InputError(f"a vision configuration needs '{name}', got {sorted(config)[:12]}")
        self.width = int(config["hidden_size"])
        self.size = _one(config["image_size"], "image_size")
        self.channels = int(config.get("num_channels", 3))
        patch = _one(config["patch_size"], "patch_size")
        self.tokens = (self.size // patch) ** 2
        self.own = config["model_type"] == "patches"
        if encoder is None:
            encoder = PatchEncoder(self.size, patch, self.channels, self.width) if self.own else _build(config)
        self.encoder = encoder
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.float32).reshape(-1, 1, 1), persistent=False)

    def forward(self, pixels: Float[Tensor, "images channels size size"]) -> Float[Tensor, "images patches width"]:
        """Features of pixels in [0, 1]."""
        if pixels.ndim != 4 or pixels.shape[1:] != (self.channels, self.size, self.size):
            wanted = f"(images, {self.channels}, {self.size}, {self.size})"
            raise ValueError(f"pixel_values must have the shape {wanted}, got {tuple(pixels.shape)}")
        weight = next(self.encoder.parameters())
        pixels = ((pixels - self.mean) / self.std).to(weight.dtype)
        if self.own:
            return self.encoder(pixels)
        hidden = self.encoder(pixel_values=pixels).last_hidden_state
        # Class and register tokens stand before the patches.
        return hidden[:, -self.tokens :]


def _one(value: Any, name: str) -> int:
    values = {int(v) for v in (value if isinstance(value, list | tuple) else [value])}
    if len(values) != 1:
        raise InputError(f"{name} must be one number (square), got {value}")
    return values.pop()


def _build(config: Mapping[str, Any]) -> nn.Module:
    from transformers import AutoConfig, AutoModel

    options = {k: v for k, v in config.items() if k != "model_type"}
    try:
        model: nn.Module = AutoModel.from_config(AutoConfig.for_model(config["model_type"], **options))
    except ValueError as error:
        raise InputError(f"vision configuration: {str(error).splitlines()[0][:200]}") from None
    return model
