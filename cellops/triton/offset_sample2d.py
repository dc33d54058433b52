"""Every channel sampled at its own offsets, in Triton: y[n, c, h, w] = x[n, c] at (h + dy, w + dx), clamped.

Forward must move x, the offsets (twice as many numbers) and y once: 4 tensors of x's size, 12 us for 8,512,56,56 in
bfloat16 at 4.3 TB/s. It reads each offset once and four neighbours of each point, which for offsets of a few pixels hit
the first-level cache. In NCHW neighbouring threads hold neighbouring pixels of one channel; in channels_last they hold
neighbouring channels of one pixel, whose offsets come in loads of 16 bytes, but whose points scatter over rows of the
image: 2 bytes used of each sector of 32 that the cache delivers. Backward must move x, offsets, grad_output and both
gradients, 7 of that size; it adds four corners for each point to the input's gradient by float32 atomics and, for half
types, reads that once more to round it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cellops.triton._launch import ceil_div, image_slices, launch, power_of_2
from cellops.triton._numerics import narrow
from cellops.triton._pixels import pixel_elements, tile_elements, tiles


@triton.jit
def _locate(dy, dx, pixel_row, pixel_column, height, width):
    """Of clamped points: known or NaN, free to move along y and x, first row and column, and the fractions beyond."""
    y, x = pixel_row.to(tl.float32) + dy.to(tl.float32), pixel_column.to(tl.float32) + dx.to(tl.float32)
    known = (y == y) & (x == x)
    free_y, free_x = known & (y > 0) & (y < height - 1), known & (x > 0) & (x < width - 1)
    y = tl.where(free_y, y, tl.where(known & (y > 0), height - 1.0, 0.0))
    x = tl.where(free_x, x, tl.where(known & (x > 0), width - 1.0, 0.0))
    top, left = tl.floor(y), tl.floor(x)
    return known, free_y, free_x, top.to(tl.int32), left.to(tl.int32), y - top, x - left


@triton.jit
def _offset_elements(
    channel,
    pixel,
    image,
    channels,
    image_pixels,
    channel_stride,
    pixel_stride,
    INTERLEAVED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Offsets [C, P] of dy and dx: of channels 2c and 2c + 1, or of a pair within the NCHW tensor's row of pairs."""
    if WIDE:
        channel, pixel = channel.to(tl.int64), pixel.to(tl.int64)
    base = image * channels * image_pixels * 2
    if INTERLEAVED:
        pair = channel[:, None] * image_pixels + pixel[None, :]
        dy, dx = 2 * pair, 2 * pair + 1
        dy = dy // image_pixels * channel_stride + dy % image_pixels * pixel_stride
        dx = dx // image_pixels * channel_stride + dx % image_pixels * pixel_stride
    else:
        dy = 2 * channel[:, None] * channel_stride + pixel[None, :] * pixel_stride
        dx = dy + channel_stride
    return base[None, :] + dy, base[None, :] + dx


@triton.jit
def _load_offsets(
    offset,
    channel,
    pixel,
    exists,
    image,
    channels,
    image_pixels,
    channel_stride,
    pixel_stride,
    INTERLEAVED: tl.constexpr,
    PAIRS: tl.constexpr,
    WIDE: tl.constexpr,
    AXIS: tl.constexpr,
):
    """dy and dx [C, P] of a block; and for `_store_offsets` where each of them lies, and which exist.

    With PAIRS a pixel's pairs lie side by side and are read as [P, 2C], in 16-byte loads; both places are the pairs'.
    """
    if PAIRS:
        BLOCK_C: tl.constexpr = channel.shape[0]
        BLOCK_P: tl.constexpr = pixel.shape[0]
        if WIDE:
            pixel = pixel.to(tl.int64)
        number = 2 * BLOCK_C * tl.program_id(1 - AXIS) + tl.arange(0, 2 * BLOCK_C)
        place = (image * channels * image_pixels * 2 + pixel * pixel_stride)[:, None] + number[None, :]
        valid = exists[:, None] & (number < 2 * channels)[None, :]
        dy, dx = tl.split(tl.reshape(tl.load(offset + place, valid, 0.0), [BLOCK_P, BLOCK_C, 2]))
        return tl.trans(dy), tl.trans(dx), place, place, valid
    else:
        dy_place, dx_place = _offset_elements(
            channel, pixel, image, channels, image_pixels, channel_stride, pixel_stride, INTERLEAVED, WIDE
        )
        valid = (channel < channels)[:, None] & exists[None, :]
        dy, dx = tl.load(offset + dy_place, valid, 0.0), tl.load(offset + dx_place, valid, 0.0)
        return dy, dx, dy_place, dx_place, valid


