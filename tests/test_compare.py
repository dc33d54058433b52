"""`cellops compare`: the tests' figures, what is paired with what, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import trees
from scipy.stats import binomtest, chi2
from training_runs import finish, start, tiny_recipe

from cellops.models import cli
from cellops.models.training.apply import evaluate_run
from cellops.models.training.comparison import compare, pair, read_judged
from cellops.models.training.console import Output
from cellops.models.training.evaluate import Predictions
from cellops.models.training.metrics import classification_metrics
from cellops.models.training.paired import differences, holm, mcnemar

CLASSES = ("a", "b", "c")


def command(capsys, *arguments):
    """Exit code, output and errors of `cellops compare`."""
    code = cli.main(["compare", *map(str, arguments)])
    found = capsys.readouterr()
    return code, found.out, found.err


def predictions(found, targets, ids=None, classes=CLASSES) -> Predictions:
    """Predictions of these class numbers, each with 0.8."""
    rows = np.full((len(found), len(classes)), 0.2 / (len(classes) - 1))
    rows[np.arange(len(found)), found] = 0.8
    names = [f"{number:03}.png" for number in range(len(found))] if ids is None else list(ids)
    return Predictions(names, np.asarray(targets), rows, tuple(classes))


def run_of(folder: Path, parts: list[Predictions], group=None, hashes=None, protocol="grouped", **facts) -> Path:
    """The files of a run that `compare` reads, one fold for each of the predictions."""
    samples, listed = {}, []
    for number, one in enumerate(parts):
        place = folder / f"fold_{number + 1}" if len(parts) > 1 else folder
        place.mkdir(parents=True, exist_ok=True)
        one.save(place / "predictions.csv")
        (place / "metrics.json").write_text(json.dumps({"judged_on": "test", **facts}))
        listed.append({"protocol": protocol, "fold": number + 1, "folder": str(place.relative_to(folder))})
        for name, target in zip(one.ids, one.targets, strict=True):
            digest = f"sha of {name}" if hashes is None else hashes[name]
            samples[name] = {"sha256": digest, "label": int(target), "group": group(name) if group else name}
    (folder / f"folds_{protocol}.json").write_text(json.dumps({"samples": samples}))
    (folder / "run.json").write_text(json.dumps({"parts": listed, "grouped": group is not None}))
    return folder


def drawn(seed, count=60, right=0.7):
    """Targets and predictions of two classifiers."""
    random = np.random.default_rng(seed)
    targets = np.arange(count) % 3
    found = [np.where(random.random(count) < right, targets, random.integers(0, 3, count)) for _ in range(2)]
    return targets, *found


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (5, 5), (3, 17), (12, 12), (24, 0)])
def test_mcnemar_of_few_images_is_exact(first, second):
    found = mcnemar(first, second)
    wanted = binomtest(first, first + second).pvalue if first + second else 1.0
    assert found["test"] == "exact" and found["statistic"] is None and found["p"] == pytest.approx(wanted)


@pytest.mark.parametrize(("first", "second"), [(25, 0), (13, 12), (20, 20), (40, 85), (2000, 2400)])
def test_mcnemar_of_many_images_is_corrected(first, second):
    found = mcnemar(first, second)
    statistic = max(abs(first - second) - 1, 0) ** 2 / (first + second)
    assert found["test"] == "corrected" and found["statistic"] == pytest.approx(statistic)
    assert found["p"] == pytest.approx(chi2.sf(statistic, 1))
    assert found["p"] == pytest.approx(binomtest(first, first + second).pvalue, abs=0.02)


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1.0, 1.0] and holm([0.2]) == [0.2]


@pytest.mark.parametrize("grouped", [False, True])
def test_differences_are_paired(grouped):
    """Resample by resample they are what the metrics of both say on the same images."""
    targets, first, second = drawn(0)
    groups = [f"g{number // 6}" for number in range(60)] if grouped else None
    found = differences(targets, first, second, 3, samples=200, seed=4, groups=groups)
    units = 10 if grouped else 60
    random = np.random.default_rng(4)
    resamples = [random.multinomial(units, np.full(units, 1 / units), size=100) for _ in range(2)]
    less: dict[str, list[float]] = {"accuracy_micro": [], "accuracy_macro": []}
    for row in np.concatenate(resamples):
        chosen = np.repeat(np.arange(60), row[np.arange(60) // 6] if grouped else row)
        one, other = (
            classification_metrics(predictions(said[chosen], targets[chosen]).probabilities, targets[chosen])
            for said in (first, second)
        )
        for name, values in less.items():
            values.append(one[name] - other[name])
    for name, values in less.items():
        assert found[name]["interval"] == pytest.approx(tuple(np.quantile(values, (0.025, 0.975))))
    right = [(said == targets).mean() for said in (first, second)]
    assert found["accuracy_micro"]["value"] == pytest.approx(right[0] - right[1])
    same = differences(targets, first, first, 3, samples=20)
    assert same["accuracy_micro"] == {"value": 0.0, "interval": None}
    assert differences(targets, first, second, 3, samples=0)["accuracy_macro"]["interval"] is None


def test_of_whole_groups_the_interval_is_wider():
    """Where cells of a group fail together, as many independent ones say more."""
    targets = np.zeros(200, dtype=int)
    fails = np.random.default_rng(0).random(10) < 0.5
    first, second = np.repeat(fails, 20).astype(int), np.zeros(200, dtype=int)
    width = {}
    for name, groups in (("images", None), ("groups", np.arange(200) // 20)):
        low, high = differences(targets, first, second, 2, groups=groups)["accuracy_micro"]["interval"]
        width[name] = high - low
    assert width["groups"] > 3 * width["images"]


@pytest.mark.parametrize("by", ["hash", "path"])
def test_images_are_paired_in_any_order(tmp_path, by):
    """Also where another run names classes in another order, and files otherwise."""
    targets, first, second = drawn(1)
    hashes = {f"{number:03}.png": f"sha {number}" for number in range(60)}
    one = run_of(tmp_path / "one", [predictions(first, targets)], hashes=hashes)
    order = np.random.default_rng(0).permutation(60)
    turned = np.array([2, 0, 1])  # the number of each class there
    names = [f"{'other/' if by == 'hash' else ''}{number:03}.png" for number in order]
    told = predictions(turned[second[order]], turned[targets[order]], names, ("b", "c", "a"))
    moved = {name: f"sha {number}" for name, number in zip(names, order, strict=True)}
    other = run_of(tmp_path / "other", [told], hashes=moved)
    found = pair([read_judged(one), read_judged(other)], by)
    assert found.ids == [f"{number:03}.png" for number in range(60)] and found.by == by
    assert np.array_equal(found.found, [first, second]) and np.array_equal(found.targets, targets)
    both = (first == targets) & (second == targets)
    table = compare(found, samples=0)["pairs"][0]["table"]
    assert table[0][0] == both.sum() and table[1][0] == ((first != targets) & (second == targets)).sum()


def test_files_of_one_content_are_told_apart(tmp_path):
    """By label, then path, whatever the order."""
    ids, targets = ["1.png", "2.png", "3.png"], np.array([0, 1, 1])
    hashes = dict.fromkeys(ids, "the same")
    one = run_of(tmp_path / "one", [predictions([0, 1, 2], targets, ids)], hashes=hashes)
    told = predictions([2, 1, 0], targets[::-1], ids[::-1])
    found = pair([read_judged(one), read_judged(run_of(tmp_path / "other", [told], hashes=hashes))])
    assert found.ids == ids and found.found.tolist() == [[0, 1, 2], [0, 1, 2]]


def test_what_cannot_be_compared(capsys, tmp_path):
    targets, first, second = drawn(2)
    ids = [f"{number:03}.png" for number in range(60)]
    one = run_of(tmp_path / "one", [predictions(first, targets)])

    def refused(name, told, text, *more, **options):
        code, out, err = command(capsys, one, run_of(tmp_path / name, [told], **options), *more)
        assert code == 2 and out == "" and err.startswith("cellops compare: ") and text in err, err
        return err

    other = predictions(second, targets, classes=("a", "b", "d"))
    err = refused("classes", other, f"the classes are not the same: {one} has c, which {tmp_path / 'classes'} has not")
    assert f"{tmp_path / 'classes'} has d, which {one} has not" in err
    some = predictions(second[2:], targets[2:], ids[2:])
    refused("fewer", some, f"not the same: 2 of {one} are not in {tmp_path / 'fewer'} (000.png, 001.png)")
    code, out, _ = command(capsys, one, tmp_path / "fewer", "--common")
    assert (
        code == 0 and "58 images of 3 classes" in out and f"left out, as not held out in every run: 2 of {one}" in out
    )
    none = predictions(second, targets, [f"x{name}" for name in ids])
    refused("none", none, f"no image is held out in each of {one}", "--common")
    changed = {name: f"sha of {name if name != '007.png' else 'another'}" for name in ids}
    err = refused("changed", predictions(second, targets), "(007.png)", hashes=changed)
    assert "1 of them have the same path and another content, or mask; --by path" in err
    assert command(capsys, one, tmp_path / "changed", "--by", "path")[0] == 0
    relabelled = predictions(second, np.where(np.arange(60) == 3, 1 - targets, targets))
    refused("labels", relabelled, f"{one} and {tmp_path / 'labels'} have other labels for 1 images: 003.png")
    refused("protocol", predictions(second, targets), f"--protocol paper: {one} has grouped", "--protocol", "paper")
    for arguments, text in (
        ((one,), "RUN: from 2 to 26 runs are compared, got 1"),
        ((one, one / ".." / "one"), "is given twice"),
        ((one, tmp_path / "nowhere"), f"{tmp_path / 'nowhere'} holds no predictions"),
        ((one, tmp_path / "labels", "--bootstrap", "-1"), "--bootstrap must not be negative, got -1"),
    ):
        code, _, err = command(capsys, *arguments)
        assert code == 2 and text in err


def test_three_runs(capsys, tmp_path):
    """Each with each, p-values by Holm's correction too; the files are replaced only when told."""
    targets, first, second = drawn(3, count=300)
    runs = [
        run_of(tmp_path / name, [predictions(said, targets)])
        for name, said in (("x", first), ("y", second), ("z", targets))
    ]
    code, out, _ = command(capsys, *runs, "--output", tmp_path / "out")
    assert code == 0 and "A and B" in out and "B and C" in out and out.count("by Holm's correction for 3 pairs") == 3
    assert "chi-squared with continuity correction" in out and "independent" not in out
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    tests = [one["mcnemar"] for one in found["pairs"]]
    assert [one["p_holm"] for one in tests] == pytest.approx(holm([one["p"] for one in tests]))
    assert found["pairs"][1]["second"] == str(runs[2]) and found["runs"][2]["accuracy_micro"] == 1
    with open(tmp_path / "out" / "differences.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    unlike = np.flatnonzero((first != second) | (first != targets))
    assert [row["image"] for row in rows] == [f"{number:03}.png" for number in unlike]
    row, number = rows[0], unlike[0]
    assert row["truth"] == CLASSES[targets[number]] and row[f"predicted {runs[0]}"] == CLASSES[first[number]]
    assert row[f"correct {runs[1]}"] == str(int(second[number] == targets[number])) and "group" not in row
    assert f"{len(rows)} images are not classified alike -> {tmp_path / 'out' / 'differences.csv'}" in out
    code, _, err = command(capsys, *runs, "--output", tmp_path / "out")
    assert code == 2 and "comparison.json is there already: take another --output, or --overwrite it" in err
    assert command(capsys, *runs, "--output", tmp_path / "out", "--overwrite")[0] == 0


def test_folds_are_taken_together(capsys, tmp_path):
    """And groups are drawn whole, which McNemar's test cannot: that is said."""
    targets, first, second = drawn(4)
    ids = [f"{number:03}.png" for number in range(60)]

    def folds(name, found, cuts, **facts):
        parts = [predictions(found[cut], targets[cut], [ids[place] for place in cut]) for cut in cuts]
        return run_of(tmp_path / name, parts, group=lambda name: f"g{int(name[:3]) // 10}", **facts)

    halves = [np.arange(0, 30), np.arange(30, 60)]
    one, other = folds("one", first, halves), folds("other", second, halves[::-1])
    code, out, _ = command(capsys, one, other)
    assert code == 0 and "60 images in 6 groups of 3 classes, paired by SHA-256" in out
    assert "the 60 images are of 6 groups, and McNemar's test takes them for independent: its p is too small" in out
    assert "bootstrap of groups" in out and "the folds" not in out
    wanted = differences(targets, first, second, 3, groups=np.arange(60) // 10)["accuracy_micro"]
    assert compare(pair([read_judged(one), read_judged(other)]))["pairs"][0]["differences"]["accuracy_micro"] == wanted
    third = folds("third", second, [np.arange(0, 60, 2), np.arange(1, 60, 2)], notes=["seen before"])
    code, out, _ = command(capsys, one, third)
    assert code == 0 and f"the folds of {third} are not those of {one}: training differs too" in out
    assert f"note: {third / 'fold_1'}: seen before" in out
    code, out, _ = command(capsys, one / "fold_1", other / "fold_2")
    assert code == 0 and "30 images in 3 groups" in out
    (third / "fold_2" / "metrics.json").unlink()
    code, out, _ = command(capsys, one, third, "--common")
    assert code == 0 and f"of {third}, 1 of 2 folds are in" in out and "30 images" in out


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two runs of one split, with other seeds, of images in groups of two; both protocols."""
    base = tmp_path_factory.mktemp("compared")
    data = trees.table(base / "data", count=48)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CELLOPS_CACHE", str(base / "cache"))
        torch.set_num_threads(1)
        for seed in (0, 1):
            settings = {"path": str(data), "options": {"count": None, "size": None}, "split_seed": 7}
            recipe = tiny_recipe(data={**settings, "protocol": "both"}, training={"epochs": 1}, seed=seed)
            finish(start(base / f"seed_{seed}", recipe))
    return base


def test_trained_runs_and_evaluations(capsys, trained, tmp_path, monkeypatch):
    monkeypatch.setenv("CELLOPS_CACHE", str(trained / "cache"))
    one, other = trained / "seed_0", trained / "seed_1"
    code, out, _ = command(capsys, one, other)
    assert code == 0 and "paired by SHA-256" in out and f"note: of {one}, protocol grouped" in out
    code, paper, _ = command(capsys, one, other, "--protocol", "paper")
    assert code == 0 and paper != out
    evaluate_run(other, None, "auto", None, tmp_path / "again", Output(quiet=True))
    code, again, _ = command(capsys, one, tmp_path / "again")
    assert code == 0 and again.replace(str(tmp_path / "again"), str(other)).splitlines()[2:8] == out.splitlines()[2:8]
    code, same, _ = command(capsys, other, tmp_path / "again", "--bootstrap", "0")
    assert code == 0 and "McNemar: 0 against 0 images, exact binomial test, p = 1" in same
    assert "0 images are not classified alike" in same
    for name, run in (("first", one), ("second", other)):
        evaluate_run(run, str(trained / "data"), "auto", None, tmp_path / name, Output(quiet=True))
    code, out, _ = command(capsys, tmp_path / "first", tmp_path / "second")
    assert code == 0 and "48 images in 24 groups" in out and "were in the training part" in out
    for name in ("first", "second"):
        (tmp_path / name / "images.json").unlink()  # as of an earlier version
    code, out, _ = command(capsys, tmp_path / "first", tmp_path / "second")
    assert code == 0 and "48 images of" in out and "paired by path" in out
    assert "no folder records groups of images" in out and "known by their paths alone" in out
    code, _, err = command(capsys, tmp_path / "first", tmp_path / "second", "--by", "hash")
    assert code == 2 and f"--by hash: {tmp_path / 'first'}, {tmp_path / 'second'} records none" in err
