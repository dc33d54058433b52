"""Herlev: 917 cells, seven classes (Jantzen et al. 2005)."""

from __future__ import annotations

import re

from cellops.models.data.layouts.listing import Found, Listing, assemble, counted, parent, stem
from cellops.models.data.samples import CellData

EXPECTS = "<class>/A-B-NNN.BMP with masks A-B-NNN-d.bmp, e.g. carcinoma_in_situ/149143370-149143378-001.BMP"

# From normal to cancer; copies of the set differ in spelling.
CLASSES = {
    "normal_superficiel": "superficie|superficial",
    "normal_intermediate": "intermedi",
    "normal_columnar": "columnar",
    "light_dysplastic": "light|mild",
    "moderate_dysplastic": "moderate",
    "severe_dysplastic": "severe",
    "carcinoma_in_situ": "carcinoma|in_situ",
}
NAME = re.compile(r"^(\d+)-(\d+)-(\d+)((?:[-_][a-z]+\d*)*)$", re.IGNORECASE)
COPY = re.compile(r"[-_]c\d+", re.IGNORECASE)


def class_name(folder: str) -> str | None:
    """The class that a folder stands for, or None."""
    matches = [name for name, spelling in CLASSES.items() if re.search(spelling, folder, re.IGNORECASE)]
    return matches[0] if len(matches) == 1 else None


def read(listing: Listing) -> CellData | None:
    """Read the cells; A of A-B-NNN, the smear's scan, is the group."""
    found = []
    masks = copies = others = 0
    for path in listing.images:
        name, label = NAME.match(stem(path)), class_name(parent(path))
        if name is None or label is None:
            others += 1
            continue
        if COPY.search(name.group(4)):
            copies += 1
        elif name.group(4):
            masks += 1
        else:
            found.append(Found(path, label, group=name.group(1)))
    if not found:
        return None
    present = {image.label for image in found}
    missing = [name for name in CLASSES if name not in present]
    notes = [
        counted(masks, "mask (-d) was not read as an image.", "masks (-d) were not read as images."),
        counted(copies, "augmented copy (-c1) was left out.", "augmented copies (-c1, -c2, ...) were left out."),
        counted(others, "image with another name was left out.", "images with other names were left out."),
        f"No images of {', '.join(missing)}." if missing else None,
        listing.others(),
    ]
    return assemble("herlev", listing, found, notes, [name for name in CLASSES if name in present])
