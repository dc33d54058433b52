"""Trained networks at work: on other labelled images, and on images without labels."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cellops.models.data import Batch, CellData, Folds, build_augmentation
from cellops.models.data.images import SUFFIXES, ImageError, read_image
from cellops.models.data.parallel import available_cores, ordered_map
from cellops.models.data.store import resized
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

SHEET_SIDE = 128


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


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The files given, and the images in the folders given, each once.

    Raises:
        ValueError: a path does not exist, or a folder holds no image.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            if not inside:
                raise ValueError(f"no images in the folder {path}; known are {', '.join(sorted(SUFFIXES))}")
            found |= dict.fromkeys(inside)
        elif path.exists():
            found[path] = None
        else:
            raise ValueError(f"there is no image or folder {path}")
    return list(found)


def predict_images(
    run: Path,
    images: Sequence[Path],
    folder: Path,
    tta: str | None,
    batch_size: int,
    sheet: int,
    output: Output,
) -> list[tuple[Path, str]]:
    """Classify images: predictions.csv, contact_sheet.png and, where some cannot be read, unreadable.csv.

    Args:
        run: folder of a run (several folds are averaged), or a file of weights.
        images: files and folders.
        folder: where the results go.
        tta: views of each image; None for the recipe's.
        batch_size: images at a time.
        sheet: images on the contact sheet; 0 for none.
        output: for progress and the summary.

    Returns:
        The files that cannot be read, with the reason.

    Raises:
        ValueError: the run or a path does not exist, or no image can be read.
    """
    if batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {batch_size}")
    files = image_files(images)
    device = Ranks("auto").device
    trained = load_trained(run, device, tta)
    recipe = trained.recipe
    unreadable: list[tuple[Path, str]] = []
    read: list[Path] = []
    shown: list[np.ndarray] = []
    rows: list[np.ndarray] = []

    def note(path: Path, thumbnail: np.ndarray) -> None:
        read.append(path)
        if len(shown) < sheet:
            shown.append(thumbnail)

    with output.bar("predicting", len(files)) as bar:
        for batch in _batches(files, recipe, batch_size, note, unreadable):
            mean: Any = 0
            for model in trained.models:
                _, found = predict_batches(model, [batch], device, activation(recipe), recipe.evaluation.tta)
                mean = mean + found / len(trained.models)
            rows.append(mean)
            bar.advance(steps=len(batch))
    folder.mkdir(parents=True, exist_ok=True)
    if unreadable:
        text = io.StringIO(newline="")
        csv.writer(text).writerows([("image", "reason"), *((str(path), reason) for path, reason in unreadable)])
        write_text(folder / "unreadable.csv", text.getvalue())
        output.line(f"{len(unreadable)} of {len(files)} images cannot be read:", style="yellow")
        for _, reason in unreadable[:10]:
            output.line(f"  {reason}")
        if len(unreadable) > 10:
            output.line(f"  and {len(unreadable) - 10} more, see {folder / 'unreadable.csv'}")
    if not rows:
        raise ValueError("none of the images can be read")
    probabilities = np.concatenate(rows)
    _write_predictions(folder / "predictions.csv", read, probabilities, trained.classes)
    if shown:
        from cellops.models.report.sheet import contact_sheet

        captions = [f"{trained.classes[row.argmax()]} {row.max():.0%}" for row in probabilities[: len(shown)]]
        contact_sheet(shown, captions, folder / "contact_sheet.png")
    counts = np.bincount(probabilities.argmax(1), minlength=len(trained.classes))
    for name, count in zip(trained.classes, counts, strict=True):
        output.line(f"  {name:<32}{count:>7}")
    if trained.synthetic:
        output.line("warning: this network was trained on SYNTHETIC images", style="yellow")
    output.line(f"{len(read)} images -> {folder / 'predictions.csv'}", style="bold")
    return unreadable


def _write_predictions(path: Path, files: Sequence[Path], probabilities: np.ndarray, classes: Sequence[str]) -> None:
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(["image", "predicted", "confidence", *(f"p_{name}" for name in classes)])
    for file, row in zip(files, probabilities, strict=True):
        best = int(row.argmax())
        table.writerow([str(file), classes[best], f"{row[best]:.6f}", *(f"{value:.9g}" for value in row)])
    write_text(path, text.getvalue())


def _batches(
    files: Iterable[Path], recipe: Recipe, batch_size: int, note: Any, unreadable: list[tuple[Path, str]]
) -> Iterator[Batch]:
    """Batches of the files that can be read, decoded in threads; `note` gets each with a thumbnail."""
    height, width = recipe.data.store_size or recipe.data.input_size
    augmentation = build_augmentation(recipe.augmentation, tuple(recipe.data.input_size), False)
    generator = torch.Generator()

    def decode(path: Path) -> tuple[Path, np.ndarray | ImageError]:
        try:
            return path, read_image(path)
        except ImageError as error:
            return path, error

    waiting: list[torch.Tensor] = []
    for path, image in ordered_map(decode, files, available_cores()):
        if isinstance(image, ImageError):
            unreadable.append((path, str(image)))
            continue
        pixels = torch.from_numpy(resized(image, (height, width), recipe.data.resize).copy()).permute(2, 0, 1)
        note(path, resized(image, (SHEET_SIDE, SHEET_SIDE), "pad"))
        waiting.append(augmentation(pixels, generator))
        if len(waiting) == batch_size:
            yield _batch(waiting)
            waiting = []
    if waiting:
        yield _batch(waiting)


def _batch(images: list[torch.Tensor]) -> Batch:
    count = len(images)
    return Batch(
        images=torch.stack(images),
        targets=torch.zeros(count, dtype=torch.int64),
        index=torch.arange(count),
        valid=torch.ones(count, dtype=torch.bool),
    )
