from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lossmith.data.passages import BLANK_LINE, LINE_END, TOP_LEVEL, passages

texts = st.text(alphabet="ab \n\té", max_size=400)


@settings(max_examples=200, deadline=None)
@given(texts, st.integers(2, 40))
def test_passages_joined_give_back_the_text_and_none_is_longer_than_one_and_a_half_sizes(text, size):
    found = list(passages([text], size=size))
    assert "".join(p.text for p in found) == text
    assert all(0 < len(p.text) <= size + size // 2 for p in found)
    position = 0
    for passage in found:
        assert passage.line == text[:position].count("\n") + 1
        position += len(passage.text)


@settings(max_examples=200, deadline=None)
@given(texts, st.integers(2, 40), st.lists(st.integers(0, 400), max_size=8))
def test_passages_do_not_depend_on_how_the_text_arrives(text, size, cuts):
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(borders)]
    assert list(passages(pieces, size=size)) == list(passages([text], size=size))


def test_a_passage_ends_at_a_blank_line_rather_than_at_a_nearer_line_end():
    text = "a" * 10 + "\n" + "b" * 2 + " \n \n" + "c" * 20
    assert next(passages([text], size=12)).text == "a" * 10 + "\n" + "bb \n \n"


def test_a_passage_without_lines_is_cut_hard():
    assert [len(p.text) for p in passages(["x" * 35], size=10)] == [10, 10, 15]


def test_a_text_of_one_and_a_half_sizes_stays_whole():
    assert [p.text for p in passages(["x" * 15], size=10)] == ["x" * 15]


@pytest.mark.parametrize("text", ["", "\n", "\n\n\n"])
def test_texts_of_nothing_but_line_ends_come_back(text):
    assert "".join(p.text for p in passages([text], size=2)) == text


def test_code_is_cut_before_top_level_statements():
    text = "def f():\n    a = 1\n\n    return a\n\n\ndef g():\n    return 2\n\n\n" * 3
    found = [p.text for p in passages([text], size=50, borders=(TOP_LEVEL, BLANK_LINE, LINE_END))]
    assert all(p.startswith("def ") for p in found)


def test_a_blank_line_a_little_before_the_size_is_better_than_a_line_end_behind_it():
    text = "a" * 8 + "\n\n" + "bbb\n" * 10
    assert next(passages([text], size=12)).text == "a" * 8 + "\n\n"
