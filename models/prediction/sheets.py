"""Contact sheets of predictions: the images with their classes, and what the networks look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cellops.models.data import read_image
from cellops.models.data.images import ImageError
from cellops.models.data.store import resized
from cellops.models.prediction.predictor import OnnxNetwork, Predictor
from cellops.models.report.mistakes import deepest_maps, grad_cam, overlay
from cellops.models.report.sheet import contact_sheet

SIDE = 128
AT_A_TIME = 8
MOST = 1024  # tiles of 48 KiB

Row = tuple[Path, str, float]
"""File, class and confidence."""


def check_gradcam(predictor: Predictor) -> None:
    """Say at once that a predictor has nothing for Grad-CAM to show.

    Raises:
        ValueError: it runs an ONNX file, or a network has no maps.
    """
    if any(isinstance(network, OnnxNetwork) for network in predictor.networks):
        raise ValueError("--gradcam needs gradients, which an .onnx file has not: give the run")
    example = torch.zeros(1, 3, *predictor.preparation.input_size, device=predictor.device)
    if any(deepest_maps(network, example) is None for network in predictor.networks):
        raise ValueError("--gradcam needs a network with maps of features, which this one has not")


def write_contact_sheet(rows: Sequence[Row], path: Path) -> None:
    """The images of some rows, each over its class; one that is no longer there is left out."""
    tiles, captions = [], []
    for file, predicted, confidence in rows:
        try:
            tiles.append(resized(read_image(file), (SIDE, SIDE), "pad"))
        except ImageError:
            continue
        captions.append(f"{predicted} {confidence:.0%}")
    if tiles:
        contact_sheet(tiles, captions, path)


def write_gradcam_sheet(predictor: Predictor, rows: Sequence[Row], path: Path) -> None:
    """The images of some rows as the network sees them, each beside its Grad-CAM for the predicted class.

    Of several networks the mean of their maps is shown.
    """
    tiles: list[np.ndarray] = []
    captions: list[str] = []
    for start in range(0, len(rows), AT_A_TIME):
        read = []
        for row in rows[start : start + AT_A_TIME]:
            try:
                read.append((row, read_image(row[0])))
            except ImageError:
                continue
        if not read:
            continue
        images = torch.stack([predictor.preparation(image) for _, image in read]).to(predictor.device)
        labels = torch.tensor([predictor.classes.index(row[1]) for row, _ in read], device=predictor.device)
        maps = [grad_cam(network, images, labels) for network in predictor.networks]
        heats = np.mean([found for found in maps if found is not None], axis=0)
        plain = predictor.preparation.without_normalisation()
        for (row, image), heat in zip(read, heats, strict=True):
            pixels = (255 * plain(image).permute(1, 2, 0)).round().clamp(0, 255).byte().numpy()
            tiles += [_tile(pixels), _tile(overlay(pixels, heat))]
            captions += [f"{row[1]} {row[2]:.0%}", "Grad-CAM"]
    if tiles:
        contact_sheet(tiles, captions, path)


def _tile(pixels: np.ndarray) -> np.ndarray:
    scale = SIDE / max(pixels.shape[:2])
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    return resized(np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)), (SIDE, SIDE), "pad")
