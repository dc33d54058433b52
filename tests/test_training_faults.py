"""What a laboratory runs into: finished runs resumed otherwise, file systems without links or locks, wrong settings."""

from __future__ import annotations

import errno
import os
import shutil

import pytest
import torch
import trees
from training_runs import differences, finish, start, state, tiny_recipe

from cellops.models.commands import CommandError, bad_input
from cellops.models.training import checkpoint, folder
from cellops.models.training.console import Output
from cellops.models.training.folder import free_folder
from cellops.models.training.recipe import RecipeError, build_recipe, load_recipe, overridden, recipe_values
from cellops.models.training.run import prepare, train
from cellops.models.training.stopping import Interrupted


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def test_checkpoint_of_another_run(tmp_path):
    for name, changes in (("one", {}), ("other", {"data": {"split_seed": 7}})):
        finish(start(tmp_path / name, tiny_recipe(**changes)), stop_after=1)
    shutil.copy(tmp_path / "other" / "checkpoints" / "last.pt", tmp_path / "one" / "checkpoints")
    before = (tmp_path / "one" / "log.csv").read_bytes()
    with pytest.raises(checkpoint.CheckpointError, match=r"last\.pt is of another run"):
        finish(start(tmp_path / "one", resume=True))
    assert (tmp_path / "one" / "log.csv").read_bytes() == before


@pytest.mark.parametrize("monitor", ["loss", "brier_micro", "log_loss_micro"])
def test_the_least_error_is_the_best_epoch(tmp_path, monitor):
    session = start(tmp_path / "run", tiny_recipe(training={"epochs": 3, "ema": None, "monitor": monitor}))
    trainer = session._first
    finish(session)
    found = [row[f"validation_{monitor}"] for row in trainer.history]
    assert trainer.progress.best_epoch == 1 + found.index(min(found))


def test_a_metric_of_more_than_five_classes_chooses(tmp_path):
    data = trees.class_folders(tmp_path / "data", count=6)  # eight
    settings = {"path": str(data), "options": {"count": None, "size": None}}
    recipe = tiny_recipe(data=settings, training={"epochs": 1, "monitor": "accuracy_top5_micro"})
    assert finish(start(tmp_path / "run", recipe))


def test_workers_change_no_number(tmp_path):
    """Dropout draws what it draws without them, also where an epoch is gone on with."""
    for workers in (0, 2):
        finish(start(tmp_path / f"{workers}", tiny_recipe(training={"epochs": 2, "workers": workers})))
    assert differences(state(tmp_path / "0"), state(tmp_path / "2")) == []
    assert not finish(start(tmp_path / "late", tiny_recipe(training={"epochs": 2, "workers": 2})), stop_after=1)
    session = start(tmp_path / "late", resume=True)
    session._first.stopping.asked = True
    with pytest.raises(Interrupted):
        finish(session)
    assert (state(tmp_path / "late")["progress"]["epoch"], state(tmp_path / "late")["progress"]["step"]) == (1, 2)
    assert finish(start(tmp_path / "late", resume=True))
    assert differences(state(tmp_path / "2"), state(tmp_path / "late")) == []


@pytest.mark.parametrize(
    ("change", "text"),
    [("training.epochs=5", "training.epochs 1, not 5"), ("evaluation.tta=flips", "evaluation .*'none'.*'flips'")],
)
def test_a_finished_run_is_not_given_another_recipe(tmp_path, change, text):
    finish(start(tmp_path / "run", tiny_recipe(training={"epochs": 1}, evaluation={"worst": 0})))
    before = (tmp_path / "run" / "recipe.yaml").read_text()
    with pytest.raises(ValueError, match=f"is done, by {text}"):
        prepare(None, tmp_path / "run", True, Output(quiet=True), [change])
    assert (tmp_path / "run" / "recipe.yaml").read_text() == before
    prepare(None, tmp_path / "run", True, Output(quiet=True)).lock.close()


def test_a_run_goes_on_where_its_images_were_moved_to(tmp_path):
    data = trees.class_folders(tmp_path / "data", classes=("a", "b"), count=12)
    recipe = tiny_recipe(
        data={"path": str(data), "options": {"count": None, "size": None}, "validation": 0.0}, training={"epochs": 2}
    )
    assert not finish(start(tmp_path / "run", recipe), stop_after=1)
    moved = shutil.move(data, tmp_path / "elsewhere")
    session = prepare(None, tmp_path / "run", True, Output(quiet=True), [f"data.path='{moved}'"])
    assert finish(session)


def test_a_class_without_a_readable_image_is_an_error(tmp_path):
    data = trees.class_folders(tmp_path / "data", classes=("a", "b"), count=6)
    for path in (data / "b").iterdir():
        path.write_bytes(b"x")
    recipe = tiny_recipe(data={"path": str(data), "options": {"count": None, "size": None}, "unreadable": "skip"})
    with pytest.raises(ValueError, match="no image of b can be read"):
        start(tmp_path / "run", recipe)
    assert not (tmp_path / "run").exists()


def test_a_start_that_was_killed_before_its_recipe_does_not_block_the_folder(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    (tmp_path / "run" / ".recipe.yaml.12.tmp").touch()
    assert free_folder(tmp_path / "run") == tmp_path / "run"
    assert finish(start(tmp_path / "run", tiny_recipe(training={"epochs": 1}, evaluation={"worst": 0})))
    assert free_folder(tmp_path / "run") == tmp_path / "run-2"


def test_checkpoints_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def refuse(*paths):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / ".last.pt.12-ab.tmp").touch()  # of a process that was killed
    for epoch in (1, 2):
        checkpoint.save_checkpoint(tmp_path, {"format": checkpoint.FORMAT, "progress": {"epoch": epoch}})
    kept = [checkpoint.read_checkpoint(tmp_path / name)["progress"]["epoch"] for name in ("last.pt", "previous.pt")]
    assert kept == [2, 1] and sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "previous.pt"]


def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(folder.fcntl, "flock", refuse)
    folder.lock(tmp_path / "run").close()

    def taken(*_):
        raise BlockingIOError

    monkeypatch.setattr(folder.fcntl, "flock", taken)
    with pytest.raises(ValueError, match="another process is training"):
        folder.lock(tmp_path / "run")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer.learning_rate", float("inf")),
        ("training.epochs", float("inf")),
        ("schedule.warmup_learning_rate", float("nan")),
        ("evaluation.batch_size", -1),
    ],
)
def test_numbers_that_cannot_be(key, value):
    values = recipe_values(tiny_recipe())
    section, name = key.split(".")
    values[section][name] = value
    with pytest.raises(RecipeError, match=key):
        build_recipe(values)


def test_a_value_of_a_wrong_type_is_bad_input():
    with pytest.raises(CommandError, match="must be real number"), bad_input():
        raise TypeError("must be real number, not str")


def test_overrides_of_a_recipe_that_is_there_already(tmp_path):
    assert overridden(load_recipe("demo"), ["training.epochs=3"]).training.epochs == 3
    session = train(tiny_recipe(evaluation={"worst": 0}), folder=tmp_path / "run", overrides=["training.epochs=1"])
    session.lock.close()
    assert session.recipe.training.epochs == 1
    with pytest.raises(RecipeError, match=r"unknown key training\.epoch"):
        overridden(tiny_recipe(), ["training.epoch=1"])


def test_no_space_left(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    path.write_text("old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(checkpoint.CheckpointError, match="No space left on device"):
        checkpoint.write_text(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
