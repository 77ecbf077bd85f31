"""What every weighting must do."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from lossmith.registry import WEIGHTINGS

every_weighting = pytest.mark.parametrize("name", WEIGHTINGS.names())


def losses(number: int = 16, seed: int = 0) -> torch.Tensor:
    """Positive losses in float64."""
    return 3 * torch.rand(number, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5


def built(name: str, number: int = 16) -> Any:
    """With its defaults; one that weighs by domain gets a batch that is all of one domain."""
    weighting = WEIGHTINGS.build(name)
    if not getattr(weighting, "by_domain", False):
        return weighting
    return functools.partial(weighting.for_domains([100], 20_000), domains=torch.zeros(number, dtype=torch.long))


@every_weighting
@pytest.mark.parametrize("number", [1, 2, 16, 1000])
@pytest.mark.parametrize("step", [0, 1, 10_000])
@pytest.mark.filterwarnings("ignore:.*batch of one example")
def test_weights_are_not_negative_and_sum_to_one(name: str, number: int, step: int) -> None:
    """At any step and batch size."""
    weights = built(name, number)(losses(number), step)
    assert weights.shape == (number,)
    assert (weights >= 0).all()
    assert weights.sum().item() == pytest.approx(1, abs=1e-12)


@every_weighting
def test_weights_carry_no_gradient(name: str) -> None:
    """The gradient of the step is ``sum_i w_i grad l_i`` with constant weights."""
    values = losses().requires_grad_()
    assert not built(name)(values, 5).requires_grad


@every_weighting
def test_the_order_of_examples_does_not_matter(name: str) -> None:
    """Permuting the losses permutes the weights."""
    values, order = losses(), torch.randperm(16, generator=torch.Generator().manual_seed(1))
    weighting = built(name)
    torch.testing.assert_close(weighting(values[order], 3), weighting(values, 3)[order], rtol=1e-14, atol=0)


@every_weighting
def test_equal_losses_get_equal_weights(name: str) -> None:
    """Exactly ``1 / batch``."""
    assert torch.equal(built(name, 8)(torch.full((8,), 2.5), 3), torch.full((8,), 0.125))


@every_weighting
def test_the_same_losses_give_the_same_weights(name: str) -> None:
    """A weighting decides from its batch alone, unless it says that it has memory."""
    weighting = built(name)
    first = weighting(losses(), 3)
    weighting(losses(seed=9), 4)
    if not getattr(weighting, "has_memory", False):
        assert torch.equal(weighting(losses(), 3), first)


@every_weighting
def test_weights_by_domain_sum_to_one_over_all_the_data(name: str) -> None:
    """In a batch with the data's own proportions; examples of a domain count the same."""
    weighting = WEIGHTINGS.build(name)
    if not getattr(weighting, "by_domain", False):
        return
    domains = torch.tensor([0] * 90 + [1] * 9 + [3])
    weights = weighting.for_domains([90, 9, 0, 1], 20_000)(losses(100), 3, domains=domains)
    assert weights.sum().item() == pytest.approx(1, abs=1e-12)
    assert all(len(weights[domains == number].unique()) == 1 for number in (0, 1, 3))
