"""Texts from Hugging Face models with a tokenizer: greedy, sampled, and as a teacher that explains its answers."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lossmith.errors import InputError

INSTRUCTION = (
    "Explain how to answer the question, then answer it. Use exactly this form:\n"
    "<Explanation>: the reasoning <Answer>: the answer alone"
)


@torch.no_grad()
def generate_texts(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    samples: int = 1,
    temperature: float | None = None,
    max_new_tokens: int = 64,
    max_length: int = 1024,
    batch_size: int = 64,
    seed: int | None = None,
    count: Callable[[int, int], None] | None = None,
) -> list[list[str]]:
    """Texts for each prompt: greedy, or drawn from the model's own distribution.

    Args:
        model: causal, or with encoder and decoder; run in evaluation mode, and put back to the mode that it was in.
        tokenizer: the model's.
        prompts: texts.
        samples: per prompt.
        temperature: of sampling, without cutting the distribution (no top-k, no top-p, whatever the model's own
            generation settings say); ``None``: greedy.
        max_new_tokens: longest text.
        max_length: longest prompt in tokens; longer ones lose their end (causal: their beginning).
        batch_size: prompts at a time.
        seed: of the draws; torch's global generator is left as it was. ``None`` draws from it.
        count: told the numbers of tokens read and written, for whoever counts the cost.

    Returns:
        For each prompt a list of ``samples`` texts, stripped, without special tokens; they may be empty.
    """
    if temperature is not None and not 0 < temperature < float("inf"):
        raise InputError(f"temperature must be a finite number > 0, got {temperature}")
    if samples > 1 and temperature is None:
        raise InputError("several samples of a prompt need a temperature: greedy texts are all the same")
    training, generate = model.training, _generate(model)
    device = next(model.parameters()).device
    is_causal = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    pad = int(tokenizer.pad_token_id or 0)
    how: dict[str, Any] = {"do_sample": False, "num_beams": 1}
    if temperature is not None:
        how = {"do_sample": True, "num_beams": 1, "temperature": float(temperature), "top_k": 0, "top_p": 1.0}
    texts: list[list[str]] = []
    model.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            for start in range(0, len(prompts), batch_size):
                part = prompts[start : start + batch_size]
                ids, mask = padded(encoded(tokenizer, part, max_length, is_causal=is_causal), pad, is_causal)
                written = generate(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    num_return_sequences=samples,
                    max_new_tokens=max_new_tokens,
                    pad_token_id=pad,
                    eos_token_id=tokenizer.eos_token_id,
                    **how,
                )
                written = written[:, ids.shape[1] :] if is_causal else written[:, 1:]
                if count is not None:
                    count(ids.numel(), written.numel())
                decoded = [t.strip() for t in tokenizer.batch_decode(written, skip_special_tokens=True)]
                texts += [decoded[i : i + samples] for i in range(0, len(decoded), samples)]
    finally:
        model.train(training)
    return texts


class ModelTeacher:
    """A local language model as a teacher that explains and answers.

    Args:
        model: causal, or with encoder and decoder.
        tokenizer: the model's; its chat template is used where it has one.
        instruction: what is asked for.
        examples: pairs of question and ``"<Explanation>: ... <Answer>: ..."`` to show first (few-shot).
        max_new_tokens: longest output.
        max_length: longest prompt.
        seed: of the draws; each question has its own, so that what it gets does not depend on what else was asked.

    >>> teacher = ModelTeacher(model, tokenizer)  # doctest: +SKIP
    >>> sample_rationales(teacher, ["2 + 2?"], samples=5, temperature=0.7, cache="samples.jsonl")  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        instruction: str = INSTRUCTION,
        examples: Sequence[tuple[str, str]] = (),
        max_new_tokens: int = 256,
        max_length: int = 2048,
        seed: int = 0,
    ):
        _generate(model)
        self.model, self.tokenizer, self.instruction, self.examples = model, tokenizer, instruction, tuple(examples)
        self.max_new_tokens, self.max_length, self.seed = max_new_tokens, max_length, seed

    def __call__(self, questions: Sequence[str], samples: int, temperature: float) -> list[list[str]]:
        """``samples`` outputs per question."""
        return [
            generate_texts(
                self.model,
                self.tokenizer,
                [self.prompt(question)],
                samples=samples,
                temperature=temperature,
                max_new_tokens=self.max_new_tokens,
                max_length=self.max_length,
                seed=zlib.crc32(f"{self.seed} {question}".encode()),
            )[0]
            for question in questions
        ]

    def prompt(self, question: str) -> str:
        """What the model reads."""
        if getattr(self.tokenizer, "chat_template", None):
            messages = []
            for asked, said in self.examples:
                messages += [self._turn(asked), {"role": "assistant", "content": said}]
            messages.append(self._turn(question))
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        shown = "".join(f"Question: {asked}\n{said}\n\n" for asked, said in self.examples)
        return f"{self.instruction}\n\n{shown}Question: {question}\n"

    def _turn(self, question: str) -> dict[str, str]:
        return {"role": "user", "content": f"{self.instruction}\n\nQuestion: {question}"}


def encoded(tokenizer: Any, texts: Sequence[str], max_length: int, *, is_causal: bool = False) -> list[list[int]]:
    """Token ids of each text; for an encoder with the end token last, for a causal model ready to be continued."""
    if not texts:
        return []
    rows: list[list[int]] = tokenizer(list(texts), verbose=False)["input_ids"]
    end = tokenizer.eos_token_id
    if is_causal:
        return [list(ids[-max_length:]) or [int(tokenizer.bos_token_id or end or 0)] for ids in rows]
    without_end = (ids[:-1] if ids and ids[-1] == end else ids for ids in rows)
    return [[*ids[: max_length - 1], int(end)] for ids in without_end]


def padded(rows: Sequence[Sequence[int]], filling: int, left: bool = False) -> tuple[Tensor, Tensor]:
    """Rows of one length, and the mask (1 and 0) of what is not filling.

    >>> padded([[5, 6], [7]], 0, left=True)
    (tensor([[5, 6],
            [0, 7]]), tensor([[1, 1],
            [0, 1]]))
    """
    longest = max(map(len, rows), default=0)
    # One tensor of all, not one per row: these rows are a batch's rationales, looked up in every step.
    filled = ([filling] * (longest - len(row)) for row in rows)
    whole = [[*rest, *row] if left else [*row, *rest] for rest, row in zip(filled, rows, strict=True)]
    there = torch.arange(longest) < torch.tensor([len(row) for row in rows], dtype=torch.long).unsqueeze(-1)
    ids = torch.tensor(whole, dtype=torch.long).reshape(len(rows), longest)
    return ids, (there.flip(-1) if left else there).long()


def _generate(model: nn.Module) -> Callable[..., Tensor]:
    generate: Any = getattr(model, "generate", None)
    if generate is None:
        raise InputError(f"{type(model).__name__} cannot generate text; give a Hugging Face model with generate()")
    return generate
