"""Sampling, shared by the kernels of deformable convolution: where a tap looks at each output pixel, and what is there.

CONV is (kernel height, kernel width, stride, stride, padding, padding, dilation, dilation), vertical before horizontal.
The images that are sampled have their channels innermost: a corner is a row of contiguous channels. What belongs to the
four corners of a point is a tuple: upper left, upper right, lower left, lower right.

A tile of samples is [K, P, B]: K chunks of B channels, 64 bytes, at P pixels. In that order four threads share a pixel
and each of them owns 16 bytes of every chunk, so that the 55 instructions for finding a pixel's corners serve K times
as many channels as in a tile [P, K * B]. Two threads to a pixel take a sixth of the instructions less, but a warp's 512
bytes then lie in 16 lines of the first-level cache, which takes a clock for each: on an H200 that was 2 of the 3 ms of
forward at 1024,64,56,56, where instructions took 1. Four take 8 clocks, the eight of [P, K * B] 4.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def output_pixels(index, out_height, out_width, WIDE: tl.constexpr):
    """Image, number in the image, row and column of output pixels numbered over all images."""
    image = index // (out_height * out_width)
    pixel = index - image * (out_height * out_width)
    row = pixel // out_width
    return image.to(tl.int64) if WIDE else image, pixel, row, pixel - row * out_width


@triton.jit
def locate(offset, base, channel_stride, exists, row, column, tap, offset_group, height, width, CONV: tl.constexpr):
    """The sampled points [P] of a tap: top row and left column, the fractions beyond them, and unknown (NaN).

    Points outside the image come back beside it, where none of their corners is in it; infinite and unknown ones too.
    """
    first = ((offset_group * CONV[0] * CONV[1] + tap) * 2).to(base.dtype)  # 64 bits wherever the pixels' places are
    place = offset + base + first * channel_stride
    y = tl.load(place, exists, float("-inf")).to(tl.float32)
    x = tl.load(place + channel_stride, exists, float("-inf")).to(tl.float32)
    y += (row * CONV[2] + (tap // CONV[1] * CONV[6] - CONV[4])).to(tl.float32)
    x += (column * CONV[3] + (tap % CONV[1] * CONV[7] - CONV[5])).to(tl.float32)
    unknown = (y != y) | (x != x)
    # NaN is no number to these, and becomes -2.
    y, x = tl.minimum(tl.maximum(y, -2.0), height), tl.minimum(tl.maximum(x, -2.0), width)
    top, left = tl.floor(y), tl.floor(x)
    return top.to(tl.int32), left.to(tl.int32), y - top, x - left, unknown


@triton.jit
def corners(base, top, left, height, width, channels, WIDE: tl.constexpr):
    """Of the four corners: the offsets [P] of their first channels, and whether they are in the image."""
    pixel = top * width + left
    pixel = pixel.to(tl.int64) if WIDE else pixel
    first, below = base + pixel * channels, base + (pixel + width) * channels
    # Negative numbers are large ones without a sign: one comparison for both ends.
    upper, lower = top.to(tl.uint32, bitcast=True) < height, (top + 1).to(tl.uint32, bitcast=True) < height
    near, far = left.to(tl.uint32, bitcast=True) < width, (left + 1).to(tl.uint32, bitcast=True) < width
    return (first, first + channels, below, below + channels), (upper & near, upper & far, lower & near, lower & far)


@triton.jit
def shares(down, right, factor):
    """factor * the bilinear weights [P] of the four corners."""
    upper, lower = (1 - down) * factor, down * factor
    return upper * (1 - right), upper * right, lower * (1 - right), lower * right


@triton.jit
def chunks(SIZE: tl.constexpr, CHUNK: tl.constexpr):
    """0, 1, 2 ... as [K, B]."""
    return tl.arange(0, SIZE // CHUNK)[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]


@triton.jit
def widen(value):
    """float32 of what is stored: of two bfloat16 by two instructions, where Triton's own conversion takes three."""
    if value.dtype == tl.bfloat16:
        return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return value.to(tl.float32)


@triton.jit
def corner_values(input, element, valid, channel, known):
    """The channels [K, B] of a corner as [K, P, B], 0 outside the image."""
    places = (input + element)[None, :, None] + channel[:, None, :]
    places = tl.max_contiguous(places, [1, 2, channel.shape[1]])
    return widen(tl.load(places, valid[None, :, None] & known[:, None, :], 0.0))


@triton.jit
def column_values(input, elements, valid, weights, unknown, channel, known):
    """Bilinear samples [K, P, B] in float32; NaN where the point is unknown."""
    # An unknown point's corners read as 0: a weight of NaN makes the sample NaN at no cost for each channel.
    first = tl.where(unknown, float("nan"), weights[0])
    values = first[None, :, None] * corner_values(input, elements[0], valid[0], channel, known)
    for corner in tl.static_range(1, 4):
        values += weights[corner][None, :, None] * corner_values(input, elements[corner], valid[corner], channel, known)
    return values


@triton.jit
def mask_values(mask, base, channel_stride, exists, tap, offset_group, CONV: tl.constexpr):
    """The tap's factor at each output pixel [P], 1 without a mask."""
    if mask is None:
        return tl.full(exists.shape, 1.0, tl.float32)
    else:
        channel = (offset_group * CONV[0] * CONV[1] + tap).to(base.dtype)
        return tl.load(mask + base + channel * channel_stride, exists, 0.0).to(tl.float32)
