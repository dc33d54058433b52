"""Metrics of a classifier, the averaging in every name: micro over images, macro over classes, weighted by their size.

Class means are over the classes that have an image among the targets: one that is absent from a part has no recall, and
counting it as 0 would punish the network for the split. Everything that follows from the confusion matrix is computed
for many matrices at once, so that bootstrap intervals cost one matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

BINS = 15  # of the calibration error, as in Guo et al. 2017
RESAMPLES_AT_ONCE = 100

LOWER_IS_BETTER = ("loss", "log_loss_micro", "brier_micro")
"""Of the metrics that may choose an epoch."""


def checked(probabilities: Any, targets: Any) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities as float64 [N, K] and targets as int64 [N].

    [N] or [N, 1] probabilities of class 1 become two columns.

    Raises:
        ValueError: shapes do not fit, there is no image, rows are no probabilities, or a target is no class.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    t = np.asarray(targets)
    if p.ndim == 1 or (p.ndim == 2 and p.shape[1] == 1):
        p = np.stack([1 - p.reshape(-1), p.reshape(-1)], 1)
    if p.ndim != 2 or t.shape != p.shape[:1] or not len(t):
        raise ValueError(
            f"probabilities must be [N, K] and targets [N] with N at least 1, got {list(p.shape)} and {list(t.shape)}"
        )
    if not np.isfinite(p).all() or (p < -1e-6).any() or (np.abs(p.sum(1) - 1) > 1e-3).any():
        row = int(np.argmax(~np.isfinite(p).all(1) | (p < -1e-6).any(1) | ~(np.abs(p.sum(1) - 1) <= 1e-3)))
        raise ValueError(f"row {row} of probabilities does not sum to 1 or holds no probabilities: {p[row].tolist()}")
    if not np.issubdtype(t.dtype, np.integer) or t.min() < 0 or t.max() >= p.shape[1]:
        raise ValueError(f"targets must be integers from 0 to {p.shape[1] - 1}, got {t.dtype} {t.min()} to {t.max()}")
    return p, t.astype(np.int64)


def ratio(part: np.ndarray, whole: np.ndarray, otherwise: float) -> np.ndarray:
    """part / whole, and a given value where the whole is 0."""
    return np.divide(part, whole, out=np.full(np.broadcast(part, whole).shape, otherwise), where=whole != 0)


def rates(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Per class from confusion matrices [..., K, K] (truth, prediction): each [..., K], NaN where there is no image.

    A class that is never predicted has precision 0.
    """
    confusion = confusion.astype(np.float64)
    hit = np.diagonal(confusion, axis1=-2, axis2=-1)
    true, predicted = confusion.sum(-1), confusion.sum(-2)
    everything = true.sum(-1, keepdims=True)
    absent = true == 0
    precision = np.where(absent, np.nan, ratio(hit, predicted, 0.0))
    recall = ratio(hit, true, np.nan)
    specificity = ratio(everything - true - predicted + hit, everything - true, np.nan)
    f1 = np.where(absent, np.nan, ratio(2 * hit, true + predicted, 0.0))
    return {"precision": precision, "recall": recall, "specificity": np.where(absent, np.nan, specificity), "f1": f1}


