"""The cases of `offset_sample2d`. `small` ones stay off whole-numbered coordinates, so that finite differences hold."""

from __future__ import annotations

import torch
from torch import Tensor

from cellops.reference.offset_sample2d import offset_sample2d
from cellops.testing._case import Case, draw_normal, maker, off_grid


def offset_sample2d_case(
    name: str,
    why: str,
    *,
    batch: int = 2,
    channels: int = 3,
    height: int = 5,
    width: int = 4,
    layout: str = "planar",
    spread: float = 1.5,
    tags: str = "small",
) -> Case:
    """A case of `offset_sample2d`; `spread` is the offsets' standard deviation in pixels."""
    image = channels * height * width

    def draw(key: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        if key != "offset":
            return draw_normal(key, shape, generator)
        # Multiples of 2^-10: float32 holds the coordinates exactly, as the tolerance of four products has no room for
        # a rounded one (4e-6 of a pixel at column 56, times a gradient of 6).
        return (off_grid(shape, spread, generator) * 1024).round() / 1024

    shapes = {"input": (batch, channels, height, width), "offset": (batch, 2 * channels, height, width)}
    return Case(
        op="offset_sample2d",
        name=name,
        why=why,
        sizes={"batch": batch, "channels": channels, "height": height, "width": width, "layout": layout},
        make=maker(shapes, {"layout": layout}, draw),
        reference=offset_sample2d,
        terms={"output": 4, "input": 4 * height * width, "offset": 4},
        flops=11 * batch * image,
        elements=4 * batch * image,
        tags=frozenset(tags.split()),
    )


def _layer(batch: int, channels: int, size: int, why: str) -> Case:
    return offset_sample2d_case(
        f"offset_{batch}x{channels}x{size}x{size}",
        why,
        batch=batch,
        channels=channels,
        height=size,
        width=size,
        spread=2.0,
        tags="real bench",
    )


CASES: list[Case] = [
    offset_sample2d_case("offset_basic", "channels, height and width differ from each other"),
    offset_sample2d_case("offset_interleaved", "pairs that cross the border of two channels", layout="interleaved"),
    offset_sample2d_case("offset_wide", "most points are clamped", spread=6.0),
    offset_sample2d_case("offset_row", "one row: y is always clamped", height=1, width=9),
    offset_sample2d_case("offset_column", "one column: no pixel has a right neighbour", height=9, width=1),
    offset_sample2d_case("offset_pixel", "a 1x1 map, where both memory formats coincide", height=1, width=1),
    offset_sample2d_case("offset_channel", "one channel", channels=1),
    offset_sample2d_case("offset_empty", "an empty batch", batch=0, tags="edge"),
    offset_sample2d_case(
        "offset_batch33",
        "more images than threads, one channel more than a block",
        batch=33,
        channels=17,
        tags="edge",
    ),
    offset_sample2d_case(
        "offset_image",
        "one image of several tiles and groups of rows",
        batch=1,
        channels=35,
        height=63,
        width=33,
        tags="edge",
    ),
    offset_sample2d_case(
        "offset_image_interleaved",
        "the same, interleaved",
        batch=1,
        channels=19,
        height=33,
        width=63,
        layout="interleaved",
        tags="edge",
    ),
    offset_sample2d_case(
        "offset_wide_rows", "rows longer than a group of rows", channels=2, height=3, width=1500, tags="edge"
    ),
    _layer(8, 64, 14, "HQNet's first stage"),
    _layer(8, 256, 14, "behind its first block"),
    _layer(8, 512, 7, "its last maps"),
    _layer(4, 64, 56, "a map larger than HQNet's"),
]
