"""Whole tables of a paper: `recipes/tables/NAME.yaml` lists the rows, each a recipe and the figures that are printed.

All rows get their first fold before any gets its second, so that whatever the time allows can be compared.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cellops.models.training.recipe import FOLDER, RecipeError, load_recipe, nearest, parse_yaml

TABLES = FOLDER / "tables"


@dataclass
class Row:
    """A row: its label in the paper, its recipe, and the figures that the paper prints (in percent)."""

    label: str
    recipe: str
    paper: dict[str, float] = field(default_factory=dict)


@dataclass
class Table:
    """A table of a paper."""

    name: str
    title: str
    data: str  # what --data should be, in words
    columns: list[str]
    rows: list[Row]
    notes: str = ""


def table_names() -> dict[str, str]:
    """The tables there are, with their titles."""
    return {path.stem: load_table(path.stem).title for path in sorted(TABLES.glob("*.yaml"))}


def load_table(name: str) -> Table:
    """Read a shipped table.

    Raises:
        RecipeError: there is none of this name, or its file is wrong.
    """
    path = TABLES / f"{name}.yaml"
    if not path.is_file():
        raise RecipeError(f"there is no table {name!r}: {nearest(name, [file.stem for file in TABLES.glob('*.yaml')])}")
    values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    rows = [Row(**row) for row in values.pop("rows")]
    return Table(name=name, rows=rows, **values)


def _recipe_name(row: Row, twin: str) -> str:
    return f"{row.recipe}_{twin}" if twin else row.recipe


def train_table(
    table: Table,
    folder: Path,
    overrides: Sequence[str],
    twin: str,
    hours: float | None,
    only: str | None,
    output: Any,
    parts: int | None = None,
) -> int:
    """Train the rows of a table as far as the time goes, and write table.md and table.json after each part.

    Args:
        table: the rows.
        folder: one folder a row goes into it; what is there already is gone on with.
        overrides: settings for every row.
        twin: take the rows' twins of this suffix; "" for the rows themselves.
        hours: the budget; None for no limit.
        only: a part of the names of the rows' recipes.
        output: a `console.Output`.
        parts: of each row, the first so many; None for all.

    Returns:
        How many rows could not be trained.

    Raises:
        ValueError: no row is left, or a recipe is wrong.
        Interrupted: Ctrl-C; everything is saved.
    """
    from cellops.models.training.run import prepare

    rows = [row for row in table.rows if only is None or only in _recipe_name(row, twin)]
    if not rows:
        raise ValueError(f"no row of {table.name} has {only!r} in its recipe's name")
    recipes = {row.label: load_recipe(_recipe_name(row, twin), overrides) for row in rows}
    deadline = None if hours is None else time.monotonic() + 3600 * hours
    failed: dict[str, str] = {}
    read: dict[str, Any] = {}  # data sets, by what of the settings decides what is read
    most = max(recipe.data.folds * (2 if recipe.data.protocol == "both" else 1) for recipe in recipes.values())
    for count in range(1, min(most, parts or most) + 1):
        for row in rows:
            late = deadline is not None and time.monotonic() > deadline
            if row.label in failed or late:
                continue
            target = folder / _recipe_name(row, twin)
            if _parts_done(target) >= count:
                continue
            output.line(f"{row.label}: part {count}", style="bold")
            recipe, resume = recipes[row.label], (target / "recipe.yaml").is_file()
            key = repr((recipe.data.path, recipe.data.layout, recipe.data.options, recipe.data.unreadable))
            try:
                session = prepare(recipe, target, resume=resume, output=output, data=read.get(key))
                read[key] = session.data
                session.train(deadline=deadline, parts=count)
                session.lock.close()
            except (ValueError, RuntimeError, OSError) as error:
                failed[row.label] = str(error)
                output.line(f"{row.label} failed: {error}", style="red")
            write_table(table, rows, folder, twin, failed)
    output.line(write_table(table, rows, folder, twin, failed))
    return len(failed)


def _parts_done(folder: Path) -> int:
    return sum(one["folds_done"] for one in _summary(folder).values())


def _summary(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def shown(found: dict[str, Any], metric: str) -> str:
    """A metric of a run's results.json in percent: "97.2 ± 0.5 [96.1, 98.3]", as far as it is known."""
    mean, deviation = found.get("mean", {}), found.get("deviation", {})
    text = f"{100 * mean[metric]:.2f}" if metric in mean else "–"
    text += f" ± {100 * deviation[metric]:.2f}" if metric in deviation else ""
    low, high = found.get("interval", {}).get(metric, (None, None))
    return text + (f" [{100 * low:.1f}, {100 * high:.1f}]" if low is not None else "")


def write_table(table: Table, rows: Sequence[Row], folder: Path, twin: str, failed: dict[str, str]) -> str:
    """Write table.md and table.json from the rows' folders, and return the Markdown text."""
    from cellops.models.training.checkpoint import write_text

    kind = "; ".join(dict.fromkeys(load_recipe(_recipe_name(row, twin)).setting for row in rows))
    told = (
        "Percent: mean ± standard deviation over the folds that are in, and the 95 % interval of their images together"
    )
    lines = [f"## {table.title}", "", f"{told}; {kind}.", ""]
    lines += [table.notes.strip(), ""] if table.notes else []
    printed = {name for row in rows for name in row.paper}
    head = [f"{name} (paper)" if name in printed else name for name in table.columns]
    lines += [f"| row | protocol | folds | {' | '.join(head)} |"]
    lines += ["|---|---|---|" + "---|" * len(table.columns)]
    records, lacking = [], []
    for row in rows:
        summary = _summary(folder / _recipe_name(row, twin)) or {"–": {"folds": 0, "folds_done": 0}}
        for protocol, found in summary.items():
            cells = [
                shown(found, name) + (f" ({row.paper[name]:g})" if name in row.paper else "") for name in table.columns
            ]
            folds = f"{found['folds_done']} of {found['folds']}"
            lines.append(f"| {row.label} | {protocol} | {folds} | " + " | ".join(cells) + " |")
            recipe = _recipe_name(row, twin)
            if found.get("lacking") and found["folds_done"] > 1:
                known = {name: found["together"].get(name) for name in table.columns if name.endswith("_macro")}
                means = ", ".join(f"{name} {100 * value:.2f}" for name, value in known.items() if value is not None)
                lacking.append(
                    f"\n{row.label}, {protocol}: {found['lacking']} test parts lack a class, which their class means "
                    f"leave out. Of all images together: {means}."
                )
            records.append({"label": row.label, "recipe": recipe, "protocol": protocol, "paper": row.paper, **found})
    lines += lacking
    lines += [f"\nNot trained: {label}: {reason}" for label, reason in failed.items()]
    text = "\n".join(lines) + "\n"
    write_text(folder / "table.md", text)
    write_text(folder / "table.json", json.dumps({"table": table.name, "twin": twin, "rows": records}, indent=1))
    return text
