"""Files that lie, hang, run code or name others: an error that says which, before anything is computed or replaced."""

from __future__ import annotations

import csv
import json
import os
import signal
import stat
import time
import unicodedata
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trees
from torch import nn
from training_runs import TinyCells, finish, start, tiny_recipe

from cellops.models import Predictor, cli
from cellops.models.data import ImageError, ImageStore, LayoutError, open_data
from cellops.models.export import export_program, export_weights
from cellops.models.prediction import table
from cellops.models.prediction.preparation import Preparation
from cellops.models.prediction.table import PredictionTable
from cellops.models.report import page, write_report
from cellops.models.training import checkpoint
from cellops.models.training.checkpoint import (
    CheckpointError,
    load_weights,
    read_checkpoint,
    read_weights,
    save_weights,
)

GREY = np.full((16, 16, 3), 90, np.uint8)


@contextmanager
def seconds(most: int = 20) -> Iterator[None]:
    """What waits for a pipe fails instead of hanging."""

    def late(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(most)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on drawn cells, of two folds, with mistakes."""
    folder = tmp_path_factory.mktemp("hostile") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CELLOPS_CACHE", str(tmp_path_factory.getbasetemp() / "cellops-cache"))
        data = {"folds": 2, "test_fraction": None, "validation": 0.0}
        evaluation = {"bootstrap": 0, "worst": 1, "grad_cam": False}
        finish(start(folder, tiny_recipe(data=data, training={"epochs": 1}, evaluation=evaluation, notes="by N. N.")))
    return folder


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    for name in ("labels.csv", "last.pt", "predictions.csv"):
        os.mkfifo(tmp_path / name)
    trees.class_folders(tmp_path, ("a", "b"))
    with seconds():
        with pytest.raises(LayoutError, match=r"labels\.csv is not a regular file"):
            open_data(tmp_path)
        with pytest.raises(CheckpointError, match=r"there is no checkpoint .*last\.pt"):
            read_checkpoint(tmp_path / "last.pt")
        for options in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(ValueError, match=r"predictions\.csv is a link or no regular file"):
                PredictionTable(tmp_path, ("a", "b"), {}, **options)


def test_results_are_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "of others").write_text("precious")
    os.symlink("of others", tmp_path / "predictions.csv")
    with pytest.raises(ValueError, match="is a link"):
        PredictionTable(tmp_path, ("a", "b"), {}, overwrite=True)
    assert (tmp_path / "of others").read_text() == "precious"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("path,label\na/1.png," + "x" * 200_000 + "\nb/1.png,y\n", "line 2: field larger than field limit"),
        ("path,label\na/1.png\0,x\nb/1.png,y\n", "line 2: (there is a NUL character|line contains NUL)"),
        ("path,label\n" + "x" * 5000 + ",x\nb/1.png,y\n", "names 1 files that do not exist"),
        ("path,label,label\na/1.png,x,y\nb/1.png,y,y\n", "has the column label 2 times"),
        ("path,label\na/1.png,x, mild\nb/1.png,y\n", "line 2: 3 values for 2 columns"),
    ],
    ids=["long field", "nul", "long name", "column twice", "values beyond"],
)
def test_tables_that_say_something_else(tmp_path: Path, text: str, told: str) -> None:
    for name in "ab":
        trees.write(tmp_path / name / "1.png", trees.picture(1))
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(LayoutError, match=rf"labels\.csv.* {told}"):
        open_data(tmp_path)


def test_names_with_line_ends_in_a_table(tmp_path: Path) -> None:
    names = ["a/1\n.png", "b/1\u2028.png"]
    for number, name in enumerate(names):
        trees.write(tmp_path / name, trees.picture(number))
    trees.write_rows(tmp_path / "labels.csv", [("path", "label", ""), (names[0], "x", ""), (names[1], "y", "")])
    assert [sample.id for sample in open_data(tmp_path).samples] == names


@pytest.mark.parametrize(
    ("classes", "told"),
    [
        (("Normal", "normal"), "'Normal' and 'normal' differ in case"),
        (("normal", "normal "), "'normal' and 'normal ' differ in case"),
        (("Zélle", unicodedata.normalize("NFD", "Zélle")), r"'Ze\\u0301lle' and 'Z\\xe9lle' differ in case"),
        (("ab", "a\u200bb"), r"'ab' and 'a\\u200bb' differ"),
        (("ab", "a\x1b[31mb"), r"the class 'a\\x1b\[31mb' is empty or has characters that cannot be seen"),
        (("ab", "a\u202eb"), "cannot be seen"),
        (("ab", "=1+1"), "the class '=1\\+1' would be a formula"),
        (("ab", "-1+cmd|' C'!A0"), "would be a formula"),
        (("ab", "x;@SUM(1)"), "would be a formula"),
    ],
)
def test_classes_that_nobody_can_tell_apart(tmp_path: Path, classes: tuple[str, ...], told: str) -> None:
    trees.class_folders(tmp_path, classes, count=2)
    with pytest.raises(LayoutError, match=told):
        open_data(tmp_path)
    joined = {"one": classes[0], "other": classes[1]}
    assert open_data(tmp_path, classes=joined).classes == ("one", "other")


def test_signs_of_findings_are_classes(tmp_path: Path) -> None:
    names = ("+", "+ (high grade)", "-ve", "ASC-US", "a=1")
    assert open_data(trees.class_folders(tmp_path, names, count=2)).classes == names


def test_a_store_of_files_that_changed_their_names(tmp_path: Path) -> None:
    """As large as each other and unpacked in one second: nothing but the time of the last change tells."""
    data = trees.class_folders(tmp_path / "data", ("a", "b"), count=1, suffix=".bmp")
    one, other = sorted(data.rglob("*.bmp"))
    for path in (one, other):
        os.utime(path, ns=(10**18, 10**18))
    folder = tmp_path / "cache" / "images"
    before = np.array(ImageStore.open(open_data(data), (16, 16), folder=folder)[0])
    time.sleep(0.02)  # a tick of the file system's clock
    one.rename(tmp_path / "x")
    other.rename(one)
    (tmp_path / "x").rename(other)
    after = ImageStore.open(open_data(data), (16, 16), folder=folder)
    np.testing.assert_array_equal(after[1], before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700  # patients' images


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_damaged_store_is_made_again(tmp_path: Path, damage: str) -> None:
    data = open_data(trees.class_folders(tmp_path / ("n" * 200), ("a", "b"), count=2))
    store = ImageStore.open(data, (16, 16), folder=tmp_path / "store")
    before = np.array(store.images)
    if damage == "cut":
        store.path.write_bytes(store.path.read_bytes()[:-5])
    else:
        np.save(store.path, np.zeros((4, 16, 16, 3)))
    np.testing.assert_array_equal(ImageStore.open(data, (16, 16), folder=tmp_path / "store").images, before)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_checkpoints_run_no_code(tmp_path: Path) -> None:
    torch.save({"format": 2, "progress": {}, "x": Evil(tmp_path / "made")}, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="could run a program") as found:
        read_checkpoint(tmp_path / "last.pt")
    assert not (tmp_path / "made").exists() and "weights_only" not in str(found.value)


@pytest.mark.parametrize(
    "state",
    [
        {"format": "x", "progress": {}},
        {"tensors": {}, "values": {"format": None, "progress": {}}},
        {"values": {"format": 2, "progress": {}}},
        {"tensors": {}, "values": {"format": 2, "progress": {}, "m": {"__tensor__": 5}}},
        {
            "tensors": {"float32": torch.zeros(3)},
            "values": {"format": 2, "progress": {"__tensor__": ("int8", 0, 1, 1)}},
        },
    ],
)
def test_checkpoints_that_were_made_up(tmp_path: Path, state: dict[str, Any]) -> None:
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match=r"last\.pt"):
        read_checkpoint(tmp_path / "last.pt")


def test_compressed_checkpoints_are_not_unpacked(tmp_path: Path) -> None:
    checkpoint.save_checkpoint(tmp_path, {"format": checkpoint.FORMAT, "progress": {}, "x": torch.zeros(10**6)})
    with zipfile.ZipFile(tmp_path / "last.pt") as old, zipfile.ZipFile(tmp_path / "bomb.pt", "w", 8) as new:
        for part in old.infolist():
            new.writestr(part.filename, old.read(part))
    assert (tmp_path / "bomb.pt").stat().st_size < 40_000
    with pytest.raises(CheckpointError, match="its parts are compressed"):
        read_checkpoint(tmp_path / "bomb.pt")


def test_two_processes_of_one_number_write_one_file(tmp_path: Path) -> None:
    """As in two containers."""

    def write(file: Any) -> None:
        checkpoint.write_text(tmp_path / "a", "inner")
        file.write(b"outer")

    checkpoint.write_atomically(tmp_path / "a", write)
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "outer"


def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    network = nn.Linear(3, 2)
    weights = network.state_dict()
    save_weights(tmp_path / "nan.safetensors", {**weights, "bias": torch.tensor([1.0, torch.nan])}, {})
    with pytest.raises(CheckpointError, match=r"nan\.safetensors: 1 of 2 tensors hold NaN, the first bias"):
        load_weights(network, tmp_path / "nan.safetensors")
    save_weights(tmp_path / "int.safetensors", {name: value.int() for name, value in weights.items()}, {})
    with pytest.raises(CheckpointError, match="2 of another type, the first bias"):
        load_weights(network, tmp_path / "int.safetensors")
    save_weights(tmp_path / "deep.safetensors", weights, {})
    content = (tmp_path / "deep.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.dumps({**json.loads(content[8 : 8 + length]), "__metadata__": {"classes": "[" * 100_000}}).encode()
    (tmp_path / "deep.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    assert read_weights(tmp_path / "deep.safetensors")[1] == {"classes": "[" * 100_000}


class OfDark(nn.Module):
    """Has no answer for dark images."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))[:, :2].log()


def test_no_class_where_the_network_has_no_answer(tmp_path: Path) -> None:
    """And not the first one, with a confidence of nan."""
    plain = Preparation((16, 16), (16, 16), augmentation={"normalise": {"mean": 0.5, "std": 0.5}})
    predictor = Predictor([OfDark()], ("a", "b"), plain)
    images = [GREY + 100, GREY, GREY + 120]
    told: list[tuple[Path, str]] = []
    assert [row.image for row in predictor(images, unreadable=lambda *item: told.append(item))] == [0, 2]
    assert told == [(Path("1"), "1: the network's answer is not a number")]
    with pytest.raises(ImageError, match="1: the network's answer is not a number"):
        list(predictor(images))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"classes": ("a", "a", "b")}, "classes must be two or more that differ"),
        ({"classes": ("a", 1, "b")}, "classes must be names"),
        ({"classes": "abc"}, "classes must be names"),
        ({"activation": "tanh"}, "activation must be one of softmax, sigmoid"),
    ],
)
def test_predictors_that_cannot_be(changes: dict[str, Any], told: str) -> None:
    given = {"classes": ("a", "b", "c"), "activation": "softmax", **changes}
    with pytest.raises(ValueError, match=told):
        Predictor([TinyCells(3, 3, "batch", 0.0)], preparation=Preparation((16, 16), (16, 16)), **given)
    with pytest.raises(ValueError, match=r"store_size must be .* of 1 to 8192 pixels each, got"):
        Preparation((16, 16), (100_000, 100_000))


