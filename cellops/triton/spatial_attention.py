"""Spatial attention in Triton: y = x * sigmoid(conv(source) + bias), source = x, or x's maximum and mean over channels.

A program owns some pixels and all of their channels: it finds their scale, then scales, so that what the scale was
found from is still in the caches, or in registers where all channels are one tile. Maps of one number for each pixel,
in float32, are all that is stored between them.

Passes over memory for a tensor of B bytes (bound on an H200: passes * B / 4.3 TB/s; 2 * k * k operations an element):
    forward, "conv"     2: read x, write y, the floor; for k > 1 the neighbours come from the caches
    forward, "pool"     3: read x for the maps and, from its end, which the L2 cache still has, to scale it; write y
    backward            5: x and grad_output for the logits' gradient, grad_output again (with "pool" x too), x again
                        for the weight ("conv"), and the gradient written; 3 are the floor

What else counts is instructions: 27 for an element of two bytes that is read and written take as long as its bytes.
    - Maps are convolved by a thread for each pixel, in programs of at least as many pixels as threads: among the
      threads of a tile's channels each would do it again, 100 an element for 7x7 and 128 channels.
    - In channels_last a pixel's offset is index * channels: no division.
    - Sums are kept for each element of the tile as long as there are tiles, and added up once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cellops.triton._launch import ceil_div, launch, multiprocessors, power_of_2
from cellops.triton._numerics import narrow
from cellops.triton._pixels import Tiles, pixel_elements, tile_elements, tiles


@triton.jit
def _places(index, count, channels, image_pixels, image_elements, pixel_stride, LAST: tl.constexpr, WIDE: tl.constexpr):
    """Of pixels numbered over all images: whether they exist, the offset of their first channel [P]."""
    if LAST:
        return index < count, index * channels
    else:
        exists, _, place = pixel_elements(index, count, image_pixels, image_elements, pixel_stride, WIDE)
        return exists, place


@triton.jit
def _tile(image, channel, known, exists, place, channel_stride):
    """An image's numbers [C, P] in float32, 0 outside."""
    valid = known[:, None] & exists[None, :]
    return tl.load(image + tile_elements(channel, place, channel_stride), valid, 0.0).to(tl.float32)


@triton.jit
def _column(values, channel, known):
    """Numbers of the channels in float32, [C, 1]."""
    return tl.load(values + channel, known, 0.0).to(tl.float32)[:, None]


@triton.jit
def _within(at, size):
    return (at >= 0) & (at < size)


