"""The report: what it holds, that it opens without a network, and that a browser draws it."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import trees
from PIL import Image
from rich.console import Console
from torch.nn import functional
from training_runs import TinyCells, finish, start, tiny_recipe

from cellops.models.report import figures, write_report
from cellops.models.report.mistakes import grad_cam, overlay, worst
from cellops.models.report.page import Protocol, read_protocols
from cellops.models.training.console import Output
from cellops.models.training.evaluate import Predictions, calibrate, with_temperature
from cellops.models.training.metrics import calibration, classification_metrics
from cellops.models.training.results import result_lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with both protocols and mistakes."""
    path = tmp_path_factory.mktemp("report") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CELLOPS_CACHE", str(tmp_path_factory.getbasetemp() / "cellops-cache"))
        recipe = tiny_recipe(
            title="Ünusual <title> & more",
            data={"options": {"count": 300}, "protocol": "both"},  # two slides in the test part: one has no interval
            training={"epochs": 2},
            evaluation={"cost": True, "worst": 5},
        )
        finish(start(path, recipe))
    return path


def test_holds_everything(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "<title>SYNTHETIC images – Ünusual &lt;title&gt; &amp; more</title>" in text
    for heading in (
        "Both splits side by side",
        "Learning curves",
        "Confusion – grouped",
        "Confusion – paper",
        "Classes – grouped",
        "Ranking and calibration – paper",
        "How sure are these figures",
        "Worst mistakes",
        "Cost",
        "Data",
        "How this was made",
    ):
        assert heading in text, heading
    for words in ("accuracy", "specificity", "temperature", "Grad-CAM", "torchstat", "latency", "drawn by a program"):
        assert words in text, words
    assert text.count("data:image/svg+xml;base64,") == 1 + 2 * 4
    assert text.count("data:image/png;base64,") == 10


def test_needs_no_network(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:)""", text)
    assert not re.search(r"url\(|@import|<script|<link", text)


def test_is_made_from_the_files_alone(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "moved")
    (tmp_path / "moved" / "report.html").unlink()
    path = write_report(tmp_path / "moved")
    assert path.read_text() == (folder / "report.html").read_text()


def test_while_training_is_not_complete(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "paper")
    text = write_report(tmp_path / "run").read_text()
    assert "Both splits" not in text and "Confusion" in text
    (tmp_path / "run" / "grouped" / "fold_1" / "metrics.json").unlink()
    assert "no fold has results yet" in write_report(tmp_path / "run").read_text()


def test_opens_in_a_browser(folder, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium is installed")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,3000", "--no-first-run"]
    picture = tmp_path / "page.png"
    address = (folder / "report.html").as_uri()
    subprocess.run(
        [browser, *options, f"--screenshot={picture}", address], check=True, capture_output=True, timeout=120
    )
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    assert pixels.shape == (3000, 1200, 3)
    card = (abs(pixels - (0x2B, 0x5F, 0xA8)).sum(-1) < 6).mean()
    assert card > 0.003, "the blue card of the accuracy is not there"
    assert pixels.std() > 15 and len(np.unique(pixels.reshape(-1, 3)[::97], axis=0)) > 200  # figures and photographs
    dumped = subprocess.run(
        [browser, *options, "--dump-dom", address], check=True, capture_output=True, text=True, timeout=120
    ).stdout
    assert "SYNTHETIC images" in dumped and dumped.count("<img") == 19


def test_whose_calibration_error(tmp_path, monkeypatch):
    """Of several folds the card has their mean, and the text that of all images too; each says which it is."""
    monkeypatch.setenv("CELLOPS_CACHE", str(tmp_path / "cache"))
    data = {"options": {"count": 90}, "folds": 3, "test_fraction": None, "validation": 0.0}
    finish(start(tmp_path / "run", tiny_recipe(data=data, training={"epochs": 1})))
    text = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    parts = [tmp_path / "run" / f"fold_{number}" for number in (1, 2, 3)]
    found = [json.loads((part / "metrics.json").read_text())["calibration"] for part in parts]
    before, after = (float(np.mean([one[f"ece_{when}"] for one in found])) for when in ("before", "after"))
    pooled = Predictions.join([Predictions.load(part / "predictions.csv") for part in parts])
    all_images = calibration(pooled.probabilities, pooled.targets)["ece"]
    assert f"<b>{after:.3f}</b>calibration error<span>mean of the folds, {before:.3f} before" in text
    assert f"Calibration error (ECE): {all_images:.3f} as trained" in text
    told = f"of the images of all folds together; the mean of the folds, each by itself, is {before:.3f} as trained and"
    assert f"{told} {after:.3f} after." in text


def test_one_fold_has_one_calibration_error(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "calibration error" in text and "of all folds together" not in text and "mean of the folds" not in text


def drawn(name):
    """The figures that a class name stands in, as SVG; of paths, so that every character is looked for in the fonts."""
    classes = (name, "other", "third")
    rows = np.random.default_rng(0).dirichlet(np.ones(3), 40)
    pictures = [figures.confusion(np.eye(3), classes), figures.roc(rows, np.arange(40) % 3, classes)]
    return [base64.b64decode(picture.partition(",")[2]).decode() for picture in pictures]


@pytest.mark.parametrize("name", ["p16 $x_{$", "$x_2$", r"\$a$ \frac{", "a $ b", "$$"])
def test_dollars_are_no_formula(name):
    for picture in drawn(name):
        assert f"<!-- {figures.short(name)}" in picture  # matplotlib says what it draws


def test_names_without_spaces_are_cut():
    assert figures.short("Superficial-Intermediate") == "Superficial-…"
    assert figures.short("x" * 20) == "x" * 15 + "…"
    assert figures.short("a_b") == "a b" and figures.short("_") == "_"


def test_names_in_chinese(tmp_path, monkeypatch):
    """With a font that has the characters; made here, since few machines of tests have one."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen
    from matplotlib import font_manager

    name = "细胞"
    names = [f"u{ord(letter):x}" for letter in name]
    pen = TTGlyphPen(None)
    for number, point in enumerate([(0, 0), (0, 700), (600, 900), (600, 100)]):
        (pen.lineTo if number else pen.moveTo)(point)
    pen.closePath()
    shape = pen.glyph()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", *names])
    builder.setupCharacterMap({ord(letter): glyph for letter, glyph in zip(name, names, strict=True)})
    builder.setupGlyf(dict.fromkeys([".notdef", *names], shape))
    builder.setupHorizontalMetrics(dict.fromkeys([".notdef", *names], (1000, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Noto Sans CJK SC", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "font.ttf")
    others = [font for font in font_manager.fontManager.ttflist if font.name not in figures.EAST_ASIAN]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", others)
    assert figures.families() == ["DejaVu Sans"]
    with pytest.warns(UserWarning, match="missing from font"):
        drawn(name)
    font_manager.fontManager.addfont(tmp_path / "font.ttf")
    assert figures.families() == ["DejaVu Sans", "Noto Sans CJK SC"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn(name)


def test_grad_cam_finds_the_spot():
    """A network that adds up red looks where the red is."""
    model = TinyCells(2, 3, "batch", 0.0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.norm.weight.fill_(1)
        model.first.weight[0, 0] = 1
        model.second.weight[0, 0] = 1
        model.head.weight[1, 0] = 1
    images = torch.zeros(1, 3, 32, 32)
    images[0, 0, 4:10, 20:26] = 1
    heat = grad_cam(model, images, torch.tensor([1]))[0]
    row, column = np.unravel_index(heat.argmax(), heat.shape)
    assert 2 <= row <= 11 and 18 <= column <= 27 and heat.max() == pytest.approx(1)
    assert heat[20:, :15].max() < 0.05
    assert overlay(np.zeros((32, 32, 3), np.uint8), heat).shape == (32, 32, 3)


def test_grad_cam_without_maps():
    class Flat(torch.nn.Module):
        def forward(self, images):
            return images.mean((2, 3))

    assert grad_cam(Flat(), torch.zeros(1, 3, 8, 8), torch.tensor([0])) is None


def test_grad_cam_of_maps_that_the_logits_use():
    """A head that is computed for nothing is the deepest; maps of a layer that is called again unused are not asked."""

    class Extra(TinyCells):
        def __init__(self):
            super().__init__(2, 3, "batch", 0.0)
            self.extra = torch.nn.Conv2d(16, 4, 1)

        def forward(self, images):
            features = self.forward_features(images)
            self.extra(features)
            self.second(self.norm(self.first(images)))
            return self.forward_head(features)

    torch.manual_seed(0)
    network, images, labels = Extra().eval(), torch.rand(2, 3, 32, 32), torch.tensor([1, 0])
    plain = TinyCells(2, 3, "batch", 0.0).eval()
    plain.load_state_dict({key: value for key, value in network.state_dict().items() if "extra" not in key})
    np.testing.assert_allclose(grad_cam(network, images, labels), grad_cam(plain, images, labels), atol=1e-6)


def test_grad_cam_of_a_layer_that_is_called_everywhere():
    """A single ReLU gives the maps, smaller ones after them, and the numbers of the head."""

    class Shared(TinyCells):
        def __init__(self):
            super().__init__(2, 3, "batch", 0.0)
            self.relu = self.again = torch.nn.ReLU()

        def forward(self, images):
            maps = self.relu(self.second(self.norm(self.first(images))))
            small = self.again(functional.adaptive_avg_pool2d(maps, 2))
            return self.head(self.again(small.mean((2, 3))))

    torch.manual_seed(0)
    network, images, labels = Shared().eval(), torch.rand(2, 3, 32, 32), torch.tensor([1, 0])
    found = grad_cam(network, images, labels)
    network.again = torch.nn.ReLU()
    np.testing.assert_allclose(found, grad_cam(network, images, labels), atol=1e-6)


def test_worst_first():
    rows = np.array([[0.9, 0.1], [0.2, 0.8], [0.4, 0.6], [0.01, 0.99]])
    found = Predictions(["a", "b", "c", "d"], np.array([0, 0, 0, 0]), rows, ("x", "y"))
    assert worst(found, 2).tolist() == [3, 1]


def test_temperature():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(4000, 3))
    targets = np.array([generator.choice(3, p=row) for row in np.exp(logits) / np.exp(logits).sum(1, keepdims=True)])
    sharp = np.exp(3 * logits) / np.exp(3 * logits).sum(1, keepdims=True)
    part = Predictions([str(n) for n in range(4000)], targets, sharp, ("a", "b", "c"))
    for validation in (part, None):
        found = calibrate(part, validation)
        assert found["temperature"] == pytest.approx(3, rel=0.1)
        assert found["ece_before"] > 0.15 and found["ece_after"] < 0.03
    np.testing.assert_allclose(with_temperature(sharp, 1.0), sharp, atol=1e-9)


def test_temperature_where_files_alternate():
    """A case and its control, in turn: each half of the test part has both, or it learns the other's bias."""
    generator = np.random.default_rng(0)
    targets = np.arange(400) % 2
    second = 1 / (1 + np.exp(-2 * (generator.normal(size=400) + 2 * targets - 1.5)))
    part = Predictions([str(n) for n in range(400)], targets, np.stack([1 - second, second], 1), ("control", "case"))
    found = calibrate(part, None)
    order = generator.permutation(400)
    shuffled = calibrate(Predictions(part.ids, targets[order], part.probabilities[order], part.classes), None)
    assert found["temperature"] == pytest.approx(shuffled["temperature"], rel=0.1)
    assert found["ece_after"] == pytest.approx(shuffled["ece_after"], abs=0.03)


def test_predictions_keep_every_digit(tmp_path):
    """Of a sure network the scores of a class crowd below 1; rounded, they would be ties, and its AUC another."""
    generator = np.random.default_rng(1)
    targets = generator.integers(0, 2, 300)
    second = 1 / (1 + np.exp(-18.0 * (2 * targets - 1) - 14 * generator.normal(size=300)))
    part = Predictions([str(n) for n in range(300)], targets, np.stack([1 - second, second], 1), ("a", "b"))
    part.save(tmp_path / "predictions.csv")
    read = Predictions.load(tmp_path / "predictions.csv")
    np.testing.assert_array_equal(read.probabilities, part.probabilities)


def table_of(root, groups):
    """One image for each (class, group), in a table."""
    rows = [["path", "label", "group"]]
    for number, (label, group) in enumerate(groups):
        trees.write(root / f"{number:03}.png", trees.picture(number))
        rows.append([f"{number:03}.png", label, group])
    trees.write_rows(root / "cells.csv", rows)
    return root


def of_files(data, **settings):
    """A recipe for files, trained for one epoch."""
    options = {"count": None, "size": None}
    return tiny_recipe(
        data={"path": str(data), "options": options, "validation": 0.0, **settings}, training={"epochs": 1}
    )


def test_folds_that_lack_a_class(tmp_path, monkeypatch):
    """Means over folds leave the class out where it is lacking; the figures of all images stand beside them."""
    monkeypatch.setenv("CELLOPS_CACHE", str(tmp_path / "cache"))
    groups = [("a", f"g{number // 2}") for number in range(34)] + [("b", f"h{number // 3}") for number in range(6)]
    recipe = of_files(table_of(tmp_path / "data", groups), folds=5, test_fraction=None, protocol="grouped")
    finish(start(tmp_path / "run", recipe))
    parts = [tmp_path / "run" / f"fold_{number}" for number in range(1, 6)]
    pooled = Predictions.join([Predictions.load(part / "predictions.csv") for part in parts])
    wanted = classification_metrics(pooled.probabilities, pooled.targets)
    found = json.loads((tmp_path / "run" / "results.json").read_text())["grouped"]
    assert found["lacking"] == 3
    assert {name: found["together"][name] for name in wanted} == pytest.approx(wanted)
    low, high = found["interval"]["accuracy_micro"]
    assert low <= found["together"]["accuracy_micro"] <= high
    text = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert f"balanced accuracy<span>± {100 * found['deviation']['accuracy_macro']:.1f} over folds, all images" in text
    assert f"all images together {100 * wanted['accuracy_macro']:.1f} %" in text
    assert f"over 2 of 5 folds, all images together {100 * wanted['auc_macro']:.1f} %" in text
    assert "mean of classes, of folds" in text and "those of all folds over all" in text


def test_deviation_of_one_known_fold(folder):
    protocol = read_protocols(folder, json.loads((folder / "run.json").read_text()))[0]
    other = replace(protocol.folds[0], found={**protocol.folds[0].found, "metrics": {"accuracy_micro": 0.5}})
    two = Protocol("grouped", 2, [*protocol.folds, other])
    assert "over folds" in two.spread("accuracy_micro")
    assert two.spread("auc_macro").startswith("of 1 of 2 folds") and "nan" not in two.spread("auc_macro")


def test_no_interval_is_told(tmp_path, monkeypatch):
    """Of one group in the test part, which resampling cannot vary."""
    monkeypatch.setenv("CELLOPS_CACHE", str(tmp_path / "cache"))
    groups = [(label, group) for group in ("one", "two") for label in "ab" for _ in range(10)]
    finish(
        start(tmp_path / "run", of_files(table_of(tmp_path / "data", groups), test_fraction=0.5, protocol="grouped"))
    )
    text = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "No intervals" in text and "95 %:" not in text


@pytest.mark.parametrize("protocol", ["grouped", "paper", "both"])
def test_a_prescribed_split_is_called_so(tmp_path, monkeypatch, protocol):
    """Whose groups the protocol keeps on no side."""
    monkeypatch.setenv("CELLOPS_CACHE", str(tmp_path / "cache"))
    data = trees.hep2(tmp_path / "data", specimens=1, cells=3)
    finish(start(tmp_path / "run", of_files(data, protocol=protocol, test_fraction=None)))
    text = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "held-out images; split as the data set prescribes." in text
    assert "stay on one side" not in text and "on both sides" not in text.replace("groups on both sides of a split", "")
    assert ("Both have the test part that the data set prescribes" in text) == (protocol == "both")


def test_both_splits_without_groups(tmp_path, monkeypatch):
    monkeypatch.setenv("CELLOPS_CACHE", str(tmp_path / "cache"))
    data = trees.class_folders(tmp_path / "data", ("a", "b"), count=10)
    finish(start(tmp_path / "run", of_files(data, protocol="both")))
    text = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "This data set names no groups, so that both are image by image." in text
    assert "stay on one side" not in text and "on both sides" not in text


def test_a_run_ends_with_its_figures(tmp_path, monkeypatch):
    """Of all held-out images, as results.json and the report have them."""
    monkeypatch.setenv("CELLOPS_CACHE", str(tmp_path / "cache"))
    text = io.StringIO()
    groups = [("a", f"g{number // 2}") for number in range(20)] + [("b", f"h{number // 2}") for number in range(20)]
    recipe = of_files(table_of(tmp_path / "data", groups), folds=2, test_fraction=None, protocol="both")
    run = start(tmp_path / "run", recipe)
    run.output = Output()
    run.output.console = Console(file=text, width=200, highlight=False)
    finish(run)
    lines = text.getvalue().splitlines()
    for name, found in json.loads((tmp_path / "run" / "results.json").read_text()).items():
        (line,) = [line for line in lines if line.startswith(f"{name}, 2 folds: ")]
        low, high = found["interval"]["accuracy_micro"]
        told = f"accuracy {100 * found['together']['accuracy_micro']:.1f} % (95 %: {100 * low:.1f} to {100 * high:.1f})"
        assert told in line and f"balanced {100 * found['together']['accuracy_macro']:.1f} %" in line
        assert f"40 images, trained {found['seconds']:,.0f} s" in line
    assert result_lines({"paper": {**found, "folds": 1, "interval": {}}})[0].startswith("paper: accuracy ")
    assert "(no interval)" in result_lines({"paper": {**found, "interval": {}}})[0]
