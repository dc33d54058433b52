"""Prediction on any number of images: bounded memory, resumed after a kill, each image once."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import trees
from PIL import Image
from training_runs import TinyCells, finish, start, tiny_recipe

from cellops.models import Predictor, cli
from cellops.models.data.images import ImageError
from cellops.models.prediction import table
from cellops.models.prediction.files import image_files
from cellops.models.prediction.preparation import Preparation
from cellops.models.prediction.table import PredictionTable
from cellops.models.training.network import TURNS

CLASSES = ("round", "long", "dark")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run on drawn cells, of a network of the tests."""
    folder = tmp_path_factory.mktemp("predict") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CELLOPS_CACHE", str(tmp_path_factory.getbasetemp() / "cellops-cache"))
        finish(start(folder, tiny_recipe(training={"epochs": 1}, evaluation={"bootstrap": 0, "worst": 0})))
    return folder


def predictor(tta: str = "none", count: int = 1, weights: tuple[str, ...] = ()) -> Predictor:
    """Networks of drawn weights for 16 x 16 images."""
    torch.manual_seed(0)
    networks = [TinyCells(3, 3, "batch", 0.0) for _ in range(count)]
    return Predictor(networks, CLASSES, Preparation((16, 16), (16, 16)), tta=tta, weights=weights)


def small_images(folder: Path, count: int) -> Path:
    """Files of 8 x 8 pixels, in ten folders."""
    for number in range(count):
        trees.write(folder / f"{number % 10}" / f"{number:06d}.bmp", trees.picture(number % 97, (8, 8)))
    return folder


def table_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "predictions.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def command(*arguments: object) -> int:
    return cli.main(["predict", *map(str, arguments)])


def test_three_lines(run, tmp_path):
    folder = small_images(tmp_path / "images", 30)
    rows = list(Predictor.load(run)(folder))
    assert [row.image for row in rows] == sorted(folder.rglob("*.bmp"))
    for row in rows:
        assert row.confidence == max(row.probabilities.values()) == row.probabilities[row.predicted]
        assert sum(row.probabilities.values()) == pytest.approx(1)
    one = next(Predictor.load(run)(rows[3].image))
    assert one.probabilities == pytest.approx(rows[3].probabilities, abs=1e-6)


