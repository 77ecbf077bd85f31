"""Languages with a known optimum, and the drift of SGD along it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lossmith.probes import hessian_trace, score_norms
from lossmith.theory import entropy_rate
from lossmith.theory.equal_loss import (
    BilinearModel,
    KnownLanguage,
    adam,
    descend,
    one_shot_accuracy,
    oppose,
    padded,
    wander,
)


def trace(model: BilinearModel, language: KnownLanguage) -> float:
    every = torch.arange(len(language.frequency))
    norms, _ = score_norms(model.module(), [(every, torch.zeros_like(every))], labels="exact")
    return float(norms.numpy() @ language.frequency)


def test_the_optimum_of_the_hidden_markov_language_is_its_entropy_rate() -> None:
    language = KnownLanguage.hidden_markov(seed=1)
    np.testing.assert_allclose(language.frequency @ language.conditional, language.frequency, atol=1e-12)
    model = language.as_hidden_markov()
    tokens, _ = model.sample(400, 60, seed=0)
    # 24,000 tokens, each with a spread of about one nat.
    assert entropy_rate(model, tokens, burn_in=1) == pytest.approx(language.optimum, abs=0.02)
    with pytest.raises(ValueError, match="24 contexts and 6 words"):
        KnownLanguage.clustered().as_hidden_markov()


@pytest.mark.parametrize("make", [KnownLanguage.clustered, KnownLanguage.hidden_markov])
def test_the_trace_is_that_of_the_full_hessian(make: type) -> None:
    language: KnownLanguage = make(size=2, seed=0)
    model = BilinearModel.random(language, 5, seed=0)
    # Population loss, as a function of all numbers at once.
    truth = torch.from_numpy(language.frequency[:, None] * language.conditional)
    shapes = model.features.shape, model.output.shape
    cut = model.features.size

    def loss(flat: torch.Tensor) -> torch.Tensor:
        h, a = flat[:cut].view(shapes[0]), flat[cut:].view(shapes[1])
        return -(truth * (h @ a.T).log_softmax(-1)).sum()

    start = torch.from_numpy(np.concatenate([model.features.ravel(), model.output.ravel()]))
    hessian = torch.autograd.functional.hessian(loss, start)
    assert trace(model, language) == pytest.approx(float(hessian.trace()), rel=1e-10)
    assert model.excess_loss(language) == pytest.approx(float(loss(start)) - language.optimum, rel=1e-9)
    assert trace(padded(model, 9), language) == pytest.approx(trace(model, language), rel=1e-12)


@pytest.mark.parametrize("make", [KnownLanguage.clustered, KnownLanguage.hidden_markov])
def test_every_way_reaches_the_optimum(make: type) -> None:
    language: KnownLanguage = make(seed=0)
    start = BilinearModel.random(language, 16, seed=0)
    converged = descend(start, language, 3000)
    for model in (converged, adam(start, language, 600), descend(wander(converged, language, 500), language, 2000)):
        # Kullback-Leibler: never below.
        assert -1e-12 < model.excess_loss(language) < 1e-3
    assert start.excess_loss(language) > 0.1


def test_noise_flattens_and_helps_downstream_where_descent_alone_does_nothing() -> None:
    language = KnownLanguage.clustered(seed=0)
    converged = descend(BilinearModel.random(language, seed=0), language, 4000)
    control = descend(converged, language, 4000)
    flat = descend(wander(converged, language, 10_000, seed=0), language, 4000)
    assert max(m.excess_loss(language) for m in (converged, control, flat)) < 1e-5
    assert trace(control, language) == pytest.approx(trace(converged, language), abs=1e-3)
    assert trace(flat, language) < trace(converged, language) / 2
    assert one_shot_accuracy(flat, language) > one_shot_accuracy(converged, language) + 0.4
    assert one_shot_accuracy(control, language) == pytest.approx(one_shot_accuracy(converged, language), abs=0.02)


def test_an_adversary_misleads_at_the_same_loss() -> None:
    language = KnownLanguage.clustered(seed=1)
    flat = descend(
        wander(descend(BilinearModel.random(language, seed=1), language, 3000), language, 8000), language, 2000
    )
    opposed = descend(oppose(flat, language, 300, seed=1), language, 2000)
    assert opposed.excess_loss(language) < 1e-4
    assert one_shot_accuracy(opposed, language) < one_shot_accuracy(flat, language)
    assert trace(opposed, language) > trace(flat, language)


def test_one_step_of_sgd_shrinks_the_difference_of_the_norms_by_the_law() -> None:
    # One context, two words, output rows +-a: h^2 - |a|^2 is multiplied by 1 - |eta g|^2, whatever the word drawn.
    language = KnownLanguage(np.array([[0.7, 0.3]]), np.ones(1), np.zeros(1, dtype=np.int64))
    h, a = 1.3, 0.4
    model = BilinearModel(np.array([[h]]), np.array([[a], [-a]]))
    p = 1 / (1 + math.exp(-2 * h * a))
    seen = set()
    for seed in range(20):
        moved = wander(model, language, 1, learning_rate=0.1, seed=seed)
        word = 0 if float(moved.output[0, 0]) > a else 1
        g = p - 1 if word == 0 else p
        before, after = h**2 - 2 * a**2, float(moved.features[0, 0] ** 2 - (moved.output**2).sum())
        assert after == pytest.approx(before * (1 - 2 * 0.01 * g**2), rel=1e-12)
        seen.add(word)
    assert seen == {0, 1}


def test_sgd_drifts_along_the_minimisers_at_the_rate_of_the_theorem() -> None:
    s, time = 0.7, 2.0
    language = KnownLanguage(np.array([[s, 1 - s]]), np.ones(1), np.zeros(1, dtype=np.int64))
    h = 2.0
    a = math.log(s / (1 - s)) / (2 * h)
    model = BilinearModel(np.array([[h]]), np.array([[a], [-a]]))

    def left(rate: float, seeds: int) -> float:
        ends = [wander(model, language, round(time / rate**2), learning_rate=rate, seed=seed) for seed in range(seeds)]
        return float(np.mean([m.features[0, 0] ** 2 - (m.output**2).sum() for m in ends])) / (h**2 - 2 * a**2)

    # tr H = 2 s (1 - s) (h^2 + a^2): a quarter of its gradient along the minimisers gives this exponent.
    theory = math.exp(-2 * s * (1 - s) * time)
    coarse, fine = left(0.1, 40), left(0.05, 40)
    assert abs(fine - theory) < abs(coarse - theory) < 0.1 * theory
    # The theorem is the limit of small rates; the error is linear in the rate. Four standard errors.
    assert 2 * fine - coarse == pytest.approx(theory, abs=0.02)
    # Without noise nothing moves.
    still = descend(model, language, 200, learning_rate=0.1)
    assert float(still.features[0, 0]) == pytest.approx(h, abs=1e-12)


def test_the_trace_of_the_two_parameter_model_has_its_closed_form() -> None:
    class Product(torch.nn.Module):
        def __init__(self, u: float, v: float) -> None:
            super().__init__()
            self.u = torch.nn.Parameter(torch.tensor(u, dtype=torch.float64))
            self.v = torch.nn.Parameter(torch.tensor(v, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([torch.zeros_like(x), self.u * self.v * torch.ones_like(x)], -1)

    u = 2.0
    model = Product(u, math.log(7 / 3) / u)
    labels = torch.tensor([1] * 7 + [0] * 3)
    found = hessian_trace(model, [(torch.ones(10, dtype=torch.float64), labels)], estimator="exact")
    assert found.trace == pytest.approx(0.21 * (u**2 + (math.log(7 / 3) / u) ** 2), rel=1e-12)


def test_padding_to_fewer_dimensions_is_refused() -> None:
    with pytest.raises(ValueError, match="width must be at least 32, got 8"):
        padded(BilinearModel.random(KnownLanguage.clustered()), 8)
