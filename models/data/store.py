"""Images decoded and resized once, kept in one file that is mapped into memory."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from cellops.models.data.images import Progress
from cellops.models.data.parallel import available_cores, ordered_map
from cellops.models.data.samples import CellData, Sample

VERSION = 1  # of the file: another one is another key
STALE_SECONDS = 24 * 3600
RESIZES = ("squash", "crop", "pad")


def cache_folder() -> Path:
    """Where stores lie: $CELLOPS_CACHE, else cellops in the user's cache folder."""
    if os.environ.get("CELLOPS_CACHE"):
        return Path(os.environ["CELLOPS_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "cellops"


def resized(image: np.ndarray, size: tuple[int, int], resize: str) -> np.ndarray:
    """An image in another size.

    Args:
        image: uint8 [H, W, 3].
        size: (height, width) in pixels.
        resize: "squash" changes the proportions; "crop" keeps them and cuts the middle; "pad" keeps them and adds the
            image's own border colour.

    Returns:
        uint8 [height, width, 3].
    """
    height, width = size
    picture = Image.fromarray(image)
    if resize == "squash":
        return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))
    scales = height / picture.height, width / picture.width
    if resize == "crop":
        wide, high = width / max(scales), height / max(scales)
        left, top = (picture.width - wide) / 2, (picture.height - high) / 2
        box = (left, top, left + wide, top + high)
        return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC, box=box))
    scale = min(scales)
    inner = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    padded = np.empty((height, width, 3), np.uint8)
    padded[:] = np.median(border, axis=0).astype(np.uint8)
    top, left = (height - inner[1]) // 2, (width - inner[0]) // 2
    padded[top : top + inner[1], left : left + inner[0]] = np.asarray(picture.resize(inner, Image.Resampling.BICUBIC))
    return padded


def _state(sample: Sample) -> list[object]:
    """What a sample's pixels depend on.

    The time of the last change counts too: files of one size, unpacked in one second, may have changed their names.
    """
    files = [path.stat() for path in (sample.path, sample.mask) if path is not None]
    return [sample.id, *((file.st_size, file.st_mtime_ns, file.st_ctime_ns) for file in files)]


def state_key(data: CellData, *more: object) -> str:
    """A key of these samples with their files in their present state, and of what else it is given."""
    origin = str(data.root) if data.root is not None else repr(data.draw)
    key = json.dumps([origin, *more, [_state(sample) for sample in data.samples]])
    return hashlib.sha256(key.encode()).hexdigest()[:20]


class ImageStore:
    """The images of a data set in one size: `store[i]` is uint8 [H, W, 3] of `data.samples[i]`."""

    def __init__(self, path: Path, ids: Sequence[str]) -> None:
        self.path = path
        self.ids = tuple(ids)
        self.images: np.ndarray = np.load(path, mmap_mode="r")
        self.size: tuple[int, int] = (self.images.shape[1], self.images.shape[2])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.images[index]

    def __reduce__(self) -> tuple[type[ImageStore], tuple[Path, Sequence[str]]]:
        return ImageStore, (self.path, self.ids)  # a worker maps the file itself

    @classmethod
    def open(
        cls,
        data: CellData,
        size: tuple[int, int],
        folder: Path | str | None = None,
        resize: str = "squash",
        progress: Progress | None = None,
        workers: int | None = None,
    ) -> ImageStore:
        """The store of a data set, made where there is none for these files in this state, or a damaged one.

        It is written under another name and renamed when complete: whoever is killed on the way leaves nothing that
        a later run could take for a store, and two processes do not disturb each other. Where its folder has to be
        made, that is the user's alone (0700), since the images are a patient's; one that is there stays as it is.

        Args:
            data: the samples.
            size: (height, width) in pixels.
            folder: where stores are kept; None for `cache_folder() / "images"`.
            resize: "squash", "crop" or "pad", see `resized`.
            progress: called with (done, total) while images are decoded.
            workers: threads; None is one a core.

        Raises:
            ValueError: `size` or `resize` is out of range, or the data set is empty.
            ImageError: an image cannot be decoded; the message names the file.
            OSError: the store cannot be written, for example on a full disk.
        """
        if resize not in RESIZES:
            raise ValueError(f"resize must be one of {', '.join(RESIZES)}, got {resize!r}")
        if len(size) != 2 or not all(8 <= side <= 4096 for side in size):
            raise ValueError(f"size must be (height, width) of 8 to 4096 pixels each, got {size}")
        if not len(data):
            raise ValueError(f"{data.name} has no samples")
        folder = cache_folder() / "images" if folder is None else Path(folder)
        path = folder / f"{data.name[:40]}-{size[0]}x{size[1]}-{state_key(data, VERSION, *size, resize)}.npy"
        if not _is_whole(path, (len(data), *size, 3)):
            _write(path, data, size, resize, available_cores() if workers is None else workers, progress)
        return cls(path, [sample.id for sample in data.samples])


def _is_whole(path: Path, shape: tuple[int, ...]) -> bool:
    """Whether a file is there and holds uint8 of a shape."""
    if not path.exists():
        return False
    try:
        images = np.load(path, mmap_mode="r")
    except (ValueError, EOFError):
        return False
    return images.shape == shape and images.dtype == np.uint8


def _write(
    path: Path, data: CellData, size: tuple[int, int], resize: str, workers: int, progress: Progress | None
) -> None:
    path.parent.mkdir(0o700, parents=True, exist_ok=True)
    _remove_stale(path.parent)
    temporary = path.with_name(f"{path.stem}.{os.getpid()}.{time.monotonic_ns()}.tmp")
    images = ordered_map(lambda index: resized(data.read(index), size, resize), range(len(data)), workers)
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(data), *size, 3)}
    try:
        # Plain writes, since a full disk under a mapped file ends the process instead of raising an error.
        with temporary.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for done, image in enumerate(images, start=1):
                file.write(image.tobytes())
                if progress is not None:
                    progress(done, len(data))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        needed = len(data) * size[0] * size[1] * 3 / 2**20
        message = (
            f"cannot write the image store {path} ({needed:.0f} MiB): {error.strerror or error}; "
            "choose another folder with CELLOPS_CACHE"
        )
        raise OSError(error.errno, message) from error
    finally:
        temporary.unlink(missing_ok=True)


def _remove_stale(folder: Path) -> None:
    """Remove what runs that were killed a day ago or more left behind."""
    for file in folder.glob("*.tmp"):
        try:
            if time.time() - file.stat().st_mtime > STALE_SECONDS:
                file.unlink()
        except FileNotFoundError:  # another process was faster
            continue
