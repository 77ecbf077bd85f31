"""Two losses of multi-granularity revision: a divergence on a band of classes, and one of neighbouring tokens.

Source of both: "Multi-Granularity Semantic Revision for Large Language Model Distillation", 2024, arXiv 2407.10068.
Its equations could not be read directly: forms and names below follow published descriptions of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lossmith.losses.distillation import prepare_pair

BandVariant = Literal["rest", "paper", "normalised"]

# Its exponential is 0 in any dtype, and unlike -inf it has no NaN in derivatives of logsumexp.
_NOTHING = -1e30


def clipped_kl(
    student_logits: Float[Tensor, "*batch classes"],
    teacher_logits: Float[Tensor, "*batch classes"],
    targets: Int[Tensor, "*batch"] | None = None,
    *,
    upper: float | Float[Tensor, "*batch"] = 0.9,
    lower: float | Float[Tensor, "*batch"] = 0.0,
    width: float = 0.02,
    variant: BandVariant = "rest",
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> Float[Tensor, "*batch"]:
    r"""Clipped KL: the divergence on a band of the teacher's distribution and on its top class.

    Classes in the order of the teacher's probabilities, ``p_(1) >= p_(2) >= ...``; ``c_k`` is the mass before class
    ``k``; the band is soft:

    .. math:: m_k = \sigma\bigl((c_k - l)/w\bigr)\, \sigma\bigl((u - c_k)/w\bigr), \qquad
              c_k = \textstyle\sum_{r<k} p_{(r)}

    .. math:: \text{rest:}\quad \ell = \sum_k m_k p_{(k)} \log\frac{p_{(k)}}{q_{(k)}}
              + \bar p \log\frac{\bar p}{\bar q}, \qquad m_1 = 1,\quad \bar p = \sum_k (1 - m_k)\, p_{(k)}

    Args:
        student_logits: ``s``, ``q = softmax(s/τ)``; half precision is computed in float32.
        teacher_logits: ``t``, ``p = softmax(t/τ)``; constants.
        targets: only to skip rows with ``ignore_index``.
        upper: ``u``, a number in (0, 1], or one per example (which may carry a gradient).
        lower: ``l < u``, likewise.
        width: ``w > 0``: softness of the band's edges, in units of probability mass.
        variant: ``"rest"``: one more class holds all that the band leaves out: a divergence, ``0 <= ℓ <= KL(p||q)`` for
            every band. ``"paper"``: the band and the top class once more, neither normalised, so that ``ℓ`` can be
            negative. ``"normalised"``: the same vectors divided by their sums: ``ℓ >= 0``, but a learned band shrinks
            to nothing, where ``ℓ = 0`` for any student.
        temperature: ``τ > 0``; the loss is multiplied by ``τ²``.
        ignore_index: target of rows that do not count.

    Returns:
        One number (nats, times ``τ²``) per example; exactly 0 for ignored rows.

    Relations:
        With ``"rest"`` and a band over everything this is :func:`distillation_kl`.
        :class:`lossmith.heads.AdaptiveClippedKL` learns ``u`` and ``l`` per token.

    >>> t, s = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log(), torch.tensor([[0.4, 0.4, 0.1, 0.1]]).log()
    >>> clipped_kl(s, t, upper=0.4, lower=0.0), clipped_kl(s, t, upper=1.0, lower=0.0)
    (tensor([0.0204]), tensor([0.0514]))
    """
    return clipped_kl_and_mass(
        student_logits,
        teacher_logits,
        targets,
        upper=upper,
        lower=lower,
        width=width,
        variant=variant,
        temperature=temperature,
        ignore_index=ignore_index,
    )[0]


def clipped_kl_and_mass(
    student_logits: Float[Tensor, "*batch classes"],
    teacher_logits: Float[Tensor, "*batch classes"],
    targets: Int[Tensor, "*batch"] | None,
    *,
    upper: float | Float[Tensor, "*batch"],
    lower: float | Float[Tensor, "*batch"],
    width: float,
    variant: BandVariant,
    temperature: float,
    ignore_index: int = -100,
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """:func:`clipped_kl`, and how much of the teacher's mass the band and its top class hold (a constant)."""
    _check_bounds(upper, lower, width)
    student, teacher, ignored = prepare_pair(student_logits, teacher_logits, targets, temperature, ignore_index)
    log_p, order = F.log_softmax(teacher / temperature, -1).sort(dim=-1, descending=True, stable=True)
    # The teacher's order for both: sorting each side by itself would compare different classes.
    log_q = F.log_softmax(student / temperature, -1).gather(-1, order)
    p = log_p.exp()
    log_keep, log_drop = soft_band(p, _edge(upper, log_p), _edge(lower, log_p), width)
    divergence = band_divergence(log_p, log_q, log_keep, log_drop, variant=variant)
    kept = p[..., 0] + (log_keep.detach().exp() * p)[..., 1:].sum(-1)
    return (temperature**2 * divergence).masked_fill(ignored, 0.0), kept


