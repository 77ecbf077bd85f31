"""Faults of training on domains of different size: each check passes with our form and fails with the faulty one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
from torch import Tensor

from lossmith.data import Cooldown, TemperatureSampler, temperature_probabilities
from lossmith.data.weighting import scalarization

SIZES, TAU = [3, 1], 5.0
DOMAINS = torch.tensor([0, 0, 0, 1])
LOSSES = torch.tensor([1.0, 2.0, 3.0, 7.0], dtype=torch.float64)


def test_weights_divided_by_their_sum_in_the_batch_are_another_objective() -> None:
    """The mean over all batches of two is the loss that upsampling minimises, or it is not."""
    p = temperature_probabilities(SIZES, TAU)
    upsampled = float((p / torch.tensor(SIZES))[DOMAINS] @ LOSSES)

    def check(weigh: Callable[[Tensor, Tensor], Tensor]) -> None:
        batches = torch.tensor(list(product(range(4), repeat=2)))
        values = [float(weigh(LOSSES[batch], DOMAINS[batch]) @ LOSSES[batch]) for batch in batches]
        assert sum(values) / len(values) == pytest.approx(upsampled, rel=1e-12)

    ours = scalarization(TAU).for_domains(SIZES)
    check(lambda losses, domains: ours(losses, domains=domains))

    def normalised(losses: Tensor, domains: Tensor) -> Tensor:
        weights = ours(losses, domains=domains)
        return weights / weights.sum()

    with pytest.raises(AssertionError):
        check(normalised)


def test_a_softmax_of_counts_over_the_temperature_ignores_small_domains() -> None:
    def check(probabilities: Callable[[list[int], float], Tensor]) -> None:
        found = [probabilities([unit * size for size in (900, 90, 10)], TAU) for unit in (1, 1000)]
        torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=0)
        assert float(found[0][2]) > 0.01

    check(temperature_probabilities)
    with pytest.raises(AssertionError):
        check(lambda sizes, tau: torch.softmax(torch.tensor(sizes, dtype=torch.float64) / tau, 0))


def test_a_switch_at_what_a_worker_has_fetched_comes_too_early() -> None:
    """Loaders fetch ahead: their position is not the optimiser's step."""
    parts, batch, ahead = [range(90), range(90, 100)], 10, 4

    def check(draw: Callable[[], Iterator[int]]) -> None:
        drawn = torch.tensor(list(draw())) >= 90
        expected = list(TemperatureSampler(parts, float("inf"), total=20 * batch, batch_size=batch, seed=0))
        assert drawn[: 10 * batch].tolist() == (torch.tensor(expected)[: 10 * batch] >= 90).tolist()

    check(lambda: iter(TemperatureSampler(parts, Cooldown(float("inf"), 1), total=200, batch_size=batch, seed=0)))

    class Callbacks(TemperatureSampler):
        """A sampler that a callback tells the step, while four batches are on their way."""

        def __iter__(self) -> Iterator[int]:
            hot = list(TemperatureSampler(parts, float("inf"), total=200, batch_size=batch, seed=0))
            cold = list(TemperatureSampler(parts, 1.0, total=200, batch_size=batch, seed=0))
            told = (10 - ahead) * batch
            yield from [*hot[:told], *cold[told:]]

    with pytest.raises(AssertionError):
        check(lambda: iter(Callbacks(parts, 5.0, total=200, batch_size=batch)))
