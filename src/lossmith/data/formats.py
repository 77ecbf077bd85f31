"""One file of text, JSONL, JSON, CSV or Parquet as a stream of documents; errors name the place."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..errors import InputError
from .passages import passages


@dataclass(frozen=True, slots=True)
class Document:
    """One text of a corpus.

    Attributes:
        text: the text itself.
        domain: name of the part of the corpus that it belongs to; empty where there are no parts.
        source: where it came from (``file:line`` or a module), for messages.
    """

    text: str
    domain: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True)
class Fields:
    """Which fields (columns) of a record hold the text and, optionally, the name of its domain."""

    text: str = "text"
    domain: str | None = None

    def document(self, record: Mapping[str, Any], place: str, domain: str, null_is_blank: bool = False) -> Document:
        """The document in ``record``; ``place`` (``file:line``) begins the sentence if there is none."""
        text = self._value(record, self.text, "text_field", place)
        if text is None and null_is_blank:
            text = ""
        if not isinstance(text, str):
            raise InputError(f"{place}: the field {self.text!r} must be a string, got {_kind(text)}")
        if self.domain is not None:
            value = self._value(record, self.domain, "domain_field", place)
            if isinstance(value, (dict, list)):
                raise InputError(f"{place}: the domain {self.domain!r} must be a string or number, got {_kind(value)}")
            domain = "" if value is None else str(value)
        return Document(_well_formed(text), _well_formed(domain), place)

    def check_columns(self, names: list[str], place: str) -> None:
        """Raise unless the columns ``names`` of a table hold the fields."""
        record: dict[str, Any] = dict.fromkeys(names)
        for name in (self.text, self.domain):
            head, dot, _ = (name or "").partition(".")
            if dot and name not in record and head in record:
                record[str(name)] = None  # inside a nested column, which only a row can show
        self._value(record, self.text, "text_field", place)
        if self.domain is not None:
            self._value(record, self.domain, "domain_field", place)

    @staticmethod
    def _value(record: Mapping[str, Any], name: str, argument: str, place: str) -> Any:
        head, dot, rest = name.partition(".")
        if dot and name not in record and isinstance(record.get(head), Mapping):
            # "meta.source" is the field "source" of the record in the field "meta".
            return Fields._value(record[head], rest, argument, place)
        if name not in record:
            there = [str(key) for key in record]
            listing = ", ".join(there[:20]) + (", ..." if len(there) > 20 else "") if there else "no fields at all"
            raise InputError(f"{place}: there is no field {name!r} ({argument}), only: {listing}")
        return record[name]


Reader = Callable[[Path, str, Fields], Iterator[Document]]


def read_text(path: Path, domain: str, _fields: Fields) -> Iterator[Document]:
    """Passages of a UTF-8 text file; a file only a little longer than a passage stays one document."""
    with opened(path) as stream:
        for passage in passages(_decoded(stream, path)):
            yield Document(passage.text, domain, f"{path}:{passage.line}")


def read_jsonl(path: Path, domain: str, fields: Fields) -> Iterator[Document]:
    """One JSON object per line; blank lines are skipped."""
    with opened(path) as stream:
        for number, line in enumerate(_decoded_lines(stream, path), start=1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{place}: the line is not JSON ({error.msg} at column {error.colno})") from None
            except RecursionError:
                raise InputError(f"{place}: the line is not usable JSON (nested too deeply)") from None
            except ValueError as error:  # an integer of more digits than Python converts
                raise InputError(f"{place}: the line is not usable JSON ({error})") from None
            if not isinstance(record, dict):
                raise InputError(f"{place}: the line must be a JSON object, got {_kind(record)}")
            yield fields.document(record, place, domain)


def read_json(path: Path, domain: str, fields: Fields) -> Iterator[Document]:
    """A JSON list of objects. The file is read whole: prefer JSONL for a large corpus."""
    with opened(path) as stream:
        text = "".join(_decoded(stream, path))
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno})") from None
    except (RecursionError, ValueError) as error:
        raise InputError(f"{path}: not usable JSON ({str(error) or 'nested too deeply'})") from None
    if not isinstance(records, list):
        raise InputError(f"{path}: must hold a JSON list of objects, got {_kind(records)}")
    for number, record in enumerate(records, start=1):
        place = f"{path}, item {number}"
        if not isinstance(record, dict):
            raise InputError(f"{place}: must be a JSON object, got {_kind(record)}")
        yield fields.document(record, place, domain)


def read_csv(path: Path, domain: str, fields: Fields) -> Iterator[Document]:
    """A table with a header, comma-separated (``.csv``) or tab-separated (``.tsv``), quoted as Excel does."""
    csv.field_size_limit(2**31 - 1)  # the default of 128 kB is shorter than many documents
    tabs = ".tsv" in path.suffixes or ".tab" in path.suffixes
    with opened(path) as stream:
        rows = csv.reader(_decoded_lines(stream, path), delimiter="\t" if tabs else ",")
        try:
            header = next(rows, None)
            if header is None:
                return
            fields.check_columns(header, f"{path}:1")
            for row in rows:
                if row:
                    place = f"{path}:{rows.line_num}"
                    yield fields.document(dict(zip(header, row, strict=False)), place, domain)
        except csv.Error as error:
            raise InputError(f"{path}:{rows.line_num}: not readable as a table ({error})") from None


def read_parquet(path: Path, domain: str, fields: Fields) -> Iterator[Document]:
    """The text column of a Parquet file, in small batches; a null counts as blank."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            fields.check_columns(file.schema_arrow.names, str(path))
            wanted = [fields.text] if fields.domain is None else [fields.text, fields.domain]
            columns = [n if n in file.schema_arrow.names else n.partition(".")[0] for n in wanted]
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=columns):
                for record in batch.to_pylist():
                    row += 1
                    yield fields.document(record, f"{path}, row {row}", domain, null_is_blank=True)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not readable as Parquet ({reason(error)})") from None


