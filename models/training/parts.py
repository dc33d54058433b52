"""The data of a run and how it is cut: reading, checking, folds, loaders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cellops.models.data import (
    BatchLoader,
    CellData,
    Fold,
    Folds,
    ImageStore,
    build_augmentation,
    make_folds,
    open_data,
    scan,
)
from cellops.models.training.console import Output
from cellops.models.training.recipe import RecipeError
from cellops.models.training.settings import DataSettings, Recipe

UNCHANGED = {"mean": 0.0, "std": 1.0}


@dataclass(frozen=True)
class Part:
    """One fold of one protocol, and the folder of its results."""

    protocol: str
    number: int  # from 0
    folder: Path

    @property
    def title(self) -> str:
        return f"{self.protocol}, fold {self.number + 1}"


def protocols(settings: DataSettings) -> list[str]:
    """The protocols that a run goes through."""
    return ["grouped", "paper"] if settings.protocol == "both" else [settings.protocol]


def parts(folds: Mapping[str, Folds], folder: Path) -> list[Part]:
    """The parts of a run, first folds first; the results of a single part lie in the run's own folder."""
    if sum(map(len, folds.values())) == 1:
        return [Part(next(iter(folds)), 0, folder)]
    return [
        Part(name, number, folder / name / f"fold_{number + 1}" if len(folds) > 1 else folder / f"fold_{number + 1}")
        for number in range(max(map(len, folds.values())))
        for name, cut_folds in folds.items()
        if number < len(cut_folds)
    ]


def read_data(settings: DataSettings, output: Output) -> CellData:
    """Open the data set and look at every image.

    Args:
        settings: where and what.
        output: for the progress bar and the list of what is left out.

    Raises:
        ValueError: there is no such data, its layout is unknown, or images cannot be read.
    """
    if settings.path is None:
        raise RecipeError("no data given: --data DIR, or --data synthetic for drawn cells")
    data = open_data(settings.path, layout=settings.layout, **settings.options)
    unreadable, text = unreadable_images(data, output)
    if unreadable and settings.unreadable == "error":
        raise ValueError(f"{text}\nRepair or remove them, or leave them out with --set data.unreadable=skip")
    if unreadable:
        output.line(f"warning: left out, {text}", style="yellow")
        _check_classes(data, unreadable)
        data = data.without(sorted(unreadable))
    return data


def unreadable_images(data: CellData, output: Output) -> tuple[set[str], str]:
    """The ids of images that cannot be read, and a text that names the first twenty; drawn ones all can."""
    if data.synthetic:
        return set(), ""
    with output.counter("looking at the images", len(data)) as progress:
        found = scan(data, workers=2, progress=progress)
    listed = "".join(f"\n  {item.reason}" for item in found[:20])
    listed += f"\n  and {len(found) - 20} more" if len(found) > 20 else ""
    return {item.id for item in found}, f"{len(found)} of {len(data)} images cannot be read:{listed}"


def _check_classes(data: CellData, unreadable: set[str]) -> None:
    """Raise where all images of a class are among those that cannot be read: what is left is another problem."""
    left = {data.classes[sample.label] for sample in data.samples if sample.id not in unreadable}
    if lost := [name for name in data.classes if name not in left]:
        raise ValueError(
            f"no image of {', '.join(lost)} can be read: repair them, or leave the class out with "
            "--set data.options.classes=[...]"
        )


def cut(data: CellData, recipe: Recipe, protocol: str) -> Folds:
    """The folds of a protocol."""
    settings = recipe.data
    return make_folds(
        data,
        folds=settings.folds,
        protocol=protocol,
        validation=settings.validation,
        seed=recipe.split_seed,
        test_fraction=settings.test_fraction,
        prescribed=settings.prescribed,
    )


def learning_part(indices: Sequence[int], labels: np.ndarray, fraction: float, seed: int) -> tuple[int, ...]:
    """A fraction of the training images, the same of every class and at least one, for learning curves."""
    if fraction >= 1:
        return tuple(indices)
    generator = np.random.default_rng((seed, 1))
    chosen: list[int] = []
    for label in np.unique(labels[list(indices)]):
        members = np.array([index for index in indices if labels[index] == label])
        chosen += generator.permutation(members)[: max(1, round(fraction * len(members)))].tolist()
    return tuple(sorted(chosen))


def class_weights(indices: Sequence[int], labels: np.ndarray, classes: int) -> np.ndarray:
    """Weights in inverse proportion to the images of a class, of mean 1 over the images; 1 for an absent class."""
    counts = np.bincount(labels[list(indices)], minlength=classes)
    present = counts > 0
    weights = np.ones(classes)
    weights[present] = counts.sum() / (present.sum() * counts[present])
    return weights


@dataclass
class Batches:
    """Makes the loaders of a run from its store."""

    recipe: Recipe
    data: CellData
    store: ImageStore
    rank: int = 0
    size: int = 1

    @classmethod
    def open(cls, recipe: Recipe, data: CellData, output: Output, rank: int = 0, size: int = 1) -> Batches:
        """Open the store of resized images, which is made where it is missing."""
        settings = recipe.data
        height, width = settings.store_size or settings.input_size
        with output.counter("resizing the images", len(data)) as progress:
            store = ImageStore.open(data, size=(height, width), resize=settings.resize, progress=progress)
        return cls(recipe, data, store, rank, size)

    def images(self, indices: Sequence[int], normalised: bool = True) -> Tensor:
        """Images as the network sees them in evaluation, [N, 3, H, W]; from 0 to 1 if not normalised."""
        height, width = self.recipe.data.input_size
        config = self.recipe.augmentation if normalised else {**self.recipe.augmentation, "normalise": UNCHANGED}
        augmentation, generator = build_augmentation(config, (height, width), False), torch.Generator()
        pixels = [torch.from_numpy(np.array(self.store[index])).permute(2, 0, 1) for index in indices]
        return torch.stack([augmentation(image, generator) for image in pixels])

    def _augmentation(self, train: bool) -> Any:
        height, width = self.recipe.data.input_size
        return build_augmentation(self.recipe.augmentation, (height, width), train)

    def training(self, fold: Fold, seed: int) -> BatchLoader:
        """The loader of the training part."""
        settings = self.recipe.training
        indices = learning_part(fold.train, self.data.labels, self.recipe.data.train_fraction, self.recipe.split_seed)
        # Batch normalisation has no variance over a single image, so a last batch that has one for a process is left
        # out; synchronised it is over the images of all.
        alone = 1 if settings.sync_batch_norm else self.size
        single = 1 <= len(indices) % settings.batch_size <= alone and len(indices) > settings.batch_size
        if settings.batch_size % self.size:
            raise RecipeError(f"training.batch_size {settings.batch_size} must be a multiple of {self.size} processes")
        return BatchLoader(
            self.store,
            self.data.labels,
            indices,
            settings.batch_size // self.size,
            self._augmentation(True),
            seed=seed,
            sampler=settings.sampler,
            samples_per_class=settings.samples_per_class,
            drop_last=settings.drop_last or single,
            workers=settings.workers,
            rank=self.rank,
            world_size=self.size,
        )

    def evaluation(self, indices: Sequence[int]) -> BatchLoader:
        """A loader of images as they are, in order."""
        settings = self.recipe.training
        return BatchLoader(
            self.store,
            self.data.labels,
            indices,
            self.recipe.evaluation.batch_size or 2 * settings.batch_size,
            self._augmentation(False),
            seed=0,
            sampler="sequential",
            workers=settings.workers,
            rank=self.rank,
            world_size=self.size,
        )
