"""The report's page, made from the files of a run alone, so that it can be written again at any time."""

from __future__ import annotations

import base64
import html
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cellops.models.report import figures
from cellops.models.training.checkpoint import write_text
from cellops.models.training.evaluate import Predictions, calibrate
from cellops.models.training.log import read_log
from cellops.models.training.metrics import calibration, classification_metrics, confusion_matrix, per_class_table

if TYPE_CHECKING:
    from cellops.models.training.settings import Recipe

STYLE = Path(__file__).with_name("style.css")
HEADLINES = {
    "accuracy_micro": "accuracy",
    "accuracy_macro": "balanced accuracy",
    "f1_macro": "F1, class mean",
    "auc_macro": "AUC, class mean",
}
COMPARED = {
    "accuracy_micro": "accuracy",
    "accuracy_macro": "balanced accuracy",
    "precision_macro": "precision",
    "recall_macro": "recall",
    "specificity_macro": "specificity",
    "f1_macro": "F1",
    "auc_macro": "AUC",
}
PROTOCOLS = {
    "grouped": "grouped: images of one slide, patient or parent image stay on one side",
    "paper": "paper: split image by image, as the paper does; related images are on both sides",
}
PRESCRIBED = "as the data set prescribes"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # no script runs, whatever a name or file holds


@dataclass
class Fold:
    """A part of the run with its files."""

    number: int
    folder: Path
    found: dict[str, Any]
    test: Predictions
    validation: Predictions | None


@dataclass
class Protocol:
    """The parts of one protocol that are in."""

    name: str
    planned: int
    folds: list[Fold]
    intervals: dict[str, Any] = field(default_factory=dict)  # of the images of all folds together

    @property
    def test(self) -> Predictions:
        """The predictions on the held-out images of all folds."""
        return Predictions.join([fold.test for fold in self.folds])

    @cached_property
    def together(self) -> dict[str, float]:
        """The metrics of all folds' predictions as one set of images."""
        return classification_metrics(self.test.probabilities, self.test.targets)

    def mean(self, name: str) -> float:
        """A metric's mean over the folds; NaN where none has it."""
        values = [fold.found["metrics"].get(name) for fold in self.folds]
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else float("nan")

    def spread(self, name: str) -> str:
        """What follows a metric, in percent: of folds their deviation and the figure of all images together, of a
        single one the interval."""
        if len(self.folds) > 1:
            values = [fold.found["metrics"].get(name) for fold in self.folds]
            known = [value for value in values if value is not None]
            few = f"{len(known)} of {len(values)} folds" if len(known) < len(values) else "folds"
            deviation = f"± {100 * float(np.std(known, ddof=1)):.1f} over {few}" if len(known) > 1 else f"of {few}"
            return f"{deviation}, all images together {percent(self.together[name])}"
        intervals = self.folds[0].found["intervals"]
        if name in intervals:
            return f"95 %: {100 * intervals[name][0]:.1f} to {100 * intervals[name][1]:.1f}"
        return "no interval: all resamples alike" if intervals else ""


def escape(text: Any) -> str:
    """Text for HTML."""
    return html.escape(str(text))


def percent(value: float | None) -> str:
    """A share as percent; a dash where there is none."""
    return "–" if value is None or not np.isfinite(value) else f"{100 * value:.1f} %"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], last: str = "") -> str:
    """An HTML table; cells are HTML already. `last` is the class of the last row."""
    cells = "".join(f"<th>{name}</th>" for name in head)
    lines = []
    for place, row in enumerate(rows):
        kind = f' class="{last}"' if last and place == len(rows) - 1 else ""
        columns = "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in row)
        lines.append(f"<tr{kind}>{columns}</tr>")
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def bar(value: float | None) -> str:
    """A cell with a bar behind the percent."""
    if value is None or not np.isfinite(value):
        return "<td>–</td>"
    return f'<td class="bar"><i style="width:{88 * max(value, 0):.1f}%"></i><em>{percent(value)}</em></td>'


def figure(image: str, text: str) -> str:
    """An image of data with what it shows."""
    return f'<img class="figure" src="{image}" alt="{escape(text)}">'


