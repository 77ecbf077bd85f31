"""Public faults of recommenders under noise: the faulty form fails what ours passes."""

from __future__ import annotations

import numpy as np
import torch

from lossmith.losses import bpr_loss
from lossmith.tasks.recommendation import (
    Interactions,
    inject_noise,
    personal_loss_probabilities,
    split_interactions,
    synthetic_feedback,
)
from lossmith.tasks.recommendation.denoising import draw_column


def test_the_last_none_of_a_list_is_all_of_it() -> None:
    items = list(range(4))
    n_test = int(0.2 * len(items))
    assert items[-n_test:] == items  # the faulty form: training items are test items, too
    table = Interactions.from_pairs(["a"] * 4, items)
    train, _, test = split_interactions(table, least=1)
    assert len(test) == 0
    assert not train.contains(test.rows, test.indices).any()


def test_noise_that_avoids_training_items_alone_hits_test_items() -> None:
    made = synthetic_feedback(100, 60, per_user=20, noise=0.0)
    faulty, noisy = inject_noise(made.train, 0.5)
    assert made.test.contains(faulty.rows[noisy], faulty.indices[noisy]).any()
    right, noisy = inject_noise(made.train, 0.5, exclude=made.test)
    assert not made.test.contains(right.rows[noisy], right.indices[noisy]).any()


def test_squeezing_a_batch_of_one_loses_the_batch() -> None:
    scores, negative = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0]])

    def faulty() -> torch.Tensor:
        return torch.softmax(-bpr_loss(scores, negative).squeeze() / 0.1, dim=-1)

    assert faulty().ndim == 1
    found = personal_loss_probabilities(bpr_loss(scores, negative))
    assert found.shape == (1, 2)
    assert draw_column(found, torch.tensor([0.5])).shape == (1,)


def test_a_softmax_of_the_loss_instead_of_its_negative_trains_on_noise() -> None:
    losses = torch.tensor([[0.2] * 8 + [1.0] * 2])
    assert float(torch.softmax(losses / 0.1, -1)[:, 8:].sum()) > 0.99
    assert float(personal_loss_probabilities(losses)[:, 8:].sum()) < 0.01


def test_one_negative_per_candidate_is_noise_in_the_comparison() -> None:
    # Two positives of equal score: nothing tells them apart but their negatives.
    draw = np.random.default_rng(0)
    positive, negatives = torch.zeros(1000, 2), torch.from_numpy(draw.normal(size=(1000, 2)))
    faulty = personal_loss_probabilities(bpr_loss(positive, negatives))
    assert float((faulty[:, 0] - 0.5).abs().mean()) > 0.3
    shared = personal_loss_probabilities(bpr_loss(positive, negatives[:, :1]))
    assert torch.equal(shared, torch.full_like(shared, 0.5))
