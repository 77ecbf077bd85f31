"""Sentences for people: wrapped at a terminal's width; in a pipe or a file one a line, so that scripts can grep."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap

import typer


def say(text: str, *, err: bool = False) -> None:
    """Print lines on standard output, or standard error with ``err``."""
    if (sys.stderr if err else sys.stdout).isatty():
        width = shutil.get_terminal_size().columns
        text = "\n".join(wrapped(line, width) for line in text.split("\n"))
    typer.echo(text, err=err)


def wrapped(line: str, width: int) -> str:
    """One line as several of at most ``width``, broken at spaces; all but the first are indented.

    >>> print(wrapped("a short law, and a long sentence on where it holds", 30))
    a short law, and a long
      sentence on where it holds
    """
    if len(line) <= width:
        return line
    # Below the words of a numbered line, not below its number.
    number = re.match(r" *\d+\. ", line)
    indent = " " * (number.end() if number else len(line) - len(line.lstrip()) + 2)
    # Paths and options are whole, so that they can be copied.
    return textwrap.fill(
        line,
        width,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
        expand_tabs=False,
        replace_whitespace=False,
    )
