"""Files of many kinds as documents, or as what is set aside, in an order that does not depend on the machine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from lossmith.errors import InputError

from ..corpus import corpus_files, existing_path
from ..formats import Fields, opened, read_csv, read_json, read_jsonl, read_parquet, reader_of
from .decoding import Unreadable, decoded
from .domain import Records
from .latex_macros import expand_macros
from .latex_project import check_braces, document_files, read_latex, without_comments
from .latex_text import latex_text
from .markup import html_text, markdown_text, pdf_text, plain_text

KINDS = {
    ".tex": "latex", ".ltx": "latex", ".md": "markdown", ".markdown": "markdown", ".html": "html", ".htm": "html",
    ".xhtml": "html", ".pdf": "pdf",
}  # fmt: skip
# Beside documents, but none.
_NO_DOCUMENTS = {
    ".aux", ".bbl", ".bib", ".blg", ".bst", ".cfg", ".class", ".clo", ".cls", ".css", ".dtd",
    ".ini", ".js", ".lock", ".log", ".map", ".out", ".sty", ".svg", ".toc", ".toml", ".xml", ".yaml", ".yml",
}  # fmt: skip
_ARCHIVES = {".7z", ".rar", ".tar", ".tgz", ".zip"}
_PACKED = {".gz", ".bz2", ".xz", ".zst"}
_TABLES = {read_jsonl, read_json, read_csv, read_parquet}


@dataclass(frozen=True, slots=True)
class SourceDocument:
    """A document as it was found, its text clean but not judged.

    Attributes:
        id: names it: its path within the sources, and the line or row where there are several in a file.
        text: clean text.
        category: its record's, else the folder that it is in.
        kind: ``latex``, ``markdown``, ``html``, ``pdf``, ``plain`` or ``record``.
        files: how many files it was made of.
        notes: what was not found, such as files that LaTeX includes.
    """

    id: str
    text: str
    category: str = ""
    kind: str = "plain"
    files: int = 1
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SetAside:
    """What is not in the corpus, and why: ``step`` names the rule, ``reason`` is a sentence."""

    id: str
    step: str
    reason: str
    category: str = ""
    text: str = ""


class _Task(NamedTuple):
    """One file to be read, in this process or another."""

    path: Path
    root: Path
    id: str
    category: str
    kind: str


def read_sources(
    sources: Sequence[str | os.PathLike[str]], records: Records = Records(), *, jobs: int = 1
) -> Iterator[SourceDocument | SetAside]:
    """Every document of files and folders, in sorted order; whatever is none comes with its reason.

    ==================================== ==============================================================================
    ``.tex``                             a project: each file that no other includes, with all that it includes
    ``.md``, ``.html``, ``.pdf``         text without markup and boilerplate
    ``.jsonl``, ``.json``, ``.csv``,     a document per record; see ``records``
    ``.tsv``, ``.parquet``
    others                               plain text, if they are text
    ==================================== ==============================================================================

    Args:
        sources: files and folders; folders are read with all that is in them but hidden files. All but Parquet and PDF
            may be compressed (``.gz``, ``.bz2``, ``.xz``, ``.zst``).
        records: where records hold the text and the category.
        jobs: processes that read side by side; the order stays.

    Raises:
        InputError: no such source, the same one twice, or a missing package.

    >>> import tempfile; folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "a.md").write_text("# A *title*"), (folder / "b.bin").write_bytes(bytes(9))
    >>> for found in read_sources([folder]):
    ...     print(found.id, "|", getattr(found, "reason", "") or found.text)
    a.md | # A title
    b.bin | binary file (zero bytes)
    """
    if jobs < 1:
        raise InputError(f"--jobs must be at least 1, got {jobs}")
    paths = check_sources(sources)
    tasks = (task for path in paths for task in _tasks(path, several=len(paths) > 1))
    if jobs == 1:
        for task in tasks:
            yield from _read(task, records)
        return
    # Spawned, since torch's threads do not survive a fork; a bounded number of files is under way.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        waiting: list[tuple[_Task, Future[list[SourceDocument | SetAside]] | None]] = []
        for task in tasks:
            is_table = task.kind == "records"
            waiting.append((task, None if is_table else pool.submit(_read_whole, task, records)))
            while len(waiting) > 8 * jobs:
                yield from _finished(waiting.pop(0), records)
        for entry in waiting:
            yield from _finished(entry, records)


def _finished(
    entry: tuple[_Task, Future[list[SourceDocument | SetAside]] | None], records: Records
) -> Iterator[SourceDocument | SetAside]:
    task, future = entry
    # A table may be larger than memory: it is read here, as a stream.
    yield from future.result() if future is not None else _read(task, records)


def _read_whole(task: _Task, records: Records) -> list[SourceDocument | SetAside]:
    return list(_read(task, records))


def check_sources(sources: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The paths of sources.

    Raises:
        InputError: no source, none of that name, or the same one twice.
    """
    paths: list[Path] = []
    if not sources:
        raise InputError("there are no sources: give files or folders")
    for source in sources:
        path = existing_path(Path(source))
        assert path is not None
        if any(path.resolve() == other.resolve() for other in paths):
            raise InputError(f"the source {source} is given twice")
        paths.append(path)
    return paths


