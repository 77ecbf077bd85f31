"""The model with free features: balance, equal spectra, speeds of singular values."""

from __future__ import annotations

import pytest
import torch

from lossmith.theory.representation_learning import (
    FreeFeatures,
    balanced_features,
    balanced_start,
    descend,
    error_signal,
    labels_of_counts,
    rank_trajectory,
    singular_speeds,
    summed_loss,
)

W = torch.tensor([[[0.3, -0.2, 0.1, 0.4], [0.1, 0.5, -0.3, 0.2]]], dtype=torch.float64)


def example(seed: int = 0) -> FreeFeatures:
    labels = labels_of_counts((4, 2, 1, 1))
    generator = torch.Generator().manual_seed(seed)
    frame, _ = torch.linalg.qr(torch.randn(1, 8, 2, generator=generator, dtype=torch.float64))
    return FreeFeatures(balanced_features(W, frame), W, labels)


def test_a_balanced_start_has_equal_singular_values() -> None:
    model = example()
    expected = torch.tensor([[0.62788876, 0.54383427]], dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.svdvals(model.features), expected, rtol=1e-7, atol=0)
    torch.testing.assert_close(torch.linalg.svdvals(model.output), expected, rtol=1e-7, atol=0)
    _, _, right = torch.linalg.svd(model.features, full_matrices=False)
    left, _, _ = torch.linalg.svd(model.output, full_matrices=False)
    torch.testing.assert_close((right @ left).abs(), torch.eye(2, dtype=torch.float64)[None], rtol=0, atol=1e-10)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_singular_values_move_at_their_own_speed(seed: int) -> None:
    model = example(seed)
    s, speed = singular_speeds(model)
    step = 1e-6
    after = descend(model, step)
    for matrix in (after.features, after.output):
        torch.testing.assert_close((torch.linalg.svdvals(matrix) - s) / step, speed, rtol=0, atol=1e-5)
    behind = descend(model, -step)
    for ahead, back in ((after.features, behind.features), (after.output, behind.output)):
        central = (torch.linalg.svdvals(ahead) - torch.linalg.svdvals(back)) / (2 * step)
        torch.testing.assert_close(central, speed, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_no_singular_value_moves_faster_than_the_norm_of_the_error(seed: int) -> None:
    """|g_i| <= ||A||_2, where d sigma_i / dt = -g_i sigma_i."""
    model = example(seed)
    values, speed = singular_speeds(model)
    assert bool(((speed / values).abs() <= torch.linalg.matrix_norm(error_signal(model), 2)[:, None] + 1e-12).all())


def test_balance_is_kept() -> None:
    model = example()
    for _ in range(2000):
        model = descend(model, 1e-3)
    gap = model.features.mT @ model.features - model.output @ model.output.mT
    assert float(torch.linalg.matrix_norm(gap)) < 1e-3


def test_steps_are_those_of_gradient_descent() -> None:
    model = example()
    f, w = model.features.clone().requires_grad_(), model.output.clone().requires_grad_()
    loss = summed_loss(FreeFeatures(f, w, model.labels)).sum()
    loss.backward()
    after = descend(model, 0.1)
    assert f.grad is not None
    assert w.grad is not None
    torch.testing.assert_close(after.features, model.features - 0.1 * f.grad)
    torch.testing.assert_close(after.output, model.output - 0.1 * w.grad)
    logits = (f @ w).detach().requires_grad_()
    torch.nn.functional.cross_entropy(logits[0], model.labels, reduction="sum").backward()
    assert logits.grad is not None
    torch.testing.assert_close(error_signal(model), logits.grad)


def test_the_signal_is_bounded_by_the_most_frequent_class() -> None:
    """With a uniform prediction over many classes ``A ≈ -Y``, whose norm is the root of the largest count."""
    labels = labels_of_counts((9, 4, 1, *([0] * 997)))
    zero = FreeFeatures(
        torch.zeros(1, 14, 2, dtype=torch.float64), torch.zeros(1, 2, 1000, dtype=torch.float64), labels
    )
    assert float(torch.linalg.matrix_norm(error_signal(zero), 2)) == pytest.approx(3, rel=1e-2)


def test_rank_falls_and_rises() -> None:
    ranks, losses = rank_trajectory(balanced_start((8, 4, 2, 1), 2, runs=20), 0.05, 600)
    assert (losses[-1] < 0.5 * losses[0]).all()
    trough = ranks.amin(0)
    assert float((trough / ranks[0]).mean()) < 0.95
    assert float((ranks[-1] / trough).mean()) > 1.3
    with pytest.raises(ValueError, match="as many examples"):
        balanced_start((1,), 2)
