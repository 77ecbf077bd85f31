"""LaTeX projects: which files are documents, and each of them with all that it includes, without comments."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .decoding import Unreadable, decoded

# What is taken as it stands: nothing in it is a comment, a brace or a command.
VERBATIM = r"\\begin\{(verbatim\*?|Verbatim|lstlisting|minted|alltt)\}.*?\\end\{\1\}|\\verb\*?([^A-Za-z*\s]).*?\2"
_COMMENT = re.compile(
    # A comment takes its line's end with it, unless a blank line follows, which ends the paragraph.
    VERBATIM + r"|\\(?:url|href|path)\s*\{[^{}]*\}|\\.|(%[^\n]*(?:\n[ \t]*(?!\n|[ \t])|(?=\n)|$))",
    re.DOTALL,
)
_BRACE = re.compile(VERBATIM + r"|\\.|%[^\n]*|([{}])|(\n)", re.DOTALL)
_INCLUDE = re.compile(
    r"\\(?:input|include|subfile|InputIfFileExists)\s*\{([^{}]*)\}"
    r"|\\input\s+([^\s{}\\]+)"
    r"|\\(?:sub)?(?:import|includefrom|inputfrom)\*?\s*\{([^{}]*)\}\s*\{([^{}]*)\}"
)
_PACKAGE = re.compile(r"\\(?:usepackage|RequirePackage|documentclass)\s*(?:\[[^\]]*\])?\s*\{([^{}]*)\}")
_ENCODING = re.compile(rb"\\usepackage\s*\[(latin1|latin9|ansinew|cp1252|applemac)\]\s*\{inputenc\}")
_CODECS = {"latin1": "cp1252", "latin9": "iso8859-15", "ansinew": "cp1252", "cp1252": "cp1252", "applemac": "mac-roman"}
_IFFALSE = re.compile(r"\\iffalse(?![A-Za-z]).*?(?:\\else(?![A-Za-z])(.*?))?\\fi(?![A-Za-z])", re.DOTALL)


@dataclass(frozen=True, slots=True)
class LatexSource:
    """One document: its text with everything included, and which files that took.

    Attributes:
        text: without comments.
        files: its own file first.
        missing: what it includes and is not there.
    """

    text: str
    files: tuple[Path, ...]
    missing: tuple[str, ...]


def without_comments(text: str) -> str:
    r"""LaTeX without comments; a percent sign that is escaped, or verbatim, is none.

    >>> print(without_comments("50\\% of a% remark\n  word\n\nnext% one\n\nend"))
    50\% of aword
    <BLANKLINE>
    next
    <BLANKLINE>
    end
    """
    text = _COMMENT.sub(lambda match: "" if match[3] is not None else match[0], text)
    return re.sub(r"\\begin\{comment\}.*?\\end\{comment\}", "", text, flags=re.DOTALL)


def check_braces(text: str, name: str) -> None:
    """Refuse text whose braces do not match.

    Raises:
        Unreadable: with the line.
    """
    line, opened = 1, []
    for match in _BRACE.finditer(text):
        if match[4]:
            line += 1
        elif match[3] == "{":
            opened.append(line)
        elif match[3] == "}":
            if not opened:
                raise Unreadable(f"LaTeX does not parse: {name}:{line} closes a brace that is not open")
            opened.pop()
        else:
            line += match[0].count("\n")
    if opened:
        raise Unreadable(f"LaTeX does not parse: the brace opened in {name}:{opened[-1]} is never closed")


def document_files(files: Sequence[Path], root: Path) -> list[Path]:
    """The ``.tex`` files that are documents of their own: those that no other one includes.

    Of files that include each other in a circle the first one counts, so that nothing is left out.
    """
    included: dict[Path, set[Path]] = {}
    for file in files:
        text = without_comments(file.read_bytes().decode("utf-8", "replace"))
        found = (_resolved(match, file.parent, file.parent, root) for match in _INCLUDE.finditer(text))
        included[file] = {path for path in found if path is not None and path != file}
    parts = set().union(*included.values()) if included else set()
    documents = [file for file in files if file not in parts]
    reached = _reachable(documents, included)
    for file in files:
        if file not in reached:
            documents.append(file)
            reached |= _reachable([file], included)
    return sorted(documents)


def read_latex(file: Path, root: Path) -> LatexSource:
    r"""A document with what ``\input``, ``\include``, ``\subfile`` and ``\import`` name, and without comments.

    Definitions of local packages and classes (``\usepackage{macros}`` beside ``macros.sty``) come first. Files outside
    ``root`` are never read.

    Raises:
        Unreadable: a file that is not text, or whose braces do not match.
    """
    raw = file.read_bytes()
    declared = _ENCODING.search(raw)
    reader = _Reader(file, root, _CODECS[declared[1].decode()] if declared else "utf-8")
    text = reader.text(file)
    packages = "".join(reader.packages(text))
    return LatexSource(packages + text, tuple(reader.files), tuple(dict.fromkeys(reader.missing)))


class _Reader:
    def __init__(self, main: Path, root: Path, encoding: str):
        self.main, self.root, self.encoding = main, root, encoding
        self.files: list[Path] = []
        self.missing: list[str] = []
        self._open: list[Path] = []

    def text(self, file: Path) -> str:
        if file in self._open or len(self._open) > 20:
            # TeX would never end; once is enough.
            return ""
        self._open.append(file)
        if file not in self.files:
            self.files.append(file)
        name = file.relative_to(self.root).as_posix() if self.root in file.parents else file.name
        text = decoded(file.read_bytes(), self.encoding)
        check_braces(text, name)
        text = without_comments(text)
        text = _IFFALSE.sub(lambda match: match[1] or "", text)
        text = re.split(r"\\endinput(?![A-Za-z])", text, maxsplit=1)[0]
        text = _INCLUDE.sub(lambda match: self._included(match, file), text)
        self._open.pop()
        return text

    def packages(self, text: str) -> Iterator[str]:
        for match in _PACKAGE.finditer(text):
            for name in match[1].split(","):
                for suffix in (".sty", ".cls"):
                    path = self.main.parent / (name.strip() + suffix)
                    if name.strip() and path.is_file() and _inside(path, self.root):
                        self.files.append(path)
                        # Class files hold program code: only what they define is of use, and only if it can be read.
                        yield _definitions(path.read_bytes().decode("utf-8", "replace"))

    def _included(self, match: re.Match[str], file: Path) -> str:
        path = _resolved(match, self.main.parent, file.parent, self.root)
        if path is None:
            self.missing.append("/".join(part for part in match.groups() if part))
            return ""
        return self.text(path) + "\n"


def _definitions(text: str) -> str:
    lines = without_comments(text).splitlines()
    starts = (r"\newcommand", r"\renewcommand", r"\providecommand", r"\DeclareMathOperator", r"\newtheorem", r"\def")
    kept = [line for line in lines if line.lstrip().startswith(starts) and line.count("{") == line.count("}")]
    return "\n".join(kept) + "\n"


def _resolved(match: re.Match[str], main: Path, here: Path, root: Path) -> Path | None:
    """The file that is meant: beside the main file, as TeX does, else beside the one that names it."""
    name = (match[1] or match[2] or match[4] or "").strip().strip('"')
    folder = (match[3] or "").strip()
    for base in (main, here):
        for candidate in (base / folder / f"{name}.tex", base / folder / name):
            if name and candidate.is_file() and _inside(candidate, root):
                return base_path(candidate)
    return None


def base_path(path: Path) -> Path:
    """The path without ``..``, links kept as they are."""
    import os

    return Path(os.path.normpath(path))


def _inside(path: Path, root: Path) -> bool:
    return path.resolve().is_relative_to(root.resolve())


def _reachable(start: Sequence[Path], included: Mapping[Path, set[Path]]) -> set[Path]:
    waiting, reached = list(start), set(start)
    while waiting:
        for path in included.get(waiting.pop(), ()):
            if path not in reached:
                reached.add(path)
                waiting.append(path)
    return reached
