"""Drawn cells for a machine without data: five classes after the kinds of cell in a Pap smear.

A cell is a stack of absorbing layers on a bright field (Beer and Lambert: densities add, light multiplies), so that
overlapping cells darken each other as on a slide. The classes differ in size of the cell and of the nucleus, halo,
number of nuclei and stain, with overlaps; a neighbour's parts, dust, texture, focus and noise are drawn too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageFilter

from cellops.models.data.samples import CellData, Sample

VERSION = 1  # of the drawing: the same seed draws other images in another version
CELLS_PER_SLIDE = 25

# Density per channel (red, green, blue) of the stains: what is absorbed is what the colour lacks.
CYAN = (0.62, 0.22, 0.20)
PINK = (0.12, 0.55, 0.33)
ORANGE = (0.06, 0.48, 0.86)
HAEMATOXYLIN = (1.05, 1.10, 0.62)


@dataclass(frozen=True)
class CellKind:
    """The look of one class; ranges are drawn from evenly.

    Attributes:
        radius: of the cell, in halves of the image's side.
        nucleus: radius of the nucleus, in radii of the cell.
        nuclei: how many, with equal odds.
        halo: radius of the clearing about the nucleus, in radii of the nucleus; (0, 0) for none.
        stains: of the cytoplasm, with their odds.
        density: of the cytoplasm.
        chromatin: density of the nucleus.
        corners: amplitude of the outline's departure from an ellipse.
    """

    radius: tuple[float, float]
    nucleus: tuple[float, float]
    nuclei: tuple[int, ...]
    halo: tuple[float, float]
    stains: tuple[tuple[tuple[float, float, float], float], ...]
    density: tuple[float, float]
    chromatin: tuple[float, float]
    corners: float


KINDS = {
    "dyskeratotic": CellKind(
        (0.46, 0.70), (0.22, 0.32), (2, 3, 4), (0, 0), ((ORANGE, 0.75), (CYAN, 0.25)), (0.55, 0.95), (0.85, 1.25), 0.10
    ),
    "koilocytotic": CellKind(
        (0.62, 0.84), (0.17, 0.26), (1, 1, 2), (1.7, 2.4), ((CYAN, 0.6), (PINK, 0.4)), (0.45, 0.80), (0.75, 1.15), 0.09
    ),
    "metaplastic": CellKind(
        (0.46, 0.64), (0.28, 0.38), (1,), (0, 0), ((CYAN, 0.85), (PINK, 0.15)), (0.55, 0.95), (0.55, 0.95), 0.06
    ),
    "parabasal": CellKind(
        (0.34, 0.52), (0.46, 0.62), (1,), (0, 0), ((CYAN, 0.85), (PINK, 0.15)), (0.60, 1.00), (0.55, 0.95), 0.04
    ),
    "superficial": CellKind(
        (0.62, 0.88), (0.11, 0.19), (1,), (0, 0), ((PINK, 0.6), (CYAN, 0.4)), (0.30, 0.60), (0.80, 1.25), 0.11
    ),
}
CLASSES = tuple(KINDS)


@dataclass(frozen=True)
class Slide:
    """What the cells of one slide share."""

    light: np.ndarray  # [3], the bright field
    stain: np.ndarray  # [3], how strongly each channel took the stain
    focus: float  # blur, in percent of the image's side


@cache
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels in halves of the side, from -1 to 1: float32 [size, size]."""
    line = np.linspace(-1, 1, size, dtype=np.float32)
    return np.meshgrid(line, line, indexing="ij")  # type: ignore[return-value]


def _slide(seed: int, number: int) -> Slide:
    random = np.random.default_rng((VERSION, seed, 1, number))
    return Slide(
        light=random.uniform(0.80, 0.97) * (1 + random.normal(0, 0.025, 3)),
        stain=random.uniform(0.75, 1.25) * (1 + random.normal(0, 0.12, 3)),
        focus=random.uniform(0.3, 1.2),
    )


