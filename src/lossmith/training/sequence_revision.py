"""Sequence correction and re-generation: the teacher mends one token of what the student wrote, the student goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lossmith.errors import InputError
from lossmith.losses import distillation_kl
from lossmith.training.response_sampling import (
    Rows,
    check_sampling,
    end_tokens,
    response_batch,
    response_logits,
    sample_responses,
    seeded,
)

TeacherToken = Literal["sample", "argmax"]
Position = Literal["largest", "random"]

# 512 MiB in float32.
_LOGITS_AT_ONCE = 2**27


@dataclass(frozen=True, slots=True)
class Revision:
    """What :func:`correct_and_regenerate` made.

    Attributes:
        sequences: prompts and revised responses, padded on the right.
        labels: the response tokens at their places in ``sequences``, -100 elsewhere.
        attention_mask: 1 where ``sequences`` is not padding.
        responses: revised responses.
        drafts: what the student wrote at first.
        error_positions: the place of the corrected token in the response, by round; -1 where there was none.
        student_positions: tokens that the student read or wrote without gradient, and
        teacher_positions: those that the teacher read: for counting costs.
    """

    sequences: Int[Tensor, "examples length"]
    labels: Int[Tensor, "examples length"]
    attention_mask: Int[Tensor, "examples length"]
    responses: list[list[int]]
    drafts: list[list[int]]
    error_positions: Int[Tensor, "examples rounds"]
    student_positions: int
    teacher_positions: int


def find_error_positions(
    student_logits: Float[Tensor, "examples length classes"],
    teacher_logits: Float[Tensor, "examples length classes"],
    tokens: Int[Tensor, "examples length"],
    teacher_tokens: Int[Tensor, "examples length"],
    mask: Bool[Tensor, "examples length"] | None = None,
    *,
    position: Position = "largest",
) -> Int[Tensor, " examples"]:
    r"""Where student and teacher disagree most, among the places where they chose different tokens; -1: nowhere.

    .. math:: j = \arg\max_{i:\ y^s_i \ne y^t_i} \mathrm{KL}(p_i \,\|\, q_i)

    Args:
        student_logits: ``q_i``, the distribution of token ``i`` given what the student wrote before it.
        teacher_logits: ``p_i``, given the same.
        tokens: ``y^s``, what the student wrote.
        teacher_tokens: ``y^t_i``, the teacher's choice in the student's place.
        mask: false at padding and after the end.
        position: ``"random"``: any place where they chose differently, for comparison.

    Source: Eq. 3 of arXiv 2407.10068, as described by others; the direction of the divergence is a choice.

    >>> p = torch.tensor([[[0.5, 0.5], [0.9, 0.1]]]).log()
    >>> q = torch.tensor([[[0.5, 0.5], [0.1, 0.9]]]).log()
    >>> find_error_positions(q, p, torch.tensor([[0, 1]]), torch.tensor([[1, 0]]))
    tensor([1])
    """
    if position not in get_args(Position):
        raise ValueError(f"position must be largest or random, got '{position}'")
    for name, value in (("tokens", tokens), ("teacher_tokens", teacher_tokens), ("mask", mask)):
        if value is not None and value.shape != student_logits.shape[:-1]:
            raise ValueError(f"{name} must have the shape {tuple(student_logits.shape[:-1])}, got {tuple(value.shape)}")
    differ = tokens != teacher_tokens
    if mask is not None:
        differ = differ & mask
    if not differ.numel():
        return torch.full(differ.shape[:1], -1, device=differ.device)
    size = distillation_kl(student_logits, teacher_logits)
    if position == "random":
        size = torch.rand_like(size)
    best = size.masked_fill(~differ, -torch.inf).argmax(-1)
    return torch.where(differ.any(-1), best, -1)


@torch.no_grad()
def correct_and_regenerate(
    student: nn.Module,
    teacher: nn.Module,
    input_ids: Int[Tensor, "examples length"] | Rows,
    attention_mask: Int[Tensor, "examples length"] | None = None,
    *,
    responses: Rows | None = None,
    max_new_tokens: int = 128,
    rounds: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    teacher_token: TeacherToken = "sample",
    position: Position = "largest",
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    generator: torch.Generator | None = None,
) -> Revision:
    """The student answers, the teacher mends the worst token, the student goes on from there (SCRG).

    1. The student samples a response. 2. One pass of each model over it gives both distributions at every place, the
    teacher's given what the *student* wrote; the teacher draws a token at every place. 3. Among the places where the
    tokens differ, that of the largest ``KL(teacher || student)`` is corrected (:func:`find_error_positions`).
    4. Everything before it stays, and the student writes what comes after. Only one token is the teacher's.

    Args:
        student: a Hugging Face causal model that generates. Both models are run in evaluation mode, without a graph,
            and put back into the mode they were in.
        teacher: of the same vocabulary.
        input_ids: prompts: padded on either side, with ``attention_mask``, or lists without padding.
        attention_mask: 0 at padding; default all ones.
        responses: drafts of the student that are there already.
        max_new_tokens: longest response.
        rounds: how many times steps 2 to 4 are done; 0: only the draft. The paper uses 1.
        temperature: of the student's samples.
        top_p: of the student's samples.
        teacher_token: ``"sample"`` from the teacher, as published, or ``"argmax"``.
        position: ``"random"``: correct a random one of those places instead, for comparison.
        eos_token_id: default the student's. A correction to it ends the response.
        pad_token_id: default the student's.
        generator: of all random choices; default torch's global one.

    Returns:
        A :class:`Revision`; a response with no place of different tokens is kept as it is.

    Raises:
        InputError: different vocabularies, empty prompts, options out of range.

    Source: Eq. 3 and 4 of "Multi-Granularity Semantic Revision for Large Language Model Distillation", 2024,
    arXiv 2407.10068, as described by others.

    >>> from lossmith.training.models import build_model
    >>> student, teacher = (build_model("nano", vocab_size=20, sequence_length=32) for _ in range(2))
    >>> out = correct_and_regenerate(student, teacher, [[1, 2], [3]], max_new_tokens=4, pad_token_id=0)
    >>> out.error_positions.shape, out.sequences.shape[0]
    (torch.Size([2, 1]), 2)
    """
    if rounds < 0 or max_new_tokens < 1:
        raise InputError(f"rounds must be >= 0 and max_new_tokens >= 1, got {rounds} and {max_new_tokens}")
    if teacher_token not in get_args(TeacherToken):
        raise InputError(f"teacher_token must be sample or argmax, got '{teacher_token}'")
    if position not in get_args(Position):
        raise InputError(f"position must be largest or random, got '{position}'")
    check_sampling(temperature=temperature, top_p=top_p)
    prompts = _unpadded(input_ids, attention_mask)
    ends = end_tokens(student, eos_token_id)
    sampling = {"temperature": temperature, "top_p": top_p, "eos_token_id": sorted(ends), "pad_token_id": pad_token_id}
    cost = [0, 0]
    with seeded(generator, _device(student)):
        if responses is None:
            drafts = sample_responses(student, prompts, max_new_tokens=max_new_tokens, **sampling)  # type: ignore[arg-type]
            cost[0] += _tokens(prompts, drafts)
        else:
            if len(responses) != len(prompts):
                raise InputError(f"responses must be one per prompt ({len(prompts)}), got {len(responses)}")
            drafts = [list(map(int, r))[:max_new_tokens] for r in responses]
        current, places = drafts, []
        for _ in range(rounds):
            found, corrections = _errors(student, teacher, prompts, current, teacher_token, position)
            cost[0] += _tokens(prompts, current)
            cost[1] += _tokens(prompts, current)
            kept = [r if j < 0 else [*r[:j], token] for r, j, token in zip(current, found, corrections, strict=True)]
            room = [0 if j < 0 or r[-1] in ends else max_new_tokens - len(r) for r, j in zip(kept, found, strict=True)]
            begun = [[*p, *r] for p, r in zip(prompts, kept, strict=True)]
            rest = sample_responses(student, begun, max_new_tokens=room, **sampling)  # type: ignore[arg-type]
            cost[0] += sum(len(b) + len(r) for b, r, n in zip(begun, rest, room, strict=True) if n > 0)
            current = [[*r, *more] for r, more in zip(kept, rest, strict=True)]
            places.append(found)
    batch = response_batch(prompts, current, pad_token_id=pad_token_id or 0)
    positions = torch.tensor(places, dtype=torch.long).reshape(rounds, len(prompts)).T
    return Revision(
        sequences=batch["input_ids"],
        labels=batch["labels"],
        attention_mask=batch["attention_mask"],
        responses=current,
        drafts=drafts,
        error_positions=positions,
        student_positions=cost[0],
        teacher_positions=cost[1],
    )


def _errors(
    student: nn.Module, teacher: nn.Module, prompts: Rows, responses: Rows, teacher_token: str, position: Position
) -> tuple[list[int], list[int]]:
    """Places of the tokens to correct (-1: none), and the teacher's tokens there; some examples at a time."""
    longest = max((len(p) + len(r) for p, r in zip(prompts, responses, strict=True)), default=0)
    classes = getattr(getattr(student, "config", None), "vocab_size", None) or 1
    several = max(1, _LOGITS_AT_ONCE // max(1, longest * classes))
    found, corrections = [], []
    for first in range(0, len(prompts), several):
        part = slice(first, first + several)
        places, tokens = _errors_of_some(student, teacher, prompts[part], responses[part], teacher_token, position)
        found += places
        corrections += tokens
    return found, corrections


def _errors_of_some(
    student: nn.Module, teacher: nn.Module, prompts: Rows, responses: Rows, teacher_token: str, position: Position
) -> tuple[list[int], list[int]]:
    if not any(len(r) for r in responses):
        return [-1] * len(prompts), [-1] * len(prompts)
    ours = response_logits(student, prompts, responses)
    theirs = response_logits(teacher, prompts, responses).to(ours.device)
    if ours.shape[-1] != theirs.shape[-1]:
        raise InputError(
            f"the student's vocabulary has {ours.shape[-1]} tokens and the teacher's {theirs.shape[-1]}: correction by "
            "token needs one vocabulary"
        )
    tokens = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(list(r), dtype=torch.long) for r in responses], batch_first=True, padding_value=-1
    ).to(ours.device)
    p = theirs.float().softmax(-1)
    drawn = p.argmax(-1) if teacher_token == "argmax" else torch.multinomial(p.flatten(0, 1), 1).reshape(tokens.shape)
    found = find_error_positions(ours, theirs, tokens, drawn, tokens >= 0, position=position)
    corrections = drawn.gather(1, found.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return found.tolist(), corrections.tolist()


def _unpadded(input_ids: Tensor | Rows, attention_mask: Tensor | None) -> list[list[int]]:
    if not isinstance(input_ids, Tensor):
        return [[int(token) for token in row] for row in input_ids]
    if input_ids.ndim != 2:
        raise InputError(f"input_ids must have the shape (examples, length), got {tuple(input_ids.shape)}")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask.shape != input_ids.shape:
        raise InputError(f"attention_mask must have the shape {tuple(input_ids.shape)}, got {tuple(mask.shape)}")
    return [row[keep != 0].tolist() for row, keep in zip(input_ids, mask, strict=True)]


def _tokens(prompts: Rows, responses: Rows) -> int:
    return sum(map(len, prompts)) + sum(map(len, responses))


def _device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
