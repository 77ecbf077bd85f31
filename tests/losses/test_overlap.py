"""Dice and Tversky losses against the digest's numbers and plain formulas."""

from __future__ import annotations

import math

import pytest
import torch

from lossmith.losses import (
    class_weights,
    cross_entropy,
    dice_loss,
    focal_loss,
    set_dice_loss,
    set_tversky_loss,
    tversky_loss,
)

P = torch.tensor([0.9, 0.6, 0.3, 0.2, 0.05], dtype=torch.float64)
Y = torch.tensor([1, 1, 1, 0, 0])
LOGITS = torch.tensor([[2, 0.5, -1], [0.1, 0.2, 0.3], [-1, 0, 3], [1, 1, 0]], dtype=torch.float64)
CLASSES = torch.tensor([0, 1, 2, 2])


def binary() -> torch.Tensor:
    """One logit per example."""
    return torch.logit(P).unsqueeze(-1).requires_grad_()


def by_probability(loss: torch.Tensor, z: torch.Tensor) -> list[float]:
    """Gradient by p instead of by the logit."""
    (gradient,) = torch.autograd.grad(loss, z)
    return (gradient[:, 0] / (P * (1 - P))).tolist()


def test_example_level_values_and_gradients_are_the_digests() -> None:
    z = binary()
    plain = dice_loss(z, Y, alpha=0)
    assert plain.tolist() == pytest.approx([0.0035587189, 0.0677966102, 0.2344497608, 0.0384615385, 0.0024937656])
    assert plain.mean().item() == pytest.approx(0.06935207876876501, abs=1e-14)
    expected = [-0.0146907967, -0.0746911807, -0.1474325221, 0.073964497, 0.0199003738]
    assert by_probability(plain.mean(), z) == pytest.approx(expected, abs=1e-9)
    dsc = dice_loss(z, Y, alpha=1, square=False)
    assert dsc.mean().item() == pytest.approx(0.26308711454679773, abs=1e-14)
    expected = [0.1098875941, 0.0239158163, -0.049139043, 0.0891795482, 0.1640455454]
    assert by_probability(dsc.mean(), z) == pytest.approx(expected, abs=1e-9)
    tversky = tversky_loss(z, Y)
    assert tversky.mean().item() == pytest.approx(0.09283453673697573, abs=1e-14)
    expected = [-0.0525969757, -0.0617283951, -0.0734618916, 0.0826446281, 0.0951814396]
    assert by_probability(tversky.mean(), z) == pytest.approx(expected, abs=1e-9)
    other = tversky_loss(z, Y, false_positives=0.3, false_negatives=0.7)
    assert other.mean().item() == pytest.approx(0.10591885612089172, abs=1e-14)


def test_focal_loss_agrees_with_the_digest() -> None:
    two = torch.stack([torch.zeros(5, dtype=torch.float64), torch.logit(P)], -1)
    assert focal_loss(two, Y, gamma=2.0).mean().item() == pytest.approx(0.13635727087347652, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "value", "gradient"),
    [
        (
            {"alpha": 0, "square": False},
            0.2396694214876035,
            [-0.2049040366] * 3 + [0.1256744758] * 2,
        ),
        (
            {"alpha": 0},
            0.13248467703913258,
            [-0.0826916395, -0.1808546181, -0.2790175966, 0.0654419857, 0.0163604964],
        ),
        (
            {"alpha": 0.01},
            0.13553591708660284,
            [-0.0810677211, -0.1804233275, -0.2798329613, 0.0652986765, 0.0164132853],
        ),
    ],
)
def test_set_level_values_and_gradients_are_the_digests(
    options: dict[str, float], value: float, gradient: list[float]
) -> None:
    z = binary()
    loss = set_dice_loss(z, Y, **options).sum()
    assert loss.item() == pytest.approx(value, abs=1e-14)
    assert by_probability(loss, z) == pytest.approx(gradient, abs=1e-9)


@pytest.mark.parametrize(
    ("alpha", "released", "by_set"),
    [(0, 0.28022989655112607, 0.201232971060511), (0.01, 0.2803076581263219, 0.20301041436985676)],
)
def test_several_classes_are_one_against_the_rest(alpha: float, released: float, by_set: float) -> None:
    assert dice_loss(LOGITS, CLASSES, alpha=alpha).mean().item() == pytest.approx(released, abs=1e-10)
    assert set_dice_loss(LOGITS, CLASSES, alpha=alpha).sum().item() == pytest.approx(by_set, abs=1e-12)


def test_hard_predictions_give_one_less_f1() -> None:
    p, y = torch.tensor([1, 0, 1, 1, 0, 0]), torch.tensor([1, 1, 1, 0, 0, 0])
    z = (80.0 * p - 40).double().unsqueeze(-1)
    for square in (True, False):
        loss = set_dice_loss(z, y, alpha=0, smooth=1e-12, square=square).sum()
        assert loss.item() == pytest.approx(1 / 3, abs=1e-9)


@pytest.mark.parametrize("level", ["example", "set"])
def test_tversky_with_equal_weights_is_dice_with_twice_the_smoothing(level: str) -> None:
    dice, tversky = (dice_loss, tversky_loss) if level == "example" else (set_dice_loss, set_tversky_loss)
    torch.testing.assert_close(
        tversky(LOGITS, CLASSES, smooth=0.7).sum(), dice(LOGITS, CLASSES, alpha=0, square=False, smooth=1.4).sum()
    )


def test_set_level_gradients_are_the_same_for_all_positives_and_for_all_negatives() -> None:
    z = binary()
    gradient = by_probability(set_dice_loss(z, Y, alpha=0, square=False).sum(), z)
    total, overlap = P.sum() + 3 + 1, 2 * (P * Y).sum() + 1
    assert gradient == pytest.approx([(-(2 * y * total - overlap) / total**2).item() for y in Y], abs=1e-12)