def section(title: str, body: str) -> str:
    """A titled part of the page."""
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def read_json(path: Path) -> Any:
    """A JSON file of the run.

    Raises:
        ValueError: it is missing or broken; names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None


def inside(folder: Path, name: str) -> Path:
    """A file that another one names.

    Raises:
        ValueError: it lies outside the folder: a page would show files of whoever makes it.
    """
    path = folder / name
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise ValueError(f"{folder} names a file outside it: {name}")
    return path


def without_folders(arguments: Sequence[str]) -> list[str]:
    """Arguments of a command with the last part alone of a path from / or ~ or .., which names people and projects."""
    told = []
    for argument in arguments:
        head, equals, value = argument.rpartition("=")
        outside = value.strip("'\"").startswith(("/", "~", ".."))
        told.append(f"{head}{equals}{Path(value).name}" if outside else argument)
    return told


def read_protocols(run: Path, facts: dict[str, Any]) -> list[Protocol]:
    """The parts of a run that are in, by protocol, the honest split first."""
    results = read_json(run / "results.json") if (run / "results.json").is_file() else {}
    protocols = []
    for name in sorted(facts["protocols"], key=lambda known: known != "grouped"):
        planned = [part for part in facts["parts"] if part["protocol"] == name]
        folds = []
        for part in planned:
            folder = inside(run, part["folder"])
            if not (folder / "metrics.json").is_file():
                continue
            validation = folder / "predictions_validation.csv"
            folds.append(
                Fold(
                    part["fold"],
                    folder,
                    read_json(folder / "metrics.json"),
                    Predictions.load(folder / "predictions.csv"),
                    Predictions.load(validation) if validation.is_file() else None,
                )
            )
        if folds:
            summary = results.get(name, {})
            current = summary.get("folds_done") == len(folds)
            protocols.append(Protocol(name, len(planned), folds, summary["interval"] if current else {}))
    return protocols


def write_report(run: Path) -> Path:
    """Write RUN/report.html from what is in the folder, and return its path.

    Of paths to data and weights it shows the last part alone: a report is sent to others.

    Raises:
        ValueError: the folder holds no run, or one whose files name others outside it.
    """
    from cellops.models.training.recipe import build_recipe, dump_recipe, parse_yaml

    facts = read_json(run / "run.json")
    recipe = build_recipe(parse_yaml((run / "recipe.yaml").read_text(encoding="utf-8"), "recipe.yaml"))
    places = [path for path in (recipe.data.path, recipe.model.weights) if path and Path(path).name]
    recipe = replace(
        recipe,
        data=replace(recipe.data, path=recipe.data.path and Path(recipe.data.path).name),
        model=replace(recipe.model, weights=recipe.model.weights and Path(recipe.model.weights).name),
    )
    for place in places:
        facts["notes"] = [note.replace(place, Path(place).name) for note in facts["notes"]]
    starts = read_json(run / "environment.json")
    protocols = read_protocols(run, facts)
    title, body = _header(facts, recipe, protocols)
    if len(protocols) > 1:
        body += _comparison(protocols, facts)
    body += _curves(run, facts)
    for protocol in protocols:
        body += _results(protocol, facts, alone=len(protocols) == 1)
    body += _costs(protocols) + _data(facts, protocols) + _settings(dump_recipe(recipe), starts)
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE.read_text(encoding='utf-8')}</style></head>"
        f"<body><main>{body}</main></body></html>\n"
    )
    path = run / "report.html"
    write_text(path, page)
    return path


def _header(facts: dict[str, Any], recipe: Recipe, protocols: Sequence[Protocol]) -> tuple[str, str]:
    title = f"{recipe.title or recipe.name}"
    if facts["synthetic"]:
        title = f"SYNTHETIC images – {title}"
    height, width = recipe.data.input_size
    body = f"<header><h1>{escape(title)}</h1>"
    body += (
        f'<p class="muted">{escape(recipe.model.name)} on {escape(facts["data"])}, '
        f"{sum(facts['images'].values()):,} images of {len(facts['classes'])} classes, seen at {height} × {width}; "
        f"recipe {escape(recipe.name)}{f', paper {escape(recipe.paper)}' if recipe.paper else ''}</p>"
    )
    if facts["synthetic"]:
        body += (
            '<div class="synthetic">These images are drawn by a program. '
            "Nothing on this page says anything about real cells.</div>"
        )
    body += f'<p class="muted">{escape(recipe.setting)}</p>' if recipe.setting else ""
    if recipe.notes:
        body += f"<p>{escape(recipe.notes)}</p>"
    if not protocols:
        return title, body + '<div class="warning">Training is not complete; no fold has results yet.</div></header>'
    first = protocols[0]
    if len(first.folds) < first.planned:
        body += f'<div class="warning">{len(first.folds)} of {first.planned} folds are in.</div>'
    if {fold.found["judged_on"] for fold in first.folds} != {"test"}:
        body += (
            '<div class="warning">There is no test part: these figures are of the images that chose the epoch.</div>'
        )
    cards = [
        (percent(first.mean(name)), label, first.spread(name))
        for name, label in HEADLINES.items()
        if np.isfinite(first.mean(name))
    ]
    errors = [fold.found["calibration"]["ece_after"] for fold in first.folds]
    before = np.mean([fold.found["calibration"]["ece_before"] for fold in first.folds])
    of_folds = "mean of the folds, " if len(first.folds) > 1 else ""
    cards.append((f"{np.mean(errors):.3f}", "calibration error", f"{of_folds}{before:.3f} before temperature scaling"))
    costs = [fold.found.get("cost") for fold in first.folds]
    if costs[0]:
        cards.append((_millions(costs[0]["parameters"]), "parameters", f"{costs[0]['megabytes']:.1f} MiB of weights"))
    seconds = sum(fold.found["training"]["seconds"] for protocol in protocols for fold in protocol.folds)
    cards.append((_duration(seconds), "training", f"{first.folds[0].found['training']['epochs']} epochs a fold"))
    body += '<div class="cards">'
    body += "".join(
        f'<div class="card"><b>{escape(value)}</b>{escape(label)}<span>{escape(note)}</span></div>'
        for value, label, note in cards
    )
    body += "</div>"
    held_out = len(first.test.ids)
    split = PROTOCOLS[first.name] if facts["grouped"] else "image by image, since this data set names no groups"
    split = PRESCRIBED if facts.get("prescribed") else split
    body += f'<p class="muted">On {held_out:,} held-out images; split {escape(split)}.</p>'
    return title, body + "</header>"


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M" if count >= 1e5 else f"{count:,}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _comparison(protocols: Sequence[Protocol], facts: dict[str, Any]) -> str:
    head = ["", *(escape(protocol.name) for protocol in protocols), "difference"]
    rows = []
    for name, label in COMPARED.items():
        values = [protocol.mean(name) for protocol in protocols]
        if all(np.isfinite(values)):
            cells = [
                f"{percent(value)} <span class='muted'>{protocol.spread(name)}</span>"
                for value, protocol in zip(values, protocols, strict=True)
            ]
            rows.append([label, *cells, f"{100 * (values[1] - values[0]):+.1f}"])
    rows.append(["folds in", *(f"{len(protocol.folds)} of {protocol.planned}" for protocol in protocols), ""])
    told = [PROTOCOLS[protocol.name] for protocol in protocols]
    if facts.get("prescribed"):
        told = [
            "Both have the test part that the data set prescribes, so that this shows nothing of what groups on "
            "both sides of a split are worth; set data.prescribed: false for that."
        ]
    elif not facts["grouped"]:
        told = ["This data set names no groups, so that both are image by image."]
    text = "".join(f"<p class='muted'>{escape(line)}</p>" for line in told)
    return section("Both splits side by side", table(head, rows) + text)


def _curves(run: Path, facts: dict[str, Any]) -> str:
    logs = [
        (f"{part['protocol']} {part['fold']}", log)
        for part in facts["parts"]
        if (log := read_log(inside(run, part["folder"])))
    ]
    if not logs:
        return ""
    left_out = sum(int(log[-1].get("non_finite", 0)) for _, log in logs)
    text = figure(figures.learning_curves(logs), "loss and accuracy over the epochs")
    if left_out:
        text += f'<div class="warning">{left_out} batches were left out because their loss was not finite.</div>'
    return section("Learning curves", text)


def _results(protocol: Protocol, facts: dict[str, Any], alone: bool) -> str:
    test, classes = protocol.test, tuple(facts["classes"])
    suffix = "" if alone else f" – {protocol.name}"
    matrix = confusion_matrix(test.found, test.targets, len(classes))
    text = section(f"Confusion{suffix}", figure(figures.confusion(matrix, classes), "confusion matrices"))
    text += section(f"Classes{suffix}", _class_table(test, protocol))
    scaled = np.concatenate([calibrate(fold.test, fold.validation)["scaled"] for fold in protocol.folds])
    before, after = calibration(test.probabilities, test.targets), calibration(scaled, test.targets)
    temperatures = ", ".join(f"{fold.found['calibration']['temperature']:.2f}" for fold in protocol.folds)
    pair = figure(figures.roc(test.probabilities, test.targets, classes), "ROC curves")
    pair += figure(figures.reliability(before, after), "reliability diagram")
    note = (
        f"Calibration error (ECE): {before['ece']:.3f} as trained, {after['ece']:.3f} "
        f"after dividing the logits by the temperature {temperatures}, found on "
        f"{escape(protocol.folds[0].found['calibration']['source'])}."
    )
    if len(protocol.folds) > 1:
        # Bins of a fold hold few images, so that its own error is mostly larger; the card above has that mean.
        own = np.mean(
            [[fold.found["calibration"][f"ece_{when}"] for when in ("before", "after")] for fold in protocol.folds], 0
        )
        note += (
            f" These are of the images of all folds together; the mean of the folds, each by itself, is {own[0]:.3f} "
            f"as trained and {own[1]:.3f} after."
        )
    text += section(f"Ranking and calibration{suffix}", f'<div class="pair">{pair}</div><p class="muted">{note}</p>')
    text += _interval_section(protocol, facts, suffix)
    return text + _mistakes(protocol, suffix)


def _class_table(test: Predictions, protocol: Protocol) -> str:
    rows = []
    for one in per_class_table(test.probabilities, test.targets, test.classes):
        figures_of_class = [bar(one[name]) for name in ("precision", "recall", "specificity", "f1", "auc")]
        rows.append([escape(one["class"]), f"{one['images']:,}", f"{one['predicted']:,}", *figures_of_class])
    averaged = [f"{name}_macro" for name in ("precision", "recall", "specificity", "f1", "auc")]
    total = f"{len(test.ids):,}"
    rows.append(["mean of classes", total, total, *(percent(protocol.together[name]) for name in averaged)])
    if len(protocol.folds) > 1:
        rows.append(["mean of classes, of folds", total, total, *(percent(protocol.mean(name)) for name in averaged)])
    head = ("class", "images", "predicted", "precision", "recall", "specificity", "F1", "AUC")
    return table(head, rows, last="mean")


def _interval_section(protocol: Protocol, facts: dict[str, Any], suffix: str) -> str:
    rows, groups = [], []
    several = len(protocol.folds) > 1
    for name, label in COMPARED.items():
        if several and name in protocol.intervals:
            rows.append((f"{label}, all folds", protocol.together[name], *protocol.intervals[name]))
            groups.append(label)
        for fold in protocol.folds:
            interval, value = fold.found["intervals"].get(name), fold.found["metrics"].get(name)
            if interval and value is not None:
                rows.append((f"{label}, fold {fold.number}" if several else label, value, *interval))
                groups.append(label)
    if not rows:
        text = "<p>No intervals: none were asked for, or all resamples were alike, as of one group.</p>"
        return section(f"How sure are these figures{suffix}", text)
    text = figure(figures.intervals(rows, groups), "confidence intervals")
    text += '<p class="muted">Bars: 95 % bootstrap intervals over the held-out images'
    text += ", whole groups resampled" if facts["grouped"] else ""
    text += (
        ". They are of the networks as trained: what another seed or other training images would change comes on top. "
        "A figure that all resamples have alike, as where no image is wrong, has none."
    )
    if several:
        text += " Class means of a fold are over the classes that its test part has, those of all folds over all."
    return section(f"How sure are these figures{suffix}", text + "</p>")


def _mistakes(protocol: Protocol, suffix: str) -> str:
    listed = []
    for fold in protocol.folds:
        path = fold.folder / "mistakes" / "mistakes.json"
        if path.is_file():
            listed += [(fold.folder / "mistakes", one) for one in read_json(path)]
    wrong = int((protocol.test.found != protocol.test.targets).sum())
    if not listed:
        text = "<p>No image was classified wrongly.</p>" if not wrong else "<p>No images were kept.</p>"
        return section(f"Worst mistakes{suffix}", text)
    listed = sorted(listed, key=lambda item: item[1]["truth_probability"] - item[1]["confidence"])[:24]
    cards = ""
    for folder, one in listed:
        image = base64.b64encode(inside(folder, one["file"]).read_bytes()).decode()
        cards += (
            f'<figure><img src="data:image/png;base64,{image}" alt="{escape(one["image"])}"><figcaption>'
            f'<span class="wrong">{escape(one["predicted"])}</span> {one["confidence"]:.0%}, '
            f"is <b>{escape(one['truth'])}</b> {one['truth_probability']:.0%}"
            f'<small title="{escape(one["image"])}">{escape(one["image"])}</small></figcaption></figure>'
        )
    cam = any(one["grad_cam"] for _, one in listed)
    note = f"{wrong:,} of {len(protocol.test.ids):,} held-out images are classified wrongly; these most confidently."
    note += " Right: Grad-CAM, where the network saw the class that it named." if cam else ""
    return section(f"Worst mistakes{suffix}", f'<p class="muted">{note}</p><div class="gallery">{cards}</div>')


def _costs(protocols: Sequence[Protocol]) -> str:
    found = next(
        (fold.found["cost"] for protocol in protocols for fold in protocol.folds if fold.found.get("cost")), None
    )
    if found is None:
        return ""
    peak, latency = found.get("peak_bytes"), found.get("latency_seconds")
    rows = [
        ["parameters", f"{found['parameters']:,}"],
        ["weights and buffers", f"{found['megabytes']:.2f} MiB"],
        ["multiply-accumulates, one image", f"{found['macs'] / 1e6:,.1f} M"],
        ["outputs of all layers (torchstat's rule), one image", f"{found['torchstat_bytes'] / 2**20:.2f} MiB"],
    ]
    rows += [["peak memory, one image", f"{peak / 2**20:.1f} MiB"]] if peak is not None else []
    rows += [["latency, one image", f"{1e3 * latency:.2f} ms"]] if latency is not None else []
    speeds = [fold.found["images_per_second"] for protocol in protocols for fold in protocol.folds]
    rows.append(["test speed, loading included", f"{np.median(speeds):,.0f} images/s"])
    return section("Cost", table(("", "this machine"), rows))


def _data(facts: dict[str, Any], protocols: Sequence[Protocol]) -> str:
    rows = [[escape(name), f"{count:,}"] for name, count in facts["images"].items()]
    rows.append(["all", f"{sum(facts['images'].values()):,}"])
    text = table(("class", "images"), rows, last="mean")
    lines = []
    for protocol in protocols:
        for fold in protocol.folds:
            training = fold.found["training"]
            images = training["images"]
            lines.append(
                [
                    escape(f"{protocol.name}, fold {fold.number}"),
                    *(f"{images[part]:,}" for part in ("train", "validation", "test")),
                    str(training["epochs"]),
                    f"{training['kept_epoch']} ({escape(training['kept'])})",
                    _duration(training["seconds"]),
                ]
            )
    head = ("part", "training", "validation", "test", "epochs", "epoch kept", "time")
    text += "<h3>Parts</h3>" + table(head, lines) if lines else ""
    text += "".join(f'<p class="muted">{escape(note)}</p>' for note in facts["notes"])
    return section("Data", text)


def _settings(recipe_text: str, starts: Sequence[dict[str, Any]]) -> str:
    last = starts[-1]
    packages = ", ".join(f"{name} {version}" for name, version in last["packages"].items() if version)
    git = last.get("git") or {}
    changed = len(git.get("changed_files", ()))
    rows = [
        ["command", f"<code>{escape(' '.join(without_folders(last['command'])))}</code>"],
        ["started", escape(f"{starts[0]['time']}" + (f", resumed {len(starts) - 1} times" if len(starts) > 1 else ""))],
        ["machine", escape(f"{last['cpu']}, {last['cores']} cores, {last['threads']} threads")],
        ["versions", escape(f"cellops {last['cellops']}, Python {last['python']}, {packages}")],
    ]
    if git:
        state = f"{git['commit'][:12]}{f', {changed} files changed' if changed else ''}"
        rows.append(["commit", f"<code>{escape(state)}</code>"])
    body = table(("", ""), rows).replace("<thead><tr><th></th><th></th></tr></thead>", "")
    body += f"<details><summary>Every setting</summary><pre>{escape(recipe_text)}</pre></details>"
    return section("How this was made", body)
