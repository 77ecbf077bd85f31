"""Files of pairs and the pair classifier."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2Model,
)

from lossmith.tasks.text import Pair, PairClassifier, read_pairs
from lossmith.training import SetClassification
from lossmith.training.set_classification import classification_objective, takes_single_logit

SMALL: dict[str, Any] = {"width": 32, "layers": 1, "batch_size": 16, "learning_rate": 3e-3}


def pairs(number: int = 96, share: float = 0.5) -> list[Pair]:
    """Positive where the second text says ``yes``."""
    draw = random.Random(0)
    words = ["rain", "sun", "wind", "snow", "fog"]
    result = []
    for _ in range(number):
        positive = draw.random() < share
        first, second = (" ".join(draw.choices(words, k=draw.randint(1, 6))) for _ in range(2))
        result.append(Pair(first, f"{second} {'yes' if positive else 'no'}", "1" if positive else "0"))
    return result


@pytest.mark.parametrize(
    "loss",
    ["cross_entropy", "weighted_cross_entropy", "focal_loss(gamma=1)", "set_dice_loss(alpha=0.01)", "set_tversky_loss"],
)
def test_a_small_classifier_learns_a_simple_rule_with_any_loss(loss: str) -> None:
    classifier = PairClassifier(loss=loss, epochs=10, **SMALL).fit(pairs())
    scores = classifier.evaluate(pairs(40))
    assert scores.f1 > 0.9
    assert scores.accuracy > 0.9
    assert "F1" in scores.summary()
    single = loss.startswith("set_")
    assert classifier.model_.config.num_labels == (1 if single else 2)
    assert classifier.decide(pairs(5)).shape == (5, 1 if single else 2)


@pytest.mark.parametrize("loss", ["cross_entropy", "set_dice_loss"])
def test_a_saved_classifier_predicts_the_same_and_loads_in_plain_transformers(loss: str, tmp_path: Path) -> None:
    classifier = PairClassifier(loss=loss, epochs=3, **SMALL).fit(pairs())
    classifier.save_pretrained(tmp_path)
    again = PairClassifier.from_pretrained(tmp_path)
    assert again.labels_ == ["0", "1"]
    torch.testing.assert_close(again.decide(pairs(10)), classifier.decide(pairs(10)), rtol=1e-5, atol=1e-6)
    assert again.predict(pairs(10)) == classifier.predict(pairs(10))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert plain.config.num_labels == classifier.model_.config.num_labels


def test_the_same_seed_gives_the_same_classifier() -> None:
    first, again = (PairClassifier(epochs=1, seed=3, **SMALL).fit(pairs()) for _ in range(2))
    for a, b in zip(first.model_.parameters(), again.model_.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_template_and_token_types_of_an_encoder_are_used(tmp_path: Path) -> None:
    """[CLS] first [SEP] second [SEP], as BERT was trained."""
    source = PairClassifier(epochs=0.1, **SMALL).fit(pairs())
    tokenizer = source.tokenizer_
    tokenizer.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]"})
    special = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special
    )
    tokenizer.save_pretrained(tmp_path)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path)
    options = {k: v for k, v in SMALL.items() if k not in ("width", "layers")}
    classifier = PairClassifier(tmp_path, loss="set_dice_loss", epochs=2, max_length=12, **options).fit(pairs())
    encoded = classifier._encode("rain " * 20, "sun yes")
    (cls, sep), ids = (id for _, id in special), encoded["input_ids"]
    assert ids[0] == cls
    assert [i for i, token in enumerate(ids) if token == sep] == [ids.index(sep), len(ids) - 1]
    assert len(ids) == 12
    assert encoded["token_type_ids"] == [0] * (ids.index(sep) + 1) + [1] * (len(ids) - ids.index(sep) - 1)
    assert classifier.tokenizer_.decode(ids[ids.index(sep) + 1 : -1]) == "sun yes"
    assert isinstance(classifier.model_, BertForSequenceClassification)
    assert len(classifier.predict(pairs(3))) == 3


def test_a_model_without_token_types_or_padding_works(tmp_path: Path) -> None:
    source = PairClassifier(epochs=0.1, **SMALL).fit(pairs())
    source.tokenizer_.save_pretrained(tmp_path)
    config = GPT2Config(vocab_size=len(source.tokenizer_), n_embd=32, n_layer=1, n_head=2, n_positions=64)
    GPT2Model(config).save_pretrained(tmp_path)
    options = {k: v for k, v in SMALL.items() if k not in ("width", "layers")}
    classifier = PairClassifier(tmp_path, epochs=1, max_length=64, **options).fit(pairs())
    alone = [classifier.decide([pair]) for pair in pairs(4)]
    torch.testing.assert_close(classifier.decide(pairs(4)), torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_long_texts_are_cut_longest_first() -> None:
    classifier = PairClassifier(epochs=0.1, max_length=16, **SMALL).fit(pairs())
    for first, second in (("rain " * 50, "sun"), ("sun", "rain " * 50), ("rain " * 50, "snow " * 50)):
        encoded = classifier._encode(first, second)
        assert len(encoded["input_ids"]) == len(encoded["token_type_ids"]) == 16
        end = encoded["input_ids"].index(encoded["input_ids"][0], 1)
        kept = encoded["input_ids"][1:end], encoded["input_ids"][end + 1 :]
        assert min(map(len, kept)) >= min(7, len(classifier.tokenizer_(min(first, second, key=len))["input_ids"]))


def test_three_labels_and_a_positive_of_the_users_choice() -> None:
    data = [Pair(p.first, p.second, "same" if p.label == "1" else "other") for p in pairs()]
    assert PairClassifier(epochs=0.1, **SMALL).fit(data).labels_[-1] == "same"
    assert PairClassifier(epochs=0.1, positive="other", **SMALL).fit(data).labels_[-1] == "other"
    three = [*data[:60], *(Pair("fog", "fog", "neutral") for _ in range(20))]
    classifier = PairClassifier(loss="set_dice_loss", epochs=1, **SMALL).fit(three)
    assert classifier.model_.config.num_labels == 3
    assert 0 <= classifier.evaluate(three).f1 <= 1


def test_scores_are_those_of_the_definition() -> None:
    classifier = PairClassifier(epochs=0.1, **SMALL).fit(pairs())
    truth = ["1", "1", "1", "0", "0"]
    classifier.predict = lambda _: ["1", "0", "1", "1", "0"]  # type: ignore[method-assign]
    scores = classifier.evaluate([Pair("a", "b", label) for label in truth])
    assert (scores.precision, scores.recall) == pytest.approx((2 / 3, 2 / 3))
    assert (scores.f1, scores.accuracy) == pytest.approx((2 / 3, 0.6))
    classifier.predict = lambda pairs: ["0"] * len(pairs)  # type: ignore[method-assign]
    assert classifier.evaluate([Pair("a", "b", "0")] * 3).f1 == 0.0


def test_objectives_by_name() -> None:
    assert isinstance(classification_objective("set_dice_loss(alpha=0)", [5, 3]), SetClassification)
    logits, labels = torch.tensor([[0.3], [-0.2]]), torch.tensor([1, 0])
    assert classification_objective("dice_loss(alpha=0)", [5, 3]).loss(logits, labels).shape == (2,)
    assert [takes_single_logit(name) for name in ("tversky_loss", "focal_loss(gamma=2)")] == [True, False]
    with pytest.raises(ValueError, match="unknown loss 'focl_loss'"):
        classification_objective("focl_loss", [5, 3])


def test_files_of_every_kind_give_the_same_pairs(tmp_path: Path) -> None:
    expected = [Pair('he said "no', "they, too", "1"), Pair("a\u2028b", "c", "0")]
    (tmp_path / "a.tsv").write_text(
        "\ufeffQuality\t#1 ID\t#1 String\t#2 String\r\n"
        + "".join(f"{p.label}\t7\t{p.first}\t{p.second}\r\n" for p in expected),
        encoding="utf-8",
        newline="",
    )
    (tmp_path / "a.csv").write_text(
        'sentence1,sentence2,label\n"he said ""no","they, too",1\n\n"a\u2028b",c,0\n', encoding="utf-8"
    )
    (tmp_path / "a.jsonl").write_text(
        '{"premise": "he said \\"no", "hypothesis": "they, too", "label": 1}\n\n'
        '{"premise": "a\\u2028b", "hypothesis": "c", "label": 0}\n'
    )
    for name in ("a.tsv", "a.csv", "a.jsonl"):
        assert read_pairs(tmp_path / name) == expected
    assert read_pairs(tmp_path / "a.tsv", label="#1 ID")[0].label == "7"


def test_wrong_input_is_one_sentence(tmp_path: Path) -> None:
    def written(name: str, text: str | bytes) -> Path:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path / name

    header = "sentence1\tsentence2\tlabel\n"
    for path, message in (
        (tmp_path / "none.tsv", "does not exist or is a folder"),
        (written("a.xml", "x"), r"read from \.tsv \(or \.txt\), \.csv and \.jsonl files, got '\.xml'"),
        (written("b.tsv", b"\xff\xfe\x00"), "not UTF-8 at byte 0"),
        (written("c.tsv", header), "holds no pairs"),
        (written("d.tsv", header + "a\tb\t1\na\tb\n"), r"d\.tsv:3: 2 columns, but the header has 3"),
        (written("e.tsv", header + "a\t\t1\n"), r"e\.tsv:2: the column 'sentence2' is missing or empty"),
        (written("f.tsv", "x\ty\tlabel\na\tb\t1\n"), "say which column is first; it has x, y, label"),
        (written("g.jsonl", '{"label": 1}\n{'), "say which column is first"),
        (written("h.jsonl", "[1]"), r"h\.jsonl:1: must be a JSON object"),
        (written("i.jsonl", "{"), r"i\.jsonl:1: not JSON"),
    ):
        with pytest.raises(ValueError, match=message):
            read_pairs(path)
    with pytest.raises(ValueError, match=r"no column 'z' \(label\), only: sentence1"):
        read_pairs(written("j.tsv", header + "a\tb\t1\n"), label="z")
    with pytest.raises(ValueError, match="no pairs to train on"):
        PairClassifier().fit([])
    with pytest.raises(ValueError, match="all pairs have the label '1'"):
        PairClassifier().fit([Pair("a", "b", "1")] * 3)
    with pytest.raises(ValueError, match="positive='x' is no label of the pairs; there are 0, 1"):
        PairClassifier(positive="x").fit(pairs(10))
    with pytest.raises(ValueError, match="has not been trained"):
        PairClassifier().predict([("a", "b")])
    classifier = PairClassifier(epochs=0.1, **SMALL).fit(pairs())
    with pytest.raises(ValueError, match="label '2' did not occur in training"):
        classifier.evaluate([Pair("a", "b", "2")])
    with pytest.raises(ValueError, match="no pairs to judge by"):
        classifier.evaluate([])
    assert classifier.predict([]) == []


def test_the_microsoft_paraphrase_corpus(real_data: Path) -> None:
    """Its file as it is (byte order mark, lone quotes), and some steps of training by the Dice loss."""
    if not (real_data / "msrp").is_dir():
        pytest.skip(f"no msrp in {real_data}")
    train, test = (read_pairs(real_data / "msrp" / f"{part}.tsv") for part in ("train", "test"))
    assert (len(train), len(test)) == (3576, 1725)
    assert sum(pair.label == "1" for pair in test) == 1147
    classifier = PairClassifier(loss="set_dice_loss(alpha=0.01)", max_steps=6, **SMALL).fit(train[:400])
    scores = classifier.evaluate(test[:100])
    assert 0 <= scores.f1 <= 1
    # Nearly everything may be called a paraphrase so early; that F1 is known.
    share = sum(pair.label == "1" for pair in test[:100]) / 100
    assert scores.recall < 1 or scores.f1 == pytest.approx(2 * share / (1 + share), abs=0.05)
