"""What the denoising loop needs of a model, and what it returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Bool, Float, Int
from torch import Tensor

from lossmith.sparsity.visual_tokens_cost import TransformerShape
from lossmith.sparsity.visual_tokens_scores import AttentionLogits

#: Called in each layer between attention and feed-forward part with the layer's number, the hidden states and a
#: function that gives attention logits; returns the indices ``(batch, left)`` of the tokens that go on, or ``None``.
AfterAttention = Callable[[int, Tensor, AttentionLogits | None], Tensor | None]


class Denoiser(Protocol):
    """What :func:`denoise_generate` needs of a model: any callable from embeddings to hidden states and logits.

    A model that predicts each token from the place before it says so with ``shifted = True``.
    """

    @property
    def shape(self) -> TransformerShape:
        """What a forward pass costs."""
        ...

    @property
    def mask_token_id(self) -> int:
        """Token that stands for what is not written yet."""
        ...

    def embed(self, ids: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length width"]:
        """Embeddings of token ids, the mask's among them."""
        ...

    def denoise(
        self,
        embeddings: Float[Tensor, "batch tokens width"],
        positions: Int[Tensor, "batch tokens"],
        real: Bool[Tensor, "batch tokens"] | None,
        answer_length: int,
        after_attention: AfterAttention | None,
    ) -> tuple[Float[Tensor, "batch left width"], Float[Tensor, "batch answer classes"]]:
        """All tokens see each other. Final hidden states, and logits of the last ``answer_length`` tokens."""
        ...


@dataclass(frozen=True, slots=True)
class DenoisingStep:
    """One forward pass of the loop: visual tokens that entered it, mean confidence and number of tokens committed.

    ``log_probabilities`` (batch, answer, classes) are kept where asked for.
    """

    visual: int
    confidence: float
    committed: int
    log_probabilities: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Denoised:
    """Answers, and what they cost.

    Attributes:
        ids: of the answers.
        committed_at: step at which each token was committed; -1: never, after a stop.
        kept_indices: which of the visual tokens were there at the end.
        flops: multiply-adds per example, as :func:`denoising_flops` counts them, and the passes that only score tokens.
        seconds: of the loop.
        trace: by step; shorter than ``steps`` where all answers stopped.
        steps: that were asked for.
    """

    ids: Int[Tensor, "batch answer"]
    committed_at: Int[Tensor, "batch answer"]
    kept_indices: Int[Tensor, "batch kept"]
    flops: float
    seconds: float
    trace: tuple[DenoisingStep, ...]
    steps: int
