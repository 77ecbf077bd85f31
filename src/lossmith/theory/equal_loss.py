"""Models of a language whose optimum is known, which reach the optimum in different places.

"Same Pre-training Loss, Better Downstream: Implicit Bias Matters for Language Models", 2022, arXiv 2210.14199.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lossmith.theory.known_languages import Array, KnownLanguage

__all__ = [
    "BilinearModel",
    "KnownLanguage",
    "adam",
    "descend",
    "one_shot_accuracy",
    "oppose",
    "padded",
    "wander",
]


@dataclass(frozen=True, eq=False)
class BilinearModel:
    """``logits(x) = output @ features[x]``: free features of every context, and an output layer."""

    features: Array
    output: Array

    @classmethod
    def random(cls, language: KnownLanguage, width: int = 32, *, seed: int = 0) -> BilinearModel:
        """Entries of standard deviation 0.6 (features) and 0.3 (output layer) at width 32; the same norms at others."""
        contexts, words = language.conditional.shape
        rng, scale = np.random.default_rng([seed, 3]), (32 / width) ** 0.5
        return cls(rng.normal(0, 0.6 * scale, (contexts, width)), rng.normal(0, 0.3 * scale, (words, width)))

    @classmethod
    def lookup(cls, language: KnownLanguage) -> BilinearModel:
        """The lookup table: features are the logarithms of the true probabilities, and the optimum by construction.

        Raises:
            ValueError: a word that is impossible after some context has no finite logit.
        """
        if not bool((language.conditional > 0).all()):
            raise ValueError("a lookup table needs a language in which every word is possible after every context")
        logits = np.log(language.conditional)
        return cls(logits - logits.mean(1, keepdims=True), np.eye(logits.shape[1]))

    def module(self) -> nn.Sequential:
        """The same as a torch module that takes numbers of contexts, for probes."""
        embedding = nn.Embedding.from_pretrained(torch.from_numpy(self.features.copy()), freeze=False)
        words, width = self.output.shape
        layer = nn.Linear(width, words, bias=False, dtype=torch.float64)
        layer.weight.data = torch.from_numpy(self.output.copy())
        return nn.Sequential(embedding, layer)

    def excess_loss(self, language: KnownLanguage) -> float:
        """Population loss beyond the optimum, nats: the mean divergence from the truth, without cancellation."""
        p = language.conditional
        logits = self.features @ self.output.T
        log_f = logits - np.logaddexp.reduce(logits, 1, keepdims=True)
        log_p = np.log(p, where=p > 0, out=np.zeros_like(p))
        return float((language.frequency[:, None] * p * (log_p - log_f)).sum())


def descend(model: BilinearModel, language: KnownLanguage, steps: int, *, learning_rate: float = 1.0) -> BilinearModel:
    """Gradient descent on the population loss: no noise, so it stops where it first meets the minimisers."""
    h, a = model.features.copy(), model.output.copy()
    frequency = language.frequency[:, None]
    for _ in range(steps):
        g = frequency * (_softmax(h @ a.T) - language.conditional)
        h, a = h - learning_rate * (g @ a), a - learning_rate * (g.T @ h)
    return BilinearModel(h, a)


def wander(
    model: BilinearModel,
    language: KnownLanguage,
    steps: int,
    *,
    learning_rate: float = 0.1,
    batch_size: int = 1,
    seed: int = 0,
) -> BilinearModel:
    r"""Stochastic gradient descent, fresh contexts and words at every step: its noise drifts to flat minimisers.

    Along the minimisers it follows :math:`\dot\theta = -\tfrac{1}{4B} \nabla \mathrm{tr}\, \nabla^2 L`, where a step
    of rate :math:`\eta` and batch :math:`B` takes the time :math:`\eta^2` (Theorem 4.3).
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    h, a = model.features.copy(), model.output.copy()
    rng = np.random.default_rng([seed, 4])
    contexts, words = language.conditional.shape
    chosen = rng.choice(contexts, steps * batch_size, p=language.frequency / language.frequency.sum())
    drawn = (rng.random(len(chosen))[:, None] > language.conditional.cumsum(1)[chosen]).sum(1).clip(max=words - 1)
    if batch_size > 1:
        rows = np.arange(batch_size)
        for x, y in zip(chosen.reshape(steps, -1), drawn.reshape(steps, -1), strict=True):
            seen = h[x]
            batch = _softmax(seen @ a.T)
            batch[rows, y] -= 1
            batch *= learning_rate / batch_size
            # A context may have been drawn twice.
            np.subtract.at(h, x, batch @ a)
            a -= batch.T @ seen
        return BilinearModel(h, a)
    for x, y in zip(chosen, drawn, strict=True):
        row = h[x].copy()
        logits = a @ row
        g = np.exp(logits - logits.max())
        g /= g.sum()
        g[y] -= 1
        g *= learning_rate
        h[x] = row - g @ a
        a -= g[:, None] * row
    return BilinearModel(h, a)


