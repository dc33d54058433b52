"""A trained network in three lines.

from cellops.models import Predictor
for row in Predictor.load("runs/demo")("new_slides/"):
    print(row.image, row.predicted, row.confidence)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cellops.models.data import Batch, read_image
from cellops.models.data.images import ImageError
from cellops.models.data.parallel import available_cores, ordered_map
from cellops.models.prediction.files import image_files
from cellops.models.prediction.preparation import Preparation
from cellops.models.training.checkpoint import file_hash
from cellops.models.training.network import TURNS, predict_batches

BATCH_SIZE = 64
ACTIVATIONS = ("softmax", "sigmoid")

Name = Path | int
"""Of an image: its file, or its number where arrays were given."""
Note = Callable[[Path, str], object]
"""Called with a file that cannot be read and the reason."""


@dataclass(frozen=True)
class Prediction:
    """What the network says about one image.

    Attributes:
        image: its file, or its number from 0 where arrays were given.
        predicted: name of the most probable class.
        confidence: its probability.
        probabilities: of every class, in the network's order.
    """

    image: Name
    predicted: str
    confidence: float
    probabilities: dict[str, float]


class Predictor:
    """Networks with what they need to classify an image file; see `load`.

    Args:
        networks: each gives logits [N, K] of images [N, 3, H, W]; their probabilities are averaged.
        classes: K names.
        preparation: from a decoded image to the network's input.
        activation: "softmax" or "sigmoid", see `network.probabilities`.
        tta: views of an image, whose probabilities are averaged: "none"; "flips", 4: as it is, mirrored left to right,
            top to bottom and both; "dihedral", 8: these also turned by 90 degrees.
        device: where the networks are.
        synthetic: whether they were trained on drawn images.
        weights: SHA-256 of each file of weights; part of `settings`.

    Raises:
        ValueError: `tta` or `activation` is unknown, or `classes` are not two texts or more that differ.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        classes: Sequence[str],
        preparation: Preparation,
        activation: str = "softmax",
        tta: str = "none",
        device: torch.device | str = "cpu",
        synthetic: bool = False,
        weights: Sequence[str] = (),
    ) -> None:
        if tta not in TURNS:
            raise ValueError(f"tta must be one of {', '.join(TURNS)}, got {tta!r}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        if isinstance(classes, str) or not all(isinstance(name, str) and name for name in classes):
            raise ValueError(f"classes must be names, got {classes!r}")
        if len(set(classes)) != len(classes) or len(classes) < 2:
            raise ValueError(f"classes must be two or more that differ, got {list(classes)}")
        self.device = torch.device(device)
        self.networks = [network.to(self.device).eval() for network in networks]
        self.classes, self.preparation = tuple(classes), preparation
        self.activation, self.tta, self.synthetic = activation, tta, synthetic
        self.settings: dict[str, Any] = {
            "weights": list(weights),
            "classes": list(classes),
            "activation": activation,
            "tta": tta,
            "preparation": preparation.values(),
        }
        """What the probabilities depend on, as JSON can hold it."""

    @classmethod
    def load(cls, run: str | Path, tta: str | None = None, device: str = "auto") -> Predictor:
        """The networks of a run.

        Args:
            run: folder of a run (the mean of its folds), one `weights.safetensors` of it, or an .onnx file that
                `cellops export` wrote of it, which runs on the CPU.
            tta: views of each image; None for the recipe's ("none" of an .onnx file).
            device: "auto", "cpu", "cuda", ...

        Raises:
            ValueError: there is nothing trained, the device is not there, the networks of the folds have other classes
                or preparations, or a file changes while it is read.
            CheckpointError: the weights are damaged, hold NaN, or are not from `cellops train`.
            ModuleNotFoundError: an .onnx file is given and onnxruntime is not installed.
        """
        run = Path(run)
        if run.suffix == ".onnx":
            return _from_onnx(run, tta or "none")
        from cellops.models.training.apply import load_trained, weight_files
        from cellops.models.training.ranks import Ranks
        from cellops.models.training.run import activation

        found = Ranks(device).device
        files = weight_files(run)
        before = _states(files)
        trained = load_trained(run, found, tta)
        hashes = [file_hash(path) for path in files]
        if weight_files(run) != files or _states(files) != before:
            raise ValueError(f"{run} was written anew while it was read: try again")
        return cls(
            trained.models,
            trained.classes,
            Preparation.of(trained.recipe),
            activation(trained.recipe),
            trained.recipe.evaluation.tta,
            found,
            trained.synthetic,
            hashes,
        )

    def __call__(
        self,
        images: str | Path | Iterable[str | Path | np.ndarray],
        batch_size: int = BATCH_SIZE,
        unreadable: Note | None = None,
    ) -> Iterator[Prediction]:
        """Classify images, while they are read: a few batches are held at a time, however many there are.

        Args:
            images: a file or folder, several of them, or arrays uint8 [H, W, 3] in RGB; a generator is read as needed.
            batch_size: images at a time.
            unreadable: called with a file that cannot be read and the reason; the others go on. Without it the first
                such file is an error.

        Raises:
            ValueError: `batch_size` is less than 1, a path does not exist, or a folder holds no image.
            ImageError: an image cannot be read, or the networks give no number for it, and there is no `unreadable`.
        """
        return (row for batch in self.batches(sources(images), batch_size, unreadable) for row in batch)

    def batches(
        self, found: Iterable[tuple[Name, np.ndarray | str | None]], batch_size: int, unreadable: Note | None = None
    ) -> Iterator[list[Prediction]]:
        """The same by batches, of images with their names.

        Args:
            found: each with its pixels, None to read them from the file of its name, or why it cannot be read.
            batch_size: images at a time.
            unreadable: as of a call.

        Raises:
            ValueError, ImageError: as of a call.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        return self._batches(self._inputs(found, unreadable), batch_size, unreadable)

    def prediction(self, name: Name, probabilities: np.ndarray) -> Prediction:
        """Probabilities [K] of an image as a row."""
        best = int(probabilities.argmax())
        values = dict(zip(self.classes, probabilities.tolist(), strict=True))
        return Prediction(name, self.classes[best], float(probabilities[best]), values)

    def probabilities(self, images: Tensor) -> np.ndarray:
        """The mean over networks and views [N, K] in float64, of inputs [N, 3, height, width]."""
        count = len(images)
        batch = Batch(
            images=images,
            targets=torch.zeros(count, dtype=torch.int64),
            index=torch.arange(count),
            valid=torch.ones(count, dtype=torch.bool),
        )
        mean: Any = 0
        for network in self.networks:
            _, rows = predict_batches(network, [batch], self.device, self.activation, self.tta)
            mean = mean + rows / len(self.networks)
        return mean

    def _batches(
        self, inputs: Iterator[tuple[Name, Tensor]], batch_size: int, unreadable: Note | None
    ) -> Iterator[list[Prediction]]:
        while waiting := list(islice(inputs, batch_size)):
            rows = self.probabilities(torch.stack([image for _, image in waiting]))
            known = np.isfinite(rows).all(1)  # of NaN, `argmax` would make the first class
            for (name, _), good in zip(waiting, known, strict=True):
                if not good:
                    _leave_out(name, ImageError(f"{name}: the network's answer is not a number"), unreadable)
            yield [
                self.prediction(name, row) for (name, _), row, good in zip(waiting, rows, known, strict=True) if good
            ]

    def _inputs(
        self, found: Iterable[tuple[Name, np.ndarray | str | None]], unreadable: Note | None
    ) -> Iterator[tuple[Name, Tensor]]:
        """Names and inputs of what can be read, decoded in threads."""

        def prepared(item: tuple[Name, np.ndarray | str | None]) -> tuple[Name, Tensor | ImageError]:
            name, source = item
            try:
                if isinstance(source, str):
                    raise ImageError(source)
                return name, self.preparation(pixels_of(name, source))
            except ImageError as error:
                return name, error

        for name, image in ordered_map(prepared, found, available_cores()):
            if isinstance(image, ImageError):
                _leave_out(name, image, unreadable)
            else:
                yield name, image


def _leave_out(name: Name, error: ImageError, unreadable: Note | None) -> None:
    if unreadable is None:
        raise error
    unreadable(Path(str(name)), str(error))


def _states(files: Sequence[Path]) -> list[tuple[int, int, int]]:
    """By which a file that is written or put in the place of another is noticed."""
    return [(state.st_ino, state.st_size, state.st_mtime_ns) for state in (path.stat() for path in files)]


def pixels_of(name: Name, source: np.ndarray | None) -> np.ndarray:
    """An image as uint8 [H, W, 3].

    Raises:
        ImageError: the file cannot be read, or the array is of another kind.
    """
    if source is None:
        return read_image(Path(str(name)))
    if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
        raise ImageError(f"image {name}: must be uint8 [H, W, 3], got {source.dtype} {list(source.shape)}")
    return source


def sources(
    images: str | Path | Iterable[str | Path | np.ndarray],
) -> Iterator[tuple[Name, np.ndarray | str | None]]:
    """What a call of a `Predictor` takes, one image at a time; a path is looked at now."""
    return image_files([images]) if isinstance(images, str | Path) else _several(images)


def _several(images: Iterable[str | Path | np.ndarray]) -> Iterator[tuple[Name, np.ndarray | str | None]]:
    for number, item in enumerate(images):
        if isinstance(item, np.ndarray):
            yield number, item
        else:
            yield from image_files([item])


class OnnxNetwork(nn.Module):
    """An ONNX file as a network on the CPU; without gradients.

    Args:
        path: of the file; weights in other files beside it are not read, since its hash would not be theirs.
    """

    def __init__(self, path: Path) -> None:
        from cellops.models.export import onnx_session

        super().__init__()
        content = path.read_bytes()
        self.hash = hashlib.sha256(content).hexdigest()
        self.session = onnx_session(content)
        self.name = self.session.get_inputs()[0].name
        self.fixed = isinstance(self.session.get_inputs()[0].shape[0], int)

    def forward(self, images: Tensor) -> Tensor:
        parts = images.split(1) if self.fixed else [images]
        return torch.cat([torch.from_numpy(self.session.run(None, {self.name: part.numpy()})[0]) for part in parts])

    def check(self, classes: Sequence[str], input_size: tuple[int, int]) -> None:
        """Raise ValueError where the file's input or output is not that of its metadata."""
        takes, gives = self.session.get_inputs()[0], self.session.get_outputs()[0]
        if takes.type != "tensor(float)" or not _fits(takes.shape, (None, 3, *input_size)):
            raise ValueError(f"its input is {takes.type} {takes.shape}, not float32 [N, 3, {input_size}]")
        if not (_fits(gives.shape, (None, len(classes))) or (len(classes) == 2 and _fits(gives.shape, (None, 1)))):
            raise ValueError(f"its output is {gives.shape}, not the logits of {len(classes)} classes")


def _fits(shape: Sequence[int | str | None], wanted: Sequence[int | None]) -> bool:
    """Whether the sizes that a shape names are those that are wanted."""
    return len(shape) == len(wanted) and all(
        known == side for known, side in zip(shape, wanted, strict=True) if isinstance(known, int) and side is not None
    )


def _from_onnx(path: Path, tta: str) -> Predictor:
    from importlib.util import find_spec

    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    if find_spec("onnxruntime") is None:
        raise ModuleNotFoundError("an .onnx file needs onnxruntime: pip install onnxruntime")
    try:
        network = OnnxNetwork(path)
        said = network.session.get_modelmeta().custom_metadata_map
    except Exception as error:  # onnxruntime's own kinds
        raise ValueError(f"{path} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    if not {"classes", "activation", "preparation"} <= said.keys():
        raise ValueError(f"{path} does not say how images are prepared: export it from a run with `cellops export`")
    try:
        preparation, classes = Preparation.from_values(json.loads(said["preparation"])), json.loads(said["classes"])
        synthetic = said.get("trained_on_synthetic_images") == "True"
        predictor = Predictor(
            [network], classes, preparation, said["activation"], tta, "cpu", synthetic, [network.hash]
        )
        network.check(predictor.classes, preparation.input_size)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error
    height, width = preparation.input_size
    if tta == "dihedral" and height != width:
        raise ValueError(
            f"tta must be none or flips for an .onnx file of {height} x {width}: turned views do not fit it"
        )
    return predictor
