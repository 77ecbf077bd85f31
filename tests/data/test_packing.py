import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lossmith.data import packing
from lossmith.data.packing import PACKINGS, pack
from lossmith.errors import InputError

# Token 0 starts and ends a document; every other token is unique, so that pairs can be found again.
lengths = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 2)), max_size=40)


def documents_of(shape):
    following, found = 1, []
    for length, domain in shape:
        body = np.arange(following, following + length, dtype=np.int32)
        following += length
        found.append((np.concatenate([[0], body, [0]]).astype(np.int32), domain))
    return found


def predicted(tokens):
    return list(zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True))


@settings(max_examples=150, deadline=None)
@given(lengths, st.integers(2, 12), st.sampled_from(["isolated", "none"]))
def test_within_segments_every_token_is_predicted_once_from_the_one_before_it(shape, length, how):
    documents = documents_of(shape)
    rows = list(pack(documents, length, how))
    found = []
    for row in rows:
        assert 2 <= len(row.tokens) <= length
        assert sum(row.segments) == len(row.tokens)
        for segment in np.split(row.tokens, np.cumsum(row.segments)[:-1]):
            found += [(row.domain, *pair) for pair in predicted(segment)]
    expected = [(domain, *pair) for tokens, domain in documents for pair in predicted(tokens)]
    assert sorted(found) == sorted(expected)
    if how == "none":
        assert found == expected


@settings(max_examples=150, deadline=None)
@given(lengths, st.integers(2, 12))
def test_concatenated_rows_predict_the_joined_stream_of_each_domain_once(shape, length):
    documents = documents_of(shape)
    rows = list(pack(documents, length, "concatenated"))
    for domain in range(3):
        stream = [0]
        for tokens, where in documents:
            if where == domain:
                stream += tokens[1:].tolist()  # one token between two documents
        own = [row for row in rows if row.domain == domain]
        assert all(row.segments == [len(row.tokens)] for row in own)
        assert all(len(row.tokens) == length for row in own[:-1])
        assert [pair for row in own for pair in predicted(row.tokens)] == predicted(np.array(stream))


def test_different_start_and_end_tokens_are_both_kept_when_joining():
    documents = [(np.array([1, 7, 2]), 0), (np.array([1, 8, 2]), 0)]
    assert [row.tokens.tolist() for row in pack(documents, 8, "concatenated")] == [[1, 7, 2, 1, 8, 2]]


def test_pieces_are_packed_tightly():
    generator = np.random.default_rng(0)
    documents = [(np.zeros(n, dtype=np.int32), 0) for n in generator.integers(2, 100, size=5000)]
    rows = list(pack(documents, 100))
    fill = sum(len(row.tokens) for row in rows) / (100 * len(rows))
    assert fill > 0.98


def test_a_best_fit_is_chosen():
    documents = [(np.full(n, n), 0) for n in (5, 7, 3, 5)]
    # Longest first: 7 opens a row of 10, 5 and 5 fill one, 3 goes where exactly 3 places are left.
    assert [row.segments for row in pack(documents, 10)] == [[5, 5], [7, 3]]


def test_memory_is_bounded_over_many_domains(monkeypatch):
    monkeypatch.setattr(packing, "_ALL_TOKENS", 1000)
    given_tokens = 0

    def documents():
        nonlocal given_tokens
        for i in range(2000):
            given_tokens += 5
            yield np.full(5, i), i % 300

    taken = 0
    for row in pack(documents(), 16):
        taken += len(row.tokens)
        assert given_tokens - taken <= 1000 + 5 * 10 or given_tokens == 10_000
    assert taken == 10_000


def test_rows_do_not_keep_long_documents_alive():
    long = np.zeros(1_000_000, dtype=np.int32)
    row = list(pack([(long[:130], 0)], 128))[-1]
    assert row.tokens.base is None or row.tokens.base.size < 1000


@pytest.mark.parametrize("how", PACKINGS)
def test_no_documents_give_no_rows(how):
    assert list(pack([], 8, how)) == []


def test_an_unknown_packing_names_the_nearest():
    with pytest.raises(InputError, match="packing: unknown 'isolate'; did you mean 'isolated'"):
        pack([], 8, "isolate")


@pytest.mark.parametrize("length", [1, 0, -5, 2.0, "8", True, None])
def test_a_sequence_length_below_two_is_refused(length):
    with pytest.raises(InputError, match="sequence_length must be an integer of at least 2"):
        pack([], length)
