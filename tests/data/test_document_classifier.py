"""The document classifier: the same scores as fastText's, without what fastText trips over."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from lossmith.data import DocumentClassifier, classify_corpus
from lossmith.errors import InputError

fasttext = pytest.importorskip("fasttext", reason="needs the extra 'selection'")

WORDS = ["loss", "weight", "model", "data", "step", "token", "batch", "head", "law", "probe", "mixture", "sample"]


def documents(seed: int, number: int, first: int, last: int) -> list[str]:
    generator = np.random.default_rng(seed)
    return [
        " ".join(WORDS[i] for i in generator.integers(first, last, 3 + generator.integers(30))) for _ in range(number)
    ]


POSITIVES, NEGATIVES = documents(0, 60, 0, 8), documents(1, 60, 4, 12)
BOTH = [*documents(2, 40, 0, 12), "", "unheard", "loss", "Loss,"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fastText's own file from the same documents."""
    folder = tmp_path_factory.mktemp("fasttext")
    lines = [f"__label__1 {text}\n" for text in POSITIVES] + [f"__label__0 {text}\n" for text in NEGATIVES]
    (folder / "lines.txt").write_text("".join(lines))
    options = {"dim": 20, "epoch": 30, "wordNgrams": 2, "bucket": 5_000, "thread": 1, "verbose": 0}
    fasttext.train_supervised(str(folder / "lines.txt"), **options).save_model(str(folder / "model.bin"))
    return folder / "model.bin"


@pytest.fixture(scope="module")
def classifier() -> DocumentClassifier:
    return DocumentClassifier.fit(POSITIVES, NEGATIVES, dimension=20, epochs=30)


def test_one_number_per_feature_gives_the_probabilities_of_the_vectors(trained: Path) -> None:
    model = fasttext.load_model(str(trained))
    outputs = model.get_output_matrix().astype(np.float64)
    one = model.get_labels().index("__label__1")
    exact = np.array([model.get_sentence_vector(text) for text in BOTH], dtype=np.float64) @ (
        outputs[one] - outputs[1 - one]
    )
    compact = DocumentClassifier.load(trained)
    # Means of up to 70 float32 features of size 20.
    assert compact.log_odds(BOTH) == pytest.approx(exact, abs=2e-5)
    assert np.abs(exact).max() > 1
    for text, probability in zip(BOTH, compact.probabilities(BOTH), strict=True):
        labels, values = model.predict(text, k=2)
        # The library adds 1e-5 before it takes a logarithm.
        assert dict(zip(labels, values, strict=True))["__label__1"] == pytest.approx(probability, abs=3e-5)
    assert len(compact.content) < trained.stat().st_size / 10


def test_the_other_label_has_the_opposite_log_odds(trained: Path) -> None:
    one, zero = (DocumentClassifier.load(trained, positive=label).log_odds(BOTH) for label in "10")
    assert np.array_equal(one, -zero)
    with pytest.raises(InputError, match=r"the labels [01] and [01], not 'hq'"):
        DocumentClassifier.load(trained, positive="hq")


def test_what_is_saved_is_read_again_and_by_fasttext(classifier: DocumentClassifier, tmp_path: Path) -> None:
    classifier.save(tmp_path / "c.bin")
    again = DocumentClassifier.load(tmp_path / "c.bin")
    assert np.array_equal(again.log_odds(BOTH), classifier.log_odds(BOTH))
    assert np.array_equal(pickle.loads(pickle.dumps(classifier)).log_odds(BOTH), classifier.log_odds(BOTH))
    labels, values = fasttext.load_model(str(tmp_path / "c.bin")).predict(POSITIVES[0])
    assert labels == ("__label__1",)
    assert values[0] == pytest.approx(classifier.probabilities(POSITIVES[:1])[0], abs=3e-5)


def test_it_learns_and_repeats_itself(classifier: DocumentClassifier) -> None:
    assert (classifier.log_odds(documents(7, 50, 0, 6)) > 0).mean() > 0.95
    assert (classifier.log_odds(documents(8, 50, 6, 12)) < 0).mean() > 0.95
    weights = classifier.word_weights()
    assert list(weights) == sorted(weights, key=lambda word: -weights[word])
    assert min(weights[word] for word in WORDS[:4]) > 0 > max(weights[word] for word in WORDS[8:])
    again = DocumentClassifier.fit(POSITIVES, NEGATIVES, dimension=20, epochs=30)
    assert again.content == classifier.content


def test_without_the_end_tokens_weight_repeating_a_text_changes_less() -> None:
    # The end token leans to one side: negatives are short.
    negatives = [text.split()[0] for text in NEGATIVES]
    options = {"dimension": 20, "epochs": 30, "word_ngrams": 1}
    moved = {}
    for correct in (True, False):
        made = DocumentClassifier.fit(POSITIVES, negatives, correct_end=correct, **options)
        assert (made.word_weights()["</s>"] == 0) is correct
        once, often = made.probabilities(["loss data"]), made.probabilities(["loss data " * 50])
        moved[correct] = abs(float(often[0] - once[0]))
    assert moved[True] < 0.5 * moved[False]