def test_folds_must_agree(run: Path, tmp_path: Path) -> None:
    """Their probabilities are averaged class by class."""
    os.symlink(run / "fold_1", tmp_path / "fold_1")
    (tmp_path / "run.json").write_bytes((run / "run.json").read_bytes())
    weights, facts = read_weights(run / "fold_2" / "weights.safetensors")
    save_weights(tmp_path / "fold_2" / "weights.safetensors", weights, {**facts, "classes": facts["classes"][::-1]})
    with pytest.raises(ValueError, match=r"fold_2/weights\.safetensors has other classes than .*fold_1"):
        Predictor.load(tmp_path)


def test_weights_that_name_files(run: Path, tmp_path: Path) -> None:
    """Of whoever loads them; timm would read those."""
    weights, facts = read_weights(run / "fold_1" / "weights.safetensors")
    model = {**facts["recipe"]["model"], "arguments": {"checkpoint_path": str(tmp_path / "other.pt")}}
    file = tmp_path / "weights.safetensors"
    save_weights(file, weights, {**facts, "recipe": {**facts["recipe"], "model": model}})
    assert Predictor.load(file).classes == tuple(facts["classes"])


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ("{", "run.json is damaged"),
        ('{"parts": 3}', "run.json is damaged"),
        ('{"parts": [{"folder": "../other"}]}', "names a folder outside the run"),
        ('{"parts": [{"folder": "/etc"}]}', "names a folder outside the run"),
    ],
)
def test_a_run_that_is_none(facts: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(facts)
    with pytest.raises(ValueError, match=told):
        Predictor.load(tmp_path)


def test_weights_that_are_written_while_they_are_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hash that is kept must be of those that were used."""
    from cellops.models.training import apply

    load = apply.load_trained

    def late(*arguments: Any) -> Any:
        found, path = load(*arguments), run / "fold_1" / "weights.safetensors"
        content = path.read_bytes()
        checkpoint.write_atomically(path, lambda file: file.write(content))
        return found

    monkeypatch.setattr(apply, "load_trained", late)
    with pytest.raises(ValueError, match="was written anew while it was read"):
        Predictor.load(run)


def small_onnx(path: Path, external: bool = False, **changes: str) -> Path:
    """The means of three channels for logits, its weights in another file or not."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.eye(3, dtype=np.float32), "weight")
    if external:
        (path.parent / "weights.bin").write_bytes(np.eye(3, dtype=np.float32).tobytes())
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        weight.external_data.add(key="location", value="weights.bin")
    nodes = [
        helper.make_node("ReduceMean", ["images", "axes"], ["means"], keepdims=0),
        helper.make_node("MatMul", ["means", "weight"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, 16, 16])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 3])],
        [weight, numpy_helper.from_array(np.array([2, 3]), "axes")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    said = {"classes": '["a", "b", "c"]', "activation": "softmax"}
    said["preparation"] = json.dumps(Preparation((16, 16), (16, 16)).values())
    for key, value in {**said, **changes}.items():
        model.metadata_props.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(path))
    return path


