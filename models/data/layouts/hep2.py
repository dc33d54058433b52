"""HEp-2 cells of the ICPR 2012 contest: 1,455 cells, six patterns, 28 specimens (Foggia et al. 2013)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import PurePosixPath

from cellops.models.data.layouts.listing import Found, LayoutError, Listing, assemble, counted, stem, suffix
from cellops.models.data.layouts.table import rows_of
from cellops.models.data.samples import CellData

EXPECTS = (
    "training/ and test/ with NNN.png and NNN_mask.png, gt_training.csv and gt_test.csv (id;pattern) beside them, "
    "and cells.csv"
)
EXPECTS_MAIN = (
    "Main_Dataset/Images/NN/ with a file per cell, its mask, and a CSV that gives the pattern of each cell or specimen"
)

PATTERNS = ("homogeneous", "coarse_speckled", "fine_speckled", "nucleolar", "centromere", "cytoplasmatic")
MASK = re.compile(r"[-_]?mask$", re.IGNORECASE)
SPLIT_OF = {"training": "train", "train": "train", "test": "test"}
SPECIMEN = re.compile(r"(?:^|/)Images/(\d+)/(.+)$", re.IGNORECASE)


# The contest's names by every spelling that is taken for them.
PATTERN_NAMES = {name: name for name in PATTERNS} | {"cytoplasmic": "cytoplasmatic", "homogenous": "homogeneous"}


def spelling(value: str) -> str:
    """A pattern's name as in the keys of `PATTERN_NAMES`: lower case, joined by underscores."""
    return re.sub(r"[\s_-]+", "_", value.strip().lower())


def number(value: str) -> int:
    """The first number in a cell of a table or in a file's name; -1 without one."""
    digits = re.search(r"\d+", value)
    return int(digits.group()) if digits else -1


def column(row: dict[str, str], *words: str) -> str | None:
    """The name of the first column that contains one of these words."""
    return next((name for word in words for name in row if word in name), None)


def pattern_column(rows: list[dict[str, str]]) -> str | None:
    """The column in which every value is a pattern."""
    return (
        next((name for name in rows[0] if all(spelling(row[name]) in PATTERN_NAMES for row in rows)), None)
        if rows
        else None
    )


def masks_of(images: Iterable[str]) -> dict[tuple[str, str], str]:
    """(folder, stem of the image in lower case) -> path of its mask."""
    return {
        (str(PurePosixPath(path).parent), MASK.sub("", stem(path)).lower()): path
        for path in images
        if MASK.search(stem(path))
    }


def read(listing: Listing, masks: bool = True) -> CellData | None:
    """The contest's release.

    Args:
        listing: the files.
        masks: whether the background is made black.

    Raises:
        LayoutError: an image has no row or a row no image, or a pattern is unknown.
    """
    truths = {
        path: re.fullmatch(r"gt_(training|train|test)", stem(path), re.IGNORECASE)
        for path in listing.paths
        if suffix(path) == ".csv"
    }
    # One table for each part, the first where copies of it lie about.
    tables = {match.group(1).lower(): path for path, match in sorted(truths.items(), reverse=True) if match}
    if not tables:
        return None
    mask_files = masks_of(listing.images)
    specimens = _specimens(listing)
    found: list[Found] = []
    unmasked = 0
    for part, table in sorted(tables.items(), reverse=True):  # training before test
        rows = rows_of(listing.path(table))
        patterns = pattern_column(rows)
        if patterns is None:
            raise LayoutError(f"{listing.path(table)}: no column holds patterns only ({', '.join(PATTERNS)})")
        key = column(rows[0], "id") or next(iter(rows[0]))
        images = {
            number(stem(path)): path
            for path in listing.images
            if PurePosixPath(path).parent.name.lower() == part
            and not MASK.search(stem(path))
            and number(stem(path)) >= 0
        }
        ids = {number(row[key]): PATTERN_NAMES[spelling(row[patterns])] for row in rows}
        if images.keys() != ids.keys():
            lone = sorted(str(cell) for cell in images.keys() ^ ids.keys())
            raise LayoutError(
                f"{listing.path(table)} and the images of {part}/ do not agree: {len(lone)} cells are in one only, "
                f"e.g. {lone[0]}"
            )
        split = SPLIT_OF[part]
        # Some copies of cells.csv number the test cells on from the training cells.
        trained = 0 if split == "train" else sum(image.split == "train" for image in found)
        shift = trained if all((split, cell + trained) in specimens for cell in images) else 0
        for cell, path in images.items():
            mask = mask_files.get((str(PurePosixPath(path).parent), stem(path).lower()))
            unmasked += mask is None
            specimen = specimens.get((split, cell + shift))
            found.append(Found(path, ids[cell], group=specimen, split=split, mask=mask if masks else None))
    lonely = sum(image.group is None for image in found)
    notes = [
        None if masks else "The masks were not used (masks: false).",
        counted(
            unmasked if masks else 0,
            "image without a mask keeps its background.",
            "images without a mask keep their background.",
        ),
        f"{lonely} cells have no specimen in cells.csv: their split cannot keep specimens together."
        if lonely
        else None,
    ]
    present = {image.label for image in found}
    both = len({image.split for image in found}) == 2
    if not both:
        found = [Found(image.path, image.label, image.group, None, image.mask) for image in found]
        notes.append("Only one of training/ and test/ is there, so that no split is prescribed.")
    return assemble("hep2", listing, found, notes, [name for name in PATTERNS if name in present])