def adam(model: BilinearModel, language: KnownLanguage, steps: int, *, learning_rate: float = 0.01) -> BilinearModel:
    """Adam on the population loss, its rate falling to zero by a cosine."""
    parameters = [torch.from_numpy(v.copy()).requires_grad_() for v in (model.features, model.output)]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        _loss(parameters, language).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return _from(parameters)


def oppose(
    model: BilinearModel,
    language: KnownLanguage,
    steps: int,
    *,
    strength: float = 0.1,
    learning_rate: float = 1.0,
    draws: int = 4,
    seed: int = 0,
) -> BilinearModel:
    """Descend on the loss minus ``strength`` times the downstream error of a head: features that mislead at no loss.

    The head is fitted as in :func:`one_shot_accuracy`, on labelled contexts of its own draws; its error is the mean
    squared distance of the other contexts' scores from their labels, at most 1 for each.
    """
    parameters = [torch.from_numpy(v.copy()).requires_grad_() for v in (model.features, model.output)]
    rng = np.random.default_rng([seed, 5])
    seen = torch.from_numpy(np.stack([_one_of_each(language.cluster, rng) for _ in range(draws)]))
    labels = torch.from_numpy(np.eye(int(language.cluster.max()) + 1)[language.cluster])
    for _ in range(steps):
        objective = _loss(parameters, language) - strength * _head_error(parameters[0], labels, seen)
        gradients = torch.autograd.grad(objective, parameters)
        with torch.no_grad():
            for value, gradient in zip(parameters, gradients, strict=True):
                value -= learning_rate * gradient
    return _from(parameters)


def one_shot_accuracy(model: BilinearModel, language: KnownLanguage, *, draws: int = 200, seed: int = 0) -> float:
    """How often the cluster of a context is named by a least-norm head that saw one labelled context of each.

    Mean over ``draws`` of the labelled contexts.
    """
    rng = np.random.default_rng([seed, 6])
    labels = np.eye(int(language.cluster.max()) + 1)[language.cluster]
    right = []
    for _ in range(draws):
        chosen = _one_of_each(language.cluster, rng)
        rest = np.setdiff1d(np.arange(len(labels)), chosen)
        head = np.linalg.pinv(model.features[chosen]) @ labels[chosen]
        right.append(float(((model.features[rest] @ head).argmax(1) == language.cluster[rest]).mean()))
    return float(np.mean(right))


def padded(model: BilinearModel, width: int) -> BilinearModel:
    """The same function with further dimensions that are zero on both sides: the trace stays, and widths compare."""
    more = width - model.features.shape[1]
    if more < 0:
        raise ValueError(f"width must be at least {model.features.shape[1]}, got {width}")
    return replace(
        model, features=np.pad(model.features, ((0, 0), (0, more))), output=np.pad(model.output, ((0, 0), (0, more)))
    )


def _one_of_each(cluster: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    return np.array([rng.choice(np.flatnonzero(cluster == c)) for c in range(int(cluster.max()) + 1)])


def _head_error(features: Tensor, labels: Tensor, seen: Tensor) -> Tensor:
    """Mean over the draws, ``seen``: ``(draws, clusters)``."""
    own = features[seen]
    # A little ridge: where two labelled contexts coincide, the least-norm head is no smooth function of them.
    gram = own @ own.mT + 1e-3 * torch.eye(seen.shape[1], dtype=features.dtype)
    scores = features @ own.mT @ torch.linalg.solve(gram, labels[seen])
    squares = (scores - labels).square().sum(-1).clamp(max=1.0)
    unseen = torch.ones_like(squares).scatter(1, seen, 0.0)
    return (squares * unseen).sum() / unseen.sum()


def _loss(parameters: list[Tensor], language: KnownLanguage) -> Tensor:
    features, output = parameters
    truth = torch.from_numpy(language.frequency[:, None] * language.conditional)
    return -(truth * (features @ output.T).log_softmax(-1)).sum()


def _from(parameters: list[Tensor]) -> BilinearModel:
    features, output = (value.detach().numpy() for value in parameters)
    return BilinearModel(features, output)


def _softmax(logits: Array) -> Array:
    p: Array = np.exp(logits - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)
