"""Runs that were judged on the same images: read, paired image by image, and compared (`cellops compare`)."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from cellops.models.training.apply import FACTS, IMAGES, PREDICTIONS, part_of, run_folder
from cellops.models.training.evaluate import Predictions
from cellops.models.training.metrics import averages, confusion_matrix
from cellops.models.training.paired import differences, holm, mcnemar, right_and_wrong
from cellops.models.training.run import METRICS


@dataclass
class Judged:
    """What a run, or an evaluation of one, said of labelled images.

    Attributes:
        name: the folder as it was given.
        predictions: of all its folds that are in.
        samples: id -> `sha256` and `group`; empty where they are not recorded.
        grouped: whether these groups say more than the ids.
        fold: of each image [N].
        notes: what a reader of its figures must know.
    """

    name: str
    predictions: Predictions
    samples: Mapping[str, Mapping[str, Any]]
    grouped: bool
    fold: np.ndarray
    notes: list[str] = field(default_factory=list)


def read_judged(folder: Path, protocol: str | None = None) -> Judged:
    """Read the folder of a run, of one of its folds, or of what `cellops evaluate` wrote.

    Args:
        folder: several folds in it are taken together.
        protocol: of a folder that has two; None takes "grouped".

    Raises:
        ValueError: there are no predictions, or none of this protocol; names the folder.
    """
    root = run_folder(folder) if folder.is_dir() else None
    part = part_of(root, folder) if root is not None else None
    if (folder / FACTS).is_file():
        places = [(one["protocol"], folder / one["folder"]) for one in _read(folder / FACTS)["parts"]]
    elif (folder / PREDICTIONS).is_file():
        places = [(part["protocol"] if part else "", folder)]
    else:
        places = [(path.parent.parent.name, path.parent) for path in sorted(folder.glob(f"*/fold_*/{PREDICTIONS}"))]
    done = [(name, place) for name, place in places if all((place / one).is_file() for one in (PREDICTIONS, METRICS))]
    if not done:
        raise ValueError(
            f"{folder} holds no predictions: give the folder of a run of which a fold is done, or that of `cellops "
            "evaluate`"
        )
    names = list(dict.fromkeys(name for name, _ in done))
    wanted = protocol or ("grouped" if "grouped" in names else names[0])
    if wanted not in names and names != [""]:
        raise ValueError(f"--protocol {wanted}: {folder} has {', '.join(names)}")
    chosen = [place for name, place in done if name in (wanted, "")]
    notes = [] if len(names) == 1 else [f"of {folder}, protocol {wanted}"]
    planned = sum(name in (wanted, "") for name, _ in places)
    notes += [f"of {folder}, {len(chosen)} of {planned} folds are in"] if len(chosen) < planned else []
    for place in chosen:
        found = _read(place / METRICS)
        notes += [f"{place}: {text}" for text in found.get("notes", ())]
        if found.get("judged_on") == "validation":
            notes.append(f"{place}: there is no test part, and the images that are compared chose its epoch")
    parts = [Predictions.load(place / PREDICTIONS) for place in chosen]
    of_run = part is not None or (folder / FACTS).is_file()
    grouped, samples = _images(chosen, root if of_run else None, part["protocol"] if part else wanted)
    fold = np.concatenate([np.full(len(one.ids), number) for number, one in enumerate(parts)])
    return Judged(str(folder), Predictions.join(parts), samples, grouped, fold, notes)


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None


def _images(places: Sequence[Path], root: Path | None, protocol: str) -> tuple[bool, dict[str, Any]]:
    """Whether images have groups, and hash and group of each; of a run from its folds, else as evaluate wrote them."""
    folds = None if root is None else root / f"folds_{protocol}.json"
    if root is not None and folds is not None and folds.is_file():
        return bool(_read(root / FACTS)["grouped"]), _read(folds)["samples"]
    records = [_read(place / IMAGES) for place in places if (place / IMAGES).is_file()]
    if len(records) < len(places):
        return False, {}
    return records[0]["grouped"], {name: one for record in records for name, one in record["samples"].items()}


@dataclass
class Paired:
    """Predictions of several runs on the same images in the same order.

    Attributes:
        names: of the runs.
        ids: of the images, as the first run has them.
        classes: as the first run has them.
        targets: class numbers [N].
        found: predicted class numbers, [runs, N].
        confidence: probabilities of these, [runs, N].
        groups: of the images, or None.
        by: "hash" or "path".
        notes: what a reader must know.
    """

    names: list[str]
    ids: list[str]
    classes: tuple[str, ...]
    targets: np.ndarray
    found: np.ndarray
    confidence: np.ndarray
    groups: list[str] | None
    by: str
    notes: list[str]


def pair(judged: Sequence[Judged], by: str = "auto", common: bool = False) -> Paired:
    """Bring several runs' predictions into one order.

    Args:
        judged: at least two.
        by: "hash" knows an image by the SHA-256 of its file and mask, "path" by its path in the data set; "auto" takes
            the hash where every run has recorded it.
        common: leave out images that are not held out in every run.

    Raises:
        ValueError: classes, images or their labels are not the same; names them.
    """
    first = judged[0]
    for other in judged[1:]:
        _check_classes(first, other)
    recorded = [all(name in one.samples for name in one.predictions.ids) for one in judged]
    if by == "hash" and not all(recorded):
        lacking = ", ".join(one.name for one, known in zip(judged, recorded, strict=True) if not known)
        raise ValueError(f"--by hash: {lacking} records none; `cellops evaluate` of today does")
    by = ("hash" if all(recorded) else "path") if by == "auto" else by
    keys = [_keys(one, by) for one in judged]
    shared = set(keys[0]).intersection(*keys[1:])
    for other, known in zip(judged[1:], keys[1:], strict=True):
        if not common and known.keys() != keys[0].keys():
            raise ValueError(_unlike(first, keys[0], other, known, len(shared), by))
    if not shared:
        raise ValueError(f"no image is held out in each of {', '.join(one.name for one in judged)}")
    order = [[known[key] for key in keys[0] if key in shared] for known in keys]
    classes = first.predictions.classes
    targets, found, confidence = [], [], []
    for one, rows in zip(judged, order, strict=True):
        columns = [one.predictions.classes.index(name) for name in classes]
        place = np.argsort(columns)  # of this run's class numbers, in the first one's
        probabilities = one.predictions.probabilities[rows][:, columns]
        targets.append(place[one.predictions.targets[rows]])
        found.append(place[one.predictions.found[rows]])
        confidence.append(probabilities.max(1))
        other = np.flatnonzero(targets[-1] != targets[0])
        if len(other):
            ids = [one.predictions.ids[rows[row]] for row in other]
            raise ValueError(f"{first.name} and {one.name} have other labels for {len(ids)} images: {_some(ids)}")
    ids = [first.predictions.ids[row] for row in order[0]]
    groups, notes = _groups(judged, order)
    left_out = [f"{len(known) - len(shared)} of {one.name}" for one, known in zip(judged, keys, strict=True)]
    notes += [f"left out, as not held out in every run: {', '.join(left_out)}"] if common else []
    notes += _fold_notes(judged, order) + [note for one in judged for note in one.notes]
    if not all(recorded):
        notes.append("images are known by their paths alone: not every folder records their SHA-256")
    names = [one.name for one in judged]
    return Paired(names, ids, classes, targets[0], np.array(found), np.array(confidence), groups, by, notes)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _check_classes(first: Judged, other: Judged) -> None:
    one, two = set(first.predictions.classes), set(other.predictions.classes)
    if one != two:
        told = [
            f"{judged.name} has {', '.join(sorted(more))}, which {lacking.name} has not"
            for judged, lacking, more in ((first, other, one - two), (other, first, two - one))
            if more
        ]
        raise ValueError(f"the classes are not the same: {'; '.join(told)}")


def _keys(judged: Judged, by: str) -> dict[Any, int]:
    """What an image is known by -> its place; files of the same content are told apart by label and path."""
    predictions = judged.predictions
    if by == "path":
        return {name: place for place, name in enumerate(predictions.ids)}
    names = [predictions.classes[target] for target in predictions.targets]
    alike: Counter = Counter()
    keys = {}
    for place in sorted(range(len(names)), key=lambda place: (names[place], predictions.ids[place])):
        value = judged.samples[predictions.ids[place]]["sha256"]
        keys[value, alike[value]] = place
        alike[value] += 1
    return dict(sorted(keys.items(), key=lambda item: item[1]))


def _unlike(first: Judged, one: Mapping, other: Judged, two: Mapping, shared: int, by: str) -> str:
    """What is wrong where the images of two runs are not the same."""
    told, changed = [], 0
    for judged, lacking, keys, known in ((first, other, one, two), (other, first, two, one)):
        missing = [judged.predictions.ids[place] for key, place in keys.items() if key not in known]
        changed = len(set(missing).intersection(lacking.predictions.ids))
        if missing:
            told.append(f"{len(missing)} of {judged.name} are not in {lacking.name} ({_some(missing)})")
    text = f"the held-out images are not the same: {'; '.join(told)}"
    if changed and by == "hash":
        text += (
            f". {changed} of them have the same path and another content, or mask; --by path takes them for the same"
        )
    return f"{text}. --common compares on the {shared} that all have" if shared else text


def _groups(judged: Sequence[Judged], order: Sequence[Sequence[int]]) -> tuple[list[str] | None, list[str]]:
    """The groups of the paired images, by the first run that has some, and what to say about those of the others."""
    known = [(one, rows) for one, rows in zip(judged, order, strict=True) if one.grouped]
    if not known:
        told = not any(one.samples for one in judged)
        return None, ["no folder records groups of images, so that single images are resampled"] if told else []
    found = [[str(one.samples[one.predictions.ids[row]]["group"]) for row in rows] for one, rows in known]
    other = [one.name for (one, _), groups in zip(known, found, strict=True) if not _same_parts(groups, found[0])]
    told = f"groups are those of {known[0][0].name}; of {', '.join(other)} they are others" if other else ""
    return found[0], [told] if told else []


def _same_parts(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two ways of dividing the same images divide them alike, whatever the names."""
    return len(set(zip(one, other, strict=True))) == len(set(one)) == len(set(other))


