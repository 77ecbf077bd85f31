"""The final table on the terminal, within 100 columns."""

from __future__ import annotations

from collections.abc import Callable

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lossmith.reporting import cells
from lossmith.reporting.comparison import Comparison
from lossmith.reporting.formatting import NONE, one_line
from lossmith.reporting.table import ComparisonTable, summarise

WIDTH = 100
_GAP = 2
_NAME_WIDTH = 20
_SPARE = {
    "result": ("p", "difference"),
    "metric": ("p", "difference"),
    "cost": ("steps", "scored", "memory"),
    "forecast": ("4x",),
}
_COLOURS = {
    "better": "green",
    "worse": "red",
    "failed": "red",
    "supported": "green",
    "not supported": "red",
    "not told apart": "yellow",
    "inconclusive": "yellow",
}
_ASCII = str.maketrans({"±": "+/-", "†": "*", "…": "~", "×": "x", "−": "-"})


def print_table(comparison: Comparison | ComparisonTable, console: Console | None = None) -> None:
    """Print result, other metrics, cost, claims, findings and footnotes; nothing is wider than 100 columns.

    Names are printed as they are: square brackets in them are no markup. Where the terminal's encoding has no
    ``±``, plain ASCII stands in.
    """
    console = console or Console()
    table = comparison if isinstance(comparison, ComparisonTable) else summarise(comparison)
    width = min(WIDTH, console.width)

    def show(text: str, style: str = "") -> Text:
        if console.options.ascii_only:
            text = text.translate(_ASCII).encode("ascii", "replace").decode()
        return Text(text, style=style)

    console.print(show(one_line(table.title), "bold"), width=width)
    if table.question:
        console.print(show(one_line(table.question), "dim"), width=width)
    for grid in cells.grids(table):
        console.print()
        console.print(_table(grid, show, width), width=width)
    console.print()
    for finding in table.findings:
        console.print(show(finding), width=width)
    if table.footnotes:
        console.print()
    for note in table.footnotes:
        console.print(show(note, "dim"), width=width)


def _table(grid: cells.Grid, show: Callable[..., Text], width: int) -> Table:
    keep = _columns_that_fit(grid, width)
    table = Table(
        title=show(grid.title, "bold"),
        title_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for index in keep:
        column = grid.columns[index]
        fixed = column.numeric or column.name in ("standing", "verdict", "cost")
        table.add_column(
            show(column.name),
            justify="right" if column.numeric else "left",
            no_wrap=fixed,
            min_width=_natural(grid, index) if fixed else None,
            overflow="fold",
        )
    for row in grid.rows:
        table.add_row(*(show(row[i], _COLOURS.get(row[i].removesuffix(" †"), "")) for i in keep))
    return table


def _columns_that_fit(grid: cells.Grid, width: int) -> list[int]:
    """Leave out what the other columns also say, or nobody measured, until an arm's name has room."""
    keep = [
        i
        for i, column in enumerate(grid.columns)
        if grid.kind != "cost" or i == 0 or any(row[i] != NONE for row in grid.rows)
    ]
    wanted = sum(_natural(grid, i) + _GAP for i in keep)
    for name in _SPARE.get(grid.kind, ()):
        if wanted > width:
            keep = [i for i in keep if grid.columns[i].name != name]
            wanted = sum((_natural(grid, i) if i else min(_natural(grid, i), _NAME_WIDTH)) + _GAP for i in keep)
    return keep


def _natural(grid: cells.Grid, index: int) -> int:
    return max(len(text) for text in (grid.columns[index].name, *(row[index] for row in grid.rows)))