def mean_of_present(values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """The mean over the last axis without NaN, by weights if given; NaN where nothing is left."""
    known = ~np.isnan(values)
    share = known if weights is None else known * weights
    return ratio((np.where(known, values, 0) * share).sum(-1), share.sum(-1).astype(np.float64), np.nan)


def averages(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """The averaged metrics of confusion matrices [..., K, K]: each [...]."""
    confusion = confusion.astype(np.float64)
    of_class = rates(confusion)
    size = confusion.sum(-1)
    total = size.sum(-1)
    found = {
        "accuracy_micro": np.trace(confusion, axis1=-2, axis2=-1) / total,
        "accuracy_macro": mean_of_present(of_class["recall"]),
    }
    for name, values in of_class.items():
        found[f"{name}_macro"] = mean_of_present(values)
        found[f"{name}_weighted"] = mean_of_present(values, size)
    if confusion.shape[-1] == 2:
        for name, values in of_class.items():
            found[f"{name}_binary"] = values[..., 1]
    return found


def confusion_matrix(predicted: np.ndarray, targets: np.ndarray, classes: int) -> np.ndarray:
    """Counts [K, K] of (truth, prediction)."""
    return np.bincount(targets * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def aucs(probabilities: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each class against the rest, [K]; NaN where either side is empty."""
    return resampled_aucs(probabilities, targets, np.ones((1, len(targets))))[0]


def resampled_aucs(probabilities: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The same with each image counted `weights` [R, N] times: [R, K].

    The share of pairs of a positive and a negative that are in the right order, ties half (Mann and Whitney).
    """
    found = np.empty((len(weights), probabilities.shape[1]))
    for label in range(probabilities.shape[1]):
        order = np.argsort(probabilities[:, label], kind="stable")
        scores, positive = probabilities[order, label], targets[order] == label
        counts = weights[:, order]
        negatives = np.concatenate(
            [np.zeros((len(weights), 1)), np.cumsum(np.where(positive, 0, counts), axis=1)], axis=1
        )
        below = negatives[:, np.searchsorted(scores, scores[positive], "left")]
        up_to = negatives[:, np.searchsorted(scores, scores[positive], "right")]
        of_positive = counts[:, positive]
        pairs = of_positive.sum(1) * negatives[:, -1]
        found[:, label] = ratio((of_positive * (below + up_to) / 2).sum(1), pairs, np.nan)
    return found


def classification_metrics(probabilities: Any, targets: Any) -> dict[str, float]:
    """Every metric of a classifier.

    Args:
        probabilities: [N, K], or [N] and [N, 1] of class 1 of two.
        targets: [N] class indices.

    Returns:
        `accuracy_micro` (the share of images), `accuracy_macro` (balanced accuracy, the mean recall); `precision`,
        `recall`, `specificity` and `f1`, `auc` and `average_precision`, each class against the rest, as `_macro` and
        `_weighted`, with two classes also `_binary`, of class 1; `accuracy_top5_micro` with more than five classes;
        `kappa` and `matthews`; `log_loss_micro` and `brier_micro`, means over images. NaN where nothing defines one.

    Raises:
        ValueError: see `checked`.
    """
    from sklearn.metrics import average_precision_score, cohen_kappa_score, matthews_corrcoef

    p, t = checked(probabilities, targets)
    classes = p.shape[1]
    predicted = p.argmax(1)
    confusion = confusion_matrix(predicted, t, classes)
    found = {name: float(value) for name, value in averages(confusion).items()}
    size = confusion.sum(1)
    precisions = np.full(classes, np.nan)
    for label in np.flatnonzero(size):
        precisions[label] = average_precision_score(t == label, p[:, label])
    for name, values in (("auc", aucs(p, t)), ("average_precision", precisions)):
        found[f"{name}_macro"] = float(mean_of_present(values))
        found[f"{name}_weighted"] = float(mean_of_present(values, size))
        if classes == 2:
            found[f"{name}_binary"] = float(values[1])
    if classes > 5:
        found["accuracy_top5_micro"] = float((np.argsort(-p, axis=1, kind="stable")[:, :5] == t[:, None]).any(1).mean())
    one_class = (size > 0).sum() == 1 and (predicted == t).all()
    # With one class and no mistake both are 0 / 0, which scikit-learn warns about.
    found["kappa"] = float("nan") if one_class else float(cohen_kappa_score(t, predicted, labels=np.arange(classes)))
    found["matthews"] = float("nan") if one_class else float(matthews_corrcoef(t, predicted))
    found["log_loss_micro"] = float(-np.log(np.clip(p[np.arange(len(t)), t], 1e-12, 1)).mean())
    found["brier_micro"] = float(((p - np.eye(classes)[t]) ** 2).sum(1).mean())
    return found


def per_class_table(probabilities: Any, targets: Any, classes: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each class: `class`, `images`, `predicted`, `precision`, `recall`, `specificity`, `f1`, `auc`.

    Raises:
        ValueError: see `checked`, or the names are not as many as the classes.
    """
    p, t = checked(probabilities, targets)
    if len(classes) != p.shape[1]:
        raise ValueError(f"{len(classes)} names for {p.shape[1]} classes")
    confusion = confusion_matrix(p.argmax(1), t, p.shape[1])
    columns = {**rates(confusion), "auc": aucs(p, t)}
    return [
        {
            "class": name,
            "images": int(confusion[label].sum()),
            "predicted": int(confusion[:, label].sum()),
            **{column: float(values[label]) for column, values in columns.items()},
        }
        for label, name in enumerate(classes)
    ]


def roc_curves(probabilities: Any, targets: Any, classes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """For each class that has both sides: `false_positive_rate` and `true_positive_rate` (arrays) and `auc`.

    Raises:
        ValueError: see `checked`, or the names are not as many as the classes.
    """
    from sklearn.metrics import roc_curve

    p, t = checked(probabilities, targets)
    if len(classes) != p.shape[1]:
        raise ValueError(f"{len(classes)} names for {p.shape[1]} classes")
    areas = aucs(p, t)
    found = {}
    for label, name in enumerate(classes):
        if not np.isnan(areas[label]):
            false, true, _ = roc_curve(t == label, p[:, label])
            found[name] = {"false_positive_rate": false, "true_positive_rate": true, "auc": float(areas[label])}
    return found


def calibration(probabilities: Any, targets: Any, bins: int = BINS) -> dict[str, Any]:
    """How far confidence is from accuracy (Guo et al. 2017), over bins of equal width of the highest probability.

    Returns:
        `ece`, the mean distance over images; `mce`, the largest of a bin; `bins`, for each that is not empty `low`,
        `high`, `count`, `confidence` and `accuracy` (means).

    Raises:
        ValueError: see `checked`, or `bins` is less than 1.
    """
    p, t = checked(probabilities, targets)
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    confidence = p.max(1)
    right = p.argmax(1) == t
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    filled = []
    for number in np.unique(place):
        members = place == number
        filled.append(
            {
                "low": float(number / bins),
                "high": float((number + 1) / bins),
                "count": int(members.sum()),
                "confidence": float(confidence[members].mean()),
                "accuracy": float(right[members].mean()),
            }
        )
    gaps = [abs(one["confidence"] - one["accuracy"]) for one in filled]
    error = sum(gap * one["count"] for gap, one in zip(gaps, filled, strict=True)) / len(t)
    return {"ece": float(error), "mce": float(max(gaps)), "bins": filled}


def temperature(probabilities: Any, targets: Any) -> float:
    """The number that logits are to be divided by for the least log loss on these images, from 0.05 to 20.

    Takes probabilities: their logarithms are the logits up to a number for each image, which changes nothing.

    Raises:
        ValueError: see `checked`.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import logsumexp

    p, t = checked(probabilities, targets)
    logits = np.log(np.clip(p, 1e-12, 1))

    def loss(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        return float((logsumexp(scaled, axis=1) - scaled[np.arange(len(t)), t]).mean())

    # Convex in 1 / temperature, so that there is one minimum.
    return float(np.exp(minimize_scalar(loss, bounds=(np.log(0.05), np.log(20)), method="bounded").x))


def resampled(count: int, samples: int, seed: int, groups: Sequence[Any] | None = None) -> Iterator[np.ndarray]:
    """How often each of `count` images is drawn in resamples of them, or of whole groups: [R, count], R at a time.

    Args:
        count: N.
        samples: resamples in all.
        seed: of the draws.
        groups: [N] or None.
    """
    _, member = np.unique(np.arange(count) if groups is None else np.asarray(groups), return_inverse=True)
    units = int(member.max()) + 1
    random = np.random.default_rng(seed)
    for start in range(0, samples, RESAMPLES_AT_ONCE):
        size = min(RESAMPLES_AT_ONCE, samples - start)
        yield random.multinomial(units, np.full(units, 1 / units), size=size)[:, member].astype(np.float64)


def bootstrap_intervals(
    probabilities: Any,
    targets: Any,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    groups: Sequence[Any] | None = None,
) -> dict[str, tuple[float, float]]:
    """Percentile intervals of the averaged metrics and of `auc_macro` over resampled images.

    Args:
        probabilities: [N, K].
        targets: [N].
        samples: resamples.
        seed: of the draws.
        level: share of the resamples inside.
        groups: [N]; if given, whole groups are resampled, since cells of one slide are no independent evidence.

    Returns:
        Name of the metric -> (low, high). A metric that the resamples all have the same, as where no image is wrong or
        all are of one group, is left out: they cannot tell how far off it may be.

    Raises:
        ValueError: see `checked`; `samples` less than 2, `level` outside 0 to 1, or groups of another length.
    """
    p, t = checked(probabilities, targets)
    if samples < 2 or not 0 < level < 1:
        raise ValueError(f"samples must be at least 2 and level between 0 and 1, got {samples} and {level}")
    if groups is not None and len(groups) != len(t):
        raise ValueError(f"{len(groups)} groups for {len(t)} targets")
    classes = p.shape[1]
    cell = np.zeros((len(t), classes * classes))
    cell[np.arange(len(t)), t * classes + p.argmax(1)] = 1
    found: dict[str, list[np.ndarray]] = {}
    for weights in resampled(len(t), samples, seed, groups):
        values = averages((weights @ cell).reshape(-1, classes, classes))
        values["auc_macro"] = mean_of_present(resampled_aucs(p, t, weights))
        for name, column in values.items():
            found.setdefault(name, []).append(column)
    tails = [(1 - level) / 2, (1 + level) / 2]
    intervals = {}
    for name, columns in found.items():
        known = np.concatenate(columns)
        known = known[~np.isnan(known)]
        low, high = np.quantile(known, tails) if len(known) else (np.nan, np.nan)
        if low < high:
            intervals[name] = float(low), float(high)
    return intervals
