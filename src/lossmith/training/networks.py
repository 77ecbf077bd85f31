"""Small networks for images, with the conventions of Hugging Face's classifiers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn


class ImagePerceptron(nn.Module):
    """Fully connected layers with ReLU on pixels with 1/2 subtracted; takes ``pixel_values``, returns logits.

    Args:
        shape: channels, height, width.
        widths: of the hidden layers.
        classes: width of the output layer, ``classifier``.
        normalise: batch normalisation before each ReLU.

    >>> import torch
    >>> ImagePerceptron((1, 8, 8), (16,), 10)(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """

    def __init__(self, shape: Sequence[int], widths: Sequence[int], classes: int, *, normalise: bool = False):
        super().__init__()
        layers: list[nn.Module] = []
        inside = math.prod(shape)
        for width in widths:
            layers += [nn.Linear(inside, width), *([nn.BatchNorm1d(width)] if normalise else []), nn.ReLU()]
            inside = width
        self.body = nn.Sequential(*layers)
        self.classifier = nn.Linear(inside, classes)

    def forward(self, pixel_values: Float[Tensor, "images channels height width"]) -> Float[Tensor, "images classes"]:
        """Logits."""
        return self.classifier(self.body(pixel_values.flatten(1) - 0.5))
