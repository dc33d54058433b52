"""What network shares, old locales, small memories and shell scripts do to the commands."""

from __future__ import annotations

import errno
import io
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import trees
from PIL import Image
from torch import nn
from training_runs import finish, start, tiny_recipe

from cellops.models import cli, commands
from cellops.models.commands import recipes
from cellops.models.data import ImageError, read_image
from cellops.models.export import export_program
from cellops.models.prediction.predictor import Prediction
from cellops.models.prediction.table import TABLE, PredictionTable
from cellops.models.training.checkpoint import CheckpointError, write_text
from cellops.models.training.results import read_results

NO_HIGH_WATER = "the system keeps no high-water mark of a process's memory that can be set back"


def rows(first: int, last: int) -> list[Prediction]:
    return [Prediction(Path(f"/{number}.png"), "a", 0.75, {"a": 0.75, "b": 0.25}) for number in range(first, last)]


def test_locks_of_smb_shares_are_mandatory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There a locked file can be read by the descriptor that locked it alone (flock(2), "CIFS details")."""
    plain = Path.open

    def mandatory(self, *arguments, **named):
        if self.name == TABLE:
            raise PermissionError(errno.EACCES, "Permission denied")
        return plain(self, *arguments, **named)

    monkeypatch.setattr(Path, "open", mandatory)
    for count, resume in ((3, False), (5, True)):
        with PredictionTable(tmp_path, ("a", "b"), {}, resume=resume) as table:
            assert ("/2.png" in table) == resume and "/3.png" not in table
            table.add(rows(table.rows, count))
            assert table.first(9) == [(Path(f"/{number}.png"), "a", 0.75) for number in range(count)]
            table.add(rows(count, count))
    monkeypatch.undo()
    lines = (tmp_path / TABLE).read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["image", *(f"/{number}.png" for number in range(5))]


def test_export_where_modes_cannot_be_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a share that belongs to another user; and files are for whom the umask says."""

    def refused(*arguments, **named):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "chmod", refused)
    export_program(nn.Conv2d(3, 4, 1), tmp_path / "network.pt2", (3, 4, 4))
    (tmp_path / "other").write_text("")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["network.pt2", "other"]
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


FULL = """
import resource, sys
from torch import nn
from cellops.models.export import ExportError, export_onnx, export_program

network = nn.Conv2d(3, 64, 5)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
for export, end in ((export_program, "pt2"), (export_onnx, "onnx")):
    try:
        export(network, f"{sys.argv[1]}/network.{end}", (3, 8, 8), check=False)
    except ExportError as error:
        print(error)
"""


