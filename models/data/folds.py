"""Which samples train, validate and test: stratified, and by default without a group on both sides."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cellops.models.data.likeness import ALIKE, alike_pairs, signature
from cellops.models.data.samples import CellData, Sample
from cellops.models.data.splitting import FoldError, cross_validation, hold_out, set_aside
from cellops.models.data.store import ImageStore

__all__ = ["PROTOCOLS", "Fold", "FoldError", "Folds", "make_folds", "near_duplicates", "pairs_alike"]

PROTOCOLS = ("grouped", "paper")
FORMAT = 1


@dataclass(frozen=True)
class Fold:
    """Indices into `CellData.samples`, each list ascending."""

    train: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]


@dataclass(frozen=True)
class Folds:
    """Splits of one data set, and how they came about.

    Attributes:
        data: the samples that are split.
        protocol: "grouped", "paper" (image by image, as the papers do) or "prescribed".
        seed: of the random splits.
        folds: one for a single hold-out part, else every sample is in one test part.
        notes: what a reader of the results must know, in sentences.
    """

    data: CellData
    protocol: str
    seed: int
    folds: tuple[Fold, ...]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.folds)

    def __getitem__(self, number: int) -> Fold:
        return self.folds[number]

    def save(self, path: Path | str) -> None:
        """Write the splits with the SHA-256 of every file, so that a result can be repeated or a change noticed."""
        path = Path(path)
        samples = self.data.samples
        document: dict[str, Any] = {
            "format": FORMAT,
            "data": self.data.name,
            "protocol": self.protocol,
            "seed": self.seed,
            "classes": list(self.data.classes),
            "notes": list(self.notes),
            "samples": {
                sample.id: {"sha256": file_hash(self.data, sample), "label": sample.label, "group": sample.group}
                for sample in samples
            },
            "folds": [
                {part: [samples[index].id for index in getattr(fold, part)] for part in ("train", "validation", "test")}
                for fold in self.folds
            ],
        }
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(document, file, indent=1, ensure_ascii=False)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path | str, data: CellData) -> Folds:
        """Read splits for a data set that must be the one they were made for.

        Raises:
            FoldError: the file is damaged, or files, their classes or groups changed, are missing or are new; the
                message names some.
        """
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
            recorded = document["samples"]
            if document["format"] != FORMAT:
                raise FoldError(f"{path}: format {document['format']}, this version reads {FORMAT}")
            if document["classes"] != list(data.classes):
                raise FoldError(
                    f"{path}: made for the classes {document['classes']}, the data has {list(data.classes)}"
                )
            index = {sample.id: position for position, sample in enumerate(data.samples)}
            differences = {
                "missing": [name for name in recorded if name not in index],
                "new": [name for name in index if name not in recorded],
                "changed": [
                    sample.id
                    for sample in data.samples
                    if sample.id in recorded
                    and (file_hash(data, sample), sample.label, sample.group)
                    != tuple(recorded[sample.id][key] for key in ("sha256", "label", "group"))
                ],
            }
            if any(differences.values()):
                told = "; ".join(f"{len(names)} {kind}: {_some(names)}" for kind, names in differences.items() if names)
                raise FoldError(f"{path} was made for other files of {data.name}: {told}")
            folds = tuple(
                Fold(*(tuple(sorted(index[name] for name in fold[part])) for part in ("train", "validation", "test")))
                for fold in document["folds"]
            )
            return cls(data, document["protocol"], document["seed"], folds, tuple(document["notes"]))
        except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise FoldError(f"{path} is not a file of folds: {type(error).__name__}: {error}") from error


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def file_hash(data: CellData, sample: Sample) -> str:
    """SHA-256 of a sample's file and mask; of a drawn sample, of what it is drawn from."""
    digest = hashlib.sha256()
    if sample.path is None:
        digest.update(f"{data.draw!r} {sample.id}".encode())
    for path in (sample.path, sample.mask):
        if path is not None:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def make_folds(
    data: CellData,
    folds: int = 5,
    protocol: str = "grouped",
    validation: float = 0.0,
    seed: int = 0,
    test_fraction: float | None = None,
    prescribed: bool = True,
) -> Folds:
    """Split a data set.

    Args:
        data: the samples.
        folds: parts of the cross-validation; 1 is a single hold-out part.
        protocol: "grouped" keeps every group on one side; "paper" splits image by image, as the papers do, and lets
            near copies of a test image into the training part.
        validation: share of the training part that is set aside, by the same protocol; a class of one image or group
            stays in the training part.
        seed: of the random splits.
        test_fraction: share of the hold-out part where `folds` is 1 (0.2).
        prescribed: take the data set's own training and test part where it has one; then there is one fold.

    Raises:
        ValueError: an argument is out of range.
        FoldError: a class cannot be both learned and tested, since it has one image or one group, or the data set
            prescribes no training or no test part. A class that only some test parts lack is a note.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    if folds < 1:
        raise ValueError(f"folds must be at least 1, got {folds}")
    if not 0 <= validation < 1:
        raise ValueError(f"validation must be at least 0 and less than 1, got {validation}")
    if test_fraction is not None and (folds != 1 or not 0 < test_fraction < 1):
        raise ValueError(f"test_fraction is for folds=1 and between 0 and 1, got {test_fraction} with folds={folds}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    everything = np.arange(len(data))
    groups = np.array(data.groups) if protocol == "grouped" else None
    notes = []
    own = prescribed and data.prescribed
    if own:
        splits = [_prescribed(data)]
        told = f", so there is one fold, not {folds}" if folds > 1 else ""
        notes.append(f"{data.name} prescribes its test part{told} (prescribed: false).")
        shared = {data.groups[i] for i in splits[0][0]} & {data.groups[i] for i in splits[0][1]}
        if shared:
            notes.append(f"{len(shared)} groups are on both sides of the prescribed split.")
    elif folds == 1:
        splits = [hold_out(data, everything, groups, 0.2 if test_fraction is None else test_fraction, seed)]
    else:
        splits = cross_validation(data, everything, groups, folds, seed)
    if not own or validation:  # of a prescribed split the protocol cuts the validation part alone
        what, sides = ("Validation part", "in it and in training") if own else ("Split", "on both sides")
        if protocol == "paper" and data.grouped:
            notes.append(f"{what} image by image (protocol: paper): cells of one group are {sides}.")
        if protocol == "grouped" and not data.grouped:
            notes.append(f"{data.name} has no groups, so that the {what.lower()} is image by image.")
    made = []
    for number, (train, test) in enumerate(splits):
        held: np.ndarray = np.array([], dtype=int)
        if validation:
            train, held = set_aside(data, train, groups, validation, seed + 1 + number)
        made.append(Fold(*(tuple(int(index) for index in np.sort(part)) for part in (train, held, test))))
    return Folds(data, protocol, seed, tuple(made), (*notes, *_absences(data, made)))


def _prescribed(data: CellData) -> tuple[np.ndarray, np.ndarray]:
    """The data set's own training and test part.

    Raises:
        FoldError: one of them is empty.
    """
    splits = np.array([sample.split for sample in data.samples])
    for part, other in (("train", "test"), ("test", "train")):
        if not (splits == part).any():
            raise FoldError(
                f"{data.name}: every image is marked {other}, and none is left to {part} on. Mark some as {part}, or "
                "leave the marks aside (data.prescribed: false)"
            )
    return np.flatnonzero(splits == "train"), np.flatnonzero(splits == "test")


def _absences(data: CellData, folds: Sequence[Fold]) -> list[str]:
    """Which parts lack a class; a class that the training part lacks is an error.

    Raises:
        FoldError: a class has images, and a training part has none of them.
    """
    notes = []
    present = set(data.labels.tolist())
    for number, fold in enumerate(folds):
        for part in ("train", "validation", "test"):
            indices = getattr(fold, part)
            lacking = [data.classes[label] for label in sorted(present - set(data.labels[list(indices)].tolist()))]
            if not lacking or not indices:
                continue
            if part == "train":
                raise FoldError(
                    f"fold {number + 1}: the training part has no image of {', '.join(lacking)}. Leave the class out "
                    "(data.options.classes), use other data.folds or another seed, or split image by image "
                    "(data.protocol: paper); of a split that the data set prescribes, leave it aside "
                    "(data.prescribed: false)"
                )
            notes.append(f"Fold {number + 1}: the {part} part has no {', '.join(lacking)}; class means leave it out.")
    return notes


def pairs_alike(store: ImageStore, distance: float = ALIKE) -> list[tuple[int, int]]:
    """Places (i < j) of images in a store that look alike, but for rotation and flips; see `likeness.signature`."""
    return alike_pairs(np.stack([signature(np.asarray(store[index])) for index in range(len(store))]), distance)


def near_duplicates(
    store: ImageStore,
    folds: Folds,
    distance: float = ALIKE,
    part: str = "test",
    pairs: Sequence[tuple[int, int]] | None = None,
) -> list[tuple[str, str]]:
    """Images that look alike, but for rotation and flips, on the two sides of a split.

    Args:
        store: the images of `folds.data`.
        folds: the splits.
        distance: between signatures, see `likeness.signature`.
        part: the side that is held out: "test", of training and validation, or "validation", of training alone.
        pairs: what `pairs_alike(store, distance)` found, to be spared the search.

    Returns:
        Pairs (id on the other side, id in the part), each once.

    Raises:
        ValueError: `part` is another one, or the store is of other data.
    """
    if part not in ("test", "validation"):
        raise ValueError(f"part must be test or validation, got {part!r}")
    if store.ids != tuple(sample.id for sample in folds.data.samples):
        raise ValueError("store and folds are of different data sets")
    sides = []
    for fold in folds.folds:
        learned = (fold.train, fold.validation) if part == "test" else (fold.train,)
        sides.append((set().union(*learned), set(getattr(fold, part))))
    found = []
    for pair in pairs_alike(store, distance) if pairs is None else pairs:
        for learned, held in sides:
            across = next(((one, other) for one, other in (pair, pair[::-1]) if one in learned and other in held), None)
            if across is not None:
                found.append((store.ids[across[0]], store.ids[across[1]]))
                break
    return found
