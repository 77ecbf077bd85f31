"""Grammars against enumeration of all their sentences."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from lossmith.errors import InputError
from lossmith.theory import PCFG

# Ambiguous, recursive, with chains and a circle of single symbols, and a word that several symbols give.
RULES = """
# left side, right side, probability
S A S 0.2
S -> A B [0.5]
S C 0.3
A 'x' 0.7
A B B 0.3
B x 0.25
B y 0.5
B -> C [0.25]
C z 0.5
C B 0.2
C A C 0.3
"""


def derivations(grammar: PCFG, symbol: int, words: tuple[int, ...], depth: int = 60) -> float:
    """P(words | symbol) by the plain recursion; chains of single symbols are followed 60 deep."""
    total = float(grammar.lexical[symbol, words[0]]) if len(words) == 1 else 0.0
    for (a, b, c), p in zip(grammar.binary.tolist(), grammar.weights.tolist(), strict=True):
        if a == symbol:
            total += p * sum(
                derivations(grammar, b, words[:cut]) * derivations(grammar, c, words[cut:])
                for cut in range(1, len(words))
            )
    if depth:
        for b, p in enumerate(grammar.unary[symbol].tolist()):
            if p:
                total += p * derivations(grammar, b, words, depth - 1)
    return total


@pytest.fixture(scope="module")
def grammar() -> PCFG:
    return PCFG.from_rules(RULES)


@pytest.fixture(scope="module")
def every(grammar: PCFG) -> dict[tuple[int, ...], float]:
    """All sentences of up to three words."""
    return {
        words: derivations(grammar, 0, words, 12)
        for length in (1, 2, 3)
        for words in itertools.product(range(3), repeat=length)
    }


def test_rules_are_read_and_added() -> None:
    read = PCFG.from_rules(["S A A 0.5", "S A A 0.25", "S 'A' 0.25", "A a 1"])
    assert read.symbols == ("S", "A")
    # In quotes a word, although a symbol has its name.
    assert read.words == ("A", "a")
    assert read.weights.tolist() == [0.75]
    assert read.lexical.tolist() == [[0.25, 0], [0, 1]]


def test_likelihoods_are_sums_over_derivations(grammar: PCFG, every: dict[tuple[int, ...], float]) -> None:
    for length in (1, 2, 3):
        sentences = [words for words in every if len(words) == length]
        found = grammar.log_likelihood(torch.tensor(sentences)).exp()
        expected = torch.tensor([every[words] for words in sentences], dtype=torch.float64)
        # The reference follows circles 12 deep: 0.05 ** 6 is left out.
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-12)
    padded = torch.tensor([[0, 1, -1], [2, -1, -1], [0, 0, 1]])
    found = grammar.log_likelihood(padded, torch.tensor([2, 1, 3])).exp()
    expected = torch.tensor([every[w] for w in ((0, 1), (2,), (0, 0, 1))], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)
    assert float(grammar.log_mass(3).exp()) == pytest.approx(sum(every.values()), rel=1e-7)


def test_the_next_word_is_that_of_all_sentences(grammar: PCFG, every: dict[tuple[int, ...], float]) -> None:
    for length in (0, 1, 2, 3):
        prefixes = list(itertools.product(range(3), repeat=length))
        expected = np.zeros((len(prefixes), 4))
        for words, p in every.items():
            if words[:length] in prefixes:
                row = prefixes.index(words[:length])
                expected[row, words[length] if len(words) > length else 3] += p
        possible = expected.sum(1) > 0
        prefixes_tensor = torch.tensor(prefixes, dtype=torch.long).reshape(len(prefixes), length)[possible]
        found = grammar.next_word(prefixes_tensor, max_length=3)
        expected = expected[possible] / expected[possible].sum(1, keepdims=True)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-7, atol=1e-9)
        inside = grammar.inside(prefixes_tensor, max_length=3)[:, 0].exp()
        sums = [sum(p for w, p in every.items() if w[:length] == tuple(row)) for row in prefixes_tensor.tolist()]
        np.testing.assert_allclose(inside.numpy(), sums, rtol=1e-7)


def test_the_masked_word_is_that_of_all_sentences(grammar: PCFG, every: dict[tuple[int, ...], float]) -> None:
    tokens, places, lengths = torch.tensor([[0, -9, 1], [0, -9, 5], [-9, 7, 7]]), torch.tensor([1, 1, 0]), [3, 2, 1]
    found = grammar.masked_word(tokens, places, torch.tensor(lengths))
    for row, sentence in enumerate(((0, None, 1), (0, None), (None,))):
        joint = [every[tuple(w if item is None else item for item in sentence)] for w in range(3)]
        np.testing.assert_allclose(found[row].numpy(), np.array(joint) / sum(joint), rtol=1e-7, atol=1e-12)


def test_products_of_next_words_are_likelihoods(grammar: PCFG) -> None:
    tokens, lengths = grammar.sample(40, 6, seed=3)
    expected = grammar.log_likelihood(tokens, lengths) - grammar.log_mass(6)
    for row, length in zip(tokens, lengths.tolist(), strict=True):
        total = 0.0
        for place in range(length + 1):
            following = grammar.next_word(row[None, :place], max_length=6)[0]
            total += math.log(float(following[int(row[place]) if place < length else -1]))
        assert total == pytest.approx(float(expected[(tokens == row).all(1).nonzero()[0]]), rel=1e-9)


def test_samples_have_the_frequencies_of_the_grammar(grammar: PCFG, every: dict[tuple[int, ...], float]) -> None:
    n = 4000
    tokens, lengths = grammar.sample(n, 3, seed=1)
    again, _ = grammar.sample(n, 3, seed=1)
    assert torch.equal(tokens, again)
    mass = sum(every.values())
    for words, p in every.items():
        row = torch.tensor([*words, *[-1] * (3 - len(words))])
        share = float(((tokens == row).all(1) & (lengths == len(words))).double().mean())
        assert abs(share - p / mass) < 5 * math.sqrt(max(p / mass, 1e-3) / n), words


def test_long_and_unlikely_sentences_do_not_underflow() -> None:
    """A chain: P = 1e-9 for every word, a sum over all bracketings of none but one."""
    grammar = PCFG.from_rules(["S A S 0.001", "S a 0.999", "A a 0.000001", "A b 0.999999"])
    tokens = torch.zeros(2, 60, dtype=torch.long)
    expected = 59 * (math.log(1e-3) + math.log(1e-6)) + math.log(0.999)
    assert grammar.log_likelihood(tokens).tolist() == pytest.approx([expected] * 2, rel=1e-12)
    assert grammar.next_word(tokens[:1], max_length=60).tolist() == [[0.0, 0.0, 1.0]]
    impossible = PCFG.from_rules(["S A A 1", "A a 0.5", "A b 0.5"])
    assert impossible.log_likelihood(torch.zeros(1, 3, dtype=torch.long)).item() == -math.inf
    torch.testing.assert_close(
        impossible.next_word(torch.zeros(1, 2, dtype=torch.long), max_length=4)[0, -1].item(), 1.0
    )


def test_a_file_of_rules(tmp_path: Path) -> None:
    path = tmp_path / "rules.txt"
    path.write_text(RULES, encoding="utf-8")
    assert torch.equal(PCFG.from_file(path).weights, PCFG.from_rules(RULES).weights)


@pytest.mark.parametrize(
    "rules, message",
    [
        ("", "no rule"),
        ("S A B", "rules, line 1: a rule is A B C 0.5"),
        ("S 1.0", "rules, line 1: a rule is"),
        ("S a nan", "rules, line 1: a rule is"),
        ("S a -0.5", "rules, line 1: a rule is"),
        ("S A A 0.5\nS a 0.4\nA a 1", "the probabilities of S must sum to 1 within 1e-6, got 0.9"),
        ("S A b 1\nA a 1", "line 1: the right side must be one word, or one or two symbols, got A b"),
        ("S A A A 1\nA a 1", "line 1: the right side must be"),
        ("S T 1\nT S 1", "go round in circles for ever"),
    ],
)
def test_rules_that_are_none_are_named(rules: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        PCFG.from_rules(rules)


def test_wrong_input_is_one_sentence(grammar: PCFG) -> None:
    short = torch.zeros(1, 2, dtype=torch.long)
    for call, message in (
        (lambda: grammar.log_likelihood(short + 3), "tokens must lie from 0 to 2, got 3 to 3"),
        (lambda: grammar.log_likelihood(torch.zeros(0, 2, dtype=torch.long)), "shape"),
        (lambda: grammar.log_likelihood(short, torch.tensor([3])), "lengths must be 1 numbers from 1 to 2"),
        (lambda: grammar.next_word(short, max_length=1), "max_length must be at least 2, got 1"),
        (lambda: grammar.next_word(torch.tensor([[0, 2], [1, 1]]), max_length=2), "row 1 has no sentence"),
        (lambda: grammar.masked_word(short, torch.tensor([2])), "places must be one for each sentence"),
        (lambda: PCFG.from_rules(["S S S 0.9", "S a 0.1"]).sample(1, 0), "max_length must be at least 1"),
        (lambda: PCFG.from_rules(["S A A 1", "A B B 1", "B b 1"]).sample(1, 3), "fewer than one in a million"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
