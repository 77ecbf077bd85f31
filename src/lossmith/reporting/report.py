"""Every file of a report at once."""

from __future__ import annotations

import json
from pathlib import Path

from lossmith.files import write_text
from lossmith.reporting.comparison import Comparison
from lossmith.reporting.html import write_html
from lossmith.reporting.plots import write_plots
from lossmith.reporting.serialization import comparison_to_json
from lossmith.reporting.table import summarise


def write_all(comparison: Comparison, folder: str | Path) -> dict[str, Path]:
    """Write the report's files into ``folder`` and return their paths by file name.

    ``comparison.json`` (what the others are made from, see :func:`read_comparison`), ``table.json``,
    ``table.md``, the PNG plots that there is data for, and ``report.html``. Each is written whole or not at
    all; works with no finished run too, and says so. Raises ``InputError`` where the folder cannot be made.
    """
    folder = Path(folder)
    table = summarise(comparison)
    written = [
        write_text(folder / "comparison.json", _json(comparison_to_json(comparison), indent=None)),
        write_text(folder / "table.json", _json(table.to_json(), indent=2)),
        write_text(folder / "table.md", table.to_markdown()),
        *write_plots(comparison, folder),
        write_html(comparison, folder / "report.html"),
    ]
    return {path.name: path for path in written}


def _json(data: object, *, indent: int | None) -> str:
    return json.dumps(data, indent=indent, ensure_ascii=True, allow_nan=False) + "\n"
