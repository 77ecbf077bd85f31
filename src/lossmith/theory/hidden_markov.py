"""Hidden Markov models with finitely many states: likelihoods, posteriors and estimation, many sequences at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Places between two divisions by the mass.
_EVERY = 4
# Emissions that are looked up at once.
_BLOCK = 1 << 14
# Numbers in a matrix for each of some sequences, and places of each, where pieces side by side are faster.
_FEW, _LONG = 2048, 64
# A mass below this has lost digits, or everything.
_TOO_SMALL = {torch.float64: 1e-250, torch.float32: 1e-30}


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
        if int(lengths.min()) < tokens.shape[1]:
            order = lengths.argsort(descending=True)
            found = self._by_places(tokens[order].T.contiguous(), lengths[order])
            likelihood, least = (value[order.argsort()] for value in found)
        elif len(tokens) * len(self.start) ** 2 <= _FEW and tokens.shape[1] >= _LONG:
            likelihood, least = self._by_pieces(tokens.T)
        else:
            likelihood, least = self._by_places(tokens.T, lengths)
        return self._repaired(likelihood, least, tokens, lengths)

    def posterior(
        self, tokens: Int[Tensor, "sequences length"], lengths: Int[Tensor, " sequences"] | None = None
    ) -> Posterior:
        """Forward-backward over a batch; arguments as of :meth:`log_likelihood`."""
        lengths = self._check(tokens, lengths)
        alphas, likelihood, scales, emitted = self._forward(tokens, lengths)
        k, length, _ = alphas.shape
        betas, pulled = torch.empty_like(alphas), torch.empty_like(alphas)
        back, pull, out = betas.unbind(1), pulled.unbind(1), emitted.unbind(1)
        betas[:, -1] = 1
        for i in range(length - 1, 0, -1):
            torch.mul(back[i], out[i], out=pull[i])
            torch.mm(self.transition, pull[i], out=back[i - 1])
            if i % _EVERY == 0:
                # Any factor will do: states and moves are normalised at the end.
                back[i - 1].div_(back[i - 1].sum(0))
        states = betas.mul_(alphas)
        mass = states.sum(0)
        states /= mass
        # Σ alpha_{i-1} A pulled_i is the mass at i before alpha_i was scaled.
        pulled[:, 1:] /= mass[1:] * scales[1:]
        if int(lengths.min()) < length:
            outside = torch.arange(length)[:, None] >= lengths
            states[:, outside] = 0
            pulled[:, outside] = 0
        impossible = ~torch.isfinite(likelihood) | ~(mass > 0).all(0)
        if bool(impossible.any()):
            states[:, :, impossible] = 0
            pulled[:, :, impossible] = 0
        # One product over all places instead of one for each.
        moves = (alphas[:, :-1].reshape(k, -1) @ pulled[:, 1:].reshape(k, -1).T) * self.transition
        return Posterior(likelihood, states.permute(2, 1, 0), moves)

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

    def _forward(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Forward variables by place, log-likelihoods, what was divided by, emissions.

        Behind a sequence's end every token is certain (emission 1): moves keep the mass, so that nothing changes there.
        Dividing by the mass every few places keeps digits; where it becomes too small a sequence is impossible, or so
        nearly that only logarithms can tell.
        """
        length = tokens.shape[1]
        outside = (torch.arange(length) >= lengths[:, None]).T
        safe = torch.where(outside, 0, tokens.T)
        # (states, length, sequences): long rows are what vector units like.
        emitted = self.emission.index_select(1, safe.reshape(-1)).view(-1, *safe.shape)
        if bool(outside.any()):
            emitted[:, outside] = 1
        alphas = torch.empty_like(emitted)
        scales = emitted.new_ones(safe.shape)
        torch.mul(emitted[:, 0], self.start[:, None], out=alphas[:, 0])
        forward, out = alphas.unbind(1), emitted.unbind(1)
        moved, forwards = torch.empty_like(forward[0]), self.transition.T.contiguous()
        for i in range(1, length):
            torch.mm(forwards, forward[i - 1], out=moved)
            torch.mul(moved, out[i], out=forward[i])
            if i % _EVERY == 0:
                torch.sum(forward[i], 0, out=scales[i])
                forward[i].div_(scales[i])
        last = forward[-1].sum(0)
        least = torch.minimum(scales.amin(0), last)
        likelihood = self._repaired(scales.log().sum(0) + last.log(), least, tokens, lengths)
        return alphas, likelihood, scales, emitted

    def _repaired(self, likelihood: Tensor, least: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Where the smallest mass that was divided by is too small (or NaN), the likelihood by logarithms."""
        failed = ~(least > _TOO_SMALL[least.dtype])
        if bool(failed.any()):
            likelihood[failed] = self._forward_in_logarithms(tokens[failed], lengths[failed])
        return likelihood

    def _by_places(self, words: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Log-likelihoods and smallest masses of ``(length, sequences)`` words, the longest sequence first.

        Nothing is kept of the places behind, and sequences that have ended take no time.
        """
        state = (self.start[:, None] * self.emission[:, words[0]])[:, :, None]
        logarithms, least = state.new_zeros(len(lengths)), state.new_full((len(lengths),), math.inf)
        done = 1
        for edge in lengths.unique().tolist():
            active = int((lengths >= edge).sum())
            left = state[:, :active].contiguous()
            self._advance(left, words[done:edge, :active], logarithms[:active], least[:active])
            state[:, :active], done = left, edge
        last = state[:, :, 0].sum(0)
        return logarithms + last.log(), torch.minimum(least, last)

    def _by_pieces(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """The same for few long sequences of one length: all are cut into pieces, which advance side by side.

        A piece is a matrix, ``A diag(B_x) A diag(B_y) ...``: a column for each state that it may begin in. That is more
        arithmetic by the number of states, in ``3 sqrt(length)`` steps instead of ``length``.
        """
        length, sequences = words.shape
        k, pieces = len(self.start), math.isqrt(length - 1)
        size = (length - 1) // pieces
        inner = words[1 : 1 + pieces * size].view(pieces, size, sequences).transpose(0, 1).reshape(size, -1)
        matrices = torch.eye(k, dtype=self.start.dtype)[:, None].repeat(1, pieces * sequences, 1)
        # One mass for each matrix: its columns keep their proportions.
        whole = matrices.new_zeros(pieces * sequences), matrices.new_full((pieces * sequences,), math.inf)
        self._advance(matrices, inner, *whole)
        logarithms, least = whole[0].view(pieces, -1).sum(0), whole[1].view(pieces, -1).amin(0)
        state = (self.start[:, None] * self.emission[:, words[0]]).T
        for matrix in matrices.view(k, pieces, sequences, k).permute(1, 2, 0, 3).contiguous().unbind(0):
            state = torch.bmm(matrix, state[:, :, None])[:, :, 0]
            mass = state.sum(1)
            state /= mass[:, None]
            logarithms += mass.log()
            least = torch.minimum(least, mass)
        rest = state.T.contiguous()[:, :, None]
        self._advance(rest, words[1 + pieces * size :], logarithms, least)
        last = rest[:, :, 0].sum(0)
        return logarithms + last.log(), torch.minimum(least, last)

    def _advance(self, state: Tensor, words: Tensor, logarithms: Tensor, least: Tensor) -> None:
        """Move and emit, word by word, all in place; every few places what is reached is divided by its mass.

        Args:
            state: ``(states, sequences, vectors)``; vectors of a sequence share their words and their mass.
            words: ``(length, sequences)``.
            logarithms: of the masses, added to, ``(sequences,)``.
            least: the smallest of them.
        """
        (length, sequences), k = words.shape, len(state)
        flat, forwards = state.view(k, -1), self.transition.T.contiguous()
        moved = torch.empty_like(state)
        flat_moved = moved.view(k, -1)
        masses = state.new_empty(length // _EVERY, sequences)
        mass, divisor = masses.unbind(0), masses[:, :, None].unbind(0)
        # Emissions of some places at once: fewer calls, and what they fill stays in the cache.
        block = max(1, _BLOCK // max(1, sequences * k))
        for first in range(0, length, block):
            part = words[first : first + block].reshape(-1)
            emitted = self.emission.gather(1, part.expand(k, -1)).view(k, -1, sequences, 1)
            for i, out in enumerate(emitted.unbind(1), first + 1):
                torch.mm(forwards, flat, out=flat_moved)
                torch.mul(moved, out, out=state)
                if i % _EVERY == 0:
                    torch.sum(state, (0, 2), out=mass[i // _EVERY - 1])
                    state.div_(divisor[i // _EVERY - 1])
        if len(masses):
            logarithms += masses.log().sum(0)
            torch.minimum(least, masses.amin(0), out=least)

    def _forward_in_logarithms(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        log_a, log_b = self.transition.log(), self.emission.log()
        safe = torch.where(torch.arange(tokens.shape[1]) < lengths[:, None], tokens, 0)
        score = self.start.log() + log_b.T[safe[:, 0]]
        for i in range(1, tokens.shape[1]):
            moved = torch.logsumexp(score[:, :, None] + log_a, 1) + log_b.T[safe[:, i]]
            score = torch.where((i < lengths)[:, None], moved, score)
        return torch.logsumexp(score, -1)


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
