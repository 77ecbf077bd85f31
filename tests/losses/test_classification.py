"""The losses against closed forms; what every loss must do is in lossmith.testing."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lossmith.losses import cross_entropy, focal_loss, z_loss

X = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
T = torch.tensor([0, 8, 3, 3, 5, 1])


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_cross_entropy_is_torchs_with_label_smoothing(smoothing: float) -> None:
    expected = F.cross_entropy(X, T, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(cross_entropy(X, T, label_smoothing=smoothing), expected, rtol=1e-13, atol=1e-13)


def test_log_partition_penalty_adds_its_square() -> None:
    expected = F.cross_entropy(X, T, reduction="none") + 0.01 * torch.logsumexp(X, -1) ** 2
    torch.testing.assert_close(cross_entropy(X, T, log_partition_penalty=0.01), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
def test_focal_loss_is_its_formula(gamma: float) -> None:
    p = torch.softmax(X, -1)[torch.arange(6), T]
    torch.testing.assert_close(focal_loss(X, T, gamma=gamma), -((1 - p) ** gamma) * p.log(), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_focal_loss_of_a_certain_prediction_has_a_finite_gradient(gamma: float) -> None:
    x = torch.tensor([[200.0, 0.0]], requires_grad=True)
    loss = focal_loss(x, torch.tensor([0]), gamma=gamma)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert loss.item() == pytest.approx(0, abs=1e-30)
    assert torch.isfinite(gradient).all()


def test_focal_loss_with_gamma_0_is_cross_entropy() -> None:
    torch.testing.assert_close(focal_loss(X, T, gamma=0.0), cross_entropy(X, T), rtol=1e-13, atol=1e-13)


def test_z_loss_is_its_formula() -> None:
    z = (X - X.mean(-1, keepdim=True)) / X.std(-1, unbiased=False, keepdim=True)
    expected = F.softplus(0.3 * (4.0 - z[torch.arange(6), T])) / 0.3
    torch.testing.assert_close(z_loss(X, T, a=0.3, b=4.0), expected, rtol=1e-12, atol=1e-12)


def test_z_loss_gradient_is_the_derived_one() -> None:
    a, b, classes = 0.7, 2.0, X.shape[1]
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(z_loss(x, T, a=a, b=b).sum(), x)
    sigma = X.std(-1, unbiased=False, keepdim=True)
    z = (X - X.mean(-1, keepdim=True)) / sigma
    zc = z.gather(-1, T[:, None])
    p = torch.sigmoid(a * (b - zc))
    expected = p / (classes * sigma) * (1 + zc * z) - F.one_hot(T, classes) * p / sigma
    torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-13)


def test_z_loss_is_unchanged_by_shift_and_scale() -> None:
    for scale, shift in ((1e-6, 0.0), (1e6, -3e7), (3.0, 100.0)):
        torch.testing.assert_close(z_loss(scale * X + shift, T), z_loss(X, T), rtol=1e-7, atol=1e-9)


def test_z_loss_stays_between_its_bounds() -> None:
    bound = math.sqrt(X.shape[1] - 1)
    best = torch.zeros(1, 9, dtype=torch.float64)
    best[0, 4] = 1
    low = F.softplus(torch.tensor(-bound, dtype=torch.float64))
    torch.testing.assert_close(z_loss(best, torch.tensor([4])), low[None], rtol=1e-12, atol=1e-12)
    assert (z_loss(X, T) >= low).all()


def test_z_loss_of_equal_logits_is_defined() -> None:
    x = torch.full((1, 5), 3.0, requires_grad=True)
    loss = z_loss(x, torch.tensor([2]), a=1.0, b=1.0)
    assert loss.item() == pytest.approx(math.log1p(math.e))
    assert not torch.autograd.grad(loss.sum(), x)[0].any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cross_entropy(X, T, label_smoothing=1.0), r"label_smoothing must be in \[0, 1\), got 1.0"),
        (lambda: cross_entropy(X, T, log_partition_penalty=-1), "log_partition_penalty must be"),
        (lambda: focal_loss(X, T, gamma=-0.1), "gamma must be a finite number >= 0, got -0.1"),
        (lambda: z_loss(X, T, a=0.0), "a must be a finite number > 0"),
        (lambda: z_loss(X, T, b=math.inf), "b must be a finite number"),
    ],
)
def test_options_out_of_range_are_named(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
