"""Distillation through two output layers, without the student's or the teacher's (rows x classes) matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lossmith.heads.linear import linear_loss
from lossmith.registry import DISTILLATION_LOSSES

IGNORED_ROW = -100


def linear_distillation_loss(
    loss: Callable[..., Tensor] | str,
    hidden: Float[Tensor, "*batch features"],
    weight: Float[Tensor, "classes features"],
    teacher_hidden: Float[Tensor, "*batch teacher_features"],
    teacher_weight: Float[Tensor, "classes teacher_features"],
    targets: Int[Tensor, "*batch"],
    *,
    bias: Float[Tensor, " classes"] | None = None,
    teacher_bias: Float[Tensor, " classes"] | None = None,
    chunk_size: int | None = None,
    row_weights: Float[Tensor, "*batch"] | None = None,
    ignore_index: int = -100,
    **options: Any,
) -> Float[Tensor, "*batch"]:
    r"""One distillation loss per row from hidden states, a chunk of rows at a time.

    .. math:: \ell_i = \mathrm{loss}\bigl(W h_i + b,\; W_T h^T_i + b_T,\; y_i\bigr)

    Neither side's logits are ever held for more than ``chunk_size`` rows, forward or backward. Student and teacher may
    have different widths; they must have the same classes. Only ``hidden``, ``weight`` and ``bias`` get gradients.

    Args:
        loss: a registered distillation loss (``"distillation_kl"``) or any row-wise function
            ``(student_logits, teacher_logits, targets, **options) -> one value per row``.
        hidden: the student's last hidden states.
        weight: the student's output layer.
        teacher_hidden: the teacher's last hidden states.
        teacher_weight: the teacher's output layer.
        targets: class indices; rows with ``ignore_index`` are skipped before any product.
        bias: the student's, if it has one.
        teacher_bias: the teacher's, if it has one.
        chunk_size: rows at a time; ``None`` chooses.
        row_weights: see :func:`linear_loss`.
        ignore_index: target of rows that do not count.
        **options: of ``loss``. Losses that relate rows (``dist`` with ``gamma > 0``) are refused: chunks would change
            their value.

    Returns:
        One loss per row; exactly 0 where the target is ``ignore_index``.

    >>> h, w, t, v = (torch.ones(2, 3), torch.eye(4, 3), torch.zeros(2, 5), torch.ones(4, 5))
    >>> linear_distillation_loss("distillation_kl", h, w, t, v, torch.tensor([0, -100])).round(decimals=4)
    tensor([0.0780, 0.0000])
    """
    function: Callable[..., Tensor] = DISTILLATION_LOSSES.get(loss) if isinstance(loss, str) else loss
    if weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(
            f"student and teacher must have the same classes, got {weight.shape[0]} and {teacher_weight.shape[0]}"
        )
    if teacher_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"teacher_hidden must begin with the batch shape of hidden, {tuple(hidden.shape[:-1])}, "
            f"got {tuple(teacher_hidden.shape)}"
        )
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets must have the shape {tuple(hidden.shape[:-1])}, got {tuple(targets.shape)}")
    check_streamable(function, options)
    layer = TeacherLayer(teacher_hidden, teacher_weight, teacher_bias)
    rows, against = against_teacher(function, layer, targets, ignore_index=ignore_index, **options)
    return linear_loss(against, hidden, weight, rows, bias=bias, chunk_size=chunk_size, row_weights=row_weights)


class TeacherLayer:
    """The teacher's logits of chosen rows, computed when they are asked for."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None):
        self.hidden, self.weight = hidden.detach().flatten(0, -2), weight.detach()
        self.bias = None if bias is None else bias.detach()

    def __call__(self, rows: Int[Tensor, " chosen"]) -> Float[Tensor, "chosen classes"]:
        """Logits of ``rows``."""
        return F.linear(self.hidden[rows], self.weight, self.bias)


class TeacherLogits:
    """Chosen rows of logits that are there already."""

    def __init__(self, logits: Tensor):
        self.logits = logits.detach().flatten(0, -2)

    def __call__(self, rows: Int[Tensor, " chosen"]) -> Float[Tensor, "chosen classes"]:
        """Logits of ``rows``."""
        return self.logits[rows]


@dataclass(frozen=True)
class AgainstTeacher:
    """A row-wise loss whose targets are row numbers: it looks the teacher's logits and the class up by row."""

    loss: Callable[..., Tensor]
    teacher: Callable[[Tensor], Tensor]
    targets: Tensor
    options: dict[str, Any]

    def __call__(self, logits: Tensor, rows: Tensor, *, ignore_index: int = IGNORED_ROW) -> Tensor:
        """One loss per row of ``logits``."""
        skipped = rows == ignore_index
        rows = rows.masked_fill(skipped, 0)
        with torch.no_grad():
            teacher_logits = self.teacher(rows)
        losses = self.loss(logits, teacher_logits, self.targets[rows], **self.options)
        return losses.masked_fill(skipped, 0.0)


def against_teacher(
    loss: Callable[..., Tensor],
    teacher: Callable[[Tensor], Tensor],
    targets: Int[Tensor, "*batch"],
    *,
    ignore_index: int = -100,
    **options: Any,
) -> tuple[Int[Tensor, "*batch"], AgainstTeacher]:
    """Row numbers to be used as targets (``IGNORED_ROW`` where the class is ``ignore_index``), and the loss of them."""
    rows = torch.arange(targets.numel(), device=targets.device).reshape(targets.shape)
    rows = rows.masked_fill(targets == ignore_index, IGNORED_ROW)
    return rows, AgainstTeacher(loss, teacher, targets.flatten(), options)


def check_streamable(loss: Callable[..., Tensor], options: dict[str, Any]) -> None:
    """Refuse a loss that relates rows to each other, or that learns."""
    from lossmith.losses import dist

    function, bound = getattr(loss, "func", loss), {**getattr(loss, "keywords", {}), **options}
    if function is dist and bound.get("gamma", 2.0) != 0:
        raise ValueError("dist correlates examples with each other, which chunks of rows would change; set gamma=0")
    if isinstance(function, torch.nn.Module) and any(p.requires_grad for p in function.parameters()):
        raise ValueError(
            f"{type(function).__name__} has weights of its own, whose gradient streaming would lose; use "
            "lossmith.training.MultiGranularityDistillation"
        )
