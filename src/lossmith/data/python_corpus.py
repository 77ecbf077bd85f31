"""The embedded corpus: the running interpreter's standard library as English (docs) and as Python (code)."""

from __future__ import annotations

import ast
import gc
import hashlib
import inspect
import io
import os
import re
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

from ..errors import InputError
from .formats import Document
from .passages import BLANK_LINE, LINE_END, TOP_LEVEL, passages

_LONGEST_MODULE = 400_000  # bytes; longer ones are generated
_SHORTEST_DOCSTRING = 200  # characters
_LEFT_OUT_FOLDERS = {
    "__pycache__", "__phello__", "_bundled", "dist-packages", "encodings", "idle_test", "idlelib",
    "lib-dynload", "lib2to3", "pydoc_data", "site-packages", "test", "tests",
}  # fmt: skip
# Tables, and what the build of this interpreter wrote about the machine it was built on.
_LEFT_OUT_FILES = re.compile(
    r"_sysconfigdata.*|_sysconfig_vars.*|(.*/)?site-?customize\.py|html/entities\.py|stringprep\.py|this\.py"
)


def read_python_corpus() -> Iterator[Document]:
    """Documents from the standard library of the running interpreter: real text everywhere, no download.

    Domain ``docs``: the language reference's topics (``pydoc_data.topics``) and every docstring of at least
    200 characters. Domain ``code``: the modules without their docstrings, so that no text is in both domains.
    Nothing is imported: files are read and parsed. Tests, IDLE, bundled packages, codec tables and generated
    files are left out. Long texts are cut into passages of about 4,000 characters, code between top-level
    statements where possible. The same interpreter gives the same documents in the same order.

    Raises:
        lossmith.errors.InputError: where the interpreter came without the sources of its library.

    >>> first = next(read_python_corpus())
    >>> first.domain
    'docs'
    """
    root = _library()
    yield from _topics(root)
    for path in _modules(root):
        name = path.relative_to(root).as_posix()
        text = _source(path)
        tree = None if text is None else _parsed(text)
        if text is None or tree is None:
            continue
        documented = list(_documented(tree))
        for owner, statement, docstring in documented:
            cleaned = inspect.cleandoc(docstring)
            if len(cleaned) >= _SHORTEST_DOCSTRING:
                where = f"{name}:{statement.lineno} {getattr(owner, 'name', '')}".rstrip()
                for passage in passages([cleaned]):
                    yield Document(passage.text, "docs", where)
        code = _without(text, [(statement, len(owner.body) == 1) for owner, statement, _ in documented])
        for passage in passages([code], borders=(TOP_LEVEL, BLANK_LINE, LINE_END)):
            yield Document(passage.text, "code", f"{name}:{passage.line}")


def python_corpus_key() -> str:
    """A hash of the interpreter's version and library, to recognise the corpus without parsing it."""
    root = _library()
    digest = hashlib.blake2b(sys.version.encode(), digest_size=16)
    topics = root / "pydoc_data" / "topics.py"
    for path in [*_modules(root), *([topics] if topics.is_file() else [])]:
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(hashlib.blake2b(path.read_bytes(), digest_size=16).digest())
    return digest.hexdigest()


def _library() -> Path:
    root = Path(sysconfig.get_path("stdlib"))
    if not (root / "argparse.py").is_file():
        raise InputError(
            f"data 'python': the running interpreter came without the sources of its library ({root}); "
            "give a file or folder instead"
        )
    return root


def _modules(root: Path) -> list[Path]:
    found: list[str] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _LEFT_OUT_FOLDERS and not name.startswith("config-")]
        relative = os.path.relpath(folder, root)
        prefix = "" if relative == "." else relative.replace(os.sep, "/") + "/"
        found += [prefix + name for name in names if name.endswith(".py")]
    paths = [root / name for name in sorted(found) if not _LEFT_OUT_FILES.fullmatch(name)]
    return [path for path in paths if path.is_file() and path.stat().st_size <= _LONGEST_MODULE]


def _topics(root: Path) -> Iterator[Document]:
    path = root / "pydoc_data" / "topics.py"
    tree = _parsed(path.read_text(encoding="utf-8")) if path.is_file() else None
    for statement in tree.body if tree else []:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            topics = ast.literal_eval(statement.value)
            for topic in sorted(topics):
                for passage in passages([topics[topic]]):
                    yield Document(passage.text, "docs", f"topic {topic}:{passage.line}")


def _source(path: Path) -> str | None:
    data = path.read_bytes()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        text = data.decode(encoding)
    except (SyntaxError, UnicodeDecodeError):
        return None
    return text.replace("\r\n", "\n").replace("\r", "\n").removeprefix("\ufeff")


def _parsed(text: str) -> ast.Module | None:
    # A tree is many small objects without cycles: collecting while they are made takes half of the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in the library are not our user's business
            return ast.parse(text)
    except (SyntaxError, ValueError):
        return None
    finally:
        if collecting:
            gc.enable()


_STATEMENTS = ("body", "handlers", "cases", "orelse", "finalbody")
_Owner = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _documented(tree: ast.Module) -> Iterator[tuple[_Owner, ast.Expr, str]]:
    """Everything with a docstring, in the order of the source, with the docstring's statement and text."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, _Owner) and node.body and isinstance(node.body[0], ast.Expr):
            value = node.body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield node, node.body[0], value.value
        # Only statements can hold definitions: leaving expressions out makes the walk several times shorter.
        if isinstance(node, (ast.stmt, ast.Module, ast.ExceptHandler, ast.match_case)):
            waiting += reversed([child for field in _STATEMENTS for child in getattr(node, field, ())])


def _without(text: str, statements: list[tuple[ast.Expr, bool]]) -> str:
    """The source without the given docstrings; an ellipsis stands where a body would be left empty."""
    lines = [line.encode() for line in text.split("\n")]  # columns of the syntax tree count UTF-8 bytes
    for statement, alone in sorted(statements, key=lambda item: -item[0].lineno):
        assert statement.end_lineno is not None
        assert statement.end_col_offset is not None
        first, last = statement.lineno - 1, statement.end_lineno - 1
        before, after = lines[first][: statement.col_offset], lines[last][statement.end_col_offset :]
        if before.strip() or after.strip() or alone:
            lines[first : last + 1] = [before + b"..." + after]
        else:
            del lines[first : last + 1]
            if first < len(lines) and not lines[first].strip():
                del lines[first]
    return b"\n".join(lines).decode()
