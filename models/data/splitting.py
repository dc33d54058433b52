"""Stratified splits, with and without groups, of scikit-learn."""

from __future__ import annotations

import warnings

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, StratifiedShuffleSplit

from cellops.models.data.samples import CellData

ATTEMPTS = 20  # draws of a grouped split, of which the most even is taken
DRAWS = 25  # of the smaller groups of a part that is held out, in each attempt
LARGEST = 8  # groups that are held out by chance alone


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
                "learned and tested. Leave the class out (data.options.classes) or add images"
            )
        if groups is not None and len(set(groups[members])) < 2:
            raise FoldError(
                f"class {data.classes[label]!r}: all {len(members)} images are of one group, "
                f"{str(groups[members[0]])!r}, so that it cannot be both learned and tested. Leave the class out "
                "(data.options.classes), add images or split image by image (data.protocol: paper)"
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


def _split(splitter: StratifiedKFold | StratifiedGroupKFold, labels: np.ndarray, groups: np.ndarray | None) -> list:
    """The splits of scikit-learn, whose warning of a class with fewer images than folds Folds.notes says by name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")
        return list(splitter.split(labels, labels, groups))


def _grouped(labels: np.ndarray, groups: np.ndarray, parts: int, seed: int) -> list[Split]:
    """The most even of some random grouped splits; the first where no class is lacking anywhere."""
    best: tuple[tuple[int, float], list[Split]] | None = None
    for attempt in range(ATTEMPTS):
        folder = StratifiedGroupKFold(parts, shuffle=True, random_state=(seed * 1009 + attempt) % 2**32)
        splits = _split(folder, labels, groups)
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
    largest = int(np.bincount(labels).max())
    if folds > largest:
        raise FoldError(f"data.folds: {folds} parts of at most {largest} images of a class; use {largest} or fewer")
    if groups is None:
        splits = _split(StratifiedKFold(folds, shuffle=True, random_state=seed % 2**32), labels, None)
    else:
        count = len(set(groups[indices]))
        if folds > count:
            raise FoldError(f"data.folds: {folds} parts of {count} groups; use {count} or fewer")
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
            "no two classes have a second image or group for a validation part. Train without one "
            "(data.validation: 0), or split image by image (data.protocol: paper)"
        )
    _, held = hold_out(data, free, groups, min(fraction * len(indices) / len(free), 0.9), seed)
    return np.setdiff1d(indices, held), held


def hold_out(data: CellData, indices: np.ndarray, groups: np.ndarray | None, fraction: float, seed: int) -> Split:
    """One split, `fraction` of the images (about that, where groups stay whole) on the second side.

    The first side has every class, so that the second is smaller than asked where that needs it.

    Raises:
        FoldError: a class of one image or group.
    """
    _check_classes(data, indices, groups)
    present, labels = np.unique(data.labels[indices], return_inverse=True)
    count = min(max(round(fraction * len(indices)), len(present)), len(indices) - len(present))
    if groups is None or len(set(groups[indices])) == len(indices):
        held = _drawn_images(labels, count, seed)
    else:
        held = _drawn_groups(labels, groups[indices], count, seed)
    return indices[~held], indices[held]


def _drawn_images(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Which images are held out, bool [N]: `count` of them, but for one of a class that all would be of."""
    _, drawn = next(StratifiedShuffleSplit(1, test_size=count, random_state=seed % 2**32).split(labels, labels))
    held = np.isin(np.arange(len(labels)), drawn)
    for label in set(labels.tolist()) - set(labels[~held].tolist()):
        held[drawn[labels[drawn] == label][0]] = False
    return held


def _drawn_groups(labels: np.ndarray, groups: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Which images are held out, bool [N]: whole groups with about `count`, every class among them where that can be.

    Chance decides on each of the largest groups, since the most even part has none of them, whatever the seed, and
    StratifiedGroupKFold deals them out nearly alike for every seed. The others make the part as even as they can.
    """
    _, group = np.unique(groups, return_inverse=True)
    counts = np.zeros((int(group.max()) + 1, int(labels.max()) + 1), dtype=np.int64)
    np.add.at(counts, (group, labels), 1)
    share, random = count / len(labels), np.random.default_rng(seed)
    by_size = np.argsort(-(counts / counts.sum(0)).max(1), kind="stable")
    largest, others = np.split(by_size, [min(LARGEST, len(counts) // 4)])
    best: tuple[tuple[int, float], np.ndarray] | None = None
    for attempt in range(ATTEMPTS):
        # Each with the probability `share`, and as many as that makes, to the next whole number.
        ends = np.floor(random.random() + share * np.arange(len(largest) + 1))
        chosen = random.permutation(largest)[np.diff(ends) > 0]
        if attempt >= ATTEMPTS // 2:  # every class is worth more than chance
            chosen, others = largest[:0], by_size
        for _ in range(DRAWS):
            taken = _taken(counts, np.concatenate([chosen, random.permutation(others)]), count)
            found = counts[taken].sum(0)
            shares = np.array([*(found / counts.sum(0)), found.sum() / len(labels)])
            score = int((found == 0).sum()), float(np.abs(shares - share).max())
            if best is None or score < best[0]:
                best = score, taken
            if score[0] == 0 and score[1] < 0.05:
                break
        if best is not None and best[0][0] == 0:
            break
    assert best is not None
    return np.isin(group, best[1])


def _taken(counts: np.ndarray, order: np.ndarray, count: int) -> np.ndarray:
    """Groups in an order, each where it brings the part nearer to `count` images and leaves some of every class.

    Args:
        counts: images by group and class; every class has two groups, so that any one group can be taken.
        order: of the groups that may be taken.
        count: images wanted.
    """
    sizes, left, total = counts.sum(1), counts.sum(0), 0
    taken = []
    for group in order:
        if abs(total + sizes[group] - count) < abs(total - count) and (left > counts[group]).all():
            taken.append(group)
            left, total = left - counts[group], total + sizes[group]
        if total >= count:
            break
    return np.array(taken or [order[sizes[order].argmin()]])
