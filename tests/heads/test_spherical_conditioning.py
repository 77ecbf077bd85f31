"""A SphericalHead where it is hard: large steps, singular ones, long contraction, other types, void gradients."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_descent import CLASSES, DENSE, FEATURES, batches, dense_step, start
from safetensors.torch import load_file, save_file

import lossmith.heads.spherical as spherical
from lossmith.heads import SphericalHead
from lossmith.heads.factored import STRAIN, largest_singular_value


def count_plain_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps that had to be made on the full matrix."""
    seen: list[int] = []
    plainly = spherical.descend_plainly

    def counted(*arguments: Any, **options: Any) -> None:
        seen.append(1)
        plainly(*arguments, **options)

    monkeypatch.setattr(spherical, "descend_plainly", counted)
    return seen


@pytest.mark.parametrize("rows", [4, 9], ids=["few rows", "more rows than features"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("loss", "lr", "singular"),
    [
        ("z_loss", 30.0, False),
        ("z_loss", 3000.0, True),
        ("taylor_softmax", 3.0, False),
        ("spherical_softmax", 3.0, False),
        ("squared_error", 0.03, True),
        ("squared_error", 0.08, True),
    ],
)
def test_large_steps_are_exact(
    loss: str, lr: float, singular: bool, dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 steps that change the condition of the factor a lot, some of which would make it singular.

    float64: 1e-8. float32: a thousand-fold of what plain float32 SGD rounds, or 1e-4 of the largest weight (a step may
    cost the factor's condition, at most 300, in digits).
    """
    plain_steps = count_plain_steps(monkeypatch)
    head = SphericalHead(FEATURES, CLASSES, loss=loss, weight=start(), dtype=dtype, **DENSE[loss][1])
    exact, plain = start(), start(torch.float32)
    looks = 0
    for number, (hidden, targets, weights) in enumerate(batches(100, rows)):
        exact, _, _ = dense_step(exact, loss, hidden, targets, weights, lr)
        plain, _, _ = dense_step(plain, loss, hidden.float(), targets, weights.float(), lr)
        (head(hidden.to(dtype), targets) * weights.to(dtype)).sum().backward()
        before = head._strain
        head.step(lr)
        looks += head._strain < before
        assert torch.linalg.cond(head._factor("old").u) < 300 * math.exp(STRAIN)
        if number % 10 == 0:
            size = exact.abs().max()
            error = (head.weight.double() - exact).abs().max() / size
            rounding = (plain.double() - exact).abs().max() / size
            assert error < (1e-8 if dtype == torch.float64 else 1e-4 + 1000 * rounding)
    assert max(head.consistency().values()) < (1e-10 if dtype == torch.float64 else 1e-5)
    assert bool(plain_steps) == singular or dtype == torch.float64
    assert looks or plain_steps


def test_the_strain_bounds_what_steps_do_to_the_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rigorously, its condition and singular values, whatever the sign: squared error contracts, others do not."""
    monkeypatch.setattr(SphericalHead, "_stabilize", lambda head: None)
    for loss, lr in (("squared_error", 0.012), ("taylor_softmax", 2.0), ("spherical_softmax", 1.0), ("z_loss", 40.0)):
        head = SphericalHead(FEATURES, CLASSES, loss=loss, weight=start(), dtype=torch.float64, **DENSE[loss][1])
        for hidden, targets, _ in batches(60, 4):
            before = head._factor("old").u.clone()
            strain = head._strain
            head(hidden, targets).sum().backward()
            head.step(lr)
            after = head._factor("old").u
            spent = head._strain - strain
            if torch.equal(after, torch.eye(FEATURES).double()):  # made on the full matrix
                continue
            grown = torch.linalg.cond(after).log() - torch.linalg.cond(before).log()
            assert grown <= spent + 1e-9
            values = torch.linalg.svdvals(after).log() - torch.linalg.svdvals(before).log()
            assert values.abs().max() <= spent + 1e-9


def test_largest_singular_values_are_found_whatever_the_matrix() -> None:
    """Within 30 percent below, never above; also where the longest row lies across the direction looked for."""
    generator = torch.Generator().manual_seed(0)

    def check(matrix: torch.Tensor) -> None:
        true = float(torch.linalg.matrix_norm(matrix, 2))
        assert 0.7 * true <= largest_singular_value(matrix) <= true * (1 + 1e-9)

    for features in (1, 2, 7, 64):
        eye = torch.eye(features, dtype=torch.float64)
        check(eye)
        for spread in (0.1, 1.0, 10.0):
            check(eye + spread * torch.randn(features, features, generator=generator, dtype=torch.float64))
        q = torch.linalg.qr(torch.randn(features, features, generator=generator, dtype=torch.float64)).Q
        for far in (3.0, 100.0, 1e6):
            values = torch.ones(features, dtype=torch.float64)
            values[-1] = far
            check(q * values @ q.T)
            across = torch.full((features,), features**-0.5, dtype=torch.float64)
            if features == 64:
                hidden_one = eye + (far - 1) * torch.outer(across, across)
                hidden_one[0] *= 0
                hidden_one[0, 0] = far / 8
                check(hidden_one)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_weight_decay_alone_may_go_on_for_ever(dtype: torch.dtype) -> None:
    """The factor shrinks evenly: no digits are lost, but its inverse must stay a number. Here W falls to 1e-33."""
    head = SphericalHead(FEATURES, CLASSES, weight=start(), weight_decay=1.0, dtype=dtype)
    for _ in range(730):
        head.step(0.1)
        assert torch.isfinite(head.old_inverse).all()
    torch.testing.assert_close(head.weight.double() / 0.9**730, start(), rtol=1e-4, atol=1e-4)
    assert max(head.consistency().values()) < 1e-5
    # While nothing is rewritten the second factor rests.
    if not head._busy:
        assert torch.equal(head._factor("new").u, torch.eye(FEATURES, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_one_step_may_decay_nearly_everything(dtype: torch.dtype) -> None:
    head = SphericalHead(FEATURES, CLASSES, weight=start(), weight_decay=1 - 1e-6, dtype=dtype)
    for _ in range(3):
        head.step(1.0)
    torch.testing.assert_close(head.weight.double() * 1e18, start(), rtol=1e-3, atol=1e-3)


def test_decay_clipping_and_resuming_together_equal_torch(tmp_path: Path) -> None:
    """400 steps with a changing learning rate, saved and loaded where a rewriting and a strain are under way."""
    weight = torch.nn.Parameter(start())
    optimizer = torch.optim.SGD([weight], lr=1.0, weight_decay=0.02)
    arguments: dict[str, Any] = {"weight_decay": 0.02, "max_grad_norm": 2.0, "loss": "squared_error"}
    arguments |= {"stabilize_every": 7, "dtype": torch.float64}
    head = SphericalHead(FEATURES, CLASSES, weight=start(), **arguments)
    resumed = 0
    for number, (hidden, targets, weights) in enumerate(batches(400, 4)):
        lr = 0.01 * (1 + number % 5)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        (DENSE["squared_error"][0](hidden @ weight.T, targets) * weights).sum().backward()
        torch.nn.utils.clip_grad_norm_([weight], 2.0)
        optimizer.step()
        (head(hidden, targets) * weights).sum().backward()
        head.step(lr)
        if number % 50 == 33 or (head._busy and resumed < 3):
            resumed += head._busy
            save_file(head.state_dict(), tmp_path / "head.safetensors")
            strain, head = head._strain, SphericalHead(FEATURES, CLASSES, **arguments)
            head.load_state_dict(load_file(tmp_path / "head.safetensors"))
            assert head._strain == strain
    assert resumed
    torch.testing.assert_close(head.weight, weight.detach(), rtol=1e-8, atol=1e-8)
    assert max(head.consistency().values()) < 1e-8


def test_a_gradient_without_a_norm_changes_nothing() -> None:
    (hidden, targets, weights), *_ = batches(1, 4)
    head = SphericalHead(FEATURES, CLASSES, weight=start(), dtype=torch.float64)
    before = {k: v.clone() for k, v in head.state_dict().items()}
    for bad in (math.nan, math.inf):
        spoiled = hidden.clone()
        spoiled[1, 2] = bad
        for h, u in ((spoiled, weights), (hidden, weights * torch.tensor([1, bad, 1, 1]))):
            (head(h, targets) * u).sum().backward()
            with pytest.raises(FloatingPointError, match=r"the norm of the collected gradient is (nan|inf)"):
                head.step(0.1)
            assert all(torch.equal(v, before[k]) for k, v in head.state_dict().items())
    head(hidden, targets).sum().backward()
    head.step(0.1)
    assert torch.isfinite(head.weight).all()


def test_autocast_and_half_precision_reach_a_head_that_computes_in_its_own_type() -> None:
    (hidden, targets, _), *_ = batches(1, 4)
    for narrow in (torch.bfloat16, torch.float16):
        one, other = (SphericalHead(FEATURES, CLASSES, weight=start()) for _ in range(2))
        low = hidden.to(narrow).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = one(low, targets)
            losses.sum().backward()
            one.step(0.3)
            best = one.topk(low, 3).indices
        wide = hidden.to(narrow).float().requires_grad_()
        expected = other(wide, targets)
        expected.sum().backward()
        other.step(0.3)
        assert losses.dtype == torch.float32
        assert torch.equal(losses, expected)
        assert torch.equal(low.grad, wide.grad.to(narrow))
        assert torch.equal(one.weight, other.weight)
        assert torch.equal(best, other.topk(wide, 3).indices)


@pytest.mark.parametrize("convert", ["half", "bfloat16", "float", "cpu"])
def test_no_conversion_of_the_model_costs_digits(convert: str) -> None:
    head = SphericalHead(FEATURES, CLASSES, weight=start())
    for hidden, targets, _ in batches(5, 4):
        head(hidden.float(), targets).sum().backward()
        head.step(1.0)
    before = {k: v.clone() for k, v in head.state_dict().items()}
    getattr(torch.nn.Sequential(head), convert)()
    after = head.state_dict()
    assert all(v.dtype == after[k].dtype and torch.equal(v, after[k]) for k, v in before.items())


def test_a_wider_type_takes_the_collected_gradient_along() -> None:
    (hidden, targets, _), (more, others, _) = batches(2, 4)
    head, other = (SphericalHead(FEATURES, CLASSES, weight=start().float()) for _ in range(2))
    head(hidden.float(), targets).sum().backward()
    head = head.double()
    assert head.v.dtype == head.old_inverse.dtype == head.gram.dtype == torch.float64
    head(more, others).sum().backward()
    head.step(0.3)
    for h, t in ((hidden, targets), (more, others)):
        other(h.float(), t).sum().backward()
    other.step(0.3)
    torch.testing.assert_close(head.weight.float(), other.weight, rtol=1e-6, atol=1e-6)
    assert head.float().v.dtype == torch.float32
    assert max(head.consistency().values()) < 1e-6


def test_an_empty_head_can_be_built_and_filled() -> None:
    """As large models are loaded: on the meta device first."""
    full = SphericalHead(FEATURES, CLASSES, weight=start())
    empty = SphericalHead(FEATURES, CLASSES, device="meta").to_empty(device="cpu")
    empty.load_state_dict(full.state_dict())
    assert torch.equal(empty.weight, full.weight)


def test_materialising_keeps_what_was_collected_and_refuses_what_was_only_computed() -> None:
    (hidden, targets, _), (more, others, _) = batches(2, 4)
    weight, _, _ = dense_step(start(), "z_loss", hidden, targets, torch.ones(4).double(), 2.0)
    head = SphericalHead(FEATURES, CLASSES, weight=start(), dtype=torch.float64, **DENSE["z_loss"][1])
    for _ in range(2):  # at first with U = 1, then not
        head(hidden, targets).sum().backward()
        void = head(more, others)
        head.materialise()
        head.step(2.0)
        torch.testing.assert_close(head.weight, weight, rtol=1e-12, atol=1e-12)
        with pytest.raises(RuntimeError, match="or was materialised since"):
            void.sum().backward()
        weight, _, _ = dense_step(weight, "z_loss", hidden, targets, torch.ones(4).double(), 2.0)


def test_second_derivatives_are_refused_not_wrong() -> None:
    (hidden, targets, _), *_ = batches(1, 4)
    hidden.requires_grad_()
    head = SphericalHead(FEATURES, CLASSES, weight=start(), dtype=torch.float64)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(head(hidden, targets).sum(), hidden, create_graph=True)


@pytest.mark.slow
def test_twenty_thousand_float32_steps_keep_the_statistics() -> None:
    """Rounding of the statistics grows no faster than a random walk: 1e-5 after 20,000 steps, with rewriting."""
    generator = torch.Generator().manual_seed(0)
    head = SphericalHead(16, 300, loss="taylor_softmax", init_std=0.1)
    for _ in range(20_000):
        hidden = torch.randn(8, 16, generator=generator)
        head(hidden, torch.randint(300, (8,), generator=generator)).mean().backward()
        head.step(0.5)
    assert max(head.consistency().values()) < 1e-5


def test_a_class_may_be_what_is_ignored() -> None:
    (hidden, targets, _), *_ = batches(1, 6)
    targets[2] = 3
    head = SphericalHead(FEATURES, CLASSES, weight=start(), dtype=torch.float64, ignore_index=3)
    other = SphericalHead(FEATURES, CLASSES, weight=start(), dtype=torch.float64)
    losses = head(hidden, targets)
    assert torch.equal(losses, other(hidden, targets.masked_fill(targets == 3, -100)))
    assert losses[2] == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("lr", [0.0005, 0.003, 0.004])
def test_a_rewriting_keeps_pace_with_the_steps(lr: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fast and lasting contraction of some directions more than of others: never all rows of V at once."""
    monkeypatch.setattr(spherical, "FEWEST_ROWS", 8)
    generator = torch.Generator().manual_seed(0)
    classes, features = 3000, 8
    head = SphericalHead(features, classes, loss="squared_error", dtype=dtype)
    most, rewritten, conditions = 0, 0, []
    materialise = head.materialise
    at_once: list[int] = []
    head.materialise = lambda: (at_once.append(1), materialise())[1]  # type: ignore[method-assign]
    for _ in range(250):
        before = head._place
        hidden = torch.randn(4, features, generator=generator, dtype=torch.float64).to(dtype)
        hidden[:, 0] += 2
        head(hidden, torch.randint(classes, (4,), generator=generator)).sum().backward()
        head.step(lr)
        if head._busy:
            most, rewritten = max(most, head._place - before), rewritten + 1
        conditions.append(float(torch.linalg.cond(head._factor("old").u)))
    assert rewritten
    assert not at_once
    assert most < classes / 3
    assert max(conditions) < 2 * spherical.CRITICAL[dtype]
    assert max(head.consistency().values()) < (1e-10 if dtype == torch.float64 else 1e-5)
