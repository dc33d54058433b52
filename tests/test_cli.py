"""The command line: help with examples, errors that say what to do, and each command on a small run."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import trees
from PIL import Image
from training_runs import finish, start, state, tiny_recipe

from cellops.models import cli
from cellops.models.training.recipe import dump_recipe


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("CELLOPS_CACHE", str(tmp_path_factory.getbasetemp() / "cellops-cache"))
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on files of three classes, made by the command."""
    base = tmp_path_factory.mktemp("trained")
    data = trees.class_folders(base / "data", classes=("a", "b", "c"), count=16)
    recipe = base / "mine.yaml"
    recipe.write_text(dump_recipe(tiny_recipe(data={"path": None, "options": {"count": None, "size": None}})))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CELLOPS_CACHE", str(tmp_path_factory.getbasetemp() / "cellops-cache"))
        torch.set_num_threads(1)
        code = cli.main(
            [
                "train",
                "--recipe",
                str(recipe),
                "--data",
                str(data),
                "--epochs",
                "2",
                "--output",
                str(base / "run"),
                "--quiet",
            ]
        )
    assert code == 0
    return base / "run", data


def run(capsys, *arguments):
    """Exit code, output and errors of the command."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as left:
        code = left.code
    found = capsys.readouterr()
    return code, found.out, found.err


@pytest.mark.parametrize("name", ["train", "evaluate", "compare", "predict", "report", "table", "recipes", "models"])
def test_help_has_examples(capsys, name):
    code, out, _ = run(capsys, name, "--help")
    assert code == 0 and "examples:" in out and f"cellops {name}" in out
    assert max(map(len, out.splitlines())) <= 120


def test_starts_without_the_heavy_packages(tmp_path):
    code = (
        "import sys; from cellops.models import cli; cli.parser()\n"
        "assert not {'timm', 'torchvision', 'matplotlib', 'sklearn', 'yaml', 'rich'} & set(sys.modules), sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=os.getcwd())


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["train"], "no recipe given: --recipe demo"),
        (["train", "--recipe", "dmeo"], "did you mean 'demo'?"),
        (
            ["train", "--recipe", "demo", "--set", "training.epoch=3"],
            "unknown key training.epoch: did you mean 'epochs'?",
        ),
        (["train", "--recipe", "demo", "--epochs", "0"], "training.epochs must be at least 1"),
        (["train", "--recipe", "pbc"], "no data given: --data DIR"),
        (["train", "--recipe", "pbc", "--data", "nowhere"], "does not exist"),
        (["train", "--recipe", "demo", "--model", "resnet188"], "did you mean 'resnet18'"),
        (["train", "--resume"], "--output runs/NAME"),
        (["train", "--resume", "--output", "nowhere"], "there is no run to resume in nowhere"),
        (["evaluate", "nowhere"], "nowhere is no run"),
        (["predict", "nowhere", "x.png"], "there is no image or folder x.png"),
        (["predict", "nowhere", "setup.py"], "nowhere is no run"),
        (["report", "nowhere"], "cannot read nowhere/run.json"),
        (["compare", "nowhere", "other"], "nowhere holds no predictions: give the folder of a run"),
        (["recipes", "dmeo"], "did you mean 'demo'?"),
        (["recipes", "--set", "seed=3"], "--set changes one recipe, which is then printed: cellops recipes NAME --set"),
        (["recipes", "hybrid_g", "--set", "seed=3"], "in the name of hybrid_ghostnet, hybrid_ghostnet_scratch: take"),
        (["recipes", "demo", "--set", "data.split_seed=-1"], "data.split_seed must not be negative"),
        (["table", "hybrid"], "did you mean 'hybrid_loss'?"),
        (["table", "hybrid_loss"], "no data given: --data DIR, for this table a folder of SIPaKMeD"),
        (["models", "resnet188"], "did you mean 'resnet18'"),
    ],
)
def test_errors_say_what_to_do(capsys, tmp_path, monkeypatch, arguments, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "setup.py").write_text("")
    code, out, err = run(capsys, *arguments)
    assert code == 2 and text in err and "Traceback" not in err + out
    assert err.startswith(f"cellops {arguments[0]}: ")
    assert {path.name for path in tmp_path.iterdir()} == {"setup.py"}


def test_missing_packages(capsys, monkeypatch):
    from cellops.models import commands

    monkeypatch.setattr(commands, "find_spec", lambda name: None if name == "timm" else object())
    code, _, err = run(capsys, "train", "--recipe", "demo")
    assert code == 2 and "this command needs timm: pip install 'cellops[models]'" in err


def test_lists(capsys):
    code, out, _ = run(capsys, "recipes")
    assert code == 0 and re.search(r"^  demo ", out, re.MULTILINE) and "each also as NAME_scratch" in out
    code, out, _ = run(capsys, "recipes", "demo", "--set", "training.epochs=3")
    assert code == 0 and "  epochs: 3" in out
    code, out, _ = run(capsys, "table")
    assert code == 0 and "hybrid_loss" in out
    code, out, _ = run(capsys, "models", "--names")
    assert code == 0 and re.search(r"dresnet +cellops", out) and re.search(r"resnet18 +timm", out)
    code, out, _ = run(capsys, "models", "dresnet_025", "--size", "64", "--no-measure")
    assert code == 0 and "dresnet_025" in out


def test_unreadable_images(capsys, tmp_path):
    data = trees.class_folders(tmp_path / "data", classes=("a", "b"), count=12)
    (data / "a" / "broken.png").write_bytes((data / "a" / "A_000000.png").read_bytes()[:60])
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(dump_recipe(tiny_recipe(data={"path": None, "options": {"count": None, "size": None}})))
    arguments = ["train", "--recipe", recipe, "--data", data, "--epochs", "1", "--output", tmp_path / "run"]
    code, _, err = run(capsys, *arguments)
    assert code == 2 and "1 of 25 images cannot be read" in err and "broken.png" in err
    assert "--set data.unreadable=skip" in err and not (tmp_path / "run").exists()
    code, out, _ = run(capsys, *arguments, "--set", "data.unreadable=skip")
    assert code == 0 and "left out, 1 of 25" in out
    code, out, _ = run(capsys, "evaluate", tmp_path / "run")
    assert code == 0 and "a/broken.png" in out  # it is in no part of the run
    code, _, err = run(capsys, "evaluate", tmp_path / "run", "--data", data, "--output", tmp_path / "all")
    assert code == 2 and "broken.png" in err  # an evaluation of other images never skips


def test_a_name_that_is_taken(capsys, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, data = trained
    shutil.copytree(folder, tmp_path / "runs" / "tiny")
    arguments = ["train", "--recipe", folder.parent / "mine.yaml", "--data", data, "--epochs", "1"]
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and "runs/tiny is taken, this run goes to runs/tiny-2" in out and "report: runs/tiny-2" in out
    code, _, err = run(capsys, *arguments, "--output", folder)
    assert code == 2 and "is not empty: --resume goes on" in err


def test_evaluate(capsys, trained, tmp_path):
    folder, data = trained
    code, out, _ = run(capsys, "evaluate", folder, "--output", tmp_path / "own")
    assert code == 0 and "accuracy_micro" in out
    first = (folder / "predictions.csv").read_text()
    assert (tmp_path / "own" / "predictions.csv").read_text() == first
    code, out, _ = run(capsys, "evaluate", folder, "--data", data, "--tta", "flips", "--output", tmp_path / "all")
    assert code == 0 and "48 images" in out
    assert json.loads((tmp_path / "all" / "metrics.json").read_text())["metrics"]["accuracy_micro"] >= 0
    other = trees.class_folders(tmp_path / "other", classes=("a", "z"), count=4)
    code, _, err = run(capsys, "evaluate", folder, "--data", other)
    assert code == 2 and "classes that the network does not know: z" in err


def test_predict(capsys, trained, tmp_path):
    folder, data = trained
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 nothing")
    out_folder = tmp_path / "out"
    files = [data / "a", data / "b" / "B_000000.png", tmp_path / "notes.txt", tmp_path / "broken.jpg"]
    code, out, _ = run(capsys, "predict", folder, *files, "--output", out_folder, "--batch-size", "7")
    assert code == 1 and "2 of 19 images cannot be read" in out
    with open(out_folder / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 17 and list(rows[0]) == ["image", "predicted", "confidence", "p_a", "p_b", "p_c"]
    with open(out_folder / "unreadable.csv", newline="") as file:
        assert [os.path.basename(row["image"]) for row in csv.DictReader(file)] == ["notes.txt", "broken.jpg"]
    assert Image.open(out_folder / "contact_sheet.png").size[0] > 500
    # The same numbers as the evaluation of these images, whatever the batch.
    run(capsys, "evaluate", folder, "--data", data, "--output", tmp_path / "all")
    with open(tmp_path / "all" / "predictions.csv", newline="") as file:
        evaluated = {row["image"]: row for row in csv.DictReader(file)}
    for row in rows:
        same = evaluated[os.path.relpath(row["image"], data)]
        for name in ("p_a", "p_b", "p_c"):
            assert float(row[name]) == pytest.approx(float(same[name]), abs=1e-5)
    code, out, _ = run(
        capsys, "predict", folder / "weights.safetensors", data / "a", "--output", tmp_path / "few", "--sheet", "0"
    )
    assert code == 0 and "16 images" in out


def test_predict_with_damaged_weights(capsys, trained, tmp_path):
    folder, data = trained
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes((folder / "weights.safetensors").read_bytes()[:-100])
    code, _, err = run(capsys, "predict", weights, data / "a", "--output", tmp_path / "out")
    assert code == 2 and f"the weights {weights}" in err and "damaged or truncated" in err
    from cellops.models.training.checkpoint import save_weights

    save_weights(weights, {"x": torch.zeros(1)}, {})
    code, _, err = run(capsys, "predict", weights, data / "a", "--output", tmp_path / "out")
    assert code == 2 and "was not written by `cellops train`" in err


def test_find_learning_rate(capsys, trained, tmp_path):
    folder, data = trained
    recipe = folder.parent / "mine.yaml"
    arguments = ["train", "--recipe", recipe, "--data", data, "--output", tmp_path / "lr", "--find-learning-rate"]
    code, out, _ = run(capsys, *arguments)
    rate = float(re.search(r"optimizer\.learning_rate=(\S+)", out).group(1))
    assert code == 0 and 1e-6 <= rate <= 1
    assert len((tmp_path / "lr" / "learning_rate.csv").read_text().splitlines()) > 20
    assert (tmp_path / "lr" / "learning_rate.png").read_bytes().startswith(b"\x89PNG")


def test_damaged_checkpoint_is_named(capsys, trained, tmp_path):
    folder, _ = trained
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    for name in ("last.pt", "previous.pt"):
        path = tmp_path / "run" / "checkpoints" / name
        path.write_bytes(path.read_bytes()[:500])
    code, _, err = run(capsys, "train", "--resume", "--output", tmp_path / "run")
    assert code == 1 and "last.pt (500 bytes) is damaged or truncated" in err and "Traceback" not in err


def test_too_many_nans(capsys, trained, tmp_path):
    """A learning rate beyond reason: the run stops with a code, and says what to do."""
    folder, data = trained
    changes = [
        "--set",
        "optimizer.learning_rate=1e30",
        "--set",
        "training.clip=null",
        "--set",
        "training.non_finite_limit=3",
    ]
    arguments = [
        "train",
        "--recipe",
        folder.parent / "mine.yaml",
        "--data",
        data,
        "--output",
        tmp_path / "run",
        *changes,
    ]
    code, out, err = run(capsys, *arguments)
    assert code == 1 and "3 batches in a row" in err and "start anew with a lower optimizer.learning_rate" in err
    assert "left out" in out


def test_control_c(tmp_path):
    """The command in a process of its own, stopped from outside; what it advises to type is what goes on."""
    recipe = tiny_recipe(training={"epochs": 200}, model={"name": "hqnet_tiny", "arguments": {"width": 4}})
    path = tmp_path / "mine.yaml"
    path.write_text(dump_recipe(recipe))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "cellops.models"]
    process = subprocess.Popen(
        [*command, "train", "--recipe", str(path), "--output", str(tmp_path / "run")],
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "run" / "log.csv"
    for _ in range(1200):
        if log.exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    advised = re.search(r"Go on with: cellops (train --resume --output \S+)", err).group(1)
    stopped = state(tmp_path / "run")["progress"]
    assert 1 <= stopped["epoch"] < 200 and "Traceback" not in err
    assert cli.main([*advised.split(), "--stop-after", "1", "--quiet"]) == 0
    went_on = state(tmp_path / "run")["progress"]
    assert went_on["updates"] > stopped["updates"]
    run = start(tmp_path / "whole", recipe)
    finish(run, stop_after=went_on["epoch"])
    same, resumed = state(tmp_path / "whole"), state(tmp_path / "run")
    assert all(torch.equal(tensor, resumed["model"][name]) for name, tensor in same["model"].items())
    assert np.array_equal([row["loss"] for row in same["history"]], [row["loss"] for row in resumed["history"]])
