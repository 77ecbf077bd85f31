"""Probabilistic context-free grammars: samples, inside probabilities, and the exact distribution of the next word."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lossmith.errors import InputError
from lossmith.files import read_utf8

# Numbers of a chart that are in work at once.
_BLOCK = 1 << 20


@dataclass(frozen=True, eq=False)
class PCFG:
    """A grammar with at most two symbols, or one word, on the right of a rule; see :meth:`from_rules`.

    Attributes:
        symbols: names; the first is where a sentence starts.
        words: the vocabulary.
        unary: probability of ``A -> B``, ``(symbols, symbols)``.
        binary: ``A``, ``B``, ``C`` of every rule ``A -> B C``, ``(rules, 3)``.
        weights: their probabilities, ``(rules,)``.
        lexical: probability of ``A -> word``, ``(symbols, words)``.

    Source: the synthetic language of "Same Pre-training Loss, Better Downstream: Implicit Bias Matters for Language
    Models", 2022, arXiv 2210.14199; inside probabilities of Baker 1979.

    >>> grammar = PCFG.from_rules(["S A S 0.4", "S A B 0.6", "A x 1", "B x 0.5", "B y 0.5"])
    >>> [round(p, 3) for p in grammar.next_word(torch.tensor([[0]]), max_length=3)[0].tolist()]  # x, y, end
    [0.643, 0.357, 0.0]
    """

    symbols: tuple[str, ...]
    words: tuple[str, ...]
    unary: Float[Tensor, "symbols symbols"]
    binary: Int[Tensor, "rules 3"]
    weights: Float[Tensor, " rules"]
    lexical: Float[Tensor, "symbols words"]

    @classmethod
    def from_rules(cls, rules: str | Iterable[str], *, name: str = "rules") -> PCFG:
        """A grammar from lines ``A B C 0.5`` or ``A -> B C [0.5]``, the left side of the first being the start.

        What stands on no left side, or in quotes, is a word. Rules that occur twice are added. Empty lines and lines
        that begin with ``#`` do not count.

        Raises:
            InputError: a line that is no rule (by its number), a word beside something else, a symbol whose
                probabilities do not sum to 1 within 1e-6, rules that go round in circles.
        """
        lines = rules.splitlines() if isinstance(rules, str) else list(rules)
        found = [_rule(f"{name}, line {i}", line) for i, line in enumerate(lines, 1) if _counts(line)]
        if not found:
            raise InputError(f"{name}: no rule; a rule is A B C 0.5, or A -> B C [0.5]")
        symbols = tuple(dict.fromkeys(left for _, left, _, _ in found))
        place = {symbol: i for i, symbol in enumerate(symbols)}
        words = tuple(dict.fromkeys(_word(item) for _, _, right, _ in found for item in right if _is_word(item, place)))
        column = {word: i for i, word in enumerate(words)}
        unary = torch.zeros(len(symbols), len(symbols), dtype=torch.float64)
        lexical = torch.zeros(len(symbols), len(words), dtype=torch.float64)
        pairs: dict[tuple[int, int, int], float] = {}
        for where, left, right, p in found:
            kinds = [_is_word(item, place) for item in right]
            if len(right) > 2 or (len(right) == 2 and any(kinds)):
                raise InputError(
                    f"{where}: the right side must be one word, or one or two symbols, got {' '.join(right)}"
                )
            a = place[left]
            if len(right) == 2:
                key = a, place[right[0]], place[right[1]]
                pairs[key] = pairs.get(key, 0.0) + p
            elif kinds[0]:
                lexical[a, column[_word(right[0])]] += p
            else:
                unary[a, place[right[0]]] += p
        binary = torch.tensor(list(pairs), dtype=torch.long).reshape(-1, 3)
        weights = torch.tensor(list(pairs.values()), dtype=torch.float64)
        totals = (unary.sum(1) + lexical.sum(1)).index_add(0, binary[:, 0], weights)
        for symbol, total in zip(symbols, totals.tolist(), strict=True):
            if not abs(total - 1) <= 1e-6:
                raise InputError(f"{name}: the probabilities of {symbol} must sum to 1 within 1e-6, got {total:.8g}")
        if float(torch.linalg.eigvals(unary).abs().max()) > 1 - 1e-9:
            raise InputError(f"{name}: rules with one symbol on the right go round in circles for ever")
        by_left = totals[:, None]
        return cls(symbols, words, unary / by_left, binary, weights / totals[binary[:, 0]], lexical / by_left)

    @classmethod
    def from_file(cls, path: str | Path) -> PCFG:
        """A grammar from a file of :meth:`from_rules`' lines, such as the paper's ``rule_deep_mlm.txt``."""
        return cls.from_rules(read_utf8(path), name=str(path))

    def sample(self, sentences: int, max_length: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Sentences of at most ``max_length`` words (longer ones are drawn again), padded with -1; and their lengths.

        Raises:
            ValueError: hardly any sentence is so short.
        """
        if float(self.log_mass(max_length)) < np.log(1e-6):
            raise ValueError(f"fewer than one in a million sentences has at most max_length = {max_length} words")
        rng = np.random.default_rng(seed)
        choices = [self._choices(i) for i in range(len(self.symbols))]
        tokens = torch.full((sentences, max_length), -1)
        lengths = torch.zeros(sentences, dtype=torch.long)
        for row in range(sentences):
            words: list[int] | None = None
            while words is None:
                words = _derive(choices, max_length, rng)
            tokens[row, : len(words)], lengths[row] = torch.tensor(words), len(words)
        return tokens, lengths

    def inside(
        self,
        tokens: Int[Tensor, "sentences length"],
        lengths: Int[Tensor, " sentences"] | None = None,
        *,
        max_length: int | None = None,
    ) -> Float[Tensor, "sentences symbols"]:
        """``ln P(words | symbol)``: that a symbol derives these words.

        Args:
            tokens: ids of words.
            lengths: of the sentences; default: all of them.
            max_length: if given, ``tokens`` are beginnings: they may go on to so many words at most.
        """
        ends = self._check(tokens, lengths, max_length)
        if max_length is None:
            tokens = tokens[:, : int(ends.max())]
            found = [self._spans(self._leaves(part)) for part in self._parts(tokens, tokens.shape[1])]
            tables = torch.cat([torch.stack([v.log() + s[:, None] for v, s in spans], 1) for spans in found])
            return tables[torch.arange(len(tokens)), ends - 1]
        blocks = []
        for part, end in zip(self._parts(tokens, max_length), self._parts(ends, max_length), strict=True):
            spans = self._spans(self._leaves(part, end, max_length))
            table = torch.stack([v.log() + s[:, None] for v, s in spans], 1)
            short = torch.arange(1, max_length + 1) < end[:, None]
            blocks.append(torch.logsumexp(table.masked_fill(short[:, :, None], -torch.inf), 1))
        return torch.cat(blocks)

    def log_likelihood(
        self, tokens: Int[Tensor, "sentences length"], lengths: Int[Tensor, " sentences"] | None = None
    ) -> Float[Tensor, " sentences"]:
        """``ln P`` of whole sentences; ``-log_mass(max_length)`` more where longer ones were drawn again."""
        return self.inside(tokens, lengths)[:, 0]

    def log_mass(self, max_length: int) -> Float[Tensor, ""]:
        """``ln P`` that a sentence has at most so many words."""
        return self.inside(torch.zeros(1, 0, dtype=torch.long), max_length=max_length)[0, 0]

    def next_word(self, prefixes: Int[Tensor, "sentences length"], *, max_length: int) -> Float[Tensor, "sentences _"]:
        """Probability of each next word, and last that of the end, among sentences of at most ``max_length`` words.

        Inside probabilities are linear in what may stand at a place, so that one backward pass gives all words at once.

        Raises:
            ValueError: a beginning that no such sentence has (by its row), or longer than ``max_length``.
        """
        ends = self._check(prefixes, None, max_length)
        done = prefixes.shape[1]
        found = []
        for part, end in zip(self._parts(prefixes, max_length), self._parts(ends, max_length), strict=True):
            stops = torch.zeros(len(part), dtype=torch.float64)
            if done == max_length:
                # Nothing but the end is left; the probability itself may be too small for a number.
                possible = torch.isfinite(self.inside(part)[:, 0])
                found.append((torch.zeros(len(part), len(self.words)), possible.double()))
                continue
            choice = torch.ones(len(part), len(self.words), dtype=torch.float64, requires_grad=True)
            leaves = self._leaves(part, end, max_length)
            leaves = torch.cat([leaves[:, :done], (choice @ self.lexical.T)[:, None], leaves[:, done + 1 :]], 1)
            spans = self._spans(leaves)
            scale = torch.stack([s for _, s in spans[max(0, done - 1) :]]).amax(0)
            scale = torch.where(torch.isfinite(scale), scale, 0.0)
            goes_on = sum((v[:, 0] * (s - scale).exp() for v, s in spans[done:]), torch.zeros(len(part)))
            if done:
                value, size = spans[done - 1]
                stops = (value[:, 0] * (size - scale).exp()).detach()
            (joint,) = torch.autograd.grad(goes_on.sum(), choice)
            found.append((joint, stops))
        joint = torch.cat([torch.cat([j, s[:, None]], 1) for j, s in found])
        return self._normalised(joint, f"has no sentence of at most {max_length} words")

    def masked_word(
        self,
        tokens: Int[Tensor, "sentences length"],
        places: Int[Tensor, " sentences"],
        lengths: Int[Tensor, " sentences"] | None = None,
    ) -> Float[Tensor, "sentences words"]:
        """Probability of each word at one place of a sentence, given all others: the optimum of masked prediction.

        Raises:
            ValueError: a place outside its sentence; other words that no sentence has (by its row).
        """
        ends = self._check(tokens, lengths, None, places)
        tokens, blocks = tokens[:, : int(ends.max())], []
        rows = zip(*(self._parts(v, tokens.shape[1]) for v in (tokens, places, ends)), strict=True)
        for part, place, end in rows:
            choice = torch.ones(len(part), len(self.words), dtype=torch.float64, requires_grad=True)
            here = torch.arange(part.shape[1]) == place[:, None]
            leaves = torch.where(here[:, :, None], (choice @ self.lexical.T)[:, None], self._leaves(part))
            spans = self._spans(leaves)
            whole = torch.stack([value[:, 0] for value, _ in spans], 1)[torch.arange(len(part)), end - 1]
            (joint,) = torch.autograd.grad(whole.sum(), choice)
            blocks.append(joint)
        return self._normalised(torch.cat(blocks), "is no sentence whatever the word")

    def _normalised(self, joint: Tensor, fault: str) -> Tensor:
        total = joint.sum(1, keepdim=True)
        if not bool((total > 0).all()):
            raise ValueError(f"row {int((total[:, 0] > 0).logical_not().nonzero()[0])} {fault}")
        return joint / total

    def _leaves(self, tokens: Tensor, ends: Tensor | None = None, length: int = 0) -> Tensor:
        """What each symbol gives each place; behind ``ends`` any word."""
        own = self.lexical.T[tokens.clamp(0, len(self.words) - 1)]
        if ends is None:
            return own
        free = self.lexical.sum(1).expand(len(tokens), length - tokens.shape[1], -1)
        behind = torch.arange(length) >= ends[:, None]
        return torch.where(behind[:, :, None], self.lexical.sum(1), torch.cat([own, free], 1))

    def _spans(self, leaves: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For each length, what derives the words from the first on: ``(sentences, symbols)``, logarithm of the scale.

        Every cell of the chart is scaled to a largest entry of 1, so that long sentences do not underflow. Scales carry
        no gradient: what is returned is linear in each leaf at given scales.
        """
        closure = torch.linalg.inv(torch.eye(len(self.symbols), dtype=torch.float64) - self.unary)
        left, right = self.binary[:, 1], self.binary[:, 2]
        rules = torch.zeros(len(self.binary), len(self.symbols), dtype=torch.float64)
        rules[torch.arange(len(rules)), self.binary[:, 0]] = self.weights
        rules = rules @ closure.T
        cell = _scaled(leaves @ closure.T, torch.zeros(leaves.shape[:2], dtype=torch.float64))
        chart = [cell]
        # What each rule's two symbols are in each cell is looked up once, not for every cell above.
        firsts, seconds = [cell[0][:, :, left]], [cell[0][:, :, right]]
        for width in range(2, leaves.shape[1] + 1):
            places = leaves.shape[1] - width + 1
            cuts = range(1, width)
            scales = torch.stack([chart[c - 1][1][:, :places] + chart[width - c - 1][1][:, c:] for c in cuts])
            top = scales.amax(0)
            top = torch.where(torch.isfinite(top), top, 0.0)
            total = leaves.new_zeros(len(leaves), places, len(self.binary))
            for cut, share in zip(cuts, (scales - top).exp().unbind(0), strict=True):
                first = firsts[cut - 1][:, :places] * share[:, :, None]
                total = torch.addcmul(total, first, seconds[width - cut - 1][:, cut:])
            cell = _scaled(total @ rules, top)
            chart.append(cell)
            firsts.append(cell[0][:, :, left])
            seconds.append(cell[0][:, :, right])
        return [(value[:, 0], scale[:, 0]) for value, scale in chart]

    def _parts(self, values: Tensor, length: int) -> tuple[Tensor, ...]:
        return values.split(max(1, _BLOCK // max(1, length * max(len(self.binary), len(self.symbols)))))

    def _choices(self, symbol: int) -> tuple[list[tuple[int, ...]], np.ndarray]:
        """Right sides and cumulated probabilities; words are negative numbers."""
        own = self.binary[:, 0] == symbol
        sides: list[tuple[int, ...]] = [(b, c) for _, b, c in self.binary[own].tolist()]
        probabilities = self.weights[own].tolist()
        for row, sign in ((self.unary[symbol], 1), (self.lexical[symbol], -1)):
            some = row.nonzero()[:, 0].tolist()
            sides += [(i if sign == 1 else -1 - i,) for i in some]
            probabilities += row[some].tolist()
        return sides, np.cumsum(probabilities)

    def _check(
        self, tokens: Tensor, lengths: Tensor | None, max_length: int | None, places: Tensor | None = None
    ) -> Tensor:
        least = 0 if max_length is not None else 1
        if tokens.ndim != 2 or not len(tokens) or tokens.shape[1] < least:
            raise ValueError(f"tokens must have shape (sentences, length), got {tuple(tokens.shape)}")
        ends = torch.full((len(tokens),), tokens.shape[1]) if lengths is None else lengths
        if ends.shape != (len(tokens),) or int(ends.min()) < least or int(ends.max()) > tokens.shape[1]:
            raise ValueError(f"lengths must be {len(tokens)} numbers from {least} to {tokens.shape[1]}")
        if max_length is not None and max_length < max(1, tokens.shape[1]):
            raise ValueError(f"max_length must be at least {max(1, tokens.shape[1])}, got {max_length}")
        inside = torch.arange(tokens.shape[1]) < ends[:, None]
        if places is not None:
            if places.shape != (len(tokens),) or not bool(((places >= 0) & (places < ends)).all()):
                raise ValueError("places must be one for each sentence, inside it")
            inside &= torch.arange(tokens.shape[1]) != places[:, None]
        used = tokens[inside]
        if len(used) and (int(used.min()) < 0 or int(used.max()) >= len(self.words)):
            raise ValueError(f"tokens must lie from 0 to {len(self.words) - 1}, got {used.min()} to {used.max()}")
        return ends


def _scaled(value: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    largest = value.detach().amax(-1)
    divisor = torch.where(largest > 0, largest, 1.0)
    return value / divisor[..., None], torch.where(largest > 0, scale + divisor.log(), -torch.inf)


def _derive(
    choices: list[tuple[list[tuple[int, ...]], np.ndarray]], limit: int, rng: np.random.Generator
) -> list[int] | None:
    """Words of one derivation, leftmost first; nothing where it grows beyond the limit."""
    words: list[int] = []
    open_symbols = [0]
    while open_symbols:
        symbol = open_symbols.pop()
        if symbol < 0:
            words.append(-1 - symbol)
            continue
        sides, cumulated = choices[symbol]
        drawn = int(np.searchsorted(cumulated, rng.random() * cumulated[-1], side="right"))
        open_symbols.extend(reversed(sides[min(drawn, len(sides) - 1)]))
        # Each open symbol becomes a word at least.
        if len(words) + len(open_symbols) > limit:
            return None
    return words


def _counts(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


def _rule(where: str, line: str) -> tuple[str, str, list[str], float]:
    left, *rest = line.replace("->", " ").split()
    try:
        p = float(rest[-1].strip("[]"))
    except (IndexError, ValueError):
        p = float("nan")
    if not 0 <= p <= 1 + 1e-6 or len(rest) < 2:
        raise InputError(
            f"{where}: a rule is A B C 0.5, or A -> B C [0.5], with a probability, got {line.strip()[:80]!r}"
        )
    return where, left, rest[:-1], p


def _is_word(item: str, symbols: dict[str, int]) -> bool:
    return item[0] in "'\"" or item not in symbols


def _word(item: str) -> str:
    return item[1:-1] if item[0] in "'\"" and item[-1] == item[0] and len(item) > 2 else item
