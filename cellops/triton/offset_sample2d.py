"""Every channel sampled at its own offsets, in Triton: y[n, c, h, w] = x[n, c] at (h + dy, w + dx), clamped.

Forward must move x, the offsets (twice as many numbers) and y once: 4 tensors of x's size, 24 us for 8,512,56,56 in
bfloat16 at 4.3 TB/s. Backward must move x, offsets, grad_output and both gradients, 7 of that size; it adds four
corners for each point to the input's gradient by float32 atomics and, for half types, reads that again to round it.

In the time of its 8 bytes an element of forward may take 53 instructions on an H200, one of backward, with the float32
gradient, some 130. For sm_90 and bfloat16 they take 63 (70 with 64 channels in channels_last) and 127 to 133, after 135
and 213 of wide tiles: issuing instructions bounds forward, memory all of float32. What counts:

- Neighbouring lanes hold neighbouring channels of a pixel (channels_last) or pixels of a channel (NCHW), and a lane
  takes one number of each access. Loads of 16 bytes would give it 8 channels; Triton lays out atomics lane by lane all
  the same, and pointers, values and masks would change lanes through shared memory, a sixth of the instructions. The
  points of 32 channels of one pixel also lie in fewer lines of the first-level cache than those of 4 pixels.
- A thread holds several channels of the same pixel. Its row, column and addresses, some 30 instructions and twice that
  with divisions by runtime numbers, are found once for all of them.
- Clamping makes the first corner exist, so that it needs no mask, and coordinates positive: truncation is the floor.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cellops.triton._launch import ceil_div, image_slices, launch, power_of_2
from cellops.triton._numerics import narrow
from cellops.triton._pixels import tiles


@triton.jit
def _quotient(number, divisor, multiplier, shift, WIDE: tl.constexpr):
    """number // divisor of numbers from 0 below 2^31, with `_reciprocal`: 3 instructions, where a division takes 20."""
    if WIDE:
        return number // divisor
    else:
        return (tl.umulhi((2 * number).to(tl.uint32), multiplier.to(tl.uint32)) >> shift).to(tl.int32)


@triton.jit
def _tile(
    channels,
    count,
    image_pixels,
    width,
    pixels_multiplier,
    pixels_shift,
    width_multiplier,
    width_shift,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    LANES: tl.constexpr,
    WIDE: tl.constexpr,
    AXIS: tl.constexpr,
):
    """Channels, images, pixels, rows and columns [C * P] of points in the order of their lanes; which of them exist.

    In one dimension neighbouring points are those of neighbouring lanes, whatever the compiler knows of addresses: of a
    tile of more it asks them for the order of dimensions, and those of samples tell nothing. A thread's points, 128
    apart, are one pixel's: the compiler sees that it finds the same row and column for them, and does so once.

    Beyond the last channel and pixel come these two again, so that loads and stores need no mask: what is stored there
    is what is there. The minimum also keeps Triton from giving a thread adjacent numbers for the sake of wide loads.
    """
    point = tl.arange(0, BLOCK_C * BLOCK_P)
    channel = tl.program_id(1 - AXIS) * BLOCK_C + point // (LANES * BLOCK_P) * LANES + point % LANES
    index = tl.program_id(AXIS).to(tl.int64 if WIDE else tl.int32) * BLOCK_P + point // LANES % BLOCK_P
    exists = (channel < channels) & (index < count)
    channel, index = tl.minimum(channel, channels - 1), tl.minimum(index, count - 1)
    image = _quotient(index, image_pixels, pixels_multiplier, pixels_shift, WIDE)
    pixel = index + image * -image_pixels
    row = _quotient(pixel, width, width_multiplier, width_shift, WIDE)
    return channel.to(index.dtype), image, pixel, row, pixel + row * -width, exists


@triton.jit
def _pairs(
    offset,
    channel,
    pixel,
    image,
    channels,
    image_pixels,
    channel_stride,
    pixel_stride,
    INTERLEAVED: tl.constexpr,
):
    """Pointers to dy and dx: of channels 2c and 2c + 1, or of a pair within the NCHW tensor's row of pairs."""
    base = image * channels * image_pixels * 2
    if INTERLEAVED:
        dy = 2 * (channel * image_pixels + pixel)
        dx = dy + 1
        dy = dy // image_pixels * channel_stride + dy % image_pixels * pixel_stride
        dx = dx // image_pixels * channel_stride + dx % image_pixels * pixel_stride
        return offset + base + dy, offset + base + dx
    else:
        dy = offset + (base + pixel * pixel_stride) + 2 * channel * channel_stride
        return dy, dy + channel_stride