_READERS: dict[str, Reader] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".tab": read_csv,
    ".parquet": read_parquet,
    ".pq": read_parquet,
}


def _open_plain(path: Path) -> BinaryIO:
    return open(path, "rb")


def _open_zstandard(path: Path) -> BinaryIO:
    import pyarrow as pa

    return cast(BinaryIO, io.BufferedReader(pa.input_stream(str(path), compression="zstd")))


_COMPRESSIONS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstandard,
}


def reader_of(path: Path) -> Reader:
    """The reader for a file's name: anything that is no known table or record format is read as text."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
    return _READERS.get(suffixes[-1], read_text) if suffixes else read_text


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed if its name says so; failures of reading become one sentence."""
    opener = _COMPRESSIONS.get(path.suffix.lower(), _open_plain)
    try:
        with opener(path) as stream:
            yield stream
    except EOFError:
        raise InputError(f"{path}: the compressed file is cut short") from None
    except (OSError, zlib.error, lzma.LZMAError) as error:
        raise InputError(f"{path}: cannot be read ({reason(error)})") from None


def _decoded(stream: BinaryIO, path: Path, size: int = 1 << 16) -> Iterator[str]:
    """The text in pieces, without byte order mark, every line end as one newline."""
    decoder = io.IncrementalNewlineDecoder(_Utf8(path), translate=True)
    while chunk := stream.read(size):
        yield decoder.decode(cast(Any, chunk))
    yield decoder.decode(cast(Any, b""), final=True)


def _decoded_lines(stream: BinaryIO, path: Path) -> Iterator[str]:
    decoder = _Utf8(path)
    for line in stream:  # a UTF-8 character never contains the byte of a newline
        yield decoder.decode(line, final=True)


class _Utf8(codecs.IncrementalDecoder):
    """UTF-8 that tolerates a byte order mark at the start and says at which byte of the file it stopped."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._path = path
        self._consumed = 0
        self._at_start = True

    def decode(self, data: Any, final: bool = False) -> str:
        pending = len(cast(bytes, self._decoder.getstate()[0]))
        try:
            text = self._decoder.decode(data, final)
        except UnicodeDecodeError as error:
            offset = self._consumed - pending + error.start
            bad = error.object[error.start]
            hint = ""
            if offset == 0 and error.object[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                hint = "; it looks like UTF-16, save it as UTF-8"
            raise InputError(
                f"{self._path}: not UTF-8 text, the byte at offset {offset} is 0x{bad:02x}{hint}"
            ) from None
        self._consumed += len(data)
        if self._at_start and text:
            self._at_start = False
            text = text.removeprefix("\ufeff")
        return text


def _well_formed(text: str) -> str:
    """Lone surrogates (JSON can spell them, UTF-8 cannot) replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _kind(value: object) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    return {**names, list: "a list", dict: "an object"}.get(type(value), type(value).__name__)


def reason(error: BaseException) -> str:
    """Why, in one line: the first line of an error's message, or its kind where it has none."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    # The head of a list, such as that of what transformers tried, says nothing alone.
    return first.rstrip(": ").removesuffix(" from one of")
