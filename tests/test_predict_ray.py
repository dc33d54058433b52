"""Prediction on a local Ray of two workers, one of which is killed on the way."""

from __future__ import annotations

import csv
import os
import sys
from collections import Counter
from pathlib import Path

import pytest
import trees
from training_runs import finish, start, tiny_recipe

from cellops.models import Predictor, cli

pytest.importorskip("ray", reason="ray is not installed: pip install 'cellops[ray]'")
psutil = pytest.importorskip("psutil")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a network of the zoo: the workers know none of the tests'."""
    folder = tmp_path_factory.mktemp("ray") / "run"
    recipe = tiny_recipe(
        model={"name": "dresnet_025"},
        data={"input_size": 32},
        training={"epochs": 1},
        evaluation={"bootstrap": 0, "worst": 0},
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CELLOPS_CACHE", str(tmp_path_factory.getbasetemp() / "cellops-cache"))
        finish(start(folder, recipe))
    return folder


@pytest.fixture(autouse=True)
def for_the_workers(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def images(folder: Path, count: int) -> Path:
    for number in range(count):
        trees.write(folder / f"{number:04d}.png", trees.picture(number, (24, 20)))
    (folder / "0007.png").write_bytes(b"nothing")
    return folder


def rows_of(folder: Path) -> dict[str, list[float]]:
    with (folder / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["image"] for row in rows}) == len(rows)
    return {row["image"]: [float(row[name]) for name in row if name.startswith("p_")] for row in rows}


def actors() -> list[psutil.Process]:
    """The processes of our Ray that hold a predictor."""
    ours = psutil.Process().children(recursive=True)
    return [process for process in ours if "MapWorker" in " ".join(process.cmdline())]


def test_each_image_once_after_a_worker_is_killed(run, tmp_path):
    from cellops.models.prediction.files import image_files
    from cellops.models.prediction.on_ray import ray_batches

    # Eight views make a task last: those that were handed to the worker are lost with it.
    folder = images(tmp_path / "images", 600)
    predictor, unreadable, seen, killed = Predictor.load(run, tta="dihedral"), [], Counter(), []
    batches = ray_batches(
        predictor,
        run,
        image_files([folder]),
        unreadable=lambda path, reason: unreadable.append((path.name, reason)),
        workers=2,
        batch_size=4,
    )
    found = {}
    for rows in batches:
        seen.update(row.image for row in rows)
        found.update({str(row.image): list(row.probabilities.values()) for row in rows})
        if not killed:
            working = actors()
            assert len(working) == 2, [process.cmdline() for process in psutil.Process().children(recursive=True)]
            assert len(seen) < 300, "too little is left to do"
            working[0].kill()
            killed.append(working[0].pid)
    assert killed and not psutil.pid_exists(killed[0])
    assert set(seen.values()) == {1} and len(seen) == 599
    assert [name for name, _ in unreadable] == ["0007.png"] and "not an image" in unreadable[0][1]
    here = {str(row.image): list(row.probabilities.values()) for row in predictor(folder, unreadable=lambda *_: None)}
    assert found.keys() == here.keys()
    for name, probabilities in here.items():
        assert found[name] == pytest.approx(probabilities, abs=1e-5)


def test_command(run, tmp_path, capsys):
    """The table of Ray is that of one process but for the order, and each can go on with the other's."""
    folder = images(tmp_path / "images", 40)
    arguments = ["predict", str(run), str(folder), "--batch-size", "4", "--output"]
    assert cli.main([*arguments, str(tmp_path / "ray"), "--engine", "ray", "--workers", "2"]) == 1
    assert cli.main([*arguments, str(tmp_path / "here")]) == 1
    there, here = rows_of(tmp_path / "ray"), rows_of(tmp_path / "here")
    assert there.keys() == here.keys() and len(here) == 39
    for name, probabilities in here.items():
        assert there[name] == pytest.approx(probabilities, abs=1e-5)
    trees.write(folder / "new.png", trees.picture(1))
    capsys.readouterr()
    assert cli.main([*arguments, str(tmp_path / "here"), "--engine", "ray", "--workers", "2", "--resume"]) == 1
    assert "40 images, 1 of them new" in capsys.readouterr().out and len(rows_of(tmp_path / "here")) == 40


def test_no_cluster(run, tmp_path, capsys):
    folder = images(tmp_path / "images", 10)
    arguments = ["predict", str(run), str(folder), "--output", str(tmp_path / "out"), "--engine", "ray"]
    assert cli.main([*arguments, "--address", "127.0.0.1:1"]) == 2
    assert "there is no Ray cluster at 127.0.0.1:1: Connection refused" in capsys.readouterr().err
    assert cli.main([*arguments, "--address", "here"]) == 2
    assert "--address must be HOST:PORT or auto, got 'here'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_run_under_the_same_path(run, tmp_path):
    """A worker that finds other weights than the caller's does not begin."""
    from cellops.models.prediction.files import image_files
    from cellops.models.prediction.on_ray import EngineError, ray_batches

    folder = images(tmp_path / "images", 10)
    predictor = Predictor.load(run)
    predictor.settings["weights"] = ["of another machine"]
    with pytest.raises(EngineError, match="is another run here than where prediction was started"):
        list(ray_batches(predictor, run, image_files([folder]), workers=2))
