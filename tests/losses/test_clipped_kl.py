"""The clipped KL and the span correlation against the digest's numbers, a slow reference and their identities."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lossmith.losses import clipped_kl, distillation_kl, reverse_kl, span_correlation
from lossmith.losses.clipped_kl import band_divergence, linked_positions, soft_band

P = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4], [0.25] * 4], dtype=torch.float64)
Q = torch.tensor([[0.4, 0.4, 0.1, 0.1], [0.4, 0.3, 0.2, 0.1], [0.7, 0.1, 0.1, 0.1]], dtype=torch.float64)
EXACT: dict[str, float] = {"rtol": 1e-10, "atol": 1e-12}


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hard(row: int, mask: list[int]) -> list[float]:
    """The three variants under a hard mask over the classes in the teacher's order."""
    order = P[row].argsort(descending=True)
    log_p, log_q = P[row, order].log(), Q[row, order].log()
    keep = torch.tensor(mask, dtype=torch.float64)
    log_keep, log_drop = (x.log().clamp_min(-1e30) for x in (keep, 1 - keep))
    variants = ("paper", "normalised", "rest")
    return [band_divergence(log_p, log_q, log_keep, log_drop, variant=v).item() for v in variants]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("row", "mask", "expected"),
    [
        (0, [1, 1, 1, 1], [0.163001336767, 0.039674686358, 0.051429561110]),
        (0, [1, 1, 0, 0], [0.136838929579, 0.025218007387, 0.025267153922]),
        (0, [0, 1, 1, 0], [0.086086920138, 0.036550589401, 0.051429561110]),
        (0, [0, 0, 0, 0], [0.111571775657, 0.0, 0.020410997260]),
        (1, [1, 1, 1, 1], [1.010952563595, 0.480946917179, 0.456434819147]),
        (1, [0, 0, 0, 0], [0.554517744448, 0.0, 0.311238679583]),
    ],
)
def test_hard_masks_give_the_digests_values(row: int, mask: list[int], expected: list[float]) -> None:
    assert hard(row, mask) == pytest.approx(expected, abs=1e-11)


def test_the_soft_band_has_the_digests_values() -> None:
    edges = (torch.tensor([0.9], dtype=torch.float64), torch.tensor([0.1], dtype=torch.float64))
    inside, outside = soft_band(P[0], *edges, 0.02)
    assert inside.exp().tolist() == pytest.approx([0.0067, 1.0, 0.9933, 0.0759], abs=5e-5)
    torch.testing.assert_close(inside.exp() + outside.exp(), torch.ones(4, dtype=torch.float64), **EXACT)


def test_a_band_that_holds_one_class_is_the_binary_divergence_of_the_top_class() -> None:
    p, q = P[0, 0].item(), Q[0, 0].item()
    binary = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    value = clipped_kl(Q[0].log(), P[0].log(), upper=1e-6, lower=0.0, width=1e-4)
    assert value.item() == pytest.approx(binary, abs=1e-9)
    assert hard(0, [0, 0, 0, 0])[2] == pytest.approx(binary, abs=1e-12)


def row_by_row(s: Tensor, t: Tensor, upper: float, lower: float, width: float, variant: str) -> float:
    """Class by class, from probabilities."""
    p, q = torch.softmax(t, -1).tolist(), torch.softmax(s, -1).tolist()
    order = sorted(range(len(p)), key=lambda c: -p[c])
    before, a, b = 0.0, [], []
    for rank, c in enumerate(order):
        mask = 1 / (1 + math.exp(-(before - lower) / width)) / (1 + math.exp(-(upper - before) / width))
        if variant == "rest" and rank == 0:
            mask = 1.0
        a.append(mask * p[c])
        b.append(mask * q[c])
        before += p[c]
    if variant == "rest":
        a.append(1 - sum(a))
        b.append(1 - sum(b))
    else:
        a.append(p[order[0]])
        b.append(q[order[0]])
    if variant == "normalised":
        a, b = [x / sum(a) for x in a], [x / sum(b) for x in b]
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("variant", ["rest", "paper", "normalised"])
def test_every_variant_equals_the_sum_class_by_class(variant: Any) -> None:
    s, t = random_logits(20, 7), random_logits(20, 7, seed=1)
    values = clipped_kl(s, t, upper=0.8, lower=0.1, width=0.05, variant=variant)
    expected = [row_by_row(s[i], t[i], 0.8, 0.1, 0.05, variant) for i in range(20)]
    assert values.tolist() == pytest.approx(expected, abs=1e-10)