def _texture(random: np.random.Generator, size: int, grains: int) -> np.ndarray:
    """Smooth noise of mean 0 and deviation about 1, `grains` lumps across: float32 [size, size]."""
    coarse = Image.fromarray(random.standard_normal((grains, grains)).astype(np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)) * 1.3


def _blob(
    random: np.random.Generator, size: int, centre: np.ndarray, radius: float, corners: float, edge: float
) -> tuple[np.ndarray, np.ndarray]:
    """A wavy ellipse: how far inside each pixel lies (0 to 1 with a soft edge), and its distance in radii.

    Args:
        centre: (row, column) in halves of the side.
        radius: in halves of the side.
        corners: amplitude of the waves.
        edge: width of the soft edge, in halves of the side.
    """
    rows, columns = _grid(size)
    down, right = rows - np.float32(centre[0]), columns - np.float32(centre[1])
    distance = np.sqrt(down * down + right * right) + np.float32(1e-4)
    turn = np.arange(256) * (2 * np.pi / 256)
    outline = 1 + random.uniform(0.0, 0.14) * np.cos(2 * (turn - random.uniform(0, np.pi)))
    for wave in range(3, 8):
        outline += corners * random.normal(0, 1.6 / wave) * np.cos(wave * turn + random.uniform(0, 2 * np.pi))
    sector = (np.arctan2(down, right) * np.float32(128 / np.pi)).astype(np.int32) & 255
    reach = (radius * np.clip(outline, 0.6, 1.5)).astype(np.float32)[sector]
    inside = np.clip((reach - distance) / np.float32(edge) + np.float32(0.5), 0, 1)
    return inside, distance / reach


def _cell(random: np.random.Generator, size: int, kind: CellKind, centre: np.ndarray) -> np.ndarray:
    """The density of one cell: float32 [size, size, 3]."""
    radius = random.uniform(*kind.radius)
    stains, odds = zip(*kind.stains, strict=True)
    stain = np.array(stains[random.choice(len(stains), p=odds)])
    stain = np.maximum(stain * (1 + random.normal(0, 0.12, 3)), 0.02)
    inside, depth = _blob(random, size, centre, radius, kind.corners, random.uniform(0.03, 0.07))
    thickness = random.uniform(*kind.density) * inside * (1 + 0.16 * _texture(random, size, 9))
    thickness *= 1 + random.uniform(-0.25, 0.35) * depth  # thin or thick towards the rim
    if random.random() < 0.35:  # a fold of the sheet
        rows, columns = _grid(size)
        angle, offset = random.uniform(0, np.pi), random.uniform(-0.5, 0.5) * radius
        fold = (rows - centre[0]) * np.sin(angle) + (columns - centre[1]) * np.cos(angle) - offset
        thickness *= 1 + 0.5 * np.exp(-((fold / 0.035) ** 2))

    count = int(random.choice(kind.nuclei))
    small = radius * random.uniform(*kind.nucleus)
    first = centre + random.uniform(-0.18, 0.18, 2) * radius
    places = [first]
    turn = random.uniform(0, 2 * np.pi)
    for number in range(1, count):
        angle = turn + (number - 1) * random.uniform(1.6, 2.4)
        places.append(first + small * random.uniform(1.5, 2.1) * np.array([np.sin(angle), np.cos(angle)]))
    nuclei = np.zeros((size, size), np.float32)
    for place in places:
        shape, _ = _blob(random, size, place, small * random.uniform(0.85, 1.15), 0.07, 0.05)
        nuclei = np.maximum(nuclei, shape)
    if kind.halo[1]:
        clear, edge = _blob(random, size, np.mean(places, 0), small * random.uniform(*kind.halo), 0.10, 0.10)
        thickness *= 1 - random.uniform(0.65, 0.9) * clear
        thickness += inside * 0.25 * np.exp(-(((edge - 1.1) / 0.12) ** 2))  # the dense rim of the clearing
    chromatin = random.uniform(*kind.chromatin) * nuclei * np.maximum(1 + 0.22 * _texture(random, size, 24), 0.2)
    return thickness[..., None] * stain.astype(np.float32) + chromatin[..., None] * np.array(HAEMATOXYLIN, np.float32)


