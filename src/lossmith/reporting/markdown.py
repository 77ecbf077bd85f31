"""The final table as GitHub-flavoured Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from lossmith.reporting import cells
from lossmith.reporting.table import ComparisonTable


def table_to_markdown(table: ComparisonTable) -> str:
    """Title, findings, result, other metrics, cost, claims and footnotes."""
    parts = [f"# {_escape(table.title)}"]
    if table.question:
        parts.append(_escape(table.question))
    parts.append("\n".join(f"- {_escape(finding)}" for finding in table.findings))
    for grid in cells.grids(table):
        parts.append(f"## {_escape(grid.title)}\n\n{_grid(grid.columns, grid.rows)}")
    if table.footnotes:
        parts.append("\n".join(f"- {_escape(note)}" for note in table.footnotes))
    return "\n\n".join(parts) + "\n"


def _grid(columns: Sequence[cells.Column], rows: Iterable[Sequence[str]]) -> str:
    lines = [
        "| " + " | ".join(_escape(column.name) for column in columns) + " |",
        "|" + "|".join(" ---: " if column.numeric else " --- " for column in columns) + "|",
    ]
    lines += ["| " + " | ".join(_escape(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _escape(text: str) -> str:
    """Whatever would open a cell, a tag, an image, a link or emphasis is text."""
    return re.sub(r"([\\`*_\[\]|<>#~$])", r"\\\1", " ".join(text.split()))