def test_files_and_arrays_and_what_cannot_be_read(tmp_path):
    good = trees.write(tmp_path / "good.png", trees.picture(1))
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"nothing")
    one = predictor()
    listed: list[tuple[Path, str]] = []
    rows = list(one([good, bad, np.asarray(Image.open(good))], unreadable=lambda *item: listed.append(item)))
    assert [row.image for row in rows] == [good, 2] and rows[0].probabilities == rows[1].probabilities
    assert listed[0][0] == bad and "not an image" in listed[0][1]
    with pytest.raises(ImageError, match=r"bad\.png: not an image"):
        list(one([good, bad]))
    with pytest.raises(ImageError, match=r"image 0: must be uint8 \[H, W, 3\], got float64 \[4, 4\]"):
        list(one([np.zeros((4, 4))]))
    with pytest.raises(ValueError, match="there is no image or folder"):
        one(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        one(good, batch_size=0)
    with pytest.raises(ValueError, match="tta must be one of none, flips, dihedral, got 'all'"):
        predictor("all")


@pytest.mark.parametrize("tta", ["flips", "dihedral"])
def test_views_are_averaged_as_documented(tta):
    """Mean of the probabilities over mirrored and turned images, made here with NumPy, and over the networks."""
    image = trees.picture(5, (16, 16))
    mirrored = [image, image[:, ::-1], image[::-1], image[::-1, ::-1]]
    views = mirrored if tta == "flips" else mirrored + [np.rot90(view) for view in mirrored]
    assert len(views) == len(TURNS[tta])
    plain = [list(row.probabilities.values()) for row in predictor("none", 2)(map(np.ascontiguousarray, views))]
    (found,) = predictor(tta, 2)([image])
    np.testing.assert_allclose(list(found.probabilities.values()), np.mean(plain, 0), atol=1e-6)
    separate = [Predictor([one], CLASSES, Preparation((16, 16), (16, 16))) for one in predictor(count=2).networks]
    alone = [[list(row.probabilities.values()) for row in one([image])] for one in separate]
    np.testing.assert_allclose(plain[0], np.mean(alone, 0)[0], atol=1e-6)


def test_few_images_are_held_at_a_time():
    """Of 3,000 that a generator makes; what was read ahead of the last answer is a batch and what the threads hold."""
    alive = most = made = 0

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def images():
        nonlocal alive, most, made
        for number in range(3000):
            image = np.full((16, 16, 3), number % 256, np.uint8)
            alive += 1
            made += 1
            most = max(most, alive)
            weakref.finalize(image, gone)
            yield image

    ahead = 0
    for number, row in enumerate(predictor()(images(), batch_size=16)):
        assert row.image == number
        ahead = max(ahead, made - number)
    cores = len(os.sched_getaffinity(0))
    assert number == 2999 and ahead <= 16 + 4 * cores + 2 and most <= 16 + 4 * cores + 2


MEASURED = """
import sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import training_runs
from cellops.models.prediction.job import Settings, predict_images
from cellops.models.training.console import Output
run, images, folder = map(Path, sys.argv[1:4])
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
for name in ("0", "1", "."):
    before, start = peak(), time.process_time()
    predict_images(run, [images / name], folder / f"out{name}", Settings(batch_size=32, sheet=8), Output(quiet=True))
    print(peak() - before, time.process_time() - start)
"""


@pytest.mark.slow
def test_memory_and_time_do_not_grow_with_the_images(run, tmp_path):
    """6,000 files after 600 and 600, in another process."""
    images = tmp_path / "images"
    for number in range(6000):
        path = images / f"{number % 10}" / f"{number:06d}.bmp"
        if number < 100:
            trees.write(path, trees.picture(number, (64, 64)))
        else:  # a link costs no disk
            os.link(images / f"{number % 10}" / f"{number % 100:06d}.bmp", path)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MEASURED, str(run), str(images), str(tmp_path)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    _, (_, few), (grown, all_of_them) = (map(float, line.split()) for line in done.stdout.splitlines())
    assert len(table_of(tmp_path / "out.")) == 6000
    assert grown < 16 * 1024, f"{grown:.0f} KiB more than for 600 images"  # all decoded: 70 MiB
    assert all_of_them < 2 * 10 * few


def test_commits_cost_the_same_however_long_the_table(tmp_path):
    """The file of the state does not grow, and a row is written once."""
    rows = list(predictor()([np.zeros((16, 16, 3), np.uint8)] * 10))
    with PredictionTable(tmp_path, CLASSES, {"weights": ["x"]}) as written:
        sizes = []
        for _ in range(200):
            written.add(rows)
            written.commit()
            sizes.append((tmp_path / "predictions.json").stat().st_size)
    assert sizes[-1] - sizes[0] < 16
    assert (tmp_path / "predictions.csv").read_text().count("\n") == 2001


def test_folders_are_walked_once_in_order(tmp_path):
    root = small_images(tmp_path / "root", 20)
    (root / "notes.txt").write_text("")
    (root / "0" / "sub").mkdir()
    trees.write(root / "0" / "sub" / "deep.PNG", trees.picture(1))
    os.symlink(root / "1", root / "link")  # would be met twice
    os.symlink(tmp_path / "nowhere", root / "gone.png")
    expected = sorted(path for path in root.rglob("*") if path.suffix.lower() in (".bmp", ".png"))
    expected = [path for path in expected if "link" not in path.parts]
    found = [path for path, problem in image_files([root, root / "0", root / "3" / "000003.bmp", root])]
    assert found == expected and len(found) == 22
    outside = [path for path, _ in image_files([root / "0", root / "link", root / "0" / ".." / "0"])]
    assert len(outside) == 3 + 2
    first, *others = expected
    os.symlink(root, tmp_path / "other name")
    assert [
        path for path, _ in image_files([root], leave_out=[tmp_path / "other name" / first.relative_to(root)])
    ] == others
    (root / "empty").mkdir()
    with pytest.raises(ValueError, match="no images in the folder"):
        image_files([root, root / "empty"])


def test_the_walk_does_not_list_folders_ahead(tmp_path, monkeypatch):
    root = small_images(tmp_path / "root", 50)
    listed = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(Path(path).name) or scandir(path))
    files = image_files([root])
    listed.clear()
    for _ in range(7):
        next(files)
    assert listed == ["root", "0", "1"]


