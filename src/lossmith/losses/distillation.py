"""Losses between a student's and a teacher's logits: one value per example, never reduced.

All share one signature, ``f(student_logits, teacher_logits, targets, *, options)``, so that any of them can be plugged
into :class:`lossmith.training.Distillation`. ``targets`` are class indices; those losses that do not need them take
``None``, and otherwise only skip rows whose target is ``ignore_index`` (loss and gradient exactly 0). The teacher never
receives a gradient.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lossmith.losses.classification import check_target_range

RankWeights = Literal["teacher", "uniform", "ce", "position"]


def distillation_kl(
    student_logits: Float[Tensor, "*batch classes"],
    teacher_logits: Float[Tensor, "*batch classes"],
    targets: Int[Tensor, "*batch"] | None = None,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> Float[Tensor, "*batch"]:
    r"""Hinton's knowledge distillation: the divergence of the student from the softened teacher.

    .. math:: \ell = \tau^2\, \mathrm{KL}\bigl(\mathrm{softmax}(t/\tau) \,\|\, \mathrm{softmax}(s/\tau)\bigr)

    Args:
        student_logits: ``s``; half precision is computed in float32.
        teacher_logits: ``t``, same shape; constants.
        targets: only to skip rows with ``ignore_index``; ``None`` where every row counts.
        temperature: ``τ > 0``; the factor ``τ²`` keeps gradients of the same size whatever it is.
        ignore_index: target of rows that do not count.

    Returns:
        One divergence (nats, times ``τ²``) per example; 0 where student and teacher agree up to a constant.

    Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531.

    Relations:
        "Forward" KL: the student covers all that the teacher thinks possible. :func:`reverse_kl` turns it round,
        :func:`jensen_shannon` lies between, :func:`decoupled_kl` splits it into target and other classes.

    >>> distillation_kl(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
    tensor([0.4338])
    """
    student, teacher, ignored = prepare_pair(student_logits, teacher_logits, targets, temperature, ignore_index)
    divergence = _kl(_log_softmax(teacher / temperature), _log_softmax(student / temperature))
    return (temperature**2 * divergence).masked_fill(ignored, 0.0)


def reverse_kl(
    student_logits: Float[Tensor, "*batch classes"],
    teacher_logits: Float[Tensor, "*batch classes"],
    targets: Int[Tensor, "*batch"] | None = None,
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> Float[Tensor, "*batch"]:
    r"""Reverse divergence: the student keeps to what the teacher finds likely.

    .. math:: \ell = \tau^2\, \mathrm{KL}\bigl(\mathrm{softmax}(s/\tau) \,\|\, \mathrm{softmax}(t/\tau)\bigr)

    Arguments, shapes and units as in :func:`distillation_kl`. Infinite where the teacher rules out (``-inf``) a class
    that the student does not.

    Source: Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models", 2023, arXiv 2306.08543.

    >>> reverse_kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0]]))
    tensor([0.4338])
    """
    student, teacher, ignored = prepare_pair(student_logits, teacher_logits, targets, temperature, ignore_index)
    divergence = _kl(_log_softmax(student / temperature), _log_softmax(teacher / temperature))
    return (temperature**2 * divergence).masked_fill(ignored, 0.0)


def jensen_shannon(
    student_logits: Float[Tensor, "*batch classes"],
    teacher_logits: Float[Tensor, "*batch classes"],
    targets: Int[Tensor, "*batch"] | None = None,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> Float[Tensor, "*batch"]:
    r"""Generalised Jensen-Shannon divergence, between forward and reverse.

    .. math::
        \ell = \tau^2 \bigl[\beta\, \mathrm{KL}(p \| m) + (1-\beta)\, \mathrm{KL}(q \| m)\bigr], \qquad
        m = \beta p + (1-\beta) q

    with the teacher's ``p = softmax(t/τ)`` and the student's ``q = softmax(s/τ)``.

    Args:
        student_logits: ``s``.
        teacher_logits: ``t``.
        targets: only to skip rows with ``ignore_index``.
        beta: in (0, 1). For small ``β``, ``ℓ/β`` tends to :func:`distillation_kl`; near 1, ``ℓ/(1-β)`` to
            :func:`reverse_kl`. (Some libraries have had this the wrong way round.)
        temperature: ``τ > 0``.
        ignore_index: target of rows that do not count.

    Returns:
        One divergence per example, at most ``τ² log 2`` for ``β = 1/2``, whatever the logits.

    Source: Agarwal et al., "On-Policy Distillation of Language Models", 2023, arXiv 2306.13649, equation 1.

    >>> jensen_shannon(torch.tensor([[40.0, 0.0]]), torch.tensor([[0.0, 40.0]]))
    tensor([0.6931])
    """
    if not 0.0 < beta < 1.0:
        raise ValueError(f"beta must lie between 0 and 1, got {beta}; use distillation_kl or reverse_kl at the ends")
    student, teacher, ignored = prepare_pair(student_logits, teacher_logits, targets, temperature, ignore_index)
    log_q, log_p = _log_softmax(student / temperature), _log_softmax(teacher / temperature)
    log_m = torch.logaddexp(log_p + math.log(beta), _finite(log_q) + math.log1p(-beta))
    divergence = beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
    return (temperature**2 * divergence).masked_fill(ignored, 0.0)


def decoupled_kl(
    student_logits: Float[Tensor, "*batch classes"],
    teacher_logits: Float[Tensor, "*batch classes"],
    targets: Int[Tensor, "*batch"],
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    ignore_index: int = -100,
) -> Float[Tensor, "*batch"]:
    r"""Decoupled knowledge distillation (DKD): target against the rest, and the rest among themselves.

    .. math::
        \ell = \tau^2 \bigl[\alpha\, \mathrm{KL}\bigl((p_y, 1-p_y) \| (q_y, 1-q_y)\bigr)
        + \beta\, \mathrm{KL}(\hat p \| \hat q)\bigr]

    where ``p̂`` and ``q̂`` are the softmax over all classes but the target ``y``.

    Args:
        student_logits: ``s``.
        teacher_logits: ``t``.
        targets: class indices ``y``, or ``ignore_index``.
        alpha: weight of the target part.
        beta: weight of the other part. With ``α = 1`` and ``β`` replaced by each example's ``1 - p_y`` this is
            :func:`distillation_kl`.
        temperature: ``τ > 0``.
        ignore_index: target of rows that do not count.

    Source: Zhao et al., "Decoupled Knowledge Distillation", 2022, arXiv 2203.08679, equation 7; defaults of its
    experiments on CIFAR-100.

    >>> decoupled_kl(torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[3.0, 0.0, 1.0]]), torch.tensor([0]))
    tensor([1.7901])
    """
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be a finite number >= 0, got {value}")
    student, teacher, ignored = prepare_pair(student_logits, teacher_logits, targets, temperature, ignore_index)
    chosen = _safe_targets(targets, student, ignored).unsqueeze(-1)
    is_target = torch.zeros_like(student, dtype=torch.bool).scatter(-1, chosen, True)

    def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
        log_probs = _log_softmax(logits / temperature)
        rest = torch.logsumexp(log_probs.masked_fill(is_target, -math.inf), -1, keepdim=True)
        binary = torch.cat([log_probs.gather(-1, chosen), rest], -1)
        return binary, log_probs.masked_fill(is_target, -math.inf) - rest

    student_binary, student_others = parts(student)
    teacher_binary, teacher_others = parts(teacher)
    divergence = alpha * _kl(teacher_binary, student_binary) + beta * _kl(teacher_others, student_others)
    return (temperature**2 * divergence).masked_fill(ignored, 0.0)


def dist(
    student_logits: Float[Tensor, "*batch classes"],
    teacher_logits: Float[Tensor, "*batch classes"],
    targets: Int[Tensor, "*batch"] | None = None,
    *,
    beta: float = 2.0,
    gamma: float = 2.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
) -> Float[Tensor, "*batch"]:
    r"""DIST: correlation of the two predictions instead of their divergence.

    .. math::
        \ell_i = \tau^2 \Bigl[\beta \bigl(1 - \rho(p_{i\cdot}, q_{i\cdot})\bigr)
        + \gamma\, \tfrac1C \sum_c \bigl(1 - \rho(p_{\cdot c}, q_{\cdot c})\bigr)\Bigr]

    with Pearson's correlation ``ρ``, ``p = softmax(t/τ)`` and ``q = softmax(s/τ)``.

    The first part is per example. The second ("intra-class") correlates each class over the *batch*: it is the same for
    all examples of a call and changes with the micro-batch; ``gamma=0`` leaves it out, and where rows are streamed in
    chunks it must be. Rows (or classes) without variance count as uncorrelated, with gradient 0.

    Args:
        student_logits: ``s``.
        teacher_logits: ``t``.
        targets: only to skip rows with ``ignore_index``.
        beta: weight of the correlation over classes.
        gamma: weight of the correlation over examples.
        temperature: ``τ > 0``.
        ignore_index: target of rows that do not count.

    Source: Huang et al., "Knowledge Distillation from A Stronger Teacher", 2022, arXiv 2205.10536, equation 9.

    >>> dist(torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[2.0, 0.0, 1.0]]), gamma=0.0).abs() < 1e-6
    tensor([True])
    """
    for name, value in (("beta", beta), ("gamma", gamma)):
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be a finite number >= 0, got {value}")
    student, teacher, ignored = prepare_pair(student_logits, teacher_logits, targets, temperature, ignore_index)
    q, p = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    loss = beta * (1 - _correlation(p, q))
    if gamma:
        rows = (~ignored).reshape(-1, 1).to(q.dtype)
        loss = loss + gamma * (1 - _correlation(p.flatten(0, -2).T, q.flatten(0, -2).T, rows.T)).mean()
    return (temperature**2 * loss).masked_fill(ignored, 0.0)


def plackett_luce_distillation(
    student_logits: Float[Tensor, "*batch classes"],
    teacher_logits: Float[Tensor, "*batch classes"],
    targets: Int[Tensor, "*batch"],
    *,
    temperature: float = 1.0,
    weights: RankWeights | Float[Tensor, " classes"] = "teacher",
    top_k: int | None = None,
    ignore_index: int = -100,
) -> Float[Tensor, "*batch"]:
    r"""PLD: the student learns one ranking, the true class first and the others in the teacher's order.

    .. math::
        \ell = \sum_{k=1}^{C} \alpha_k \Bigl[-s_{\pi_k} + \log \sum_{l \ge k} e^{s_{\pi_l}}\Bigr], \qquad
        \pi_1 = y,\ \pi_2.. = \text{the others by descending } t, \qquad
        \alpha_k = \mathrm{softmax}(t/\tau)_{\pi_k}

    The negative log likelihood of the ranking ``π`` under the Plackett-Luce model, each choice weighted by the
    teacher's probability of the class at that rank. Its first term is cross entropy, so that no mixing weight is
    needed; convex in the student's logits; O(C log C).

    Args:
        student_logits: ``s``; never divided by the temperature.
        teacher_logits: ``t``; only their order and the weights matter, both constants.
        targets: class indices ``y``, or ``ignore_index``. Soft targets have no first choice and are refused.
        temperature: ``τ > 0`` of the weights (1 on ImageNet, 4 on CIFAR-100); the order does not depend on it.
        weights: ``"teacher"`` as above; ``"uniform"`` 1/C (ListMLE divided by C); ``"ce"`` (1, 0, ..., 0), plain
            cross entropy; ``"position"`` ``2^(C-k) - 1`` normalised (p-ListMLE as we read it: the paper's row is
            not clear); or ``C`` numbers >= 0 by rank.
        top_k: rank only the teacher's ``top_k`` classes and the target, with weights normalised over them: for large
            vocabularies (not in the paper); default all.
        ignore_index: target of rows that do not count; not a class, which would be ranked and ignored at once.

    Returns:
        One loss >= 0 per example. It is not 0 where the student equals the teacher: a ranking is learned, not a
        distribution. Infinite where the student rules out (``-inf``) a class that has weight and is not last.

    Source: "PLD: A Choice-Theoretic List-Wise Knowledge Distillation", 2025, arXiv 2506.12542, section 4.

    Relations:
        With one class left this is cross entropy; with two classes, cross entropy times the teacher's probability of
        the true one.

    >>> s, t = torch.tensor([[0.2, -0.4, 1.0, 0.5]]), torch.tensor([[2.0, 0.5, 1.0, -1.0]])
    >>> plackett_luce_distillation(s, t, torch.tensor([2]))
    tensor([1.0044])
    """
    student, teacher, ignored = prepare_pair(student_logits, teacher_logits, targets, temperature, ignore_index)
    classes = student.shape[-1]
    if classes < 2:
        raise ValueError("a ranking needs at least 2 classes, got 1")
    if 0 <= ignore_index < classes:
        raise ValueError(f"ignore_index must lie outside the {classes} ranked classes, got {ignore_index}")
    chosen = _safe_targets(targets, student, ignored).unsqueeze(-1)
    log_weights = _log_softmax(teacher / temperature)
    # Only for sorting: the weights must come from the teacher's own logits.
    order = teacher.scatter(-1, chosen, math.inf).argsort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")
        # One more where the target is not among them.
        among = (teacher > teacher.gather(-1, chosen)).sum(-1, keepdim=True) < top_k
        count = torch.where(among, min(top_k, classes), min(top_k + 1, classes))
        order = order[..., : min(top_k + 1, classes)]
        beyond = torch.arange(order.shape[-1], device=order.device) >= count
    ranked = student.gather(-1, order)
    alpha = _rank_weights(weights, log_weights.gather(-1, order), None if top_k is None else beyond)
    # exp(-1e30) is 0 in any dtype, and unlike -inf it has no NaN in the derivative of logcumsumexp.
    ruled_out = ranked == -math.inf
    finite = ranked.masked_fill(ruled_out, -1e30)
    if top_k is not None:
        finite = finite.masked_fill(beyond, -1e30)
    remaining = finite.flip(-1).logcumsumexp(-1).flip(-1)
    brackets = (remaining - finite).masked_fill(alpha == 0, 0.0)
    brackets = torch.where(ruled_out & (brackets.detach() > 0), math.inf, brackets)
    return (alpha * brackets).sum(-1).masked_fill(ignored, 0.0)


def _rank_weights(weights: RankWeights | Tensor, log_teacher: Tensor, beyond: Tensor | None) -> Tensor:
    """``α`` by rank, shaped like ``log_teacher`` (the teacher's log-probabilities in the order of the ranking)."""
    count = log_teacher.shape[-1]
    if isinstance(weights, Tensor):
        if weights.shape != (count,):
            raise ValueError(f"weights must be {count} numbers, one per rank, got shape {tuple(weights.shape)}")
        if bool((weights < 0).any() | ~torch.isfinite(weights).all()):
            raise ValueError("weights must be finite and >= 0")
        alpha = weights.detach().to(log_teacher).expand_as(log_teacher)
        return alpha if beyond is None else alpha.masked_fill(beyond, 0.0)
    ranks = torch.arange(count, device=log_teacher.device, dtype=log_teacher.dtype)
    if weights == "teacher":
        log_alpha = log_teacher if beyond is None else _log_softmax(log_teacher.masked_fill(beyond, -math.inf))
        return log_alpha.exp()
    if weights == "uniform":
        log_alpha = torch.zeros_like(log_teacher)
    elif weights == "ce":
        log_alpha = torch.where(ranks == 0, 0.0, -math.inf).expand_as(log_teacher)
    elif weights == "position":
        # 2^n - 1 in logs (it overflows beyond a thousand classes): n log 2 + log(1 - 2^-n), -inf at the last rank.
        left = count - 1 - ranks
        log_alpha = (left * math.log(2) + torch.log1p(-torch.exp2(-left))).expand_as(log_teacher)
    else:
        raise ValueError(f"weights must be teacher, uniform, ce, position or a tensor, got '{weights}'")
    if beyond is not None:
        log_alpha = log_alpha.masked_fill(beyond, -math.inf)
    return _log_softmax(log_alpha).exp()


def prepare_pair(
    student: Tensor, teacher: Tensor, targets: Tensor | None, temperature: float, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Checked, in float32 or float64, the teacher detached; rows that do not count are replaced by zeros."""
    for name, logits in (("student_logits", student), ("teacher_logits", teacher)):
        if not logits.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {logits.dtype}")
        if logits.ndim == 0 or logits.shape[-1] == 0:
            raise ValueError(f"{name} must have at least one class in its last dimension, got {tuple(logits.shape)}")
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(
            f"student and teacher must have the same classes, got {student.shape[-1]} and {teacher.shape[-1]}"
        )
    if student.shape != teacher.shape:
        raise ValueError(f"teacher_logits must have the shape {tuple(student.shape)}, got {tuple(teacher.shape)}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be a finite number > 0, got {temperature}")
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    student, teacher = student.to(dtype), teacher.detach().to(dtype)
    if targets is None:
        return student, teacher, torch.zeros(student.shape[:-1], dtype=torch.bool, device=student.device)
    if targets.is_floating_point():
        raise TypeError(f"targets must be class indices (hard), got {targets.dtype}; soft targets have no first choice")
    if targets.shape != student.shape[:-1]:
        raise ValueError(f"targets must have the shape {tuple(student.shape[:-1])}, got {tuple(targets.shape)}")
    ignored = targets == ignore_index
    blank = ignored.unsqueeze(-1)
    return student.masked_fill(blank, 0.0), teacher.masked_fill(blank, 0.0), ignored


def _safe_targets(targets: Tensor, student: Tensor, ignored: Tensor) -> Tensor:
    if targets is None:
        raise TypeError("this loss needs targets (class indices), got None")
    targets = targets.long().masked_fill(ignored, 0)
    check_target_range(targets, student.shape[-1])
    return targets


def _log_softmax(logits: Tensor) -> Tensor:
    return F.log_softmax(logits, dim=-1)


def _finite(log_probs: Tensor) -> Tensor:
    """``-inf`` as a number whose exponential is 0: ``logaddexp`` of two ``-inf`` has no derivative."""
    return log_probs.clamp_min(-1e30)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``Σ p (log p - log q)``, where 0 log 0 is 0 in value and derivative."""
    impossible = log_p == -math.inf
    terms = log_p.masked_fill(impossible, 0.0).exp() * (log_p.masked_fill(impossible, 0.0) - log_q).masked_fill(
        impossible, 0.0
    )
    return terms.masked_fill(impossible, 0.0).sum(-1)


def _correlation(p: Tensor, q: Tensor, counted: Tensor | None = None) -> Tensor:
    """Pearson's correlation along the last dimension, of the entries where ``counted`` is 1; 0 without variance."""
    if counted is None:
        p, q = p - p.mean(-1, keepdim=True), q - q.mean(-1, keepdim=True)
    else:
        number = counted.sum(-1, keepdim=True).clamp_min(1)
        p = (p - (p * counted).sum(-1, keepdim=True) / number) * counted
        q = (q - (q * counted).sum(-1, keepdim=True) / number) * counted
    scale = p.square().sum(-1) * q.square().sum(-1)
    flat = scale.detach() <= torch.finfo(scale.dtype).tiny
    return ((p * q).sum(-1) / scale.masked_fill(flat, 1.0).sqrt()).masked_fill(flat, 0.0)
