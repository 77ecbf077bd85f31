"""Hidden Markov models against enumeration of all paths."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from lossmith.theory import HiddenMarkov, entropy_rate, fit_hidden_markov
from lossmith.theory.markov_passes import Passes


def passes(model: HiddenMarkov) -> Passes:
    return Passes(model.start, model.transition, model.emission)


def by_paths(model: HiddenMarkov, tokens: Tensor) -> tuple[float, Tensor, Tensor, tuple[int, ...]]:
    """Likelihood, posteriors, expected moves and best path of one sequence, from every path."""
    k, length = len(model.start), len(tokens)
    total, best = 0.0, (-1.0, ())
    states = torch.zeros(length, k, dtype=torch.float64)
    moves = torch.zeros(k, k, dtype=torch.float64)
    for path in itertools.product(range(k), repeat=length):
        p = float(model.start[path[0]])
        for i, state in enumerate(path):
            p *= float(model.emission[state, tokens[i]])
            if i:
                p *= float(model.transition[path[i - 1], state])
        total += p
        best = max(best, (p, path))
        for i, state in enumerate(path):
            states[i, state] += p
            if i:
                moves[path[i - 1], state] += p
    return math.log(total), states / total, moves / total, best[1]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_batch_of_different_lengths_equals_enumeration(seed: int) -> None:
    model = HiddenMarkov.random(3, 4, seed=seed)
    tokens, _ = model.sample(4, 6, seed=seed)
    lengths = torch.tensor([6, 1, 4, 3])
    found = model.posterior(tokens, lengths)
    paths = model.viterbi(tokens, lengths)
    moves = torch.zeros(3, 3, dtype=torch.float64)
    for row, length in enumerate(lengths.tolist()):
        likelihood, states, own, best = by_paths(model, tokens[row, :length])
        assert float(found.log_likelihood[row]) == pytest.approx(likelihood, rel=1e-12)
        torch.testing.assert_close(found.states[row, :length], states, rtol=1e-10, atol=1e-12)
        assert not found.states[row, length:].any()
        assert paths[row].tolist() == [*best, *([-1] * (6 - length))]
        moves += own
    torch.testing.assert_close(found.transitions, moves, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model.log_likelihood(tokens, lengths), found.log_likelihood)


def test_what_lies_behind_the_end_does_not_count() -> None:
    model = HiddenMarkov.random(3, 4)
    tokens, _ = model.sample(2, 5)
    lengths = torch.tensor([3, 5])
    changed = tokens.clone()
    changed[0, 3:] = -7
    torch.testing.assert_close(model.log_likelihood(changed, lengths), model.log_likelihood(tokens, lengths))


def test_long_and_unlikely_sequences_do_not_underflow() -> None:
    model = HiddenMarkov.random(4, 50, concentration=0.05, seed=3)
    tokens = torch.randint(0, 50, (3, 2000), generator=torch.Generator().manual_seed(0))
    found = model.log_likelihood(tokens)
    assert torch.isfinite(found).all()
    assert (found < -5000).all()
    torch.testing.assert_close(
        found, passes(model).likelihood_in_logarithms(tokens, torch.full((3,), 2000)), rtol=1e-11, atol=0
    )


@pytest.mark.parametrize("sequences, length, states", [(1, 64, 1), (1, 2001, 3), (7, 65, 2), (30, 80, 8), (200, 70, 5)])
def test_every_way_to_a_likelihood_is_that_in_logarithms(sequences: int, length: int, states: int) -> None:
    """Few long sequences are cut into pieces, many advance place by place, the longest first."""
    model = HiddenMarkov.random(states, 6, concentration=0.2, seed=length)
    tokens, _ = model.sample(sequences, length, seed=1)
    whole = torch.full((sequences,), length)
    expected = passes(model).likelihood_in_logarithms(tokens, whole)
    for found in (
        model.log_likelihood(tokens),
        passes(model).likelihood_by_pieces(tokens.T)[0],
        passes(model).likelihood_by_places(tokens.T, whole)[0],
        model.posterior(tokens).log_likelihood,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    lengths = torch.randint(1, length + 1, (sequences,), generator=torch.Generator().manual_seed(0))
    expected = passes(model).likelihood_in_logarithms(tokens, lengths)
    torch.testing.assert_close(model.log_likelihood(tokens, lengths), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sequences, length, states", [(1, 64, 1), (1, 2001, 3), (7, 65, 2), (3, 82, 5), (2, 101, 4)])
def test_posteriors_by_pieces_are_those_in_logarithms(sequences: int, length: int, states: int) -> None:
    model = HiddenMarkov.random(states, 6, concentration=0.2, seed=length)
    tokens, _ = model.sample(sequences, length, seed=1)
    whole = torch.full((sequences,), length)
    expected, moves = passes(model).posterior_in_logarithms(tokens, whole)
    by_pieces = passes(model).posterior_by_pieces(tokens)
    assert by_pieces is not None
    for likelihood, found, found_moves in (by_pieces, passes(model).posterior(tokens, whole), model.posterior(tokens)):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(found_moves, moves, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(likelihood, model.log_likelihood(tokens), rtol=1e-12, atol=0)
    lengths = torch.randint(1, length + 1, (sequences,), generator=torch.Generator().manual_seed(0))
    expected, moves = passes(model).posterior_in_logarithms(tokens, lengths)
    found = model.posterior(tokens, lengths)
    torch.testing.assert_close(found.states, expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.transitions, moves, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("length", [5, 130])
def test_posteriors_that_underflow_are_those_in_logarithms(length: int) -> None:
    """Tokens of probability 1e-100 in one state: four of them are below the smallest number."""
    model = HiddenMarkov(
        torch.tensor([0.4, 0.6], dtype=torch.float64),
        torch.tensor([[1 - 1e-9, 1e-9], [0.0, 1.0]], dtype=torch.float64),
        torch.tensor([[1e-100, 1 - 1e-100], [1e-110, 1 - 1e-110]], dtype=torch.float64),
    )
    tokens = torch.zeros(2, length, dtype=torch.long)
    tokens[1] = 1
    found = model.posterior(tokens)
    assert float(found.log_likelihood[0]) == pytest.approx(math.log(0.4) + length * math.log(1e-100), rel=1e-9)
    torch.testing.assert_close(found.states[0, :, 0], torch.ones(length, dtype=torch.float64), rtol=0, atol=1e-8)
    torch.testing.assert_close(found.states.sum(-1), torch.ones(2, length, dtype=torch.float64))
    assert float(found.transitions.sum()) == pytest.approx(2 * (length - 1))


def test_a_piece_that_only_an_unlikely_state_can_explain_keeps_its_digits() -> None:
    """Chains that never change their state: the piece of the likely start says nothing of the one that was taken."""
    model = HiddenMarkov(
        torch.tensor([1.0, 0], dtype=torch.float64),
        torch.eye(2, dtype=torch.float64),
        torch.tensor([[1e-12, 1 - 1e-12], [1 - 1e-12, 1e-12]], dtype=torch.float64),
    )
    tokens = torch.zeros(1, 900, dtype=torch.long)
    # Reached in state 0 alone, where each token has 1e-12; a piece begun in state 1 has a mass of about 1.
    assert float(model.log_likelihood(tokens)[0]) == pytest.approx(900 * math.log(1e-12), rel=1e-12)


def test_impossible_sequences() -> None:
    model = HiddenMarkov(torch.tensor([1.0, 0]), torch.eye(2), torch.eye(2))
    found = model.log_likelihood(torch.tensor([[0, 0, 0], [0, 1, 0]]))
    assert found.tolist() == [0.0, -math.inf]
    tiny = HiddenMarkov(
        torch.tensor([1.0, 0], dtype=torch.float64),
        torch.tensor([[1 - 1e-310, 1e-310], [0, 1]], dtype=torch.float64),
        torch.eye(2, dtype=torch.float64),
    )
    assert float(tiny.log_likelihood(torch.tensor([[0, 1]]))[0]) == pytest.approx(math.log(1e-310), rel=1e-9)


def test_estimation_never_loses_likelihood_and_finds_the_model() -> None:
    model = HiddenMarkov.random(2, 5, concentration=0.3, seed=5)
    tokens, _ = model.sample(200, 60, seed=1)
    found, log = fit_hidden_markov(tokens, 2, max_steps=60, tolerance=0, seed=1)
    assert all(later >= earlier - 1e-12 for earlier, later in itertools.pairwise(log))
    # From a random start it may end in a local optimum, from the truth it can only gain.
    near, log = fit_hidden_markov(tokens, 2, initial=model, max_steps=5)
    assert log[0] == pytest.approx(-entropy_rate(model, tokens), rel=1e-12)
    assert log[-1] > log[0]
    torch.testing.assert_close(near.transition, model.transition, rtol=0, atol=0.05)
    assert float(found.emission.sum()) == pytest.approx(2)


def test_the_optimum_on_its_own_text() -> None:
    """Independent tokens: the entropy of their distribution."""
    p = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    model = HiddenMarkov(torch.ones(1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64), p[None])
    tokens, _ = model.sample(500, 100)
    assert entropy_rate(model, tokens, burn_in=10) == pytest.approx(1.5 * math.log(2), abs=2e-2)


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match="sum to 1"):
        HiddenMarkov(torch.tensor([0.5, 0.4]), torch.eye(2), torch.eye(2))
    with pytest.raises(ValueError, match="are needed"):
        HiddenMarkov(torch.tensor([0.5, 0.5]), torch.eye(3), torch.eye(2))
    model = HiddenMarkov.random(2, 3)
    with pytest.raises(ValueError, match="tokens must lie from 0 to 2"):
        model.log_likelihood(torch.tensor([[0, 3]]))
    with pytest.raises(ValueError, match="lengths"):
        model.log_likelihood(torch.tensor([[0, 1]]), torch.tensor([3]))
    with pytest.raises(ValueError, match="shape"):
        model.log_likelihood(torch.zeros(0, 3, dtype=torch.long))