def test_a_folder_that_may_not_be_listed(tmp_path, monkeypatch):
    root = small_images(tmp_path / "root", 20)
    scandir = os.scandir

    def denied(path):
        if Path(path).name == "4":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    found = list(image_files([root]))
    assert len(found) == 19
    assert [problem for _, problem in found if problem] == [
        f"{root / '4'}: the folder cannot be read: Permission denied"
    ]


def test_results_in_the_way(run, tmp_path, capsys):
    images, out = small_images(tmp_path / "images", 20), tmp_path / "out"
    assert command(run, images, "--output", out) == 0
    before = (out / "predictions.csv").read_bytes()
    assert command(run, images, "--output", out) == 2
    assert "is there already: --resume goes on with it, --overwrite begins anew" in capsys.readouterr().err
    assert command(run, images, "--output", out, "--resume", "--overwrite") == 2
    assert command(run, images, "--output", out, "--resume", "--tta", "flips") == 2
    assert "was made with other tta" in capsys.readouterr().err
    assert (out / "predictions.csv").read_bytes() == before
    assert command(run, images, "--output", out, "--resume") == 0
    assert "20 images, 0 of them new" in capsys.readouterr().out
    assert (out / "predictions.csv").read_bytes() == before
    with PredictionTable(out, (), {}, overwrite=True), pytest.raises(ValueError, match="written by another process"):
        PredictionTable(out, (), {}, overwrite=True)
    (out / "predictions.csv").write_bytes(before)
    (out / "predictions.json").unlink()
    assert command(run, images, "--output", out, "--resume") == 2
    assert "cannot be resumed, as predictions.json is not beside it" in capsys.readouterr().err
    assert command(run, images, "--output", out, "--overwrite", "--tta", "flips") == 0
    (out / "predictions.csv").write_bytes(before[:100])
    assert command(run, images, "--output", out, "--resume", "--tta", "flips") == 2
    assert "has 100 bytes, fewer than the" in capsys.readouterr().err


def test_other_weights_are_not_mixed(run, tmp_path, capsys):
    images, out = small_images(tmp_path / "images", 20), tmp_path / "out"
    assert command(run, images, "--output", out) == 0
    from cellops.models.training.checkpoint import read_weights, save_weights

    weights, facts = read_weights(run / "weights.safetensors")
    weights["head.bias"] += 1
    save_weights(tmp_path / "other.safetensors", weights, facts)
    assert command(tmp_path / "other.safetensors", images, "--output", out, "--resume") == 2
    assert "was made with other weights" in capsys.readouterr().err


def test_new_images_and_repaired_ones_are_added(run, tmp_path, capsys):
    """Names that CSV must quote and that are no UTF-8 among them; the sheets of an earlier call are no images."""
    images = small_images(tmp_path / "images", 40)
    odd = [images / 'a,"b"\nc.bmp', Path(os.fsdecode(os.fsencode(images) + b"/caf\xe9.bmp"))]
    for path in odd:
        trees.write(path, trees.picture(1))
    (images / "broken.png").write_bytes(b"nothing")
    out = images / "results"
    assert command(run, images, "--output", out, "--batch-size", "7") == 1
    assert (out / "contact_sheet.png").exists() and len(table_of(out)) == 42
    assert "broken.png" in (out / "unreadable.csv").read_text()
    trees.write(images / "broken.png", trees.picture(2))
    trees.write(images / "0" / "new.png", trees.picture(3))
    assert command(run, images, "--output", out, "--resume") == 0
    assert "44 images, 2 of them new" in capsys.readouterr().out and not (out / "unreadable.csv").exists()
    names = [row["image"] for row in table_of(out)]
    assert len(set(names)) == len(names) == 44 and {str(path) for path in odd} <= set(names)


def test_half_a_line_is_dropped(run, tmp_path):
    images, out = small_images(tmp_path / "images", 40), tmp_path / "out"
    assert command(run, images, "--output", tmp_path / "whole", "--batch-size", "8") == 0
    assert command(run, images / "0", images / "1", "--output", out, "--batch-size", "8") == 0
    with (out / "predictions.csv").open("ab") as file:
        file.write(b'"/images/half,')
    assert command(run, images, "--output", out, "--resume", "--batch-size", "8") == 0
    assert (out / "predictions.csv").read_bytes() == (tmp_path / "whole" / "predictions.csv").read_bytes()


