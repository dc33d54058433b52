"""Spatial attention in Triton: y = x * sigmoid(conv(source) + bias), source = x, or x's maximum and mean over channels.

A program owns some pixels and all of their channels: it finds their scale, then scales, so that what the scale was
found from is still in the caches. Maps of one number for each pixel, in float32, are all that is stored between them.

Passes over memory for a tensor of B bytes (bound on an H200: passes * B / 4.3 TB/s; 2 * k * k operations an element):
    forward, "conv"     2: read x, write y, the floor; for k > 1 the neighbours come from the caches
    forward, "pool"     2 as well: images go in chunks that stay in the L2 cache between the maps and the scaling
    backward            5: x and grad_output for the logits' gradient, grad_output again (with "pool" x too), x again
                        for the weight ("conv"), and the gradient written; 3 are the floor
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cellops.triton._channel_attention import chunks
from cellops.triton._launch import ceil_div, launch, power_of_2
from cellops.triton._numerics import narrow
from cellops.triton._pixels import Tiles, pixel_elements, tile_elements, tiles


@triton.jit
def _beside(pixel, tap, SIGN: tl.constexpr, height, width, K: tl.constexpr):
    """Whether the pixel at SIGN * (tap - centre) lies in the image, and how many pixels on it is."""
    dy, dx = SIGN * (tap // K - K // 2), SIGN * (tap % K - K // 2)
    row, column = pixel // width + dy, pixel % width + dx
    return (row >= 0) & (row < height) & (column >= 0) & (column < width), dy * width + dx


@triton.jit
def _map_convolved(
    map, place, map_stride, exists, pixel, weight, first, height, width, K: tl.constexpr, SIGN: tl.constexpr
):
    """sum over taps of weight[first + tap] * a float32 map at SIGN * (tap - centre), [P]; 0 outside the image."""
    sum = tl.zeros(place.shape, tl.float32)
    for tap in tl.range(0, K * K, loop_unroll_factor=K):
        inside, step = _beside(pixel, tap, SIGN, height, width, K)
        value = tl.load(map + place + step * map_stride, exists & inside, 0.0)
        sum += tl.load(weight + first + tap).to(tl.float32) * value
    return sum


@triton.jit
def _scale(
    input,
    source,
    weight,
    bias,
    index,
    exists,
    pixel,
    place,
    height,
    width,
    channels,
    image_pixels,
    channel_stride,
    pixel_stride,
    K: tl.constexpr,
    POOL: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The sigmoid of the logits [P]."""
    logits = tl.zeros(place.shape, tl.float32)
    if bias is not None:
        logits += tl.load(bias).to(tl.float32)
    if POOL:
        map_place = index // image_pixels * 2 * image_pixels + pixel
        for map in tl.static_range(2):
            logits += _map_convolved(
                source, map_place + map * image_pixels, 1, exists, pixel, weight, map * K * K, height, width, K, 1
            )
    else:
        for start in range(0, channels, BLOCK_C):
            channel = start + tl.arange(0, BLOCK_C)
            known = channel < channels
            element = tile_elements(channel, place, channel_stride)
            sum = tl.zeros(element.shape, tl.float32)
            for tap in tl.range(0, K * K, loop_unroll_factor=K):
                inside, step = _beside(pixel, tap, 1, height, width, K)
                valid = known[:, None] & (exists & inside)[None, :]
                value = tl.load(input + element + step * pixel_stride, valid, 0.0).to(tl.float32)
                sum += tl.load(weight + channel * K * K + tap, known, 0.0).to(tl.float32)[:, None] * value
            logits += tl.sum(sum, 0)
    return tl.sigmoid(logits)


