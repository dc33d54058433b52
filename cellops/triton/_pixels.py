"""Tiles of channels and pixels, for kernels that treat the pixels of all images as one row."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import triton
import triton.language as tl
from torch import Tensor

from cellops.triton._launch import ceil_div, multiprocessors, power_of_2


@triton.jit
def pixel_elements(index, count, image_pixels, image_elements, pixel_stride, WIDE: tl.constexpr):
    """Of pixels numbered over all images: whether they exist, their number in the image, their offset [P]."""
    pixel = index % image_pixels
    image = index // image_pixels
    if WIDE:
        image, pixel_stride = image.to(tl.int64), tl.cast(pixel_stride, tl.int64)
    return index < count, pixel, image * image_elements + pixel * pixel_stride


@triton.jit
def tile_elements(channel, place, channel_stride):
    """Offsets [C, P] of a tile, in the bits that the pixels' have: a single image may have 2^31 elements."""
    return channel.to(place.dtype)[:, None] * channel_stride + place[None, :]


@triton.jit
def channel_numbers(values, channel, valid, ABSENT: tl.constexpr):
    """Numbers of the channels in float32, ABSENT for an absent tensor."""
    if values is None:
        return tl.full(channel.shape, ABSENT, tl.float32)
    else:
        return tl.load(values + channel, valid, ABSENT).to(tl.float32)


@triton.jit
def channel_values(values, channel, valid, ABSENT: tl.constexpr):
    """The same as a column."""
    return channel_numbers(values, channel, valid, ABSENT)[:, None]


@triton.jit
def with_tile(mean, square, seen, z, valid, size, DIM: tl.constexpr):
    """Mean, squared distances from it and count with the `size` valid numbers of a tile (Chan et al. 1979).

    DIM is the tile's dimension of pixels; the others are the channels of `mean` and `square`.
    """
    share = size / tl.maximum(seen + size, 1.0)
    tile_mean = tl.sum(tl.where(valid, z, 0.0), DIM) / tl.maximum(size, 1.0)
    distance = tl.where(valid, z - tl.expand_dims(tile_mean, DIM), 0.0)
    apart = tl.where(size > 0, tile_mean - mean, 0.0)
    square += tl.sum(distance * distance, DIM) + apart * apart * seen * share
    return mean + apart * share, square, seen + size


@dataclass(frozen=True)
class Tiles:
    """How the pixels of all images are cut up: for kernels that map them, and for kernels that sum over them.

    What is launched is worked out once for all calls of the same sizes.
    """

    channels: int
    total: int  # pixels of all images
    image_pixels: int
    image_elements: int
    channel_stride: int
    pixel_stride: int
    block_c: int
    block_p: int
    wide: bool
    parts: int  # of the pixels, each summed by one program
    part_pixels: int  # a multiple of block_p

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The kernels' arguments in order."""
        return self.channels, self.total, self.image_pixels, self.image_elements, self.channel_stride, self.pixel_stride

    @cached_property
    def constants(self) -> dict[str, int]:
        return {"BLOCK_C": self.block_c, "BLOCK_P": self.block_p, "WIDE": self.wide}

    @cached_property
    def grid(self) -> tuple[int, int]:
        """A program for each tile."""
        return ceil_div(self.total, self.block_p), ceil_div(self.channels, self.block_c)

    @cached_property
    def part_grid(self) -> tuple[int, int]:
        """A program for each part of the pixels."""
        return self.parts, ceil_div(self.channels, self.block_c)


def tiles(image: Tensor, elements: int = 1024) -> Tiles:
    """Tiles for an image [N, C, H, W], dense in either memory format.

    Tiles are wide along what is contiguous, for 16-byte loads: 1024 elements are 8 for each of 128 threads. Sums take
    about four programs for each multiprocessor, over parts that depend on sizes alone: the order of additions is fixed.
    """
    return _tiles(image.shape, image.is_contiguous(), multiprocessors(image.device), elements)


@lru_cache(maxsize=4096)
def _tiles(shape: tuple[int, ...], nchw: bool, side_by_side: int, elements: int) -> Tiles:
    batch, channels, height, width = shape
    pixels, count = height * width, batch * height * width
    if nchw:
        strides, block_p = (pixels, 1), power_of_2(count, 16, elements)
        block_c = power_of_2(channels, 1, elements // block_p)
    else:
        strides, block_c = (1, channels), power_of_2(channels, 16, 64)
        block_p = elements // block_c
    programs = 4 * side_by_side
    part_blocks = ceil_div(ceil_div(count, block_p), ceil_div(programs, ceil_div(channels, block_c)))
    part_pixels = max(part_blocks, 1) * block_p
    return Tiles(
        channels=channels,
        total=count,
        image_pixels=pixels,
        image_elements=channels * pixels,
        channel_stride=strides[0],
        pixel_stride=strides[1],
        block_c=block_c,
        block_p=block_p,
        wide=math.prod(shape) >= 2**31 or 2 * count >= 2**31,  # the last part may end beyond, and there may be two maps
        parts=ceil_div(count, part_pixels),
        part_pixels=part_pixels,
    )
