"""Data sets on disk: which layout a folder has, and what is in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

from cellops.models.data import synthetic
from cellops.models.data.images import dark_note
from cellops.models.data.layouts import folders, hep2, herlev, multi_cancer, sipakmed, table
from cellops.models.data.layouts.listing import LayoutError, Listing, check_classes
from cellops.models.data.samples import CellData

__all__ = ["LAYOUTS", "Layout", "LayoutError", "open_data"]


@dataclass(frozen=True)
class Layout:
    """How one data set lies on disk.

    Attributes:
        expects: what to find below the folder, for errors and help.
        read: the data set, or None where the files are not of this layout; further parameters are options.
    """

    expects: str
    read: Callable[..., CellData | None]


# In the order in which they are tried: the special ones first, since any of them is also a folder of folders.
LAYOUTS = {
    "sipakmed": Layout(sipakmed.EXPECTS, sipakmed.read),
    "multi_cancer": Layout(multi_cancer.EXPECTS, multi_cancer.read),
    "hep2": Layout(hep2.EXPECTS, hep2.read),
    "hep2_main": Layout(hep2.EXPECTS_MAIN, hep2.read_main),
    "herlev": Layout(herlev.EXPECTS, herlev.read),
    "cric": Layout(table.EXPECTS_CRIC, table.read_cric),
    "table": Layout(table.EXPECTS_TABLE, table.read_table),
    "pbc": Layout(folders.EXPECTS_PBC, folders.read_pbc),
    "folders": Layout(folders.EXPECTS, folders.read),
}


def open_data(path: str | Path, layout: str = "auto", **options: Any) -> CellData:
    """The data set at a path.

    Args:
        path: a folder, a CSV file, or "synthetic" for drawn cells.
        layout: a name of `LAYOUTS`, or "auto" for the first that fits.
        options: `classes` selects or joins classes (`CellData.select`); `count`, `size` and `seed` for synthetic cells;
            `masks` for hep2; `hash_groups`, `workers` and `progress` for multi_cancer.

    Raises:
        LayoutError: the path is missing or empty, holds another layout, has folders or tables that are links out of it,
            one class, or classes whose names cannot be told apart or start a formula.
        ValueError: an option is unknown or not of this layout.
    """
    classes = options.pop("classes", None)
    if str(path) == "synthetic":
        data = synthetic.draw_cells(**_known(synthetic.draw_cells, options, "synthetic"))
    else:
        data = _from_disk(Path(path).expanduser(), layout, options)
        dark = dark_note(data)
        data = replace(data, notes=(*data.notes, dark)) if dark else data
    if classes is not None:
        data = data.select(classes)
    try:
        check_classes(data.classes)
    except ValueError as error:
        raise LayoutError(f"{path}: {error}") from None
    present = [name for name, count in data.class_counts.items() if count]
    if len(present) < 2:
        raise LayoutError(f"{path}: only one class has images ({', '.join(present)}); a classifier needs two")
    return data


def _from_disk(path: Path, layout: str, options: dict[str, Any]) -> CellData:
    if layout != "auto" and layout not in LAYOUTS:
        raise ValueError(f"layout must be auto or one of {', '.join(LAYOUTS)}, got {layout!r}")
    if not path.exists():
        raise LayoutError(
            f"{path} does not exist.\n{_expected(layout)}\nor `synthetic`, for drawn cells without a download"
        )
    if path.is_file():
        return _from_file(path, layout, options)
    listing = Listing.of(path)
    for name in LAYOUTS if layout == "auto" else (layout,):
        read = LAYOUTS[name].read
        data = read(listing, **{option: options[option] for option in options if option in _options(read)})
        if data is not None:
            _known(read, options, data.name)
            return data
    raise LayoutError(f"{path}: no data set recognised; found: {listing.summary()}.\n{_expected(layout)}")


def _from_file(path: Path, layout: str, options: dict[str, Any]) -> CellData:
    if path.suffix.lower() != ".csv" or layout not in ("auto", "table", "cric"):
        raise LayoutError(f"{path} is a file.\n{_expected(layout)}")
    listing = Listing.of(path.parent)
    cric = {"file", "class", "parent_image"} <= table.columns_of(path)
    read = table.read_cric if layout == "cric" or (layout == "auto" and cric) else table.read_table
    data = read(listing, path)
    assert data is not None  # a table that is given is read or refused
    _known(table.read_cric, options, data.name)
    return data


def _options(read: Callable[..., Any]) -> set[str]:
    return set(signature(read).parameters) - {"listing", "table"}


def _known(read: Callable[..., Any], options: dict[str, Any], name: str) -> dict[str, Any]:
    unknown = set(options) - _options(read)
    if unknown:
        known = ", ".join(sorted({*_options(read), "classes"}))
        raise ValueError(f"data option {', '.join(sorted(unknown))} is not known for {name}; known: {known}")
    return options


def _expected(layout: str) -> str:
    names = LAYOUTS if layout == "auto" else (layout,)
    return "Expected one of:\n" + "\n".join(f"  {name}: {LAYOUTS[name].expects}" for name in names)