def soft_band(
    sorted_probabilities: Float[Tensor, "*batch classes"],
    upper: Float[Tensor, "*batch 1"],
    lower: Float[Tensor, "*batch 1"],
    width: float,
) -> tuple[Float[Tensor, "*batch classes"], Float[Tensor, "*batch classes"]]:
    """Logarithms of ``m`` and of ``1 - m``, the soft band of :func:`clipped_kl`, for probabilities in falling order."""
    before = sorted_probabilities.cumsum(-1) - sorted_probabilities
    above, below = (before - lower) / width, (upper - before) / width
    reached = F.logsigmoid(above)
    inside = reached + F.logsigmoid(below)
    # 1 - σ(a) σ(b) = σ(-a) + σ(a) σ(-b), without cancellation.
    outside = torch.logaddexp(F.logsigmoid(-above), reached + F.logsigmoid(-below))
    return inside, outside


def band_divergence(
    log_p: Float[Tensor, "*batch classes"],
    log_q: Float[Tensor, "*batch classes"],
    log_keep: Float[Tensor, "*batch classes"],
    log_drop: Float[Tensor, "*batch classes"],
    *,
    variant: BandVariant = "rest",
) -> Float[Tensor, "*batch"]:
    """The divergence of :func:`clipped_kl` under any mask, all classes in the teacher's order (its top class first).

    Args:
        log_p: teacher.
        log_q: student.
        log_keep: logarithm of the mask; where it is 0, a large negative number such as -1e30.
        log_drop: logarithm of one minus the mask, likewise.
        variant: see :func:`clipped_kl`.
    """
    if variant not in ("rest", "paper", "normalised"):
        raise ValueError(f"variant must be rest, paper or normalised, got '{variant}'")
    if variant == "rest":
        # The top class is always kept, and not a second time.
        first = torch.arange(log_p.shape[-1], device=log_p.device) == 0
        log_keep, log_drop = log_keep.masked_fill(first, 0.0), log_drop.masked_fill(first, _NOTHING)
    impossible = log_p == -math.inf
    known = log_p.masked_fill(impossible, 0.0)
    # 0 log 0 is 0, in value and derivative; nor has a class outside a hard band a part, even one the student rules out.
    terms = (known.exp() * (known - log_q).masked_fill(impossible, 0.0)).masked_fill(impossible, 0.0)
    banded = (log_keep.exp() * terms.masked_fill(log_keep <= _NOTHING, 0.0)).sum(-1)
    if variant == "rest":
        rest_p, rest_q = (torch.logsumexp(x + log_drop, -1).clamp_min(2 * _NOTHING) for x in (log_p, log_q))
        return banded + rest_p.exp() * (rest_p - rest_q)
    unnormalised = banded + terms[..., 0]
    if variant == "paper":
        return unnormalised
    sum_p, sum_q = (torch.logsumexp(torch.cat([x + log_keep, x[..., :1]], -1), -1) for x in (log_p, log_q))
    return unnormalised / sum_p.exp() - sum_p + sum_q


