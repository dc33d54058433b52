"""The command `cellops`."""

from __future__ import annotations

import argparse
import importlib
import io
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from cellops.models.commands import report_errors

# Each is a module of cellops.models.commands with HELP, EXAMPLES, add_arguments(parser) and run(arguments).
COMMANDS = ("train", "evaluate", "compare", "predict", "export", "report", "table", "recipes", "models")

EXAMPLES = """\
examples:
  cellops train --recipe demo                 train a small network on drawn cells and write a report
  cellops train --recipe pbc --data images/   the same on your images; `cellops recipes` lists the recipes
  cellops predict runs/demo cell.png          classify images
  cellops doctor                              what is compiled, which backend each op takes, does it compute right
  cellops bench                               all benchmarks, from the root of a clone
  cellops bench -k deform_conv2d --full       arguments that bench does not know go to pytest
"""


def parser() -> argparse.ArgumentParser:
    """The command line of `cellops`."""
    command = argparse.ArgumentParser(
        prog="cellops",
        description="Operators of lightweight networks with native kernels, and training of networks for cell images.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--version", action="store_true", help="print the version and exit")
    commands = command.add_subparsers(dest="command", metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"cellops.models.commands.{name}")
        added = commands.add_parser(
            name,
            help=module.HELP,
            description=f"{module.HELP[0].upper()}{module.HELP[1:]}.",
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(added)
    commands.add_parser("doctor", help="report versions, backends and compiled kernels, and check every op")
    commands.add_parser(
        "bench",
        help="compare every op with its peers on this machine; needs a clone and the [models,test] extras",
        usage="cellops bench [PYTEST ARGUMENTS]",
        add_help=False,
    )
    return command


def benchmarks_folder() -> Path:
    """The clone's benchmarks: those of the working directory, or beside the source tree in use.

    Raises:
        FileNotFoundError: there is none.
    """
    from cellops import _source_tree

    for root in (Path.cwd(), _source_tree.ROOT):
        if any((root / "benchmarks").glob("bench_*.py")) and (root / "pyproject.toml").is_file():
            return root / "benchmarks"
    raise FileNotFoundError(
        f"no benchmarks/ in {Path.cwd()}: they are part of the repository, not of the package. "
        "Run `cellops bench` from the root of a clone"
    )


def bench(arguments: Sequence[str]) -> int:
    """Run the benchmarks through pytest and return its exit code."""
    missing = [name for name in ("pytest", "pytest_benchmark") if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"cellops bench needs {', '.join(missing)}: pip install 'cellops[models,test]'")
    folder = benchmarks_folder()
    command = [sys.executable, "-m", "pytest", folder.name, "--benchmark-only", *arguments]
    return subprocess.run(command, cwd=folder.parent).returncode


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a name that is no UTF-8 must not end a job
    command = parser()
    known, others = command.parse_known_args(arguments)
    if others and known.command != "bench":
        command.error(f"unrecognized arguments: {' '.join(others)}")
    if known.version:
        from cellops import __version__

        print(f"cellops {__version__}")
        return 0
    if known.command == "doctor":
        from cellops.models import doctor

        return report_errors(known.command, doctor.main)
    if known.command == "bench":
        try:
            return bench(others)
        except (FileNotFoundError, ModuleNotFoundError) as error:
            print(f"cellops bench: {error}", file=sys.stderr)
            return 2
    if known.command in COMMANDS:
        module = importlib.import_module(f"cellops.models.commands.{known.command}")
        return report_errors(known.command, lambda: module.run(known))
    command.print_help()
    return 2
