"""Logit-level distillation losses against the digest's numbers and torch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from lossmith.losses import binary_kl, binary_kl_norm, distillation_kl

S = torch.tensor([[1, 0, -1], [0.5, 2, -0.5]], dtype=torch.float64)
T = torch.tensor([[2, -1, 0], [0, 3, -2]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("temperature", "plain", "norm"),
    [
        (1.0, 0.26418925654946035, 0.3848269644380392),
        (2.0, 0.35394760972425715, 0.40047055870899706),
        (4.0, 0.3913456133974937, 0.4047751649016943),
    ],
)
def test_values_are_the_digests(temperature: float, plain: float, norm: float) -> None:
    assert binary_kl(S, T, temperature=temperature).mean().item() == pytest.approx(plain, abs=1e-12)
    assert binary_kl_norm(S, T, temperature=temperature).mean().item() == pytest.approx(norm, abs=1e-12)


def test_gradients_are_the_digests() -> None:
    expected = {
        binary_kl: [[-0.1085992474, 0.1224593312, -0.1224593312], [0.0621765009, -0.0865158976, 0.1688820777]],
        binary_kl_norm: [[-0.1224593312, 0.1224593312, -0.1224593312], [0.0621765009, -0.1224593312, 0.1791786992]],
    }
    for loss, values in expected.items():
        s = S.clone().requires_grad_()
        loss(s, T).mean().backward()
        torch.testing.assert_close(s.grad, torch.tensor(values, dtype=torch.float64), rtol=1e-8, atol=1e-9)


def test_binary_kl_is_binary_cross_entropy_less_the_teachers_entropy() -> None:
    p = (T / 2).sigmoid()
    entropy = -(p * p.log() + (1 - p) * (1 - p).log())
    expected = 4 * (F.binary_cross_entropy_with_logits(S / 2, p, reduction="none") - entropy).sum(-1)
    torch.testing.assert_close(binary_kl(S, T), expected, rtol=1e-12, atol=1e-12)


def test_a_difference_that_softmax_cannot_see_is_seen() -> None:
    teacher = torch.tensor([[2.0, 3, 4]], dtype=torch.float64)
    assert distillation_kl(teacher - 4, teacher).item() == pytest.approx(0, abs=1e-12)
    assert binary_kl(teacher - 4, teacher).item() == pytest.approx(4.790972565269556, abs=1e-10)
    assert binary_kl_norm(teacher - 4, teacher).item() == pytest.approx(5.205369965796326, abs=1e-10)


def test_only_the_difference_counts_for_the_normalised_form() -> None:
    shift = torch.tensor([[3.0, -7, 1], [2, 2, 9]], dtype=torch.float64)
    torch.testing.assert_close(binary_kl_norm(S + shift, T + shift), binary_kl_norm(S, T))
    torch.testing.assert_close(binary_kl_norm(T, S), binary_kl_norm(S, T))
    assert not torch.allclose(binary_kl(T, S), binary_kl(S, T))


@pytest.mark.parametrize("loss", [binary_kl, binary_kl_norm])
def test_agreement_is_zero_in_value_and_gradient(loss: object) -> None:
    s = T.clone().requires_grad_()
    value = loss(s, T)  # type: ignore[operator]
    (gradient,) = torch.autograd.grad(value.sum(), s)
    assert value.abs().max() < 1e-15
    assert gradient.abs().max() < 1e-15


@pytest.mark.parametrize("loss", [binary_kl, binary_kl_norm])
def test_high_temperature_is_an_eighth_of_the_squared_difference(loss: object) -> None:
    value = loss(S, T, temperature=1e3).mean().item()  # type: ignore[operator]
    assert value == pytest.approx(((S - T).square().sum() / 8 / 2).item(), rel=1e-5)


def test_large_differences_stay_finite_in_float32() -> None:
    """The published fault: clamped probabilities are infinite there."""
    s = torch.tensor([[40.0]], requires_grad=True)
    value = binary_kl_norm(s, torch.zeros(1, 1), temperature=1.0)
    value.sum().backward()
    assert value.item() == pytest.approx(19.306852819440056, rel=1e-6)
    assert s.grad.item() == pytest.approx(0.5)
    clamped = (16.0 * torch.ones(1)).sigmoid().clamp(1e-8, 1 - 1e-8)
    faulty = math.log(0.5) - 0.5 * (clamped.log() + (1 - clamped).log())
    assert abs(faulty.item() - 7.307) > 0.02
    assert binary_kl_norm(torch.tensor([[16.0]]), torch.zeros(1, 1), temperature=1.0).item() == pytest.approx(
        16 / 2 - math.log(2), abs=1e-4
    )
