"""Superposition: the closed forms of features, overlaps, decay, forward pass and loss."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lossmith.theory import (
    SignedDecayAdamW,
    expected_exponent,
    feature_frequencies,
    loglog_slope,
    mean_absolute_overlap,
    mean_square_overlap,
    represented,
    sample_features,
    signed_decay_,
    toy_loss,
    toy_outputs,
    truncation_loss,
    welch_bound,
    with_density,
)

W3 = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]], dtype=torch.float64)


def units(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, columns, generator=generator, dtype=torch.float64), dim=-1)


# ---- decay -----------------------------------------------------------------------------------------------------------


def test_negative_decay_draws_norms_to_one_and_positive_to_zero() -> None:
    weight = torch.tensor([[0.3, 0.4], [3.0, 4.0]], dtype=torch.float64)
    for decay, expected in (
        (-1.0, [[0.33, 0.44], [2.76, 3.68]]),
        (1.0, [[0.27, 0.36], [2.7, 3.6]]),
        (0.0, weight.tolist()),
    ):
        moved = signed_decay_(weight.clone(), 0.1, decay)
        torch.testing.assert_close(moved, torch.tensor(expected, dtype=torch.float64), rtol=1e-7, atol=0)


def test_many_steps_of_negative_decay_approach_one_geometrically_without_turning() -> None:
    weight = units(5, 3) * torch.tensor([0.1, 0.5, 1.0, 2.0, 7.0], dtype=torch.float64)[:, None]
    start, moved = weight.clone(), weight.clone()
    for _ in range(20):
        signed_decay_(moved, 0.05, -2.0)
    # The authors' 1e-8 beside the norm moves it by that much at most.
    torch.testing.assert_close(moved.norm(dim=-1) - 1, 0.9**20 * (start.norm(dim=-1) - 1), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        torch.nn.functional.normalize(moved, dim=-1), torch.nn.functional.normalize(start, dim=-1), rtol=0, atol=1e-12
    )


def test_a_row_of_zeros_stays_zero_and_a_batch_takes_a_decay_each() -> None:
    weight = torch.stack([torch.tensor([[0.0, 0.0], [0.6, 0.8]])] * 2)
    signed_decay_(weight, 0.1, torch.tensor([-1.0, 1.0]))
    torch.testing.assert_close(weight, torch.tensor([[[0.0, 0.0], [0.6, 0.8]], [[0.0, 0.0], [0.54, 0.72]]]))


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_with_decay_that_is_not_negative_it_takes_the_steps_of_torch_adamw(decay: float) -> None:
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(4, 3, dtype=torch.float64)), torch.nn.Parameter(torch.randn(4).double())]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    first = SignedDecayAdamW([{"params": ours[:1], "weight_decay": decay}, {"params": ours[1:]}], lr=1e-2)
    second = torch.optim.AdamW(
        [{"params": theirs[:1], "weight_decay": decay}, {"params": theirs[1:], "weight_decay": 0.0}], lr=1e-2
    )
    for step in range(30):
        for optimizer, parameters in ((first, ours), (second, theirs)):
            optimizer.zero_grad()
            ((parameters[0] * (step + 1)).sin().sum() + (parameters[1] ** 2).sum()).backward()
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


def test_decay_uses_the_scheduled_rate_and_comes_before_adam() -> None:
    weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    optimizer = SignedDecayAdamW([weight], lr=1.0, weight_decay=-1.0)
    optimizer.param_groups[0]["lr"] = 0.1
    weight.grad = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    optimizer.step()
    # Norm 5 -> 4.6, then Adam's first step of one learning rate against the sign.
    torch.testing.assert_close(weight.detach(), torch.tensor([[2.76 - 0.1, 3.68 + 0.1]], dtype=torch.float64))


def test_wrong_options_of_the_optimiser_are_named() -> None:
    weight, bias = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="lr must not be negative"):
        SignedDecayAdamW([weight], lr=-1.0)
    with pytest.raises(ValueError, match="give vectors a group with weight_decay=0"):
        SignedDecayAdamW([bias], weight_decay=-1.0)
    with pytest.raises(ValueError, match="must be finite"):
        SignedDecayAdamW([weight], weight_decay=math.nan)


# ---- forward ---------------------------------------------------------------------------------------------------------


def test_the_forward_pass_is_the_worked_example() -> None:
    bias = torch.tensor([0.0, -0.1, 0.2], dtype=torch.float64)
    x = torch.tensor([[1.0, 0.0, 0.5], [0.0, 2.0, 0.0]], dtype=torch.float64)
    expected = torch.tensor([[1.3, 0.3, 1.3], [0.0, 1.9, 1.8]], dtype=torch.float64)
    torch.testing.assert_close(toy_outputs(x, W3, bias), expected)
    losses = toy_loss(x, W3, bias)
    torch.testing.assert_close(losses, torch.tensor([0.82, 3.25], dtype=torch.float64))
    assert losses.mean().item() == pytest.approx(2.035)
    assert losses.mean().item() / 3 == pytest.approx(0.6783333, abs=1e-7)


def test_permuting_features_or_rotating_the_hidden_space_changes_nothing() -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(7, 3).double(), torch.randn(7).double(), torch.rand(11, 7).double()
    order = torch.randperm(7)
    torch.testing.assert_close(toy_loss(x[:, order], weight[order], bias[order]), toy_loss(x, weight, bias))
    rotation = torch.linalg.qr(torch.randn(3, 3).double()).Q
    torch.testing.assert_close(toy_outputs(x, weight @ rotation, bias), toy_outputs(x, weight, bias))


def test_the_loss_has_right_gradients() -> None:
    torch.manual_seed(1)
    weight = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    x = torch.rand(3, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda w, b: toy_loss(x, w, b), (weight, bias))


# ---- overlaps --------------------------------------------------------------------------------------------------------


def test_overlaps_are_those_of_the_worked_example() -> None:
    assert mean_square_overlap(W3).item() == pytest.approx(1 / 3, abs=1e-15)
    assert mean_absolute_overlap(W3).item() == pytest.approx(0.4666667, abs=1e-7)
    assert welch_bound(3, 2) == 0.25
    # Lengths do not count.
    assert mean_square_overlap(W3 * torch.tensor([[3.0], [0.1], [20.0]])).item() == pytest.approx(1 / 3)


@given(rows=st.integers(2, 40), columns=st.integers(1, 40), seed=st.integers(0, 9))
def test_no_unit_vectors_overlap_less_than_welch_and_the_sum_is_that_of_all_pairs(
    rows: int, columns: int, seed: int
) -> None:
    weight = units(rows, columns, seed)
    cosine = weight @ weight.T
    pairs = [cosine[i, j].item() ** 2 for i in range(rows) for j in range(i)]
    found = mean_square_overlap(weight).item()
    assert found == pytest.approx(sum(pairs) / len(pairs), rel=1e-9, abs=1e-13)
    assert found >= welch_bound(rows, columns) - 1e-12


def test_a_simplex_reaches_the_bound_and_orthonormal_rows_do_not_overlap() -> None:
    for m in (2, 3, 7):
        corners = torch.eye(m + 1, dtype=torch.float64) - 1 / (m + 1)
        simplex = corners @ torch.linalg.svd(corners).Vh[:m].T
        assert mean_square_overlap(simplex).item() == pytest.approx(1 / m**2, rel=1e-12)
        assert welch_bound(m + 1, m) == pytest.approx(1 / m**2)
    assert mean_square_overlap(torch.eye(5)).item() == 0
    assert welch_bound(5, 5) == 0


@pytest.mark.parametrize("m", [8, 32, 128])
def test_random_vectors_overlap_by_one_over_the_dimensions(m: int) -> None:
    assert m * mean_square_overlap(units(1000, m)).item() == pytest.approx(1.0, abs=0.01)


def test_rows_without_direction_do_not_count() -> None:
    weight = torch.cat([W3, torch.zeros(4, 2, dtype=torch.float64)])
    assert mean_square_overlap(weight).item() == pytest.approx(1 / 3)
    assert math.isnan(mean_square_overlap(torch.zeros(3, 2)).item())
    assert represented(weight).item() == pytest.approx(3 / 7)
    assert represented(W3 * 1.001, 1.0).item() == 1.0


def test_wrong_matrices_are_named() -> None:
    with pytest.raises(ValueError, match="at least two rows"):
        mean_square_overlap(torch.ones(1, 4))
    with pytest.raises(ValueError, match="not finite"):
        mean_square_overlap(torch.tensor([[1.0, math.nan], [0.0, 1.0]]))
    with pytest.raises(TypeError, match=r"torch\.int64"):
        mean_square_overlap(torch.ones(3, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="at least 2 vectors"):
        welch_bound(1, 3)


# ---- features --------------------------------------------------------------------------------------------------------


def test_frequencies_have_their_shapes_and_sums() -> None:
    torch.testing.assert_close(
        feature_frequencies("power", 4), torch.tensor([0.48, 0.24, 0.16, 0.12], dtype=torch.float64)
    )
    exponential = feature_frequencies("exponential", 50, scale=7.0)
    torch.testing.assert_close(exponential[7:] / exponential[:-7], torch.full((43,), math.exp(-1), dtype=torch.float64))
    linear = feature_frequencies("linear", 10, active=2.0)
    assert linear.sum().item() == pytest.approx(2.0)
    torch.testing.assert_close(linear[:-1] - linear[1:], linear[-1].expand(9))


def test_density_keeps_the_shape_and_ends_where_the_first_is_always_on() -> None:
    p = feature_frequencies("power", 1000, exponent=1.0)
    denser = with_density(p, 0.5)
    torch.testing.assert_close(denser / denser[0], p / p[0])
    assert with_density(p, 0.0).sum().item() == pytest.approx(1.0)
    # The digest's sweep ends at about 7.5 active features.
    assert with_density(p, 1.0).sum().item() == pytest.approx(7.4855, abs=1e-3)


@pytest.mark.parametrize("active", [1.0, 7.0])
def test_examples_have_the_moments_of_their_distribution(active: float) -> None:
    p = (
        with_density(feature_frequencies("power", 40, exponent=1.2), 0.4)
        if active > 1
        else feature_frequencies("power", 40, exponent=1.2)
    )
    rows = 100_000
    x = sample_features(p, rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # Five standard errors of each mean.
    torch.testing.assert_close(x.mean(0), p, rtol=0, atol=5 * math.sqrt(4 / 3 * 0.5 / rows))
    torch.testing.assert_close(x.square().mean(0), 4 / 3 * p, rtol=0, atol=5 * math.sqrt(16 / 5 / rows))
    on = (x > 0).double()
    torch.testing.assert_close(on.mean(0), p, rtol=0, atol=5 * math.sqrt(0.25 / rows))
    assert on.sum(1).mean().item() == pytest.approx(p.sum().item(), abs=5 * math.sqrt(p.sum().item() / rows))
    # Features are independent: the variance of the number that are on is the sum of theirs.
    assert on.sum(1).var().item() == pytest.approx((p * (1 - p)).sum().item(), rel=0.03)
    assert x.max() < 2


def test_a_feature_may_be_always_on_or_never_and_seeds_repeat_themselves() -> None:
    p = torch.tensor([1.0, 0.0, 0.5])
    x, again = (sample_features(p, 5000, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert (x[:, 0] > 0).all()
    assert (x[:, 1] == 0).all()
    assert torch.equal(x, again)
    assert sample_features(p, 0).shape == (0, 3)


def test_wrong_frequencies_are_named() -> None:
    with pytest.raises(ValueError, match="did you mean 'power'"):
        feature_frequencies("powr", 4)
    with pytest.raises(ValueError, match="exponent must be at least 0"):
        feature_frequencies("power", 4, exponent=-1.0)
    with pytest.raises(ValueError, match=r"at most 2\.083 can be active"):
        feature_frequencies("power", 4, active=3.0)
    with pytest.raises(ValueError, match=r"lie in \[0, 1\], got 1\.5 at index 1"):
        sample_features(torch.tensor([0.1, 1.5]), 3)
    with pytest.raises(ValueError, match="got nan"):
        sample_features(torch.tensor([math.nan]), 3)
    with pytest.raises(ValueError, match="no feature is ever on"):
        sample_features(torch.zeros(3), 3)


# ---- theory ----------------------------------------------------------------------------------------------------------


def test_the_weak_limit_is_that_computed_by_hand_and_by_sampling() -> None:
    p = feature_frequencies("power", 4)
    assert truncation_loss(p, 2) == pytest.approx(0.3733333, abs=1e-7)
    assert truncation_loss(p, 2, bias="optimal") == pytest.approx(0.3333333, abs=1e-7)
    assert truncation_loss(p, 0) == pytest.approx(4 / 3)
    assert truncation_loss(p, 0, bias="optimal") == pytest.approx(1.0053333, abs=1e-7)
    assert truncation_loss(p, 4) == 0
    x = sample_features(p, 200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stored = torch.eye(4, 2, dtype=torch.float64)
    for bias, name in ((torch.zeros(4), "zero"), (torch.tensor([0.0, 0.0, 0.16, 0.12]), "optimal")):
        measured = toy_loss(x, stored, bias.double())
        assert measured.mean().item() == pytest.approx(truncation_loss(p, 2, bias=name), abs=0.01)  # type: ignore[arg-type]


@pytest.mark.parametrize("alpha, slope", [(1.2, 0.404), (1.5, 0.607), (2.0, 1.021)])
def test_at_finite_size_the_weak_slope_is_steeper_than_its_limit(alpha: float, slope: float) -> None:
    widths = [10, 15, 25, 39, 63, 100]
    p = feature_frequencies("power", 1000, exponent=alpha)
    losses = torch.tensor([truncation_loss(p, width) for width in widths])
    found = loglog_slope(torch.tensor(widths, dtype=torch.float64), losses).exponent.item()
    assert found == pytest.approx(slope, abs=5e-4)
    limit = expected_exponent("weak", alpha)
    assert limit is not None
    assert found > limit


def test_expected_exponents() -> None:
    assert expected_exponent("weak", 1.0) is None
    assert expected_exponent("weak", 2.0) == 1.0
    assert [expected_exponent("strong", a) for a in (0.0, 1.0, 1.5, 2.0)] == [1.0, 1.0, 1.0, 2.0]
    with pytest.raises(ValueError, match="regime"):
        expected_exponent("medium", 1.0)  # type: ignore[arg-type]


def test_slopes_are_exact_on_power_laws_and_need_three_widths() -> None:
    widths = torch.tensor([4.0, 8.0, 16.0, 32.0])
    losses = torch.stack([3 * widths**-0.7, 0.1 * widths**-2.0])
    slope = loglog_slope(widths, losses)
    torch.testing.assert_close(slope.exponent, torch.tensor([0.7, 2.0], dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(slope.factor, torch.tensor([3.0, 0.1], dtype=torch.float64), rtol=1e-6, atol=0)
    assert (slope.r_squared > 1 - 1e-10).all()
    with pytest.raises(ValueError, match="at least 3 different widths"):
        loglog_slope(torch.tensor([1.0, 2.0, 2.0]), torch.ones(3))
    with pytest.raises(ValueError, match="losses must be positive"):
        loglog_slope(widths, widths - 4)
