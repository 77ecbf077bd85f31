"""BPR and binary cross entropy of pairs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lossmith.losses import bpr_loss, implicit_bce_loss

POOL, NEGATIVE = torch.tensor([2, 1.5, -0.5, 0, 1], dtype=torch.float64), torch.tensor([0.2], dtype=torch.float64)


def test_bpr_is_the_digests() -> None:
    expected = (0.152977610526, 0.241008453833, 1.103186048885, 0.798138869382, 0.371100665948)
    torch.testing.assert_close(
        bpr_loss(POOL, NEGATIVE), torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0
    )


def test_bce_is_the_sum_of_both_binary_cross_entropies() -> None:
    expected = F.binary_cross_entropy_with_logits(POOL, torch.ones(5, dtype=torch.float64), reduction="none")
    expected = expected + F.binary_cross_entropy_with_logits(NEGATIVE, torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(implicit_bce_loss(POOL, NEGATIVE), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("loss", [bpr_loss, implicit_bce_loss])
def test_gradients_twice(loss: object) -> None:
    positive, negative = POOL.clone().requires_grad_(), NEGATIVE.clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, (positive, negative))
    assert torch.autograd.gradgradcheck(loss, (positive, negative))


@pytest.mark.parametrize("loss", [bpr_loss, implicit_bce_loss])
def test_large_scores_half_precision_and_empty_batches(loss: object) -> None:
    assert torch.equal(loss(torch.tensor([-1e4]), torch.tensor([1e4])) > 9e3, torch.tensor([True]))  # type: ignore[operator]
    assert loss(torch.tensor([1e4]), torch.tensor([-1e4])).item() == 0  # type: ignore[operator]
    assert loss(torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2)).dtype == torch.float32  # type: ignore[operator]
    assert loss(torch.zeros(0), torch.zeros(0)).shape == (0,)  # type: ignore[operator]
    assert loss(POOL.repeat(3, 1)[:, ::2], NEGATIVE).shape == (3, 3)  # type: ignore[operator]


@pytest.mark.parametrize("loss", [bpr_loss, implicit_bce_loss])
def test_wrong_input(loss: object) -> None:
    with pytest.raises(TypeError, match=r"negative_scores must be floating point, got torch\.int64"):
        loss(torch.zeros(2), torch.zeros(2, dtype=torch.long))  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"broadcast, got \(2,\) and \(3,\)"):
        loss(torch.zeros(2), torch.zeros(3))  # type: ignore[operator]
