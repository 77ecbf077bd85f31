"""The measured table inside a documentation page, written by the tool and never by hand."""

from __future__ import annotations

import re
from pathlib import Path

from lossmith.errors import InputError
from lossmith.files import write_text

BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"


def begin_of(data: str | None) -> str:
    """The marker where the measurements on ``data`` begin: its last name, without an ending.

    >>> begin_of("corpora/wnut17"), begin_of(None)
    ('<!-- measured:begin wnut17 -->', '<!-- measured:begin -->')
    """
    return f"<!-- measured:begin {Path(data).stem} -->" if data else BEGIN


def check_card(path: str | Path, data: str | None = None) -> tuple[str, str, str]:
    """What stands before the markers, the first of them, and what stands after the last.

    Measurements on the user's ``data`` have a place of their own where the card has a marker with that name; otherwise
    they go where the others would.

    Raises:
        InputError: the file is missing or has no such markers.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"--card {path} does not exist; a card is a Markdown file with the lines {BEGIN} and {END}")
    text = path.read_text(encoding="utf-8")
    marker = begin_of(data) if begin_of(data) in text else BEGIN
    before, begin, rest = text.partition(marker)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError(f"--card {path} has no lines {BEGIN} and {END} to write between")
    return before, marker, after


def write_measured(path: str | Path, markdown: str, data: str | None = None) -> None:
    """Replace what stands between the markers ``<!-- measured:begin -->`` and ``<!-- measured:end -->``.

    With ``data``: between ``<!-- measured:begin NAME -->`` and the next end, see :func:`check_card`.

    Raises:
        InputError: the file is missing or has no such markers.
    """
    before, marker, after = check_card(path, data)
    # Headings go below the card's own.
    markdown = re.sub(r"^(#+ )", r"##\1", markdown, flags=re.MULTILINE)
    write_text(path, f"{before}{marker}\n\n{markdown.strip()}\n\n{END}{after}")
