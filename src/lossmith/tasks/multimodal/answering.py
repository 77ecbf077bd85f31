"""Questions about images, answered by a model that unmasks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lossmith.data.image_questions import ImageQuestion
from lossmith.errors import InputError, did_you_mean
from lossmith.files import read_json, write_json
from lossmith.sparsity import Denoised, PruneSchedule, denoise_generate
from lossmith.tasks.multimodal.encoding import QuestionRows
from lossmith.tasks.multimodal.model import MultimodalDiffusionModel

if TYPE_CHECKING:
    from lossmith.probes import RedundancyReport

KINDS = ("scratch", "adapted")
_MOST_IN_MEMORY = 2**27


@dataclass(frozen=True, slots=True)
class AnswerScores:
    """Share of right tokens, share of answers that are right throughout, and what writing them cost per answer."""

    tokens: float
    exact: float
    questions: int
    flops: float
    seconds: float

    def summary(self) -> str:
        """One line."""
        return (
            f"{self.exact:.3f} of {self.questions} answers right, {self.tokens:.3f} of their tokens; "
            f"{self.flops:.3g} multiply-adds and {1e3 * self.seconds:.3g} ms per answer"
        )


class ImageAnswerer:
    """A system with ``fit``, ``predict``, ``evaluate``, ``redundancy``, ``save_pretrained`` and ``from_pretrained``.

    Args:
        kind: ``scratch``: masked diffusion from the first step (as LLaDA-V); ``adapted``: the same network is first
            trained to write from left to right, for ``autoregressive_share`` of the steps, and then to unmask
            (as Dream and LaViDa). A ``trunk`` with weights is autoregressive already.
        vision: folder or hub id of a vision encoder with weights (CLIP, SigLIP, ViT ...), or its configuration as a
            dictionary, for random weights; default: patches of 4 pixels.
        trunk: folder or hub id of a Llama-type language model with weights, whose tokenizer is used, or a
            configuration; default: a small one, with words as tokens.
        tokenizer: folder or hub id of another tokenizer than the trunk's, or for a configuration.
        steps: optimiser steps.
        batch_size: questions per step.
        learning_rate: of AdamW, with a cosine schedule.
        floor: smallest masking probability, see :class:`lossmith.training.MaskedDiffusion`.
        autoregressive_share: see ``kind``.
        stop: answers are filled up with end tokens to one length, a multiple of four, and the model writes those too
            (LLaDA's way: nobody has to know how long an answer is); ``False``: they are as long as is asked.
        max_prompt, max_answer: in tokens.
        seed: of weights, order and masks.
        width, layers: of the small trunk.
        patch_size: of the default vision encoder.
        image_size: to which it has image files scaled; tensors are taken as they are.
        **training: further ``transformers.TrainingArguments``.

    >>> from lossmith.data import shape_questions
    >>> questions = shape_questions(16)
    >>> answerer = ImageAnswerer(steps=2, width=16, layers=1).fit(questions)
    >>> len(answerer.predict(questions[:3]))
    3
    """

    def __init__(
        self,
        kind: Literal["scratch", "adapted"] = "scratch",
        *,
        vision: str | Path | Mapping[str, Any] | None = None,
        trunk: str | Path | Mapping[str, Any] | None = None,
        tokenizer: str | Path | None = None,
        steps: int = 1000,
        batch_size: int = 64,
        learning_rate: float = 2e-3,
        floor: float = 0.05,
        autoregressive_share: float = 0.5,
        stop: bool = True,
        max_prompt: int = 64,
        max_answer: int = 64,
        seed: int = 0,
        width: int = 64,
        layers: int = 3,
        patch_size: int = 4,
        image_size: int = 32,
        **training: Any,
    ):
        self.kind, self.vision, self.trunk, self.steps, self.batch_size = kind, vision, trunk, steps, batch_size
        self.learning_rate, self.floor, self.autoregressive_share = learning_rate, floor, autoregressive_share
        self.stop, self.max_prompt, self.max_answer, self.seed = stop, max_prompt, max_answer, seed
        self.width, self.layers, self.patch_size, self.training = width, layers, patch_size, training
        self.tokenizer, self.image_size = tokenizer, image_size

    # ---- verbs ------------------------------------------------------------------------------------------------------

    def fit(self, questions: Sequence[ImageQuestion]) -> ImageAnswerer:
        """Train on questions with answers."""
        from lossmith.tasks.multimodal.building import build_model, build_tokenizer
        from lossmith.tasks.text.encoder_training import train_encoder
        from lossmith.training import MaskedDiffusion, NextAnswerToken

        self._check(questions)
        torch.manual_seed(self.seed)
        self.tokenizer_ = build_tokenizer(self.tokenizer or self.trunk, questions)
        self.model_ = build_model(self, questions)
        rows = QuestionRows(questions, self)
        assert rows.labels is not None
        self.answer_length_ = rows.labels.shape[1]
        share = self.autoregressive_share if self.kind == "adapted" and not isinstance(self.trunk, str | Path) else 0.0
        first = round(share * self.steps)
        phases: list[tuple[Any, int]] = [
            (NextAnswerToken(), first),
            (MaskedDiffusion(floor=self.floor), self.steps - first),
        ]
        self.steps_ = 0
        for objective, steps in phases:
            if steps:
                self.steps_ += train_encoder(
                    self.model_,
                    range(len(questions)),
                    objective,
                    rows.batch,
                    epochs=1,
                    batch_size=self.batch_size,
                    learning_rate=self.learning_rate,
                    seed=self.seed,
                    **{"max_steps": steps, "lr_scheduler_type": "cosine", "weight_decay": 0.0, **self.training},
                )
        self.model_.eval()
        return self

    def predict(self, questions: Sequence[ImageQuestion], **options: Any) -> list[str]:
        """Answers as text; ``options`` of :meth:`denoise`."""
        length = options.pop("answer_length", getattr(self, "answer_length_", None))
        texts: list[str] = []
        for start in range(0, len(questions), self.batch_size):
            part = questions[start : start + self.batch_size]
            ids = self.denoise(part, answer_length=length, **options).ids
            texts += [self._text(row) for row in ids.tolist()]
        return texts

    def denoise(
        self,
        questions: Sequence[ImageQuestion],
        *,
        answer_length: int | None = None,
        steps: int | None = None,
        prune: PruneSchedule | str | Literal["default"] | None = "default",
        **options: Any,
    ) -> Denoised:
        """Answers of one batch as token ids, with their costs.

        Args:
            questions: what to answer; their own answers are not looked at.
            answer_length: tokens to write; default: the longest answer of the training questions.
            steps: forward passes; default: one per token.
            prune: which visual tokens are dropped; default: what the model was given by
                :func:`lossmith.sparsity.prune_visual_tokens`; ``None``: none.
            **options: of :func:`lossmith.sparsity.denoise_generate`.
        """
        self._check_fitted()
        if not questions:
            raise InputError("no questions to answer")
        model = self.model_
        length = answer_length if answer_length is not None else self.answer_length_
        device = next(model.parameters()).device
        rows = QuestionRows(questions, self, answered=False)
        batch = {k: v.to(device) for k, v in rows.batch(range(len(questions))).items()}
        with torch.no_grad():
            embeddings, visual, real = model.embed_prompt(batch)
        schedule = model.visual_pruning if prune == "default" else PruneSchedule.parse(prune)
        return denoise_generate(
            model,
            embeddings,
            visual,
            real=real,
            answer_length=length,
            steps=length if steps is None else steps,
            prune=schedule,
            stop_id=self.tokenizer_.eos_token_id if self.stop else None,
            **{"seed": self.seed, "forbidden": self._forbidden(), **options},
        )

    def evaluate(self, questions: Sequence[ImageQuestion], **options: Any) -> AnswerScores:
        """Compare with the answers; ``options`` of :meth:`denoise`."""
        right, counted, exact, flops, seconds = 0, 0, 0, 0.0, 0.0
        for group in self.groups(questions):
            found = self.denoise(group.questions, **{"answer_length": group.length, **options})
            hits = group.hits(found.ids)
            right, counted = right + int(hits.sum()), counted + int(group.counted.sum())
            exact += int((hits | ~group.counted).all(1).sum())
            flops, seconds = flops + found.flops * len(group.questions), seconds + found.seconds
        number = len(questions)
        return AnswerScores(right / max(1, counted), exact / number, number, flops / number, seconds / number)

    def redundancy(self, questions: Sequence[ImageQuestion], **options: Any) -> RedundancyReport:
        """How many visual tokens these questions need: see :func:`lossmith.probes.visual_redundancy`.

        Divergences are left out where the full model's distributions would take more than half a gigabyte.
        """
        from lossmith.probes import visual_redundancy

        groups = self.groups(questions)
        # The full model's distributions of every step are kept, to compare with.
        numbers = sum(g.answers.numel() * g.length for g in groups) * self.model_.lm_head.out_features
        kept = numbers <= _MOST_IN_MEMORY

        def denoise(group: AnswerGroup, schedule: PruneSchedule | None) -> Denoised:
            return self.denoise(
                group.questions, answer_length=group.length, prune=schedule, keep_log_probabilities=kept
            )

        return visual_redundancy(
            denoise, groups, layers=self.model_.shape.layers, visual=self.model_.vision.tokens, **options
        )

    def time_ratio(self, schedule: PruneSchedule, *, repeats: int = 5) -> float:
        """Time of the longest answer about one image under ``schedule`` over that without: median of pairs.

        Encoder and embedding count; images are noise, and the end token is forbidden, so that both write all tokens.
        """
        self._check_fitted()
        vision, end = self.model_.vision, self.tokenizer_.eos_token_id
        noise = torch.rand(vision.channels, vision.size, vision.size, generator=torch.Generator().manual_seed(0))
        question = [ImageQuestion(noise, "")]
        forbidden = tuple({*self._forbidden(), end})
        ratios = []
        for _ in range(repeats + 1):
            seconds = []
            for chosen in (schedule, None):
                started = time.perf_counter()
                self.denoise(question, prune=chosen, forbidden=forbidden)
                seconds.append(time.perf_counter() - started)
            ratios.append(seconds[0] / seconds[1])
        # The first pair warms up.
        return statistics.median(ratios[1:])

    def groups(self, questions: Sequence[ImageQuestion]) -> list[AnswerGroup]:
        """Batches of questions whose answers have one length."""
        self._check_fitted()
        if not questions:
            raise InputError("no questions to answer")
        rows = QuestionRows(questions, self, self.answer_length_)
        assert rows.labels is not None
        by_length: dict[int, list[int]] = {}
        for number, length in enumerate((rows.labels != -100).sum(1).tolist()):
            by_length.setdefault(length, []).append(number)
        found = []
        for length, numbers in sorted(by_length.items()):
            for start in range(0, len(numbers), self.batch_size):
                part = numbers[start : start + self.batch_size]
                found.append(
                    AnswerGroup(
                        tuple(questions[i] for i in part), rows.labels[part, :length], rows.counted[part, :length]
                    )
                )
        return found

    def save_pretrained(self, folder: str | Path) -> None:
        """Weights, configurations and tokenizer."""
        self._check_fitted()
        self.model_.save_pretrained(folder)
        self.tokenizer_.save_pretrained(Path(folder) / "tokenizer")
        names = ("kind", "stop", "max_prompt", "max_answer", "batch_size", "seed")
        kept = {name: getattr(self, name) for name in names}
        write_json(Path(folder) / "image_answerer.json", {**kept, "answer_length": self.answer_length_})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ImageAnswerer:
        """A trained system, from a folder."""
        from lossmith.data import load_tokenizer

        kept = Path(folder) / "image_answerer.json"
        if not kept.is_file():
            raise InputError(f"{folder} holds no image answerer (image_answerer.json)")
        values = read_json(kept)
        length = values.pop("answer_length")
        answerer = cls(**values)
        answerer.answer_length_ = length
        answerer.model_ = MultimodalDiffusionModel.from_pretrained(folder)
        answerer.tokenizer_ = load_tokenizer(Path(folder) / "tokenizer")
        return answerer

    # ---- parts ------------------------------------------------------------------------------------------------------

    answer_length_: int
    model_: MultimodalDiffusionModel
    tokenizer_: Any

    def _check(self, questions: Sequence[ImageQuestion]) -> None:
        if not questions:
            raise InputError("no questions to train on")
        if self.kind not in KINDS:
            raise InputError(f"unknown kind '{self.kind}': {did_you_mean(self.kind, KINDS)}")
        if self.steps < 1 or self.batch_size < 1 or not self.learning_rate > 0:
            raise InputError(
                f"steps and batch_size must be at least 1 and learning_rate > 0, got {self.steps}, {self.batch_size} "
                f"and {self.learning_rate}"
            )
        if not 0 <= self.autoregressive_share < 1:
            raise InputError(f"autoregressive_share must be in [0, 1), got {self.autoregressive_share}")

    def _check_fitted(self) -> None:
        if not hasattr(self, "model_"):
            raise InputError("this system has not been trained; call fit, or ImageAnswerer.from_pretrained(folder)")

    def _forbidden(self) -> tuple[int, ...]:
        """Ids that are no part of an answer: special ones, but the end where answers have one."""
        end = {self.tokenizer_.eos_token_id} if self.stop else set()
        return tuple(sorted(set(self.tokenizer_.all_special_ids) - end))

    def _text(self, ids: Sequence[int]) -> str:
        end = self.tokenizer_.eos_token_id
        if self.stop and end in ids:
            ids = ids[: list(ids).index(end)]
        return str(self.tokenizer_.decode(ids, skip_special_tokens=True)).strip()


@dataclass(frozen=True, slots=True)
class AnswerGroup:
    """Questions whose answers have one length, the answers' ids, and which of them count (not what only fills up)."""

    questions: tuple[ImageQuestion, ...]
    answers: Tensor
    counted: Tensor

    @property
    def length(self) -> int:
        """Tokens of each answer."""
        return int(self.answers.shape[1])

    def hits(self, ids: Tensor) -> Tensor:
        """Which tokens are right; what does not count is not."""
        return (ids[:, : self.length].cpu() == self.answers) & self.counted