@given(st.lists(st.floats(0, 1), min_size=6, max_size=6), st.integers(0, 1000))
def test_with_a_rest_class_any_mask_is_a_noisy_channel(mask: list[float], seed: int) -> None:
    """Data processing: between 0 and the whole divergence."""
    t, s = random_logits(6, seed=seed), random_logits(6, seed=seed + 1)
    order = t.argsort(descending=True)
    log_p, log_q = t.log_softmax(-1)[order], s.log_softmax(-1)[order]
    keep = torch.tensor(mask, dtype=torch.float64)
    value = band_divergence(log_p, log_q, keep.log().clamp_min(-1e30), (1 - keep).log().clamp_min(-1e30))
    assert -1e-12 <= value.item() <= distillation_kl(s, t).item() + 1e-12


@pytest.mark.parametrize("variant", ["rest", "normalised", "paper"])
def test_a_student_that_equals_its_teacher_has_no_loss_and_no_slope(variant: Any) -> None:
    t = random_logits(5, 9)
    s = (t + 3).requires_grad_()
    values = clipped_kl(s, t, upper=0.7, lower=0.05, variant=variant)
    (gradient,) = torch.autograd.grad(values.sum(), s)
    assert values.abs().max() < 1e-12
    if variant != "paper":  # neither side of the printed form sums to 1: it has a slope there
        assert gradient.abs().max() < 1e-12


def test_a_band_over_everything_is_the_whole_divergence() -> None:
    s, t = random_logits(6, 9), random_logits(6, 9, seed=1)
    bounds = {"upper": torch.full((6,), 5.0).double(), "lower": torch.full((6,), -5.0).double()}
    torch.testing.assert_close(clipped_kl(s, t, **bounds), distillation_kl(s, t), **EXACT)
    torch.testing.assert_close(
        clipped_kl(s, t, temperature=2.0, **bounds), distillation_kl(s, t, temperature=2.0), **EXACT
    )


def test_the_printed_form_can_be_negative() -> None:
    t, s = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.6, 0.35, 0.05]).log()
    assert clipped_kl(s, t, upper=0.5, lower=0.1, variant="paper") < 0
    assert clipped_kl(s, t, upper=0.5, lower=0.1) >= 0


def test_bounds_per_token_carry_the_gradient_of_the_value() -> None:
    s, t = random_logits(3, 5), random_logits(3, 5, seed=1)
    upper = torch.tensor([0.8, 0.6, 0.9], dtype=torch.float64, requires_grad=True)
    lower = torch.tensor([0.1, 0.2, 0.0], dtype=torch.float64, requires_grad=True)
    s.requires_grad_()

    for variant in ("rest", "paper", "normalised"):

        def loss(s: Tensor, u: Tensor, low: Tensor, variant: Any = variant) -> Tensor:
            return clipped_kl(s, t, upper=u, lower=low, width=0.1, variant=variant)

        assert torch.autograd.gradcheck(loss, (s, upper, lower))


def test_a_hard_mask_hides_what_the_student_rules_out() -> None:
    log_p, log_q = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.7, 0.3, 0.0]).log()
    keep = torch.tensor([1.0, 1.0, 0.0])
    value = band_divergence(
        log_p, log_q, keep.log().clamp_min(-1e30), (1 - keep).log().clamp_min(-1e30), variant="paper"
    )
    assert torch.isfinite(value)


def test_bad_bounds_are_named() -> None:
    s = random_logits(2, 3)
    for options, message in (
        ({"upper": 1.2}, "upper must lie between 0 and 1, got 1.2"),
        ({"lower": -0.1}, "lower must lie between 0 and 1"),
        ({"upper": 0.2, "lower": 0.3}, "lower must be less than upper, got 0.3 and 0.2"),
        ({"width": 0.0}, "width must be a finite number > 0, got 0.0"),
        ({"upper": torch.ones(3)}, r"upper and lower must have the shape \(2,\), got \(3,\)"),
        ({"variant": "renorm"}, "variant must be rest, paper or normalised, got 'renorm'"),
    ):
        with pytest.raises(ValueError, match=message):
            clipped_kl(s, s, **options)  # type: ignore[arg-type]


def test_token_divergences_are_the_digests() -> None:
    """What sequence correction ranks positions by, in both directions."""
    forward = [0.05142956110979794, 0.4564348191467835, 0.4298131946103268]
    assert distillation_kl(Q.log(), P.log()).tolist() == pytest.approx(forward, abs=1e-12)
    backward = [0.0545836157, 0.4564348191, 0.4458463725]
    assert reverse_kl(Q.log(), P.log()).tolist() == pytest.approx(backward, abs=1e-10)


