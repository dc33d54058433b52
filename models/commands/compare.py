"""`cellops compare`: which of several runs is better on the images that each of them was judged on."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from cellops.models.commands import bad_input, given_path, need_models_extra

HELP = "compare runs image by image, on the images that each was judged on"
EXAMPLES = """\
examples:
  cellops compare runs/pbc runs/resnet18                    McNemar's test, and how far apart they are
  cellops compare runs/pbc runs/resnet18 --output pbc_or_resnet18
                                                            keeps it, with the images that they do not classify alike
  cellops compare runs/tables/cells/cells_resnet18 runs/tables/cells/cells_shufflenetv1
                                                            rows of a table: the images of all folds together
  cellops compare runs/pbc/evaluation runs/resnet18/evaluation    what `cellops evaluate` found

Several folds are taken together. With more than two runs p-values are Holm's as well.
"""
FILES = ("comparison.json", "differences.csv")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("runs", type=given_path, nargs="+", metavar="RUN", help="folders of runs or evaluations")
    parser.add_argument("--protocol", choices=("grouped", "paper"), help="of runs that have both (grouped)")
    parser.add_argument(
        "--by",
        choices=("auto", "hash", "path"),
        default="auto",
        help="what an image is known by: SHA-256, or path in its data set (the hash where all runs have it)",
    )
    parser.add_argument("--common", action="store_true", help="leave out images that not every run was judged on")
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="resamples of the intervals (1000)")
    parser.add_argument("--output", type=given_path, metavar="DIR", help=f"folder for {' and '.join(FILES)}")
    parser.add_argument("--overwrite", action="store_true", help="replace these files in --output")


def run(arguments: argparse.Namespace) -> int:
    """Compare, and return the exit code."""
    need_models_extra()
    from cellops.models.training.checkpoint import write_text
    from cellops.models.training.comparison import compare, differing, pair, read_judged
    from cellops.models.training.console import Output
    from cellops.models.training.evaluate import plain

    with bad_input():
        _check(arguments)
        paired = pair([read_judged(run, arguments.protocol) for run in arguments.runs], arguments.by, arguments.common)
        found = compare(paired, arguments.bootstrap)
        output = Output(quiet=False)
        for line in shown(found):
            output.line(line)
        for note in found["notes"]:
            output.line(f"note: {note}", style="yellow")
        count = int((paired.found != paired.found[0]).any(0).sum())
        if arguments.output is None:
            output.line(f"{count} images are not classified alike; --output DIR lists them")
            return 0
        write_text(arguments.output / FILES[0], json.dumps(plain(found), indent=1, ensure_ascii=False))
        write_text(arguments.output / FILES[1], differing(paired))
        output.line(f"{count} images are not classified alike -> {arguments.output / FILES[1]}")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Raise ValueError where arguments cannot be, before anything is read."""
    runs: list[Path] = arguments.runs
    if not 2 <= len(runs) <= len(LETTERS):
        raise ValueError(f"RUN: from 2 to {len(LETTERS)} runs are compared, got {len(runs)}")
    places = [run.resolve() for run in runs]
    for run, place in zip(runs, places, strict=True):
        if places.count(place) > 1:
            raise ValueError(f"RUN: {run} is given twice")
    if arguments.bootstrap < 0:
        raise ValueError(f"--bootstrap must not be negative, got {arguments.bootstrap}")
    if arguments.output is not None and not arguments.overwrite:
        taken = next((path for name in FILES if (path := arguments.output / name).exists()), None)
        if taken is not None:
            raise ValueError(f"{taken} is there already: take another --output, or --overwrite it")


def shown(found: dict[str, Any]) -> list[str]:
    """The lines that are printed of what `comparison.compare` found."""
    letter = {one["run"]: LETTERS[number] for number, one in enumerate(found["runs"])}
    groups = f" in {found['groups']:,} groups" if found["groups"] is not None else ""
    by = "SHA-256" if found["paired_by"] == "hash" else "path"
    lines = [f"{found['images']:,} images{groups} of {len(found['classes'])} classes, paired by {by}"]
    width = max(map(len, letter))
    for one in found["runs"]:
        accuracy, balanced = (f"{100 * one[name]:5.1f} %" for name in ("accuracy_micro", "accuracy_macro"))
        lines.append(f"  {letter[one['run']]}  {one['run']:<{width}}  accuracy {accuracy}, balanced {balanced}")
    for one in found["pairs"]:
        lines += ["", *_pair(one, letter[one["first"]], letter[one["second"]], len(found["runs"]), found["groups"])]
    return [*lines, ""]


def _pair(one: dict[str, Any], first: str, second: str, runs: int, groups: int | None) -> list[str]:
    """The lines of two runs."""
    (both, only_first), (only_second, neither) = one["table"]
    lines = [
        f"  {first} and {second:<6}{second} right{second:>5} wrong",
        f"  {first} right {both:>10,} {only_first:>10,}",
        f"  {first} wrong {only_second:>10,} {neither:>10,}",
    ]
    for name, label in (("accuracy_micro", "accuracy"), ("accuracy_macro", "balanced accuracy")):
        value, interval = one["differences"][name]["value"], one["differences"][name]["interval"]
        text = "no interval: none asked for, or all resamples alike"
        if interval is not None:
            what = "images" if groups is None else "groups"
            text = f"95 %: {100 * interval[0]:+.1f} to {100 * interval[1]:+.1f}, bootstrap of {what}"
        lines.append(f"  {label} {first} - {second}: {100 * value:+.1f} points ({text})")
    test = one["mcnemar"]
    how = "exact binomial test"
    if test["test"] == "corrected":
        how = f"chi-squared with continuity correction {test['statistic']:.2f}"
    adjusted = f", by Holm's correction for {runs * (runs - 1) // 2} pairs {test['p_holm']:.3g}" if runs > 2 else ""
    lines.append(f"  McNemar: {only_first} against {only_second} images, {how}, p = {test['p']:.3g}{adjusted}")
    return lines
