"""From sources to a corpus: read, filter, drop duplicates, and account for every document."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lossmith.errors import InputError
from lossmith.files import replacing, write_json, write_text

from ..questions import Question, read_questions
from ..splitting import content_digest
from .contamination import Contamination
from .domain import Domain, load_domain
from .duplicates import NearDuplicates
from .markup import without_sections
from .quality import quality_problem
from .relevance import BagOfWordsClassifier, KeywordFinder
from .report import CategoryCount, CurationReport, StepCount, data_card
from .sources import SetAside, SourceDocument, check_sources, read_sources

STEPS = (
    "read", "quality", "keywords", "relevance", "exact duplicates", "near duplicates", "contamination"
)  # fmt: skip


def curate(
    sources: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    out: str | os.PathLike[str],
    domain: str | os.PathLike[str] | Domain | None = None,
    *,
    relevance: Callable[[str], float] | None = None,
    jobs: int = 1,
    watch: Callable[[int, int], None] | None = None,
) -> CurationReport:
    """Make a corpus of a domain from files and folders, and account for every document.

    ==================== ==============================================================================================
    read                 LaTeX projects, Markdown, HTML, PDF, tables and plain text, see
                         :func:`lossmith.data.curation.read_sources`; sections such as references are left out
    quality              rules of text
    keywords             enough terms of the domain
    relevance            a classifier of words trained on labelled documents, or ``relevance``
    exact duplicates     the same words as an earlier document
    near duplicates      five-word shingles overlap by 80 % with an earlier document's, by MinHash, verified
    contamination        holds an evaluation question
    ==================== ==============================================================================================

    Args:
        sources: files and folders.
        out: a ``.jsonl`` or ``.jsonl.gz`` file with ``id``, ``category``, ``kind`` and ``text``, in sorted order of the
            sources; the earlier of two duplicates stays. Beside it: ``OUT.rejected.jsonl``, every document that is not
            in it, with step, reason and text; ``OUT.report.json``; ``OUT.md``, a data card.
        domain: a YAML file, the name of a built-in one (``telecom``), or a :class:`Domain`.
        relevance: from a text to a score between 0 and 1, instead of the classifier: a language model that is asked,
            for example.
        jobs: processes that read files side by side. The result does not depend on it.
        watch: told the numbers of documents read and kept.

    Returns:
        Counts per step and category; ``print(report.summary())``.

    Raises:
        InputError: no such source, a wrong configuration, ``out`` inside a source, or nothing left (the rejected
            documents are written all the same).

    Memory: a signature of 1 kB per kept document; texts stay on disk.

    Source: the corpus Tele-Data of "Tele-LLMs: A Series of Specialized Large Language Models for Telecommunications",
    2024, arXiv 2409.05314; the paper filters with a large language model (``relevance``), and gives no numbers for
    duplicates (ours).

    >>> import tempfile; folder = Path(tempfile.mkdtemp())
    >>> for name in "ab":
    ...     (folder / f"{name}.txt").write_text("All of the words of one text. " * 2) and None
    >>> quality = {"minimum_words": 3, "maximum_repeated_words": None}
    >>> report = curate([folder], folder.parent / "corpus.jsonl", Domain(quality=quality))
    >>> report.documents, report.rejected
    (1, {'exact duplicates': 1})
    """
    paths = check_sources([sources] if isinstance(sources, (str, os.PathLike)) else sources)
    out = Path(out)
    _check_out(out, paths)
    settings = domain if isinstance(domain, Domain) else load_domain(domain)
    filters = _Filters(settings, relevance)
    counts = _Counts()
    rejected = Path(f"{out}.rejected.jsonl")
    first: SetAside | None = None
    with (
        replacing(rejected) as aside,
        aside.open("w", encoding="utf-8") as aside_stream,
        suppress(_NothingLeftError),
        replacing(out) as plain,
    ):
        with plain.open("w+b") as stream:
            kept = _Kept(stream)
            near = NearDuplicates(settings.duplicates, kept.text) if settings.duplicates.permutations else None
            for found in read_sources(paths, settings.records, jobs=jobs):
                document, problem = filters.judge(found)
                problem = problem or filters.compare(document, kept, near)
                if problem is None:
                    kept.add(document, filters)
                else:
                    aside_stream.write(_line(_as_row(problem)))
                    first = first or problem
                counts.add(document, problem)
                if watch is not None and counts.read % 100 == 0:
                    watch(counts.read, counts.kept)
        if not counts.read:
            raise InputError(f"there are no documents in {', '.join(map(str, paths))}")
        if not counts.kept:
            raise _NothingLeftError
        if out.suffix == ".gz":
            # Without a time, so that the same corpus has the same bytes.
            plain.write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
    if not counts.kept:
        assert first is not None
        raise InputError(
            f"none of {counts.read} documents is left ({counts.shown()}); the first, {first.id}: {first.reason}; "
            f"{rejected} says why, one by one"
        )
    report = counts.report(settings, paths, filters)
    write_json(f"{out}.report.json", report.as_json())
    write_text(f"{out}.md", data_card(report, out.name))
    return report


class _NothingLeftError(Exception):
    """Leaves no empty corpus behind."""


def _check_out(out: Path, sources: Sequence[Path]) -> None:
    if not re.search(r"\.(jsonl|ndjson)(\.gz)?$", out.name):
        raise InputError(f"--out must end with .jsonl or .jsonl.gz, got {out}")
    for source in sources:
        place = source.resolve()
        if out.resolve() == place or (source.is_dir() and place in out.resolve().parents):
            raise InputError(
                f"--out {out} lies inside the source {source}, and would be read again; choose another place"
            )


class _Filters:
    """The rules of a domain, ready to judge documents."""

    def __init__(self, domain: Domain, relevance: Callable[[str], float] | None):
        self.domain = domain
        self.sections = re.compile("|".join(f"(?:{p})" for p in domain.sections.drop) or r"(?!)")
        self.keywords = KeywordFinder(domain.keywords.terms)
        self.relevance: Any = relevance
        self.is_given = relevance is not None
        if relevance is None and domain.relevance.labelled is not None:
            self.relevance = BagOfWordsClassifier.from_file(
                domain.relevance.labelled,
                text_field=domain.relevance.text_field,
                label_field=domain.relevance.label_field,
            )
        self.questions: list[Question] = []
        for path in domain.contamination.questions:
            self.questions += read_questions(path).questions
        self.contamination = Contamination(((q.question, q.answer) for q in self.questions), domain.contamination.ngram)
        self.sources = {q.id for q in self.questions if q.id} if domain.contamination.drop_sources else set()
        self.terms: Counter[str] = Counter()
        self.scores: dict[str, float] = {}

    def judge(self, found: SourceDocument | SetAside) -> tuple[SourceDocument, SetAside | None]:
        """The document without unwanted sections, and why it goes, judged by itself."""
        if isinstance(found, SetAside):
            return SourceDocument(found.id, "", found.category, files=0), found
        text = without_sections(found.text, self.sections)
        document = dataclasses.replace(found, text=text)
        step, reason = "quality", quality_problem(text, self.domain.quality)
        if reason is None:
            step, reason = "keywords", self._keyword_problem(text)
        if reason is None:
            step, reason = "relevance", self._relevance_problem(document)
        return document, None if reason is None else _aside(document, step, reason)

    def _keyword_problem(self, text: str) -> str | None:
        rules = self.domain.keywords
        if not self.keywords.terms:
            return None
        terms = self.keywords.find(text)
        if len(terms) < rules.minimum:
            named = f": {', '.join(terms)}" if terms else ""
            return f"fewer than {rules.minimum} different terms ({len(terms)}{named})"
        share = 1000 * sum(terms.values()) / max(1, len(text.split()))
        if share < rules.per_thousand:
            return f"fewer than {rules.per_thousand:g} terms in 1,000 words ({share:.1f})"
        return None

    def _relevance_problem(self, document: SourceDocument) -> str | None:
        if self.relevance is None:
            return None
        score = float(self.relevance(document.text))
        if not 0 <= score <= 1:
            raise InputError(f"relevance must give a score between 0 and 1, got {score} for {document.id}")
        self.scores[document.id] = score
        threshold = self.domain.relevance.threshold
        return f"score below {threshold:g} ({score:.3f})" if score < threshold else None

    def compare(self, document: SourceDocument, kept: _Kept, near: NearDuplicates | None) -> SetAside | None:
        """Why a document goes that is good in itself."""
        if (same := kept.digests.get(content_digest(document.text))) is not None:
            return _aside(document, "exact duplicates", f"the same words as: {kept.ids[same]}")
        if near is not None and (found := near.find(document.text)) is not None:
            return _aside(
                document, "near duplicates", f"nearly the same as: {kept.ids[found[0]]} (Jaccard {found[1]:.3f})"
            )
        if document.id in self.sources:
            return _aside(document, "contamination", "evaluation questions were made from it")
        if words := self.contamination.find(document.text):
            return _aside(document, "contamination", f"holds an evaluation question ({words!r})")
        if near is not None:
            near.add(len(kept.ids), document.text)
        return None


def _as_row(problem: SetAside) -> dict[str, str]:
    row = {"id": problem.id, "step": problem.step, "reason": problem.reason}
    return {**row, "category": problem.category, "text": problem.text}


def _aside(document: SourceDocument, step: str, reason: str) -> SetAside:
    return SetAside(document.id, step, reason, document.category, document.text)


class _Kept:
    """The corpus on disk, and where each of its texts begins."""

    def __init__(self, stream: Any):
        self.stream = stream
        self.ids: list[str] = []
        self.digests: dict[bytes, int] = {}
        self._places: list[int] = []
        self._end = 0

    def add(self, document: SourceDocument, filters: _Filters) -> None:
        row: dict[str, Any] = {"id": document.id, "category": document.category, "kind": document.kind}
        if document.id in filters.scores:
            row["relevance"] = round(filters.scores.pop(document.id), 4)
        line = _line({**row, "text": document.text}).encode()
        self.stream.write(line)
        self.digests[content_digest(document.text)] = len(self.ids)
        self.ids.append(document.id)
        self._places.append(self._end)
        self._end += len(line)
        filters.terms.update(filters.keywords.find(document.text))

    def text(self, index: int) -> str:
        """The text of an earlier document."""
        self.stream.seek(self._places[index])
        row = json.loads(self.stream.readline())
        self.stream.seek(0, os.SEEK_END)
        return str(row["text"])


def _line(row: dict[str, Any]) -> str:
    # What has no UTF-8 form (half of a surrogate pair) becomes a question mark.
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "replace").decode() + "\n"


@dataclass(slots=True)
class _Counts:
    read: int = 0
    kept: int = 0
    files: int = 0
    gone: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, Counter[str]] = field(default_factory=dict)
    kinds: Counter[str] = field(default_factory=Counter)
    categories: dict[str, list[int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, document: SourceDocument, problem: SetAside | None) -> None:
        self.read += 1
        self.notes += [f"{document.id}: {note}" for note in document.notes]
        if problem is not None:
            self.gone[problem.step] += 1
            # Without what belongs to the one document alone.
            kind = re.split(r" \(|: | at byte ", problem.reason, maxsplit=1)[0]
            self.reasons.setdefault(problem.step, Counter())[kind] += 1
            return
        self.kept += 1
        self.files += document.files
        self.kinds[document.kind] += 1
        row = self.categories.setdefault(document.category, [0, 0, 0])
        for place, more in enumerate((1, len(document.text.split()), len(document.text))):
            row[place] += more

    def shown(self) -> str:
        return ", ".join(f"{self.gone[step]} by {step}" for step in STEPS if self.gone[step]) or "there were none"

    def report(self, domain: Domain, sources: Sequence[Path], filters: _Filters) -> CurationReport:
        left, steps = self.read, []
        for step in _active(domain, filters):
            reasons = tuple(sorted(self.reasons.get(step, Counter()).items(), key=lambda item: (-item[1], item[0])))
            steps.append(StepCount(step, left, left - self.gone[step], reasons))
            left -= self.gone[step]
        return CurationReport(
            domain=domain,
            sources=tuple(path.as_posix() for path in sources),
            steps=tuple(steps),
            categories=tuple(CategoryCount(name, *row) for name, row in sorted(self.categories.items())),
            kinds=dict(sorted(self.kinds.items())),
            files=self.files,
            terms=tuple(filters.terms.most_common(20)),
            questions=len(filters.questions),
            classifier=_classifier(filters),
            notes=tuple(self.notes),
        )


def _active(domain: Domain, filters: _Filters) -> Iterator[str]:
    off = {
        "keywords": not filters.keywords.terms,
        "relevance": filters.relevance is None,
        "near duplicates": not domain.duplicates.permutations,
        "contamination": not filters.questions,
    }
    yield from (step for step in STEPS if not off.get(step, False))


def _classifier(filters: _Filters) -> str:
    if filters.is_given:
        return "a function of the user's"
    if filters.relevance is None:
        return ""
    accuracy = filters.relevance.accuracy
    judged = (
        "too few to cross-validate" if accuracy is None else f"balanced accuracy {accuracy:.3f} by cross-validation"
    )
    return f"a bag of words trained on {filters.relevance.texts} labelled texts ({judged})"