@triton.jit
def _maps_convolved(source, index, exists, weight, count, height, width, K: tl.constexpr):
    """sum over both maps and their taps of weight[map, tap] * source[map] at tap - centre, [P]; 0 outside the image."""
    row, column = index // width % height, index % width
    sum = tl.zeros(index.shape, tl.float32)
    for i in tl.range(0, K):
        line = source + index + (i - K // 2) * width
        inside = exists & _within(row + (i - K // 2), height)
        for j in tl.static_range(K):
            valid = inside & _within(column + (j - K // 2), width)
            for map in tl.static_range(2):
                value = tl.load(line + map * count + (j - K // 2), valid, 0.0)
                sum += tl.load(weight + (map * K + i) * K + j).to(tl.float32) * value
    return sum


@triton.jit
def _through_maps(grad_logits, index, exists, weight, height, width, K: tl.constexpr):
    """The gradients to maximum and mean, [P] each: `_maps_convolved` transposed."""
    row, column = index // width % height, index % width
    through_maximum = tl.zeros(index.shape, tl.float32)
    through_mean = tl.zeros(index.shape, tl.float32)
    for i in tl.range(0, K):
        line = grad_logits + index - (i - K // 2) * width
        inside = exists & _within(row - (i - K // 2), height)
        for j in tl.static_range(K):
            value = tl.load(line - (j - K // 2), inside & _within(column - (j - K // 2), width), 0.0)
            through_maximum += tl.load(weight + i * K + j).to(tl.float32) * value
            through_mean += tl.load(weight + (K + i) * K + j).to(tl.float32) * value
    return through_maximum, through_mean


@triton.jit
def _convolved(
    input, index, exists, place, weight, height, width, channels, channel_stride, pixel_stride, K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sum over channels and taps of weight[c, tap] * input[c] at tap - centre, [P]; 0 outside the image."""
    row, column = index // width % height, index % width
    valid = exists
    sum = tl.zeros([BLOCK_C, index.shape[0]], tl.float32)
    for start in range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        known = channel < channels
        for tap in tl.range(0, K * K, loop_unroll_factor=K):
            dy, dx = tap // K - K // 2, tap % K - K // 2
            if K > 1:
                valid = exists & _within(row + dy, height) & _within(column + dx, width)
            value = _tile(input, channel, known, valid, place + (dy * width + dx) * pixel_stride, channel_stride)
            sum += _column(weight + tap, channel * K * K, known) * value
    return tl.sum(sum, 0)


@triton.jit
def _scale(logits, bias):
    """The scales of logits [P] that lack the bias."""
    if bias is not None:
        logits += tl.load(bias).to(tl.float32)
    return tl.sigmoid(logits)


@triton.jit
def spatial_attention_pool_kernel(
    input,  # [N, C, H, W]
    source,  # [2, N, H, W] float32
    channels, count, image_pixels, image_elements, channel_stride, pixel_stride,
    LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """source[0] = maximum over the channels, source[1] = mean."""
    index = tl.program_id(0).to(tl.int64 if WIDE else tl.int32) * BLOCK_P + tl.arange(0, BLOCK_P)
    exists, place = _places(index, count, channels, image_pixels, image_elements, pixel_stride, LAST, WIDE)
    largest = tl.full([BLOCK_C, BLOCK_P], float("-inf"), tl.float32)
    sum = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for start in range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        known = channel < channels
        x = _tile(input, channel, known, exists, place, channel_stride)
        sum += x
        x = tl.where(known[:, None], x, float("-inf"))
        largest = tl.maximum(largest, x, propagate_nan=tl.PropagateNan.ALL)
    unknown = tl.max((largest != largest).to(tl.int32), 0) > 0  # tl.max leaves NaN out
    tl.store(source + index, tl.where(unknown, float("nan"), tl.max(largest, 0)), exists)
    tl.store(source + count + index, tl.sum(sum, 0) / channels, exists)


@triton.jit
def spatial_attention_forward_kernel(
    input,  # [N, C, H, W]
    source,  # [2, N, H, W] float32, None for "conv"
    weight,  # [C or 2, K, K]
    bias,  # [1], or None
    output,  # [N, C, H, W]
    height, width, channels, count, image_pixels, image_elements, channel_stride, pixel_stride,
    K: tl.constexpr, WHOLE: tl.constexpr, LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """output = input * scale. WHOLE: all channels are one tile, and each pixel has a scale of its own.

    The last pixels come first: maps were made of them last.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    index = tile.to(tl.int64 if WIDE else tl.int32) * BLOCK_P + tl.arange(0, BLOCK_P)
    exists, place = _places(index, count, channels, image_pixels, image_elements, pixel_stride, LAST, WIDE)
    if WHOLE:
        channel = tl.arange(0, BLOCK_C)
        known = channel < channels
        x = _tile(input, channel, known, exists, place, channel_stride)
        y = x * _scale(tl.sum(_column(weight, channel, known) * x, 0), bias)[None, :]
        element = tile_elements(channel, place, channel_stride)
        tl.store(output + element, narrow(y, output.dtype.element_ty), known[:, None] & exists[None, :])
    else:
        if source is not None:
            logits = _maps_convolved(source, index, exists, weight, count, height, width, K)
        else:
            logits = _convolved(
                input, index, exists, place, weight, height, width, channels, channel_stride, pixel_stride, K, BLOCK_C
            )
        scale = _scale(logits, bias)
        for start in range(0, channels, BLOCK_C):
            channel = start + tl.arange(0, BLOCK_C)
            known = channel < channels
            y = _tile(input, channel, known, exists, place, channel_stride) * scale[None, :]
            element = tile_elements(channel, place, channel_stride)
            tl.store(output + element, narrow(y, output.dtype.element_ty), known[:, None] & exists[None, :])


@triton.jit
def spatial_attention_backward_logits_kernel(
    grad_output,  # [N, C, H, W]
    input,  # [N, C, H, W]
    source,  # [2, N, H, W] float32, None for "conv"
    weight,  # [C or 2, K, K]
    bias,  # [1], or None
    scales,  # [N, H, W] float32
    grad_logits,  # [N, H, W] float32
    ties,  # [N, H, W] float32: channels that reach the maximum; None for "conv"
    height, width, channels, count, image_pixels, image_elements, channel_stride, pixel_stride,
    K: tl.constexpr, WHOLE: tl.constexpr, LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """grad_logits = scale * (1 - scale) * sum over the channels of grad_output * input."""
    index = tl.program_id(0).to(tl.int64 if WIDE else tl.int32) * BLOCK_P + tl.arange(0, BLOCK_P)
    exists, place = _places(index, count, channels, image_pixels, image_elements, pixel_stride, LAST, WIDE)
    product = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    if WHOLE:
        channel = tl.arange(0, BLOCK_C)
        known = channel < channels
        x = _tile(input, channel, known, exists, place, channel_stride)
        logits = tl.sum(_column(weight, channel, known) * x, 0)
        product += _tile(grad_output, channel, known, exists, place, channel_stride) * x
    else:
        if source is not None:
            logits = _maps_convolved(source, index, exists, weight, count, height, width, K)
            maximum = tl.load(source + index, exists, 0.0)
            reached = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
        else:
            logits = _convolved(
                input, index, exists, place, weight, height, width, channels, channel_stride, pixel_stride, K, BLOCK_C
            )
        for start in range(0, channels, BLOCK_C):
            channel = start + tl.arange(0, BLOCK_C)
            known = channel < channels
            x = _tile(input, channel, known, exists, place, channel_stride)
            product += _tile(grad_output, channel, known, exists, place, channel_stride) * x
            if source is not None:
                reached += tl.where(known[:, None] & (x == maximum[None, :]), 1.0, 0.0)
        if source is not None:
            tl.store(ties + index, tl.sum(reached, 0), exists)
    scale = _scale(logits, bias)
    tl.store(scales + index, scale, exists)
    tl.store(grad_logits + index, tl.sum(product, 0) * scale * (1 - scale), exists)


@triton.jit
def spatial_attention_backward_input_kernel(
    grad_output,  # [N, C, H, W]
    input,  # [N, C, H, W]
    source,  # [2, N, H, W] float32, None for "conv"
    weight,  # [C or 2, K, K]
    scales,  # [N, H, W] float32
    grad_logits,  # [N, H, W] float32
    ties,  # [N, H, W] float32, None for "conv"
    grad_input,  # [N, C, H, W]
    height, width, channels, count, image_pixels, image_elements, channel_stride, pixel_stride,
    K: tl.constexpr, LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """grad_input = grad_output * scale + the transposed convolution of grad_logits, through the pooling if there is."""
    index = tl.program_id(0).to(tl.int64 if WIDE else tl.int32) * BLOCK_P + tl.arange(0, BLOCK_P)
    exists, place = _places(index, count, channels, image_pixels, image_elements, pixel_stride, LAST, WIDE)
    scale = tl.load(scales + index, exists, 0.0)
    if source is not None:
        through_maximum, through_mean = _through_maps(grad_logits, index, exists, weight, height, width, K)
        through_maximum = through_maximum / tl.load(ties + index, exists, 1.0)
        through_mean = through_mean / channels
        maximum = tl.load(source + index, exists, 0.0)
    else:
        row, column = index // width % height, index % width
        valid = exists
    for start in range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        known = channel < channels
        grad = _tile(grad_output, channel, known, exists, place, channel_stride) * scale[None, :]
        if source is not None:
            x = _tile(input, channel, known, exists, place, channel_stride)
            grad += tl.where(x == maximum[None, :], through_maximum[None, :], 0.0) + through_mean[None, :]
        else:
            for tap in tl.range(0, K * K, loop_unroll_factor=K):
                dy, dx = K // 2 - tap // K, K // 2 - tap % K
                if K > 1:
                    valid = exists & _within(row + dy, height) & _within(column + dx, width)
                value = tl.load(grad_logits + index + dy * width + dx, valid, 0.0)
                grad += _column(weight + tap, channel * K * K, known) * value[None, :]
        element = tile_elements(channel, place, channel_stride)
        tl.store(grad_input + element, narrow(grad, grad_input.dtype.element_ty), known[:, None] & exists[None, :])


@triton.jit
def spatial_attention_backward_weight_kernel(
    input,  # [N, C, H, W]
    grad_logits,  # [N, H, W] float32
    grad_weights,  # [parts, C, K, K] float32
    part_pixels,
    height, width, channels, count, image_pixels, image_elements, channel_stride, pixel_stride,
    K: tl.constexpr, LAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, WIDE: tl.constexpr,
    AXIS: tl.constexpr,
):  # fmt: skip
    """grad_weight[c, tap] = sum over pixels of input[c] at (tap - centre) * grad_logits, over a part of the pixels."""
    part, tap = tl.program_id(AXIS) // (K * K), tl.program_id(AXIS) % (K * K)
    dy, dx = tap // K - K // 2, tap % K - K // 2
    channel = tl.program_id(1 - AXIS) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < channels
    sums = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    first = part.to(tl.int64 if WIDE else tl.int32) * part_pixels
    for start in range(0, part_pixels, BLOCK_P):
        index = first + start + tl.arange(0, BLOCK_P)
        exists, place = _places(index, count, channels, image_pixels, image_elements, pixel_stride, LAST, WIDE)
        grad = tl.load(grad_logits + index, exists, 0.0)
        if K > 1:
            exists &= _within(index // width % height + dy, height) & _within(index % width + dx, width)
        place += (dy * width + dx) * pixel_stride
        sums += _tile(input, channel, known, exists, place, channel_stride) * grad[None, :]
    tl.store(grad_weights + (part * channels + channel) * K * K + tap, tl.sum(sums, 1), known)


@triton.jit
def spatial_attention_backward_map_weight_kernel(
    source,  # [2, N, H, W] float32
    grad_logits,  # [N, H, W] float32
    grad_weights,  # [parts, 2, K, K] float32
    part_strips, strips, count, height, width,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr, WIDE: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """grad_weight[:, :, j] = sum over pixels of source[map] at (tap - centre) * grad_logits, over a part of them.

    A thread has a strip of ROWS pixels, one below the other: they and the taps of a column share what they load.
    """
    part, j = tl.program_id(AXIS).to(tl.int64 if WIDE else tl.int32), tl.program_id(1 - AXIS)
    blocks = tl.cdiv(height, ROWS)
    of_maximum = (tl.zeros([BLOCK_P], tl.float32),) * K
    of_mean = (tl.zeros([BLOCK_P], tl.float32),) * K
    for start in range(0, part_strips, BLOCK_P):
        strip = part * part_strips + start + tl.arange(0, BLOCK_P)
        block, column = strip // width, strip % width
        row = block % blocks * ROWS
        place = (block // blocks * height + row) * width + column
        grads = ()
        for r in tl.static_range(ROWS):
            grad = tl.load(grad_logits + place + r * width, (strip < strips) & (row + r < height), 0.0)
            grads = grads + (grad,)
        inside = (strip < strips) & _within(column + (j - K // 2), width)
        for i in tl.static_range(ROWS + K - 1):
            valid = inside & _within(row + (i - K // 2), height)
            line = source + place + (i - K // 2) * width + (j - K // 2)
            of_maximum = _with_products(of_maximum, tl.load(line, valid, 0.0), grads, row, height, i, K, ROWS)
            of_mean = _with_products(of_mean, tl.load(line + count, valid, 0.0), grads, row, height, i, K, ROWS)
    place = grad_weights + part * 2 * K * K + j
    for i in tl.static_range(K):
        tl.store(place + i * K, tl.sum(of_maximum[i], 0))
        tl.store(place + (K + i) * K, tl.sum(of_mean[i], 0))


@triton.jit
def _with_products(sums, value, grads, row, height, LINE: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr):
    """The sums of the K taps with the products of one line of a strip's surroundings."""
    added = ()
    for i in tl.static_range(K):
        sum = sums[i]
        if LINE >= i and LINE - i < ROWS:
            # An infinite value times the 0 of a row that there is not would be NaN.
            sum += tl.where(row + (LINE - i) < height, value, 0.0) * grads[LINE - i]
        added = added + (sum,)
    return added


MAP_PIXELS = 128
"""Of a program that convolves maps: as many as threads, which then do not do each other's work again."""

STRIP_ROWS = 4
"""Pixels, one below the other, of a thread that sums a map's products."""


def _blocks(image: Tensor, kernel: int, pool: bool, images: int = 1) -> tuple[Tiles, bool]:
    """Tiles of some channels of a few pixels, whose program goes through all channels; WHOLE if there is one alone.

    Args:
        image: any of the images.
        kernel: of the convolution.
        pool: whether maps are convolved.
        images: that are loaded in a pass; with 64 elements a thread, two and their sums would take 226 registers.
    """
    return _blocks_of(tiles(image), image.element_size(), kernel, pool, images)


@lru_cache(maxsize=4096)
def _blocks_of(layout: Tiles, element_size: int, kernel: int, pool: bool, images: int) -> tuple[Tiles, bool]:
    if layout.pixel_stride == 1:
        block_p = power_of_2(layout.total, 16, MAP_PIXELS)
        return replace(layout, block_p=block_p, block_c=power_of_2(layout.channels, 1, 1024 // block_p)), False
    if pool:
        block_c = power_of_2(layout.channels, 16, max(128 // element_size // images, 16))
        return replace(layout, block_p=MAP_PIXELS, block_c=block_c), False
    if kernel == 1 and layout.channels <= 512:
        block_c = power_of_2(layout.channels, 16)
        return replace(layout, block_p=4096 // block_c, block_c=block_c), True
    return layout, False


def _constants(image: Tensor, layout: Tiles) -> dict[str, Any]:
    return {"LAST": not image.is_contiguous(), **layout.constants}


def _pixel_grid(layout: Tiles) -> tuple[int]:
    return (ceil_div(layout.total, layout.block_p),)


def _pooled(input: Tensor) -> Tensor:
    """Maximum and mean over the channels, [2, N, H, W]."""
    # Of float32 a load of 16 bytes has four elements: of 2048 the maxima and sums would spill on sm_120.
    layout = _blocks(input, 1, False)[0] if input.is_contiguous() else tiles(input, 4096 // input.element_size())
    source = torch.empty(2, input.shape[0], *input.shape[2:], dtype=torch.float32, device=input.device)
    constants = _constants(input, layout)
    launch(spatial_attention_pool_kernel, _pixel_grid(layout), (input, source), layout.sizes, **constants)
    return source


def spatial_attention_forward_triton(input: Tensor, weight: Tensor, bias: Tensor | None, mode: str) -> Tensor:
    """[N, C, H, W]; arguments as in `cellops.spatial_attention`."""
    output, pool, kernel = torch.empty_like(input), mode == "pool", weight.shape[2]
    layout, whole = _blocks(input, kernel, pool)
    source = _pooled(input) if pool else None
    tensors = (input, source, weight, bias, output)
    constants = {"K": kernel, "WHOLE": whole, **_constants(input, layout)}
    sizes, grid = (*input.shape[2:], *layout.sizes), _pixel_grid(layout)
    launch(spatial_attention_forward_kernel, grid, tensors, sizes, **constants)
    return output


def spatial_attention_backward_triton(
    grad_output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, mode: str, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients to the three tensors; the maximum's goes in equal shares to the channels that reach it."""
    pool, kernel = mode == "pool", weight.shape[2]
    layout, whole = _blocks(input, kernel, pool, 2)
    source = _pooled(input) if pool else None
    maps = input.new_empty(3, *input.shape[:1], *input.shape[2:], dtype=torch.float32)
    scales, grad_logits, ties = maps[0], maps[1], maps[2] if pool else None
    constants = {"K": kernel, **_constants(input, layout)}
    sizes, grid = (*input.shape[2:], *layout.sizes), _pixel_grid(layout)
    tensors = (grad_output, input, source, weight, bias, scales, grad_logits, ties)
    launch(spatial_attention_backward_logits_kernel, grid, tensors, sizes, WHOLE=whole, **constants)
    grad_input = grad_weight = None
    if wanted[0]:
        grad_input = torch.empty_like(input)
        tensors = (grad_output, input, source, weight, scales, grad_logits, ties, grad_input)
        launch(spatial_attention_backward_input_kernel, grid, tensors, sizes, **constants)
    if wanted[1] and source is None:
        grad_weight = _grad_weight(input, grad_logits, kernel)
    elif wanted[1]:
        grad_weight = _grad_map_weight(source, grad_logits, kernel)
    return grad_input, grad_weight, None if bias is None else grad_logits.sum()


def _grad_weight(input: Tensor, grad_logits: Tensor, kernel: int) -> Tensor:
    layout = tiles(input)
    grad_weights = input.new_empty(layout.parts, layout.channels, kernel, kernel, dtype=torch.float32)
    tensors, sizes = (input, grad_logits, grad_weights), (layout.part_pixels, *input.shape[2:], *layout.sizes)
    # The taps of a part are neighbours in the grid: what one loads is in the L2 cache for the others.
    grid = (layout.parts * kernel * kernel, ceil_div(layout.channels, layout.block_c))
    launch(spatial_attention_backward_weight_kernel, grid, tensors, sizes, K=kernel, **_constants(input, layout))
    return grad_weights.sum(0)


def _grad_map_weight(source: Tensor, grad_logits: Tensor, kernel: int) -> Tensor:
    batch, height, width = grad_logits.shape
    strips = batch * ceil_div(height, STRIP_ROWS) * width
    programs = ceil_div(8 * multiprocessors(source.device), kernel)
    part_strips = max(ceil_div(ceil_div(strips, MAP_PIXELS), programs), 1) * MAP_PIXELS
    parts = ceil_div(strips, part_strips)
    grad_weights = source.new_empty(parts, 2, kernel, kernel)
    tensors, sizes = (source, grad_logits, grad_weights), (part_strips, strips, grad_logits.numel(), height, width)
    wide = 2 * source.numel() >= 2**31
    constants = {"K": kernel, "ROWS": STRIP_ROWS, "BLOCK_P": MAP_PIXELS, "WIDE": wide}
    launch(spatial_attention_backward_map_weight_kernel, (parts, kernel), tensors, sizes, **constants)
    return grad_weights.sum(0)
