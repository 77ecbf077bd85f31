"""The clipped KL with bounds that a small network learns together with the student."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lossmith.losses.clipped_kl import BandVariant, clipped_kl, clipped_kl_and_mass

# Beyond so many classes the network sees only the teacher's most likely ones.
MOST_CLASSES, TOP_CLASSES = 10_000, 256


@dataclass(frozen=True, slots=True)
class Band:
    """Means over rows: the bounds, and how much of the teacher's mass the band and the top class keep."""

    upper: float
    lower: float
    kept: float


class AdaptiveClippedKL(nn.Module):
    r"""Distribution-adaptive clipped KL: :func:`lossmith.losses.clipped_kl` with ``u`` and ``l`` learned per token.

    .. math:: (a, b) = \sigma\bigl(W_2\, \mathrm{relu}(W_1 [p, q] + b_1) + b_2\bigr), \qquad
              u = \max(a, b),\ l = \min(a, b)

    The student enters the network as a constant. Its weights are trained by the same loss as the student: give them to
    the same optimiser (:func:`attach_adaptive_clipped_kl` makes them part of the student). It begins with
    ``u = 0.953``, ``l = 0.047`` for every token.

    Args:
        classes: size of the vocabulary.
        variant: see :func:`lossmith.losses.clipped_kl`. ``"rest"`` is a true divergence under every band.
            ``"normalised"`` collapses: the band shrinks to nothing, where the loss is 0 whatever the student does.
        hidden: width of the network; default 64, and 256 for more than 10,000 classes.
        top: how many of the teacher's most likely classes the network sees, in falling order, with the student's
            probabilities of the same classes; default all in the vocabulary's order, and 256 for more than 10,000.
        width: softness of the band's edges.
        min_band: least ``u - l``.
        upper: with ``lower``, fixed bounds: nothing is learned.
        lower: see ``upper``.
        temperature: ``τ > 0``.

    Minimising it moves the band as well as the student: a falling loss is not by itself progress. Watch the full
    divergence, and :attr:`last_band`.

    Source: Eq. 6-8 of "Multi-Granularity Semantic Revision for Large Language Model Distillation", 2024,
    arXiv 2407.10068, as described by others; input, size and start of the network are choices made here.

    >>> loss = AdaptiveClippedKL(50)
    >>> student, teacher = torch.zeros(3, 50, requires_grad=True), torch.randn(3, 50)
    >>> loss(student, teacher).shape, round(loss.last_band.upper, 3), round(loss.last_band.lower, 3)
    (torch.Size([3]), 0.953, 0.047)
    """

    def __init__(
        self,
        classes: int,
        *,
        variant: BandVariant = "rest",
        hidden: int | None = None,
        top: int | None = None,
        width: float = 0.02,
        min_band: float = 0.0,
        upper: float | None = None,
        lower: float | None = None,
        temperature: float = 1.0,
    ):
        super().__init__()
        if classes < 1:
            raise ValueError(f"classes must be at least 1, got {classes}")
        if not 0 <= min_band <= 1:
            raise ValueError(f"min_band must lie between 0 and 1, got {min_band}")
        if (upper is None) != (lower is None):
            raise ValueError("upper and lower are given together, or neither")
        large = classes > MOST_CLASSES
        self.classes, self.variant, self.width, self.min_band = classes, variant, width, min_band
        self.temperature, self.fixed = temperature, None if upper is None or lower is None else (upper, lower)
        self.top = min(top if top is not None else (TOP_CLASSES if large else classes), classes)
        self.sees_all = top is None and not large
        if self.top < 1:
            raise ValueError(f"top must be at least 1, got {top}")
        # A bad option fails here and not in the first batch.
        bounds: Any = {} if self.fixed is None else {"upper": self.fixed[0], "lower": self.fixed[1]}
        clipped_kl(
            torch.zeros(1, 1), torch.zeros(1, 1), variant=variant, width=width, temperature=temperature, **bounds
        )
        self.network: nn.Module | None = None
        if self.fixed is None:
            units = hidden if hidden is not None else (256 if large else 64)
            if units < 1:
                raise ValueError(f"hidden must be at least 1, got {hidden}")
            last = nn.Linear(units, 2)
            nn.init.zeros_(last.weight)
            with torch.no_grad():
                last.bias.copy_(torch.tensor([3.0, -3.0]))
            self.network = nn.Sequential(nn.Linear(2 * self.top, units), nn.ReLU(), last)
        self._last: tuple[Tensor, ...] | None = None

    def forward(
        self,
        student_logits: Float[Tensor, "*batch classes"],
        teacher_logits: Float[Tensor, "*batch classes"],
        targets: Int[Tensor, "*batch"] | None = None,
    ) -> Float[Tensor, "*batch"]:
        """One loss per row; see :func:`lossmith.losses.clipped_kl`."""
        if student_logits.shape[-1] != self.classes:
            raise ValueError(f"this loss was made for {self.classes} classes, got {student_logits.shape[-1]}")
        counted = torch.ones_like(student_logits[..., 0], dtype=torch.bool) if targets is None else targets != -100
        upper, lower = self.bounds(
            student_logits.masked_fill(~counted.unsqueeze(-1), 0.0),
            teacher_logits.masked_fill(~counted.unsqueeze(-1), 0.0),
        )
        values, kept = clipped_kl_and_mass(
            student_logits,
            teacher_logits,
            targets,
            upper=upper,
            lower=lower,
            width=self.width,
            variant=self.variant,
            temperature=self.temperature,
        )
        if counted.any():
            self._last = tuple(x.detach()[counted].mean() for x in (upper, lower, kept))
        return values

    def bounds(
        self, student_logits: Float[Tensor, "*batch classes"], teacher_logits: Float[Tensor, "*batch classes"]
    ) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
        """``u`` and ``l`` of each row, with a graph to the network only."""
        dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
        if self.fixed is not None:
            upper, lower = (
                torch.full(student_logits.shape[:-1], x, dtype=dtype, device=student_logits.device) for x in self.fixed
            )
            return upper, lower
        assert self.network is not None
        parameter: Any = next(self.network.parameters())
        with torch.no_grad():
            p, q = (F.softmax(x.detach().to(dtype) / self.temperature, -1) for x in (teacher_logits, student_logits))
            if not self.sees_all:
                p, chosen = p.topk(self.top, -1)
                q = q.gather(-1, chosen)
            seen = torch.cat([p, q], -1).to(parameter.dtype)
        a, b = self.network(seen).to(dtype).sigmoid().unbind(-1)
        upper, lower = torch.maximum(a, b), torch.minimum(a, b)
        if self.min_band:
            lower = torch.minimum(lower, (upper - self.min_band).clamp_min(0.0))
            upper = torch.maximum(upper, lower + self.min_band)
        return upper, lower

    @property
    def has_band(self) -> bool:
        """Whether there is a :attr:`last_band`: the loss has been called on a row that counts."""
        return self._last is not None

    @property
    def last_band(self) -> Band:
        """The band of the last call."""
        if self._last is None:
            raise ValueError("no band yet: the loss has not been called")
        upper, lower, kept = (float(x) for x in self._last)
        return Band(upper, lower, kept)

    def extra_repr(self) -> str:
        """Settings, for ``repr``."""
        return f"classes={self.classes}, variant={self.variant}, width={self.width}, fixed={self.fixed}"


