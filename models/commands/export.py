"""`cellops export`: a network as a file for other runtimes."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellops.models.commands import FAILED, CommandError, bad_input, given_path, need_models_extra, not_empty

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cellops.models.prediction.preparation import Preparation

HELP = "write a network as ONNX, in float32 or 8 bits, as a program of torch.export, or as weights to hand over"
EXAMPLES = """\
examples:
  cellops export runs/demo --output cells.onnx            standard operators, any batch size, checked with onnxruntime
  cellops export runs/demo --output cells.onnx --images new_slides/   checked on these images too
  cellops export runs/demo --output cells_int8.onnx --int8       8 bits; accuracy before and after is measured
  cellops export runs/demo --output cells_int8.onnx --int8 --calibrate new_slides/   ranges from these images
  cellops export dresnet --classes 8 --size 224 --output dresnet.onnx   a new network of the zoo
  cellops export runs/demo --output cells.pt2             for torch.export.load("cells.pt2").module(), without its code
  cellops export runs/demo --output cells.pt2 --train     the same, to be trained further
  cellops export runs/demo --output cells.safetensors     its weights for `cellops predict`, without paths and notes

Images must be scaled and normalised before as in training; an ONNX file of a run says how in its metadata, which
`cellops predict cells.onnx` reads.
"""
FORMATS = ("onnx", "pt2", "safetensors")
LOST = 0.02
"""Accuracy whose loss is worth a warning."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument(
        "model", type=not_empty, metavar="MODEL|RUN", help="name of a network, folder of a run, or weights.safetensors"
    )
    parser.add_argument("--output", type=given_path, required=True, metavar="FILE", help="file to write")
    parser.add_argument("--format", choices=FORMATS, help="(from the end of FILE)")
    parser.add_argument("--size", type=int, nargs="+", metavar="N", help="height [width] (the run's, or 224)")
    parser.add_argument("--classes", type=int, metavar="K", help="of a new network (1000)")
    parser.add_argument(
        "--images", type=given_path, nargs="+", metavar="IMAGE|DIR", help="check on these too; of a run only"
    )
    parser.add_argument("--int8", action="store_true", help="onnx, of a run: weights and activations in 8 bits")
    parser.add_argument(
        "--calibrate",
        type=given_path,
        nargs="+",
        metavar="IMAGE|DIR",
        help="int8: find ranges on these (training images)",
    )
    parser.add_argument("--calibration-images", type=int, default=128, metavar="N", help="int8: so many of them (128)")
    parser.add_argument("--fixed-batch", action="store_true", help="one image at a time, where a runtime needs to know")
    parser.add_argument("--train", action="store_true", help="pt2: the network in training mode")
    parser.add_argument("--no-check", action="store_true", help="do not run the file")


def run(arguments: argparse.Namespace) -> int:
    """Write the file, and return the exit code."""
    need_models_extra()
    from cellops.models.export import ExportError, export_onnx, export_program, export_weights

    with bad_input():
        kind = arguments.format or arguments.output.suffix.removeprefix(".")
        _check(arguments, kind)
        if kind == "safetensors":
            print(f"{export_weights(arguments.model, arguments.output)}: {arguments.output.stat().st_size:,} bytes")
            return 0
        model, size, metadata, images = _load(arguments)
        common: dict[str, Any] = {"dynamic_batch": not arguments.fixed_batch, "check": not arguments.no_check}
        try:
            if arguments.int8:
                print(_write_int8(arguments, model, size, metadata, images))
            elif kind == "onnx":
                print(export_onnx(model, arguments.output, size, metadata=metadata, images=images, **common))
            else:
                print(export_program(model, arguments.output, size, train=arguments.train, **common))
        except ExportError as error:
            raise CommandError(str(error), FAILED) from None
    return 0


def _check(arguments: argparse.Namespace, kind: str) -> None:
    if kind not in FORMATS:
        raise ValueError(f"--format is not given and {arguments.output} does not end in .onnx, .pt2 or .safetensors")
    if kind == "safetensors" and (arguments.size or arguments.classes or arguments.no_check or arguments.fixed_batch):
        raise ValueError("--size, --classes, --no-check and --fixed-batch are not of --format safetensors")
    if arguments.train and kind != "pt2":
        raise ValueError("--train is of --format pt2: ONNX is written for evaluation")
    if arguments.images and (kind != "onnx" or arguments.no_check):
        raise ValueError("--images are to check an ONNX file")
    if arguments.int8 and (kind != "onnx" or arguments.fixed_batch or arguments.no_check):
        raise ValueError("--int8 is of --format onnx, with any batch size, and is always checked")
    if arguments.int8 and not Path(arguments.model).exists():
        raise ValueError(f"--int8 needs a trained run, and there is none at {arguments.model}")
    if arguments.int8 and arguments.size is not None:
        raise ValueError("--int8 takes images of the run's size, on which it is judged: leave --size out")
    if arguments.calibrate and not arguments.int8:
        raise ValueError("--calibrate is of --int8")
    if arguments.calibration_images < 1:
        raise ValueError(f"--calibration-images must be at least 1, got {arguments.calibration_images}")


