"""Public faults of distillation and overlap losses: the faulty form fails what ours passes."""

from __future__ import annotations

import math

import torch

from lossmith.losses import (
    binary_kl_norm,
    cross_entropy,
    distillation_kl,
    jensen_shannon,
    plackett_luce_distillation,
    set_dice_loss,
)


def logits(rows: int, classes: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_weights_from_logits_changed_for_sorting_are_silently_cross_entropy() -> None:
    s, t, y = logits(6, 5), logits(6, 5, 1), torch.arange(6) % 5

    def faulty() -> torch.Tensor:
        changed = t.scatter(-1, y[:, None], 1e4)
        order = changed.argsort(-1, descending=True)
        ranked = s.gather(-1, order)
        steps = ranked.flip(-1).logcumsumexp(-1).flip(-1) - ranked
        return (changed.softmax(-1).gather(-1, order) * steps).sum(-1)

    torch.testing.assert_close(faulty(), cross_entropy(s, y))
    assert (plackett_luce_distillation(s, t, y) - cross_entropy(s, y)).abs().min() > 1e-3


def test_jensen_shannon_the_wrong_way_round_tends_to_the_other_divergence() -> None:
    s, t, beta = logits(6, 5), logits(6, 5, 1), 1e-6

    def faulty() -> torch.Tensor:
        p, q = t.softmax(-1), s.softmax(-1)
        m = beta * q + (1 - beta) * p
        return beta * (q * (q / m).log()).sum(-1) + (1 - beta) * (p * (p / m).log()).sum(-1)

    forward = distillation_kl(s, t)
    torch.testing.assert_close(jensen_shannon(s, t, beta=beta) / beta, forward, rtol=1e-3, atol=1e-5)
    assert ((faulty() / beta - forward).abs() > 1e-3).all()


def test_clamped_probabilities_make_the_binary_divergence_infinite() -> None:
    difference = torch.tensor([[20.0]])

    def faulty() -> torch.Tensor:
        q = difference.sigmoid().clamp(1e-8, 1 - 1e-8)
        return math.log(0.5) - 0.5 * (q.log() + (1 - q).log())

    assert torch.isinf(faulty()).all()
    assert torch.isfinite(binary_kl_norm(difference, torch.zeros(1, 1), temperature=1.0)).all()


def test_a_mask_of_another_shape_broadcasts_and_masks_nothing() -> None:
    p, y, mask = torch.tensor([0.9, 0.2, 0.8]), torch.tensor([1.0, 0, 0]), torch.tensor([[1.0], [1], [0]])

    def faulty() -> torch.Tensor:
        f, t = (p * mask).flatten(), (y * mask).flatten()
        return 1 - (2 * (f * t).sum() + 1) / ((f * f).sum() + (t * t).sum() + 1)

    z, labels = torch.logit(p).unsqueeze(-1), torch.tensor([1, 0, -100])
    ours = set_dice_loss(z, labels, alpha=0).sum()
    torch.testing.assert_close(ours, set_dice_loss(z[:2], labels[:2], alpha=0).sum())
    assert (faulty() - ours).abs() > 0.1


def test_an_index_off_by_two_keeps_fewer_hard_negatives_than_asked() -> None:
    p = torch.tensor([0.9, 0.6, 0.5, 0.4, 0.3, 0.2])
    y = torch.tensor([1, 1, 0, 0, 0, 0])
    wanted = 2
    negatives = p[y == 0]
    threshold = negatives.sort().values[-wanted + 1]
    assert int((negatives > threshold).sum()) == wanted - 2
    shares = set_dice_loss(torch.logit(p).unsqueeze(-1), y, ohem_ratio=1.0)
    assert int((shares[2:] > 0).sum()) == wanted
