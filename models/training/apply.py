"""Trained networks at work: loaded with what they need, and measured on other labelled images."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cellops.models.data import CellData, Fold, Folds, LayoutError, open_data
from cellops.models.data.folds import file_hash
from cellops.models.data.layouts import LAYOUTS
from cellops.models.data.layouts.folders import without_masks
from cellops.models.data.layouts.listing import Found, Listing, assemble
from cellops.models.training.checkpoint import CheckpointError, load_weights, read_facts, write_text
from cellops.models.training.console import Output
from cellops.models.training.evaluate import Predictions
from cellops.models.training.network import predict_batches
from cellops.models.training.parts import Batches, learning_part, unreadable_images
from cellops.models.training.ranks import Ranks
from cellops.models.training.recipe import build_recipe
from cellops.models.training.results import measure, predict
from cellops.models.training.run import METRICS, WEIGHTS, Run, activation, build_model
from cellops.models.training.settings import DataSettings, Recipe

PREDICTIONS = "predictions.csv"
IMAGES = "images.json"
FACTS = "run.json"
READ_FILES = ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
"""Arguments of a network that make timm read files; a trained one has its weights."""


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
        ValueError: there is no such run, nothing of it is trained yet, or its run.json is damaged.
    """
    if run.is_file():
        if run.suffix == ".onnx":
            raise ValueError(f"{run} is an ONNX file, which `cellops predict` takes alone: give the run")
        return [run]
    facts = run / FACTS
    if not facts.is_file():
        what = "a folder without run.json" if run.is_dir() else "nothing"
        raise ValueError(f"{run} is no run but {what}: give the folder that `cellops train` named, as in runs/demo")
    try:
        folders = [run / part["folder"] for part in json.loads(facts.read_text(encoding="utf-8"))["parts"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{facts} is damaged: {type(error).__name__}: {error}") from None
    strange = next((folder for folder in folders if ".." in folder.parts or not folder.is_relative_to(run)), None)
    if strange is not None:
        raise ValueError(f"{facts} names a folder outside the run: {strange}")
    found = [folder / WEIGHTS for folder in folders if (folder / WEIGHTS).is_file()]
    if not found:
        raise ValueError(f"{run} is not trained to the end: cellops train --resume --output {run}")
    return found


def check_facts(file: Path, facts: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a header of weights that no training wrote."""
    if not {"recipe", "classes", "synthetic"} <= facts.keys():
        raise CheckpointError(f"{file} was not written by `cellops train`: its header names no recipe and classes")


def _facts(file: Path) -> tuple[dict[str, Any], Recipe]:
    """The header of weights, and its recipe without what would read other files."""
    facts = read_facts(file)
    check_facts(file, facts)
    recipe = build_recipe(facts["recipe"])
    arguments = {name: value for name, value in recipe.model.arguments.items() if name not in READ_FILES}
    return facts, replace(recipe, model=replace(recipe.model, pretrained=False, weights=None, arguments=arguments))


def _check_alike(files: Sequence[Path], headers: Sequence[tuple[dict[str, Any], Recipe]]) -> None:
    """Raise ValueError where networks, whose probabilities are averaged, have other classes or see images otherwise."""
    from cellops.models.prediction.preparation import Preparation

    used = [
        {"classes": facts["classes"], "activation": activation(recipe)} | Preparation.of(recipe).values()
        for facts, recipe in headers
    ]
    for path, found in zip(files, used, strict=True):
        differing = [name for name, value in found.items() if value != used[0][name]]
        if differing:
            told = f"{path} has other {', '.join(differing)} than {files[0]}"
            raise ValueError(f"{told}: give one of the two files alone")


def load_trained(run: Path, device: torch.device, tta: str | None = None) -> Trained:
    """The networks of a run or of one file of weights.

    Raises:
        ValueError: there is nothing trained, or networks of several folds have other classes or preparations.
        CheckpointError: the weights are damaged, or not from `cellops train`.
    """
    files = weight_files(run)
    headers = [_facts(file) for file in files]
    _check_alike(files, headers)
    facts, recipe = headers[0]
    if tta is not None:
        recipe = replace(recipe, evaluation=replace(recipe.evaluation, tta=tta))
    models = []
    for file in files:
        model = build_model(recipe, facts["classes"])
        load_weights(model, file)
        models.append(model.to(device).eval())
    return Trained(models, [file.parent for file in files], recipe, tuple(facts["classes"]), bool(facts["synthetic"]))


def run_folder(run: Path) -> Path | None:
    """The folder of the run that a path is, or that a file of weights lies in; None where there is none."""
    folder = (run if run.is_dir() else run.parent).resolve()
    return next((place for place in (folder, *folder.parents[:2]) if (place / FACTS).is_file()), None)


def part_of(root: Path, folder: Path) -> dict[str, Any] | None:
    """What run.json says about the part whose weights lie in a folder."""
    listed = json.loads((root / FACTS).read_text(encoding="utf-8"))["parts"]
    return next((part for part in listed if (root / part["folder"]).resolve() == folder.resolve()), None)


def _readable(data: CellData, output: Output) -> CellData:
    """The data, once every image was looked at: what a figure is said to be of must not depend on what can be read.

    Raises:
        ValueError: images cannot be read; names them.
    """
    unreadable, text = unreadable_images(data, output)
    if unreadable:
        raise ValueError(text)
    return data


def _own_data(settings: DataSettings, root: Path, output: Output) -> CellData:
    """The images that a run was made of.

    A run that skipped unreadable files has them in no fold, and they are skipped again, with whatever else came since:
    its parts are judged as they were cut. Of another run a new file is an error of `Folds.load`.

    Raises:
        ValueError: the data is not where it was, or an image of the run cannot be read.
    """
    if settings.path is None:
        raise ValueError(f"{root} does not say where its images are: give labelled ones with --data")
    data = open_data(settings.path, layout=settings.layout, **settings.options)
    if settings.unreadable == "skip":
        known: set[str] = set()
        for path in root.glob("folds_*.json"):
            known |= json.loads(path.read_text(encoding="utf-8"))["samples"].keys()
        strange = [sample.id for sample in data.samples if sample.id not in known]
        if strange:
            some = ", ".join(strange[:3]) + (", ..." if len(strange) > 3 else "")
            output.line(f"warning: left out, as in no part of the run: {len(strange)} images ({some})", style="yellow")
            data = data.without(strange)
    return _readable(data, output)


def _check_free(folder: Path, overwrite: bool) -> None:
    """Raise ValueError where results would replace others, or the run's own, which no flag allows."""
    if any((folder / name).is_file() for name in (FACTS, WEIGHTS)):
        raise ValueError(f"{folder} holds a run, whose own results would be lost: take another --output")
    taken = next((folder / name for name in (PREDICTIONS, METRICS) if (folder / name).exists()), None)
    if taken is not None and not overwrite:
        raise ValueError(f"{taken} is there already: take another --output, or --overwrite it")


def _write(
    folder: Path, predictions: Predictions, found: dict[str, Any], images: dict[str, Any], output: Output, title: str
) -> None:
    predictions.save(folder / PREDICTIONS)
    write_text(folder / IMAGES, json.dumps(images, indent=1, ensure_ascii=False))
    write_text(folder / METRICS, json.dumps(found, indent=1, ensure_ascii=False))
    output.line(f"{title}, {len(predictions.ids)} images -> {folder}", style="bold")
    for name, value in found["metrics"].items():
        if isinstance(value, (int, float)):
            interval = found["intervals"].get(name)
            text = f"  [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""
            output.line(f"  {name:<24} {value:.4f}{text}")
    output.line(f"  {'ece':<24} {found['calibration']['ece_before']:.4f}")
    for note in found.get("notes", ()):
        output.line(f"warning: {note}", style="yellow")


def _recorded(data: CellData, indices: Iterable[int]) -> dict[str, Any]:
    """What is known of judged images, as in a file of folds: by this `cellops compare` finds the same ones again."""
    samples = {
        sample.id: {"sha256": file_hash(data, sample), "group": sample.group}
        for sample in (data.samples[index] for index in indices)
    }
    return {"data": data.name, "grouped": data.grouped, "samples": samples}


def evaluate_run(
    run: Path,
    data: str | None,
    layout: str,
    tta: str | None,
    folder: Path | None,
    output: Output,
    overwrite: bool = False,
) -> dict[str, dict[str, Any]]:
    """Measure a run on its own held-out images, fold by fold, or on all images of another folder, by its mean network.

    Args:
        run: folder of the run.
        data: another folder of labelled images; None for the run's own.
        layout: of `data`.
        tta: views of each image; None for the recipe's.
        folder: where predictions.csv and metrics.json go; None for `evaluation` in the run.
        output: for the figures.
        overwrite: replace results that are there; never those of a run's own folder.

    Returns:
        The measured figures by part; `notes` says in sentences what a reader of them must know.

    Raises:
        ValueError: the run, the data or its classes do not fit, an image cannot be read, or results are in the way.
    """
    weight_files(run)  # says what is wrong with it
    if data is None and not run.is_dir():
        raise ValueError(f"{run} is a file of weights: give the run's folder, or labelled images with --data")
    base = folder or (run if run.is_dir() else run.parent) / "evaluation"
    _check_free(base, overwrite)
    ranks = Ranks("auto")
    trained = load_trained(run, ranks.device, tta)
    recipe = trained.recipe
    if data is not None:
        return {"all": _evaluate_other(trained, run, data, layout, base, output, ranks)}
    found_data = _own_data(recipe.data, run, output)
    folds = {
        path.stem.removeprefix("folds_"): Folds.load(path, found_data) for path in sorted(run.glob("folds_*.json"))
    }
    session = Run(recipe, run, found_data, folds, Batches.open(recipe, found_data, output), output, ranks)
    alone = len(session.parts) == 1
    places = {
        part: base if alone else base / part.protocol / f"fold_{part.number + 1}"
        for part in session.parts
        if part.folder in trained.folders
    }
    for place in places.values():  # all of them before the first is written
        _check_free(place, overwrite)
    results = {}
    for part, place in places.items():
        fold, model = session.fold(part), trained.models[trained.folders.index(part.folder)]
        held_out = fold.test or fold.validation
        predictions = predict(session, model, held_out, part.title)
        validation = predict(session, model, fold.validation, part.title) if fold.test and fold.validation else None
        groups = [found_data.samples[index].group for index in held_out] if found_data.grouped else None
        results[part.title] = measure(predictions, validation, recipe.evaluation.bootstrap, recipe.seed, groups)
        _write(place, predictions, results[part.title], _recorded(found_data, held_out), output, part.title)
    return results


def _evaluate_other(
    trained: Trained, run: Path, path: str, layout: str, folder: Path, output: Output, ranks: Ranks
) -> dict[str, Any]:
    """Measure the mean of a run's networks on all images of a folder."""
    recipe = trained.recipe
    found_data, notes = with_classes_of(trained, _other_data(trained, path, layout))
    data = _readable(found_data, output)
    batches = Batches.open(recipe, data, output)
    loader = batches.evaluation(range(len(data)))
    mean: Any = 0
    for model in trained.models:
        with output.bar("predicting", len(loader)) as bar:
            _, rows = predict_batches(
                model, loader, ranks.device, activation(recipe), recipe.evaluation.tta, each=bar.advance
            )
        mean = mean + rows / len(trained.models)
    predictions = Predictions([sample.id for sample in data.samples], data.labels, mean, trained.classes)
    groups = [sample.group for sample in data.samples] if data.grouped else None
    found = measure(predictions, None, recipe.evaluation.bootstrap, recipe.seed, groups)
    images = _recorded(data, range(len(data)))
    hashes = [one["sha256"] for one in images["samples"].values()]
    found["notes"] = [*notes, *_seen_before(trained, run, hashes)]
    _write(folder, predictions, found, images, output, f"{data.name}{' (SYNTHETIC)' if data.synthetic else ''}")
    return found


def _other_data(trained: Trained, path: str, layout: str) -> CellData:
    """Labelled images, read with those options of the run that their layout has; classes are as they lie there.

    Raises:
        ValueError: there is no such data, or its layout is unknown.
    """
    settings = trained.recipe.data
    options = {name: value for name, value in settings.options.items() if name != "classes"}
    if path == "synthetic":
        return open_data(path, **(options if settings.path == "synthetic" else {}))
    try:
        data = open_data(path, layout=layout)
    except LayoutError:
        alone = _of_one_class(Path(path).expanduser(), layout, {*trained.classes, *_members(settings)})
        if alone is None:
            raise
        return alone
    known = signature(LAYOUTS[data.name].read).parameters if data.name in LAYOUTS else {}
    fitting = {name: value for name, value in options.items() if name in known}
    return open_data(path, layout=layout, **fitting) if fitting else data


def _of_one_class(path: Path, layout: str, classes: Collection[str]) -> CellData | None:
    """Images of a single class, in which nothing can be learned, but measured: the folder's name must be a class."""
    if not path.is_dir():
        return None
    listing = Listing.of(path)
    for name in LAYOUTS if layout == "auto" else (layout,):
        read: Callable[..., CellData | None] | None = LAYOUTS[name].read if name in LAYOUTS else None
        if name != "folders" and read is not None and (data := read(listing)) is not None:
            return data
    images, _ = without_masks(listing.images)
    found = []
    for image in images:
        label = next((part for part in image.split("/")[:-1] if part in classes), None)
        if label is None:
            return None
        found.append(Found(image, label))
    if layout not in ("auto", "folders") or len({image.label for image in found}) != 1:
        return None  # several classes are refused for a reason
    return assemble(listing.root.name, listing, found)


def _members(settings: DataSettings) -> dict[str, str]:
    """Class in the images -> class of the network, of a run that selects or joins classes; else empty."""
    chosen = settings.options.get("classes") or ()
    if not isinstance(chosen, Mapping):
        return {name: name for name in chosen}
    return {
        member: name
        for name, members in chosen.items()
        for member in ((members,) if isinstance(members, str) else members)
    }


def with_classes_of(trained: Trained, data: CellData) -> tuple[CellData, list[str]]:
    """The images with the network's classes for labels, and what to say about it.

    Where the run selects or joins classes (data.options.classes), so is done here, and what it left out is left out;
    images that have the names of the joined classes already are taken as they are. A class without images is none of
    the means.

    Raises:
        ValueError: the network does not know a class; names them.
    """
    present = [name for name, count in data.class_counts.items() if count]
    members = _members(trained.recipe.data)
    selected = any(name in members for name in present)
    names = members if selected else {name: name for name in trained.classes}
    unknown = [name for name in present if name not in names]
    if unknown and not selected:
        raise ValueError(
            f"the data has classes that the network does not know: {', '.join(unknown)}; it knows "
            f"{', '.join([*trained.classes, *(name for name in members if name not in trained.classes)])}. "
            "Rename the folders"
        )
    label = {name: trained.classes.index(new) for name, new in names.items()}
    kept = tuple(
        replace(sample, label=label[data.classes[sample.label]])
        for sample in data.samples
        if data.classes[sample.label] in label
    )
    notes = []
    if unknown:
        count = len(data) - len(kept)
        notes.append(f"{count:,} images of {', '.join(unknown)} were left out, which are not of the run's classes")
    absent = [name for name in trained.classes if name not in {names.get(old) for old in present}]
    if absent:
        notes.append(f"there is no image of {', '.join(absent)}, so that means over the classes leave it out")
    return replace(data, classes=trained.classes, samples=kept), notes


def _seen_before(trained: Trained, run: Path, hashes: Sequence[str]) -> list[str]:
    """How many of the images the networks were trained on, by their hashes in the run's folds: those prove nothing."""
    learned = _learned(trained, run)
    if learned is None:
        return [f"whether the network was trained on some of these images cannot be told: {run} lies in no whole run"]
    training = sum(value in learned["train"] for value in hashes)
    validation = sum(value in learned["validation"] and value not in learned["train"] for value in hashes)
    if not training + validation:
        return []
    of = f" of at least one of the {len(trained.models)} networks" if len(trained.models) > 1 else ""
    text = f"{training:,} of {len(hashes):,} images were in the training part{of}"
    text += f", {validation:,} in the validation part" if validation else ""
    return [f"{text}: these figures are not of images that are new to the network"]


def _learned(trained: Trained, run: Path) -> dict[str, set[str]] | None:
    """SHA-256 of the images of the training and validation parts of the folds whose weights are used."""
    root = run_folder(run)
    if root is None:
        return None
    found: dict[str, set[str]] = {"train": set(), "validation": set()}
    for folder in trained.folders:
        part = part_of(root, folder)
        if part is None or not (root / f"folds_{part['protocol']}.json").is_file():
            return None
        document = json.loads((root / f"folds_{part['protocol']}.json").read_text(encoding="utf-8"))
        recorded, fold = document["samples"], document["folds"][part["fold"] - 1]
        ids = list(recorded)
        place = {name: index for index, name in enumerate(ids)}
        labels = np.array([recorded[name]["label"] for name in ids])
        fraction, seed = trained.recipe.data.train_fraction, trained.recipe.split_seed
        used = learning_part([place[name] for name in fold["train"]], labels, fraction, seed)
        found["train"] |= {recorded[ids[index]]["sha256"] for index in used}
        found["validation"] |= {recorded[name]["sha256"] for name in fold["validation"]}
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
    root = run_folder(run)
    if root is None:
        raise ValueError(f"{run} lies in no run, whose images it could be judged on")
    trained = load_trained(run, torch.device("cpu"))
    part = part_of(root, trained.folders[0])
    if part is None:
        raise ValueError(f"{run} is no part of the run {root}")
    data = _own_data(trained.recipe.data, root, output)
    folds = Folds.load(root / f"folds_{part['protocol']}.json", data)
    return RunImages(Batches.open(trained.recipe, data, output), folds.folds[part["fold"] - 1])