def _load(arguments: argparse.Namespace) -> tuple[nn.Module, tuple[int, int, int], dict[str, str], Tensor | None]:
    """The network, its input's size, what the file shall say about it, and the images to check on."""
    from cellops.models import create_model

    path = Path(arguments.model)
    if not path.exists():
        if os.sep in arguments.model:  # of which no network has one in its name
            raise ValueError(f"there is no run, and no file of weights, {path}")
        if arguments.images:
            raise ValueError("--images need a run, which says how images are scaled and normalised")
        classes = 1000 if arguments.classes is None else arguments.classes
        model = create_model(arguments.model, num_classes=classes)
        return model, (3, *_size(arguments.size or [224])), {"model": arguments.model}, None
    if arguments.classes is not None:
        raise ValueError("--classes are those of the run")
    import torch

    from cellops.models.prediction.preparation import Preparation
    from cellops.models.training.apply import load_trained
    from cellops.models.training.run import activation

    trained = load_trained(path, torch.device("cpu"))
    if len(trained.models) > 1:
        files = ", ".join(str(folder / "weights.safetensors") for folder in trained.folders[:3])
        raise ValueError(f"{path} has {len(trained.models)} networks, one a fold: give the weights of one, as {files}")
    recipe = trained.recipe
    size = _size(arguments.size or list(recipe.data.input_size))
    preparation = Preparation.of(recipe).with_input_size(size)
    metadata = {
        "model": recipe.model.name,
        "classes": json.dumps(trained.classes, ensure_ascii=False),
        "activation": activation(recipe),
        "resize": recipe.data.resize,
        "normalise": json.dumps(recipe.augmentation.get("normalise", "imagenet")),
        "preparation": json.dumps(preparation.values()),
        "trained_on_synthetic_images": str(trained.synthetic),
    }
    images = None if arguments.images is None else _read(arguments.images, preparation, 64)
    return trained.models[0], (3, *size), metadata, images


def _size(given: list[int]) -> tuple[int, int]:
    if len(given) > 2 or min(given) < 1:
        raise ValueError("--size takes one or two positive integers")
    return given[0], given[-1]


def _read(paths: list[Path], preparation: Preparation, limit: int) -> Tensor:
    """Images as the run's network sees them, [N, 3, H, W]; spread over the listing, which may be by class."""
    import torch

    from cellops.models.data import read_image
    from cellops.models.prediction.files import image_files

    files = [path for path, _ in image_files(paths)]
    count = min(limit, len(files))
    chosen = [files[index * len(files) // count] for index in range(count)]
    return torch.stack([preparation(read_image(path)) for path in chosen])


def _write_int8(
    arguments: argparse.Namespace,
    model: nn.Module,
    size: tuple[int, int, int],
    metadata: dict[str, str],
    images: Tensor | None,
) -> str:
    """Quantise, judge both files on the run's held-out images, and say what came of it."""
    from cellops.models.export import export_onnx
    from cellops.models.prediction.preparation import Preparation
    from cellops.models.quantize import compare, quantize_onnx
    from cellops.models.training.apply import run_images
    from cellops.models.training.console import Output

    own = run_images(Path(arguments.model), Output(quiet=False))
    if arguments.calibrate:
        preparation = Preparation.from_values(json.loads(metadata["preparation"]))
        calibration = _read(arguments.calibrate, preparation, arguments.calibration_images)
    else:
        calibration = own.training(arguments.calibration_images)
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "float32.onnx"
        export_onnx(model, plain, size, metadata=metadata, images=images)
        quantize_onnx(plain, arguments.output, calibration)
        before, after = compare([plain, arguments.output], own.judged())
    assert before.accuracy is not None and after.accuracy is not None
    lines = [
        f"{arguments.output}: {after.size / 2**20:.2f} MiB, in float32 {before.size / 2**20:.2f} MiB; "
        f"ranges from {len(calibration)} images",
        f"accuracy on {after.images} held-out images: {after.accuracy:.1%}, in float32 {before.accuracy:.1%}; "
        f"the same answer for {after.agreement:.1%}",
        f"one image on one core: {1e3 * after.latency:.1f} ms, in float32 {1e3 * before.latency:.1f} ms",
    ]
    if after.accuracy < before.accuracy - LOST:
        lines.append("warning: 8 bits cost accuracy here; keep the float32 file, or calibrate on more images")
    return "\n".join(lines)
