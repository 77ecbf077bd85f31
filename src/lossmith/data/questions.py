"""Question-answer sets for evaluation: files, and questions that a model writes from documents and rules check."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import replacing, write_text
from .corpus import read_corpus
from .formats import Document, Fields, read_text, reader_of

INSTRUCTION = (
    "Write {number} questions about the text below, each with its short answer, for an examination in which the text "
    "is not at hand. Every question must make sense without the text: do not speak of 'the text', 'the paper', "
    "'the author', a figure, a table or a section. Every answer must be found in the text. Use exactly this form:\n"
    "Question: ...\nAnswer: ...\n\nText:\n{text}\n"
)
_PAIR = re.compile(
    r"^\W*(?:\d+\W+)?(?:question|q)\W*\d*\s*[:.)]\**\s*(?P<question>.+?)\s*^\W*(?:answer|a)\W*\d*\s*[:.)]\**\s*(?P<answer>.+?)\s*"
    r"(?=^\W*(?:\d+\W+)?(?:question|q)\W*\d*\s*[:.)]|\Z)",
    re.IGNORECASE | re.MULTILINE | re.DOTALL,
)
# A question that needs its source at hand.
_REFERS = re.compile(
    r"\b(?:the|this|above|following|given|provided)\s+(?:text|paper|article|passage|document|authors?'?s?|excerpt|study|"
    r"section|proposed \w+|figure|table)\b|\b(?:fig(?:ure)?|table|section|eq(?:uation)?)\.?\s*\(?\d",
    re.IGNORECASE,
)
_SMALL_WORDS = {
    *(
        "a",
        "an",
        "and",
        "are",
        "as",
        "at",
        "be",
        "been",
        "but",
        "by",
        "can",
        "could",
        "did",
        "do",
        "does",
        "for",
        "from",
    ),
    *("had", "has", "have", "how", "if", "in", "into", "is", "it", "its", "may", "might", "of", "on", "or", "than"),
    *("that", "the", "their", "then", "there", "these", "they", "this", "those", "to", "was", "were", "what", "when"),
    *("where", "which", "who", "why", "will", "with", "would"),
}


@dataclass(frozen=True, slots=True)
class Question:
    """An open question with its answer.

    Attributes:
        question: what is asked.
        answer: the reference.
        id: of the document that it was made from, where there is one.
        category: of that document.
    """

    question: str
    answer: str
    id: str = ""
    category: str = ""


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """Questions that passed, those that did not with their reason, and how many documents were asked about."""

    questions: tuple[Question, ...]
    rejected: tuple[tuple[Question, str], ...] = ()
    documents: int = 0

    def summary(self) -> str:
        """One line per reason."""
        lines = [f"{len(self.questions)} questions from {self.documents} documents, {len(self.rejected)} rejected"]
        reasons = Counter(reason.split(" (")[0] for _, reason in self.rejected)
        lines += [f"  {count:>6}  {reason}" for reason, count in sorted(reasons.items(), key=lambda r: (-r[1], r[0]))]
        return "\n".join(lines)

    def write(self, path: str | Path) -> None:
        """JSON lines with ``question``, ``answer``, ``id``, ``category``; the others in ``PATH.rejected.jsonl``."""
        if self.rejected:
            rows = ({**_as_row(question), "reason": reason} for question, reason in self.rejected)
            write_text(f"{path}.rejected.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
            for question in self.questions:
                stream.write(json.dumps(_as_row(question), ensure_ascii=False) + "\n")


def _as_row(question: Question) -> dict[str, str]:
    return {name: getattr(question, name) for name in ("question", "answer", "id", "category")}


@dataclass(slots=True)
class QuestionChecks:
    """What a question must be like; see :func:`generate_questions`.

    Attributes:
        longest_question, longest_answer: in words.
        answerable: share of the answer's content words that the document must hold.
        known: words of the questions so far, for duplicates.
    """

    longest_question: int = 60
    longest_answer: int = 100
    answerable: float = 0.8
    known: set[str] = field(default_factory=set)

    def problem(self, question: Question, text: str | None = None) -> str | None:
        """Why a question is no good; ``None`` where it is. What passes is a duplicate from then on."""
        asked, answer = words_of(question.question), words_of(question.answer)
        if len(asked) < 3:
            return "no question (fewer than three words)"
        if not answer:
            return "no answer"
        if len(asked) > self.longest_question:
            return f"question of more than {self.longest_question} words ({len(asked)})"
        if len(answer) > self.longest_answer:
            return f"answer of more than {self.longest_answer} words ({len(answer)})"
        if match := _REFERS.search(question.question):
            return f"needs its source ({match[0]!r})"
        content = [word for word in answer if word not in _SMALL_WORDS] or answer
        if len(content) > 1 and set(content) <= set(asked):
            return "the question holds its answer"
        if text is not None:
            held = set(words_of(text))
            share = sum(word in held for word in content) / len(content)
            if share < self.answerable:
                return f"not answerable from its document ({share:.0%} of the answer's words are there)"
        key = " ".join(asked)
        if key in self.known:
            return "duplicate"
        self.known.add(key)
        return None


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"\w+(?:[.'-]\w+)*", text.lower())


def parse_questions(reply: str) -> list[tuple[str, str]]:
    r"""Pairs of question and answer in what a model replied: lines, or JSON objects one per line or in a list.

    >>> parse_questions("1. Question: What is OFDM?\nAnswer: A modulation.")
    [('What is OFDM?', 'A modulation.')]
    >>> parse_questions('[{"question": "What is OFDM?", "answer": "A modulation."}]')
    [('What is OFDM?', 'A modulation.')]
    """
    reply = re.sub(r"^```\w*\n|\n?```\s*$", "", reply.strip())
    if reply[:1] in "[{" and reply:
        try:
            found = json.loads(reply)
        except ValueError:
            found = [_loads(line) for line in reply.splitlines()]
        rows = found if isinstance(found, list) else [found]
        return [
            (str(r["question"]), str(r["answer"]))
            for r in rows
            if isinstance(r, dict) and {"question", "answer"} <= r.keys()
        ]
    return [(" ".join(m["question"].split()), " ".join(m["answer"].split())) for m in _PAIR.finditer(f"\n{reply}")]


def _loads(line: str) -> object:
    try:
        return json.loads(line.strip().rstrip(","))
    except ValueError:
        return None


def generate_questions(
    documents: Iterable[Document],
    generate: Callable[[str], str],
    *,
    per_document: int = 3,
    characters: int = 4_000,
    limit: int | None = None,
    instruction: str = INSTRUCTION,
    checks: QuestionChecks | None = None,
    watch: Callable[[int, int], None] | None = None,
) -> QuestionSet:
    """Questions with answers that a model writes from documents, each checked.

    A question is kept if it has the asked form; can be understood without its document (does not speak of "the paper"
    or "figure 3"); does not hold its own answer; is not longer than ``checks`` allow; is answered by its document (of
    the answer's words, small ones left out, 80 % are there); and was not asked before.

    Args:
        documents: of the corpus.
        generate: from a prompt to the model's reply: any language model, or any function.
        per_document: how many questions to ask for.
        characters: of a document that the prompt shows; the middle of a longer one.
        limit: stop after so many questions.
        instruction: with ``{number}`` and ``{text}``.
        checks: other bounds.
        watch: told the numbers of documents and of questions after each document.

    Raises:
        InputError: no question is left, or an instruction without ``{text}``.

    Source: the benchmark Tele-Eval of "Tele-LLMs: A Series of Specialized Large Language Models for
    Telecommunications", 2024, arXiv 2409.05314; its prompt is not published in full, the checks here are ours.

    >>> document = Document("Polar codes protect the control channel.", source="5g.md")
    >>> reply = "Question: Which codes protect the control channel?\\nAnswer: Polar codes"
    >>> generate_questions([document], lambda prompt: reply).questions
    (Question(question='Which codes protect the control channel?', answer='Polar codes', id='5g.md', category=''),)
    """
    if "{text}" not in instruction:
        raise InputError("the instruction has no {text}, where the document would stand")
    checks = checks or QuestionChecks()
    kept: list[Question] = []
    rejected: list[tuple[Question, str]] = []
    seen = 0
    for document in documents:
        if limit is not None and len(kept) >= limit:
            break
        seen += 1
        start = max(0, (len(document.text) - characters) // 2)
        shown = document.text[start : start + characters]
        reply = generate(instruction.replace("{number}", str(per_document)).replace("{text}", shown))
        pairs = parse_questions(reply)
        if not pairs:
            rejected.append((Question(reply[:500], "", document.source, document.domain), "not of the asked form"))
        for asked, answer in pairs[:per_document]:
            question = Question(asked.strip(), answer.strip(), document.source, document.domain)
            problem = checks.problem(question, shown)
            if problem is None:
                kept.append(question)
            else:
                rejected.append((question, problem))
        if watch is not None:
            watch(seen, len(kept))
    if not kept:
        reasons = Counter(reason.split(" (")[0] for _, reason in rejected)
        found = ", ".join(f"{count} times: {reason}" for reason, count in reasons.most_common(3)) or "no documents"
        raise InputError(f"no question passed the checks ({found})")
    return QuestionSet(tuple(kept[:limit]), tuple(rejected), seen)


def read_questions(
    source: str | Path,
    *,
    question_field: str = "question",
    answer_field: str = "answer",
    id_field: str | None = None,
    category_field: str | None = None,
) -> QuestionSet:
    """Questions of a JSONL, JSON, CSV, TSV or Parquet file.

    Args:
        source: the file.
        question_field: column of the questions; where it is not there, ``Statement`` is tried (Tele-Eval's).
        answer_field: column of the answers; else ``Answer``.
        id_field: column that names the document; by default ``id`` where it is there.
        category_field: column of the category; by default ``category`` where it is there, else the part of the id
            before the first underscore (Tele-Eval's ``standard_...``), if it has one.

    Returns:
        Questions, and those without an answer as rejected.

    Raises:
        InputError: no such file or column, or no question with an answer.

    >>> import tempfile; path = Path(tempfile.mkdtemp()) / "qa.jsonl"
    >>> _ = path.write_text('{"Statement": "What is 5G?", "Answer": "A network.", "id": "wiki_7"}\\n')
    >>> read_questions(path).questions
    (Question(question='What is 5G?', answer='A network.', id='wiki_7', category='wiki'),)
    """
    path = Path(source)
    if not path.is_file() or reader_of(path) is read_text:
        raise InputError(f"questions: {path} is no file of questions (JSONL, JSON, CSV, TSV or Parquet)")

    def column(name: str, other: str | None = None) -> list[str]:
        try:
            return [record.text for record in reader_of(path)(path, "", Fields(name))]
        except InputError as problem:
            if other is None or "there is no field" not in str(problem):
                raise
            try:
                return column(other)
            except InputError:
                raise problem from None

    def column_if_there(name: str) -> list[str]:
        return [record.text for record in reader_of(path)(path, "", _FieldIfThere(name))]

    asked, answers = column(question_field, "Statement"), column(answer_field, "Answer")
    ids = column(id_field) if id_field else column_if_there("id")
    categories = column(category_field) if category_field else column_if_there("category")
    categories = [
        category or (name.partition("_")[0] if "_" in name else "")
        for category, name in zip(categories, ids, strict=True)
    ]
    rows = [Question(*row) for row in zip(asked, answers, ids, categories, strict=True)]
    kept = tuple(row for row in rows if row.question.strip() and row.answer.strip())
    if not kept:
        raise InputError(f"{path} holds no question with an answer")
    without = ((row, "no answer" if row.question.strip() else "no question") for row in rows if row not in set(kept))
    return QuestionSet(kept, tuple(without), len({row.id for row in kept if row.id}))


class _FieldIfThere(Fields):
    """A field that a record may lack."""

    def document(self, record: Mapping[str, Any], place: str, domain: str, null_is_blank: bool = False) -> Document:
        value = record.get(self.text)
        return Document("" if value is None else str(value), domain, place)

    def check_columns(self, names: list[str], place: str) -> None:
        pass


def documents_to_ask_about(
    source: str, *, text_field: str = "text", category_field: str | None = None
) -> Iterator[Document]:
    """Documents of a corpus, named by their ``id`` where they are records that have one, as those of ``curate``.

    Raises:
        InputError: as ``read_corpus``.
    """
    path = Path(source)
    if not path.is_file() or reader_of(path) is read_text:
        yield from read_corpus(source, text_field=text_field, domain_field=category_field)
        return
    read = reader_of(path)
    ids = read(path, "", _FieldIfThere("id"))
    for document, name in zip(read(path, "", Fields(text_field, category_field)), ids, strict=True):
        if document.text.strip():
            yield dataclasses.replace(document, source=name.text or document.source)


def cloze_questions(texts: Sequence[Document], *, every: int = 1) -> list[Question]:
    """The second half of a sentence as the answer to its first half: questions that need no model to write them.

    A rough measure of what a model recalls of its documents, where there is no model that could write questions.

    Args:
        texts: documents.
        every: take one sentence of so many.

    >>> cloze_questions([Document("The control channel of 5G is protected by polar codes of short length.")])[0].answer
    'by polar codes of short length.'
    """
    found = []
    for document in texts:
        for number, sentence in enumerate(re.findall(r"[A-Z][^.!?\n`*|]{40,200}\.(?=\s|$)", document.text)):
            words = sentence.split()
            if number % every == 0 and len(words) >= 8:
                middle = len(words) // 2 + 1
                halves = " ".join(words[:middle]), " ".join(words[middle:])
                found.append(Question(*halves, document.source, document.domain))
    return found
