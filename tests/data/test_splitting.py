from collections import Counter

import pytest

from lossmith.data import Document
from lossmith.data.splitting import content_digest, split_draw, spool
from lossmith.errors import InputError


def split(documents, folder, *, fraction=0.25, seed=0):
    """Validation and training texts."""
    found = spool(documents, folder / "spool.arrow", validation_fraction=fraction, split_seed=seed)
    rows = [row for batch in found.batches() for row in batch]
    assert len(rows) == found.documents
    return {text for text, _, held_out in rows if held_out}, {text for text, _, held_out in rows if not held_out}


def numbered(numbers, domain=""):
    return [Document(f"document {i}", domain) for i in numbers]


def test_the_split_follows_the_draw_of_each_document(tmp_path):
    documents = numbered(range(3000))
    held_out, train = split(documents, tmp_path)
    assert held_out == {d.text for d in documents if split_draw(content_digest(d.text), 0) < 0.25 * 2**64}
    assert held_out | train == {d.text for d in documents}
    assert not held_out & train
    # Binomial: five standard deviations of sqrt(3000 * 0.25 * 0.75) = 24.
    assert len(held_out) == pytest.approx(750, abs=120)


def test_no_document_moves_when_others_are_added_or_the_order_changes(tmp_path):
    few, _ = split(numbered(range(0, 400, 2)), tmp_path)
    many, _ = split(numbered(reversed(range(400))), tmp_path)
    assert few == {text for text in many if int(text.split()[1]) % 2 == 0}


def test_another_seed_draws_another_split(tmp_path):
    first, _ = split(numbered(range(400)), tmp_path, seed=0)
    second, _ = split(numbered(range(400)), tmp_path, seed=1)
    assert first != second


def test_documents_with_the_same_words_are_kept_once_over_all_domains(tmp_path):
    documents = [Document("a b", "x"), Document(" a\n\tb ", "y"), Document("A b", "y"), Document("a b", "x")]
    found = spool(documents, tmp_path / "s", validation_fraction=0.5, split_seed=0)
    assert (found.documents, found.duplicates, found.domains) == (2, 2, ("x", "y"))
    assert [row[:2] for batch in found.batches() for row in batch] == [("a b", 0), ("A b", 1)]


@pytest.mark.parametrize("fraction", [1e-9, 0.01, 0.5, 0.99, 1 - 1e-12])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_each_side_gets_a_document_even_of_a_tiny_corpus(tmp_path, fraction, count):
    held_out, train = split(numbered(range(count)), tmp_path, fraction=fraction)
    assert held_out
    assert train
    assert len(held_out) + len(train) == count


def test_two_documents_of_two_domains_are_split_too(tmp_path):
    for fraction in (0.01, 0.99):
        held_out, train = split([Document("one", "x"), Document("two", "y")], tmp_path, fraction=fraction)
        assert len(held_out) == len(train) == 1


def test_every_domain_that_is_large_enough_is_evaluated(tmp_path):
    # 60 domains of 20 documents at 5 %: without care a third of them would miss a validation document.
    documents = [Document(f"{i} of {d}", f"domain {d:02}") for d in range(60) for i in range(20)]
    found = spool(documents, tmp_path / "s", validation_fraction=0.05, split_seed=0)
    held_out = Counter(domain for batch in found.batches() for _, domain, side in batch if side)
    assert set(held_out) == set(range(60))


@pytest.mark.parametrize("documents", [[], [Document("a")], [Document("a"), Document(" a ")]])
def test_fewer_than_two_different_documents_are_refused(tmp_path, documents):
    with pytest.raises(InputError, match=r"need at least 2 different documents, got [01]"):
        spool(documents, tmp_path / "s", validation_fraction=0.5, split_seed=0)


def test_domains_are_sorted_whatever_the_order_of_appearance(tmp_path):
    found = spool([Document(d * 2, d) for d in "cabd"], tmp_path / "s", validation_fraction=0.5, split_seed=0)
    assert found.domains == ("a", "b", "c", "d")
    assert [row[:2] for batch in found.batches() for row in batch] == [
        ("cc", 2),
        ("aa", 0),
        ("bb", 1),
        ("dd", 3),
    ]


def test_the_digest_follows_texts_and_domains(tmp_path):
    def digest(*documents):
        return spool(documents, tmp_path / "s", validation_fraction=0.5, split_seed=0).digest

    one, two = Document("one"), Document("two")
    assert digest(one, two) == digest(one, two)
    assert digest(one, two) != digest(two, one)
    assert digest(one, two) != digest(one, Document("two", "x"))
