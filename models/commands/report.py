"""`cellops report`: the report of a run again, also while it is still training."""

from __future__ import annotations

import argparse

from cellops.models.commands import bad_input, given_path, need_models_extra

HELP = "write the report of a run again"
EXAMPLES = """\
examples:
  cellops report runs/pbc                also of a run that is not complete: with what is there
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("run", type=given_path, metavar="RUN", help="folder of a run")


def run(arguments: argparse.Namespace) -> int:
    """Write the report, and return the exit code."""
    need_models_extra()
    from cellops.models.report import write_report

    with bad_input():
        print(write_report(arguments.run))
    return 0
