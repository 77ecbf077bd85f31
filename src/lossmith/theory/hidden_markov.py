"""Hidden Markov models with finitely many states: likelihoods, posteriors and estimation, many sequences at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lossmith.theory.markov_passes import Passes

# Numbers in a matrix for each of some sequences, and places of each, where pieces side by side are faster.
_FEW, _LONG = 2048, 64


class Posterior(NamedTuple):
    """What a batch of sequences says of its states.

    Attributes:
        log_likelihood: of each sequence, ``(sequences,)``.
        states: probability of each state at each place, ``(sequences, length, states)``; 0 behind the end.
        transitions: expected number of moves from state to state, over all sequences, ``(states, states)``.
    """

    log_likelihood: Tensor
    states: Tensor
    transitions: Tensor


@dataclass(frozen=True, eq=False)
class HiddenMarkov:
    """``π``, ``A`` and ``B`` of a hidden Markov model over tokens.

    Attributes:
        start: ``π``, ``(states,)``.
        transition: ``A``, ``(states, states)``; rows sum to 1.
        emission: ``B``, ``(states, tokens)``; rows sum to 1.

    >>> model = HiddenMarkov.random(3, 5)
    >>> tokens, states = model.sample(4, 10)
    >>> model.log_likelihood(tokens).shape
    torch.Size([4])
    """

    start: Float[Tensor, " states"]
    transition: Float[Tensor, "states states"]
    emission: Float[Tensor, "states tokens"]

    def __post_init__(self) -> None:
        k = len(self.start)
        if (
            self.start.ndim != 1
            or self.transition.shape != (k, k)
            or self.emission.ndim != 2
            or len(self.emission) != k
        ):
            raise ValueError(
                f"start (k,), transition (k, k) and emission (k, tokens) are needed, got {tuple(self.start.shape)}, "
                f"{tuple(self.transition.shape)} and {tuple(self.emission.shape)}"
            )
        for name, value in (("start", self.start), ("transition", self.transition), ("emission", self.emission)):
            if not bool((value >= 0).all()) or not torch.allclose(value.sum(-1), torch.ones((), dtype=value.dtype)):
                raise ValueError(f"{name} must hold probabilities that sum to 1")

    @classmethod
    def random(cls, states: int, tokens: int, *, concentration: float = 1.0, seed: int = 0) -> HiddenMarkov:
        """Rows drawn from a Dirichlet distribution; a small ``concentration`` gives sharp ones."""
        generator = torch.Generator().manual_seed(seed)

        def rows(*shape: int) -> Tensor:
            alpha = torch.full(shape, concentration, dtype=torch.float64)
            gamma = torch._standard_gamma(alpha, generator=generator).clamp_min(1e-300)
            return gamma / gamma.sum(-1, keepdim=True)

        return cls(rows(states), rows(states, states), rows(states, tokens))

    @torch.no_grad()
    def sample(self, sequences: int, length: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Tokens and states, each ``(sequences, length)``."""
        generator = torch.Generator().manual_seed(seed)
        states = torch.empty(sequences, length, dtype=torch.long)
        tokens = torch.empty_like(states)
        state = torch.multinomial(self.start.expand(sequences, -1), 1, generator=generator)[:, 0]
        for i in range(length):
            if i:
                state = torch.multinomial(self.transition[state], 1, generator=generator)[:, 0]
            states[:, i] = state
            tokens[:, i] = torch.multinomial(self.emission[state], 1, generator=generator)[:, 0]
        return tokens, states

    def log_likelihood(
        self, tokens: Int[Tensor, "sequences length"], lengths: Int[Tensor, " sequences"] | None = None
    ) -> Float[Tensor, " sequences"]:
        """``ln P(tokens)`` of each sequence.

        Args:
            tokens: ids; what lies behind a sequence's end does not count.
            lengths: of the sequences; default: all of them.

        Raises:
            ValueError: tokens out of range, or lengths that do not fit.
        """
        lengths = self._check(tokens, lengths)
        passes = Passes(self.start, self.transition, self.emission)
        if self._few_and_long(tokens, lengths):
            likelihood, least = passes.likelihood_by_pieces(tokens.T)
        else:
            order = lengths.argsort(descending=True)
            found = passes.likelihood_by_places(tokens[order].T.contiguous(), lengths[order])
            likelihood, least = (value[order.argsort()] for value in found)
        return passes.repaired(likelihood, least, tokens, lengths)

    def posterior(
        self, tokens: Int[Tensor, "sequences length"], lengths: Int[Tensor, " sequences"] | None = None
    ) -> Posterior:
        """Forward-backward over a batch; arguments as of :meth:`log_likelihood`."""
        lengths = self._check(tokens, lengths)
        passes = Passes(self.start, self.transition, self.emission)
        found = None
        if self._few_and_long(tokens, lengths):
            found = passes.posterior_by_pieces(tokens)
        likelihood, states, moves = found or passes.posterior(tokens, lengths)
        return Posterior(likelihood, states, moves)

    def viterbi(
        self, tokens: Int[Tensor, "sequences length"], lengths: Int[Tensor, " sequences"] | None = None
    ) -> Int[Tensor, "sequences length"]:
        """The most probable states of each sequence; -1 behind its end."""
        lengths = self._check(tokens, lengths)
        log_a, log_b = self.transition.log(), self.emission.log()
        batch, length = tokens.shape
        score = self.start.log() + log_b[:, tokens[:, 0]].T
        back = torch.zeros(length, batch, len(self.start), dtype=torch.long)
        for i in range(1, length):
            best, back[i] = (score[:, :, None] + log_a).max(1)
            inside = (i < lengths)[:, None]
            score = torch.where(inside, best + log_b[:, tokens[:, i]].T, score)
        path = torch.full((batch, length), -1, dtype=torch.long)
        state = score.argmax(-1)
        for i in reversed(range(length)):
            inside = i < lengths
            path[:, i] = torch.where(inside, state, -1)
            if i:
                state = torch.where(inside, back[i].gather(1, state[:, None])[:, 0], state)
        return path

    def _few_and_long(self, tokens: Tensor, lengths: Tensor) -> bool:
        whole = int(lengths.min()) == tokens.shape[1]
        return whole and len(tokens) * len(self.start) ** 2 <= _FEW and tokens.shape[1] >= _LONG

    def _check(self, tokens: Tensor, lengths: Tensor | None) -> Tensor:
        if tokens.ndim != 2 or not tokens.numel():
            raise ValueError(f"tokens must have shape (sequences, length), got {tuple(tokens.shape)}")
        if lengths is None:
            lengths = torch.full((len(tokens),), tokens.shape[1])
        if lengths.shape != (len(tokens),) or int(lengths.min()) < 1 or int(lengths.max()) > tokens.shape[1]:
            raise ValueError(f"lengths must be {len(tokens)} numbers from 1 to {tokens.shape[1]}")
        whole = int(lengths.min()) == tokens.shape[1]
        used = tokens if whole else tokens[torch.arange(tokens.shape[1]) < lengths[:, None]]
        if int(used.min()) < 0 or int(used.max()) >= self.emission.shape[1]:
            raise ValueError(
                f"tokens must lie from 0 to {self.emission.shape[1] - 1}, got {used.min()} to {used.max()}"
            )
        return lengths


