"""The cervical part of Kaggle's Multi Cancer: SIPaKMeD inflated to 5,000 images a class by augmentation."""

from __future__ import annotations

from dataclasses import replace

from cellops.models.data.images import Progress
from cellops.models.data.layouts.listing import Found, Listing, assemble, parent
from cellops.models.data.likeness import groups_of_alike, signatures
from cellops.models.data.samples import CellData

EXPECTS = "Multi Cancer/Multi Cancer/Cervical Cancer/cervix_{dyk,koc,mep,pab,sfi}/*.jpg, or from any of its folders"

CLASSES = {
    "cervix_dyk": "Dyskeratotic",
    "cervix_koc": "Koilocytotic",
    "cervix_mep": "Metaplastic",
    "cervix_pab": "Parabasal",
    "cervix_sfi": "Superficial-Intermediate",
}


def read(
    listing: Listing, hash_groups: bool = True, workers: int | None = None, progress: Progress | None = None
) -> CellData | None:
    """Read the images; those alike but for rotation and flips are one group, which needs each of them decoded.

    Args:
        listing: the files.
        hash_groups: without it every image is its own group.
        workers: threads that decode; None is one a core.
        progress: called with (done, total) while images are decoded.
    """
    found = [Found(path, CLASSES[parent(path).lower()]) for path in listing.images if parent(path).lower() in CLASSES]
    if not found:
        return None
    left_out = len(listing.images) - len(found)
    note = f"{left_out} images of other organs were left out." if left_out else None
    data = assemble("multi_cancer", listing, found, [note])
    if not hash_groups:
        return replace(
            data, notes=(*data.notes, "Augmented copies of one cell were not looked for (hash_groups: false).")
        )
    # A copy keeps its class, so classes are compared apart: fewer chance likenesses.
    names, largest = [""] * len(data), 0
    described = signatures(data, workers, progress)
    for label, name in enumerate(data.classes):
        members = [index for index, sample in enumerate(data.samples) if sample.label == label]
        groups = groups_of_alike(described[members])
        for index, group in zip(members, groups, strict=True):
            names[index] = f"{name}/{group:05d}"
        if groups:
            largest = max(largest, max(groups.count(group) for group in set(groups)))
    samples = tuple(replace(sample, group=group) for sample, group in zip(data.samples, names, strict=True))
    note = f"{len(set(names))} groups of images that are alike but for rotation and flips; the largest has {largest}."
    return replace(data, samples=samples, grouped=True, notes=(*data.notes, note))