_NAME = "adaptive_clipped_kl"


def attach_adaptive_clipped_kl(student: nn.Module, classes: int | None = None, **options: Any) -> AdaptiveClippedKL:
    """Make an :class:`AdaptiveClippedKL` a part of ``student``, so that whatever trains the one trains the other.

    The optimiser, gradient clipping, several processes and checkpoints then treat its weights like the student's.
    :func:`detach_adaptive_clipped_kl` gives the plain model back.

    Args:
        student: any module; its output embeddings tell the number of classes where ``classes`` is not given.
        classes: size of the vocabulary.
        **options: of :class:`AdaptiveClippedKL`.

    >>> student = nn.Linear(4, 10)
    >>> _ = attach_adaptive_clipped_kl(student, 10)
    >>> len(list(student.parameters())), len(list(detach_adaptive_clipped_kl(student).parameters()))
    (6, 2)
    """
    if classes is None:
        head: Any = getattr(student, "get_output_embeddings", lambda: None)()
        if head is None or getattr(head, "weight", None) is None:
            raise ValueError("classes must be given: the student has no output embeddings to count")
        classes = int(head.weight.shape[0])
    parameter = next(student.parameters(), None)
    loss = AdaptiveClippedKL(classes, **options)
    if parameter is not None:
        # The band's own weights stay in float32 in a half-precision student: their steps would be rounded away.
        loss = loss.to(parameter.device, torch.float64 if parameter.dtype == torch.float64 else torch.float32)
    setattr(student, _NAME, loss)
    return loss


def attached_adaptive_clipped_kl(student: nn.Module) -> AdaptiveClippedKL | None:
    """What :func:`attach_adaptive_clipped_kl` attached, or ``None``."""
    found = getattr(student, _NAME, None)
    return found if isinstance(found, AdaptiveClippedKL) else None


def detach_adaptive_clipped_kl(student: nn.Module) -> nn.Module:
    """Take it off again; returns the student."""
    if attached_adaptive_clipped_kl(student) is not None:
        delattr(student, _NAME)
    return student
