"""Distillation losses that compare the level of every logit, which softmax cannot see."""

from __future__ import annotations

import math

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lossmith.losses.distillation import prepare_pair


def binary_kl(
    student_logits: Float[Tensor, "*batch classes"],
    teacher_logits: Float[Tensor, "*batch classes"],
    targets: Int[Tensor, "*batch"] | None = None,
    *,
    temperature: float = 2.0,
    ignore_index: int = -100,
) -> Float[Tensor, "*batch"]:
    r"""BinaryKL: one yes-or-no divergence per class, summed.

    .. math::
        \ell = \tau^2 \sum_k \mathrm{KL}\bigl(\mathrm{Bern}(\sigma(t_k/\tau))
        \,\|\, \mathrm{Bern}(\sigma(s_k/\tau))\bigr)

    Args:
        student_logits: ``s``; half precision is computed in float32.
        teacher_logits: ``t``, same shape; constants.
        targets: only to skip rows with ``ignore_index``.
        temperature: ``τ > 0``.
        ignore_index: target of rows that do not count.

    Returns:
        One value per example, *summed* over classes; 0 exactly where ``s = t``. Unlike
        :func:`lossmith.losses.distillation_kl` it notices a constant added to all logits.

    Source: Yang et al., "Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary Head", 2024,
    arXiv 2411.08937.

    >>> import torch
    >>> binary_kl(torch.tensor([[-2.0, -1.0, 0.0]]), torch.tensor([[2.0, 3.0, 4.0]]))
    tensor([4.7910])
    """
    student, teacher, ignored = prepare_pair(student_logits, teacher_logits, targets, temperature, ignore_index)
    s, t = student / temperature, teacher / temperature
    # KL = σ(t)(t - s) + softplus(s) - softplus(t): no logarithm of a rounded probability. As a function of s it is
    # softplus(s) - softplus(t) - σ(t)(s - t), never negative but for rounding.
    divergence = F.softplus(s) - F.softplus(t) - t.sigmoid() * (s - t)
    return (temperature**2 * divergence.sum(-1)).masked_fill(ignored, 0.0)


def binary_kl_norm(
    student_logits: Float[Tensor, "*batch classes"],
    teacher_logits: Float[Tensor, "*batch classes"],
    targets: Int[Tensor, "*batch"] | None = None,
    *,
    temperature: float = 2.0,
    ignore_index: int = -100,
) -> Float[Tensor, "*batch"]:
    r"""BinaryKL-Norm: both logits shifted so that the teacher's is 0, which is a log-cosh regression of the difference.

    .. math::
        \ell = \tau^2 \sum_k \mathrm{KL}\bigl(\mathrm{Bern}(\tfrac12) \,\|\,
        \mathrm{Bern}(\sigma(\tfrac{s_k - t_k}{\tau}))\bigr)
        = \tau^2 \sum_k \log\cosh \frac{s_k - t_k}{2\tau}

    Near 0 it is ``(s-t)²/8`` per class, far away ``τ|s-t|/2 - τ² log 2``: the gradient is bounded by ``τ/2`` and
    depends on the difference only, where that of :func:`binary_kl` fades for large logits of the teacher.

    Arguments and shapes as in :func:`binary_kl`. Finite for any finite logits in float32: the published code clamps
    rounded probabilities and gives ``inf`` once ``(s-t)/τ`` exceeds about 17.

    Source: Yang et al., 2024, arXiv 2411.08937 (DHKD's own loss; closed form derived from it).

    >>> import torch
    >>> binary_kl_norm(torch.tensor([[40.0]]), torch.tensor([[0.0]]), temperature=1.0)
    tensor([19.3069])
    """
    student, teacher, ignored = prepare_pair(student_logits, teacher_logits, targets, temperature, ignore_index)
    half = (student - teacher) / (2 * temperature)
    # log cosh x = |x| + log(1 + e^(-2|x|)) - log 2 = softplus(2x) - x - log 2, smooth at 0.
    values = F.softplus(2 * half) - half - math.log(2)
    return (temperature**2 * values.sum(-1)).masked_fill(ignored, 0.0)