@triton.jit
def _locate(dy, dx, row, column, height, width, WIDE: tl.constexpr):
    """Of clamped points: known or NaN; beyond 0 along y and x; before the last row and column; top, left; fractions."""
    y, x = row.to(tl.float32) + dy.to(tl.float32), column.to(tl.float32) + dx.to(tl.float32)
    known = (y == y) & (x == x)
    last_y, last_x = height - 1.0, width - 1.0
    y, x = tl.minimum(tl.maximum(y, 0.0), last_y), tl.minimum(tl.maximum(x, 0.0), last_x)  # of NaN 0
    top, left = y.to(tl.int32), x.to(tl.int32)
    below, right = y - top.to(tl.float32), x - left.to(tl.float32)
    if WIDE:  # float32 may have rounded a last row up
        top, left = tl.minimum(top, height - 1).to(tl.int64), tl.minimum(left, width - 1)
    return known, y > 0, x > 0, y < last_y, x < last_x, top, left, below, right


@triton.jit
def _corners(point, inside_y, inside_x, row_stride, pixel_stride):
    """The values around a point, from its first corner on; 0 beyond the last row and column."""
    x00 = tl.load(point).to(tl.float32)
    x01 = tl.load(point + pixel_stride, inside_x, 0.0).to(tl.float32)
    x10 = tl.load(point + row_stride, inside_y, 0.0).to(tl.float32)
    x11 = tl.load(point + (row_stride + pixel_stride), inside_y & inside_x, 0.0).to(tl.float32)
    return x00, x01, x10, x11


@triton.jit
def offset_sample2d_forward_kernel(
    input,  # [N, C, H, W]
    offset,  # [N, 2C, H, W]
    output,  # [N, C, H, W]
    height,
    width,
    pixels_multiplier,  # of `_reciprocal`
    pixels_shift,
    width_multiplier,
    width_shift,
    offset_channel_stride,
    offset_pixel_stride,
    channels,
    count,
    image_pixels,
    image_elements,
    channel_stride,
    pixel_stride,
    INTERLEAVED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    LANES: tl.constexpr,  # channels in neighbouring lanes; 1 where these hold pixels
    WIDE: tl.constexpr,
    AXIS: tl.constexpr,
):
    """output = (1 - b) ((1 - r) x00 + r x01) + b ((1 - r) x10 + r x11), with b, r the fractions below and right."""
    channel, image, pixel, row, column, _ = _tile(
        channels,
        count,
        image_pixels,
        width,
        pixels_multiplier,
        pixels_shift,
        width_multiplier,
        width_shift,
        BLOCK_C,
        BLOCK_P,
        LANES,
        WIDE,
        AXIS,
    )
    dy, dx = _pairs(
        offset,
        channel,
        pixel,
        image,
        channels,
        image_pixels,
        offset_channel_stride,
        offset_pixel_stride,
        INTERLEAVED,
    )
    known, _, _, inside_y, inside_x, top, left, below, right = _locate(
        tl.load(dy), tl.load(dx), row, column, height, width, WIDE
    )
    start, plane = image * image_elements, channel * channel_stride
    point = input + start + plane + (top * width + left) * pixel_stride
    row_stride = (tl.cast(width, tl.int64) if WIDE else width) * pixel_stride
    x00, x01, x10, x11 = _corners(point, inside_y, inside_x, row_stride, pixel_stride)
    below = tl.where(known, below, float("nan"))
    y = (1 - below) * ((1 - right) * x00 + right * x01) + below * ((1 - right) * x10 + right * x11)
    tl.store(output + (start + pixel * pixel_stride) + plane, narrow(y, output.dtype.element_ty))


