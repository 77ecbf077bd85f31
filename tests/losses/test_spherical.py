"""Taylor and spherical softmax against the digest's numbers and plain formulas."""

from __future__ import annotations

import pytest
import torch

from lossmith.losses import spherical_softmax_loss, taylor_softmax_loss

O = torch.tensor([[2, -1, 0.5, 0, -0.5]], dtype=torch.float64)  # noqa: E741
C = torch.tensor([0])


def test_values_are_the_digests() -> None:
    assert taylor_softmax_loss(O, C).item() == pytest.approx(0.5596157879354229, abs=1e-14)
    assert spherical_softmax_loss(O, C, eps=1e-3).item() == pytest.approx(0.3191124402995451, abs=1e-14)


def test_they_are_the_logs_of_their_formulas() -> None:
    o = 3 * torch.randn(20, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    c = torch.arange(20) % 9
    for loss, terms in (
        (taylor_softmax_loss, 1 + o + o**2 / 2),
        (spherical_softmax_loss, o**2 + 1e-2),
    ):
        p = (terms / terms.sum(-1, keepdim=True)).gather(-1, c[:, None])[:, 0]
        torch.testing.assert_close(loss(o, c), -p.log(), rtol=1e-12, atol=1e-12)


def test_the_sign_is_lost_by_one_and_kept_by_the_other() -> None:
    torch.testing.assert_close(spherical_softmax_loss(-O, C), spherical_softmax_loss(O, C))
    assert not torch.allclose(taylor_softmax_loss(-O, C), taylor_softmax_loss(O, C))


def test_squares_do_not_overflow_in_float32() -> None:
    o = torch.tensor([[1e30, -1e30, 1.0]])
    assert taylor_softmax_loss(o, C).item() == pytest.approx(0.6931472, abs=1e-6)
    assert spherical_softmax_loss(o, C).item() == pytest.approx(0.6931472, abs=1e-6)


def test_eps_must_be_positive() -> None:
    with pytest.raises(ValueError, match="eps must be a finite number > 0, got 0"):
        spherical_softmax_loss(O, C, eps=0)
