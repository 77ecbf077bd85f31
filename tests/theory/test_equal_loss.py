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


def test_a_batch_shrinks_the_difference_by_its_mean_gradient() -> None:
    """The exact law of one step, whatever is drawn: the factor is that of the batch's mean gradient."""
    language = KnownLanguage(np.array([[0.7, 0.3]]), np.ones(1), np.zeros(1, dtype=np.int64))
    h, a = 1.3, 0.4
    model = BilinearModel(np.array([[h]]), np.array([[a], [-a]]))
    p = 1 / (1 + math.exp(-2 * h * a))
    possible = {1 - 2 * 0.01 * (p - first / 3) ** 2 for first in range(4)}
    seen = set()
    for seed in range(40):
        moved = wander(model, language, 1, learning_rate=0.1, batch_size=3, seed=seed)
        ratio = float(moved.features[0, 0] ** 2 - (moved.output**2).sum()) / (h**2 - 2 * a**2)
        factor = min(possible, key=lambda value: abs(value - ratio))
        assert ratio == pytest.approx(factor, rel=1e-12)
        seen.add(factor)
    assert seen == possible
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        wander(model, language, 1, batch_size=0)


def test_a_batch_of_several_contexts_is_the_mean_of_their_gradients() -> None:
    """Against autograd on the very contexts and words, some of which are drawn twice."""
    language = KnownLanguage.clustered(seed=0)
    model = BilinearModel.random(language, 5, seed=0)
    moved = wander(model, language, 1, batch_size=60, learning_rate=0.3, seed=2)
    rng = np.random.default_rng([2, 4])
    contexts = rng.choice(24, 60, p=language.frequency)
    words = (rng.random(60)[:, None] > language.conditional.cumsum(1)[contexts]).sum(1)
    assert len(set(contexts.tolist())) < 60
    h, a = (torch.from_numpy(v).requires_grad_() for v in (model.features, model.output))
    loss = torch.nn.functional.cross_entropy(h[torch.from_numpy(contexts)] @ a.T, torch.from_numpy(words))
    by_h, by_a = torch.autograd.grad(loss, (h, a))
    np.testing.assert_allclose(moved.features, (h - 0.3 * by_h).detach().numpy(), rtol=0, atol=1e-14)
    np.testing.assert_allclose(moved.output, (a - 0.3 * by_a).detach().numpy(), rtol=0, atol=1e-14)


def test_a_batch_of_four_drifts_at_a_quarter_of_the_rate() -> None:
    """exp(-s (1 - s) t / B) of the two-parameter model, here with twice the exponent; four standard errors."""
    s, time, rate = 0.7, 4.0, 0.1
    language = KnownLanguage(np.array([[s, 1 - s]]), np.ones(1), np.zeros(1, dtype=np.int64))
    h = 2.0
    a = math.log(s / (1 - s)) / (2 * h)
    model = BilinearModel(np.array([[h]]), np.array([[a], [-a]]))
    for batch_size in (1, 4):
        steps = round(time / rate**2)
        ends = [wander(model, language, steps, learning_rate=rate, batch_size=batch_size, seed=i) for i in range(30)]
        left = [(m.features[0, 0] ** 2 - (m.output**2).sum()) / (h**2 - 2 * a**2) for m in ends]
        theory = math.exp(-2 * s * (1 - s) * time / batch_size)
        # What is linear in the rate: 4 % at batch 1 (above), less for more.
        assert float(np.mean(left)) == pytest.approx(theory, rel=0.1)


