"""`cellops export`: a network as a file for other runtimes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellops.models.commands import FAILED, CommandError, bad_input, need_models_extra

if TYPE_CHECKING:
    from torch import Tensor, nn

HELP = "write a network as ONNX, or as a program of torch.export"
EXAMPLES = """\
examples:
  cellops export runs/demo --output cells.onnx            standard operators, any batch size, checked with onnxruntime
  cellops export runs/demo --output cells.onnx --images new_slides/   checked on these images too
  cellops export dresnet --classes 8 --size 224 --output dresnet.onnx   a new network of the zoo
  cellops export runs/demo --output cells.pt2             for torch.export.load("cells.pt2").module(), without its code
  cellops export runs/demo --output cells.pt2 --train     the same, to be trained further

Images must be scaled and normalised before as in training; an ONNX file of a run says how in its metadata.
"""
FORMATS = ("onnx", "pt2")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("model", metavar="MODEL|RUN", help="name of a network, folder of a run, or weights.safetensors")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="file to write")
    parser.add_argument("--format", choices=FORMATS, help="(from the end of FILE)")
    parser.add_argument("--size", type=int, nargs="+", metavar="N", help="height [width] (the run's, or 224)")
    parser.add_argument("--classes", type=int, metavar="K", help="of a new network (1000)")
    parser.add_argument("--images", type=Path, nargs="+", metavar="IMAGE|DIR", help="check on these too; of a run only")
    parser.add_argument("--fixed-batch", action="store_true", help="one image at a time, where a runtime needs to know")
    parser.add_argument("--train", action="store_true", help="pt2: the network in training mode")
    parser.add_argument("--no-check", action="store_true", help="do not run the file")


def run(arguments: argparse.Namespace) -> int:
    """Write the file, and return the exit code."""
    need_models_extra()
    from cellops.models.export import ExportError, export_onnx, export_program

    with bad_input():
        kind = arguments.format or arguments.output.suffix.removeprefix(".")
        if kind not in FORMATS:
            raise ValueError(f"--format is not given and {arguments.output} does not end in .onnx or .pt2")
        if arguments.train and kind != "pt2":
            raise ValueError("--train is of --format pt2: ONNX is written for evaluation")
        if arguments.images and (kind != "onnx" or arguments.no_check):
            raise ValueError("--images are to check an ONNX file")
        model, size, metadata, images = _load(arguments)
        common: dict[str, Any] = {"dynamic_batch": not arguments.fixed_batch, "check": not arguments.no_check}
        try:
            if kind == "onnx":
                written = export_onnx(model, arguments.output, size, metadata=metadata, images=images, **common)
            else:
                written = export_program(model, arguments.output, size, train=arguments.train, **common)
        except ExportError as error:
            raise CommandError(str(error), FAILED) from None
    print(written)
    return 0


def _load(arguments: argparse.Namespace) -> tuple[nn.Module, tuple[int, int, int], dict[str, str], Tensor | None]:
    """The network, its input's size, what the file shall say about it, and the images to check on."""
    from cellops.models import create_model

    path = Path(arguments.model)
    if not path.exists():
        if arguments.images:
            raise ValueError("--images need a run, which says how images are scaled and normalised")
        classes = 1000 if arguments.classes is None else arguments.classes
        model = create_model(arguments.model, num_classes=classes)
        return model, (3, *_size(arguments.size or [224])), {"model": arguments.model}, None
    if arguments.classes is not None:
        raise ValueError("--classes are those of the run")
    import torch

    from cellops.models.training.apply import load_trained
    from cellops.models.training.run import activation

    trained = load_trained(path, torch.device("cpu"))
    if len(trained.models) > 1:
        files = ", ".join(str(folder / "weights.safetensors") for folder in trained.folders[:3])
        raise ValueError(f"{path} has {len(trained.models)} networks, one a fold: give the weights of one, as {files}")
    recipe = trained.recipe
    size = _size(arguments.size or list(recipe.data.input_size))
    metadata = {
        "model": recipe.model.name,
        "classes": json.dumps(trained.classes, ensure_ascii=False),
        "activation": activation(recipe),
        "resize": recipe.data.resize,
        "normalise": json.dumps(recipe.augmentation.get("normalise", "imagenet")),
        "trained_on_synthetic_images": str(trained.synthetic),
    }
    images = None if arguments.images is None else _read(arguments.images, recipe, size)
    return trained.models[0], (3, *size), metadata, images


def _size(given: list[int]) -> tuple[int, int]:
    if len(given) > 2 or min(given) < 1:
        raise ValueError("--size takes one or two positive integers")
    return given[0], given[-1]


def _read(paths: list[Path], recipe: Any, size: tuple[int, int], limit: int = 64) -> Tensor:
    """Some images as the run's network sees them, [N, 3, H, W]."""
    import torch

    from cellops.models.data import build_augmentation
    from cellops.models.data.images import read_image
    from cellops.models.data.store import resized
    from cellops.models.training.apply import image_files

    stored = recipe.data.store_size or recipe.data.input_size
    augmentation, generator = build_augmentation(recipe.augmentation, size, False), torch.Generator()
    found = []
    for path in image_files(paths)[:limit]:
        pixels = torch.from_numpy(resized(read_image(path), tuple(stored), recipe.data.resize).copy())
        found.append(augmentation(pixels.permute(2, 0, 1), generator))
    return torch.stack(found)
