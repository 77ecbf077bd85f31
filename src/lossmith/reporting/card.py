"""The measured table inside a documentation page, written by the tool and never by hand."""

from __future__ import annotations

import re
from pathlib import Path

from lossmith.errors import InputError
from lossmith.files import write_text

BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"


def check_card(path: str | Path) -> tuple[str, str]:
    """What stands before and after the markers.

    Raises:
        InputError: the file is missing or has no such markers.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"--card {path} does not exist; a card is a Markdown file with the lines {BEGIN} and {END}")
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError(f"--card {path} has no lines {BEGIN} and {END} to write between")
    return before, after


def write_measured(path: str | Path, markdown: str) -> None:
    """Replace what stands between the markers ``<!-- measured:begin -->`` and ``<!-- measured:end -->``.

    Raises:
        InputError: the file is missing or has no such markers.
    """
    before, after = check_card(path)
    # Headings go below the card's own.
    markdown = re.sub(r"^(#+ )", r"##\1", markdown, flags=re.MULTILINE)
    write_text(path, f"{before}{BEGIN}\n\n{markdown.strip()}\n\n{END}{after}")
