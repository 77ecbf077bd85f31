"""Distillation: a student learns from a frozen teacher, through any loss between their logits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lossmith.errors import InputError
from lossmith.heads.distillation import TeacherLayer, TeacherLogits, against_teacher, check_streamable
from lossmith.registry import DISTILLATION_LOSSES, Spec
from lossmith.training.objectives import (
    IGNORE_INDEX,
    Batch,
    Classification,
    ExampleEvaluation,
    LossFunction,
    NextToken,
    accepted_inputs,
    bind_loss,
    output_logits,
    shifted,
    unwrapped,
)
from lossmith.training.teacher_cache import TeacherCache, content_key

Task = Literal["auto", "next_token", "classification"]


class Distillation:
    r"""An objective: ``distillation_weight`` times a loss against the teacher, plus ``label_weight`` times one against
    the labels.

    .. math:: \ell_i = \alpha\, \mathrm{loss}(s_i, t_i, y_i) + \gamma\, \mathrm{label\_loss}(s_i, y_i)

    averaged over the unmasked tokens of each example where labels are per token. The teacher is run in evaluation mode
    and without a graph, and moved to the student's device; it keeps its own data type.

    Args:
        teacher: any module with the student's inputs and classes (a Hugging Face model, a plain network).
        loss: a registered distillation loss (``"distillation_kl(temperature=2)"``) or any row-wise function
            ``(student_logits, teacher_logits, targets) -> one value per row``.
        distillation_weight: ``α >= 0``.
        label_weight: ``γ >= 0``; 0 leaves the labels' own loss out (``plackett_luce_distillation`` contains it).
        label_loss: a registered loss or row-wise function ``(logits, targets)``.
        task: ``next_token`` (labels are shifted, as for causal language models), ``classification`` (of examples or
            of their tokens), or ``auto``: next token where the teacher has output embeddings and the labels have the
            shape of ``input_ids``.
        chunk_size: for ``next_token``: rows of logits held at once; ``None`` chooses. Neither side's full logits are
            ever held where its output layer is plain (see :class:`NextToken`).
        cache: folder that keeps what the teacher said by the content of the example: logits for classification, what
            enters its output layer for language models (exact, and far smaller than logits). Training on for further
            epochs, or another student, then costs no teacher pass. Useless with random augmentation.
        tokenizer: the student's, and
        teacher_tokenizer: the teacher's: checked to be the same vocabulary. Without them only its size is checked.
        **options: of ``loss``.

    Raises:
        InputError: student and teacher with different vocabularies or numbers of classes.

    The teacher's forward passes count in the Trainer's ``total_flos``.

    >>> teacher, student = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)
    >>> objective = Distillation(teacher, "distillation_kl(temperature=2)", label_weight=0.1, distillation_weight=0.9)
    >>> objective(student, {"input": torch.zeros(2, 3), "labels": torch.tensor([0, 3])}).shape
    torch.Size([2])
    """

    def __init__(
        self,
        teacher: nn.Module,
        loss: str | Spec | Callable[..., Tensor] = "distillation_kl",
        *,
        distillation_weight: float = 1.0,
        label_weight: float = 0.0,
        label_loss: str | Spec | LossFunction = "cross_entropy",
        task: Task = "auto",
        chunk_size: int | None = None,
        cache: str | Path | None = None,
        tokenizer: Any = None,
        teacher_tokenizer: Any = None,
        **options: Any,
    ):
        for name, value in (("distillation_weight", distillation_weight), ("label_weight", label_weight)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a finite number >= 0, got {value}")
        if task not in ("auto", "next_token", "classification"):
            raise ValueError(f"task must be auto, next_token or classification, got '{task}'")
        self.teacher = teacher.eval()
        self.loss = bind_distillation_loss(loss, **options)
        self.label_loss = bind_loss(label_loss)
        self.distillation_weight, self.label_weight = distillation_weight, label_weight
        self.task = task
        self.cache = TeacherCache(cache, teacher) if cache is not None else None
        self._next_token, self._classification = NextToken(chunk_size=chunk_size), Classification()
        self._checked: int | None = None
        self._teacher_parameters: int | None = None
        if tokenizer is not None and teacher_tokenizer is not None:
            _check_one_vocabulary(tokenizer, teacher_tokenizer)

    def __call__(self, model: nn.Module, batch: Batch) -> Float[Tensor, examples]:
        """One loss per example; 0 for an example without targets."""
        self._prepare(model)
        if self._is_next_token(batch):
            return self._of_tokens(model, batch)
        labels = batch["labels"]
        logits = output_logits(model(**accepted_inputs(unwrapped(model), batch)))
        teacher_logits = self.teacher_logits(batch)
        _check_classes(logits.shape[-1], teacher_logits.shape[-1])
        rows, against = against_teacher(self._combined, TeacherLogits(teacher_logits), labels)
        if labels.ndim == 1:
            return against(logits, rows)
        values = against(logits.flatten(0, -2), rows.flatten()).reshape(labels.shape)
        return values.flatten(1).sum(-1) / self.target_counts(batch).clamp_min(1)

    def target_counts(self, batch: Batch) -> Int[Tensor, examples]:
        """Number of unmasked targets of each example."""
        return self._plain(batch).target_counts(batch)

    def evaluate(self, model: nn.Module, batch: Batch) -> ExampleEvaluation:
        """The student's cross entropy and correct first choices, per example; the teacher is not asked."""
        return self._plain(batch).evaluate(model, batch)

    def extra_flops(self, batch: Batch) -> int:
        """The teacher's forward pass, ``2 N`` per position."""
        from lossmith.training.models import matmul_parameters

        if self.cache is not None:
            return 0
        if self._teacher_parameters is None:
            self._teacher_parameters = matmul_parameters(self.teacher)
        positions = batch["input_ids"] if "input_ids" in batch else batch["labels"]
        return 2 * self._teacher_parameters * positions.numel()

    @torch.no_grad()
    def teacher_logits(self, batch: Batch) -> Float[Tensor, "examples ... classes"]:
        """The teacher's logits of a batch of classification, from the cache where they are there."""
        inputs = accepted_inputs(self.teacher, batch)
        if self.cache is None:
            return output_logits(self.teacher(**inputs)).detach()
        columns = {k: v for k, v in inputs.items() if isinstance(v, Tensor) and len(v) == len(batch["labels"])}
        keys = [content_key((name, column[i]) for name, column in columns.items()) for i in range(len(batch["labels"]))]
        found = self._remembered(keys, lambda: list(output_logits(self.teacher(**inputs))))
        return torch.stack([value.to(batch["labels"].device) for value in found])

    def _combined(self, logits: Tensor, teacher_logits: Tensor, targets: Tensor) -> Tensor:
        total = self.distillation_weight * self.loss(logits, teacher_logits, targets)
        if self.label_weight:
            total = total + self.label_weight * self.label_loss(logits, targets)
        return total

    def _of_tokens(self, model: nn.Module, batch: Batch) -> Tensor:
        check_streamable(self.loss, {})
        targets = shifted(batch["labels"])
        rows, against = against_teacher(self._combined, self._teacher_of_tokens(batch), targets)
        return self._next_token.mean_by_example(model, batch, against, rows)

    def _teacher_of_tokens(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        if self.cache is None:
            output = self._next_token.output_layer(self.teacher, batch)
            return TeacherLogits(output) if isinstance(output, Tensor) else TeacherLayer(*output)
        lengths = _used_lengths(batch["labels"])
        inputs = {k: v for k, v in accepted_inputs(self.teacher, batch).items() if isinstance(v, Tensor) and v.ndim > 1}
        keys = [
            content_key((name, column[i, :length]) for name, column in inputs.items())
            for i, length in enumerate(lengths)
        ]

        def run() -> list[Tensor]:
            output = self._next_token.output_layer(self.teacher, batch)
            whole = output if isinstance(output, Tensor) else output[0]
            return [row[:length] for row, length in zip(whole, lengths, strict=True)]

        width, device = batch["labels"].shape[1], batch["labels"].device
        kept = [value.to(device) for value in self._remembered(keys, run)]
        whole = torch.stack([nn.functional.pad(v, (0, 0, 0, width - len(v))) for v in kept])
        # As wide as the layer's input: that is what was kept; else logits.
        head = getattr(self.teacher, "get_output_embeddings", lambda: None)()
        if isinstance(head, nn.Linear) and whole.shape[-1] == head.in_features != head.out_features:
            return TeacherLayer(whole, head.weight, head.bias)
        return TeacherLogits(whole)

    def _remembered(self, keys: list[str], run: Callable[[], list[Tensor]]) -> list[Tensor]:
        """What the cache holds under ``keys``; one that is missing makes the teacher run on the whole batch."""
        assert self.cache is not None
        found = [value for key in keys if (value := self.cache.get(key)) is not None]
        if len(found) < len(keys):
            found = run()
            for key, value in zip(keys, found, strict=True):
                self.cache.put(key, value)
        return found

    def _prepare(self, model: nn.Module) -> None:
        inner = unwrapped(model)
        if inner is self.teacher:
            raise InputError("the teacher is the student itself, which training would change; give a copy of it")
        if self.teacher.training:
            self.teacher.eval()
        if self._checked == id(inner):
            return
        self._checked = id(inner)
        parameter = next(model.parameters(), None)
        if parameter is not None:
            self.teacher.to(parameter.device)
        heads: list[Any] = [getattr(m, "get_output_embeddings", lambda: None)() for m in (inner, self.teacher)]
        if all(getattr(head, "weight", None) is not None for head in heads):
            student, teacher = (head.weight.shape[0] for head in heads)
            if student != teacher:
                raise InputError(
                    f"the student's vocabulary has {student} tokens and the teacher's {teacher}: distillation by token "
                    "needs one vocabulary (the same tokenizer; resize_token_embeddings where only the padding differs)"
                )

    def _is_next_token(self, batch: Batch) -> bool:
        if self.task != "auto":
            return self.task == "next_token"
        ids = batch.get("input_ids")
        head = getattr(self.teacher, "get_output_embeddings", lambda: None)()
        return head is not None and isinstance(ids, Tensor) and ids.shape == batch["labels"].shape

    def _plain(self, batch: Batch) -> NextToken | Classification:
        return self._next_token if self._is_next_token(batch) else self._classification


def bind_distillation_loss(loss: str | Spec | Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """A distillation loss with its options bound, tried once on two classes so that a bad option fails early."""
    if not isinstance(loss, str | Spec):
        return functools.partial(loss, **options) if options else loss
    bound = DISTILLATION_LOSSES.bind(loss)
    bound = functools.partial(bound.func, *bound.args, **{**bound.keywords, **options})
    bound(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, dtype=torch.long))
    return bound


def _check_classes(student: int, teacher: int) -> None:
    if student != teacher:
        raise InputError(f"student and teacher must have the same classes, got {student} and {teacher}")


def _check_one_vocabulary(tokenizer: Any, teacher_tokenizer: Any) -> None:
    ours, theirs = tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    if ours != theirs:
        other = next(token for token in [*ours, *theirs] if ours.get(token) != theirs.get(token))
        raise InputError(
            f"student and teacher have different tokenizers (token {other!r} is {ours.get(other)} for the student and "
            f"{theirs.get(other)} for the teacher): distillation by token needs one vocabulary"
        )


def _used_lengths(labels: Int[Tensor, "rows length"]) -> list[int]:
    """How many positions of each row matter: a causal model's outputs depend on nothing after the last target."""
    positions = torch.arange(1, labels.shape[1] + 1, device=labels.device)
    return [int(n) for n in ((labels != IGNORE_INDEX) * positions).amax(-1)] if labels.numel() else []