def test_the_printed_form_pushes_right_answers_back() -> None:
    """Its minimum for a positive is at 1 / (1 + alpha)."""
    for alpha in (1.0, 0.5, 0.1):
        best = 1 / (1 + alpha)
        for p, sign in ((best - 0.01, -1), (best + 0.01, 1)):
            z = torch.logit(torch.tensor([[p]], dtype=torch.float64)).requires_grad_()
            dice_loss(z, torch.tensor([1]), alpha=alpha, square=False).sum().backward()
            assert math.copysign(1, z.grad.item()) == sign


def test_masked_examples_change_nothing_at_either_level() -> None:
    more = torch.cat([LOGITS, torch.tensor([[float("nan")] * 3, [9.0, -9, 0]], dtype=torch.float64)]).requires_grad_()
    targets = torch.cat([CLASSES, torch.tensor([-100, -100])])
    for loss in (dice_loss, tversky_loss, set_dice_loss, set_tversky_loss):
        values = loss(more, targets)
        (gradient,) = torch.autograd.grad(values.sum(), more)
        torch.testing.assert_close(values[:4], loss(LOGITS, CLASSES))
        assert not values[4:].any()
        assert not gradient[4:].any()


def test_order_and_shape_of_the_batch_change_nothing() -> None:
    order = torch.tensor([2, 0, 3, 1])
    expected = set_dice_loss(LOGITS, CLASSES)
    torch.testing.assert_close(set_dice_loss(LOGITS[order], CLASSES[order]), expected[order])
    torch.testing.assert_close(set_dice_loss(LOGITS.reshape(2, 2, 3), CLASSES.reshape(2, 2)), expected.reshape(2, 2))


def test_batches_without_positives_and_empty_ones_are_finite() -> None:
    z = torch.full((4, 1), -30.0, requires_grad=True)
    loss = set_dice_loss(z, torch.zeros(4, dtype=torch.long)).sum()
    loss.backward()
    assert torch.isfinite(z.grad).all()
    assert set_dice_loss(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)).shape == (0,)
    assert not set_dice_loss(LOGITS, torch.full((4,), -100)).any()


def test_extreme_logits_have_bounded_slopes() -> None:
    for size in (30.0, 1e4):
        z = torch.tensor([[size], [-size], [size], [-size]], requires_grad=True)
        for loss in (dice_loss, set_dice_loss, tversky_loss, set_tversky_loss):
            (gradient,) = torch.autograd.grad(loss(z, torch.tensor([1, 1, 0, 0])).sum(), z)
            assert torch.isfinite(gradient).all()
            assert gradient.abs().max() <= 1


def test_hard_negative_mining_keeps_exactly_the_hardest() -> None:
    z = torch.logit(torch.tensor([0.9, 0.5, 0.4, 0.3, 0.2, 0.1], dtype=torch.float64)).unsqueeze(-1)
    y = torch.tensor([1, 1, 0, 0, 0, 0])
    mined = set_dice_loss(z, y, ohem_ratio=1.0)
    assert (mined[4:] == 0).all()
    torch.testing.assert_close(mined[:4], set_dice_loss(z[:4], y[:4]))
    # At least one negative, however small the ratio.
    assert (set_dice_loss(z, y, ohem_ratio=0.01) != 0).sum() == 3
    torch.testing.assert_close(set_dice_loss(z, y, ohem_ratio=100), set_dice_loss(z, y))


def test_ignored_classes_do_not_enter_the_mean() -> None:
    p = LOGITS.softmax(-1)
    y = torch.nn.functional.one_hot(CLASSES, 3).double()
    parts = 1 - (2 * (p * y).sum(0) + 1) / (p.square().sum(0) + y.sum(0) + 1)
    loss = set_dice_loss(LOGITS, CLASSES, alpha=0, ignore_classes=(0,)).sum()
    assert loss.item() == pytest.approx(parts[1:].mean().item(), abs=1e-12)


def test_set_level_gradients_are_those_of_the_value() -> None:
    z = LOGITS.clone().requires_grad_()
    for loss in (set_dice_loss, set_tversky_loss):
        assert torch.autograd.gradcheck(lambda x, loss=loss: loss(x, CLASSES), z)


def test_class_weights_are_the_digests() -> None:
    expected = [0.0969100130, 0.8239087409, 1.3010299957]
    assert class_weights([800, 150, 50]).tolist() == pytest.approx(expected, abs=1e-9)
    with pytest.raises(ValueError, match="counts must be positive"):
        class_weights([3, 0])


def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match="smooth must be a finite number > 0, got 0"):
        dice_loss(LOGITS, CLASSES, smooth=0)
    with pytest.raises(ValueError, match="alpha must be a finite number >= 0, got -1"):
        set_dice_loss(LOGITS, CLASSES, alpha=-1)
    with pytest.raises(ValueError, match=r"targets must be in \[0, 2\), got 2"):
        set_dice_loss(binary(), torch.tensor([0, 1, 2, 0, 0]))
    with pytest.raises(ValueError, match="ohem_ratio"):
        set_dice_loss(LOGITS, CLASSES, ohem_ratio=-1)
    with pytest.raises(ValueError, match=r"ignore_classes must be in \[0, 3\), got 3"):
        set_dice_loss(LOGITS, CLASSES, ignore_classes=(3,))
    with pytest.raises(ValueError, match="leaves no class"):
        set_dice_loss(LOGITS, CLASSES, ignore_classes=(0, 1, 2))
    assert cross_entropy(LOGITS, CLASSES).shape == (4,)
