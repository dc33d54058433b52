"""`cellops evaluate`: a trained run on other images, or on its own held-out ones again."""

from __future__ import annotations

import argparse

from cellops.models.commands import bad_input, given_path, need_models_extra, not_empty

HELP = "measure a trained run on labelled images"
EXAMPLES = """\
examples:
  cellops evaluate runs/pbc                                  its own held-out images again
  cellops evaluate runs/pbc --tta dihedral                   each image seen in eight ways
  cellops evaluate runs/pbc --data other_hospital/           every image of another folder, with the same class names

--data may hold images that the network was trained on: the output and metrics.json say how many.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("run", type=given_path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--data", type=not_empty, metavar="DIR", help="labelled images; without it the run's own held-out part"
    )
    parser.add_argument("--layout", default="auto", help="of --data (auto)")
    parser.add_argument("--tta", choices=("none", "flips", "dihedral"), help="views of each image (the recipe's)")
    parser.add_argument("--output", type=given_path, metavar="DIR", help="folder of the results (RUN/evaluation)")
    parser.add_argument("--overwrite", action="store_true", help="replace the results in --output")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, and return the exit code."""
    need_models_extra()
    from cellops.models.training.apply import evaluate_run
    from cellops.models.training.console import Output

    with bad_input():
        evaluate_run(
            arguments.run,
            arguments.data,
            arguments.layout,
            arguments.tta,
            arguments.output,
            Output(quiet=False),
            arguments.overwrite,
        )
    return 0
