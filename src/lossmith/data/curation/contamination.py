"""Which documents hold the questions that a model is to be judged by."""

from __future__ import annotations

import re
from collections.abc import Iterable

_WORD = re.compile(r"\w+")
# A question of fewer words could stand anywhere.
_SHORTEST = 5


class Contamination:
    """Finds evaluation questions and answers in texts: any ``ngram`` consecutive words of one of them.

    A question that is shorter is looked for as a whole, if it has five words or more; an answer is not.

    >>> held_out = Contamination([("Which code does the 5G control channel use?", "Polar codes")], ngram=13)
    >>> held_out.find("Quiz: which code does the 5G control channel use? Polar codes.")
    'which code does the 5g control channel use'
    """

    def __init__(self, questions: Iterable[tuple[str, str]], ngram: int = 13):
        self._sequences: dict[int, set[str]] = {}
        self.questions = 0
        for question, answer in questions:
            self.questions += 1
            for words, whole in ((_words(question), True), (_words(answer), False)):
                size = min(ngram, len(words)) if whole else ngram
                if size < min(_SHORTEST, ngram):
                    continue
                for start in range(len(words) - size + 1):
                    self._sequences.setdefault(size, set()).add(" ".join(words[start : start + size]))

    def find(self, text: str) -> str | None:
        """The first sequence of words of a question that the text holds."""
        if not self._sequences:
            return None
        words = _words(text)
        for size, sequences in sorted(self._sequences.items()):
            for start in range(len(words) - size + 1):
                if (found := " ".join(words[start : start + size])) in sequences:
                    return found
        return None


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
