"""Denoising an answer beside an image, while visual tokens are dropped."""

from __future__ import annotations

import time
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lossmith.errors import did_you_mean
from lossmith.sparsity.visual_tokens_denoiser import Denoised, Denoiser, DenoisingStep
from lossmith.sparsity.visual_tokens_loop import Confidence, PrunedSequence
from lossmith.sparsity.visual_tokens_schedule import PruneSchedule

Remasking = Literal["low_confidence", "margin", "entropy", "random"]


def transfer_counts(masked: int, steps: int) -> list[int]:
    """How many tokens to commit in each of ``steps`` steps: equal numbers, the first ones take the rest.

    >>> transfer_counts(10, 4)
    [3, 3, 2, 2]
    """
    if steps < 1 or masked < 0:
        raise ValueError(f"steps must be at least 1 and masked at least 0, got {steps} and {masked}")
    return [masked // steps + (i < masked % steps) for i in range(steps)]


@torch.no_grad()
def denoise_generate(
    model: Denoiser,
    embeddings: Float[Tensor, "batch prompt width"],
    visual: slice,
    *,
    answer_length: int,
    steps: int,
    block_length: int | None = None,
    prune: PruneSchedule | None = None,
    real: Bool[Tensor, "batch prompt"] | None = None,
    temperature: float = 0.0,
    remasking: Remasking = "low_confidence",
    guidance: float = 0.0,
    forbidden: tuple[int, ...] = (),
    stop_id: int | None = None,
    seed: int | None = None,
    keep_log_probabilities: bool = False,
) -> Denoised:
    """Answer by unmasking, LLaDA's way: each step sees everything and commits the tokens that it is surest of.

    Args:
        model: a :class:`Denoiser`.
        embeddings: of the prompt, with the image's tokens among them.
        visual: where those are, ``slice(start, end)``; the same for all examples.
        answer_length: ``L``, tokens to write.
        steps: ``S``, forward passes; fewer than ``L`` commit several tokens at once.
        block_length: blocks are written from left to right, each in its share of the steps; default: one block.
        prune: what is dropped, when.
        real: false where a prompt is only filled; visual tokens must all be real.
        temperature: 0: the likeliest token; else Gumbel noise, in float64.
        remasking: which tokens are committed: those of the highest probability (``low_confidence``: the others are
            masked again), the largest ``margin`` between the first two, the lowest ``entropy``, or any (``random``).
        guidance: classifier-free guidance: ``u + (guidance + 1) (c - u)`` with the prompt masked in ``u``; costs twice.
        forbidden: ids that are never written; the mask's is always forbidden.
        stop_id: an answer is finished where it has this id and no mask before it; when all are, the loop ends.
        seed: of all random choices.
        keep_log_probabilities: in the trace.

    Raises:
        ValueError: numbers that do not divide, an empty image, images of different numbers of tokens, a schedule that
            never fires, attention scores of a model that gives none.

    Source: "Large Language Diffusion Models", 2025, arXiv 2502.09992 (the loop); "A Comprehensive Study on Visual Token
    Redundancy for Discrete Diffusion-based Multimodal Large Language Models", 2025, arXiv 2511.15098 (dropping tokens).
    """
    run = PrunedSequence(model, embeddings, visual, answer_length, steps, block_length, prune, real, temperature, seed)
    if remasking not in _CONFIDENCE:
        raise ValueError(f"unknown remasking '{remasking}': {did_you_mean(remasking, _CONFIDENCE)}")
    if guidance < 0:
        raise ValueError(f"guidance must be at least 0, got {guidance}")
    started = time.perf_counter()
    if guidance:
        run.add_unconditional()
    trace = []
    run.cut_input()
    for block in range(run.blocks):
        end = (block + 1) * run.block_length
        masked = (run.ids[:, block * run.block_length : end] == model.mask_token_id).sum(1)
        # A block is untouched when it begins: the same number in all rows.
        for number in transfer_counts(int(masked.max()), steps // run.blocks):
            logits = run.forward(guidance)
            logits[..., [*forbidden, model.mask_token_id]] = -torch.inf
            step = run.commit(logits, number, end, _CONFIDENCE[remasking])
            if keep_log_probabilities:
                step = DenoisingStep(step.visual, step.confidence, step.committed, torch.log_softmax(logits, -1))
            trace.append(step)
            run.cut_after_step(logits)
            if stop_id is not None and run.finished(stop_id):
                return run.result(trace, started)
    return run.result(trace, started)


def _probability(p: Tensor, chosen: Tensor, _: torch.Generator) -> Tensor:
    return p.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)


def _margin(p: Tensor, _: Tensor, __: torch.Generator) -> Tensor:
    first, second = p.topk(min(2, p.shape[-1]), dim=-1).values[..., [0, -1]].unbind(-1)
    return first - second


def _entropy(p: Tensor, _: Tensor, __: torch.Generator) -> Tensor:
    return torch.special.xlogy(p, p).sum(-1)


def _chance(p: Tensor, _: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(p.shape[:-1], generator=generator, dtype=p.dtype).to(p.device)


_CONFIDENCE: dict[str, Confidence] = {
    "low_confidence": _probability,
    "margin": _margin,
    "entropy": _entropy,
    "random": _chance,
}
