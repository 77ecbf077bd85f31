"""What belongs to a domain, and what a document must be like: one YAML file, checked key by key."""

from __future__ import annotations

import os
import re
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lossmith.errors import InputError, did_you_mean
from lossmith.files import read_utf8


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Keywords(_Part):
    """A document must name so many different terms, and so many in 1,000 words."""

    terms: tuple[str, ...] = ()
    minimum: int = Field(default=1, ge=0)
    per_thousand: float = Field(default=0.0, ge=0)

    @field_validator("terms")
    @classmethod
    def _not_blank(cls, terms: tuple[str, ...]) -> tuple[str, ...]:
        for term in terms:
            if not term.strip(" *"):
                raise ValueError("a term must not be blank")
        return terms


class Relevance(_Part):
    """A document's score under a classifier must reach ``threshold``.

    ``labelled`` is a file of documents with labels (1 or true: of the domain) from which a bag-of-words classifier is
    trained; relative paths start at the YAML file.
    """

    labelled: Path | None = None
    text_field: str = "text"
    label_field: str = "label"
    threshold: float = Field(default=0.5, ge=0, le=1)


class Sections(_Part):
    """Sections that go, by their heading: regular expressions of the whole heading in lower case, without number."""

    drop: tuple[str, ...] = (
        r"references?( and notes)?", "bibliography", "works cited", "further reading", "external links?", "see also",
        "notes", r"table of contents|contents", "list of (figures|tables|acronyms)", r"change (history|log)",
        r"acknowled?ge?ments?", r"author(s'?)? (contributions?|addresses)", "navigation( menu)?",
    )  # fmt: skip

    @field_validator("drop")
    @classmethod
    def _compiles(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression ({error})") from None
        return patterns


class Quality(_Part):
    """Rules of text, after C4, Gopher and their successors; ``null`` leaves a rule out."""

    minimum_words: int | None = Field(default=50, ge=1)
    maximum_words: int | None = Field(default=None, ge=1)
    mean_word_length: tuple[float, float] | None = (2.5, 12.0)
    minimum_letters: float | None = Field(default=0.6, ge=0, le=1)
    maximum_repeated_lines: float | None = Field(default=0.3, ge=0, le=1)
    maximum_repeated_words: float | None = Field(default=0.3, ge=0, le=1)
    forbidden: tuple[str, ...] = ("lorem ipsum",)

    @model_validator(mode="after")
    def _ordered(self) -> Quality:
        if self.minimum_words and self.maximum_words and self.minimum_words > self.maximum_words:
            raise ValueError(f"maximum_words {self.maximum_words} is less than minimum_words {self.minimum_words}")
        low, high = self.mean_word_length or (0, 1)
        if not 0 <= low < high:
            raise ValueError(f"mean_word_length must be two numbers, the second larger, got {low} and {high}")
        return self


class Duplicates(_Part):
    """Documents whose sets of ``shingle`` consecutive words overlap by ``similarity`` (Jaccard) or more are kept once.

    ``permutations=0`` drops exact duplicates only.
    """

    shingle: int = Field(default=5, ge=1)
    permutations: int = Field(default=128, ge=0)
    similarity: float = Field(default=0.8, gt=0, le=1)


class Contamination(_Part):
    """Documents that hold ``ngram`` consecutive words of an evaluation question, or of its answer, go.

    ``questions`` are files of questions; ``drop_sources`` also drops the documents that questions were made from.
    """

    questions: tuple[Path, ...] = ()
    ngram: int = Field(default=13, ge=3)
    drop_sources: bool = False


class Records(_Part):
    """Where JSONL, CSV and Parquet files hold the text and the category, and what the text is."""

    text: str = "text"
    category: str | None = None
    id: str | None = None
    format: str = "plain"

    @field_validator("format")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in ("plain", "markdown", "html", "latex"):
            raise ValueError(did_you_mean(name, ("plain", "markdown", "html", "latex")))
        return name


class Domain(_Part):
    """Everything that decides how a corpus is curated; see :func:`load_domain`."""

    name: str = "domain"
    description: str = ""
    keywords: Keywords = Keywords()
    relevance: Relevance = Relevance()
    sections: Sections = Sections()
    quality: Quality = Quality()
    duplicates: Duplicates = Duplicates()
    contamination: Contamination = Contamination()
    records: Records = Records()


def built_in_domains() -> list[str]:
    """Names of the configurations that come with the package."""
    folder = resources.files(__package__) / "domains"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def load_domain(source: str | os.PathLike[str] | None = None) -> Domain:
    """A configuration from a YAML file, or one that comes with the package, by its name.

    Args:
        source: path of a YAML file, or a name (``telecom``); ``None`` is the default: every text of quality, without
            keywords.

    Raises:
        InputError: no such file or name, not YAML, an unknown key (names the nearest one) or a value that is not
            allowed (names the key).

    >>> load_domain("telecom").keywords.minimum
    2
    """
    if source is None:
        return Domain()
    path = Path(source).expanduser()
    if str(source) in built_in_domains() and not path.exists():
        text = (resources.files(__package__) / "domains" / f"{source}.yaml").read_text(encoding="utf-8")
        return make_domain(text, str(source), Path())
    if not path.is_file() and path.suffix not in (".yaml", ".yml"):
        raise InputError(f"--domain {source}: no such file; built in: {', '.join(built_in_domains())}")
    return make_domain(read_utf8(path, "domain file"), str(path), path.parent)


def make_domain(text: str, name: str, folder: Path) -> Domain:
    """A configuration from YAML text; relative paths in it start at ``folder``.

    Raises:
        InputError: as :func:`load_domain`.
    """
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        place = getattr(error, "problem_mark", None)
        where = f":{place.line + 1}" if place else ""
        raise InputError(f"{name}{where}: not YAML ({getattr(error, 'problem', error)})") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise InputError(f"{name}: must be a mapping with keys such as {', '.join(Domain.model_fields)}")
    try:
        domain = Domain(**{str(key): value for key, value in values.items()})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        if first["type"] == "extra_forbidden":
            raise InputError(f"{name}: unknown key '{key}': {_nearest(first['loc'])}") from None
        message = first["msg"].removeprefix("Value error, ")
        shown = "" if first["msg"].startswith("Value error") else f", got {first['input']!r}"
        raise InputError(f"{name}: {key}: {message[0].lower()}{message[1:]}{shown}") from None
    return _resolved(domain, folder)


def _nearest(location: tuple[int | str, ...]) -> str:
    model: Any = Domain
    for part in location[:-1]:
        model = model.model_fields[str(part)].annotation
    return did_you_mean(str(location[-1]), model.model_fields)


def _resolved(domain: Domain, folder: Path) -> Domain:
    """The same with paths that start at the file's folder."""
    labelled = domain.relevance.labelled
    relevance = domain.relevance.model_copy(update={"labelled": folder / labelled if labelled else None})
    questions = tuple(folder / path for path in domain.contamination.questions)
    contamination = domain.contamination.model_copy(update={"questions": questions})
    return domain.model_copy(update={"relevance": relevance, "contamination": contamination})
