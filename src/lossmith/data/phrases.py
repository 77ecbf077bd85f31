"""Phrases of a text, and the tokens that they are made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from ..errors import InputError

Span = tuple[int, int]
Chunker = Literal["auto", "nltk", "words"]

_WORD = re.compile(r"\w+(?:['’\-]\w+)*|[^\w\s]")
_SENTENCE_END = frozenset(".!?;:\n")
# The words that English phrases are held together by, not made of.
_COMMON = """
a about above after again against all am an and any are as at be because been before being below between both
but by can could did do does doing down during each few for from further had has have having he her here hers
him his how i if in into is it its itself just me more most my no nor not now of off on once only or other our
out over own same she should so some such than that the their them then there these they this those through to
too under until up very was we were what when where which while who whom why will with would you your
"""
_STOP_WORDS = frozenset(_COMMON.split())
# Noun, verb and prepositional phrases over Penn Treebank tags.
_GRAMMAR = r"""
  NP: {<DT|PRP\$|PDT>?<CD|JJ.*|VBN|VBG>*<NN.*|CD>+(<POS><JJ.*|NN.*>+)*}
  PP: {<IN|TO><NP>}
  VP: {<MD|TO>?<RB.*>*<VB.*>(<RB.*>*<VB.*>)*<RP>?}
"""


class PhraseFinder:
    """Finds the phrases of a text, as ``(start, end)`` places of its characters, end exclusive, in order.

    Args:
        chunker: ``"nltk"``: noun, verb and prepositional phrases by part of speech (English; needs the package nltk and
            its data ``averaged_perceptron_tagger_eng``). ``"words"``: longest runs of words between punctuation marks
            and common English words; needs nothing, and does not depend on the machine. ``"auto"``: the first where
            it is there, else the second; :attr:`chunker` says which.

    Raises:
        InputError: ``"nltk"`` without the package or its data.

    >>> text = "The training loss of a language model, in nats."
    >>> [text[a:b] for a, b in PhraseFinder("words")(text)]
    ['training loss', 'language model', 'nats']
    """

    def __init__(self, chunker: Chunker = "auto"):
        if chunker not in ("auto", "nltk", "words"):
            raise InputError(f"chunker must be auto, nltk or words, got '{chunker}'")
        missing = None if chunker == "words" else _missing_for_nltk()
        if chunker == "nltk" and missing is not None:
            raise InputError(f"chunker nltk needs {missing}; or use chunker words, which needs nothing")
        #: What is used: ``nltk`` or ``words``.
        self.chunker = "words" if chunker == "words" or missing is not None else "nltk"
        self._parser: Any = None

    def __call__(self, text: str) -> list[Span]:
        """The phrases of ``text``; phrases never reach over the end of a sentence or line."""
        return self._by_tags(text) if self.chunker == "nltk" else _runs_of_words(text)

    def _by_tags(self, text: str) -> list[Span]:
        import nltk

        if self._parser is None:
            self._parser = nltk.RegexpParser(_GRAMMAR, loop=2)
        found = []
        for words in _sentences(text):
            tags = [tag for _, tag in nltk.pos_tag([text[a:b] for a, b in words])]
            # The parser sees places instead of words, so that they come back with the phrase.
            tree = self._parser.parse(list(zip(words, tags, strict=True)))
            for part in tree:
                if isinstance(part, nltk.Tree):
                    places = [place for place, _ in part.leaves()]
                    found.append((places[0][0], places[-1][1]))
        return found


def phrase_tokens(tokenizer: Any, ids: Sequence[int], phrases: Callable[[str], Sequence[Span]]) -> list[Span]:
    """The phrases of at least two tokens in ``ids``, as ``(start, end)`` places of tokens, end exclusive.

    Args:
        tokenizer: a Hugging Face tokenizer. Special tokens belong to no phrase.
        ids: tokens of one text, for instance as a model generated them: they need not be what the tokenizer would make
            of the text.
        phrases: finds phrases by places of characters: a :class:`PhraseFinder`, or any function of yours.

    >>> from lossmith.data import train_tokenizer
    >>> tokenizer = train_tokenizer(["red blue green"], vocab_size=258)
    >>> ids = tokenizer("red, blue and")["input_ids"]
    >>> phrase_tokens(tokenizer, ids, PhraseFinder("words"))
    [(0, 2), (4, 8)]
    """
    text, places = _places(tokenizer, ids)
    found = []
    for start, end in phrases(text):
        inside = [i for i, (a, b) in enumerate(places) if a < b and a < end and b > start]
        if len(inside) > 1:
            found.append((inside[0], inside[-1] + 1))
    return found


def _places(tokenizer: Any, ids: Sequence[int]) -> tuple[str, list[Span]]:
    """The text of ``ids``, and where in it each token stands (without the blanks that it begins with)."""
    special = set(tokenizer.all_special_ids)
    text, places = "", []
    before: list[int] = []  # many tokenizers drop a blank at the beginning of what they decode
    pending: list[int] = []  # tokens that are the beginning of one character
    for token in map(int, ids):
        if token in special:
            places += [(len(text), len(text))] * (len(pending) + 1)
            before, pending = [], []
            continue
        pending.append(token)
        piece = tokenizer.decode(before + pending)[len(tokenizer.decode(before)) if before else 0 :]
        if piece.endswith("\ufffd") and len(pending) < 4:  # bytes of a character in UTF-8
            continue
        blank = len(piece) - len(piece.lstrip())
        places += [(len(text) + blank, len(text) + len(piece))] * len(pending)
        text, before, pending = text + piece, pending, []
    return text, places + [(len(text), len(text))] * len(pending)


def _sentences(text: str) -> list[list[Span]]:
    """Places of words and marks, a list for each sentence or line."""
    found: list[list[Span]] = [[]]
    end = 0
    for match in _WORD.finditer(text):
        if "\n" in text[end : match.start()]:
            found.append([])
        end = match.end()
        found[-1].append(match.span())
        if match[0] in _SENTENCE_END:
            found.append([])
    return [words for words in found if words]


def is_common_word(word: str) -> bool:
    """Whether it is one of the English words that phrases are held together by.

    >>> is_common_word("The"), is_common_word("loss")
    (True, False)
    """
    return word.lower() in _STOP_WORDS


def _runs_of_words(text: str) -> list[Span]:
    found: list[Span] = []
    for words in _sentences(text):
        run: list[Span] = []
        for start, end in [*words, (len(text), len(text))]:
            word = text[start:end]
            if word and (word[0].isalnum() or word[0] == "_") and not is_common_word(word):
                run.append((start, end))
            elif run:
                found.append((run[0][0], run[-1][1]))
                run = []
    return found


def _missing_for_nltk() -> str | None:
    try:
        import nltk
    except ImportError:
        return "the package nltk (pip install 'lossmith[generation]')"
    try:
        nltk.data.find("taggers/averaged_perceptron_tagger_eng")
    except LookupError:
        return "its data: python -m nltk.downloader averaged_perceptron_tagger_eng"
    return None
