"""Networks on real cells: what `cellops table cells` left, kept in benchmarks/results/experiments/ and shown in docs/.

cellops table cells --data PBC --output runs/pbc
cellops table cells --twin cric --data CRIC --output runs/cric
python benchmarks/experiments.py runs/pbc runs/cric     # keep their figures, and update docs/experiments.md
python benchmarks/experiments.py                        # update the page from the results that are there
python benchmarks/experiments.py --check                # fail where the page is not what the results say
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import machine
import pages

Table = dict[str, Any]

RESULTS = machine.ROOT / "benchmarks" / "results" / "experiments"
PAGE = machine.ROOT / "docs" / "experiments.md"
BEGIN, END = "<!-- experiments: begin (written by benchmarks/experiments.py) -->", "<!-- experiments: end -->"
COLUMNS = {
    "accuracy": "accuracy_micro",
    "balanced": "accuracy_macro",
    "F1": "f1_macro",
    "specificity": "specificity_macro",
}
DATA = {
    "pbc": "PBC: 1,600 images of eight kinds of blood cell",
    "cric": "CRIC: 1,317 cervical cells of six Bethesda classes, from 167 parent images",
}
SPLITS = {
    ("pbc", "grouped"): "Image by image: the set names no patients.",
    ("cric", "grouped"): "No parent image on both sides of a split.",
    ("cric", "paper"): "Image by image, as the papers split: cells of one parent image on both sides.",
}


def collect(folder: Path) -> Table:
    """The figures of a folder of `cellops table`, with where each row was trained.

    Raises:
        ValueError: no table was written there.
    """
    path = folder / "table.json"
    if not path.is_file():
        raise ValueError(f"there is no table.json in {folder}: it is what `cellops table --output` names")
    table: Table = json.loads(path.read_text())
    rows = [row for row in table["rows"] if row.get("folds_done")]
    for row in rows:
        run = folder / row["recipe"]
        row.pop("paper")
        row["mean"] = {name: row["mean"][name] for name in COLUMNS.values()}
        row["deviation"] = {name: row["deviation"][name] for name in COLUMNS.values() if name in row["deviation"]}
        row["interval"] = {name: row["interval"][name] for name in COLUMNS.values() if name in row["interval"]}
        row["parameters"] = json.loads(next(run.rglob("metrics.json")).read_text())["cost"]["parameters"]  # of any part
        row["origin"] = _origins(run)
    data = {json.loads((folder / row["recipe"] / "run.json").read_text())["data"] for row in rows}
    if len(data) != 1:
        raise ValueError(f"{folder} has rows of {', '.join(sorted(data)) or 'no data'}, not of one set")
    return {"table": table["table"], "data": data.pop(), "rows": rows}


def _origins(run: Path) -> list[str]:
    """Machine, versions and commit of each start of a run, each once."""
    found = []
    for start in json.loads((run / "environment.json").read_text()):
        git = start["git"] or {"commit": "no clone", "changed_files": []}
        where = ", ".join(start["gpus"]) or f"{start['cpu']}, {start['threads']} thread(s)"
        changed = " and changes" if git["changed_files"] else ""
        found.append(f"{where}; torch {start['packages']['torch']}; commit {git['commit'][:10]}{changed}")
    return list(dict.fromkeys(found))


def keep(table: Table, name: str, folder: Path = RESULTS) -> Path:
    """Write the figures of a table: of the same machine, data, recipe and protocol they are replaced, others stay."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{table['data']}.json"
    before = json.loads(path.read_text())["rows"] if path.is_file() else []
    rows = {(row["recipe"], row["protocol"]): row for row in [*before, *table["rows"]]}
    path.write_text(json.dumps({**table, "rows": list(rows.values())}, indent=1, ensure_ascii=False) + "\n")
    return path


def page(tables: list[Table]) -> str:
    """The tables of all results, those of all machines together, in Markdown."""
    parts = []
    for data, title in DATA.items():
        of_data = [row for table in tables if table["data"] == data for row in table["rows"]]
        if of_data:
            parts.append(f"## {title}")
        commits: dict[str, dict[str, None]] = {}
        for row in of_data:
            for origin in row["origin"]:
                machine, _, commit = origin.rpartition("; commit ")
                commits.setdefault(machine, {})[commit] = None
        parts += [f"Trained on: {machine}; commit {', '.join(known)}." for machine, known in commits.items()]
        for (of, protocol), text in SPLITS.items():
            chosen = [row for row in of_data if of == data and row["protocol"] == protocol]
            parts += [text, _rows(chosen)] if chosen else []
    return "\n\n".join(parts) + "\n"


def _rows(rows: list[Table]) -> str:
    from cellops.models.training.tables import load_table, shown

    order = {row.label: at for at, row in enumerate(load_table("cells").rows)}
    rows = sorted(rows, key=lambda row: order.get(row["label"], len(order)))
    cells = [["network", "parameters", "folds", *COLUMNS, "training"]]
    for row in rows:
        figures = [shown(row, name) for name in COLUMNS.values()]
        minutes = f"{row['seconds'] / row['folds_done'] / 60:.1f} min"
        folds = f"{row['folds_done']} of {row['folds']}"
        cells.append([row["label"], f"{row['parameters'] / 1e6:.2f} M", folds, *figures, minutes])
    return pages.table(cells)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, metavar="DIR", help="of cellops table --output")
    parser.add_argument("--name", default=None, help="of the machine, in the results' file names")
    parser.add_argument("--check", action="store_true", help="change nothing, fail where the page is old")
    options = parser.parse_args()
    sys.path.insert(0, str(machine.ROOT))
    for folder in options.folders:
        print(f"kept in {keep(collect(folder), options.name or machine.slug())}")
    tables = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    before = PAGE.read_text()
    text = pages.updated(before, page(tables), BEGIN, END)
    if options.check:
        return int(text != before)
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
