"""`cellops predict`: classes for images without labels."""

from __future__ import annotations

import argparse
from pathlib import Path

from cellops.models.commands import FAILED, INTERRUPTED, CommandError, bad_input, given_path, need_models_extra

HELP = "classify images: a CSV file and a contact sheet"
EXAMPLES = """\
examples:
  cellops predict runs/demo cell.png other.jpg
  cellops predict runs/pbc new_slides/ --output new_slides_predicted --gradcam 32
  cellops predict runs/pbc new_slides/ --output new_slides_predicted --resume   after Ctrl-C, a crash or kill -9
  cellops predict runs/pbc/weights.safetensors new_slides/ --tta flips
  cellops predict cells_int8.onnx new_slides/                    a file that `cellops export` wrote of a run
  cellops predict runs/pbc /shared/slides/ --engine ray --address auto      on the machines of a Ray cluster

Any number of images: they are read while the ones before them are predicted. The exit code is 0 where all were
predicted, 1 if some could not be read (unreadable.csv names them and says why; the others are in the table) or the
results could not be written to the end, 2 for bad input, before anything is written, and 130 after Ctrl-C.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument(
        "run", type=given_path, metavar="RUN", help="folder of a run, its weights, or an .onnx file of it"
    )
    parser.add_argument("images", type=given_path, nargs="+", metavar="IMAGE|DIR", help="images, or folders of images")
    parser.add_argument("--output", type=given_path, default=Path("predictions"), metavar="DIR", help="(predictions)")
    parser.add_argument("--resume", action="store_true", help="go on with the results in --output, if there are any")
    parser.add_argument("--overwrite", action="store_true", help="replace the results in --output")
    parser.add_argument("--tta", choices=("none", "flips", "dihedral"), help="1, 4 or 8 views of each (the recipe's)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="(64)")
    parser.add_argument("--sheet", type=int, default=64, metavar="N", help="images on the contact sheet (64)")
    parser.add_argument("--gradcam", type=int, default=0, metavar="N", help="images on a sheet of Grad-CAMs (0)")
    parser.add_argument("--engine", choices=("local", "ray"), default="local", help="who does the work (local)")
    parser.add_argument("--address", metavar="HOST:PORT|auto", help="of a Ray cluster (Ray is started here)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes of Ray (one a core)")


def run(arguments: argparse.Namespace) -> int:
    """Predict, and return the exit code."""
    need_models_extra()
    from cellops.models.prediction.job import Settings, Unfinished, predict_images
    from cellops.models.prediction.on_ray import EngineError
    from cellops.models.training.console import Output

    settings = Settings(
        tta=arguments.tta,
        batch_size=arguments.batch_size,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        sheet=arguments.sheet,
        gradcam=arguments.gradcam,
        engine=arguments.engine,
        address=arguments.address,
        workers=arguments.workers,
    )
    try:
        with bad_input():
            unreadable = predict_images(
                arguments.run, arguments.images, arguments.output, settings, Output(quiet=False)
            )
    except (EngineError, Unfinished) as error:
        raise CommandError(f"{error}; the same command with --resume goes on", FAILED) from error
    except KeyboardInterrupt:
        raise CommandError("interrupted; the same command with --resume goes on", INTERRUPTED) from None
    return FAILED if unreadable else 0
