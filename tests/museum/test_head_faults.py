"""Faults of public losses and fused heads: each check passes with ours and fails with the faulty form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lossmith.heads import linear_loss
from lossmith.losses import cross_entropy

Head = Callable[[Tensor, Tensor, Tensor], Tensor]


def layer() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    return hidden, weight, torch.randint(9, (6,), generator=generator)


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return linear_loss("cross_entropy", hidden, weight, targets, chunk_size=4)


class _GradientInForward(torch.autograd.Function):
    """Cross entropy whose gradients are taken in the forward pass, as fused heads do."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, smallest: float) -> Tensor:
        logits = hidden @ weight.T
        slope = logits.softmax(-1)
        slope = slope.masked_fill(slope < smallest, 0.0) - F.one_hot(targets, logits.shape[-1])
        ctx.save_for_backward(slope @ weight, slope.T @ hidden)
        return F.cross_entropy(logits, targets, reduction="none")

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        by_hidden, by_weight = ctx.saved_tensors
        return by_hidden * upstream[0][0], by_weight * upstream[0][0], None, None  # the first row's weight, for all


def check_weighted_rows(head: Head) -> None:
    """Gradients under different weights per row are those of the plain computation."""
    hidden, weight, targets = layer()
    row_weights = torch.linspace(0.1, 1, 6, dtype=torch.float64)
    losses = head(hidden, weight, targets)
    assert losses.shape == (6,)
    plain = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    torch.testing.assert_close(losses, plain, rtol=1e-12, atol=0)
    found = torch.autograd.grad((row_weights * losses).sum(), (hidden, weight))
    expected = torch.autograd.grad((row_weights * plain).sum(), (hidden, weight))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_first_rows_weight_must_not_scale_every_rows_gradient() -> None:
    """The losses look right; only the gradients are wrong."""
    check_weighted_rows(ours)
    with pytest.raises(AssertionError, match="Tensor-likes"):
        check_weighted_rows(lambda *inputs: _GradientInForward.apply(*inputs, 0.0))


def test_no_reduction_means_one_loss_per_row() -> None:
    check_weighted_rows(ours)
    with pytest.raises(AssertionError):
        check_weighted_rows(lambda h, w, t: F.cross_entropy(h @ w.T, t))  # reduces all the same
    with pytest.raises(AssertionError, match="Tensor-likes"):
        # Values right, gradients zero.
        check_weighted_rows(lambda h, w, t: 0 * h.sum() * w.sum() + F.cross_entropy(h @ w.T, t, reduction="none").data)


def test_skipping_small_probabilities_changes_the_gradient() -> None:
    """Equal weights, so that only the skipped entries differ: fine for bfloat16, not exact."""

    def check(head: Head) -> None:
        hidden, weight, targets = layer()
        losses = head(hidden, weight, targets)
        (found,) = torch.autograd.grad(losses.sum(), weight)
        (expected,) = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, targets, reduction="sum"), weight)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)

    check(ours)
    check(lambda *inputs: _GradientInForward.apply(*inputs, 0.0))
    with pytest.raises(AssertionError):
        check(lambda *inputs: _GradientInForward.apply(*inputs, 2.0**-5))


def test_an_ignored_row_of_nan_must_not_reach_a_gradient() -> None:
    def check(head: Head) -> None:
        hidden, weight, targets = layer()
        targets[2] = -100
        poisoned = hidden.detach().clone()
        poisoned[2] = torch.nan
        poisoned.requires_grad_()
        losses = head(poisoned, weight, targets)
        gradients = torch.autograd.grad(losses.sum(), (poisoned, weight))
        assert losses[2] == 0
        assert torch.equal(gradients[0][2], torch.zeros(4, dtype=torch.float64))
        assert torch.isfinite(gradients[1]).all()

    check(ours)
    with pytest.raises(AssertionError):  # the gradient of the layer is NaN even where the loss is 0
        check(lambda h, w, t: cross_entropy(h @ w.T, t))
    with pytest.raises(AssertionError):  # 0 * NaN
        check(lambda h, w, t: F.cross_entropy(h @ w.T, t.clamp_min(0), reduction="none") * (t != -100))


def test_a_power_of_zero_must_not_give_an_infinite_gradient() -> None:
    """(1 - p)^gamma with gamma < 1 at p = 1: the formula's naive gradient is infinity times zero."""
    from lossmith.losses import focal_loss

    def check(loss: Callable[..., Tensor]) -> None:
        logits = torch.tensor([[1000.0, 0.0]], dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(loss(logits, torch.tensor([0])).sum(), logits)
        assert torch.isfinite(gradient).all()

    def naive(logits: Tensor, targets: Tensor) -> Tensor:
        log_p = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        return -((1 - log_p.exp()) ** 0.5) * log_p

    check(lambda logits, targets: focal_loss(logits, targets, gamma=0.5))
    with pytest.raises(AssertionError):
        check(naive)
