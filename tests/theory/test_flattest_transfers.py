"""The second theorem of the paper on flatness, on an instance small enough to enumerate.

"Same Pre-training Loss, Better Downstream: Implicit Bias Matters for Language Models", 2022, arXiv 2210.14199, Theorem
6.1: of single-layer transformers that fill in the masked bracket of a balanced sentence without error, the flattest one
followed by a least-norm head on ``n`` examples has no error downstream with probability 1 - 2^-n at least, while random
features reach the same loss at a larger trace. The paper has encodings of its own; here attention sums a token's sign
and its place, ``z = (sum of the other signs, places that are seen)``, the layer is ``a . relu(W z)`` and the loss half
the squared distance from the masked sign.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

LENGTH = 6


def contexts() -> tuple[np.ndarray, np.ndarray]:
    """Every sum of the encodings of a balanced sentence with one bracket masked, and the masked sign; all as likely."""
    found = {}
    for ups in itertools.combinations(range(LENGTH), LENGTH // 2):
        signs = np.array([1 if i in ups else -1 for i in range(LENGTH)])
        for masked in range(LENGTH):
            seen = np.arange(LENGTH) != masked
            found[(signs[seen].sum(), *seen)] = signs[masked]
    return np.array(list(found), dtype=float), np.array(list(found.values()), dtype=float)


def trace(weights: np.ndarray, output: np.ndarray) -> float:
    """Of the full Hessian of the mean loss in all parameters, by autograd."""
    z, target = (torch.from_numpy(v) for v in contexts())
    cut = weights.size

    def loss(flat: torch.Tensor) -> torch.Tensor:
        w, a = flat[:cut].view(weights.shape), flat[cut:]
        return (torch.relu(z @ w.T) @ a - target).square().mean() / 2

    start = torch.from_numpy(np.concatenate([weights.ravel(), output]))
    assert float(loss(start)) < 1e-20
    return float(torch.autograd.functional.hessian(loss, start).trace())


def flattest() -> tuple[np.ndarray, np.ndarray]:
    """One neuron for each sign, its layers balanced: ``relu(c s)`` times ``1 / c`` at ``c^4 = |z|^2``."""
    c = LENGTH**0.25
    weights = np.zeros((2, 1 + LENGTH))
    # The masked sign is minus the sum of the others.
    weights[:, 0] = -c, c
    return weights, np.array([1 / c, -1 / c])


def random_features(width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    z, target = contexts()
    weights = np.random.default_rng(seed).normal(size=(width, 1 + LENGTH))
    return weights, np.linalg.pinv(np.maximum(z @ weights.T, 0)) @ target


def test_the_masked_bracket_follows_from_the_sum_of_the_others() -> None:
    z, target = contexts()
    assert len(z) == 2 * LENGTH
    np.testing.assert_array_equal(z[:, 0], -target)
    np.testing.assert_array_equal((z**2).sum(1), np.full(len(z), LENGTH))


@pytest.mark.slow
def test_the_two_neurons_have_the_least_trace_of_any_width() -> None:
    r"""At zero loss the trace is ``E sum_j h_j^2 + a_j^2 |z|^2 [h_j > 0]``; by the inequality of the means that is at
    least ``2 |z| sum_j |a_j h_j| >= 2 |z| |f(z)| = 2 sqrt(T)``, whatever the neurons are."""
    bound = 2 * math.sqrt(LENGTH)
    assert trace(*flattest()) == pytest.approx(bound, rel=1e-12)
    # Unbalanced layers: the same function, sharper.
    weights, output = flattest()
    assert trace(2 * weights, output / 2) == pytest.approx(bound * (4 + 1 / 4) / 2, rel=1e-12)
    for seed in range(5):
        for width in (20, 60):
            weights, output = random_features(width, seed)
            assert trace(weights, output) > 2 * bound
            # The best balance of each neuron leaves the function, and does not reach the bound either.
            z, _ = contexts()
            h = np.maximum(z @ weights.T, 0)
            scale = (LENGTH * output**2 * (h > 0).sum(0) / (h**2).sum(0).clip(1e-300)) ** 0.25
            some = h.any(0)
            assert trace(weights[some] * scale[some, None], output[some] / scale[some]) > 1.05 * bound


def downstream_errors(weights: np.ndarray, examples: int) -> tuple[float, int]:
    """Share of all draws of ``examples`` contexts after which the least-norm head errs; and all draws.

    Downstream: 1 where the masked bracket opens, 0 where it closes.
    """
    z, target = contexts()
    features, label = np.maximum(z @ weights.T, 0), (target > 0).astype(float)
    wrong = 0
    draws = list(itertools.product(range(len(z)), repeat=examples))
    for draw in draws:
        rows = list(draw)
        head = np.linalg.pinv(features[rows]) @ label[rows]
        wrong += bool(np.abs(features @ head - label).max() > 1e-9)
    return wrong / len(draws), len(draws)


@pytest.mark.parametrize("examples", [1, 2, 3])
def test_the_flattest_solution_transfers_but_for_one_draw_in_two_to_the_n(examples: int) -> None:
    """It errs exactly when no example has the label 1: the other neuron's zero is what the least norm gives anyway."""
    wrong, draws = downstream_errors(flattest()[0], examples)
    assert draws == (2 * LENGTH) ** examples
    assert wrong == 0.5**examples


@pytest.mark.parametrize("examples", [1, 2])
def test_random_features_do_not_transfer(examples: int) -> None:
    wrong, _ = downstream_errors(random_features(40, 0)[0], examples)
    # Draws without a 1 give the zero head, others one that says something else of contexts it has not seen.
    assert wrong == 1.0