def test_export_on_a_full_disk(tmp_path: Path) -> None:
    """In a process of its own, which torch's archives would end."""
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = [f"cannot write {tmp_path}/network.{end}: File too large" for end in ("pt2", "onnx")]
    assert done.stdout.splitlines() == told and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("number", "fails"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_folders_that_cannot_be_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, fails: bool
) -> None:
    flush = os.fsync

    def of_files_alone(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", of_files_alone)
    if fails:
        with pytest.raises(CheckpointError, match="cannot write"):
            write_text(tmp_path / "x", "text")
    else:
        write_text(tmp_path / "x", "text")
        assert (tmp_path / "x").read_text() == "text"


def test_files_are_utf8_whatever_the_locale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(start(tmp_path / "run", tiny_recipe(training={"epochs": 1})), stop_after=0)
    facts = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    write_text(tmp_path / "run" / "run.json", json.dumps({**facts, "notes": ["für"]}, ensure_ascii=False))
    write_text(tmp_path / "metrics.json", json.dumps({"class": "größer"}, ensure_ascii=False))
    monkeypatch.setattr(io, "text_encoding", lambda encoding, stacklevel=2: encoding or "iso8859-15")
    assert read_results([SimpleNamespace(folder=tmp_path, protocol="paper")]) == {"paper": [{"class": "größer"}]}
    start(tmp_path / "run", resume=True).lock.close()
    assert "für" in json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["notes"]


def test_names_that_are_no_utf8_are_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a share that is mounted with another character set."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="utf-8"))
    monkeypatch.setattr(recipes, "run", lambda arguments: print("M\udcfcller") or 0)
    assert cli.main(["recipes"]) == 0
    sys.stdout.flush()
    assert written.getvalue() == b"M\\udcfcller\n"


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["predict", "", "x.png"], "RUN"),
        (["predict", "run", ""], "IMAGE|DIR"),
        (["predict", "run", "x.png", "--output", ""], "--output"),
        (["train", "--recipe", "demo", "--output", ""], "--output"),
        (["train", "--recipe", "pbc", "--data", ""], "--data"),
        (["evaluate", "run", "--data", ""], "--data"),
        (["export", "", "--output", "x.onnx"], "MODEL|RUN"),
        (["export", "run", "--output", "x.onnx", "--int8", "--calibrate", ""], "--calibrate"),
        (["report", ""], "RUN"),
    ],
)
def test_variables_without_a_value(capsys, tmp_path, monkeypatch, arguments, name):
    """ "$NEW" of a script is then an empty argument, and never stands for the working directory."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 2 and f"argument {name}: it is empty" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    for place in (tmp_path / "out", tmp_path / "out" / "more"):
        with pytest.raises(ValueError, match=r"--output .* is no folder to write in: "):
            PredictionTable(place, ("a", "b"), {})
    assert (tmp_path / "out").read_text() == "mine"


def test_a_run_that_is_not_there_is_no_network(capsys, tmp_path):
    assert cli.main(["export", f"{tmp_path}/run", "--output", f"{tmp_path}/x.onnx"]) == 2
    assert f"there is no run, and no file of weights, {tmp_path}/run" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["evaluate"], ["export", "--output", "y.onnx"]])
def test_an_onnx_file_is_not_called_damaged(capsys, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.onnx").write_bytes(b"ONNX")
    assert cli.main([arguments[0], "x.onnx", *arguments[1:]]) == 2
    assert "x.onnx is an ONNX file, which `cellops predict` takes alone" in capsys.readouterr().err


def test_a_package_that_is_found_missing_late(monkeypatch):
    """As by `cellops recipes` and `cellops table`, which list without the whole extra."""
    monkeypatch.setattr(commands, "find_spec", lambda name: None if name == "yaml" else object())
    told = r"needs pyyaml: pip install 'cellops\[models\]'"
    with pytest.raises(commands.CommandError, match=told), commands.bad_input():
        raise ModuleNotFoundError("No module named 'yaml'", name="yaml")


def test_an_image_for_which_memory_does_not_suffice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = trees.write(tmp_path / "a.png", trees.picture(1))

    def load(self):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "load", load)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(ImageError, match=r"a.png: cannot be decoded: there is not enough memory"):
        read_image(path)


def high_water(reset: bool = False) -> int:
    """The most bytes that this process has held in memory, since it was set back."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16"])
def test_memory_of_a_large_image(tmp_path: Path, mode: str) -> None:
    """The largest that are read, of 64 megapixels, are decoded in a thread on each core: 1 GB each is much for 4 GB."""
    side = 3000
    grey = np.resize(np.arange(256, dtype=np.uint8), (side, side))
    if mode == "I;16":
        picture = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        picture = Image.fromarray(np.stack([grey] * len(mode), axis=-1))
    picture.save(tmp_path / "large.png", compress_level=1)
    read_image(trees.write(tmp_path / "small.png", trees.picture(1)))
    try:
        before = high_water(reset=True)
    except (OSError, StopIteration):
        pytest.skip(NO_HIGH_WATER)
    found = read_image(tmp_path / "large.png")
    assert (high_water() - before) / side**2 < {"RGB": 11.5, "RGBA": 15, "I;16": 11.5}[mode]  # bytes for a pixel
    if mode != "RGBA":
        assert (found == grey[..., None]).all()