def test_control_c_keeps_what_is_done(run, tmp_path, capsys, monkeypatch):
    images, out = small_images(tmp_path / "images", 40), tmp_path / "out"
    add, calls = PredictionTable.add, []

    def interrupted(self, rows):
        add(self, rows)
        calls.append(rows)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(PredictionTable, "add", interrupted)
    assert command(run, images, "--output", out, "--batch-size", "8") == 130
    assert "interrupted; the same command with --resume goes on" in capsys.readouterr().err
    assert len(table_of(out)) == 24
    assert command(run, images, "--output", out, "--batch-size", "8", "--resume") == 0
    assert "40 images, 16 of them new" in capsys.readouterr().out
    assert command(run, images, "--output", tmp_path / "whole", "--batch-size", "8") == 0
    assert (out / "predictions.csv").read_bytes() == (tmp_path / "whole" / "predictions.csv").read_bytes()


def test_a_full_disk_is_told_and_nothing_is_lost(run, tmp_path, capsys, monkeypatch):
    """What was committed before stays, and goes on when there is room."""
    images, out = small_images(tmp_path / "images", 40), tmp_path / "out"
    monkeypatch.setattr(table, "COMMIT_SECONDS", 0)
    sync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) > 12:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert command(run, images, "--output", out, "--batch-size", "4") == 1
    told = capsys.readouterr().err
    assert "No space left on device" in told and "the same command with --resume goes on" in told
    assert 0 < json.loads((out / "predictions.json").read_text())["rows"] < 40
    assert command(run, images, "--output", out, "--batch-size", "4", "--resume") == 0
    assert command(run, images, "--output", tmp_path / "whole", "--batch-size", "4") == 0
    assert (out / "predictions.csv").read_bytes() == (tmp_path / "whole" / "predictions.csv").read_bytes()


def test_none_can_be_read(run, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"nothing")
    assert command(run, tmp_path / "a.png", "--output", tmp_path / "out") == 1
    assert "1 of 1 images cannot be read" in capsys.readouterr().out and table_of(tmp_path / "out") == []


def test_bad_arguments(run, tmp_path, capsys):
    trees.write(tmp_path / "a.png", trees.picture(1))
    wrong = {
        "--batch-size must be at least 1": ["--batch-size", "0"],
        "--sheet must be from 0 to 1024": ["--sheet", "5000"],
        "--gradcam must be from 0 to 1024": ["--gradcam", "-1"],
        "--address and --workers are of --engine ray": ["--workers", "2"],
    }
    for text, arguments in wrong.items():
        assert command(run, tmp_path / "a.png", "--output", tmp_path / "out", *arguments) == 2
        assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_gradcam_sheet(run, tmp_path):
    images, out = small_images(tmp_path / "images", 20), tmp_path / "out"
    assert command(run, images, "--output", out, "--sheet", "0", "--gradcam", "10") == 0
    sheet = np.asarray(Image.open(out / "gradcam_sheet.png").convert("RGB"))
    assert not (out / "contact_sheet.png").exists()
    # Ten images beside their maps: four pairs in a row, three rows; the maps are not the images.
    assert sheet.shape == (3 * (128 + 8 + 18) + 8, 8 * (128 + 8) + 8, 3)
    left, right = sheet[8:136, 8:136].astype(int), sheet[8:136, 144:272].astype(int)
    assert np.abs(left - right).mean() > 5 and left.std() > 5


def _predict(arguments: list[str], seconds: float) -> None:
    """In another process: the command, which commits so often."""
    torch.set_num_threads(1)
    table.COMMIT_SECONDS = seconds
    sys.exit(cli.main(arguments))


