"""Pruning in a loop of one's own: the trajectory of masked weights, gradients, moments, counting, checkpoints."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from lossmith.errors import InputError
from lossmith.sparsity import ComputeSchedule, Dense, PruningSchedule, SparsePretraining, dense, sparse_pretraining

SCHEDULE = PruningSchedule(steps=30, sparsity=0.6, start=6, end=18, interval=4)


def network(seed: int = 0, width: int = 16) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3)).double()


def batches(number: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(8, 6, generator=generator, dtype=torch.float64) for _ in range(number)]


def train(
    model: nn.Module,
    sparsity: SparsePretraining,
    optimizer: torch.optim.Optimizer,
    steps: range,
    watch: Callable[[int], None] = lambda step: None,
) -> None:
    data = batches(steps.stop)
    for step in steps:
        sparsity.before_step(step)
        optimizer.zero_grad()
        (model(data[step]).square().mean() + model(data[step]).sum() / 99).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        watch(step)
        optimizer.step()
        sparsity.after_step()


OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.3),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.3, momentum=0.9, weight_decay=0.01),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.02),
}


@pytest.mark.parametrize("name", ["adamw", "momentum"])
def test_the_trajectory_is_that_of_weights_times_masks(name: str) -> None:
    """The released code keeps stored weights and multiplies by the mask in the forward pass."""
    ours, theirs = network(), network()
    sparsity = SparsePretraining(SCHEDULE)
    sparsity.attach(ours)
    optimizer = OPTIMIZERS[name](ours.parameters())
    layers = [(theirs[0], "weight"), (theirs[2], "weight")]
    for layer, _ in layers:
        prune.identity(layer, "weight")
    reference = OPTIMIZERS[name](theirs.parameters())
    data = batches(30)
    for step in range(30):
        if SCHEDULE.prunes_before(step):
            for (layer, _), mask in zip(layers, reference_masks(theirs, SCHEDULE.density(step)), strict=True):
                layer.weight_mask.copy_(mask)
        reference.zero_grad()
        (theirs(data[step]).square().mean() + theirs(data[step]).sum() / 99).backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.05)
        reference.step()
        train(ours, sparsity, optimizer, range(step, step + 1))
        for mine, (layer, _) in zip((ours[0], ours[2]), layers, strict=True):
            expected = layer.weight_orig * layer.weight_mask
            torch.testing.assert_close(mine.weight, expected, rtol=1e-12, atol=1e-14)
            assert torch.equal(mine.weight == 0, layer.weight_mask == 0)
    assert sparsity.active == 57


def reference_masks(model: nn.Sequential, density: float) -> list[Tensor]:
    """Sort everything; the element at n - kept is the threshold; masks only shrink."""
    layers = [model[0], model[2]]
    scores = [(layer.weight_orig * layer.weight_mask).detach().abs() for layer in layers]
    ascending = torch.cat([score.flatten() for score in scores]).sort().values
    threshold = ascending[len(ascending) - int(density * len(ascending) + 1e-6)]
    return [(s >= threshold).double() * layer.weight_mask for s, layer in zip(scores, layers, strict=True)]


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_pruned_weights_get_no_gradient_and_stay_zero(name: str) -> None:
    model, sparsity = network(), SparsePretraining(SCHEDULE)
    sparsity.attach(model)
    seen: list[int] = []

    def watch(step: int) -> None:
        for key, mask in sparsity.masks.items():
            gradient = model.get_parameter(key).grad
            assert gradient is not None
            assert not gradient[~mask].any()
            assert gradient[mask].any()
        seen.append(int(sum((p == 0).sum() for p in model.parameters() if p.ndim == 2)))

    train(model, sparsity, OPTIMIZERS[name](model.parameters()), range(30), watch)
    # 144 weights; the density falls by the fourth root of 0.4 each time.
    assert sparsity.events == [(6, 114), (10, 91), (14, 72), (18, 57)]
    assert seen == [0] * 6 + [30] * 4 + [53] * 4 + [72] * 4 + [87] * 12


def test_moments_of_pruned_weights_decay_to_zero() -> None:
    model, sparsity = network(), SparsePretraining(PruningSchedule(400, 0.5, 5, 5))
    sparsity.attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    train(model, sparsity, optimizer, range(400))
    for name, mask in sparsity.masks.items():
        state = optimizer.state[model.get_parameter(name)]
        assert state["exp_avg"][~mask].abs().max() < 1e-15
        assert state["exp_avg_sq"][~mask].max() < 1e-8 * state["exp_avg_sq"][mask].max()
        assert not model.get_parameter(name)[~mask].any()


def test_gradients_of_live_weights_are_right_in_float64() -> None:
    model, sparsity = network(width=4), SparsePretraining(PruningSchedule(3, 0.5, 0, 0))
    sparsity.attach(model)
    sparsity.before_step(0)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: model(x), (x,))
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    masks = sparsity.masks
    masked = {name: p * masks[name] if name in masks else p for name, p in parameters.items()}
    torch.func.functional_call(model, masked, (x,)).square().sum().backward()
    model(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, parameters[name].grad, rtol=1e-13, atol=1e-14)


def test_the_average_is_over_all_steps() -> None:
    model, sparsity = network(), SparsePretraining(SCHEDULE)
    sparsity.attach(model)
    counts: list[int] = []
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    train(model, sparsity, optimizer, range(30), lambda step: counts.append(sparsity.active))
    assert sparsity.average_parameters() == pytest.approx(sum(counts) / 30, rel=1e-14)
    assert sparsity.average_parameters(8) == pytest.approx(sum(counts[:8]) / 8, rel=1e-14)
    assert sparsity.average_parameters() == pytest.approx(SCHEDULE.average_parameters(144), rel=1e-14)
    densities = sparsity.densities()
    assert sum(densities[n] * model.get_parameter(n).numel() for n in densities) == pytest.approx(57)


def test_a_dense_schedule_changes_nothing() -> None:
    plain, pruned = network(), network()
    sparsity = SparsePretraining(PruningSchedule(30, 0.0, 5, 20, 5))
    sparsity.attach(pruned)
    train(pruned, sparsity, OPTIMIZERS["adamw"](pruned.parameters()), range(30))
    other = SparsePretraining(PruningSchedule(30, 0.5, 29, 29))
    other.attach(plain)
    train(plain, other, OPTIMIZERS["adamw"](plain.parameters()), range(29))
    again = network()
    third = SparsePretraining(PruningSchedule(30, 0.0, 0, 0))
    third.attach(again)
    train(again, third, OPTIMIZERS["adamw"](again.parameters()), range(29))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), again.parameters(), strict=True))
    assert sparsity.average_parameters() == sparsity.active == 144
    assert isinstance(dense(), Dense)


@pytest.mark.parametrize("stop", [0, 3, 6, 7, 14, 18, 25])
def test_a_resumed_run_has_the_same_bits(stop: int) -> None:
    model, sparsity = network(), SparsePretraining(SCHEDULE)
    sparsity.attach(model)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    train(model, sparsity, optimizer, range(stop))
    # A live weight that is zero by chance must not be taken for a pruned one.
    with torch.no_grad():
        live = sparsity.masks["0.weight"].nonzero()[0]
        model[0].weight[tuple(live)] = 0.0
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), sparsity.state()))
    train(model, sparsity, optimizer, range(stop, 30))
    fresh, resumed = network(seed=5), SparsePretraining(SCHEDULE)
    fresh.load_state_dict(saved[0])
    resumed.attach(fresh)
    resumed.load_state(saved[2])
    other = OPTIMIZERS["adamw"](fresh.parameters())
    other.load_state_dict(saved[1])
    train(fresh, resumed, other, range(stop, 30))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))
    assert resumed.events == sparsity.events
    assert resumed.average_parameters() == sparsity.average_parameters()


def test_asking_twice_for_a_step_prunes_once_and_missed_prunings_are_made_up_for() -> None:
    model, sparsity = network(), SparsePretraining(SCHEDULE)
    sparsity.attach(model)
    for _ in range(3):
        sparsity.before_step(6)
    assert sparsity.events == [(6, 114)]
    sparsity.before_step(29)
    assert sparsity.active == 57
    assert [step for step, _ in sparsity.events] == [6, 29, 29, 29]


def test_random_scores_are_a_control_that_ignores_magnitude() -> None:
    masks = []
    for scale in (1.0, -7.0):
        model, sparsity = network(), SparsePretraining(SCHEDULE, score="random", seed=3)
        with torch.no_grad():
            model[0].weight.mul_(scale)
        sparsity.attach(model)
        for step in range(30):
            sparsity.before_step(step)
        masks.append(sparsity.masks)
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])
    assert sum(int(mask.sum()) for mask in masks[0].values()) == 57


def test_two_of_four_in_a_run() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).double()
    sparsity = SparsePretraining(PruningSchedule(20, 0.5, 4, 10, 3), structure="2:4")
    sparsity.attach(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for step in range(20):
        sparsity.before_step(step)
        optimizer.zero_grad()
        model(torch.randn(6, 8, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
        sparsity.after_step()
    assert all((mask.reshape(-1, 4).sum(-1) == 2).all() for mask in sparsity.masks.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_pruned_to_the_number(dtype: torch.dtype) -> None:
    model, sparsity = network().to(dtype), SparsePretraining(SCHEDULE)
    sparsity.attach(model)
    sparsity.before_step(29)
    assert sum(int((p != 0).sum()) for p in model.parameters() if p.ndim == 2) == sparsity.active == 57


def test_letting_go_leaves_the_model_and_its_gradients_alone() -> None:
    model, sparsity = network(), SparsePretraining(SCHEDULE)
    sparsity.attach(model)
    sparsity.before_step(29)
    sparsity.detach()
    model(batches(1)[0]).sum().backward()
    assert (model[2].weight == 0).any()
    assert model[2].weight.grad is not None
    assert model[2].weight.grad.all()
    assert not sparsity.attached


def test_mistakes_are_named() -> None:
    sparsity = SparsePretraining(ComputeSchedule(0.5))
    with pytest.raises(ValueError, match="attach a model first"):
        sparsity.before_step(0)
    with pytest.raises(ValueError, match="needs the number of steps"):
        sparsity.attach(network())
    sparsity.attach(network(), 100)
    with pytest.raises(ValueError, match="has a model already"):
        sparsity.attach(network(), 100)
    with pytest.raises(ValueError, match="the schedule is for 30 steps, the run has 31"):
        SparsePretraining(SCHEDULE).attach(network(), 31)
    with pytest.raises(ValueError, match=r"2:4 leaves 0.5 of the weights; sparsity must be at most 0.5, got 0.6"):
        SparsePretraining(SCHEDULE, structure="2:4")
    with pytest.raises(ValueError, match=r"0.weight has 6 inputs, not a multiple of 4"):
        SparsePretraining(PruningSchedule(9, 0.5, 1, 1), structure="2:4").attach(network())
    with pytest.raises(InputError, match="no linear layer to prune"):
        SparsePretraining(SCHEDULE).attach(nn.Embedding(3, 3))
    with pytest.raises(TypeError, match="schedule must be a PruningSchedule or ComputeSchedule, got float"):
        SparsePretraining(0.5)  # type: ignore[arg-type]
    for options in ({"final": 1.0}, {"start": 0.9}, {"interval": 0}, {"score": "x"}, {"structure": "x"}):
        with pytest.raises(ValueError):
            sparse_pretraining(**options)  # type: ignore[arg-type]
    other = SparsePretraining(SCHEDULE)
    other.attach(network(width=3))
    pruned = SparsePretraining(SCHEDULE)
    pruned.attach(network())
    pruned.before_step(29)
    with pytest.raises(ValueError, match="the masks are of another model"):
        other.load_state(pruned.state())
