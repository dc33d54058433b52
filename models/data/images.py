"""Decoding: any image file to uint8 RGB, or an error that names the file."""

from __future__ import annotations

import os
import stat
import struct
import threading
import warnings
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cellops.models.data.parallel import ordered_map
from cellops.models.data.samples import CellData

# The formats that cell images come in. Pillow reads others too, EPS by starting Ghostscript.
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP", "PPM")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif", ".webp", ".ppm", ".pgm"})

# A field of a slide has 3 megapixels, a crop far less; what claims more is refused before it is decoded.
MAX_PIXELS = 64_000_000

# A decoder takes 10 to 14 bytes a pixel, so that larger images are decoded one at a time, however many cores there are.
LARGE_PIXELS = 16_000_000
_LARGE = threading.Lock()

# (first column, first row, columns between, rows between) of the passes of an interlaced PNG.
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # a pixel, by a PNG's colour type

# Images of which the brightness is looked at; one camera or program made all of a data set's, as a rule.
LOOKED_AT = 20

DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    TypeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

Progress = Callable[[int, int], object]  # (done, total)


class ImageError(ValueError):
    """A file is no image that can be used; the message names it."""


@dataclass(frozen=True)
class Unreadable:
    """A sample whose image cannot be used, and why."""

    id: str
    reason: str


def read_image(path: Path | str, root: Path | str | None = None, mask: Path | str | None = None) -> np.ndarray:
    """Decode a file to uint8 [H, W, 3] in RGB.

    The first frame of an animation or page of a TIFF; turned as its EXIF orientation says; alpha laid over white, as
    slides are; 16-bit grey divided by 257, so that the whole range stays (`dark_note` tells where little is used).
    Colour profiles (ICC) are not applied: two scanners' RGB stays as they wrote it.

    Args:
        path: the file.
        root: the folder that file and mask must lie in once links are followed; None: anywhere.
        mask: an image of the same size; where it is darker than half its maximum, the result is black.

    Raises:
        ImageError: no file, outside the root, not an image, truncated, a PNG of fewer rows than it says, too large, or
            of pixels without a known range; a mask that is empty or of another size.
    """
    pixels = _decode(Path(path), root, _rgb)
    if mask is not None:
        shade = _decode(Path(mask), root, _grey)
        if shade.shape != pixels.shape[:2]:
            raise ImageError(f"{mask}: the mask is {shade.shape[::-1]} pixels, its image {pixels.shape[1::-1]}")
        if not shade.any():
            raise ImageError(f"{mask}: the mask is black everywhere, which leaves nothing of the image")
        # Releases differ in whether masks are 0/1 or 0/255, and re-saved ones are not exactly two-valued.
        pixels = np.where((shade.astype(np.int32) * 2 > int(shade.max()))[..., None], pixels, np.uint8(0))
    return pixels


def _decode(path: Path, root: Path | str | None, convert: Callable[[Image.Image, Path], Image.Image]) -> np.ndarray:
    if root is not None:
        check_inside(path, Path(root))
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would wait for ever
            raise ImageError(f"{path}: not a regular file")
        with warnings.catch_warnings(), path.open("rb") as file:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is stricter
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ImageError(
                        f"{path}: {image.width} x {image.height} pixels, more than {MAX_PIXELS:,} are refused"
                    )
                with _LARGE if image.width * image.height > LARGE_PIXELS else nullcontext():
                    image.seek(0)
                    image.load()
                    if image.format == "PNG" and _ends_black(image) and _is_short(file):
                        raise ImageError(f"{path}: cannot be decoded: its data end before its last row")
                    ImageOps.exif_transpose(image, in_place=True)
                    return np.asarray(convert(image, path))
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        raise ImageError(f"{path}: not an image ({', '.join(FORMATS)} are read)") from None
    except MemoryError:
        raise ImageError(f"{path}: cannot be decoded: there is not enough memory") from None
    except DECODING_ERRORS as error:
        raise ImageError(f"{path}: cannot be decoded: {error}") from error


def _ends_black(image: Image.Image) -> bool:
    """Whether the last two rows are 0, as Pillow leaves what a PNG's data do not reach (one of two if interlaced)."""
    rows = np.asarray(image.crop((0, max(0, image.height - 2), image.width, image.height)))
    return not (rows[-1].any() and rows[0].any())


