"""Reading tables of who used what, and writing recommendations."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from lossmith.errors import InputError, did_you_mean
from lossmith.files import check_file_place, read_utf8, replacing
from lossmith.tasks.recommendation.interactions import Interactions

LAYOUTS = ("auto", "pairs", "counts", "lists")
USER_NAMES = ("user", "user_id", "userid", "uid", "user_idx")
ITEM_NAMES = ("item", "item_id", "itemid", "iid", "item_idx")
COUNT_NAMES = ("count", "rating", "weight", "value", "plays")


def read_interactions(
    path: str | Path,
    *,
    layout: str = "auto",
    user: str | None = None,
    item: str | None = None,
    count: str | None = None,
    least: float | None = None,
) -> Interactions:
    """A table of interactions from a file.

    Args:
        path: of text with cells separated by tabs, commas or spaces, with or without a header; ``.parquet``; or
            ``.json``, an object from users to lists of items.
        layout: of text: ``pairs`` (``user item``), ``counts`` (``user item count``, further columns are not read),
            ``lists`` (``user item item ...``, LightGCN's) or ``auto``: by the header; else lists where lines differ
            in length and some have more than three cells, counts where all have three or more, pairs where all have
            two.
        user: name of the user's column, if not one of the usual.
        item: name of the item's column, if not one of the usual.
        count: name of the column of counts or ratings, if not one of the usual.
        least: interactions with a smaller count are left out; default: those with a count of 0.

    Names of users and items may be any text. Interactions given several times count once; users without any are left
    out; both are counted in the result.

    Raises:
        InputError: no such file, nothing in it, or a line (named) that does not fit.
    """
    path = Path(path)
    if layout not in LAYOUTS:
        raise InputError(f"unknown layout '{layout}': {did_you_mean(layout, LAYOUTS)}")
    if path.suffix in (".jsonl", ".gz", ".xlsx"):
        raise InputError(f"{path}: a table is text (.csv, .tsv, .txt), .json or .parquet")
    if path.suffix == ".parquet":
        rows = _from_parquet(path, user, item, count)
    elif path.suffix == ".json":
        rows = _from_json(path)
    else:
        rows = _from_text(path, layout, user, item, count)
    users: list[str] = []
    items: list[str] = []
    every: set[str] = set()
    for place, who, what, times in rows:
        every.add(who)
        if what is None:
            continue
        number = 1.0 if times is None else _number(times, f"{path}, {place}")
        if number > 0 if least is None else number >= least:
            users.append(who)
            items.append(what)
    if not users:
        raise InputError(f"{path} holds no interactions" + (f" with a count of {least:g} or more" if least else ""))
    return Interactions.from_pairs(users, items, dropped_users=len(every) - len(set(users)))


def read_parts(
    data: str | Path, *, test: str | Path | None = None, **options: Any
) -> tuple[Interactions, Interactions | None]:
    """A training table, and a test table where there is one: a folder holds ``train.txt`` and ``test.txt``."""
    path = Path(data)
    if path.is_dir():
        if not (path / "train.txt").is_file():
            raise InputError(f"folder {path} holds no train.txt; give a file, or a folder with train.txt and test.txt")
        if test is None and (path / "test.txt").is_file():
            test = path / "test.txt"
        path = path / "train.txt"
    return read_interactions(path, **options), read_interactions(test, **options) if test is not None else None


def check_ending(path: str | Path) -> None:
    """Raise unless a table can be written there: by its ending, and by the folder."""
    if Path(path).suffix not in (".csv", ".tsv", ".parquet"):
        raise InputError(f"{path} must end in .csv, .tsv or .parquet")
    check_file_place(path)


def write_recommendations(path: str | Path, table: pd.DataFrame) -> None:
    """Columns ``user item score rank`` as CSV, or Parquet by the ending; whole or not at all."""
    with replacing(path) as temporary:
        if Path(path).suffix == ".parquet":
            table.to_parquet(temporary, index=False)
        else:
            table.to_csv(temporary, index=False, sep="\t" if Path(path).suffix == ".tsv" else ",")


Row = tuple[str, str, str | None, Any]


def _from_text(path: Path, layout: str, user: str | None, item: str | None, count: str | None) -> Iterator[Row]:
    lines = [(n, line) for n, line in enumerate(read_utf8(path, "table", encoding="utf-8-sig").splitlines(), 1)]
    lines = [(n, line) for n, line in lines if line.strip()]
    if not lines:
        raise InputError(f"{path} holds no interactions")
    separator = next((mark for mark in ("\t", ",") if mark in lines[0][1]), None)
    cells = [(n, _cells(line, separator)) for n, line in lines]
    first = [cell.lower() for cell in cells[0][1]]
    if user or item or count or (set(first) & set(USER_NAMES) and set(first) & set(ITEM_NAMES)):
        names = cells.pop(0)[1]
        columns = _columns(names, str(path), user, item, count)
        if layout == "pairs":
            columns[2] = None
        yield from _picked(cells, path, len(names), columns)
        return
    lengths = {len(row) for _, row in cells}
    if layout == "auto":
        if len(cells) > 1 and lengths <= {2, 3, 4} and _like_a_header([row for _, row in cells]):
            raise InputError(
                f"{path}, line {cells[0][0]}: '{lines[0][1].strip()[:60]}' looks like a header with names that are not "
                f"known (of users {', '.join(USER_NAMES)}; of items {', '.join(ITEM_NAMES)}); say which columns they "
                "are with --user-col and --item-col, or with --layout pairs or counts that it is no header"
            )
        if len(lengths) > 1 and max(lengths) <= 3:
            # A table with a broken line must not be read as lists whose items are its counts.
            usual = max(lengths, key=[len(row) for _, row in cells].count)
            n, row = next((n, row) for n, row in cells if len(row) != usual)
            raise InputError(
                f"{path}, line {n}: {len(row)} cells, other lines have {usual}; mend it, or say the layout: "
                "pairs, counts or lists"
            )
        layout = "lists" if len(lengths) > 1 else "pairs" if lengths == {2} else "counts"
    if layout == "lists":
        for n, row in cells:
            for what in row[1:]:
                yield f"line {n}", row[0], what, None
            if len(row) == 1:
                yield f"line {n}", row[0], None, None
        return
    needed = 2 if layout == "pairs" else 3
    yield from _picked(cells, path, needed, [0, 1, None if layout == "pairs" else 2])


def _like_a_header(rows: Sequence[Sequence[str]]) -> bool:
    """Whether the first row names a known column, or has words only where all others have numbers in their names."""

    def numbered(cell: str) -> bool:
        return any(mark.isdigit() for mark in cell)

    first, others = rows[0][:2], [row[:2] for row in rows[1:]]
    known = {cell.lower() for cell in first} & {*USER_NAMES, *ITEM_NAMES}
    return bool(known) or (not any(map(numbered, first)) and all(all(map(numbered, row)) for row in others))


def _picked(
    cells: Sequence[tuple[int, list[str]]], path: Path, needed: int, columns: list[int | None]
) -> Iterator[Row]:
    who, what, times = columns
    assert who is not None
    assert what is not None
    for n, row in cells:
        if len(row) < needed or not row[who] or not row[what]:
            raise InputError(
                f"{path}, line {n}: a user, an item"
                f"{' and a count' if times is not None else ''} were expected, found '{' '.join(row)[:60]}'"
            )
        yield f"line {n}", row[who], row[what], row[times] if times is not None else None


def _from_parquet(path: Path, user: str | None, item: str | None, count: str | None) -> Iterator[Row]:
    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from None
    who, what, times = _columns([str(name) for name in frame.columns], str(path), user, item, count)
    values = frame.iloc[:, [c for c in (who, what, times) if c is not None]]
    if bool(values.isna().any(axis=None)):
        row = int(values.isna().any(axis=1).to_numpy().argmax())
        raise InputError(f"{path}, row {row}: a user, an item or a count is missing")
    for n, cells in enumerate(values.itertuples(index=False)):
        yield f"row {n}", str(cells[0]), str(cells[1]), cells[2] if len(cells) > 2 else None


def _from_json(path: Path) -> Iterator[Row]:
    try:
        found = json.loads(read_utf8(path, "table"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    pairs = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
    for who, items in pairs:
        if not isinstance(items, list) or any(isinstance(item, dict | list) for item in items):
            raise InputError(f"{path}: user '{who}' must have a list of items")
        if not items:
            yield f"user {who}", str(who), None, None
        for item in items:
            yield f"user {who}", str(who), str(item), None


def _columns(
    names: Sequence[str], path: str, user: str | None, item: str | None, count: str | None
) -> list[int | None]:
    lowered = [name.strip().lower() for name in names]
    for wanted in (user, item, count):
        if wanted is not None and wanted not in names:
            raise InputError(f"{path} has no column '{wanted}': {did_you_mean(wanted, names)}")
    found: list[int | None] = []
    for wanted, usual in ((user, USER_NAMES), (item, ITEM_NAMES), (count, COUNT_NAMES)):
        if wanted is not None:
            found.append(list(names).index(wanted))
        else:
            found.append(next((lowered.index(name) for name in usual if name in lowered), None))
    for place, what in zip(found, ("user", "item"), strict=False):
        if place is None:
            raise InputError(f"{path} has no column of {what}s; name one of: {', '.join(names)}")
    return found


def _cells(line: str, separator: str | None) -> list[str]:
    return [c.strip() for c in next(csv.reader([line], delimiter=separator))] if separator else line.split()


def _number(text: Any, where: str) -> float:
    try:
        number = float(text)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise InputError(f"{where}: a count must be a number >= 0, found '{text}'")
    return number
