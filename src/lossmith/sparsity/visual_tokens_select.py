"""Choosing visual tokens: by chance, by their likeness to each other, by a score."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lossmith.errors import InputError, did_you_mean

_METHODS = ("random", "divprune", "one_nn", "one_nn_pairs", "scores")


def select_tokens(
    features: Float[Tensor, "batch tokens width"],
    keep: float | int,
    method: str = "divprune",
    *,
    scores: Float[Tensor, "batch tokens"] | None = None,
    sort: bool = True,
    pivot: int | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, "batch kept"]:
    """Indices of the tokens that stay.

    Args:
        features: what ``divprune``, ``one_nn`` and ``one_nn_pairs`` look at; the others need the shape only.
        keep: how many (an integer), or which share (a float in (0, 1], rounded to the nearest, half to even).
        method: ``random``; ``divprune``: from one pivot on, always the token least like those kept (Alvar et al.,
            2025, arXiv 2503.02175); ``one_nn``: drop those that have the nearest neighbour, both of a pair;
            ``one_nn_pairs``: one at a time, so that one of each pair stays; ``scores``: the highest ``scores``.
        scores: of each token, for ``scores``.
        sort: indices rise; else in the order of choice.
        pivot: first token of ``divprune``; default: at random, one for each example.
        generator: of random choices; default: torch's own.

    Returns:
        ``(batch, kept)`` indices. Likeness is the cosine, computed in float32 or better, so that lengths do not matter;
        of equals the first one counts more.

    Raises:
        ValueError: a share or number out of range, features or scores that are not finite or of the wrong shape.

    >>> select_tokens(torch.eye(3)[None, [0, 0, 1, 2]], 2, "one_nn").tolist()
    [[2, 3]]
    """
    if features.ndim != 3 or not features.is_floating_point():
        raise ValueError(
            f"features must be floating point of shape (batch, tokens, width), got {tuple(features.shape)}"
        )
    batch, tokens, _ = features.shape
    number = _number(keep, tokens)
    if method not in _METHODS:
        raise InputError(f"unknown method '{method}': {did_you_mean(method, _METHODS)}")
    if method == "scores":
        if scores is None or scores.shape != (batch, tokens):
            found = None if scores is None else tuple(scores.shape)
            raise ValueError(f"scores must have the shape {(batch, tokens)}, got {found}")
        _check_finite("scores", scores)
        chosen = highest(scores, number)
    elif method == "random":
        noise = torch.rand(batch, tokens, generator=generator)
        chosen = highest(noise.to(features.device), number)
    else:
        _check_finite("features", features)
        if method == "divprune":
            chosen = _div_prune(features, number, pivot, generator)
        elif method == "one_nn":
            chosen = highest(-nearest_neighbour(features), number)
        else:
            chosen = _one_of_each_pair(features, number)
    return chosen.sort(dim=1).values if sort else chosen


def highest(scores: Float[Tensor, "batch tokens"], number: int) -> Int[Tensor, "batch number"]:
    """Indices of the highest scores, best first; of equals the first."""
    return scores.argsort(dim=1, descending=True, stable=True)[:, :number]


def cosines(features: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens tokens"]:
    """Of all pairs; 0 with a token that is zero."""
    wide = features if features.dtype == torch.float64 else features.float()
    # The largest number first: squares of very large or very small features stay finite.
    wide = wide / wide.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(wide.dtype).tiny)
    unit = F.normalize(wide, dim=-1, eps=1e-12)
    return unit @ unit.transpose(1, 2)


def nearest_neighbour(features: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens"]:
    r"""Each token's largest cosine with another one; -1 where there is no other.

    .. math:: n_j = \max_{i \neq j} \cos(h_j, h_i)

    >>> nearest_neighbour(torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]])).tolist()
    [[1.0, 1.0, 0.0]]
    """
    alike = cosines(features)
    itself = torch.eye(alike.shape[1], dtype=torch.bool, device=alike.device)
    return alike.masked_fill(itself, -1.0).amax(-1)


def _div_prune(features: Tensor, number: int, pivot: int | None, generator: torch.Generator | None) -> Tensor:
    batch, tokens, _ = features.shape
    if pivot is not None and not 0 <= pivot < tokens:
        raise ValueError(f"pivot must be one of the {tokens} tokens, got {pivot}")
    alike = cosines(features)
    rows = torch.arange(batch, device=features.device)
    if pivot is None:
        last = torch.randint(tokens, (batch,), generator=generator).to(features.device)
    else:
        last = torch.full((batch,), pivot, device=features.device)
    nearest = torch.full((batch, tokens), -torch.inf, dtype=alike.dtype, device=features.device)
    chosen = [last]
    taken = torch.zeros(batch, tokens, dtype=torch.bool, device=features.device)
    for _ in range(number - 1):
        taken[rows, last] = True
        nearest = torch.maximum(nearest, alike[rows, last])
        last = nearest.masked_fill(taken, torch.inf).argmin(dim=1)
        chosen.append(last)
    return torch.stack(chosen, dim=1)


def _one_of_each_pair(features: Tensor, number: int) -> Tensor:
    """Drop one token at a time, the second of the pair that is most alike among those left."""
    alike = cosines(features)
    batch, tokens, _ = alike.shape
    # Of each pair, seen from its second member only.
    alike = alike.masked_fill(~torch.ones_like(alike, dtype=torch.bool).tril(-1), -torch.inf)
    rows = torch.arange(batch, device=features.device)
    left = torch.ones(batch, tokens, dtype=torch.bool, device=features.device)
    for _ in range(tokens - number):
        score = alike.amax(-1).masked_fill(~left, -torch.inf)
        # The first token has no earlier one to be like: it goes only when it is alone.
        gone = score.argmax(dim=1)
        left[rows, gone] = False
        alike[rows, gone] = -torch.inf
        alike[rows, :, gone] = -torch.inf
    return left.nonzero()[:, 1].view(batch, number)


def _number(keep: float | int, tokens: int) -> int:
    if tokens < 1:
        raise ValueError("features must have at least one token, got none")
    if isinstance(keep, int) and not isinstance(keep, bool):
        if not 1 <= keep <= tokens:
            raise ValueError(f"keep must be 1 to {tokens} tokens, got {keep}")
        return keep
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be a share in (0, 1], got {keep}")
    return max(1, round(keep * tokens))


def _check_finite(name: str, values: Tensor) -> None:
    if not torch.isfinite(values).all():
        row, token = torch.nonzero(~torch.isfinite(values))[0, :2].tolist()
        raise ValueError(f"{name} must be finite, those of example {row}, token {token} are not")
