"""Phrases of texts and of tokens."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from lossmith.data import train_tokenizer
from lossmith.data.phrases import PhraseFinder, phrase_tokens
from lossmith.errors import InputError


def texts(text: str, finder: Any) -> list[str]:
    return [text[a:b] for a, b in finder(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("of the and", []),
        ("   \n\n ", []),
        ("Paris", ["Paris"]),
        ("new york, new\njersey", ["new york", "new", "jersey"]),
        ("don't stop (now) 3 times!", ["don't stop", "3 times"]),
        ("grüne Äpfel und 東京", ["grüne Äpfel und 東京"]),
        ("loss_fn of x_1", ["loss_fn", "x_1"]),
    ],
)
def test_words_are_cut_at_marks_line_ends_and_common_words(text: str, expected: list[str]) -> None:
    assert texts(text, PhraseFinder("words")) == expected


def test_tokens_of_a_phrase_are_found_whatever_their_borders() -> None:
    text = "the red fox of 東京 tower, and naïve café\nend"
    tokenizer = train_tokenizer([text, "red fox red fox"], vocab_size=262)
    ids = tokenizer(text)["input_ids"]
    finder = PhraseFinder("words")
    spans = phrase_tokens(tokenizer, [*ids, tokenizer.eos_token_id], finder)
    assert [tokenizer.decode(ids[a:b]).strip() for a, b in spans] == [
        "red fox",
        "東京 tower",
        "naïve café",
        "end",
    ]
    assert max(end for _, end in spans) <= len(ids)  # the end token belongs to none


def test_phrases_of_one_token_are_left_out_and_nothing_is_fine() -> None:
    tokenizer = train_tokenizer(["cat cat cat cat"], vocab_size=300)
    assert phrase_tokens(tokenizer, tokenizer("cat")["input_ids"], PhraseFinder("words")) == []
    assert phrase_tokens(tokenizer, [], PhraseFinder("words")) == []
    assert phrase_tokens(tokenizer, [tokenizer.eos_token_id], PhraseFinder("words")) == []


def test_a_tokenizer_that_drops_blanks_when_decoding_is_read_in_context() -> None:
    """Like SentencePiece's: decoding one token alone loses the blank before it."""

    class Words:
        all_special_ids = (0,)
        pieces = ("", " big", " dog", " of", " ville")

        def decode(self, ids: list[int]) -> str:
            return "".join(self.pieces[i] for i in ids).removeprefix(" ")

    assert phrase_tokens(Words(), [1, 2, 3, 4, 2, 0], PhraseFinder("words")) == [(0, 2), (3, 5)]


def test_any_function_finds_phrases() -> None:
    tokenizer = train_tokenizer(["abc"], vocab_size=257)
    assert phrase_tokens(tokenizer, tokenizer("a b c")["input_ids"], lambda text: [(0, 3)]) == [(0, 3)]


TAGS = {
    "The": "DT",
    "old": "JJ",
    "cat": "NN",
    "has": "VBZ",
    "quickly": "RB",
    "jumped": "VBN",
    "over": "IN",
    "tables": "NNS",
    "Dogs": "NNS",
    "bark": "VBP",
}


def test_with_tags_noun_verb_and_prepositional_phrases_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    nltk = pytest.importorskip("nltk")
    monkeypatch.setattr(nltk.data, "find", lambda name: name)
    monkeypatch.setattr(nltk, "pos_tag", lambda words: [(word, TAGS.get(word, ".")) for word in words])
    finder = PhraseFinder("auto")
    assert finder.chunker == "nltk"
    text = "The old cat has quickly jumped over tables. Dogs bark"
    assert texts(text, finder) == ["The old cat", "has quickly jumped", "over tables", "Dogs", "bark"]


def test_what_is_missing_is_named_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="chunker must be auto, nltk or words, got 'spacy'"):
        PhraseFinder("spacy")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "nltk", None)
    assert PhraseFinder("auto").chunker == "words"
    with pytest.raises(InputError, match=r"needs the package nltk .* or use chunker words"):
        PhraseFinder("nltk")


def test_missing_data_of_nltk_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    nltk = pytest.importorskip("nltk")

    def missing(name: str) -> None:
        raise LookupError(name)

    monkeypatch.setattr(nltk.data, "find", missing)
    with pytest.raises(InputError, match="averaged_perceptron_tagger_eng; or use chunker words"):
        PhraseFinder("nltk")
    assert PhraseFinder().chunker == "words"
