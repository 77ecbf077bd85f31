"""The clipped KL whose band a small network learns."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from lossmith.heads import AdaptiveClippedKL, attach_adaptive_clipped_kl, detach_adaptive_clipped_kl
from lossmith.heads.adaptive_clipped_kl import attached_adaptive_clipped_kl
from lossmith.losses import clipped_kl, distillation_kl


def logits(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def learned(classes: int = 8, **options: Any) -> AdaptiveClippedKL:
    torch.manual_seed(0)
    loss = AdaptiveClippedKL(classes, **options).double()
    with torch.no_grad():
        loss.network[-1].weight.normal_()  # type: ignore[index,union-attr,operator]
    return loss


def test_it_begins_with_the_same_wide_band_for_every_token() -> None:
    loss = AdaptiveClippedKL(8).double()
    s, t = logits(5, 8), logits(5, 8, seed=1)
    upper, lower = loss.bounds(s, t)
    assert upper.tolist() == pytest.approx([1 / (1 + math.exp(-3))] * 5)
    assert lower.tolist() == pytest.approx([1 / (1 + math.exp(3))] * 5)
    torch.testing.assert_close(loss(s, t), clipped_kl(s, t, upper=upper[0].item(), lower=lower[0].item()))


def test_student_and_network_get_the_gradient_of_the_value_and_the_teacher_none() -> None:
    loss, s, t = learned(width=0.1), logits(3, 8).requires_grad_(), logits(3, 8, seed=1).requires_grad_()
    weights = [p for p in loss.parameters() if p.requires_grad]
    assert len(weights) == 4
    names = [n for n, _ in loss.named_parameters()]

    # The student enters the network as a constant: its own gradient is that at a fixed band.
    upper, lower = (x.detach() for x in loss.bounds(s, t))
    (ours,) = torch.autograd.grad(loss(s, t).sum(), s)
    (fixed,) = torch.autograd.grad(clipped_kl(s, t, upper=upper, lower=lower, width=0.1).sum(), s)
    torch.testing.assert_close(ours, fixed)

    def of_weights(*values: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(
            loss, dict(zip(names, values, strict=True)), (s.detach(), t.detach())
        )
        return result

    assert torch.autograd.gradcheck(of_weights, tuple(w.detach().clone().requires_grad_() for w in weights))
    loss(s, t).sum().backward()
    assert t.grad is None
    assert all(w.grad is not None and w.grad.any() for w in weights)


def test_ignored_rows_have_no_part_even_when_they_are_not_numbers() -> None:
    loss, s, t = learned(), logits(4, 8), logits(4, 8, seed=1)
    targets = torch.tensor([1, -100, 2, -100])
    s[1], t[3] = float("nan"), float("inf")
    s.requires_grad_()
    values = loss(s, t, targets)
    gradients = torch.autograd.grad(values.sum(), [s, *loss.parameters()])
    assert values[1] == values[3] == 0
    assert all(torch.isfinite(g).all() for g in gradients)
    torch.testing.assert_close(values[[0, 2]], loss(s[[0, 2]], t[[0, 2]]))


def test_the_band_of_the_last_call_is_reported() -> None:
    loss, t = AdaptiveClippedKL(4, upper=0.4, lower=0.0), torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    with pytest.raises(ValueError, match="no band yet"):
        _ = loss.last_band
    loss(torch.zeros(1, 4), t)
    # Only the top class starts below 0.4 of the mass.
    assert (loss.last_band.upper, loss.last_band.kept) == (pytest.approx(0.4), pytest.approx(0.502, abs=2e-3))
    assert not list(loss.parameters())


def test_a_least_band_is_kept() -> None:
    loss = learned(min_band=0.3)
    with torch.no_grad():
        loss.network[-1].bias.copy_(torch.tensor([5.0, 5.0]))  # type: ignore[index,union-attr]
    upper, lower = loss.bounds(logits(50, 8), logits(50, 8, seed=1))
    assert ((upper - lower) >= 0.3 - 1e-12).all()
    assert ((lower >= 0) & (upper <= 1)).all()


@pytest.mark.parametrize(("classes", "options", "seen"), [(50, {}, 50), (12_000, {}, 256), (50, {"top": 5}, 5)])
def test_of_large_vocabularies_the_network_sees_the_likeliest_classes(
    classes: int, options: dict[str, Any], seen: int
) -> None:
    loss = AdaptiveClippedKL(classes, **options)
    first: Any = loss.network[0]  # type: ignore[index]
    assert first.in_features == 2 * seen
    assert loss(torch.randn(3, classes), torch.randn(3, classes)).shape == (3,)


def test_with_top_classes_the_order_of_the_vocabulary_does_not_matter() -> None:
    loss, s, t = learned(top=4), logits(3, 8), logits(3, 8, seed=1)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(loss(s[:, order], t[:, order]), loss(s, t))


@pytest.mark.parametrize("variant", ["rest", "normalised"])
def test_only_the_normalised_form_collapses_when_it_is_minimised(variant: Any) -> None:
    """Train the band alone: with a rest class it cannot fall below the top class's own divergence."""
    loss = learned(20, variant=variant)
    s, t = logits(200, 20), logits(200, 20, seed=1)
    optimiser = torch.optim.Adam(loss.parameters(), lr=2e-2)
    for _ in range(300):
        optimiser.zero_grad()
        loss(s, t).mean().backward()
        optimiser.step()
    p, q = t.softmax(-1), s.softmax(-1)
    top = p.argmax(-1, keepdim=True)
    a, b = p.gather(-1, top).squeeze(-1), q.gather(-1, top).squeeze(-1)
    binary = (a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log()).mean()
    value = loss(s, t).mean()
    if variant == "rest":
        assert value > 0.95 * binary
    else:
        assert value < 0.02 * distillation_kl(s, t).mean()


def test_attached_it_trains_with_the_student_and_comes_off_again() -> None:
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    student = transformers.LlamaForCausalLM(config).bfloat16()
    names = set(student.state_dict())
    loss = attach_adaptive_clipped_kl(student, hidden=4)
    assert loss.classes == 30
    assert attached_adaptive_clipped_kl(student) is loss
    assert {p.dtype for p in loss.parameters()} == {torch.float32}  # small steps would be rounded away in bfloat16
    assert loss(torch.zeros(2, 30).bfloat16(), torch.randn(2, 30).bfloat16()).dtype == torch.float32
    assert set(detach_adaptive_clipped_kl(student).state_dict()) == names
    assert attached_adaptive_clipped_kl(student) is None
    assert detach_adaptive_clipped_kl(student) is student


def test_bad_options_are_named() -> None:
    for options, message in (
        ({"classes": 0}, "classes must be at least 1, got 0"),
        ({"min_band": 1.5}, "min_band must lie between 0 and 1, got 1.5"),
        ({"upper": 0.5}, "upper and lower are given together"),
        ({"upper": 0.2, "lower": 0.4}, "lower must be less than upper"),
        ({"top": 0}, "top must be at least 1, got 0"),
        ({"hidden": 0}, "hidden must be at least 1, got 0"),
        ({"width": -1.0}, "width must be a finite number > 0"),
        ({"variant": "renorm"}, "variant must be rest, paper or normalised"),
        ({"temperature": 0.0}, "temperature must be a finite number > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            AdaptiveClippedKL(**{"classes": 5, **options})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="made for 5 classes, got 6"):
        AdaptiveClippedKL(5)(torch.zeros(1, 6), torch.zeros(1, 6))
    with pytest.raises(ValueError, match="classes must be given: the student has no output embeddings"):
        attach_adaptive_clipped_kl(nn.Linear(2, 3))
