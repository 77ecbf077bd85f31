"""What became of every document, as numbers and as a data card."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from .domain import Domain


@dataclass(frozen=True, slots=True)
class StepCount:
    """How many documents came to a step, how many it kept, and why the others went."""

    step: str
    given: int
    kept: int
    reasons: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class CategoryCount:
    """The size of a part of the corpus."""

    category: str
    documents: int
    words: int
    characters: int


@dataclass(frozen=True, slots=True)
class CurationReport:
    """What :func:`lossmith.data.curate` did.

    Attributes:
        domain: the settings.
        sources: what was read.
        steps: in their order.
        categories: of the corpus.
        kinds: documents by kind of source.
        files: that the kept documents were made of; LaTeX projects have several.
        terms: the most frequent terms of the domain, by documents.
        questions: evaluation questions that were looked for.
        classifier: what judged relevance.
        notes: what was not found, such as files that LaTeX includes.
    """

    domain: Domain
    sources: tuple[str, ...]
    steps: tuple[StepCount, ...]
    categories: tuple[CategoryCount, ...]
    kinds: dict[str, int]
    files: int
    terms: tuple[tuple[str, int], ...] = ()
    questions: int = 0
    classifier: str = ""
    notes: tuple[str, ...] = ()

    @property
    def documents(self) -> int:
        """In the corpus."""
        return sum(category.documents for category in self.categories)

    @property
    def rejected(self) -> dict[str, int]:
        """Documents that went, by step; steps that took none are left out."""
        return {step.step: step.given - step.kept for step in self.steps if step.given > step.kept}

    def summary(self) -> str:
        """A few lines: what went at each step, and why; what is left."""
        lines = [f"{self.steps[0].given} documents found"]
        for step in self.steps:
            lines.append(f"  {step.step:<17}{step.given:>8} -> {step.kept:<8}")
            lines += [f"    {count:>6}  {reason}" for reason, count in step.reasons[:5]]
            if len(step.reasons) > 5:
                lines.append(f"    {sum(count for _, count in step.reasons[5:]):>6}  other reasons")
        words, characters = (sum(getattr(c, name) for c in self.categories) for name in ("words", "characters"))
        lines.append(f"{self.documents} documents kept: {words:,} words, {characters:,} characters")
        if len(self.categories) > 1:
            lines += [
                f"  {c.category or '(none)'}: {c.documents} documents, {c.words:,} words" for c in self.categories
            ]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """Everything, for machines."""
        return {
            "documents": self.documents,
            "sources": list(self.sources),
            "steps": [{**asdict(step), "reasons": dict(step.reasons)} for step in self.steps],
            "categories": [asdict(category) for category in self.categories],
            "kinds": self.kinds,
            "files": self.files,
            "terms": dict(self.terms),
            "questions": self.questions,
            "classifier": self.classifier,
            "notes": list(self.notes),
            "settings": json.loads(self.domain.model_dump_json()),
        }


def data_card(report: CurationReport, name: str) -> str:
    """A card in Markdown, with the front matter of the Hugging Face hub."""
    domain = report.domain
    words = sum(category.words for category in report.categories)
    lines = [
        "---",
        f"pretty_name: {json.dumps(domain.name)}",
        "configs:",
        f"- {{config_name: default, data_files: {json.dumps(name)}}}",
        "---",
        "",
        f"# {domain.name}",
        "",
        domain.description or f"Documents of the domain {domain.name}.",
        "",
        f"{report.documents} documents, {words:,} words. Fields: `id`, `category`, `kind`, `text`"
        + (", `relevance`." if report.classifier else "."),
        "",
        "## Sources",
        "",
        *(f"- `{source}`" for source in report.sources),
        "",
        "The licences of the sources are not recorded: check them before you share this corpus.",
        "",
        "| category | documents | words | characters |",
        "|---|---:|---:|---:|",
        *(
            f"| {_cell(c.category) or '(none)'} | {c.documents} | {c.words:,} | {c.characters:,} |"
            for c in report.categories
        ),
        "",
        "Kinds of source: " + ", ".join(f"{kind} {count}" for kind, count in report.kinds.items()) + ".",
        "",
        "## Curation",
        "",
        "| step | given | kept | why documents went |",
        "|---|---:|---:|---|",
        *(
            f"| {step.step} | {step.given} | {step.kept} | "
            + "; ".join(f"{_cell(reason)}: {count}" for reason, count in step.reasons)
            + " |"
            for step in report.steps
        ),
        "",
    ]
    if report.classifier:
        lines += [f"Relevance: {report.classifier}, threshold {domain.relevance.threshold:g}.", ""]
    if report.terms:
        lines += ["Most frequent terms: " + ", ".join(f"{term} ({count})" for term, count in report.terms) + ".", ""]
    lines += ["## Evaluation", "", _evaluation(report), ""]
    if report.notes:
        lines += ["## Not found", "", *(f"- {note}" for note in report.notes[:50])]
        lines += [f"- and {len(report.notes) - 50} more" if len(report.notes) > 50 else "", ""]
    lines += ["## Settings", "", "```json", domain.model_dump_json(indent=1), "```", ""]
    return "\n".join(lines)


def _evaluation(report: CurationReport) -> str:
    if not report.questions:
        return (
            "No evaluation questions were named. Questions made from these documents measure what a model recalls of "
            "them, not what it makes of documents it has not seen."
        )
    contamination = report.domain.contamination
    rest = "are left out too" if contamination.drop_sources else "are kept: such questions measure recall"
    return (
        f"Documents that hold one of {report.questions} evaluation questions ({contamination.ngram} consecutive words) "
        f"are left out. Documents from which questions were made {rest}."
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