def test_onnx_files_are_all_that_their_hash_is_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    assert next(Predictor.load(small_onnx(tmp_path / "a.onnx"))([GREY])).image == 0
    with pytest.raises(ValueError, match=r"b\.onnx cannot be loaded"):
        Predictor.load(small_onnx(tmp_path / "b.onnx", external=True))


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("classes", '["a", "b"]', r"its output is \['n', 3\], not the logits of 2 classes"),
        ("classes", '["a", "b", "c", "d"]', "not the logits of 4 classes"),
        ("classes", '["a", "a", "b"]', "classes must be two or more that differ"),
        ("classes", "{", "Expecting property name"),
        ("classes", "4", "'int' object is not iterable"),
        ("activation", "tanh", "activation must be one of"),
        ("preparation", json.dumps(Preparation((32, 32), (32, 32)).values()), r"its input is .* not float32"),
        ("preparation", "[1]", "input_size, store_size, resize and augmentation must be given"),
    ],
)
def test_onnx_files_that_say_what_is_not_in_them(tmp_path: Path, key: str, value: str, told: str) -> None:
    pytest.importorskip("onnxruntime")
    with pytest.raises(ValueError, match=rf"a\.onnx: .*{told}"):
        Predictor.load(small_onnx(tmp_path / "a.onnx", **{key: value}))


