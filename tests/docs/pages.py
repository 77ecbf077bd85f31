"""The documentation's pages, cut into their code blocks."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block: its language, its text, and the line where the text begins."""

    language: str
    text: str
    line: int


def name(page: Path) -> str:
    """What a page is called in messages."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[Block]:
    """The page's fenced blocks in ``languages``."""
    text = page.read_text(encoding="utf-8")
    found = [Block(m[1], m[2], text.count("\n", 0, m.start(2)) + 1) for m in _FENCE.finditer(text)]
    return [block for block in found if block.language in languages]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def commands(page: Path) -> Iterator[list[str]]:
    """The shell commands of a page as lists of words; in ``console`` blocks those after ``$``."""
    for block in blocks(page, "bash", "console"):
        lines = block.text.replace("\\\n", " ").splitlines()
        for line in lines:
            if block.language == "console":
                if not line.startswith("$ "):
                    continue
                line = line[2:]
            if words := shlex.split(line, comments=True):
                yield words


def lossmith_arguments(words: list[str]) -> list[str] | None:
    """What follows ``lossmith`` (or ``-m lossmith``) in a command; ``None`` for other commands."""
    if words[0] == "lossmith":
        return words[1:]
    if "lossmith" in words and words[words.index("lossmith") - 1] == "-m":
        return words[words.index("lossmith") + 1 :]
    return None
