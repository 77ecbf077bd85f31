"""Votes on sampled rationales, files of them, and asking a teacher without asking twice."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lossmith.data import (
    RationaleSamples,
    RecordedTeacher,
    SampledRationale,
    build_contrastive_rationales,
    read_rationales,
    sample_rationales,
    write_rationales,
)
from lossmith.data.rationales import corrupt_rationale, normalized_answer, parse_rationale, vote_rationales
from lossmith.errors import InputError


def said(answers: str) -> tuple[SampledRationale, ...]:
    return tuple(SampledRationale(f"reason {i}", answer) for i, answer in enumerate(answers))


def test_the_majority_is_good_and_the_others_are_bad() -> None:
    vote = vote_rationales(said("aabac"))
    assert vote.answer == "a"
    assert [s.rationale for s in vote.positives] == ["reason 0", "reason 1", "reason 3"]
    assert [s.rationale for s in vote.negatives] == ["reason 2", "reason 4"]


def test_a_tie_goes_to_the_label_or_else_to_the_answer_given_first() -> None:
    assert vote_rationales(said("baba")).answer == "b"
    assert vote_rationales(said("baba"), gold="A ").answer == "a"
    assert vote_rationales(said("caabb"), gold="c").answer == "a"  # the label is not among the tied


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=7))
def test_a_vote_loses_nothing_and_always_leaves_a_good_rationale(answers: list[str]) -> None:
    vote = vote_rationales(said("".join(answers)))
    assert len(vote.positives) == max(answers.count(a) for a in answers)
    assert len(vote.positives) + len(vote.negatives) == len(answers)


def test_rationales_that_say_the_same_count_once_and_are_never_both_good_and_bad() -> None:
    samples = [
        SampledRationale(*pair) for pair in (("Two  twos", "4"), ("two twos", "4"), ("two twos", "5"), ("x", "6"))
    ]
    vote = vote_rationales(samples)
    assert [s.rationale for s in vote.positives] == ["Two  twos"]
    assert [s.rationale for s in vote.negatives] == ["x"]


def test_five_votes_of_a_teacher_that_is_right_in_sixty_percent_are_right_in_eighty_eight() -> None:
    draw, right, trials = random.Random(0), 0, 4000
    for _ in range(trials):
        answers = [0 if draw.random() < 0.6 else draw.randint(1, 9) for _ in range(5)]
        right += vote_rationales([SampledRationale("r", str(a)) for a in answers]).answer == "0"
    # One standard error is 0.005; the first of the tied is a random one, since the samples are exchangeable.
    assert right / trials == pytest.approx(0.88, abs=0.02)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1,200", "1200.0", True),
        ("Yes.", " yes", True),
        ("0.50", "1/2", True),
        ("12", "13", False),
        ("1e3", "1000", False),
    ],
)
def test_answers_are_compared_by_what_they_say(one: str, other: str, same: bool) -> None:
    assert (normalized_answer(one) == normalized_answer(other)) == same


@pytest.mark.parametrize("text", ["", ".", ",", "-", "1" * 5000, "٣", "1e999999999", "\x00"])
def test_odd_answers_do_no_harm(text: str) -> None:
    assert isinstance(normalized_answer(text), str)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<Explanation>: because\nof x <Answer>: 7\n", ("because\nof x", "7")),
        ("explanation: a answer: b", ("a", "b")),
        ("Answer: 7", None),
        ("Explanation: a Answer:  ", None),
    ],
)
def test_outputs_are_taken_apart(text: str, expected: tuple[str, str] | None) -> None:
    found = parse_rationale(text)
    assert (found and (found.rationale, found.answer)) == expected


def test_building_counts_what_was_dropped_and_how_good_the_vote_is() -> None:
    rows = [
        RationaleSamples("q1", "a", said("aab"), dropped=2),
        RationaleSamples("q2", "a", said("bba"), "known"),
        RationaleSamples("q3", "a", (), dropped=3),
    ]
    built = build_contrastive_rationales(rows)
    assert (built.samples, built.dropped, built.without) == (6, 5, 1)
    assert built.vote_accuracy == 0.5
    assert built.sample_accuracy == pytest.approx(3 / 6)
    assert built.agreement == pytest.approx(2 / 3)
    assert [e.label for e in built.examples] == ["a", "a"]
    assert built.examples[1].reference == "known"
    assert "5 outputs had no answer, 1 questions were left out" in built.summary()
    teacher = build_contrastive_rationales(rows, labels="teacher")
    assert [e.label for e in teacher.examples] == ["a", "b"]


def test_other_votes() -> None:
    rows = [RationaleSamples("q", "b", said("aab"))]
    first = build_contrastive_rationales(rows, vote="first").examples[0]
    assert (first.positives, first.negatives) == (("reason 0",), ())
    gold = build_contrastive_rationales(rows, vote="gold").examples[0]
    assert (gold.positives, gold.negatives) == (("reason 2",), ("reason 0", "reason 1"))


def test_building_refuses_what_it_cannot_learn_from() -> None:
    with pytest.raises(InputError, match="no rationale to learn from: 1 questions and 3 outputs without an answer"):
        build_contrastive_rationales([RationaleSamples("q", "a", (), dropped=3)])
    with pytest.raises(InputError, match=r"question 1 has no label \('q'\); use labels='teacher'"):
        build_contrastive_rationales([RationaleSamples("q", None, said("a"))])
    with pytest.raises(InputError, match="vote must be majority or first or gold, got 'all'"):
        build_contrastive_rationales([RationaleSamples("q", "a", said("a"))], vote="all")  # type: ignore[arg-type]


def test_a_spoilt_rationale_differs_by_about_the_rate_and_by_at_least_a_word() -> None:
    draw, text = random.Random(0), " ".join(f"w{i}" for i in range(200))
    vocabulary = text.split()
    changed = [
        sum(a != b for a, b in zip(text.split(), corrupt_rationale(text, vocabulary, draw).split(), strict=True))
        for _ in range(50)
    ]
    assert sum(changed) / 50 == pytest.approx(30, abs=2)  # standard error 0.7
    assert all(corrupt_rationale("a", ["a"], draw) == "<mask>" for _ in range(20))
    assert corrupt_rationale(" ", [], draw) == "<mask>"


def test_files_are_read_as_they_were_written(tmp_path: Path) -> None:
    rows = [
        RationaleSamples("2 + 2?\u2028", "4", said("44"), "known", 1),
        RationaleSamples("is “it”?", None, said("y")),
        RationaleSamples("none", "4", (), None, 5),
    ]
    write_rationales(tmp_path / "a.jsonl", rows)
    assert read_rationales(tmp_path / "a.jsonl") == rows


def test_raw_outputs_numbers_and_single_rationales_are_understood(tmp_path: Path) -> None:
    lines = [
        {"question": "q", "label": 4, "samples": ["Explanation: a Answer: 4", "hm", {"rationale": "b", "answer": 5}]},
        {"question": "q2", "label": "x", "rationale": "known"},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8")
    first, second = read_rationales(tmp_path / "a.jsonl")
    assert first == RationaleSamples("q", "4", (SampledRationale("a", "4"), SampledRationale("b", "5")), None, 1)
    assert second.samples == (SampledRationale("known", "x"),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no questions"),
        ("{", "line 1: not JSON"),
        ("[]", "line 1: an object is needed, got list"),
        ('{"label": "a"}', "line 1: 'question' must be text, got nothing"),
        ('{"question": " ", "samples": []}', "line 1: the question is empty"),
        ('{"question": "q"}', r"line 1: 'samples' is needed \(or 'rationale' and 'label'\), only: question"),
        ('{"question": "q", "samples": "r"}', "'samples' must be a list, got str"),
        ('{"question": "q", "samples": [3]}', "a sample must be an object or text, got int"),
        ('{"question": "q", "samples": [{"rationale": ["a"], "answer": "b"}]}', "must be text"),
    ],
)
def test_a_wrong_line_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_rationales(path)


def test_files_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist or is a folder"):
        read_rationales(tmp_path)
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="is not UTF-8 at byte 0"):
        read_rationales(tmp_path / "a.jsonl")


class Teacher:
    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, questions: Any, samples: int, temperature: float) -> list[list[str]]:
        self.asked += questions
        return [[f"Explanation: of {q} Answer: {i}" for i in range(samples - 1)] + ["silence"] for q in questions]


def test_a_teacher_is_asked_once_per_question_even_after_a_crash_in_the_middle_of_a_line(tmp_path: Path) -> None:
    cache, questions = tmp_path / "deep" / "a.jsonl", [f"q{i}" for i in range(5)]
    first = Teacher()
    rows = sample_rationales(first, questions, samples=3, cache=cache, batch_size=2)
    assert first.asked == questions
    assert rows[4].samples == (SampledRationale("of q4", "0"), SampledRationale("of q4", "1"))
    assert rows[4].dropped == 1
    whole = cache.read_text()
    cache.write_text(whole[: whole.rindex('"samples"')])
    second = Teacher()
    again = sample_rationales(second, [RationaleSamples("new", "l"), *questions], samples=3, cache=cache)
    assert second.asked == ["new", "q4"]
    assert again[1:] == rows
    assert again[0].label == "l"
    assert read_rationales(cache)[0].question == "q0"
    with pytest.raises(InputError, match="holds rationales of other settings"):
        sample_rationales(Teacher(), questions, samples=4, cache=cache)


def test_a_recorded_teacher_says_what_was_recorded_and_names_what_was_not(tmp_path: Path) -> None:
    write_rationales(tmp_path / "a.jsonl", [RationaleSamples("q", "a", said("ab"))])
    teacher = RecordedTeacher(tmp_path / "a.jsonl")
    assert sample_rationales(teacher, ["q"], samples=5)[0].samples == said("ab")
    with pytest.raises(InputError, match="have none for the question 'other'"):
        teacher(["other"], 1, 0.7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": []}, "no questions to ask"),
        ({"samples": 0}, "samples and batch_size must be at least 1"),
        ({"temperature": 0.0}, "temperature must be a finite number > 0, got 0"),
        ({"generate": lambda q, s, t: []}, "must return a list of texts for each of 1 questions, got 0"),
        ({"generate": lambda q, s, t: ["text"]}, "must return a list of texts"),
    ],
)
def test_sampling_refuses(change: dict, message: str) -> None:
    arguments = {"generate": Teacher(), "rows": ["q"], **change}
    with pytest.raises(InputError, match=message):
        sample_rationales(**arguments)