@triton.jit
def offset_sample2d_backward_kernel(
    grad_output,  # [N, C, H, W]
    input,  # [N, C, H, W]
    offset,  # [N, 2C, H, W]
    grad_input,  # [N, C, H, W] float32, added to; None where not wanted
    grad_offset,  # [N, 2C, H, W]; None where not wanted
    height,
    width,
    pixels_multiplier,  # of `_reciprocal`
    pixels_shift,
    width_multiplier,
    width_shift,
    offset_channel_stride,
    offset_pixel_stride,
    channels,
    count,
    image_pixels,
    image_elements,
    channel_stride,
    pixel_stride,
    INTERLEAVED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    LANES: tl.constexpr,  # channels in neighbouring lanes; 1 where these hold pixels
    WIDE: tl.constexpr,
    AXIS: tl.constexpr,
):
    """grad_dy = grad * ((1 - r) (x10 - x00) + r (x11 - x01)) where y is free, dx likewise; corners += grad * weight."""
    channel, image, pixel, row, column, exists = _tile(
        channels,
        count,
        image_pixels,
        width,
        pixels_multiplier,
        pixels_shift,
        width_multiplier,
        width_shift,
        BLOCK_C,
        BLOCK_P,
        LANES,
        WIDE,
        AXIS,
    )
    dy, dx = _pairs(
        offset,
        channel,
        pixel,
        image,
        channels,
        image_pixels,
        offset_channel_stride,
        offset_pixel_stride,
        INTERLEAVED,
    )
    known, beyond_y, beyond_x, inside_y, inside_x, top, left, below, right = _locate(
        tl.load(dy), tl.load(dx), row, column, height, width, WIDE
    )
    start, plane = image * image_elements, channel * channel_stride
    grad = tl.load(grad_output + (start + pixel * pixel_stride) + plane).to(tl.float32)
    grad = tl.where(known, grad, 0.0)
    corner = (top * width + left) * pixel_stride
    row_stride = (tl.cast(width, tl.int64) if WIDE else width) * pixel_stride
    if grad_offset is not None:
        point = input + start + plane + corner
        x00, x01, x10, x11 = _corners(point, inside_y, inside_x, row_stride, pixel_stride)
        grad_y = grad * ((1 - right) * (x10 - x00) + right * (x11 - x01))
        grad_x = grad * ((1 - below) * (x01 - x00) + below * (x11 - x10))
        grad_y = tl.where(known & beyond_y & inside_y, grad_y, 0.0)
        grad_x = tl.where(known & beyond_x & inside_x, grad_x, 0.0)
        dy, dx = _pairs(
            grad_offset,
            channel,
            pixel,
            image,
            channels,
            image_pixels,
            offset_channel_stride,
            offset_pixel_stride,
            INTERLEAVED,
        )
        tl.store(dx, narrow(grad_x, grad_offset.dtype.element_ty))
        tl.store(dy, narrow(grad_y, grad_offset.dtype.element_ty))
    if grad_input is not None:
        # Beyond the last row and column 0 is added to the first corner: a mask would be a branch around each addition.
        point = grad_input + start + plane + corner
        to_row, to_column = tl.where(inside_y, row_stride, 0), tl.where(inside_x, pixel_stride, 0)
        grad = tl.where(exists, grad, 0.0)
        at_left, at_right = grad * (1 - right), tl.where(inside_x, grad * right, 0.0)
        tl.atomic_add(point, at_left * (1 - below), sem="relaxed")
        tl.atomic_add(point + to_column, at_right * (1 - below), sem="relaxed")
        tl.atomic_add(point + to_row, tl.where(inside_y, at_left * below, 0.0), sem="relaxed")
        tl.atomic_add(point + (to_row + to_column), tl.where(inside_y, at_right * below, 0.0), sem="relaxed")