def test_marks_of_fasttext_inside_a_text_are_only_text() -> None:
    """A literal end token would cut the document, ``__label__x`` would be a third label."""
    made = DocumentClassifier.fit([f"{text} __label__x" for text in POSITIVES], [f"</s> {text}" for text in NEGATIVES])
    before, after = made.log_odds(["</s> loss loss", "</s> law law"])
    assert before > after
    assert made.log_odds(["__label__0 loss"])[0] != made.log_odds(["loss"])[0]
    assert np.array_equal(made.log_odds(["loss\nlaw"]), made.log_odds(["loss law"]))
    assert np.isfinite(made.log_odds(["loss \ud800 law", "\x00", "ü 漢", "loss " * 100_000])).all()


def test_a_word_far_behind_still_counts(classifier: DocumentClassifier) -> None:
    long = "probe " * 5_000
    assert classifier.log_odds([long + "loss"])[0] > classifier.log_odds([long + "probe"])[0]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"epochs": 0}, "epochs must be a whole number"),
        ({"dimension": 1.5}, "dimension must be a whole number"),
        ({"buckets": 0}, "buckets must be"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0"),
        ({"positives": ["", " \n"]}, "positives: there is no word"),
        ({"negatives": []}, "negatives: there is no word"),
    ],
)
def test_what_cannot_be_learned_is_one_sentence(changes: dict, match: str) -> None:
    given = {"positives": ["a"], "negatives": ["b"], **changes}
    with pytest.raises(InputError, match=match):
        DocumentClassifier.fit(given.pop("positives"), given.pop("negatives"), **given)


def test_files_that_are_no_classifier_are_one_sentence(trained: Path, tmp_path: Path) -> None:
    content = trained.read_bytes()
    quantised = fasttext.load_model(str(trained))
    quantised.quantize()
    quantised.save_model(str(tmp_path / "quantised.bin"))
    (tmp_path / "lines.txt").write_text("".join(f"__label__{i % 3} word{i}\n" for i in range(9)))
    fasttext.train_supervised(str(tmp_path / "lines.txt"), bucket=10, thread=1, verbose=0).save_model(
        str(tmp_path / "three.bin")
    )
    fasttext.train_unsupervised(
        str(tmp_path / "lines.txt"), minCount=1, bucket=10, dim=4, thread=1, verbose=0
    ).save_model(str(tmp_path / "vectors.bin"))
    wrong_files = {"empty": b"", "short": content[:-100], "text": b"some text" * 50}
    wrong_files["nan"] = content[:-4] + struct.pack("<f", np.nan)
    for name, wrong in wrong_files.items():
        (tmp_path / f"{name}.bin").write_bytes(wrong)
    for name in ("empty", "short", "text", "nan", "quantised", "three", "vectors", "missing"):
        with pytest.raises(InputError, match=rf"{name}.bin (is|has|must|cannot)"):
            DocumentClassifier.load(tmp_path / f"{name}.bin")


def test_a_corpus_is_classified_in_order_and_held_out_documents_are_not(
    classifier: DocumentClassifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lossmith.data import document_classifier

    monkeypatch.setattr(document_classifier, "_BATCH_DOCUMENTS", 7)
    texts = [text for text in BOTH if text]
    (tmp_path / "corpus.csv").write_text("text\n" + "".join(f'"{text}"\n' for text in texts))
    told: list[int] = []
    scores, characters = classify_corpus(
        tmp_path / "corpus.csv", classifier, allowed=lambda document: document.text != "unheard", progress=told.append
    )
    assert np.isnan(scores[texts.index("unheard")])
    finite = np.isfinite(scores)
    assert finite.sum() == len(texts) - 1
    assert np.array_equal(scores[finite], classifier.log_odds(texts)[finite])
    assert characters.tolist() == [len(text) for text in texts]
    assert told[-1] == len(texts)
    with pytest.raises(InputError, match="jobs must be"):
        classify_corpus(tmp_path / "corpus.csv", classifier, jobs=0)


@pytest.mark.slow
def test_processes_side_by_side_give_the_same_scores(classifier: DocumentClassifier, tmp_path: Path) -> None:
    (tmp_path / "corpus.csv").write_text("text\n" + "".join(f'"{text}"\n' for text in documents(3, 5_000, 0, 12)))
    one, two = (classify_corpus(tmp_path / "corpus.csv", classifier, jobs=jobs)[0] for jobs in (1, 2))
    assert np.array_equal(one, two)
    assert len(one) == 5_000
