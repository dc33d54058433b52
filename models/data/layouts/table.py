"""Tables: CRIC's crops.csv, and any CSV with path,label[,group][,split]."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from pathlib import Path

from cellops.models.data.layouts.listing import Found, LayoutError, Listing, assemble, counted
from cellops.models.data.samples import CellData

EXPECTS_CRIC = "crops.csv with the columns file, class and parent_image beside the images it names"
EXPECTS_TABLE = "a CSV file with the columns path,label[,group][,split], paths relative to its folder"

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "train",
    "valid": "train",
    "validation": "train",
    "test": "test",
    "testing": "test",
}


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV, its column names in lower case; separated by comma, semicolon or tab.

    Raises:
        LayoutError: the file is empty, no text or damaged, has a column twice, or a row has values beyond the columns.
    """
    _check_regular(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise LayoutError(f"{path} is not a text file in UTF-8: {error}") from None
    header = text.split("\n", 1)[0]
    if not header.strip():
        raise LayoutError(f"{path} is empty")
    delimiter = max(",;\t", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        names = [name.strip().lower() for name in next(reader)]
        twice = [name for name, count in Counter(names).items() if name and count > 1]
        if twice:
            raise LayoutError(f"{path} has the column {twice[0]} {names.count(twice[0])} times")
        rows = []
        for values in reader:
            if any("\0" in value for value in values):
                raise LayoutError(f"{path}, line {reader.line_num}: there is a NUL character")
            if any(value.strip() for value in values[len(names) :]):
                raise LayoutError(
                    f"{path}, line {reader.line_num}: {len(values)} values for {len(names)} columns; a value with "
                    f"a {delimiter!r} in it goes in double quotes"
                )
            if values:
                values += [""] * (len(names) - len(values))
                rows.append({name: value.strip() for name, value in zip(names, values, strict=False)})
    except csv.Error as error:
        raise LayoutError(f"{path}, line {reader.line_num}: {error}") from None
    return rows


def _check_regular(path: Path) -> None:
    """Raise LayoutError for a pipe or device, which could be read for ever."""
    if not path.is_file():
        raise LayoutError(f"{path} is not a regular file")


def columns_of(path: Path) -> set[str]:
    """The column names of a CSV, in lower case.

    Raises:
        LayoutError: it is no regular file.
    """
    _check_regular(path)
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        header = file.readline(2**20)
    return {name.strip().strip('"').lower() for name in header.replace(";", ",").replace("\t", ",").split(",")}


def merged(name: str, count: int) -> str | None:
    """A note that a part named so is not what chooses the epoch; None for a training or test part."""
    if not name.lower().startswith("val"):
        return None
    return (
        f"{counted(count, 'image', 'images')} of the part {name} became training images; data.validation takes a "
        "validation part of these."
    )


def read_cric(listing: Listing, table: Path | None = None) -> CellData | None:
    """CRIC cervix; crops of one parent image overlap and share stain and focus, so the parent is the group.

    Args:
        listing: the files.
        table: the CSV; None for the only crops.csv that has the columns.

    Raises:
        LayoutError: there are several, or the table is wrong.
    """
    if table is None:
        table = _only(listing, listing.named("crops.csv"), {"file", "class", "parent_image"})
        if table is None:
            return None
    return _read(listing, table, "cric", path="file", label="class", group="parent_image")


def read_table(listing: Listing, table: Path | None = None) -> CellData | None:
    """Any table.

    Args:
        listing: the files.
        table: the CSV; None for the only one in the folder itself that has the columns.

    Raises:
        LayoutError: there are several, or the table is wrong.
    """
    if table is None:
        candidates = [path for path in listing.paths if path.lower().endswith(".csv") and "/" not in path]
        table = _only(listing, candidates, {"path", "label"})
        if table is None:
            return None
    return _read(listing, table, table.stem, path="path", label="label", group="group")


def _only(listing: Listing, candidates: list[str], columns: set[str]) -> Path | None:
    """The table that has the columns, or None.

    Raises:
        LayoutError: several have, and a guess, or the folders without any, would lose groups.
    """
    tables = [path for path in candidates if columns <= columns_of(listing.path(path))]
    if len(tables) > 1:
        raise LayoutError(
            f"{listing.root} has {len(tables)} tables with the columns {', '.join(sorted(columns))}: "
            f"{', '.join(tables)}. Give one of them as the data, e.g. {listing.path(tables[0])}, or join them; a "
            "column split says what is for training and what for testing"
        )
    return listing.path(tables[0]) if tables else None


def _read(listing: Listing, table: Path, name: str, path: str, label: str, group: str) -> CellData:
    rows = rows_of(table)
    present = set(rows[0]) if rows else columns_of(table)
    lacking = {path, label} - present
    if lacking:
        raise LayoutError(
            f"{table} lacks the column {' and '.join(sorted(lacking))}; it has {', '.join(sorted(present))}"
        )
    if not rows:
        raise LayoutError(f"{table} has a header and no rows")
    folder = table.parent.resolve()
    found, absent, seen = [], [], set()
    for number, row in enumerate(rows, start=2):
        if not row[path] or not row[label]:
            raise LayoutError(f"{table}, line {number}: empty {path if not row[path] else label}")
        target = Path(os.path.realpath(folder / row[path]))
        if not target.is_relative_to(listing.root):
            raise LayoutError(f"{table}, line {number}: {row[path]} leads to {target}, outside {listing.root}")
        if not os.path.isfile(target):  # Path.is_file fails at a name that is too long
            absent.append(row[path])
            continue
        relative = target.relative_to(listing.root).as_posix()
        if relative in seen:
            raise LayoutError(f"{table}, line {number}: {row[path]} is listed twice")
        seen.add(relative)
        found.append(Found(relative, row[label], group=row.get(group) or None, split=_split(table, number, row)))
    if absent:
        raise LayoutError(f"{table} names {len(absent)} files that do not exist, e.g. {absent[0]}")
    if len({image.split is None for image in found}) > 1:
        raise LayoutError(
            f"{table}: the column split is empty in some rows; say train or test in each, or leave it out"
        )
    ungrouped = sum(image.group is None for image in found)
    unlisted = len(set(listing.images) - seen)
    marks = Counter(row.get("split", "").lower() for row in rows)
    notes = [
        *(merged(mark, count) for mark, count in marks.items()),
        f"{ungrouped} rows without a {group} are groups of their own." if 0 < ungrouped < len(found) else None,
        f"{unlisted} images are not in {table.name} and were left out." if unlisted else None,
    ]
    return assemble(name, listing, found, notes)


def _split(table: Path, number: int, row: dict[str, str]) -> str | None:
    value = row.get("split", "").lower()
    if value and value not in SPLITS:
        raise LayoutError(f"{table}, line {number}: split is {value!r}, not train or test")
    return SPLITS.get(value)