def _dust(random: np.random.Generator, size: int) -> np.ndarray:
    """Bacteria, blood and dirt: float32 [size, size, 1]."""
    density = np.zeros((size, size), np.float32)
    for _ in range(random.integers(0, 7)):
        spot, _ = _blob(random, size, random.uniform(-1, 1, 2), random.uniform(0.015, 0.06), 0.2, 0.05)
        density += random.uniform(0.1, 0.6) * spot
    return density[..., None]


def draw_cell(seed: int, index: int, size: int) -> np.ndarray:
    """The image of cell `index`, which depends on the three arguments alone: uint8 [size, size, 3]."""
    random = np.random.default_rng((VERSION, seed, 0, index))
    slide = _slide(seed, index // CELLS_PER_SLIDE)
    density = _cell(random, size, KINDS[CLASSES[label_of(seed, index)]], random.uniform(-0.1, 0.1, 2))
    for _ in range(random.integers(0, 3)):
        angle, distance = random.uniform(0, 2 * np.pi), random.uniform(1.0, 1.45)
        neighbour = KINDS[CLASSES[random.integers(len(CLASSES))]]
        density += _cell(random, size, neighbour, distance * np.array([np.sin(angle), np.cos(angle)]))
    density += _dust(random, size)
    rows, columns = _grid(size)
    tilt = random.normal(0, 0.035, 2)  # uneven light
    light = slide.light.astype(np.float32) * (1 + tilt[0] * rows + tilt[1] * columns)[..., None].astype(np.float32)
    picture = 255 * light * np.exp(-density * slide.stain.astype(np.float32))
    blur = (slide.focus + random.uniform(0, 0.6)) * size / 100
    blurred = Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(blur))
    noise = random.uniform(2, 7) * random.standard_normal((size, size, 3), dtype=np.float32)
    return np.clip(np.asarray(blurred) + noise, 0, 255).astype(np.uint8)


def label_of(seed: int, index: int) -> int:
    """The class of cell `index`: every class once in five cells, in an order that changes."""
    order = np.random.default_rng((VERSION, seed, 2, index // len(CLASSES))).permutation(len(CLASSES))
    return int(order[index % len(CLASSES)])


@dataclass(frozen=True)
class Drawing:
    """Draws the samples of one synthetic set; can be sent to another process."""

    seed: int
    size: int

    def __call__(self, sample: Sample) -> np.ndarray:
        """The sample's image: uint8 [size, size, 3]."""
        return draw_cell(self.seed, int(sample.id.rsplit("/", 1)[1]), self.size)


def draw_cells(count: int = 1000, size: int = 80, seed: int = 0) -> CellData:
    """A set of drawn cells on slides of 25, which share stain and focus and are the groups.

    Args:
        count: images, at least 10.
        size: pixels of a side, 32 to 512.
        seed: of the drawing, not negative.

    Raises:
        ValueError: an argument is out of its range.
    """
    if count < 10:
        raise ValueError(f"count must be at least 10 images, got {count}")
    if not 32 <= size <= 512:
        raise ValueError(f"size must be 32 to 512 pixels, got {size}")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}")
    samples = []
    for index in range(count):
        label = label_of(seed, index)
        samples.append(Sample(f"{CLASSES[label]}/{index:06d}", None, label, f"slide {index // CELLS_PER_SLIDE:04d}"))
    samples.sort(key=lambda sample: sample.id)
    note = f"Drawn cells, not photographs: seed {seed}, {size} pixels, version {VERSION} of the drawing."
    return CellData(
        "synthetic",
        None,
        CLASSES,
        tuple(samples),
        synthetic=True,
        grouped=True,
        notes=(note,),
        draw=Drawing(seed, size),
    )
