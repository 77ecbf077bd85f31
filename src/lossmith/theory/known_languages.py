"""Languages small enough to know the true distribution of the next word after every context, and so the optimum.

"Same Pre-training Loss, Better Downstream: Implicit Bias Matters for Language Models", 2022, arXiv 2210.14199.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lossmith.theory.context_free import PCFG
from lossmith.theory.hidden_markov import HiddenMarkov

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class KnownLanguage:
    """Contexts of known frequency, each with the true distribution of its next word and a hidden cluster.

    Attributes:
        conditional: ``(contexts, words)``, rows sum to 1.
        frequency: ``(contexts,)``, sums to 1.
        cluster: ``(contexts,)``, what a downstream task asks for.
    """

    conditional: Array
    frequency: Array
    cluster: NDArray[np.int64]

    @property
    def optimum(self) -> float:
        """The least cross entropy, nats per word: the conditional entropy of the language."""
        p = self.conditional
        logs = np.log(p, where=p > 0, out=np.zeros_like(p))
        return float(-(self.frequency[:, None] * p * logs).sum())

    @classmethod
    def clustered(cls, clusters: int = 4, size: int = 6, words: int = 6, *, seed: int = 0) -> KnownLanguage:
        """Equally frequent contexts; those of a cluster share a distribution (Dirichlet(0.7), 2 % of it uniform)."""
        rng = np.random.default_rng([seed, 1])
        rows = 0.98 * rng.dirichlet(np.full(words, 0.7), clusters) + 0.02 / words
        cluster = np.repeat(np.arange(clusters), size)
        return cls(rows[cluster], np.full(len(cluster), 1 / len(cluster)), cluster)

    @classmethod
    def hidden_markov(cls, states: int = 4, size: int = 6, *, seed: int = 0) -> KnownLanguage:
        """Next tokens of a hidden Markov model whose tokens each belong to one state: one token tells the state.

        The context is the last token, its cluster the state; the optimum is the entropy rate.
        """
        rng = np.random.default_rng([seed, 2])
        transition = 0.95 * rng.dirichlet(np.full(states, 0.7), states) + 0.05 / states
        emission = np.zeros((states, states * size))
        for state in range(states):
            emission[state, state * size : (state + 1) * size] = rng.dirichlet(np.full(size, 4.0))
        values, vectors = np.linalg.eig(transition.T)
        stationary = np.real(vectors[:, np.argmin(np.abs(values - 1))])
        stationary = stationary / stationary.sum()
        cluster = np.repeat(np.arange(states), size)
        return cls(transition[cluster] @ emission, stationary @ emission, cluster)

    @classmethod
    def context_free(cls, roots: int = 4, words: int = 6, *, seed: int = 0) -> KnownLanguage:
        """The third word of a grammar's sentences of four; the cluster is the root that most likely made the first two.

        ``S`` becomes one of ``roots``, that becomes two of eight phrases, each phrase two of six kinds of words. Roots
        share phrases, phrases share kinds, kinds share words: contexts of a cluster differ in their next word, as they
        do in the paper's grammar, so that the true probabilities alone do not tell the cluster.
        """
        for attempt in itertools.count():
            grammar = _small_grammar(roots, words, np.random.default_rng([seed, 7, attempt]))
            contexts = torch.cartesian_prod(torch.arange(words), torch.arange(words))
            inside = grammar.inside(contexts, max_length=4)
            places = [grammar.symbols.index(f"R{i}") for i in range(roots)]
            by_root = (grammar.unary[0, places].log() + inside[:, places]).softmax(1).numpy()
            cluster = by_root.argmax(1)
            # Each root needs contexts to learn from and to be asked about.
            if np.bincount(cluster, minlength=roots).min() >= 3:
                conditional = grammar.next_word(contexts, max_length=4)[:, :words].numpy()
                return cls(conditional, inside[:, 0].exp().numpy(), cluster)
        raise AssertionError

    def as_hidden_markov(self) -> HiddenMarkov:
        """The hidden Markov model with a state for every context: what samples the language of single tokens.

        Raises:
            ValueError: contexts are not the words.
        """
        if self.conditional.shape[0] != self.conditional.shape[1]:
            raise ValueError(
                f"contexts are single words only where there are as many, got {self.conditional.shape[0]} contexts and "
                f"{self.conditional.shape[1]} words"
            )
        start, moves = torch.from_numpy(self.frequency), torch.from_numpy(self.conditional)
        return HiddenMarkov(start, moves, torch.eye(len(start), dtype=torch.float64))


def _small_grammar(roots: int, words: int, rng: np.random.Generator) -> PCFG:
    lines = [f"S R{i} {1 / roots!r}" for i in range(roots)]

    def pairs(symbol: str, of: str, number: int, rules: int) -> None:
        chosen = rng.choice(number**2, rules, replace=False)
        for pair, p in zip(chosen.tolist(), rng.dirichlet(np.full(rules, 4.0)).tolist(), strict=True):
            lines.append(f"{symbol} {of}{pair // number} {of}{pair % number} {p!r}")

    for i in range(roots):
        pairs(f"R{i}", "P", 8, 2)
    for i in range(8):
        pairs(f"P{i}", "K", 6, 2)
    for i in range(6):
        shares = 0.95 * rng.dirichlet(np.full(words, 0.5)) + 0.05 / words
        lines += [f"K{i} w{j} {p!r}" for j, p in enumerate(shares.tolist())]
    # All words, in their order, whichever kind of word comes first.
    grammar = PCFG.from_rules(lines)
    order = [grammar.words.index(f"w{j}") for j in range(words)]
    return PCFG(
        grammar.symbols,
        tuple(grammar.words[j] for j in order),
        grammar.unary,
        grammar.binary,
        grammar.weights,
        grammar.lexical[:, order],
    )
