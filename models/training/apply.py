"""Trained networks at work: loaded with what they need, and measured on other labelled images."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cellops.models.data import CellData, Fold, Folds
from cellops.models.training.checkpoint import CheckpointError, load_weights, read_weights, write_text
from cellops.models.training.console import Output
from cellops.models.training.evaluate import Predictions
from cellops.models.training.network import predict_batches
from cellops.models.training.parts import Batches, read_data
from cellops.models.training.ranks import Ranks
from cellops.models.training.recipe import build_recipe
from cellops.models.training.results import measure, predict
from cellops.models.training.run import WEIGHTS, Run, activation, build_model
from cellops.models.training.settings import Recipe


@dataclass
class Trained:
    """The networks of a run, one a fold, and what is needed to use them."""

    models: list[nn.Module]
    folders: list[Path]
    recipe: Recipe
    classes: tuple[str, ...]
    synthetic: bool


def weight_files(run: Path) -> list[Path]:
    """The weights of a run's parts that are trained, or the file itself.

    Raises:
        ValueError: there is no such run, or nothing of it is trained yet.
    """
    if run.is_file():
        return [run]
    facts = run / "run.json"
    if not facts.is_file():
        what = "a folder without run.json" if run.is_dir() else "nothing"
        raise ValueError(f"{run} is no run but {what}: give the folder that `cellops train` named, as in runs/demo")
    folders = [run / part["folder"] for part in json.loads(facts.read_text())["parts"]]
    found = [folder / WEIGHTS for folder in folders if (folder / WEIGHTS).is_file()]
    if not found:
        raise ValueError(f"{run} is not trained to the end: cellops train --resume --output {run}")
    return found


def load_trained(run: Path, device: torch.device, tta: str | None = None) -> Trained:
    """The networks of a run or of one file of weights.

    Raises:
        ValueError: there is nothing trained.
        CheckpointError: the weights are damaged, or not from `cellops train`.
    """
    files = weight_files(run)
    _, facts = read_weights(files[0])
    if not {"recipe", "classes"} <= facts.keys():
        raise CheckpointError(f"{files[0]} was not written by `cellops train`: its header names no recipe and classes")
    recipe = build_recipe(facts["recipe"])
    recipe = replace(recipe, model=replace(recipe.model, pretrained=False, weights=None))
    if tta is not None:
        recipe = replace(recipe, evaluation=replace(recipe.evaluation, tta=tta))
    models = []
    for file in files:
        model = build_model(recipe, facts["classes"])
        load_weights(model, file)
        models.append(model.to(device).eval())
    return Trained(models, [file.parent for file in files], recipe, tuple(facts["classes"]), bool(facts["synthetic"]))


def _write(folder: Path, predictions: Predictions, found: dict[str, Any], output: Output, title: str) -> None:
    predictions.save(folder / "predictions.csv")
    write_text(folder / "metrics.json", json.dumps(found, indent=1, ensure_ascii=False))
    output.line(f"{title}, {len(predictions.ids)} images -> {folder}", style="bold")
    for name, value in found["metrics"].items():
        if isinstance(value, (int, float)):
            interval = found["intervals"].get(name)
            text = f"  [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""
            output.line(f"  {name:<24}{value:.4f}{text}")
    output.line(f"  {'ece':<24}{found['calibration']['ece_before']:.4f}")


def evaluate_run(
    run: Path, data: str | None, layout: str, tta: str | None, folder: Path | None, output: Output
) -> dict[str, dict[str, Any]]:
    """Measure a run on its own held-out images, fold by fold, or on all images of another folder, by its mean network.

    Args:
        run: folder of the run.
        data: another folder of labelled images; None for the run's own.
        layout: of `data`.
        tta: views of each image; None for the recipe's.
        folder: where predictions.csv and metrics.json go; None for `evaluation` in the run.
        output: for the figures.

    Returns:
        The measured figures by part.

    Raises:
        ValueError: the run, the data or its classes do not fit, or an image cannot be read.
    """
    ranks = Ranks("auto")
    trained = load_trained(run, ranks.device, tta)
    recipe = trained.recipe
    if data is not None:
        recipe = replace(recipe, data=replace(recipe.data, path=data, layout=layout, options={}))
    if data == "synthetic" or (data is None and trained.synthetic):
        recipe = replace(recipe, data=replace(recipe.data, options=trained.recipe.data.options))
    found_data = read_data(recipe.data, output, strict=True)
    base = folder or (run if run.is_dir() else run.parent) / "evaluation"
    batches = Batches.open(recipe, found_data, output)
    if data is not None:
        return {"all": _evaluate_other(trained, recipe, found_data, batches, base, output, ranks)}
    folds = {
        path.stem.removeprefix("folds_"): Folds.load(path, found_data) for path in sorted(run.glob("folds_*.json"))
    }
    session = Run(recipe, run, found_data, folds, batches, output, ranks)
    results = {}
    for part in session.parts:
        if part.folder not in trained.folders:
            continue
        fold, model = session.fold(part), trained.models[trained.folders.index(part.folder)]
        predictions = predict(session, model, fold.test or fold.validation, part.title)
        validation = predict(session, model, fold.validation, part.title) if fold.test and fold.validation else None
        groups = [found_data.samples[index].group for index in fold.test or fold.validation]
        results[part.title] = measure(
            predictions,
            validation,
            recipe.evaluation.bootstrap,
            recipe.seed,
            groups if found_data.grouped else None,
        )
        where = base if len(session.parts) == 1 else base / part.protocol / f"fold_{part.number + 1}"
        _write(where, predictions, results[part.title], output, part.title)
    return results


def _evaluate_other(
    trained: Trained, recipe: Recipe, data: CellData, batches: Batches, folder: Path, output: Output, ranks: Ranks
) -> dict[str, Any]:
    unknown = [name for name in data.classes if name not in trained.classes]
    if unknown:
        raise ValueError(
            f"the data has classes that the network does not know: {', '.join(unknown)}; it knows "
            f"{', '.join(trained.classes)}. Rename the folders"
        )
    translation = np.array([trained.classes.index(name) for name in data.classes])
    loader = batches.evaluation(range(len(data)))
    mean: Any = 0
    for model in trained.models:
        with output.bar("predicting", len(loader)) as bar:
            _, rows = predict_batches(
                model, loader, ranks.device, activation(recipe), recipe.evaluation.tta, each=bar.advance
            )
        mean = mean + rows / len(trained.models)
    predictions = Predictions([sample.id for sample in data.samples], translation[data.labels], mean, trained.classes)
    found = measure(predictions, None, recipe.evaluation.bootstrap, recipe.seed)
    _write(folder, predictions, found, output, f"{data.name}{' (SYNTHETIC)' if data.synthetic else ''}")
    return found


@dataclass
class RunImages:
    """The images of one part of a run, as its network sees them in evaluation."""

    batches: Batches
    fold: Fold

    def training(self, count: int) -> Tensor:
        """Some of the images it was trained on, [N, 3, H, W]: evenly spread over them, so that no class is missed."""
        train = self.fold.train
        count = min(count, len(train))
        return self.batches.images([train[index * len(train) // count] for index in range(count)])

    @property
    def held_out(self) -> tuple[int, ...]:
        """Indices of the images that it is judged on."""
        return self.fold.test or self.fold.validation

    def judged(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The held-out images by batches [N, 3, H, W], with their labels [N]."""
        for batch in self.batches.evaluation(self.held_out):
            yield batch.images[batch.valid], batch.targets[batch.valid]


def run_images(run: Path, output: Output) -> RunImages:
    """The images of a run that has one part, or of the part that a file of weights is of.

    Args:
        run: folder of the run, or its `weights.safetensors`.
        output: for progress.

    Raises:
        ValueError: the file is of no run, the images are not where they were, or they have changed.
    """
    folder = run if run.is_dir() else run.parent
    root = next((place for place in (folder, *folder.parents[:2]) if (place / "run.json").is_file()), None)
    if root is None:
        raise ValueError(f"{run} lies in no run, whose images it could be judged on")
    trained = load_trained(run, torch.device("cpu"))
    facts = json.loads((root / "run.json").read_text())
    data = read_data(trained.recipe.data, output, strict=True)
    part = next((part for part in facts["parts"] if root / part["folder"] == trained.folders[0]), None)
    if part is None:
        raise ValueError(f"{run} is no part of the run {root}")
    folds = Folds.load(root / f"folds_{part['protocol']}.json", data)
    return RunImages(Batches.open(trained.recipe, data, output), folds.folds[part["fold"] - 1])