def test_the_digests_two_parameter_law_holds_at_every_step_and_in_the_mean() -> None:
    """Logit u v, y ~ Bernoulli(s): u^2 - v^2 is multiplied by 1 - eta^2 g^2; it decays as exp(-s (1 - s) t / B)."""
    rng, s, eta, time = np.random.default_rng(0), 0.7, 0.05, 4.0
    for batch, theory in ((1, 0.4317), (4, 0.8106)):
        assert math.exp(-s * (1 - s) * time / batch) == pytest.approx(theory, abs=5e-5)
        u = np.full(200, 2.0)
        v = math.log(s / (1 - s)) / u
        start = u**2 - v**2
        for _ in range(round(time / eta**2)):
            g = 1 / (1 + np.exp(-u * v)) - rng.binomial(batch, s, 200) / batch
            before = u**2 - v**2
            u, v = u - eta * g * v, v - eta * g * u
            np.testing.assert_allclose(u**2 - v**2, before * (1 - (eta * g) ** 2), rtol=1e-9, atol=1e-12)
        assert float(((u**2 - v**2) / start).mean()) == pytest.approx(theory, abs=0.01)


@pytest.mark.parametrize("make", [KnownLanguage.clustered, KnownLanguage.hidden_markov])
def test_at_the_optimum_the_noise_of_one_sample_is_the_hessian(make: type) -> None:
    """Bartlett's identity (Lemma 4.2), all elements; away from the optimum they differ."""
    language: KnownLanguage = make(size=2, seed=0)
    truth = torch.from_numpy(language.frequency[:, None] * language.conditional)

    def both(model: BilinearModel) -> tuple[torch.Tensor, torch.Tensor]:
        cut, shapes = model.features.size, (model.features.shape, model.output.shape)

        def losses(flat: torch.Tensor) -> torch.Tensor:
            return -(flat[:cut].view(shapes[0]) @ flat[cut:].view(shapes[1]).T).log_softmax(-1)

        start = torch.from_numpy(np.concatenate([model.features.ravel(), model.output.ravel()]))
        gradients = torch.autograd.functional.jacobian(losses, start).flatten(0, 1)
        mean = truth.flatten() @ gradients
        covariance = (gradients * truth.flatten()[:, None]).T @ gradients - mean[:, None] * mean
        return covariance, torch.autograd.functional.hessian(lambda x: (truth * losses(x)).sum(), start)

    covariance, hessian = both(BilinearModel.lookup(language))
    torch.testing.assert_close(covariance, hessian, rtol=0, atol=1e-13)
    covariance, hessian = both(BilinearModel.random(language, 5))
    assert float((covariance - hessian).abs().max()) > 1e-2


def test_the_language_of_a_grammar_is_that_of_its_sentences() -> None:
    """Against enumeration of all sentences of four words."""
    from lossmith.theory.known_languages import _small_grammar

    language = KnownLanguage.context_free(seed=0)
    assert language.conditional.shape == (36, 6)
    assert language.frequency.sum() == pytest.approx(1, abs=1e-12)
    assert np.bincount(language.cluster).min() >= 3
    # The attempt that was kept is the first whose language is this one.
    for attempt in range(50):
        grammar = _small_grammar(4, 6, np.random.default_rng([0, 7, attempt]))
        sentences = torch.cartesian_prod(*[torch.arange(6)] * 4)
        p = grammar.log_likelihood(sentences).exp().numpy().reshape(6, 6, 6, 6)
        joint = p.sum(3).reshape(36, 6)
        if np.allclose(joint.sum(1), language.frequency, atol=1e-12):
            break
    assert p.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_allclose(language.conditional, joint / joint.sum(1, keepdims=True), rtol=1e-10)
    roots = [grammar.symbols.index(f"R{i}") for i in range(4)]
    by_root = grammar.inside(sentences).exp()[:, roots].numpy().reshape(36, 36, 4).sum(1)
    np.testing.assert_array_equal(language.cluster, by_root.argmax(1))


def test_the_lookup_table_is_at_the_optimum() -> None:
    for language in (KnownLanguage.clustered(), KnownLanguage.hidden_markov(), KnownLanguage.context_free()):
        assert BilinearModel.lookup(language).excess_loss(language) == pytest.approx(0, abs=1e-14)
    impossible = KnownLanguage(np.array([[1.0, 0.0]]), np.ones(1), np.zeros(1, dtype=np.int64))
    with pytest.raises(ValueError, match="every word is possible"):
        BilinearModel.lookup(impossible)


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
