"""`cellops evaluate`: what a figure is of is said, the run's own results stay, other images may have fewer classes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import trees
from training_runs import finish, start, tiny_recipe

from cellops.models import cli
from cellops.models.training.apply import Trained, _other_data, evaluate_run, run_images, with_classes_of
from cellops.models.training.console import Output
from cellops.models.training.evaluate import Predictions
from cellops.models.training.metrics import bootstrap_intervals

CLASSES = ("a", "b", "c")
QUIET = Output(quiet=True)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CELLOPS_CACHE", str(tmp_path_factory.getbasetemp() / "cellops-cache"))
    torch.set_num_threads(1)


def recipe_of(data: Path, **settings):
    """A recipe for files; one epoch."""
    options = {"count": None, "size": None, **settings.pop("options", {})}
    return tiny_recipe(data={"path": str(data), "options": options, **settings}, training={"epochs": 1})


def trained_on(folder: Path, data: Path, **settings) -> Path:
    """A run that is complete."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CELLOPS_CACHE", str(folder.parent / "cache"))
        finish(start(folder, recipe_of(data, **settings)))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on half of its training part, and the images."""
    base = tmp_path_factory.mktemp("evaluate")
    data = trees.class_folders(base / "data", classes=CLASSES, count=16)
    return trained_on(base / "run", data, train_fraction=0.5), data


@pytest.fixture(scope="module")
def folds(tmp_path_factory):
    """A run of three folds on the same images."""
    base = tmp_path_factory.mktemp("folds")
    data = trees.class_folders(base / "data", classes=CLASSES, count=16)
    return trained_on(base / "run", data, folds=3, test_fraction=None, validation=0.0), data


def evaluate(capsys, *arguments):
    """Exit code, output and errors of the command."""
    code = cli.main(["evaluate", *map(str, arguments)])
    found = capsys.readouterr()
    return code, found.out, found.err


def results(folder: Path):
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def test_groups_are_resampled_whole(tmp_path):
    data = trees.table(tmp_path / "data", count=48)
    run = trained_on(tmp_path / "run", data, protocol="grouped")
    found = evaluate_run(run, str(data), "auto", None, tmp_path / "out", QUIET)["all"]
    predictions = Predictions.load(tmp_path / "out" / "predictions.csv")
    groups = [f"g{int(Path(name).stem) // 2}" for name in predictions.ids]
    by_group, by_image = (
        bootstrap_intervals(predictions.probabilities, predictions.targets, samples=20, seed=0, groups=given)
        for given in (groups, None)
    )
    assert found["intervals"]["accuracy_micro"] == pytest.approx(by_group["accuracy_micro"])
    assert found["intervals"]["accuracy_micro"] != pytest.approx(by_image["accuracy_micro"])


def test_images_of_the_training_part_are_told(capsys, trained, tmp_path):
    """By their content, whatever they are called now; those that train_fraction left out are not counted."""
    run, data = trained
    images = results(run)["training"]["images"]
    text = f"{images['train']} of 48 images were in the training part, {images['validation']} in the validation part"
    code, out, _ = evaluate(capsys, run, "--data", data, "--output", tmp_path / "same")
    assert code == 0 and f"warning: {text}" in out and 0 < images["train"] < 20
    assert text in results(tmp_path / "same")["notes"][0]
    for name in CLASSES:
        for path in (data / name).iterdir():
            (tmp_path / "renamed" / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / "renamed" / name / f"other_{path.name}")
    code, out, _ = evaluate(capsys, run / "weights.safetensors", "--data", tmp_path / "renamed", "--overwrite")
    assert code == 0 and f"warning: {text}" in out
    new = trees.write(tmp_path / "new" / "a" / "1.png", trees.picture(9001)).parent.parent
    trees.write(new / "b" / "1.png", trees.picture(9002))
    trees.write(new / "c" / "1.png", trees.picture(9003))
    code, out, _ = evaluate(capsys, run, "--data", new, "--output", tmp_path / "fresh")
    assert code == 0 and "warning" not in out and results(tmp_path / "fresh")["notes"] == []
    shutil.copy(run / "weights.safetensors", tmp_path / "weights.safetensors")
    code, out, _ = evaluate(capsys, tmp_path / "weights.safetensors", "--data", new)
    assert code == 0 and "cannot be told" in out
    code, _, err = evaluate(capsys, run / "weights.safetensors", "--overwrite")
    assert code == 2 and "is a file of weights" in err


def test_training_images_of_several_networks(capsys, folds, tmp_path):
    run, data = folds
    code, out, _ = evaluate(capsys, run, "--data", data, "--output", tmp_path / "all")
    assert code == 0 and "48 of 48 images were in the training part of at least one of the 3 networks" in out
    part = results(run / "fold_2")["training"]["images"]["train"]
    code, out, _ = evaluate(
        capsys, run / "fold_2" / "weights.safetensors", "--data", data, "--output", tmp_path / "one"
    )
    assert code == 0 and f"{part} of 48 images were in the training part:" in out


def test_results_of_a_run_are_not_replaced(capsys, trained, folds, tmp_path):
    for run, output in ((trained[0], trained[0]), (folds[0], folds[0]), (folds[0], folds[0] / "fold_1")):
        before = {path: path.read_bytes() for path in run.rglob("*.*") if path.is_file()}
        for more in ([], ["--overwrite"], ["--data", str(trained[1])]):
            code, _, err = evaluate(capsys, run, "--output", output, *more)
            assert code == 2 and "holds a run, whose own results would be lost: take another --output" in err
        assert {path: path.read_bytes() for path in run.rglob("*.*") if path.is_file()} == before


def test_other_results_are_replaced_only_when_told(capsys, folds, tmp_path):
    run, data = folds
    out = tmp_path / "out"
    assert evaluate(capsys, run, "--output", out)[0] == 0
    place = out / results(run / "fold_3")["protocol"] / "fold_3" / "predictions.csv"
    assert place.read_text() == (run / "fold_3" / "predictions.csv").read_text()
    for other in place.parent.parent.glob("fold_[12]/*"):
        other.unlink()
    code, _, err = evaluate(capsys, run, "--output", out)
    assert code == 2 and f"{place} is there already: take another --output, or --overwrite it" in err
    assert not list(place.parent.parent.glob("fold_[12]/*"))  # nothing is written before the last is looked at
    assert evaluate(capsys, run, "--output", out, "--overwrite")[0] == 0
    assert evaluate(capsys, run, "--data", data, "--output", out / "all")[0] == 0
    code, _, err = evaluate(capsys, run, "--data", data, "--output", out / "all")
    assert code == 2 and "is there already" in err


def test_a_run_that_skipped_files(capsys, tmp_path):
    """Its held-out part is judged without the files of no fold; an image of a fold must still be there."""
    data = trees.class_folders(tmp_path / "data", classes=("a", "b"), count=12)
    (data / "a" / "broken.png").write_bytes(b"nothing")
    run = trained_on(tmp_path / "run", data, unreadable="skip")
    trees.write(data / "b" / "new.png", trees.picture(77))
    code, out, _ = evaluate(capsys, run, "--output", tmp_path / "out")
    assert code == 0 and "2 images (a/broken.png, b/new.png)" in out
    assert (tmp_path / "out" / "predictions.csv").read_text() == (run / "predictions.csv").read_text()
    images = run_images(run, QUIET)
    assert len(images.held_out) == results(run)["training"]["images"]["test"] and len(images.training(4)) == 4
    code, _, err = evaluate(capsys, run, "--data", data, "--output", tmp_path / "all")
    assert code == 2 and "1 of 26 images cannot be read" in err and "broken.png" in err
    (data / "a" / "A_000000.png").write_bytes(b"nothing")
    code, _, err = evaluate(capsys, run, "--output", tmp_path / "again")
    assert code == 2 and "1 of 24 images cannot be read" in err and "A_000000.png" in err


def test_new_files_are_told_of_a_run_that_skips_none(capsys, tmp_path):
    data = trees.class_folders(tmp_path / "data", classes=("a", "b"), count=12)
    run = trained_on(tmp_path / "run", data)
    trees.write(data / "b" / "new.png", trees.picture(77))
    code, _, err = evaluate(capsys, run)
    assert code == 2 and "1 new: b/new.png" in err


@pytest.mark.parametrize("classes", [("a", "c"), ("b",)])
def test_some_of_the_classes(capsys, trained, tmp_path, classes):
    other = trees.class_folders(tmp_path / "other", classes=classes, count=5)
    trees.write(other / classes[0] / "x.png", trees.picture(1))
    trees.write(other / classes[0] / "x_mask.png", trees.picture(1))
    code, out, _ = evaluate(capsys, trained[0], "--data", other, "--output", tmp_path / "out")
    absent = ", ".join(name for name in CLASSES if name not in classes)
    assert code == 0 and f"there is no image of {absent}" in out
    found, predictions = results(tmp_path / "out"), Predictions.load(tmp_path / "out" / "predictions.csv")
    assert predictions.classes == CLASSES and len(predictions.ids) == 5 * len(classes) + 1
    assert all(
        CLASSES[label] == name.split("/")[0] for name, label in zip(predictions.ids, predictions.targets, strict=True)
    )
    recalls = [row["recall"] for row in found["per_class"] if row["class"] in classes]
    assert found["metrics"]["recall_macro"] == pytest.approx(np.mean(recalls))
    assert [row["recall"] for row in found["per_class"] if row["class"] not in classes] == [None] * (3 - len(classes))


def test_classes_that_the_network_does_not_know(capsys, trained, tmp_path):
    other = trees.class_folders(tmp_path / "other", classes=("a", "y", "z"), count=3)
    code, _, err = evaluate(capsys, trained[0], "--data", other, "--output", tmp_path / "out")
    assert code == 2 and "classes that the network does not know: y, z; it knows a, b, c" in err
    alone = trees.class_folders(tmp_path / "alone", classes=("z",), count=3)
    code, _, err = evaluate(capsys, trained[0], "--data", alone, "--output", tmp_path / "out")
    assert code == 2 and "no data set recognised" in err and not (tmp_path / "out").exists()


def test_joined_classes(capsys, tmp_path):
    """Of a run that joins classes, its own images, some of them, and images that are joined already."""
    data = trees.class_folders(tmp_path / "data", classes=("a", "b", "c", "d"), count=12)
    run = trained_on(tmp_path / "run", data, options={"classes": {"sick": ["c", "a"], "well": "b"}})
    code, out, _ = evaluate(capsys, run, "--data", data, "--output", tmp_path / "all")
    assert code == 0 and "12 images of d were left out" in out and "were in the training part" in out
    found = Predictions.load(tmp_path / "all" / "predictions.csv")
    assert found.classes == ("sick", "well") and len(found.ids) == 36
    assert [found.classes[label] for label in found.targets] == [
        "well" if name.startswith("b/") else "sick" for name in found.ids
    ]
    held_out = Predictions.load(run / "predictions.csv")
    same = dict(zip(found.ids, found.probabilities, strict=True))
    np.testing.assert_allclose([same[name] for name in held_out.ids], held_out.probabilities, atol=1e-5)
    some = trees.class_folders(tmp_path / "some", classes=("a", "c"), count=4)
    code, out, _ = evaluate(capsys, run, "--data", some, "--output", tmp_path / "few")
    assert code == 0 and "there is no image of well" in out
    joined = trees.class_folders(tmp_path / "joined", classes=("sick", "well"), count=4)
    assert evaluate(capsys, run, "--data", joined, "--output", tmp_path / "third")[0] == 0
    strange = trees.class_folders(tmp_path / "strange", classes=("sick", "z"), count=4)
    code, _, err = evaluate(capsys, run, "--data", strange, "--output", tmp_path / "fourth")
    assert code == 2 and "does not know: z; it knows sick, well, c, a, b" in err


def test_options_of_the_run_that_the_layout_has(tmp_path):
    recipe = recipe_of(tmp_path, options={"masks": False, "classes": ["nucleolar", "centromere"]})
    trained = Trained([], [], recipe, ("nucleolar", "centromere"), False)
    data = _other_data(trained, str(trees.hep2(tmp_path / "hep2")), "auto")
    assert all(sample.mask is None for sample in data.samples) and len(data.classes) == 6
    data, notes = with_classes_of(trained, data)
    assert data.classes == trained.classes and {sample.label for sample in data.samples} == {0, 1}
    assert "of homogeneous, coarse_speckled" in notes[0]
    folders = _other_data(trained, str(trees.class_folders(tmp_path / "folders", trained.classes)), "auto")
    assert len(folders) == 8  # which has no masks
