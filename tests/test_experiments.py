"""benchmarks/experiments.py: what it keeps of a table's runs, and the page that it writes."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
METRICS = ("accuracy_micro", "accuracy_macro", "f1_macro", "specificity_macro")


@pytest.fixture
def experiments() -> Iterator[Any]:
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("experiments")
    sys.path.remove(str(BENCHMARKS))


def write_table(folder: Path, data: str, changed: list[str]) -> Path:
    """A table with one row of two protocols, one of them done."""
    run = folder / "cells_resnet18_cric"
    (run / "grouped" / "fold_1").mkdir(parents=True)
    (run / "grouped" / "fold_1" / "metrics.json").write_text(json.dumps({"cost": {"parameters": 11_170_000}}))
    (run / "run.json").write_text(json.dumps({"data": data}))
    start = {"cpu": "X", "threads": 2, "gpus": [], "packages": {"torch": "2.15"}}
    starts = [{**start, "git": {"commit": "0123456789abcdef", "changed_files": changed}}, {**start, "git": None}]
    (run / "environment.json").write_text(json.dumps(starts))
    row = {"label": "ResNet-18", "recipe": run.name, "paper": {}, "folds": 5, "seconds": 120.0, "images": 264}
    done = {
        "folds_done": 1,
        "mean": {**dict.fromkeys(METRICS, 0.625), "kappa": 0.5},
        "deviation": {},
        "interval": {name: [0.5, 0.75] for name in (*METRICS, "kappa")},
    }
    rows = [{**row, "protocol": "grouped", **done}, {**row, "protocol": "paper", "folds_done": 0}]
    (folder / "table.json").write_text(json.dumps({"table": "cells", "twin": "cric", "rows": rows}))
    return folder


def test_what_is_kept_and_shown(experiments: Any, tmp_path: Path) -> None:
    table = experiments.collect(write_table(tmp_path / "runs", "cric", ["setup.py"]))
    (row,) = table["rows"]  # the protocol without a fold has no figures
    assert set(row["mean"]) == set(row["interval"]) == set(METRICS) and row["parameters"] == 11_170_000
    path = experiments.keep(table, "a-machine", tmp_path / "kept")
    assert path.name == "a-machine-cric.json"
    text = experiments.page([json.loads(path.read_text())])
    assert "| ResNet-18 | 11.17 M | 1 of 5 |" + 4 * " 62.50 [50.0, 75.0] |" + " 2.0 min |" in text
    assert "No parent image on both sides" in text
    assert "X, 2 thread(s); torch 2.15; commit 0123456789 and changes, no clone." in text


def test_other_rows_stay(experiments: Any, tmp_path: Path) -> None:
    """A folder has the rows that were trained on one day; those of others are kept, the same ones replaced."""
    table = experiments.collect(write_table(tmp_path / "runs", "cric", []))
    (row,) = table["rows"]
    for label, recipe in (("old", row["recipe"]), ("other", "cells_other_cric"), ("new", row["recipe"])):
        path = experiments.keep({**table, "rows": [{**row, "label": label, "recipe": recipe}]}, "m", tmp_path / "kept")
    assert [row["label"] for row in json.loads(path.read_text())["rows"]] == ["new", "other"]


def test_drawn_cells_are_not_shown_as_real_ones(experiments: Any, tmp_path: Path) -> None:
    table = experiments.collect(write_table(tmp_path / "runs", "synthetic", []))
    assert experiments.page([table]).strip() == ""


def test_says_what_is_missing(experiments: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no table\.json in"):
        experiments.collect(tmp_path)
    folder = write_table(tmp_path / "runs", "cric", [])
    table = json.loads((folder / "table.json").read_text())
    (folder / "table.json").write_text(json.dumps({**table, "rows": table["rows"][1:]}))
    with pytest.raises(ValueError, match="has rows of no data"):
        experiments.collect(folder)
