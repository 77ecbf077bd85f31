"""Losses over logits and class indices: one value per example, never reduced."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def cross_entropy(
    logits: Float[Tensor, "*batch classes"],
    targets: Int[Tensor, "*batch"],
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    log_partition_penalty: float = 0.0,
) -> Float[Tensor, "*batch"]:
    r"""Cross entropy per example, with label smoothing and the log-partition penalty.

    .. math::
        \ell = \log Z - (1-\varepsilon)\, o_c - \frac{\varepsilon}{C} \sum_k o_k + \lambda (\log Z)^2,
        \qquad \log Z = \log \sum_k e^{o_k}

    Args:
        logits: raw scores ``o``, any floating dtype; half precision is accumulated in float32.
        targets: class indices ``c`` in ``[0, classes)``, or ``ignore_index``.
        ignore_index: examples with this target have loss exactly 0 and gradient exactly 0.
        label_smoothing: ``ε`` in [0, 1): that share of the target is spread evenly over all classes.
        log_partition_penalty: ``λ >= 0``, the coefficient of ``(log Z)²``: what PaLM (Chowdhery et al., 2022,
            arXiv 2204.02311, section 5) and ST-MoE (Zoph et al., 2022, arXiv 2202.08906) call "z-loss";
            PaLM uses 1e-4. Not to be confused with :func:`z_loss`.

    Returns:
        One loss in nats per example, in float32 for half-precision logits and in the dtype of ``logits`` otherwise.

    A logit of ``-inf`` is a class ruled out: its probability and its gradient are 0 (with ``label_smoothing`` the
    loss is ``inf``, as the formula says); a target that is ruled out has loss ``inf``. An empty batch gives an
    empty result.

    Relations:
        ``torch.nn.functional.cross_entropy(..., reduction="none")`` with the penalty added. :func:`focal_loss` with
        ``gamma=0`` is this loss without options.

    >>> cross_entropy(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([0, -100]))
    tensor([0.1269, 0.0000])
    """
    check_class_targets(logits, targets)
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if not (log_partition_penalty >= 0.0 and math.isfinite(log_partition_penalty)):
        raise ValueError(f"log_partition_penalty must be a finite number >= 0, got {log_partition_penalty}")
    logits, targets, ignored = safe_inputs(logits, targets, ignore_index)
    log_partition = torch.logsumexp(logits, dim=-1)
    expected = logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    if label_smoothing:
        expected = (1 - label_smoothing) * expected + label_smoothing * logits.mean(-1)
    loss = log_partition - expected
    if log_partition_penalty:
        loss = loss + log_partition_penalty * log_partition.square()
    return loss.masked_fill(ignored, 0.0)


def focal_loss(
    logits: Float[Tensor, "*batch classes"],
    targets: Int[Tensor, "*batch"],
    *,
    gamma: float = 2.0,
    ignore_index: int = -100,
) -> Float[Tensor, "*batch"]:
    r"""Cross entropy that fades for examples the model already gets right.

    .. math:: \ell = -(1 - p_c)^\gamma \log p_c, \qquad p = \mathrm{softmax}(o)

    Args:
        logits: raw scores ``o``; half precision is accumulated in float32.
        targets: class indices ``c``, or ``ignore_index`` (loss and gradient exactly 0).
        gamma: ``γ >= 0``, how fast the loss fades; 0 is cross entropy, the paper's choice is 2.
        ignore_index: target of examples that do not count.

    Returns:
        One loss in nats per example.

    Source: Lin et al., "Focal Loss for Dense Object Detection", 2017, arXiv 1708.02002, equation 4.

    Relations:
        With ``gamma=0`` this is :func:`cross_entropy`. The class weight α of the paper is a weight per example:
        multiply the result by it.

    >>> focal_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([0]), gamma=2.0)
    tensor([0.0018])
    """
    check_class_targets(logits, targets)
    if not (gamma >= 0.0 and math.isfinite(gamma)):
        raise ValueError(f"gamma must be a finite number >= 0, got {gamma}")
    logits, targets, ignored = safe_inputs(logits, targets, ignore_index)
    log_probs = F.log_softmax(logits, dim=-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    if gamma == 0:
        return (-log_probs).masked_fill(ignored, 0.0)
    # 1 - p = -expm1(log p) keeps its digits when p is near 1; the floor keeps the slope of x^gamma finite at x = 0
    # (for gamma < 1 it is unbounded), where the product with log p is 0 anyway.
    tiny = torch.finfo(log_probs.dtype).tiny
    fade = (-torch.expm1(log_probs)).clamp_min(tiny).pow(gamma)
    return (-fade * log_probs).masked_fill(ignored, 0.0)


def z_loss(
    logits: Float[Tensor, "*batch classes"],
    targets: Int[Tensor, "*batch"],
    *,
    a: float = 1.0,
    b: float = 0.0,
    ignore_index: int = -100,
) -> Float[Tensor, "*batch"]:
    r"""Z-loss: softplus of the standardised target score; unchanged by shifting or scaling the logits.

    .. math::
        \ell = \frac1a \operatorname{softplus}\bigl(a\,(b - z_c)\bigr), \qquad
        z_c = \frac{o_c - \mu}{\sigma}, \quad \mu = \tfrac1C \sum_k o_k, \quad
        \sigma^2 = \tfrac1C \sum_k (o_k - \mu)^2

    Args:
        logits: raw scores ``o``; half precision is accumulated in float32.
        targets: class indices ``c``, or ``ignore_index`` (loss and gradient exactly 0).
        a: sharpness ``a > 0``; large values approach the hinge ``max(0, b - z_c)``.
        b: the standardised score to reach; tunes the loss towards a top-k error.
        ignore_index: target of examples that do not count.

    Returns:
        One loss per example. The loss ranks classes and defines no probabilities, so it is not in nats.

    Where all logits of an example are equal, ``z`` is not defined; it is taken as 0 with gradient 0. A logit of
    ``-inf`` is a class ruled out: it counts neither in the mean nor in the variance; a target ruled out has loss
    ``inf``.

    Source: de Brébisson and Vincent, "The Z-loss: a shift and scale invariant classification loss belonging to the
    Spherical Family", 2016, arXiv 1604.08859.

    Relations:
        Not the "z-loss" of large language models: that is ``cross_entropy(log_partition_penalty=...)``.

    >>> x = torch.tensor([[3.0, 1.0, 2.0]])
    >>> torch.allclose(z_loss(x, torch.tensor([0])), z_loss(10 * x + 5, torch.tensor([0])))
    True
    """
    check_class_targets(logits, targets)
    if not (a > 0 and math.isfinite(a)):
        raise ValueError(f"a must be a finite number > 0, got {a}")
    if not math.isfinite(b):
        raise ValueError(f"b must be a finite number, got {b}")
    logits, targets, ignored = safe_inputs(logits, targets, ignore_index)
    ruled_out = logits == -math.inf
    classes = (~ruled_out).sum(-1, keepdim=True).clamp_min(1)
    logits = logits.masked_fill(ruled_out, 0.0)
    centred = (logits - logits.sum(-1, keepdim=True) / classes).masked_fill(ruled_out, 0.0)
    # Invariance lets us divide by the largest deviation first, so that squares neither overflow nor underflow.
    scale = centred.detach().abs().amax(-1, keepdim=True)
    flat = scale == 0
    centred = centred / scale.masked_fill(flat, 1.0)
    variance = (centred.square().sum(-1, keepdim=True) / classes).masked_fill(flat, 1.0)
    z = (centred / variance.sqrt()).masked_fill(flat, 0.0).masked_fill(ruled_out, -math.inf)
    z = z.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return (F.softplus(a * (b - z)) / a).masked_fill(ignored, 0.0)


def check_class_targets(logits: Tensor, targets: Tensor) -> None:
    """Types and shapes of logits and class indices."""
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    if targets.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"targets must be integer class indices, got {targets.dtype}")
    if logits.ndim == 0 or logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets must have the shape of logits without the last dimension, {tuple(logits.shape[:-1])}, "
            f"got {tuple(targets.shape)}"
        )
    if logits.shape[-1] == 0:
        raise ValueError("logits must have at least one class, got 0")


def check_target_range(targets: Int[Tensor, "*batch"], classes: int) -> None:
    """Name the first class index that does not exist.

    Only on a CPU and outside of ``torch.func`` and ``torch.compile``: looking at values would stop a GPU's queue.
    """
    if targets.device.type != "cpu" or torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling():
        return
    if targets.numel() and (int(targets.min()) < 0 or int(targets.max()) >= classes):
        place = ((targets < 0) | (targets >= classes)).nonzero()[0]
        value = int(targets[tuple(place)])
        raise ValueError(f"targets must be in [0, {classes}), got {value} at index {tuple(place.tolist())}")


def safe_inputs(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 for half precision; ignored rows replaced by zeros, so that not even their NaN can reach a gradient."""
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    ignored = targets == ignore_index
    targets = targets.long().masked_fill(ignored, 0)
    check_target_range(targets, logits.shape[-1])
    return logits.masked_fill(ignored.unsqueeze(-1), 0.0), targets, ignored
