"""Questions with sampled rationales: files, self-consistency votes, and what they leave as good and bad examples."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from ..errors import InputError
from ..files import read_utf8, write_text

_PARTS = re.compile(r"<?\s*explanation\s*>?\s*:(.*?)<?\s*answer\s*>?\s*:(.*)", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class SampledRationale:
    """One output of a teacher: its reasoning, and the answer that it came to."""

    rationale: str
    answer: str


@dataclass(frozen=True, slots=True)
class RationaleSamples:
    """A question with its label (where it is known) and what a teacher said; ``dropped`` outputs had no answer.

    ``reference`` is a rationale that is known to be right, for evaluation.
    """

    question: str
    label: str | None = None
    samples: tuple[SampledRationale, ...] = ()
    reference: str | None = None
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class RationaleExample:
    """What a student learns from: the label to predict, rationales to learn, and rationales to move away from."""

    question: str
    label: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...] = ()
    reference: str | None = None


@dataclass(frozen=True, slots=True)
class Vote:
    """The majority answer, and the samples that agree and disagree with it."""

    answer: str
    positives: tuple[SampledRationale, ...]
    negatives: tuple[SampledRationale, ...]


@dataclass(frozen=True, slots=True)
class ContrastiveRationales:
    """The examples, and what happened on the way to them.

    Attributes:
        examples: one per question that had a sample with an answer.
        samples: samples with an answer.
        dropped: outputs without one.
        without: questions left out, since none of their outputs had one.
        agreement: mean share of a question's samples that agree with its majority.
        vote_accuracy: share of majority answers that are the label; ``None`` without labels.
        sample_accuracy: share of single answers that are the label; ``None`` without labels.
    """

    examples: tuple[RationaleExample, ...]
    samples: int
    dropped: int
    without: int
    agreement: float
    vote_accuracy: float | None
    sample_accuracy: float | None

    def summary(self) -> str:
        """One line."""
        good = sum(len(e.positives) for e in self.examples)
        bad = sum(len(e.negatives) for e in self.examples)
        text = f"{len(self.examples)} questions, {good} good and {bad} bad rationales, agreement {self.agreement:.3f}"
        if self.vote_accuracy is not None:
            text += f", right answers: {self.sample_accuracy:.3f} of single samples, {self.vote_accuracy:.3f} of votes"
        if self.dropped or self.without:
            text += f"; {self.dropped} outputs had no answer, {self.without} questions were left out"
        return text


def parse_rationale(text: str) -> SampledRationale | None:
    """Take ``Explanation: ... Answer: ...`` apart (in any case, with or without angle brackets).

    >>> parse_rationale("<Explanation>: 3 + 4 = 7 <Answer>: 7")
    SampledRationale(rationale='3 + 4 = 7', answer='7')
    >>> parse_rationale("no idea") is None
    True
    """
    found = _PARTS.search(text)
    if found is None:
        return None
    rationale, answer = found[1].strip(), found[2].strip()
    return SampledRationale(rationale, answer) if rationale and answer else None


def normalized_answer(answer: str) -> str:
    """What makes answers equal: case, spaces, a final period and the form of a number do not count.

    >>> normalized_answer(" The  Cat. "), normalized_answer("1,200.0"), normalized_answer("0.5")
    ('the cat', '1200', '1/2')
    """
    plain = " ".join(answer.split()).casefold().removesuffix(".")
    # Short: 1e999999999 would be a number of a gigabyte.
    if re.fullmatch(r"-?[\d,]{1,30}(\.\d{1,30})?", plain) and any(c.isdigit() for c in plain):
        return str(Fraction(plain.replace(",", "")))
    return plain


def vote_rationales(samples: Sequence[SampledRationale], *, gold: str | None = None) -> Vote:
    """Self-consistency: the answer that most samples came to; those that agree with it are good, the others bad.

    Args:
        samples: at least one.
        gold: the label, which decides a tie if it is among the tied; else the answer that was given first wins.

    Rationales that say the same (but for case and spaces) count once; a rationale among the good is not also bad.

    Source: "QCRD", 2024, arXiv 2405.13014; Wang et al., "Self-Consistency Improves Chain of Thought Reasoning", 2022,
    arXiv 2203.11171.

    >>> vote = vote_rationales([SampledRationale(f"r{i}", answer) for i, answer in enumerate("aabac")])
    >>> vote.answer, len(vote.positives), len(vote.negatives)
    ('a', 3, 2)
    """
    if not samples:
        raise ValueError("a vote needs at least one sample, got none")
    answers = [normalized_answer(s.answer) for s in samples]
    counts = Counter(answers)
    tied = [a for a in counts if counts[a] == max(counts.values())]
    winner = tied[0]
    if gold is not None and normalized_answer(gold) in tied:
        winner = normalized_answer(gold)
    good = _distinct(s for s, a in zip(samples, answers, strict=True) if a == winner)
    said = {_plain(s.rationale) for s in good}
    bad = _distinct(s for s, a in zip(samples, answers, strict=True) if a != winner and _plain(s.rationale) not in said)
    return Vote(good[0].answer, good, bad)


def build_contrastive_rationales(
    rows: Iterable[RationaleSamples],
    *,
    labels: Literal["gold", "teacher"] = "gold",
    vote: Literal["majority", "first", "gold"] = "majority",
) -> ContrastiveRationales:
    """Good and bad rationales of each question.

    Args:
        rows: see :func:`read_rationales`.
        labels: what the student learns to predict: the ``gold`` label of the row, or the ``teacher``'s majority answer.
        vote: ``"majority"``: self-consistency; ``"first"``: the first sample is good and nothing is bad, as in
            "Distilling step-by-step"; ``"gold"``: samples that come to the label are good, the others bad, and a
            question without a good one falls back to the majority (not the paper's: it uses the labels twice).

    Raises:
        InputError: no rows, no sample with an answer, a label that is missing in ``gold`` mode.

    >>> rows = [RationaleSamples("2 + 2?", "4", (SampledRationale("two twos", "4"), SampledRationale("a guess", "5")))]
    >>> build_contrastive_rationales(rows).examples[0]
    RationaleExample(question='2 + 2?', label='4', positives=('two twos',), negatives=('a guess',), reference=None)
    """
    for name, value, allowed in (
        ("labels", labels, ("gold", "teacher")),
        ("vote", vote, ("majority", "first", "gold")),
    ):
        if value not in allowed:
            raise InputError(f"{name} must be {' or '.join(allowed)}, got '{value}'")
    examples: list[RationaleExample] = []
    samples = dropped = without = 0
    agreement, right_votes, right_samples, judged, judged_samples = 0.0, 0, 0, 0, 0
    for number, row in enumerate(rows, 1):
        dropped += row.dropped
        if not row.samples:
            without += 1
            continue
        if row.label is None and (labels == "gold" or vote == "gold"):
            raise InputError(
                f"question {number} has no label ({row.question[:60]!r}); use labels='teacher' without them"
            )
        result = vote_rationales(row.samples, gold=row.label)
        answers = [normalized_answer(s.answer) for s in row.samples]
        samples += len(answers)
        agreement += answers.count(normalized_answer(result.answer)) / len(answers)
        if row.label is not None:
            gold = normalized_answer(row.label)
            judged, judged_samples = judged + 1, judged_samples + len(answers)
            right_votes += normalized_answer(result.answer) == gold
            right_samples += answers.count(gold)
            if vote == "gold" and gold in answers:
                result = _by_gold(row.samples, gold)
        if vote == "first":
            result = Vote(row.samples[0].answer, row.samples[:1], ())
        label = row.label if labels == "gold" and row.label is not None else result.answer
        good, bad = ([s.rationale for s in part] for part in (result.positives, result.negatives))
        examples.append(RationaleExample(row.question, label, tuple(good), tuple(bad), row.reference))
    if not examples:
        found = f"{without} questions and {dropped} outputs without an answer" if without else "no questions"
        raise InputError(f"no rationale to learn from: {found}; an output must read 'Explanation: ... Answer: ...'")
    return ContrastiveRationales(
        tuple(examples),
        samples,
        dropped,
        without,
        agreement / len(examples),
        right_votes / judged if judged else None,
        right_samples / judged_samples if judged_samples else None,
    )


def corrupt_rationale(
    text: str, vocabulary: Sequence[str], draw: random.Random, *, rate: float = 0.15, mask: str = "<mask>"
) -> str:
    """Mask or replace words: a rationale that is surely worse, to train a judge with.

    Args:
        text: the rationale.
        vocabulary: words to replace others with.
        draw: random numbers.
        rate: share of words to change, at least one; half of them are masked, half replaced by another word.
        mask: what masks a word.

    >>> corrupt_rationale("3 + 4 = 7", ["8"], random.Random(1), rate=0.2)
    '8 + 4 = 7'
    """
    if not 0 < rate <= 1:
        raise ValueError(f"rate must be in (0, 1], got {rate}")
    words = text.split()
    if not words:
        return mask
    changed = [i for i in range(len(words)) if draw.random() < rate] or [draw.randrange(len(words))]
    for i in changed:
        others = [draw.choice(vocabulary) for _ in range(4)] if vocabulary and draw.random() < 0.5 else []
        words[i] = next((w for w in others if w != words[i]), mask)
    return " ".join(words)


def read_rationales(path: str | Path, *, need_samples: bool = True) -> list[RationaleSamples]:
    """Read a JSONL file of questions with sampled rationales.

    Each line holds ``question``, ``label`` (optional), and ``samples``: a list of objects with ``rationale`` and
    ``answer``, or of a teacher's raw outputs (``"Explanation: ... Answer: ..."``; those without an answer are dropped
    and counted). ``rationale`` is one known to be right; without ``samples`` it is the only sample, and comes to the
    label. ``need_samples=False`` takes bare questions, too.

    Raises:
        InputError: names the file and line.
    """
    path = Path(path)
    text = read_utf8(path)
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except ValueError:
                raise InputError(f"{path}, line {number}: not JSON") from None
            if number == 1 and isinstance(value, Mapping) and set(value) == {"settings"}:
                continue  # the heading that sample_rationales writes
            rows.append(_row(value, f"{path}, line {number}", need_samples))
    if not rows:
        raise InputError(f"{path} holds no questions")
    return rows


def write_rationales(path: str | Path, rows: Iterable[RationaleSamples]) -> None:
    """Write what :func:`read_rationales` reads, whole or not at all."""
    write_text(path, "".join(rationale_line(row) for row in rows))


def rationale_line(row: RationaleSamples) -> str:
    """One line of a JSONL file."""
    value: dict[str, Any] = {"question": row.question}
    if row.label is not None:
        value["label"] = row.label
    if row.reference is not None:
        value["rationale"] = row.reference
    value["samples"] = [{"rationale": s.rationale, "answer": s.answer} for s in row.samples]
    if row.dropped:
        value["dropped"] = row.dropped
    return json.dumps(value, ensure_ascii=False) + "\n"


def _row(value: Any, place: str, need_samples: bool) -> RationaleSamples:
    if not isinstance(value, Mapping):
        raise InputError(f"{place}: an object is needed, got {type(value).__name__}")
    question = _text(value, "question", place)
    # A label may be a number; a question that is one is another column's.
    if not isinstance(value["question"], str):
        raise InputError(f"{place}: 'question' must be text, got the number {question}")
    if not question.strip():
        raise InputError(f"{place}: the question is empty")
    label = _text(value, "label", place) if value.get("label") is not None else None
    reference = _text(value, "rationale", place) if value.get("rationale") is not None else None
    given = value.get("samples")
    if given is None:
        if not need_samples:
            return RationaleSamples(question, label, (), reference)
        if reference is None or label is None:
            raise InputError(f"{place}: 'samples' is needed (or 'rationale' and 'label'), only: {', '.join(value)}")
        given = [{"rationale": reference, "answer": label}]
    if not isinstance(given, list):
        raise InputError(f"{place}: 'samples' must be a list, got {type(given).__name__}")
    samples: list[SampledRationale] = []
    dropped = int(value.get("dropped") or 0)
    for sample in given:
        if isinstance(sample, str):
            parsed = parse_rationale(sample)
        elif isinstance(sample, Mapping):
            parts = [sample.get(name) for name in ("rationale", "answer")]
            if any(isinstance(part, list | Mapping) for part in parts):
                raise InputError(f"{place}: a sample's 'rationale' and 'answer' must be text")
            whole = all(part is not None and str(part).strip() for part in parts)
            parsed = SampledRationale(*(str(part).strip() for part in parts)) if whole else None
        else:
            raise InputError(f"{place}: a sample must be an object or text, got {type(sample).__name__}")
        if parsed is None:
            dropped += 1
        else:
            samples.append(parsed)
    return RationaleSamples(question, label, tuple(samples), reference, dropped)


def _text(value: Mapping[str, Any], name: str, place: str) -> str:
    found = value.get(name)
    if isinstance(found, bool) or not isinstance(found, str | int | float):
        raise InputError(f"{place}: '{name}' must be text, got {'nothing' if found is None else type(found).__name__}")
    return str(found)


def _by_gold(samples: Sequence[SampledRationale], gold: str) -> Vote:
    good = _distinct(s for s in samples if normalized_answer(s.answer) == gold)
    said = {_plain(s.rationale) for s in good}
    bad = _distinct(s for s in samples if normalized_answer(s.answer) != gold and _plain(s.rationale) not in said)
    return Vote(good[0].answer, good, bad)


def _distinct(samples: Iterable[SampledRationale]) -> tuple[SampledRationale, ...]:
    return tuple({_plain(s.rationale): s for s in reversed(list(samples))}.values())[::-1]


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()