@triton.jit
def spatial_attention_pool_kernel(
    input,  # [N, C, H, W]
    source,  # [N, 2, H, W] float32
    channels, count, image_pixels, image_elements, channel_stride, pixel_stride,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """source[:, 0] = maximum over the channels, source[:, 1] = mean."""
    index = tl.program_id(0).to(tl.int64 if WIDE else tl.int32) * BLOCK_P + tl.arange(0, BLOCK_P)
    exists, pixel, place = pixel_elements(index, count, image_pixels, image_elements, pixel_stride, WIDE)
    largest = tl.full([BLOCK_C, BLOCK_P], float("-inf"), tl.float32)
    unknown = tl.zeros([BLOCK_C, BLOCK_P], tl.int32)
    sum = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for start in range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        valid = (channel < channels)[:, None] & exists[None, :]
        x = tl.load(input + tile_elements(channel, place, channel_stride), valid, float("-inf")).to(tl.float32)
        largest = tl.where(x > largest, x, largest)
        unknown = tl.where(x != x, 1, unknown)
        sum += tl.where(valid, x, 0.0)
    place = index // image_pixels * 2 * image_pixels + pixel
    maximum = tl.where(tl.max(unknown, 0) > 0, float("nan"), tl.max(largest, 0))
    tl.store(source + place, maximum, exists)
    tl.store(source + place + image_pixels, tl.sum(sum, 0) / channels, exists)


@triton.jit
def spatial_attention_forward_kernel(
    input,  # [N, C, H, W]
    source,  # [N, 2, H, W] float32, None for "conv"
    weight,  # [C or 2, K, K]
    bias,  # [1], or None
    output,  # [N, C, H, W]
    height, width, channels, count, image_pixels, image_elements, channel_stride, pixel_stride,
    K: tl.constexpr, POOL: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """output = input * scale."""
    index = tl.program_id(0).to(tl.int64 if WIDE else tl.int32) * BLOCK_P + tl.arange(0, BLOCK_P)
    exists, pixel, place = pixel_elements(index, count, image_pixels, image_elements, pixel_stride, WIDE)
    scale = _scale(
        input,
        source,
        weight,
        bias,
        index,
        exists,
        pixel,
        place,
        height,
        width,
        channels,
        image_pixels,
        channel_stride,
        pixel_stride,
        K,
        POOL,
        BLOCK_C,
    )
    for start in range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        valid = (channel < channels)[:, None] & exists[None, :]
        element = tile_elements(channel, place, channel_stride)
        y = tl.load(input + element, valid, 0.0).to(tl.float32) * scale[None, :]
        tl.store(output + element, narrow(y, output.dtype.element_ty), valid)


@triton.jit
def spatial_attention_backward_logits_kernel(
    grad_output,  # [N, C, H, W]
    input,  # [N, C, H, W]
    source,  # [N, 2, H, W] float32, None for "conv"
    weight,  # [C or 2, K, K]
    bias,  # [1], or None
    scales,  # [N, H, W] float32
    grad_logits,  # [N, H, W] float32
    ties,  # [N, H, W] float32: channels that reach the maximum; None for "conv"
    height, width, channels, count, image_pixels, image_elements, channel_stride, pixel_stride,
    K: tl.constexpr, POOL: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """grad_logits = scale * (1 - scale) * sum over the channels of grad_output * input."""
    index = tl.program_id(0).to(tl.int64 if WIDE else tl.int32) * BLOCK_P + tl.arange(0, BLOCK_P)
    exists, pixel, place = pixel_elements(index, count, image_pixels, image_elements, pixel_stride, WIDE)
    scale = _scale(
        input,
        source,
        weight,
        bias,
        index,
        exists,
        pixel,
        place,
        height,
        width,
        channels,
        image_pixels,
        channel_stride,
        pixel_stride,
        K,
        POOL,
        BLOCK_C,
    )
    product = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    reached = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for start in range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        valid = (channel < channels)[:, None] & exists[None, :]
        element = tile_elements(channel, place, channel_stride)
        x = tl.load(input + element, valid, 0.0).to(tl.float32)
        product += tl.load(grad_output + element, valid, 0.0).to(tl.float32) * x
        if POOL:
            maximum = tl.load(source + index // image_pixels * 2 * image_pixels + pixel, exists, 0.0)
            reached += tl.where(valid & (x == maximum[None, :]), 1.0, 0.0)
    tl.store(scales + index, scale, exists)
    tl.store(grad_logits + index, tl.sum(product, 0) * scale * (1 - scale), exists)
    if POOL:
        tl.store(ties + index, tl.sum(reached, 0), exists)


@triton.jit
def spatial_attention_backward_input_kernel(
    grad_output,  # [N, C, H, W]
    input,  # [N, C, H, W]
    source,  # [N, 2, H, W] float32, None for "conv"
    weight,  # [C or 2, K, K]
    scales,  # [N, H, W] float32
    grad_logits,  # [N, H, W] float32
    ties,  # [N, H, W] float32, None for "conv"
    grad_input,  # [N, C, H, W]
    height, width, channels, count, image_pixels, image_elements, channel_stride, pixel_stride,
    K: tl.constexpr, POOL: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """grad_input = grad_output * scale + the transposed convolution of grad_logits, through the pooling if there is."""
    index = tl.program_id(0).to(tl.int64 if WIDE else tl.int32) * BLOCK_P + tl.arange(0, BLOCK_P)
    exists, pixel, place = pixel_elements(index, count, image_pixels, image_elements, pixel_stride, WIDE)
    scale = tl.load(scales + index, exists, 0.0)
    if POOL:
        through_maximum = _map_convolved(grad_logits, index, 1, exists, pixel, weight, 0, height, width, K, -1)
        through_maximum = through_maximum / tl.load(ties + index, exists, 1.0)
        through_mean = _map_convolved(grad_logits, index, 1, exists, pixel, weight, K * K, height, width, K, -1)
        maximum = tl.load(source + index // image_pixels * 2 * image_pixels + pixel, exists, 0.0)
    for start in range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        known = channel < channels
        valid = known[:, None] & exists[None, :]
        element = tile_elements(channel, place, channel_stride)
        grad = tl.load(grad_output + element, valid, 0.0).to(tl.float32) * scale[None, :]
        if POOL:
            x = tl.load(input + element, valid, 0.0).to(tl.float32)
            grad += tl.where(x == maximum[None, :], through_maximum[None, :], 0.0) + (through_mean / channels)[None, :]
        else:
            for tap in tl.range(0, K * K, loop_unroll_factor=K):
                inside, step = _beside(pixel, tap, -1, height, width, K)
                value = tl.load(grad_logits + index + step, exists & inside, 0.0)
                grad += tl.load(weight + channel * K * K + tap, known, 0.0).to(tl.float32)[:, None] * value[None, :]
        tl.store(grad_input + element, narrow(grad, grad_input.dtype.element_ty), valid)


@triton.jit
def spatial_attention_backward_weight_kernel(
    source,  # [N, C, H, W], or [N, 2, H, W] float32
    grad_logits,  # [N, H, W] float32
    grad_weights,  # [parts, C or 2, TAPS] float32
    part_pixels,
    height, width, channels, count, image_pixels, image_elements, channel_stride, pixel_stride,
    K: tl.constexpr, TAPS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, WIDE: tl.constexpr,
    AXIS: tl.constexpr,
):  # fmt: skip
    """grad_weight[c, tap] = sum over pixels of source[c] at (tap - centre) * grad_logits, over a part of the pixels."""
    channel = tl.program_id(1 - AXIS) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < channels
    taps = tl.arange(0, TAPS)[None, :]
    sums = tl.zeros([BLOCK_C, TAPS], tl.float32)
    first = tl.program_id(AXIS).to(tl.int64 if WIDE else tl.int32) * part_pixels
    for start in range(0, part_pixels, BLOCK_P):
        index = first + start + tl.arange(0, BLOCK_P)
        exists, pixel, place = pixel_elements(index, count, image_pixels, image_elements, pixel_stride, WIDE)
        grad = tl.load(grad_logits + index, exists, 0.0)
        for tap in range(K * K):
            inside, step = _beside(pixel, tap, 1, height, width, K)
            element = tile_elements(channel, place + step * pixel_stride, channel_stride)
            value = tl.load(source + element, known[:, None] & (exists & inside)[None, :], 0.0).to(tl.float32)
            sums += tl.where(taps == tap, tl.sum(value * grad[None, :], 1)[:, None], 0.0)
    row = (tl.program_id(AXIS) * channels + channel)[:, None] * TAPS + taps
    tl.store(grad_weights + row, sums, known[:, None] & (taps < TAPS))


def _blocks(image: Tensor) -> Tiles:
    """Tiles of some channels of a few pixels: their program goes through all channels."""
    layout = tiles(image)
    if image.is_contiguous():
        block_p = power_of_2(layout.total, 16, 128)
        return layout._replace(block_p=block_p, block_c=power_of_2(layout.channels, 1, 1024 // block_p))
    return layout


def _pixel_grid(layout: Tiles) -> tuple[int]:
    return (ceil_div(layout.total, layout.block_p),)


def _pooled(input: Tensor, layout: Tiles) -> Tensor:
    """Maximum and mean over the channels, [N, 2, H, W]."""
    source = torch.empty(input.shape[0], 2, *input.shape[2:], dtype=torch.float32, device=input.device)
    launch(spatial_attention_pool_kernel, _pixel_grid(layout), input, source, *layout.sizes, **layout.constants)
    return source


def spatial_attention_forward_triton(input: Tensor, weight: Tensor, bias: Tensor | None, mode: str) -> Tensor:
    """[N, C, H, W]; arguments as in `cellops.spatial_attention`."""
    output, pool = torch.empty_like(input), mode == "pool"
    for images in chunks(input) if pool else [slice(0, input.shape[0])]:
        layout = _blocks(input[images])
        source = _pooled(input[images], layout) if pool else None
        tensors = (input[images], source, weight, bias, output[images])
        constants = {"K": weight.shape[2], "POOL": pool, **layout.constants}
        grid = _pixel_grid(layout)
        launch(spatial_attention_forward_kernel, grid, *tensors, *input.shape[2:], *layout.sizes, **constants)
    return output


def spatial_attention_backward_triton(
    grad_output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, mode: str, wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients to the three tensors; the maximum's goes in equal shares to the channels that reach it."""
    layout, pool = _blocks(input), mode == "pool"
    source = _pooled(input, layout) if pool else None
    maps = input.new_empty(3, *input.shape[:1], *input.shape[2:], dtype=torch.float32)
    scales, grad_logits, ties = maps[0], maps[1], maps[2] if pool else None
    constants: dict[str, Any] = {"K": weight.shape[2], "POOL": pool, **layout.constants}
    sizes, grid = (*input.shape[2:], *layout.sizes), _pixel_grid(layout)
    tensors = (grad_output, input, source, weight, bias, scales, grad_logits, ties)
    launch(spatial_attention_backward_logits_kernel, grid, *tensors, *sizes, **constants)
    grad_input = grad_weight = None
    if wanted[0]:
        grad_input = torch.empty_like(input)
        tensors = (grad_output, input, source, weight, scales, grad_logits, ties, grad_input)
        launch(spatial_attention_backward_input_kernel, grid, *tensors, *sizes, **constants)
    if wanted[1]:
        grad_weight = _grad_weight(input if source is None else source, grad_logits, weight.shape[2])
    return grad_input, grad_weight, None if bias is None else grad_logits.sum()


def _grad_weight(source: Tensor, grad_logits: Tensor, kernel: int) -> Tensor:
    layout, taps = tiles(source), power_of_2(kernel * kernel)
    grad_weights = source.new_empty(layout.parts, layout.channels, taps, dtype=torch.float32)
    arguments = (source, grad_logits, grad_weights, layout.part_pixels, *source.shape[2:], *layout.sizes)
    constants = {"K": kernel, "TAPS": taps, **layout.constants}
    launch(spatial_attention_backward_weight_kernel, layout.part_grid, *arguments, **constants)
    return grad_weights.sum(0)[:, : kernel * kernel]
