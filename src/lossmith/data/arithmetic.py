"""Word problems with known rationales, a teacher of known error rate, and rationales judged by evaluating them."""

from __future__ import annotations

import ast
import operator
import random
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Literal

from ..errors import InputError
from .rationales import RationaleSamples, normalized_answer

_OPERATIONS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_NAMES = ("ann", "bob", "eve", "max")
_THINGS = ("pears", "books", "coins", "cards")
_STEPS = {"+": ("gets {} more", "finds {}"), "-": ("loses {}", "gives away {}")}


def evaluate_arithmetic(text: str) -> Fraction:
    """The exact value of an expression of numbers, ``+ - * /`` and brackets; nothing else is run.

    Raises:
        ValueError: anything else, more than 200 characters, a division by zero.

    >>> evaluate_arithmetic("( 8.0 - 3.0 ) / 2")
    Fraction(5, 2)
    """
    if len(text) > 200:
        raise ValueError(f"an expression may have at most 200 characters, got {len(text)}")
    try:
        return _value(ast.parse(text.strip(), mode="eval").body, text)
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"{text!r} is not an expression of numbers, + - * / and brackets") from None
    except ZeroDivisionError:
        raise ValueError(f"{text!r} divides by zero") from None


def rationale_holds(rationale: str, answer: str | None = None, question: str | None = None) -> bool:
    """Whether each equation is true, and the last one comes to ``answer``, from the numbers of ``question``.

    Equations are separated by ``;``, commas or line breaks. With ``question`` each number on a left-hand side must be
    in the question or the result of an earlier equation, and all numbers of the question must be used.

    >>> rationale_holds("3 + 4 = 7 ; 7 - 2 = 5", "5", "ann has 3 pears, finds 4, loses 2")
    True
    >>> rationale_holds("3 + 4 = 8 ; 8 - 2 = 6", "6"), rationale_holds("2 + 3 = 5", "5", "3 and 4 less 2")
    (False, False)
    """
    equations = [part for part in re.split(r"[;\n,]", rationale) if part.strip()]
    known = [normalized_answer(n) for n in re.findall(r"\d+(?:\.\d+)?", question)] if question is not None else []
    unused, results = list(known), []
    if not equations:
        return False
    for equation in equations:
        left, sign, right = equation.partition("=")
        try:
            value = evaluate_arithmetic(right)
            if not sign or evaluate_arithmetic(left) != value:
                return False
        except ValueError:
            return False
        for number in map(normalized_answer, re.findall(r"\d+(?:\.\d+)?", left)):
            if question is not None and number not in known and number not in results:
                return False
            if number in unused:
                unused.remove(number)
        results.append(str(value))
    return (answer is None or results[-1] == normalized_answer(answer)) and not unused


def arithmetic_problems(
    number: int, *, seed: int = 0, largest: int = 9, form: Literal["story", "expression"] = "story"
) -> list[RationaleSamples]:
    """Word problems of two steps with their rationales and answers; no two have the same rationale.

    Args:
        number: how many.
        seed: of the draw.
        largest: largest number in a question; results are never negative.
        form: a ``story``, or the bare ``expression``.

    >>> problem = arithmetic_problems(1, seed=1)[0]
    >>> problem.question, problem.reference, problem.label
    ('max has 7 cards , finds 8 , then gets 7 more . how many cards now ?', '7 + 8 = 15 ; 15 + 7 = 22', '22')
    """
    if number < 1 or largest < 1:
        raise InputError(f"number and largest must be at least 1, got {number} and {largest}")
    if form not in ("story", "expression"):
        raise InputError(f"form must be story or expression, got '{form}'")
    draw = random.Random(seed)
    found: dict[str, RationaleSamples] = {}
    for _ in range(100 * number):
        a, b, c = (draw.randint(0 if i == 0 else 1, largest) for i in range(3))
        signs = [draw.choice("+-") for _ in range(2)]
        middle = _OPERATIONS[_kind(signs[0])](Fraction(a), Fraction(b))
        last = _OPERATIONS[_kind(signs[1])](middle, Fraction(c))
        if middle < 0 or last < 0:
            continue
        first, second = (draw.choice(_STEPS[sign]) for sign in signs)
        thing = draw.choice(_THINGS)
        story = f"{draw.choice(_NAMES)} has {a} {thing} , {first.format(b)} , then {second.format(c)} ."
        question = f"{story} how many {thing} now ?" if form == "story" else f"{a} {signs[0]} {b} {signs[1]} {c}"
        rationale = f"{a} {signs[0]} {b} = {middle} ; {middle} {signs[1]} {c} = {last}"
        found.setdefault(rationale, RationaleSamples(question, str(last), (), rationale))
        if len(found) == number:
            return list(found.values())
    raise InputError(f"there are not {number} distinct problems with numbers up to {largest}; take fewer")


class ArithmeticTeacher:
    """A rule-based stand-in for a language model: right with a known probability, each output on its own.

    A wrong output errs in the intermediate result and carries on from there; half of them yet end, by an equation that
    is not true, in the right answer. So a vote on answers alone does not find all bad rationales.

    Args:
        problems: with ``reference`` rationales of two equations (:func:`arithmetic_problems`).
        accuracy: probability that an output is right.
        seed: of its errors; the same question gets the same outputs.

    >>> problems = arithmetic_problems(1)
    >>> ArithmeticTeacher(problems, accuracy=1.0)([problems[0].question], 1, 0.7)
    [['<Explanation>: 6 - 5 = 1 ; 1 + 8 = 9 <Answer>: 9']]
    """

    def __init__(self, problems: Sequence[RationaleSamples], *, accuracy: float = 0.6, seed: int = 0):
        if not 0 <= accuracy <= 1:
            raise InputError(f"accuracy must be in [0, 1], got {accuracy}")
        self._problems = {p.question: p for p in problems}
        self.accuracy, self.seed = accuracy, seed

    def __call__(self, questions: Sequence[str], samples: int, temperature: float) -> list[list[str]]:
        """``samples`` outputs per question; the temperature has no meaning here."""
        return [[self._output(question, i) for i in range(samples)] for question in questions]

    def _output(self, question: str, number: int) -> str:
        reference = self._problems[question].reference
        assert reference is not None
        draw = random.Random(f"{self.seed} {number} {question}")
        a, sign, b, _, middle, _, _, second, c, _, last = reference.split()
        if draw.random() >= self.accuracy:
            middle = str(
                draw.choice([m for m in range(int(middle) - 3, int(middle) + 4) if m >= 0 and m != int(middle)])
            )
            carried = _OPERATIONS[_kind(second)](Fraction(middle), Fraction(c))
            last = last if draw.random() < 0.5 else str(max(Fraction(0), carried))
        rationale = f"{a} {sign} {b} = {middle} ; {middle} {second} {c} = {last}"
        return f"<Explanation>: {rationale} <Answer>: {last}"


def _kind(sign: str) -> type:
    return {"+": ast.Add, "-": ast.Sub}[sign]


def _value(node: ast.expr, text: str) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        value = _value(node.operand, text)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left, text), _value(node.right, text))
    raise ValueError(f"{text!r} is not an expression of numbers, + - * / and brackets")
