"""The results of a part and of a whole run: files that the report is made of."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from cellops.models.training.checkpoint import write_text
from cellops.models.training.evaluate import Predictions, calibrate, negative_log_likelihood, plain
from cellops.models.training.metrics import bootstrap_intervals, classification_metrics, per_class_table
from cellops.models.training.network import predict_batches
from cellops.models.training.parts import Part

if TYPE_CHECKING:
    from cellops.models.training.run import Run


def predict(run: Run, model: nn.Module, indices: Sequence[int], title: str) -> Predictions:
    """The predictions of a model on some of a run's images."""
    from cellops.models.training.run import activation

    recipe, wanted = run.recipe, np.asarray(indices)
    loader = run.batches.evaluation(tuple(indices))
    with run.output.bar(title, len(loader)) as bar:
        found, rows = predict_batches(
            model.to(run.ranks.device),
            loader,
            run.ranks.device,
            activation(recipe),
            tta=recipe.evaluation.tta,
            precision=recipe.training.precision,
            channels_last=recipe.training.channels_last,
            each=bar.advance,
        )
    probabilities = run.ranks.gather(found, rows, wanted)
    ids = [run.data.samples[index].id for index in wanted]
    return Predictions(ids, run.data.labels[wanted], probabilities, run.data.classes)


