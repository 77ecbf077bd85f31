"""CoNLL files and the token tagger."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForTokenClassification, BertConfig, BertModel

from lossmith.tasks.text import Sentence, TokenTagger, read_conll
from lossmith.tasks.text.conll import write_conll
from lossmith.tasks.text.tagging import tagging_scores


def sentences(number: int = 60) -> list[Sentence]:
    """Names follow the word ``mister``."""
    draw = random.Random(0)
    result = []
    for _ in range(number):
        words, tags = ["we", "saw"], ["O", "O"]
        if draw.random() < 0.5:
            words += ["mister", draw.choice(["ann", "bob", "cleo"])]
            tags += ["O", "B-person"]
        words += [draw.choice(["today", "there", "again"])]
        tags += ["O"]
        result.append(Sentence(tuple(words), tuple(tags)))
    return result


@pytest.mark.parametrize("loss", ["cross_entropy", "weighted_cross_entropy", "focal_loss(gamma=1)", "set_dice_loss"])
def test_a_small_tagger_learns_a_simple_rule_with_any_loss(loss: str) -> None:
    tagger = TokenTagger(loss=loss, epochs=12, batch_size=20, learning_rate=5e-3, width=32, layers=1)
    scores = tagger.fit(sentences()).evaluate(sentences(30))
    assert scores.f1 > 0.95
    assert scores.by_type.keys() == {"person"}
    assert "F1" in scores.summary()


def test_a_saved_tagger_predicts_the_same_and_loads_in_plain_transformers(tmp_path: Path) -> None:
    tagger = TokenTagger(epochs=2, width=32, layers=1).fit(sentences())
    tagger.save_pretrained(tmp_path)
    words = [list(s.words) for s in sentences(10)]
    assert TokenTagger.from_pretrained(tmp_path).predict(words) == tagger.predict(words)
    assert AutoModelForTokenClassification.from_pretrained(tmp_path).config.id2label[0] == "O"


def test_the_same_seed_gives_the_same_tagger() -> None:
    first, again = (TokenTagger(epochs=1, width=32, layers=1, seed=3).fit(sentences()) for _ in range(2))
    for a, b in zip(first.model_.parameters(), again.model_.parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_encoder_of_the_users_own_gets_an_output_layer(tmp_path: Path) -> None:
    source = TokenTagger(epochs=0.1, width=32, layers=1).fit(sentences())
    source.tokenizer_.save_pretrained(tmp_path)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(source.tokenizer_), **shape)).save_pretrained(tmp_path)
    tagger = TokenTagger(tmp_path, epochs=0.2).fit(sentences())
    assert len(tagger.predict([["we", "saw", "nobody"]])[0]) == 3


@pytest.mark.parametrize("max_length", [4, 7, 16, 200])
def test_long_sentences_are_cut_without_losing_or_repeating_a_word(max_length: int) -> None:
    tagger = TokenTagger(epochs=0.1, width=32, layers=1, max_length=max_length, stride=3).fit(sentences())
    words = ["we", "saw", "mister", "ann", "supercalifragilistic"] * 9
    tags = ["O", "O", "O", "B-person", "O"] * 9
    windows = tagger._windows(words, tags)
    assert all(len(w["input_ids"]) == len(w["labels"]) <= max_length for w in windows)
    labels = [label for w in windows for label in w["labels"] if label != -100]
    assert [tagger.tags_[label] for label in labels] == tags
    assert len(tagger.predict([words])[0]) == len(words)


def test_words_that_tokenize_to_nothing_still_get_a_tag() -> None:
    tagger = TokenTagger(epochs=0.1, width=32, layers=1).fit(sentences())
    assert [len(tags) for tags in tagger.predict([["", "\u200b", "we"], [], ["saw"]])] == [3, 0, 1]


def test_words_become_the_same_tokens_together_as_alone() -> None:
    tagger = TokenTagger(epochs=0.1, width=32, layers=1).fit(sentences())
    words = ["we", "", "saw", "Mister", "supercalifragilistic", "we", ","]
    alone = [token for word in words for token in tagger._windows([word], ["O"])[0]["input_ids"]]
    assert tagger._windows(words, ["O"] * len(words))[0]["input_ids"] == alone


def test_scores_are_those_of_whole_entities() -> None:
    truth = [["B-a", "I-a", "O", "B-b"], ["O", "B-a"]]
    predicted = [["B-a", "I-a", "O", "B-a"], ["O", "O"]]
    scores = tagging_scores(truth, predicted)
    assert scores.precision == pytest.approx(1 / 2)
    assert scores.recall == pytest.approx(1 / 3)
    assert scores.f1 == pytest.approx(0.4)
    assert scores.by_type == {"a": 0.5, "b": 0.0}
    assert tagging_scores([["O"]], [["O"]]).accuracy == 1


def test_conll_files_are_read_whatever_their_columns(tmp_path: Path) -> None:
    path = tmp_path / "x.conll"
    path.write_text("-DOCSTART- -X- O\n\nEU NNP B-ORG\nrejects VBZ O\n\n\n# 1\nAnn\tB-PER\r\nLee\tI-PER\r\n")
    read = read_conll(path)
    assert read == [Sentence(("EU", "rejects"), ("B-ORG", "O")), Sentence(("Ann", "Lee"), ("B-PER", "I-PER"))]
    write_conll(tmp_path / "y.conll", read)
    assert read_conll(tmp_path / "y.conll") == read


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no sentences"),
        (b"a O\nb\n", "line 2: a word and its tag are needed, got 'b'"),
        (b"a O\nb person\n", "line 2: 'person' is no tag"),
        (b"a O\n\xff O\n", "not UTF-8 at byte 4"),
    ],
)
def test_wrong_files_are_named_with_their_line(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.conll"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_conll(path)


def test_wrong_use_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        read_conll(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has not been trained"):
        TokenTagger().predict([["a"]])
    with pytest.raises(ValueError, match="no sentences to train on"):
        TokenTagger().fit([])
    with pytest.raises(ValueError, match="all words have the tag 'O'"):
        TokenTagger().fit([Sentence(("a",), ("O",))])
    options: dict[str, Any] = {"loss": "dise_loss"}
    with pytest.raises(ValueError, match=r"unknown loss 'dise_loss'.*dice_loss"):
        TokenTagger(**options).fit(sentences())


def test_emerging_entities_of_social_media(real_data: Path) -> None:
    """WNUT 2017 as it is: lines with a tab alone between tweets, odd characters; some steps by the Dice loss."""
    if not (real_data / "wnut17").is_dir():
        pytest.skip(f"no wnut17 in {real_data}")
    train, test = (read_conll(real_data / "wnut17" / f"{part}.conll") for part in ("train", "test"))
    assert (len(train), len(test)) == (3394, 1287)
    types = {tag.partition("-")[2] for s in train for tag in s.tags if tag != "O"}
    assert types == {"corporation", "creative-work", "group", "location", "person", "product"}
    tagger = TokenTagger(loss="set_dice_loss(alpha=0.01)", max_steps=4, batch_size=16, width=32, layers=1)
    scores = tagger.fit(train[:200]).evaluate(test[:50])
    assert 0 <= scores.f1 <= 1