def _fold_notes(judged: Sequence[Judged], order: Sequence[Sequence[int]]) -> list[str]:
    """Whether networks were trained on other folds, so that more than they differs."""
    folds = [one.fold[list(rows)].tolist() for one, rows in zip(judged, order, strict=True)]
    several = [(one.name, fold) for one, fold in zip(judged, folds, strict=True) if len(set(one.fold)) > 1]
    other = [name for name, fold in several if not _same_parts(fold, several[0][1])]
    return [f"the folds of {', '.join(other)} are not those of {several[0][0]}: training differs too"] if other else []


def compare(paired: Paired, samples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Every figure of the comparison, as plain values.

    Args:
        paired: at least two runs.
        samples: resamples of the intervals; fewer than 2 give none.
        seed: of the resamples.

    Returns:
        `runs`: name, accuracy and balanced accuracy. `pairs`, of each two: `table` [[both right, the first alone],
        [the second alone, none]], `mcnemar` with `p_holm` where there are more than two runs, and the `differences`
        first - second. `images`, `groups` (None without any), `classes`, `paired_by` and `notes`.
    """
    classes, targets = len(paired.classes), paired.targets
    runs, pairs = [], []
    for name, found in zip(paired.names, paired.found, strict=True):
        means = averages(confusion_matrix(found, targets, classes))
        runs.append({"run": name, **{key: float(means[key]) for key in ("accuracy_micro", "accuracy_macro")}})
    for one, other in combinations(range(len(runs)), 2):
        first, second = paired.found[one], paired.found[other]
        table = right_and_wrong(targets, first, second)
        pairs.append(
            {
                "first": paired.names[one],
                "second": paired.names[other],
                "table": table.tolist(),
                "mcnemar": mcnemar(int(table[0, 1]), int(table[1, 0])),
                "differences": differences(targets, first, second, classes, samples, seed, paired.groups),
            }
        )
    if len(runs) > 2:
        for one_pair, value in zip(pairs, holm([one_pair["mcnemar"]["p"] for one_pair in pairs]), strict=True):
            one_pair["mcnemar"]["p_holm"] = value
    notes = list(paired.notes)
    groups = None if paired.groups is None else len(set(paired.groups))
    if groups is not None and groups < len(targets):
        notes.append(
            f"the {len(targets)} images are of {groups} groups, and McNemar's test takes them for independent: its p "
            "is too small where those of a group fail together. Go by the intervals, which draw whole groups"
        )
    return {
        "images": len(targets),
        "groups": groups,
        "classes": list(paired.classes),
        "paired_by": paired.by,
        "runs": runs,
        "pairs": pairs,
        "notes": list(dict.fromkeys(notes)),
    }


def differing(paired: Paired) -> str:
    """A CSV text of the images that are not classified alike: the truth, the group, and what each run says."""
    text = io.StringIO(newline="")
    table = csv.writer(text)
    grouped = paired.groups is not None
    columns = [f"{what} {name}" for name in paired.names for what in ("predicted", "correct", "confidence")]
    table.writerow(["image", "truth", *(["group"] if grouped else []), *columns])
    for row in np.flatnonzero((paired.found != paired.found[0]).any(0)):
        values: list[Any] = [paired.ids[row], paired.classes[paired.targets[row]]]
        values += [paired.groups[row]] if paired.groups is not None else []
        for found, confidence in zip(paired.found[:, row], paired.confidence[:, row], strict=True):
            values += [paired.classes[found], int(found == paired.targets[row]), f"{confidence:.6f}"]
        table.writerow(values)
    return text.getvalue()
