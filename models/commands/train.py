"""`cellops train`: a recipe, a data set, and at the end a report."""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

from cellops.models.commands import (
    FAILED,
    INTERRUPTED,
    CommandError,
    bad_input,
    given_path,
    need_models_extra,
    not_empty,
)

HELP = "train a recipe on a folder of images and write a report"
EXAMPLES = """\
examples:
  cellops train --recipe demo                               drawn cells; two minutes; try this first
  cellops train --recipe pbc --data images/                 images/CLASS/*.png, or another layout it knows
  cellops train --recipe hybrid_ghostnet_scratch --data SIPaKMeD --epochs 5 --set training.batch_size=32
  cellops train --recipe pbc --data images/ --model resnet18 --output runs/resnet18
  cellops train --resume --output runs/resnet18             after Ctrl-C, a crash or kill -9: goes on exactly
  cellops train --recipe pbc --data images/ --find-learning-rate
  torchrun --nproc-per-node 2 -m cellops.models train --recipe pbc --data images/ --output runs/two
  torchrun --nproc-per-node 8 -m cellops.models train --recipe hqnet --data SIPaKMeD --output runs/hqnet \\
      --set training.distributed=fsdp                       each process holds an eighth of every weight

`cellops recipes` lists the recipes, `cellops recipes NAME` prints one with every key that --set takes.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("--recipe", metavar="NAME|FILE", help="a shipped recipe or a YAML file")
    parser.add_argument(
        "--data", type=not_empty, metavar="DIR|synthetic", help="folder of the images, or synthetic for drawn cells"
    )
    parser.add_argument("--model", metavar="NAME", help="another network: `cellops models` lists them")
    parser.add_argument("--epochs", type=int, metavar="N", help="another number of epochs")
    parser.add_argument("--protocol", choices=("grouped", "paper", "both"), help="how images are split; both runs two")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting; may be repeated")
    parser.add_argument("--output", type=given_path, metavar="DIR", help="folder of the run (runs/RECIPE)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output")
    parser.add_argument("--hours", type=float, metavar="H", help="stop after H hours, to be resumed")
    parser.add_argument("--stop-after", type=int, metavar="N", help="stop after N epochs, to be resumed")
    parser.add_argument("--find-learning-rate", action="store_true", help="try learning rates on this recipe and stop")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


def overrides(arguments: argparse.Namespace) -> list[str]:
    """The command line's short forms as settings; --set goes last."""
    short: list[tuple[str, Any]] = [
        ("data.path", arguments.data),
        ("model.name", arguments.model),
        ("training.epochs", arguments.epochs),
        ("data.protocol", arguments.protocol),
    ]
    return [f"{key}={_quoted(value)}" for key, value in short if value is not None] + arguments.set


def _quoted(value: Any) -> str:
    """A value as YAML; a folder named 2024 stays a text."""
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else str(value)


def run(arguments: argparse.Namespace) -> int:
    """Train, and return the exit code."""
    need_models_extra()
    from cellops.models.training.checkpoint import CheckpointError
    from cellops.models.training.console import Output
    from cellops.models.training.recipe import load_recipe
    from cellops.models.training.run import prepare
    from cellops.models.training.stopping import Interrupted

    with bad_input():
        if arguments.recipe is None and not arguments.resume:
            raise ValueError("no recipe given: --recipe demo needs nothing more, `cellops recipes` lists the others")
        changes = overrides(arguments)
        recipe = load_recipe(arguments.recipe, changes) if arguments.recipe else None
        session = prepare(recipe, arguments.output, arguments.resume, Output(arguments.quiet), changes)
    output = session.output
    if arguments.find_learning_rate:
        from cellops.models.training.learning_rate import find_learning_rate

        try:
            find_learning_rate(session)
        finally:
            session.ranks.close()
        return 0
    title = f"{session.recipe.name}: {session.recipe.model.name} on {session.data.name}"
    output.line(f"{title}{' (SYNTHETIC images)' if session.data.synthetic else ''}", style="bold")
    output.line(f"{len(session.data)} images of {len(session.data.classes)} classes -> {session.folder}")
    folds = [note for cut in session.folds.values() for note in cut.notes]
    for note in dict.fromkeys([*session.data.notes, *folds, *session.notes]):
        output.line(f"note: {note}")
    deadline = None if arguments.hours is None else time.monotonic() + 3600 * arguments.hours
    try:
        complete = session.train(arguments.stop_after, deadline)
    except Interrupted as stopped:
        raise CommandError(f"{stopped}; saved. Go on with: {session.resume_command()}", INTERRUPTED) from None
    except (CheckpointError, OSError) as error:
        raise CommandError(f"{error}\nGo on with: {session.resume_command()}", FAILED) from error
    except (ValueError, RuntimeError) as error:  # of a batch or a result that cannot be; NonFiniteLoss among them
        if os.environ.get("CELLOPS_TRACEBACK"):
            raise
        raise CommandError(f"{error}\nSaved in {session.folder}; CELLOPS_TRACEBACK=1 shows where", FAILED) from error
    finally:
        session.ranks.close()
    if not complete:
        output.line(f"not complete; go on with: {session.resume_command()}")
    return 0
