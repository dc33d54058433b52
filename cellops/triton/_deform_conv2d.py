"""Sampling, shared by the kernels of deformable convolution: where a tap looks at each output pixel, and what is there.

CONV is (kernel height, kernel width, stride, stride, padding, padding, dilation, dilation), vertical before horizontal.
The images that are sampled have their channels innermost: a corner is a row of contiguous channels.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def output_pixels(index, out_height, out_width, WIDE: tl.constexpr):
    """Image, number in the image, row and column of output pixels numbered over all images."""
    pixel = index % (out_height * out_width)
    image = index // (out_height * out_width)
    if WIDE:
        image = image.to(tl.int64)
    return image, pixel, pixel // out_width, pixel % out_width


@triton.jit
def locate(offset, base, channel_stride, exists, row, column, tap, offset_group, height, width, CONV: tl.constexpr):
    """The sampled points [P] of a tap: inside, unknown (NaN), top row and left column, and the fractions beyond them.

    Points that are not inside, infinite and huge ones too, come back as (0, 0), so that no index is made of them.
    """
    first = ((offset_group * CONV[0] * CONV[1] + tap) * 2).to(base.dtype)  # 64 bits wherever the pixels' places are
    y = tl.load(offset + base + first * channel_stride, exists, 0.0).to(tl.float32)
    x = tl.load(offset + base + (first + 1) * channel_stride, exists, 0.0).to(tl.float32)
    y += (row * CONV[2] - CONV[4] + tap // CONV[1] * CONV[6]).to(tl.float32)
    x += (column * CONV[3] - CONV[5] + tap % CONV[1] * CONV[7]).to(tl.float32)
    inside = exists & (y >= -1) & (y < height) & (x >= -1) & (x < width)
    unknown = exists & ((y != y) | (x != x))
    y, x = tl.where(inside, y, 0.0), tl.where(inside, x, 0.0)
    top, left = tl.floor(y), tl.floor(x)
    return inside, unknown, top.to(tl.int32), left.to(tl.int32), y - top, x - left


@triton.jit
def corner_elements(
    base, inside, top, left, DOWN: tl.constexpr, RIGHT: tl.constexpr, height, width, channels, WIDE: tl.constexpr
):
    """Offsets [P] of a corner's first channel, and whether the corner is in the image."""
    row, column = top + DOWN, left + RIGHT
    valid = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    pixel = row * width + column
    if WIDE:
        pixel = pixel.to(tl.int64)
    return base + pixel * channels, valid


@triton.jit
def corner_values(
    input,
    base,
    inside,
    top,
    left,
    DOWN: tl.constexpr,
    RIGHT: tl.constexpr,
    channel,
    known,
    height,
    width,
    channels,
    WIDE: tl.constexpr,
):
    """The channels [P, C] of a corner, 0 outside the image."""
    element, valid = corner_elements(base, inside, top, left, DOWN, RIGHT, height, width, channels, WIDE)
    return tl.load(input + element[:, None] + channel[None, :], valid[:, None] & known[None, :], 0.0).to(tl.float32)


@triton.jit
def column_values(
    input,
    base,
    inside,
    unknown,
    top,
    left,
    down,
    right,
    factor,
    channel,
    known,
    height,
    width,
    channels,
    WIDE: tl.constexpr,
):
    """factor * the bilinear sample of each channel, [P, C] in float32; NaN where the point is unknown."""
    # An unknown point's corners read as 0: a weight of NaN makes the sample NaN at no cost for each channel.
    first = tl.where(unknown, float("nan"), (1 - down) * (1 - right) * factor)
    values = first[:, None] * corner_values(
        input, base, inside, top, left, 0, 0, channel, known, height, width, channels, WIDE
    )
    values += ((1 - down) * right * factor)[:, None] * corner_values(
        input, base, inside, top, left, 0, 1, channel, known, height, width, channels, WIDE
    )
    values += (down * (1 - right) * factor)[:, None] * corner_values(
        input, base, inside, top, left, 1, 0, channel, known, height, width, channels, WIDE
    )
    values += (down * right * factor)[:, None] * corner_values(
        input, base, inside, top, left, 1, 1, channel, known, height, width, channels, WIDE
    )
    return values


@triton.jit
def mask_values(mask, base, channel_stride, exists, tap, offset_group, CONV: tl.constexpr):
    """The tap's factor at each output pixel [P], 1 without a mask."""
    if mask is None:
        return tl.full(exists.shape, 1.0, tl.float32)
    else:
        channel = (offset_group * CONV[0] * CONV[1] + tap).to(base.dtype)
        return tl.load(mask + base + channel * channel_stride, exists, 0.0).to(tl.float32)