@triton.jit
def offset_sample2d_backward_input_kernel(
    grad_output,  # [N, C, H, W]
    offset,  # [N, 2C, H, W]
    grad_input,  # [N, C, H, W]
    height,
    width,
    offset_channel_stride,
    offset_pixel_stride,
    channels,
    image_pixels,
    image_elements,
    channel_stride,
    pixel_stride,
    INTERLEAVED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    WIDE: tl.constexpr,
    AXIS: tl.constexpr,
):
    """The input's gradient without atomics: a program owns BLOCK_Q pixels of a plane and takes its points in order.

    grad_input[q] = sum over p: grad_output[p] * (the bilinear weight of p's point at q). Blocks of points that touch
    none of q's rows are passed over. Each lane sums up some of the points, and the lanes are added up behind the loop.
    """
    blocks = tl.cdiv(image_pixels, BLOCK_Q)
    image = (tl.program_id(AXIS) // blocks).to(tl.int64)
    first = tl.program_id(AXIS) % blocks * BLOCK_Q
    own = first + tl.arange(0, BLOCK_Q)
    own_row, own_column = (own // width)[:, None], (own % width)[:, None]
    channel = tl.program_id(1 - AXIS).to(tl.int64)
    plane = image * image_elements + channel * channel_stride
    sums = tl.zeros([BLOCK_Q, BLOCK_P], tl.float32)
    for start in range(0, image_pixels, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        exists = pixel < image_pixels
        pixel = tl.minimum(pixel, image_pixels - 1)
        row = pixel // width
        dy, dx = _pairs(
            offset,
            channel,
            pixel.to(tl.int64),
            image,
            channels,
            image_pixels,
            offset_channel_stride,
            offset_pixel_stride,
            INTERLEAVED,
        )
        known, _, _, _, _, top, left, below, right = _locate(
            tl.load(dy), tl.load(dx), row, pixel - row * width, height, width, WIDE
        )
        near = known & exists & (top + 1 >= first // width) & (top <= (first + BLOCK_Q - 1) // width)
        if tl.max(near.to(tl.int32), 0) > 0:
            grad = tl.load(grad_output + plane + pixel.to(tl.int64) * pixel_stride).to(tl.float32)
            upper, lower = grad * (1 - below), grad * below
            down, aside = own_row - tl.where(near, top, -2)[None, :], own_column - left[None, :]
            across = tl.where(aside == 0, (1 - right)[None, :], right[None, :])
            sums += tl.where(
                ((down == 0) | (down == 1)) & ((aside == 0) | (aside == 1)),
                tl.where(down == 0, upper[None, :], lower[None, :]) * across,
                0.0,
            )
    element = plane + own.to(tl.int64) * pixel_stride
    tl.store(grad_input + element, narrow(tl.sum(sums, 1), grad_input.dtype.element_ty), own < image_pixels)


def _offset_strides(offset: Tensor) -> tuple[int, int]:
    """Of a channel and of a pixel."""
    return (offset.shape[2] * offset.shape[3], 1) if offset.is_contiguous() else (1, offset.shape[1])


def _reciprocal(divisor: int) -> tuple[int, int]:
    """A multiplier of 32 bits and a shift: number // divisor is (2 * number * multiplier >> 32) >> shift below 2^31."""
    shift = (divisor - 1).bit_length()
    return ceil_div(1 << (31 + shift), divisor), shift


def _blocks(input: Tensor, elements: int) -> dict[str, int]:
    """A tile of so many elements, among them several channels of each pixel for each of 128 threads."""
    channels = input.shape[1]
    if input.is_contiguous():
        block_c, lanes = power_of_2(channels, 1, elements // 128), 1
    else:
        block_c, lanes = max(gcd(channels, 256), power_of_2(channels, 16, 64)), power_of_2(channels, 16, 32)
    return {"BLOCK_C": block_c, "BLOCK_P": elements // block_c, "LANES": lanes}


def _launch_points(
    kernel: Any, tensors: tuple[Tensor | None, ...], input: Tensor, offset: Tensor, layout: str, elements: int
) -> None:
    """Launch a kernel of which each program takes the points of a tile."""
    if not input.numel():
        return
    blocks, sizes = _blocks(input, elements), tiles(input).sizes
    batch, channels, height, width = input.shape
    launch(
        kernel,
        (ceil_div(batch * height * width, blocks["BLOCK_P"]), ceil_div(channels, blocks["BLOCK_C"])),
        tensors,
        (height, width, *_reciprocal(height * width), *_reciprocal(width), *_offset_strides(offset), *sizes),
        INTERLEAVED=layout == "interleaved",
        WIDE=_wide(offset),
        **blocks,
    )


def _wide(offset: Tensor) -> bool:
    """Whether 32-bit integers do not hold an element's offset, or float32 a row or column."""
    return offset.numel() >= 2**31 or max(offset.shape[2:]) > 2**24


def offset_sample2d_forward_triton(input: Tensor, offset: Tensor, layout: str) -> Tensor:
    """[N, C, H, W]; arguments as in `cellops.offset_sample2d`."""
    output = torch.empty_like(input)
    _launch_points(offset_sample2d_forward_kernel, (input, offset, output), input, offset, layout, 1024)
    return output


def offset_sample2d_backward_triton(
    grad_output: Tensor, input: Tensor, offset: Tensor, layout: str, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients to input and offset; the input's without atomics under `torch.use_deterministic_algorithms(True)`."""
    want_input, want_offset = wanted[:2]
    scattered = want_input and not torch.are_deterministic_algorithms_enabled()
    grad_input = torch.zeros_like(input, dtype=torch.float32) if scattered else None
    grad_offset = torch.empty_like(offset) if want_offset else None
    if scattered or want_offset:
        tensors = (grad_output, input, offset, grad_input, grad_offset)
        _launch_points(offset_sample2d_backward_kernel, tensors, input, offset, layout, 512)
    if want_input and not scattered:
        grad_input, blocks = torch.empty_like(input), tiles(input)
        block = power_of_2(blocks.image_pixels, 16, 64)
        programs = ceil_div(blocks.image_pixels, block)
        for images in image_slices(input.shape[0], programs, blocks.channels):
            grad, points, target = grad_output[images], offset[images], grad_input[images]
            launch(
                offset_sample2d_backward_input_kernel,
                (target.shape[0] * programs, blocks.channels),
                (grad, points, target),
                (*input.shape[2:], *_offset_strides(offset), *blocks.sizes[:1], *blocks.sizes[2:]),
                INTERLEAVED=layout == "interleaved",
                WIDE=_wide(offset),
                BLOCK_Q=block,
                BLOCK_P=block,
            )
    return grad_input, grad_offset
