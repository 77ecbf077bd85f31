"""Rules that tell text from what is left of it: tables, menus, garbage."""

from __future__ import annotations

import re

from .domain import Quality

_FORMULA = re.compile(r"\$\$.+?\$\$|\$[^$]+?\$|\\\[.+?\\\]|\\\(.+?\\\)|\\begin\{(\w+\*?)\}.+?\\end\{\1\}", re.DOTALL)
# Sequences of so many words count as repeated.
_SEQUENCE = 10


def quality_problem(text: str, rules: Quality) -> str | None:
    """The first rule that a text breaks, as a sentence; ``None`` where it breaks none.

    Formulas do not count as words or letters.

    >>> quality_problem("Too short.", Quality())
    'fewer than 50 words (2)'
    """
    prose = _FORMULA.sub(" ", text)
    words = prose.split()
    if rules.minimum_words is not None and len(words) < rules.minimum_words:
        return f"fewer than {rules.minimum_words} words ({len(words)})"
    if rules.maximum_words is not None and len(words) > rules.maximum_words:
        return f"more than {rules.maximum_words} words ({len(words)})"
    if rules.mean_word_length is not None and words:
        mean = sum(map(len, words)) / len(words)
        low, high = rules.mean_word_length
        if not low <= mean <= high:
            return f"mean word length outside {low:g} to {high:g} ({mean:.1f})"
    if rules.minimum_letters is not None and words:
        characters = "".join(words)
        letters = sum(map(str.isalpha, characters)) / len(characters)
        if letters < rules.minimum_letters:
            return f"fewer than {rules.minimum_letters:.0%} letters ({letters:.0%})"
    if rules.maximum_repeated_lines is not None and (share := repeated_lines(text)) > rules.maximum_repeated_lines:
        return f"more than {rules.maximum_repeated_lines:.0%} in repeated lines ({share:.0%})"
    if rules.maximum_repeated_words is not None and (share := repeated_words(words)) > rules.maximum_repeated_words:
        return f"more than {rules.maximum_repeated_words:.0%} in repeated sequences of {_SEQUENCE} words ({share:.0%})"
    lower = text.lower()
    for phrase in rules.forbidden:
        if phrase.lower() in lower:
            return f"holds {phrase!r}"
    return None


def repeated_lines(text: str) -> float:
    r"""Share of the characters that stand in lines which an earlier one equals.

    >>> repeated_lines("ab\nab\ncd")
    0.3333333333333333
    """
    seen: set[str] = set()
    total = repeated = 0
    for line in text.split("\n"):
        line = line.strip()
        total += len(line)
        if line in seen:
            repeated += len(line)
        seen.add(line)
    return repeated / total if total else 0.0


def repeated_words(words: list[str]) -> float:
    """Share of the words that stand in a sequence of ten which occurred before."""
    seen: set[int] = set()
    repeated, covered = 0, 0
    for start in range(len(words) - _SEQUENCE + 1):
        sequence = hash(tuple(words[start : start + _SEQUENCE]))
        if sequence in seen:
            repeated += start + _SEQUENCE - max(start, covered)
            covered = start + _SEQUENCE
        seen.add(sequence)
    return repeated / len(words) if words else 0.0
