"""Arithmetic of visual tokens: the multiplications that a transformer spends on a sequence, and on all its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TransformerShape:
    """What the cost of a transformer depends on.

    Attributes:
        layers: ``T``.
        width: ``d``, of the hidden states.
        ffn: ``m``, of the inner layer of the feed-forward part.
        ffn_matrices: 2, or 3 where the feed-forward part has a gate (Llama); the paper's formula has 2.
    """

    layers: int
    width: int
    ffn: int
    ffn_matrices: int = 2

    def __post_init__(self) -> None:
        for name in ("layers", "width", "ffn"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.ffn_matrices not in (2, 3):
            raise ValueError(f"ffn_matrices must be 2, or 3 with a gate, got {self.ffn_matrices}")

    def layer(self, tokens: int) -> float:
        """One layer over ``tokens`` tokens that all attend to each other."""
        n, d = tokens, self.width
        return 4.0 * n * d * d + 2.0 * n * n * d + self.ffn_matrices * float(n) * d * self.ffn


def prefill_flops(shape: TransformerShape, tokens: int) -> float:
    r"""One pass over ``tokens`` tokens, counted in multiply-adds as the paper does.

    .. math:: T\,(4 n d^2 + 2 n^2 d + 2 n d m)

    Embeddings and the output layer are left out. Source: "A Comprehensive Study on Visual Token Redundancy for Discrete
    Diffusion-based Multimodal Large Language Models", 2025, arXiv 2511.15098.

    >>> prefill_flops(TransformerShape(layers=2, width=4, ffn=8), 10)
    4160.0
    """
    return shape.layers * shape.layer(tokens)


def decode_flops(shape: TransformerShape, context: int, generated: int) -> float:
    r"""What an autoregressive model with a key-value cache spends on ``generated`` tokens after ``context`` others.

    .. math:: T\,(4 L d^2 + 2 L d m + d L (2 n + L - 1))

    >>> decode_flops(TransformerShape(layers=2, width=4, ffn=8), context=10, generated=3)
    1296.0
    """
    n, L, d = context, generated, shape.width
    per_layer = 4.0 * L * d * d + shape.ffn_matrices * float(L) * d * shape.ffn + d * L * (2.0 * n + L - 1)
    return shape.layers * per_layer


def denoising_flops(shape: TransformerShape, tokens: Sequence[Sequence[int]]) -> float:
    """All passes of a denoising loop without a cache: the sum over steps and layers.

    Args:
        shape: of the transformer.
        tokens: for each step, for each layer, the number of tokens that enter the layer. (A layer in which tokens are
            dropped between attention and feed-forward part counts whole.)
    """
    for row in tokens:
        if len(row) != shape.layers:
            raise ValueError(f"each step must have {shape.layers} numbers of tokens, one per layer, got {len(row)}")
    return sum(shape.layer(n) for row in tokens for n in row)


def visual_flops(
    shape: TransformerShape,
    *,
    text: int,
    visual: int,
    answer: int,
    steps: int,
    prune: object = None,
) -> float:
    """Cost of a denoising loop under a schedule, before anything is run.

    Args:
        shape: of the transformer.
        text: ``P``, tokens of the prompt.
        visual: ``V``.
        answer: ``L``.
        steps: ``S``, over all blocks.
        prune: a :class:`PruneSchedule`; ``None``: nothing is dropped.

    Passes that only score tokens are left out (``Denoised.flops`` has them).

    >>> from lossmith.sparsity import PruneSchedule
    >>> shape = TransformerShape(layers=32, width=4096, ffn=12288)
    >>> size = dict(text=100, visual=729, answer=96, steps=48)
    >>> cheap = visual_flops(shape, **size, prune=PruneSchedule("fastv", keep=0.25, step=0, layer=2))
    >>> round(cheap / visual_flops(shape, **size), 4)
    0.3994
    """
    from lossmith.sparsity.visual_tokens_schedule import PruneSchedule

    if prune is not None and not isinstance(prune, PruneSchedule):
        raise TypeError(f"prune must be a PruneSchedule, got {type(prune).__name__}")
    cuts = prune.cuts(steps=steps, layers=shape.layers, visual=visual) if prune is not None else ()
    left, rows = visual, []
    for cut in cuts:
        if cut.step < 0:
            left = cut.left
    for step in range(steps):
        row = [left] * shape.layers
        for cut in cuts:
            if cut.step == step and cut.layer is not None:
                row[cut.layer + 1 :] = [cut.left] * (shape.layers - cut.layer - 1)
            if cut.step == step and not cut.passing:
                left = cut.left
        rows.append([text + n + answer for n in row])
    return denoising_flops(shape, rows)
