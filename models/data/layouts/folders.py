"""Folders named like their classes: PBC and any other."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from cellops.models.data.layouts.listing import Found, LayoutError, Listing, assemble, counted, stem
from cellops.models.data.layouts.table import SPLITS, merged
from cellops.models.data.samples import CellData

EXPECTS = "<class>/*.{png,jpg,bmp,tif} for two classes or more, also below train/ and test/"
EXPECTS_PBC = "basophil/, eosinophil/, erythroblast/, ig/, lymphocyte/, monocyte/, neutrophil/ and platelet/ with *.jpg"

PBC = ("basophil", "eosinophil", "erythroblast", "ig", "lymphocyte", "monocyte", "neutrophil", "platelet")
MASK = re.compile(r"[-_]mask$", re.IGNORECASE)


def read(listing: Listing) -> CellData | None:
    """The first folder's name is the class; folders that wrap all the others are passed over.

    Raises:
        LayoutError: folders are named like parts of a split that lacks a part, or has other folders beside it.
    """
    images, masks = without_masks(listing.images)
    prefix = wrapper(images)
    top: dict[str, list[str]] = {}
    stray = 0
    for path in images:
        parts = path[len(prefix) :].split("/")
        if len(parts) == 1:
            stray += 1
        else:
            top.setdefault(parts[0], []).append(path)
    splits = _parts(listing, prefix, list(top))
    found = []
    if splits:
        for name, paths in top.items():
            for path in paths:
                parts = path[len(prefix) :].split("/")
                if len(parts) < 3:
                    stray += 1
                else:
                    found.append(Found(path, parts[1], split=splits[name]))
    else:
        found = [Found(path, name) for name, paths in top.items() for path in paths]
    if len({image.label for image in found}) < 2:
        return None
    empty = [folder for folder in listing.folders if folder.startswith(prefix) and "/" not in folder[len(prefix) :]]
    notes = [
        *(merged(name, len(top[name])) for name in splits),
        f"Class folders without images: {', '.join(PurePosixPath(folder).name for folder in empty)}."
        if empty
        else None,
        counted(masks, "mask was not read as an image.", "masks were not read as images."),
        counted(
            stray, "image outside the class folders was left out.", "images outside the class folders were left out."
        ),
        listing.others(),
    ]
    return assemble(PurePosixPath(prefix).name or listing.root.name, listing, found, notes)


def _parts(listing: Listing, prefix: str, names: list[str]) -> dict[str, str]:
    """The part, train or test, that each of the folders stands for; empty where they are classes.

    Raises:
        LayoutError: some are named like parts, but not all, or of one part only.
    """
    parts = {name: SPLITS[name.lower()] for name in names if name.lower() in SPLITS}
    if not parts or len(names) == 1:
        return {}
    others = [name for name in names if name not in parts]
    place, told = listing.root / prefix, _slashed(parts)
    for part in ("train", "test"):
        if part not in parts.values():
            raise LayoutError(
                f"{place}: {told} would be a class, since its name is that of a part of a split and no {part}/ is "
                f"there. Rename what is the {part} part to {part}/, give the folder that holds the classes, e.g. "
                f"{place / next(iter(parts))}, or give the class another name"
            )
    if others:
        raise LayoutError(
            f"{place}: {_slashed(others)} beside {told}, which are parts of a split, would be classes. Move what "
            "belongs to no part out of the data folder, or give the classes other names"
        )
    return parts


def _slashed(names: Iterable[str]) -> str:
    return ", ".join(f"{name}/" for name in names)


def read_pbc(listing: Listing) -> CellData | None:
    """PBC blood cells (Acevedo et al. 2020); no patient ids exist, so that every image is its own group."""
    data = read(listing)
    if data is None or tuple(name.lower() for name in data.classes) != PBC:
        return None
    note = "No patient ids exist: cells of one person may lie on both sides of a split."
    return CellData("pbc", data.root, data.classes, data.samples, notes=(*data.notes, note))


def without_masks(images: Iterable[str]) -> tuple[list[str], int]:
    """The images less `NAME_mask` beside a `NAME`, and how many of those there were."""
    images = list(images)
    known = {(str(PurePosixPath(path).parent), stem(path).lower()) for path in images}
    kept = []
    for path in images:
        base = MASK.sub("", stem(path)).lower()
        is_mask = base != stem(path).lower() and (str(PurePosixPath(path).parent), base) in known
        if not is_mask:
            kept.append(path)
    return kept, len(images) - len(kept)


def wrapper(images: Iterable[str]) -> str:
    """The folders, with "/", that lie above every class: those that hold one folder each and no image."""
    split = [path.split("/") for path in images]
    depth = 0
    while split and all(len(parts) > depth + 2 for parts in split) and len({parts[depth] for parts in split}) == 1:
        depth += 1
    return "".join(part + "/" for part in split[0][:depth]) if split else ""