@pytest.mark.slow
def test_killed_at_random_moments(run, tmp_path):
    """kill -9 again and again: the table is that of an uninterrupted run, to the byte."""
    images = small_images(tmp_path / "images", 3000)
    (images / "3" / "broken.png").write_bytes(b"nothing")
    arguments = ["predict", str(run), str(images), "--batch-size", "16", "--sheet", "4", "--output"]
    assert cli.main([*arguments, str(tmp_path / "whole")]) == 1
    whole = (tmp_path / "whole" / "predictions.csv").read_bytes()
    out, moments, killed = tmp_path / "out", random.Random(0), 0
    csv_file = out / "predictions.csv"

    def written() -> int:
        """Bytes of the table, which comes a moment after its folder."""
        return csv_file.stat().st_size if csv_file.exists() else 0

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cellops.models.prediction.job", "cellops.models.training.run"])
    for attempt in range(40):
        begun = written()
        process = context.Process(
            target=_predict, args=([*arguments, str(out), "--resume"], moments.choice([0, 0.05])), daemon=True
        )
        process.start()
        while process.is_alive() and written() <= begun:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.25))
        if attempt < 12 and process.is_alive():
            process.kill()
            killed += 1
        process.join(120)
        if process.exitcode == 1:
            break
    assert killed >= 3, f"killed {killed} times only"
    assert csv_file.read_bytes() == whole
    names = [row["image"] for row in table_of(out)]
    assert len(names) == len(set(names)) == 3000
    assert (out / "unreadable.csv").read_bytes() == (tmp_path / "whole" / "unreadable.csv").read_bytes()
    state = json.loads((out / "predictions.json").read_text())
    assert state["rows"] == 3000 and state["committed"] == len(whole)


def test_images_are_known_by_their_place(run, tmp_path, capsys, monkeypatch):
    """Not by the spelling of their path: from another directory the same names are other images."""
    for name in ("here", "there"):
        small_images(tmp_path / name / "images", 4)
    out = tmp_path / "out"
    monkeypatch.chdir(tmp_path / "here")
    assert command(run, "images", "--output", out) == 0
    assert [row["image"] for row in table_of(out)] == [f"images/{n}/{n:06d}.bmp" for n in range(4)]
    for spelling in ("images/../images", "./images", tmp_path / "here" / "images"):
        assert command(run, spelling, "--output", out, "--resume") == 0
        assert "4 images, 0 of them new" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path / "there")
    for new in (4, 0):
        assert command(run, "images", "../here/images", "--output", out, "--resume") == 0
        assert f"8 images, {new} of them new" in capsys.readouterr().out
    assert [row["image"] for row in table_of(out)[4:]] == list(map(str, sorted((tmp_path / "there").rglob("*.bmp"))))
    with PredictionTable(out, *known(run), resume=True) as opened:
        assert all(path.exists() for path, *_ in opened.first(8))


def known(run):
    """Classes and settings of a run."""
    loaded = Predictor.load(run)
    return loaded.classes, loaded.settings


@pytest.mark.parametrize("name", ["unreadable.csv", "predictions.json", "contact_sheet.png", "gradcam_sheet.png"])
def test_files_of_others_are_not_replaced(name, tmp_path):
    (tmp_path / name).write_text("of others")
    for resume in (False, True):
        with pytest.raises(ValueError, match=f"{name} is there without predictions.csv: take another --output"):
            PredictionTable(tmp_path, CLASSES, {}, resume=resume)
        assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "of others"
    PredictionTable(tmp_path, CLASSES, {}, overwrite=True).close()


def test_results_among_the_images(run, tmp_path, capsys):
    images = small_images(tmp_path / "images", 20)
    os.symlink(images, tmp_path / "link")
    assert command(run, images, "--output", tmp_path / "link") == 0
    assert (images / "contact_sheet.png").exists()
    assert command(run, images, "--output", images, "--resume") == 0
    assert "20 images, 0 of them new" in capsys.readouterr().out and len(table_of(images)) == 20


def test_half_a_batch_is_never_committed(tmp_path, monkeypatch):
    """The disk is full in the middle of a batch."""
    rows = list(predictor()([np.zeros((16, 16, 3), np.uint8)] * 10))
    written = PredictionTable(tmp_path, CLASSES, {})
    written.add(rows)
    whole, file = (tmp_path / "predictions.csv").stat().st_size, written.file

    class Full:
        def write(self, data):
            file.write(data[: len(data) // 2 - 3])
            file.flush()
            raise OSError(28, "No space left on device")

        def __getattr__(self, name):
            return getattr(file, name)

    monkeypatch.setattr(written, "file", Full())
    with pytest.raises(OSError, match="No space left"), written:
        written.add(rows)
    state = json.loads((tmp_path / "predictions.json").read_text())
    assert (state["rows"], state["committed"]) == (10, whole)
    assert (tmp_path / "predictions.csv").stat().st_size > whole
    with PredictionTable(tmp_path, CLASSES, {}, resume=True) as again:
        assert again.rows == 10
    assert (tmp_path / "predictions.csv").stat().st_size == whole
