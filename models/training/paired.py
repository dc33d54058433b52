"""Two classifiers on the same images: which is right where the other is wrong, and by how much they differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cellops.models.training.metrics import averages, resampled

EXACT_BELOW = 25  # images that one alone has right, from which on the chi-squared distribution is near enough
DIFFERENCES = ("accuracy_micro", "accuracy_macro")


def mcnemar(first: int, second: int) -> dict[str, Any]:
    """McNemar's test (1947) of whether two classifiers are right equally often, on images that are independent.

    Args:
        first: images that the first alone has right.
        second: those that the second alone has right.

    Returns:
        `test`: "exact" (two-sided binomial) below EXACT_BELOW images in all, else "corrected" (chi-squared with
        Edwards' continuity correction); `statistic`, None of an exact one; `p`.
    """
    count = first + second
    if count < EXACT_BELOW:
        tail = sum(math.comb(count, k) for k in range(min(first, second) + 1))
        return {"test": "exact", "statistic": None, "p": min(1.0, 2 * tail / 2**count)}
    statistic = max(abs(first - second) - 1, 0) ** 2 / count
    return {"test": "corrected", "statistic": statistic, "p": math.erfc(math.sqrt(statistic / 2))}


def holm(values: Sequence[float]) -> list[float]:
    """The p-values of several tests, adjusted so that any of them is wrong at the level of one (Holm 1979)."""
    adjusted, highest = [0.0] * len(values), 0.0
    for rank, place in enumerate(sorted(range(len(values)), key=lambda place: values[place])):
        highest = max(highest, min(1.0, (len(values) - rank) * values[place]))
        adjusted[place] = highest
    return adjusted


def right_and_wrong(targets: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Images [2, 2]: rows for the first right and wrong, columns for the second.

    Args:
        targets: class numbers [N].
        first: predicted ones [N].
        second: predicted ones [N].
    """
    one, other = first == targets, second == targets
    return np.array([[(one & other).sum(), (one & ~other).sum()], [(~one & other).sum(), (~one & ~other).sum()]])


def differences(
    targets: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    classes: int,
    samples: int = 1000,
    seed: int = 0,
    groups: Sequence[Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """The first's accuracy and balanced accuracy less the second's, with paired bootstrap intervals.

    A resample draws images, or whole groups, and takes them for both classifiers.

    Args:
        targets: class numbers [N].
        first: predicted ones [N].
        second: predicted ones [N].
        classes: K.
        samples: resamples; fewer than 2 give no interval.
        seed: of the draws.
        groups: [N] or None.

    Returns:
        Name of the metric -> `value`, and `interval`: percentiles 2.5 and 97.5, None where all resamples are alike.
    """
    cells = []
    for found in (first, second):
        cell = np.zeros((len(targets), classes * classes))
        cell[np.arange(len(targets)), targets * classes + found] = 1
        cells.append(cell)

    def less(weights: np.ndarray) -> dict[str, np.ndarray]:
        one, other = (averages((weights @ cell).reshape(-1, classes, classes)) for cell in cells)
        return {name: one[name] - other[name] for name in DIFFERENCES}

    values = less(np.ones((1, len(targets))))
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in DIFFERENCES}
    for weights in resampled(len(targets), samples if samples > 1 else 0, seed, groups):
        for name, column in less(weights).items():
            drawn[name].append(column)
    found = {}
    for name in DIFFERENCES:
        low, high = np.quantile(np.concatenate(drawn[name]), (0.025, 0.975)) if drawn[name] else (0.0, 0.0)
        interval = (float(low), float(high)) if low < high else None
        found[name] = {"value": float(values[name][0]), "interval": interval}
    return found
