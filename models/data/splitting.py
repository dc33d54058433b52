"""Stratified splits, with and without groups, of scikit-learn."""

from __future__ import annotations

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, StratifiedShuffleSplit

from cellops.models.data.samples import CellData

ATTEMPTS = 20  # draws of a grouped split, of which the most even is taken


class FoldError(ValueError):
    """A data set cannot be split as asked, or a file of folds does not belong to it."""


Split = tuple[np.ndarray, np.ndarray]


def _check_classes(data: CellData, indices: np.ndarray, groups: np.ndarray | None) -> None:
    """Every class must be able to lie on both sides.

    Raises:
        FoldError: one cannot.
    """
    labels = data.labels[indices]
    for label in np.unique(labels):
        members = indices[labels == label]
        if len(members) < 2:
            raise FoldError(
                f"class {data.classes[label]!r} has one image, {data.samples[members[0]].id}: it cannot be both "
                "learned and tested. Leave the class out (classes: ...) or add images"
            )
        if groups is not None and len(set(groups[members])) < 2:
            raise FoldError(
                f"class {data.classes[label]!r}: all {len(members)} images are of one group, "
                f"{str(groups[members[0]])!r}, so that it cannot be both learned and tested. Leave the class out "
                "(classes: ...), add images or split image by image (protocol: paper)"
            )


def _unevenness(labels: np.ndarray, splits: list[Split]) -> tuple[int, float]:
    """How many parts lack a class, then the largest departure of a class's share in a test part from its mean."""
    present, counts = np.unique(labels, return_counts=True)
    shares = []
    lacking = 0
    for _, test in splits:
        in_test = np.array([(labels[test] == label).sum() for label in present])
        lacking += int((in_test == 0).sum()) + len(present) * int((in_test == counts).sum())
        shares.append(in_test / counts)
    target = [len(test) / len(labels) for _, test in splits]
    return lacking, float(np.abs(np.array(shares) - np.array(target)[:, None]).max())


def _grouped(labels: np.ndarray, groups: np.ndarray, parts: int, seed: int) -> list[Split]:
    """The most even of some random grouped splits; the first where no class is lacking anywhere."""
    best: tuple[tuple[int, float], list[Split]] | None = None
    for attempt in range(ATTEMPTS):
        folder = StratifiedGroupKFold(parts, shuffle=True, random_state=(seed * 1009 + attempt) % 2**32)
        splits = list(folder.split(labels, labels, groups))
        score = _unevenness(labels, splits)
        if best is None or score < best[0]:
            best = score, splits
        if score[0] == 0 and score[1] < 0.1:
            break
    assert best is not None
    return best[1]


def cross_validation(
    data: CellData, indices: np.ndarray, groups: np.ndarray | None, folds: int, seed: int
) -> list[Split]:
    """Splits in which every index is tested once.

    Args:
        data: for labels and names.
        indices: of the samples to split.
        groups: of all samples, or None to split image by image.
        folds: how many.
        seed: of the draw.

    Raises:
        FoldError: there are fewer images or groups than folds, or a class of one image or group.
    """
    _check_classes(data, indices, groups)
    labels = data.labels[indices]
    if groups is None:
        largest = int(np.bincount(labels).max())
        if folds > largest:
            raise FoldError(f"folds: {folds} of at most {largest} images of a class cannot each test one")
        import warnings

        with warnings.catch_warnings():
            # A class with fewer images than folds is absent from some test parts, which Folds.notes says.
            warnings.filterwarnings("ignore", message="The least populated class")
            splits = list(StratifiedKFold(folds, shuffle=True, random_state=seed % 2**32).split(labels, labels))
    else:
        count = len(set(groups[indices]))
        if folds > count:
            raise FoldError(f"folds: {folds} of {count} groups cannot each test one")
        splits = _grouped(labels, groups[indices], folds, seed)
    return [(indices[train], indices[test]) for train, test in splits]


def set_aside(data: CellData, indices: np.ndarray, groups: np.ndarray | None, fraction: float, seed: int) -> Split:
    """`hold_out` for validation: classes of one image or group stay on the first side, with what shares their groups.

    Raises:
        FoldError: no two classes are left to split.
    """
    names = np.arange(len(data)) if groups is None else groups
    units = {label: set(names[indices[data.labels[indices] == label]]) for label in np.unique(data.labels[indices])}
    kept: set[object] = set()
    while lone := set().union(*(found for found in units.values() if len(found - kept) < 2)) - kept:
        kept |= lone
    free = np.array([index for index in indices if names[index] not in kept], dtype=int)
    if len(np.unique(data.labels[free])) < 2:
        raise FoldError(
            "no two classes have a second image or group for a validation part. Train without one (validation: 0), or "
            "split image by image (protocol: paper)"
        )
    _, held = hold_out(data, free, groups, min(fraction * len(indices) / len(free), 0.9), seed)
    return np.setdiff1d(indices, held), held


def hold_out(data: CellData, indices: np.ndarray, groups: np.ndarray | None, fraction: float, seed: int) -> Split:
    """One split, `fraction` of the images (about that, where groups stay whole) on the second side.

    Raises:
        FoldError: a class of one image or group.
    """
    _check_classes(data, indices, groups)
    labels = data.labels[indices]
    if groups is None:
        count = min(max(round(fraction * len(indices)), len(set(labels))), len(indices) - len(set(labels)))
        splitter = StratifiedShuffleSplit(1, test_size=count, random_state=seed % 2**32)
        rest, held = next(splitter.split(labels, labels))
        return indices[rest], indices[held]
    parts, taken = _nearest_ratio(fraction, len(set(groups[indices])))
    best: tuple[tuple[int, float], Split] | None = None
    for attempt in range(ATTEMPTS):
        folder = StratifiedGroupKFold(parts, shuffle=True, random_state=(seed * 1009 + attempt) % 2**32)
        tests = [test for _, test in folder.split(labels, labels, groups[indices])]
        held = np.sort(np.concatenate(tests[:taken]))
        split = np.setdiff1d(np.arange(len(indices)), held), held
        score = _unevenness(labels, [split])
        if best is None or score < best[0]:
            best = score, split
        if score[0] == 0 and score[1] < 0.05:
            break
    assert best is not None
    return indices[best[1][0]], indices[best[1][1]]


def _nearest_ratio(fraction: float, groups: int) -> tuple[int, int]:
    """Parts, and how many of them to take, whose ratio is nearest to a fraction; few parts where that is as near."""
    ratios = [(parts, taken) for parts in range(2, min(20, groups) + 1) for taken in range(1, parts)]
    return min(ratios, key=lambda ratio: (round(abs(ratio[1] / ratio[0] - fraction), 3), ratio[0]))
