"""The contrast between good and bad rationales: the digest's numbers, exact identities, and a slow reference."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lossmith.losses import contrastive_rationale_loss, rationale_quality_loss
from lossmith.losses.contrastive import SCHEMES, choose_rationale

GOOD, GOOD_SCORES = (1.2, 0.8, 2.0), (0.9, 0.7, 0.95)
BAD_SCORES = (0.1, 0.3, 0.6)


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64)


@pytest.mark.parametrize(
    ("bad", "beta", "margin", "expected"),
    [
        ((2.5, 4.0, 1.0), 0.2, 3.0, 0.56),  # one negative has reached the margin: none is pushed
        ((2.5, 2.0, 1.0), 0.2, 3.0, 0.65),
        ((2.5, 2.0, 1.0), 0.5, 2.0, 0.56),
        ((2.5, 2.0, 1.0), 0.2, 0.0, 0.56),  # margin 0: cross entropies are never below it
    ],
)
def test_values_worked_out_by_hand(bad: tuple[float, ...], beta: float, margin: float, expected: float) -> None:
    loss = contrastive_rationale_loss(
        row(*GOOD), row(*bad), row(*GOOD_SCORES), row(*BAD_SCORES), beta=beta, margin=margin
    )
    assert loss.item() == pytest.approx(expected, abs=1e-15)


def test_gradients_are_the_score_at_the_chosen_positive_and_minus_beta_times_badness_at_the_chosen_negative() -> None:
    good, bad = row(*GOOD).requires_grad_(), row(2.5, 2.0, 1.0).requires_grad_()
    good_scores, bad_scores = row(*GOOD_SCORES).requires_grad_(), row(*BAD_SCORES).requires_grad_()
    contrastive_rationale_loss(good, bad, good_scores, bad_scores).sum().backward()
    assert good.grad.tolist() == [[0.0, 0.7, 0.0]]
    torch.testing.assert_close(bad.grad, row(-0.2 * 0.9, 0.0, 0.0))
    assert good_scores.grad is None  # scores are constants: the judge learns nothing from the student's loss
    assert bad_scores.grad is None


@pytest.mark.parametrize("value", [3.0, 3.5, math.inf])
def test_a_negative_at_or_beyond_the_margin_has_no_gradient(value: float) -> None:
    bad = row(value, 1.0).requires_grad_()
    loss = contrastive_rationale_loss(row(1.0), bad)
    loss.sum().backward()
    assert loss.item() == 1.0
    assert bad.grad.tolist() == [[0.0, 0.0]]


def test_quality_loss_has_the_published_value_and_gradients() -> None:
    good, bad = row(*GOOD_SCORES).requires_grad_(), row(*BAD_SCORES).requires_grad_()
    loss = rationale_quality_loss(good, bad)
    loss.sum().backward()
    assert loss.item() == pytest.approx(-0.5010261188511342, abs=1e-15)
    torch.testing.assert_close(good.grad, -good.detach().softmax(-1))
    torch.testing.assert_close(bad.grad, bad.detach().softmax(-1))
    torch.testing.assert_close(good.grad, row(-0.3484, -0.2853, -0.3663), atol=5e-5, rtol=0)
    torch.testing.assert_close(bad.grad, row(0.2584, 0.3156, 0.4260), atol=5e-5, rtol=0)


def test_quality_loss_is_zero_between_equals_and_minus_one_at_best() -> None:
    assert rationale_quality_loss(row(0.2, 0.9), row(0.9, 0.2)).item() == pytest.approx(0.0, abs=1e-15)
    assert rationale_quality_loss(row(1.0), row(0.0)).item() == -1.0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_quality_loss_is_bounded_by_one_around_the_log_ratio_of_the_numbers(good: list, bad: list) -> None:
    value = rationale_quality_loss(row(*good), row(*bad)).item()
    assert abs(value - math.log(len(bad) / len(good))) <= 1 + 1e-12


def test_quality_loss_of_an_example_without_both_kinds_is_an_exact_zero() -> None:
    good, bad = torch.rand(3, 2).requires_grad_(), torch.rand(3, 2).requires_grad_()
    positive_mask = torch.tensor([[True, True], [False, False], [True, False]])
    negative_mask = torch.tensor([[False, True], [True, True], [False, False]])
    loss = rationale_quality_loss(good, bad, positive_mask=positive_mask, negative_mask=negative_mask)
    loss.sum().backward()
    assert (loss != 0).tolist() == [True, False, False]
    for gradient in (good.grad, bad.grad):
        assert torch.isfinite(gradient).all()
        assert gradient.any(-1).tolist() == [True, False, False]
    assert rationale_quality_loss(good, torch.empty(3, 0)).tolist() == [0.0, 0.0, 0.0]


def reference(
    good: list[float], bad: list[float], s: list[float], t: list[float], beta: float, margin: float, scheme: str
) -> float:
    """Equations 3 to 7 and the other schemes, one example, in plain Python."""
    clipped = [min(x - margin, 0.0) for x in bad]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values) if values else 0.0

    if scheme == "minmax":
        a, b = good.index(min(good)), bad.index(max(bad)) if bad else None
    elif scheme == "maxmin":
        a, b = good.index(max(good)), bad.index(min(bad)) if bad else None
    elif scheme == "mean":
        return mean(good) * mean(s) - beta * mean(clipped) * mean([1 - x for x in t])
    else:
        return mean([x * y for x, y in zip(good, s, strict=True)]) - beta * mean(
            [x * (1 - y) for x, y in zip(clipped, t, strict=True)]
        )
    return s[a] * good[a] - beta * ((1 - t[b]) * clipped[b] if b is not None else 0.0)


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s != "sampling"])
def test_equals_a_loop_over_examples_with_any_numbers_of_rationales(scheme: str) -> None:
    draw = random.Random(0)
    for _ in range(20):
        beta, margin = draw.random(), 4 * draw.random()
        sizes = [(draw.randint(1, 4), draw.randint(0, 4)) for _ in range(5)]
        columns = [[[3 * draw.random() for _ in range(m)], [5 * draw.random() for _ in range(k)]] for m, k in sizes]
        scores = [[[draw.random() for _ in range(m)], [draw.random() for _ in range(k)]] for m, k in sizes]
        expected = [
            reference(c[0], c[1], s[0], s[1], beta, margin, scheme) for c, s in zip(columns, scores, strict=True)
        ]

        def padded(rows: list[list[float]], width: int, filling: float) -> tuple[Tensor, Tensor]:
            full = [r + [filling] * (width - len(r)) for r in rows]
            mask = [[True] * len(r) + [False] * (width - len(r)) for r in rows]
            return torch.tensor(full, dtype=torch.float64), torch.tensor(mask)

        # Filling of any value, NaN too, must have no influence.
        good, good_mask = padded([c[0] for c in columns], 4, math.nan)
        bad, bad_mask = padded([c[1] for c in columns], 4, -math.inf)
        s, _ = padded([x[0] for x in scores], 4, math.nan)
        t, _ = padded([x[1] for x in scores], 4, 7.0)
        good.requires_grad_()
        got = contrastive_rationale_loss(
            good, bad, s, t, positive_mask=good_mask, negative_mask=bad_mask, beta=beta, margin=margin, scheme=scheme
        )
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)
        got.sum().backward()
        assert torch.isfinite(good.grad).all()
        assert not good.grad[~good_mask].any()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_agree_with_finite_differences(scheme: str) -> None:
    torch.manual_seed(3)
    good, bad = 3 * torch.rand(4, 3, dtype=torch.float64), 5 * torch.rand(4, 3, dtype=torch.float64)
    s, t = torch.rand(4, 3, dtype=torch.float64), torch.rand(4, 3, dtype=torch.float64)

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return contrastive_rationale_loss(a, b, s, t, scheme=scheme, generator=torch.Generator().manual_seed(5))

    assert torch.autograd.gradcheck(loss, (good.requires_grad_(), bad.requires_grad_()))


def test_sampling_takes_every_rationale_about_equally_often_and_none_that_is_masked() -> None:
    losses, mask = torch.zeros(3000, 3), torch.tensor([True, False, True]).expand(3000, 3)
    chosen = choose_rationale(
        losses, mask, positive=True, scheme="sampling", generator=torch.Generator().manual_seed(0)
    )
    counts = torch.bincount(chosen, minlength=3)
    assert counts[1] == 0
    assert abs(int(counts[0]) - 1500) < 4 * math.sqrt(3000 / 4)  # four standard deviations


def test_beta_zero_one_positive_and_no_scores_is_the_rationale_loss_of_distilling_step_by_step() -> None:
    losses = torch.rand(6, 1)
    assert torch.equal(contrastive_rationale_loss(losses, torch.rand(6, 2), beta=0.0), losses[:, 0])


def test_a_positive_with_a_larger_loss_changes_nothing() -> None:
    more = contrastive_rationale_loss(row(*GOOD, 5.0), row(1.0), row(*GOOD_SCORES, 0.01))
    assert torch.equal(more, contrastive_rationale_loss(row(*GOOD), row(1.0), row(*GOOD_SCORES)))


@given(st.floats(0, 5), st.floats(0, 5))
def test_an_easier_negative_with_the_same_score_can_only_reduce_the_push(first: float, second: float) -> None:
    one = contrastive_rationale_loss(row(0.0), row(first), None, row(0.4))
    two = contrastive_rationale_loss(row(0.0), row(first, max(first, second)), None, row(0.4, 0.4))
    assert two.item() <= one.item() + 1e-15


def test_no_negatives_leave_the_first_part_alone_also_without_columns() -> None:
    good = torch.rand(2, 3).requires_grad_()
    masked = contrastive_rationale_loss(good, torch.rand(2, 2), negative_mask=torch.zeros(2, 2, dtype=torch.bool))
    without = contrastive_rationale_loss(good, torch.empty(2, 0))
    assert torch.equal(masked, good.min(-1).values)
    assert torch.equal(without, masked)
    assert contrastive_rationale_loss(torch.empty(0, 3), torch.empty(0, 2)).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    good, bad = torch.rand(8, 3).to(dtype), (4 * torch.rand(8, 3)).to(dtype)
    loss = contrastive_rationale_loss(good, bad)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss.double(), contrastive_rationale_loss(good.double(), bad.double()), rtol=1e-6, atol=0
    )


def test_strides_leading_dimensions_vmap_and_compile_change_nothing() -> None:
    good, bad = torch.rand(4, 5, 3, dtype=torch.float64), 5 * torch.rand(4, 5, 2, dtype=torch.float64)
    flat = contrastive_rationale_loss(good.flatten(0, 1), bad.flatten(0, 1)).reshape(4, 5)
    assert torch.equal(contrastive_rationale_loss(good, bad), flat)
    strided = good.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert torch.equal(contrastive_rationale_loss(strided, bad), flat)
    assert torch.equal(torch.func.vmap(contrastive_rationale_loss)(good, bad), flat)
    assert torch.equal(torch.func.vmap(rationale_quality_loss)(good, bad), rationale_quality_loss(good, bad))


def test_a_loss_that_is_not_a_number_is_not_hidden() -> None:
    assert contrastive_rationale_loss(row(math.nan, 1.0), row(1.0)).isnan().all()
    assert contrastive_rationale_loss(row(1.0), row(math.nan, 1.0)).isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": -1.0}, "beta must be a finite number >= 0, got -1"),
        ({"beta": math.nan}, "beta must be"),
        ({"margin": math.inf}, "margin must be a finite number >= 0, got inf"),
        ({"scheme": "min"}, "scheme must be one of minmax, maxmin, .*, got 'min'"),
        ({"positive_scores": torch.rand(2, 2)}, r"positive_scores must have the shape .*\(2, 3\), got \(2, 2\)"),
        ({"negative_mask": torch.ones(2, 3, dtype=torch.bool)}, r"negative_mask must have the shape"),
        ({"negative_losses": torch.rand(3, 2)}, "must be of the same examples"),
    ],
)
def test_wrong_arguments_are_named(change: dict, message: str) -> None:
    arguments = {"positive_losses": torch.rand(2, 3), "negative_losses": torch.rand(2, 2), **change}
    with pytest.raises(ValueError, match=message):
        contrastive_rationale_loss(**arguments)


def test_integers_and_scalars_are_refused() -> None:
    with pytest.raises(TypeError, match="must be floating point"):
        contrastive_rationale_loss(torch.ones(2, 3, dtype=torch.long), torch.rand(2, 3))
    with pytest.raises(ValueError, match="need a last dimension"):
        rationale_quality_loss(torch.tensor(0.5), torch.tensor(0.5))
    with pytest.raises(ValueError, match="counts all rationales"):
        choose_rationale(torch.rand(2, 2), torch.ones(2, 2, dtype=torch.bool), positive=True, scheme="mean")
