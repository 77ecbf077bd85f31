"""Questions about images as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lossmith.data.image_questions import ImageQuestion
from lossmith.errors import InputError

if TYPE_CHECKING:
    from lossmith.tasks.multimodal.answering import ImageAnswerer


class QuestionRows:
    """Questions as tensors; prompts are filled up on the left, so that each answer follows its prompt.

    Args:
        questions: with answers, unless not ``answered``.
        system: whose tokenizer, sizes and lengths count.
        length: at least so many tokens has an answer with an end.
        answered: whether the answers are wanted.

    Raises:
        InputError: a question without an answer, where answers are wanted.
    """

    def __init__(
        self, questions: Sequence[ImageQuestion], system: ImageAnswerer, length: int = 0, *, answered: bool = True
    ):
        self.questions, self.size = questions, system.model_.vision.size
        self.channels = system.model_.vision.channels
        tokenizer = system.tokenizer_
        ids = [row[-system.max_prompt :] for row in _encode(tokenizer, [q.prompt for q in questions])]
        # An empty prompt still has a token, from which a shifted model reads.
        pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
        ids = [row or [end] for row in ids]
        widest = max(map(len, ids))
        self.prompts = torch.tensor([[pad] * (widest - len(row)) + row for row in ids])
        self.real = torch.tensor([[0] * (widest - len(row)) + [1] * len(row) for row in ids])
        self.labels: Tensor | None = None
        if answered:
            self._encode_answers(system, length)

    def _encode_answers(self, system: ImageAnswerer, length: int) -> None:
        tokenizer = system.tokenizer_
        texts = [q.completion for q in self.questions]
        answers = [row[: system.max_answer] for row in _encode(tokenizer, texts)]
        for number, row in enumerate(answers):
            if not row:
                asked = self.questions[number].prompt
                raise InputError(f"question {number + 1} ('{asked}') has no answer to learn or to judge by")
        longest = max(map(len, answers))
        if system.stop:
            # With the end; a multiple of four, so that quarters of the steps are steps.
            longest = max(-4 * (-(longest + 1) // 4), length)
        fill = tokenizer.eos_token_id if system.stop else -100
        self.labels = torch.tensor([row + [fill] * (longest - len(row)) for row in answers])
        lengths = torch.tensor([len(row) + system.stop for row in answers]).unsqueeze(1)
        #: Which tokens are judged: the answer, and its end where it has one.
        self.counted = torch.arange(longest) < lengths

    def batch(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """What the model and its objectives take of the questions with these numbers."""
        rows = list(numbers)
        batch = {
            "pixel_values": pixels_of([self.questions[i].image for i in rows], self.size, self.channels),
            "input_ids": self.prompts[rows],
            "attention_mask": self.real[rows],
        }
        return batch if self.labels is None else {**batch, "labels": self.labels[rows]}


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    ids = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    return [list(row) for row in ids]


def pixels_of(images: Sequence[Path | Tensor], size: int, channels: int) -> Tensor:
    """Pixels in [0, 1] of one size and number of channels; files are scaled, tensors must fit."""
    from lossmith.data.images import PixelsOnDisk

    files = [image for image in images if isinstance(image, Path)]
    read = iter(PixelsOnDisk(files, size)[range(len(files))] if files else ())
    found = []
    for image in images:
        pixels = image if isinstance(image, Tensor) else next(read)
        if pixels.ndim != 3 or pixels.shape[1:] != (size, size):
            raise InputError(f"images must be of {size} x {size} pixels, got {tuple(pixels.shape)}")
        if pixels.shape[0] != channels:
            if {pixels.shape[0], channels} != {1, 3}:
                raise InputError(f"images must have {channels} channels, got {pixels.shape[0]}")
            pixels = pixels.mean(0, keepdim=True) if channels == 1 else pixels.expand(3, -1, -1)
        found.append(pixels.float())
    return torch.stack(found)