@triton.jit
def _store_offsets(grad_offset, grad_y, grad_x, dy_place, dx_place, valid, PAIRS: tl.constexpr):
    """Gradients to dy and dx [C, P], to where `_load_offsets` found these."""
    grad_y, grad_x = narrow(grad_y, grad_offset.dtype.element_ty), narrow(grad_x, grad_offset.dtype.element_ty)
    if PAIRS:
        pairs = tl.reshape(tl.join(tl.trans(grad_y), tl.trans(grad_x)), valid.shape)
        tl.store(grad_offset + dy_place, pairs, valid)
    else:
        tl.store(grad_offset + dy_place, grad_y, valid)
        tl.store(grad_offset + dx_place, grad_x, valid)


@triton.jit
def _corner(input, plane, valid, row, column, height, width, pixel_stride, WIDE: tl.constexpr):
    """The plane's values at a corner, 0 beyond its last row and column; where the values are; whether they exist."""
    inside = valid & (row < height) & (column < width)
    pixel = row * width + column
    if WIDE:
        pixel = pixel.to(tl.int64)
    element = plane + pixel * pixel_stride
    return tl.load(input + element, inside, 0.0).to(tl.float32), element, inside


@triton.jit
def offset_sample2d_forward_kernel(
    input,  # [N, C, H, W]
    offset,  # [N, 2C, H, W]
    output,  # [N, C, H, W]
    height,
    width,
    offset_channel_stride,
    offset_pixel_stride,
    channels,
    count,
    image_pixels,
    image_elements,
    channel_stride,
    pixel_stride,
    INTERLEAVED: tl.constexpr,
    PAIRS: tl.constexpr,  # planar and channels_last: a pixel's offsets are read side by side
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    WIDE: tl.constexpr,
    AXIS: tl.constexpr,
):
    """output = (1 - b) (1 - r) x00 + (1 - b) r x01 + b (1 - r) x10 + b r x11, with b, r the fractions below, right."""
    channel = tl.program_id(1 - AXIS) * BLOCK_C + tl.arange(0, BLOCK_C)
    index = tl.program_id(AXIS).to(tl.int64 if WIDE else tl.int32) * BLOCK_P + tl.arange(0, BLOCK_P)
    exists, pixel, place = pixel_elements(index, count, image_pixels, image_elements, pixel_stride, WIDE)
    image = index // image_pixels
    valid = (channel < channels)[:, None] & exists[None, :]
    dy, dx, _, _, _ = _load_offsets(
        offset,
        channel,
        pixel,
        exists,
        image,
        channels,
        image_pixels,
        offset_channel_stride,
        offset_pixel_stride,
        INTERLEAVED,
        PAIRS,
        WIDE,
        AXIS,
    )
    known, _, _, top, left, below, right = _locate(
        dy, dx, (pixel // width)[None, :], (pixel % width)[None, :], height, width
    )
    plane = tile_elements(channel, image * image_elements, channel_stride)
    y = tl.where(known, 0.0, float("nan"))
    for corner in tl.static_range(4):
        value, _, _ = _corner(
            input, plane, valid, top + corner // 2, left + corner % 2, height, width, pixel_stride, WIDE
        )
        y += value * (below if corner // 2 else 1 - below) * (right if corner % 2 else 1 - right)
    tl.store(output + tile_elements(channel, place, channel_stride), narrow(y, output.dtype.element_ty), valid)


@triton.jit
def offset_sample2d_backward_kernel(
    grad_output,  # [N, C, H, W]
    input,  # [N, C, H, W]
    offset,  # [N, 2C, H, W]
    grad_input,  # [N, C, H, W] float32, added to; None where not wanted
    grad_offset,  # [N, 2C, H, W]; None where not wanted
    height,
    width,
    offset_channel_stride,
    offset_pixel_stride,
    channels,
    count,
    image_pixels,
    image_elements,
    channel_stride,
    pixel_stride,
    INTERLEAVED: tl.constexpr,
    PAIRS: tl.constexpr,  # planar and channels_last: a pixel's offsets are read side by side
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    WIDE: tl.constexpr,
    AXIS: tl.constexpr,
):
    """grad_dy = grad * ((1 - r) (x10 - x00) + r (x11 - x01)) where y is free, dx likewise; corners += grad * weight."""
    channel = tl.program_id(1 - AXIS) * BLOCK_C + tl.arange(0, BLOCK_C)
    index = tl.program_id(AXIS).to(tl.int64 if WIDE else tl.int32) * BLOCK_P + tl.arange(0, BLOCK_P)
    exists, pixel, place = pixel_elements(index, count, image_pixels, image_elements, pixel_stride, WIDE)
    image = index // image_pixels
    valid = (channel < channels)[:, None] & exists[None, :]
    dy, dx, dy_place, dx_place, offsets_exist = _load_offsets(
        offset,
        channel,
        pixel,
        exists,
        image,
        channels,
        image_pixels,
        offset_channel_stride,
        offset_pixel_stride,
        INTERLEAVED,
        PAIRS,
        WIDE,
        AXIS,
    )
    known, free_y, free_x, top, left, below, right = _locate(
        dy, dx, (pixel // width)[None, :], (pixel % width)[None, :], height, width
    )
    grad = tl.load(grad_output + tile_elements(channel, place, channel_stride), valid, 0.0).to(tl.float32)
    grad = tl.where(known, grad, 0.0)
    plane = tile_elements(channel, image * image_elements, channel_stride)
    grad_y = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    grad_x = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for corner in tl.static_range(4):
        value, element, inside = _corner(
            input, plane, valid & known, top + corner // 2, left + corner % 2, height, width, pixel_stride, WIDE
        )
        weight_y, weight_x = (below if corner // 2 else 1 - below), (right if corner % 2 else 1 - right)
        grad_y += grad * value * weight_x * (corner // 2 * 2 - 1)
        grad_x += grad * value * weight_y * (corner % 2 * 2 - 1)
        if grad_input is not None:
            tl.atomic_add(grad_input + element, grad * weight_y * weight_x, inside, sem="relaxed")
    if grad_offset is not None:
        grad_y, grad_x = tl.where(free_y, grad_y, 0.0), tl.where(free_x, grad_x, 0.0)
        _store_offsets(grad_offset, grad_y, grad_x, dy_place, dx_place, offsets_exist, PAIRS)


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
    none of q's rows are passed over.
    """
    blocks = tl.cdiv(image_pixels, BLOCK_Q)
    image = (tl.program_id(AXIS) // blocks).to(tl.int64)
    first = tl.program_id(AXIS) % blocks * BLOCK_Q
    own = first + tl.arange(0, BLOCK_Q)
    own_row, own_column = own // width, own % width
    channel = tl.program_id(1 - AXIS) + tl.arange(0, 1)
    plane = image * image_elements + channel.to(tl.int64) * channel_stride
    sum = tl.zeros([BLOCK_Q], tl.float32)
    for start in range(0, image_pixels, BLOCK_P):
        pixel = start + tl.arange(0, BLOCK_P)
        exists = pixel < image_pixels
        dy, dx, _, _, _ = _load_offsets(
            offset,
            channel,
            pixel,
            exists,
            image + tl.zeros([BLOCK_P], tl.int64),
            channels,
            image_pixels,
            offset_channel_stride,
            offset_pixel_stride,
            INTERLEAVED,
            False,
            WIDE,
            AXIS,
        )
        known, _, _, top, left, below, right = _locate(
            dy, dx, (pixel // width)[None, :], (pixel % width)[None, :], height, width
        )
        near = known & exists[None, :] & (top + 1 >= first // width) & (top <= (first + BLOCK_Q - 1) // width)
        if tl.max(tl.max(near.to(tl.int32), 1), 0) > 0:
            grad = tl.load(grad_output + plane + pixel.to(plane.dtype) * pixel_stride, exists, 0.0).to(tl.float32)
            down, aside = own_row[:, None] - top, own_column[:, None] - left
            weight = tl.where(down == 0, 1 - below, tl.where(down == 1, below, 0.0))
            weight *= tl.where(aside == 0, 1 - right, tl.where(aside == 1, right, 0.0))
            sum += tl.sum(tl.where(near, weight * grad[None, :], 0.0), 1)
    element = plane + own.to(plane.dtype) * pixel_stride
    tl.store(grad_input + element, narrow(sum, grad_input.dtype.element_ty), own < image_pixels)


def _offset_strides(offset: Tensor) -> tuple[int, int]:
    """Of a channel and of a pixel."""
    return (offset.shape[2] * offset.shape[3], 1) if offset.is_contiguous() else (1, offset.shape[1])


def _layout_constants(offset: Tensor, layout: str) -> dict[str, bool]:
    interleaved = layout == "interleaved"
    return {"INTERLEAVED": interleaved, "PAIRS": not interleaved and not offset.is_contiguous()}


def offset_sample2d_forward_triton(input: Tensor, offset: Tensor, layout: str) -> Tensor:
    """[N, C, H, W]; arguments as in `cellops.offset_sample2d`."""
    output, blocks = torch.empty_like(input), tiles(input)
    sizes = (*input.shape[2:], *_offset_strides(offset), *blocks.sizes)
    constants = {**_layout_constants(offset, layout), **blocks.constants, "WIDE": offset.numel() >= 2**31}
    launch(offset_sample2d_forward_kernel, blocks.grid, input, offset, output, *sizes, **constants)
    return output


def offset_sample2d_backward_triton(
    grad_output: Tensor, input: Tensor, offset: Tensor, layout: str, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients to input and offset; the input's without atomics under `torch.use_deterministic_algorithms(True)`."""
    want_input, want_offset = wanted[:2]
    scattered = want_input and not torch.are_deterministic_algorithms_enabled()
    blocks, strides = tiles(input), _offset_strides(offset)
    constants = {"INTERLEAVED": layout == "interleaved", "WIDE": offset.numel() >= 2**31}
    grad_input = torch.zeros_like(input, dtype=torch.float32) if scattered else None
    grad_offset = torch.empty_like(offset) if want_offset else None
    if scattered or want_offset:
        launch(
            offset_sample2d_backward_kernel,
            blocks.grid,
            *(grad_output, input, offset, grad_input, grad_offset, *input.shape[2:], *strides),
            *blocks.sizes,
            **{**blocks.constants, **constants, **_layout_constants(offset, layout)},
        )
    if want_input and not scattered:
        grad_input = torch.empty_like(input)
        block = power_of_2(blocks.image_pixels, 16, 64)
        programs = ceil_div(blocks.image_pixels, block)
        for images in image_slices(input.shape[0], programs, blocks.channels):
            grad, points, target = grad_output[images], offset[images], grad_input[images]
            launch(
                offset_sample2d_backward_input_kernel,
                (target.shape[0] * programs, blocks.channels),
                *(grad, points, target, *input.shape[2:], *strides, *blocks.sizes[:1], *blocks.sizes[2:]),
                **constants,
                BLOCK_Q=block,
                BLOCK_P=block,
            )
    return grad_input, grad_offset
