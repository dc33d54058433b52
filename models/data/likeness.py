"""Which images show the same cell: a signature that rotation and flips leave as it is."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from PIL import Image

from cellops.models.data.images import Progress
from cellops.models.data.parallel import available_cores, ordered_map
from cellops.models.data.samples import CellData
from cellops.models.data.store import cache_folder, state_key

VERSION = 1  # of the signature: another one is another key of the cache
SIZE = 48  # pixels that an image is reduced to
RINGS = 10
ANGLES = 48
WAVES = 6  # angular frequencies kept of each ring
EDGE = 0.94  # of the inscribed circle; a rotated copy has no pixels of its own beyond it


def _sampling() -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the polar grid, [RINGS, ANGLES]; a ring's area grows with its index alike."""
    radius = EDGE * (SIZE - 1) / 2 * np.sqrt((np.arange(RINGS) + 0.5) / RINGS)
    angle = 2 * np.pi * np.arange(ANGLES) / ANGLES
    middle = (SIZE - 1) / 2
    return middle + radius[:, None] * np.sin(angle), middle + radius[:, None] * np.cos(angle)


ROWS, COLUMNS = _sampling()


def signature(image: np.ndarray) -> np.ndarray:
    """Describe an image by the size of its angular waves on rings about its centre.

    A rotation shifts the phase of a wave and a flip turns its sign; neither changes its size. Brightness and contrast
    are taken out, and colour stays as two means of each ring.

    Args:
        image: uint8 [H, W, 3].

    Returns:
        float32 [RINGS * (WAVES + 1) + 2 * RINGS], of length 1.
    """
    small = np.asarray(Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.float32)
    grey = small @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    planes = np.stack([grey, small[..., 0] - small[..., 1], small[..., 1] - small[..., 2]])
    rings = _bilinear(planes, ROWS, COLUMNS)
    # Over the rings alone: a turned copy's corners are filled with some colour.
    spread = float(rings[0].std()) + 4.0  # four grey levels, so that the noise of an even image is not blown up
    rings = (rings - rings.mean((1, 2), keepdims=True)) / spread  # the mean colour is the stain, which makes no copy
    waves = np.abs(np.fft.rfft(rings[0], axis=-1)[:, : WAVES + 1]) / ANGLES
    waves[:, 0] = rings[0].mean(-1)
    colour = rings[1:].mean(-1)
    described = np.concatenate([waves.ravel(), colour.ravel()]).astype(np.float32)
    return described / max(float(np.linalg.norm(described)), 1e-6)


def _bilinear(planes: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Values of [C, H, W] at fractional places [R, A]: [C, R, A]."""
    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    down, right = (rows - top).astype(np.float32), (columns - left).astype(np.float32)
    upper = planes[:, top, left] * (1 - right) + planes[:, top, left + 1] * right
    lower = planes[:, top + 1, left] * (1 - right) + planes[:, top + 1, left + 1] * right
    return upper * (1 - down) + lower * down


def signatures(data: CellData, workers: int | None = None, progress: Progress | None = None) -> np.ndarray:
    """The signatures of every image, [N, D], kept in the cache folder for these files in this state.

    Args:
        data: the samples.
        workers: threads; None is one a core.
        progress: called with (done, total) while images are decoded.

    Raises:
        ImageError: an image cannot be decoded; the message names the file.
    """
    path = cache_folder() / "signatures" / f"{data.name}-{state_key(data, VERSION)}.npy"
    if path.exists():
        return np.load(path)
    described = _signatures(data, workers, progress)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.save(file, described)
        temporary.replace(path)
    except OSError:  # without a place to keep them they are computed again
        temporary.unlink(missing_ok=True)
    return described


def _signatures(data: CellData, workers: int | None, progress: Progress | None) -> np.ndarray:
    described = []
    images = ordered_map(
        lambda index: signature(data.read(index)), range(len(data)), available_cores() if workers is None else workers
    )
    for index, row in enumerate(images):
        described.append(row)
        if progress is not None:
            progress(index + 1, len(data))
    return np.stack(described)


# The distance below which two images are taken for the same cell. Copies turned by any angle, mirrored or darkened were
# at most 0.075 away on 60 images each of CRIC, PBC and drawn cells; no two of all CRIC or PBC cells were within 0.09.
ALIKE = 0.09


def alike_pairs(described: np.ndarray, distance: float = ALIKE) -> list[tuple[int, int]]:
    """The pairs of rows (i < j) nearer than a distance."""
    from sklearn.neighbors import NearestNeighbors

    if len(described) < 2:
        return []
    near = NearestNeighbors(radius=distance).fit(described).radius_neighbors(described, return_distance=False)
    return [(i, int(j)) for i, row in enumerate(near) for j in sorted(row) if i < j]


def groups_of_alike(described: np.ndarray, distance: float = ALIKE) -> list[int]:
    """The group of each row; rows nearer than a distance, and those joined by a chain of such, share one."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    pairs: Sequence[tuple[int, int]] = alike_pairs(described, distance)
    first, second = (
        (np.array(column, dtype=int) for column in zip(*pairs, strict=True)) if pairs else (np.zeros(0, int),) * 2
    )
    graph = coo_array((np.ones(len(pairs)), (first, second)), shape=(len(described),) * 2)
    return [int(group) for group in connected_components(graph, directed=False)[1]]
