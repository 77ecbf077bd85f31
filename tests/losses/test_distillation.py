"""Distillation losses against the paper digests' numbers, closed forms and slow references."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from lossmith.losses import (
    cross_entropy,
    decoupled_kl,
    dist,
    distillation_kl,
    jensen_shannon,
    plackett_luce_distillation,
    reverse_kl,
)

S = torch.tensor([[0.2, -0.4, 1, 0.5], [1.5, 0.3, -0.2, 0.1]], dtype=torch.float64)
T = torch.tensor([[2, 0.5, 1, -1], [0.1, 3, 0.2, 1]], dtype=torch.float64)
Y = torch.tensor([2, 1])
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def random_logits(rows: int, classes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * classes)
    s, t = (torch.randn(rows, classes, generator=generator, dtype=torch.float64) for _ in range(2))
    return s, t, torch.randint(classes, (rows,), generator=generator)


@pytest.mark.parametrize(
    ("temperature", "mean"), [(1.0, 1.3413220282730909), (2.0, 1.2404931647339352), (4.0, 1.1598057553810937)]
)
def test_pld_gives_the_digests_values(temperature: float, mean: float) -> None:
    values = plackett_luce_distillation(S, T, Y, temperature=temperature)
    assert values.mean().item() == pytest.approx(mean, abs=1e-12)
    if temperature == 1:
        torch.testing.assert_close(
            values, torch.tensor([1.0043864152864976, 1.6782576412596844], dtype=torch.float64), **EXACT
        )


def test_pld_gives_the_digests_gradient() -> None:
    s = S.clone().requires_grad_()
    plackett_luce_distillation(s, T, Y).mean().backward()
    expected = [
        [-0.17772520448586118, 0.021361093912299275, -0.0634150826551285, 0.2197791932286903],
        [0.2893218618331668, -0.3300702562715932, 0.028553030398310104, 0.012195364040116154],
    ]
    torch.testing.assert_close(s.grad, torch.tensor(expected, dtype=torch.float64), **EXACT)


def pld_row_by_row(s: torch.Tensor, t: torch.Tensor, y: int) -> tuple[float, list[float]]:
    """Value and closed-form gradient, class by class."""
    order = [y, *sorted((c for c in range(len(s)) if c != y), key=lambda c: -float(t[c]))]
    alpha = torch.softmax(t, -1)
    value, gradient = 0.0, torch.zeros_like(s)
    for k, c in enumerate(order):
        left = order[k:]
        value += float(alpha[c] * (torch.logsumexp(s[left], 0) - s[c]))
        gradient[left] += alpha[c] * torch.softmax(s[left], 0)
        gradient[c] -= alpha[c]
    return value, gradient.tolist()


def test_pld_equals_the_closed_forms_row_by_row() -> None:
    s, t, y = random_logits(20, 9)
    s.requires_grad_()
    values = plackett_luce_distillation(s, t, y)
    values.sum().backward()
    for i in range(20):
        value, gradient = pld_row_by_row(s[i].detach(), t[i], int(y[i]))
        assert values[i].item() == pytest.approx(value, abs=1e-12)
        assert s.grad[i].tolist() == pytest.approx(gradient, abs=1e-12)
    assert s.grad.sum(-1).abs().max() < 1e-14


def test_pld_with_all_weight_on_the_first_rank_is_cross_entropy() -> None:
    torch.testing.assert_close(plackett_luce_distillation(S, T, Y, weights="ce"), cross_entropy(S, Y), **EXACT)
    assert plackett_luce_distillation(S, T, Y, weights="ce").mean().item() == pytest.approx(1.2911861992309395)
    first = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(plackett_luce_distillation(S, T, Y, weights=first), cross_entropy(S, Y), **EXACT)


def test_pld_with_uniform_weights_is_the_log_likelihood_of_the_ranking() -> None:
    values = 4 * plackett_luce_distillation(S, T, Y, weights="uniform")
    torch.testing.assert_close(
        values, torch.tensor([3.1393826734775825, 5.373352955664663], dtype=torch.float64), **EXACT
    )
    # Over all orders that a teacher may have, and all first choices, the probabilities sum to 1.
    total = 0.0
    for order in itertools.permutations(range(4)):
        teacher = torch.empty(4, dtype=torch.float64)
        teacher[list(order)] = torch.arange(4, 0, -1, dtype=torch.float64)
        one = plackett_luce_distillation(S[0], teacher, torch.tensor(order[0]), weights="uniform")
        total += math.exp(-4 * one.item())
    assert total == pytest.approx(1, abs=1e-12)


def test_pld_position_weights_are_those_of_p_list_mle_and_do_not_overflow() -> None:
    weights = torch.tensor([7.0, 3, 1, 0], dtype=torch.float64) / 11
    torch.testing.assert_close(
        plackett_luce_distillation(S, T, Y, weights="position"),
        plackett_luce_distillation(S, T, Y, weights=weights),
        **EXACT,
    )
    s, t, y = random_logits(2, 3000)
    assert torch.isfinite(plackett_luce_distillation(s, t, y, weights="position")).all()


def test_pld_of_two_classes_is_cross_entropy_times_the_teachers_probability() -> None:
    s, t = torch.tensor([0.7, -0.2], dtype=torch.float64), torch.tensor([-1.0, 2], dtype=torch.float64)
    value = plackett_luce_distillation(s, t, torch.tensor(0))
    assert value.item() == pytest.approx(0.016179520397079507, abs=1e-12)
    assert value.item() == pytest.approx((t.softmax(-1)[0] * cross_entropy(s, torch.tensor(0))).item(), abs=1e-12)


def test_pld_is_convex_and_not_negative() -> None:
    s, t, y = random_logits(50, 6)
    other = random_logits(50, 7)[0][:, :6]
    middle = plackett_luce_distillation((s + other) / 2, t, y)
    ends = (plackett_luce_distillation(s, t, y) + plackett_luce_distillation(other, t, y)) / 2
    assert (middle <= ends + 1e-12).all()
    assert (middle >= 0).all()


def test_pld_of_a_constant_student_has_its_closed_form() -> None:
    left = torch.tensor([4.0, 3, 2, 1], dtype=torch.float64).log()
    alpha = torch.tensor(
        [0.22420781804820114, 0.6094600375988771, 0.1359889157935055, 0.030343228559416225], dtype=torch.float64
    )
    value = plackett_luce_distillation(torch.full((4,), 5.0).double(), T[0], Y[0])
    assert value.item() == pytest.approx((alpha * left).sum().item(), abs=1e-12)


def test_pld_temperature_has_its_limits() -> None:
    hot = plackett_luce_distillation(S, T, Y, temperature=1e9)
    torch.testing.assert_close(hot, plackett_luce_distillation(S, T, Y, weights="uniform"), rtol=1e-8, atol=1e-8)
    cold = plackett_luce_distillation(S, T, Y, temperature=1e-3)
    # Row 1's teacher is right: cross entropy. Row 0's prefers class 0, which is at rank 2: that bracket.
    assert cold[1].item() == pytest.approx(cross_entropy(S, Y)[1].item())
    assert cold[0].item() == pytest.approx((torch.logsumexp(S[0, [0, 1, 3]], 0) - S[0, 0]).item())


def test_pld_weighs_with_the_teachers_own_logits_not_with_those_changed_for_sorting() -> None:
    """The faulty form (infinity put at the target before the softmax) is silently cross entropy."""
    assert (plackett_luce_distillation(S, T, Y) - cross_entropy(S, Y)).abs().min() > 0.05


def test_pld_stays_finite_for_far_apart_logits() -> None:
    s, t = torch.tensor([1000.0, -1000, 0]), torch.tensor([0.0, 1, 2])
    assert plackett_luce_distillation(s, t, torch.tensor(1)).item() == pytest.approx(1154.697897884417, rel=1e-6)


def test_pld_ties_are_broken_by_class_index() -> None:
    s, _, y = random_logits(5, 6)
    t = torch.zeros(5, 6, dtype=torch.float64)
    assert torch.equal(plackett_luce_distillation(s, t, y), plackett_luce_distillation(s, t.clone(), y))
    order_of_index = -torch.arange(6, dtype=torch.float64).expand(5, 6)
    torch.testing.assert_close(
        plackett_luce_distillation(s, t, y, weights="uniform"),
        plackett_luce_distillation(s, order_of_index, y, weights="uniform"),
    )


def test_pld_of_the_top_classes_is_pld_of_those_classes_alone() -> None:
    s, t, y = random_logits(30, 8)
    values = plackett_luce_distillation(s, t, y, top_k=3)
    for i in range(30):
        kept = list(dict.fromkeys([int(y[i]), *t[i].argsort(descending=True)[:3].tolist()]))
        expected = plackett_luce_distillation(s[i, kept], t[i, kept], torch.tensor(0))
        assert values[i].item() == pytest.approx(expected.item(), abs=1e-12)
    torch.testing.assert_close(
        plackett_luce_distillation(s, t, y, top_k=8), plackett_luce_distillation(s, t, y), **EXACT
    )


def test_pld_refuses_what_cannot_be_ranked() -> None:
    with pytest.raises(ValueError, match=r"targets must be in \[0, 4\), got 4 at index \(1,\)"):
        plackett_luce_distillation(S, T, torch.tensor([2, 4]))
    with pytest.raises(ValueError, match="ignore_index must lie outside the 4 ranked classes, got 1"):
        plackett_luce_distillation(S, T, Y, ignore_index=1)
    with pytest.raises(ValueError, match="at least 2 classes"):
        plackett_luce_distillation(S[:, :1], T[:, :1], torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="weights must be 4 numbers"):
        plackett_luce_distillation(S, T, Y, weights=torch.ones(3))
    with pytest.raises(ValueError, match="weights must be finite and >= 0"):
        plackett_luce_distillation(S, T, Y, weights=torch.tensor([1.0, 0, -1, 0]))
    with pytest.raises(ValueError, match="weights must be teacher"):
        plackett_luce_distillation(S, T, Y, weights="theacher")  # type: ignore[arg-type]


def test_a_student_that_rules_out_a_class_with_weight_has_infinite_loss() -> None:
    s = S.clone()
    s[0, 0] = -math.inf
    assert plackett_luce_distillation(s, T, Y)[0] == math.inf


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_forward_and_reverse_divergence_are_torchs(temperature: float) -> None:
    s, t, _ = random_logits(10, 7)
    log_q, log_p = F.log_softmax(s / temperature, -1), F.log_softmax(t / temperature, -1)
    forward = temperature**2 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    backward = temperature**2 * F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(distillation_kl(s, t, temperature=temperature), forward, **EXACT)
    torch.testing.assert_close(reverse_kl(s, t, temperature=temperature), backward, **EXACT)


def test_jensen_shannon_tends_to_forward_and_reverse_divergence_at_its_ends() -> None:
    """The published fault: teacher and student the wrong way round."""
    s, t, _ = random_logits(10, 7)
    tiny = 1e-7
    torch.testing.assert_close(jensen_shannon(s, t, beta=tiny) / tiny, distillation_kl(s, t), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(jensen_shannon(s, t, beta=1 - tiny) / tiny, reverse_kl(s, t), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(jensen_shannon(s, t), jensen_shannon(t, s), **EXACT)
    with pytest.raises(ValueError, match="beta must lie between 0 and 1, got 1"):
        jensen_shannon(s, t, beta=1.0)


def test_decoupled_parts_add_up_to_the_whole_divergence() -> None:
    """KL = KL(target against rest) + (1 - p_y) KL(rest), the paper's equation 5."""
    s, t, y = random_logits(10, 7)
    rest = 1 - t.softmax(-1).gather(-1, y[:, None])[:, 0]
    target_part = decoupled_kl(s, t, y, alpha=1, beta=0, temperature=1)
    other_part = decoupled_kl(s, t, y, alpha=0, beta=1, temperature=1)
    torch.testing.assert_close(target_part + rest * other_part, distillation_kl(s, t), **EXACT)


def test_dist_is_the_correlation_over_classes_and_over_the_batch() -> None:
    s, t, _ = random_logits(10, 7)
    p, q = (t / 4).softmax(-1), (s / 4).softmax(-1)
    rows = torch.stack([1 - torch.corrcoef(torch.stack([p[i], q[i]]))[0, 1] for i in range(10)])
    columns = torch.stack([1 - torch.corrcoef(torch.stack([p[:, c], q[:, c]]))[0, 1] for c in range(7)]).mean()
    values = dist(s, t, beta=2, gamma=3, temperature=4)
    torch.testing.assert_close(values, 16 * (2 * rows + 3 * columns), rtol=1e-9, atol=1e-9)


def test_dist_without_variance_is_finite() -> None:
    s = torch.zeros(1, 4, requires_grad=True)
    value = dist(s, torch.randn(1, 4))
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(s.grad).all()
