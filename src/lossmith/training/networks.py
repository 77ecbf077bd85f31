"""Small networks for images and words, with the conventions of Hugging Face's classifiers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int
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


class WordWindow(nn.Module):
    """An n-gram language model: embeddings of the last words, fully connected layers, any output layer.

    Args:
        vocabulary: number of words.
        context: words looked at.
        embedding: width of their embeddings.
        widths: of the layers; the last is what the output layer reads (no ReLU before it).
        classifier: from features to scores, or a head with its own loss.
    """

    def __init__(self, vocabulary: int, context: int, embedding: int, widths: Sequence[int], classifier: nn.Module):
        super().__init__()
        self.words = nn.Embedding(vocabulary, embedding)
        layers: list[nn.Module] = []
        inside = context * embedding
        for width in widths:
            layers += [nn.Linear(inside, width), nn.ReLU()]
            inside = width
        self.body = nn.Sequential(*layers[:-1])
        self.classifier = classifier

    def features(self, context: Int[Tensor, "rows context"]) -> Float[Tensor, "rows features"]:
        """What the output layer reads."""
        return self.body(self.words(context).flatten(1))

    def forward(self, context: Int[Tensor, "rows context"]) -> Tensor:
        """Scores."""
        return self.classifier(self.features(context))

    def body_parameters(self) -> list[nn.Parameter]:
        """All but the output layer's."""
        return [*self.words.parameters(), *self.body.parameters()]


class AdamWithPlainOutput(torch.optim.Optimizer):
    """Adam for a body and plain SGD for an output layer (sparse gradients are welcome), as one optimiser.

    Args:
        body: parameters for Adam.
        output: parameters for SGD; may be none.
        lr: Adam's learning rate.
        output_lr: SGD's.
    """

    def __init__(self, body: Iterable[nn.Parameter], output: Iterable[nn.Parameter], *, lr: float, output_lr: float):
        groups: list[dict[str, object]] = [{"params": list(body), "lr": lr}]
        if plain := list(output):
            groups.append({"params": plain, "lr": output_lr})
        super().__init__(groups, {"lr": lr})
        self._adam = torch.optim.Adam(self.param_groups[0]["params"], lr=lr)
        self._sgd = torch.optim.SGD(plain, lr=output_lr) if plain else None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Both."""
        self._adam.param_groups[0]["lr"] = self.param_groups[0]["lr"]
        self._adam.step()
        if self._sgd is not None:
            self._sgd.param_groups[0]["lr"] = self.param_groups[1]["lr"]
            self._sgd.step()
