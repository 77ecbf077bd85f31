"""What every weighting must do."""

from __future__ import annotations

import pytest
import torch

from lossmith.registry import WEIGHTINGS

every_weighting = pytest.mark.parametrize("name", WEIGHTINGS.names())


def losses(number: int = 16, seed: int = 0) -> torch.Tensor:
    """Positive losses in float64."""
    return 3 * torch.rand(number, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5


@every_weighting
@pytest.mark.parametrize("number", [1, 2, 16, 1000])
@pytest.mark.parametrize("step", [0, 1, 10_000])
@pytest.mark.filterwarnings("ignore:.*batch of one example")
def test_weights_are_not_negative_and_sum_to_one(name: str, number: int, step: int) -> None:
    """At any step and batch size."""
    weights = WEIGHTINGS.build(name)(losses(number), step)
    assert weights.shape == (number,)
    assert (weights >= 0).all()
    assert weights.sum().item() == pytest.approx(1, abs=1e-12)


@every_weighting
def test_weights_carry_no_gradient(name: str) -> None:
    """The gradient of the step is ``sum_i w_i grad l_i`` with constant weights."""
    values = losses().requires_grad_()
    assert not WEIGHTINGS.build(name)(values, 5).requires_grad


@every_weighting
def test_the_order_of_examples_does_not_matter(name: str) -> None:
    """Permuting the losses permutes the weights."""
    values, order = losses(), torch.randperm(16, generator=torch.Generator().manual_seed(1))
    weighting = WEIGHTINGS.build(name)
    torch.testing.assert_close(weighting(values[order], 3), weighting(values, 3)[order], rtol=1e-14, atol=0)


@every_weighting
def test_equal_losses_get_equal_weights(name: str) -> None:
    """Exactly ``1 / batch``."""
    assert torch.equal(WEIGHTINGS.build(name)(torch.full((8,), 2.5), 3), torch.full((8,), 0.125))


@every_weighting
def test_the_same_losses_give_the_same_weights(name: str) -> None:
    """A weighting decides from its batch alone, unless it says that it has memory."""
    weighting = WEIGHTINGS.build(name)
    first = weighting(losses(), 3)
    weighting(losses(seed=9), 4)
    if not getattr(weighting, "has_memory", False):
        assert torch.equal(weighting(losses(), 3), first)
