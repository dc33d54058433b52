"""Metrics beside scikit-learn and torchmetrics, and what they say where a class or a side is missing."""

from __future__ import annotations

import numpy as np
import pytest
import sklearn.metrics as sklearn_metrics
import torch
import torchmetrics.functional.classification as torchmetrics

from cellops.models.training.metrics import (
    aucs,
    bootstrap_intervals,
    calibration,
    classification_metrics,
    per_class_table,
    roc_curves,
    temperature,
)


def case(count: int = 300, classes: int = 6, seed: int = 0, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that know something of uneven targets; with ties in the scores if asked."""
    random = np.random.default_rng(seed)
    targets = random.choice(classes, count, p=np.arange(1, classes + 1) / sum(range(1, classes + 1)))
    logits = random.normal(size=(count, classes)) + 1.5 * np.eye(classes)[targets]
    if ties:
        logits = np.round(logits)
    odds = np.exp(logits)
    return odds / odds.sum(1, keepdims=True), targets


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("classes", [2, 3, 6])
def test_same_as_scikit_learn(classes: int, ties: bool) -> None:
    probabilities, targets = case(classes=classes, ties=ties)
    found = classification_metrics(probabilities, targets)
    predicted = probabilities.argmax(1)
    wanted = {
        "accuracy_micro": sklearn_metrics.accuracy_score(targets, predicted),
        "accuracy_macro": sklearn_metrics.balanced_accuracy_score(targets, predicted),
        "kappa": sklearn_metrics.cohen_kappa_score(targets, predicted),
        "matthews": sklearn_metrics.matthews_corrcoef(targets, predicted),
        "log_loss_micro": sklearn_metrics.log_loss(targets, probabilities),
    }
    for average in ("macro", "weighted"):
        precision, recall, f1, _ = sklearn_metrics.precision_recall_fscore_support(targets, predicted, average=average)
        wanted |= {f"precision_{average}": precision, f"recall_{average}": recall, f"f1_{average}": f1}
        one_hot = np.eye(classes)[targets]
        wanted[f"auc_{average}"] = sklearn_metrics.roc_auc_score(one_hot, probabilities, average=average)
        wanted[f"average_precision_{average}"] = sklearn_metrics.average_precision_score(
            one_hot, probabilities, average=average
        )
    if classes == 2:
        wanted["precision_binary"] = sklearn_metrics.precision_score(targets, predicted)
        wanted["recall_binary"] = sklearn_metrics.recall_score(targets, predicted)
        wanted["specificity_binary"] = sklearn_metrics.recall_score(targets, predicted, pos_label=0)
        wanted["f1_binary"] = sklearn_metrics.f1_score(targets, predicted)
        wanted["auc_binary"] = sklearn_metrics.roc_auc_score(targets, probabilities[:, 1])
        wanted["brier_micro"] = 2 * sklearn_metrics.brier_score_loss(targets, probabilities[:, 1])
    if classes > 5 and not ties:
        wanted["accuracy_top5_micro"] = sklearn_metrics.top_k_accuracy_score(targets, probabilities, k=5)
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-9)


def test_same_as_torchmetrics() -> None:
    probabilities, targets = case()
    found = classification_metrics(probabilities, targets)
    p, t = torch.from_numpy(probabilities), torch.from_numpy(targets)
    for name in ("accuracy", "precision", "recall", "specificity", "f1_score", "auroc"):
        for average in ("macro", "weighted"):
            if (name, average) == ("accuracy", "weighted"):
                continue  # torchmetrics calls the weighted recall so, which is the share of images
            wanted = getattr(torchmetrics, f"multiclass_{name}")(p, t, num_classes=6, average=average)
            ours = {"f1_score": "f1", "auroc": "auc"}.get(name, name)
            assert found[f"{ours}_{average}"] == pytest.approx(float(wanted), rel=1e-5), (name, average)
    micro = torchmetrics.multiclass_accuracy(p, t, num_classes=6, average="micro")
    assert found["accuracy_micro"] == pytest.approx(float(micro))
    wanted = torchmetrics.multiclass_calibration_error(p, t, num_classes=6, n_bins=15, norm="l1")
    assert calibration(probabilities, targets)["ece"] == pytest.approx(float(wanted), abs=1e-6)
    largest = torchmetrics.multiclass_calibration_error(p, t, num_classes=6, n_bins=15, norm="max")
    assert calibration(probabilities, targets)["mce"] == pytest.approx(float(largest), abs=1e-6)


def test_per_class_table_by_hand() -> None:
    # truth a: two of three right, one taken for b; b: one of one right; c: no image and no prediction
    probabilities = np.array([[0.8, 0.1, 0.1], [0.7, 0.2, 0.1], [0.3, 0.6, 0.1], [0.1, 0.8, 0.1]])
    a, b, c = per_class_table(probabilities, np.array([0, 0, 0, 1]), ["a", "b", "c"])
    assert (a["images"], a["predicted"], a["precision"], a["specificity"]) == (3, 2, 1.0, 1.0)
    assert a["recall"] == pytest.approx(2 / 3) and a["f1"] == pytest.approx(0.8)
    assert (b["images"], b["predicted"], b["precision"], b["recall"]) == (1, 2, 0.5, 1.0)
    assert b["specificity"] == pytest.approx(2 / 3)
    assert a["auc"] == b["auc"] == 1.0
    assert c["images"] == 0 and all(np.isnan(c[name]) for name in ("precision", "recall", "specificity", "f1", "auc"))
    with pytest.raises(ValueError, match="2 names for 3 classes"):
        per_class_table(probabilities, np.array([0, 0, 0, 1]), ["a", "b"])


def test_class_means_leave_absent_classes_out() -> None:
    probabilities, targets = case(classes=4)
    kept = targets != 2
    found = classification_metrics(probabilities[kept], targets[kept])
    predicted = probabilities[kept].argmax(1)
    assert (predicted == 2).any()
    assert found["accuracy_macro"] == pytest.approx(
        sklearn_metrics.recall_score(targets[kept], predicted, labels=[0, 1, 3], average="macro")
    )
    assert found["precision_macro"] == pytest.approx(
        sklearn_metrics.precision_score(targets[kept], predicted, labels=[0, 1, 3], average="macro")
    )
    areas = [sklearn_metrics.roc_auc_score(targets[kept] == k, probabilities[kept, k]) for k in (0, 1, 3)]
    assert found["auc_macro"] == pytest.approx(np.mean(areas))


def test_one_class_only_is_no_number_and_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    found = classification_metrics(np.array([[0.9, 0.1], [0.8, 0.2]]), np.array([0, 0]))
    assert found["accuracy_micro"] == found["recall_macro"] == 1.0
    assert np.isnan(found["auc_macro"]) and np.isnan(found["kappa"]) and np.isnan(found["specificity_macro"])
    assert not recwarn.list


def test_a_single_column_is_class_1() -> None:
    probabilities, targets = case(classes=2)
    two = classification_metrics(probabilities, targets)
    assert classification_metrics(probabilities[:, 1:], targets) == two
    assert classification_metrics(probabilities[:, 1], targets) == two


def test_roc_curves_end_at_the_areas() -> None:
    probabilities, targets = case(classes=3, ties=True)
    curves = roc_curves(probabilities, targets, ["a", "b", "c"])
    for label, name in enumerate("abc"):
        curve = curves[name]
        area = np.trapezoid(curve["true_positive_rate"], curve["false_positive_rate"])
        assert area == pytest.approx(curve["auc"]) == pytest.approx(aucs(probabilities, targets)[label])
    assert list(roc_curves(probabilities[targets == 1], targets[targets == 1], ["a", "b", "c"])) == []


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_temperature_undoes_overconfidence(factor: float) -> None:
    """Targets drawn from the probabilities themselves: sharpening the logits by a factor is undone by that factor."""
    random = np.random.default_rng(3)
    logits = random.normal(size=(6000, 4)) * 1.5
    honest = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    targets = (random.random((6000, 1)) > honest.cumsum(1)).sum(1)
    sharp = np.exp(logits * factor)
    sharp /= sharp.sum(1, keepdims=True)
    found = temperature(sharp, targets)
    assert found == pytest.approx(factor, rel=0.08)
    scaled = np.exp(np.log(sharp) / found)
    scaled /= scaled.sum(1, keepdims=True)
    after = calibration(scaled, targets)["ece"]
    assert after < 0.02
    if factor == 3.0:
        assert calibration(sharp, targets)["ece"] > 5 * after


def test_calibration_by_hand() -> None:
    # two bins: 0.55 and 0.65 (confidence 0.6, one of two right) and 0.95 (right)
    probabilities = np.array([[0.55, 0.45], [0.65, 0.35], [0.05, 0.95]])
    found = calibration(probabilities, np.array([0, 1, 1]), bins=4)
    assert [one["count"] for one in found["bins"]] == [2, 1]
    assert found["ece"] == pytest.approx((2 * 0.1 + 0.05) / 3)
    assert found["mce"] == pytest.approx(0.1)
    certain = calibration(np.array([[1.0, 0.0]]), np.array([0]))
    assert (certain["ece"], certain["bins"][0]["high"]) == (0.0, 1.0)


def test_bootstrap_intervals_beside_resampling_with_scikit_learn() -> None:
    probabilities, targets = case(count=120, classes=3)
    found = bootstrap_intervals(probabilities, targets, samples=1500, seed=1)
    random = np.random.default_rng(5)
    accuracies, areas = [], []
    for _ in range(600):
        drawn = random.integers(0, 120, 120)
        accuracies.append(sklearn_metrics.accuracy_score(targets[drawn], probabilities[drawn].argmax(1)))
        areas.append(sklearn_metrics.roc_auc_score(np.eye(3)[targets[drawn]], probabilities[drawn]))
    for name, values in (("accuracy_micro", accuracies), ("auc_macro", areas)):
        assert found[name] == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), abs=0.02), name
    metrics = classification_metrics(probabilities, targets)
    for name, (low, high) in found.items():
        assert low <= metrics[name] <= high, name
    assert bootstrap_intervals(probabilities, targets, samples=50, seed=1) == bootstrap_intervals(
        probabilities, targets, samples=50, seed=1
    )


def test_bootstrap_over_groups_is_wider_where_groups_agree() -> None:
    random = np.random.default_rng(0)
    right = np.repeat(random.random(20) < 0.7, 20)  # whole slides are right or wrong
    targets = random.integers(0, 2, 400)
    probabilities = np.eye(2)[np.where(right, targets, 1 - targets)]
    narrow = bootstrap_intervals(probabilities, targets, samples=300)["accuracy_micro"]
    wide = bootstrap_intervals(probabilities, targets, samples=300, groups=np.repeat(np.arange(20), 20))[
        "accuracy_micro"
    ]
    assert wide[1] - wide[0] > 3 * (narrow[1] - narrow[0])


def test_no_interval_of_what_resampling_cannot_vary() -> None:
    """One group, one image, no mistake: [x, x] would say that the figure is certain."""
    probabilities, targets = case(count=60, classes=3)
    assert bootstrap_intervals(probabilities, targets, samples=50, groups=["slide 1"] * 60) == {}
    assert bootstrap_intervals(probabilities[:1], targets[:1], samples=50) == {}
    right = bootstrap_intervals(0.1 + 0.7 * np.eye(3)[targets], targets, samples=50)
    assert "accuracy_micro" not in right and "auc_macro" not in right
    two = bootstrap_intervals(probabilities, targets, samples=50, groups=["a"] * 30 + ["b"] * 30)
    assert two["accuracy_micro"][0] < two["accuracy_micro"][1]


@pytest.mark.parametrize(
    ("probabilities", "targets", "message"),
    [
        (np.full((3, 2), 0.5), np.array([0, 1]), "N at least 1, got"),
        (np.zeros((0, 2)), np.zeros(0, int), "N at least 1"),
        (np.array([[0.5, 0.5], [np.nan, 1.0]]), np.array([0, 1]), "row 1 of probabilities"),
        (np.array([[0.5, 0.6]]), np.array([0]), "row 0 of probabilities does not sum to 1"),
        (np.array([[0.5, 0.5]]), np.array([2]), "targets must be integers from 0 to 1"),
        (np.array([[0.5, 0.5]]), np.array([0.0]), "targets must be integers"),
    ],
)
def test_wrong_input_is_named(probabilities: np.ndarray, targets: np.ndarray, message: str) -> None:
    for function in (classification_metrics, calibration, temperature, bootstrap_intervals):
        with pytest.raises(ValueError, match=message):
            function(probabilities, targets)
