"""`cellops predict`: classes for images without labels."""

from __future__ import annotations

import argparse
from pathlib import Path

from cellops.models.commands import FAILED, bad_input, need_models_extra

HELP = "classify images: a CSV file and a contact sheet"
EXAMPLES = """\
examples:
  cellops predict runs/demo cell.png other.jpg
  cellops predict runs/pbc new_slides/ --output new_slides_predicted
  cellops predict runs/pbc/weights.safetensors new_slides/ --tta flips

The exit code is 1 if images could not be read; they are listed, and the others are in the table.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, or its weights.safetensors")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE|DIR", help="images, or folders of images")
    parser.add_argument("--output", type=Path, default=Path("predictions"), metavar="DIR", help="(predictions)")
    parser.add_argument("--tta", choices=("none", "flips", "dihedral"), help="views of each image (the recipe's)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="(64)")
    parser.add_argument("--sheet", type=int, default=64, metavar="N", help="images on the contact sheet (64)")


def run(arguments: argparse.Namespace) -> int:
    """Predict, and return the exit code."""
    need_models_extra()
    from cellops.models.training.apply import predict_images
    from cellops.models.training.console import Output

    with bad_input():
        unreadable = predict_images(
            arguments.run,
            arguments.images,
            arguments.output,
            arguments.tta,
            arguments.batch_size,
            arguments.sheet,
            Output(quiet=False),
        )
    return FAILED if unreadable else 0