def _is_short(file: BinaryIO) -> bool:
    """Whether a PNG's data are whole and yet fewer bytes than its size asks for, at which no decoder stumbles."""
    file.seek(12)
    if file.read(4) != b"IHDR":
        return False
    width, height, depth, kind, _, _, interlaced = struct.unpack(">IIBBBBB", file.read(13))
    wanted = 0
    for left, top, across, down in ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = -((left - width) // across), -((top - height) // down)
        if columns > 0 and rows > 0:
            wanted += rows * (1 + (columns * depth * SAMPLES[kind] + 7) // 8)
    unpacker, found = zlib.decompressobj(), 0
    file.seek(4, os.SEEK_CUR)
    while found < wanted and len(head := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", head)
        data = file.read(length) if name == b"IDAT" else b""
        file.seek(4 if name == b"IDAT" else length + 4, os.SEEK_CUR)
        while data and found < wanted:
            found += len(unpacker.decompress(data, 2**20))
            data = unpacker.unconsumed_tail
    return found < wanted


def check_inside(path: Path, root: Path) -> None:
    """Raise if a file lies outside a folder once symbolic links are followed.

    Raises:
        ImageError: it does.
    """
    target = Path(os.path.realpath(path))  # of links in a circle, at which Path.resolve may fail, itself
    if not target.is_relative_to(os.path.realpath(root)):
        raise ImageError(f"{path}: leads to {target}, outside the data folder {root}")


def _eight_bits(image: Image.Image, path: Path) -> Image.Image:
    """Grey of 16 or 32 bits to 8; every other image as it is."""
    if image.mode == "F":
        raise ImageError(f"{path}: floating-point pixels have no known range; save it with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise ImageError(f"{path}: pixels from {values.min()} to {values.max()} are neither of 8 nor of 16 bits")
    scaled = values.astype(np.uint32)  # 64 megapixels of float64 would be half a gigabyte, and again to be rounded
    scaled += 128
    scaled //= 257
    return Image.fromarray(scaled.astype(np.uint8))


def _rgb(image: Image.Image, path: Path) -> Image.Image:
    image = _eight_bits(image, path)
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")  # which copies


def _grey(image: Image.Image, path: Path) -> Image.Image:
    """A mask; 16-bit masks of 0/1 stay 0/1 instead of being divided to nothing."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) > 0).astype(np.uint8))
    return image.convert("RGB").convert("L") if image.mode == "P" else image.convert("L")


def dark_note(data: CellData) -> str | None:
    """A note where a sample of the 16-bit images stays below a sixteenth of the range, as those of 12-bit cameras do.

    `read_image` does not brighten them: which range was meant, the files do not say.
    """

    def sixteen_bits(image: Image.Image, path: Path) -> Image.Image:
        return image if image.mode.startswith("I") else Image.new("1", (1, 1))

    highest = []
    for index in np.linspace(0, len(data) - 1, min(LOOKED_AT, len(data))).round().astype(int):
        path = data.samples[index].path
        if path is None:
            continue
        try:
            pixels = _decode(path, data.root, sixteen_bits)
        except ImageError:  # `scan` tells
            continue
        if pixels.dtype != bool:
            highest.append(int(pixels.max()))
    if not highest or max(highest) >= 65536 // 16:
        return None
    return (
        f"The 16-bit images use little of their range (at most {max(highest)} of 65535 in {len(highest)} looked at) "
        "and are nearly black with 8 bits. Save them scaled to the whole range, those of a 12-bit camera times 16."
    )


def scan(data: CellData, workers: int = 0, progress: Progress | None = None) -> list[Unreadable]:
    """Decode every image once and list those that cannot be used, in the order of the samples.

    Args:
        workers: threads; 0 is the calling one. Pillow decodes without the interpreter's lock.
        progress: called with (done, total).
    """

    def problem(index: int) -> str | None:
        try:
            data.read(index)
        except ImageError as error:
            return str(error)
        return None

    found = []
    for index, reason in enumerate(ordered_map(problem, range(len(data)), workers)):
        if reason is not None:
            found.append(Unreadable(data.samples[index].id, reason))
        if progress is not None:
            progress(index + 1, len(data))
    return found