def measure(
    predictions: Predictions,
    validation: Predictions | None,
    bootstrap: int,
    seed: int,
    groups: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Every figure of one set of predictions, as plain values.

    Args:
        predictions: of the images that are judged.
        validation: of those that give the temperature, or None.
        bootstrap: resamples of the intervals; fewer than 2 give none.
        seed: of the resamples.
        groups: of the images, which are then resampled as wholes.
    """
    probabilities, targets = predictions.probabilities, predictions.targets
    calibrated = calibrate(predictions, validation)
    calibrated.pop("scaled")
    return plain(
        {
            "metrics": {
                "loss": negative_log_likelihood(probabilities, targets),
                **classification_metrics(probabilities, targets),
            },
            "intervals": (
                bootstrap_intervals(probabilities, targets, samples=bootstrap, seed=seed, groups=groups)
                if bootstrap > 1
                else {}
            ),
            "per_class": per_class_table(probabilities, targets, predictions.classes),
            "calibration": calibrated,
        }
    )


def judge(run: Run, part: Part, model: nn.Module, training: dict[str, Any]) -> None:
    """Predict the test part and write predictions.csv, mistakes/ and, last of all, metrics.json."""
    fold, settings = run.fold(part), run.recipe.evaluation
    held_out = fold.test or fold.validation
    clock = time.monotonic()
    test = predict(run, model, held_out, "testing")
    seconds = time.monotonic() - clock
    validation = predict(run, model, fold.validation, "calibrating") if fold.test and fold.validation else None
    if not run.ranks.main:
        return
    test.save(part.folder / "predictions.csv")
    if validation is not None:
        validation.save(part.folder / "predictions_validation.csv")
    groups = [run.data.samples[index].group for index in held_out] if run.data.grouped else None
    found = measure(test, validation, settings.bootstrap, run.recipe.seed, groups)
    found |= {
        "protocol": part.protocol,
        "fold": part.number + 1,
        "judged_on": "test" if fold.test else "validation",
        "images_per_second": round(len(held_out) / max(seconds, 1e-9), 1),
        "training": training,
    }
    if settings.cost:
        found["cost"] = measure_cost(run, model)
    if settings.worst:
        from cellops.models.report.mistakes import save_mistakes

        save_mistakes(run, part, model, test, list(held_out))
    write_text(part.folder / "metrics.json", json.dumps(found, indent=1, ensure_ascii=False))
    metrics = found["metrics"]
    run.output.line(
        f"{found['judged_on']}: accuracy {metrics['accuracy_micro']:.2%}, balanced {metrics['accuracy_macro']:.2%}, "
        f"ECE {found['calibration']['ece_before']:.3f}, {len(held_out)} images",
        style="bold green",
    )


def measure_cost(run: Run, model: nn.Module) -> dict[str, Any]:
    """Parameters, size, operations, memory and latency of the network at the recipe's input size."""
    from dataclasses import asdict

    from cellops.models.cost import cost

    height, width = run.recipe.data.input_size
    return plain(asdict(cost(model, input_size=(3, height, width), measure=True)))


def read_results(parts: Sequence[Part]) -> dict[str, list[dict[str, Any]]]:
    """The metrics.json of every part that is done, by protocol."""
    found: dict[str, list[dict[str, Any]]] = {}
    for part in parts:
        path = part.folder / "metrics.json"
        if path.is_file():
            found.setdefault(part.protocol, []).append(json.loads(path.read_text(encoding="utf-8")))
    return found


def predictions_of_all(parts: Sequence[Part]) -> Predictions:
    """The predictions of several folds as one; every image is in one test part at most."""
    return Predictions.join([Predictions.load(part.folder / "predictions.csv") for part in parts])


def interval_of_all(run: Run, predictions: Predictions) -> dict[str, Any]:
    """95 % intervals of the predictions of several folds together."""
    groups = None
    if run.data.grouped:
        group_of = {sample.id: sample.group for sample in run.data.samples}
        groups = [group_of[name] for name in predictions.ids]
    samples, seed = run.recipe.evaluation.bootstrap, run.recipe.seed
    return bootstrap_intervals(
        predictions.probabilities, predictions.targets, samples=samples, seed=seed, groups=groups
    )


def summarize(run: Run) -> dict[str, Any]:
    """Write results.json: for each protocol the folds that are in, mean and standard deviation over them, and figures
    and intervals of their predictions together; these two are of one set of images, the mean over folds is not, and
    its class means leave out what a test part lacks, as so many (`lacking`) do."""
    parts = run.parts
    results = read_results(parts)
    summary: dict[str, Any] = {}
    for protocol in dict.fromkeys(part.protocol for part in parts):
        done = results.get(protocol, [])
        intervals = done[0]["intervals"] if len(done) == 1 else {}
        together = done[0]["metrics"] if len(done) == 1 else {}
        if len(done) > 1:
            pooled = predictions_of_all([part for part in parts if part.protocol == protocol and run.done(part)])
            together = classification_metrics(pooled.probabilities, pooled.targets)
            intervals = interval_of_all(run, pooled) if run.recipe.evaluation.bootstrap > 1 else {}
        names = [name for name, value in done[0]["metrics"].items() if isinstance(value, (int, float))] if done else []
        values = {
            name: [one["metrics"][name] for one in done if one["metrics"].get(name) is not None] for name in names
        }
        summary[protocol] = {
            "folds": sum(part.protocol == protocol for part in parts),
            "folds_done": len(done),
            "mean": {name: float(np.mean(found)) for name, found in values.items() if found},
            "deviation": {name: float(np.std(found, ddof=1)) for name, found in values.items() if len(found) > 1},
            "lacking": sum(any(row["images"] == 0 for row in one["per_class"]) for one in done),
            "together": together,
            "interval": intervals,
            "images": sum(one["training"]["images"]["test"] or one["training"]["images"]["validation"] for one in done),
            "seconds": sum(one["training"]["seconds"] for one in done),
        }
    write_text(run.folder / "results.json", json.dumps(plain(summary), indent=1))
    return summary


def result_lines(summary: dict[str, Any]) -> list[str]:
    """What `summarize` found of all held-out images, a line for each protocol."""
    lines = []
    for protocol, found in summary.items():
        told = []
        for name, label in (("accuracy_micro", "accuracy"), ("accuracy_macro", "balanced")):
            low, high = found["interval"].get(name, (None, None))
            interval = "no interval" if low is None else f"95 %: {100 * low:.1f} to {100 * high:.1f}"
            told.append(f"{label} {100 * found['together'][name]:.1f} % ({interval})")
        folds = f", {found['folds']} folds" if found["folds"] > 1 else ""
        lines.append(
            f"{protocol}{folds}: {', '.join(told)}, {found['images']:,} images, trained {found['seconds']:,.0f} s"
        )
    return lines