def _specimens(listing: Listing) -> dict[tuple[str, int], str]:
    """(split, cell's number) -> specimen, from cells.csv; empty without one."""
    specimens: dict[tuple[str, int], str] = {}
    for path in listing.named("cells.csv"):
        for row in rows_of(listing.path(path)):
            image = column(row, "image", "specimen")
            part = next((row[name].lower() for name in row if row[name].lower() in SPLIT_OF), None)
            cell = column({name: "" for name in row if name != image}, "id", "cell")
            if image and part and cell and number(row[cell]) >= 0:
                specimens[SPLIT_OF[part], number(row[cell])] = f"image {row[image]}"
    return specimens


def read_main(listing: Listing, masks: bool = True) -> CellData | None:
    """The later release: a folder per specimen; the whole field of view `NN/NN.bmp` is left out.

    Args:
        listing: the files.
        masks: whether the background is made black.

    Raises:
        LayoutError: no table gives the patterns, or a folder has no files of single cells.
    """
    matches = {path: SPECIMEN.search(path) for path in listing.images}
    places = {path: (int(match.group(1)), match.group(2)) for path, match in matches.items() if match}
    if not places or not any("main_dataset" in path.lower() for path in (*places, str(listing.root))):
        return None
    of_cell, of_specimen = _patterns(listing)
    mask_files = masks_of(listing.images)
    found, unknown = [], []
    fields = unmasked = 0
    for path, (specimen, rest) in places.items():
        if MASK.search(stem(path)):
            continue
        if "/" not in rest and number(stem(path)) == specimen and stem(path).isdigit():
            fields += 1
            continue
        numbers = [int(digits) for digits in re.findall(r"\d+", stem(path))]
        cell = numbers[-1] if numbers else None
        pattern = of_cell.get((specimen, cell)) or of_specimen.get(specimen)
        if pattern is None:
            unknown.append(path)
            continue
        mask = mask_files.get((str(PurePosixPath(path).parent), stem(path).lower()))
        unmasked += mask is None
        found.append(Found(path, pattern, group=f"image {specimen:02d}", mask=mask if masks else None))
    if unknown:
        raise LayoutError(
            f"no table gives the pattern of {len(unknown)} cells, e.g. {unknown[0]}; expected {EXPECTS_MAIN}"
        )
    if not found:
        raise LayoutError(
            f"{listing.root}: {fields} whole fields of view and no file of a single cell; expected {EXPECTS_MAIN}"
        )
    notes = [
        counted(
            fields, "whole field of view was left out.", "whole fields of view, which contain the cells, were left out."
        ),
        None if masks else "The masks were not used (masks: false).",
        counted(
            unmasked if masks else 0,
            "image without a mask keeps its background.",
            "images without a mask keep their background.",
        ),
    ]
    present = {image.label for image in found}
    return assemble("hep2_main", listing, found, notes, [name for name in PATTERNS if name in present])


def _patterns(listing: Listing) -> tuple[dict[tuple[int, int | None], str], dict[int, str]]:
    """Patterns by (specimen, cell) and by specimen, from every CSV that has a column of patterns."""
    of_cell: dict[tuple[int, int | None], str] = {}
    of_specimen: dict[int, str] = {}
    for path in listing.paths:
        if suffix(path) != ".csv":
            continue
        rows = rows_of(listing.path(path))
        patterns = pattern_column(rows)
        if patterns is None:
            continue
        image = column(rows[0], "image", "specimen")
        cell = column({name: "" for name in rows[0] if name != image}, "cell", "id")
        place = SPECIMEN.search(path)
        for row in rows:
            specimen = int(place.group(1)) if place else number(row[image]) if image else None
            if specimen is None:
                continue
            if cell is not None and number(row[cell]) >= 0:
                of_cell[specimen, number(row[cell])] = PATTERN_NAMES[spelling(row[patterns])]
            else:
                of_specimen[specimen] = PATTERN_NAMES[spelling(row[patterns])]
    return of_cell, of_specimen