def test_tables_hold_no_formulas(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["=cmd()|x.png", "+1.png", "-1.png", "@SUM(1).png", " =1.png", "a;=1.png", "b.png"]
    for name in names:
        trees.write(tmp_path / name, trees.picture(1))
    (tmp_path / "-broken;=1.png").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    for resumed in ([], ["--resume"]):
        assert cli.main(["predict", str(run), ".", "--output", "out", "--sheet", "0", *resumed]) == 1
        text = Path("out/predictions.csv").read_text()
        rows = list(csv.DictReader(text.splitlines()))
        assert {os.path.normpath(row["image"]) for row in rows} == set(names) and len(rows) == len(names)
        cells = [cell for line in text.splitlines() for cell in line.split(",")]
        assert not any(cell.lstrip().startswith(("=", "+", "-", "@")) for cell in cells)
        assert '\n"a;=1.png","' in text  # so that a spreadsheet whose separator is ; sees one cell
        assert Path("out/unreadable.csv").read_text().splitlines()[1].startswith('"./-broken;=1.png","not an image')
    with pytest.raises(ValueError, match="the class '=x' would be a formula"):
        PredictionTable(tmp_path / "new", ("=x", "y"), {})
    assert not (tmp_path / "new").exists()


def test_a_table_says_what_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(Predictor([TinyCells(2, 3, "batch", 0.0)], ("a", "b"), Preparation((16, 16), (16, 16)))([GREY]))

    def told(**options: bool) -> list[dict[str, str]]:
        with PredictionTable(tmp_path, ("a", "b"), {}, **options) as written:
            written.add(rows)
        return json.loads((tmp_path / "predictions.json").read_text())["made_by"]

    first = told()
    assert len(first) == 1 and {"cellops", "python", "torch", "numpy", "pillow"} <= first[0].keys()
    assert told(resume=True) == first
    monkeypatch.setattr(table, "made_by", lambda: {"torch": "another"})
    assert told(resume=True) == [*first, {"torch": "another"}]
    assert told(overwrite=True) == [{"torch": "another"}]


def test_no_space_for_the_first_row(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Is no bad input, and names the file."""
    image = trees.write(tmp_path / "a.png", trees.picture(1))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table.os, "fsync", full)
        assert cli.main(["predict", str(run), str(image), "--output", str(tmp_path / "out")]) == 1
    assert "cannot write" in (text := capsys.readouterr().err) and "--resume goes on" in text
    assert cli.main(["predict", str(run), str(image), "--output", str(tmp_path / "out"), "--resume"]) == 0


def test_a_model_to_hand_over_tells_nothing_of_where_it_was_made(run: Path, tmp_path: Path) -> None:
    weights, facts = read_weights(run / "fold_1" / "weights.safetensors")
    facts["recipe"]["data"]["path"] = facts["recipe"]["model"]["weights"] = "/home/nurse/patients.safetensors"
    save_weights(tmp_path / "own.safetensors", weights, {**facts, "data": "patients"})
    path = tmp_path / "given.safetensors"
    assert cli.main(["export", str(tmp_path / "own.safetensors"), "--output", str(path)]) == 0
    assert b"patients" in (tmp_path / "own.safetensors").read_bytes()
    assert not any(word in path.read_bytes() for word in (b"patients", b"nurse", b"N. N."))
    one, other = (list(Predictor.load(file)([GREY])) for file in (path, tmp_path / "own.safetensors"))
    assert one == other
    for arguments, told in (
        ((run, path), "has 2 networks, one a fold"),
        ((path, tmp_path / "x.pt"), "path must end in .safetensors"),
        ((path, path), "path must be another file than the run's"),
    ):
        with pytest.raises(ValueError, match=told):
            export_weights(*arguments)


def test_a_program_to_hand_over_has_no_paths(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 2))
    export_program(network, tmp_path / "a.pt2", (3, 8, 8))
    with zipfile.ZipFile(tmp_path / "a.pt2") as archive:
        content = b"".join(archive.read(part) for part in archive.namelist())
    assert b"Conv2d" in content and str(Path(torch.__file__).parent).encode() not in content


def copied(run: Path, folder: Path) -> Path:
    """The files of a run, to be changed."""
    for path in (path for path in run.rglob("*") if path.suffix in (".json", ".yaml", ".csv", ".png")):
        (folder / path.relative_to(run)).parent.mkdir(parents=True, exist_ok=True)
        (folder / path.relative_to(run)).write_bytes(path.read_bytes())
    return folder


def test_a_report_names_no_folders(run: Path, tmp_path: Path) -> None:
    folder = copied(run, tmp_path / "run")
    recipe = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(recipe.replace("path: synthetic", "path: /home/nurse/slides"))
    facts = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**facts, "notes": ["Started from /home/nurse/slides."]}))
    starts = json.loads((folder / "environment.json").read_text())
    starts[-1]["command"] = ["cellops", "train", "--data", "/home/nurse/slides", "--set", "data.path='../nurse/x'"]
    (folder / "environment.json").write_text(json.dumps(starts))
    text = write_report(folder).read_text()
    assert "nurse" not in text and "path: slides" in text and "Started from slides." in text
    assert "default-src 'none'" in text  # no script, whatever its files hold


def test_a_report_shows_no_files_of_its_reader(run: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    folder = copied(run, tmp_path / "run")
    facts = json.loads((folder / "run.json").read_text())
    listed = next(path for path in folder.rglob("mistakes.json") if json.loads(path.read_text()))
    listed.write_text(json.dumps([{**one, "file": "../../../secret"} for one in json.loads(listed.read_text())]))
    with pytest.raises(ValueError, match=r"names a file outside it: \.\./\.\./\.\./secret"):
        page._mistakes(page.read_protocols(folder, facts)[0], "")
    facts["parts"][0]["folder"] = "../run2"
    with pytest.raises(ValueError, match=r"names a file outside it: \.\./run2"):
        page.read_protocols(folder, facts)
