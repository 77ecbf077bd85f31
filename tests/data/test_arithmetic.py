"""Word problems, exact values of expressions, and rationales judged by their equations."""

from __future__ import annotations

from fractions import Fraction

import pytest

from lossmith.data import ArithmeticTeacher, arithmetic_problems, sample_rationales
from lossmith.data.arithmetic import evaluate_arithmetic, rationale_holds
from lossmith.errors import InputError


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("( 8.0 - 3.0 ) * 2", 10), ("1 / 3", Fraction(1, 3)), ("-2 - +3", -5), ("0.1 + 0.2", Fraction(3, 10))],
)
def test_values_are_exact(text: str, value: object) -> None:
    assert evaluate_arithmetic(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "2 ** 9",
        "9 % 2",
        "1 / 0",
        "__import__('os')",
        "True",
        "1e999",
        "(" * 150,
        "1j",
        "'a'",
        "1 if 1 else 2",
        "[1]",
    ],
)
def test_nothing_else_is_evaluated(text: str) -> None:
    with pytest.raises(ValueError):
        evaluate_arithmetic(text)


def test_long_texts_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 200 characters"):
        evaluate_arithmetic("1+" * 200 + "1")


@pytest.mark.parametrize(
    ("rationale", "holds"),
    [
        ("3 + 4 = 7 ; 7 - 2 = 5", True),
        ("4 + 3 = 7 , 7 - 2 = 5", True),
        ("3 + 4 - 2 = 5", True),
        ("3 + 4 = 8 ; 8 - 2 = 6", False),  # false equation, other answer
        ("3 + 4 = 8 ; 8 - 2 = 5", False),  # right answer by false equations
        ("3 + 2 = 5", False),  # true, but not of this question
        ("1 + 4 = 5", False),
        ("", False),
        ("seven less two = five", False),
        ("3 + 4 ; 5", False),
        ("3 + 4 = 7 ; 7 - 2 = 5 ; ", True),
    ],
)
def test_a_rationale_holds_if_its_equations_are_true_and_of_the_question(rationale: str, holds: bool) -> None:
    assert rationale_holds(rationale, "5", "ann has 3 pears , finds 4 , then loses 2") is holds


@pytest.mark.slow
def test_problems_are_distinct_repeatable_and_their_rationales_hold() -> None:
    for form in ("story", "expression"):
        problems = arithmetic_problems(200, seed=3, form=form)
        assert problems == arithmetic_problems(200, seed=3, form=form)
        assert len({p.reference for p in problems}) == 200
        assert all(rationale_holds(p.reference or "", p.label, p.question) for p in problems)
    assert all(evaluate_arithmetic(p.question) == int(p.label or "") for p in problems)
    with pytest.raises(InputError, match="there are not 5000 distinct problems with numbers up to 2"):
        arithmetic_problems(5000, largest=2)
    with pytest.raises(InputError, match="form must be story or expression, got 'x'"):
        arithmetic_problems(1, form="x")  # type: ignore[arg-type]


def test_the_teacher_is_right_as_often_as_it_is_told() -> None:
    problems = arithmetic_problems(400)
    rows = sample_rationales(ArithmeticTeacher(problems, accuracy=0.6), problems, samples=5)
    right = [rationale_holds(s.rationale, r.label, r.question) for r in rows for s in r.samples]
    assert sum(right) / len(right) == pytest.approx(0.6, abs=0.04)  # standard error 0.011
    answers = [s.answer == r.label for r in rows for s in r.samples]
    assert sum(answers) / len(answers) == pytest.approx(0.8, abs=0.04)  # half of the wrong ones end right
    for accuracy in (0.0, 1.0):
        rows = sample_rationales(ArithmeticTeacher(problems, accuracy=accuracy), problems[:50], samples=2)
        assert {rationale_holds(s.rationale, r.label, r.question) for r in rows for s in r.samples} == {accuracy == 1.0}
    with pytest.raises(InputError, match=r"accuracy must be in \[0, 1\], got 2"):
        ArithmeticTeacher(problems, accuracy=2)