def _tasks(source: Path, *, several: bool) -> Iterator[_Task]:
    files = corpus_files(source)
    root = source if source.is_dir() else source.parent
    inside = [file.relative_to(root).parts for file in files]
    folders = {parts[0] for parts in inside if len(parts) > 1}
    latex = [file for file in files if file.suffix.lower() in (".tex", ".ltx")]
    documents = set(document_files(latex, root))
    for file, parts in zip(files, inside, strict=True):
        kind = _kind(file)
        if kind == "latex" and file not in documents:
            continue  # a part of another one
        category = parts[0] if len(parts) > 1 and len(folders) > 1 else ""
        if several and not category:
            category = source.stem if source.is_file() else source.name
        prefix = f"{source.as_posix()}/" if several and source.is_dir() else ""
        name = prefix + "/".join(parts) if source.is_dir() or not several else source.as_posix()
        yield _Task(file, root, name, category, kind)


def _kind(file: Path) -> str:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    last = suffixes[-1] if suffixes else ""
    if last in _ARCHIVES or suffixes[-2:-1] == [".tar"]:
        return "archive"
    if reader_of(file) in _TABLES:
        return "records"
    if last in _PACKED and len(suffixes) > 1:
        last = suffixes[-2]
    return "none" if last in _NO_DOCUMENTS else KINDS.get(last, "plain")


def _read(task: _Task, records: Records) -> Iterator[SourceDocument | SetAside]:
    if task.kind == "records":
        yield from _read_records(task, records)
        return
    try:
        if task.kind == "archive":
            raise Unreadable("an archive; unpack it first")
        if task.kind == "none":
            raise Unreadable(f"no document ({task.path.suffix})")
        document = _document(task)
        if not document.text:
            raise Unreadable("empty")
    except Unreadable as problem:
        yield SetAside(task.id, "read", str(problem), task.category)
    except RecursionError:
        name = {"latex": "LaTeX", "html": "HTML"}.get(task.kind, task.kind)
        yield SetAside(task.id, "read", f"{name} does not parse: nested too deeply", task.category)
    else:
        yield document


def _document(task: _Task) -> SourceDocument:
    if task.kind == "latex":
        try:
            source = read_latex(task.path, task.root)
        except OSError as error:
            raise Unreadable(f"cannot be read ({error.strerror})") from None
        notes = tuple(f"{name} is not there" for name in source.missing)
        text = latex_text(expand_macros(source.text))
        return SourceDocument(task.id, text, task.category, task.kind, len(source.files), notes)
    try:
        with opened(task.path) as stream:
            data = stream.read()
    except InputError as error:
        raise Unreadable(str(error).removeprefix(f"{task.path}: ")) from None
    if task.kind == "pdf":
        text = pdf_text(data)
    elif task.kind == "html":
        text = html_text(data)
    else:
        text = {"markdown": markdown_text, "plain": plain_text}[task.kind](decoded(data))
    return SourceDocument(task.id, text, task.category, task.kind)


def _read_records(task: _Task, records: Records) -> Iterator[SourceDocument | SetAside]:
    ids = _ids(task, records)
    number = 0
    try:
        for number, record in enumerate(reader_of(task.path)(task.path, "", Fields(records.text, records.category)), 1):
            name = next(ids) if records.id else f"{task.id}:{number}"
            category = record.domain or task.category
            try:
                text = _formatted(record.text, records.format, name)
                if not text:
                    raise Unreadable("empty")
            except Unreadable as problem:
                yield SetAside(name, "read", str(problem), category, record.text)
            else:
                yield SourceDocument(name, text, category, "record")
    except InputError as problem:
        # The rest of a table cannot be found again: the reason says where it ends.
        rest = f"{problem}; {number} documents before it were read"
        yield SetAside(f"{task.id}:{number + 1}-", "read", rest, task.category)


def _ids(task: _Task, records: Records) -> Iterator[str]:
    if records.id:
        for number, record in enumerate(reader_of(task.path)(task.path, "", Fields(records.text, records.id)), 1):
            yield record.domain or f"{task.id}:{number}"


def _formatted(text: str, kind: str, name: str) -> str:
    if kind == "latex":
        check_braces(text, name)
        return latex_text(expand_macros(without_comments(text)))
    if kind == "html":
        return html_text(text.encode())
    return {"markdown": markdown_text, "plain": plain_text}[kind](text)
