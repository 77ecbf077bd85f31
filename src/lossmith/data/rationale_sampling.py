"""Asking a teacher for rationales, several times per question; nothing that was answered is ever asked again."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ..errors import InputError
from .rationales import RationaleSamples, SampledRationale, parse_rationale, rationale_line, read_rationales

#: ``generate(questions, samples, temperature)`` returns for each question that many texts.
Generate = Callable[[Sequence[str], int, float], list[list[str]]]


class RecordedTeacher:
    """A teacher that says again what a file recorded: the usual way to use an API's outputs.

    Args:
        recorded: a JSONL file (see :func:`read_rationales`) or rows.

    >>> rows = [RationaleSamples("2 + 2?", "4", (SampledRationale("two twos", "4"),))]
    >>> RecordedTeacher(rows)(["2 + 2?"], 1, 0.7)
    [['Explanation: two twos Answer: 4']]
    """

    def __init__(self, recorded: str | Path | Iterable[RationaleSamples]):
        rows = read_rationales(recorded) if isinstance(recorded, str | Path) else recorded
        self._said: dict[str, list[SampledRationale]] = defaultdict(list)
        for row in rows:
            self._said[row.question] += row.samples

    def __call__(self, questions: Sequence[str], samples: int, temperature: float) -> list[list[str]]:
        """At most ``samples`` texts per question; the temperature is that of the recording."""
        for question in questions:
            if not self._said.get(question):
                raise InputError(f"the recorded rationales have none for the question {question[:80]!r}")
        return [
            [f"Explanation: {s.rationale} Answer: {s.answer}" for s in self._said[question][:samples]]
            for question in questions
        ]


def sample_rationales(
    generate: Generate,
    rows: Iterable[RationaleSamples] | Sequence[str],
    *,
    samples: int = 5,
    temperature: float = 0.7,
    cache: str | Path | None = None,
    batch_size: int = 16,
    parse: Callable[[str], SampledRationale | None] = parse_rationale,
    watch: Callable[[int, int], None] | None = None,
) -> list[RationaleSamples]:
    """Ask a teacher ``samples`` times per question.

    Args:
        generate: any callable ``(questions, samples, temperature) -> texts``: :class:`lossmith.training.ModelTeacher`,
            :class:`RecordedTeacher`, a few lines around an API.
        rows: questions, alone or with labels.
        samples: per question.
        temperature: of sampling, > 0.
        cache: JSONL file to which answers are appended as they come. The same call with the same file asks only for
            what is missing, also after a crash in the middle of a line.
        batch_size: questions per call of ``generate``.
        parse: takes an output apart; ``None`` drops it (counted).
        watch: told how many questions of how many are done.

    Raises:
        InputError: no questions, settings out of range, a teacher that returns something else, a cache of other
            settings.

    >>> def teacher(questions, samples, temperature):
    ...     return [["Explanation: by heart Answer: 4"] * samples for _ in questions]
    >>> sample_rationales(teacher, ["2 + 2?"], samples=2)[0].samples[1]
    SampledRationale(rationale='by heart', answer='4')
    """
    asked = [RationaleSamples(row) if isinstance(row, str) else row for row in rows]
    if not asked:
        raise InputError("no questions to ask")
    if samples < 1 or batch_size < 1:
        raise InputError(f"samples and batch_size must be at least 1, got {samples} and {batch_size}")
    if not 0 < temperature < float("inf"):
        raise InputError(f"temperature must be a finite number > 0, got {temperature}")
    settings = {"samples": samples, "temperature": temperature}
    known = _read_cache(Path(cache), settings) if cache is not None else {}
    unknown = list(dict.fromkeys(row.question for row in asked if row.question not in known))
    for start in range(0, len(unknown), batch_size):
        part = unknown[start : start + batch_size]
        outputs = generate(part, samples, temperature)
        if len(outputs) != len(part) or any(isinstance(texts, str) for texts in outputs):
            raise InputError(
                f"generate must return a list of texts for each of {len(part)} questions, got {len(outputs)} items"
            )
        new = {}
        for question, texts in zip(part, outputs, strict=True):
            parsed = [parse(text) for text in texts]
            kept = tuple(p for p in parsed if p is not None)
            new[question] = RationaleSamples(question, None, kept, dropped=len(parsed) - len(kept))
        known |= new
        if cache is not None:
            with Path(cache).open("a", encoding="utf-8") as file:
                file.writelines(rationale_line(row) for row in new.values())
        if watch is not None:
            watch(min(start + batch_size, len(unknown)), len(unknown))
    return [
        RationaleSamples(
            row.question, row.label, known[row.question].samples, row.reference, known[row.question].dropped
        )
        for row in asked
    ]


def _read_cache(path: Path, settings: dict[str, float]) -> dict[str, RationaleSamples]:
    """What a file holds already; a half-written last line is cut off."""
    header = json.dumps({"settings": settings}) + "\n"
    if not path.exists() or not path.read_bytes().strip():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(header, encoding="utf-8")
        return {}
    content = path.read_bytes()
    if not content.endswith(b"\n"):
        content = content[: content.rfind(b"\n") + 1]
        with path.open("r+b") as file:
            file.truncate(len(content))
    first, _, rest = content.partition(b"\n")
    try:
        found = json.loads(first or b"null")
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("settings") != settings:
        raise InputError(f"{path} holds rationales of other settings than {settings}, or none; choose another file")
    if not rest.strip():
        return {}
    rows = [_recorded(line) for line in rest.decode("utf-8").split("\n") if line.strip()]
    return {row.question: row for row in rows}


def _recorded(line: str) -> RationaleSamples:
    value = json.loads(line)
    samples = tuple(SampledRationale(s["rationale"], s["answer"]) for s in value["samples"])
    return RationaleSamples(value["question"], None, samples, dropped=value.get("dropped", 0))