def span_correlation(
    student_logits: Float[Tensor, "batch length classes"],
    teacher_logits: Float[Tensor, "batch length classes"],
    spans: Sequence[Sequence[tuple[int, int]]] | Bool[Tensor, "batch length"],
    *,
    squared: bool = False,
    temperature: float = 1.0,
    chunk_size: int = 1024,
) -> Float[Tensor, " batch"]:
    r"""Span correlation: inside a phrase, products of neighbouring tokens' distributions must agree with the teacher's.

    .. math:: \ell = \frac{1}{|P|} \sum_{(i, i+1) \in P}
              \bigl\lVert p_i \odot p_{i+1} - q_i \odot q_{i+1} \bigr\rVert_2

    over all pairs ``P`` of neighbours within one span of the example.

    Args:
        student_logits: ``q = softmax(s/τ)``; position ``i`` is the distribution *of* token ``i`` (for a causal model,
            the logits that it gives one position earlier).
        teacher_logits: ``p = softmax(t/τ)``; constants.
        spans: for each example a list of ``(start, end)``, end exclusive; or a boolean tensor, true where positions
            ``i`` and ``i + 1`` are in one span. Spans of fewer than two tokens hold no pair.
        squared: the square of the distance (what the description leaves open).
        temperature: ``τ > 0``.
        chunk_size: pairs at a time.

    Returns:
        One number per example; 0 for an example without pairs. Between 0 and √2, and tiny in practice: products of
        probabilities are, so they are computed in float32 at least.

    Raises:
        ValueError: spans out of range, with ``end <= start``, or not one list per example.

    >>> p = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]]).log()
    >>> q = torch.tensor([[[0.4, 0.4, 0.2], [0.4, 0.3, 0.3]]]).log()
    >>> span_correlation(q, p, [[(0, 2)]]).round(decimals=4)
    tensor([0.1487])
    """
    if student_logits.ndim != 3:
        raise ValueError(
            f"student_logits must have the shape (batch, length, classes), got {tuple(student_logits.shape)}"
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    student, teacher, _ = prepare_pair(student_logits, teacher_logits, None, temperature, -100)
    linked = linked_positions(spans, *student.shape[:2], device=student.device)
    rows, columns = linked.nonzero(as_tuple=True)
    distances = [
        torch.linalg.vector_norm(
            _neighbours(teacher, r, c, temperature) - _neighbours(student, r, c, temperature), dim=-1
        )
        for r, c in zip(rows.split(chunk_size), columns.split(chunk_size), strict=True)
    ]
    values = torch.cat(distances) if distances else student.new_zeros(0)
    values = values.square() if squared else values
    sums = torch.zeros(len(linked), dtype=values.dtype, device=values.device).index_add(0, rows, values)
    return sums / linked.sum(-1).clamp_min(1)


def linked_positions(
    spans: Sequence[Sequence[tuple[int, int]]] | Tensor,
    batch: int,
    length: int,
    *,
    device: torch.device | str | None = None,
) -> Bool[Tensor, "batch length"]:
    """True where positions ``i`` and ``i + 1`` are in one span; see :func:`span_correlation`."""
    if isinstance(spans, Tensor):
        if spans.dtype != torch.bool or spans.shape != (batch, length):
            raise ValueError(
                f"spans must be a boolean tensor of shape {(batch, length)}, got {spans.dtype} {tuple(spans.shape)}"
            )
        if length and bool(spans[:, -1].any()):
            raise ValueError("spans link the last position to one after it")
        return spans.to(device)
    if len(spans) != batch:
        raise ValueError(f"spans must be one list per example, {batch}, got {len(spans)}")
    linked = torch.zeros(batch, length, dtype=torch.bool)
    for i, row in enumerate(spans):
        for start, end in row:
            if not 0 <= start < end <= length:
                raise ValueError(
                    f"span ({start}, {end}) of example {i} must have 0 <= start < end <= {length}, the length"
                )
            linked[i, start : end - 1] = True
    return linked.to(device)


def _neighbours(logits: Tensor, rows: Tensor, columns: Tensor, temperature: float) -> Tensor:
    """``p_i ⊙ p_{i+1}`` of the chosen positions."""
    first, second = (F.softmax(logits[rows, columns + step] / temperature, -1) for step in (0, 1))
    return first * second


def _edge(value: float | Tensor, like: Tensor) -> Tensor:
    """A bound, ready to be compared with each class."""
    if not isinstance(value, Tensor):
        return like.new_tensor(value)
    if value.shape != like.shape[:-1]:
        raise ValueError(f"upper and lower must have the shape {tuple(like.shape[:-1])}, got {tuple(value.shape)}")
    return value.to(like.dtype).unsqueeze(-1)


def _check_bounds(upper: float | Tensor, lower: float | Tensor, width: float) -> None:
    if not (width > 0 and math.isfinite(width)):
        raise ValueError(f"width must be a finite number > 0, got {width}")
    for name, value in (("upper", upper), ("lower", lower)):
        if not isinstance(value, Tensor) and not 0 <= value <= 1:
            raise ValueError(f"{name} must lie between 0 and 1, got {value}")
    if not isinstance(upper, Tensor) and not isinstance(lower, Tensor) and not lower < upper:
        raise ValueError(f"lower must be less than upper, got {lower} and {upper}")
