"""What a data set is: samples with labels and groups, and where their pixels come from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Sample:
    """One image of one cell.

    Attributes:
        id: unique in its data set; for files the path relative to the root, with "/" on every system.
        path: the file, or None where the image is drawn.
        label: index into `CellData.classes`.
        group: what must not be split: the slide, patient or cluster image the cell was cut from.
        split: "train" or "test" where the data set prescribes it.
        mask: a file of the image's size whose bright part is the cell; the rest is made black.
    """

    id: str
    path: Path | None
    label: int
    group: str
    split: str | None = None
    mask: Path | None = None


@dataclass(frozen=True)
class CellData:
    """A data set of labelled cell images.

    Attributes:
        name: of the data set or layout.
        root: the folder that every file lies in, or None.
        classes: names; `Sample.label` counts in them.
        samples: in the order of their ids.
        synthetic: whether the images are drawn, which reports must say.
        grouped: whether `Sample.group` says more than `Sample.id`.
        notes: what was left out or assumed when it was read, in sentences.
        draw: makes the image of a sample that has no file: uint8 [H, W, 3].

    Raises:
        ValueError: an id appears twice, or a label is no class.
    """

    name: str
    root: Path | None
    classes: tuple[str, ...]
    samples: tuple[Sample, ...]
    synthetic: bool = False
    grouped: bool = False
    notes: tuple[str, ...] = ()
    draw: Callable[[Sample], np.ndarray] | None = None

    def __post_init__(self) -> None:
        counts = Counter(sample.id for sample in self.samples)
        twice = [name for name, count in counts.items() if count > 1]
        if twice:
            raise ValueError(f"{self.name}: {len(twice)} ids appear more than once, e.g. {twice[0]!r}")
        for sample in self.samples:
            if not 0 <= sample.label < len(self.classes):
                raise ValueError(f"{sample.id}: label {sample.label} is none of the {len(self.classes)} classes")

    def __len__(self) -> int:
        return len(self.samples)

    @cached_property
    def labels(self) -> np.ndarray:
        """int64 [N]."""
        return np.array([sample.label for sample in self.samples], dtype=np.int64)

    @property
    def groups(self) -> list[str]:
        """The group of each sample."""
        return [sample.group for sample in self.samples]

    @property
    def class_counts(self) -> dict[str, int]:
        """How many samples each class has, absent classes with 0."""
        counts = np.bincount(self.labels, minlength=len(self.classes))
        return {name: int(count) for name, count in zip(self.classes, counts, strict=True)}

    @property
    def prescribed(self) -> bool:
        """Whether the data set says which samples are for training and which for testing."""
        return bool(self.samples) and all(sample.split is not None for sample in self.samples)

    def read(self, index: int) -> np.ndarray:
        """The image of `samples[index]`, its mask applied: uint8 [H, W, 3].

        Raises:
            ImageError: it cannot be decoded; the message names the file.
        """
        from cellops.models.data.images import read_image

        sample = self.samples[index]
        if sample.path is None:
            if self.draw is None:
                raise ValueError(f"{sample.id} has no file, and {self.name} draws no images")
            return self.draw(sample)
        return read_image(sample.path, root=self.root, mask=sample.mask)

    def without(self, ids: Iterable[str]) -> CellData:
        """The data set less some samples; the classes stay.

        Raises:
            ValueError: an id is not in the data set.
        """
        left_out = set(ids)
        unknown = left_out - {sample.id for sample in self.samples}
        if unknown:
            raise ValueError(f"{self.name} has no sample {sorted(unknown)[0]!r}")
        if not left_out:
            return self
        kept = tuple(sample for sample in self.samples if sample.id not in left_out)
        return replace(self, samples=kept, notes=(*self.notes, f"{len(left_out)} samples were left out by name."))

    def select(self, classes: Mapping[str, str | Collection[str]] | Sequence[str]) -> CellData:
        """Some of the classes, or new classes made of them.

        Args:
            classes: names to keep, in their new order; or new name -> the name or names that it joins, for example
                `{"normal": ["Parabasal", "Superficial-Intermediate"], "abnormal": "Dyskeratotic"}`.

        Raises:
            ValueError: `classes` is of another form, a name is not a class or used twice, or no two classes are left.
        """
        wanted = _checked_classes(classes)
        position = {name: label for label, name in enumerate(self.classes)}
        new_label: dict[int, int] = {}
        for new, (name, members) in enumerate(wanted.items()):
            for member in members:
                if member not in position:
                    raise ValueError(f"{self.name} has no class {member!r}; its classes: {', '.join(self.classes)}")
                if position[member] in new_label:
                    raise ValueError(f"class {member!r} is used twice, the second time for {name!r}")
                new_label[position[member]] = new
        if len(wanted) < 2:
            raise ValueError(f"classes: at least two are needed, got {list(wanted)}")
        kept = tuple(
            replace(sample, label=new_label[sample.label]) for sample in self.samples if sample.label in new_label
        )
        notes = [*self.notes]
        if len(kept) < len(self.samples):
            notes.append(f"{len(self.samples) - len(kept)} images of other classes were left out.")
        return replace(self, classes=tuple(wanted), samples=kept, notes=tuple(notes))


def _checked_classes(classes: Mapping[str, str | Collection[str]] | Sequence[str]) -> dict[str, Collection[str]]:
    """New class -> the names that it joins, as `CellData.select` describes it.

    Raises:
        ValueError: the classes have another form; they come from `data.options.classes` of a recipe.
    """
    form = "data.options.classes must be a list of names, or new names with the name or list of names that each joins"
    if not isinstance(classes, Mapping | Sequence) or isinstance(classes, str):
        raise ValueError(f"{form}; got {classes!r}")
    pairs = list(classes.items() if isinstance(classes, Mapping) else ((name, name) for name in classes))
    wanted: dict[str, Collection[str]] = {}
    for name, joined in pairs:
        members = list(joined) if isinstance(joined, Collection) and not isinstance(joined, str) else [joined]
        for one in (name, *members):
            if not isinstance(one, str):
                hint = "; a name that is a number goes in quotes" if isinstance(one, int | float) else ""
                raise ValueError(f"{form}; got {one!r}{hint}")
        if name in wanted:
            raise ValueError(f"data.options.classes has {name!r} twice")
        wanted[name] = members
    return wanted
