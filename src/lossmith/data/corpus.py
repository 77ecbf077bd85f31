"""Corpora from wherever they lie: the running Python, files, folders, saved data sets, the hub."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import InputError
from .formats import Document, Fields, reader_of, reason
from .hub import is_hub_id, read_hub
from .python_corpus import python_corpus_key, read_python_corpus

_SAVED_DATASET, _SAVED_DATASETS = "state.json", "dataset_dict.json"


def read_corpus(
    source: str | os.PathLike[str], *, text_field: str = "text", domain_field: str | None = None
) -> Iterator[Document]:
    """Stream the documents of a corpus, in a fixed order, without ever holding the corpus.

    Args:
        source: one of

            - ``"python"``: the standard library of the running interpreter
              (:func:`~lossmith.data.read_python_corpus`); a folder of that name is ``"./python"``;
            - a file: ``.jsonl``, ``.ndjson``, ``.json`` (a list of objects), ``.csv``, ``.tsv``,
              ``.parquet``; anything else is read as UTF-8 text and cut into passages of about 4,000
              characters at blank lines. All but Parquet may be compressed (``.gz``, ``.bz2``, ``.xz``,
              ``.zst``);
            - a folder: all its files that are not hidden, recursively, in sorted order. Where there are
              several sub-folders, the name of the first one on the way to a file is its domain;
            - a folder written by ``datasets.save_to_disk`` (of a ``DatasetDict``, the split ``train``);
            - a string ``owner/name[:config[:split]]`` where no such path exists: a data set of the Hugging
              Face hub.
        text_field: the field or column that holds the text, where there are fields.
        domain_field: the field or column that names the domain, where there are fields.

    Yields:
        Documents that are not blank.

    Raises:
        lossmith.errors.InputError: at once where the source does not exist, and while reading where a file
            is not UTF-8 (with the byte's offset), a line is not JSON or has no text (with the line), a
            column is missing, a compressed file is cut short. A corpus without any text raises when it is
            exhausted.

    >>> import tempfile, pathlib
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "two.jsonl"
    >>> _ = path.write_text('{"text": "one", "kind": "a"}\\n{"text": "two", "kind": "b"}\\n')
    >>> [(d.text, d.domain) for d in read_corpus(path, domain_field="kind")]
    [('one', 'a'), ('two', 'b')]
    """
    fields = Fields(text_field, domain_field)
    if source == "python":
        return _not_blank(read_python_corpus(), "python")
    path = existing_path(source)
    if path is None:
        return _not_blank(read_hub(str(source), fields), str(source))
    return _not_blank(_read_path(path, fields), str(source))


def content_key(source: str | os.PathLike[str]) -> str | None:
    """A hash of what a corpus is read from, without parsing; ``None`` where only reading can tell (hub)."""
    if source == "python":
        return python_corpus_key()
    path = existing_path(source)
    if path is None:
        return None
    digest = hashlib.blake2b(digest_size=16)
    for file in corpus_files(path):
        name = file.relative_to(path).as_posix() if path.is_dir() else "".join(file.suffixes)
        digest.update(name.encode("utf-8", "surrogateescape") + b"\0")
        try:
            with open(file, "rb") as stream:
                digest.update(hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).digest())
        except OSError as error:
            raise InputError(f"{file}: cannot be read ({reason(error)})") from None
    return digest.hexdigest()


def existing_path(source: str | os.PathLike[str]) -> Path | None:
    """The path that ``source`` names, or ``None`` for a hub id; raises where it can be neither."""
    text = os.fspath(source)
    if not text:
        raise InputError("data: expected a path, a hub id or 'python', got an empty string")
    path = Path(text).expanduser()
    try:
        if path.exists():
            return path
    except (OSError, ValueError) as error:
        raise InputError(f"data: {text!r} cannot be opened ({reason(error)})") from None
    # 'corpora/new' next to a folder 'corpora' is a mistyped path, not somebody's data set.
    if isinstance(source, str) and is_hub_id(source) and not path.parent.is_dir():
        return None
    raise InputError(f"data: there is no file or folder {text!r} (give a path, a hub id owner/name, or 'python')")


def _not_blank(documents: Iterator[Document], source: str) -> Iterator[Document]:
    found = False
    for document in documents:
        if document.text and not document.text.isspace():
            found = True
            yield document
    if not found:
        raise InputError(f"{source}: the corpus is empty (no text but white space was found)")


def _read_path(path: Path, fields: Fields) -> Iterator[Document]:
    if path.is_dir() and (_is_saved(path) or (path / _SAVED_DATASETS).is_file()):
        yield from _read_saved(path, fields)
        return
    files = corpus_files(path)
    top_folders = {file.relative_to(path).parts[0] for file in files if len(file.relative_to(path).parts) > 1}
    for file in files:
        parts = file.relative_to(path).parts
        domain = parts[0] if len(parts) > 1 and len(top_folders) > 1 else ""
        yield from reader_of(file)(file, domain, fields)


def corpus_files(path: Path) -> list[Path]:
    """A folder's files, in an order that does not depend on the file system; links are followed."""
    if not path.is_dir():
        if not path.is_file():
            raise InputError(f"{path}: expected a regular file or a folder")
        return [path]
    files: list[Path] = []
    seen: set[str] = set()

    def complain(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read ({reason(error)})") from None

    for folder, folders, names in os.walk(path, followlinks=True, onerror=complain):
        real = os.path.realpath(folder)
        folders[:] = [] if real in seen else [name for name in folders if not _hidden(name)]
        if real in seen:
            continue
        seen.add(real)
        files += [Path(folder, name) for name in names if not _hidden(name)]
    return sorted((file for file in files if file.is_file()), key=lambda file: file.relative_to(path).as_posix())


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"


def _is_saved(folder: Path) -> bool:
    return (folder / _SAVED_DATASET).is_file() and (folder / "dataset_info.json").is_file()


def _read_saved(path: Path, fields: Fields) -> Iterator[Document]:
    folder = path
    if not _is_saved(path):
        splits = sorted(child.name for child in path.iterdir() if _is_saved(child))
        if "train" in splits or len(splits) == 1:
            folder = path / ("train" if "train" in splits else splits[0])
        else:
            listing = ", ".join(splits) or "none"
            raise InputError(f"{path}: no split 'train' among the saved splits ({listing}); name one split's folder")
    import datasets

    try:
        table = datasets.load_from_disk(str(folder))
    except Exception as error:
        raise InputError(f"{folder}: not readable as a saved data set ({reason(error)})") from None
    assert isinstance(table, datasets.Dataset)
    fields.check_columns(table.column_names, str(folder))
    table = table.select_columns([fields.text] if fields.domain is None else [fields.text, fields.domain])
    for row, record in enumerate(table.with_format(None)):
        yield fields.document(record, f"{folder}, row {row + 1}", "", null_is_blank=True)
