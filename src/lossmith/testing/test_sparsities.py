"""What everything that ``weights=`` names must do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from lossmith.registry import SPARSITIES
from lossmith.training.models import build_model

STEPS = 12

every_sparsity = pytest.mark.parametrize("name", SPARSITIES.names())


def run(name: str, steps: range, state: Any = None) -> tuple[torch.nn.Module, Any, Any]:
    """A small language model, trained for some of its steps on fixed tokens; continued from ``state``."""
    torch.manual_seed(0)
    model = build_model("nano", vocab_size=64, sequence_length=16)
    sparsity = SPARSITIES.build(name)
    sparsity.attach(model, STEPS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if state is not None:
        model.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
        if hasattr(sparsity, "load_state"):
            sparsity.load_state(state[2])
    generator = torch.Generator().manual_seed(1)
    data = torch.randint(64, (STEPS, 4, 16), generator=generator)
    for step in steps:
        if hasattr(sparsity, "before_step"):
            sparsity.before_step(step)
        optimizer.zero_grad()
        model(input_ids=data[step], labels=data[step]).loss.backward()
        optimizer.step()
        if hasattr(sparsity, "after_step"):
            sparsity.after_step()
    kept = sparsity.state() if hasattr(sparsity, "state") else None
    return model, copy.deepcopy((model.state_dict(), optimizer.state_dict(), kept)), sparsity


@every_sparsity
def test_every_weight_that_is_trained_stays_finite_and_something_is_learned(name: str) -> None:
    """The model changes, and no weight becomes NaN or infinite."""
    before, _, _ = run(name, range(0))
    after, _, _ = run(name, range(STEPS))
    assert all(bool(torch.isfinite(p).all()) for p in after.parameters())
    moved = [not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)]
    assert any(moved)


@every_sparsity
@pytest.mark.parametrize("stop", [1, STEPS // 2, STEPS - 1])
def test_a_run_that_is_interrupted_continues_to_the_same_bits(name: str, stop: int) -> None:
    """Weights, optimiser and ``state()`` are all that a checkpoint needs."""
    whole, _, _ = run(name, range(STEPS))
    _, state, _ = run(name, range(stop))
    resumed, _, _ = run(name, range(stop, STEPS), state)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@every_sparsity
def test_pruned_weights_are_zeros_that_are_counted(name: str) -> None:
    """Where a sparsity says how many weights are active, so many are not zero."""
    model, _, sparsity = run(name, range(STEPS))
    if not hasattr(sparsity, "masks"):
        pytest.skip(f"{name} has no masks")
    masks = sparsity.masks
    assert sum(int(mask.sum()) for mask in masks.values()) == sparsity.active
    for full, mask in masks.items():
        assert not model.get_parameter(full)[~mask].any()
    assert 0 < sparsity.active <= sparsity.average_parameters(STEPS) <= sparsity.number
