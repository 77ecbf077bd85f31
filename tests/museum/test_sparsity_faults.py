"""Public faults of pruning while training: the faulty form fails what ours passes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lossmith.sparsity import PruningSchedule, SparsePretraining


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 5)).double()


def test_a_quarter_of_the_steps_is_not_a_quarter_of_the_compute() -> None:
    """At 80 % sparsity half of the steps are cheap: those rules prune much too late."""
    by_steps = PruningSchedule(10_000, 0.8, 2_500, 7_500, 100)
    ours = PruningSchedule.from_compute(10_000, 0.8, interval=100)
    assert by_steps.compute_before(by_steps.start) > 0.45
    assert by_steps.compute_before(by_steps.end) > 0.9
    assert ours.compute_before(ours.start) == pytest.approx(0.25, abs=0.01)
    assert ours.compute_before(ours.end) == pytest.approx(0.75, abs=0.01)


def test_an_amount_given_again_is_a_share_of_what_remains() -> None:
    """``torch.nn.utils.prune`` counts an amount from the weights that are left, so that sparsities multiply."""
    schedule, model = PruningSchedule(20, 0.5, 5, 15, 5), network()
    layers = [(model[0], "weight"), (model[2], "weight")]
    for step in range(20):
        if schedule.prunes_before(step):
            prune.global_unstructured(layers, prune.L1Unstructured, amount=1 - schedule.density(step))
    left = sum(int(layer.weight_mask.sum()) for layer, _ in layers)
    assert left == pytest.approx(0.7937 * 0.62996 * 0.5 * 1000, abs=2)
    ours, sparsity = network(), SparsePretraining(schedule)
    sparsity.attach(ours)
    for step in range(20):
        sparsity.before_step(step)
    assert sparsity.active == 500


def test_weights_put_back_to_zero_without_their_gradients_are_clipped_by_them() -> None:
    """A loop that only zeroes weights after the step counts pruned weights in the norm of the gradient."""
    norms = []
    for masked in (True, False):
        model, sparsity = network(), SparsePretraining(PruningSchedule(5, 0.9, 0, 0))
        sparsity.attach(model)
        sparsity.before_step(0)
        if not masked:
            for hook in sparsity._hooks:
                hook.remove()
        x = torch.randn(16, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (model(x) - 1).square().mean().backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1e9)))
        # The product of weights and masks, which is what is trained.
        masks = sparsity.masks
        values = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        effective = {name: p * masks[name] if name in masks else p for name, p in values.items()}
        (torch.func.functional_call(model, effective, (x,)) - 1).square().mean().backward()
        reference = float(torch.stack([p.grad.norm() for p in values.values() if p.grad is not None]).norm())
        assert (norms[-1] == pytest.approx(reference, rel=1e-12)) == masked
    assert norms[1] > 1.05 * norms[0]
