"""Contact sheets: many small images with a caption each, in one PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cellops.models.training.checkpoint import write_atomically

MARGIN, CAPTION = 8, 18


def contact_sheet(images: Sequence[np.ndarray], captions: Sequence[str], path: Path, columns: int = 8) -> None:
    """Write a PNG of images in a grid, each over its caption.

    Args:
        images: uint8 [S, S, 3], all of one size.
        captions: one each; cut where it is wider than the image.
        path: the file.
        columns: images in a row.
    """
    side = images[0].shape[0]
    columns = min(columns, len(images))
    rows = math.ceil(len(images) / columns)
    wide, high = side + MARGIN, side + MARGIN + CAPTION
    sheet = Image.new("RGB", (columns * wide + MARGIN, rows * high + MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = MARGIN + number % columns * wide, MARGIN + number // columns * high
        sheet.paste(Image.fromarray(image), (left, top))
        draw.text((left + 1, top + side + 2), fitting(caption, side, font), fill="#1d2733", font=font)
    write_atomically(path, lambda file: sheet.save(file, "PNG"))


def fitting(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The text, its first word cut with an ellipsis where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    head, _, tail = text.rpartition(" ")
    while head and font.getlength(f"{head}… {tail}") > width:
        head = head[:-1]
    return f"{head}… {tail}"
