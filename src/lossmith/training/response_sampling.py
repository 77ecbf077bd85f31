"""Sampling from causal language models, and scoring what was sampled, on ragged batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lossmith.errors import InputError
from lossmith.training.objectives import IGNORE_INDEX, accepted_inputs, output_logits

Rows = Sequence[Sequence[int]]


@torch.no_grad()
def sample_responses(
    model: nn.Module,
    prompts: Rows,
    *,
    max_new_tokens: int | Sequence[int] = 128,
    temperature: float = 1.0,
    top_p: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """What a causal language model goes on to write after each prompt.

    Args:
        model: a Hugging Face model with ``generate``. It is run in evaluation mode and put back. Its own
            ``generation_config`` (penalties, ``top_k``, ...) has no say: samples are those of the model itself.
        prompts: token ids of each example, at least one each, without padding.
        max_new_tokens: longest response, for all or for each.
        temperature: of sampling; 0 always takes the likeliest token.
        top_p: sample from the likeliest tokens that hold this much probability.
        eos_token_id: what ends a response (it is its last token); default the model's.
        pad_token_id: fills shorter prompts, on the left, unseen by the model; default the model's.
        generator: of the samples; default torch's global one.

    Returns:
        The response of each prompt, without prompt and padding.

    Raises:
        InputError: a model that does not generate, an empty prompt, options out of range.
    """
    check_sampling(temperature=temperature, top_p=top_p)
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"prompt {i} has no token; begin it with the tokenizer's beginning or end token")
    most = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if len(most) != len(prompts) or any(n < 0 for n in most):
        raise InputError(f"max_new_tokens must be a number >= 0, or one per prompt ({len(prompts)}), got {most}")
    responses: list[list[int]] = [[] for _ in prompts]
    # Rows that have room for nothing are left out: their number changes no other row's samples but in their order.
    chosen = [i for i, n in enumerate(most) if n > 0]
    if not chosen:
        return responses
    ends = end_tokens(model, eos_token_id)
    width = max(len(prompts[i]) for i in chosen)
    device = next(model.parameters()).device if next(model.parameters(), None) is not None else torch.device("cpu")
    pad = _pad_token(model, pad_token_id, ends)
    ids = torch.full((len(chosen), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, i in enumerate(chosen):
        ids[row, width - len(prompts[i]) :] = torch.as_tensor(prompts[i], dtype=torch.long)
        mask[row, width - len(prompts[i]) :] = 1
    options: dict[str, Any] = {
        "max_new_tokens": max(most),
        "do_sample": temperature > 0,
        "eos_token_id": list(ends) or None,
        "pad_token_id": pad,
        "use_cache": True,
    }
    if temperature > 0:
        options |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
    with evaluating(model), _own_samples(model), seeded(generator, device):
        generated: Tensor = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), **options)  # type: ignore[operator]
    for i, row in zip(chosen, generated[:, width:].tolist(), strict=True):
        end = next((k + 1 for k, token in enumerate(row) if token in ends), len(row))
        responses[i] = row[: min(end, most[i])]
    return responses


@torch.no_grad()
def response_logits(
    model: nn.Module, prompts: Rows, responses: Rows, *, pad_token_id: int = 0
) -> Float[Tensor, "examples length classes"]:
    """Logits from which each response token was, or would have been, drawn; zeros after a response's end.

    One pass in evaluation mode, padded on the right, where a causal model does not look.
    """
    device = next(model.parameters()).device if next(model.parameters(), None) is not None else torch.device("cpu")
    batch = response_batch(prompts, responses, pad_token_id=pad_token_id)
    with evaluating(model):
        inputs = accepted_inputs(model, {k: v.to(device) for k, v in batch.items()})
        logits = output_logits(model(**inputs))
    longest = max((len(r) for r in responses), default=0)
    found = logits.new_zeros(len(prompts), longest, logits.shape[-1])
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        # The distribution of a token stands one position before it.
        found[i, : len(response)] = logits[i, len(prompt) - 1 : len(prompt) - 1 + len(response)]
    return found


def response_batch(prompts: Rows, responses: Rows, *, pad_token_id: int = 0) -> dict[str, Int[Tensor, "rows length"]]:
    """``input_ids`` (padded on the right), ``labels`` (-100 but in responses) and ``attention_mask``."""
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    shape = (len(prompts), max(lengths, default=0))
    ids = torch.full(shape, pad_token_id, dtype=torch.long)
    labels, mask = torch.full(shape, IGNORE_INDEX, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids[i, : lengths[i]] = torch.tensor([*prompt, *response], dtype=torch.long)
        labels[i, len(prompt) : lengths[i]] = torch.tensor(list(response), dtype=torch.long)
        mask[i, : lengths[i]] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def end_tokens(model: nn.Module, eos_token_id: int | Sequence[int] | None) -> frozenset[int]:
    """The tokens that end a response: those given, else the model's."""
    if eos_token_id is None:
        for place in ("generation_config", "config"):
            eos_token_id = getattr(getattr(model, place, None), "eos_token_id", None)
            if eos_token_id is not None:
                break
    if eos_token_id is None:
        return frozenset()
    return frozenset([eos_token_id] if isinstance(eos_token_id, int) else map(int, eos_token_id))


def check_sampling(*, temperature: float, top_p: float) -> None:
    """Refuse options of sampling that are out of range."""
    if not 0 <= temperature < float("inf"):
        raise InputError(f"temperature must be a finite number >= 0, got {temperature}")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p must be in (0, 1], got {top_p}")


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Within it the models are in evaluation mode; afterwards every part is in the mode it was in."""
    were = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in were:
            module.training = training


@contextmanager
def seeded(generator: torch.Generator | None, device: torch.device | str = "cpu") -> Iterator[None]:
    """Within it torch's global generators follow ``generator``; ``None``: they are used as they are."""
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    cuda = torch.device(device).type == "cuda"
    with torch.random.fork_rng([torch.device(device)] if cuda else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def _own_samples(model: nn.Module) -> Iterator[None]:
    """Within it the model's own generation settings do not fill in what is not given."""
    if not callable(getattr(model, "generate", None)):
        raise InputError(f"{type(model).__name__} cannot generate text; give a causal language model of transformers")
    own: Any = getattr(model, "generation_config", None)
    if own is None:
        yield
        return
    model.generation_config = type(own)()
    try:
        yield
    finally:
        model.generation_config = own


def _pad_token(model: nn.Module, pad_token_id: int | None, ends: frozenset[int]) -> int:
    """Any token will do: it is masked where it fills, and cut off after the end."""
    if pad_token_id is not None:
        return pad_token_id
    own = getattr(getattr(model, "config", None), "pad_token_id", None)
    return int(own) if isinstance(own, int) and own >= 0 else min(ends, default=0)
