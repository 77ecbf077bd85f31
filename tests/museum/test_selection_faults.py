"""Faults of public data selection: each check passes with our form and fails with the faulty one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lossmith.data import DocumentClassifier, character_threshold, select_lowest


def released(scores: np.ndarray, tau: float) -> np.ndarray:
    """The authors' script, with its sign (the largest are kept)."""
    k = int((1.0 / tau) * len(scores))
    return np.argsort(-scores, kind="stable")[-k:]


@pytest.mark.parametrize(("candidates", "right"), [(98, 2), (147, 3)])
def test_the_released_number_to_keep_is_off_by_one(candidates: int, right: int) -> None:
    scores = np.random.default_rng(0).normal(size=candidates)
    assert len(released(scores, 49)) == right - 1
    assert len(select_lowest(scores, tau=49)) == right


def test_a_number_to_keep_of_zero_is_no_whole_corpus() -> None:
    scores = np.arange(5.0)
    assert len(released(scores, 6)) == 5
    with pytest.raises(ValueError, match="one needs at least 6"):
        select_lowest(scores, tau=6)


def test_a_threshold_at_zero_depends_on_how_far_the_model_was_tuned() -> None:
    """Ranks do not change when every text becomes harder by the same amount; what lies below 0 does."""
    scores = np.random.default_rng(0).normal(size=200)
    assert select_lowest(scores, tau=8).tolist() == select_lowest(scores + 2, tau=8).tolist()
    assert (scores < 0).sum() > 10 * max(1, (scores + 2 < 0).sum())


def test_fasttext_reads_no_further_than_a_literal_end_token(tmp_path: Path) -> None:
    """The plain pipeline drops what follows ``</s>``, the end of struck-through text in HTML."""
    fasttext = pytest.importorskip("fasttext", reason="needs the extra 'selection'")
    classifier = DocumentClassifier.fit(["deep blue sea"] * 50, ["return x + y"] * 50, epochs=50)
    classifier.save(tmp_path / "classifier.bin")
    released = fasttext.load_model(str(tmp_path / "classifier.bin"))
    cut = "return </s> deep blue sea deep blue sea"
    assert released.predict(cut)[0] == released.predict("return")[0] == ("__label__0",)
    assert classifier.log_odds([cut])[0] > 0


def test_a_tenth_of_the_documents_is_not_a_tenth_of_the_characters() -> None:
    """Where short documents score best, a budget by number keeps much less than was asked for."""
    characters = np.repeat([100, 2_000], 50)
    scores = -characters.astype(float) - np.arange(100) / 1_000
    by_number = select_lowest(-scores, keep=0.1)
    kept = scores >= character_threshold(scores, characters, 0.1)
    assert characters[by_number].sum() / characters.sum() < 0.01
    assert 0.1 < characters[kept].sum() / characters.sum() < 0.13
