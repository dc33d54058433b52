"""SIPaKMeD: 4,049 cells cut from 966 cluster images, five classes (Plissiti et al. 2018)."""

from __future__ import annotations

import re

from cellops.models.data.layouts.listing import Found, Listing, assemble, counted
from cellops.models.data.samples import CellData

EXPECTS = "im_<Class>/im_<Class>/CROPPED/NNN_MM.bmp, or the same with one im_<Class>/ or without CROPPED/"

# 001_05.bmp is the fifth cell of cluster 001, which is 001.bmp; the numbers start again in every class.
CLASS = re.compile(r"(?:^|/)im_([^/]+)/", re.IGNORECASE)
CELL = re.compile(r"(?:^|/)(\d+)_(\d+)\.(?:bmp|png|jpe?g|tiff?)$", re.IGNORECASE)
COUNTS = {
    "Dyskeratotic": 813,
    "Koilocytotic": 825,
    "Metaplastic": 793,
    "Parabasal": 787,
    "Superficial-Intermediate": 831,
}


def read(listing: Listing) -> CellData | None:
    """Read the crops only: a search for *.bmp also finds the clusters that contain them."""
    names = {name.lower(): name for name in COUNTS}
    found: dict[tuple[str, int, int], Found] = {}
    copies = clusters = 0
    for path in listing.images:
        belongs = CLASS.search(path)
        if belongs is None:
            continue
        label = names.get(belongs.group(1).lower().replace("_", "-"), belongs.group(1))
        cell = CELL.search(path)
        if cell is None:
            clusters += 1
            continue
        cluster, number = int(cell.group(1)), int(cell.group(2))
        if (label, cluster, number) in found:
            copies += 1
            continue
        found[label, cluster, number] = Found(path, label, group=f"{label}/{cluster:03d}")
    if not found:
        return None
    missing = [name for name in COUNTS if name not in {label for label, _, _ in found}]
    notes = [
        counted(
            clusters,
            "cluster image, which contains cells, was left out.",
            "cluster images, which contain the cells, were left out.",
        ),
        counted(copies, "second copy of a cell was left out.", "second copies of cells were left out."),
        f"No images of {', '.join(missing)}." if missing else None,
        listing.others(),
    ]
    return assemble("sipakmed", listing, found.values(), notes)