def fit_hidden_markov(
    tokens: Int[Tensor, "sequences length"],
    states: int,
    *,
    lengths: Int[Tensor, " sequences"] | None = None,
    vocabulary: int | None = None,
    max_steps: int = 100,
    tolerance: float = 1e-4,
    initial: HiddenMarkov | None = None,
    seed: int = 0,
) -> tuple[HiddenMarkov, list[float]]:
    """Maximum likelihood by Baum and Welch's steps.

    Args:
        tokens: ids.
        states: of the model.
        lengths: of the sequences.
        vocabulary: number of tokens; default: as many as are seen.
        max_steps: at most.
        tolerance: stop where the log-likelihood per token gains less.
        initial: where to begin, instead of random rows.
        seed: of those.

    Returns:
        The model, and the log-likelihood per token before every step and after the last.
    """
    size = vocabulary if vocabulary is not None else int(tokens.max()) + 1
    model = initial if initial is not None else HiddenMarkov.random(states, size, concentration=5.0, seed=seed)
    ends = lengths if lengths is not None else torch.full((len(tokens),), tokens.shape[1])
    inside = (torch.arange(tokens.shape[1]) < ends[:, None]).double()
    count = float(inside.sum())
    places = torch.where(inside.bool(), tokens, 0).reshape(-1)
    log: list[float] = []
    for _ in range(max_steps):
        found = model.posterior(tokens, lengths)
        log.append(float(found.log_likelihood.sum()) / count)
        if len(log) > 1 and log[-1] - log[-2] < tolerance:
            return model, log
        emitted = torch.zeros(size, states, dtype=torch.float64)
        emitted.index_add_(0, places, found.states.reshape(-1, states))
        model = HiddenMarkov(_rows(found.states[:, 0].sum(0)), _rows(found.transitions), _rows(emitted.T))
    log.append(float(model.log_likelihood(tokens, lengths).sum()) / count)
    return model, log


def _rows(counts: Tensor) -> Tensor:
    total = counts.sum(-1, keepdim=True)
    # A state that is never visited keeps a uniform row.
    return torch.where(total > 0, counts / total.clamp_min(1e-300), 1 / counts.shape[-1])


def entropy_rate(model: HiddenMarkov, tokens: Tensor, *, burn_in: int = 0) -> float:
    """Nats per token that the model itself needs on its own text: the optimum of any language model there.

    Args:
        model: that made the text.
        tokens: its text, ``(sequences, length)``.
        burn_in: tokens at the start that do not count.
    """
    if not 0 <= burn_in < tokens.shape[1]:
        raise ValueError(f"burn_in must lie from 0 to {tokens.shape[1] - 1}, got {burn_in}")
    whole = float(model.log_likelihood(tokens).sum())
    start = float(model.log_likelihood(tokens[:, :burn_in]).sum()) if burn_in else 0.0
    return (start - whole) / (len(tokens) * (tokens.shape[1] - burn_in))
