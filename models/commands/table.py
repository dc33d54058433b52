"""`cellops table`: every row of a paper's table, as far as the time goes."""

from __future__ import annotations

import argparse
from pathlib import Path

from cellops.models.commands import (
    FAILED,
    INTERRUPTED,
    CommandError,
    bad_input,
    given_path,
    need_models_extra,
    not_empty,
)

HELP = "train every row of a paper's table, resumably"
EXAMPLES = """\
examples:
  cellops table                                        the tables there are
  cellops table hybrid_loss --data SIPaKMeD --twin scratch --hours 8
                                                       the same command again goes on where it stopped
  cellops table hybrid_loss --data synthetic --twin scratch --epochs 1 --set data.input_size=64
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="of a table; without it they are listed")
    parser.add_argument("--data", type=not_empty, metavar="DIR|synthetic", help="folder of the images")
    parser.add_argument("--hours", type=float, metavar="H", help="stop after H hours, to be gone on with")
    parser.add_argument(
        "--twin", default="", metavar="SUFFIX", help="the rows' twins: scratch needs no pretrained weights"
    )
    parser.add_argument("--rows", metavar="TEXT", help="only rows whose recipe has this in its name")
    parser.add_argument("--parts", type=int, metavar="N", help="only the first N folds of a row, over all protocols")
    parser.add_argument("--epochs", type=int, metavar="N", help="another number of epochs")
    parser.add_argument("--protocol", choices=("grouped", "paper", "both"), help="how images are split")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting; may be repeated")
    parser.add_argument("--output", type=given_path, metavar="DIR", help="folder of the runs (runs/tables/NAME)")


def run(arguments: argparse.Namespace) -> int:
    """Train the rows, and return the exit code."""
    from cellops.models.commands.train import overrides

    with bad_input():
        from cellops.models.training.tables import table_names

        if arguments.name is None:
            print("\n".join(f"{name:<18}{title}" for name, title in table_names().items()))
            return 0
    need_models_extra()
    from cellops.models.training.checkpoint import CheckpointError
    from cellops.models.training.console import Output
    from cellops.models.training.stopping import Interrupted
    from cellops.models.training.tables import load_table, train_table

    with bad_input():
        table = load_table(arguments.name)
        if arguments.parts is not None and arguments.parts < 1:
            raise ValueError(f"--parts must be at least 1, got {arguments.parts}")
        if arguments.data is None:
            raise ValueError(f"no data given: --data DIR, for this table {table.data}")
        arguments.model = None
        changes = overrides(arguments)
    folder = arguments.output or Path("runs") / "tables" / arguments.name
    try:
        with bad_input():
            failed = train_table(
                table, folder, changes, arguments.twin, arguments.hours, arguments.rows, Output(), arguments.parts
            )
    except Interrupted as stopped:
        raise CommandError(f"{stopped}; saved. The same command goes on.", INTERRUPTED) from None
    except CheckpointError as error:
        raise CommandError(str(error), FAILED) from None
    return FAILED if failed else 0
