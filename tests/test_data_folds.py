"""Folds: nothing on both sides, stratified, written with hashes; and the likeness that finds copies."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trees
from PIL import Image
from sklearn.model_selection import StratifiedGroupKFold

from cellops.models.data import (
    CellData,
    FoldError,
    Folds,
    ImageStore,
    Sample,
    make_folds,
    near_duplicates,
    open_data,
    pairs_alike,
)
from cellops.models.data.likeness import ALIKE, alike_pairs, groups_of_alike, signature
from cellops.models.training.notes import look_alikes


def data_of(groups: list[list[str]], grouped: bool = True, splits: list[str] | None = None) -> CellData:
    """Samples without files: `groups[k]` lists the group of each image of class k."""
    samples = [
        Sample(f"{label}/{number:04d}", None, label, group)
        for label, members in enumerate(groups)
        for number, group in enumerate(members)
    ]
    if splits is not None:
        samples = [Sample(s.id, None, s.label, s.group, split) for s, split in zip(samples, splits, strict=True)]
    classes = tuple("abcdefgh"[: len(groups)])
    return CellData("made", None, classes, tuple(samples), grouped=grouped)


def slides(sizes: list[int], cells: int = 10) -> CellData:
    """Classes of `sizes` slides with so many cells each; slides are shared by neighbouring classes."""
    return data_of(
        [[f"s{label // 2}-{number // cells}" for number in range(size * cells)] for label, size in enumerate(sizes)]
    )


def check(folds: Folds, groups: bool) -> None:
    """Parts are disjoint and ascending, every sample is tested once, and no group is on two sides."""
    names = np.array(folds.data.groups)
    for fold in folds.folds:
        parts = [fold.train, fold.validation, fold.test]
        assert all(list(part) == sorted(set(part)) for part in parts)
        assert sorted(index for part in parts for index in part) == list(range(len(folds.data)))
        if groups:
            sides = [set(names[list(part)]) for part in parts]
            assert not sides[0] & sides[1] and not sides[0] & sides[2] and not sides[1] & sides[2]
    if len(folds) > 1:
        assert sorted(index for fold in folds.folds for index in fold.test) == list(range(len(folds.data)))


@pytest.mark.parametrize("validation", [0.0, 0.2])
@pytest.mark.parametrize(("folds", "fraction"), [(5, None), (2, None), (1, 0.2), (1, 0.3), (1, None)])
def test_grouped(folds: int, fraction: float | None, validation: float) -> None:
    data = slides([12, 12, 15, 30])
    made = make_folds(data, folds, validation=validation, test_fraction=fraction)
    check(made, groups=True)
    share = fraction or (0.2 if folds == 1 else 1 / folds)
    for fold in made.folds:
        counts = np.bincount(data.labels[list(fold.test)], minlength=4) / np.bincount(data.labels)
        assert np.abs(counts - share).max() < 0.12
        assert bool(fold.validation) == bool(validation)
        if validation:
            assert len(fold.validation) / (len(data) - len(fold.test)) == pytest.approx(validation, abs=0.1)


@pytest.mark.parametrize(("folds", "fraction"), [(5, None), (1, 0.3)])
def test_paper_protocol_splits_images_and_says_so(folds: int, fraction: float | None) -> None:
    data = slides([12, 12, 15, 30])
    made = make_folds(data, folds, protocol="paper", validation=0.25, test_fraction=fraction)
    check(made, groups=False)
    assert "Split image by image (protocol: paper): cells of one group are on both sides." in made.notes
    names = np.array(data.groups)
    assert set(names[list(made[0].train)]) & set(names[list(made[0].test)])
    counts = np.bincount(data.labels[list(made[0].test)]) / np.bincount(data.labels)
    assert np.abs(counts - (fraction or 0.2)).max() < 0.01


def test_first_draw_is_scikit_learns_and_the_seed_decides() -> None:
    data = slides([20, 20, 20, 20], cells=4)
    made = make_folds(data, 4, seed=3)
    splitter = StratifiedGroupKFold(4, shuffle=True, random_state=3 * 1009)
    wanted = [tuple(test.tolist()) for _, test in splitter.split(data.labels, data.labels, data.groups)]
    assert [fold.test for fold in made.folds] == wanted
    assert make_folds(data, 4, seed=3) == made
    assert make_folds(data, 4, seed=4) != made


def test_data_without_groups_says_so() -> None:
    data = data_of([[f"{label}{number}" for number in range(20)] for label in range(3)], grouped=False)
    made = make_folds(data, 5)
    check(made, groups=True)
    assert made.notes == ("made has no groups, so that the split is image by image.",)


def test_prescribed_split_is_kept(tmp_path: Path) -> None:
    data = open_data(trees.hep2(tmp_path, specimens=3, cells=2))
    made = make_folds(data, 1, validation=0.5)
    check(made, groups=True)
    assert all(data.samples[index].split == "test" for index in made[0].test)
    assert len(made[0].test) == 36 and 9 <= len(made[0].validation) <= 27
    assert "hep2 prescribes its test part, so there is one fold, not 5 (prescribed: false)." in make_folds(data).notes
    assert len(make_folds(data, 3, prescribed=False)) == 3
    leaking = data_of([["x"] * 4 + ["y"] * 4, ["z"] * 8], splits=["train", "test"] * 8)
    assert "3 groups are on both sides of the prescribed split." in make_folds(leaking).notes


@pytest.mark.parametrize("validation", [0.0, 0.5])
def test_notes_of_a_prescribed_split_are_of_what_the_protocol_cuts(validation: float) -> None:
    splits = (["train"] * 8 + ["test"] * 4) * 2
    data = data_of([[f"{label}{number // 2}" for number in range(12)] for label in "ab"], splits=splits)
    lone = data_of([[f"{label}{number}" for number in range(12)] for label in "ab"], grouped=False, splits=splits)
    told = "made prescribes its test part (prescribed: false)."
    image = "Validation part image by image (protocol: paper): cells of one group are in it and in training."
    none = "made has no groups, so that the validation part is image by image."
    assert make_folds(data, 1, "grouped", validation).notes == (told,)
    assert make_folds(data, 1, "paper", validation).notes == (told, *([image] if validation else []))
    assert make_folds(lone, 1, "grouped", validation).notes == (told, *([none] if validation else []))


def test_classes_that_cannot_be_split_are_named() -> None:
    single = data_of([["a"] * 5 + ["b"] * 5, ["c"]])
    for protocol in ("grouped", "paper"):
        for folds in (1, 2):
            with pytest.raises(
                FoldError, match=r"class 'b' has one image, 1/0000: it cannot be both learned and tested"
            ):
                make_folds(single, folds, protocol)
    lone = data_of([["a"] * 5 + ["b"] * 5, ["c"] * 6])
    with pytest.raises(FoldError, match="class 'b': all 6 images are of one group, 'c'"):
        make_folds(lone, 2)
    check(make_folds(lone, 2, protocol="paper"), groups=False)
    few = data_of([["a", "b", "c"], ["d", "e", "f"]])
    with pytest.raises(FoldError, match="folds: 8 parts of at most 3 images of a class; use 3 or fewer"):
        make_folds(few, 8)
    with pytest.raises(FoldError, match="folds: 5 parts of at most 3 images of a class"):
        make_folds(few, 5, protocol="paper")
    with pytest.raises(FoldError, match="folds: 5 parts of 4 groups; use 4 or fewer"):
        make_folds(data_of([["a", "a", "b", "b", "b"], ["c", "d"]]), 5)


def test_hints_name_the_keys_of_a_recipe() -> None:
    for groups, folds in (([["a"] * 5 + ["b"] * 5, ["c"]], 2), ([["a"] * 5 + ["b"] * 5, ["c"] * 6], 1)):
        with pytest.raises(FoldError, match=r"Leave the class out \(data\.options\.classes\)"):
            make_folds(data_of(groups), folds)
    untrained = data_of([["a", "b"], ["c", "d"]], splits=["train", "train", "test", "test"])
    with pytest.raises(
        FoldError, match=r"training part has no image of b\. .*data\.options\.classes.*data\.prescribed"
    ):
        make_folds(untrained)


@pytest.mark.parametrize(("part", "other"), [("train", "test"), ("test", "train")])
def test_prescribed_split_with_an_empty_part_is_an_error(part: str, other: str) -> None:
    data = data_of([["a", "b"], ["c", "d"]], splits=[part] * 4)
    with pytest.raises(FoldError, match=f"made: every image is marked {part}, and none is left to {other} on"):
        make_folds(data)
    check(make_folds(data, 2, prescribed=False), groups=True)


def clumped() -> CellData:
    """Like CRIC: groups of all sizes with two classes each, and a small class that lies in the largest ones."""
    sizes = [50, 40, 29, 27, 25, *range(20, 4, -1), *[4] * 30]
    groups: list[list[str]] = [[], [], [], []]
    for number, size in enumerate(sizes):
        groups[number % 3].extend([f"g{number}"] * size)
        groups[(number + 1) % 3].extend([f"g{number}"] * (size // 3))
    groups[3] = ["g0"] * 10 + ["g1"] * 8 + ["g2"] * 6 + [f"g{number}" for number in range(20, 40)]
    return data_of(groups)


@pytest.mark.parametrize("part", ["test", "validation"])
def test_no_group_is_held_out_for_every_seed_or_for_none(part: str) -> None:
    data = clumped()
    names = np.array(data.groups)
    options = {"folds": 2, "validation": 0.2} if part == "validation" else {"folds": 1, "test_fraction": 0.2}
    seeds = range(60)
    made = [make_folds(data, seed=seed, **options) for seed in seeds]
    held = [{name for fold in one.folds for name in names[list(getattr(fold, part))]} for one in made]
    for group in [f"g{number}" for number in range(16)]:
        assert 0.03 < sum(group in one for one in held) / len(seeds) < 0.5, group
    assert len({frozenset(one) for one in held}) > 50


@pytest.mark.parametrize("fraction", [0.01, 0.15, 0.2, 0.5, 0.9, 0.99])
def test_hold_out_finds_a_split_that_trains_every_class(fraction: float) -> None:
    """With classes of two groups, which most random choices would hold out or lack."""
    rare = [["t0"] * 5 + ["t1"] * 5, ["u0"] * 3 + ["t1"] * 2, ["s0"] * 9 + ["s1"]]
    data = data_of([[f"s{number // 4}" for number in range(80)], *rare])
    for seed in range(20):
        made = make_folds(data, 1, test_fraction=fraction, seed=seed)
        check(made, groups=True)
        assert set(data.labels[list(made[0].train)]) == {0, 1, 2, 3}
        if fraction in (0.15, 0.2, 0.5):
            assert len(made[0].test) / len(data) == pytest.approx(fraction, abs=0.06)
            assert set(data.labels[list(made[0].test)]) == {0, 1, 2, 3}


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("options", [{"validation": 0.15}, {"validation": 0.001}, {"folds": 1, "test_fraction": 0.99}])
def test_small_sets_are_split(options: dict[str, Any], grouped: bool, recwarn: pytest.WarningsRecorder) -> None:
    """A dozen images of a class, and a class of two: of a group each, in pairs, and with warnings left to notes."""
    sizes = (12, 12, 2)
    data = data_of(
        [
            [f"{label}-{number // (2 if grouped and size > 2 else 1)}" for number in range(size)]
            for label, size in enumerate(sizes)
        ],
        grouped=grouped,
    )
    for protocol in ("grouped", "paper"):
        for seed in range(5):
            made = make_folds(data, **{"folds": 2, **options}, protocol=protocol, seed=seed)
            check(made, groups=protocol == "grouped")
            for fold in made.folds:
                assert bool(fold.validation) == ("validation" in options) and fold.test
    with pytest.raises(FoldError, match=r"data\.folds: 13 parts of at most 12 images of a class; use 12 or fewer"):
        make_folds(data, 13)
    assert not [str(warning.message) for warning in recwarn]


def test_many_images_without_groups_are_split_quickly() -> None:
    data = data_of([[f"{label}-{number}" for number in range(4000)] for label in range(5)], grouped=False)
    start = time.perf_counter()
    made = make_folds(data, 1, validation=0.15)
    assert time.perf_counter() - start < 5  # 0.1 s measured; 18 s as groups of one image
    assert np.bincount(data.labels[list(made[0].validation)]).tolist() == [480] * 5


def test_class_missing_from_a_test_part_is_a_note() -> None:
    data = data_of([[f"s{number}" for number in range(30)], ["t0"] * 4 + ["t1"] * 4])
    made = make_folds(data, 5)
    check(made, groups=True)
    lacking = [note for note in made.notes if "the test part has no b; class means leave it out" in note]
    assert len(lacking) == 3  # two groups serve two of five folds
    for fold in made.folds:
        assert set(data.labels[list(fold.train)]) == {0, 1}


def test_validation_leaves_classes_of_one_group_to_the_training_part() -> None:
    data = data_of(
        [[f"s{number // 2}" for number in range(60)], [f"s{number // 3}" for number in range(60)], ["t", "u"]]
    )
    made = make_folds(data, 2, validation=0.25, seed=1)
    check(made, groups=True)
    for number, fold in enumerate(made.folds):
        assert {0, 1} == set(data.labels[list(fold.validation)]) and 2 in data.labels[list(fold.train)]
        assert f"Fold {number + 1}: the validation part has no c; class means leave it out." in made.notes
        assert len(fold.validation) / (len(data) - len(fold.test)) == pytest.approx(0.25, abs=0.12)
    two_each = data_of([["a"] * 3 + ["b"] * 3, ["a"] * 2 + ["b"] * 2])
    with pytest.raises(FoldError, match="no two classes have a second image or group for a validation part"):
        make_folds(two_each, 2, validation=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folds": 0}, "folds must be at least 1"),
        ({"protocol": "patient"}, "protocol must be one of grouped, paper"),
        ({"validation": 1.0}, "validation must be at least 0 and less than 1"),
        ({"test_fraction": 0.2}, "test_fraction is for folds=1"),
        ({"folds": 1, "test_fraction": 0.0}, "test_fraction is for folds=1 and between 0 and 1"),
        ({"seed": -1}, "seed must not be negative"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_folds(slides([12, 12]), **options)


def test_saved_folds_know_their_files(tmp_path: Path) -> None:
    root = trees.hep2(tmp_path / "data", specimens=3)
    data = open_data(root)
    made = make_folds(data, 3, validation=0.2, prescribed=False)
    made.save(tmp_path / "folds.json")
    assert Folds.load(tmp_path / "folds.json", data) == made
    assert len(json.loads((tmp_path / "folds.json").read_text())["samples"]["training/001.png"]["sha256"]) == 64
    assert [path.name for path in tmp_path.iterdir()] == ["data", "folds.json"] or len(list(tmp_path.iterdir())) == 2

    fewer = data.without(["training/001.png", "training/002.png"])
    with pytest.raises(FoldError, match=r"2 missing: training/001.png, training/002.png"):
        Folds.load(tmp_path / "folds.json", fewer)
    make_folds(fewer, 3, prescribed=False).save(tmp_path / "fewer.json")
    with pytest.raises(FoldError, match=r"2 new: training/001.png"):
        Folds.load(tmp_path / "fewer.json", data)
    with pytest.raises(FoldError, match="made for the classes"):
        Folds.load(tmp_path / "folds.json", data.select(data.classes[::-1]))
    trees.write(root / "test" / "003_mask.png", trees.disc((22, 26), 254))
    with pytest.raises(FoldError, match=r"folds.json was made for other files of hep2: 1 changed: test/003.png"):
        Folds.load(tmp_path / "folds.json", open_data(root))
    data = open_data(root)
    made.save(tmp_path / "folds.json")
    moved = replace(data.samples[0], group=data.samples[-1].group)
    with pytest.raises(FoldError, match=r"1 changed: test/001\.png"):
        Folds.load(tmp_path / "folds.json", replace(data, samples=(moved, *data.samples[1:])))
    for text in ("{", "[]", "{}", '{"format": 1}'):
        (tmp_path / "damaged.json").write_text(text)
        with pytest.raises(FoldError, match="is not a file of folds"):
            Folds.load(tmp_path / "damaged.json", data)


def test_saved_folds_of_drawn_cells(tmp_path: Path) -> None:
    data = open_data("synthetic", count=60, size=32)
    made = make_folds(data, 1, test_fraction=0.4)
    made.save(tmp_path / "folds.json")
    assert Folds.load(tmp_path / "folds.json", data) == made
    with pytest.raises(FoldError, match="changed"):
        Folds.load(tmp_path / "folds.json", open_data("synthetic", count=60, size=40))


def turned(pixels: np.ndarray, angle: float) -> np.ndarray:
    """A copy turned by an angle as augmentation does, its corners filled with white."""
    image = Image.fromarray(pixels)
    return np.asarray(image.rotate(angle, Image.Resampling.BICUBIC, fillcolor=(255, 255, 255)))


def test_copies_are_alike_and_other_cells_are_not() -> None:
    """The farthest copy, turned, mirrored or darker, is nearer than ALIKE, and the nearest other cell is not."""
    data = open_data("synthetic", count=40, size=96)
    originals = np.stack([signature(data.read(index)) for index in range(40)])
    assert originals.shape == (40, 90) and np.allclose(np.linalg.norm(originals, axis=1), 1)
    distance = np.linalg.norm(originals[:, None] - originals[None], axis=-1)
    nearest = (distance + 9 * np.eye(40)).min()
    worst = 0.0
    for index in range(12):
        pixels = data.read(index)
        copies = [np.rot90(pixels, turn) for turn in (1, 2, 3)]
        copies += [pixels[:, ::-1], pixels[::-1], np.rot90(pixels)[:, ::-1]]
        copies += [turned(pixels, angle) for angle in (17, 45, 133, -60)]
        copies += [np.clip(pixels * 0.85 + 10, 0, 255).astype(np.uint8)]
        for copy in copies:
            worst = max(worst, float(np.linalg.norm(signature(np.ascontiguousarray(copy)) - originals[index])))
    print(f"farthest copy {worst:.3f}, nearest other cell {nearest:.3f}, threshold {ALIKE}")
    assert worst < ALIKE < nearest


def test_groups_join_chains() -> None:
    line = np.array([[0.0], [0.08], [0.16], [1.0], [1.05], [3.0]])
    assert alike_pairs(line) == [(0, 1), (1, 2), (3, 4)]
    assert groups_of_alike(line) == [0, 0, 0, 1, 1, 2]
    assert groups_of_alike(line[:1]) == [0]


def with_a_copy(folder: Path) -> tuple[CellData, ImageStore]:
    """Twenty images of two classes, and one of b turned by a quarter among those of a."""
    root = trees.class_folders(folder / "data", ("a", "b"), count=10)
    trees.write(root / "a" / "copy.png", np.ascontiguousarray(np.rot90(trees.picture(1000 + 3))))
    data = open_data(root)
    return data, ImageStore.open(data, (48, 48), folder=folder / "store")


def test_near_duplicates_across_folds(tmp_path: Path) -> None:
    data, store = with_a_copy(tmp_path)
    found = [near_duplicates(store, make_folds(data, 1, test_fraction=0.5, seed=seed)) for seed in range(8)]
    pairs = {tuple(sorted(pair)) for one in found for pair in one}
    assert pairs == {("a/copy.png", "b/B_000003.png")}
    assert [] in found  # where both are on one side
    other = open_data("synthetic", count=60, size=32)
    with pytest.raises(ValueError, match="store and folds are of different data sets"):
        near_duplicates(store, make_folds(other, 2))


def test_near_duplicates_of_the_validation_part(tmp_path: Path) -> None:
    """Copies in it of training images; those of test images are another list."""
    data, store = with_a_copy(tmp_path)
    copied = {"a/copy.png", "b/B_000003.png"}
    place = {sample.id: number for number, sample in enumerate(data.samples)}
    seen: set[tuple[str, ...]] = set()
    for seed in range(12):
        folds = make_folds(data, 1, validation=0.4, test_fraction=0.4, seed=seed)
        sides = {
            name: next(part for part in ("train", "validation", "test") if place[name] in getattr(folds[0], part))
            for name in copied
        }
        kind = tuple(sorted(sides.values()))
        seen.add(kind)
        found = {part: near_duplicates(store, folds, part=part) for part in ("test", "validation")}
        assert bool(found["validation"]) == (kind == ("train", "validation"))
        assert bool(found["test"]) == ("test" in kind and len(set(kind)) == 2)
        for part, pairs in found.items():
            for learned, held in pairs:
                assert {learned, held} == copied and sides[held] == part
        assert near_duplicates(store, folds, part="validation", pairs=pairs_alike(store)) == found["validation"]
        told = look_alikes(store, {"paper": folds})
        assert [("in training and validation part look alike" in line) for line in told] == [
            part == "validation" for part in ("test", "validation") if found[part]
        ]
        assert all(line.startswith("Protocol paper: 1 pairs ") and "a/copy.png" in line for line in told)
        assert near_duplicates(store, folds, part="test", pairs=[]) == []
    assert {("train", "validation"), ("test", "train")} <= seen
    with pytest.raises(ValueError, match="part must be test or validation, got 'train'"):
        near_duplicates(store, folds, part="train")
