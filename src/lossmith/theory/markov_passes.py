"""Passes forward and backward over the sequences of a hidden Markov model."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Places between two divisions by the mass.
_EVERY = 4
# Emissions that are looked up at once.
_BLOCK = 1 << 14
# A mass below this has lost digits, or everything.
_TOO_SMALL = {torch.float64: 1e-250, torch.float32: 1e-30}


class Pieces(NamedTuple):
    """Few long sequences of one length, cut into pieces that can be walked side by side.

    Attributes:
        size: places that a piece adds to the one that it begins at; the last piece has what is left.
        matrices: what each piece makes of what is before it, ``(states, pieces, sequences, states)``.
        begins: forward variables where each piece begins, and where the last ends, ``(states, sequences)`` each.
        log_likelihood, least: of the sequences, and the smallest mass that was divided by.
    """

    size: int
    matrices: list[Tensor]
    begins: list[Tensor]
    log_likelihood: Tensor
    least: Tensor


class Passes:
    """The passes over some sequences: all at once, place by place.

    Forward variables are divided by their mass every few places, which keeps digits; where the mass becomes too small a
    sequence is impossible, or so nearly that only logarithms can tell.
    """

    def __init__(self, start: Tensor, transition: Tensor, emission: Tensor):
        self.start, self.transition, self.emission = start, transition, emission

    def likelihood_by_places(self, words: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Log-likelihoods and smallest masses of ``(length, sequences)`` words, the longest sequence first.

        Nothing is kept of the places behind, and sequences that have ended take no time.
        """
        state = (self.start[:, None] * self.emission[:, words[0]])[:, :, None]
        logarithms, least = state.new_zeros(len(lengths)), state.new_full((len(lengths),), math.inf)
        done = 1
        for edge in lengths.unique().tolist():
            active = int((lengths >= edge).sum())
            left = state[:, :active].contiguous()
            self.advance(left, words[done:edge, :active], logarithms[:active], least[:active])
            state[:, :active], done = left, edge
        last = state[:, :, 0].sum(0)
        return logarithms + last.log(), torch.minimum(least, last)

    def likelihood_by_pieces(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """The same for few long sequences of one length, ``(length, sequences)``: see :meth:`cut`."""
        found = self.cut(words)
        return found.log_likelihood, found.least

    def cut(self, words: Tensor) -> Pieces:
        """Cut ``(length, sequences)`` words into pieces, and find what is where they meet.

        A piece is a matrix, ``A diag(B_x) A diag(B_y) ...``: a column for each state that it may begin in. That is more
        arithmetic by the number of states, in ``3 sqrt(length)`` steps instead of ``length``.
        """
        length, sequences = words.shape
        k, pieces = len(self.start), math.isqrt(length - 1)
        size = (length - 1) // pieces
        inner = words[1 : 1 + pieces * size].view(pieces, size, sequences).transpose(0, 1).reshape(size, -1)
        matrices: list[Tensor] = []
        logarithms, least = self.start.new_zeros(sequences), self.start.new_full((sequences,), math.inf)
        for part, number in ((inner, pieces), (words[1 + pieces * size :], 1)):
            columns = torch.eye(k, dtype=self.start.dtype)[:, None].repeat(1, number * sequences, 1)
            # One mass for each matrix: its columns keep their proportions.
            whole = columns.new_zeros(number * sequences), columns.new_full((number * sequences,), math.inf)
            self.advance(columns, part, *whole)
            logarithms = logarithms + whole[0].view(number, -1).sum(0)
            least = torch.minimum(least, whole[1].view(number, -1).amin(0))
            matrices += columns.view(k, number, sequences, k).permute(1, 2, 0, 3).contiguous().unbind(0)
        state = (self.start[:, None] * self.emission[:, words[0]]).T
        begins = [state]
        for matrix in matrices:
            state = torch.bmm(matrix, state[:, :, None])[:, :, 0]
            mass = state.sum(1)
            state = state / mass[:, None]
            logarithms = logarithms + mass.log()
            least = torch.minimum(least, mass)
            begins.append(state)
        return Pieces(size, matrices, [b.T for b in begins], logarithms, least)

    def advance(self, state: Tensor, words: Tensor, logarithms: Tensor, least: Tensor) -> None:
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

    def posterior_by_pieces(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """As :meth:`posterior`, for few long sequences of one length; nothing where a mass becomes too small."""
        sequences, length = tokens.shape
        cut = self.cut(tokens.T)
        ends = [torch.ones_like(cut.begins[0])]
        least = cut.least
        for matrix in reversed(cut.matrices[1:]):
            behind = torch.bmm(matrix.mT, ends[0].T[:, :, None])[:, :, 0]
            mass = behind.sum(1)
            least = torch.minimum(least, mass)
            ends.insert(0, (behind / mass[:, None]).T)
        pieces, size = len(cut.matrices), cut.size
        rest = length - 1 - (pieces - 1) * size
        # Each piece begins at the last place of the one before.
        rows = torch.zeros(pieces, sequences, size + 1, dtype=tokens.dtype)
        for i in range(pieces):
            part = tokens[:, i * size : i * size + size + 1]
            rows[i, :, : part.shape[1]] = part
        lengths = torch.full((pieces, sequences), size + 1)
        lengths[-1] = rest + 1
        first, last = torch.cat(cut.begins[:-1], 1), torch.cat(ends, 1)
        found = self._both_ways(rows.flatten(0, 1), lengths.flatten(), first, last)
        if not bool((torch.minimum(least, found[1].view(pieces, -1).amin(0)) > _TOO_SMALL[least.dtype]).all()):
            return None
        k = len(self.start)
        states = found[2].view(k, size + 1, pieces, sequences)
        whole = states[:, 1:].permute(3, 2, 1, 0).reshape(sequences, pieces * size, k)[:, : length - 1]
        return cut.log_likelihood, torch.cat([states[:, :1, 0].permute(2, 1, 0), whole], 1), found[3]

    def posterior(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-likelihoods, states ``(sequences, length, states)``, expected moves: of ``(sequences, length)`` ids."""
        likelihood, least, states, moves = self._both_ways(tokens, lengths)
        likelihood = self.repaired(likelihood, least, tokens, lengths)
        states = states.permute(2, 1, 0)
        # Possible after all, but not without logarithms.
        failed = ~(least > _TOO_SMALL[least.dtype]) & torch.isfinite(likelihood)
        if bool(failed.any()):
            states[failed], more = self.posterior_in_logarithms(tokens[failed], lengths[failed])
            moves = moves + more
        return likelihood, states, moves

    def _both_ways(
        self, tokens: Tensor, lengths: Tensor, first: Tensor | None = None, last: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-likelihood, smallest mass, states ``(states, length, sequences)`` and moves; neither of lost sequences.

        ``first`` and ``last`` are forward and backward variables of the ends, ``(states, sequences)``, in any scale.
        """
        alphas, likelihood, least, scales, emitted = self._forward(tokens, lengths, first)
        k, length, _ = alphas.shape
        betas, pulled = torch.empty_like(alphas), torch.empty_like(alphas)
        back, pull, out = betas.unbind(1), pulled.unbind(1), emitted.unbind(1)
        betas[:, -1] = 1 if last is None else last
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
        lost = ~(least > _TOO_SMALL[least.dtype]) | ~(mass > 0).all(0)
        if bool(lost.any()):
            states[:, :, lost] = 0
            pulled[:, :, lost] = 0
            alphas[:, :, lost] = 0
            least = torch.where(lost, 0.0, least)
        # One product over all places instead of one for each.
        moves = (alphas[:, :-1].reshape(k, -1) @ pulled[:, 1:].reshape(k, -1).T) * self.transition
        return likelihood, least, states, moves

    def _forward(self, tokens: Tensor, lengths: Tensor, first: Tensor | None) -> tuple[Tensor, ...]:
        """Forward variables by place, log-likelihoods, least masses, what was divided by, emissions.

        Behind a sequence's end every token is certain (emission 1): moves keep the mass, so that nothing changes there.
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
        alphas[:, 0] = emitted[:, 0] * self.start[:, None] if first is None else first
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
        return alphas, scales.log().sum(0) + last.log(), least, scales, emitted

    def repaired(self, likelihood: Tensor, least: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Where the smallest mass that was divided by is too small (or NaN), the likelihood by logarithms."""
        failed = ~(least > _TOO_SMALL[least.dtype])
        if bool(failed.any()):
            likelihood[failed] = self.likelihood_in_logarithms(tokens[failed], lengths[failed])
        return likelihood

    def posterior_in_logarithms(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """States and moves where nothing but logarithms keeps a number; slow."""
        log_a, log_b = self.transition.log(), self.emission.log()
        inside = torch.arange(tokens.shape[1]) < lengths[:, None]
        emitted = log_b.T[torch.where(inside, tokens, 0)]
        alphas = [self.start.log() + emitted[:, 0]]
        for i in range(1, tokens.shape[1]):
            moved = torch.logsumexp(alphas[-1][:, :, None] + log_a, 1) + emitted[:, i]
            alphas.append(torch.where(inside[:, i, None], moved, alphas[-1]))
        likelihood = torch.logsumexp(alphas[-1], 1)[:, None]
        beta = torch.zeros_like(alphas[0])
        states, moves = torch.zeros(*tokens.shape, len(self.start), dtype=beta.dtype), torch.zeros_like(log_a)
        for i in reversed(range(tokens.shape[1])):
            here = inside[:, i, None]
            states[:, i] = torch.where(here, (alphas[i] + beta - likelihood).exp(), 0)
            if i:
                both = alphas[i - 1][:, :, None] + log_a + (emitted[:, i] + beta)[:, None]
                moves += torch.where(here[:, :, None], (both - likelihood[:, :, None]).exp(), 0).sum(0)
                pulled = torch.logsumexp(log_a + (emitted[:, i] + beta)[:, None], 2)
                beta = torch.where(here, pulled, beta)
        return states, moves

    def likelihood_in_logarithms(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Log-likelihoods where nothing but logarithms keeps a number; slow."""
        log_a, log_b = self.transition.log(), self.emission.log()
        safe = torch.where(torch.arange(tokens.shape[1]) < lengths[:, None], tokens, 0)
        score = self.start.log() + log_b.T[safe[:, 0]]
        for i in range(1, tokens.shape[1]):
            moved = torch.logsumexp(score[:, :, None] + log_a, 1) + log_b.T[safe[:, i]]
            score = torch.where((i < lengths)[:, None], moved, score)
        return torch.logsumexp(score, -1)