def test_span_correlation_has_the_digests_values() -> None:
    p, q = P.log().unsqueeze(0), Q.log().unsqueeze(0)
    assert span_correlation(q, p, [[(0, 2)]]).item() == pytest.approx(0.12816005617976298, abs=1e-13)
    assert span_correlation(q, p, [[(1, 3)]]).item() == pytest.approx(0.2766767066451384, abs=1e-13)
    assert span_correlation(q, p, [[(0, 3)]]).item() == pytest.approx(0.2024183814, abs=1e-10)
    assert span_correlation(q, p, [[(0, 3)]], squared=True).item() == pytest.approx((0.016425 + 0.07655) / 2, abs=1e-12)


def test_span_correlation_equals_the_sum_pair_by_pair_in_any_chunks() -> None:
    s, t = random_logits(3, 8, 6), random_logits(3, 8, 6, seed=1)
    spans = [[(0, 3), (5, 8)], [(2, 3)], [(1, 7)]]
    p, q = t.softmax(-1), s.softmax(-1)
    expected = []
    for i, row in enumerate(spans):
        pairs = [j for start, end in row for j in range(start, end - 1)]
        distances = [(p[i, j] * p[i, j + 1] - q[i, j] * q[i, j + 1]).square().sum().sqrt().item() for j in pairs]
        expected.append(sum(distances) / len(pairs) if pairs else 0.0)
    for chunk in (1, 2, 1000):
        assert span_correlation(s, t, spans, chunk_size=chunk).tolist() == pytest.approx(expected, abs=1e-12)
    linked = linked_positions(spans, 3, 8)
    assert span_correlation(s, t, linked).tolist() == pytest.approx(expected, abs=1e-12)


def test_span_correlation_has_the_gradient_of_its_value_and_none_for_the_teacher() -> None:
    s, t = random_logits(2, 4, 5).requires_grad_(), random_logits(2, 4, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: span_correlation(x, t, [[(0, 3)], [(1, 4)]], chunk_size=2), s)
    span_correlation(s, t, [[(0, 3)], []]).sum().backward()
    assert t.grad is None
    assert s.grad is not None
    assert not s.grad[1].any()


def test_span_correlation_of_equal_models_is_zero_with_zero_slope() -> None:
    t = random_logits(1, 4, 5)
    s = t.clone().requires_grad_()
    value = span_correlation(s, t, [[(0, 4)]])
    value.sum().backward()
    assert value.item() == 0
    assert s.grad is not None
    assert torch.equal(s.grad, torch.zeros_like(t))


def test_span_correlation_is_unchanged_by_the_order_of_classes_and_computed_in_float32() -> None:
    s, t = random_logits(1, 4, 5), random_logits(1, 4, 5, seed=1)
    for order in itertools.islice(itertools.permutations(range(5)), 3, 40, 12):
        torch.testing.assert_close(
            span_correlation(s[..., list(order)], t[..., list(order)], [[(0, 4)]]), span_correlation(s, t, [[(0, 4)]])
        )
    half = span_correlation(s.half(), t.half(), [[(0, 4)]])
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), span_correlation(s.half().double(), t.half().double(), [[(0, 4)]]))


def test_span_correlation_works_on_nothing() -> None:
    assert span_correlation(torch.zeros(0, 3, 5), torch.zeros(0, 3, 5), []).shape == (0,)
    assert span_correlation(torch.zeros(1, 0, 5), torch.zeros(1, 0, 5), [[]]).tolist() == [0.0]
    assert span_correlation(torch.zeros(2, 1, 5), torch.zeros(2, 1, 5), [[(0, 1)], []]).tolist() == [0.0, 0.0]
    strided = random_logits(2, 5, 4).transpose(1, 2)
    assert span_correlation(strided, strided + 1, [[(0, 4)], []]).shape == (2,)


def test_bad_spans_are_named() -> None:
    x = torch.zeros(2, 4, 3)
    for spans, message in (
        ([[(0, 5)], []], r"span \(0, 5\) of example 0 must have 0 <= start < end <= 4, the length"),
        ([[], [(2, 2)]], r"span \(2, 2\) of example 1"),
        ([[], [(-1, 2)]], r"span \(-1, 2\) of example 1"),
        ([[]], "spans must be one list per example, 2, got 1"),
        (torch.ones(2, 4, dtype=torch.bool), "spans link the last position to one after it"),
        (torch.ones(2, 3, dtype=torch.bool), r"spans must be a boolean tensor of shape \(2, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            span_correlation(x, x, spans)
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        span_correlation(x, x, [[], []], chunk_size=0)
    with pytest.raises(ValueError, match=r"student_logits must have the shape \(batch, length, classes\)"):
        span_correlation(x[0], x[0], [[]])
