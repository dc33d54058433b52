"""What a trained network is worth: metrics, calibration, confidence intervals, and the predictions of every image."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cellops.models.training.checkpoint import write_text
from cellops.models.training.metrics import classification_metrics


def negative_log_likelihood(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """The mean of -log p(target); probabilities [N, K], targets [N]."""
    return float(-np.log(np.clip(probabilities[np.arange(len(targets)), targets], 1e-12, 1)).mean())


def quick_metrics(probabilities: np.ndarray, targets: np.ndarray, monitor: str = "accuracy_micro") -> dict[str, float]:
    """The metrics of an epoch: the cheap ones, and the monitored one.

    Args:
        probabilities: [N, K].
        targets: [N].
        monitor: one of these names or of `classification_metrics`.

    Raises:
        ValueError: the monitored metric is unknown.
    """
    right = probabilities.argmax(1) == targets
    present = np.unique(targets)
    found = {
        "loss": negative_log_likelihood(probabilities, targets),
        "accuracy_micro": float(right.mean()),
        "accuracy_macro": float(np.mean([right[targets == label].mean() for label in present])),
    }
    if monitor not in found:
        all_of_them = classification_metrics(probabilities, targets)
        if monitor not in all_of_them:
            names = ", ".join(sorted({*found, *all_of_them}))
            raise ValueError(f"training.monitor: {monitor!r} is not known, take one of {names}")
        found[monitor] = float(all_of_them[monitor])
    return found


def with_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """The probabilities that the logits over `temperature` give; [N, K]."""
    scaled = np.log(np.clip(probabilities, 1e-12, 1)) / temperature
    scaled = np.exp(scaled - scaled.max(1, keepdims=True))
    return scaled / scaled.sum(1, keepdims=True)


@dataclass
class Predictions:
    """The predictions on one part of a data set."""

    ids: list[str]
    targets: np.ndarray  # [N]
    probabilities: np.ndarray  # [N, K]
    classes: tuple[str, ...]

    @property
    def found(self) -> np.ndarray:
        """The predicted class numbers [N]."""
        return self.probabilities.argmax(1)

    def save(self, path: Path) -> None:
        """Write a CSV file: image, truth, predicted, correct, confidence and the probability of every class."""
        text = io.StringIO(newline="")
        table = csv.writer(text)
        table.writerow(
            ["image", "truth", "predicted", "correct", "confidence", *(f"p_{name}" for name in self.classes)]
        )
        for name, target, row in zip(self.ids, self.targets, self.probabilities, strict=True):
            best = int(row.argmax())
            values = [repr(float(value)) for value in row]  # all digits: 0.9999999999 ranks below 0.99999999999
            table.writerow(
                [name, self.classes[target], self.classes[best], int(best == target), f"{row[best]:.6f}", *values]
            )
        write_text(path, text.getvalue())

    @classmethod
    def load(cls, path: Path) -> Predictions:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is missing or is no table of predictions.
        """
        try:
            with open(path, encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
            classes = tuple(name[2:] for name in (rows[0] if rows else {}) if name.startswith("p_"))
            return cls(
                ids=[row["image"] for row in rows],
                targets=np.array([classes.index(row["truth"]) for row in rows], dtype=np.int64),
                probabilities=np.array([[float(row[f"p_{name}"]) for name in classes] for row in rows]),
                classes=classes,
            )
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise ValueError(f"cannot read the predictions {path}: {error}") from None

    @classmethod
    def join(cls, parts: Sequence[Predictions]) -> Predictions:
        """The predictions of several folds as one."""
        return cls(
            ids=[name for part in parts for name in part.ids],
            targets=np.concatenate([part.targets for part in parts]),
            probabilities=np.concatenate([part.probabilities for part in parts]),
            classes=parts[0].classes,
        )


def calibrate(test: Predictions, validation: Predictions | None) -> dict[str, Any]:
    """Temperature scaling (Guo et al. 2017), and the calibration error before and after it.

    The temperature comes from the validation part. Without one, each half of the test part, with half of every
    class, is scaled by the temperature of the other half, so that no image judges its own.

    Args:
        test: the part that is judged.
        validation: the part that chose the epoch, or None.

    Returns:
        `temperature` (the mean of two without a validation part), `source`, `ece_before`, `ece_after`, and the
        `scaled` probabilities.
    """
    from cellops.models.training.metrics import calibration, temperature

    if validation is not None and len(validation.targets) > 1:
        values = [float(temperature(validation.probabilities, validation.targets))]
        scaled = with_temperature(test.probabilities, values[0])
        source = "validation part"
    else:
        # Every other image of each class: files often alternate, as a case and its control do.
        half = np.empty(len(test.targets), dtype=bool)
        half[np.argsort(test.targets, kind="stable")] = np.arange(len(half)) % 2 == 0
        if len(test.targets) < 4:
            values, scaled, source = [1.0], test.probabilities, "too few images"
        else:
            scaled, values = np.empty_like(test.probabilities), []
            for part in (half, ~half):
                value = float(temperature(test.probabilities[~part], test.targets[~part]))
                scaled[part] = with_temperature(test.probabilities[part], value)
                values.append(value)
            source = "the other half of the test part"
    return {
        "temperature": float(np.mean(values)),
        "source": source,
        "ece_before": float(calibration(test.probabilities, test.targets)["ece"]),
        "ece_after": float(calibration(scaled, test.targets)["ece"]),
        "scaled": scaled,
    }


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as JSON can hold them: NumPy's numbers as Python's, NaN as null."""

    def convert(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): convert(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [convert(item) for item in value]
        if hasattr(value, "tolist"):
            return convert(value.tolist())
        if isinstance(value, float) and not np.isfinite(value):
            return None
        return value

    return {key: convert(value) for key, value in values.items()}
