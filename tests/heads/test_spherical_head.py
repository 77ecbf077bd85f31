"""SphericalHead against plain SGD on the full matrix."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_descent import DENSE, batches, dense_step, start
from safetensors.torch import load_file, save_file
from torch import nn

from lossmith.heads import SphericalHead
from lossmith.losses import z_loss

every_loss = pytest.mark.parametrize("loss", list(DENSE))


@every_loss
@pytest.mark.parametrize("rows", [1, 4, 9], ids=["one row", "a few", "more rows than features"])
def test_hundreds_of_steps_equal_plain_sgd(loss: str, rows: int) -> None:
    """Losses, gradients of hidden, the matrix and its statistics, with learning rate and weights changing."""
    weight, head = start(), SphericalHead(6, 50, loss=loss, weight=start(), dtype=torch.float64, **DENSE[loss][1])
    size = 0.01 if loss == "squared_error" else 0.3
    for number, (hidden, targets, weights) in enumerate(batches(200, rows)):
        lr = size * (1 + number % 3) / 3
        weight, losses, gradient = dense_step(weight, loss, hidden, targets, weights, lr)
        mine = hidden.clone().requires_grad_()
        ours = head(mine, targets)
        (ours * weights).sum().backward()
        torch.testing.assert_close(ours.detach(), losses, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(mine.grad, gradient, rtol=1e-8, atol=1e-8)
        head.step(lr)
    torch.testing.assert_close(head.weight, weight, rtol=1e-8, atol=1e-8)
    assert max(head.consistency().values()) < 1e-8


def test_one_step_is_the_digests_example() -> None:
    w = torch.tensor([[1, 0], [0, 1], [1, 1], [-1, 0.5]], dtype=torch.float64)
    head = SphericalHead(2, 4, weight=w, dtype=torch.float64)
    h = torch.tensor([[0.5, 2.0]], dtype=torch.float64, requires_grad=True)
    loss = head(h, torch.tensor([2]))
    loss.sum().backward()
    head.step(0.1)
    assert loss.item() == pytest.approx(0.24965502253, abs=1e-10)
    assert h.grad[0].tolist() == pytest.approx([-0.08734999954, 0.021837499885], abs=1e-10)
    expected = [
        [1.000727916663, 0.002911666651],
        [-0.005823333303, 0.976706666789],
        [1.004367499977, 1.017469999908],
        [-0.999272083337, 0.502911666651],
    ]
    torch.testing.assert_close(head.weight, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-10)
    u = [[0.997816250011, -0.008734999954], [-0.008734999954, 0.965060000184]]
    torch.testing.assert_close(head._factor("old").u, torch.tensor(u, dtype=torch.float64), rtol=1e-9, atol=1e-10)
    assert head._factor("old").omega.tolist() == pytest.approx([0.002911666651, 0.011646666605], abs=1e-10)
    assert head.v[2].tolist() == pytest.approx([1.012851686046, 1.051406744182], abs=1e-10)
    q = [[3.008789045946, 0.516594308882], [0.516594308882, 2.24212973592]]
    gram = head.gram + torch.outer(head.sums, head.sums) / 4  # it is kept centred
    torch.testing.assert_close(gram, torch.tensor(q, dtype=torch.float64), rtol=1e-9, atol=1e-10)
    assert head.sums.tolist() == pytest.approx([1, 2.5], abs=1e-12)


def test_z_loss_never_changes_column_sums_and_never_shrinks_the_matrix() -> None:
    head = SphericalHead(6, 50, weight=start(), dtype=torch.float64)
    sums, size = start().sum(0), start().norm()
    for hidden, targets, _ in batches(50, 4):
        head(hidden, targets).sum().backward()
        head.step(0.3)
        assert head.weight.norm() >= size - 1e-12
        size = head.weight.norm()
    torch.testing.assert_close(head.weight.sum(0), sums, rtol=1e-10, atol=1e-10)


def test_gradient_of_hidden_passes_gradcheck() -> None:
    for loss, (_, options) in DENSE.items():
        head = SphericalHead(6, 50, loss=loss, weight=start(), dtype=torch.float64, **options).eval()
        hidden, targets, _ = batches(1, 3)[0]
        assert torch.autograd.gradcheck(lambda h, head=head, t=targets: head(h, t), hidden.requires_grad_())


def test_accumulated_micro_batches_are_one_step() -> None:
    (hidden, targets, weights), *_ = batches(1, 9)
    whole, parts = (SphericalHead(6, 50, weight=start(), dtype=torch.float64) for _ in range(2))
    (whole(hidden, targets) * weights).sum().backward()
    for rows in (slice(0, 2), slice(2, 3), slice(3, 9)):
        (parts(hidden[rows], targets[rows]) * weights[rows]).sum().backward()
    assert parts.grad_norm() == pytest.approx(whole.grad_norm(), rel=1e-12)
    whole.step(0.3)
    parts.step(0.3)
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-12, atol=1e-12)


def test_weight_decay_and_clipping_are_those_of_torch() -> None:
    weight = nn.Parameter(start())
    optimizer = torch.optim.SGD([weight], lr=0.2, weight_decay=0.05)
    head = SphericalHead(6, 50, weight=start(), weight_decay=0.05, max_grad_norm=0.1, dtype=torch.float64)
    for hidden, targets, _ in batches(40, 4):
        optimizer.zero_grad()
        z_loss(hidden @ weight.T, targets).sum().backward()
        head(hidden, targets).sum().backward()
        assert head.grad_norm() == pytest.approx(weight.grad.norm().item(), rel=1e-8)
        nn.utils.clip_grad_norm_([weight], 0.1)
        optimizer.step()
        head.step(0.2)
    torch.testing.assert_close(head.weight, weight.detach(), rtol=1e-8, atol=1e-8)
    assert max(head.consistency().values()) < 1e-8


def test_ignored_rows_and_empty_batches_do_nothing() -> None:
    (hidden, targets, _), *_ = batches(1, 4)
    hidden[1] = float("nan")
    targets[1] = -100
    head, other = (SphericalHead(6, 50, weight=start(), dtype=torch.float64) for _ in range(2))
    hidden.requires_grad_()
    losses = head(hidden, targets)
    losses.sum().backward()
    assert losses[1] == 0
    assert not hidden.grad[1].any()
    keep = [0, 2, 3]
    other(hidden.detach()[keep], targets[keep]).sum().backward()
    for h in (head, other):
        h.step(0.1)
    torch.testing.assert_close(head.weight, other.weight)
    before = head.weight
    assert head(hidden[:0], targets[:0]).shape == (0,)
    head(hidden, torch.full((4,), -100)).sum().backward()
    head.step(0.1)
    assert torch.equal(head.weight, before)


def test_shapes_of_the_batch_and_strides_do_not_matter() -> None:
    (hidden, targets, _), *_ = batches(1, 6)
    head = SphericalHead(6, 50, weight=start(), dtype=torch.float64)
    flat = head(hidden, targets)
    assert torch.equal(head(hidden.reshape(2, 3, 6), targets.reshape(2, 3)), flat.reshape(2, 3))
    wide = torch.stack([hidden, hidden], -1)[..., 0]
    assert torch.equal(head(wide, targets), flat)


def test_several_valued_targets_equal_dense_squared_error() -> None:
    generator = torch.Generator().manual_seed(3)
    weight, head = start(), SphericalHead(6, 50, loss="squared_error", weight=start(), dtype=torch.float64)
    dense_head = copy.deepcopy(head)
    for hidden, _, _ in batches(60, 4):
        indices = torch.stack([torch.randperm(50, generator=generator)[:3] for _ in range(4)])
        values = torch.randn(4, 3, generator=generator, dtype=torch.float64)
        dense = torch.zeros(4, 50, dtype=torch.float64).scatter(1, indices, values)
        w = weight.clone().requires_grad_()
        losses = (hidden @ w.T - dense).square().sum(-1)
        losses.sum().backward()
        weight = weight - 0.01 * w.grad
        for h, targets in ((head, (indices, values)), (dense_head, dense)):
            ours = h(hidden, targets)
            torch.testing.assert_close(ours.detach(), losses.detach(), rtol=1e-9, atol=1e-9)
            ours.sum().backward()
            h.step(0.01)
    torch.testing.assert_close(head.weight, weight, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dense_head.weight, weight, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_five_thousand_contracting_steps_stay_well_conditioned() -> None:
    """The digest's stress: without stabilisation U's smallest singular value falls to 1e-73."""
    check_contracting_steps(5000, 1e-12)


def test_contracting_steps_stay_well_conditioned() -> None:
    check_contracting_steps(250, 1e-12)


def check_contracting_steps(number: int, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = 0.3 * torch.randn(40, 5, generator=generator, dtype=torch.float64)
    head = SphericalHead(5, 40, loss="squared_error", weight=weight, stabilize_every=50, dtype=torch.float64)
    for _ in range(number):
        hidden = 0.5 * torch.randn(3, 5, generator=generator, dtype=torch.float64)
        targets = torch.randint(40, (3,), generator=generator)
        weight, _, _ = dense_step(weight, "squared_error", hidden, targets, torch.ones(3).double(), 0.02)
        head(hidden, targets).sum().backward()
        head.step(0.02)
    torch.testing.assert_close(head.weight, weight, rtol=tolerance, atol=tolerance)
    assert torch.linalg.cond(head._factor("old").u) < 1e3


def rewriting_head(dtype: torch.dtype = torch.float64) -> SphericalHead:
    """A head that rewrites a few rows per step, always."""
    head = SphericalHead(6, 50, loss="squared_error", weight=start(dtype), stabilize_every=5, dtype=dtype)
    head._pace, head._busy = 2, True
    head.pace.fill_(2)
    return head


def test_rows_with_either_factor_stand_for_the_same_matrix() -> None:
    """In the middle of a rewriting: training, scores, the best classes and the matrix itself."""
    weight, head = start(), rewriting_head()
    places = set()
    for number, (hidden, targets, weights) in enumerate(batches(120, 4)):
        weight, losses, gradient = dense_step(weight, "squared_error", hidden, targets, weights, 0.01)
        mine = hidden.clone().requires_grad_()
        ours = head(mine, targets)
        (ours * weights).sum().backward()
        torch.testing.assert_close(ours.detach(), losses, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(mine.grad, gradient, rtol=1e-9, atol=1e-9)
        head.step(0.01)
        places.add(head._place)
        if number % 20 == 0:
            torch.testing.assert_close(head.weight, weight, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(head.scores(hidden), hidden @ weight.T, rtol=1e-9, atol=1e-9)
            assert torch.equal(head.topk(hidden, 5).indices, (hidden @ weight.T).topk(5).indices)
        if not head._busy:
            head._pace, head._busy = 2, True
    assert len(places) > 10
    head.materialise()
    torch.testing.assert_close(head.v, weight, rtol=1e-9, atol=1e-9)


def test_a_step_that_would_make_the_factor_singular_is_exact_all_the_same() -> None:
    """With h·h = 1/(2η) squared error annihilates the matrix in the direction of h."""
    hidden = torch.zeros(1, 6, dtype=torch.float64)
    hidden[0, 0] = 1.0
    weight, _, _ = dense_step(start(), "squared_error", hidden, torch.tensor([3]), torch.ones(1).double(), 0.5)
    head = SphericalHead(6, 50, loss="squared_error", weight=start(), dtype=torch.float64)
    head(hidden, torch.tensor([3])).sum().backward()
    head.step(0.5)
    torch.testing.assert_close(head.weight, weight, rtol=1e-12, atol=1e-12)
    assert max(head.consistency().values()) < 1e-10


@every_loss
def test_float32_rounds_like_plain_float32_sgd(loss: str) -> None:
    """Over 250 steps with rewriting at work, measured against float64.

    Usually no worse than plain float32 SGD; at most a hundred times, since the spherical softmax (a logarithm of o²)
    makes much of small differences. Statistics agree with the matrix to 2e-6 throughout.
    """
    exact, plain = start(), start(torch.float32)
    head = SphericalHead(6, 50, loss=loss, weight=start(), stabilize_every=10, **DENSE[loss][1])
    size = 0.01 if loss == "squared_error" else 0.1
    for number, (hidden, targets, weights) in enumerate(batches(250, 4)):
        exact, _, _ = dense_step(exact, loss, hidden, targets, weights, size)
        plain, _, _ = dense_step(plain, loss, hidden.float(), targets, weights.float(), size)
        (head(hidden.float(), targets) * weights.float()).sum().backward()
        head.step(size)
        if number == 100:
            head._pace, head._busy = 2, True
    error = (head.weight.double() - exact).abs().max()
    assert error <= 100 * (plain.double() - exact).abs().max() + 1e-6 * exact.abs().max()
    assert max(head.consistency().values()) < 2e-6
    head.synchronise()
    assert max(head.consistency().values()) < 1e-6


@pytest.mark.parametrize("steps", [3, 12, 47])
def test_a_saved_head_goes_on_bit_for_bit(steps: int, tmp_path: Path) -> None:
    head = rewriting_head()
    data = batches(80, 4)

    def run(h: SphericalHead, part: Any) -> None:
        for hidden, targets, _ in part:
            h(hidden, targets).sum().backward()
            h.step(0.01)

    run(head, data[:steps])
    save_file(head.state_dict(), tmp_path / "head.safetensors")
    again = SphericalHead(6, 50, loss="squared_error", stabilize_every=5, dtype=torch.float64)
    again.load_state_dict(load_file(tmp_path / "head.safetensors"))
    run(head, data[steps:])
    run(again, data[steps:])
    assert all(torch.equal(a, b) for a, b in zip(head.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_plain_layer_goes_in_and_comes_out() -> None:
    linear = nn.Linear(6, 50, bias=False)
    head = SphericalHead.from_linear(linear)
    assert torch.equal(head.to_linear().weight, linear.weight)
    assert "z_loss" in repr(head)
    with pytest.raises(ValueError, match="append a constant feature"):
        SphericalHead.from_linear(nn.Linear(6, 50))


def test_fixed_features_train_the_head() -> None:
    head = SphericalHead(6, 50, weight=start(), dtype=torch.float64)
    hidden, targets, _ = batches(1, 4)[0]
    before = head(hidden, targets).sum()
    before.backward()
    head.step(0.3)
    assert head(hidden, targets).sum() < before


def test_equal_outputs_have_a_finite_loss_and_no_gradient() -> None:
    head = SphericalHead(6, 50, weight=torch.zeros(50, 6).double(), dtype=torch.float64)
    hidden = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    loss = head(hidden, torch.tensor([0, 1, 2]))
    loss.sum().backward()
    head.step(0.1)
    assert torch.isfinite(loss).all()
    assert not hidden.grad.any()
    assert not head.weight.any()


def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"loss 'log_softmax' is not spherical.*z_loss, taylor_softmax"):
        SphericalHead(6, 50, loss="log_softmax")
    with pytest.raises(ValueError, match="a must be a finite number > 0, got 0"):
        SphericalHead(6, 50, a=0)
    with pytest.raises(ValueError, match="has no such options: gamma"):
        SphericalHead(6, 50, gamma=2)
    with pytest.raises(ValueError, match="2 classes or more"):
        SphericalHead(6, 1)
    head = SphericalHead(6, 50)
    hidden = torch.randn(2, 6)
    with pytest.raises(ValueError, match=r"targets must be in \[0, 50\), got 50"):
        head(hidden, torch.tensor([0, 50]))
    with pytest.raises(ValueError, match="must have 6 features"):
        head(hidden[:, :5], torch.tensor([0, 1]))
    with pytest.raises(TypeError, match=r"must have the head's dtype, torch\.float32, or a narrower one"):
        head(hidden.double(), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="one class index per row"):
        head(hidden, torch.rand(2, 50))
    with pytest.raises(ValueError, match="lr must be a finite number >= 0"):
        head.step(-1)
    with pytest.raises(ValueError, match=r"k must be in \[1, 50\]"):
        head.topk(hidden, 51)
    squares = SphericalHead(6, 50, loss="squared_error")
    with pytest.raises(ValueError, match="names the same class twice"):
        squares(hidden, (torch.tensor([[1, 1], [2, 3]]), torch.ones(2, 2)))
    losses = head(hidden, torch.tensor([0, 1]))
    head(hidden, torch.tensor([0, 1])).sum().backward()
    head.step(0.1)
    with pytest.raises(RuntimeError, match="made a step or was materialised since"):
        losses.sum().backward()
